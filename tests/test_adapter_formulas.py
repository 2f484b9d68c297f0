"""What adapters compute, against hand-computed values and loops over the definitions."""

import itertools
import math

import pytest
import torch
from torch import nn

from moe_mtl import create_model
from moe_mtl.adapters._method import ADAPTER, AdapterContext
from moe_mtl.adapters.adapter_model import AlignedPredictions
from moe_mtl.adapters.alignment import BANDWIDTHS, GaussianKernels, mmd, symmetric_kl
from moe_mtl.adapters.lora import Lora
from moe_mtl.adapters.poly import Poly, TaskRouter
from moe_mtl.adapters.scalearn import ScaLearn, ScaledAdapters
from moe_mtl.tasks import Task
from tests.test_adapters import TASKS, make
from tests.test_encoders import texts


def adapted(method, tasks=("a", "b"), d_in=4, d_out=6):
    """A linear map with adapters whose values are random, and its context."""
    torch.manual_seed(0)
    holder, context = nn.Module(), AdapterContext()
    holder.map = nn.Linear(d_in, d_out)
    method.inject(holder, ["map"], tasks, context)
    with torch.no_grad():
        for parameter in holder.map.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return holder.map.double().eval(), context


# ---- what is added --------------------------------------------------------------------------------------------------


def test_lora_by_definition():
    layer, _ = adapted(Lora(2, 6.0))
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    assert a.shape == (2, 4) and b.shape == (6, 2)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 6 / 2 * (x @ a.T) @ b.T)
    torch.testing.assert_close(Lora(2, 6.0).delta(layer, "a"), 3 * b @ a)


