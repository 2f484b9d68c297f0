"""Metrics of single values, a class or a number each, that a running sum can hold; errors serve maps of values too."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_mtl.metrics._summed import Summed, ratio


class Accuracy(Summed):
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
        return ratio(self.correct, self.count)


class BinaryAccuracy(Summed):
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
        return ratio(self.correct, self.count)


class LogLoss(Summed):
    """Mean of minus the natural logarithm of the probability given to the label; with several labels, their mean.

    Computed from the logits in float64, so that a confident mistake counts as what it is and not as infinity. Binary
    labels between 0 and 1 are probabilities. Labels without any entry are left out of the mean.

    Args:
        labels: binary labels a sample has, c of a multilabel task, else 1.
    """

    higher_is_better = False

    def __init__(self, labels: int = 1):
        super().__init__()
        self.labels = labels
        self.add_sums("total", size=labels)
        self.add_sums("count", size=labels, dtype=torch.int64)

    def update(self, prediction: Tensor, target: Tensor, valid: Tensor) -> None:
        """Adds logits [b c] against ids [b], or logits against binary labels of the same shape, [b] or [b labels]."""
        target = target.masked_fill(~valid, 0)
        if prediction.ndim > target.ndim:
            loss = F.cross_entropy(prediction.double(), target, reduction="none")
        else:
            loss = F.binary_cross_entropy_with_logits(prediction.double(), target.double(), reduction="none")
        self.total += loss.where(valid, 0.0).view(len(loss), self.labels).sum(dim=0)
        self.count += valid.view(len(loss), self.labels).sum(dim=0)

    def compute(self) -> Tensor:
        """The mean so far, in nats."""
        return ratio(self.total, self.count).nanmean()


class _Errors(Summed):
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
        return ratio(self.absolute, self.count)


class RelError(_Errors):
    """Mean absolute difference over the label, where the label is above zero."""

    def compute(self) -> Tensor:
        """The mean so far."""
        return ratio(self.relative, self.positive)


class RMSE(_Errors):
    """Root of the mean square difference, pooled over all values of the set (not a mean of per-image roots)."""

    def compute(self) -> Tensor:
        """The root so far, in the label's unit."""
        return ratio(self.square, self.count).sqrt()


class Delta1(_Errors):
    """Share with max(prediction/label, label/prediction) < 1.25, where the label is above zero."""

    higher_is_better = True

    def compute(self) -> Tensor:
        """The share so far."""
        return ratio(self.close, self.positive)


def _merge(moments: Tensor) -> Tensor:
    """Count, mean and sum of squares about the mean of several parts, [parts 3 c], to those of the whole, [3 c].

    Source: Chan et al. 1983. Sums of squares about zero would lose the variance of labels far from zero.
    """
    count, mean, squares = moments.unbind(dim=1)
    total = count.sum(dim=0)
    centre = (count * mean).sum(dim=0) / total.clamp(min=1)
    return torch.stack([total, centre, (squares + count * (mean - centre).square()).sum(dim=0)])


class R2(Summed):
    """Share of the labels' variance explained, 1 - sum (label - prediction)^2 / sum (label - mean label)^2.

    Pooled over the set; with several values, their mean. Below zero for predictions worse than the mean label. A value
    whose labels are all equal, or a single one, has none and is left out of the mean.

    Args:
        values: values a sample has.
    """

    higher_is_better = True
    by_difference = True  # a baseline may lie anywhere, near zero and below
    residual: Tensor
    moments: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(self, values: int = 1):
        super().__init__()
        self.values = values
        self.add_sums("residual", size=values)
        self.add_state("moments", torch.zeros(3, values, dtype=torch.float64), dist_reduce_fx=_merge)
        # equal labels are told by these: rounding leaves their variance a hair above zero
        self.add_state("lowest", torch.full((values,), float("inf"), dtype=torch.float64), dist_reduce_fx="min")
        self.add_state("highest", torch.full((values,), float("-inf"), dtype=torch.float64), dist_reduce_fx="max")

    def update(self, prediction: Tensor, target: Tensor, valid: Tensor) -> None:
        """Adds values against values of the same shape, [b] or [b values]."""
        shape = (len(target), self.values)
        prediction, target, valid = prediction.double().view(shape), target.double().view(shape), valid.view(shape)
        if not len(target):
            return
        count = valid.sum(dim=0).double()
        mean = target.where(valid, 0.0).sum(dim=0) / count.clamp(min=1)
        squares = (target - mean).where(valid, 0.0).square().sum(dim=0)
        self.moments = _merge(torch.stack([self.moments, torch.stack([count, mean, squares])]))
        self.residual += (prediction - target).where(valid, 0.0).square().sum(dim=0)
        self.lowest = torch.minimum(self.lowest, target.where(valid, float("inf")).amin(dim=0))
        self.highest = torch.maximum(self.highest, target.where(valid, float("-inf")).amax(dim=0))

    def compute(self) -> Tensor:
        """The share so far, at most 1."""
        return (1 - ratio(self.residual, self.moments[2].where(self.highest > self.lowest, 0.0))).nanmean()
