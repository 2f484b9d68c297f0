"""Model folders: `save` and `load`; and the pretrained ones among them, which come with the library.

A folder holds config.json (name, options, tasks, code version) and model.safetensors. A pretrained model is such a
folder in `weights/`, named `<model>.<tag>` after the architecture and what it was trained on; SHA256SUMS beside them
lists the checksum of every weights file.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_mtl import __version__, sparse
from moe_mtl.registry import create_model
from moe_mtl.tasks import Task, check_tasks, nearest

CONFIG, WEIGHTS, CHECKSUMS = "config.json", "model.safetensors", "SHA256SUMS"
HALF = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


# ---- writing and reading folders ------------------------------------------------------------------------------------


def save(model: nn.Module, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Path:
    """Writes a model made by `create_model` (or extracted from one) so that `load` builds it again.

    The weights file carries the configuration too, and `load` goes by that: config.json is the copy for people. So one
    file, moved into place when it is complete, decides, and an interrupted save leaves the model that was there or the
    whole new one.

    Args:
        model: what to write.
        folder: made when missing.
        dtype: float16 or bfloat16 to store floating point tensors in, at half the size; the model's own when None.
            `load` gives float32 either way.

    Raises:
        ValueError: the model was not made by `create_model`, so its architecture cannot be named; or a weight is too
            large for the dtype.
    """
    if dtype is not None and dtype not in HALF:
        raise ValueError(f"dtype: got {dtype}, expected {' or '.join(map(str, HALF))}, or None for the model's own")
    model = getattr(model, "_orig_mod", model)  # a compiled model wraps the one that has a name
    if not hasattr(model, "config"):
        raise ValueError(f"model: a {type(model).__name__} without `config`; only models of create_model can be saved")
    named: Any = model
    folder = Path(folder)
    config = {**named.config, "tasks": [task.to_dict() for task in named.tasks], "moe_mtl": __version__}
    # copies: tied weights, such as T5's embeddings, share memory, which the format refuses
    weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    if dtype is not None:
        config["dtype"] = HALF[dtype]
        weights = {name: _in_half(name, tensor, dtype) for name, tensor in weights.items()}
    text = json.dumps(config, indent=2)  # before anything is written: a config that is not JSON fails here
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / WEIGHTS, lambda path: save_file(weights, path, metadata={"format": "pt", CONFIG: text}))
    replace_file(folder / CONFIG, lambda path: path.write_text(text + "\n"))
    return folder


def load(folder: str | os.PathLike[str]) -> nn.Module:
    """The model that `save` wrote, in evaluation mode and float32 whatever the precision of the file.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: the files are truncated or belong to another architecture; nothing half-loaded is returned.
    """
    folder = Path(folder)
    config, where = read_config(folder)
    try:
        tasks = [Task.from_dict(task) for task in config["tasks"]]
        model: Any = create_model(config["name"], tasks=tasks, **config["args"])
        if "kept_experts" in config:  # it was pruned: fewer experts than its options say
            sparse.keep_experts(model, config["kept_experts"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"folder: {where} holds no model configuration ({error!r})") from error
    load_weights(model, folder / WEIGHTS)
    return model.eval()


def read_config(folder: Path) -> tuple[dict[str, Any], Path]:
    """What `save` wrote about a model, and the file that says it: the weights, or config.json for weights without it.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: the weights are truncated, or the configuration is not JSON.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"folder: {folder} holds no {name}; expected a folder written by moe_mtl.save")
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(CONFIG)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error})") from error
    where = path if text is not None else folder / CONFIG
    try:
        config = json.loads(where.read_text() if text is None else text)
    except ValueError as error:
        raise ValueError(f"folder: {where} holds no model configuration ({error!r})") from error
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
    problems = [f"missing {name}" for name in state.keys() - found.keys()]
    problems += [f"unexpected {name}" for name in found.keys() - state.keys()]
    problems += [
        f"{name} is {list(found[name].shape)}, expected {list(state[name].shape)}"
        for name in state.keys() & found.keys()
        if found[name].shape != state[name].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{path} holds the weights of another architecture: {shown}")
    model.load_state_dict(found)


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


# ---- pretrained models ----------------------------------------------------------------------------------------------


def weights_root() -> Path:
    """The folder of the pretrained models: `weights/` of a checkout, `moe_mtl/weights/` of an installed library."""
    return Path(next(iter(import_module("moe_mtl.weights").__path__)))


def list_pretrained() -> list[str]:
    """Names `<model>.<tag>` of the pretrained models, sorted."""
    named = (path for path in weights_root().iterdir() if "." in path.name and not path.name.startswith("."))
    return sorted(path.name for path in named if _is_model(path))


def find(name: str | os.PathLike[str]) -> Path:
    """The folder of a model: a model folder itself, or that of a pretrained name.

    Args:
        name: a folder; `<model>.<tag>`; or `<model>`, for the first of its tags. A folder wins over a name.

    Raises:
        FileNotFoundError: there is neither; the nearest names are listed.
    """
    folder = Path(name)
    if _is_model(folder):
        return folder
    if folder.is_dir():
        missing = " and no ".join(file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file())
        raise FileNotFoundError(f"{folder} holds no {missing}; expected a folder written by train.py or moe_mtl.save")
    if full := _full_name(os.fspath(name)):
        return weights_root() / full
    raise FileNotFoundError(
        f"{folder} is not a folder; expected a folder written by train.py or moe_mtl.save, or a pretrained model: "
        f"{nearest(os.fspath(name), list_pretrained())}"
    )


def pretrained_folder(name: str) -> Path:
    """The folder of a pretrained model.

    Args:
        name: `<model>.<tag>`, or `<model>` for the first of its tags.

    Raises:
        ValueError: there are no weights of that name; the nearest are listed.
    """
    if full := _full_name(name):
        return weights_root() / full
    raise ValueError(
        f"name: no pretrained weights {name!r} (folders are for moe_mtl.load); {nearest(name, list_pretrained())}"
    )


def load_pretrained(name: str, tasks: Sequence[Task | str] | str | None = None) -> nn.Module:
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
    model: Any = load(folder)
    if tasks is None:
        return model
    own = {task.name: task for task in model.tasks}
    names = []
    for task in [tasks] if isinstance(tasks, str) else tasks:
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


def check_sha256(folder: Path) -> None:
    """Compares the weights of a pretrained folder with SHA256SUMS beside it.

    Raises:
        ValueError: no line for this file, or it is another file.
    """
    sums, name = folder.parent / CHECKSUMS, f"{folder.name}/{WEIGHTS}"
    expected = read_checksums(sums).get(name)
    if expected is None:
        raise ValueError(f"{sums} has no line for {name}; install moe_mtl again, or load the folder with moe_mtl.load")
    found = sha256(folder / WEIGHTS)
    if found != expected:
        raise ValueError(
            f"{folder / WEIGHTS} is not the published file: its sha256 is {found}, {sums.name} says {expected}; it is "
            "damaged or was changed, install moe_mtl again"
        )


def sha256(path: Path) -> str:
    """The checksum of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checksums(path: Path) -> dict[str, str]:
    """File name to checksum, from lines as `sha256sum` writes them; none where there is no such file.

    Raises:
        ValueError: a line is something else.
    """
    sums = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name:
            raise ValueError(f"{path}: {line!r} is not a line of sha256sum")
        sums[name] = digest
    return sums


def _full_name(name: str) -> str | None:
    """`<model>.<tag>` of a pretrained name, None where there is no such model."""
    return next((full for full in list_pretrained() if name in (full, full.partition(".")[0])), None)


def _is_model(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (CONFIG, WEIGHTS))
