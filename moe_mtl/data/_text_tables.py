"""Rows of CSV, TSV, JSON and Parquet files and of data sets of the Hugging Face hub, each with where it stands."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_mtl.data._reading import TextError, read_lines, read_text
from moe_mtl.data._texts import SPLITS

ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
NAMES = {"train": ("train",), "val": ("val", "validation", "validation_matched", "dev", "valid"), "test": ("test",)}
HUB = "hub:"
Row = dict[str, Any]


@dataclass(frozen=True)
class TextTable:
    """Rows of a file, or of a part of a data set of the hub.

    Attributes:
        name: of either.
        rows: values by column, the same columns in each.
        wheres: what each row is called in messages: the file, and its line or number.
        classes: names of the classes, by their ids, of columns that hold ids and say so; only the hub's do.
        hidden: the id that stands for a class nobody tells; None where every value means what it says.
    """

    name: str
    rows: Sequence[Row]
    wheres: Sequence[str]
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    hidden: int | None = None


def read_tables(root: str) -> dict[str, TextTable]:
    """The table of each split, or a single one, called "", which is to be split.

    Args:
        root: a file; a folder with a file per split; or hub:NAME or hub:NAME:CONFIGURATION. With a training split alone
            the last two are as a file.

    Raises:
        FileNotFoundError: there is no such file or folder, or none to train on.
        ValueError: a file that is not what its ending says; the message names the line.
    """
    if not root.startswith(HUB) and (path := Path(root)).is_file():
        return {"": _read_file(path)}
    tables = _read_hub(root) if root.startswith(HUB) else _read_folder(Path(root))
    return {"": tables["train"]} if list(tables) == ["train"] else tables


def _read_folder(path: Path) -> dict[str, TextTable]:
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
    return {split: _read_file(file) for split, file in files.items()}


def _read_hub(root: str) -> dict[str, TextTable]:
    import datasets

    name, _, configuration = root.removeprefix(HUB).partition(":")
    found: Any = datasets.load_dataset(name, configuration or None)
    tables = {}
    for split in SPLITS:
        for own in NAMES[split]:
            if own in found:
                tables[split] = _read_part(found[own], f"{root}[{own}]")
    if not tables:
        raise FileNotFoundError(f"root: {root} has the parts {', '.join(map(str, found))}, expected train, val or test")
    return tables


def _read_part(part: Any, name: str) -> TextTable:
    """A part of a data set of `datasets`."""
    from datasets import ClassLabel

    each = {column: getattr(feature, "feature", feature) for column, feature in part.features.items()}  # of a list
    classes = {column: feature.names for column, feature in each.items() if isinstance(feature, ClassLabel)}
    # benchmarks keep the classes of their test part to themselves, and write -1
    return TextTable(name, part.to_list(), [f"{name}[{i}]" for i in range(len(part))], classes, hidden=-1)


def _read_file(path: Path) -> TextTable:
    if path.suffix not in ENDINGS:
        raise ValueError(f"root: {path} is none of {', '.join(ENDINGS)}")
    if path.suffix in (".csv", ".tsv"):
        found = list(_read_csv(path))
    elif path.suffix == ".parquet":
        found = list(_read_parquet(path))
    else:
        found = list(_read_jsonl(path) if path.suffix == ".jsonl" else _read_json(path))
    if not found:
        raise ValueError(f"root: {path} holds no rows")
    empty = {key: None for _, row in found for key in row}  # a row of JSON may lack a key
    return TextTable(str(path), [{**empty, **row} for _, row in found], [where for where, _ in found])


# ---- each kind of file: where its rows stand, and the rows -----------------------------------------------------------


def _read_csv(path: Path) -> Iterator[tuple[str, Row]]:
    """Values between commas, some in quotes; in .tsv between tabs, and a quote is a character as any other."""
    tabs = path.suffix == ".tsv"
    records = _records(path, tabs)
    where, names = next(records, (f"{path}:1", []))
    for name in names:
        if name and names.count(name) > 1:
            raise TextError(f"{where}: two columns are called {name!r}; rename one")
    remedy = (
        "no field can hold a tab, and an empty one keeps its own"
        if tabs
        else 'a field that holds commas goes between "quotes", and an empty one keeps its comma'
    )
    for where, fields in records:
        if len(fields) != len(names):
            raise TextError(f"{where}: has {len(fields)} fields, expected {len(names)} ({', '.join(names)}); {remedy}")
        yield where, dict(zip(names, fields, strict=True))


def _records(path: Path, tabs: bool) -> Iterator[tuple[str, list[str]]]:
    """The fields of each record and the line it begins in; without those where nothing stands."""
    content = read_text(path, newline="")
    how: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    reader = csv.reader(io.StringIO(content, newline=""), **how)
    usual = csv.field_size_limit(max(len(content), csv.field_size_limit()))  # of the process
    where = f"{path}:1"
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                yield where, fields
            where = f"{path}:{reader.line_num + 1}"
    except csv.Error as error:
        raise TextError(f"{where}: is no CSV ({error}); close quotes, and write one inside of quotes twice") from None
    finally:
        csv.field_size_limit(usual)


def _read_json(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        rows = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise TextError(
            f"{path}:{error.lineno}: is not JSON ({error.msg}, column {error.colno}); a file with an object on each "
            "line ends in .jsonl"
        ) from None
    if not isinstance(rows, list):
        raise TextError(f"{path}: holds {type(rows).__name__}, expected a list of objects, one per text")
    for i, row in enumerate(rows):
        yield _object(row, f"{path}[{i}]")


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise TextError(
                    f"{where}: is not JSON ({error.msg}, column {error.colno}); expected an object on each line"
                ) from None
            yield _object(row, where)


def _object(row: Any, where: str) -> tuple[str, Row]:
    if not isinstance(row, dict):
        raise TextError(f"{where}: got {type(row).__name__}, expected an object with a value per column")
    return where, row


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        rows = ParquetFile(path).read().to_pylist()
    except ArrowException as error:
        raise TextError(f"{path}: is no Parquet file ({error})") from error
    for i, row in enumerate(rows):
        yield f"{path}[{i}]", row
