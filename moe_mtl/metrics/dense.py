"""Metrics of maps: segmentation, normals, edges and saliency.

Differs:
    edge_f is not the odsF of the edge literature but its offline substitute "odsF-dt": a pixel is matched when a
        pixel of the other map lies within the tolerance, with no one-to-one assignment and no thinning. Edges drawn up
        to the tolerance too thick cost nothing, so values are higher than odsF and comparable only among themselves.
    max_f pools precision and recall over all pixels of the set before the maximum; saliency papers average them
        over images first.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from moe_mtl.metrics._summed import Summed, ratio

ANGLE_BIN = 0.01  # degrees, the resolution of angle_median


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
        return ratio(hit, union).nanmean()


class PixelAccuracy(_Confusion):
    """Share of labelled pixels whose largest logit is the label's."""

    higher_is_better = True

    def compute(self) -> Tensor:
        """The share so far."""
        return ratio(self.confmat.diagonal().sum(), self.confmat.sum())


class _Angles(Summed):
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
        return ratio(self.total, self.histogram.sum())


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
        return ratio(self.histogram[: round(self.degrees / ANGLE_BIN)].sum(), self.histogram.sum())


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


class _BestF(Summed):
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
        if not len(target):  # which pools refuse
            return
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
        precision = ratio(predicted_hit, predicted)[1:]
        recall = ratio(positive_hit, positive_hit[0])[1:]
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
