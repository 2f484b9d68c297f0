"""Which experts each task can see: a table that linear routers apply to their scores."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_mtl.gates._gate import UNREACHABLE
from moe_mtl.gates._router import RouterGate, rows_of
from moe_mtl.routing import TaskIds
from moe_mtl.task_linear import TaskLinear


class VisibleExperts(RouterGate):
    """A router per task whose tasks may be kept from some experts.

    The logits of those are -10^4, so their softmax is exactly 0.

    Attributes:
        hidden_from: what each task cannot see, bool [t, e]; None where every task sees all.
        seen: ids of what each can, as numbers, which an exported forward may read; None likewise.
        router: the map of each task to the scores of all experts.
    """

    hidden_from: Tensor | None
    seen: tuple[tuple[int, ...], ...] | None
    router: TaskLinear

    def hide(self, visible: Sequence[Sequence[int]] | None, least: int = 1) -> None:
        """Sets the table, in place.

        Args:
            visible: ids of the experts each task can see, in the order of the tasks; None for all.
            least: experts that a task must see.

        Raises:
            ValueError: not one row of at least so many different ids for every task.
        """
        self.register_buffer("hidden_from", None if visible is None else self._table(visible, least))
        self.note_seen()
        self.register_load_state_dict_post_hook(_note_seen)

    def note_seen(self) -> None:
        """Reads, in place, `seen` off the table."""
        rows = None if self.hidden_from is None else (~self.hidden_from).tolist()
        self.seen = None if rows is None else tuple(tuple(e for e, yes in enumerate(row) if yes) for row in rows)

    def _table(self, visible: Sequence[Sequence[int]], least: int) -> Tensor:
        if len(visible) != self.num_tasks:
            raise ValueError(f"visible: got {len(visible)} rows, expected one for each of the {self.num_tasks} tasks")
        table = torch.ones(self.num_tasks, self.num_experts, dtype=torch.bool)
        for task, row in enumerate(visible):
            if len(row) < least or len(set(row)) < len(row) or not all(e in range(self.num_experts) for e in row):
                count = "one" if least == 1 else str(least)
                raise ValueError(
                    f"visible: got {list(row)} for task {task}, expected different ids from 0 to "
                    f"{self.num_experts - 1}, at least {count}"
                )
            table[task, list(row)] = False
        return table

    def reachable(self, task: int) -> tuple[int, ...] | None:
        """Ids of the experts the task can see, ascending; None for all."""
        return None if self.seen is None else self.seen[task]

    def task_options(self) -> dict[str, Any]:
        """What each task can see, where that is not everything."""
        return {} if self.seen is None else {"visible": [list(row) for row in self.seen]}

    def masked(self, logits: Tensor, task: TaskIds) -> Tensor:
        """Logits [m, e], those out of a task's sight replaced."""
        if self.hidden_from is None:
            return logits
        return logits.masked_fill(rows_of(self.hidden_from, task, logits.shape[0]), UNREACHABLE)

    def check_like(self, like: Sequence[int]) -> None:
        """Refuses ids out of range, and a task that would see no expert.

        Raises:
            ValueError: says which.
        """
        super().check_like(like)
        if self.hidden_from is not None:
            seen = ~self.hidden_from_new(like)
            if not (seen if self.kept is None else seen[self.kept]).any():
                raise ValueError(
                    "init_from: every expert is closed to some task, so a fresh one would see none; name tasks, whose "
                    "experts it is to see"
                )

    def hidden_from_new(self, like: Sequence[int]) -> Tensor:
        """What one more task cannot see, bool [e]: what none of these tasks sees, or what some task does not."""
        assert self.hidden_from is not None
        return self.hidden_from[list(like)].all(dim=0) if like else self.hidden_from.any(dim=0)

    @torch.no_grad()
    def append_sight(self, like: Sequence[int]) -> None:
        """Adds, in place, what one more task can see, once its router is there.

        It sees the experts that every task sees or, like some tasks, those that one of them does. The mean of several
        routers is taken, per expert, over those that see it: the rows of the others have learned nothing.
        """
        if self.hidden_from is None:
            return
        if len(like) > 1:
            seen = (~self.hidden_from[list(like)]).to(self.router.weight[0])  # [u, e]
            share = seen / seen.sum(dim=0).clamp(min=1)
            for entries in (self.router.weight, self.router.bias):
                if entries is not None:
                    rows = torch.stack([entries[i] for i in like])
                    entries[-1].copy_(torch.einsum("ue,ue...->e...", share, rows))
        self.hidden_from = torch.cat([self.hidden_from, self.hidden_from_new(like).unsqueeze(0)])
        self.note_seen()

    def keep_sight(self, tasks: Sequence[int]) -> None:
        """Drops, in place, what every task but these can see."""
        if self.hidden_from is not None:
            self.hidden_from = self.hidden_from[list(tasks)]
            self.note_seen()

    def show_only(self, task: int, ids: Sequence[int]) -> None:
        """Lets a task see, in place, these experts alone.

        Raises:
            ValueError: fewer than a token uses.
        """
        if len(ids) < min(self.k, self.num_experts) and self.compute_class == "token":
            raise ValueError(f"ids: got {list(ids)}, expected at least k={self.k} experts")
        if self.hidden_from is None:
            weight = self.router.weight[0]
            self.hidden_from = torch.zeros(self.num_tasks, self.num_experts, dtype=torch.bool, device=weight.device)
        self.hidden_from[task] = True
        self.hidden_from[task, list(ids)] = False
        self.note_seen()

    @torch.no_grad()
    def give_experts(self, task: int, ids: Sequence[int]) -> None:
        """Gives a task new experts in the place of some; see `Gate.give_experts`. Its scores for them are the same."""
        sight = self.hidden_from
        if sight is None:
            sight = torch.zeros(self.num_tasks, self.num_experts, dtype=torch.bool, device=self.router.weight[0].device)
        new = torch.ones(self.num_tasks, len(ids), dtype=torch.bool, device=sight.device)
        new[task] = False
        self.hidden_from = torch.cat([sight, new], dim=1)
        self.hidden_from[task, list(ids)] = True
        self.note_seen()
        self.router.append_outputs(ids, task)
        super().give_experts(task, ids)


def _note_seen(gate: VisibleExperts, _: Any) -> None:
    """After a state was loaded; a function, so that a gate can be pickled."""
    gate.note_seen()
