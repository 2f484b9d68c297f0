"""Model folders and the hub: `save`, `load`, `push`.

A folder holds config.json (name, options, tasks, code version), model.safetensors and README.md, the card. A pretrained
model of the library is such a folder, see `moe_mtl.pretrained`; a repository on the hub holds the same files.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_mtl import __version__, sparse
from moe_mtl.experts import shapes_only
from moe_mtl.folded import fold_layers
from moe_mtl.folder_card import folder_card, is_own
from moe_mtl.images import write_colours
from moe_mtl.locate import CARD, HUB_ID, find
from moe_mtl.pretrained import CONFIG, WEIGHTS, check_sha256, missing_files, pretrained_folder
from moe_mtl.registry import create_model
from moe_mtl.tasks import Task, check_tasks, nearest

HALF = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
) -> Path:
    """Writes a model made by `create_model` or `moefy` (or extracted from one) so that `load` builds it again.

    The weights file carries the configuration too, and `load` goes by that: config.json is the copy for people. So one
    file, moved into place when all are complete, decides, and an interrupted save leaves the model that was there or
    the whole new one. README.md, the card, replaces one that `save` wrote; one that a person wrote or edited stays.

    Args:
        model: what to write.
        folder: made when missing.
        dtype: float16 or bfloat16 to store floating point tensors in, at half the size; the model's own when None.
            `load` gives float32 either way.
        tokenizer: of transformers, of a model of texts; written beside it, where `moe_mtl.Predictor` finds it.

    Raises:
        ValueError: the model was not made by `create_model`, so its architecture cannot be named, or was changed by
            hand, so that `load` would refuse its weights; a weight is too large for the dtype; or a tokenizer that is
            none, or of a model that reads no texts.
        OSError: the folder cannot be written to, or the disk is full; what it held is unchanged.
    """
    if dtype is not None and dtype not in HALF:
        raise ValueError(f"dtype: got {dtype}, expected {' or '.join(map(str, HALF))}, or None for the model's own")
    reads = getattr(model, "input", None)
    if tokenizer is not None and not (hasattr(tokenizer, "save_pretrained") and reads == "text"):
        raise ValueError(
            f"tokenizer: got {type(tokenizer).__name__} for a model whose input is {reads!r}; expected a tokenizer of "
            "transformers, and that only for a model of texts"
        )
    model = getattr(model, "_orig_mod", model)  # a compiled model wraps the one that has a name
    named: Any = model
    if not isinstance(getattr(model, "config", None), dict):
        why = getattr(model, "unnamed", "only models of create_model and moefy can be saved")
        raise ValueError(f"model: a {type(model).__name__} without a `config` that names its architecture; {why}")
    folder = Path(folder)
    config = {**named.config, "tasks": [task.to_dict() for task in named.tasks], "moe_mtl": __version__}
    if isinstance(config.get("args"), dict):
        write_colours(model, args := dict(config["args"]))
        config["args"] = args
    if hasattr(model, "extraction"):
        config["extraction"] = asdict(named.extraction)
    if dtype is not None:
        config["dtype"] = HALF[dtype]
    text = json.dumps(config, indent=2)  # before anything is written: a config that is not JSON fails here
    state = model.state_dict()
    _check_built(state, json.loads(text), folder / WEIGHTS)  # its memory is free again before weights are copied
    # copies: tied weights, such as T5's embeddings, share memory, which the format refuses
    weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    if dtype is not None:
        weights = {name: _in_half(name, tensor, dtype) for name, tensor in weights.items()}
    with replacing(folder) as new:
        save_file(weights, new / WEIGHTS, metadata={"format": "pt", CONFIG: text})
        (new / CONFIG).write_text(text + "\n")
        shutil.copymode(new / CONFIG, new / WEIGHTS)  # safetensors lets nobody but the owner read
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        card = folder / CARD
        if not card.exists() or is_own(card.read_text(encoding="utf-8", errors="replace")):
            (new / CARD).write_text(folder_card(model, config, new / WEIGHTS), encoding="utf-8")
    return folder


def load(source: str | os.PathLike[str], revision: str | None = None) -> nn.Module:
    """A model that `save` wrote, in evaluation mode and float32 whatever the precision of the file.

    Args:
        source: looked for in this order: a folder; a pretrained model of the library, `<model>.<tag>`, whose sha256 is
            checked; a model on the hub, `owner/name`, of which only the files of a model folder are downloaded.
        revision: branch, tag or commit on the hub.

    Raises:
        FileNotFoundError: there is none of these, or the folder lacks a file; the nearest names are listed.
        ConnectionError: it can only be on the hub, which could not be reached.
        ValueError: the files are truncated or belong to another architecture, nothing half-loaded is returned; or a
            revision of what has none.
    """
    return _read(find(source, revision))


def push(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
    tokenizer: Any = None,
    **upload: Any,
) -> str:
    """Sends a model to the Hugging Face hub, in one commit; `load(repo_id)` gives it back.

    What `save` writes is what is sent. A README.md there that a person wrote or edited stays.

    Args:
        model: what to send.
        repo_id: `owner/name`, or `name` for your own; made when missing.
        private: whether a new repository is private; None for the default of its owner.
        revision: branch to commit to, made when missing; None for the main branch.
        commit_message: None for the default of the hub's client.
        token: of the hub; None for the one its client has stored.
        tokenizer: as in `save`.
        **upload: further options of `huggingface_hub.HfApi.upload_folder`.

    Returns:
        The address of the commit.

    Raises:
        ValueError: the model cannot be saved, and nothing was sent; or `repo_id` is no name of a repository.
    """
    if not HUB_ID.fullmatch(repo_id if "/" in repo_id else f"me/{repo_id}"):
        raise ValueError(f"repo_id: got {repo_id!r}, expected 'owner/name' of letters, digits, '-', '_' and '.'")
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as temporary:
        folder = save(model, Path(temporary) / "model", tokenizer=tokenizer)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if api.file_exists(repo_id, CARD, revision=revision):
            there = Path(api.hf_hub_download(repo_id, CARD, revision=revision))
            if not is_own(there.read_text(encoding="utf-8", errors="replace")):
                (folder / CARD).unlink()
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message, **upload
        )


def load_pretrained(name: str, tasks: Sequence[Task | str] | Task | str | None = None) -> nn.Module:
    """A pretrained model, in evaluation mode and float32, once the checksum of its file has been found right.

    Args:
        name: `<model>.<tag>`, or `<model>` for the first of its tags.
        tasks: which of its tasks to extract, names or equal `Task`s; None for the whole model.

    Raises:
        FileNotFoundError: the folder lacks a file.
        ValueError: no such weights; a file that is not the one SHA256SUMS lists; a task the model was not trained on.
    """
    folder = pretrained_folder(name)
    check_sha256(folder)
    model: Any = _read(folder)
    if tasks is None:
        return model
    own = {task.name: task for task in model.tasks}
    names = []
    for task in [tasks] if isinstance(tasks, Task | str) else tasks:
        wanted = task if isinstance(task, str) else check_tasks([task])[0].name
        if wanted not in own:
            raise ValueError(
                f"tasks: {folder.name} was not trained on {wanted!r}; {nearest(wanted, own)}. Fresh weights for other "
                "tasks: pretrained=False"
            )
        if not isinstance(task, str) and task != own[wanted]:
            raise ValueError(
                f"tasks: {folder.name} was trained on another {wanted!r} task, {own[wanted]}; got {task}. "
                f"Pass the name {wanted!r} to take it as it is"
            )
        names.append(wanted)
    return sparse.extract(model, names)


# ---- the files of a folder ------------------------------------------------------------------------------------------


def _read(folder: Path) -> nn.Module:
    """The model of a folder, see `load`."""
    config, where = read_config(folder)
    model = build(config, where)
    load_weights(model, folder / WEIGHTS)
    if read_config(folder)[0] != config:
        raise ValueError(f"folder: another model was saved into {folder} while it was read; load it again")
    return model.eval()


def build(config: Mapping[str, Any], where: Path) -> nn.Module:
    """The model of a configuration, with fresh weights and the experts that are left of it.

    Args:
        config: what `read_config` found.
        where: the file that says it, for messages.

    Raises:
        ValueError: it is not what `save` writes.
    """
    if "model_type" in config:
        raise ValueError(
            f"folder: {where.parent} holds a {config['model_type']!r} model of transformers; use its "
            "AutoModel.from_pretrained (for 'moe_mtl' after `import moe_mtl.backbones.hf_model`)"
        )
    try:
        tasks = [Task.from_dict(task) for task in config["tasks"]]
        model: Any = create_model(config["name"], tasks=tasks, **config["args"])
        if "kept_experts" in config:  # it was pruned: fewer experts than its options say
            sparse.keep_experts(model, config["kept_experts"])
        if "extraction" in config:
            from moe_mtl.pruning import Pruning  # late: metrics take a second to import

            kind = Pruning if "by" in config["extraction"] else sparse.Extraction
            model.extraction = kind.from_dict(config["extraction"])
        if "folded" in config:  # a task's own: gates that decided nothing are part of the weights
            fold_layers(model, config["folded"])
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        written = config.get("moe_mtl", "another version")
        by = "" if written == __version__ else f"; it was written by moe_mtl {written}, this is {__version__}"
        raise ValueError(f"folder: {where} holds no model configuration ({error!r}){by}") from error
    return model


def read_config(folder: Path) -> tuple[dict[str, Any], Path]:
    """What `save` wrote about a model, and the file that says it: the weights, or config.json for weights without it.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: the weights are truncated, or the configuration is no JSON object.
    """
    if missing := missing_files(folder):
        raise FileNotFoundError(f"folder: {folder} holds no {missing[0]}; expected a folder written by moe_mtl.save")
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(CONFIG)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error})") from error
    where = path if text is not None else folder / CONFIG
    try:
        config = json.loads(where.read_text(encoding="utf-8") if text is None else text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"folder: {where} holds no model configuration ({error!r})") from error
    if not isinstance(config, dict):
        raise ValueError(f"folder: {where} holds no model configuration, but a {type(config).__name__}")
    return config, where


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Fills a model from a safetensors file that holds exactly its tensors, or changes nothing.

    Raises:
        ValueError: the file is truncated, or names or shapes differ; the differences are listed.
    """
    state = model.state_dict()
    try:
        with safe_open(path, framework="pt") as file:
            found: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error})") from error
    check_shapes({name: t.shape for name, t in found.items()}, {name: t.shape for name, t in state.items()}, path)
    model.load_state_dict(found)


