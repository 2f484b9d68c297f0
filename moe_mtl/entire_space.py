"""Stages of one chain, as impression -> click -> conversion: rates over all impressions and rates given a step before.

A stage has a logit of its own. A task reads one stage, or the product or the quotient of two stages' probabilities.
Products and quotients are taken of logits, so that rates of 1e-30 have exact losses and gradients:

    product   q = s(a) s(b)          1/q - 1 = e^-a + e^-b + e^(-a-b)      logit q = -logsumexp(-a, -b, -a-b)
    quotient  q = s(b) / s(a) <= 1   u = -log q = log s(a) - log s(b)      logit q = -u - log(1 - e^-u)

with s the logistic function: 1/s(a) = 1 + e^-a, and the logit of q is -log(1/q - 1).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_mtl.levels import Trunk
from moe_mtl.routing import Routing
from moe_mtl.task_linear import TaskLinear
from moe_mtl.tasks import Task
from moe_mtl.towers import TaskMLP


def product_logit(a: Tensor, b: Tensor) -> Tensor:
    """Logit of s(a) s(b), elementwise, without leaving the log space."""
    return -torch.logaddexp(torch.logaddexp(-a, -b), -a - b)


def quotient_logit(part: Tensor, whole: Tensor) -> Tensor:
    """Logit of min(1, s(part) / s(whole)), elementwise; at most about 16 in float32, where the quotient rounds to 1.

    Args:
        part: logits of the rarer event.
        whole: logits of the event that contains it.
    """
    u = (F.logsigmoid(whole) - F.logsigmoid(part)).clamp(min=torch.finfo(part.dtype).eps)
    return -u - (-torch.expm1(-u)).log()


@dataclass(frozen=True)
class Reading:
    """What a task reads.

    Attributes:
        how: "stage", the logit of one stage; "product", of the probabilities of two; "quotient", of the probability of
            the first of two over that of the second.
        stages: the stage, or the two of them.
    """

    how: Literal["stage", "product", "quotient"]
    stages: tuple[int, ...]

    def logit(self, logits: dict[int, Tensor]) -> Tensor:
        """The task's logit [b] from those of the stages, each [b]."""
        found = [logits[s] for s in self.stages]
        if self.how == "stage":
            return found[0]
        return product_logit(*found) if self.how == "product" else quotient_logit(*found)


def stages_of(readings: Sequence[Reading]) -> list[int]:
    """Every stage that is read, ascending."""
    return sorted({s for reading in readings for s in reading.stages})


