"""timm vision transformers with task-gated experts in place of chosen MLPs.

Works on any timm model whose `forward_features` gives tokens [b, n, d] and whose blocks have an `mlp` of one of timm's
shapes (`Mlp`, `GluMlp`, `SwiGLU`): ViT, DeiT, EVA, BEiT, ViT-relpos and their kin.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe_mtl.experts import ExpertBank
from moe_mtl.gates import GATES, Gate, create_gate, resolve_k
from moe_mtl.heads import Features, make_head
from moe_mtl.kernels.ops import moe_mlp, plan_routing
from moe_mtl.layers import ContextMoE, ExpandTasks, ExpertBlock, MoE, StackTasks, TaskContext
from moe_mtl.multitask import MultiTaskModel
from moe_mtl.tasks import Task, check_tasks

Weights = dict[str, Tensor | None]
Timm = Any  # a module of timm, read by structure: its attributes are not declared


def build_vit(**options: Any) -> Timm:
    """A timm `VisionTransformer` with fresh weights, without classifier, for images of any size its patches divide."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(num_classes=0, dynamic_img_size=True, **options)


def moefy(
    backbone: Timm,
    tasks: Sequence[Task],
    *,
    gate: str = "noisy_topk",
    experts: int = 16,
    k: int | None = None,
    every: int = 2,
    blocks: Sequence[int] | None = None,
    hidden: Literal["copy", "split"] = "copy",
    gate_args: Mapping[str, Any] | None = None,
    head_width: int = 16,
) -> MultiTaskModel:
    """Turns a dense timm ViT into a task-gated mixture-of-experts model that computes the same features at first.

    Sparse upcycling: each chosen MLP becomes a bank of experts made from its weights, and the routers start fresh.
    With `hidden="copy"` every expert is the whole MLP and the selected weights are divided by their detached sum, so
    the mixture equals the MLP while the routers still get a gradient. With `hidden="split"` the MLP's hidden units are
    dealt out over the experts, which costs no more than the routers and an output bias per expert; the sum is exact
    only when every expert is used with equal weight, so it needs k == experts and starts the routers at zero.

    Paper: Komatsuzaki et al. 2023, Sparse Upcycling, https://arxiv.org/abs/2212.05055 (section 2.2, appendix B).
    Differs: weights are normalised by their detached sum rather than by the sum, which would leave the router without
        gradient at equal experts; tasks, routers per task and "split" are not in the paper.

    Args:
        backbone: a timm model; it is copied, not changed. Its classifier is dropped.
        tasks: what the new model predicts; each gets a fresh head.
        gate: a name in `moe_mtl.gates.GATES`.
        experts: experts per bank.
        k: experts used per token; None for 4, or for all where the gate is dense.
        every: experts go into every `every`-th block, counted from the input: 2 takes blocks 1, 3, 5, ...
        blocks: the blocks that get experts, instead of `every`; negative numbers count from the end.
        hidden: "copy" or "split".
        gate_args: options of the gate.
        head_width: feature maps of the dense heads.

    Returns:
        The model. How many parameters the backbone had and has is printed to stderr.

    Raises:
        ValueError: a structure this adapter does not know, block numbers out of range, or "split" where it is inexact.
    """
    tasks, backbone = check_tasks(tasks), copy.deepcopy(backbone)
    if hidden not in ("copy", "split"):
        raise ValueError(f"hidden: got {hidden!r}, expected 'copy' or 'split'")
    k = resolve_k(gate, experts, k)
    if hidden == "split" and k != experts:
        raise ValueError(
            f"hidden: 'split' computes what the dense model did only when every expert is used; got k={k} of "
            f"{experts} experts. Use k={experts}, or hidden='copy'"
        )
    # a softmax over all experts: the weights of the chosen add up to less
    chosen = "normalize" in inspect.signature(GATES[gate]).parameters
    router_args: dict[str, Any] = {"normalize": "detached"} if chosen else {}
    if hidden == "split" and chosen:
        router_args["noise_std"] = 0.0  # noise would make the weights unequal in training
    router_args |= gate_args or {}
    backbone.reset_classifier(0)
    before = sum(p.numel() for p in backbone.parameters())

    def upcycle(mlp: Timm) -> MoE:
        weights, options = dense_mlp(mlp)
        if hidden == "split" and options["hidden"] % experts:
            raise ValueError(f"experts: {options['hidden']} hidden units do not split into {experts} equal experts")
        router = create_gate(gate, options["dim"], experts, len(tasks), k, **router_args)
        if hidden == "split":
            router.zero_scores()
        _check_exact(gate, router, hidden)
        if hidden == "split":
            weights, options = _split(weights, options, experts)
        else:
            weights = {name: w if w is None else w.expand(experts, *w.shape) for name, w in weights.items()}
        w1 = weights["w1"]
        assert w1 is not None
        bank = ExpertBank(experts, **options).to(w1)
        with torch.no_grad():
            for name, w in weights.items():
                if w is not None:
                    getattr(bank, name).copy_(w)
        return MoE(router.to(w1.device), bank)

    model = with_experts(backbone, tasks, upcycle, every=every, blocks=blocks, head_width=head_width)
    after = sum(p.numel() for p in model.backbone.parameters())
    print(f"moefy: backbone parameters {before / 1e6:.3f} M -> {after / 1e6:.3f} M", file=sys.stderr)
    return model


