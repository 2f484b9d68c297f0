"""The contract every balancer keeps."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from moe_mtl.tasks import Task, check_tasks, nearest


class Balancer(nn.Module, ABC):
    """Combines the losses of several tasks into the scalar that is differentiated.

    Losses are handed over by task name; a task that was not sampled in this step, or has no label in the batch, is
    absent, and neither it nor any parameter kept for it may influence the result. `Task.weight` is a factor on the
    task's share in every method. Whatever a method learns or remembers is a parameter or a buffer, so that a checkpoint
    holds it; parameters are trained by the optimizer of the model, without weight decay.

    Args:
        tasks: the tasks whose losses will come.
    """

    # The total is an affine function of the losses, so that it may be accumulated over parts of a batch.
    affine: ClassVar[bool] = True
    # Factor on the learning rate of this balancer's own parameters.
    lr_scale: float = 1.0

    def __init__(self, tasks: Sequence[Task]):
        super().__init__()
        self.tasks = check_tasks(tasks)
        self._weight_of = {task.name: task.weight for task in self.tasks}

    @abstractmethod
    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The total to differentiate, a scalar.

        Args:
            losses: scalar loss per task name; at least one, not necessarily all.

        Raises:
            ValueError: no losses, or the name of an unknown task.
        """

    @abstractmethod
    def factors(self) -> dict[str, float]:
        """d total / d loss of every task at this moment, for logs."""

    def _check(self, losses: Mapping[str, Tensor]) -> None:
        if not losses:
            raise ValueError("losses: got none; skip the step when no task has a label")
        for name in losses:
            if name not in self._weight_of:
                raise ValueError(f"losses: unknown task {name!r}; {nearest(name, self._weight_of)}")
