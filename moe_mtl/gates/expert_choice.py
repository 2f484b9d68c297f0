"""Expert-choice gate: in training every expert takes the tokens that suit it best, so that all are equally busy.

Paper: Zhou et al. 2022, https://arxiv.org/abs/2202.09368 (expert choice; capacity c = n k / e).
Differs: every task has a router, and experts choose among the tokens of each task by themselves, so that no task is
    crowded out. In evaluation a token takes the k experts it scores highest, since what it gets must not depend on the
    other tokens of the batch; the paper's tokens are chosen there too. No limit on the experts of a token.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from moe_mtl.gates._router import RouterGate
from moe_mtl.routing import Routing, TaskIds, task_per_row
from moe_mtl.task_linear import TaskLinear


class ExpertChoiceGate(RouterGate):
    """Weights softmax(W_t x), where expert and token have chosen each other; 0 elsewhere.

    In training an expert takes the ceil(n k / e) tokens with the largest weights of the n that a task has in the batch,
    padding left out: the weights of a token depend on the batch, it may have any number of experts, and none leaves it
    at 0, as is usual beside a residual path. Every expert is computed for every token there. In evaluation a token has
    the k experts with its largest weights.

    Args:
        dim: width d of the tokens.
        num_experts: experts e.
        num_tasks: tasks t.
        k: experts per token, on average in training.

    Raises:
        ValueError: a size is below 1 or k exceeds num_experts.
    """

    compute_class: Literal["dense", "token", "task", "weight"] = "token"
    shares_out = False

    def __init__(self, dim: int, num_experts: int, num_tasks: int, k: int):
        super().__init__(dim, num_experts, num_tasks, k)
        self.chosen = k  # by which capacity is counted, whatever experts are kept
        self.router = TaskLinear(dim, num_experts, num_tasks, bias=False)

    def scores(self, x: Tensor, task: TaskIds) -> Tensor:
        """W_t x, [m, e]."""
        return self.router(x, task)

    def scores_each(self, x: Tensor, tasks: Sequence[int]) -> Tensor:
        """W_t x for each task, in one product."""
        return self.router.each(x, tasks)

    def choose(self, logits: Tensor, task: TaskIds | None, valid: Tensor | None) -> Routing:
        """Who chose whom, from logits [m, e]."""
        assert task is not None  # `forward` has refused it
        probs = logits.softmax(dim=-1)
        if not self.training:
            weights, indices = self.strongest(probs)
            return Routing(weights, indices, logits, task, valid)
        ids = task_per_row(task, len(probs), probs.device)
        weights = probs * chosen_by_experts(probs.detach(), ids, self.num_tasks, self.chosen, valid)
        if self.kept is None:
            return Routing(weights, None, logits, task, valid)
        return Routing(weights.index_select(-1, self.kept), self.kept.expand(len(probs), -1), logits, task, valid)

    def zero_scores(self) -> None:
        """Makes, in place, every router zero."""
        self.router.zero_scores()

    def append_task(self, like: Sequence[int]) -> None:
        """Adds, in place, the router of one more task."""
        self.router.append_task(like)

    def keep_tasks(self, tasks: Sequence[int]) -> None:
        """Drops, in place, the routers of every task but these."""
        self.router.keep_tasks(tasks)


def chosen_by_experts(probs: Tensor, task: Tensor, num_tasks: int, k: int, valid: Tensor | None = None) -> Tensor:
    """Which tokens each expert takes: of every task's n tokens the ceil(n k / e) it has the largest probability for.

    Args:
        probs: of the experts, [m, e]; of equal ones the earlier token is taken.
        task: ids [m].
        num_tasks: ids are 0..num_tasks-1.
        k: experts per token on average.
        valid: bool [m], False for padding.

    Returns:
        bool [m, e].
    """
    rows, experts = probs.shape
    # padding forms a group of its own, the last, in which nothing is taken
    group = task if valid is None else task.where(valid, num_tasks)
    sizes = torch.zeros(num_tasks + 1, dtype=torch.int64, device=probs.device).index_add(
        0, group, torch.ones_like(group)
    )
    capacity = (sizes * k + experts - 1) // experts
    capacity[-1] = 0
    order = probs.argsort(dim=0, descending=True, stable=True)
    order = order.gather(0, group[order].argsort(dim=0, stable=True))  # by group, then by probability
    place = torch.arange(rows, device=probs.device).unsqueeze(1) - (sizes.cumsum(0) - sizes)[group[order]]
    return torch.zeros_like(probs, dtype=torch.bool).scatter(0, order, place < capacity[group[order]])
