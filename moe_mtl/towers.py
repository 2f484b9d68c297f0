"""Towers: one small MLP per task on the task's vector, all tasks in one batched product per layer."""

import itertools
from collections.abc import Sequence
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from moe_mtl.task_linear import TaskLinear
from moe_mtl.tasks import Task


class Towers(nn.Module):
    """ReLU layers and an output layer for every task, the tasks side by side.

    Predictions have the shapes of `moe_mtl.tasks`; those of a regression task are in the unit of its labels.

    Args:
        tasks: what is predicted; tasks of one vector per sample.
        dim: width of the vectors.
        hidden: widths of the hidden layers.
        dropout: share of the units dropped after each hidden layer in training.

    Raises:
        ValueError: a task predicts something per pixel.
    """

    def __init__(self, tasks: Sequence[Task], dim: int, hidden: Sequence[int] = (64,), dropout: float = 0.0):
        super().__init__()
        for task in tasks:
            if task.is_dense:
                raise ValueError(f"tasks: {task.name!r} of kind {task.kind} needs an image; towers read one vector")
        self.tasks, self.dropout = tuple(tasks), dropout
        widths = (dim, *hidden)
        self.layers = nn.ModuleList(
            [TaskLinear(into, out, len(tasks), bias=True) for into, out in itertools.pairwise(widths)]
        )
        self.out = TaskLinear(widths[-1], [task.channels for task in tasks], len(tasks), bias=True)

    def forward(self, x: Tensor, ids: Sequence[int]) -> dict[str, Tensor]:
        """Predictions of the tasks with these ids, {name: [b] or [b, c]}, from a vector for each, [t, b, d]."""
        rows = x.shape[1]
        y = x.flatten(0, 1)
        for layer in self.layers:
            y = F.dropout(F.relu(layer(y, ids)), self.dropout, self.training)
        y = self.out(y, ids).unflatten(0, (len(ids), rows))
        return {self.tasks[i].name: self._shaped(self.tasks[i], one) for i, one in zip(ids, y.unbind(0), strict=True)}

    @staticmethod
    def _shaped(task: Task, y: Tensor) -> Tensor:
        """[b, most channels] of all tasks to one task's prediction."""
        y = y[:, : task.channels]
        if task.kind == "regression":
            y = y * task.std + task.mean
        return y.squeeze(1) if task.is_scalar else y

    def for_tasks(self, ids: Sequence[int]) -> Self:
        """A copy that serves these tasks alone, in this order."""
        small = type(self).__new__(type(self))
        nn.Module.__init__(small)
        small.tasks, small.dropout = tuple(self.tasks[i] for i in ids), self.dropout
        small.layers = nn.ModuleList([layer.for_tasks(ids) for layer in self.layers])  # type: ignore[operator]
        small.out = self.out.for_tasks(ids)
        return small.train(self.training)
