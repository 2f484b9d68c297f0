"""Models by name: `register_model`, `create_model`, `list_models`. The one mutable global of the library.

A name is `<family>_<size>[_<distinguishing facts>]`, the name of the function that builds it in `models/`.
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


def list_models(pattern: str = "*") -> list[str]:
    """Names of all models that match a wildcard pattern, sorted."""
    _load_families()
    return sorted(name for name in _MODELS if fnmatch(name, pattern))


def create_model(name: str, *, tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """Builds a model with fresh weights.

    Args:
        name: one of `list_models()`.
        tasks: what it predicts.
        **overrides: anything the model's function takes, for example `depth=4`.

    Returns:
        The model; `model.config` holds the name and every option with its value, so that a saved model does not depend
        on later defaults.

    Raises:
        ValueError: unknown name or override; the nearest valid ones are listed.
    """
    known = list_models()
    if name not in _MODELS:
        raise ValueError(f"name: unknown model {name!r}; {nearest(name, known)}")
    tasks = check_tasks(tasks)
    model: Any = _MODELS[name](tasks, **overrides)
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
