"""Pictures of what a model predicts and of which experts its tasks use.

Every function returns matplotlib figures (or plain arrays) and touches no global state: no pyplot, no style, no
backend. Figures are small and portrait, with type that stays legible when a page is as wide as a phone.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from torch import Tensor, nn

from moe_mtl.diagnostics import LayerUsage, expert_load
from moe_mtl.palette import MISSING, categorical_palette
from moe_mtl.routing import Routing
from moe_mtl.tasks import Task

INK = "#1b1b1f"
BAR = "#5a5a63"
SEQUENTIAL = "viridis"
TITLE = {"fontsize": 9, "color": INK, "pad": 4}


# ---- which experts each task uses -----------------------------------------------------------------------------------


def usage_figures(usage: Mapping[str, LayerUsage], tasks: Sequence[str]) -> dict[str, Figure]:
    """One heat map per layer, tasks by experts, of the share of selected slots; all on one colour scale.

    Bars above it show the load of each expert, the mean over tasks, beside a line for even use; an expert that no task
    chose has no bar.

    Args:
        usage: as `ExpertUsage.compute` returns it.
        tasks: names of the rows.
    """
    highest = max((float(layer.slots.nan_to_num().max()) for layer in usage.values()), default=1.0)
    cmap = colormaps[SEQUENTIAL].with_extremes(bad=MISSING)
    figures = {}
    for name, layer in usage.items():
        rows, columns = layer.slots.shape
        figure = new_figure(4.6, 1.55 + 0.26 * rows)
        bars, axes = figure.subplots(2, 1, sharex=True, height_ratios=[2, rows])
        bars.bar(range(columns), expert_load(layer.slots).nan_to_num().tolist(), color=BAR, width=0.8)
        bars.axhline(1.0 / columns, color=INK, linewidth=0.8, linestyle="--")
        bars.set_title(name, **TITLE)
        bars.set_ylabel("load", fontsize=9, rotation=0, ha="right", va="center")
        bars.yaxis.set_major_formatter(_percent)
        bars.tick_params(labelsize=8, labelbottom=False)
        image = axes.imshow(np.ma.masked_invalid(layer.slots.numpy()), cmap=cmap, vmin=0.0, vmax=highest, aspect="auto")
        axes.set_yticks(range(rows), tasks, fontsize=9)
        step = max(1, math.ceil(columns / 16))
        axes.set_xticks(range(0, columns, step), [str(e) for e in range(0, columns, step)], fontsize=8)
        axes.set_xlabel("expert", fontsize=9)
        axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.0)
        for part in (axes, bars):
            part.tick_params(which="both", length=0)
        for side in (*axes.spines.values(), *bars.spines.values()):
            side.set_visible(False)
        scale = figure.colorbar(image, ax=axes, pad=0.02, aspect=12, format=_percent)
        scale.ax.tick_params(labelsize=8)
        scale.ax.axhline(1.0 / columns, color="white", linewidth=1.5)  # where every expert would be under even use
        scale.outline.set_visible(False)
        figures[name] = figure
    return figures


def _percent(value: float, _: object = None) -> str:
    return f"{value:.0%}"


# ---- which expert each patch uses -----------------------------------------------------------------------------------


def top_expert(routing: Routing, task: int, batch: int, image_size: tuple[int, int]) -> Tensor:
    """The expert with the largest weight at every patch of every sample, int64 [b, rows, columns].

    The patch grid is the largest one of the image's aspect that the tokens can fill; what is left over are prefix
    tokens (class, registers), which come first and are dropped.

    Args:
        routing: of a layer that sees tokens ordered [(t b) n], or [b n] before the tasks part.
        task: id of the task to show.
        batch: samples b in the pass.
        image_size: height and width of the input in pixels.

    Raises:
        ValueError: the layer did not route this task, or its tokens do not split into b samples.
    """
    top = routing.dense_weights().argmax(dim=-1)
    if routing.task is not None:
        ids = routing.task_ids()
        if not (ids == task).any():
            raise ValueError(f"task: the layer routed ids {ids.unique().tolist()}, not {task}")
        top = top[ids == task]
    if len(top) % batch:
        raise ValueError(f"batch: {len(top)} tokens do not split into {batch} samples")
    tokens = top.view(batch, -1)
    height, width = (side // math.gcd(*image_size) for side in image_size)
    scale = math.isqrt(tokens.shape[1] // (height * width))
    if scale == 0:
        raise ValueError(
            f"image_size: {tokens.shape[1]} tokens hold no grid of aspect {height}:{width}; "
            "pass the size the model sees"
        )
    height, width = height * scale, width * scale
    return tokens[:, tokens.shape[1] - height * width :].reshape(batch, height, width)


def expert_map(images: Tensor, experts: Mapping[str, Tensor], num_experts: int, title: str = "") -> Figure:
    """Coloured patches over the images: one row per sample, the input and one column per task.

    Args:
        images: inputs [b, 3, h, w].
        experts: column name to expert ids [b, rows, columns], from `top_expert`.
        num_experts: size of the bank; an expert has the same colour in every figure of that size or larger.
        title: of the figure.
    """
    palette = categorical_palette(num_experts)
    pictures = to_rgb(images)
    columns = ["input", *experts]
    used = sorted({int(e) for ids in experts.values() for e in ids.unique()})
    figure, grid = _image_grid(len(pictures), columns, legend_rows=math.ceil(len(used) / 8), title=title)
    for row, picture in enumerate(pictures):
        grid[row][0].imshow(picture)
        for column, ids in enumerate(experts.values(), start=1):
            colours = torch.as_tensor(palette[ids[row].cpu().numpy()]).permute(2, 0, 1).unsqueeze(0)
            overlay = torch.nn.functional.interpolate(colours, picture.shape[:2], mode="nearest")[0].permute(1, 2, 0)
            luminance = picture.mean(axis=-1, keepdims=True)
            grid[row][column].imshow((overlay.numpy() * (0.6 + 0.4 * luminance)).clip(0, 1))
    _legend(figure, [(f"{e}", palette[e]) for e in used], columns=8, title="expert")
    return figure


# ---- predictions ----------------------------------------------------------------------------------------------------


def prediction_grid(task: Task, images: Tensor, prediction: Tensor, target: Tensor | None = None) -> Figure:
    """Input, prediction and truth of several samples of one task, one row per sample.

    Segmentation has a fixed palette and a legend of the classes seen; depth shares its limits, from the truth, over all
    panels; normals are drawn as (n + 1) / 2; binary maps show the probability; what holds for the whole image is text.
    Pixels without a label are light grey.

    Args:
        task: what was predicted.
        images: inputs [b, 3, h, w].
        prediction: what the model returned, shapes in `moe_mtl.tasks`.
        target: the labels; None when there are none.
    """
    images, prediction = images.detach().float().cpu(), prediction.detach().float().cpu()
    target = None if target is None else target.detach().cpu()
    columns = ["input", "prediction"] + (["truth"] if target is not None else [])
    sides = [prediction] if target is None else [prediction, target]
    if not task.is_dense:
        return _text_grid(task, images, sides, columns)
    panels = [_dense_panel(task, side, is_target=i == 1) for i, side in enumerate(sides)]
    seen = (
        sorted({int(c) for panel in panels for c in np.unique(panel) if c >= 0}) if task.kind == "segmentation" else []
    )
    names = task.classes or [str(c) for c in range(task.channels)]
    across = 3 if max((len(names[c]) for c in seen), default=0) > 5 else 6
    figure, grid = _image_grid(len(images), columns, legend_rows=math.ceil(len(seen) / across))
    style: dict[str, Any] = {}
    if task.kind == "segmentation":
        style = {
            "cmap": ListedColormap([*categorical_palette(task.channels)]),
            "vmin": -0.5,
            "vmax": task.channels - 0.5,
        }
        panels = [np.ma.masked_less(panel, 0) for panel in panels]
    elif task.kind == "depth":
        limits = panels[-1][np.isfinite(panels[-1])]
        low, high = (float(limits.min()), float(limits.max())) if limits.size else (0.0, 1.0)
        style = {"cmap": colormaps[SEQUENTIAL], "vmin": low, "vmax": high}
    elif task.kind == "binary_map":
        style = {"cmap": colormaps["gray"], "vmin": 0.0, "vmax": 1.0}
    if "cmap" in style:
        style["cmap"] = style["cmap"].with_extremes(bad=MISSING)
    for row, picture in enumerate(to_rgb(images)):
        grid[row][0].imshow(picture)
        for column, panel in enumerate(panels, start=1):
            grid[row][column].imshow(panel[row], interpolation="nearest", **style)
    if task.kind == "depth":
        bar = figure.colorbar(
            grid[0][1].images[0], ax=[a for axes in grid for a in axes], location="bottom", pad=0.02, aspect=40
        )
        bar.ax.tick_params(labelsize=8)
        bar.set_label("metres", fontsize=8)
        bar.outline.set_visible(False)
    elif task.kind == "segmentation":
        palette = categorical_palette(task.channels)
        _legend(figure, [(names[c], palette[c]) for c in seen], columns=across)
    return figure


def _dense_panel(task: Task, side: Tensor, is_target: bool) -> np.ndarray:
    """What is drawn per pixel: class ids (-1 missing), metres, RGB, or a probability; [b, h, w] or [b, h, w, 3]."""
    if task.kind == "segmentation":
        return (side.masked_fill(side == task.ignore_index, -1) if is_target else side.argmax(dim=1)).numpy()
    if task.kind == "normals":
        known = side.nan_to_num().norm(dim=1, keepdim=True) > 0
        unit = nn.functional.normalize(side.nan_to_num(), dim=1)
        grey = torch.tensor(MISSING).view(1, 3, 1, 1)
        return torch.where(known, (unit + 1) / 2, grey).permute(0, 2, 3, 1).numpy()
    if task.kind == "binary_map":
        side = side if is_target else side.sigmoid()
    return np.ma.masked_invalid(side.numpy())


def _text_grid(task: Task, images: Tensor, sides: Sequence[Tensor], columns: Sequence[str]) -> Figure:
    """The figure of a task that says one thing about the whole image."""
    figure, grid = _image_grid(len(images), columns)
    for row, picture in enumerate(to_rgb(images)):
        grid[row][0].imshow(picture)
        for column, side in enumerate(sides, start=1):
            axes = grid[row][column]
            axes.set(xlim=(0, 1), ylim=(0, 1))
            text = describe(task, side[row], is_target=column == 2)
            if task.kind == "classification" and column == 1 and len(sides) == 2 and sides[1][row] != task.ignore_index:
                text = f"{'✓' if int(side[row].argmax()) == int(sides[1][row]) else '✗'} {text}"
            axes.text(0.5, 0.5, plain(text), ha="center", va="center", fontsize=10, color=INK, linespacing=1.5)
    return figure


def describe(task: Task, value: Tensor, is_target: bool) -> str:
    """One sample's prediction or label of an image-level task in words: what holds and how probable it is, or numbers.

    Of several labels those are named that hold; those that are missing are named as such.
    """
    names = task.classes or [str(c) for c in range(task.channels)]
    if task.kind == "classification":
        if is_target:
            return "no label" if int(value) == task.ignore_index else names[int(value)]
        probability, best = value.softmax(dim=-1).max(dim=-1)
        return f"{names[int(best)]}\n{float(probability):.0%} sure"
    if task.kind in ("binary", "multilabel") and not is_target:
        value = value.sigmoid()
    if task.kind in ("binary", "multilabel") and value.isnan().all():
        return "no label"
    if task.kind == "binary":
        probability = float(value)
        word = (task.classes or ("no", "yes"))[probability >= 0.5]
        return word if is_target else f"{word}\n{max(probability, 1 - probability):.0%} sure"
    if task.kind == "multilabel":
        told = zip(names, value.tolist(), strict=True)
        return "\n".join(name if v >= 0.5 else f"{name}: no label" for name, v in told if not v < 0.5) or "none"
    return "\n".join("no label" if math.isnan(v) else f"{v:.3g}" for v in value.flatten().tolist())


# ---- drawing --------------------------------------------------------------------------------------------------------


def to_rgb(images: Tensor) -> np.ndarray:
    """Images as float [b, h, w, 3] in 0..1; values outside (a normalised input) are stretched over the batch.

    Args:
        images: [b, c, h, w]; of other than 3 channels the first is shown in grey.
    """
    images = images.detach().float().cpu()
    if images.shape[1] != 3:
        images = images[:, :1].expand(-1, 3, -1, -1)
    low, high = images.min(), images.max()
    if low < 0 or high > 1:
        images = (images - low) / (high - low if high > low else 1.0)
    return images.permute(0, 2, 3, 1).numpy()


def plain(text: object) -> str:
    """A text that matplotlib draws as it stands: what is between two dollar signs it takes for a formula."""
    return str(text).replace("$", r"\$")


def new_figure(width: float, height: float) -> Figure:
    """An empty opaque figure of that many inches, on its own canvas."""
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _image_grid(
    rows: int, columns: Sequence[str], legend_rows: int = 0, title: str = ""
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of bare axes with column titles."""
    figure = new_figure(3.9, 0.22 + 3.9 / len(columns) * rows + 0.18 * legend_rows + 0.25 * bool(title))
    if title:
        figure.suptitle(title, fontsize=10, color=INK)
    grid = figure.subplots(rows, len(columns), squeeze=False).tolist()
    for axes in (a for row in grid for a in row):
        axes.set(xticks=[], yticks=[])
        for side in axes.spines.values():
            side.set_visible(False)
    for axes, column in zip(grid[0], columns, strict=True):
        axes.set_title(textwrap.fill(column.replace("_", " "), 36 // len(columns)), **TITLE)
    return figure, grid


def _legend(figure: Figure, entries: Sequence[tuple[str, np.ndarray]], columns: int, title: str | None = None) -> None:
    """A legend below everything else, in reading order: matplotlib fills columns, so the entries are dealt to them."""
    entries = [entry for column in range(columns) for entry in entries[column::columns]]
    handles = [
        Patch(facecolor=tuple(colour.tolist()), edgecolor="#00000055", linewidth=0.5, label=plain(label))
        for label, colour in entries
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        title=title,
        fontsize=8,
        title_fontsize=8,
        frameon=False,
        handlelength=1.0,
        handleheight=1.0,
        columnspacing=1.0,
        borderpad=0.1,
    )
