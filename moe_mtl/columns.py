"""Columns of a table: what a model must know about each to read it, as plain data that is saved with the model.

A batch of rows is a dict of at most four tensors, one per kind of column the table has, each over the columns of that
kind in their order:

    numeric      float32 [b, columns], in the table's own units; NaN where missing
    categorical  int64 [b, columns], 0 for a missing or unseen category, c + 1 for category c
    multihot     float32 [b, sum of vocabularies], the sets of all columns side by side: 1 for every member
    vector       float32 [b, sum of sizes], fixed-length features side by side

Scaling and binning are the model's (`moe_mtl.embeddings`), so that an exported model takes the table's own units.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moe_mtl.tasks import nearest

ColumnKind = Literal["numeric", "categorical", "multihot", "vector"]
COLUMN_KINDS = ("numeric", "categorical", "multihot", "vector")
Rows = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One input column.

    Attributes:
        name: as in the table.
        kind: one of `COLUMN_KINDS`.
        categories: of a categorical or multihot column, in the order of their ids.
        mean: of a numeric column over the training rows, in its unit.
        std: standard deviation of a numeric column over the training rows, above 0.
        edges: quantiles of a numeric column over the training rows, strictly ascending; two at least, or none.
        has_missing: whether training rows lacked a value of a numeric column.
        size: numbers in a vector column.

    Raises:
        ValueError: an unknown kind, or a value that the kind cannot have.
    """

    name: str
    kind: ColumnKind
    categories: Sequence[str] = ()
    mean: float = 0.0
    std: float = 1.0
    edges: Sequence[float] = ()
    has_missing: bool = False
    size: int = 0

    def __post_init__(self):
        if self.kind not in COLUMN_KINDS:
            raise ValueError(
                f"kind: column {self.name!r} has the unknown kind {self.kind!r}; {nearest(self.kind, COLUMN_KINDS)}"
            )
        object.__setattr__(self, "categories", tuple(self.categories))
        object.__setattr__(self, "edges", tuple(float(edge) for edge in self.edges))
        if self.kind == "numeric":
            if not self.std > 0:
                raise ValueError(f"std: column {self.name!r} has {self.std}, expected above 0; drop a constant column")
            if len(self.edges) == 1 or any(a >= b for a, b in zip(self.edges, self.edges[1:], strict=False)):
                raise ValueError(
                    f"edges: column {self.name!r} has {self.edges}, expected ascending numbers, two at least"
                )
        if self.kind in ("categorical", "multihot") and not self.categories:
            raise ValueError(f"categories: column {self.name!r} of kind {self.kind} has none")
        if self.kind == "vector" and self.size < 1:
            raise ValueError(f"size: column {self.name!r} has {self.size}, expected at least 1")

    @property
    def width(self) -> int:
        """Entries of the column in the tensor of its kind."""
        return {"multihot": len(self.categories), "vector": self.size}.get(self.kind, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready data, without what the kind does not use; `from_dict` reads it back."""
        data, empty = asdict(self), Column.__dataclass_fields__
        data["categories"], data["edges"] = list(self.categories), list(self.edges)
        return {k: v for k, v in data.items() if k in ("name", "kind") or v != _plain(empty[k].default)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Column":
        """The column `to_dict` wrote."""
        return cls(**data)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def read_columns(columns: Sequence[Column | Mapping[str, Any]] | None) -> tuple[Column, ...]:
    """Columns of a model's option `columns`.

    Raises:
        ValueError: there are none, or two of one name.
    """
    found = tuple(c if isinstance(c, Column) else Column.from_dict(c) for c in columns or ())
    if not found:
        raise ValueError("columns: got none; pass those of a data set, as in create_model(..., columns=data.columns())")
    names = [column.name for column in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"columns: {', '.join(twice)} given twice")
    return found


def of_kind(columns: Sequence[Column], kind: ColumnKind) -> list[Column]:
    """The columns of one kind, in their order."""
    return [column for column in columns if column.kind == kind]


def check_rows(rows: Any, columns: Sequence[Column]) -> int:
    """The number of rows b of a batch.

    Raises:
        ValueError: it is no dict of one tensor per kind of the columns, of the shapes and dtypes above.
    """
    if not isinstance(rows, Mapping):
        raise ValueError(f"x: got {type(rows).__name__}, expected rows as a dict of tensors, see moe_mtl.columns")
    count = None
    for kind in COLUMN_KINDS:
        width = sum(column.width for column in of_kind(columns, kind))
        if not width:
            continue
        found = rows.get(kind)
        if not isinstance(found, Tensor) or found.ndim != 2 or found.shape[1] != width:
            got = f"{list(found.shape)}" if isinstance(found, Tensor) else "nothing"
            raise ValueError(f"x[{kind!r}]: got {got}, expected [b, {width}]")
        if (found.dtype == torch.int64) != (kind == "categorical") or (
            kind != "categorical" and not found.is_floating_point()
        ):
            wanted = "torch.int64" if kind == "categorical" else "floating point"
            raise ValueError(f"x[{kind!r}]: got {found.dtype}, expected {wanted}")
        if count is not None and found.shape[0] != count:
            raise ValueError(f"x[{kind!r}]: got {found.shape[0]} rows, the others have {count}")
        count = found.shape[0]  # len() would fix the number of rows in an exported model
    assert count is not None
    return count
