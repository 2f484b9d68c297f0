"""What is left of a gate whose weights depend on the task alone, once nothing about it shall change any more."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, Self

import torch
from torch import Tensor

from moe_mtl.gates._gate import UNREACHABLE, Gate
from moe_mtl.gates._router import rows_of
from moe_mtl.routing import Routing, TaskIds, task_per_row


class ConstantGate(Gate):
    """The same weights for every token of a task; no parameters.

    Args:
        dim: width d of the tokens.
        weights: of every expert, per task, [t, e].

    Attributes:
        weights: the same, saved with the model.
    """

    compute_class: Literal["dense", "token", "task", "weight"] = "task"
    weights: Tensor

    def __init__(self, dim: int, weights: Tensor):
        super().__init__(dim, weights.shape[1], weights.shape[0], weights.shape[1])
        self.register_buffer("weights", weights)

    def forward(self, x: Tensor, task: TaskIds | None, valid: Tensor | None = None) -> Routing:
        """Routes tokens; see `Gate.forward`."""
        of: Any = task_per_row(task, len(x), x.device) if isinstance(task, Tensor) else task
        weights = rows_of(self.weights, of, x.shape[0])
        used = weights > 0
        shown = torch.where(used, weights, 1.0).log().where(used, UNREACHABLE)
        if self.kept is None:
            return Routing(weights, None, shown, task, valid)
        return Routing(weights.index_select(-1, self.kept), self.kept.expand(x.shape[0], -1), shown, task, valid)

    def zero_scores(self) -> None:
        """Refuses: there are no scores.

        Raises:
            ValueError: always.
        """
        raise ValueError("gate: its weights are constant, nothing in it can learn")

    def for_tasks(self, tasks: Sequence[int]) -> Self:
        """A gate for these tasks alone, in this order."""
        gate = type(self)(self.dim, self.weights[list(tasks)].clone())
        if self.kept is not None:
            gate.keep_experts(self.kept.clone())
        return gate.train(self.training)

    def check_like(self, like: Sequence[int]) -> None:
        """Refuses a new task.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "task: the model was extracted for one task, and what its gates had to decide is folded into its weights; "
            "add the task to the full model, or to extract(..., fold=False)"
        )

    def add_task(self, like: Sequence[int] = ()) -> None:
        """Refuses a new task; see `check_like`.

        Raises:
            ValueError: always.
        """
        self.check_like(like)


@torch.no_grad()
def constant_of(gate: Gate) -> ConstantGate | None:
    """The gate that says in training, too, what this one says in evaluation; None where that depends on the token."""
    if gate.compute_class != "task":
        return None
    found = list(chain(gate.parameters(), gate.buffers()))
    dtype = next((t.dtype for t in found if t.is_floating_point()), torch.float32)
    x = torch.zeros(1, gate.dim, dtype=torch.promote_types(dtype, torch.float32), device=found[0].device)
    mode = gate.training
    gate.eval()
    weights = torch.cat([gate(x, task).dense_weights() for task in range(gate.num_tasks)])
    gate.train(mode)
    constant = ConstantGate(gate.dim, weights)
    if gate.kept is not None:
        constant.keep_experts(gate.kept.clone())
    return constant.train(mode)
