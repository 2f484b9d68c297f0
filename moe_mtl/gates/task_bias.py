"""Task-bias gate: one router for all tasks, whose scores each task shifts by a learned number per expert.

Paper: inspired by Gupta et al. 2022, https://arxiv.org/abs/2204.07689 (task-aware gates: what a token's experts are
    depends on the token and on its task).
Differs: rebuilt from the abstract, for want of public code. The task enters by a bias per expert, the least that makes
    a router depend on it; `task_embedding` has it as a vector beside the token, `noisy_topk` as a router of its own.
    Balance inside each task, as such a gate wants it, is `switch_balance` of `moe_mtl.regularizers` with `per_task`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_mtl.gates._router import rows_of
from moe_mtl.gates._topk import TopKGate
from moe_mtl.routing import TaskIds
from moe_mtl.task_linear import append, select, uniform_parameter


class TaskBiasGate(TopKGate):
    """The k largest of softmax(W x + u_t + noise); arguments as in `TopKGate`.

    W [e, d] is shared; u_t [e], zero to begin with, is the only parameter that belongs to one task.
    """

    def make_router(self) -> None:
        """W [e, d] for all tasks, and u_t [e] for every task."""
        self.weight = uniform_parameter(self.num_experts, self.dim, fan_in=self.dim)
        self.bias = nn.ParameterList([nn.Parameter(torch.zeros(self.num_experts)) for _ in range(self.num_tasks)])

    def scores(self, x: Tensor, task: TaskIds) -> Tensor:
        """W x + u_t, [m, e]."""
        return F.linear(x, self.weight.to(x.dtype)) + rows_of(self.bias, task, x.shape[0]).to(x.dtype)

    def scores_each(self, x: Tensor, tasks: Sequence[int]) -> Tensor:
        """W x, once, plus u_t for each task."""
        shift = torch.stack([self.bias[i] for i in tasks]).to(x.dtype)
        return (F.linear(x, self.weight.to(x.dtype)) + shift.unsqueeze(1)).flatten(0, 1)

    @torch.no_grad()
    def zero_scores(self) -> None:
        """Makes, in place, the router and every bias zero."""
        for parameter in (self.weight, *self.bias):
            parameter.zero_()

    def append_task(self, like: Sequence[int]) -> None:
        """Adds, in place, the bias of one more task."""
        append(self.bias, like, torch.zeros(self.num_experts))

    def keep_tasks(self, tasks: Sequence[int]) -> None:
        """Drops, in place, the biases of every task but these; the router is shared and stays."""
        self.bias = select(self.bias, tasks)
