"""Exclusive gate: a softmax gate in which some experts belong to one task alone, or are closed to one task.

Paper: Aoki et al. 2021, MMoEEx, https://arxiv.org/abs/2106.10595 (section 3: exclusivity and exclusion).
Differs: closed experts have the logit -10^4 and so the weight 0, where the authors' code zeroes weights before the
    softmax and leaves them exp(0); tasks are dealt over the experts evenly, in a random order, where the paper draws
    each at random, so that no task is left with none or with all by bad luck.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from moe_mtl.gates.softmax import SoftmaxGate
from moe_mtl.tasks import nearest

Closed = Literal["exclusivity", "exclusion"]
CLOSED = ("exclusivity", "exclusion")


def deal_experts(num_experts: int, num_tasks: int, alpha: float, kind: Closed, seed: int) -> list[list[int]]:
    """The experts each task can see.

    floor(alpha e) experts, drawn at random, are dealt over the tasks in a random order, so that tasks differ by at most
    one. "exclusivity": only the task it was dealt to sees such an expert; "exclusion": every task but that one.

    Raises:
        ValueError: alpha is not a share, the kind is unknown, or a task would see no expert.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: got {alpha}, expected a share from 0 to 1")
    if kind not in CLOSED:
        raise ValueError(f"kind: unknown {kind!r}; {nearest(str(kind), CLOSED)}")
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randperm(num_experts, generator=generator)[: int(alpha * num_experts)].tolist()
    tasks = torch.randperm(num_tasks, generator=generator).tolist()
    owner = {expert: tasks[i % num_tasks] for i, expert in enumerate(experts)}
    visible = [
        [e for e in range(num_experts) if e not in owner or (owner[e] == task) == (kind == "exclusivity")]
        for task in range(num_tasks)
    ]
    if not all(visible):
        raise ValueError(
            f"alpha: {len(experts)} of {num_experts} experts by {kind} leave a task of {num_tasks} without any; lower "
            "it, or take more experts"
        )
    return visible


class ExclusiveGate(SoftmaxGate):
    """MMoEEx's gate: softmax over the experts that are open to the task.

    Args:
        dim: width d of the tokens.
        num_experts: experts e.
        num_tasks: tasks t.
        k: num_experts, or None for the same.
        alpha: share of the experts that are dealt to single tasks.
        kind: "exclusivity" or "exclusion", see `deal_experts`.
        seed: of the deal.
        visible: the experts each task can see, instead of a deal: what a saved model holds.
        hidden: as in `SoftmaxGate`.
        dropout: as in `SoftmaxGate`.

    Raises:
        ValueError: as in `deal_experts` and `SoftmaxGate`.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        num_tasks: int,
        k: int | None = None,
        *,
        alpha: float = 0.75,
        kind: Closed = "exclusivity",
        seed: int = 0,
        visible: Sequence[Sequence[int]] | None = None,
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
    ):
        table = deal_experts(num_experts, num_tasks, alpha, kind, seed) if visible is None else visible
        super().__init__(dim, num_experts, num_tasks, k, hidden=hidden, dropout=dropout, visible=table)
        self.kind = kind

    def hidden_from_new(self, like: Sequence[int]) -> Tensor:
        """As in `SoftmaxGate`; by exclusion, nothing is closed to a task that is like no other."""
        hidden = super().hidden_from_new(like)
        return torch.zeros_like(hidden) if self.kind == "exclusion" and not like else hidden
