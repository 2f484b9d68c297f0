"""ESMM: logits of products and quotients against probabilities, the roles of its tasks, and a training run."""

import json
import math

import pytest
import torch

from moe_mtl import create_model
from moe_mtl.data.entire_space import EntireSpaceLog
from moe_mtl.entire_space import product_logit, quotient_logit
from moe_mtl.tasks import Task
from moe_mtl.trainer import Trainer
from moe_mtl.trainer_config import TrainerConfig

COLUMNS = [{"name": "x", "kind": "vector", "size": 4}, {"name": "job", "kind": "categorical", "categories": ["a", "b"]}]
TASKS = (Task.binary("click"), Task.binary("conversion", weight=0), Task.binary("both"))


def rows(b=8, seed=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {
        "vector": torch.randn(b, 4, generator=g).to(dtype),
        "categorical": torch.randint(0, 3, (b, 1), generator=g),
    }


def make(tasks=TASKS, **overrides):
    torch.manual_seed(0)
    return create_model("esmm_table", tasks=tasks, columns=COLUMNS, **{"tower": [6, 4], **overrides}).eval()


def grid(dtype=torch.float64):
    values = torch.linspace(-12, 12, 25, dtype=dtype)
    return torch.cartesian_prod(values, values).unbind(1)


class TestLogits:
    def test_a_product_is_that_of_the_probabilities(self):
        a, b = grid()
        p = a.sigmoid() * b.sigmoid()
        torch.testing.assert_close(product_logit(a, b).sigmoid(), p, rtol=1e-13, atol=0)
        torch.testing.assert_close(product_logit(a, b), p.log() - (-p).log1p(), rtol=1e-9, atol=1e-9)

    def test_a_quotient_is_that_of_the_probabilities_and_at_most_one(self):
        part, whole = grid()
        q = (part.sigmoid() / whole.sigmoid()).clamp(max=1)
        torch.testing.assert_close(quotient_logit(part, whole).sigmoid(), q, rtol=1e-12, atol=0)
        assert quotient_logit(part, whole).isfinite().all()

    def test_the_product_over_one_factor_is_the_other(self):
        a, b = (z[(z.abs() < 9)] for z in grid())
        a, b = a[: len(b)], b[: len(a)]
        torch.testing.assert_close(quotient_logit(product_logit(a, b), a), b, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_extremes_by_hand(self, dtype):
        # -log(e^-a + e^-b + e^(-a-b)): (100, 100) 100 - log 2; (-100, -100) -200, the last term; (100, -100) -100;
        # (0, 100) -log(1 + 2e^-100) = 0
        a = torch.tensor([100.0, -100.0, 100.0, 0.0], dtype=dtype)
        b = torch.tensor([100.0, -100.0, -100.0, 100.0], dtype=dtype)
        expected = torch.tensor([100 - math.log(2), -200.0, -100.0, 0.0], dtype=dtype)
        torch.testing.assert_close(product_logit(a, b), expected)
        # s(part) / s(whole): e^-200 / e^-100 = e^-100; e^-100 / 1; s(-100) / s(-100) = 1, its logit -log eps
        part = torch.tensor([-200.0, -100.0, -100.0], dtype=dtype)
        whole = torch.tensor([-100.0, 100.0, -100.0], dtype=dtype)
        expected = torch.tensor([-100.0, -100.0, -math.log(torch.finfo(dtype).eps)], dtype=dtype)
        torch.testing.assert_close(quotient_logit(part, whole), expected)

    def test_gradients(self):
        # d/da logit(s(a) s(b)) = (e^-a + e^(-a-b)) / (e^-a + e^-b + e^(-a-b)): 2/3 at a = b = 0, 1 at (-100, 100),
        # where the product is a itself, and 0 at (100, -100)
        a = torch.tensor([0.0, -100.0, 100.0], requires_grad=True)
        b = torch.tensor([0.0, 100.0, -100.0], requires_grad=True)
        product_logit(a, b).sum().backward()
        torch.testing.assert_close(a.grad, torch.tensor([2 / 3, 1.0, 0.0]))
        torch.testing.assert_close(b.grad, torch.tensor([2 / 3, 0.0, 1.0]))
        for function in (product_logit, quotient_logit):
            x, y = (torch.randn(20, dtype=torch.float64) + shift for shift in (-3, 3))
            assert torch.autograd.gradcheck(function, (x.requires_grad_(), y.requires_grad_()))
            extremes = torch.tensor([100.0, -100.0, 0.0], requires_grad=True)
            function(extremes.unsqueeze(0), extremes.unsqueeze(1)).sum().backward()
            assert extremes.grad.isfinite().all()

    def test_losses_of_rates_that_no_float_holds(self):
        # p = s(-100) s(-100) is about e^-200, 0 in float32; the loss of a positive is 200, of a negative 0
        z = product_logit(torch.tensor([-100.0]), torch.tensor([-100.0]))
        assert TASKS[2].compute_loss(z, torch.ones(1)).item() == pytest.approx(200)
        assert TASKS[2].compute_loss(z, torch.zeros(1)).item() == 0


class TestModel:
    def test_the_formula(self):
        model, x = make().double(), rows(dtype=torch.float64)
        v, p = model.encoder(x), {name: z.sigmoid() for name, z in model(x).items()}
        first, second = model.trunk.towers.layers
        for stage, name in enumerate(("click", "conversion")):
            h = (v @ first.weight[stage].T + first.bias[stage]).relu()
            h = (h @ second.weight[stage].T + second.bias[stage]).relu()
            z = h @ model.towers.out.weight[stage][0] + model.towers.out.bias[stage]
            torch.testing.assert_close(p[name], z.sigmoid(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(p["both"], p["click"] * p["conversion"], rtol=1e-12, atol=1e-12)

    def test_the_conversion_rate_learns_from_the_product_alone(self):
        model, x = make().train(), rows()
        TASKS[2].compute_loss(model(x, tasks=["both"])["both"], torch.ones(8)).backward()
        assert model.trunk.towers.layers[0].weight[1].grad.any()
        assert model.towers.out.weight[1].grad.any()

    def test_sizes_and_default_options(self):
        model = create_model("esmm_table", tasks=TASKS, columns=COLUMNS)
        assert [tuple(layer.weight[0].shape) for layer in model.trunk.towers.layers] == [(256, 12), (128, 256)]
        assert model.moe_layers == {}
        assert model.config["args"]["roles"] == ["click", "conversion", "both"]

    def test_roles_by_name_in_any_order(self):
        torch.manual_seed(0)
        model = make([TASKS[2], TASKS[0], TASKS[1]], roles=["click", "conversion", "both"])
        p = {name: z.sigmoid() for name, z in model(rows()).items()}
        assert list(p) == ["both", "click", "conversion"]
        torch.testing.assert_close(p["both"], p["click"] * p["conversion"])
        # without a task for the conversion rate, the product still has both towers
        assert list(make([TASKS[0], TASKS[2]], roles=["click", "conversion", "both"])(rows())) == ["click", "both"]

    def test_bfloat16_towers_give_float32_logits(self):
        with torch.autocast("cpu", torch.bfloat16):
            assert {p.dtype for p in make()(rows()).values()} == {torch.float32}

    @pytest.mark.parametrize(
        "tasks, options, message",
        [
            (TASKS[:2], {}, r"^tasks: got 2 \(click, conversion\), expected three in this order"),
            (TASKS, {"roles": ["click", "both"]}, r"^roles: got \['click', 'both'\], expected three"),
            (TASKS, {"roles": ["clik", "conversion", "both"]}, "^tasks: 'click' has no role; did you mean 'clik'"),
            (TASKS[:1], {"roles": ["click", "both", "both"]}, "^roles: .*names a task twice"),
            ((*TASKS[:2], Task.regression("both")), {}, "^tasks: 'both' is of kind regression"),
            ((TASKS[0], Task.binary("conversion"), TASKS[2]), {}, "^tasks: 'conversion' has weight 1, .*weight=0"),
            (TASKS, {"experts": -1}, "^experts: got -1"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, tasks, options, message):
        with pytest.raises(ValueError, match=message):
            make(tasks, **options)

    def test_a_loss_of_its_own_is_asked_for(self):
        make((TASKS[0], Task.binary("conversion"), TASKS[2]), own_loss=True)


@pytest.mark.parametrize("name", ["esmm_table", "aitm_table"])
def test_trains_on_the_entire_space_log(name, tmp_path):
    data = EntireSpaceLog(num_users=40, num_items=20, num_train=600, num_val=200, num_test=50, click_rate=0.3)
    torch.manual_seed(0)
    model = create_model(name, tasks=data.task_list(), **data.model_args(), tower=[8])
    config = TrainerConfig(
        out=str(tmp_path), steps=60, batch_size=64, lr=0.02, warmup=1, log_every=60, eval_every=60, progress=False
    )
    Trainer(model, data, config).fit()
    train, val = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert all(0 < train["loss"][task.name] < 5 for task in data.task_list())
    assert set(val["metrics"]) == {"click", "conversion", "click_and_conversion"}
    assert val["metrics"]["click"]["auc"] > 0.55  # seen to be about 0.7
    assert ("calibrator" in train["regularizer"]) == (name == "aitm_table")
