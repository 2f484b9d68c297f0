"""Patches in their place, colours apart, and figures that show what they are given."""

import io
import sys

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.cbook import is_math_text
from matplotlib.text import Text
from torch import nn

from moe_mtl.charts import score_chart
from moe_mtl.diagnostics import ExpertUsage
from moe_mtl.palette import categorical_palette
from moe_mtl.routing import Routing
from moe_mtl.tasks import Task
from moe_mtl.viz import (
    MISSING,
    describe,
    expert_map,
    prediction_grid,
    to_rgb,
    top_expert,
    usage_figures,
)

TASKS = (Task.depth("d"), Task.classification("c", 2))


def routing(indices, weights, task, experts=4, **kwargs):
    indices, weights = torch.tensor(indices), torch.tensor(weights)
    return Routing(weights, indices, torch.zeros(len(weights), experts), task, **kwargs)


def test_top_expert_puts_patches_in_their_place():
    # 2 tasks x 2 samples x (1 class token + 2x3 patches); expert id = patch number, plus one for task 1
    patches = torch.arange(6)
    sample = torch.cat([torch.tensor([7]), patches])
    indices = torch.cat([sample, sample, (sample + 1) % 8, (sample + 1) % 8]).unsqueeze(1)
    layer = Routing(torch.ones(28, 1), indices, torch.zeros(28, 8), (0, 1))
    for task in (0, 1):
        top = top_expert(layer, task, batch=2, image_size=(16, 24))
        assert top.tolist() == [(patches + task).view(2, 3).tolist()] * 2
    with pytest.raises(ValueError, match=r"task: the layer routed ids \[0, 1\], not 2"):
        top_expert(layer, 2, batch=2, image_size=(16, 24))
    with pytest.raises(ValueError, match="batch: 14 tokens do not split into 3 samples"):
        top_expert(layer, 0, batch=3, image_size=(16, 24))
    with pytest.raises(ValueError, match="no grid of aspect 16:25"):
        top_expert(layer, 0, batch=2, image_size=(16, 25))


def test_top_expert_is_the_one_with_the_largest_weight():
    layer = Routing(torch.tensor([[0.4, 0.6]]), torch.tensor([[2, 1]]), torch.zeros(1, 4), None)
    assert top_expert(layer, 0, batch=1, image_size=(8, 8)).tolist() == [[[1]]]


def test_palette_keeps_colours_apart_and_is_stable():
    long, short = categorical_palette(40), categorical_palette(13)
    assert long.shape == (40, 3) and long.min() >= 0 and long.max() <= 1
    np.testing.assert_array_equal(long[:13], short)
    everything = np.concatenate([short, [(1, 1, 1), MISSING]])
    distances = np.linalg.norm(everything[:, None] - everything[None], axis=-1)
    assert (distances + 9 * np.eye(15)).min() > 0.2  # of sqrt(3) from black to white
    assert len({tuple(colour) for colour in long}) == 40


def test_to_rgb_leaves_0_to_1_alone_and_stretches_the_rest():
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(to_rgb(x), x.permute(0, 2, 3, 1).numpy())
    y = to_rgb(4 * x - 2)
    assert y.min() == 0 and y.max() == 1
    assert to_rgb(x[:, :1]).shape == (2, 4, 4, 3)
    np.testing.assert_array_equal(to_rgb(torch.full((1, 3, 4, 4), 3.0)), np.zeros((1, 4, 4, 3)))  # nothing to stretch


def drawn(figure):
    """The arrays of the images in a figure, row by row of its panels, colour bars left out."""
    return [axes.images[0].get_array() for axes in figure.axes if axes.images and axes.get_label() != "<colorbar>"]


IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_segmentation_panels_and_legend():
    task = Task.segmentation("s", 3, classes=("wall", "floor", "lamp"))
    truth = torch.zeros(2, 8, 8, dtype=torch.int64)
    truth[:, 0] = task.ignore_index
    prediction = nn.functional.one_hot(torch.full((2, 8, 8), 2), 3).permute(0, 3, 1, 2).float()
    figure = prediction_grid(task, IMAGES, prediction, truth)
    _, predicted, labelled = drawn(figure)[:3]
    assert (predicted == 2).all() and (labelled[1:] == 0).all() and labelled.mask[0].all()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["wall", "lamp"]  # floor is nowhere
    limits = {axes.images[0].get_clim() for axes in figure.axes if axes.images[0].get_array().ndim == 2}
    assert limits == {(-0.5, 2.5)}


def test_depth_panels_share_the_limits_of_the_truth():
    truth = torch.full((2, 8, 8), 3.0)
    truth[0, 0, 0], truth[1, 0, 0], truth[0, 1, 1] = 1.0, 5.0, float("nan")
    figure = prediction_grid(Task.depth(), IMAGES, torch.full((2, 8, 8), 9.0), truth)
    panels = [axes for axes in figure.axes if axes.images and axes.images[0].get_array().ndim == 2]
    assert {axes.images[0].get_clim() for axes in panels} == {(1.0, 5.0)}
    assert drawn(figure)[2].mask[1, 1]


def test_normals_are_colours():
    # (0, 0, -1) is (.5, .5, 0); a prediction of length 2 is normalised first; no label is grey
    truth = torch.tensor([0.0, 0.0, -1.0]).view(1, 3, 1, 1).repeat(2, 1, 8, 8)
    truth[:, :, 0] = 0
    _, predicted, labelled = drawn(prediction_grid(Task.normals(), IMAGES, 2 * truth - 0.0, truth))[:3]
    np.testing.assert_allclose(predicted[1], [[0.5, 0.5, 0.0]] * 8)
    np.testing.assert_allclose(labelled[1], [[0.5, 0.5, 0.0]] * 8)
    np.testing.assert_allclose(labelled[0], [MISSING] * 8)


