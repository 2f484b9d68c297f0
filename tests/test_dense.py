"""The dense MLP that a mixture of all experts is, against its definition."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from moe_mtl.kernels import reference
from moe_mtl.kernels.dense import dense_mlp
from moe_mtl.testing import assert_matches

D, H, OUT, M = 16, 24, 8, 45


def leaves_of(e, m=M, *, glu=False, bias=True, dtype=torch.float32):
    """[x, w1, b1, w2, b2, gates], gates at least float32."""
    wide = H * (1 + glu)
    shapes = (m, D), (e, wide, D), (e, wide) if bias else None, (e, OUT, H), (e, OUT) if bias else None
    leaves = [None if s is None else (torch.randn(s) / s[-1] ** 0.5).to(dtype).requires_grad_() for s in shapes]
    return [*leaves, torch.rand(m, e, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "form", [("gelu", False, True), ("silu", True, True), ("relu", False, False), ("relu", True, True)]
)
@pytest.mark.parametrize(("m", "e"), [(9, 5), (23, 4), (24, 4), (97, 1)])  # fewer tokens than hidden units, and more
def test_the_dense_mlp_matches_the_oracle(dtype, form, m, e):
    activation, glu, bias = form
    options = {"activation": activation, "glu": glu}
    every = torch.arange(e).expand(m, -1)

    def definition(*leaves):
        return reference.moe_mlp(*leaves, every, **options)

    pools = [], [], []
    for _ in range(16):
        leaves, cotangent = leaves_of(e, m, glu=glu, bias=bias, dtype=dtype), torch.randn(m, OUT).to(dtype)
        exact = [t if t is None else t.detach().double().requires_grad_() for t in leaves]
        ours = lambda *ts: dense_mlp(*ts, **options)  # noqa: E731
        for pool, function, ts in zip(pools, (ours, definition, definition), (leaves, exact, leaves), strict=True):
            y = function(*ts)
            grads = torch.autograd.grad(y, [t for t in ts if t is not None], cotangent.to(y.dtype))
            with torch.no_grad():
                pool.append([function(*ts), y, *grads])
    for i in range(len(pools[0][0])):
        assert_matches(*(torch.stack([draw[i] for draw in pool]) for pool in pools), str(i))


@pytest.mark.parametrize("which", [(0,), (1, 2), (3, 4), (2,), (4,), (5,), (0, 5), (1, 3)])
@pytest.mark.parametrize("glu", [False, True])
def test_only_the_needed_gradients(which, glu):
    leaves, cotangent = leaves_of(4, glu=glu), torch.randn(M, OUT)
    every = torch.autograd.grad(dense_mlp(*leaves, glu=glu), leaves, cotangent)
    some = [t.detach().requires_grad_(i in which) for i, t in enumerate(leaves)]
    dense_mlp(*some, glu=glu).backward(cotangent)
    for i, t in enumerate(some):
        assert (t.grad is not None) == (i in which)
        if i in which:
            torch.testing.assert_close(t.grad, every[i])


def test_it_keeps_the_tokens_the_pre_activation_and_what_was_given():
    leaves, kept = leaves_of(4, glu=True), []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dense_mlp(*leaves, glu=True)
    given = {t.data_ptr() for t in leaves}
    assert [t.numel() for t in kept if t.data_ptr() not in given] == [M * 4 * 2 * H]
    with torch.no_grad(), saved_tensors_hooks(lambda t: pytest.fail("saved"), lambda t: t):
        dense_mlp(*leaves, glu=True)


def test_no_tokens_and_strange_strides():
    leaves = leaves_of(4, 0)
    y = dense_mlp(*leaves)
    grads = torch.autograd.grad(y, leaves, torch.randn(0, OUT))
    assert y.shape == (0, OUT) and all(g.eq(0).all() and g.shape == t.shape for g, t in zip(grads, leaves, strict=True))
    plain = leaves_of(4)
    strided = [t.detach().mT.contiguous().mT.requires_grad_() for t in plain]
    assert not any(t.is_contiguous() for t in strided)
    cotangent = torch.randn(OUT).expand(M, OUT)
    for a, b in zip(
        *([y, *torch.autograd.grad(y, ts, cotangent)] for ts in (plain, strided) for y in [dense_mlp(*ts)]), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_autocast_leaves_the_gates_alone():
    leaves, cotangent = leaves_of(4), torch.randn(M, OUT).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = dense_mlp(*leaves)
        grads = torch.autograd.grad(y, leaves, cotangent)
    low = [t.detach().bfloat16().requires_grad_() for t in leaves[:5]]
    gates = leaves[5].detach().requires_grad_()
    expected = dense_mlp(*low, gates)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    for a, b in zip(grads, torch.autograd.grad(expected, [*low, gates], cotangent), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())


def test_a_second_derivative_is_refused():
    leaves = leaves_of(4)
    (dx,) = torch.autograd.grad(dense_mlp(*leaves).square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dx.sum().backward()


def test_function_transforms_see_plain_torch():
    x, *rest = (t.detach() for t in leaves_of(4))
    jacobian = torch.func.jacrev(lambda row: dense_mlp(row[None], *rest[:-1], rest[-1][:1])[0])(x[0])
    expected = torch.autograd.functional.jacobian(
        lambda row: reference.moe_mlp(row[None], *rest[:-1], rest[-1][:1], torch.arange(4)[None])[0], x[0]
    )
    torch.testing.assert_close(jacobian, expected)


def test_bad_arguments_of_the_dense_mlp_are_named():
    good = dict(zip(("x", "w1", "b1", "w2", "b2", "gates"), (t.detach() for t in leaves_of(4)), strict=True))
    for name, value in {
        "x": torch.randn(M, D + 1),
        "w1": torch.randn(4, H + 1, D),
        "w2": torch.randn(3, OUT, H),
        "b1": torch.randn(4, D),
        "b2": torch.randn(4, H),
        "gates": torch.rand(M, 3),
    }.items():
        with pytest.raises(ValueError, match=rf"^(x, |w1, )?{name}(, w\d)?: got .*expected"):
            dense_mlp(**{**good, name: value})
    with pytest.raises(ValueError, match=r"^gates: got .*int64"):
        dense_mlp(**{**good, "gates": torch.ones(M, 4, dtype=torch.int64)})
    for name in ("w1", "b1", "w2", "b2"):
        with pytest.raises(ValueError, match=f"^{name}: got torch.float64 on cpu, but x is torch.float32"):
            dense_mlp(**{**good, name: good[name].double()})
    with pytest.raises(ValueError, match=r"activation: .*did you mean 'silu'"):
        dense_mlp(**good, activation="silo")
    with pytest.raises(ValueError, match=r"w1, w2: .*\(glu\)"):
        dense_mlp(**good, glu=True)
