"""Related regressions: two tasks whose likeness is a dial, the set on which MMoE was shown.

Paper: Ma et al. 2018, MMoE, https://dl.acm.org/doi/10.1145/3219819.3220007 (section 3.2: synthetic data).
Differs: the paper does not give the frequencies and phases of its sines. "paper" takes alpha_j = j and beta_j = (j-1)^2
    for 10 sines and noise of standard deviation 0.01, as the generator its authors released; "learnable" draws 4 of
    each, from U(0.5, 2) and U(0, 2 pi), which small networks can fit.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moe_mtl.data._frames import Source, TableData, generated_parts
from moe_mtl.tasks import Task


@dataclass(frozen=True, kw_only=True)
class RelatedRegression(TableData):
    """Two regressions y_i = w_i x + sum_j sin(alpha_j w_i x + beta_j) + noise on x ~ N(0, 1), by their cosine.

    Tasks `first` and `second`, labels as they come. Input: one vector `x`.

    Attributes:
        cosine: p of the paper, between w_1 and w_2; correlation of the labels is lower (`correlation`).
        dim: of x.
        preset: "paper" or "learnable", see above.
        num_train: training rows.
        num_val: validation rows.
        num_test: test rows.
        seed: of everything.

    Raises:
        ValueError: the cosine is not in 0..1 or dim is below 2.
    """

    cosine: float = 0.5
    dim: int = 100
    preset: Literal["paper", "learnable"] = "learnable"
    num_train: int = 20_000
    num_val: int = 5_000
    num_test: int = 5_000
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.cosine <= 1:
            raise ValueError(f"cosine: got {self.cosine}, expected 0 to 1")
        if self.dim < 2:
            raise ValueError(f"dim: got {self.dim}, expected at least 2, for two directions")

    def weights(self) -> NDArray[np.float64]:
        """w_1 and w_2, unit vectors with that cosine, [2, dim]."""
        basis = np.linalg.qr(np.random.default_rng(self.seed).standard_normal((self.dim, 2)))[0].T
        mix = np.array([[1.0, 0.0], [self.cosine, np.sqrt(1 - self.cosine**2)]])
        return mix @ basis

    def source(self) -> Source:
        """Draws the rows."""
        import pandas

        generator = np.random.default_rng([self.seed, 1])
        part = generated_parts(self.num_train, self.num_val, self.num_test)
        if self.preset == "paper":
            alpha, beta = np.arange(1.0, 11), np.arange(10.0) ** 2
        else:
            alpha, beta = generator.uniform(0.5, 2, 4), generator.uniform(0, 2 * np.pi, 4)
        x = generator.standard_normal((len(part), self.dim))
        z = x @ self.weights().T
        y = z + np.sin(z[..., None] * alpha + beta).sum(axis=-1) + 0.01 * generator.standard_normal(z.shape)
        own = y[part == "train"]
        return Source(
            features=pandas.DataFrame(index=range(len(part))),
            labels={"first": y[:, 0], "second": y[:, 1]},
            part=part,
            tasks=tuple(
                Task.regression(
                    name, mean=float(own[:, i].mean()), std=float(own[:, i].std()), metrics={"rmse": {}, "r2": {}}
                )
                for i, name in enumerate(("first", "second"))
            ),
            vectors={"x": x.astype(np.float32)},
        )

    def correlation(self) -> float:
        """Pearson's correlation of the two labels over all rows."""
        labels = self._source.labels
        return float(np.corrcoef(labels["first"], labels["second"])[0, 1])
