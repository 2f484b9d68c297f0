"""Uncertainty weighting: each task's loss is divided by a learned variance.

Paper: Kendall, Gal and Cipolla 2018, https://arxiv.org/abs/1705.07115 (eq. 7 regression, eq. 10 classification).
Differs: regression, depth and normals take the Gaussian form L / (2 e^s) + s/2 whatever their loss is, although l1,
    huber and cosine are not Gaussian likelihoods; all other kinds take the softmax form L / e^s + s/2. `Task.weight`
    multiplies both terms, which leaves the best s where it was. Tasks absent from a step contribute neither term: under
    s/2 alone the variance of an absent task would shrink without end.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from moe_mtl.balancing._balancer import Balancer
from moe_mtl.tasks import Task

GAUSSIAN_KINDS = frozenset({"regression", "depth", "normals"})


class Uncertainty(Balancer):
    """Learns s_t, the log variance of each task.

    At the best s a task's loss counts one half: e^s = L in the Gaussian form, e^s = 2 L in the softmax form. The factor
    1 / e^s has no upper bound: a loss that goes to zero drives it up for ever, and losses must not be negative.

    Args:
        tasks: the tasks whose losses will come.
        init: s at the start; 0 is a variance of one.
        lr_scale: factor on the learning rate for s. 10: at a learning rate of 1e-3 Adam then moves s by one in about a
            hundred steps, which runs of a few thousand steps need to follow the losses.
    """

    def __init__(self, tasks: Sequence[Task], *, init: float = 0.0, lr_scale: float = 10.0):
        super().__init__(tasks)
        self.lr_scale = lr_scale
        self._divisor_of = {task.name: 2.0 if task.kind in GAUSSIAN_KINDS else 1.0 for task in self.tasks}
        # the prefix keeps task names such as "get" from clashing with methods of the dict
        self.log_variance = nn.ParameterDict(
            {f"of_{task.name}": nn.Parameter(torch.tensor(float(init))) for task in self.tasks}
        )

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """sum_t weight_t (L_t / (c_t e^s_t) + s_t / 2) over the tasks given; c is 2 in the Gaussian form, else 1."""
        self._check(losses)
        total = torch.zeros((), device=next(iter(losses.values())).device)
        for name, loss in losses.items():
            s = self.log_variance[f"of_{name}"]
            total = total + self._weight_of[name] * (loss * torch.exp(-s) / self._divisor_of[name] + s / 2)
        return total

    def factors(self) -> dict[str, float]:
        """weight_t / (c_t e^s_t) of every task."""
        return {
            name: weight * float(torch.exp(-self.log_variance[f"of_{name}"].detach())) / self._divisor_of[name]
            for name, weight in self._weight_of.items()
        }
