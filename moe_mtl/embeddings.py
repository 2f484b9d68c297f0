"""Columns to vectors: the one place where categorical, numeric, multi-hot and vector columns become features.

Paper: Gorishniy et al. 2022, https://arxiv.org/abs/2203.05556 (section 3.2: piecewise linear encoding of numbers over
    quantile bins).
Differs: the first and last component are clamped like the others, so that a value outside the training range is the
    nearest one in it.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_mtl.columns import Column, Rows, check_rows, of_kind
from moe_mtl.tasks import nearest

NumericEncoding = Literal["standard", "piecewise"]
NUMERIC_ENCODINGS = ("standard", "piecewise")


class NumericEncoder(nn.Module):
    """Numeric columns to features, side by side per column.

    A column gives (value - mean) / std, the mean where it is missing; with "piecewise" also, for each of its bins
    [lo, hi], how far the value is through it: (value - lo) / (hi - lo) clamped to 0..1, all 0 where it is missing. A
    column that had missing values in training gives one more feature, 1 where it is missing.

    Args:
        columns: numeric ones.
        encoding: "standard" or "piecewise".

    Attributes:
        owner: the column, by position, of each feature.
    """

    mean: Tensor
    std: Tensor
    lo: Tensor
    hi: Tensor
    bin_owner: Tensor
    flagged: Tensor

    def __init__(self, columns: Sequence[Column], encoding: NumericEncoding = "piecewise"):
        super().__init__()
        if encoding not in NUMERIC_ENCODINGS:
            raise ValueError(f"numeric: unknown {encoding!r}; {nearest(str(encoding), NUMERIC_ENCODINGS)}")
        spans = [
            (i, lo, hi)
            for i, column in enumerate(columns)
            for lo, hi in zip(column.edges, column.edges[1:], strict=False)
            if encoding == "piecewise" and len(column.edges) > 2
        ]
        flagged = [i for i, column in enumerate(columns) if column.has_missing]
        self.owner = [*range(len(columns)), *(i for i, _, _ in spans), *flagged]
        for name, values in (
            ("mean", [column.mean for column in columns]),
            ("std", [column.std for column in columns]),
            ("lo", [lo for _, lo, _ in spans]),
            ("hi", [hi for _, _, hi in spans]),
        ):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32), persistent=False)
        for name, ids in (("bin_owner", [i for i, _, _ in spans]), ("flagged", flagged)):
            self.register_buffer(name, torch.tensor(ids, dtype=torch.int64), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """Values [b, columns] to features [b, features]."""
        missing = values.isnan()
        features = [((values - self.mean) / self.std).masked_fill(missing, 0.0)]
        if len(self.lo):
            through = (values.index_select(1, self.bin_owner) - self.lo) / (self.hi - self.lo)
            features.append(through.nan_to_num(0.0).clamp(0.0, 1.0))
        if len(self.flagged):
            features.append(missing.index_select(1, self.flagged).to(values.dtype))
        return torch.cat(features, dim=1)


class CategoryEncoder(nn.Module):
    """Categorical columns to one vector each, all from one table; every column has a row for unseen categories.

    Args:
        columns: categorical ones.
        dim: width of a vector.
        std: of the normal distribution the vectors are drawn from.
    """

    first: Tensor
    last: Tensor

    def __init__(self, columns: Sequence[Column], dim: int, std: float):
        super().__init__()
        rows = [len(column.categories) + 1 for column in columns]
        sizes = torch.tensor(rows)
        self.names = [column.name for column in columns]
        self.register_buffer("first", sizes.cumsum(0) - sizes, persistent=False)
        self.register_buffer("last", sizes - 1, persistent=False)
        self.table = nn.Embedding(sum(rows), dim)
        nn.init.normal_(self.table.weight, std=std)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [b, columns] to vectors [b, columns, dim].

        Raises:
            ValueError: an id out of its column's range. Ids on a GPU are not read.
        """
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = ((ids < 0) | (ids > self.last)).any(dim=0)
            if wrong.any():
                c = int(wrong.nonzero()[0])
                raise ValueError(
                    f"x['categorical']: column {self.names[c]!r} has ids {int(ids[:, c].min())} to "
                    f"{int(ids[:, c].max())}, expected 0 (unseen) to {int(self.last[c])}"
                )
        return self.table(ids + self.first)


class SetEncoder(nn.Module):
    """Multi-hot columns to one vector each: the mean of their members' vectors; zero for an empty set.

    Args:
        columns: multihot ones.
        dim: width of a vector.
        std: of the normal distribution the vectors are drawn from.
    """

    owner: Tensor

    def __init__(self, columns: Sequence[Column], dim: int, std: float):
        super().__init__()
        widths = [column.width for column in columns]
        owner = torch.tensor([i for i, width in enumerate(widths) for _ in range(width)])
        self.register_buffer("owner", F.one_hot(owner, len(widths)).float(), persistent=False)
        self.table = nn.Parameter(torch.empty(sum(widths), dim).normal_(std=std))

    def forward(self, members: Tensor) -> Tensor:
        """Members [b, vocabularies] to vectors [b, columns, dim]."""
        count = members @ self.owner.to(members.dtype)
        spread = self.owner.to(members.dtype).unsqueeze(2) * self.table.unsqueeze(1)  # [vocabularies, columns, dim]
        total = (members @ spread.flatten(1)).unflatten(1, spread.shape[1:])
        return total / count.clamp(min=1).unsqueeze(2)


