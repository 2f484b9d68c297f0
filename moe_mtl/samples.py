"""Samples at hand, in whatever form they come, as the data sets that training and measuring read."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from moe_mtl.as_trained import read_splits
from moe_mtl.batches import in_order, shuffled
from moe_mtl.data import collate, pad_batch
from moe_mtl.data._frames import TableSplit
from moe_mtl.multitask import move, task_ids
from moe_mtl.tasks import Task

HELD_OUT = 0.2  # of samples that come without others to validate on
LEAST = 5  # samples from which on some are held out
USAGE = 256  # samples on which the use of experts is measured


class TextRows(Dataset):
    """Tokenized texts in a list, {"text": {...}, task: label}, padded to the longest of a batch.

    Args:
        rows: as `moe_mtl.data.TextSplit` has them.
        model: whose tasks and padding they get.
    """

    def __init__(self, rows: Any, model: Any):
        self.rows, self.tasks = rows, model.tasks
        self.pad_id = getattr(getattr(model.backbone, "config", None), "pad_token_id", None) or 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """A padded batch."""
        return pad_batch([self.rows[i] for i in indices], self.tasks, self.pad_id)


def samples_of(
    model: Any, data: Any, val: Any, seed: int, tasks: Sequence[str] | str | None = None
) -> tuple[Any, Any, list[str]]:
    """Samples with labels of some tasks to learn from; others, or None, to validate on; and the names of these tasks.

    Where `val` is None, some of `data` are held out, of those that have labels, or its split "val" is taken; none where
    it is False. A table is read with the model's columns and classes.

    Raises:
        ValueError: there are none, they are no samples, or have no labels of the tasks.
    """
    held = val
    if hasattr(data, "split") and hasattr(data, "task_list"):
        data, *rest = read_splits(model, data, "train", *(["val"] if val is None else []), tasks=tasks)
        held = rest[0] if rest else val
    else:
        data = read_samples(model, data, "data")
    learn = with_labels(model, data, labelled_tasks(model, data, tasks))
    if held is None and len(learn) >= LEAST:
        order, count = shuffled(len(learn), seed, 0), max(1, round(HELD_OUT * len(learn)))
        learn, held = Subset(learn, order[count:]), Subset(learn, order[:count])
    elif held is None or held is False:
        return learn, None, labelled_tasks(model, learn, tasks)
    else:
        held = read_samples(model, held, "val")
    names = labelled_tasks(model, learn, tasks)
    if not any(_labelled(held, task) for task in model.tasks if task.name in names):
        raise ValueError(
            f"val: none of the {len(held)} samples to validate on has a label of {', '.join(names)}; pass samples that "
            "have as val=, or val=False to go without"
        )
    return learn, held, names


def read_samples(model: Any, data: Any, argument: str) -> Any:
    """Samples as a data set whose batches fit a model.

    Raises:
        ValueError: there are none, or they are no samples; the message is about the argument of that name.
    """
    sized = hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, str | Mapping)
    if sized and not len(data):
        raise ValueError(f"{argument}: got no samples")
    try:
        first = data[0] if sized else None
    except (LookupError, TypeError):  # a data frame's keys are its columns
        first = None
    if not isinstance(first, Mapping):
        of = "" if first is None else f" of {type(first).__name__}"
        raise ValueError(
            f"{argument}: got a {type(data).__name__}{of}, expected samples: a list of dicts, a map-style data set"
        )
    return TextRows(data, model) if model.input == "text" and not _pads(data) else data


def read_training(model: Any, data: Any, argument: str) -> Any:
    """`read_samples`, which also takes a data set with splits: its "train", a table's with the model's columns.

    Raises:
        ValueError: as `read_samples` and `moe_mtl.as_trained.read_splits` say.
    """
    if hasattr(data, "split") and hasattr(data, "task_list"):
        return read_splits(model, data, "train")[0]
    return read_samples(model, data, argument)


def _pads(data: Any) -> bool:
    """Whether several samples come as a padded batch, as of `moe_mtl.data.TextSplit`, not as a list of dicts."""
    return hasattr(data, "__getitems__") and isinstance(data.__getitems__([0]), Mapping)


def labelled_tasks(model: Any, samples: Any, tasks: Sequence[str] | str | None) -> list[str]:
    """Names of those of these tasks, or of all, that samples have labels of, in the model's order.

    Raises:
        ValueError: one is unknown, or no sample has a label of it.
    """
    known = [task.name for task in model.tasks]
    wanted = range(len(known)) if tasks is None else sorted(task_ids(model.tasks, tasks))
    found = [known[i] for i in wanted if _labelled(samples, model.tasks[i])]
    if lacking := [known[i] for i in wanted if known[i] not in found] if tasks is not None else []:
        raise ValueError(f"tasks: no sample has a label of {', '.join(lacking)}; a label's key is the name of its task")
    if not found:
        raise ValueError(f"data: no sample has a label of any of {', '.join(known)}; a label's key is its task's name")
    return found


def with_labels(model: Any, samples: Any, names: Sequence[str]) -> Any:
    """The samples that have a label of some of these tasks, where that is known without reading all; else all."""
    found = [_rows_with(samples, task) for task in model.tasks if task.name in names]
    if any(rows is None for rows in found):
        return samples
    rows = sorted({int(i) for rows in found for i in rows or ()})
    return samples if len(rows) == len(samples) else Subset(samples, rows)


def _labelled(samples: Any, task: Task) -> bool:
    rows = _rows_with(samples, task)
    return any(has_label(samples[i], task) for i in range(len(samples))) if rows is None else bool(len(rows))


def _rows_with(samples: Any, task: Task) -> Sequence[int] | None:
    """Numbers of the samples that have a label of a task; None where only reading them would tell."""
    if hasattr(samples, "labelled"):
        return samples.labelled(task.name)
    if isinstance(samples, TableSplit):
        labels = samples.flat.get(task.name)
        return [] if labels is None else task.valid(labels).reshape(len(labels), -1).any(dim=1).nonzero()[:, 0].tolist()
    if isinstance(samples, TextRows):
        return _rows_with(samples.rows, task)
    if isinstance(samples, list | tuple):
        return [i for i, sample in enumerate(samples) if has_label(sample, task)]
    return None


def has_label(sample: Mapping[str, Any], task: Task) -> bool:
    """Whether a sample has a label of a task; NaN, the id of no class and None are none."""
    label = sample.get(task.name)
    try:
        return label is not None and bool(task.valid(torch.as_tensor(np.asarray(label))[None]).any())
    except (TypeError, ValueError, RuntimeError, IndexError):
        return True  # what is no label is refused where a batch is made of it, in words of its own


def inputs_of(model: Any, samples: Any, limit: int, batch_size: int = 32) -> Iterator[Any]:
    """Batches of what a model is called with, on its device, of so many samples at most.

    Args:
        model: whose `input` names the entry of a sample.
        samples: as `read_samples` returns them.
        limit: samples.
        batch_size: of them per batch.
    """
    for rows in in_order(samples, batch_size, limit):
        yield input_of(model, samples, rows)


def input_of(model: Any, samples: Any, rows: Sequence[int]) -> Any:
    """What a model is called with, on its device, of the samples of these numbers."""
    batch = samples.__getitems__(rows) if hasattr(samples, "__getitems__") else [samples[i] for i in rows]
    batch = collate(batch, [], inputs=(model.input,))
    return move(batch[model.input], next(model.parameters()).device)
