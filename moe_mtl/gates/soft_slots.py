"""Soft-slot gate: experts read slots, which are mixtures of a sample's tokens, and tokens read mixtures of slots.

Paper: Puigcerver et al. 2024, https://arxiv.org/abs/2308.00951 (Soft MoE; normalised with a learned scale as in its
    section 2.3).
Differs: every task has slots and a scale of its own.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_mtl.gates._gate import UNREACHABLE
from moe_mtl.gates._router import RouterGate, rows_of
from moe_mtl.routing import Routing, TaskIds
from moe_mtl.task_linear import append, select


class SoftSlotsGate(RouterGate):
    """p slots per expert: token i and slot j of task t have the score c_t <x_i / |x_i|, f_tj / |f_tj|>.

    Slot j is the mixture of a sample's tokens with the softmax of its scores over them (dispatch); expert j // p maps
    it; a token is the mixture of the results with the softmax of its scores over the slots (combine). Nothing is cut
    off, and no sample touches another; the cost is e p rows per sample and task, however many tokens there are.

    The weights of a `Routing` are those of combine, summed over the slots of an expert; its logits are the log of the
    sum of their exponentials. They depend on a token alone; what an expert reads needs all tokens of a sample, which
    `slots` is told by their number.

    Args:
        dim: width d of the tokens.
        num_experts: experts e.
        num_tasks: tasks t.
        k: num_experts, or None for the same: every expert is used.
        slots: slots p per expert.

    Raises:
        ValueError: a size is below 1, or k is not num_experts.
    """

    compute_class: Literal["dense", "token", "task", "weight"] = "dense"
    per_sample: ClassVar[bool] = True
    shares_out = False

    def __init__(self, dim: int, num_experts: int, num_tasks: int, k: int | None = None, *, slots: int = 1):
        super().__init__(dim, num_experts, num_tasks, num_experts if k is None else k)
        if self.k != num_experts:
            raise ValueError(f"k: got {k}, but the soft-slot gate uses all {num_experts} experts; leave k out")
        if slots < 1:
            raise ValueError(f"slots: got {slots}, expected at least 1")
        self.slots_per_expert = slots
        width = num_experts * slots
        self.slot = nn.ParameterList([nn.Parameter(torch.randn(width, dim) * dim**-0.5) for _ in range(num_tasks)])
        self.scale = nn.ParameterList([nn.Parameter(torch.ones(1)) for _ in range(num_tasks)])

    def slot_scores(self, x: Tensor, task: TaskIds) -> Tensor:
        """Scores of every token and slot, [m, e p]."""
        unit = F.normalize(x, dim=-1)
        if isinstance(task, Tensor):
            slots = F.normalize(torch.stack(tuple(self.slot)).to(x.dtype)[task], dim=-1)
            scores = torch.bmm(slots, unit.unsqueeze(-1)).squeeze(-1)
        else:
            ids = [task] if isinstance(task, int) else task
            slots = F.normalize(torch.stack([self.slot[i] for i in ids]).to(x.dtype), dim=-1)
            scores = torch.bmm(unit.unflatten(0, (len(ids), x.shape[0] // len(ids))), slots.mT).flatten(0, 1)
        return scores * rows_of(self.scale, task, x.shape[0]).to(x.dtype)

    def scores(self, x: Tensor, task: TaskIds) -> Tensor:
        """The log of what the slots of each expert have together before the softmax, [m, e]."""
        return self._of_experts(self.slot_scores(x, task))

    def _of_experts(self, scores: Tensor) -> Tensor:
        return scores.unflatten(1, (self.num_experts, self.slots_per_expert)).logsumexp(dim=-1)

    def choose(self, logits: Tensor, task: TaskIds | None, valid: Tensor | None) -> Routing:
        """The weights of combine, from logits [m, e]."""
        weights = logits.softmax(dim=-1)
        if self.kept is None:
            return Routing(weights, None, logits, task, valid)
        indices = self.kept.expand(logits.shape[0], -1)
        return Routing(weights.index_select(-1, self.kept), indices, logits, task, valid)

    def slots(self, x: Tensor, task: TaskIds, valid: Tensor | None, group: int) -> tuple[Tensor, Tensor, Routing]:
        """Dispatch and combine of samples of so many tokens each.

        Args:
            x: tokens [m, d], those of a sample side by side.
            task: as `Gate.forward` takes it; the tokens of a sample have one task.
            valid: bool [m], False for padding, which no slot reads.
            group: tokens per sample.

        Returns:
            Dispatch [b, n, s] (sums to 1 over the tokens of a sample, 0 for a sample of padding alone), combine
            [b, n, s] (0 for padding), both over the s slots of the kept experts, and the routing.

        Raises:
            ValueError: the tokens do not split into samples of `group`, or what `forward` refuses.
        """
        if group < 1 or x.shape[0] % group:
            raise ValueError(f"group: {x.shape[0]} tokens do not split into samples of {group}")
        routing = self(x, task, valid)
        with torch.autocast(x.device.type, enabled=False):
            tokens = x if valid is None else x.masked_fill(~valid.unsqueeze(-1), 0.0)
            scores = self.slot_scores(tokens.to(routing.logits.dtype), task)
        combine = scores.softmax(dim=-1).unflatten(0, (-1, group))
        scores = scores.unflatten(0, (-1, group))
        if valid is not None:
            real = valid.unflatten(0, (-1, group)).unsqueeze(-1)
            scores = scores.masked_fill(~real, UNREACHABLE)
            dispatch, combine = scores.softmax(dim=1) * real, combine * real
        else:
            dispatch = scores.softmax(dim=1)
        if self.kept is not None:
            own = self.kept.unsqueeze(1) * self.slots_per_expert
            columns = (own + torch.arange(self.slots_per_expert, device=own.device)).flatten()
            dispatch, combine = dispatch.index_select(-1, columns), combine.index_select(-1, columns)
        return dispatch, combine, routing

    @torch.no_grad()
    def zero_scores(self) -> None:
        """Makes, in place, every scale zero: slots are then means of all tokens, and tokens means of all slots."""
        for parameter in self.scale:
            parameter.zero_()

    def check_like(self, like: Sequence[int]) -> None:
        """Refuses ids out of range, and the mean of several tasks where an expert has several slots.

        Raises:
            ValueError: says which.
        """
        super().check_like(like)
        if len(like) > 1 and self.slots_per_expert > 1:
            raise ValueError(
                f"init_from: the {self.slots_per_expert} slots of an expert have no order, so those of different tasks "
                "do not match and have no mean; name one task"
            )

    def append_task(self, like: Sequence[int]) -> None:
        """Adds, in place, the slots and the scale of one more task."""
        append(self.slot, like, torch.randn(self.slot[0].shape) * self.dim**-0.5)
        append(self.scale, like, torch.ones(1))

    def keep_tasks(self, tasks: Sequence[int]) -> None:
        """Drops, in place, the slots and scales of every task but these."""
        self.slot, self.scale = select(self.slot, tasks), select(self.scale, tasks)
