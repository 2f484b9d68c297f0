"""Pictures of what tasks share: how alike their routing is, and which experts are left when one is cut out.

Like `moe_mtl.viz`: figures, small and portrait, no global state.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from moe_mtl.diagnostics import LayerUsage, task_cosine, task_divergence
from moe_mtl.palette import MISSING
from moe_mtl.sparse import Extraction
from moe_mtl.tasks import nearest
from moe_mtl.viz import INK, SEQUENTIAL, TITLE, new_figure

Alike = Literal["cosine", "jensen_shannon"]
WRITTEN = 16  # tasks up to which every cell of a map holds its number


# ---- how alike the routing of tasks is ------------------------------------------------------------------------------


def routing_similarity(usage: Mapping[str, LayerUsage], by: Alike = "cosine") -> dict[str, Tensor]:
    """How alike every two tasks spread their gate weight over the experts, 0 to 1, [t, t] per layer and over all.

    Args:
        usage: as `ExpertUsage.compute` returns it.
        by: "cosine" of the shares; or "jensen_shannon", 1 less the divergence over ln 2, its largest value.

    Returns:
        By layer; and under "all layers" the cosine of the shares of all layers side by side, or the mean over layers.

    Raises:
        ValueError: `by` is unknown.
    """
    if by not in get_args(Alike):
        raise ValueError(f"by: unknown {by!r}; {nearest(str(by), get_args(Alike))}")
    mass = {name: layer.mass for name, layer in usage.items()}
    if by == "cosine":
        found = {name: task_cosine(shares) for name, shares in mass.items()}
        return {"all layers": task_cosine(torch.cat(list(mass.values()), dim=1)), **found} if found else {}
    found = {name: 1 - task_divergence(shares) / math.log(2) for name, shares in mass.items()}
    return {"all layers": torch.stack(list(found.values())).mean(dim=0), **found} if found else {}


def similarity_figures(
    usage: Mapping[str, LayerUsage], tasks: Sequence[str], by: Alike = "cosine"
) -> dict[str, Figure]:
    """One heat map of `routing_similarity` over all layers and one per layer, tasks by tasks, all on the scale 0 to 1.

    Of more than `WRITTEN` tasks the cells are small and without numbers.

    Args:
        usage: as `ExpertUsage.compute` returns it.
        tasks: names of the rows.
        by: as in `routing_similarity`.
    """
    figures = {}
    cmap = colormaps[SEQUENTIAL].with_extremes(bad=MISSING)
    for name, alike in routing_similarity(usage, by).items():
        count = len(tasks)
        cell = (0.42, 0.36) if count <= WRITTEN else (0.16, 0.16)
        figure = new_figure(1.4 + cell[0] * count, 1.0 + cell[1] * count)
        axes = figure.subplots()
        image = axes.imshow(np.ma.masked_invalid(alike.numpy()), cmap=cmap, vmin=0.0, vmax=1.0, aspect="auto")
        for row in range(count if count <= WRITTEN else 0):
            for column in range(count):
                value = float(alike[row, column])
                if not math.isnan(value):
                    colour = "white" if value < 0.6 else INK
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(range(count), tasks, fontsize=8, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(count), tasks, fontsize=8)
        axes.set_title(name, **TITLE)
        _bare(axes)
        scale = figure.colorbar(image, ax=axes, pad=0.02, aspect=16)
        scale.ax.tick_params(labelsize=7)
        scale.outline.set_visible(False)
        figures[name] = figure
    return figures


# ---- what is left of a task -----------------------------------------------------------------------------------------


def kept_figures(reports: Mapping[str, Extraction]) -> dict[str, Figure]:
    """One map per layer of the experts that each extraction kept, a row each: colour is the share of the gate weight an
    expert had before, a cross marks what was dropped; at the right how many are left and what share went.

    Args:
        reports: row names to `extraction` of what `extract` or `prune` returned. Of several tasks the shares are the
            mean; without calibration they are unknown, and cells grey.
    """
    figures: dict[str, Figure] = {}
    names = list(dict.fromkeys(name for report in reports.values() for name in report.layers))
    shares = {name: {row: _mass(report, name) for row, report in reports.items()} for name in names}
    highest = max((float(np.nanmax(m, initial=0.0)) for rows in shares.values() for m in rows.values()), default=0.0)
    cmap = colormaps[SEQUENTIAL].with_extremes(bad=MISSING)
    for name in names:
        rows = [row for row, report in reports.items() if name in report.layers]
        layers = [reports[row].layers[name] for row in rows]
        values = np.ma.masked_invalid(np.stack([shares[name][row] for row in rows]))
        figure = new_figure(4.8, 0.85 + 0.26 * len(rows))
        axes = figure.subplots()
        image = axes.imshow(values, cmap=cmap, vmin=0.0, vmax=highest or 1.0, aspect="auto")
        for place, layer in enumerate(layers):
            for e in set(range(layer.experts)) - set(layer.kept):
                dark = values[place, e] is np.ma.masked or values[place, e] > 0.6 * highest
                axes.plot(e, place, marker="x", color=INK if dark else "white", markersize=5, markeredgewidth=1.2)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        step = max(1, math.ceil(values.shape[1] / 16))
        axes.set_xticks(range(0, values.shape[1], step), [str(e) for e in range(0, values.shape[1], step)], fontsize=8)
        axes.set_xlabel("expert", fontsize=8)
        axes.set_title(name, **TITLE)
        _bare(axes)
        right = axes.secondary_yaxis("right")
        right.set_yticks(range(len(rows)), [_left(layer) for layer in layers], fontsize=7)
        right.tick_params(length=0)
        right.spines["right"].set_visible(False)
        if not values.mask.all():
            scale = figure.colorbar(image, ax=axes, pad=0.02, aspect=12, format=lambda value, _: f"{value:.0%}")
            scale.ax.tick_params(labelsize=7)
            scale.outline.set_visible(False)
        figures[name] = figure
    return figures


def _mass(report: Extraction, name: str) -> np.ndarray:
    """The share of the gate weight of every expert of a layer, NaN where it was not measured, [e]."""
    layer = report.layers.get(name)
    if layer is None or not layer.mass_by_task:
        return np.full(0 if layer is None else layer.experts, np.nan)
    return np.mean(list(layer.mass_by_task.values()), axis=0)


def _left(layer: Any) -> str:
    text = f"{len(layer.kept)}/{layer.experts}"
    return f"{text}, -{layer.dropped_mass:.1%}" if layer.tokens else text


def _bare(axes: Any) -> None:
    """White lines between the cells of a map, and no frame."""
    rows, columns = axes.images[0].get_array().shape
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.0)
    axes.tick_params(which="both", length=0)
    for side in axes.spines.values():
        side.set_visible(False)
