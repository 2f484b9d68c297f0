"""What pruning took, learned again: the experts and gates that are left are trained to give the features there were.

Paper: Romero et al. 2015, FitNets, https://arxiv.org/abs/1412.6550, eq. 3 (a student learns a teacher's features), the
    teacher being the model before pruning.
Differs: both are as wide, so no regressor stands between them; the error is taken over the variance of the teacher's
    features, so that a rate suits every family; only layers with experts learn.
"""

from typing import Any

import torch
from torch import Tensor

from moe_mtl.batches import ShuffledBatches
from moe_mtl.multitask import evaluating
from moe_mtl.samples import input_of, inputs_of
from moe_mtl.trainer_config import TrainerConfig, lr_factor

BATCH = 16
SEEN = 64  # samples on which the difference is told


def distill(student: Any, teacher: Any, samples: Any, *, steps: int, lr: float) -> tuple[float, float]:
    """Trains the layers with experts of a pruned model on another one's features, in evaluation mode, in place.

    Args:
        student: a model with experts. What does not require gradients stays.
        teacher: of the same tasks, whose features have the same shape; it stays as it is.
        samples: as `moe_mtl.samples.read_samples` returns them; labels are not read.
        steps: updates, of 16 samples.
        lr: peak learning rate of AdamW; it warms up for a twentieth of the updates and then follows a cosine.

    Returns:
        What the student's features lack on the first 64 samples, before and after: `difference`.

    Raises:
        ValueError: nothing of these layers requires gradients.
    """
    layers = student.moe_layers.values()
    learn = list(dict.fromkeys(p for layer in layers for p in layer.parameters() if p.requires_grad))
    if not learn:
        raise ValueError("recover: every expert and gate is frozen; model.requires_grad_(True) lets them learn")
    config = TrainerConfig(steps=steps, lr=lr, warmup=steps // 20)
    optimizer = torch.optim.AdamW(learn, lr=lr, weight_decay=0.0)
    student.eval()
    before = _mean_difference(student, teacher, samples)
    for step, rows in zip(range(steps), ShuffledBatches(len(samples), min(BATCH, len(samples)), 0), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_factor(step, config)
        optimizer.zero_grad()
        difference(student, teacher, input_of(student, samples, rows)).backward()
        optimizer.step()
    return before, _mean_difference(student, teacher, samples)


def difference(student: Any, teacher: Any, x: Any) -> Tensor:
    """The squared error of features as a share of the variance of the teacher's, the mean of two such shares.

    One is that of patches or tokens, without padding, the other that of the pooled features.

    Args:
        student: a model.
        teacher: a model of the same tasks, that learns nothing from this.
        x: what both are called with.
    """
    with evaluating(teacher):
        wanted = _features(teacher, x)
    shares = [
        (ours - theirs).square().mean() / theirs.var(correction=0)
        for ours, theirs in zip(_features(student, x), wanted, strict=True)
    ]
    return torch.stack(shares).mean()


@torch.no_grad()
def _mean_difference(student: Any, teacher: Any, samples: Any) -> float:
    found = [difference(student, teacher, x) for x in inputs_of(student, samples, SEEN, BATCH)]
    return float(torch.stack(found).mean())


def _features(model: Any, x: Any) -> tuple[Tensor, Tensor]:
    """Features of all tasks, one after the other: those of patches or tokens, without padding, and the pooled ones."""
    ids = tuple(range(len(model.tasks)))
    features, _ = model.features(x, ids if len(ids) > 1 else 0)
    patches, valid = features.patches, model.valid_tokens(x) if hasattr(model, "valid_tokens") else None
    if valid is not None:
        patches = patches[valid.repeat(len(patches) // len(valid), 1)]
    return patches, features.pooled
