"""Scoring: every metric of every task over a whole set, and the multi-task gain over a baseline."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from moe_mtl.metrics import METRICS, metric_info
from moe_mtl.tasks import Task, check_tasks, nearest


def _collection(task: Task) -> MetricCollection:
    """The metrics of one task; those with the same states share them."""
    metrics: dict[str, Any] = {}
    groups: dict[str, list[str]] = {}
    for name, args in task.metrics.items():
        info = metric_info(name)
        if task.kind not in info.kinds:
            fitting = [other for other, known in METRICS.items() if task.kind in known.kinds]
            raise ValueError(
                f"metrics: {name!r} does not fit task {task.name!r} of kind {task.kind!r}; use {', '.join(fitting)}"
            )
        try:
            metric = metrics[name] = info.factory(task, **args)
        except TypeError as error:
            raise ValueError(f"metrics: {name!r} of task {task.name!r} refuses {dict(args)}: {error}") from error
        # a process without new labels would return its cached value while the others wait for its states
        metric.compute_with_cache = False
        groups.setdefault(getattr(metric, "state_group", None) or name, []).append(name)
    return MetricCollection(metrics, compute_groups=list(groups.values()))


def _grouping(task: Task, metrics: MetricCollection) -> tuple[str, str] | None:
    """The metric of a task that ranks within groups and the batch key of their ids, or None."""
    found = {name: getattr(metric, "by", None) for name, metric in metrics.items(copy_state=False)}
    keys = {name: by for name, by in found.items() if by is not None}
    if len(set(keys.values())) > 1:
        raise ValueError(f"metrics: task {task.name!r} groups by {keys}; one task groups by one key")
    return next(iter(keys.items()), None)


class TaskMetrics:
    """The metrics of all tasks, accumulated over a set.

    Under DDP every process updates with its own batches and all call `compute`, which sums the states.

    Args:
        tasks: what is scored; a task without metrics is skipped.

    Raises:
        ValueError: a metric is unknown, does not fit its task, or refuses its arguments; or metrics of a task group by
            different keys.
    """

    def __init__(self, tasks: Sequence[Task]):
        self.tasks = {task.name: task for task in check_tasks(tasks)}
        self._metrics = {name: _collection(task) for name, task in self.tasks.items() if task.metrics}
        self._grouping = {name: _grouping(self.tasks[name], metrics) for name, metrics in self._metrics.items()}
        self.device = torch.device("cpu")

    def to(self, device: torch.device | str) -> "TaskMetrics":
        """Moves the states; batches are brought to where the states are. MPS lacks float64, keep it on the CPU."""
        for metrics in self._metrics.values():
            metrics.to(device)
        self.device = torch.device(device)
        return self

    def update(self, predictions: Mapping[str, Tensor], targets: Mapping[str, Tensor | None]) -> None:
        """Adds a batch.

        Args:
            predictions: prediction per task, shapes as in `moe_mtl.tasks`; a task left out is not scored.
            targets: label per task; tasks may be absent or None, and labels missing inside a batch are masked.
                Of the other keys only group ids are read, int64 [b] under the key a metric's `by` names, and the
                inputs are ignored, so a whole batch can be passed.

        Raises:
            ValueError: a prediction of an unknown task or with NaN in it, what is no tensor, a shape that does not fit,
                a label out of range, or group ids that are missing or not int64 [b].
        """
        for name, prediction in predictions.items():
            if name not in self.tasks:
                raise ValueError(f"predictions: unknown task {name!r}; {nearest(name, self.tasks)}")
            target = targets.get(name)
            if target is None or name not in self._metrics:
                continue
            task = self.tasks[name]
            _check_tensor(f"predictions[{name!r}]", prediction)
            _check_tensor(f"targets[{name!r}]", target)
            task.check_shapes(prediction, target)
            prediction, target = prediction.detach().to(self.device), target.to(self.device)
            if prediction.isnan().any():
                raise ValueError(f"predictions: task {name!r} has NaN; the model diverged or its input holds NaN")
            task.check_target(target, f"targets[{name!r}]")
            self._metrics[name].update(prediction, target, task.valid(target), **self._groups(name, targets))

    def _groups(self, name: str, targets: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        grouping = self._grouping[name]
        if grouping is None:
            return {}
        metric, by = grouping
        groups = targets.get(by)
        if not isinstance(groups, Tensor):
            raise ValueError(
                f"targets: no tensor {by!r}, whose ids {metric!r} of task {name!r} groups by; {nearest(by, targets)}"
            )
        return {"groups": groups.to(self.device)}

    def compute(self) -> dict[str, dict[str, float]]:
        """The values over all batches since the last reset, {task: {metric: value}}; NaN where labels define none."""
        values = {}
        with warnings.catch_warnings():
            # a task nobody labelled, perhaps on this process only, is a documented NaN and no mistake
            warnings.filterwarnings("ignore", message=".*was called before the ``update`` method", category=UserWarning)
            for name, metrics in self._metrics.items():
                computed = metrics.compute()
                values[name] = {metric: float(computed[metric]) for metric in self.tasks[name].metrics}
        return values

    def reset(self) -> None:
        """Forgets all batches."""
        for metrics in self._metrics.values():
            metrics.reset()


def _check_tensor(where: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{where}: got a {type(value).__name__}, expected a tensor; where every sample has one task, which gives "
            "(rows, prediction), pass the prediction and the labels of those rows"
        )


Results = Mapping[str, Mapping[str, float]]


def multi_task_gain(
    results: Results, baseline: Results, tasks: Sequence[Task], *, near_zero: float = 1e-6
) -> dict[str, Any]:
    """Compares a multi-task model with a baseline, usually single-task models, in the two conventions in use.

    The gain of a metric is s (N - B) / |B| in percent: N the result, B the baseline, s +1 if higher is better, else -1.
    Where |B| <= near_zero, and of metrics such as R² (`MetricInfo.by_difference`), the quotient says nothing and
    100 s (N - B), the absolute difference, stands in for it.

    Source: the task average as in Maninis et al. 2019, Vandenhende et al. 2021 and LibMTL; the metric average as in
    Nash-MTL (Navon et al. 2022) and FAMO. They are not interchangeable, and neither is comparable across baselines.

    Args:
        results: {task: {metric: value}}, as `TaskMetrics.compute` gives it.
        baseline: the same for the baseline.
        tasks: tasks to compare, on the metrics each of them lists.
        near_zero: baselines up to this size are compared by difference.

    Returns:
        delta_task: percent, mean over tasks of the mean gain of each; higher is better.
        delta_metric: percent, minus the mean gain over all metrics of all tasks; LOWER is better.
        per_task: percent gain of each task.
        per_metric: percent gain of each metric of each task.
        worst_task, worst_gain: the task with the smallest gain, and that gain.
        tasks_worse: how many tasks lost against the baseline.
        absolute: "task/metric" of each that was compared by difference.

    Raises:
        ValueError: a task or metric is missing, None or NaN in results or baseline, or no task has a metric.
    """
    gains: dict[str, dict[str, float]] = {}
    absolute: list[str] = []
    for task in check_tasks(tasks):
        for metric in task.metrics:
            info = metric_info(metric)
            sign = 1.0 if info.higher_is_better else -1.0
            new = _value("results", results, task.name, metric)
            old = _value("baseline", baseline, task.name, metric)
            by_difference = info.by_difference or abs(old) <= near_zero
            if by_difference:
                absolute.append(f"{task.name}/{metric}")
            gains.setdefault(task.name, {})[metric] = 100 * sign * (new - old) / (1 if by_difference else abs(old))
    if not gains:
        raise ValueError(f"tasks: none of {[task.name for task in tasks]} lists a metric")
    per_task = {name: sum(values.values()) / len(values) for name, values in gains.items()}
    flat = [gain for values in gains.values() for gain in values.values()]
    worst = min(per_task, key=per_task.__getitem__)
    return {
        "delta_task": sum(per_task.values()) / len(per_task),
        "delta_metric": -sum(flat) / len(flat),
        "per_task": per_task,
        "per_metric": gains,
        "worst_task": worst,
        "worst_gain": per_task[worst],
        "tasks_worse": sum(gain < 0 for gain in per_task.values()),
        "absolute": absolute,
    }


def _value(where: str, values: Results, task: str, metric: str) -> float:
    if task not in values:
        raise ValueError(f"{where}: task {task!r} is missing; it has {', '.join(values) or 'none'}")
    if metric not in values[task]:
        raise ValueError(f"{where}: metric {metric!r} of task {task!r} is missing; it has {', '.join(values[task])}")
    value = values[task][metric]
    if value is None or not math.isfinite(value):
        raise ValueError(
            f"{where}: metric {metric!r} of task {task!r} is {value}; was there no label to score it on, or of "
            "one class alone? Compare the other tasks, or score more samples"
        )
    return float(value)
