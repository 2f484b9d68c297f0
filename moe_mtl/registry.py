"""Models by name: `register_model`, `create_model`, `list_models`. The one mutable global of the library.

A name is `<family>_<size>[_<distinguishing facts>]`, the name of the function that builds it in `models/`. Pretrained
weights are named `<model>.<tag>`; the tag says what they were trained on.
"""

import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from functools import cache
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from moe_mtl.pretrained import WEIGHTS, count_weights, list_pretrained, pretrained_folder
from moe_mtl.tasks import DENSE_KINDS, KINDS, Task, check_tasks, nearest

Config = TypeVar("Config")
Build = TypeVar("Build", bound=Callable[..., nn.Module])
Modality = Literal["image", "table", "text"]

VECTOR_KINDS = ("binary", "classification", "multilabel", "regression")  # of a whole sample
MODALITIES: dict[str, tuple[str, ...]] = {  # what a model takes -> the kinds of task such models predict
    "image": (*VECTOR_KINDS, *sorted(DENSE_KINDS)),
    "table": VECTOR_KINDS,
    "text": (*VECTOR_KINDS, "tagging"),
}


@dataclass(frozen=True)
class Architecture:
    """A registered model.

    Attributes:
        build: (tasks, **overrides) to the model.
        modality: what it takes, the key of a batch: "image", "table" or "text".
        kinds: the kinds of task it can predict.
    """

    build: Callable[..., nn.Module]
    modality: str
    kinds: tuple[str, ...]


_MODELS: dict[str, Architecture] = {}


def register_model(*, modality: Modality, kinds: Sequence[str] | None = None) -> Callable[[Build], Build]:
    """Decorator: makes `build(tasks, **overrides)` available under its own name.

    Args:
        modality: what the model takes.
        kinds: the kinds of task it can predict; those of its modality when None.

    Raises:
        ValueError: the name is taken, usually because a file was imported under two names; or an unknown modality
            or kind.
    """
    _check_known("modality", modality, MODALITIES)
    for kind in kinds or ():
        _check_known("kinds", kind, KINDS)

    def register(build: Build) -> Build:
        name = build.__name__
        if name in _MODELS:
            raise ValueError(f"model {name!r} is already registered by {_MODELS[name].build.__module__}")
        _MODELS[name] = Architecture(build, modality, tuple(MODALITIES[modality] if kinds is None else kinds))
        return build

    return register


def _load_families() -> None:
    package = importlib.import_module("moe_mtl.models")
    for found in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"moe_mtl.models.{found.name}")


def summary(name: str) -> str:
    """The first sentence of what is said about a model of `list_models()`, without its full stop."""
    _load_families()
    return (inspect.getdoc(_MODELS[name].build) or "").partition("\n")[0].removesuffix(".")


def list_models(
    pattern: str = "*",
    *,
    pretrained: bool = False,
    modality: Modality | None = None,
    kind: str | Sequence[str] | None = None,
    max_params: int | None = None,
) -> list[str]:
    """Names of the models that fit all that is asked for, sorted.

    Args:
        pattern: a wildcard pattern for the whole name; with `pretrained` one for the part before the tag will do.
        pretrained: list the weights that come with the library, as `<model>.<tag>`, instead of architectures.
        modality: what the model takes: "image", "table" or "text".
        kind: a kind of task, see `moe_mtl.tasks`, or several: architectures that can predict tasks of all of them;
            weights that were trained on a task of each.
        max_params: the most parameters. Of weights all in their file count. An architecture counts with its default
            options and one task, each further one adding its head and routers; one whose size only its data or its
            encoder decides, as for tables and texts, has none and is left out.

    Raises:
        ValueError: an unknown modality or kind, the nearest are listed; or `max_params` below 1.
    """
    if modality is not None:
        _check_known("modality", modality, MODALITIES)
    kinds = () if kind is None else (kind,) if isinstance(kind, str) else tuple(kind)
    for one in kinds:
        _check_known("kind", one, KINDS)
    if max_params is not None and max_params < 1:
        raise ValueError(f"max_params: got {max_params}, expected at least 1")
    if not pretrained or modality is not None:
        _load_families()
    found = []
    for name in list_pretrained() if pretrained else sorted(_MODELS):
        architecture = name.partition(".")[0]
        if not (fnmatch(name, pattern) or (pretrained and fnmatch(architecture, pattern))):
            continue
        if modality is not None and modality != _known(architecture).modality:
            continue
        if not set(kinds) <= set(_trained_kinds(name) if pretrained else _known(architecture).kinds):
            continue
        if max_params is not None:
            size = count_weights(pretrained_folder(name) / WEIGHTS) if pretrained else _default_size(architecture)
            if size is None or size > max_params:
                continue
        found.append(name)
    return found


