"""Metrics by name; `moe_mtl.scoring` runs them over a whole set for all tasks.

Every metric is a `torchmetrics.Metric` whose states are sums, or the scores themselves where the order of all matters
(`ranking.py`), so that a set scored in batches, or on several processes, gives the number of the set scored at once,
never an average of batch averages. `update` takes the prediction and target of `moe_mtl.tasks` and a bool mask of the
entries that carry a label; what the mask leaves out counts nowhere. Without any label the value is NaN, and so it is
where the labels leave it undefined: a ranking of one class, the F1 of what is neither labelled nor predicted.

Importing this package costs seconds (torchmetrics pulls transformers), so nothing light imports it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torchmetrics import Metric

from moe_mtl.metrics.dense import (
    ANGLE_BIN,
    AngleMean,
    AngleMedian,
    EdgeF,
    MaxF,
    MeanIoU,
    PixelAccuracy,
    Within11,
    Within22,
    Within30,
    dilate,
)
from moe_mtl.metrics.ranking import AUC, AveragePrecision, GroupedAUC
from moe_mtl.metrics.texts import ConstrainedSpanF1, MicroF1, SpanF1
from moe_mtl.metrics.values import R2, RMSE, AbsError, Accuracy, BinaryAccuracy, Delta1, LogLoss, RelError
from moe_mtl.tasks import Task, nearest

__all__ = [
    "ANGLE_BIN",
    "AUC",
    "METRICS",
    "R2",
    "RMSE",
    "AbsError",
    "Accuracy",
    "AngleMean",
    "AngleMedian",
    "AveragePrecision",
    "BinaryAccuracy",
    "ConstrainedSpanF1",
    "Delta1",
    "EdgeF",
    "GroupedAUC",
    "LogLoss",
    "MaxF",
    "MeanIoU",
    "MetricInfo",
    "MicroF1",
    "PixelAccuracy",
    "RelError",
    "SpanF1",
    "Within11",
    "Within22",
    "Within30",
    "dilate",
    "metric_info",
]


@dataclass(frozen=True)
class MetricInfo:
    """A registered metric.

    Attributes:
        factory: called with the task and the metric's arguments; gives a `torchmetrics.Metric` whose `update` takes
            (prediction, target, valid) as the metrics here do. One with an attribute `by`, a key of the batch, also
            takes what stands there, int64 [b], as `groups`.
        higher_is_better: the direction of the value.
        unit: of the value; "label" for the unit of the labels, "nat" for natural logarithms, empty for
            a number without one.
        kinds: the kinds of task it can score.
        description: one line.
        by_difference: gains are differences; of values whose zero is no natural start a quotient says nothing.
    """

    factory: Callable[..., Metric]
    higher_is_better: bool
    unit: str
    kinds: frozenset[str]
    description: str
    by_difference: bool = False


def _info(
    cls: type[Metric], unit: str, *kinds: str, given: Callable[[Task], dict[str, Any]] = lambda task: {}
) -> MetricInfo:
    """The entry of a class; `given` are the arguments it takes from the task."""

    def factory(task: Task, **args: Any) -> Metric:
        return cls(**given(task), **args)

    description = (cls.__doc__ or "").partition("\n")[0].partition("; ")[0]
    by_difference = getattr(cls, "by_difference", False)
    return MetricInfo(factory, bool(cls.higher_is_better), unit, frozenset(kinds), description, by_difference)


def _classes(task: Task) -> dict[str, Any]:
    return {"num_classes": task.channels}


def _labels(task: Task) -> dict[str, Any]:
    return {"labels": task.channels if task.kind == "multilabel" else 1}


def _values(task: Task) -> dict[str, Any]:
    return {"values": task.channels}


def _tags(task: Task) -> dict[str, Any]:
    return {"classes": task.classes}


def _one_score(task: Task) -> dict[str, Any]:
    if task.kind == "classification" and task.channels != 2:
        raise ValueError(
            f"metrics: task {task.name!r} has {task.channels} classes; auc, average_precision and grouped_auc rank the "
            "samples of 2, use log_loss or accuracy"
        )
    return {}


METRICS: dict[str, MetricInfo] = {
    "accuracy": _info(Accuracy, "share", "classification", "tagging"),
    "binary_accuracy": _info(BinaryAccuracy, "share", "binary", "multilabel", "binary_map"),
    "micro_f1": _info(MicroF1, "share", "binary", "multilabel"),
    "constrained_span_f1": _info(ConstrainedSpanF1, "share", "tagging", given=_tags),
    "span_f1": _info(SpanF1, "share", "tagging", given=_tags),
    "log_loss": _info(LogLoss, "nat", "binary", "classification", "multilabel", given=_labels),
    "auc": _info(AUC, "", "binary", "classification", "multilabel", given=_one_score),
    "average_precision": _info(AveragePrecision, "", "binary", "classification", "multilabel", given=_one_score),
    "grouped_auc": _info(GroupedAUC, "", "binary", "classification", given=_one_score),
    "miou": _info(MeanIoU, "share", "segmentation", given=_classes),
    "pixel_accuracy": _info(PixelAccuracy, "share", "segmentation", given=_classes),
    "abs_error": _info(AbsError, "label", "depth", "regression"),
    "rel_error": _info(RelError, "share", "depth", "regression"),
    "rmse": _info(RMSE, "label", "depth", "regression"),
    "r2": _info(R2, "", "regression", given=_values),
    "delta_1": _info(Delta1, "share", "depth", "regression"),
    "angle_mean": _info(AngleMean, "degree", "normals"),
    "angle_median": _info(AngleMedian, "degree", "normals"),
    "within_11": _info(Within11, "share", "normals"),
    "within_22": _info(Within22, "share", "normals"),
    "within_30": _info(Within30, "share", "normals"),
    "edge_f": _info(EdgeF, "share", "binary_map"),
    "max_f": _info(MaxF, "share", "binary_map"),
}


def metric_info(name: str) -> MetricInfo:
    """The registered metric of that name, or a ValueError with the nearest names."""
    if name not in METRICS:
        raise ValueError(f"metrics: unknown {name!r}; {nearest(name, METRICS)}")
    return METRICS[name]
