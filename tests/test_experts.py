"""ExpertBank: what it computes from a Routing, how it starts, what it refuses."""

import math

import pytest
import torch

from moe_mtl.experts import ExpertBank
from moe_mtl.routing import Routing


def route(m, e, k, *, valid=None, dtype=torch.float32):
    """A top-k routing with random scores."""
    logits = torch.randn(m, e)
    weights, indices = logits.softmax(-1).topk(k)
    return Routing(weights.to(dtype), indices, logits, 0, valid)


def plain_expert(bank, e):
    """Expert e of a bank as torch's own layers."""
    first, second = torch.nn.Linear(bank.dim, bank.hidden), torch.nn.Linear(bank.hidden, bank.out_dim)
    with torch.no_grad():
        for layer, w, b in ((first, bank.w1, bank.b1), (second, bank.w2, bank.b2)):
            layer.weight.copy_(w[e])
            layer.bias.copy_(b[e])
    return torch.nn.Sequential(first, torch.nn.GELU(), second)


def test_is_the_weighted_sum_of_its_experts():
    bank, x = ExpertBank(5, 8, 12, out_dim=6), torch.randn(21, 8)
    routing = route(21, 5, 2)
    every = torch.stack([plain_expert(bank, e)(x) for e in range(5)], 1)  # [m, e, o]
    expected = (routing.dense_weights()[..., None] * every).sum(1)
    torch.testing.assert_close(bank(x, routing), expected)
    assert torch.equal(bank(x, routing), bank(x, routing, backend="cpu"))
    torch.testing.assert_close(bank(x, routing, backend="reference"), expected)


def test_dense_routing_uses_every_expert():
    bank, x = ExpertBank(5, 8, 12), torch.randn(21, 8)
    weights = torch.rand(21, 5)
    every = torch.stack([plain_expert(bank, e)(x) for e in range(5)], 1)
    got = bank(x, Routing(weights, None, torch.randn(21, 5), 0))
    torch.testing.assert_close(got, (weights[..., None] * every).sum(1))


@pytest.mark.parametrize("dense", [False, True])
def test_padding_gives_zero_and_takes_no_gradient(dense):
    bank, valid = ExpertBank(5, 8, 12), torch.arange(21) % 3 > 0
    x = torch.randn(21, 8, requires_grad=True)
    routing = route(21, 5, 5 if dense else 2, valid=valid)
    if dense:
        routing = Routing(routing.dense_weights(), None, routing.logits, 0, valid)
    y = bank(x, routing)
    cotangent = torch.randn(21, 8)
    y.backward(cotangent)
    assert y[~valid].eq(0).all() and x.grad[~valid].eq(0).all() and x.grad[valid].ne(0).any(1).all()
    got = [p.grad for p in bank.parameters()]
    bank.zero_grad()
    kept = Routing(routing.weights[valid], None if dense else routing.indices[valid], routing.logits[valid], 0)
    alone = bank(x[valid], kept)
    alone.backward(cotangent[valid])
    torch.testing.assert_close(y[valid], alone)
    for a, p in zip(got, bank.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [2, 5, None])
