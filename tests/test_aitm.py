"""AITM: the transfer and the calibrator against numbers worked out by hand, and the places of its tasks."""

import math

import pytest
import torch

from moe_mtl import create_model
from moe_mtl.models.aitm import Transfer
from moe_mtl.tasks import Task

COLUMNS = [{"name": "x", "kind": "vector", "size": 4}, {"name": "job", "kind": "categorical", "categories": ["a", "b"]}]
CLICK, BUY, AGAIN = Task.binary("click"), Task.binary("buy"), Task.binary("again")
RATE, LATER = Task.binary("rate", weight=0), Task.binary("later", weight=0)
STEPS = (CLICK, BUY, AGAIN)


def rows(b=8, seed=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {
        "vector": torch.randn(b, 4, generator=g).to(dtype),
        "categorical": torch.randint(0, 3, (b, 1), generator=g),
    }


def make(tasks=STEPS, **overrides):
    torch.manual_seed(0)
    return create_model("aitm_table", tasks=tasks, columns=COLUMNS, **{"tower": [6, 4], **overrides}).eval()


class TestTransfer:
    def test_two_steps_by_hand(self):
        # d = 1, q = (2, 1), G = 1 and g = 0: p = 2. Q = K = 1, V = 3: scores 2 * 2 / 1 = 4 of p and 1 of q_2, weights
        # e^4 / (e^4 + e) = 1 / (1 + e^-3) and 1 / (1 + e^3), values 6 and 3.
        transfer = Transfer(1, 2)
        with torch.no_grad():
            transfer.info.weight[0].fill_(1)
            transfer.maps.copy_(torch.tensor([[1.0], [1.0], [3.0]]))
        z = transfer(torch.tensor([[[2.0]], [[1.0]]]))
        first = 1 / (1 + math.exp(-3))
        torch.testing.assert_close(z.flatten(), torch.tensor([2.0, 6 * first + 3 * (1 - first)]))

    def test_nothing_negative_is_passed_on(self):
        # p = relu(-2) = 0: scores 0 and 1, values 0 and 1: z_2 = e / (1 + e)
        transfer = Transfer(1, 2)
        with torch.no_grad():
            transfer.info.weight[0].fill_(-1)
            transfer.maps.fill_(1)
        z = transfer(torch.tensor([[[2.0]], [[1.0]]]))
        torch.testing.assert_close(z[1].flatten(), torch.tensor([math.e / (1 + math.e)]))

    def test_three_steps_row_by_row(self):
        torch.manual_seed(0)
        transfer, q = Transfer(4, 3).double(), torch.randn(3, 5, 4, dtype=torch.float64)
        with torch.no_grad():
            for bias in transfer.info.bias:
                bias.normal_()
        z = transfer(q)
        query, key, value = (transfer.maps[i * 4 : (i + 1) * 4] for i in range(3))
        for row in range(5):
            before = q[0, row]
            torch.testing.assert_close(z[0, row], before)
            for step in (1, 2):
                p = (transfer.info.weight[step - 1] @ before + transfer.info.bias[step - 1]).relu()
                both = (p, q[step, row])
                scores = torch.stack([(key @ u) @ (query @ u) / 2 for u in both])  # sqrt(4)
                shares = scores.exp() / scores.exp().sum()
                before = sum(share * (value @ u) for share, u in zip(shares, both, strict=True))
                torch.testing.assert_close(z[step, row], before, rtol=1e-12, atol=1e-12)

    def test_fewer_steps(self):
        transfer, q = Transfer(4, 3), torch.randn(3, 5, 4)
        torch.testing.assert_close(transfer.for_stages(2)(q[:2]), transfer(q)[:2])
        assert transfer.for_stages(1) is None
        assert sum(p.numel() for p in transfer.for_stages(2).parameters()) == 4 * 4 + 4 + 12 * 4


class TestCalibrator:
    def test_by_hand(self):
        # rates of two impressions: click 0.2 0.8, buy 0.5 0.4, again 0.6 0.1. Excess: buy over click 0.3 0, again over
        # buy 0.1 0; mean of the sums 0.2. Without buy, again over click is 0.4 0: mean 0.2 as well; without again 0.15.
        rates = {"click": [0.2, 0.8], "buy": [0.5, 0.4], "again": [0.6, 0.1]}
        logits = {name: torch.tensor(p).logit() for name, p in rates.items()}

        def value(model, *names):
            return model.auxiliary_losses({name: logits[name] for name in names})["calibrator"].item()

        assert value(make(), "click", "buy", "again") == pytest.approx(0.6 * 0.2)
        assert value(make(), "again", "buy", "click") == pytest.approx(0.6 * 0.2)  # whatever their order
        assert value(make(calibrator=2.0), "click", "again") == pytest.approx(0.4)
        assert value(make(), "click", "buy") == pytest.approx(0.6 * 0.15)
        assert value(make((CLICK, RATE, BUY)), "click", "buy") == pytest.approx(0.6 * 0.15)
        assert make().auxiliary_losses({"buy": logits["buy"]}) == {}
        assert make(calibrator=0.0).auxiliary_losses(logits) == {}

    def test_rates_given_a_step_take_no_part(self):
        model = make((CLICK, RATE, BUY))
        predictions = model(rows())
        without = {name: p for name, p in predictions.items() if name != "rate"}
        torch.testing.assert_close(model.auxiliary_losses(predictions), model.auxiliary_losses(without))

    def test_it_pushes_the_later_rate_down_and_the_earlier_up(self):
        click, buy = (torch.tensor([z], requires_grad=True) for z in (-1.0, 1.0))
        make().auxiliary_losses({"click": click, "buy": buy})["calibrator"].backward()
        assert click.grad < 0 < buy.grad

    def test_extracted_models_have_it_too(self):
        model, x = make(), rows()
        small = model.for_tasks(["buy", "click"])
        torch.testing.assert_close(
            small.auxiliary_losses(small(x)), model.auxiliary_losses(model(x, tasks=["click", "buy"]))
        )


class TestModel:
    def test_a_rate_given_a_step_is_the_quotient(self):
        model = make(
            (CLICK, RATE, BUY, AGAIN, LATER), conditional={"rate": ["buy", "click"], "later": ["again", "click"]}
        )
        p = {name: z.sigmoid() for name, z in model(rows()).items()}
        torch.testing.assert_close(p["rate"], (p["buy"] / p["click"]).clamp(max=1))
        torch.testing.assert_close(p["later"], (p["again"] / p["click"]).clamp(max=1))

    def test_defaults(self):
        model = create_model("aitm_table", tasks=(CLICK, RATE, BUY, LATER, AGAIN), columns=COLUMNS)
        assert [tuple(layer.weight[0].shape) for layer in model.trunk.towers.layers] == [(128, 9), (64, 128), (32, 64)]
        assert model.calibrator == 0.6
        args = model.config["args"]
        assert args["steps"] == ["click", "buy", "again"]
        assert args["conditional"] == {"rate": ["buy", "click"], "later": ["again", "buy"]}

    def test_a_step_needs_those_before_it_and_their_towers_only(self):
        model = make()
        first, last = model.for_tasks("click"), model.for_tasks("again")
        assert first.trunk.transfer is None
        assert len(first.trunk.towers.layers[0].weight) == 1
        assert (len(last.trunk.towers.layers[0].weight), len(last.towers.out.weight)) == (3, 1)
        assert len(model.for_tasks("buy").trunk.transfer.info.weight) == 1

    def test_a_later_step_leaves_the_earlier_alone_and_not_the_other_way_round(self):
        model, x = make(), rows()
        before = model(x)
        with torch.no_grad():
            model.trunk.towers.layers[0].weight[1].add_(1)
        after = model(x)
        assert torch.equal(before["click"], after["click"])
        assert not torch.allclose(before["buy"], after["buy"])
        assert not torch.allclose(before["again"], after["again"])

    @pytest.mark.parametrize(
        "tasks, options, message",
        [
            ((CLICK,), {}, r"^tasks: got 1 steps \(click\), expected two at least"),
            ((CLICK, RATE), {}, "^tasks: got 1 steps"),
            ((CLICK, BUY, RATE), {}, "^tasks: 'rate' is no step and stands between none"),
            ((CLICK, Task.depth()), {}, "^tasks: 'depth' is of kind depth"),
            (
                STEPS,
                {"steps": ["click", "by", "again"], "conditional": {}},
                "^tasks: 'buy' has no place.*did you mean 'by'",
            ),
            (STEPS, {"steps": ["click", "buy", "buy"]}, "^steps: .*names a task twice"),
            (STEPS, {"conditional": {"rate": ["buy", "clik"]}}, "^conditional: .*did you mean 'click'"),
            (STEPS, {"conditional": {"rate": ["click", "buy"]}}, r"^conditional: 'rate' is \['click', 'buy'\]"),
            (STEPS, {"conditional": {"buy": ["again", "click"]}}, "^conditional: 'buy'"),
            (
                (CLICK, Task.binary("rate"), BUY),
                {"steps": ["click", "buy"], "conditional": {"rate": ["buy", "click"]}},
                "^tasks: 'rate' has weight 1; .*weight=0",
            ),
            (STEPS, {"calibrator": -1}, "^calibrator: got -1"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, tasks, options, message):
        with pytest.raises(ValueError, match=message):
            make(tasks, **options)
