"""Models by name: `register_model`, `create_model`, `list_models`. The one mutable global of the library.

A name is `<family>_<size>[_<distinguishing facts>]`, the name of the function that builds it in `models/`. Pretrained
weights are named `<model>.<tag>`; the tag says what they were trained on.
"""

import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from fnmatch import fnmatch
from typing import Any, TypeVar

from torch import nn

from moe_mtl.tasks import Task, check_tasks, nearest

Config = TypeVar("Config")

_MODELS: dict[str, Callable[..., nn.Module]] = {}


def register_model(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Decorator: makes `build(tasks, **overrides)` available under its own name.

    Raises:
        ValueError: the name is taken, usually because a file was imported under two names.
    """
    if build.__name__ in _MODELS:
        raise ValueError(f"model {build.__name__!r} is already registered by {_MODELS[build.__name__].__module__}")
    _MODELS[build.__name__] = build
    return build


def _load_families() -> None:
    package = importlib.import_module("moe_mtl.models")
    for found in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"moe_mtl.models.{found.name}")


def list_models(pattern: str = "*", pretrained: bool = False) -> list[str]:
    """Names of all models that match a wildcard pattern, sorted.

    Args:
        pattern: for the whole name; with `pretrained` one for the part before the tag will do.
        pretrained: list the weights that come with the library instead, as `<model>.<tag>`.
    """
    if not pretrained:
        _load_families()
        return sorted(name for name in _MODELS if fnmatch(name, pattern))
    from moe_mtl import hub  # late: it builds what it loads with this module

    names = hub.list_pretrained()
    return [name for name in names if fnmatch(name, pattern) or fnmatch(name.partition(".")[0], pattern)]


def create_model(
    name: str, *, tasks: Sequence[Task | str] | str | None = None, pretrained: bool = False, **overrides: Any
) -> nn.Module:
    """Builds a model, with fresh weights or those that come with the library.

    Args:
        name: one of `list_models()`; or one of `list_models(pretrained=True)`, for the options of that model.
        tasks: what it predicts. With pretrained weights None stands for all tasks they were trained on, and names (or
            `Task`s) choose some of these, which are extracted.
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
        config, _ = hub.read_config(hub.pretrained_folder(f"{name}.{tag}"))
        overrides = {**config["args"], **overrides}
    known = list_models()
    if name not in _MODELS:
        raise ValueError(f"name: unknown model {name!r}; {nearest(name, known)}")
    if tasks is None:
        raise ValueError(
            f"tasks: fresh weights of {name!r} need to know what to predict; pass a list of Task, for example "
            "[Task.depth()], or pretrained=True for the tasks of trained weights"
        )
    wanted: Any = [tasks] if isinstance(tasks, str) else tasks
    model: Any = _MODELS[name](check_tasks(wanted), **overrides)
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
