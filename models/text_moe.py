"""Text encoders of transformers with task-gated experts, and their dense controls on the same encoder and heads.

Paper: Gupta et al. 2022, Sparsely Activated Mixture-of-Experts are Robust Multi-Task Learners,
    https://arxiv.org/abs/2204.07689 (task-aware gates in a pretrained encoder); experts start as copies of its MLPs
    as in Komatsuzaki et al. 2023, https://arxiv.org/abs/2212.05055.
Differs: inspired by the abstract of the former; the gate is any of `moe_mtl.gates`, by default a noisy top-1 router per
    task; experts in every second layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from torch import nn

from moe_mtl.backbones._upcycle import ExpertMaker
from moe_mtl.backbones.hf_encoder import TextModel, describe_encoder, moefy_encoder, read_encoder
from moe_mtl.multitask import SingleTaskSet
from moe_mtl.registry import configure, register_model
from moe_mtl.tasks import Task


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A dense encoder with task heads.

    Attributes:
        encoder: folder, or name on the hub, of an encoder of transformers, whose weights the model starts from; or its
            configuration as plain data, for fresh weights. A saved model has the latter.
        attention: how attention is computed, "eager" or "sdpa", say; None for the choice of transformers. Eager trains
            short texts on a CPU nearly twice as fast, whose fused attention has a slow backward.
    """

    encoder: str | Mapping[str, Any] = ""
    attention: str | None = None


@dataclass(frozen=True, kw_only=True)
class TextMoEConfig(TextConfig):
    """An encoder with task-gated experts in some of its layers; see `moe_mtl.backbones.moefy`.

    Attributes:
        gate: a name in `moe_mtl.gates.GATES`.
        gate_args: options of the gate.
        experts: experts per bank.
        k: experts used per token; None for the gate's default.
        every: experts go into every `every`-th layer.
        blocks: the layers that get experts, instead of `every`; negative numbers count from the end.
        hidden: "copy" or "split".
    """

    gate: str = "noisy_topk"
    gate_args: Mapping[str, Any] = field(default_factory=dict)
    experts: int = 4
    k: int | None = 1
    every: int = 2
    blocks: Sequence[int] | None = None
    hidden: Literal["copy", "split"] = "copy"


def build(tasks: Sequence[Task], config: TextConfig) -> TextModel:
    """The multi-task model a config describes."""
    if not config.encoder:
        raise ValueError("encoder: name the folder of an encoder, as encoder='path', or give its configuration")
    make = None
    if isinstance(config, TextMoEConfig):
        how = {name: getattr(config, name) for name in ("gate", "experts", "k", "hidden", "gate_args")}
        make = ExpertMaker(len(tasks), **how)
    where = {"every": config.every, "blocks": config.blocks} if isinstance(config, TextMoEConfig) else {}
    return moefy_encoder(read_encoder(config.encoder, config.attention), tasks, make, **where)


def _with_options(model: Any, config: TextConfig) -> nn.Module:
    parts = getattr(model, "models", None)  # of a set of single-task models
    one = model if parts is None else next(iter(parts.values()))
    model.options = asdict(replace(config, encoder=describe_encoder(one.backbone)))  # what `create_model` records
    return model


@register_model(modality="text")
def text_moe(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """An encoder with task-gated experts in every second layer."""
    config = configure(TextMoEConfig, {}, overrides)
    return _with_options(build(tasks, config), config)


@register_model(modality="text")
def text_shared_bottom(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """The dense encoder of text_moe, shared by all tasks, with the same heads."""
    config = configure(TextConfig, {}, overrides)
    return _with_options(build(tasks, config), config)


@register_model(modality="text")
def text_single_task(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """The dense encoder of text_moe with a head, once per task."""
    config = configure(TextConfig, {}, overrides)
    return _with_options(SingleTaskSet({task.name: build((task,), config) for task in tasks}), config)
