"""Vision transformers of timm with task-gated experts, and their dense controls on the same backbone and heads.

Paper: Komatsuzaki et al. 2023, Sparse Upcycling, https://arxiv.org/abs/2212.05055; routers per task as in Fan et al.
    2022, M3ViT, https://arxiv.org/abs/2210.14793.
Differs: as `moe_mtl.backbones.moefy` does. That puts experts into a backbone with trained weights and gives a model of
    this name; here the backbone's weights are fresh.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import nn

from moe_mtl.backbones._timm_config import read_vit
from moe_mtl.backbones._upcycle import ExpertMaker
from moe_mtl.backbones.timm_vit import moefy_vit, with_experts
from moe_mtl.images import Colours
from moe_mtl.multitask import MultiTaskModel, SingleTaskSet
from moe_mtl.registry import configure, register_model
from moe_mtl.tasks import Task


@dataclass(frozen=True, kw_only=True)
class TimmConfig:
    """A dense vision transformer of timm with task heads.

    Attributes:
        backbone: name of an architecture in timm, such as "vit_tiny_patch16_224".
        backbone_args: plain options of it for `timm.create_model`, such as img_size and in_chans.
        head_width: feature maps of the dense heads.
        mean: of colours, what `moe_mtl.Predictor` subtracts from those of 0..1; per colour, or one for all.
        std: of colours, what it divides the rest by. Training on colours of 0..1 sets both to 0 and 1.
    """

    backbone: str = ""
    backbone_args: Mapping[str, Any] = field(default_factory=dict)
    head_width: int = 16
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)


@dataclass(frozen=True, kw_only=True)
class TimmMoEConfig(TimmConfig):
    """A vision transformer of timm with task-gated experts in some of its blocks; see `moe_mtl.backbones.moefy`.

    Attributes:
        gate: a name in `moe_mtl.gates.GATES`.
        gate_args: options of the gate.
        experts: experts per bank.
        k: experts used per token; None for the gate's default.
        every: experts go into every `every`-th block.
        blocks: the blocks that get experts, instead of `every`.
        hidden: "copy" or "split".
    """

    gate: str = "noisy_topk"
    gate_args: Mapping[str, Any] = field(default_factory=dict)
    experts: int = 16
    k: int | None = None
    every: int = 2
    blocks: Sequence[int] | None = None
    hidden: Literal["copy", "split"] = "copy"


def build(tasks: Sequence[Task], config: TimmConfig) -> MultiTaskModel:
    """The multi-task model a config describes, with fresh weights."""
    if not config.backbone:
        raise ValueError("backbone: name an architecture of timm, for example backbone='vit_tiny_patch16_224'")
    backbone, colours = read_vit(config.backbone, config.backbone_args), Colours.of(config.mean, config.std)
    if isinstance(config, TimmMoEConfig):
        how = {name: getattr(config, name) for name in ("gate", "experts", "k", "hidden", "gate_args")}
        make, where = ExpertMaker(len(tasks), **how), {"every": config.every, "blocks": config.blocks}
        model = moefy_vit(backbone, tasks, make, **where, head_width=config.head_width)
    else:
        model = with_experts(backbone, tasks, None, head_width=config.head_width)
    model.colours = colours
    return model


def _with_options(model: Any, config: TimmConfig) -> nn.Module:
    model.options = asdict(config)  # what `create_model` records
    return model


@register_model(modality="image")
def timm_moe(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """A vision transformer of timm with experts in every second block."""
    config = configure(TimmMoEConfig, {}, overrides)
    return _with_options(build(tasks, config), config)


@register_model(modality="image")
def timm_shared_bottom(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """The dense backbone of timm_moe, shared by all tasks, with the same heads."""
    config = configure(TimmConfig, {}, overrides)
    return _with_options(build(tasks, config), config)


@register_model(modality="image")
def timm_single_task(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """The dense backbone of timm_moe with a head, once per task."""
    config = configure(TimmConfig, {}, overrides)
    return _with_options(SingleTaskSet({task.name: build((task,), config) for task in tasks}), config)
