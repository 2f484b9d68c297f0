"""Two-step update: each task's loss after one trial step on it, from which the shared step is taken.

Paper: Aoki et al. 2021, MMoEEx, https://arxiv.org/abs/2106.10595 (MAML-MTL); Finn et al. 2017, MAML,
    https://arxiv.org/abs/1703.03400 (the trial step, and its first-order form).
Differs: the trial weights are functions of the weights and never overwrite them, so activations of both are never mixed
    as in the authors' code; first-order by default, second-order as an option.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moe_mtl.multitask import select_rows
from moe_mtl.routing import Routing
from moe_mtl.tasks import Task


def two_step_losses(
    model: nn.Module,
    x: Any,
    targets: Mapping[str, Tensor],
    tasks: Sequence[Task],
    *,
    inner_lr: float,
    share: float = 0.8,
    second_order: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Routing]]:
    """Losses of the second part of a batch, each with weights one gradient step of its own ahead on the first part.

    Args:
        model: called as `model(x, tasks=[name], return_routing=True)`, once per task and part.
        x: inputs of b samples, a tensor or a dict of tensors.
        targets: labels of b samples per task.
        tasks: the tasks to train.
        inner_lr: of the trial step.
        share: of the samples in the first part; each part has one at least.
        second_order: differentiate through the trial step too; costs a second backward pass through it.

    Returns:
        The loss of every task, and the routings of these passes as {task/layer: Routing}.

    Raises:
        ValueError: a batch of one sample, which has no two parts.
    """
    samples = len(targets[tasks[0].name])
    first = min(max(1, round(share * samples)), samples - 1)
    if first < 1:
        raise ValueError("batch_size: got 1 sample; a two-step update needs two at least")
    trial, rest = torch.arange(first), torch.arange(first, samples)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses, routings = {}, {}
    for task in tasks:
        inner = task.compute_loss(model(select_rows(x, trial), tasks=[task.name])[task.name], targets[task.name][trial])
        steps = torch.autograd.grad(inner, list(weights.values()), create_graph=second_order, materialize_grads=True)
        ahead = {name: w - inner_lr * step for (name, w), step in zip(weights.items(), steps, strict=True)}
        predictions, layers = functional_call(
            model, ahead, (select_rows(x, rest),), {"tasks": [task.name], "return_routing": True}
        )
        losses[task.name] = task.compute_loss(predictions[task.name], targets[task.name][rest])
        routings |= {f"{task.name}/{layer}": routing for layer, routing in layers.items()}
    return losses, routings
