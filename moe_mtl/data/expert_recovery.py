"""Expert recovery: tasks whose labels are mixtures of a few known experts, to see whether a gate finds them.

Inspired by the synthetic study of Hazimeh et al. 2021 (DSelect-k, https://arxiv.org/abs/2106.03760), whose generator we
have not seen; this one is ours.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_mtl.data._frames import Source, TableData, generated_parts
from moe_mtl.tasks import Task


@dataclass(frozen=True, kw_only=True)
class ExpertRecovery(TableData):
    """T tasks in K clusters; a task's label is a linear read-out of the mean of k of E experts, those of its cluster.

    Expert e is tanh(W_e x + b_e), x ~ N(0, 1), W_e and b_e drawn once. Which experts a cluster has is drawn too,
    without replacement while there are enough. `expert_weights()` gives a model the true experts, so that only its
    gates and read-outs are learned and the experts it selects can be compared with `true_experts()` by their ids.

    Tasks `y0`, ..., regressions of standard deviation 1. Input: one vector `x`.

    Attributes:
        num_tasks: tasks T, dealt over the clusters in turn.
        clusters: clusters K.
        experts: experts E.
        k: experts of a cluster.
        dim: of x.
        width: units of an expert.
        noise: standard deviation of the label's noise.
        num_train: training rows.
        num_val: validation rows.
        num_test: test rows.
        seed: of everything.

    Raises:
        ValueError: more experts per cluster than there are.
    """

    num_tasks: int = 6
    clusters: int = 3
    experts: int = 16
    k: int = 2
    dim: int = 16
    width: int = 8
    noise: float = 0.05
    num_train: int = 10_000
    num_val: int = 2_000
    num_test: int = 4_000
    seed: int = 0

    def __post_init__(self):
        if not 1 <= self.k <= self.experts:
            raise ValueError(f"k: got {self.k}, expected 1 to experts={self.experts}")

    def true_experts(self) -> list[list[int]]:
        """Ids of the experts of every task, ascending."""
        generator = np.random.default_rng([self.seed, 2])
        deck: list[int] = []
        sets: list[list[int]] = []
        for _ in range(self.clusters):
            if len(deck) < self.k:
                deck = generator.permutation(self.experts).tolist()
            sets.append(sorted(deck[: self.k]))
            deck = deck[self.k :]
        return [sets[task % self.clusters] for task in range(self.num_tasks)]

    def expert_weights(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """W [e, width, dim] and b [e, width] of the true experts."""
        generator = np.random.default_rng([self.seed, 0])
        weight = generator.standard_normal((self.experts, self.width, self.dim)) * self.dim**-0.5 * 1.5
        return weight.astype(np.float32), generator.uniform(-1, 1, (self.experts, self.width)).astype(np.float32)

    def source(self) -> Source:
        """Draws the rows."""
        import pandas

        generator = np.random.default_rng([self.seed, 1])
        part = generated_parts(self.num_train, self.num_val, self.num_test)
        x = generator.standard_normal((len(part), self.dim)).astype(np.float32)
        weight, bias = self.expert_weights()
        outputs = np.tanh(np.einsum("nd,ehd->neh", x, weight) + bias)
        labels = {}
        for task, ids in enumerate(self.true_experts()):
            y = outputs[:, ids].mean(axis=1) @ generator.standard_normal(self.width)
            y = (y - y.mean()) / y.std()
            labels[f"y{task}"] = y + self.noise * generator.standard_normal(len(y))
        return Source(
            features=pandas.DataFrame(index=range(len(part))),
            labels=labels,
            part=part,
            tasks=tuple(Task.regression(name, metrics={"r2": {}, "rmse": {}}) for name in labels),
            vectors={"x": x},
        )


def jaccard(selected: list[int], truth: list[int]) -> float:
    """Size of the intersection of two sets of experts over that of their union."""
    return len({*selected} & {*truth}) / len({*selected} | {*truth})
