"""A new task for a trained model: its routers start from the nearest tasks, and it alone learns from a few samples.

    add_task(model, task, init_from="nearest", data=samples)
    data = FewShot(model.tasks, train=samples, val=others)
    Trainer(model, data, TrainerConfig(out="runs/few", steps=200, lr_scales=train_only(model, task.name))).fit()

What belongs to the new task alone are its head and its entries of the gates. While nothing else learns, the other tasks
compute what they did, to the bit.

Paper: none; inspired by Gupta et al. 2022, https://arxiv.org/abs/2204.07689 (new tasks learn few-shot on the routing of
    related ones).
Differs: rebuilt from the abstract. Which tasks are related is measured (`moe_mtl.similarity`), and the router starts as
    the mean of theirs.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_mtl.multitask import MultiTaskModel
from moe_mtl.similarity import By, task_similarity
from moe_mtl.tasks import Task


def add_task(
    model: MultiTaskModel,
    task: Task,
    init_from: Sequence[str] | str | None = None,
    *,
    data: Any = None,
    neighbours: int = 2,
    by: By = "fisher",
    **options: Any,
) -> MultiTaskModel:
    """`MultiTaskModel.add_task`, which also finds the tasks to start from.

    Args:
        model: changed in place; routed by task or not.
        task: of a new name.
        init_from: "nearest", tasks of the model, or None for fresh routers.
        data: for "nearest", samples of the new task and of those of the model; see `task_similarity`.
        neighbours: how many of the nearest. Some gates have no mean of several tasks, and want 1.
        by: what nearness is measured by, "fisher", "gradient" or "embedding".
        options: further arguments of `task_similarity`.

    Returns:
        The model. Which tasks were found is printed to stderr.

    Raises:
        ValueError: a model that is no `MultiTaskModel`; "nearest" without data, or data without it; or what
            `MultiTaskModel.add_task` and `task_similarity` refuse.
    """
    if not isinstance(model, MultiTaskModel):
        raise ValueError(f"model: a {type(model).__name__} takes no new task; expected a MultiTaskModel")
    if init_from != "nearest" or "nearest" in model.heads:
        if data is not None or options:
            given = ", ".join(["data"] * (data is not None) + list(options))
            raise ValueError(f"init_from: got {init_from!r}, but {given} are for init_from='nearest'; leave them out")
        return model.add_task(task, init_from)
    if data is None:
        raise ValueError("data: init_from='nearest' is measured; pass samples of the new task and of the model's tasks")
    if neighbours < 1:
        raise ValueError(f"neighbours: got {neighbours}, expected at least 1")
    near = list(task_similarity(model, task, data, by=by, **options).items())[:neighbours]
    model.add_task(task, [name for name, _ in near])
    print(f"add_task: {task.name} starts from {', '.join(f'{n} ({v:.3f})' for n, v in near)}", file=sys.stderr)
    return model


def parameters_of_task(model: MultiTaskModel, name: str) -> list[str]:
    """Names of the parameters that serve one task alone, as `model.own_parameters` has them.

    Raises:
        ValueError: there is no such task.
    """
    own = {id(p) for p in model.own_parameters(name)}
    return [full for full, p in model.named_parameters() if id(p) in own]


def train_only(model: MultiTaskModel, name: str) -> dict[str, float]:
    """`TrainerConfig.lr_scales` with which a task's own parameters learn and everything else is frozen.

    The trainer freezes in place: `model.requires_grad_(True)` undoes it, where no gate was made frozen.

    Raises:
        ValueError: there is no such task.
    """
    return {"*": 0.0} | dict.fromkeys(parameters_of_task(model, name), 1.0)


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """Samples at hand as a data set for `Trainer`; they need not have labels of all tasks.

    Attributes:
        tasks: those of the model.
        train: samples to learn from: a list of dicts or a data set, as `Trainer` reads it.
        val: samples to score.
    """

    tasks: Sequence[Task]
    train: Any
    val: Any = None

    def task_list(self) -> tuple[Task, ...]:
        """The tasks."""
        return tuple(self.tasks)

    def split(self, name: str) -> Any:
        """The samples of "train" or "val".

        Raises:
            ValueError: another name, or there are none.
        """
        found = {"train": self.train, "val": self.val}.get(name)
        if found is None:
            raise ValueError(f"split: no samples for {name!r}; pass train= and val=, or eval_every=0 to go without val")
        return found
