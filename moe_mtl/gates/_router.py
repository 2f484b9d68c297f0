"""Linear routers: what every gate that scores experts by a matrix product shares."""

import copy
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_mtl.gates._gate import Gate
from moe_mtl.kernels.ops import grouped_linear
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


def uniform_parameter(*shape: int, fan_in: int) -> nn.Parameter:
    """A parameter drawn from U(-1/sqrt(fan_in), 1/sqrt(fan_in)): Kaiming-uniform with a = sqrt(5), as nn.Linear."""
    return nn.Parameter(torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5))


class RouterGate(Gate):
    """A gate that scores all experts, then turns the scores into weights, both without autocast.

    The arithmetic is float32, or float64 for float64 tokens.
    """

    def forward(self, x: Tensor, task: TaskIds | None, valid: Tensor | None = None) -> Routing:
        """Routes tokens; see `Gate.forward`.

        Raises:
            ValueError: `x` is not [m, d], `valid` is not bool [m], or `task` is out of range, does not fit the rows, or
                is None for a gate that depends on it.
        """
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x: got shape {list(x.shape)}, expected tokens [m, {self.dim}]")
        if valid is not None and (valid.dtype != torch.bool or valid.shape != x.shape[:1]):
            raise ValueError(f"valid: got {valid.dtype} {list(valid.shape)}, expected torch.bool [{x.shape[0]}]")
        if task is not None or self.task_dependent:
            check_task(task, self.num_tasks, x.shape[0])
        if valid is not None:  # before any arithmetic: NaN in padding would reach the router's gradient
            x = x.masked_fill(~valid.unsqueeze(-1), 0.0)
        with _no_autocast(x.device.type):
            logits = self.scores(x.to(torch.promote_types(x.dtype, torch.float32)), task)
            return self.choose(logits, task, valid)

    @abstractmethod
    def scores(self, x: Tensor, task: Any) -> Tensor:
        """Clean logits [m, e] of tokens [m, d], in the dtype of `x`. `task` is checked, and None only where blind."""

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

    @abstractmethod
    def keep_tasks(self, tasks: Sequence[int]) -> None:
        """Drops, in place, the parameters of every task but these, which take the places 0, 1, ..."""


def _no_autocast(device_type: str) -> AbstractContextManager:
    # A nullcontext where autocast is off anyway keeps exported graphs free of autocast regions.
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def select(parameters: nn.ParameterList, tasks: Sequence[int]) -> nn.ParameterList:
    """Copies of these entries, in this order, each a parameter of its own."""
    return nn.ParameterList([copy.deepcopy(parameters[i]) for i in tasks])


class TaskLinear(nn.Module):
    """One linear map per task, each a parameter of its own.

    One parameter per task rather than one [t, e, d] tensor: the router of a task that takes no part in a step then has
    no gradient at all, so weight decay and momentum leave it bit-equal, and it can be frozen or dropped alone. Ids per
    row are the exception: which tasks occur is not known without reading them, so absent ones get exact zeros.

    Args:
        dim: width d of the tokens.
        num_experts: outputs e.
        num_tasks: maps t.
        bias: whether each map adds a bias, zero to begin with.
    """

    def __init__(self, dim: int, num_experts: int, num_tasks: int, *, bias: bool):
        super().__init__()
        self.weight = nn.ParameterList([uniform_parameter(num_experts, dim, fan_in=dim) for _ in range(num_tasks)])
        self.bias = (
            nn.ParameterList([nn.Parameter(torch.zeros(num_experts)) for _ in range(num_tasks)]) if bias else None
        )

    def forward(self, x: Tensor, task: TaskIds) -> Tensor:
        """Maps each row [m, d] by the matrix of its task, [m, e], in the dtype of `x`."""
        if isinstance(task, int):
            bias = None if self.bias is None else self.bias[task].to(x.dtype)
            return F.linear(x, self.weight[task].to(x.dtype), bias)
        ids = range(len(self.weight)) if isinstance(task, Tensor) else task
        weight = torch.stack([self.weight[i] for i in ids]).to(x.dtype)
        bias = None if self.bias is None else torch.stack([self.bias[i] for i in ids]).to(x.dtype)
        if isinstance(task, Tensor):
            return grouped_linear(x, weight, bias, task)
        blocks = x.unflatten(0, (len(task), x.shape[0] // len(task)))
        scores = torch.bmm(blocks, weight.mT)
        return (scores if bias is None else scores + bias.unsqueeze(1)).flatten(0, 1)

    @torch.no_grad()
    def zero_scores(self) -> None:
        """Makes, in place, every map zero."""
        for parameter in self.parameters():
            parameter.zero_()

    def keep_tasks(self, tasks: Sequence[int]) -> None:
        """Drops, in place, every map but these, which take the places 0, 1, ..."""
        self.weight = select(self.weight, tasks)
        self.bias = None if self.bias is None else select(self.bias, tasks)
