"""Any CSV or Parquet file with one or more label columns.

    python train.py mmoe_table --data.root=table.csv --data.tasks=income,hours
    python train.py mmoe_table --data.root=table.parquet --data.tasks=income:binary,hours:regression

Kinds are read off the values where they are not said: numbers are numeric columns and everything else categorical ones;
a label with two values is a binary task, numbers with a fraction or many values are a regression, the rest classes.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe_mtl.data._frames import SPLITS, Source, TableData, random_parts
from moe_mtl.data._values import SETS, as_text, has_numbers, read_numbers
from moe_mtl.tasks import Task, name_of_column, nearest

if TYPE_CHECKING:
    from pandas import DataFrame, Series

MOST_CLASSES = 20  # whole numbers with more values are taken for a regression
GAPS = ("NaN", "nan", "NA", "N/A", "NULL", "null")  # how writers of CSV mark a missing number
LABEL_KINDS = ("binary", "classification", "regression")


@dataclass(frozen=True, kw_only=True)
class Table(TableData):
    """A table in a file.

    A row may lack any label: an empty field. Empty fields of input columns are values of their own: the mean and a mark
    in numeric columns, the id of unseen categories in categorical ones. NaN, NA, N/A and NULL are missing, too, in a
    column that holds numbers else; in one of text they are text. Constant columns are left out, with a warning.

    Attributes:
        root: the file: CSV or TSV (also compressed) or Parquet.
        tasks: the label columns, separated by commas, each with its kind after a colon where the guess is wrong:
            binary, classification or regression. A task has the name of its column, with _ for what is no letter or
            digit ("star rating" makes star_rating) and _task behind a name that is taken (type makes type_task).
        kinds: kinds of input columns where the guess is wrong: numeric, categorical or multihot (members between `|`).
        drop: input columns to leave out, such as row numbers.
        split_by: a column that says "train", "val" or "test" per row; None to draw the splits.
        group: a column whose rows of one value stay in one split, as those of a user; it is not an input. A row
            without a value is drawn alone.
        val: share of the rows, or groups, drawn for validation.
        test: share of the rows, or groups, drawn for testing.
        seed: of the draw.
    """

    root: str | None = None
    tasks: str = ""
    kinds: dict[str, str] = field(default_factory=dict)
    drop: list[str] = field(default_factory=list)
    split_by: str | None = None
    group: str | None = None
    val: float = 0.1
    test: float = 0.1
    seed: int = 0

    def source(self) -> Source:
        """Reads the file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: no label column is named, a column is missing, or labels do not fit their kind.
        """
        frame = read_frame(self.root)
        wanted = [entry.strip().partition(":") for entry in self.tasks.split(",") if entry.strip()]
        if not wanted:
            raise ValueError(f"tasks: name the label columns, as --data.tasks=a,b; columns: {', '.join(frame.columns)}")
        named = [name for name, _, _ in wanted] + list(self.drop) + [c for c in (self.split_by, self.group) if c]
        for name in named:
            if name not in frame:
                raise ValueError(
                    f"columns: {self.root} ({len(frame)} rows) has no column {name!r}; {nearest(name, frame.columns)}"
                )
        if self.split_by:
            said = np.array([text or "" for text in as_text(frame[self.split_by])])
            wrong, part = ~np.isin(said, SPLITS), said.astype("<U5")
            if wrong.any():
                raise ValueError(
                    f"split_by: {self.split_by!r} is {frame[self.split_by][wrong].tolist()[0]!r} in one of "
                    f"{int(wrong.sum())} rows of {len(frame)}; expected {', '.join(SPLITS)}"
                )
        else:
            groups = None if self.group is None else number_groups(frame[self.group])
            part = random_parts(len(frame), self.val, self.test, self.seed, groups)
        read: dict[str, tuple[Task, NDArray]] = {}
        columns: dict[str, str] = {}
        for column, _, kind in wanted:
            name = name_of_column(column)
            if columns.setdefault(name, column) != column:
                raise ValueError(
                    f"tasks: columns {columns[name]!r} and {column!r} both make a task {name!r}; rename one"
                )
            read[name] = read_label(frame[column], kind or None, part == "train")
        return Source(
            features=frame.drop(columns=list(dict.fromkeys(named))),
            labels={name: values for name, (_, values) in read.items()},
            part=part,
            tasks=tuple(task for task, _ in read.values()),
            kinds=self.kinds,
        )


def number_groups(values: "Series") -> NDArray[np.int64]:
    """A number for every row, the same for rows of one value; rows without a value have one each."""
    texts = as_text(values)
    number = {text: i for i, text in enumerate(sorted({text for text in texts if text is not None}))}
    return np.array([len(number) + row if text is None else number[text] for row, text in enumerate(texts)])


def read_frame(root: str | None) -> "DataFrame":
    """A CSV, TSV or Parquet file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no file is named, its name ends otherwise, it holds no rows, or two columns have one name.
    """
    import pandas

    if root is None:
        raise ValueError("root: name the table, as --data.root=table.csv")
    path = Path(root)
    if not path.is_file():
        raise FileNotFoundError(f"root: {path} is not a file; expected a CSV, TSV or Parquet table")
    name = path.name.lower()
    if not name.endswith(".parquet") and ".csv" not in name and ".tsv" not in name:
        raise ValueError(f"root: {path} is neither .csv, .tsv nor .parquet")
    try:
        if name.endswith(".parquet"):
            frame = pandas.read_parquet(path)
            names = [str(column) for column in frame.columns]
        else:
            # an empty field alone is missing: "None" and "NA" are values of many a column. All of a column at once,
            # lest the parts of a long one are read as different types
            how: dict[str, Any] = {"sep": "\t" if ".tsv" in name else ",", "keep_default_na": False}
            frame = pandas.read_csv(path, na_values=[""], low_memory=False, **how)
            first = pandas.read_csv(path, header=None, nrows=1, dtype=str, **how).iloc[0]
            names = [given for given in first if given]
    except (ValueError, OSError) as error:  # pandas' own errors are of these kinds
        raise ValueError(f"root: {path} cannot be read as a table ({str(error).strip()})") from error
    if not len(frame):
        raise ValueError(f"root: {path} holds no rows")
    if not name.endswith(".parquet") and not isinstance(frame.index, pandas.RangeIndex):  # made of the first fields
        raise ValueError(
            f"root: rows of {path} have more fields than its first line has names; name every column, and put a field "
            'that holds the separator between "quotes"'
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):  # pandas would call the second x.1
        raise ValueError(f"root: {path} has several columns {', '.join(map(repr, twice))}; rename or drop all but one")
    frame.columns = [str(column) for column in frame.columns]
    return frame if name.endswith(".parquet") else frame.apply(read_gaps)


def read_gaps(values: "Series") -> "Series":
    """A column of text as numbers, if all of it is but for marks of missing ones; any other column as it is."""
    from pandas import to_numeric
    from pandas.api.types import is_string_dtype

    gaps = values.isin(GAPS) if is_string_dtype(values) else None
    if gaps is None or not gaps.any():
        return values
    numbers = to_numeric(values[~gaps].dropna(), errors="coerce")
    return values if not len(numbers) or numbers.isna().any() else numbers.reindex(values.index)


def read_label(values: "Series", kind: str | None, train: NDArray) -> tuple[Task, NDArray]:
    """A label column's task and its labels.

    The values of a binary or classification label are taken in ascending order, numbers by size: the smaller of two is
    "no". Two texts are the names of no and yes. Classes and the scale of a regression are those of the training rows.

    Args:
        values: the column.
        kind: binary, classification or regression; None to read it off the values.
        train: bool [n], the training rows.

    Raises:
        ValueError: the kind is unknown or does not fit; a value that no training row has.
    """
    from pandas import CategoricalDtype, Series
    from pandas.api.types import is_float_dtype

    name, task_name = str(values.name), name_of_column(str(values.name))
    if isinstance(values.dtype, CategoricalDtype):
        values = values.astype(object)
    elif has_numbers(values) and values.dtype == object:  # decimals
        values = Series(read_numbers(values), index=values.index, name=name)
    if any(isinstance(value, SETS) for value in values):
        raise ValueError(f"tasks: {name!r} holds lists, expected one value per row; write a column per value")
    seen = values[train].dropna()
    if kind is not None and kind not in LABEL_KINDS:
        raise ValueError(f"tasks: {name!r} has the unknown kind {kind!r}; {nearest(kind, LABEL_KINDS)}")
    if not len(seen):
        raise ValueError(f"tasks: {name!r} has no label in {int(train.sum())} training rows; leave it out of the tasks")
    number = has_numbers(values)
    distinct = sorted(seen.unique())
    if kind is None:
        whole = not is_float_dtype(seen) or bool((seen % 1 == 0).all())
        many = number and (not whole or len(distinct) > MOST_CLASSES)
        kind = "regression" if many else "binary" if len(distinct) <= 2 else "classification"
    if kind == "regression":
        numbers = read_numbers(values)
        own = numbers[train & ~np.isnan(numbers)]
        return Task.regression(task_name, mean=float(own.mean()), std=float(own.std()) or 1.0), numbers
    if len(distinct) == 1:
        raise ValueError(
            f"tasks: {name!r} has the one label {seen.tolist()[0]!r} in all {len(seen)} labelled of {int(train.sum())} "
            "training rows: there is nothing to learn; leave it out of the tasks, or draw other splits"
        )
    if kind == "binary" and len(distinct) > 2:
        raise ValueError(
            f"tasks: {name!r} has {len(distinct)} values ({', '.join(map(str, distinct[:5]))}, ...) in {len(seen)} "
            "labelled training rows; a binary label has two; give it the kind classification or regression"
        )
    place = {value: i for i, value in enumerate(distinct)}
    found = values.map(place).to_numpy(dtype=np.float64, na_value=np.nan)
    strange = np.isnan(found) & values.notna().to_numpy()
    if strange.any():
        raise ValueError(
            f"tasks: {name!r} is {values[strange].tolist()[0]!r} in {int(strange.sum())} rows of {len(values)}, "
            "which no training row has; drop these rows, empty the field, or draw the splits with another seed"
        )
    if kind == "binary":
        named = all(isinstance(value, str) for value in distinct)
        return Task.binary(task_name, classes=tuple(distinct) if named else ()), found
    task = Task.classification(task_name, len(distinct), classes=tuple(map(str, distinct)))
    return task, np.where(np.isnan(found), task.ignore_index, found).astype(np.int64)
