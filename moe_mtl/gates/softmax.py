"""Softmax gate: every task mixes all experts, or those it can see, with weights of its own for every token.

Paper: Ma et al. 2018, https://dl.acm.org/doi/10.1145/3219819.3220007 (MMoE, eq. 5-6: g_t(x) = softmax(x G_t)); Tang et
    al. 2020, https://dl.acm.org/doi/10.1145/3383313.3412236 (CGC: a task sees shared experts and its own); Zhao et al.
    2019, https://dl.acm.org/doi/10.1145/3298689.3346997 (dropout on the gate's probabilities against collapse).
Differs: each task's router has a bias, zero to begin with, as in keras-mmoe; the papers have none. After dropout the
    weights are divided by their sum, and a token whose experts would all be dropped keeps all of them.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_mtl.gates._visible import VisibleExperts
from moe_mtl.routing import Routing, TaskIds
from moe_mtl.task_linear import TaskLinear


class SoftmaxGate(VisibleExperts):
    """MMoE's gate: weights softmax(W_t x + c_t) over all experts, or over those that the task can see.

    Args:
        dim: width d of the tokens.
        num_experts: experts e.
        num_tasks: tasks t.
        k: num_experts, or None for the same: every expert is used.
        hidden: widths of ReLU layers between the token and the scores, per task; none for a linear map.
        dropout: share of the weights dropped per token in training.
        visible: ids of the experts each task can see, in the order of the tasks; None for all. The logits of the others
            are -10^4, their weights exactly 0.

    Raises:
        ValueError: a size is below 1, k is not num_experts, `dropout` is out of range, or `visible` is not one row of
            different ids for every task.
    """

    compute_class: Literal["dense", "token", "task", "weight"] = "dense"

    def __init__(
        self,
        dim: int,
        num_experts: int,
        num_tasks: int,
        k: int | None = None,
        *,
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
        visible: Sequence[Sequence[int]] | None = None,
    ):
        super().__init__(dim, num_experts, num_tasks, num_experts if k is None else k)
        if self.k != num_experts:
            raise ValueError(
                f"k: got {k}, but the softmax gate uses all {num_experts} experts; leave k out or take a top-k gate"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: got {dropout}, expected 0 to below 1")
        for width in hidden:
            if width < 1:
                raise ValueError(f"hidden: got {list(hidden)}, expected widths of at least 1")
        self.dropout = dropout
        self.layers = nn.ModuleList(
            [TaskLinear(a, b, num_tasks, bias=True) for a, b in itertools.pairwise((dim, *hidden))]
        )
        self.router = TaskLinear((dim, *hidden)[-1], num_experts, num_tasks, bias=True)
        self.hide(visible)

    def scores(self, x: Tensor, task: TaskIds) -> Tensor:
        """W_t x + c_t, [m, e]."""
        for layer in self.layers:
            x = F.relu(layer(x, task))
        return self.masked(self.router(x, task), task)

    def scores_each(self, x: Tensor, tasks: Sequence[int]) -> Tensor:
        """W_t x + c_t for each task, the first map in one product."""
        first, *rest = (*self.layers, self.router)
        y = first.each(x, tasks)  # type: ignore[operator]
        for layer in rest:
            y = layer(F.relu(y), tuple(tasks))
        return self.masked(y, tuple(tasks))

    def choose(self, logits: Tensor, task: TaskIds | None, valid: Tensor | None) -> Routing:
        """The dense mixture of logits [m, e]."""
        weights = self.weigh(logits)
        if self.training and self.dropout > 0:
            weights = self.drop(weights, torch.rand_like(weights) >= self.dropout)
        if self.kept is None:
            return Routing(weights, None, logits, task, valid)
        indices = self.kept.expand(logits.shape[0], -1)
        return Routing(weights.index_select(-1, self.kept), indices, logits, task, valid)

    def weigh(self, logits: Tensor) -> Tensor:
        """Weights [m, e] of logits [m, e]."""
        return logits.softmax(dim=-1)

    def drop(self, weights: Tensor, kept: Tensor) -> Tensor:
        """Weights [m, e] with those not kept at zero and the others summing to 1; all of a token where none is kept."""
        left = weights * kept
        total = left.sum(dim=-1, keepdim=True)
        return torch.where(total > 0, left / total.clamp(min=torch.finfo(total.dtype).tiny), weights)

    def zero_scores(self) -> None:
        """Makes, in place, every router zero: the experts a task can see then weigh the same."""
        self.router.zero_scores()

    def check_like(self, like: Sequence[int]) -> None:
        """Refuses ids out of range, the mean of several tasks with hidden layers, and a task that would see no expert.

        Raises:
            ValueError: says which.
        """
        super().check_like(like)
        if len(like) > 1 and len(self.layers):
            raise ValueError(
                "init_from: hidden units of different tasks' routers do not match, so these have no mean; name one task"
            )

    def append_task(self, like: Sequence[int]) -> None:
        """Adds, in place, the router of one more task, and what it can see."""
        for layer in (*self.layers, self.router):
            layer.append_task(like)  # type: ignore[operator]
        self.append_sight(like)

    def give_experts(self, task: int, ids: Sequence[int]) -> None:
        """Gives a task new experts in the place of some; see `Gate.give_experts`."""
        super().give_experts(task, ids)
        self.k = len(self.kept) if self.kept is not None else self.num_experts  # all of them are mixed

    def keep_tasks(self, tasks: Sequence[int]) -> None:
        """Drops, in place, the routers of every task but these."""
        for layer in (*self.layers, self.router):
            layer.keep_tasks(tasks)  # type: ignore[operator]
        self.keep_sight(tasks)
