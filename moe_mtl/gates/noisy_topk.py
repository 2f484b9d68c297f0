"""Noisy top-k gate: every task has a router of its own, which sends each token to k shared experts.

Paper: Fan et al. 2022, https://arxiv.org/abs/2210.14793 (M3ViT, the multi-gate variant).
Differs: one task can be run alone (the authors' code runs all of them in this mode); noise defaults to V-MoE's scale
    where the authors' published command has none; `frozen` routers are an addition, as in `moe_mtl.gates._topk`.
"""

from collections.abc import Sequence

from torch import Tensor

from moe_mtl.gates._topk import TopKGate
from moe_mtl.routing import TaskIds
from moe_mtl.task_linear import TaskLinear


class NoisyTopKGate(TopKGate):
    """The k largest of softmax(W_t x + noise) over all experts; arguments as in `TopKGate`."""

    def make_router(self) -> None:
        """W_t [e, d] for every task."""
        self.router = TaskLinear(self.dim, self.num_experts, self.num_tasks, bias=False)

    def scores(self, x: Tensor, task: TaskIds) -> Tensor:
        """W_t x, [m, e]."""
        return self.router(x, task)

    def scores_each(self, x: Tensor, tasks: Sequence[int]) -> Tensor:
        """W_t x for each task, in one product."""
        return self.router.each(x, tasks)

    def zero_scores(self) -> None:
        """Makes, in place, every router zero."""
        self.router.zero_scores()

    def append_task(self, like: Sequence[int]) -> None:
        """Adds, in place, the router of one more task."""
        self.router.append_task(like)

    def keep_tasks(self, tasks: Sequence[int]) -> None:
        """Drops, in place, the routers of every task but these."""
        self.router.keep_tasks(tasks)
