"""Samples at hand, in whatever form they come, as the data sets that training and measuring read."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset, Subset

from moe_mtl.batches import in_order, shuffled
from moe_mtl.data import collate, pad_batch
from moe_mtl.multitask import move, task_ids

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


def samples_of(model: Any, data: Any, val: Any, seed: int) -> tuple[Any, Any]:
    """Samples to learn from and, or None, to validate on: some of them where `val` is None, none where it is False.

    Raises:
        ValueError: there are none, or they are no samples.
    """
    if hasattr(data, "split") and hasattr(data, "task_list"):
        if val is None:
            val = data.split("val")
        return data.split("train"), None if val is False else read_samples(model, val, "val")
    data = read_samples(model, data, "data")
    if val is False:
        return data, None
    if val is not None or len(data) < LEAST:
        return data, None if val is None else read_samples(model, val, "val")
    order, held = shuffled(len(data), seed, 0), max(1, round(HELD_OUT * len(data)))
    return Subset(data, order[held:]), Subset(data, order[:held])


def read_samples(model: Any, data: Any, argument: str) -> Any:
    """Samples as a data set whose batches fit a model.

    Raises:
        ValueError: there are none, or they are no samples; the message is about the argument of that name.
    """
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__") or isinstance(data, str | Mapping):
        raise ValueError(
            f"{argument}: got a {type(data).__name__}, expected samples: a list of dicts, a map-style data set"
        )
    if not len(data):
        raise ValueError(f"{argument}: got no samples")
    return TextRows(data, model) if model.input == "text" and not hasattr(data, "__getitems__") else data


def labelled_tasks(model: Any, samples: Any, tasks: Sequence[str] | str | None) -> list[str]:
    """Names of those of these tasks, or of all, that samples have labels of, in the model's order.

    Raises:
        ValueError: one is unknown, or no sample has a label of it.
    """
    known = [task.name for task in model.tasks]
    wanted = known if tasks is None else [known[i] for i in sorted(task_ids(model.tasks, tasks))]
    found = [name for name in wanted if _labelled(samples, name)]
    if lacking := [name for name in wanted if name not in found] if tasks is not None else []:
        raise ValueError(f"tasks: no sample has a label of {', '.join(lacking)}; a label's key is the name of its task")
    if not found:
        raise ValueError(f"data: no sample has a label of any of {', '.join(known)}; a label's key is its task's name")
    return found


def _labelled(samples: Any, name: str) -> bool:
    if hasattr(samples, "labelled"):
        return bool(len(samples.labelled(name)))
    return any(samples[i].get(name) is not None for i in range(len(samples)))


def with_labels(samples: Any, names: Sequence[str]) -> Any:
    """The samples that have a label of some of these tasks, where the data set knows which; else all."""
    if not hasattr(samples, "labelled"):
        return samples
    rows = sorted({int(i) for name in names for i in samples.labelled(name)})
    return samples if len(rows) == len(samples) else Subset(samples, rows)


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
