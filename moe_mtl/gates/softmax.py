"""Softmax gate: every task mixes all experts, with weights of its own for every token.

Paper: Ma et al. 2018, https://dl.acm.org/doi/10.1145/3219819.3220007 (MMoE, eq. 5-6: g_t(x) = softmax(x G_t)).
Differs: each task's router has a bias, zero to begin with, as in keras-mmoe; the paper has none.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from moe_mtl.gates._router import RouterGate
from moe_mtl.routing import Routing, TaskIds
from moe_mtl.task_linear import TaskLinear


class SoftmaxGate(RouterGate):
    """MMoE's gate: weights softmax(W_t x + c_t) over all experts.

    Args:
        dim: width d of the tokens.
        num_experts: experts e.
        num_tasks: tasks t.
        k: num_experts, or None for the same: every expert is used.

    Raises:
        ValueError: a size is below 1, or k is not num_experts.
    """

    compute_class: ClassVar[Literal["dense", "token", "task", "weight"]] = "dense"

    def __init__(self, dim: int, num_experts: int, num_tasks: int, k: int | None = None):
        super().__init__(dim, num_experts, num_tasks, num_experts if k is None else k)
        if self.k != num_experts:
            raise ValueError(
                f"k: got {k}, but the softmax gate uses all {num_experts} experts; leave k out or take a top-k gate"
            )
        self.router = TaskLinear(dim, num_experts, num_tasks, bias=True)

    def scores(self, x: Tensor, task: TaskIds) -> Tensor:
        """W_t x + c_t, [m, e]."""
        return self.router(x, task)

    def scores_each(self, x: Tensor, tasks: Sequence[int]) -> Tensor:
        """W_t x for each task, in one product."""
        return self.router.each(x, tasks)

    def choose(self, logits: Tensor, task: TaskIds | None, valid: Tensor | None) -> Routing:
        """The dense mixture of logits [m, e]."""
        weights = logits.softmax(dim=-1)
        if self.kept is None:
            return Routing(weights, None, logits, task, valid)
        indices = self.kept.expand(logits.shape[0], -1)
        return Routing(weights.index_select(-1, self.kept), indices, logits, task, valid)

    def zero_scores(self) -> None:
        """Makes, in place, every router zero."""
        self.router.zero_scores()

    def keep_tasks(self, tasks: Sequence[int]) -> None:
        """Drops, in place, the routers of every task but these."""
        self.router.keep_tasks(tasks)
