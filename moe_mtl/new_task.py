"""A new task for a trained model: its routers start from the nearest tasks, and it alone learns from a few samples.

    add_task(model, task, init_from="nearest", data=samples)
    finetune(model, samples, train="router+head")

What belongs to the new task alone are its head and its entries of the gates. While nothing else learns, the other tasks
compute what they did, to the bit. For a run with a folder, which can be resumed, `Trainer` takes `train_only` and
`FewShot`.

Paper: none; inspired by Gupta et al. 2022, https://arxiv.org/abs/2204.07689 (new tasks learn few-shot on the routing of
    related ones).
Differs: rebuilt from the abstract. Which tasks are related is measured (`moe_mtl.similarity`), and the router starts as
    the mean of theirs.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_mtl.diagnostics import expert_usage
from moe_mtl.gates import VisibleExperts
from moe_mtl.multitask import task_ids
from moe_mtl.new_experts import task_layers
from moe_mtl.samples import USAGE, inputs_of, read_training
from moe_mtl.similarity import By, Routed, task_similarity
from moe_mtl.tasks import Task

MEASURED = ("nearest", "most_used")
MOST = 0.8  # share of the gates' weights


def add_task(
    model: Routed,
    task: Task,
    init_from: Sequence[str] | str | None = None,
    *,
    data: Any = None,
    neighbours: int = 2,
    by: By = "fisher",
    head_from: str | None = None,
    **options: Any,
) -> Routed:
    """`model.add_task`, which also finds the tasks to start from.

    Args:
        model: changed in place; routed by task or not.
        task: of a new name.
        init_from: "nearest"; "most_used", for fresh routers that see the experts alone which take most of the gates'
            weights on some samples, over all tasks; tasks of the model; or None for fresh routers.
        data: for "nearest", samples of the new task and of those of the model, see `task_similarity`; for "most_used",
            samples of the new task, whose labels are not read.
        neighbours: how many of the nearest. Some gates have no mean of several tasks, and want 1.
        by: what nearness is measured by, "fisher", "gradient" or "embedding".
        head_from: a task of the model, of as many outputs and the same kind, whose head the new one starts as a copy
            of; a fresh head when None.
        options: further arguments of `task_similarity`.

    Returns:
        The model. Which tasks were found is printed to stderr.

    Raises:
        ValueError: a model that takes no new task; "nearest" without data, or data without it; a head that cannot be
            copied; or what `model.add_task` and `task_similarity` refuse.
    """
    if not hasattr(model, "add_task"):
        raise ValueError(f"model: a {type(model).__name__} takes no new task; expected a MultiTaskModel or VectorModel")
    if head_from is not None:
        _check_head(model, task, head_from)
    _add(model, task, init_from, data, neighbours, by, options)
    if head_from is not None:
        with torch.no_grad():
            for new, old in zip(model.head_parameters(task.name), model.head_parameters(head_from), strict=True):
                new.copy_(old)
    return model


def _check_head(model: Routed, task: Task, name: str) -> None:
    """Refuses a head that does not fit a task.

    Raises:
        ValueError: there is no such task, or it predicts something else.
    """
    (i,) = task_ids(model.tasks, [name], "head_from")
    like = model.tasks[i]
    if (like.kind, like.channels) != (task.kind, task.channels):
        fit = [one.name for one in model.tasks if (one.kind, one.channels) == (task.kind, task.channels)]
        raise ValueError(
            f"head_from: {name} is {like.kind} with {like.channels} outputs, {task.name} {task.kind} with "
            f"{task.channels}; {'these fit: ' + ', '.join(fit) if fit else 'no task of the model fits, leave it out'}"
        )


def _add(
    model: Routed,
    task: Task,
    init_from: Sequence[str] | str | None,
    data: Any,
    neighbours: int,
    by: By,
    options: dict[str, Any],
) -> Routed:
    """`add_task` with a fresh head."""
    measured = init_from in MEASURED and init_from not in [one.name for one in model.tasks]
    if not measured or (init_from == "most_used" and options):
        given = ", ".join(["data"] * (data is not None and not measured) + list(options))
        if given:
            raise ValueError(f"init_from: got {init_from!r}, but {given} are for init_from='nearest'; leave them out")
        return model.add_task(task, init_from)
    if data is None:
        raise ValueError(
            f"data: init_from={init_from!r} is measured; pass samples, for 'nearest' of the new task and of the model's"
        )
    if init_from == "most_used":
        return _over_most_used(model, task, data)
    if neighbours < 1:
        raise ValueError(f"neighbours: got {neighbours}, expected at least 1")
    near = list(task_similarity(model, task, data, by=by, **options).items())[:neighbours]
    model.add_task(task, [name for name, _ in near])
    print(f"add_task: {task.name} starts from {', '.join(f'{n} ({v:.3f})' for n, v in near)}", file=sys.stderr)
    return model


def _over_most_used(model: Routed, task: Task, data: Any) -> Routed:
    """Adds a task whose fresh routers see only the experts that take most of the gates' weights on some samples."""
    usage = expert_usage(model, inputs_of(model, read_training(model, data, "data"), USAGE))
    for name, (layer, _) in task_layers(model, 0).items():
        if not isinstance(layer.gate, VisibleExperts):
            raise ValueError(
                f"init_from: {type(layer.gate).__name__} of {name} shows all experts to all tasks, so none can start "
                "from the most used; name tasks, or leave it out"
            )
    seen = {
        name: _most_used(layer, usage[name].mass.nanmean(dim=0)) for name, (layer, _) in task_layers(model, 0).items()
    }
    model.add_task(task)
    shown = []
    for name, (layer, place) in task_layers(model, len(model.tasks) - 1).items():
        layer.gate.show_only(place, seen[name])
        shown.append(f"{name}: {len(seen[name])} of {len(layer.kept_experts)} experts")
    model.note_experts()
    print(f"add_task: {task.name} starts from {'; '.join(shown)}", file=sys.stderr)
    return model


def _most_used(layer: Any, share: torch.Tensor) -> list[int]:
    """The experts of a layer, ascending, that take most of these shares; as many as a token uses at least."""
    held, gate = layer.kept_experts, layer.gate
    least = gate.k if gate.compute_class == "token" else min(gate.k, len(held) // 2)
    ids, total = [], 0.0
    for e in sorted(held, key=lambda e: -float(share[e])):
        if total >= MOST and len(ids) >= least:
            break
        ids.append(e)
        total += float(share[e])
    return sorted(ids)


def parameters_of_task(model: Routed, name: str) -> list[str]:
    """Names of the parameters that serve one task alone, as `model.own_parameters` has them.

    Raises:
        ValueError: there is no such task.
    """
    own = {id(p) for p in model.own_parameters(name)}
    return [full for full, p in model.named_parameters() if id(p) in own]


def train_only(model: Routed, name: str) -> dict[str, float]:
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
