"""Texts of your own in CSV, JSON or Parquet, or any data set of the Hugging Face hub, with a small schema.

    python train.py text_moe_files --data.root=reviews.csv --data.text=review --data.labels=stars:regression,topic
    python train.py text_moe_files --data.root=folder --data.text=words --data.labels=tags:tagging
    python train.py text_moe_files --data.root=hub:nyu-mll/glue:mrpc --data.text=sentence1,sentence2 --data.labels=label

A file is split at random; a folder holds train, val (or validation, dev) and test files, or one of train to split.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_mtl.bio import is_bio
from moe_mtl.data._frames import random_parts
from moe_mtl.data._reading import TextError, bio_classes, class_ids
from moe_mtl.data._text_tables import Row, TextTable, read_tables
from moe_mtl.data._texts import SPLITS, TextData, Texts
from moe_mtl.tasks import Task, name_of_column, nearest

KINDS = ("classification", "binary", "multilabel", "regression", "tagging")


@dataclass(frozen=True, kw_only=True)
class TextFiles(TextData):
    """Tables with a column of texts and columns of labels.

    Labels of class are names or numbers; tags and several labels are lists, or strings with `|` between, or with spaces
    in a column without any `|`. A field may be empty: no label. In a .tsv file quotes are characters as any other. On
    the hub a class of -1 is no label, and classes have the names and the order they have there.

    A task has the name of its column, with _ for what cannot stand in a name ("star rating" makes star_rating) and with
    _task behind a name that is taken (type makes type_task).

    Attributes:
        root: a file; a folder with a file per split; or hub:NAME or hub:NAME:CONFIGURATION, read with `datasets`.
        text: the column of texts, of words where there are tags, or two columns of a pair, separated by a comma.
        labels: the columns of labels, separated by commas, each with its kind after a colon where it is not
            classification: binary, multilabel, regression or tagging.
        val: share of the rows of a single file drawn for validation.
        test: share of the rows of a single file drawn for testing.
        seed: of the draw.
    """

    text: str = "text"
    labels: str = "label"
    val: float = 0.1
    test: float = 0.1
    seed: int = 0

    def read(self) -> dict[str, Texts]:
        """The table.

        Raises:
            FileNotFoundError: there is no such file or folder.
            ValueError: a column is missing, a kind unknown, a line is not what it should be, or a label does not fit
                its kind.
        """
        assert self.root is not None
        tables = read_tables(self.root)
        texts = [name.strip() for name in self.text.split(",")]
        if len(texts) > 2:
            raise ValueError(f"text: got {len(texts)} columns, {', '.join(texts)}; expected one, or two of a pair")
        columns = _columns(self.labels)
        for table in tables.values():
            for name in (*texts, *(column for column, _ in columns.values())):
                if table.rows and name not in table.rows[0]:
                    raise ValueError(f"columns: {table.name} has no column {name!r}; {nearest(name, table.rows[0])}")
        tagged = any(kind == "tagging" for _, kind in columns.values())
        samples = [
            {"text": _text_of(row, texts, tagged, where), "where": where}
            for table in tables.values()
            for row, where in zip(table.rows, table.wheres, strict=True)
        ]
        tasks = []
        for name, (column, kind) in columns.items():
            task, labels = _read_labels(name, kind, _Cells.of(column, kind, list(tables.values())))
            tasks.append(task)
            for sample, label in zip(samples, labels, strict=True):
                if label is not None:
                    sample[name] = label
        parts = [split for split, table in tables.items() for _ in table.rows]
        if list(tables) == [""]:
            parts = random_parts(len(samples), self.val, self.test, self.seed, None)
        splits = {part: [row for row, own in zip(samples, parts, strict=True) if own == part] for part in SPLITS}
        return {"files": Texts(tuple(tasks), splits)}


def _columns(labels: str) -> dict[str, tuple[str, str]]:
    """Per task its column and its kind."""
    found: dict[str, tuple[str, str]] = {}
    for entry in labels.split(","):
        if not entry.strip():
            continue
        column, _, kind = (part.strip() for part in entry.partition(":"))
        if kind and kind not in KINDS:
            raise ValueError(f"labels: {column!r} has the unknown kind {kind!r}; {nearest(kind, KINDS)}")
        name = name_of_column(column)
        if name in found:
            raise ValueError(
                f"labels: columns {found[name][0]!r} and {column!r} both make a task {name!r}; name each once, and "
                "rename one that differs"
            )
        found[name] = (column, kind or "classification")
    return found


def _text_of(row: Row, columns: Sequence[str], tagged: bool, where: str) -> Any:
    """The text of a row: a string, a list of words where there are tags, or a pair."""
    for column in columns:
        value = row[column]
        words = len(columns) == 1 and isinstance(value, list) and all(isinstance(word, str) for word in value)
        if not (isinstance(value, str) or words):
            raise TextError(
                f"{where}: column {column!r} holds {value!r:.80} ({type(value).__name__}), expected a string"
                f"{' or a list of strings' if len(columns) == 1 else ''}; write it as one, or leave the row out"
            )
    if len(columns) == 2:
        return tuple(row[column] for column in columns)
    value = row[columns[0]]
    return value.split() if tagged and isinstance(value, str) else value


# ---- labels ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cells:
    """A column of labels, over all splits.

    Attributes:
        values: per row, None where there is no label.
        wheres: what each row is called in messages.
        classes: their names where the source tells; ids are replaced by them.
    """

    values: Sequence[Any]
    wheres: Sequence[str]
    classes: Sequence[str] | None

    @classmethod
    def of(cls, column: str, kind: str, tables: Sequence[TextTable]) -> "_Cells":
        """A column of some tables.

        Raises:
            ValueError: there is no label in it.
        """
        values, classes = [], None
        for table in tables:
            hidden = None if kind == "regression" else table.hidden
            names = table.classes.get(column) if kind not in ("regression", "binary") else None
            found = [None if _is_absent(row[column], hidden) else row[column] for row in table.rows]
            values += found if names is None else [_named(value, names) for value in found]
            classes = names if classes is None else classes
        if all(value is None for value in values):
            raise ValueError(f"labels: column {column!r} is empty")
        return cls(values, [where for table in tables for where in table.wheres], classes)

    def map(self, read: Callable[[Any, str], Any]) -> list[Any]:
        """What `read` makes of each label and of where it stands, None where there is no label."""
        rows = zip(self.values, self.wheres, strict=True)
        return [None if value is None else read(value, where) for value, where in rows]


def _is_absent(value: Any, hidden: int | None) -> bool:
    if isinstance(value, list):
        return False
    return value is None or value == "" or value != value or (hidden is not None and value == hidden)


def _named(value: Any, names: Sequence[str]) -> Any:
    """Names for ids of classes; None for one below zero."""
    if isinstance(value, list):
        return [_named(each, names) for each in value]
    return None if value is None or value < 0 else names[value]


def _read_labels(name: str, kind: str, cells: _Cells) -> tuple[Task, list[Any]]:
    """The task of a column, its classes from all rows, and the label of each row, None where there is none."""
    if kind == "regression":
        numbers = cells.map(lambda value, where: _number(value, name, where))
        given = np.array([number for number in numbers if number is not None])
        return Task.regression(name, mean=float(given.mean()), std=float(given.std()) or 1.0), numbers
    if kind == "binary":
        return Task.binary(name), cells.map(lambda value, where: _yes_or_no(value, name, where))
    if kind == "classification":
        found = cells.map(lambda value, where: [_class(value, name, where)])
    else:
        strings = [value for value in cells.values if isinstance(value, str)]
        separator = "|" if any("|" in value for value in strings) else None  # of the whole column; None is white space
        found = cells.map(lambda value, where: _parts(value, separator, name, where, tags=kind == "tagging"))
    seen = {part for parts in found if parts for part in parts if part is not None}
    classes = list(cells.classes or sorted(seen))
    if kind == "tagging":
        spans = "O" in classes and is_bio(classes)
        classes = bio_classes(classes) if spans and not cells.classes else classes
        task = Task.tagging(name, classes, metric="constrained_span_f1" if spans else "accuracy")
    elif kind == "multilabel":
        metrics = {"micro_f1": {}, "binary_accuracy": {}}
        task = Task.multilabel(name, len(classes), classes=classes, metrics=metrics)
    else:
        task = Task.classification(name, len(classes), classes=classes)
    rows = zip(found, cells.wheres, strict=True)
    return task, [None if parts is None else _label(parts, task, where) for parts, where in rows]


def _label(parts: Sequence[str | None], task: Task, where: str) -> Any:
    """What a sample has under a task's name for these classes."""
    ids = iter(class_ids([part for part in parts if part is not None], task.classes, task.name, where))
    found = [task.ignore_index if part is None else next(ids) for part in parts]
    if task.kind == "multilabel":
        return [float(c in found) for c in range(task.channels)]
    return found if task.kind == "tagging" else found[0]


def _class(value: Any, name: str, where: str) -> str:
    if isinstance(value, list | dict):
        raise TextError(
            f"{where}: label {value!r:.80} of task {name!r} is a {type(value).__name__}, expected one class; say "
            "multilabel or tagging behind the column, as --data.labels=COLUMN:multilabel"
        )
    return str(value)


def _parts(value: Any, separator: str | None, name: str, where: str, tags: bool) -> list[str | None]:
    """Names from a list, or from a string with something between them; in a list of tags None is none."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(separator) if part.strip()]
    parts = value if isinstance(value, list) else [value]
    if any(isinstance(part, list | dict) or (part is None and not tags) for part in parts):
        raise TextError(f"{where}: got {value!r:.80} for task {name!r}, expected a list of names")
    return [None if part is None else str(part) for part in parts]


def _yes_or_no(value: Any, name: str, where: str) -> float:
    number = _number(value, name, where)
    if number not in (0.0, 1.0):
        raise TextError(f"{where}: label {value!r} of the binary task {name!r} is neither 0 nor 1")
    return number


def _number(value: Any, name: str, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise TextError(
            f"{where}: label {value!r:.80} of task {name!r} is no number; leave the field empty where there is none"
        )
    return number
