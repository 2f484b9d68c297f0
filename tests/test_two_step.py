"""The two-step update against derivatives worked out by hand, and its place in the trainer."""

import pytest
import torch
from torch import nn

from moe_mtl import create_model
from moe_mtl.data._frames import TableSplit
from moe_mtl.tasks import Task
from moe_mtl.trainer import Trainer
from moe_mtl.trainer_config import TrainerConfig
from moe_mtl.two_step import two_step_losses


class Line(nn.Module):
    """y_t = w_t x, with one weight shared by both tasks (s) added to it."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Parameter(torch.tensor(0.5))
        self.own = nn.ParameterDict({"a": torch.tensor(1.0), "b": torch.tensor(-1.0)})

    def forward(self, x, tasks=None, return_routing=False):
        predictions = {name: (self.shared + self.own[name]) * x[:, 0] for name in tasks or ("a", "b")}
        return (predictions, {}) if return_routing else predictions


TASKS = (Task.regression("a"), Task.regression("b"))
X = torch.tensor([[1.0], [2.0]])  # the first sample is the first part
Y = {"a": torch.tensor([2.0, 1.0]), "b": torch.tensor([0.0, 3.0])}
LR = 0.1


@pytest.mark.parametrize("second_order", [False, True])
def test_losses_and_gradients_by_hand(second_order):
    # Task a, v = s + w = 1.5: trial gradient of (v x1 - y1)^2 by s and by w is 2 (1.5 - 2) 1 = -1, so each moves by
    # +0.1 and v' = 1.7. Outer loss (1.7 * 2 - 1)^2 = 5.76; by v' it is 2 (3.4 - 1) 2 = 9.6. First order: dv'/ds = 1.
    # Second order: v' = v - 2 * 0.1 * 2 x1 (v x1 - y1), dv'/ds = 1 - 0.4 = 0.6.
    # Task b, v = -0.5: trial gradient 2 (-0.5) = -1, v' = -0.3; loss (-0.6 - 3)^2 = 12.96, slope 2 (-3.6) 2 = -14.4.
    model = Line()
    losses, _ = two_step_losses(model, X, Y, TASKS, inner_lr=LR, share=0.5, second_order=second_order)
    assert losses["a"].item() == pytest.approx(5.76, rel=1e-5)
    assert losses["b"].item() == pytest.approx(12.96, rel=1e-5)
    sum(losses.values()).backward()
    slope = 0.6 if second_order else 1.0
    assert model.own["a"].grad.item() == pytest.approx(9.6 * slope, rel=1e-5)
    assert model.own["b"].grad.item() == pytest.approx(-14.4 * slope, rel=1e-5)
    assert model.shared.grad.item() == pytest.approx((9.6 - 14.4) * slope, rel=1e-5)
    assert model.shared.item() == 0.5  # the weights were not touched


def test_a_missing_label_in_the_first_part_makes_the_plain_loss():
    missing = {**Y, "a": torch.tensor([float("nan"), 1.0])}
    losses, _ = two_step_losses(Line(), X, missing, TASKS[:1], inner_lr=LR, share=0.5)
    assert losses["a"].item() == pytest.approx((1.5 * 2 - 1) ** 2)


def test_one_sample_is_refused():
    with pytest.raises(ValueError, match="got 1 sample"):
        two_step_losses(Line(), X[:1], {k: v[:1] for k, v in Y.items()}, TASKS, inner_lr=LR)


class Data:
    """Two tasks on two numbers."""

    def task_list(self):
        return TASKS

    def split(self, name):
        x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        return TableSplit({"vector": x}, {"a": x[:, 0], "b": x[:, 1]})


def test_the_trainer_takes_it(tmp_path):
    columns = [{"name": "v", "kind": "vector", "size": 2}]
    weights = []
    for inner_lr in (0.0, 0.5):
        torch.manual_seed(0)
        model = create_model("mmoe_table", tasks=TASKS, columns=columns, experts=3, widths=[4], tower=[4])
        config = TrainerConfig(
            out=str(tmp_path / str(inner_lr)), steps=5, batch_size=8, inner_lr=inner_lr, eval_every=0, progress=False,
            regularizers={"importance": 0.1}, warmup=0,
        )  # fmt: skip
        Trainer(model, Data(), config).fit()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert weights[1].isfinite().all()
    assert (weights[0] - weights[1]).abs().max() > 1e-4


@pytest.mark.parametrize("options, message", [({"inner_share": 1.0}, "inner_share"), ({"accumulate": 2}, "accumulate")])
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainerConfig(out="x", steps=1, inner_lr=0.1, **options)
