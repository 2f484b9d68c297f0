"""Assigned gate: a hand-made table says which experts each task uses, for every token; the gate learns their weights.

The hand-assigned oracle of our evaluation: the control that shows what a good split of experts by task is worth before
any router has to find one.

Paper: none; inspired by Aoki et al. 2021, https://arxiv.org/abs/2106.10595 (MMoEEx: some experts are closed to a task).
Differs: the table of experts per task is given, not drawn at random, and the weights do not depend on the token.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from moe_mtl.gates._gate import UNREACHABLE
from moe_mtl.gates._router import RouterGate, rows_of
from moe_mtl.routing import Routing, TaskIds
from moe_mtl.task_linear import append, select


def contiguous_groups(num_experts: int, num_tasks: int, k: int) -> list[list[int]]:
    """Tasks dealt in order over the disjoint groups 0..k-1, k..2k-1, ... of k experts; neighbours share a group.

    16 experts, k = 4 and 8 tasks: tasks 0 and 1 get experts 0 to 3, tasks 2 and 3 experts 4 to 7, and so on.
    """
    groups = min(num_experts // k, num_tasks)
    starts = [task * groups // num_tasks * k for task in range(num_tasks)]
    return [list(range(start, start + k)) for start in starts]


class AssignedGate(RouterGate):
    """The k experts of the task's row in a table, weighted by the softmax of k learned numbers, equal to begin with.

    The logits of a `Routing` are the learned numbers at the task's experts and -10^4 at all others, so that its
    `probs()` are the weights and zeros. There is no noise, so the smooth load of `moe_mtl.regularizers` is undefined.

    Args:
        dim: width d of the tokens.
        num_experts: experts e.
        num_tasks: tasks t.
        k: experts per task. One expert has the constant weight 1, so for k = 1 the gate has no parameters.
        assignment: k different expert ids for every task, in the order of the tasks; None for `contiguous_groups`.

    Attributes:
        indices: the table, int64 [t, k].

    Raises:
        ValueError: a size is out of range, or `assignment` is not one row of k different ids for every task.
    """

    compute_class: Literal["dense", "token", "task", "weight"] = "task"
    indices: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        num_tasks: int,
        k: int,
        *,
        assignment: Sequence[Sequence[int]] | None = None,
    ):
        super().__init__(dim, num_experts, num_tasks, k)
        rows = contiguous_groups(num_experts, num_tasks, k) if assignment is None else [list(row) for row in assignment]
        if len(rows) != num_tasks:
            raise ValueError(f"assignment: got {len(rows)} rows, expected one for each of the {num_tasks} tasks")
        for task, row in enumerate(rows):
            if len(set(row)) != k or len(row) != k or not all(e in range(num_experts) for e in row):
                raise ValueError(
                    f"assignment: got {row} for task {task}, expected k={k} different ids from 0 to {num_experts - 1}"
                )
        self.register_buffer("indices", torch.tensor(rows, dtype=torch.int64))
        self.weight = nn.ParameterList([nn.Parameter(torch.zeros(k)) for _ in range(num_tasks if k > 1 else 0)])

    def reachable(self, task: int) -> tuple[int, ...]:
        """Ids of the task's experts, ascending."""
        return tuple(sorted(self.indices[task].tolist()))

    def task_options(self) -> dict[str, list[list[int]]]:
        """The table as it stands, for the configuration of a model with these tasks."""
        return {"assignment": self.indices.tolist()}

    def scores(self, x: Tensor, task: TaskIds) -> Tensor:
        """The learned numbers at the experts of each row's task, -10^4 elsewhere, [m, e]."""
        rows = x.shape[0]
        learned = rows_of(self.weight, task, rows) if len(self.weight) else x.new_zeros(rows, 1)
        unreachable = x.new_full((rows, self.num_experts), UNREACHABLE)
        return unreachable.scatter(-1, rows_of(self.indices, task, rows), learned.to(x.dtype))

    def choose(self, logits: Tensor, task: TaskIds | None, valid: Tensor | None) -> Routing:
        """The weights of each row's experts, from logits [m, e]."""
        assert task is not None  # `forward` has refused it
        indices = rows_of(self.indices, task, logits.shape[0])
        weights = logits.gather(-1, indices).softmax(dim=-1)
        if self.kept is not None and self.rows is not None:  # an expert that was dropped: weight 0, on any that is left
            left = self.rows[indices] >= 0
            weights, indices = weights.where(left, 0.0), indices.where(left, self.kept[0])
        if self.k < indices.shape[1]:
            weights, places = weights.topk(self.k, dim=-1)
            indices = indices.gather(-1, places)
        return Routing(weights, indices, logits, task, valid)

    @torch.no_grad()
    def zero_scores(self) -> None:
        """Makes, in place, the learned numbers zero: the experts of a task then weigh the same."""
        for parameter in self.weight:
            parameter.zero_()

    def check_like(self, like: Sequence[int]) -> None:
        """Refuses ids out of range, and the mean of tasks that use different experts.

        Raises:
            ValueError: says which.
        """
        super().check_like(like)
        experts = [sorted(self.indices[task].tolist()) for task in like]
        if any(row != experts[0] for row in experts):
            raise ValueError(
                f"init_from: tasks assigned to different experts have no mean, these have {experts}; name one task, or "
                "tasks with the same experts"
            )

    def give_experts(self, task: int, ids: Sequence[int]) -> None:
        """Gives a task new experts in the place of some; see `Gate.give_experts`."""
        for i, e in enumerate(ids):
            self.indices[task][self.indices[task] == e] = self.num_experts + i
        super().give_experts(task, ids)

    def append_task(self, like: Sequence[int]) -> None:
        """Adds, in place, the table row and the numbers of one more task: fresh, the experts that fewest tasks use."""
        order = self.indices[list(like)].argsort(dim=1)  # tasks may list the same experts in another order
        if like:
            row = self.indices[like[0]]
        else:
            used = torch.bincount(self.indices.flatten(), minlength=self.num_experts)
            if self.rows is not None:
                used = used.where(self.rows >= 0, self.num_tasks + 1)  # what is gone comes last
            row = used.argsort(stable=True)[: self.indices.shape[1]].sort().values
        if len(self.weight):
            numbers = torch.zeros(len(row))
            if like:
                aligned = torch.stack([self.weight[i].detach() for i in like]).gather(1, order)
                numbers = aligned.mean(dim=0)[order[0].argsort()]
            append(self.weight, (), numbers)
        self.indices = torch.cat([self.indices, row.unsqueeze(0)])

    def keep_tasks(self, tasks: Sequence[int]) -> None:
        """Drops, in place, the numbers and table rows of every task but these."""
        if len(self.weight):
            self.weight = select(self.weight, tasks)
        self.indices = self.indices[list(tasks)]
