"""From a data frame to columns, tensors and splits: what every table data set goes through."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from moe_mtl.columns import COLUMN_KINDS, Column, of_kind, read_columns
from moe_mtl.data._values import as_text, check_names, has_numbers, has_sets, places, read_numbers, read_sets
from moe_mtl.tasks import CLASS_KINDS, Task, nearest

if TYPE_CHECKING:
    from pandas import DataFrame, Series

SPLITS = ("train", "val", "test")
EDGES = 16  # bins of a numeric column between quantiles of its rows, and as many between those of its distinct values
STEPS = 64  # of float32 that a standard deviation of a numeric column should have


class TableSplit(Dataset):
    """Rows as tensors: a batch of indices is a few tensor reads, not a dict per row.

    Args:
        rows: inputs, see `moe_mtl.columns`.
        labels: per task, as in `moe_mtl.tasks`.
        extra: further entries of a sample, such as the ids of groups that a metric reads, [b] each.
    """

    def __init__(
        self, rows: Mapping[str, Tensor], labels: Mapping[str, Tensor], extra: Mapping[str, Tensor] | None = None
    ):
        self.rows, self.flat = dict(rows), {**labels, **(extra or {})}

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample: `table`, the tensors of the row, and a label per task."""
        return self._read(index)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """A batch of samples, stacked already: what a `DataLoader` asks for."""
        return self._read(torch.as_tensor(indices))

    def _read(self, index: Any) -> dict[str, Any]:
        return {"table": {k: t[index] for k, t in self.rows.items()}, **{k: t[index] for k, t in self.flat.items()}}


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a data set read, before anything is fitted to it.

    Attributes:
        features: the input columns, one row per sample.
        labels: per task, [n] or [n, c], missing ones as `moe_mtl.tasks` writes them.
        part: "train", "val" or "test" for every row.
        tasks: in the order of the model.
        kinds: the kind of columns where it cannot be read off their values.
        vectors: further inputs of a fixed size, float32 [n, size].
        extra: further entries of a sample, int64 [n].
    """

    features: "DataFrame"
    labels: Mapping[str, NDArray]
    part: NDArray
    tasks: tuple[Task, ...]
    kinds: Mapping[str, str] = field(default_factory=dict)
    vectors: Mapping[str, NDArray] = field(default_factory=dict)
    extra: Mapping[str, NDArray] = field(default_factory=dict)


class TableData:
    """A data set whose samples are rows of a table. Subclasses are frozen dataclasses that say what to read.

    Columns are fitted to the training rows alone; what a split holds is read once per object.
    """

    def source(self) -> Source:
        """Reads the table."""
        raise NotImplementedError

    @cached_property
    def _source(self) -> Source:
        found = self.source()
        check_labels(found)
        return found

    @cached_property
    def _columns(self) -> tuple[Column, ...]:
        return fit_columns(self._source)

    def task_list(self) -> tuple[Task, ...]:
        """The tasks it has labels for."""
        return self._source.tasks

    def columns(self) -> list[dict[str, Any]]:
        """Its input columns as plain data: what a model for tables needs to know, see `moe_mtl.columns`."""
        return [column.to_dict() for column in self._columns]

    def model_args(self) -> dict[str, Any]:
        """Options a model for this data set takes from it."""
        return {"columns": self.columns()}

    def split(self, name: str) -> TableSplit:
        """The rows of one split, "train", "val" or "test".

        Raises:
            ValueError: an unknown split, or one without rows.
        """
        if name not in SPLITS:
            raise ValueError(f"name: unknown split {name!r}; {nearest(name, SPLITS)}")
        found = self._source
        where = np.flatnonzero(found.part == name)
        if not len(where):
            raise ValueError(f"split: {name!r} has no rows; of {len(found.part)} rows give it some")
        rows = encode_rows(found.features.iloc[where], self._columns, {k: v[where] for k, v in found.vectors.items()})
        labels = {task.name: label_tensor(found.labels[task.name][where], task) for task in found.tasks}
        extra = {name: torch.from_numpy(ids[where].astype(np.int64)) for name, ids in found.extra.items()}
        return TableSplit(rows, labels, extra)


# ---- fitting --------------------------------------------------------------------------------------------------------


def fit_columns(found: Source) -> tuple[Column, ...]:
    """The columns of a source, from its training rows. A column with one value there is left out, with a warning.

    Raises:
        ValueError: a kind is unknown or does not fit its column, or no column is left.
    """
    train = found.part == "train"
    if not train.any():
        raise ValueError(f"split: of {len(train)} rows none is for training")
    for name, kind in found.kinds.items():
        if name not in found.features:
            raise ValueError(f"columns: no column {name!r}; {nearest(name, map(str, found.features.columns))}")
        if kind not in COLUMN_KINDS[:3]:
            raise ValueError(f"columns: {name!r} has the unknown kind {kind!r}; {nearest(kind, COLUMN_KINDS[:3])}")
    columns = []
    for name in found.features.columns:
        column = fit_column(found.features[name][train], found.kinds.get(name))
        if column is None:
            warnings.warn(f"column {name!r} is constant over {int(train.sum())} training rows: left out", stacklevel=2)
        else:
            columns.append(column)
    columns += [Column(name=name, kind="vector", size=values.shape[1]) for name, values in found.vectors.items()]
    if not columns:
        raise ValueError(f"columns: none is left of {len(found.features.columns)}; a model needs an input")
    return tuple(columns)


def fit_column(values: "Series", kind: str | None = None) -> Column | None:
    """One column from its training values; None when it is constant.

    Numbers (booleans aside) are numeric, lists multihot, everything else categorical, unless `kind` says otherwise.
    """
    name = str(values.name)
    if kind is None:
        kind = "numeric" if has_numbers(values) else "multihot" if has_sets(values) else "categorical"
    if kind == "numeric":
        return fit_numbers(name, read_numbers(values))
    if kind == "multihot":
        found = sorted({member for members in read_sets(values) for member in members})
        return Column(name=name, kind="multihot", categories=found) if found else None
    texts = as_text(values)
    found = sorted({text for text in texts if text is not None})
    constant = not found or (len(found) == 1 and None not in texts)
    return None if constant else Column(name=name, kind="categorical", categories=found)


def fit_numbers(name: str, numbers: NDArray[np.float64]) -> Column | None:
    """A numeric column, NaN where missing; None when it is constant. Warns where float32 takes values for one."""
    seen = numbers[~np.isnan(numbers)]
    missing = len(seen) < len(numbers)
    if not len(seen) or (seen.min() == seen.max() and not missing):
        return None
    distinct, mean, std = np.unique(seen), float(seen.mean()), float(seen.std())
    if len(distinct) == 1:  # what it tells is whether there is a value
        return Column(name=name, kind="numeric", mean=mean, has_missing=True)
    step = float(np.spacing(np.float32(np.abs(seen).max())))
    kept = len(np.unique(distinct.astype(np.float32)))
    if step * STEPS > std and kept < len(distinct):
        warnings.warn(
            f"column {name!r}: float32 keeps {kept} of {len(distinct)} distinct values, in steps of {step:g} at a "
            f"standard deviation of {std:.3g}; subtract its smallest value, split it, as a time into day and hour, or "
            "give it the kind categorical",
            stacklevel=2,
        )
    levels = np.linspace(0, 1, EDGES + 1)
    # quantiles of the rows alone would put no edge among the few large values of a column that is mostly zero
    edges = np.unique(np.quantile(seen, levels).tolist() + np.quantile(distinct, levels).tolist()).tolist()
    return Column(name=name, kind="numeric", mean=mean, std=std, edges=edges, has_missing=missing)


# ---- encoding -------------------------------------------------------------------------------------------------------


def encode_rows(
    frame: "DataFrame",
    columns: Sequence[Column | Mapping[str, Any]],
    vectors: Mapping[str, NDArray] | None = None,
) -> dict[str, Tensor]:
    """Rows of a data frame as a model takes them, see `moe_mtl.columns`: of new data, too.

    A category that the training rows did not have, or none at all, gets the id 0; further columns are not read.

    Args:
        frame: has the columns by name.
        columns: of the model, such as `model.config["args"]["columns"]`.
        vectors: values [b, size] of the columns of kind vector.

    Raises:
        ValueError: a column is missing or there twice, a numeric one holds something else than numbers or one that
            float32 cannot hold, or a multihot one something else than sets.
    """
    rows: dict[str, Tensor] = {}
    columns = read_columns(columns)
    for column in columns:
        if column.kind != "vector" and column.name not in frame:
            raise ValueError(
                f"columns: the {len(frame)} rows have no column {column.name!r}; "
                f"{nearest(column.name, map(str, frame.columns))}"
            )
    check_names(frame, (column.name for column in columns))
    if numbers := of_kind(columns, "numeric"):
        found = np.stack([read_numbers(frame[column.name]) for column in numbers], axis=1)
        rows["numeric"] = torch.from_numpy(found.astype(np.float32))
    if categories := of_kind(columns, "categorical"):
        ids = []
        for column in categories:
            place = places(column.categories)
            ids.append([0 if text is None else place.get(text, -1) + 1 for text in as_text(frame[column.name])])
        rows["categorical"] = torch.tensor(ids, dtype=torch.int64).T.contiguous()
    if sets := of_kind(columns, "multihot"):
        found = np.zeros((len(frame), sum(column.width for column in sets)), dtype=np.float32)
        first = 0
        for column in sets:
            place = places(column.categories)
            for row, members in enumerate(read_sets(frame[column.name])):
                found[row, [first + place[member] for member in members if member in place]] = 1.0
            first += column.width
        rows["multihot"] = torch.from_numpy(found)
    if sized := of_kind(columns, "vector"):
        given = vectors or {}
        for column in sized:
            if column.name not in given or given[column.name].shape[1:] != (column.size,):
                raise ValueError(f"columns: vector {column.name!r} is missing or not [b, {column.size}]")
        parts = [given[column.name].astype(np.float32) for column in sized]
        rows["vector"] = torch.from_numpy(np.concatenate(parts, axis=1))
    return rows


def label_tensor(values: NDArray, task: Task) -> Tensor:
    """Labels with the dtype their kind has."""
    return torch.from_numpy(np.array(values, dtype=np.int64 if task.kind in CLASS_KINDS else np.float32))


def check_labels(found: Source) -> None:
    """Refuses tasks that cannot be learned from the training rows, and labels out of range.

    Raises:
        ValueError: a task has no label, or one class alone, in the training rows, or a label out of its range anywhere.
    """
    train = found.part == "train"
    for task in found.tasks:
        labels = label_tensor(found.labels[task.name], task)
        task.check_target(labels, where=f"labels of {len(labels)} rows")
        own = labels[torch.from_numpy(train)]
        seen = own[task.valid(own)]
        if not len(seen):
            raise ValueError(
                f"tasks: {task.name!r} has no label in {len(own)} training rows; leave it out of the tasks"
            )
        if task.kind != "multilabel" and task.weight > 0 and bool((seen == seen.flatten()[0]).all()):
            raise ValueError(
                f"tasks: {task.name!r} has the one label {seen.flatten()[0].item():g} in all {len(seen)} labelled of "
                f"{len(own)} training rows: there is nothing to learn; leave it out of the tasks"
            )


# ---- splitting ------------------------------------------------------------------------------------------------------


def random_parts(rows: int, val: float, test: float, seed: int, groups: NDArray | None = None) -> NDArray:
    """ "train", "val" or "test" for every row, drawn at random; rows of one group stay together.

    Args:
        rows: how many.
        val: share of the rows (or groups) for validation.
        test: share of the rows (or groups) for testing.
        seed: of the draw.
        groups: the group of every row, or None.

    Raises:
        ValueError: the shares leave nothing to train on.
    """
    if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1):
        raise ValueError(f"val, test: got {val} and {test}, expected shares that leave some rows to train on")
    units, of_row = (np.arange(rows), np.arange(rows)) if groups is None else np.unique(groups, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(units))
    held, tested = round(val * len(units)), round(test * len(units))
    part = np.full(len(units), "train", dtype="<U5")
    part[order[:held]], part[order[held : held + tested]] = "val", "test"
    return part[of_row]


def generated_parts(train: int, val: int, test: int) -> NDArray:
    """ "train", "val" or "test" for every row of a generated set: so many of each, in this order.

    Raises:
        ValueError: a number is below 1.
    """
    for name, count in (("num_train", train), ("num_val", val), ("num_test", test)):
        if count < 1:
            raise ValueError(f"{name}: got {count}, expected at least 1 row")
    return np.repeat(np.array(SPLITS), [train, val, test])
