"""Linear routers: what every gate that scores experts by a matrix product shares."""

import copy
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from moe_mtl.gates._gate import Gate
from moe_mtl.routing import Routing, TaskIds


def check_task(task: TaskIds | None, num_tasks: int, rows: int | None = None) -> None:
    """Refuses task ids that a gate cannot serve. Ids on a GPU are not read: that would stall it.

    Args:
        task: one id, one id per equal block of rows, or int64 ids [m].
        num_tasks: ids are 0..num_tasks-1.
        rows: m, when the ids must fit that many rows.

    Raises:
        ValueError: an id is out of range or not an integer, or the ids do not fit the rows.
    """
    if isinstance(task, Tensor):
        if task.dtype != torch.int64 or task.ndim != 1 or (rows is not None and task.shape[0] != rows):
            count = "m" if rows is None else rows
            raise ValueError(
                f"task: got {task.dtype} ids {list(task.shape)}, expected torch.int64 [{count}], one per row"
            )
        readable = task.device.type == "cpu" and not torch.compiler.is_compiling()
        if readable and task.numel() and not 0 <= int(task.min()) <= int(task.max()) < num_tasks:
            raise ValueError(f"task: got ids {int(task.min())} to {int(task.max())}, expected 0 to {num_tasks - 1}")
        return
    ids = tuple(task) if isinstance(task, Sequence) and not isinstance(task, str) else (task,)
    if not ids:
        raise ValueError(f"task: got no ids, expected at least one of 0 to {num_tasks - 1}")
    for i in ids:
        if not isinstance(i, int):
            raise ValueError(f"task: got {i!r} of type {type(i).__name__}, expected an int from 0 to {num_tasks - 1}")
        if not 0 <= i < num_tasks:
            raise ValueError(f"task: got id {i}, expected 0 to {num_tasks - 1}")
    if rows is not None and len(ids) > 1 and rows % len(ids):
        raise ValueError(f"task: {rows} rows do not split into {len(ids)} equal blocks, one per id")


class RouterGate(Gate):
    """A gate that scores all experts, then turns the scores into weights, both without autocast.

    The arithmetic is float32, or float64 for float64 tokens.

    Attributes:
        frozen: the router does not learn; an option of some gates.
    """

    frozen: bool = False

    def forward(self, x: Tensor, task: TaskIds | None, valid: Tensor | None = None) -> Routing:
        """Routes tokens; see `Gate.forward`.

        Raises:
            ValueError: `x` is not [m, d], `valid` is not bool [m], or `task` is out of range, does not fit the rows, or
                is None for a gate that depends on it.
        """
        x = self._checked(x, valid)
        if task is not None or self.task_dependent:
            check_task(task, self.num_tasks, x.shape[0])
        with _no_autocast(x.device.type):
            logits = self.scores(x.to(torch.promote_types(x.dtype, torch.float32)), task)
            return self.choose(logits, task, valid)

    def each(self, x: Tensor, tasks: Sequence[int], valid: Tensor | None = None) -> Routing:
        """Routes the same tokens for each of several tasks; see `Gate.each`.

        Raises:
            ValueError: as in `forward`.
        """
        x, tasks = self._checked(x, valid), tuple(tasks)
        check_task(tasks, self.num_tasks)
        with _no_autocast(x.device.type):
            logits = self.scores_each(x.to(torch.promote_types(x.dtype, torch.float32)), tasks)
            return self.choose(logits, tasks, None if valid is None else valid.repeat(len(tasks)))

    def _checked(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """The tokens, zero where they are padding: NaN there would reach the router's gradient.

        Raises:
            ValueError: `x` is not [m, d], or `valid` is not bool [m].
        """
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x: got shape {list(x.shape)}, expected tokens [m, {self.dim}]")
        if valid is not None and (valid.dtype != torch.bool or valid.shape != x.shape[:1]):
            raise ValueError(f"valid: got {valid.dtype} {list(valid.shape)}, expected torch.bool [{x.shape[0]}]")
        return x if valid is None else x.masked_fill(~valid.unsqueeze(-1), 0.0)

    @abstractmethod
    def scores(self, x: Tensor, task: Any) -> Tensor:
        """Clean logits [m, e] of tokens [m, d], in the dtype of `x`. `task` is checked, and None only where blind."""

    def scores_each(self, x: Tensor, tasks: Sequence[int]) -> Tensor:
        """Clean logits [(t m), e] of the same tokens [m, d] for each of these tasks; cheaper where a gate knows how."""
        return self.scores(x.repeat(len(tasks), 1), tuple(tasks))

    @abstractmethod
    def choose(self, logits: Tensor, task: TaskIds | None, valid: Tensor | None) -> Routing:
        """The routing that clean logits [m, e] lead to."""

    def for_tasks(self, tasks: Sequence[int]) -> Self:
        """A deep copy that serves these tasks alone, renumbered 0, 1, ... in the given order.

        An id may be named twice: each mention gets parameters of its own, equal to begin with.

        Raises:
            ValueError: `tasks` is empty or names an id out of range.
        """
        check_task(tuple(tasks), self.num_tasks)
        gate = copy.deepcopy(self)
        gate.keep_tasks(tasks)
        gate.num_tasks = len(tasks)
        return gate

    def check_like(self, like: Sequence[int]) -> None:
        """Refuses what `add_task` cannot start from; see `Gate.check_like`.

        Raises:
            ValueError: an id out of range, or tasks whose parameters have no mean.
        """
        if like:
            check_task(tuple(like), self.num_tasks)

    def add_task(self, like: Sequence[int] = ()) -> None:
        """Serves, in place, one more task; see `Gate.add_task`. A frozen router stays frozen.

        Raises:
            ValueError: as in `check_like`.
        """
        self.check_like(like)
        self.append_task(tuple(like))
        self.num_tasks += 1
        if self.frozen:
            self.requires_grad_(False)

    def append_task(self, like: Sequence[int]) -> None:
        """Adds, in place, what belongs to one more task alone: the mean of what these tasks have, or fresh.

        Raises:
            ValueError: the gate does not say how.
        """
        raise ValueError(f"task: {type(self).__name__} takes no new task; build the model for all of them")

    @abstractmethod
    def keep_tasks(self, tasks: Sequence[int]) -> None:
        """Drops, in place, the parameters of every task but these, which take the places 0, 1, ..."""


def _no_autocast(device_type: str) -> AbstractContextManager:
    # A nullcontext where autocast is off anyway keeps exported graphs free of autocast regions.
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def rows_of(table: Tensor | nn.ParameterList, task: TaskIds, rows: int) -> Tensor:
    """What belongs to the task of each of so many tokens, [m, c]. Entries of tasks that do not occur are not read.

    Args:
        table: a row [c] per task of the gate.
        task: as `Gate.forward` takes it.
        rows: tokens m.
    """
    if isinstance(task, int):
        return table[task].expand(rows, -1)
    if isinstance(task, Tensor):
        return (table if isinstance(table, Tensor) else torch.stack(tuple(table))).index_select(0, task)
    return torch.stack([table[i] for i in task]).unsqueeze(1).expand(-1, rows // len(task), -1).flatten(0, 1)
