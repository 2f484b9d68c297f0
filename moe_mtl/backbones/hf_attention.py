"""transformers encoders in which some layers have an attention sublayer per task.

Works on encoders whose layers hold their attention as `attention` (BERT, RoBERTa, ELECTRA, DeBERTa-v2, DistilBERT),
`attn` (ModernBERT) or `layer[0].SelfAttention` (T5).
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from moe_mtl.backbones._upcycle import chosen_blocks
from moe_mtl.backbones.hf_encoder import SHARED_INPUTS, Encoder, RepeatInputs, find_layers
from moe_mtl.layers import TaskContext

Rows = slice | Tensor  # neighbouring rows of a batch, or their numbers, int64


class TaskAttention(nn.Module):
    """A layer's attention, once per task: each copy runs on the rows of its own task alone.

    Takes and returns what the attention takes and returns, the task from a `TaskContext`. The copies start equal, and
    each is modules and parameters of its own: those of a task that takes no part in a step get no gradient at all.

    Args:
        attention: the module, called with hidden states [b, n, d] first; it becomes the first copy.
        context: the wrapping model's context.
        count: tasks t.
    """

    def __init__(self, attention: nn.Module, context: TaskContext, count: int):
        super().__init__()
        self.copies = nn.ModuleList([attention, *(copy.deepcopy(attention) for _ in range(count - 1))])
        self.context = context

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the copies return for their rows, put together in the order of the batch.

        Raises:
            RuntimeError: called outside a forward of the wrapping model, so that the task is unknown.
        """
        task = self.context.task
        if not self.context.active:
            raise RuntimeError(
                "attention has no task: call the MultiTaskModel, not its backbone, and leave the backbone's own "
                "activation checkpointing off (it calls layers again after the forward)"
            )
        if isinstance(task, int):
            return self.copies[task](*args, **kwargs)
        rows = args[0].shape[0]
        found = []
        if isinstance(task, Tensor):
            parts: list[tuple[int, Rows]] = [(i, (task == i).nonzero().flatten()) for i in task.unique().tolist()]
        else:
            each = rows // len(task)
            parts = [(i, slice(place * each, (place + 1) * each)) for place, i in enumerate(task)]
        for i, own in parts:
            some, named = tree_map(lambda value: _select(value, own, rows), (args, kwargs))  # noqa: B023
            named |= {name: kwargs[name] for name in SHARED_INPUTS & kwargs.keys()}
            found.append(self.copies[i](*some, **named))
        order = None if not isinstance(task, Tensor) else torch.cat([own for _, own in parts]).argsort()  # type: ignore[misc]
        counts = [len(range(*own.indices(rows))) if isinstance(own, slice) else len(own) for _, own in parts]
        if isinstance(found[0], tuple):
            return tuple(_join(list(values), counts, order) for values in zip(*found, strict=True))
        return _join(found, counts, order)

    def keep_tasks(self, tasks: Sequence[int]) -> None:
        """Drops, in place, every copy but those of these tasks, which take the places 0, 1, ..."""
        self.copies = nn.ModuleList([self.copies[i] for i in tasks])


def _select(value: Any, own: Rows, rows: int) -> Any:
    """The rows of a task of what has a row per sample; the rest, of one row or none, serves every task."""
    return value[own] if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == rows else value


def _join(values: list[Any], counts: list[int], order: Tensor | None) -> Any:
    """What the copies returned in one place, as one value for the whole batch.

    Args:
        values: one per copy that ran: tensors with a row per sample or one for all of them, or None.
        counts: samples of each.
        order: where each sample stands among those of all copies in turn; None where it stands.
    """
    if all(value is values[0] for value in values):  # None, or what was passed through
        return values[0]
    spread = [v if len(v) == n else v.expand(n, *v.shape[1:]) for v, n in zip(values, counts, strict=True)]
    joined = torch.cat(spread)
    return joined if order is None else joined.index_select(0, order)


def find_attention(layer: Any) -> tuple[nn.Module, str] | None:
    """The module that holds a layer's attention and the name it goes by there; None where there is none."""
    inner: Any = (
        layer.layer[0] if isinstance(getattr(layer, "layer", None), nn.ModuleList) and len(layer.layer) else None
    )
    holder: Any
    for holder, name in ((layer, "attention"), (layer, "attn"), (inner, "SelfAttention")):
        found = getattr(holder, name, None)
        if isinstance(found, nn.Module) and any(isinstance(module, nn.Linear) for module in found.modules()):
            return holder, name
    return None


def attention_per_task(
    backbone: Encoder, context: TaskContext, tasks: int, *, every: int = 2, blocks: Sequence[int] | None = None
) -> None:
    """Gives chosen layers, in place, an attention per task; from the first of them on tasks are stacked.

    Args:
        backbone: an encoder of transformers.
        context: of the model that wraps it.
        tasks: their number.
        every: every `every`-th layer, counted from the input: 2 takes layers 1, 3, 5, ...
        blocks: the layers, instead of `every`; negative numbers count from the end.

    Raises:
        ValueError: a structure this adapter does not know, or layer numbers out of range.
    """
    layers = find_layers(backbone)
    chosen = chosen_blocks(len(layers), every, blocks)
    for i in chosen:
        found = find_attention(layers[i])
        if found is None:
            raise ValueError(
                f"backbone: layer {i} of {type(backbone).__name__} has no attention this adapter knows: expected "
                "attention (BERT and its kin, DistilBERT), attn (ModernBERT) or layer[0].SelfAttention (T5)"
            )
        holder, name = found
        setattr(holder, name, TaskAttention(getattr(holder, name), context, tasks))
    for layer in layers[chosen[0] :]:
        layer.register_forward_pre_hook(RepeatInputs(context), with_kwargs=True)
