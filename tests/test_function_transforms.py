"""The expert ops under torch.func and forward mode: right, or refused; never a tangent of zeros."""

import pytest
import torch
from torch.autograd import forward_ad

from moe_mtl.experts import ExpertBank
from moe_mtl.kernels import ops
from moe_mtl.routing import Routing
from tests.kernel_cases import make


@pytest.fixture
def call():
    """The op of its first argument, tokens and ids; tokens; a tangent."""
    leaves, idx = make(8, 16, 24, 16, 4, 2, dtype=torch.float64)
    x, *rest = (t.detach() for t in leaves)

    def run(x, backend="auto", way="routed"):
        if way == "planned":
            return ops.moe_mlp(x, *rest, ops.plan_routing(idx, 4), backend=backend)
        if way == "linear":
            return ops.grouped_linear(x, rest[0], rest[1], idx[:, 0], backend=backend)
        return ops.routed_mlp(x, *rest, idx, backend=backend)

    return run, x, torch.randn_like(x)


WAYS = pytest.mark.parametrize("way", ["routed", "planned", "linear"])


@WAYS
def test_jvp_is_the_derivative_along_the_tangent(call, way):
    run, x, tangent = call
    step = 1e-6
    expected = (run(x + step * tangent, way=way) - run(x - step * tangent, way=way)) / (2 * step)
    _, actual = torch.func.jvp(lambda x: run(x, way=way), (x,), (tangent,))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)
    with forward_ad.dual_level():
        dual = run(forward_ad.make_dual(x, tangent), way=way)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, actual)


@WAYS
def test_grad_and_vjp_are_those_of_autograd(call, way):
    run, x, _ = call
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(run(leaf, way=way).square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: run(x, way=way).square().sum())(x), expected)
    y, back = torch.func.vjp(lambda x: run(x, way=way), x)
    torch.testing.assert_close(back(2 * y)[0], expected)


@WAYS
def test_a_backend_without_formulas_is_refused(call, way):
    run, x, tangent = call
    with pytest.raises(ValueError, match=r"backend: 'cpu' has no formulas for torch.func.grad.*'auto' or 'reference'"):
        torch.func.jvp(lambda x: run(x, "cpu", way), (x,), (tangent,))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_an_ensemble_of_banks_trains_under_vmap():
    """What functorch maps over does not say that it requires a gradient."""
    banks = [ExpertBank(4, 8, 16) for _ in range(2)]
    x, logits = torch.randn(6, 8), torch.randn(6, 4)
    weights, indices = logits.softmax(-1).topk(2)
    routing = Routing(weights, indices, logits, task=0)
    parameters, buffers = torch.func.stack_module_state(banks)
    ys = torch.vmap(lambda p, b: torch.func.functional_call(banks[0], (p, b), (x, routing)))(parameters, buffers)
    ys.square().sum().backward()
    for i, bank in enumerate(banks):
        y = bank(x, routing)
        torch.testing.assert_close(ys[i], y)
        y.square().sum().backward()
        for name, p in bank.named_parameters():
            torch.testing.assert_close(parameters[name].grad[i], p.grad)
