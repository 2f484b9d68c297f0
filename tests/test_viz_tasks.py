"""Figures of tasks that route alike, and of the experts a task keeps."""

import math

import matplotlib.pyplot as plt
import pytest
import torch

from moe_mtl.diagnostics import LayerUsage, task_divergence
from moe_mtl.sparse import Extraction, LayerExtraction
from moe_mtl.viz_tasks import WRITTEN, kept_figures, routing_similarity, similarity_figures

SHARES = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]).double()


def usage(mass=SHARES):
    blank = torch.zeros(len(mass))
    return {name: LayerUsage(mass, mass, blank, mass, blank) for name in ("blocks.1", "blocks.3")}


def test_similarity_by_hand():
    cosine = routing_similarity(usage())
    assert list(cosine) == ["all layers", "blocks.1", "blocks.3"]
    for alike in cosine.values():
        assert alike[0].tolist() == pytest.approx([1.0, 1 / math.sqrt(2), 0.0])
    # p = (1, 0), q = (1/2, 1/2): their mean (3/4, 1/4) has the entropy 0.5623, q has ln 2
    divergence = 0.75 * math.log(4 / 3) + 0.25 * math.log(4) - math.log(2) / 2
    assert task_divergence(SHARES)[0].tolist() == pytest.approx([0.0, divergence, math.log(2)])
    alike = routing_similarity(usage(), "jensen_shannon")["all layers"]
    assert alike[0].tolist() == pytest.approx([1.0, 1 - divergence / math.log(2), 0.0])
    with pytest.raises(ValueError, match=r"^by: unknown 'cosin'; did you mean 'cosine'"):
        routing_similarity(usage(), "cosin")
    assert routing_similarity({}) == {}


@pytest.mark.parametrize("tasks", [WRITTEN, WRITTEN + 1, 60])
def test_maps_of_many_tasks_stay_small(tasks):
    names = [f"task_{i}" for i in range(tasks)]
    figure = similarity_figures(usage(torch.eye(tasks).double()), names)["blocks.1"]
    assert len(figure.axes[0].texts) == (tasks**2 if tasks == WRITTEN else 0)  # writing 60 x 60 numbers takes a minute
    assert figure.axes[0].images[0].get_array().tolist() == torch.eye(tasks).tolist()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == names and figure.get_figwidth() < 12


def test_a_map_per_layer_with_the_numbers_in_it():
    mass = SHARES.clone()
    mass[2] = torch.nan  # a task that never passed
    figures = similarity_figures(usage(mass), ["depth", "scene", "tilt"])
    assert list(figures) == ["all layers", "blocks.1", "blocks.3"]
    axes = figures["blocks.1"].axes[0]
    assert [text.get_text() for text in axes.texts] == ["1.00", "0.71", "0.71", "1.00"]
    assert axes.get_title() == "blocks.1" and not plt.get_fignums()


def test_what_is_dropped_is_crossed_out():
    measured = LayerExtraction(4, (0, 2), False, 64, 0.1, {"depth": 0.1}, {"depth": (0.5, 0.1, 0.4, 0.0)})
    exact = LayerExtraction(4, (1, 2, 3))
    reports = {"depth": Extraction({"a": measured, "b": exact}), "scene": Extraction({"a": exact})}
    figures = kept_figures(reports)
    assert list(figures) == ["a", "b"]
    axes = figures["a"].axes[0]
    crosses = sorted((int(line.get_xdata()[0]), int(line.get_ydata()[0])) for line in axes.lines)
    assert crosses == [(0, 1), (1, 0), (3, 0)]
    values = axes.images[0].get_array()
    assert values[0].tolist() == [0.5, 0.1, 0.4, 0.0] and values.mask[1].all()
    (right,) = axes.child_axes
    assert [label.get_text() for label in right.get_yticklabels()] == ["2/4, -10.0%", "3/4"]
    assert len(figures["b"].axes) == 1  # nothing measured, no scale
    assert kept_figures({}) == {}
