"""Recipes: complete, named training runs. `python train.py <recipe>` runs one; any field can be overridden there.

A recipe is a function that returns a `Recipe`; a variant calls its parent and replaces what differs. One whose numbers
have been published is not changed any more: a new setting gets a new name.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from moe_mtl.data.census_income import CensusIncome
from moe_mtl.data.click_log import ClickLog
from moe_mtl.data.entire_space import EntireSpaceLog
from moe_mtl.data.movielens import MovieLens
from moe_mtl.data.multi_mnist import MultiMNIST
from moe_mtl.data.multitab_bench import MultiTabBench
from moe_mtl.data.nlu_mix import NLUMix
from moe_mtl.data.nyuv2 import NYUv2
from moe_mtl.data.parkinsons import Parkinsons
from moe_mtl.data.procroom import ProcRoom
from moe_mtl.data.table import Table
from moe_mtl.data.text_files import TextFiles
from moe_mtl.data.tox21 import Tox21
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
    """The recipe of that name.

    Raises:
        ValueError: there is none; the nearest are listed.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe: unknown {name!r}; {nearest(name, RECIPES)}")
    return RECIPES[name]()


def _on(parent: Recipe, out: str, model: str, **args: Any) -> Recipe:
    """The parent's data and training with another model."""
    return replace(parent, model=ModelConfig(name=model, args=args), trainer=replace(parent.trainer, out=out))


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
    return _on(m3vit_micro_procroom(), f"runs/{name}", model, **args)


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
    return _on(m3vit_micro_nyuv2(), "runs/shared_bottom_micro_nyuv2", "shared_bottom_micro", **FRAMES)


@register
def single_task_micro_nyuv2() -> Recipe:
    """Single-task control of m3vit_micro_nyuv2: a dense backbone per task, the same training and data."""
    return _on(m3vit_micro_nyuv2(), "runs/single_task_micro_nyuv2", "single_task_micro", **FRAMES)


# ---- tables ---------------------------------------------------------------------------------------------------------


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
    return _on(_table("mmoe", CensusIncome()), "runs/mmoe_census", "mmoe_table")


@register
def shared_bottom_census() -> Recipe:
    """Dense control of mmoe_census: one bottom for both tasks; needs --data.root."""
    return _on(mmoe_census(), "runs/shared_bottom_census", "shared_bottom_table")


@register
def single_task_census() -> Recipe:
    """Single-task control of mmoe_census: a model per task; needs --data.root."""
    return _on(mmoe_census(), "runs/single_task_census", "single_task_table")


@register
def home_census() -> Recipe:
    """HoME on Census-Income; needs --data.root."""
    return _on(mmoe_census(), "runs/home_census", "home_table")


@register
def ple_census() -> Recipe:
    """PLE on Census-Income; needs --data.root."""
    return _on(mmoe_census(), "runs/ple_census", "ple_table")


@register
def esmm_entire_space() -> Recipe:
    """ESMM on a generated log of clicks and conversions whose true rates are known."""
    return _on(_table("esmm", EntireSpaceLog()), "runs/esmm_entire_space", "esmm_table")


@register
def aitm_entire_space() -> Recipe:
    """AITM on the log of esmm_entire_space, the same training."""
    return _on(esmm_entire_space(), "runs/aitm_entire_space", "aitm_table")


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
    return _on(_table("home", data), "runs/home_click_log", "home_table", dropout=0.2, categories=data.categories())


@register
def ple_parkinsons() -> Recipe:
    """PLE on the two UPDRS scores of people with Parkinson's, people held out; needs --data.root."""
    return _on(_table("ple", Parkinsons()), "runs/ple_parkinsons", "ple_table", dropout=0.2)


@register
def mmoe_tox21() -> Recipe:
    """MMoE on twelve assays of molecules with missing labels; needs --data.root.

    150 updates: the 6,265 training molecules are soon learned by heart.
    """
    args = {"widths": [128], "norm": "batch", "activation": "silu", "dropout": 0.5}
    recipe = _on(_table("mmoe", Tox21()), "runs/mmoe_tox21", "mmoe_table", **args)
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
    return _on(_table("multitab", MultiTabBench()), "runs/multitab_bench", "multitab_table")


# ---- texts ----------------------------------------------------------------------------------------------------------


