"""Charts: what is drawn is what was measured."""

import math

import pytest
import torch

from moe_mtl.activity import activity
from moe_mtl.charts import activity_figures, gate_figures, routing_curves, score_chart
from moe_mtl.diagnostics import LayerUsage
from moe_mtl.tasks import Task

NAN = math.nan


def heights(axes):
    return [bar.get_height() for bar in axes.patches]


def test_reliability_of_a_binary_task():
    # twenty samples, in pairs of one probability: the share of ones among the pair of logit i is 0, 1/2 or 1
    logits = torch.arange(10.0).repeat_interleave(2) - 5
    target = torch.tensor([0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 1]).float()
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    extra = torch.tensor([9.0]), torch.tensor([NAN])  # has no label and does not count
    figure = score_chart(Task.binary("y"), *(torch.cat(p) for p in zip((logits[shuffled], target[shuffled]), extra)))  # noqa: B905
    curve = figure.axes[0].lines[1]
    assert curve.get_xdata() == pytest.approx((torch.arange(10.0) - 5).sigmoid().tolist())
    assert curve.get_ydata() == pytest.approx([0, 0, 0.5, 0.5, 0.5, 0.5, 1, 0.5, 1, 1])


def test_reliability_does_not_depend_on_the_order_of_equal_probabilities():
    # logit 0 for a quarter of zeros and then three quarters of ones, logit 2 for ones and zeros alike
    logits = torch.cat([torch.zeros(20), torch.full((20,), 2.0)])
    target = torch.cat([torch.zeros(5), torch.ones(15), torch.ones(10), torch.zeros(10)])
    for rows in (torch.arange(40), torch.arange(40).flip(0)):
        curve = score_chart(Task.binary("y"), logits[rows], target[rows]).axes[0].lines[1]
        assert curve.get_ydata() == pytest.approx([0.75] * 5 + [0.5] * 5)


def test_scatter_of_a_regression():
    figure = score_chart(Task.regression("y"), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, NAN, 2.5]))
    assert figure.axes[0].collections[0].get_offsets().tolist() == [[1.5, 1.0], [2.5, 3.0]]


def test_confusion_of_classes():
    # true 0: taken for 0 and 1; true 1: for 1; no sample is of class 2
    logits = torch.eye(3)[[0, 1, 1, 2]]
    figure = score_chart(Task.classification("y", 3), logits, torch.tensor([0, 0, 1, -100]))
    shown = figure.axes[0].images[0].get_array()
    assert shown[:2].tolist() == [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]] and shown.mask[2].all()


def test_classes_may_be_numbers():
    figure = score_chart(Task.classification("y", 2, classes=[3, 5]), torch.eye(2), torch.tensor([0, 1]))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["3", "5"]


def test_nothing_to_draw():
    assert score_chart(Task.multilabel("y", 3), torch.zeros(2, 3), torch.zeros(2, 3)) is None
    assert score_chart(Task.binary("y"), torch.zeros(2), torch.full((2,), NAN)) is None


@pytest.mark.filterwarnings("error")
def test_weights_of_gates():
    weight = torch.tensor([[0.25, 0.75], [NAN, NAN]])
    usage = LayerUsage(weight, weight, weight[:, 0], weight, torch.tensor([[0.1, 0.2], [NAN, NAN]]))
    figures = gate_figures({"level.0": usage}, ["a", "b"])
    first, second = figures["level.0"].axes
    assert heights(first) == pytest.approx([0.25, 0.75]) and heights(second) == [0.0, 0.0]
    (bars,) = [c for c in first.collections if len(c.get_segments()) == 2]
    assert [s[:, 1].tolist() for s in bars.get_segments()] == [
        pytest.approx([0.15, 0.35]),
        pytest.approx([0.55, 0.95]),
    ]
    assert [axes.get_ylabel() for axes in (first, second)] == ["a", "b"]


@pytest.mark.filterwarnings("error")
def test_units_of_experts():
    # expert 0 has a unit that never fires and one that always does, expert 1 two that always do
    outputs = torch.tensor([[[0.0, 1.0], [1.0, 1.0]]]).repeat(3, 1, 1)
    left, right, *_ = activity_figures({"experts": activity(outputs)})["experts"].axes
    assert heights(left) == [0.5, 0.0, 0.5, 0.0]  # silent activations, then dead units
    assert right.images[0].get_array().tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_curves_over_training():
    def record(step, entropy):
        return {"step": step, "routing": {"l": {"gate_entropy": entropy, "load_entropy": 1.0}}}

    assert routing_curves([{"step": 1, "loss": {}}, record(2, 0.5)]) is None  # one point is no curve
    figure = routing_curves([record(2, 0.5), {"step": 3, "loss": {}}, record(4, None)])
    line = figure.axes[0].lines[0]
    assert list(line.get_xdata()) == [2, 4] and line.get_ydata()[0] == 0.5 and math.isnan(line.get_ydata()[1])