def test_without_gradient_it_computes_the_same(k, dtype):
    """Whatever stands in padding rows; weights in the bank's precision, gates in any."""
    bank, valid = ExpertBank(5, 16, 24, glu=True, activation="silu").to(dtype), torch.arange(21) % 3 > 0
    x, tolerance = torch.randn(21, 16, dtype=dtype), {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    x[~valid] = torch.nan
    routing = route(21, 5, k or 5, valid=valid, dtype=dtype)
    if k is None:
        routing = Routing(routing.dense_weights(), None, routing.logits, 0, valid)
    expected = bank(x, routing)
    with torch.no_grad():
        y = bank(x, routing)
    assert expected.requires_grad and y.dtype == dtype and y[~valid].eq(0).all() and y[valid].ne(0).any(1).all()
    torch.testing.assert_close(y, expected, **tolerance)


@pytest.mark.parametrize("k", [1, 4])
def test_every_parameter_and_the_router_get_a_gradient(k):
    bank, x = ExpertBank(4, 8, 12), torch.randn(64, 8)
    logits = torch.randn(64, 4, requires_grad=True)
    weights, indices = logits.softmax(-1).topk(k)
    bank(x, Routing(weights, indices, logits, 0)).backward(torch.randn(64, 8))
    assert indices.unique().numel() == 4
    for p in (*bank.parameters(), logits):
        assert p.grad.flatten(1).ne(0).any(1).all()


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_shapes_and_start(glu, bias):
    bank = ExpertBank(3, 50, 70, out_dim=20, glu=glu, bias=bias)
    shapes = {"w1": (3, 70 * (1 + glu), 50), "w2": (3, 20, 70)}
    if bias:
        shapes |= {"b1": (3, 70 * (1 + glu)), "b2": (3, 20)}
    assert {n: tuple(p.shape) for n, p in bank.named_parameters()} == shapes
    # nn.Linear: uniform in +-1/sqrt(fan in), whose standard deviation is bound / sqrt(3)
    for name, fan_in in (("w1", 50), ("w2", 70)):
        w, bound = getattr(bank, name), 1 / math.sqrt(fan_in)
        assert w.abs().max() <= bound and w.abs().max() > 0.95 * bound
        assert w.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    if bias:
        assert 0 < bank.b1.abs().max() <= 1 / math.sqrt(50) and 0 < bank.b2.abs().max() <= 1 / math.sqrt(70)


def test_first_expert_starts_as_linear_layers_do():
    torch.manual_seed(3)
    first, second = torch.nn.Linear(8, 12), torch.nn.Linear(12, 6)
    torch.manual_seed(3)
    bank = ExpertBank(2, 8, 12, out_dim=6)
    for ours, theirs in (
        (bank.w1, first.weight),
        (bank.b1, first.bias),
        (bank.w2, second.weight),
        (bank.b2, second.bias),
    ):
        torch.testing.assert_close(ours[0], theirs)
    assert not torch.equal(bank.w1[0], bank.w1[1])


def test_low_precision_gates_become_float32():
    bank, x = ExpertBank(5, 8, 12).bfloat16(), torch.randn(21, 8).bfloat16()
    routing, cotangent = route(21, 5, 2), torch.randn(21, 8).bfloat16()
    low = routing.weights.bfloat16().requires_grad_()
    high = low.detach().float().requires_grad_()
    results = []
    for weights in (low, high):
        y = bank(x, Routing(weights, routing.indices, routing.logits, 0))
        y.backward(cotangent)
        results.append(y)
    assert results[0].dtype == torch.bfloat16 and torch.equal(*results)
    assert torch.equal(low.grad, high.grad.bfloat16())


def test_autocast_and_state_dict():
    bank, x = ExpertBank(5, 8, 12, activation="silu", glu=True), torch.randn(21, 8)
    routing = route(21, 5, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert bank(x, routing).dtype == torch.bfloat16
    other = ExpertBank(5, 8, 12, activation="silu", glu=True)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other(x, routing), bank(x, routing))
    assert "activation='silu', glu=True, bias=True" in repr(bank)


def test_exports_with_its_routing():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.bank = torch.nn.Linear(8, 5), ExpertBank(5, 8, 12)

        def forward(self, x):
            logits = self.router(x)
            weights, indices = logits.softmax(-1).topk(2)
            return self.bank(x, Routing(weights, indices, logits, 0))

    layer = Layer()
    with torch.no_grad():
        shapes = ({0: torch.export.Dim("m", min=1)},)
        program = torch.export.export(layer, (torch.randn(37, 8),), dynamic_shapes=shapes)
        assert not [node for node in program.graph.nodes if "moe_mtl" in str(node.target)]  # plain torch alone
        for m in (1, 50):
            x = torch.randn(m, 8)
            torch.testing.assert_close(program.module()(x), layer(x))


def test_bad_arguments_are_named():
    for name in ("num_experts", "dim", "hidden"):
        with pytest.raises(ValueError, match=f"{name}: got 0"):
            ExpertBank(**({"num_experts": 2, "dim": 3, "hidden": 4} | {name: 0}))
    with pytest.raises(ValueError, match=r"activation: .*did you mean 'silu'"):
        ExpertBank(2, 3, 4, activation="silo")
    bank = ExpertBank(5, 8, 12)
    for routing in (route(21, 4, 2), route(20, 5, 2)):
        with pytest.raises(ValueError, match=r"routing: got 2[01] tokens over [45] experts, expected 21 tokens over 5"):
            bank(torch.randn(21, 8), routing)