def _check_exact(name: str, router: Gate, hidden: str) -> None:
    """Refuses a gate with which equal experts do not act as the MLP they come from.

    Raises:
        ValueError: its weights do not sum to 1, or tasks cannot see all experts that a "split" needs.
    """
    if not router.shares_out:
        raise ValueError(
            f"gate: the weights of {name!r} with {router.num_experts} experts do not sum to 1; take another gate"
        )
    for task in range(router.num_tasks if hidden == "split" else 0):
        seen = router.reachable(task)
        if seen is not None and len(seen) < router.num_experts:
            raise ValueError(
                f"hidden: 'split' needs every expert, but with gate {name!r} task {task} sees {len(seen)} of "
                f"{router.num_experts}; use hidden='copy'"
            )


@torch.no_grad()
def upcycle(model: nn.Module, dense: Mapping[str, Tensor]) -> None:
    """Gives a model, in place, the weights of a dense one of its shape: every expert becomes the MLP it stands for.

    Sparse upcycling in the middle of a training (see `moefy`, which makes the model as well). Routers stay as they are.
    While experts are equal, the model computes what the dense one did if a token's weights add up to 1: `k` experts of
    the MLP's hidden width and `normalize="detached"`, or a dense mixture.

    Args:
        model: on a timm backbone, its experts without GLU.
        dense: `state_dict` of the dense model, its MLPs of two linear layers `fc1` and `fc2`. Layers that have experts
            there, too, are copied as they are.

    Raises:
        ValueError: names or shapes do not fit; nothing was changed.
    """
    found = dict(dense)
    for path, layer in model.named_modules():
        if isinstance(layer, ContextMoE) and f"{path}.fc1.weight" in found:
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
        every: as in `moefy`.
        blocks: as in `moefy`.
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
    heads = {task.name: make_head(task, dim, patch[0], head_width).to(like) for task in tasks}
    return MultiTaskModel(backbone, tasks, heads, context, vit_features)


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
    activation = _activation(mlp.act)
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
    weights = {"w1": w1.detach(), "b1": _detached(b1), "w2": mlp.fc2.weight.detach(), "b2": _detached(b2)}
    if not _agrees(mlp, weights, options):
        raise refuse("it computes something else than its layers fc1, act and fc2 do")
    return weights, options


