"""Which linear maps of an encoder get adapters, found by structure."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moe_mtl.multitask import evaluating
from moe_mtl.tasks import nearest

PROBE = (2, 3)  # texts and tokens of the run that shows what each map is given


def find_targets(encoder: Any, layers: Sequence[nn.Module], targets: Sequence[str] | None) -> list[str]:
    """Names of the linear maps to adapt, as `encoder.get_submodule` takes them, in the encoder's order.

    A map qualifies that is given the tokens [b, n, d] of the batch whenever it is called. DeBERTa's maps of relative
    positions do not: a position belongs to no sample, so to no task.

    Args:
        encoder: of transformers, dense.
        layers: its layers.
        targets: names of maps inside a layer, whole or their last parts, such as "query" or "intermediate.dense"; all
            maps of attention and feed-forward when None.

    Raises:
        ValueError: no such map, something else than an `nn.Linear`, or a map of something else than tokens.
    """
    inside: dict[str, tuple[str, nn.Module]] = {}  # by full name: the name inside its layer
    of_layer = {id(layer) for layer in layers}
    for prefix, layer in encoder.named_modules():
        if id(layer) in of_layer:
            inside |= {f"{prefix}.{name}": (name, module) for name, module in layer.named_modules() if name}
    linear = {name: short for name, (short, module) in inside.items() if isinstance(module, nn.Linear)}
    fit = _takes_tokens(encoder, list(linear))
    if targets is None:
        found = [name for name in linear if name in fit]
        if not found:
            raise ValueError(
                f"encoder: no layer of {type(encoder).__name__} has an nn.Linear that takes tokens; adapters fit no "
                "other maps, quantised or convolutional ones included"
            )
        return found
    if isinstance(targets, str) or not targets:
        raise ValueError(f"targets: got {targets!r}, expected a list of names such as ['query', 'value'], or None")
    chosen: set[str] = set()
    for target in targets:
        named = [name for name, short in linear.items() if f".{short}".endswith(f".{target}")]
        other = [module for short, module in inside.values() if f".{short}".endswith(f".{target}")]
        if not named and other:
            raise ValueError(f"targets: {target!r} is a {type(other[0]).__name__}; adapters fit nn.Linear alone")
        if not named:
            known = sorted({linear[name] for name in fit})
            raise ValueError(f"targets: no linear map {target!r} in the layers; {nearest(target, known)}")
        if strange := [name for name in named if name not in fit]:
            raise ValueError(f"targets: {strange[0]} is given something else than the batch's tokens; leave it out")
        chosen |= set(named)
    return [name for name in linear if name in chosen]


def _takes_tokens(encoder: Any, names: Sequence[str]) -> set[str]:
    """Of some linear maps those whose every input is [b, n, d], seen in one run on two texts."""
    seen: dict[str, list[bool]] = {name: [] for name in names}
    handles = []
    for name in names:

        def note(module: nn.Module, args: tuple, calls: list[bool] = seen[name]) -> None:
            calls.append(args[0].ndim == 3 and tuple(args[0].shape[:2]) == PROBE)

        handles.append(encoder.get_submodule(name).register_forward_pre_hook(note))
    ids = torch.zeros(PROBE, dtype=torch.int64, device=next(encoder.parameters()).device)
    try:
        with evaluating(encoder):
            encoder(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        for handle in handles:
            handle.remove()
    return {name for name, calls in seen.items() if calls and all(calls)}
