"""Metrics by name; `moe_mtl.scoring` runs them over a whole set for all tasks.

Every metric is a `torchmetrics.Metric` whose states are sums, so that a set scored in batches, or on several
processes, gives the number of the set scored at once, never an average of batch averages. `update` takes the
prediction and target of `moe_mtl.tasks` and a bool mask of the entries that carry a label; what the mask leaves out
counts nowhere. Without any label the value is NaN.

Importing this file costs seconds (torchmetrics pulls transformers), so nothing light imports it.

Differs:
    edge_f is not the odsF of the edge literature but its offline substitute "odsF-dt": a pixel is matched when a
        pixel of the other map lies within the tolerance, with no one-to-one assignment and no thinning. Edges drawn up
        to the tolerance too thick cost nothing, so values are higher than odsF and comparable only among themselves.
    max_f pools precision and recall over all pixels of the set before the maximum; saliency papers average them
        over images first.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix

from moe_mtl.tasks import Task, nearest

ANGLE_BIN = 0.01  # degrees, the resolution of angle_median


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole in float64, NaN where whole is 0."""
    return part.double() / torch.where(whole > 0, whole.double(), float("nan"))


class _Summed(Metric):
    """Base of the metrics here: scalar sums as states, no gradient, one `update` a batch.

    `state_group` names metrics whose states and `update` are the same, so that a task using several computes them once.
    """

    state_group: str | None = None
    full_state_update = False
    is_differentiable = False

    def add_sums(self, *names: str, size: int | None = None, dtype: torch.dtype = torch.float64) -> None:
        """Adds zero states of shape [] or [size]; float64, since float32 loses counts above 16.7 million."""
        for name in names:
            self.add_state(name, torch.zeros(() if size is None else size, dtype=dtype), dist_reduce_fx="sum")


class Accuracy(_Summed):
    """Share of labelled samples whose largest logit is the label's."""

    higher_is_better = True

    def __init__(self):
        super().__init__()
        self.add_sums("correct", "count", dtype=torch.int64)

    def update(self, prediction: Tensor, target: Tensor, valid: Tensor) -> None:
        """Adds logits [b c] (or [b c ...]) against ids [b] (or [b ...])."""
        self.correct += ((prediction.argmax(dim=1) == target) & valid).sum()
        self.count += valid.sum()

    def compute(self) -> Tensor:
        """The share so far."""
        return _ratio(self.correct, self.count)


class BinaryAccuracy(_Summed):
    """Share of labelled entries where logit > 0 agrees with label >= 0.5, pooled over labels (or pixels)."""

    higher_is_better = True

    def __init__(self):
        super().__init__()
        self.add_sums("correct", "count", dtype=torch.int64)

    def update(self, prediction: Tensor, target: Tensor, valid: Tensor) -> None:
        """Adds logits against labels of the same shape."""
        self.correct += (((prediction > 0) == (target >= 0.5)) & valid).sum()
        self.count += valid.sum()

    def compute(self) -> Tensor:
        """The share so far."""
        return _ratio(self.correct, self.count)