@torch.no_grad()
def _agrees(mlp: Timm, weights: Weights, options: dict[str, Any]) -> bool:
    """Whether an expert with these weights computes what the MLP does, on a few random tokens."""
    w1, generator = weights["w1"], torch.Generator().manual_seed(0)
    assert w1 is not None
    x = torch.randn(1, 9, options["dim"], generator=generator).to(w1)
    single = [None if w is None else w.unsqueeze(0) for w in weights.values()]
    gates, plan = x.new_ones(9, 1), plan_routing(torch.zeros(9, 1, dtype=torch.int64, device=x.device), 1)
    ours = moe_mlp(x[0], *single, gates, plan, activation=options["activation"], glu=options["glu"])  # type: ignore[arg-type]
    theirs = mlp(x)[0]
    rounding = 5e-2 if x.element_size() == 2 else 1e-3
    return theirs.shape == ours.shape and bool((ours - theirs).norm() <= rounding * theirs.norm() + 1e-12)


def _detached(w: Tensor | None) -> Tensor | None:
    return None if w is None else w.detach()


def _activation(act: nn.Module) -> str | None:
    probe = torch.linspace(-4, 4, 33)  # told by what it computes: timm has several classes for one function
    with torch.no_grad():
        y = act(probe.clone())
    for name in ("gelu", "silu", "relu"):
        if torch.equal(y, getattr(nn.functional, name)(probe)):
            return name
    return None


def _split(weights: Weights, options: dict[str, Any], experts: int) -> tuple[Weights, dict[str, Any]]:
    """Deals hidden units out over experts; the second layer is scaled so that equal weights 1/E add up to the MLP."""
    glu, h = options["glu"], options["hidden"] // experts

    def deal(w: Tensor | None) -> Tensor | None:  # [(1|2) e h, ...] -> [e, (1|2) h, ...]
        if w is None:
            return None
        parts = w.unflatten(0, (2 if glu else 1, experts, h)).transpose(0, 1)
        return parts.flatten(1, 2)

    w2, b2 = weights["w2"], weights["b2"]
    assert w2 is not None
    split: Weights = {
        "w1": deal(weights["w1"]),
        "b1": deal(weights["b1"]),
        "w2": w2.unflatten(1, (experts, h)).transpose(0, 1) * experts,
        "b2": None if b2 is None else b2.expand(experts, -1),
    }
    return split, {**options, "hidden": h}


def _find_blocks(backbone: Timm) -> list[tuple[str, Timm]]:
    stem = getattr(getattr(backbone, "patch_embed", None), "proj", None)
    plain = isinstance(stem, nn.Conv2d) and stem.kernel_size == stem.stride and stem.stride[0] == stem.stride[1]
    if isinstance(getattr(backbone, "blocks", None), nn.Sequential | nn.ModuleList) and plain:
        found = [(f"blocks.{i}", block) for i, block in enumerate(backbone.blocks)]
        if found and all(isinstance(getattr(block, "mlp", None), nn.Module) for _, block in found):
            return found
    raise ValueError(
        f"backbone: {type(backbone).__name__} is not a plain vision transformer: expected timm's `patch_embed.proj` "
        "(square patches that do not overlap) and `blocks` with an `mlp` each (ViT, DeiT, EVA, BEiT and their kin)"
    )


def _adds_per_token(block: Timm) -> bool:
    """Whether a block is known to end in x + f(mlp(norm(x))) with an f that treats every token alike."""
    from timm.models.vision_transformer import Block

    # stochastic depth drops samples, which it takes the first axis for
    return isinstance(block, ExpertBlock) or (type(block) is Block and isinstance(block.drop_path2, nn.Identity))


def chosen_blocks(count: int, every: int, blocks: Sequence[int] | None) -> list[int]:
    """The numbers, ascending, of the blocks that get experts; arguments as in `moefy`.

    Raises:
        ValueError: `every` or `blocks` is out of range for a backbone of `count` blocks, or `blocks` is empty.
    """
    if blocks is None:
        if not 1 <= every <= count:
            raise ValueError(f"every: got {every}, expected 1 to {count} for a backbone of {count} blocks")
        return list(range(every - 1, count, every))
    chosen = sorted({i + count if i < 0 else i for i in blocks})
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise ValueError(f"blocks: got {list(blocks)}, expected block numbers from {-count} to {count - 1}")
    return chosen


def _patch_size(backbone: Timm) -> tuple[int, int]:
    height, width = backbone.patch_embed.proj.stride
    return int(height), int(width)
