"""What a model does on samples of yours: which experts its tasks use there, and what its layers were called with."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_mtl.multitask import count_rows, evaluating, move
from moe_mtl.tasks import Task

DICTS = {
    "table": "rows as a dict of tensors [b, ...], see moe_mtl.columns",
    "text": "texts as a tokenizer's output, a dict of tensors [b, n]",
}
BATCH = 64  # samples that come one by one and run together


@dataclass(frozen=True)
class Call:
    """One call of a layer: what it was called with, and what it returned, [.., d_out]."""

    args: tuple
    options: Mapping[str, Any]
    y: Tensor


@dataclass(frozen=True)
class Measured:
    """What calibration samples showed of a model.

    Attributes:
        mass: by layer, the share of each task's gate weight, in absolute value, on each of the e experts, rows sum to
            1, float64 [t, e]. Every routing on the way to a task is the task's, also that of streams tasks share.
        tokens: by layer, tokens routed, each once per task it was routed for.
        calls: by layer, the calls for each task; none where they were not asked for.
    """

    mass: dict[str, Tensor]
    tokens: dict[str, int]
    calls: dict[str, list[list[Call]]]


def measure(
    model: Any, calibration: Iterable[Any], known: Sequence[Task] | None = None, *, calls: bool = False
) -> Measured:
    """Runs every task of a model alone on the samples, in eval mode without gradients.

    Args:
        model: has `moe_layers`.
        calibration: batches or samples, see `moe_mtl.sparse.extract`; read once.
        known: tasks whose labels may stand in dicts; the model's own when None.
        calls: keep what every layer was called with, which takes the memory of all these activations.

    Raises:
        ValueError: it is empty, holds something else, or has labels of other tasks and none of a task of the model.
    """
    layers, tasks = model.moe_layers, model.tasks
    sums = {name: torch.zeros(len(tasks), layer.gate.num_experts).double() for name, layer in layers.items()}
    tokens = {name: [0] * len(tasks) for name in layers}
    kept: dict[str, list[list[Call]]] = {name: [[] for _ in tasks] for name in layers}
    names = {task.name for task in (tasks if known is None else known)}
    device, labelled, count = next(model.parameters()).device, set(), 0

    def noted() -> Iterator[Any]:
        for item in one_by_one(calibration, "calibration"):
            if isinstance(item, Mapping):
                labelled.update(name for name in names if item.get(name) is not None)
            yield item

    with evaluating(model), ExitStack() as stack:
        row = 0
        for name, layer in layers.items() if calls else ():

            def record(_: Any, args: tuple, options: dict[str, Any], out: tuple, name: str = name) -> None:
                kept[name][row].append(Call(args, options, out[0]))

            stack.enter_context(layer.register_forward_hook(record, with_kwargs=True))
        for position, item in enumerate(grouped(noted(), model, ())):
            x, count = _input(item, position, model.input), count + 1
            if not count_rows(x):
                raise ValueError(f"calibration: item {position} is an empty batch; leave it out")
            for row, task in enumerate(tasks):
                for name, routing in model(move(x, device), tasks=[task.name], return_routing=True)[1].items():
                    weights = routing.dense_weights().abs()
                    valid = None if routing.valid is None else routing.valid.unsqueeze(1)
                    weights = weights if valid is None else weights.where(valid, 0)
                    sums[name][row] += weights.double().sum(0).cpu()
                    tokens[name][row] += len(weights) if valid is None else int(valid.sum())
    if not count:
        raise ValueError("calibration: got no samples; pass an iterable of batches that can be read once more")
    if labelled and (missing := [task.name for task in tasks if task.name not in labelled]):
        raise ValueError(
            f"calibration: has labels of {', '.join(sorted(labelled))} and no sample of {', '.join(missing)}; pass "
            "inputs like those the tasks will meet; if these are, without their labels"
        )
    total = {name: sum(n) if layers[name].gate.task_dependent else max(n) for name, n in tokens.items()}
    return Measured({name: s / s.sum(1, keepdim=True) for name, s in sums.items()}, total, kept)


# ---- inputs ---------------------------------------------------------------------------------------------------------


def one_by_one(items: Any, argument: str) -> Iterator[Any]:
    """What an iterable gives, or a map-style data set by number, whose length alone may tell where it ends.

    Raises:
        ValueError: neither; the message is about the argument of that name.
    """
    if hasattr(items, "__iter__"):
        return iter(items)
    if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
        raise ValueError(
            f"{argument}: got a {type(items).__name__}, expected batches or samples: a loader, a data set, a list"
        )
    return (items[i] for i in range(len(items)))


def grouped(items: Iterable[Any], model: Any, tasks: Sequence[Task]) -> Iterator[Any]:
    """Batches of a model's input and labels: samples that come one by one are put together, the rest is passed on.

    Args:
        items: batches or samples, dicts that hold the input under its name; anything else is passed on.
        model: its `input` names the entry.
        tasks: whose labels to collect.
    """
    waiting: list[Any] = []
    for item in items:
        if _is_sample(item, model.input):
            waiting.append(item)
            if len(waiting) < BATCH:
                continue
            yield _collated(waiting, model, tasks)
            waiting = []
        else:
            if waiting:
                yield _collated(waiting, model, tasks)
                waiting = []
            yield item
    if waiting:
        yield _collated(waiting, model, tasks)


def _is_sample(item: Any, name: str) -> bool:
    """Whether an item is a dict of one sample."""
    found = item.get(name) if isinstance(item, Mapping) else None
    if name in DICTS:
        return isinstance(found, Mapping) and all(isinstance(t, Tensor) and t.ndim == 1 for t in found.values())
    return found is not None and not (isinstance(found, Tensor) and found.ndim > 3)


def _collated(samples: Sequence[Mapping[str, Any]], model: Any, tasks: Sequence[Task]) -> dict[str, Any]:
    from moe_mtl.data import collate  # late: models are loaded without it
    from moe_mtl.data._texts import pad_batch

    if model.input == "text":
        pad = getattr(getattr(model.backbone, "config", None), "pad_token_id", None) or 0
        wanted = {"text", *(task.name for task in tasks)}
        return pad_batch([{k: v for k, v in sample.items() if k in wanted} for sample in samples], tasks, pad)
    return collate(samples, tasks, inputs=(model.input,))


def _input(item: Any, position: int, name: str) -> Any:
    """What a model that takes a batch's entry `name` is called with: images [b, c, h, w], rows of a table, or texts."""
    if name not in DICTS:
        return _images(item, position)
    rows = item.get(name, item) if isinstance(item, Mapping) else item
    if not isinstance(rows, Mapping) or not all(isinstance(t, Tensor) and t.ndim == 2 for t in rows.values()):
        raise ValueError(
            f"calibration: item {position} is a {type(item).__name__}; expected {DICTS[name]}, or a dict that holds "
            f"them under {name!r}"
        )
    return rows


def _images(item: Any, position: int) -> Tensor:
    """The images [b, c, h, w] of one calibration item."""
    image = item.get("image") if isinstance(item, Mapping) else item
    if not isinstance(image, Tensor) or image.ndim not in (3, 4):
        got = type(item).__name__
        if isinstance(item, Mapping):
            got += f" of {', '.join(map(str, item))}"
        elif isinstance(item, Tensor):
            got += f" of shape {list(item.shape)}"
        raise ValueError(
            f"calibration: item {position} is a {got}; expected images [b, c, h, w] or [c, h, w], or a dict that holds "
            "them under 'image'"
        )
    return image.unsqueeze(0) if image.ndim == 3 else image