class _Confusion(MulticlassConfusionMatrix):
    """Confusion matrix [c true, c predicted] over labelled pixels; `MeanIoU` and `PixelAccuracy` read it.

    Args:
        num_classes: classes c.
    """

    state_group: str | None = "confusion"

    def __init__(self, num_classes: int):
        super().__init__(num_classes=num_classes, validate_args=False)  # the checks cost a synchronisation a batch

    # torchmetrics names the arguments of its own update (preds, target); the mask is what this one adds
    def update(self, prediction: Tensor, target: Tensor, valid: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Adds logits [b c h w] against ids [b h w]."""
        # on a CPU max is four times as fast as argmax along a strided axis
        super().update(prediction.max(dim=1).indices[valid], target[valid])


class MeanIoU(_Confusion):
    """Intersection over union, mean over the classes that were labelled or predicted anywhere in the set."""

    higher_is_better = True

    def compute(self) -> Tensor:
        """The mean so far."""
        hit = self.confmat.diagonal()
        union = self.confmat.sum(dim=0) + self.confmat.sum(dim=1) - hit
        return _ratio(hit, union).nanmean()


class PixelAccuracy(_Confusion):
    """Share of labelled pixels whose largest logit is the label's."""

    higher_is_better = True

    def compute(self) -> Tensor:
        """The share so far."""
        return _ratio(self.confmat.diagonal().sum(), self.confmat.sum())


class _Errors(_Summed):
    """Sums over labelled values; the ratios count only targets above zero, where they mean something."""

    state_group = "errors"
    higher_is_better = False

    def __init__(self):
        super().__init__()
        self.add_sums("absolute", "square", "relative")
        self.add_sums("close", "count", "positive", dtype=torch.int64)

    def update(self, prediction: Tensor, target: Tensor, valid: Tensor) -> None:
        """Adds values against values of the same shape."""
        prediction, target = prediction[valid].double(), target[valid].double()
        error = (prediction - target).abs()
        self.absolute += error.sum()
        self.square += error.square().sum()
        self.count += target.numel()
        positive = target > 0
        prediction, target = prediction[positive], target[positive]
        self.relative += (error[positive] / target).sum()
        # a prediction of zero or less is infinitely far off: its ratio is negative or infinite
        self.close += ((prediction > 0) & (torch.maximum(prediction / target, target / prediction) < 1.25)).sum()
        self.positive += target.numel()


class AbsError(_Errors):
    """Mean absolute difference."""

    def compute(self) -> Tensor:
        """The mean so far, in the label's unit."""
        return _ratio(self.absolute, self.count)


class RelError(_Errors):
    """Mean absolute difference over the label, where the label is above zero."""

    def compute(self) -> Tensor:
        """The mean so far."""
        return _ratio(self.relative, self.positive)


class RMSE(_Errors):
    """Root of the mean square difference, pooled over all values of the set (not a mean of per-image roots)."""

    def compute(self) -> Tensor:
        """The root so far, in the label's unit."""
        return _ratio(self.square, self.count).sqrt()


class Delta1(_Errors):
    """Share with max(prediction/label, label/prediction) < 1.25, where the label is above zero."""

    higher_is_better = True

    def compute(self) -> Tensor:
        """The share so far."""
        return _ratio(self.close, self.positive)


class _Angles(_Summed):
    """Histogram of the angle between predicted and labelled vector, in bins of `ANGLE_BIN` over 0..180 degrees.

    Both vectors are normalised; a predicted vector of length zero is at 90 degrees to everything. Angles are computed
    in float64: in float32 the arc cosine turns the last bit of an exact prediction into 0.02 degrees.
    """

    state_group = "angles"
    higher_is_better = False
    histogram: Tensor

    def __init__(self):
        super().__init__()
        self.add_sums("total")
        self.add_sums("histogram", size=round(180 / ANGLE_BIN) + 1, dtype=torch.int64)

    def update(self, prediction: Tensor, target: Tensor, valid: Tensor) -> None:
        """Adds vectors [b 3 h w] against vectors [b 3 h w]; `valid` is [b h w]."""
        prediction = prediction.movedim(1, -1)[valid].double()
        target = target.movedim(1, -1)[valid].double()
        dot = (F.normalize(prediction, dim=-1) * F.normalize(target, dim=-1)).sum(dim=-1)
        angle = dot.clamp(-1, 1).acos().rad2deg()
        self.total += angle.sum()
        self.histogram += torch.bincount((angle / ANGLE_BIN).long(), minlength=len(self.histogram))


class AngleMean(_Angles):
    """Mean angle."""

    def compute(self) -> Tensor:
        """The mean so far, in degrees."""
        return _ratio(self.total, self.histogram.sum())


class AngleMedian(_Angles):
    """Median angle, within 0.005 degrees of the exact one."""

    def compute(self) -> Tensor:
        """The median so far, in degrees: the mean of the two middle values, each taken as the middle of its bin."""
        below = self.histogram.cumsum(dim=0)
        count = below[-1]
        middle = torch.stack([(count + 1) // 2, count // 2 + 1])  # ranks from 1; equal for an odd count
        median = (torch.searchsorted(below, middle).double() + 0.5).mean() * ANGLE_BIN
        return torch.where(count > 0, median, float("nan"))


class _Within(_Angles):
    """Share of pixels with an angle below `degrees`, a multiple of `ANGLE_BIN`."""

    higher_is_better = True
    degrees: float

    def compute(self) -> Tensor:
        """The share so far."""
        return _ratio(self.histogram[: round(self.degrees / ANGLE_BIN)].sum(), self.histogram.sum())


class Within11(_Within):
    """Share of pixels with an angle below 11.25 degrees."""

    degrees = 11.25


class Within22(_Within):
    """Share of pixels with an angle below 22.5 degrees."""

    degrees = 22.5


class Within30(_Within):
    """Share of pixels with an angle below 30 degrees."""

    degrees = 30.0


def dilate(x: Tensor, radius: float) -> Tensor:
    """Maximum over the disc of `radius` pixels around each pixel, [b h w] to the same; cost grows with the radius.

    A disc is a stack of horizontal runs, one per row offset, so it takes 2 * radius + 1 one-dimensional pools.
    """
    reach = int(radius)
    padded = F.pad(x, (0, 0, reach, reach), value=-math.inf)
    result = x
    for dy in range(-reach, reach + 1):
        half = math.isqrt(int(radius**2 - dy**2))
        rows = padded[:, reach + dy : reach + dy + x.shape[1]]
        result = torch.maximum(result, F.max_pool2d(rows, (1, 2 * half + 1), stride=1, padding=(0, half)))
    return result


class _BestF(_Summed):
    """Best F = (1 + beta2) P R / (beta2 P + R) over thresholds t on the probability, one threshold for the whole set.

    P is the share of predicted pixels (probability >= t) with a positive within the tolerance, R the share of
    positives with a predicted pixel within it. One dilation of each map answers both for all thresholds: the
    positives' for P, the probabilities' for R. Unlabelled pixels are neither predicted nor positive.
    Without a positive label the value is NaN.

    Args:
        thresholds: how many, at i / (thresholds + 1) for i = 1, 2, ...
        beta2: weight of recall against precision.
        tolerance: distance at which pixels still match, as a share of the image diagonal and at least 1 pixel;
            0 for the same pixel only.
    """

    higher_is_better = True

    def __init__(self, *, thresholds: int, beta2: float, tolerance: float):
        super().__init__()
        for name, value, good in (
            ("thresholds", thresholds, thresholds >= 1),
            ("beta2", beta2, beta2 > 0),
            ("tolerance", tolerance, 0 <= tolerance < 1),
        ):
            if not good:
                raise ValueError(f"{name}: got {value}, expected thresholds >= 1, beta2 > 0, 0 <= tolerance < 1")
        self.thresholds, self.beta2, self.tolerance = thresholds, beta2, tolerance
        # [i]: pixels that are at or above exactly i thresholds
        self.add_sums("predicted", "predicted_hit", "positive_hit", size=thresholds + 1, dtype=torch.int64)

    def update(self, prediction: Tensor, target: Tensor, valid: Tensor) -> None:
        """Adds logits [b h w] against labels [b h w], positive from 0.5 on."""
        levels = torch.arange(1, self.thresholds + 1, device=prediction.device) / (self.thresholds + 1)
        level = torch.bucketize(prediction.float().sigmoid(), levels, right=True).masked_fill(~valid, 0)
        positive = (target >= 0.5) & valid
        near_positive, near_level = positive, level
        if self.tolerance:
            radius = max(1.0, self.tolerance * math.hypot(*target.shape[-2:]))
            near_positive = dilate(positive.float(), radius) > 0
            near_level = dilate(level.float(), radius).long()
        self.predicted += self._count(level[valid])
        self.predicted_hit += self._count(level[valid & near_positive])
        self.positive_hit += self._count(near_level[positive])

    def _count(self, level: Tensor) -> Tensor:
        return torch.bincount(level, minlength=self.thresholds + 1)

    def compute(self) -> Tensor:
        """The best F so far, 0..1."""
        # pixels at or above threshold i, for i = 0 (all), 1, ...
        predicted, predicted_hit, positive_hit = (
            count.flip(0).cumsum(dim=0).flip(0) for count in (self.predicted, self.predicted_hit, self.positive_hit)
        )
        precision = _ratio(predicted_hit, predicted)[1:]
        recall = _ratio(positive_hit, positive_hit[0])[1:]
        f = (1 + self.beta2) * precision * recall / (self.beta2 * precision + recall)
        return torch.where(positive_hit[0] > 0, f.nan_to_num(nan=0.0).max(), float("nan"))


class EdgeF(_BestF):
    """odsF-dt: best F1 over thresholds with matching within a distance; not odsF, see the top of the file."""

    def __init__(self, *, thresholds: int = 51, tolerance: float = 0.0075):
        super().__init__(thresholds=thresholds, beta2=1.0, tolerance=tolerance)


class MaxF(_BestF):
    """Best F over thresholds with beta2 = 0.3, pixel by pixel, pooled over the set."""

    def __init__(self, *, thresholds: int = 255, beta2: float = 0.3):
        super().__init__(thresholds=thresholds, beta2=beta2, tolerance=0.0)


@dataclass(frozen=True)
class MetricInfo:
    """A registered metric.

    Attributes:
        factory: called with the task and the metric's arguments; gives a `torchmetrics.Metric` whose `update` takes
            (prediction, target, valid) as the metrics of this file do.
        higher_is_better: the direction of the value.
        unit: of the value; "label" for the unit of the labels.
        kinds: the kinds of task it can score.
        description: one line.
    """

    factory: Callable[..., Metric]
    higher_is_better: bool
    unit: str
    kinds: frozenset[str]
    description: str


def _info(cls: type[Metric], unit: str, *kinds: str) -> MetricInfo:
    def factory(task: Task, **args: Any) -> Metric:
        return cls(num_classes=task.channels, **args) if issubclass(cls, _Confusion) else cls(**args)

    description = (cls.__doc__ or "").partition("\n")[0].partition("; ")[0]
    return MetricInfo(factory, bool(cls.higher_is_better), unit, frozenset(kinds), description)


METRICS: dict[str, MetricInfo] = {
    "accuracy": _info(Accuracy, "share", "classification"),
    "binary_accuracy": _info(BinaryAccuracy, "share", "multilabel", "binary_map"),
    "miou": _info(MeanIoU, "share", "segmentation"),
    "pixel_accuracy": _info(PixelAccuracy, "share", "segmentation"),
    "abs_error": _info(AbsError, "label", "depth", "regression"),
    "rel_error": _info(RelError, "share", "depth", "regression"),
    "rmse": _info(RMSE, "label", "depth", "regression"),
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
