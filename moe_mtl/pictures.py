"""The pictures of a report: what a model predicts, which experts its tasks use, and what these do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure

from moe_mtl.activity import Activity
from moe_mtl.charts import activity_figures, gate_figures, routing_curves, score_chart
from moe_mtl.diagnostics import LayerUsage
from moe_mtl.multitask import evaluating
from moe_mtl.routing import Routing
from moe_mtl.sparse import Extraction
from moe_mtl.tasks import Task
from moe_mtl.viz import expert_map, prediction_grid, top_expert, usage_figures
from moe_mtl.viz_tasks import kept_figures, similarity_figures


@dataclass(frozen=True)
class Pictures:
    """Figures for the page, each set may be empty.

    Attributes:
        predictions: task name to its input, prediction and truth.
        usage: layer name to its task-by-expert heat map.
        maps: caption to a picture of the experts each patch uses.
        gates: layer name to the weights its gates give.
        activity: name of a stack of experts to what its units do.
        curves: caption to a chart of the training.
        similarity: layer name, or "all layers", to how alike the routing of tasks is.
        kept: layer name to the experts that are left of each task when it is pruned.
    """

    predictions: Mapping[str, Figure] = field(default_factory=dict)
    usage: Mapping[str, Figure] = field(default_factory=dict)
    maps: Mapping[str, Figure] = field(default_factory=dict)
    gates: Mapping[str, Figure] = field(default_factory=dict)
    activity: Mapping[str, Figure] = field(default_factory=dict)
    curves: Mapping[str, Figure] = field(default_factory=dict)
    similarity: Mapping[str, Figure] = field(default_factory=dict)
    kept: Mapping[str, Figure] = field(default_factory=dict)


def draw(
    model: Any,
    tasks: Sequence[Task],
    samples: tuple,
    usage: Mapping[str, LayerUsage],
    activity: Mapping[str, Activity] | None = None,
    records: Sequence[Mapping[str, Any]] = (),
    pruned: Mapping[str, Extraction] | None = None,
) -> Pictures:
    """The pictures of a model: predictions, expert usage, and the first expert of every patch in the last layer.

    Args:
        model: has `tasks` and returns its routings.
        tasks: which of them to show.
        samples: images [b c h w], or None for rows of a table, {task: prediction}, {task: target or None}, on the CPU.
        usage: of these tasks, from `ExpertUsage.compute`.
        activity: of the stacks of experts, from `expert_activity`.
        records: lines of the metrics.jsonl of the training.
        pruned: what was left of each task, by its name.
    """
    images, predictions, targets = samples
    names = [task.name for task in tasks]
    if images is None:
        known = [task for task in tasks if targets.get(task.name) is not None]
        found = {t.name: score_chart(t, predictions[t.name], targets[t.name]) for t in known}
        shown = {name: figure for name, figure in found.items() if figure is not None}
    else:
        shown = {t.name: prediction_grid(t, images, predictions[t.name], targets.get(t.name)) for t in tasks}
    curves = routing_curves(records)
    return Pictures(
        predictions=shown,
        usage=usage_figures(usage, names),
        maps={} if images is None else _maps(model, names, images),
        gates=gate_figures(usage, names),
        activity=activity_figures(activity or {}),
        curves={} if curves is None else {"gates over training": curves},
        similarity=similarity_figures(usage, names) if len(names) > 1 else {},
        kept=kept_figures(pruned or {}),
    )


def _maps(model: Any, names: Sequence[str], images: torch.Tensor) -> dict[str, Figure]:
    """The first expert of every patch in the last layer, where the tasks have parted the most."""
    ids, size = {task.name: i for i, task in enumerate(model.tasks)}, (images.shape[-2], images.shape[-1])
    with evaluating(model):
        _, routings = model(images.to(next(model.parameters()).device), tasks=names, return_routing=True)
    layers: dict[
        str, dict[str, tuple[Routing, int]]
    ] = {}  # per layer what to show: a routing and the id of a task in it
    for key, routing in routings.items():
        owner, _, layer = key.rpartition("/")
        if owner in ids:  # of independent models, each of one task
            layers.setdefault(layer, {})[owner] = routing, 0
        elif routing.task is None:
            layers[key] = {"all tasks": (routing, 0)}
        else:
            layers[key] = {name: (routing, ids[name]) for name in names}
    maps = {}
    for layer, shown in list(layers.items())[-1:]:
        for start in range(0, len(shown), 3):
            group = list(shown)[start : start + 3]
            top = {name: top_expert(*shown[name], len(images), size).cpu() for name in group}
            experts = shown[group[0]][0].num_experts
            maps[f"{layer}: {', '.join(group)}"] = expert_map(images, top, experts)
    return maps