class StageTrunk(nn.Module):
    """One vector per stage from one vector per sample: a tower per stage, on what an MMoE gives it where there is one.

    With a transfer a stage needs all stages before it, else only itself. Only stages that lead to the tasks asked for
    are computed.

    Args:
        readings: what each task reads, by task.
        stages: ids of the stages held, ascending: those that the readings need.
        towers: one per stage held.
        base: a trunk whose tasks are the stages held; without one every tower reads the same vector.
        transfer: vectors [s, b, h] of the first s stages to vectors of the same shape; has `for_stages`.
    """

    def __init__(
        self,
        readings: Sequence[Reading],
        stages: Sequence[int],
        towers: TaskMLP,
        base: Trunk | None = None,
        transfer: nn.Module | None = None,
    ):
        super().__init__()
        self.readings, self.stages = tuple(readings), tuple(stages)
        self.towers, self.base, self.transfer = towers, base, transfer

    @property
    def moe_layers(self) -> dict[str, Any]:
        """The levels of the base, by the key of their `Routing`."""
        return {} if self.base is None else dict(self.base.moe_layers)

    def _needed(self, read: Sequence[int]) -> list[int]:
        """Positions of the stages that must be computed for these, ascending."""
        places = [self.stages.index(s) for s in read]
        return places if self.transfer is None else list(range(max(places) + 1))

    def forward(self, x: Tensor, tasks: Sequence[int]) -> tuple[Tensor, dict[str, Routing]]:
        """Vectors [s, b, h] of the stages that these tasks read, ascending, from vectors [b, d].

        Also the routing of the base; the blocks of a stage have the id of the task that reads it alone, or else of the
        first task that needs it.
        """
        read = stages_of([self.readings[i] for i in tasks])
        needed, routings = self._needed(read), {}
        if self.base is not None:
            x, routings = self.base(x, needed)
            shown = tuple(self._task_of(self.stages[place]) for place in needed)
            routings = {name: replace(routing, task=shown) for name, routing in routings.items()}
        y = self.towers(x, needed)
        if self.transfer is not None:
            y = self.transfer(y)
        wanted = [needed.index(self.stages.index(s)) for s in read]
        return y if len(wanted) == len(needed) else y[wanted], routings

    def _task_of(self, stage: int) -> int:
        alone = Reading("stage", (stage,))
        if alone in self.readings:
            return self.readings.index(alone)
        place = self.stages.index(stage)
        return next(i for i, reading in enumerate(self.readings) if place in self._needed(reading.stages))

    def for_tasks(self, tasks: Sequence[int]) -> Self:
        """A copy for these tasks alone, in this order: the stages they need."""
        readings = [self.readings[i] for i in tasks]
        needed = self._needed(stages_of(readings))
        transfer: Any = self.transfer
        small = type(self)(
            readings,
            [self.stages[place] for place in needed],
            self.towers.for_tasks(needed),
            None if self.base is None else self.base.for_tasks(needed),
            None if transfer is None else transfer.for_stages(len(needed)),
        )
        return small.train(self.training)

    def layout(self) -> dict[str, Any] | None:
        """What `moe_mtl.levels.build_trunk` builds the base from; None without one."""
        return None if self.base is None else self.base.layout()


class StageHeads(nn.Module):
    """A logit for every stage that is read, and from these the prediction of every task.

    Args:
        tasks: what is predicted, binary.
        readings: what each of them reads.
        dim: width of a stage's vector.
    """

    def __init__(self, tasks: Sequence[Task], readings: Sequence[Reading], dim: int):
        super().__init__()
        self.tasks, self.readings = tuple(tasks), tuple(readings)
        self.stages = tuple(stages_of(readings))
        self.out = TaskLinear(dim, 1, len(self.stages), bias=True)

    def forward(self, x: Tensor, ids: Sequence[int]) -> dict[str, Tensor]:
        """Logits {task: [b]} of these tasks from the vectors [s, b, d] of the stages they read, float32 at least."""
        read = stages_of([self.readings[i] for i in ids])
        y = self.out.blocks(x, [self.stages.index(s) for s in read]).squeeze(2)
        logits = dict(zip(read, y.to(torch.promote_types(y.dtype, torch.float32)).unbind(0), strict=True))
        return {self.tasks[i].name: self.readings[i].logit(logits) for i in ids}

    def for_tasks(self, ids: Sequence[int]) -> Self:
        """A copy that serves these tasks alone, in this order."""
        readings = [self.readings[i] for i in ids]
        read = stages_of(readings)
        out = self.out.for_tasks([self.stages.index(s) for s in read])
        small = copy.deepcopy(self, {id(self.out): out})
        small.tasks, small.readings, small.stages = tuple(self.tasks[i] for i in ids), tuple(readings), tuple(read)
        return small


def check_binary(tasks: Sequence[Task], names: Sequence[str], option: str) -> None:
    """Refuses names of stages that are not distinct, and tasks that are not binary.

    Raises:
        ValueError: with the name.
    """
    if len(set(names)) < len(names):
        raise ValueError(f"{option}: {list(names)} names a task twice")
    for task in tasks:
        if task.kind != "binary":
            raise ValueError(f"tasks: {task.name!r} is of kind {task.kind}; steps of a chain are Task.binary")
