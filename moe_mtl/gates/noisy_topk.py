"""Noisy top-k gate: every task has a router of its own, which sends each token to k shared experts.

Paper: Fan et al. 2022, https://arxiv.org/abs/2210.14793 (M3ViT, the multi-gate variant).
Differs: one task can be run alone (the authors' code runs all of them in this mode); noise defaults to V-MoE's scale
    where the authors' published command has none; `frozen` routers are an addition, as in `moe_mtl.gates._topk`.
"""

from collections.abc import Sequence

from torch import Tensor

from moe_mtl.gates._topk import Normalize, TopKGate
from moe_mtl.gates._visible import VisibleExperts
from moe_mtl.routing import TaskIds
from moe_mtl.task_linear import TaskLinear


class NoisyTopKGate(TopKGate, VisibleExperts):
    """The k largest of softmax(W_t x + noise) over all experts, or over those that the task can see.

    Args:
        dim: width d of the tokens.
        num_experts: experts e.
        num_tasks: tasks t.
        k: experts used per token.
        noise_std: as in `TopKGate`.
        normalize: as in `TopKGate`.
        frozen: as in `TopKGate`.
        visible: ids of the experts each task can see, at least k, in the order of the tasks; None for all.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        num_tasks: int,
        k: int,
        *,
        noise_std: float = 1.0,
        normalize: Normalize = "none",
        frozen: bool = False,
        visible: Sequence[Sequence[int]] | None = None,
    ):
        super().__init__(dim, num_experts, num_tasks, k, noise_std=noise_std, normalize=normalize, frozen=frozen)
        self.hide(visible, least=k)

    def make_router(self) -> None:
        """W_t [e, d] for every task."""
        self.router = TaskLinear(self.dim, self.num_experts, self.num_tasks, bias=False)

    def scores(self, x: Tensor, task: TaskIds) -> Tensor:
        """W_t x, [m, e]."""
        return self.masked(self.router(x, task), task)

    def scores_each(self, x: Tensor, tasks: Sequence[int]) -> Tensor:
        """W_t x for each task, in one product."""
        return self.masked(self.router.each(x, tasks), tuple(tasks))

    def zero_scores(self) -> None:
        """Makes, in place, every router zero."""
        self.router.zero_scores()

    def append_task(self, like: Sequence[int]) -> None:
        """Adds, in place, the router of one more task."""
        self.router.append_task(like)
        self.append_sight(like)

    def keep_tasks(self, tasks: Sequence[int]) -> None:
        """Drops, in place, the routers of every task but these."""
        self.router.keep_tasks(tasks)
        self.keep_sight(tasks)