def _check_known(argument: str, value: str, known: Iterable[str]) -> None:
    if value not in (names := tuple(known)):
        raise ValueError(f"{argument}: unknown {value!r}; {nearest(str(value), names)}")


def _known(name: str) -> Architecture:
    if name not in _MODELS:
        raise ValueError(f"name: unknown model {name!r}; {nearest(name, _MODELS)}")
    return _MODELS[name]


def _trained_kinds(name: str) -> set[str]:
    """The kinds of task that pretrained weights were trained on."""
    from moe_mtl import hub  # late: it builds what it loads with this module

    config, _ = hub.read_config(pretrained_folder(name))
    return {task["kind"] for task in config["tasks"]}


@cache
def _default_size(name: str) -> int | None:
    """The parameters of an architecture with its default options and one task; None where these do not suffice."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):  # shapes without numbers
            model = _MODELS[name].build((Task.binary("task"),))
    except ValueError:
        return None
    return sum(p.numel() for p in model.parameters())


def create_model(
    name: str, *, tasks: Sequence[Task | str] | Task | str | None = None, pretrained: bool = False, **overrides: Any
) -> nn.Module:
    """Builds a model, with fresh weights or those that come with the library.

    Args:
        name: one of `list_models()`; or one of `list_models(pretrained=True)`, for the options of that model.
        tasks: what it predicts, one or several. With pretrained weights None stands for all tasks they were trained on,
            and names (or `Task`s) choose some of these, which are extracted.
        pretrained: load the weights `<model>.<tag>`; for a name without a tag, those of the model's first tag. The
            file's sha256 is checked before it is read.
        **overrides: anything the model's function takes, for example `depth=4`; not with pretrained weights.

    Returns:
        The model; `model.config` holds the name and every option with its value, so that a saved model does not depend
        on later defaults. A pretrained one is in evaluation mode and float32.

    Raises:
        ValueError: unknown name or override, the nearest valid ones are listed; no tasks for fresh weights; or, with
            pretrained weights, an override, a task they were not trained on, a damaged file.
    """
    from moe_mtl import hub

    if pretrained:
        if overrides:
            raise ValueError(
                f"pretrained: the weights of {name!r} fix its options, got {', '.join(overrides)}; leave them out, or "
                "pass pretrained=False for fresh weights"
            )
        return hub.load_pretrained(name, tasks)
    name, _, tag = name.partition(".")
    if tag:
        config, _ = hub.read_config(pretrained_folder(f"{name}.{tag}"))
        overrides = {**config["args"], **overrides}
    _load_families()
    architecture = _known(name)
    if tasks is None:
        raise ValueError(
            f"tasks: fresh weights of {name!r} need to know what to predict; pass a list of Task, for example "
            "[Task.depth()], or pretrained=True for the tasks of trained weights"
        )
    wanted: Any = [tasks] if isinstance(tasks, Task | str) else tasks
    model: Any = architecture.build(check_tasks(wanted), **overrides)
    try:
        args = json.loads(json.dumps(getattr(model, "options", overrides)))
    except TypeError as error:
        raise ValueError(f"{name}: its options must be plain data, to be saved ({error}); got {overrides}") from error
    model.config = {"name": name, "args": args}
    return model


def configure(config_class: type[Config], defaults: Mapping[str, Any], overrides: Mapping[str, Any]) -> Config:
    """A variant's configuration: its defaults with the caller's overrides.

    Raises:
        ValueError: an override that is no field of the dataclass; the nearest fields are listed.
    """
    known = [field.name for field in fields(config_class)]  # type: ignore[arg-type]
    for option in overrides:
        if option not in known:
            raise ValueError(f"{option}: no such model option; {nearest(option, known)}")
    return config_class(**{**defaults, **overrides})
