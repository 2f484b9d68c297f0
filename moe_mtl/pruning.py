"""Smaller models still: `prune` drops experts until a size is reached, and says what that cost."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, Self, get_args

from moe_mtl.calibration import grouped, measure, one_by_one
from moe_mtl.distilling import distill
from moe_mtl.folded import FoldedMoE
from moe_mtl.multitask import MultiTaskModel, SingleTaskSet, count_rows, evaluating, move
from moe_mtl.samples import read_samples
from moe_mtl.scoring import TaskMetrics, multi_task_gain
from moe_mtl.sparse import Extraction, MassLimit, check_mass, finished, for_tasks, prunable
from moe_mtl.tasks import nearest
from moe_mtl.thinning import Check, Kept, by_output, by_usage, fewest, needs, thin, without

By = Literal["usage", "output"]
Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Pruning(Extraction):
    """What `prune` kept and what it cost; `dataclasses.asdict` makes plain data of it.

    Attributes:
        layers: as in `Extraction`.
        by: what decided which experts go.
        whole: parameters of the model that `extract` gives for the tasks without calibration.
        parameters: of the pruned one.
        samples: held-out samples it was scored on; 0 without any.
        before: the tasks' metrics on them, of the model `extract` gives.
        after: the same of the pruned one.
        updates: in which what is left learned the features of the whole; see `recover`.
        lacking: what the features lacked before these and after, as a share of the variance of the whole's.
        change: by task, how much better (+) or worse (-) that is in percent, the mean over its metrics; see
            `moe_mtl.scoring.multi_task_gain`.
    """

    by: By = "usage"
    whole: int = 0
    parameters: int = 0
    updates: int = 0
    lacking: tuple[float, float] = (0.0, 0.0)
    samples: int = 0
    before: Scores = field(default_factory=dict)
    after: Scores = field(default_factory=dict)
    change: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """As in `Extraction`."""
        return super().from_dict({**data, "lacking": tuple(data.get("lacking", (0.0, 0.0)))})

    def summary(self) -> str:
        """What is left and what it cost, a line per task."""
        share = self.parameters / max(self.whole, 1)
        lines = [f"{self.parameters:,} of {self.whole:,} parameters left ({share:.1%}), by {self.by}"]
        if self.updates:
            before, after = self.lacking
            lines.append(f"features off by {before:.2%} of their variance, {self.updates} updates later {after:.2%}")
        for task, metrics in self.before.items():
            scores = [f"{name} {old:.4g} -> {self.after[task][name]:.4g}" for name, old in metrics.items()]
            lines.append(f"{task}: {', '.join(scores)} ({self.change[task]:+.2f} %, {self.samples} held-out samples)")
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self.summary()}\n{super().__str__()}"


def prune(
    model: MultiTaskModel | SingleTaskSet,
    tasks: Sequence[str] | str,
    calibration: Iterable[Any],
    *,
    mass: float | None = None,
    experts: int | Mapping[str, int] | None = None,
    budget: float | None = None,
    by: By = "usage",
    recover: Any = None,
    updates: int = 200,
    lr: float = 1e-3,
    held_out: Iterable[Any] | None = None,
    fold: bool = True,
) -> MultiTaskModel | SingleTaskSet:
    """`extract` of some tasks with fewer experts: as many as a size allows, the least important dropped first.

    Experts go one by one. By usage the next is the one whose share of the gate's weight on the calibration samples is
    smallest, the largest of the tasks' shares where there are several, as they were before any was dropped. By output
    it is the one without which its layer's output changes least: |y' - y|^2 / |y|^2 over the calibration tokens, the
    largest of the tasks' values, y' without it and those that have gone before, measured anew after each drop in the
    layer. Of equal ones the first layer's goes, and there the lowest id.

    One of three says how far:

    mass     In each layer while no task loses more than this share of its gate weight; experts no calibration token
             used go in any case, and a gate that chooses k keeps k. By usage that is `extract(..., mass=mass)`.
    experts  In each layer until so many are left. Layers that are not named stay whole. A gate that chose k more
             chooses these.
    budget   Over all layers until so many parameters are left, of the whole model.

    With `recover` what is left then learns to give the features that the heads had before: the experts and gates are
    trained on the squared error to them (`moe_mtl.distilling`), nothing else of the model moves, and no label is read.

    A token always has an expert: of those that a task, or a stream of a table's trunk, can reach one is kept.

    Args:
        model: as in `moe_mtl.extract`; it is not changed.
        tasks: one task name or several.
        calibration: as in `extract`. By output the activations of all layers are held in memory.
        mass: 0 to below 1.
        experts: left in each layer, or by layer, the key of its `Routing`.
        budget: parameters that may remain, an int; or the share of those that `extract` leaves, above 0 to 1, a float.
        by: "usage" or "output".
        recover: samples like those of training, a list of them or a map-style data set, the more the better.
        updates: of 16 of these samples.
        lr: peak learning rate of the updates.
        held_out: samples with labels, single or in batches, on which the tasks' metrics are measured before and after;
            the result is also printed to stderr.
        fold: as in `extract`.

    Returns:
        The new model, as `extract` gives it; its attribute `extraction` is the `Pruning`.

    Raises:
        ValueError: not just one of `mass`, `experts` and `budget`; one of them out of range, or such that no choice of
            experts meets it (the smallest that does is named) or a token would have none; held-out samples without a
            label of a task; no samples to recover on, or updates or a rate out of range; an unknown `by`; or what
            `extract` refuses.
    """
    goal = [name for name, value in (("mass", mass), ("experts", experts), ("budget", budget)) if value is not None]
    if len(goal) != 1:
        raise ValueError(f"mass, experts, budget: got {', '.join(goal) or 'none'}, expected exactly one of the three")
    if by not in get_args(By):
        raise ValueError(f"by: unknown {by!r}; {nearest(str(by), get_args(By))}")
    if updates < 1 or not lr > 0:
        raise ValueError(f"updates, lr: got {updates}, {lr}; expected 1 or more, above 0")
    whole: Any = for_tasks(model, tasks, fold=fold)
    recover = None if recover is None else read_samples(whole, recover, "recover")
    held = prunable(whole) if getattr(whole, "moe_layers", None) else {}
    may, fits = _anything, _anything
    if mass is not None:
        check_mass(mass)
    elif experts is not None:
        may, fits = _until_experts(whole, held, experts)
    names = [task.name for task in whole.tasks]
    size, each = _sizes(finished(whole.for_tasks(names), fold=fold))
    if budget is not None:
        may, fits = _until_parameters(whole, held, budget, size, each)
    small, kept, measured = whole.for_tasks(names), held, None
    if held:
        measured = measure(whole, calibration, model.tasks, calls=by == "output")
        cost = by_usage(measured.mass) if by == "usage" else by_output(whole.moe_layers, measured.calls)
        kept = thin(held, cost, may, fits if mass is None else MassLimit(whole, measured, mass))
    small = finished(small, kept, measured, fold=fold)
    lacking = (0.0, 0.0)
    if recover is not None and kept != held:
        lacking = distill(small, whole, recover, steps=updates, lr=lr)
    before, after, samples = _compare(whole, small, held_out) if held_out is not None else ({}, {}, 0)
    small.extraction = Pruning(
        layers=small.extraction.layers,
        by=by,
        whole=size,
        parameters=_parameters(small),
        updates=updates if recover is not None and kept != held else 0,
        lacking=lacking,
        samples=samples,
        before=before,
        after=after,
        change=multi_task_gain(after, before, small.tasks)["per_task"] if before else {},
    )
    if before:
        print(f"prune: {small.extraction.summary()}", file=sys.stderr)
    return small


# ---- how far --------------------------------------------------------------------------------------------------------


def _anything(*_: Any) -> bool:
    return True


def _until_experts(model: Any, held: Kept, experts: int | Mapping[str, int]) -> tuple[Check, Check]:
    """Whether an expert can be done without, and whether more are there than asked for.

    Raises:
        ValueError: no such layer, no number of experts it can have, or a task would have none.
    """
    if isinstance(experts, Mapping):
        left = {name: experts.get(name, len(ids)) for name, ids in held.items()}
        for name in experts:
            if name not in held:
                raise ValueError(f"experts: no layer {name!r} with experts; {nearest(name, held)}")
    else:
        left = dict.fromkeys(held, experts)
    wanted = {name: needs(model.moe_layers[name]) for name in held}
    for name, ids in held.items():
        least = int(fewest(wanted[name], ids))
        if not isinstance(left[name], Integral) or isinstance(left[name], bool) or not least <= left[name] <= len(ids):
            why = " (fewer would leave a task's tokens without any)" if least > 1 else ""
            raise ValueError(f"experts: got {left[name]} for layer {name!r}, expected {least}{why} to {len(ids)}")

    def may(kept: Kept, name: str, e: int) -> bool:
        return fewest(wanted[name], without(kept, name, e)[name]) <= left[name]

    return may, lambda kept, name, e: len(kept[name]) > left[name]


def _sizes(extracted: Any) -> tuple[int, dict[str, int]]:
    """The parameters of a model as `extract` gives it, and by layer those that go with each of its experts.

    Where the experts are one MLP, folded, they share an output bias.
    """
    each = {}
    for name, layer in getattr(extracted, "moe_layers", {}).items():
        shared = layer.experts.b2.numel() if isinstance(layer, FoldedMoE) and layer.experts.b2 is not None else 0
        each[name] = (_parameters(layer.experts) - shared) // len(layer.kept_experts)
    return _parameters(extracted), each


def _until_parameters(model: Any, held: Kept, budget: float, size: int, each: Mapping[str, int]) -> tuple[Check, Check]:
    """Whether the budget can be met without an expert, and whether it is not met with it; sizes as `_sizes` has them.

    Raises:
        ValueError: neither a number of parameters nor a share, or less than any choice of experts leaves.
    """
    share = isinstance(budget, float)
    if isinstance(budget, bool) or not 0 < budget <= (1 if share else math.inf):
        raise ValueError(
            f"budget: got {budget}, expected a number of parameters, an int, or a share above 0 to 1, a float"
        )
    target = budget * size if share else budget
    wanted = {name: needs(model.moe_layers[name]) for name in held}

    def left(counts: Mapping[str, float]) -> float:
        return size - sum(each[name] * (len(ids) - counts[name]) for name, ids in held.items())

    def smallest(kept: Kept) -> float:
        return left({name: fewest(wanted[name], ids) for name, ids in kept.items()})

    if smallest(held) > target:
        raise ValueError(
            f"budget: got {budget}, at most {int(target):,} parameters; the smallest model of "
            f"{', '.join(task.name for task in model.tasks)} that leaves every token an expert has "
            f"{int(smallest(held)):,}, {smallest(held) / size:.1%} of the {size:,} that extract leaves"
        )
    return (
        lambda kept, name, e: smallest(without(kept, name, e)) <= target,
        lambda kept, name, e: left({name: len(ids) for name, ids in kept.items()}) > target,
    )


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ---- what it costs --------------------------------------------------------------------------------------------------


def _compare(whole: Any, small: Any, held_out: Iterable[Any]) -> tuple[Scores, Scores, int]:
    """The metrics of two models of the same tasks on the same samples, and the number of these.

    Raises:
        ValueError: samples without labels, or none for a task.
    """
    scores, samples, device = [TaskMetrics(whole.tasks) for _ in range(2)], 0, next(whole.parameters()).device
    with evaluating(whole), evaluating(small):
        for position, batch in enumerate(grouped(one_by_one(held_out, "held_out"), whole, whole.tasks)):
            if not isinstance(batch, Mapping) or batch.get(whole.input) is None:
                raise ValueError(
                    f"held_out: item {position} is a {type(batch).__name__}; expected dicts that hold {whole.input!r} "
                    "and labels under the names of the tasks"
                )
            names = [task.name for task in whole.tasks if batch.get(task.name) is not None]
            if not names:
                continue
            x = move(batch[whole.input], device)
            samples += count_rows(x)
            for one, model in zip(scores, (whole, small), strict=True):
                one.update({name: y.float() for name, y in model(x, tasks=names).items()}, batch)
    before, after = (one.compute() for one in scores)
    for name, metrics in before.items():
        if any(math.isnan(value) for value in metrics.values()):
            raise ValueError(f"held_out: no sample has a label of {name!r} that {', '.join(metrics)} can be told from")
    return before, after, samples
