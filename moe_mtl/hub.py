"""Model folders: `save` and `load`.

A folder holds config.json (name, options, tasks, code version) and model.safetensors.
"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_mtl import __version__
from moe_mtl.registry import create_model
from moe_mtl.tasks import Task

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Writes a model made by `create_model` (or extracted from one) so that `load` builds it again.

    The weights file carries the configuration too, and `load` goes by that: config.json is the copy for people. So one
    file, moved into place when it is complete, decides, and an interrupted save leaves the model that was there or the
    whole new one.

    Raises:
        ValueError: the model was not made by `create_model`, so its architecture cannot be named.
    """
    model = getattr(model, "_orig_mod", model)  # a compiled model wraps the one that has a name
    if not hasattr(model, "config"):
        raise ValueError(f"model: a {type(model).__name__} without `config`; only models of create_model can be saved")
    named: Any = model
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**named.config, "tasks": [task.to_dict() for task in named.tasks], "moe_mtl": __version__}
    weights = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
    text = json.dumps(config, indent=2)  # before anything is written: a config that is not JSON fails here
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
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"folder: {folder} holds no {name}; expected a folder written by moe_mtl.save")
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(CONFIG)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error})") from error
    try:
        config = json.loads((folder / CONFIG).read_text() if text is None else text)
        tasks = [Task.from_dict(task) for task in config["tasks"]]
        model = create_model(config["name"], tasks=tasks, **config["args"])
    except (KeyError, TypeError, ValueError) as error:
        where = path if text is not None else folder / CONFIG
        raise ValueError(f"folder: {where} holds no model configuration ({error!r})") from error
    load_weights(model, path)
    return model.eval()


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
