"""Runs on tables, and on small pictures as vectors."""

from dataclasses import replace
from typing import Any

from moe_mtl.data.census_income import CensusIncome
from moe_mtl.data.click_log import ClickLog
from moe_mtl.data.entire_space import EntireSpaceLog
from moe_mtl.data.movielens import MovieLens
from moe_mtl.data.multi_mnist import MultiMNIST
from moe_mtl.data.multitab_bench import MultiTabBench
from moe_mtl.data.parkinsons import Parkinsons
from moe_mtl.data.table import Table
from moe_mtl.data.tox21 import Tox21
from moe_mtl.recipes._recipe import ModelConfig, Recipe, on, register
from moe_mtl.trainer_config import TrainerConfig


def _table(model: str, data: Any, **args: Any) -> Recipe:
    """A model on a table, with settings that suit tens of thousands of rows on a CPU."""
    return Recipe(
        model=ModelConfig(name=f"{model}_table", args=args),
        data=data,
        trainer=TrainerConfig(
            out=f"runs/{model}_table",
            steps=2000,
            batch_size=512,
            lr=1e-3,
            weight_decay=0.01,
            eval_every=500,
            save_every=500,
            log_every=50,
        ),
    )


@register
def mmoe_table() -> Recipe:
    """MMoE on a table of your own; needs --data.root and --data.tasks."""
    return _table("mmoe", Table())


@register
def mmoe_census() -> Recipe:
    """MMoE on Census-Income; needs --data.root."""
    return on(_table("mmoe", CensusIncome()), "runs/mmoe_census", "mmoe_table")


@register
def shared_bottom_census() -> Recipe:
    """Dense control of mmoe_census: one bottom for both tasks; needs --data.root."""
    return on(mmoe_census(), "runs/shared_bottom_census", "shared_bottom_table")


@register
def single_task_census() -> Recipe:
    """Single-task control of mmoe_census: a model per task; needs --data.root."""
    return on(mmoe_census(), "runs/single_task_census", "single_task_table")


@register
def home_census() -> Recipe:
    """HoME on Census-Income, with the settings that did best on its validation rows; needs --data.root."""
    args = {"dropout": 0.2, "norm": "none", "widths": [64], "embedding_dim": 4}
    recipe = on(mmoe_census(), "runs/home_census", "home_table", **args)
    how = {"steps": 701, "batch_size": 1024, "lr": 3e-3, "eval_every": 0, "save_every": 100}
    return replace(recipe, trainer=replace(recipe.trainer, **how))


@register
def ple_census() -> Recipe:
    """PLE on Census-Income; needs --data.root."""
    return on(mmoe_census(), "runs/ple_census", "ple_table")


@register
def esmm_entire_space() -> Recipe:
    """ESMM on a generated log of clicks and conversions whose true rates are known."""
    return on(_table("esmm", EntireSpaceLog()), "runs/esmm_entire_space", "esmm_table")


@register
def aitm_entire_space() -> Recipe:
    """AITM on the log of esmm_entire_space, the same training."""
    return on(esmm_entire_space(), "runs/aitm_entire_space", "aitm_table")


@register
def home_movielens() -> Recipe:
    """HoME on watched and rated movies, a category each; needs --data.root."""
    recipe = _table("home", MovieLens(), dropout=0.3, categories=[["watch"], ["rating"]])
    how = {"steps": 1000, "batch_size": 1024, "warmup": 100}
    return replace(recipe, trainer=replace(recipe.trainer, out="runs/home_movielens", **how))


@register
def home_click_log() -> Recipe:
    """HoME on a generated log of six tasks from common to rare."""
    data = ClickLog()
    return on(_table("home", data), "runs/home_click_log", "home_table", dropout=0.2, categories=data.categories())


@register
def ple_parkinsons() -> Recipe:
    """PLE on the two UPDRS scores of people with Parkinson's, people held out; needs --data.root."""
    return on(_table("ple", Parkinsons()), "runs/ple_parkinsons", "ple_table", dropout=0.2)


@register
def mmoe_tox21() -> Recipe:
    """MMoE on twelve assays of molecules with missing labels; needs --data.root.

    150 updates: the 6,265 training molecules are soon learned by heart.
    """
    args = {"widths": [128], "norm": "batch", "activation": "silu", "dropout": 0.5}
    recipe = on(_table("mmoe", Tox21()), "runs/mmoe_tox21", "mmoe_table", **args)
    how = {"steps": 150, "warmup": 30, "batch_size": 256, "eval_every": 50}
    return replace(recipe, trainer=replace(recipe.trainer, **how))


@register
def dselect_k_mnist() -> Recipe:
    """DSelect-k on two overlapping digits; needs --data.root with the MNIST files."""
    return Recipe(
        model=ModelConfig(name="dselect_k_lenet", args={"k": 2}),
        data=MultiMNIST(),
        trainer=TrainerConfig(
            out="runs/dselect_k_mnist",
            steps=1600,
            batch_size=128,
            lr=2e-3,
            warmup=100,
            weight_decay=0.01,
            regularizers={"dselect_entropy": 5.0},
            regularize_from=0.25,
            eval_every=400,
            save_every=400,
        ),
    )


@register
def multitab_bench() -> Recipe:
    """MultiTab on its generated regressions of rising degree."""
    return on(_table("multitab", MultiTabBench()), "runs/multitab_bench", "multitab_table")
