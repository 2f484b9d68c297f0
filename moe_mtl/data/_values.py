"""What the entries of a data frame's column are: text, numbers or sets. Fitting and encoding read them alike."""

import math
import re
from collections.abc import Iterable, Sequence
from datetime import date
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pandas import DataFrame, Series

SEPARATOR = "|"  # between the members of a multihot entry that is text
SETS = (list, tuple, set, frozenset, np.ndarray)
LARGEST = float(np.finfo(np.float32).max)
WHOLE = 2.0**64  # up to which whole floats are written as integers
MIDNIGHT = " 00:00:00"


def as_text(values: "Series") -> list[str | None]:
    """The entries of a column as text, None where missing: the same text whatever type the column has.

    Whole floats read as integers, since integers with a gap become floats; floats that float32 holds with its digits,
    as 0.1; dates as 2020-01-31, with a time as 2020-01-31 12:30:00.
    """
    return [None if gone else text_of(entry) for entry, gone in zip(values.astype(object), values.isna(), strict=True)]


def text_of(entry: Any) -> str:
    """An entry, not missing, as text."""
    if isinstance(entry, np.floating):
        entry = float(entry)
    if isinstance(entry, float | Decimal) and abs(entry) < WHOLE and entry == int(entry):
        return str(int(entry))
    if isinstance(entry, float) and abs(entry) <= LARGEST:
        return str(np.float32(entry)) if np.float32(entry) == entry else str(entry)
    if isinstance(entry, Decimal):
        return str(entry.normalize())
    if isinstance(entry, date):  # times, too; midnight is what a date becomes among them
        return str(entry).removesuffix(MIDNIGHT)
    return str(entry)


def places(categories: Sequence[str]) -> dict[str, int]:
    """The place of every category among them.

    Models saved before integers with a gap were read as integers have categories such as "1.0": they are found as "1".
    """
    found = {category: i for i, category in enumerate(categories)}
    floats = all(re.fullmatch(r"-?\d+\.\d+", category) for category in categories)
    for i, category in enumerate(categories):
        found.setdefault(category.removesuffix(".0" if floats else MIDNIGHT), i)
    return found


def has_numbers(values: "Series") -> bool:
    """Whether a column holds numbers: by its type, booleans aside, or decimals."""
    from pandas.api.types import is_bool_dtype, is_numeric_dtype, is_object_dtype

    if is_object_dtype(values):
        found = values.dropna()
        return len(found) > 0 and all(isinstance(entry, Decimal) for entry in found)
    return is_numeric_dtype(values) and not is_bool_dtype(values)


def has_sets(values: "Series") -> bool:
    """Whether a column holds lists, by its first entry."""
    found = values.dropna()
    return len(found) > 0 and isinstance(found.iloc[0], SETS)


def read_numbers(values: "Series") -> NDArray[np.float64]:
    """Numbers of a column, NaN where there is none.

    Raises:
        ValueError: some entries are no numbers, are infinite, or too large for a model's float32.
    """
    from pandas import to_numeric

    numbers = to_numeric(values, errors="coerce")
    wrong = numbers.isna() & values.notna()
    if wrong.any():
        raise ValueError(
            f"columns: {values.name!r} is numeric, but {int(wrong.sum())} of {len(values)} rows are no numbers, such "
            f"as {values[wrong].tolist()[0]!r}; mend them, or give it the kind categorical"
        )
    array = numbers.to_numpy(dtype=np.float64, na_value=math.nan)
    if np.isinf(array).any():
        raise ValueError(
            f"columns: {values.name!r} is infinite in {int(np.isinf(array).sum())} of {len(values)} rows; write a "
            "missing value as an empty field"
        )
    large = np.abs(array) > LARGEST
    if large.any():
        raise ValueError(
            f"columns: {values.name!r} is {array[large][0]:g} in one of {int(large.sum())} rows of {len(values)}, "
            f"expected at most {LARGEST:.3g} in size, what float32 holds; take its logarithm, or leave the field empty"
        )
    return array


def read_sets(values: "Series") -> list[list[str]]:
    """The members of every entry of a multihot column.

    Raises:
        ValueError: an entry is neither a list, text nor missing.
    """
    return [members_of(entry, str(values.name)) for entry in values]


def members_of(entry: Any, name: str) -> list[str]:
    """The members of one entry: those of a list or array, of text between `|`, or none where it is missing."""
    from pandas import isna

    if isinstance(entry, str):
        return [member for member in entry.split(SEPARATOR) if member]
    if isinstance(entry, SETS):
        members: Iterable[Any] = entry.flat if isinstance(entry, np.ndarray) else entry
        return [text_of(member) for member in members if not (np.isscalar(isna(member)) and isna(member))]
    if not (np.isscalar(isna(entry)) and isna(entry)):
        raise ValueError(
            f"columns: {name!r} is multihot, but {entry!r} is one of its entries; expected a list, or text with "
            f"members between {SEPARATOR}, or nothing"
        )
    return []


def check_names(frame: "DataFrame", names: Iterable[str]) -> None:
    """Refuses a frame that has two columns of one of these names.

    Raises:
        ValueError: it has.
    """
    twice = set(frame.columns[frame.columns.duplicated()])
    if found := [name for name in names if name in twice]:
        raise ValueError(f"columns: the {len(frame)} rows have two columns {found[0]!r}; rename or drop one")