NLU = NLUMix(tasks=["snips_intent", "snips_slots", "banking77", "nlupp_intents", "nlupp_slots", "upos"])


def _texts(name: str, model: str, data: Any, **args: Any) -> Recipe:
    """A model on texts, fine-tuned from a pretrained encoder of MiniLM's size, whose word embeddings stay."""
    routed = model == "text_moe"
    return Recipe(
        model=ModelConfig(name=model, args={"attention": "eager", **args}),
        data=data,
        trainer=TrainerConfig(
            out=f"runs/{name}",
            steps=4500,
            batch_size=32,
            batches="homogeneous",
            temperature=5.0,
            lr=1e-3,
            lr_scales={"*backbone.*": 0.25} | ({"*.gate.*": 1.0} if routed else {}) | {"*word_embeddings*": 0.0},
            precision="bf16",
            warmup=200,
            weight_decay=0.01,
            regularizers={"switch_balance": 0.01} if routed else {},
            regularizer_args={"switch_balance": {"per_task": True}} if routed else {},
            eval_every=2000,
            save_every=500,
            log_every=50,
        ),
    )


@register
def text_moe_nlu() -> Recipe:
    """Task-gated encoder on SNIPS, BANKING77, NLU++ and parts of speech; needs --data.root and --data.tokenizer."""
    return _texts("text_moe_nlu", "text_moe", NLU, blocks=[3, 5])  # the texts of a source share a pass up to there


@register
def text_shared_bottom_nlu() -> Recipe:
    """Dense control of text_moe_nlu: one encoder for all tasks."""
    return _texts("text_shared_bottom_nlu", "text_shared_bottom", NLU)


@register
def text_single_task_nlu() -> Recipe:
    """Single-task control of text_moe_nlu: an encoder per task; each run with --data.tasks=[NAME] trains one."""
    return _texts("text_single_task_nlu", "text_single_task", NLU)


@register
def text_moe_files() -> Recipe:
    """Task-gated encoder on texts of your own; needs --data.root, --data.text, --data.labels, --data.tokenizer."""
    recipe = _texts("text_moe_files", "text_moe", TextFiles())
    scales = {"*backbone.*": 0.25, "*.gate.*": 1.0}  # of whatever encoder: it may call its embeddings something else
    return replace(recipe, trainer=replace(recipe.trainer, lr_scales=scales))


def _task_level(name: str, lr_scales: dict[str, float], gate_args: dict[str, Any], start: str | None = None) -> Recipe:
    """Experts by task rather than by token: three in every second layer, which no loss balances."""
    args = {"gate": "task_level", "experts": 3, "k": 1, "gate_args": gate_args}
    recipe = _texts(name, "text_moe", NLU, **args)
    scales = {pattern: factor for pattern, factor in recipe.trainer.lr_scales.items() if ".gate." not in pattern}
    how = {"regularizers": {}, "regularizer_args": {}, "lr_scales": scales | lr_scales}
    return replace(recipe, model=replace(recipe.model, start=start), trainer=replace(recipe.trainer, **how))


@register
def text_task_level_nlu() -> Recipe:
    """Stage 1 of task-level experts on the texts of text_moe_nlu: learns which expert serves a task in each layer."""
    return _task_level("text_task_level_nlu", {"*.gate.*": 1.0, "*.gate.table.*": 10.0}, {})


@register
def text_task_level_stage2_nlu() -> Recipe:
    """Stage 2: fresh experts along the routes of text_task_level_nlu, a checkpoint of which is --model.start."""
    first = text_task_level_nlu().trainer
    start = f"{first.out}/checkpoints/step_{first.steps:08d}"
    second = {"selection": "softmax", "start": 300.0, "end": 1.0, "frozen": True}
    return _task_level("text_task_level_stage2_nlu", {}, second, start)


@register
def text_sublayers_nlu() -> Recipe:
    """A feed-forward sublayer per task in every second layer, on the texts of text_moe_nlu."""
    return _texts("text_sublayers_nlu", "text_sublayers", NLU)


@register
def text_prompt_nlu() -> Recipe:
    """A frozen encoder with a prompt and heads per task, on the texts of text_moe_nlu."""
    recipe = _texts("text_prompt_nlu", "text_prompt", NLU)
    return replace(recipe, trainer=replace(recipe.trainer, lr_scales={"prompts.*": 5.0}))
