"""Task-blind gate: one router for all tasks, the control that shows what routing by task is worth.

Paper: Riquelme et al. 2021, https://arxiv.org/abs/2106.05974 (V-MoE's router, in front of several task heads).
Differs: no expert has a capacity limit, so no token is dropped.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from moe_mtl.gates._topk import TopKGate
from moe_mtl.routing import TaskIds
from moe_mtl.task_linear import uniform_parameter


class TaskBlindGate(TopKGate):
    """The k largest of softmax(W x + noise), the same for every task; arguments as in `TopKGate`.

    Called with the task None, its rows serve every task at once.
    """

    task_dependent: ClassVar[bool] = False

    def make_router(self) -> None:
        """W [e, d], one for all tasks."""
        self.weight = uniform_parameter(self.num_experts, self.dim, fan_in=self.dim)

    def scores(self, x: Tensor, task: TaskIds | None) -> Tensor:
        """W x, [m, e]."""
        return F.linear(x, self.weight.to(x.dtype))

    def zero_scores(self) -> None:
        """Makes, in place, the router zero."""
        nn.init.zeros_(self.weight)

    def append_task(self, like: Sequence[int]) -> None:
        """Nothing to add: no parameter belongs to one task."""

    def keep_tasks(self, tasks: Sequence[int]) -> None:
        """Nothing to drop: no parameter belongs to one task."""
