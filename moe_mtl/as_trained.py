"""Tables read with the columns and classes of a trained model, and what tells that a table is no longer what it was.

A table fits its columns to its own training rows: the ids of categories and classes in another file, or in the same one
after a change, mean something else to a model. Labels of pictures and texts must be numbered as the model's are.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_mtl.columns import Column, read_columns
from moe_mtl.data import encode_rows
from moe_mtl.data._frames import SPLITS, Source, TableData, TableSplit, label_tensor
from moe_mtl.data.table import LABEL_KINDS, Table
from moe_mtl.tasks import Task, name_of_column, nearest

Fingerprint = Mapping[str, Mapping[str, str]]


def read_splits(model: Any, data: Any, *names: str, tasks: Sequence[str] | str | None = None) -> list[Any]:
    """Splits of a data set; those of a table as a model reads them, whatever file it was trained on.

    Rows are encoded with the model's columns, and the names of classes looked up among the model's. A binary label
    without names, as of numbers, has the smaller value for "no" in every file. Labels of pictures and texts are checked
    of `tasks` alone, where these are not all that matter.

    Raises:
        ValueError: an unknown split or one without rows; a column the model needs is missing; a label is of another
            kind than the model's task or has a class that it does not know; other data as `check_labels`
            says.
    """
    columns = columns_of(model)
    if columns is None or not isinstance(data, TableData):
        wanted = [tasks] if isinstance(tasks, str) else tasks
        check_labels([task for task in model.tasks if wanted is None or task.name in wanted], data)
        return [data.split(name) for name in names]
    found = (_with_kinds(data, model.tasks) if isinstance(data, Table) else data).source()
    return [_read_split(found, columns, model.tasks, name) for name in names]


def columns_of(model: Any) -> tuple[Column, ...] | None:
    """The columns a model of tables was made with; None of other models, also where the option is empty."""
    config = getattr(model, "config", None)  # that of a model of one's own may be anything
    args = config.get("args") if isinstance(config, Mapping) else None
    columns = args.get("columns") if isinstance(args, Mapping) else None
    return read_columns(columns) if columns else None


def check_labels(tasks: Iterable[Task], data: Any) -> None:
    """Refuses data whose labels are of another kind, of another number of classes or values, or of classes in another
    order than those of a model's tasks of the same names.

    Raises:
        ValueError: names the first task that differs.
    """
    known = {task.name: task for task in data.task_list()}
    for task in tasks:
        found = known.get(task.name, task)
        for what, ours, theirs in (("kind", task.kind, found.kind), ("channels", task.channels, found.channels)):
            if ours != theirs:
                raise ValueError(
                    f"data: task {task.name!r} has {what} {theirs!r}, in the model {ours!r}; give it labels as the "
                    "model has them, or another name"
                )
        if found.classes != task.classes and set(found.classes) & set(task.classes):  # others are names of one's own
            raise ValueError(
                f"data: task {task.name!r} has the classes {found.classes}, in the model {task.classes}; number them "
                "as the model does"
            )


def check_columns(model: Any, data: Any) -> None:
    """Refuses data whose ids of categories or classes are not those of the model; data without columns pass.

    Raises:
        ValueError: names the first column or task that differs.
    """
    columns = columns_of(model)
    if columns is None or not callable(getattr(data, "columns", None)):
        return
    what = "make the model of this data: create_model(name, tasks=data.task_list(), **data.model_args()); finetune and "
    what += "eval.py read other files with the model's columns"
    for own, found in zip_longest(columns, read_columns(data.columns())):
        if own is None:
            raise ValueError(f"data: the model has no column {found.name!r}; {what}")
        if found is None:
            raise ValueError(f"data: has no column {own.name!r}, which the model has; {what}")
        if (own.name, own.kind) != (found.name, found.kind):
            raise ValueError(
                f"data: the model has the {own.kind} column {own.name!r} where the data has the {found.kind} column "
                f"{found.name!r}; {what}"
            )
        if (own.categories, own.size) != (found.categories, found.size):
            raise ValueError(f"data: column {own.name!r} has other categories or another size in the model; {what}")
    known = {task.name: task for task in data.task_list()}
    for task in model.tasks:
        classes = known[task.name].classes if task.name in known else ()
        if classes != task.classes and set(classes) & set(task.classes):  # others are names of one's own
            raise ValueError(f"data: task {task.name!r} has the classes {classes}, in the model {task.classes}; {what}")


def fingerprint(data: Any) -> dict[str, dict[str, str]]:
    """A digest of each column and each task of a table, {"column" or "task": {name: digest}}; empty for other data."""
    if not callable(getattr(data, "columns", None)):
        return {}
    tasks = [
        {"name": t.name, "kind": t.kind, "channels": t.channels, "classes": list(t.classes)} for t in data.task_list()
    ]
    return {
        what: {entry["name"]: _digest([place, entry]) for place, entry in enumerate(entries)}
        for what, entries in (("column", data.columns()), ("task", tasks))
    }


def first_change(old: Fingerprint, new: Fingerprint) -> str | None:
    """What differs between two fingerprints, in words; None where nothing does or one is empty."""
    for what in old if new else ():
        for name in dict.fromkeys((*old[what], *new[what])):
            if old[what].get(name) != new[what].get(name):
                how = "is gone" if name not in new[what] else "is new" if name not in old[what] else "is another one"
                return f"{what} {name!r} {how}"
    return None


def _digest(value: Any) -> str:
    """Of plain data; numbers count to six digits, so that rounding on another machine changes nothing."""
    text = json.dumps(_rounded(value), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return f"{value:.6g}" if isinstance(value, float) else value


def _with_kinds(data: Table, tasks: Sequence[Task]) -> Table:
    """The table with the model's kinds of labels where it says none: they are not read off the values again."""
    kinds = {task.name: task.kind for task in tasks if task.kind in LABEL_KINDS}
    entries = [entry.strip() for entry in data.tasks.split(",")]
    bare = {entry: kinds.get(name_of_column(entry)) for entry in entries if ":" not in entry}
    return replace(data, tasks=",".join(f"{entry}:{bare[entry]}" if bare.get(entry) else entry for entry in entries))


