"""Texts of your own in CSV, JSON or Parquet, or any data set of the Hugging Face hub, with a small schema.

    python train.py text_moe_files --data.root=reviews.csv --data.text=review --data.labels=stars:regression,topic
    python train.py text_moe_files --data.root=folder --data.text=words --data.labels=tags:tagging
    python train.py text_moe_files --data.root=hub:nyu-mll/glue:mrpc --data.text=sentence1,sentence2 --data.labels=label

A file is split at random; a folder holds train, val (or validation, dev) and test files.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_mtl.data._frames import random_parts
from moe_mtl.data._texts import SPLITS, TextData, TextError, Texts, bio_classes, class_ids
from moe_mtl.tasks import Task, nearest

ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
KINDS = ("classification", "binary", "multilabel", "regression", "tagging")
NAMES = {"train": ("train",), "val": ("val", "validation", "validation_matched", "dev", "valid"), "test": ("test",)}
HUB = "hub:"
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TextFiles(TextData):
    """Tables with a column of texts and columns of labels.

    Labels of class are names or numbers; tags and several labels are lists, or strings with spaces or `|` between. A
    field may be empty: no label.

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
            ValueError: a column is missing, a kind unknown, or a label does not fit its kind.
        """
        assert self.root is not None
        tables = _tables(self.root)
        columns = [name.strip() for name in self.text.split(",")]
        wanted = [entry.strip().partition(":") for entry in self.labels.split(",") if entry.strip()]
        for path, rows in tables.values():
            for name in (*columns, *(name for name, _, _ in wanted)):
                if rows and name not in rows[0]:
                    raise ValueError(f"columns: {path} has no column {name!r}; {nearest(name, rows[0])}")
        every = [row for _, rows in tables.values() for row in rows]
        tasks = {name: _task(name, kind or "classification", [row[name] for row in every]) for name, _, kind in wanted}
        split = [
            (name, _row(row, columns, tasks, f"{path}:{i + 2}" if path.endswith((".csv", ".tsv")) else f"{path}[{i}]"))
            for name, (path, rows) in tables.items()
            for i, row in enumerate(rows)
        ]
        names = np.array([name for name, _ in split])
        if list(tables) == [""]:
            names = random_parts(len(split), self.val, self.test, self.seed, None)
        splits = {part: [row for (_, row), own in zip(split, names, strict=True) if own == part] for part in SPLITS}
        return {"files": Texts(tuple(tasks.values()), splits)}


def _tables(root: str) -> dict[str, tuple[str, list[Row]]]:
    """Per split, or under "" where they are to be drawn, where the rows come from and the rows."""
    if root.startswith(HUB):
        import datasets

        name, _, configuration = root.removeprefix(HUB).partition(":")
        found: Any = datasets.load_dataset(name, configuration or None)
        # hidden labels of a benchmark's test part are written as -1
        return {s: (f"{root}[{own}]", found[own].to_list()) for s in SPLITS for own in NAMES[s] if own in found}
    path = Path(root)
    if path.is_file():
        return {"": (str(path), _rows(path))}
    if not path.is_dir():
        raise FileNotFoundError(f"root: {path} is neither a file nor a folder, nor {HUB}NAME")
    files = {
        split: file
        for split in SPLITS
        for own in NAMES[split]
        for file in (path / f"{own}{ending}" for ending in ENDINGS)
        if file.is_file()
    }
    if "train" not in files:
        raise FileNotFoundError(f"root: {path} holds no train file; expected train{', train'.join(ENDINGS)}")
    return {split: (str(file), _rows(file)) for split, file in files.items()}


def _rows(path: Path) -> list[Row]:
    import pandas

    if path.suffix not in ENDINGS:
        raise ValueError(f"root: {path} is none of {', '.join(ENDINGS)}")
    if path.suffix in (".json", ".jsonl"):
        content = path.read_text(encoding="utf-8")
        try:
            lines = [line for line in content.splitlines() if line.strip()]
            rows: Any = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else json.loads(content)
        except ValueError as error:
            raise TextError(f"{path}: is not JSON ({error})") from error
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise TextError(f"{path}: expected a list of objects, one per text")
        keys = {key: None for row in rows for key in row}
        rows = [{**keys, **row} for row in rows]
    elif path.suffix == ".parquet":
        rows = pandas.read_parquet(path).to_dict(orient="records")
    else:
        read = pandas.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", dtype=str, keep_default_na=False)
        rows = read.to_dict(orient="records")
    if not rows:
        raise ValueError(f"root: {path} holds no rows")
    return rows


def _absent(value: Any) -> bool:
    return value is None or value == "" or value == -1 or (isinstance(value, float) and value != value)


def _parts(value: Any) -> list[str]:
    """A list of names, from a list or from a string with | or spaces between."""
    if isinstance(value, str):
        return [part for part in (value.split("|") if "|" in value else value.split()) if part]
    return [str(part) for part in value]


def _task(name: str, kind: str, values: Sequence[Any]) -> Task:
    """The task of a column, its classes from all values."""
    if kind not in KINDS:
        raise ValueError(f"labels: {name!r} has the unknown kind {kind!r}; {nearest(kind, KINDS)}")
    seen = [value for value in values if not _absent(value)]
    if not seen:
        raise ValueError(f"labels: column {name!r} is empty")
    if kind == "regression":
        numbers = np.array([_number(value, name, "labels") for value in seen])
        return Task.regression(name, mean=float(numbers.mean()), std=float(numbers.std()) or 1.0)
    if kind == "binary":
        return Task.binary(name)
    if kind == "classification":
        classes = sorted({str(value) for value in seen})
        return Task.classification(name, len(classes), classes=classes)
    lists = [_parts(value) for value in seen]
    if kind == "multilabel":
        classes = sorted({label for labels in lists for label in labels})
        return Task.multilabel(name, len(classes), classes=classes, metrics={"micro_f1": {}, "binary_accuracy": {}})
    tags = {tag for labels in lists for tag in labels}
    spans = "O" in tags and all(tag == "O" or tag[:2] in ("B-", "I-") for tag in tags)
    return Task.tagging(
        name, bio_classes(list(tags)) if spans else sorted(tags), metric="constrained_span_f1" if spans else "accuracy"
    )


def _row(row: Row, columns: Sequence[str], tasks: Mapping[str, Task], where: str) -> Row:
    tagged = any(task.kind == "tagging" for task in tasks.values())
    if len(columns) == 1:
        text = row[columns[0]]
        words = text is not None and (tagged or not isinstance(text, str))
        text = (text.split() if isinstance(text, str) else [str(word) for word in text or ()]) if words else text
    else:
        text = tuple(row[column] for column in columns)
    found: Row = {"text": text, "where": where}
    for name, task in tasks.items():
        value = row[name]
        if _absent(value):
            continue
        if task.kind == "classification":
            found[name] = class_ids([str(value)], task.classes, name, where)[0]
        elif task.kind == "tagging":
            found[name] = class_ids(_parts(value), task.classes, name, where)
        elif task.kind == "multilabel":
            own = class_ids(_parts(value), task.classes, name, where)
            found[name] = [float(c in own) for c in range(task.channels)]
        else:
            found[name] = _number(value, name, where)
            if task.kind == "binary" and found[name] not in (0.0, 1.0):
                raise TextError(f"{where}: label {value!r} of the binary task {name!r} is neither 0 nor 1")
    return found


def _number(value: Any, name: str, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TextError(f"{where}: label {value!r} of task {name!r} is no number") from error
