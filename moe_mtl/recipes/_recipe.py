"""What a recipe is, and the register of them."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from moe_mtl.tasks import nearest
from moe_mtl.trainer_config import TrainerConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model.

    Attributes:
        name: one of `moe_mtl.list_models()`.
        args: its options.
        start: a checkpoint of another run on these tasks, `<out>/checkpoints/step_<n>`, whose weights and balancer this
            one starts from; where this model has experts and that one an MLP, each expert starts as the MLP. A model
            whose task-level gates are frozen takes that run's routes alone, see `moe_mtl.two_stage`.
    """

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    start: str | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model, the data it learns from and how.

    Attributes:
        model: which model.
        data: which data set, with its settings.
        trainer: how it is trained.
    """

    model: ModelConfig
    data: Any
    trainer: TrainerConfig

    def to_dict(self) -> dict[str, Any]:
        """Plain nested data."""
        return asdict(self)


RECIPES: dict[str, Callable[[], Recipe]] = {}


def register(build: Callable[[], Recipe]) -> Callable[[], Recipe]:
    """Decorator: makes a recipe available under its function's name."""
    if build.__name__ in RECIPES:
        raise ValueError(f"recipe {build.__name__!r} is defined twice")
    RECIPES[build.__name__] = build
    return build


def list_recipes() -> dict[str, str]:
    """What there is: the first line of each recipe's description, by name."""
    return {name: (build.__doc__ or "").strip().split("\n")[0] for name, build in sorted(RECIPES.items())}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name, the caller's own: what is changed in it changes no other.

    Raises:
        ValueError: there is none; the nearest are listed.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe: unknown {name!r}; {nearest(name, RECIPES)}")
    return copy.deepcopy(RECIPES[name]())


def on(parent: Recipe, out: str, model: str, **args: Any) -> Recipe:
    """The parent's data and training with another model."""
    return replace(parent, model=ModelConfig(name=model, args=args), trainer=replace(parent.trainer, out=out))
