"""MultiTab's generated tasks: polynomials of correlated projections, of a degree per task.

Paper: Sinodinos et al. 2025, MultiTab, https://arxiv.org/abs/2511.09970 (its synthetic benchmark).
Differs: labels are divided by their standard deviation over the training rows, since degrees 3 and 4 have heavy tails.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_mtl.data._frames import Source, TableData, generated_parts
from moe_mtl.tasks import Task


@dataclass(frozen=True, kw_only=True)
class MultiTabBench(TableData):
    """Tasks y_i = z_i + z_i^2 + ... + z_i^degree_i + noise, z = W x, x ~ N(0, 1), with a correlation of every two z.

    Tasks `y0`, `y1`, ..., regressions, scored by R2. Input: `dim` numeric columns `x0`, ...

    Attributes:
        degrees: of every task.
        dim: columns, at least as many as tasks.
        rho: correlation of every two projections, from -1/(T-1) to 1.
        noise: its standard deviation.
        num_train: training rows.
        num_val: validation rows.
        num_test: test rows.
        seed: of everything.

    Raises:
        ValueError: more tasks than columns, a degree below 1, or a correlation that cannot be.
    """

    degrees: tuple[int, ...] = (1, 3, 2, 3, 4, 2, 3)
    dim: int = 32
    rho: float = 0.4
    noise: float = 0.01
    num_train: int = 20_000
    num_val: int = 5_000
    num_test: int = 5_000
    seed: int = 0

    def __post_init__(self):
        tasks = len(self.degrees)
        if not 1 <= tasks <= self.dim:
            raise ValueError(f"degrees: got {tasks} tasks and dim {self.dim}, expected 1 to dim tasks")
        if min(self.degrees) < 1:
            raise ValueError(f"degrees: got {self.degrees}, expected at least 1")
        if not -1 / max(1, tasks - 1) <= self.rho <= 1:
            raise ValueError(f"rho: got {self.rho}, expected {-1 / max(1, tasks - 1):.3g} to 1 for {tasks} tasks")

    def weights(self) -> NDArray[np.float64]:
        """W [t, dim], W W' the matrix of correlations: Q sqrt(L) U with U orthonormal, Q L Q' = (1 - rho) I + rho 1."""
        tasks = len(self.degrees)
        basis = np.linalg.qr(np.random.default_rng(self.seed).standard_normal((self.dim, tasks)))[0].T
        values, vectors = np.linalg.eigh((1 - self.rho) * np.eye(tasks) + self.rho)
        return vectors * np.sqrt(values.clip(min=0)) @ basis

    def source(self) -> Source:
        """Draws the rows."""
        import pandas

        generator = np.random.default_rng([self.seed, 1])
        part = generated_parts(self.num_train, self.num_val, self.num_test)
        x = generator.standard_normal((len(part), self.dim))
        z = x @ self.weights().T
        y = np.stack([sum(z[:, i] ** p for p in range(1, d + 1)) for i, d in enumerate(self.degrees)], axis=1)
        y = y + self.noise * generator.standard_normal(y.shape)
        own = y[part == "train"]
        y = (y - own.mean(axis=0)) / own.std(axis=0)
        return Source(
            features=pandas.DataFrame(x, columns=[f"x{i}" for i in range(self.dim)]),
            labels={f"y{i}": y[:, i] for i in range(len(self.degrees))},
            part=part,
            tasks=tuple(Task.regression(f"y{i}", metrics={"r2": {}, "rmse": {}}) for i in range(len(self.degrees))),
        )