@pytest.mark.parametrize("heads", [1, 2])
def test_polytropon_and_multi_head_routing_by_definition(heads):
    method = Poly(rank=3, skills=2, heads=heads)
    layer, context = adapted(method)
    x = torch.randn(4, 5, 4, dtype=torch.float64)
    skills_a, skills_b = layer.poly_lora_A[ADAPTER], layer.poly_lora_B[ADAPTER]
    assert skills_a.shape == (heads, 2, 4 // heads, 3) and skills_b.shape == (heads, 2, 3, 6 // heads)
    expected = {}
    for task in ("a", "b"):
        gates = layer.poly_router[ADAPTER].logits(task).sigmoid().view(heads, 2)
        a, b = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(3, 6, dtype=torch.float64)
        for h, s in itertools.product(range(heads), range(2)):
            weight = gates[h, s] / gates[h].sum()
            a[h * 4 // heads : (h + 1) * 4 // heads] += weight * skills_a[h, s]
            b[:, h * 6 // heads : (h + 1) * 6 // heads] += weight * skills_b[h, s]
        expected[task] = layer.base_layer(x) + (x @ a) @ b / 3
        torch.testing.assert_close(method.delta(layer, task), (a @ b).T / 3)
    with context.open(1):
        torch.testing.assert_close(layer(x), expected["b"])
    with context.open(torch.tensor([1, 0, 0, 1])):
        found = layer(x)
    torch.testing.assert_close(found[[0, 3]], expected["b"][[0, 3]])
    torch.testing.assert_close(found[[1, 2]], expected["a"][[1, 2]])
    with context.open((1, 0)):
        torch.testing.assert_close(layer(x)[:2], expected["b"][:2])
    with pytest.raises(RuntimeError, match="an adapted map has no task"):
        layer(x)


def test_routing_weights_by_hand():
    router = TaskRouter(["a", "b"], heads=2, skills=2)
    assert all(p.abs().max() <= 1e-3 and p.abs().max() > 0 for p in router.parameters())
    with torch.no_grad():
        # sigmoid: 1/2 and 3/4, 1/5 and 1/5
        router.logits("b").copy_(torch.tensor([0.0, math.log(3.0), -math.log(4.0), -math.log(4.0)]))
    expected = torch.tensor([[0.4, 0.6], [0.5, 0.5]])
    torch.testing.assert_close(router.weights("b"), expected)
    found = router.eval()(torch.tensor([1, 0, 1]), torch.empty(0))
    assert found.shape == (3, 2, 2)
    torch.testing.assert_close(found[[0, 2]], expected.expand(2, 2, 2))


def test_routing_is_a_relaxed_bernoulli_in_training_per_sample():
    torch.manual_seed(0)
    router = TaskRouter(["a"], heads=1, skills=2).train()
    with torch.no_grad():
        router.logits("a").copy_(torch.tensor([2.0, -2.0]))
    found = router(torch.zeros(4000, dtype=torch.int64), torch.empty(0))[:, 0]
    torch.testing.assert_close(found.sum(dim=1), torch.ones(4000))
    assert found[:, 0].std() > 0.1 and (found[0] - found[1]).abs().max() > 0
    # a gate is the sigmoid of its logit plus logistic noise; the weights' mean, from many draws of our own
    u = torch.rand(400_000, 2).clamp(1e-6, 1 - 1e-6)
    gates = (torch.tensor([2.0, -2.0]) + u.log() - (-u).log1p()).sigmoid()
    expected = (gates / gates.sum(dim=1, keepdim=True)).mean(dim=0)
    torch.testing.assert_close(found.mean(dim=0), expected, atol=0.015, rtol=0)
    found[:, 0].sum().backward()
    assert router.logits("a").grad.abs().min() > 0


@pytest.mark.parametrize("uniform", [False, True])
def test_scalearn_by_definition(uniform):
    x = torch.randn(4, 5, 4, dtype=torch.float64)
    layer, context = adapted(ScaLearn(2, 6.0), ("a", "b"))
    for ids, task in (((0,), "a"), ((1,), "b")):
        a, b = getattr(layer, f"a_{task}"), getattr(layer, f"b_{task}")
        with context.open(ids[0]):
            torch.testing.assert_close(layer(x), layer.base_layer(x) + 3 * (x @ a.T) @ b.T)
        torch.testing.assert_close(layer.delta(task), 3 * b @ a)
    with context.open(0):
        first = layer(x)

    method = ScaLearn(2, 6.0, sources=["a", "b", "c"], uniform=uniform)
    layer, context = adapted(method, ("t", "u"))
    expected = {}
    for task in ("t", "u"):
        omega = getattr(layer, f"omega_{task}")
        assert omega.shape == (3, 1 if uniform else 6)
        expected[task] = layer.base_layer(x)
        for s, source in enumerate("abc"):
            a, b = getattr(layer, f"a_{source}"), getattr(layer, f"b_{source}")
            expected[task] = expected[task] + omega[s] * (3 * (x @ a.T) @ b.T)
        torch.testing.assert_close(x @ layer.delta(task).T + layer.base_layer(x), expected[task])
    with context.open((1, 0)):
        found = layer(x)
    torch.testing.assert_close(found[:2], expected["u"][:2])
    torch.testing.assert_close(found[2:], expected["t"][2:])
    with context.open(torch.tensor([0, 1, 1, 0])):
        found = layer(x)
    torch.testing.assert_close(found[[1, 2]], expected["u"][[1, 2]])
    assert (first - expected["t"]).abs().max() > 1e-3


def test_scales_start_around_two_over_the_sources_and_drop_out_in_training():
    base = nn.Linear(8, 4000)
    layer = ScaledAdapters(base, ["a", "b", "c", "d"], 2, 1.0, AdapterContext(), ["t"], False, 0.5)
    omega = layer.omega_t
    assert omega.mean().item() == pytest.approx(0.5, abs=1e-4) and omega.std().item() == pytest.approx(1e-3, rel=0.05)
    with torch.no_grad():
        for source in "abcd":
            getattr(layer, f"b_{source}").fill_(1.0)
    with layer.context.open(0):
        x = torch.ones(1, 1, 8)
        runs = [layer.train()(x) for _ in range(2)]
        still = [layer.eval()(x) for _ in range(2)]
    assert (runs[0] - runs[1]).abs().max() > 1e-3 and torch.equal(*still)
    torch.testing.assert_close(runs[0].mean(), still[0].mean(), rtol=0.2, atol=0.02)


# ---- alignment ------------------------------------------------------------------------------------------------------


def slow_mmd(x, ids, valid):
    """By loops over maps, pairs of tasks, positions and pairs of texts."""
    layers, pairs = [], list(itertools.combinations(ids.unique().tolist(), 2))
    for one in x:
        of_pairs = []
        for t, u in pairs:
            found = []
            for n in range(x.shape[2]):
                rows = {k: [i for i in range(len(ids)) if ids[i] == k and valid[i, n]] for k in (t, u)}
                if not rows[t] or not rows[u]:
                    continue

                def mean(first, second, n=n, one=one):
                    total = sum(
                        math.exp(-float((one[i, n] - one[j, n]).square().sum()) / (2 * c))
                        for i in first
                        for j in second
                        for c in BANDWIDTHS
                    )
                    return total / (len(first) * len(second))

                found.append(mean(rows[t], rows[t]) + mean(rows[u], rows[u]) - 2 * mean(rows[t], rows[u]))
            if found:
                of_pairs.append(sum(found) / len(found))
        layers.append(sum(of_pairs) / len(of_pairs))
    return sum(layers) / len(layers)


def case(seed=0):
    torch.manual_seed(seed)
    ids = torch.tensor([0, 2, 0, 3, 2, 2])
    valid = torch.arange(4) < torch.tensor([4, 2, 3, 1, 4, 2]).unsqueeze(1)
    return torch.randn(3, 6, 4, 2, dtype=torch.float64), ids, valid


def test_mmd_by_hand():
    assert len(BANDWIDTHS) == 19 and min(BANDWIDTHS) == 1e-6 and max(BANDWIDTHS) == 1e6
    x = torch.tensor([0.0, 2.0]).view(1, 2, 1, 1).double()
    valid = torch.ones(2, 1, dtype=torch.bool)
    expected = 2 * 19 - 2 * sum(math.exp(-4 / (2 * c)) for c in BANDWIDTHS)
    assert mmd(x, torch.tensor([0, 1]), valid).item() == pytest.approx(expected, rel=1e-12)


def test_mmd_by_definition_and_its_gradient():
    x, ids, valid = case()
    assert mmd(x, ids, valid).item() == pytest.approx(slow_mmd(x, ids, valid), rel=1e-9)
    small = 0.3 * x[:1]
    torch.autograd.gradcheck(lambda y: mmd(y, ids, valid), small.clone().requires_grad_(), eps=1e-8, atol=1e-3)
    square = torch.rand(5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(GaussianKernels.apply, square, eps=1e-9, atol=1e-3, rtol=1e-3)


def test_kl_by_hand():
    # a: -1 and 1, mean 0, variance 2; b: 1 and 5, mean 3, variance 8
    x = torch.tensor([-1.0, 1.0, 1.0, 5.0]).view(1, 2, 2, 1).double()
    valid = torch.ones(2, 2, dtype=torch.bool)
    p_q = 0.5 * (math.log(8 / 2) + (2 + 9) / 8 - 1)
    q_p = 0.5 * (math.log(2 / 8) + (8 + 9) / 2 - 1)
    found = symmetric_kl(x, torch.tensor([0, 1]), valid)
    assert found.item() == pytest.approx((p_q + q_p) / 2, rel=1e-6)
    # a dimension of its own adds; a map of its own averages
    doubled = symmetric_kl(x.expand(1, 2, 2, 2), torch.tensor([0, 1]), valid)
    assert doubled.item() == pytest.approx(p_q + q_p, rel=1e-6)
    assert symmetric_kl(torch.cat([x, x]), torch.tensor([0, 1]), valid).item() == pytest.approx(
        (p_q + q_p) / 2, rel=1e-6
    )


@pytest.mark.parametrize("measure", [mmd, symmetric_kl])
def test_padding_counts_for_nothing_and_one_task_is_exactly_zero(measure):
    x, ids, valid = case()
    expected = measure(x, ids, valid)
    assert expected > 0
    changed = x.masked_fill(~valid.unsqueeze(-1), 1e3)
    torch.testing.assert_close(measure(changed, ids, valid), expected, rtol=1e-9, atol=1e-9)
    assert measure(x, torch.full((6,), 2), valid).item() == 0.0
    same = x[:, [0, 0, 0, 0, 0, 0]]
    whole = torch.ones_like(valid)
    assert measure(same, torch.tensor([0, 1, 0, 1, 0, 1]), whole).abs() < 1e-12
    order = torch.tensor([5, 3, 1, 0, 2, 4])
    torch.testing.assert_close(measure(x[:, order], ids[order], valid[order]), expected)


def test_texts_that_share_no_position_are_not_aligned():
    x = torch.randn(1, 2, 4, 2)
    valid = torch.tensor([[True, True, False, False], [False, False, True, True]])
    assert mmd(x, torch.tensor([0, 1]), valid).item() == 0.0


@pytest.mark.parametrize("kind, measure", [("mmd", mmd), ("kl", symmetric_kl)])
def test_a_model_aligns_what_its_adapters_saw(kind, measure):
    options = {"alignment": 0.5, "alignment_kind": kind, "dropout": 0.0, "targets": ["query", "output.dense"]}
    model, x = make("lora", **options), texts(6, 13)
    ids = torch.tensor([0, 1, 2, 0, 1, 1])
    seen = {}
    for name, layer in model.adapted.items():
        layer.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0].detach()}))
    for module in model.modules():
        module.training = False
    model.training = True  # no dropout in the encoder, yet a model in training
    predictions = model(x, tasks=ids)
    assert isinstance(predictions, AlignedPredictions) and predictions.keys() == {t.name for t in TASKS}
    found = torch.stack([seen[name] @ layer.lora_A[ADAPTER].weight.T for name, layer in model.adapted.items()])
    expected = 0.5 * measure(found, ids, x["attention_mask"].bool())
    own = model.auxiliary_losses(predictions)
    torch.testing.assert_close(own["alignment"], expected, rtol=1e-4, atol=1e-5)
    assert expected > 0 and model.context.activations is None
    assert not any(isinstance(v, torch.Tensor) for m in model.modules() for n, v in vars(m).items() if n[0] != "_")
    same = model(x, tasks=torch.ones(6, dtype=torch.int64))
    assert model.auxiliary_losses(same)["alignment"].item() == 0.0
    assert model.auxiliary_losses(model(x, tasks=["intent", "spam"]))["alignment"].item() == 0.0
    routed = model(x, tasks=ids, return_routing=True)
    assert isinstance(routed[0], AlignedPredictions) and routed[1] == {}
    assert type(model.eval()(x, tasks=ids)) is dict
    unmasked = {"input_ids": x["input_ids"]}
    model.training = True
    assert model.auxiliary_losses(model(unmasked, tasks=ids))["alignment"] > 0


def test_without_alignment_there_is_no_loss():
    model = create_model("text_lora", tasks=[Task.binary("a")], encoder=make("lora").config["args"]["encoder"])
    predictions = model.train()(texts(), tasks=torch.zeros(3, dtype=torch.int64))
    assert type(predictions) is dict and model.auxiliary_losses(predictions) == {}
