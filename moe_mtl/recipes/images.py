"""Runs on images."""

from dataclasses import replace
from typing import Any

from moe_mtl.data.nyuv2 import NYUv2
from moe_mtl.data.procroom import ProcRoom
from moe_mtl.recipes._recipe import ModelConfig, Recipe, on, register
from moe_mtl.trainer_config import TrainerConfig

# Experts of ProcRoom's tasks in their order: semseg and saliency ask what things are, depth and normals for the
# geometry, edges and texture for contours, count and scene for the image as a whole.
_WHAT, _GEOMETRY, _CONTOUR, _IMAGE = [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]
PAIRS = [_WHAT, _GEOMETRY, _GEOMETRY, _CONTOUR, _CONTOUR, _WHAT, _IMAGE, _IMAGE]


# weights of the chosen experts that add up to 1: trained from scratch, the experts learn sooner
PROCROOM = {"gate_args": {"normalize": "detached"}}


@register
def m3vit_micro_procroom() -> Recipe:
    """Task-gated ViT on 8 tasks of generated rooms: experts in every second block."""
    return Recipe(
        model=ModelConfig(name="m3vit_micro", args=PROCROOM),
        data=ProcRoom(),
        trainer=TrainerConfig(
            out="runs/m3vit_micro_procroom",
            steps=1200,
            batch_size=16,
            lr=2e-3,
            warmup=100,
            balancer="uncertainty",  # equal weights leave normals, whose loss is small, far behind
            regularizers={"importance": 0.01},
            eval_every=400,
            val_limit=512,
            save_every=200,
        ),
    )


def _procroom(name: str, model: str, **args: Any) -> Recipe:
    """m3vit_micro_procroom with another model or other options of its own."""
    return on(m3vit_micro_procroom(), f"runs/{name}", model, **args)


@register
def m3vit_micro_last_procroom() -> Recipe:
    """m3vit_micro_procroom with experts in the last block only: tasks share everything up to its MLP."""
    return _procroom("m3vit_micro_last_procroom", "m3vit_micro", blocks=[-1], **PROCROOM)


@register
def m3vit_micro_decoder_procroom() -> Recipe:
    """m3vit_micro_procroom with experts after the backbone only: a dense ViT, then one attention-free expert block."""
    return _procroom("m3vit_micro_decoder_procroom", "m3vit_micro", blocks=[], decoder=1, **PROCROOM)


@register
def m3vit_micro_upcycled_procroom() -> Recipe:
    """Experts in the last block for the last quarter of a dense training, a checkpoint of which is --model.start.

    Every expert starts as the MLP it replaces, and the learning rate goes on from about where the dense run's stands.
    """
    recipe = _procroom(
        "m3vit_micro_upcycled_procroom", "m3vit_micro", blocks=[-1], experts=8, k=1, hidden_ratio=4.0, **PROCROOM
    )
    start = f"{shared_bottom_micro_procroom().trainer.out}/checkpoints/step_00001000"
    how = replace(recipe.trainer, lr=5e-4, warmup=20, lr_final=0.04)
    return replace(recipe, model=replace(recipe.model, start=start), trainer=how)


@register
def m3vit_micro_blind_procroom() -> Recipe:
    """Control of m3vit_micro_procroom: one router for all tasks, so that every task uses the same experts."""
    return _procroom("m3vit_micro_blind_procroom", "m3vit_micro", gate="task_blind", **PROCROOM)


@register
def m3vit_micro_frozen_procroom() -> Recipe:
    """Control of m3vit_micro_procroom: the routers of all tasks stay as they were drawn."""
    return _procroom("m3vit_micro_frozen_procroom", "m3vit_micro", gate_args={"normalize": "detached", "frozen": True})


@register
def m3vit_micro_assigned_procroom() -> Recipe:
    """Control of m3vit_micro_procroom: experts assigned by hand, four to each pair of related tasks."""
    return _procroom("m3vit_micro_assigned_procroom", "m3vit_micro", gate="assigned", gate_args={"assignment": PAIRS})


# as many experts as groups of related tasks, each as large as four of the others and one per token: same parameters,
# same work, but experts that no task can avoid sharing
SCARCE: dict[str, Any] = {"experts": 4, "k": 1, "hidden_ratio": 4}


@register
def m3vit_micro_scarce_procroom() -> Recipe:
    """m3vit_micro_procroom with four large experts per layer, one per token."""
    return _procroom("m3vit_micro_scarce_procroom", "m3vit_micro", **SCARCE, **PROCROOM)


@register
def m3vit_micro_scarce_frozen_procroom() -> Recipe:
    """Control of m3vit_micro_scarce_procroom: the routers of all tasks stay as they were drawn."""
    how = {"normalize": "detached", "frozen": True}
    return _procroom("m3vit_micro_scarce_frozen_procroom", "m3vit_micro", **SCARCE, gate_args=how)


@register
def m3vit_micro_scarce_assigned_procroom() -> Recipe:
    """Control of m3vit_micro_scarce_procroom: experts assigned by hand, one to each pair of related tasks."""
    how = {"assignment": [[experts[0] // 4] for experts in PAIRS]}
    return _procroom("m3vit_micro_scarce_assigned_procroom", "m3vit_micro", **SCARCE, gate="assigned", gate_args=how)


@register
def shared_bottom_micro_procroom() -> Recipe:
    """Dense control of m3vit_micro_procroom: one backbone of the same width for all tasks."""
    return _procroom("shared_bottom_micro_procroom", "shared_bottom_micro")


@register
def shared_bottom_micro_wide_procroom() -> Recipe:
    """Dense control of m3vit_micro_procroom with as many parameters in all: a wider shared backbone."""
    return _procroom("shared_bottom_micro_wide_procroom", "shared_bottom_micro", dim=132)


@register
def single_task_micro_procroom() -> Recipe:
    """Single-task control of m3vit_micro_procroom: a dense backbone of the same width per task, own rate."""
    recipe = _procroom("single_task_micro_procroom", "single_task_micro")
    # the best on validation of 2e-3, 1e-3 and 5e-4: alone, scene and count learn nothing at the higher two
    return replace(recipe, trainer=replace(recipe.trainer, lr=5e-4))


@register
def procroom_demo() -> Recipe:
    """m3vit_micro_procroom cut to about a minute on two CPU cores."""
    recipe = m3vit_micro_procroom()
    how = {"steps": 100, "warmup": 20, "eval_every": 100, "val_limit": 256, "save_every": 100}
    return replace(recipe, trainer=replace(recipe.trainer, out="runs/demo", **how))


FRAMES = {"image_size": [96, 128]}


@register
def m3vit_micro_nyuv2() -> Recipe:
    """Task-gated ViT on NYUv2 at 96x128: 13 classes, depth, normals; needs --data.root.

    Trains on the official 795 frames, so there is no validation; --data.tuning=true --trainer.eval_every=500 holds out
    414 of them.
    """
    return Recipe(
        model=ModelConfig(name="m3vit_micro", args=FRAMES),
        data=NYUv2(height=96, width=128, num_classes=13),
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
    return on(m3vit_micro_nyuv2(), "runs/shared_bottom_micro_nyuv2", "shared_bottom_micro", **FRAMES)


@register
def single_task_micro_nyuv2() -> Recipe:
    """Single-task control of m3vit_micro_nyuv2: a dense backbone per task, the same training and data."""
    return on(m3vit_micro_nyuv2(), "runs/single_task_micro_nyuv2", "single_task_micro", **FRAMES)