class FlatColumns(nn.Module):
    """Rows to one vector each: numeric features, vectors as they are, embeddings of categories and sets side by side.

    Args:
        columns: of the table.
        embedding_dim: width of the embedding of a category or a set.
        numeric: encoding of numbers, see `NumericEncoder`.

    Attributes:
        dim: width of the result.
    """

    input = "table"

    def __init__(self, columns: Sequence[Column], embedding_dim: int = 8, numeric: NumericEncoding = "piecewise"):
        super().__init__()
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim: got {embedding_dim}, expected at least 1")
        self.columns = tuple(columns)
        numbers, categories = of_kind(columns, "numeric"), of_kind(columns, "categorical")
        sets, vectors = of_kind(columns, "multihot"), of_kind(columns, "vector")
        self.numeric = NumericEncoder(numbers, numeric) if numbers else None
        self.categorical = CategoryEncoder(categories, embedding_dim, std=embedding_dim**-0.5) if categories else None
        self.multihot = SetEncoder(sets, embedding_dim, std=embedding_dim**-0.5) if sets else None
        self.dim = (
            (len(self.numeric.owner) if self.numeric else 0)
            + embedding_dim * (len(categories) + len(sets))
            + sum(column.size for column in vectors)
        )

    def forward(self, rows: Rows) -> Tensor:
        """Rows, see `moe_mtl.columns`, to [b, dim].

        Raises:
            ValueError: a tensor is missing or has another shape or dtype; or an id is out of range.
        """
        check_rows(rows, self.columns)
        parts = []
        if self.numeric is not None:
            parts.append(self.numeric(rows["numeric"]))
        if self.categorical is not None:
            parts.append(self.categorical(rows["categorical"]).flatten(1))
        if self.multihot is not None:
            parts.append(self.multihot(rows["multihot"]).flatten(1))
        if of_kind(self.columns, "vector"):
            parts.append(rows["vector"])
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


class FieldColumns(nn.Module):
    """Rows to one vector per column: the field embeddings that attention and field-wise gates read.

    A numeric column's vector is a linear map of its features plus a bias, a vector column's a linear map.

    Args:
        columns: of the table.
        dim: width of every vector.
        numeric: encoding of numbers, see `NumericEncoder`.
        std: of the normal distribution all embeddings are drawn from.
    """

    input = "table"

    def __init__(
        self, columns: Sequence[Column], dim: int, numeric: NumericEncoding = "piecewise", std: float | None = None
    ):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim: got {dim}, expected at least 1")
        self.columns, self.dim = tuple(columns), dim
        spread = dim**-0.5 if std is None else std
        numbers, categories = of_kind(columns, "numeric"), of_kind(columns, "categorical")
        sets, vectors = of_kind(columns, "multihot"), of_kind(columns, "vector")
        self.numeric = NumericEncoder(numbers, numeric) if numbers else None
        if self.numeric is not None:
            owner = F.one_hot(torch.tensor(self.numeric.owner), len(numbers)).float()
            self.register_buffer("owner", owner, persistent=False)
            self.number_table = nn.Parameter(torch.empty(len(self.numeric.owner), dim).normal_(std=spread))
            self.number_bias = nn.Parameter(torch.empty(len(numbers), dim).normal_(std=spread))
        self.categorical = CategoryEncoder(categories, dim, spread) if categories else None
        self.multihot = SetEncoder(sets, dim, spread) if sets else None
        self.vectors = nn.ModuleList([nn.Linear(column.size, dim) for column in vectors])
        self.sizes = [column.size for column in vectors]

    @property
    def fields(self) -> int:
        """Vectors per row, one per column: numeric ones first, then categorical, multihot and vector columns."""
        return len(self.columns)

    def forward(self, rows: Rows) -> Tensor:
        """Rows, see `moe_mtl.columns`, to [b, fields, dim].

        Raises:
            ValueError: a tensor is missing or has another shape or dtype; or an id is out of range.
        """
        check_rows(rows, self.columns)
        parts = []
        if self.numeric is not None:
            features = self.numeric(rows["numeric"])
            spread = (self.owner.unsqueeze(2) * self.number_table.unsqueeze(1)).flatten(1)  # type: ignore[operator]
            parts.append((features @ spread).unflatten(1, (-1, self.dim)) + self.number_bias)
        if self.categorical is not None:
            parts.append(self.categorical(rows["categorical"]))
        if self.multihot is not None:
            parts.append(self.multihot(rows["multihot"]))
        if self.sizes:
            pieces = rows["vector"].split(self.sizes, dim=1)
            parts.append(torch.stack([layer(piece) for layer, piece in zip(self.vectors, pieces, strict=True)], dim=1))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
