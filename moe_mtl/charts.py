"""Charts of numbers: predictions against labels, gate weights, what experts do, and how training went.

Like `moe_mtl.viz`, which draws pictures, every function returns matplotlib figures and touches no global state.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from moe_mtl.activity import Activity
from moe_mtl.diagnostics import LayerUsage
from moe_mtl.palette import MISSING
from moe_mtl.tasks import Task
from moe_mtl.viz import BAR, INK, SEQUENTIAL, TITLE, new_figure, plain

BINS = 10  # of a reliability diagram, with equally many samples
DRAWN = 2000  # points of a scatter plot


# ---- predictions against labels -------------------------------------------------------------------------------------


def score_chart(task: Task, prediction: Tensor, target: Tensor) -> Figure | None:
    """What a task predicts for a whole set, against its labels; None for a kind that has no chart.

    Binary: how often the label is 1 among samples of like probability, and how many have which. Regression: predicted
    against true values. Classification: how often each class is taken for which, in shares of the true class.

    Args:
        task: what was predicted.
        prediction: of n samples, shapes in `moe_mtl.tasks`.
        target: their labels; samples without one are left out.
    """
    draw = {"binary": _reliability, "regression": _scatter, "classification": _confusion}.get(task.kind)
    if draw is None:
        return None
    known = target != task.ignore_index if task.kind == "classification" else ~target.isnan()
    if not known.any():
        return None
    figure = new_figure(3.2, 3.0)
    draw(figure, task, prediction[known].double(), target[known])
    return figure


def _reliability(figure: Figure, task: Task, logits: Tensor, target: Tensor) -> None:
    probability, order = logits.sigmoid().sort()
    _, run, count = probability.unique_consecutive(return_inverse=True, return_counts=True)
    ones = torch.zeros(len(count), dtype=torch.float64).index_add(0, run, target[order].double())
    share = (ones / count)[run]  # of ones among samples of the same probability, whose order says nothing
    groups = [
        (p.mean().item(), y.mean().item())
        for p, y in zip(probability.tensor_split(BINS), share.tensor_split(BINS), strict=True)
        if len(p)
    ]
    axes: Any = figure.subplots(2, 1, height_ratios=[3, 1])
    top = min(1.0, 1.05 * max(max(pair) for pair in groups))
    axes[0].plot([0, top], [0, top], color=INK, linewidth=0.8, linestyle="--")
    axes[0].plot(*zip(*groups, strict=True), color=BAR, marker="o", markersize=4, linewidth=1.2)
    axes[0].set_xlabel("predicted probability", fontsize=8)
    axes[0].set_ylabel("share of ones", fontsize=8)
    edges = np.linspace(0, 1, 41)
    counts = [np.histogram(probability[target[order] == label].numpy(), edges)[0] for label in (0, 1)]
    for count, color, label in zip(counts, (MISSING, INK), ("0", "1"), strict=True):
        axes[1].stairs(np.maximum(count, 0.5), edges, color=color, label=f"label {label}", linewidth=1.2)
    axes[1].set_yscale("log")
    axes[1].set_xlabel("predicted probability", fontsize=8)
    axes[1].set_ylabel("samples", fontsize=8)
    axes[1].legend(fontsize=7, frameon=False)
    _tidy(*axes)


def _scatter(figure: Figure, task: Task, prediction: Tensor, target: Tensor) -> None:
    step = max(1, math.ceil(len(target) / DRAWN))
    axes: Any = figure.subplots()
    low, high = (float(f(torch.stack((prediction, target.double())))) for f in (torch.min, torch.max))
    axes.plot([low, high], [low, high], color=INK, linewidth=0.8, linestyle="--")
    axes.scatter(target[::step].numpy(), prediction[::step].numpy(), s=3, color=BAR, alpha=0.4, linewidths=0)
    axes.locator_params(axis="x", nbins=4)  # room for numbers of six digits
    axes.set_xlabel("true", fontsize=8)
    axes.set_ylabel("predicted", fontsize=8)
    _tidy(axes)


def _confusion(figure: Figure, task: Task, logits: Tensor, target: Tensor) -> None:
    counts = torch.zeros(task.channels, task.channels, dtype=torch.float64)
    counts.index_put_((target.long(), logits.argmax(dim=1)), torch.ones(len(target)).double(), accumulate=True)
    shares = (counts / counts.sum(dim=1, keepdim=True)).numpy()
    axes: Any = figure.subplots()
    cmap = colormaps[SEQUENTIAL].with_extremes(bad=MISSING)
    image = axes.imshow(np.ma.masked_invalid(shares), cmap=cmap, vmin=0, vmax=1)
    if task.channels <= 12:
        names = [plain(name) for name in task.classes or map(str, range(task.channels))]
        axes.set_xticks(range(task.channels), names, fontsize=7, rotation=90)
        axes.set_yticks(range(task.channels), names, fontsize=7)
    axes.set_xlabel("predicted", fontsize=8)
    axes.set_ylabel("true", fontsize=8)
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=16, format=lambda share, _: f"{share:.0%}")
    bar.ax.tick_params(labelsize=7)
    _tidy(axes)


# ---- gates and experts ----------------------------------------------------------------------------------------------


def gate_figures(usage: Mapping[str, LayerUsage], tasks: Sequence[str]) -> dict[str, Figure]:
    """One figure per layer: for every task the mean weight of each expert, with its standard deviation over tokens.

    Args:
        usage: as `ExpertUsage.compute` returns it.
        tasks: names of its rows.
    """
    figures = {}
    for name, layer in usage.items():
        rows, columns = layer.weight.shape
        figure = new_figure(4.6, 0.7 + 0.62 * rows)
        panels: Any = figure.subplots(rows, 1, sharex=True, sharey=True, squeeze=False)
        for i, task in enumerate(tasks):
            axes = panels[i][0]
            weight, spread = layer.weight[i].nan_to_num().numpy(), layer.spread[i].nan_to_num().numpy()
            axes.bar(range(columns), weight, color=BAR, width=0.8, yerr=spread, ecolor=INK, error_kw={"linewidth": 1})
            axes.set_ylabel(task, fontsize=8, rotation=0, ha="right", va="center")
            _tidy(axes)
            axes.set_ylim(0, 1.05 * float((layer.weight + layer.spread).nan_to_num().max()) or 1.0)
        panels[0][0].set_title(f"{name}: weights", **TITLE)
        panels[-1][0].set_xlabel("expert", fontsize=8)
        figures[name] = figure
    return figures


def activity_figures(found: Mapping[str, Activity]) -> dict[str, Figure]:
    """One figure per stack of experts: silent activations and dead units of each, and how far their outputs differ.

    Args:
        found: as `moe_mtl.activity.expert_activity` returns it.
    """
    figures = {}
    for name, one in found.items():
        count = len(one.silent)
        figure = new_figure(4.6, 2.6)
        left, right = figure.subplots(1, 2, width_ratios=[3, 2])
        left.bar(
            [e - 0.2 for e in range(count)], one.silent.numpy(), width=0.4, color=MISSING, label="silent activations"
        )
        left.bar([e + 0.2 for e in range(count)], one.dead.numpy(), width=0.4, color=INK, label="dead units")
        left.set_ylim(0, 1.35)
        left.set_yticks([0, 0.5, 1])
        left.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        left.set_xlabel("expert", fontsize=8)
        left.legend(fontsize=7, frameon=False, loc="upper left")
        left.set_title(name, **TITLE)
        image = right.imshow(one.distance.numpy(), cmap=colormaps[SEQUENTIAL], vmin=0, vmax=1)
        right.set_title("distance of outputs", **TITLE)
        right.set_xlabel("expert", fontsize=8)
        bar = figure.colorbar(image, ax=right, pad=0.03, aspect=16)
        bar.ax.tick_params(labelsize=7)
        _tidy(left, right)
        figures[name] = figure
    return figures


# ---- training -------------------------------------------------------------------------------------------------------


CURVES = {"gate_entropy": "gate entropy, nats", "load_entropy": "evenness of load"}


def routing_curves(records: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Gate entropy and evenness of load of every layer over the updates of a run; None where it was scored once.

    Args:
        records: lines of a run's metrics.jsonl.
    """
    records = [record for record in records if record.get("routing")]
    if len(records) < 2:
        return None
    figure = new_figure(4.6, 3.6)
    panels: Any = figure.subplots(len(CURVES), 1, sharex=True)
    steps, layers = [record["step"] for record in records], list(records[-1]["routing"])
    colors = colormaps[SEQUENTIAL](np.linspace(0, 0.85, len(layers)))
    for axes, (key, label) in zip(panels, CURVES.items(), strict=True):
        for layer, color in zip(layers, colors, strict=True):
            values = [record["routing"].get(layer, {}).get(key) for record in records]
            values = [math.nan if value is None else value for value in values]
            axes.plot(steps, values, color=color, linewidth=1.2, marker="o", markersize=2.5, label=layer)
        axes.set_ylabel(label, fontsize=8)
        axes.set_ylim(bottom=0)
        _tidy(axes)
    panels[-1].set_xlabel("updates", fontsize=8)
    if len(layers) <= 12:
        panels[0].legend(fontsize=7, frameon=False, ncols=2)
    return figure


def _tidy(*axes: Axes) -> None:
    for part in axes:
        part.tick_params(labelsize=7, length=0)
        for side in ("top", "right"):
            part.spines[side].set_visible(False)
