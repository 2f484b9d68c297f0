"""M3ViT: a vision transformer whose experts are chosen per task, and its dense controls on the same backbone and heads.

Paper: Fan et al. 2022, M3ViT, https://arxiv.org/abs/2210.14793 (section 3; every second block's MLP becomes 16
    experts of hidden ratio 1 with 4 active, one router per task and layer).
Differs: blocks before the first expert layer run once for all tasks instead of once per task; sub-pixel convolution
    heads instead of SETR-PUP; no cross-task TAM modules; no ImageNet-pretrained start; `micro` (8-pixel patches,
    average pooling, no class token) is ours, for 64x64 images on a CPU.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from moe_mtl.backbones._upcycle import chosen_blocks
from moe_mtl.backbones.timm_vit import build_vit, with_experts
from moe_mtl.experts import ExpertBank
from moe_mtl.gates import create_gate, resolve_k
from moe_mtl.layers import ExpertBlock, MoE
from moe_mtl.multitask import MultiTaskModel, SingleTaskSet
from moe_mtl.registry import configure, register_model
from moe_mtl.tasks import Task


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Sizes of a dense ViT with task heads.

    Attributes:
        image_size: height and width the position embedding is made for, in pixels; others are interpolated.
        patch_size: pixels per patch side.
        dim: width d.
        depth: blocks.
        num_heads: attention heads.
        class_token: pool from a class token rather than the mean of the patches.
        mlp_ratio: hidden width of a dense MLP over d.
        head_width: feature maps of the dense heads.
        drop_path: rate of stochastic depth at the last block, 0 to below 1.

    Raises:
        ValueError: a size that is no whole number above 0, an image that is no whole number of patches, or a rate out
            of range.
    """

    image_size: int | Sequence[int] = 64
    patch_size: int = 8
    dim: int = 128
    depth: int = 6
    num_heads: int = 4
    class_token: bool = False
    mlp_ratio: float = 4.0
    head_width: int = 16
    drop_path: float = 0.0

    def __post_init__(self):
        for name in ("patch_size", "dim", "depth", "num_heads"):
            _check_count(name, getattr(self, name), 1)
        size = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        whole = isinstance(size, Sequence) and all(isinstance(n, int) and n > 0 for n in size)
        if not whole or len(size) != 2 or any(n % self.patch_size for n in size):
            raise ValueError(
                f"image_size: got {self.image_size!r}, expected pixels, or height and width, each a multiple of "
                f"patch_size={self.patch_size}"
            )
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads: got {self.num_heads}, expected a divisor of dim={self.dim}")
        if not round(self.dim * self.mlp_ratio) >= 1:
            raise ValueError(f"mlp_ratio: got {self.mlp_ratio}, which leaves no hidden unit of dim={self.dim}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path: got {self.drop_path}, expected 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class ViTMoEConfig(ViTConfig):
    """A ViT with task-gated experts in some of its blocks.

    Attributes:
        gate: a name in `moe_mtl.gates.GATES`.
        gate_args: options of the gate.
        experts: experts per bank.
        k: experts used per token; None for 4, or for all where the gate is dense.
        every: experts go into every `every`-th block.
        blocks: the blocks that get experts, instead of `every`.
        decoder: blocks of experts without attention after the last block. With `blocks=[]` they are the only experts,
            and all tasks share the whole backbone.
        hidden_ratio: hidden width of one expert over d; k times it equal to `mlp_ratio` keeps the active width.
    """

    gate: str = "noisy_topk"
    gate_args: Mapping[str, Any] = field(default_factory=dict)
    experts: int = 16
    k: int | None = None
    every: int = 2
    blocks: Sequence[int] | None = None
    decoder: int = 0
    hidden_ratio: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        _check_count("decoder", self.decoder, 0)


def _check_count(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: got {value!r}, expected a whole number, at least {least}")


MICRO: dict[str, Any] = {"dim": 96}
TINY = {"image_size": 224, "patch_size": 16, "dim": 192, "depth": 12, "num_heads": 3, "class_token": True}
SMALL = {**TINY, "dim": 384, "num_heads": 6}
BASE = {**TINY, "dim": 768, "num_heads": 12}


def build(tasks: Sequence[Task], config: ViTConfig) -> MultiTaskModel:
    """The multi-task model a config describes, with fresh weights."""
    size = config.image_size
    backbone = build_vit(
        img_size=size if isinstance(size, int) else tuple(size),
        patch_size=config.patch_size,
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        class_token=config.class_token,
        global_pool="token" if config.class_token else "avg",
        fc_norm=False,
        drop_path_rate=config.drop_path,
    )
    if not isinstance(config, ViTMoEConfig):
        return with_experts(backbone, tasks, None, head_width=config.head_width)

    k = resolve_k(config.gate, config.experts, config.k)

    def fresh(mlp: nn.Module) -> MoE:
        gate = create_gate(config.gate, config.dim, config.experts, len(tasks), k, **config.gate_args)
        return MoE(gate, ExpertBank(config.experts, config.dim, round(config.dim * config.hidden_ratio)))

    decoder_only = config.decoder > 0 and config.blocks is not None and len(config.blocks) == 0
    blocks = [] if decoder_only else chosen_blocks(config.depth, config.every, config.blocks)
    for _ in range(config.decoder):
        blocks.append(len(backbone.blocks))
        backbone.blocks.append(ExpertBlock(config.dim))
    return with_experts(backbone, tasks, fresh, blocks=blocks, head_width=config.head_width)


def _m3vit(tasks: Sequence[Task], size: Mapping[str, Any], overrides: Mapping[str, Any]) -> nn.Module:
    config = configure(ViTMoEConfig, size, overrides)
    return _with_options(build(tasks, config), config)


def _shared_bottom(tasks: Sequence[Task], size: Mapping[str, Any], overrides: Mapping[str, Any]) -> nn.Module:
    config = configure(ViTConfig, size, overrides)
    return _with_options(build(tasks, config), config)


def _single_task(tasks: Sequence[Task], size: Mapping[str, Any], overrides: Mapping[str, Any]) -> nn.Module:
    config = configure(ViTConfig, size, overrides)
    return _with_options(SingleTaskSet({task.name: build((task,), config) for task in tasks}), config)


def _with_options(model: Any, config: ViTConfig) -> nn.Module:
    model.options = asdict(config)  # what `create_model` records
    return model


@register_model(modality="image")
def m3vit_micro(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """Width 96, depth 6, patch 8, for 64x64 images on a CPU."""
    return _m3vit(tasks, MICRO, overrides)


@register_model(modality="image")
def m3vit_tiny(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """ViT-Tiny with experts: width 192, depth 12, patch 16."""
    return _m3vit(tasks, TINY, overrides)


@register_model(modality="image")
def m3vit_small(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """ViT-Small with experts, the paper's small model: width 384, depth 12, patch 16."""
    return _m3vit(tasks, SMALL, overrides)


@register_model(modality="image")
def m3vit_base(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """ViT-Base with experts, the paper's base model: width 768, depth 12, patch 16."""
    return _m3vit(tasks, BASE, overrides)


@register_model(modality="image")
def shared_bottom_micro(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """The dense backbone of m3vit_micro, shared by all tasks, with the same heads."""
    return _shared_bottom(tasks, MICRO, overrides)


@register_model(modality="image")
def shared_bottom_tiny(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """The dense backbone of m3vit_tiny, shared by all tasks, with the same heads."""
    return _shared_bottom(tasks, TINY, overrides)


@register_model(modality="image")
def shared_bottom_small(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """The dense backbone of m3vit_small, shared by all tasks, with the same heads."""
    return _shared_bottom(tasks, SMALL, overrides)


@register_model(modality="image")
def shared_bottom_base(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """The dense backbone of m3vit_base, shared by all tasks, with the same heads."""
    return _shared_bottom(tasks, BASE, overrides)


@register_model(modality="image")
def single_task_micro(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """One dense model of m3vit_micro's size per task."""
    return _single_task(tasks, MICRO, overrides)


@register_model(modality="image")
def single_task_tiny(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """One dense model of m3vit_tiny's size per task."""
    return _single_task(tasks, TINY, overrides)


@register_model(modality="image")
def single_task_small(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """One dense model of m3vit_small's size per task."""
    return _single_task(tasks, SMALL, overrides)


@register_model(modality="image")
def single_task_base(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """One dense model of m3vit_base's size per task."""
    return _single_task(tasks, BASE, overrides)
