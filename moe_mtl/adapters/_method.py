"""What a kind of adapters has to do, and how its layers learn which tasks a forward is for."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_mtl.layers import TaskContext
from moe_mtl.routing import task_per_row

ADAPTER = "default"  # under which name peft holds its one adapter


class AdapterContext(TaskContext):
    """A `TaskContext` that can also collect low-rank activations while a forward runs."""

    def __init__(self):
        super().__init__()
        self.activations: dict[str, Tensor] | None = None

    @contextmanager
    def collect(self) -> Iterator[dict[str, Tensor]]:
        """Collects {adapted map: x A [b, n, r]} of the forwards inside."""
        self.activations = {}
        try:
            yield self.activations
        finally:
            self.activations = None

    def require(self) -> None:
        """Refuses to go on outside a forward of the wrapping model.

        Raises:
            RuntimeError: no forward is under way.
        """
        if not self.active:
            raise RuntimeError("an adapted map has no task: call the MultiTaskModel, not its backbone")

    def task_rows(self, rows: int, device: torch.device) -> Tensor:
        """The task of each row of a stacked batch, int64 [rows]."""
        self.require()
        return task_per_row(self.task, rows, device)

    def groups(self) -> tuple[list[int], Tensor | None]:
        """The distinct tasks of this forward, and which of them each row has: int64 [b], None for equal blocks."""
        self.require()
        if isinstance(self.task, Tensor):
            present, where = self.task.unique(return_inverse=True)
            return present.tolist(), where
        return [self.task] if isinstance(self.task, int) else list(self.task), None


class AdapterMethod(ABC):
    """One kind of adapters: how they get into an encoder, and what they add to a linear map for one task.

    Holds options alone; parameters live in the layers.

    Attributes:
        parts_tasks: whether what an adapted map computes depends on the task.
    """

    parts_tasks = True

    def check(self, maps: Mapping[str, nn.Linear]) -> None:  # noqa: B027  a method without such options or entries has nothing to do
        """Refuses linear maps that these adapters do not fit."""

    @abstractmethod
    def inject(self, encoder: nn.Module, maps: Sequence[str], tasks: Sequence[str], context: AdapterContext) -> None:
        """Puts adapted layers, whose `base_layer` is the frozen map, in the place of linear maps."""

    @abstractmethod
    def trained(self, layer: Any) -> Iterable[nn.Parameter]:
        """The parameters of an adapted layer that training changes."""

    def own(self, layer: Any, task: str) -> Iterable[nn.Parameter]:
        """Those that one task alone uses, and that training changes."""
        return ()

    @abstractmethod
    def delta(self, layer: Any, task: str) -> Tensor:
        """What the adapters of a layer add to its weight for a task, [out, in]."""

    def keep_tasks(self, layer: Any, tasks: Sequence[str]) -> None:  # noqa: B027  a method without such options or entries has nothing to do
        """Drops, in place, what belongs to other tasks; these get the ids 0, 1, ..."""

    def add_task(self, layer: Any, task: str, like: Sequence[str]) -> None:  # noqa: B027  a method without such options or entries has nothing to do
        """Gives a layer what one more task needs: the mean of what those of `like` have, or fresh."""

    def rename_task(self, layer: Any, old: str, new: str) -> None:  # noqa: B027  a method without such options or entries has nothing to do
        """Gives what belongs to a task the name it has now."""


class PerTask(nn.Module, ABC):
    """Parameters `<part>_<task>` of each task, apart from each other.

    So neither weight decay nor momentum moves those of a task that is not trained. Ids are positions in `tasks`.

    Attributes:
        parts: what each task has.
        tasks: names, in the order of their ids.
    """

    parts: tuple[str, ...] = ()

    def __init__(self):
        super().__init__()
        self.tasks: tuple[str, ...] = ()

    @abstractmethod
    def fresh(self) -> Iterable[Tensor]:
        """What the parts of a new task start as."""

    def own(self, task: str) -> list[nn.Parameter]:
        """The parts of a task."""
        return [getattr(self, f"{part}_{task}") for part in self.parts]

    def add_task(self, task: str, like: Sequence[str] = ()) -> None:
        """Appends a task with the mean of the parts of `like`, or fresh ones; no others change."""
        known = [[parameter.detach() for parameter in self.own(name)] for name in like]
        means = [torch.stack(values).mean(dim=0) for values in zip(*known, strict=True)]
        for part, value in zip(self.parts, means or self.fresh(), strict=True):
            self.register_parameter(f"{part}_{task}", nn.Parameter(value))
        self.tasks = (*self.tasks, task)

    def keep_tasks(self, tasks: Sequence[str]) -> None:
        """Drops, in place, the parts of other tasks; these get the ids 0, 1, ..."""
        for task in set(self.tasks) - set(tasks):
            for part in self.parts:
                delattr(self, f"{part}_{task}")
        self.tasks = tuple(tasks)

    def rename_task(self, old: str, new: str) -> None:
        """Gives the parts of a task another name; its id stays."""
        kept = self.own(old)
        for part in self.parts:
            delattr(self, f"{part}_{old}")
        for part, parameter in zip(self.parts, kept, strict=True):
            self.register_parameter(f"{part}_{new}", parameter)
        self.tasks = tuple(new if task == old else task for task in self.tasks)

    def stacked(self, part: str, ids: Sequence[int], where: Tensor | None) -> Tensor:
        """One part per group of rows, [g, ...]: of these tasks, or per row where rows have tasks of their own.

        Args:
            part: its name.
            ids: tasks.
            where: which of them each row has, int64 [b]; None for a group per task.
        """
        found = torch.stack([getattr(self, f"{part}_{self.tasks[i]}") for i in ids])
        return found if where is None else found[where]
