"""Recipes: complete, named training runs. `python train.py <recipe>` runs one; any field can be overridden there.

A recipe is a function that returns a `Recipe`; a variant calls its parent and replaces what differs. One whose numbers
have been published is not changed any more: a new setting gets a new name.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from moe_mtl.data.nyuv2 import NYUv2
from moe_mtl.data.procroom import ProcRoom
from moe_mtl.tasks import nearest
from moe_mtl.trainer_config import TrainerConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model.

    Attributes:
        name: one of `moe_mtl.list_models()`.
        args: its options.
    """

    name: str
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model, the data it learns from and how.

    Attributes:
        model: which model.
        data: which data set, with its settings.
        trainer: how it is trained.
    """

    model: ModelConfig
    data: ProcRoom | NYUv2
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
    """The recipe of that name.

    Raises:
        ValueError: there is none; the nearest are listed.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe: unknown {name!r}; {nearest(name, RECIPES)}")
    return RECIPES[name]()


def _on(parent: Recipe, out: str, model: str) -> Recipe:
    """The parent's data and training with another model."""
    return replace(parent, model=replace(parent.model, name=model), trainer=replace(parent.trainer, out=out))


@register
def m3vit_micro_procroom() -> Recipe:
    """Task-gated ViT on 8 tasks of generated rooms."""
    return Recipe(
        model=ModelConfig(name="m3vit_micro"),
        data=ProcRoom(),
        trainer=TrainerConfig(
            out="runs/m3vit_micro_procroom",
            steps=6000,
            batch_size=32,
            tasks_per_step=2,
            lr=1e-3,
            warmup=200,
            regularizers={"importance": 0.01},
            eval_every=2000,
            save_every=250,
        ),
    )


@register
def shared_bottom_micro_procroom() -> Recipe:
    """Dense control of m3vit_micro_procroom: one backbone for all tasks, the same training and data."""
    return _on(m3vit_micro_procroom(), "runs/shared_bottom_micro_procroom", "shared_bottom_micro")


@register
def single_task_micro_procroom() -> Recipe:
    """Single-task control of m3vit_micro_procroom: a dense backbone per task, the same training and data."""
    return _on(m3vit_micro_procroom(), "runs/single_task_micro_procroom", "single_task_micro")


@register
def procroom_demo() -> Recipe:
    """m3vit_micro_procroom cut to about four minutes on two CPU cores: all tasks in every step, batches of 16."""
    recipe = m3vit_micro_procroom()
    trainer = replace(
        recipe.trainer,
        out="runs/demo",
        steps=240,
        batch_size=16,
        tasks_per_step=None,
        warmup=50,
        eval_every=240,
        val_limit=512,
        save_every=80,
    )
    return replace(recipe, trainer=trainer)


@register
def m3vit_micro_nyuv2() -> Recipe:
    """Task-gated ViT on NYUv2 at 96x128: 13 classes, depth, normals; needs --data.root.

    Trains on the official 795 frames, so there is no validation; --data.tuning=true --trainer.eval_every=500 holds out
    414 of them.
    """
    data = NYUv2(height=96, width=128, num_classes=13)
    return Recipe(
        model=ModelConfig(name="m3vit_micro", args={"image_size": [data.height, data.width]}),
        data=data,
        trainer=TrainerConfig(
            out="runs/m3vit_micro_nyuv2",
            steps=1000,
            batch_size=16,
            lr=1e-3,
            warmup=100,
            regularizers={"importance": 0.01},
            eval_every=0,
            save_every=250,
        ),
    )


@register
def shared_bottom_micro_nyuv2() -> Recipe:
    """Dense control of m3vit_micro_nyuv2: one backbone for all tasks, the same training and data."""
    return _on(m3vit_micro_nyuv2(), "runs/shared_bottom_micro_nyuv2", "shared_bottom_micro")


@register
def single_task_micro_nyuv2() -> Recipe:
    """Single-task control of m3vit_micro_nyuv2: a dense backbone per task, the same training and data."""
    return _on(m3vit_micro_nyuv2(), "runs/single_task_micro_nyuv2", "single_task_micro")
