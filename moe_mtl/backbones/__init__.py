"""Backbones: adapters that put task-gated experts into models of timm and transformers, which no other room imports.

One file per library. An adapter finds blocks by structure, not by name lists, and refuses what it does not know.
"""

import copy
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from moe_mtl.backbones._timm_config import describe_vit
from moe_mtl.backbones._upcycle import ExpertMaker
from moe_mtl.backbones.hf_encoder import TextModel, moefy_encoder
from moe_mtl.backbones.timm_vit import moefy_vit, upcycle
from moe_mtl.images import Colours
from moe_mtl.multitask import MultiTaskModel
from moe_mtl.tasks import Task, check_tasks

__all__ = ["TextModel", "moefy", "upcycle"]


def moefy(
    backbone: Any,
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
    """Turns a dense model into a task-gated mixture-of-experts model that computes the same features at first.

    Images become `{task: prediction}`; texts do as a tokenizer writes them, and their padding is never routed.
    Sparse upcycling: each chosen MLP becomes a bank of experts made from its weights, and the routers start fresh.
    With `hidden="copy"` every expert is the whole MLP and the selected weights are divided by their detached sum, so
    the mixture equals the MLP while the routers still get a gradient. With `hidden="split"` the MLP's hidden units are
    dealt out over the experts, which costs no more than the routers and an output bias per expert; the sum is exact
    only when every expert is used with equal weight, so it needs k == experts and starts the routers at zero.

    Paper: Komatsuzaki et al. 2023, Sparse Upcycling, https://arxiv.org/abs/2212.05055 (section 2.2, appendix B).
    Differs: weights are normalised by their detached sum rather than by the sum, which would leave the router without
        gradient at equal experts; tasks, routers per task and "split" are not in the paper.

    Args:
        backbone: a timm ViT or an encoder of transformers, such as a `BertModel`; it is copied, not changed. What a
            classifier or another head adds to it is dropped.
        tasks: what the new model predicts; each gets a fresh head.
        gate: a name in `moe_mtl.gates.GATES`.
        experts: experts per bank.
        k: experts used per token; None for the gate's default, 4 for most, or all where it is dense.
        every: experts go into every `every`-th block, counted from the input: 2 takes blocks 1, 3, 5, ...
        blocks: the blocks that get experts, instead of `every`; negative numbers count from the end.
        hidden: "copy" or "split".
        gate_args: options of the gate.
        head_width: feature maps of the dense heads, which texts have none of.

    Returns:
        The model. How many parameters the backbone had and has is printed to stderr. `moe_mtl.save` takes it; of a
        timm model only if its architecture can be built again from the name timm gave it and options read off it, and
        stderr says why where it cannot. The `colours` of a timm model, mean and std, are kept for `moe_mtl.Predictor`.

    Raises:
        ValueError: no model, a structure this adapter does not know, block numbers out of range, a task that its inputs
            cannot have, or "split" where it is inexact.
    """
    if not isinstance(backbone, nn.Module):
        raise ValueError(
            f"backbone: got {type(backbone).__name__}, expected a model, such as timm.create_model(name) or an encoder "
            "of transformers"
        )
    tasks, backbone = (
        check_tasks(tasks),
        copy.deepcopy(getattr(backbone, "_orig_mod", backbone)),
    )  # compiled: what is in it
    make = ExpertMaker(len(tasks), gate=gate, experts=experts, k=k, hidden=hidden, gate_args=gate_args)
    of_transformers = hasattr(getattr(backbone, "config", None), "model_type")
    if of_transformers:
        backbone = getattr(backbone, "base_model", backbone)
    elif hasattr(backbone, "reset_classifier"):
        backbone.reset_classifier(0)
    before = sum(p.numel() for p in backbone.parameters())
    model: Any
    if of_transformers:
        model = moefy_encoder(backbone, tasks, make, every=every, blocks=blocks)
    else:
        names = _describe(backbone)
        model = moefy_vit(backbone, tasks, make, every=every, blocks=blocks, head_width=head_width)
        known = getattr(backbone, "pretrained_cfg", None) or {}
        model.colours = Colours.of(known.get("mean"), known.get("std"))
        if isinstance(names, str):
            model.unnamed = names
            print(f"moefy: moe_mtl.save will not take the model: {names}", file=sys.stderr)
        else:
            how = {"every": every, "blocks": None if blocks is None else list(blocks), "head_width": head_width}
            how |= {name: list(values) for name, values in model.colours._asdict().items()}
            model.config = {"name": "timm_moe", "args": {**names, **make.options, **how}}
    after = sum(p.numel() for p in model.backbone.parameters())
    print(f"moefy: backbone parameters {before / 1e6:.3f} M -> {after / 1e6:.3f} M", file=sys.stderr)
    return model


def _describe(backbone: Any) -> dict[str, Any] | str:
    """How a timm backbone is built again, or why it cannot be."""
    try:
        return describe_vit(backbone)
    except ValueError as error:
        return str(error)
