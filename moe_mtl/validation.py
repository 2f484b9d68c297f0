"""What a model is worth on samples with labels: losses, metrics and what it routes, over a whole set."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from moe_mtl.diagnostics import BRIEF, ExpertUsage, diagnose
from moe_mtl.multitask import move
from moe_mtl.scoring import TaskMetrics
from moe_mtl.tasks import Task


@torch.no_grad()
def validate(
    model: nn.Module, batches: Iterable[dict[str, Any]], tasks: Sequence[Task], *, device: torch.device, bf16: bool
) -> dict[str, Any]:
    """Scores some tasks of a model, which is in evaluation mode afterwards.

    Args:
        model: called as `Trainer` calls it.
        batches: collated ones; of tasks a batch has no labels of nothing is scored there.
        tasks: what to score.
        device: of the model.
        bf16: run it in bfloat16 autocast; losses and metrics are of float32 predictions.

    Returns:
        loss: {task: its mean over the labels}.
        metrics: {task: {metric: value}}.
        routing: {layer: {mutual_information, load_entropy, dead_experts}}, see `moe_mtl.diagnostics.diagnose`; empty
            for a dense model.
    """
    model.eval()
    metrics, usage = TaskMetrics(tasks), ExpertUsage.of(model)
    totals: dict[str, list[float]] = {}  # per task its losses, each times its labels, and labels
    for batch in batches:
        scored = [task for task in tasks if task.name in batch]
        names = [task.name for task in scored]
        if not names:
            continue
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            x = move(batch[getattr(model, "input", "image")], device)
            predictions, routings = model(x, tasks=names, return_routing=True)
        predictions = {name: p.float().cpu() for name, p in predictions.items()}
        for task in scored:
            if labels := int(task.valid(batch[task.name]).sum()):
                total = totals.setdefault(task.name, [0.0, 0])
                total[0] += labels * float(task.compute_loss(predictions[task.name], batch[task.name]))
                total[1] += labels
        metrics.update(predictions, batch)
        usage.update(routings)
    layers = {layer: diagnose(shares) for layer, shares in usage.compute().items()}
    brief = {layer: {name: found[name] for name in BRIEF} for layer, found in layers.items()}
    losses = {name: total / labels for name, (total, labels) in totals.items()}
    return {"loss": losses, "metrics": metrics.compute(), "routing": brief}