def _read_split(found: Source, columns: Sequence[Column], tasks: Sequence[Task], name: str) -> TableSplit:
    if name not in SPLITS:
        raise ValueError(f"name: unknown split {name!r}; {nearest(name, SPLITS)}")
    where = np.flatnonzero(found.part == name)
    if not len(where):
        raise ValueError(f"split: {name!r} has no rows; of {len(found.part)} rows give it some")
    rows = encode_rows(found.features.iloc[where], columns, {k: v[where] for k, v in found.vectors.items()})
    own = {task.name: task for task in tasks}
    labels = {
        task.name: _labels(label_tensor(found.labels[task.name][where], task), task, own.get(task.name, task))
        for task in found.tasks
    }
    extra = {name: torch.from_numpy(ids[where].astype(np.int64)) for name, ids in found.extra.items()}
    return TableSplit(rows, labels, extra)


def _labels(labels: Tensor, task: Task, own: Task) -> Tensor:
    """Labels of a table's task as a model's task of that name has them."""
    if task.kind != own.kind:
        raise ValueError(
            f"tasks: {task.name!r} is of kind {task.kind} in the table and {own.kind} in the model; name the kind, as "
            f"--data.tasks={task.name}:{own.kind}"
        )
    # as many classes as the model has without names are taken for the same; of others the names are the ids
    known = list(own.classes)
    if not known and own.kind == "binary":
        return labels
    if not known:
        known = list(task.classes) if task.channels == own.channels else [str(i) for i in range(own.channels)]
    if not task.classes or list(task.classes) == known:
        return labels
    place = {_plain(name): i for i, name in enumerate(known)}
    has = task.valid(labels)
    for i in map(int, labels[has].unique()):
        if _plain(task.classes[i]) not in place:
            raise ValueError(
                f"tasks: {task.name!r} is {task.classes[i]!r} in {int((labels == i).sum())} of {len(labels)} rows, no "
                f"class of the model, whose {len(known)} are {', '.join(known[:8])}; drop these rows or empty the field"
            )
    ids = torch.tensor([place.get(_plain(name), own.ignore_index) for name in task.classes])
    return ids[labels.where(has, 0).long()].to(labels.dtype).where(has, own.missing(labels))


def _plain(name: str) -> str:
    """The name of a class; numbers alike, whether their column had gaps, which makes 1 a 1.0, or not."""
    try:
        return str(float(name))
    except ValueError:
        return name
