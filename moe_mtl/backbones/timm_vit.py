"""timm vision transformers with task-gated experts in place of chosen MLPs.

Works on any timm model whose `forward_features` gives tokens [b, n, d] and whose blocks have an `mlp` of one of timm's
shapes (`Mlp`, `GluMlp`, `SwiGLU`): ViT, DeiT, EVA, BEiT, ViT-relpos and their kin.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_mtl.backbones._timm_config import importing
from moe_mtl.backbones._upcycle import ExpertMaker, Weights, activation_of, agrees, chosen_blocks, detached
from moe_mtl.heads import Features, make_head
from moe_mtl.layers import ContextMoE, ExpandTasks, ExpertBlock, MoE, StackTasks, TaskContext
from moe_mtl.multitask import MultiTaskModel
from moe_mtl.tasks import Task

Timm = Any  # a module of timm, read by structure: its attributes are not declared


def build_vit(**options: Any) -> Timm:
    """A timm `VisionTransformer` with fresh weights, without classifier, for images of any size its patches divide."""
    with importing():
        from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(num_classes=0, dynamic_img_size=True, **options)


def moefy_vit(
    backbone: Timm,
    tasks: Sequence[Task],
    make: ExpertMaker,
    *,
    every: int = 2,
    blocks: Sequence[int] | None = None,
    head_width: int = 16,
) -> MultiTaskModel:
    """`moe_mtl.backbones.moefy` of a timm ViT, which becomes part of the result.

    Raises:
        ValueError: a structure this adapter does not know, or block numbers out of range.
    """

    def upcycle(mlp: Timm) -> MoE:
        return make(*dense_mlp(mlp))

    return with_experts(backbone, tasks, upcycle, every=every, blocks=blocks, head_width=head_width)


@torch.no_grad()
def upcycle(model: nn.Module, dense: Mapping[str, Tensor]) -> None:
    """Gives a model, in place, the weights of a dense one of its shape: every expert becomes the MLP it stands for.

    Sparse upcycling in the middle of a training; `moe_mtl.backbones.moefy` makes the model as well. Routers stay as
    they are. While experts are equal, the model computes what the dense one did if a token's weights add up to 1: `k`
    experts of the MLP's hidden width and `normalize="detached"`, or a dense mixture.

    Args:
        model: on a timm backbone, its experts without GLU.
        dense: `state_dict` of the dense model, its MLPs of two linear layers `fc1` and `fc2`. Layers that have experts
            there, too, are copied as they are.

    Raises:
        ValueError: names or shapes do not fit, or experts with GLU, whose halves may stand in another order in the
            dense model; nothing was changed.
    """
    found = dict(dense)
    for path, layer in model.named_modules():
        if isinstance(layer, ContextMoE) and f"{path}.fc1.weight" in found:
            if layer.moe.experts.glu:
                raise ValueError(
                    f"model: the experts of {path} are gated linear units, whose order of halves weights do not tell; "
                    "moefy the dense model instead"
                )
            prefix, experts = f"{path}.moe.experts", layer.moe.experts.num_experts
            for ours, theirs in (("w1", "fc1.weight"), ("b1", "fc1.bias"), ("w2", "fc2.weight"), ("b2", "fc2.bias")):
                if (w := found.pop(f"{path}.{theirs}", None)) is not None:
                    found[f"{prefix}.{ours}"] = w.expand(experts, *w.shape)
            gate = {f"{path}.moe.gate.{name}": w for name, w in layer.moe.gate.state_dict().items()}
            found = {**gate, **found}
    own = model.state_dict()
    odd = [name for name in own if name not in found or found[name].shape != own[name].shape]
    if odd := odd + [name for name in found if name not in own]:
        raise ValueError(f"dense: its weights do not fit the model in {', '.join(sorted(odd)[:6])} ({len(odd)} in all)")
    model.load_state_dict(found)


def with_experts(
    backbone: Timm,
    tasks: Sequence[Task],
    make_moe: Callable[[Timm], MoE] | None,
    *,
    every: int = 2,
    blocks: Sequence[int] | None = None,
    head_width: int = 16,
) -> MultiTaskModel:
    """A multi-task model on a timm backbone, some of its MLPs replaced in place.

    Args:
        backbone: a timm model; it becomes part of the result.
        tasks: what the model predicts; each gets a fresh head.
        make_moe: a block's MLP to the layer that takes its place; None leaves the backbone dense (shared bottom).
        every: as in `moe_mtl.backbones.moefy`.
        blocks: as in `moe_mtl.backbones.moefy`.
        head_width: feature maps of the dense heads.

    Raises:
        ValueError: a structure this adapter does not know, or block numbers out of range.
    """
    context = TaskContext()
    found = _find_blocks(backbone)
    if make_moe is not None:
        stacked = False
        for i in chosen_blocks(len(found), every, blocks):
            name, block = found[i]
            moe = make_moe(block.mlp)
            block.mlp = ContextMoE(moe, context, name)
            if moe.gate.task_dependent and not stacked:
                if _adds_per_token(block):
                    block.register_forward_hook(ExpandTasks())
                else:
                    block.register_forward_pre_hook(StackTasks(context))
                stacked = True
    backbone.reset_classifier(0)
    dim, patch = backbone.num_features, _patch_size(backbone)
    like = backbone.patch_embed.proj.weight  # heads follow the backbone's device and dtype
    fresh_head = partial(image_head, dim=dim, patch_size=patch[0], width=head_width)
    heads = {task.name: fresh_head(task).to(like) for task in tasks}
    return MultiTaskModel(backbone, tasks, heads, context, vit_features, fresh_head)


def image_head(task: Task, dim: int, patch_size: int, width: int) -> nn.Module:
    """A fresh head for images, on features of width `dim`.

    Raises:
        ValueError: a task of tokens, which images have none of.
    """
    if task.kind == "tagging":
        raise ValueError(f"tasks: {task.name!r} is of kind tagging, which texts have; of pixels: Task.segmentation")
    return make_head(task, dim, patch_size, width)


def vit_features(backbone: Timm, x: Tensor) -> Features:
    """Runs a timm ViT: the patch tokens of `forward_features`, and the vector its own classifier would read.

    Raises:
        ValueError: the image is not a whole number of patches, or has the wrong number of channels.
    """
    (ph, pw), (height, width) = _patch_size(backbone), (x.shape[-2], x.shape[-1])
    channels = backbone.patch_embed.proj.weight.shape[1]
    if x.shape[1] != channels:
        raise ValueError(f"x: got images with {x.shape[1]} channels, the model takes {channels}")
    if height % ph or width % pw:
        raise ValueError(f"x: images of {height}x{width} are not a whole number of {ph}x{pw} patches; resize or pad")
    fixed = backbone.patch_embed.img_size if getattr(backbone.patch_embed, "strict_img_size", False) else None
    if fixed is not None and (height, width) != tuple(fixed):
        raise ValueError(
            f"x: got images of {height}x{width}, the backbone was built for {fixed[0]}x{fixed[1]}; resize them, or "
            "build it with dynamic_img_size=True"
        )
    tokens = backbone.forward_features(x)
    pooled = backbone.forward_head(tokens, pre_logits=True)
    grid, prefix = (height // ph, width // pw), getattr(backbone, "num_prefix_tokens", 0)
    if tokens.ndim != 3 or tokens.shape[1] != prefix + grid[0] * grid[1] or pooled.ndim != 2:
        raise ValueError(
            f"backbone: {type(backbone).__name__} gives tokens {list(tokens.shape)} and pools them to "
            f"{list(pooled.shape)}; expected [b, {prefix} + {grid[0]} * {grid[1]}, d] and [b, d]: a plain ViT that "
            "keeps every patch, with a pooling"
        )
    return Features(tokens[:, prefix:], pooled, grid, (height, width))


def dense_mlp(mlp: Timm) -> tuple[Weights, dict[str, Any]]:
    """Weights and shape of one of timm's MLPs, in an expert's layout.

    Returns:
        {w1 [(1|2)h, d], b1, w2 [d_out, h], b2} and the keyword arguments of an `ExpertBank` with such experts.

    Raises:
        ValueError: not an MLP this adapter can express: unknown layers, inner norm, active dropout, other activation.
    """
    kind = type(mlp).__name__

    def refuse(why: str) -> ValueError:
        return ValueError(f"backbone: cannot turn its {kind} into experts: {why}")

    if not isinstance(getattr(mlp, "fc2", None), nn.Linear):
        raise refuse("expected linear layers fc1 (or fc1_g and fc1_x) and fc2")
    if not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity):
        raise refuse("it normalises its hidden units")
    if not isinstance(getattr(mlp, "gate", nn.Identity()), nn.Identity):
        raise refuse("it mixes tokens")
    if any(module.p > 0 for module in mlp.modules() if isinstance(module, nn.Dropout)):
        raise refuse("it has dropout; build the backbone with proj_drop_rate=0")
    gate_first = True
    if isinstance(getattr(mlp, "fc1_g", None), nn.Linear):
        glu, first, bias = True, [mlp.fc1_g.weight, mlp.fc1_x.weight], [mlp.fc1_g.bias, mlp.fc1_x.bias]
    elif isinstance(getattr(mlp, "fc1", None), nn.Linear):
        glu, first, bias = hasattr(mlp, "gate_last"), [mlp.fc1.weight], [mlp.fc1.bias]
        gate_first = not getattr(mlp, "gate_last", False)
    else:
        raise refuse("expected linear layers fc1 (or fc1_g and fc1_x) and fc2")
    w1, b1 = torch.cat(first), None if bias[0] is None else torch.cat(bias)
    if glu and not gate_first:
        w1, b1 = w1.roll(len(w1) // 2, 0), b1 if b1 is None else b1.roll(len(b1) // 2, 0)
    activation = activation_of(mlp.act)
    if activation is None:
        raise refuse(f"activation {mlp.act} is not one of gelu (erf), silu, relu")
    biased = b1 is not None or mlp.fc2.bias is not None
    if biased:  # a bank has both biases or none
        b1 = w1.new_zeros(len(w1)) if b1 is None else b1
        b2 = mlp.fc2.weight.new_zeros(mlp.fc2.out_features) if mlp.fc2.bias is None else mlp.fc2.bias
    else:
        b2 = None
    options = {
        "dim": w1.shape[1],
        "hidden": mlp.fc2.in_features,
        "out_dim": mlp.fc2.out_features,
        "activation": activation,
        "glu": glu,
        "bias": biased,
    }
    weights = {"w1": w1.detach(), "b1": detached(b1), "w2": mlp.fc2.weight.detach(), "b2": detached(b2)}
    if not agrees(mlp, weights, options):
        raise refuse("it computes something else than its layers fc1, act and fc2 do")
    return weights, options


def _find_blocks(backbone: Timm) -> list[tuple[str, Timm]]:
    stem = getattr(getattr(backbone, "patch_embed", None), "proj", None)
    plain = isinstance(stem, nn.Conv2d) and stem.kernel_size == stem.stride and stem.stride[0] == stem.stride[1]
    plain = plain and not hasattr(backbone.patch_embed, "backbone")  # a hybrid's patches are of a network's maps
    if isinstance(getattr(backbone, "blocks", None), nn.Sequential | nn.ModuleList) and plain:
        found = [(f"blocks.{i}", block) for i, block in enumerate(backbone.blocks)]
        if found and all(isinstance(getattr(block, "mlp", None), nn.Module) for _, block in found):
            return found
    raise ValueError(
        f"backbone: {type(backbone).__name__} is not a plain vision transformer: expected timm's `patch_embed.proj` "
        "(square patches of the image that do not overlap) and `blocks` with an `mlp` each (ViT, DeiT, EVA, BEiT and "
        "their kin)"
    )


def _adds_per_token(block: Timm) -> bool:
    """Whether a block is known to end in x + f(mlp(norm(x))) with an f that treats every token alike."""
    from timm.models.vision_transformer import Block

    # stochastic depth drops samples, which it takes the first axis for
    return isinstance(block, ExpertBlock) or (type(block) is Block and isinstance(block.drop_path2, nn.Identity))


def _patch_size(backbone: Timm) -> tuple[int, int]:
    height, width = backbone.patch_embed.proj.stride
    return int(height), int(width)
