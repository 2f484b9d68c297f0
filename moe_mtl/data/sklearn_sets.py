"""scikit-learn's bundled tables as sets of several tasks: small, and there without a download.

Source: https://scikit-learn.org/stable/datasets/toy_dataset.html. They come with scikit-learn, which the extra
`moe_mtl[tables]` installs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe_mtl.data._frames import Source, TableData, random_parts
from moe_mtl.tasks import Task, nearest

if TYPE_CHECKING:
    from pandas import DataFrame

Labels = dict[str, tuple[str, NDArray]]  # task -> its kind and values


@dataclass(frozen=True, kw_only=True)
class SklearnSet(TableData):
    """One of scikit-learn's bundled tables.

    A table with one target gets a second task: an input column, which is then no input, or a question about the target.

    Attributes:
        name: "breast_cancer" (569 rows; `malignant`, and the column mean radius as `radius`), "diabetes" (442;
            `progression`, and bmi), "digits" (1,797; `digit`, `odd` and `above_4`), "iris" (150; `species`, and petal
            width as `petal_width`), "linnerud" (20; `weight`, `waist` and `pulse`) or "wine" (178; `cultivar`, and
            alcohol).
        val: share of the rows drawn for validation.
        test: share of the rows drawn for testing.
        seed: of the draw.

    Raises:
        ValueError: there is no set of that name.
    """

    name: str = "digits"
    val: float = 0.15
    test: float = 0.15
    seed: int = 0

    def __post_init__(self):
        if self.name not in SETS:
            raise ValueError(f"name: unknown set {self.name!r}; {nearest(self.name, SETS)}")

    def source(self) -> Source:
        """Reads the table.

        Raises:
            ImportError: scikit-learn is not installed.
        """
        try:
            import sklearn.datasets
        except ImportError as error:
            raise ImportError(
                "the sets of scikit-learn need it installed: pip install scikit-learn, or moe_mtl[tables]"
            ) from error
        bunch: Any = getattr(sklearn.datasets, f"load_{self.name}")(as_frame=True)
        features, labels = SETS[self.name](bunch.data.copy(), bunch.target)
        part = random_parts(len(features), self.val, self.test, self.seed)
        return Source(
            features=features,
            labels={name: values for name, (_, values) in labels.items()},
            part=part,
            tasks=tuple(_task(name, kind, values, part == "train") for name, (kind, values) in labels.items()),
        )


def _task(name: str, kind: str, values: NDArray, train: NDArray) -> Task:
    if kind == "binary":
        return Task.binary(name)
    if kind == "classification":
        return Task.classification(name, int(values.max()) + 1)
    return Task.regression(name, mean=float(values[train].mean()), std=float(values[train].std()))


def _numbers(values: Any) -> NDArray:
    return np.asarray(values, dtype=np.float64)


def _classes(values: Any) -> NDArray:
    return np.asarray(values, dtype=np.int64)


def _breast_cancer(data: "DataFrame", target: Any) -> tuple["DataFrame", Labels]:
    # radius, perimeter and area of one cell say the same
    told = [name for name in data.columns if "radius" in name or "perimeter" in name or "area" in name]
    radius = _numbers(data["mean radius"])
    labels: Labels = {"malignant": ("binary", 1 - _numbers(target)), "radius": ("regression", radius)}
    return data.drop(columns=told), labels


def _diabetes(data: "DataFrame", target: Any) -> tuple["DataFrame", Labels]:
    labels: Labels = {"progression": ("regression", _numbers(target)), "bmi": ("regression", _numbers(data.pop("bmi")))}
    return data, labels


def _digits(data: "DataFrame", target: Any) -> tuple["DataFrame", Labels]:
    digit = _classes(target)
    labels: Labels = {
        "digit": ("classification", digit),
        "odd": ("binary", _numbers(digit % 2)),
        "above_4": ("binary", _numbers(digit > 4)),
    }
    return data.loc[:, data.nunique() > 1], labels


def _iris(data: "DataFrame", target: Any) -> tuple["DataFrame", Labels]:
    width = _numbers(data.pop("petal width (cm)"))
    return data, {"species": ("classification", _classes(target)), "petal_width": ("regression", width)}


def _linnerud(data: "DataFrame", target: Any) -> tuple["DataFrame", Labels]:
    return data, {name.lower(): ("regression", _numbers(target[name])) for name in target.columns}


def _wine(data: "DataFrame", target: Any) -> tuple["DataFrame", Labels]:
    alcohol = _numbers(data.pop("alcohol"))
    return data, {"cultivar": ("classification", _classes(target)), "alcohol": ("regression", alcohol)}


SETS: dict[str, Callable[["DataFrame", Any], tuple["DataFrame", Labels]]] = {
    "breast_cancer": _breast_cancer,
    "diabetes": _diabetes,
    "digits": _digits,
    "iris": _iris,
    "linnerud": _linnerud,
    "wine": _wine,
}