def _check_built(weights: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> None:
    """Refuses weights that are not those of the model `load` will build. All random generators stay as they are.

    Raises:
        ValueError: names or shapes differ; the differences are listed.
    """
    try:
        with torch.random.fork_rng(devices=[]), shapes_only():
            expected = build(config, path).state_dict()
        check_shapes({n: t.shape for n, t in weights.items()}, {n: t.shape for n, t in expected.items()}, path)
    except ValueError as error:
        raise ValueError(
            f"model: was changed since it was made, and `load` would not take it: {error}. Modules must be those that "
            "create_model makes; of a compiled or wrapped one save what is inside"
        ) from error


def check_shapes(
    found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], path: str | os.PathLike[str]
) -> None:
    """Compares the shapes of a file's tensors, by name, with a model's.

    Raises:
        ValueError: names or shapes differ; the differences are listed.
    """
    problems = [f"missing {name}" for name in expected.keys() - found.keys()]
    problems += [f"unexpected {name}" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} is {list(found[name])}, expected {list(expected[name])}"
        for name in expected.keys() & found.keys()
        if list(found[name]) != list(expected[name])
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{path} holds the weights of another architecture: {shown}")


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move into a model folder once all of them are complete and on disk.

    The weights alone decide which model the folder holds. They move first where it holds one, and last where it holds
    none yet, so that a folder with weights lacks nothing. Other files of the folder stay.

    Raises:
        OSError: nothing could be written, or not all of it; what the folder held is unchanged.
    """
    made, moved, new = not folder.exists(), False, None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=".unfinished_", dir=folder))
        yield new
        first = (folder / WEIGHTS).exists()
        paths = sorted(new.iterdir(), key=lambda path: ((path.name == WEIGHTS) != first, path.name))
        for path in paths:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        for path in paths:
            os.replace(path, folder / path.name)
            moved = moved or path.name == WEIGHTS
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own
        left = "the new weights are in place, not all other files" if moved else "what it held is unchanged"
        message = f"folder: could not write the model to {folder} ({error}); {left}. Free space, or name another folder"
        code = getattr(error, "errno", None)
        raise (OSError(message) if code is None else OSError(code, message)) from error
    finally:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def replace_file(path: Path, write) -> None:
    """Writes a file through `write(temporary path)` and moves it into place once it is complete and on disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _in_half(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating point tensor in another type, others as they are; refused where a finite value becomes infinite."""
    if not tensor.is_floating_point():
        return tensor
    half = tensor.to(dtype)
    if lost := int((half.isinf() & tensor.isfinite()).sum()):
        largest = float(tensor[tensor.isfinite()].abs().max())
        raise ValueError(
            f"dtype: {lost} values of {name} do not fit {dtype} (up to {largest:.3g}, it ends at "
            f"{torch.finfo(dtype).max:.3g}); save in bfloat16 or without dtype"
        )
    return half
