"""Per-task losses by name.

Each maps (prediction, target) to one value per label; `Task.compute_loss` masks and averages.

Shapes as in `moe_mtl.tasks`; predictions are float32, targets hold no missing values (they are filled and masked by
the caller).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(prediction: Tensor, target: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Softmax cross-entropy in nats; prediction [b c ...], target int64 [b ...]."""
    return F.cross_entropy(prediction, target, reduction="none", label_smoothing=label_smoothing)


def bce(prediction: Tensor, target: Tensor, *, pos_weight: float = 1.0) -> Tensor:
    """Logistic loss in nats; `pos_weight` multiplies the loss of the positives (thin edges: about 2 to 20)."""
    weight = torch.tensor(pos_weight, device=prediction.device, dtype=prediction.dtype)
    return F.binary_cross_entropy_with_logits(
        prediction, target.to(prediction.dtype), reduction="none", pos_weight=weight
    )


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Absolute difference, in the target's unit."""
    return (prediction - target).abs()


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared difference."""
    return (prediction - target).square()


def huber(prediction: Tensor, target: Tensor, *, delta: float = 1.0) -> Tensor:
    """Quadratic below `delta`, linear above."""
    return F.huber_loss(prediction, target, reduction="none", delta=delta)


def cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """One minus the cosine between vectors; [b c ...] and [b c ...] to [b ...]. Lengths do not matter."""
    return 1.0 - F.cosine_similarity(prediction, target, dim=1)


LOSSES: dict[str, Callable[..., Any]] = {
    "cross_entropy": cross_entropy,
    "bce": bce,
    "l1": l1,
    "mse": mse,
    "huber": huber,
    "cosine": cosine,
}

_ALIKE = frozenset({"binary", "multilabel", "regression", "depth", "binary_map"})  # a label has a prediction's shape
LOSS_KINDS: dict[str, frozenset[str]] = {  # the kinds of task for which a loss gives one value per label
    "cross_entropy": frozenset({"classification", "tagging", "segmentation"}),
    **dict.fromkeys(("bce", "l1", "mse", "huber"), _ALIKE),
    "cosine": frozenset({"normals"}),
}
