"""Runs on texts."""

from dataclasses import replace
from typing import Any

from moe_mtl.data.nlu_mix import NLUMix
from moe_mtl.data.text_files import TextFiles
from moe_mtl.recipes._recipe import ModelConfig, Recipe, register
from moe_mtl.trainer_config import TrainerConfig

NLU = NLUMix(tasks=["snips_intent", "snips_slots", "banking77", "nlupp_intents", "nlupp_slots", "upos"])
WORDS = "*word_embeddings*|*tok_embeddings*|*backbone.shared.*"  # of BERT and its kin, of ModernBERT, of T5


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
            lr_scales={"*backbone.*": 0.25} | ({"*.gate.*": 1.0} if routed else {}) | {WORDS: 0.0},
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
    return _texts("text_moe_nlu", "text_moe", NLU, blocks=[-3, -1])  # the texts of a source share a pass up to there


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
    """A feed-forward sublayer per task in two layers, on the texts of text_moe_nlu: the model of docs/texts.md."""
    # means over 62 labels, of which a text has one or two, are small; spans take longest to learn
    data = replace(NLU, weights={"nlupp_intents": 5.0, "snips_slots": 3.0})
    recipe = _texts("text_sublayers_nlu", "text_sublayers", data, blocks=[-3, -1])
    return replace(recipe, trainer=replace(recipe.trainer, steps=9000, warmup=400))


@register
def text_prompt_nlu() -> Recipe:
    """A frozen encoder with a prompt and heads per task, on the texts of text_moe_nlu."""
    recipe = _texts("text_prompt_nlu", "text_prompt", NLU)
    return replace(recipe, trainer=replace(recipe.trainer, lr_scales={"prompts.*": 5.0}))