def test_binary_maps_show_probabilities():
    truth = torch.ones(2, 8, 8)
    _, predicted, labelled = drawn(prediction_grid(Task.binary_map("e"), IMAGES, torch.zeros(2, 8, 8), truth))[:3]
    assert (predicted == 0.5).all() and (labelled == 1).all()


def test_image_level_tasks_are_text():
    task = Task.classification("scene", 3, classes=("kitchen", "bath", "hall"))
    logits = torch.tensor([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0]])
    figure = prediction_grid(task, IMAGES, logits, torch.tensor([1, 2]))
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts == ["✓ bath\n100% sure", "bath", "✗ kitchen\n100% sure", "hall"]


def test_describe():
    mail = Task.binary("mail", classes=("ham", "spam"))
    assert describe(mail, torch.tensor(1.0), is_target=True) == "spam"
    assert describe(mail, torch.tensor(-20.0), is_target=False) == "ham\n100% sure"
    labels = Task.multilabel("l", 3, classes=("a", "b", "c"))
    assert describe(labels, torch.tensor([2.0, -2.0, 0.1]), is_target=False) == "a\nc"
    assert describe(labels, torch.tensor([0.0, 1.0, 0.0]), is_target=True) == "b"
    assert describe(labels, torch.zeros(3), is_target=True) == "none"
    nothing = float("nan")
    assert describe(labels, torch.tensor([nothing, 1.0, 0.0]), is_target=True) == "a: no label\nb"
    assert describe(labels, torch.full((3,), nothing), is_target=True) == "no label"
    yes_or_no = Task.binary("y")
    assert describe(yes_or_no, torch.tensor(-2.0), is_target=False) == "no\n88% sure"  # 1 / (1 + exp(-2))
    assert describe(yes_or_no, torch.tensor(0.5), is_target=False) == "yes\n62% sure"
    assert [describe(yes_or_no, torch.tensor(v), is_target=True) for v in (0.0, 1.0, nothing)] == [
        *("no", "yes", "no label"),
    ]
    assert describe(Task.regression("r"), torch.tensor(1.23456), is_target=True) == "1.23"
    assert describe(Task.regression("r"), torch.tensor(float("nan")), is_target=True) == "no label"
    assert describe(Task.classification("c", 2), torch.tensor(-100), is_target=True) == "no label"


def test_prediction_without_truth_has_two_columns():
    figure = prediction_grid(Task.depth(), IMAGES, torch.rand(2, 8, 8))
    assert len(drawn(figure)) == 4


def test_usage_figures_share_one_scale():
    usage = ExpertUsage(TASKS)
    usage.update({"one": routing([[0], [1]], [[1.0], [1.0]], (0, 1)), "two": routing([[0, 1]], [[0.5, 0.5]], 0)})
    figures = usage_figures(usage.compute(), usage.tasks)
    assert list(figures) == ["one", "two"]
    assert [figure.axes[1].images[0].get_clim() for figure in figures.values()] == [(0.0, 1.0)] * 2
    bars, axes = figures["two"].axes[:2]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["d", "c"]
    assert axes.images[0].get_array()[0].tolist() == [0.5, 0.5, 0.0, 0.0]
    assert axes.images[0].get_array().mask[1].all()  # drawn grey, not as 0
    assert [bar.get_height() for bar in bars.patches] == [0.5, 0.5, 0.0, 0.0]
    # task d uses expert 0 alone, task c expert 1: a load of one half each
    assert [bar.get_height() for bar in figures["one"].axes[0].patches] == [0.5, 0.5, 0.0, 0.0]


def test_expert_map_colours_patches():
    experts = torch.tensor([[[0, 1], [2, 3]]]).repeat(2, 1, 1)
    figure = expert_map(torch.ones(2, 3, 8, 8), {"depth": experts}, 4, title="blocks.1")
    _, overlay, _, _ = drawn(figure)
    palette = categorical_palette(4)
    np.testing.assert_allclose(overlay[:4, :4], np.broadcast_to(palette[0], (4, 4, 3)), rtol=1e-6)
    np.testing.assert_allclose(overlay[4:, :4], np.broadcast_to(palette[2], (4, 4, 3)), rtol=1e-6)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["0", "1", "2", "3"]


def test_nothing_global_is_touched(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would raise
    before = dict(matplotlib.rcParams)
    figure = prediction_grid(Task.depth(), IMAGES, torch.rand(2, 8, 8), torch.rand(2, 8, 8))
    figure.savefig(io.BytesIO(), format="png")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("name", ["$25k-$50k", r"$\foo$"])
def test_dollar_signs_in_names_are_no_formulas(name):
    classes = [name, "other"]
    whole, pixels = Task.classification("c", 2, classes=classes), Task.segmentation("s", 2, classes=classes)
    logits, ids = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.zeros(2, dtype=torch.int64)
    for figure in (
        prediction_grid(whole, IMAGES, logits, ids),
        prediction_grid(
            pixels, IMAGES, logits[:, :, None, None].expand(-1, -1, 8, 8), ids[:, None, None].expand(-1, 8, 8)
        ),
        score_chart(whole, logits, ids),
    ):
        figure.savefig(io.BytesIO(), format="png")  # a formula that cannot be read would raise
        texts = figure.findobj(lambda artist: isinstance(artist, Text) and "other" not in artist.get_text())
        shown = [text for text in texts if name.replace("$", r"\$") in text.get_text()]
        assert shown and not any(is_math_text(text.get_text()) for text in shown)
