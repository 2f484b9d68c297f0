"""Towers: one small MLP per task on the task's vector, all tasks in one batched product per layer."""

import itertools
from collections.abc import Sequence
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from moe_mtl.task_linear import TaskLinear
from moe_mtl.tasks import Task


class TaskMLP(nn.Module):
    """ReLU layers for every task, the tasks side by side.

    Args:
        dim: width d of the inputs.
        hidden: widths of the layers; with none the inputs are the outputs.
        num_tasks: MLPs t.
        dropout: share of the units dropped after each layer in training.
    """

    def __init__(self, dim: int, hidden: Sequence[int], num_tasks: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        widths = (dim, *hidden)
        self.out_dim = widths[-1]
        self.layers = nn.ModuleList(
            [TaskLinear(into, out, num_tasks, bias=True) for into, out in itertools.pairwise(widths)]
        )

    def forward(self, x: Tensor, ids: Sequence[int]) -> Tensor:
        """Vectors [t, b, h] of these tasks from one vector for each [t, b, d], or from one [b, d] for all of them."""
        for layer in self.layers:
            x = F.dropout(F.relu(layer.blocks(x, ids)), self.dropout, self.training)  # type: ignore[operator]
        return x if x.ndim == 3 else x.expand(len(ids), -1, -1)

    def append_task(self, like: Sequence[int] = ()) -> None:
        """Adds, in place, the layers of one more task: the mean of those of these tasks, or fresh ones."""
        for layer in self.layers:
            layer.append_task(like)  # type: ignore[operator]

    def for_tasks(self, ids: Sequence[int]) -> Self:
        """A copy that serves these tasks alone, in this order."""
        small = type(self).__new__(type(self))
        nn.Module.__init__(small)
        small.dropout, small.out_dim = self.dropout, self.out_dim
        small.layers = nn.ModuleList([layer.for_tasks(ids) for layer in self.layers])  # type: ignore[operator]
        return small.train(self.training)


class Towers(TaskMLP):
    """ReLU layers and an output layer for every task, the tasks side by side.

    Predictions have the shapes of `moe_mtl.tasks`; those of a regression task are in the unit of its labels.

    Args:
        tasks: what is predicted; tasks of one vector per sample.
        dim: width of the vectors.
        hidden: widths of the hidden layers.
        dropout: share of the units dropped after each hidden layer in training.

    Raises:
        ValueError: a task predicts something per pixel or token.
    """

    def __init__(self, tasks: Sequence[Task], dim: int, hidden: Sequence[int] = (64,), dropout: float = 0.0):
        for task in tasks:
            check_vector_task(task)
        super().__init__(dim, hidden, len(tasks), dropout)
        self.tasks = tuple(tasks)
        self.out = TaskLinear(self.out_dim, [task.channels for task in tasks], len(tasks), bias=True)

    def forward(self, x: Tensor, ids: Sequence[int]) -> dict[str, Tensor]:  # type: ignore[override]
        """Predictions of the tasks with these ids, {name: [b] or [b, c]}, from a vector for each, [t, b, d]."""
        y = self.out.blocks(super().forward(x, ids), ids)
        return {self.tasks[i].name: self._shaped(self.tasks[i], one) for i, one in zip(ids, y.unbind(0), strict=True)}

    def add_task(self, task: Task) -> None:
        """Adds, in place, a fresh tower for one more task.

        Raises:
            ValueError: it predicts something per pixel or token.
        """
        check_vector_task(task)
        self.append_task()
        self.out.append_task(out=task.channels)
        self.tasks = (*self.tasks, task)

    @staticmethod
    def _shaped(task: Task, y: Tensor) -> Tensor:
        """[b, most channels] of all tasks to one task's prediction."""
        y = y[:, : task.channels]
        if task.kind == "regression":
            y = y * task.std + task.mean
        return y.squeeze(1) if task.is_scalar else y

    def for_tasks(self, ids: Sequence[int]) -> Self:
        """A copy that serves these tasks alone, in this order."""
        small = super().for_tasks(ids)
        small.tasks, small.out = tuple(self.tasks[i] for i in ids), self.out.for_tasks(ids)
        return small.train(self.training)


def check_vector_task(task: Task) -> None:
    """Refuses a task that one vector per sample does not tell.

    Raises:
        ValueError: it predicts something per pixel or token.
    """
    if task.is_dense or task.kind == "tagging":
        raise ValueError(f"tasks: {task.name!r} of kind {task.kind} needs an image or tokens; towers read one vector")
