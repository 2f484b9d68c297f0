"""The expert ops against their definition, under the tolerance rule, in every gradient and on every path."""

import contextlib
import io
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moe_mtl.kernels import configs, cpu, dispatch, grouped_linear, inference, ops, reference
from moe_mtl.kernels import plan as tables
from moe_mtl.testing import assert_matches
from tests.kernel_cases import differentiate, make

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PATHS = {"segments": -(10**9), "padded": 10**9}


@pytest.fixture(params=[*PATHS, "grouped_mm"])
def path(request, monkeypatch):
    """Makes "auto" one of the two CPU paths, or torch's grouped product wherever that can run."""
    if request.param in PATHS:
        monkeypatch.setattr(cpu, "PADDED_ROWS", PATHS[request.param])
        return request.param

    def forced(backend, x, *widths):
        with contextlib.suppress(ValueError):
            return dispatch.resolve(request.param if backend == "auto" else backend, x, *widths)
        return dispatch.resolve(backend, x, *widths)

    for module in (ops, grouped_linear):
        monkeypatch.setattr(module, "resolve", forced)
    return request.param


def check_moe_mlp(leaves, idx, **options):
    """Result and all gradients under the tolerance rule.

    Several draws of tokens, gates and cotangents are pooled: the largest of few rounding errors says little.
    """
    m, o, e = leaves[0].shape[0], leaves[3].shape[1], leaves[1].shape[0]

    def ours(ts):
        return ops.moe_mlp(*ts, ops.plan_routing(idx, e), **options)

    def definition(ts):
        return reference.moe_mlp(*ts, idx, **options)

    pools = [], [], []
    inputs = leaves
    for draw in range(16 if m < 16 else 4):
        if draw:
            fresh = {0: torch.randn_like(leaves[0]), 5: torch.rand_like(leaves[5])}
            inputs = [fresh[i].requires_grad_() if i in fresh else t for i, t in enumerate(leaves)]
        exact = [t if t is None else t.detach().double().requires_grad_() for t in inputs]
        cotangent = torch.randn(m, o).to(leaves[0].dtype)  # rounded before anyone sees it
        for pool, function, ts in zip(pools, (ours, definition, definition), (inputs, exact, inputs), strict=True):
            pool.append(differentiate(function, ts, cotangent))
    names = ["y", *(n for n, t in zip(("x", "w1", "b1", "w2", "b2", "gates"), leaves, strict=True) if t is not None)]
    for i, name in enumerate(names):
        assert_matches(*(torch.stack([result[i] for result in pool]) for pool in pools), name)
    return dict(zip(names, pools[0][0], strict=True))


# --- the tolerance rule and the oracle --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_rule_accepts_another_order_and_rejects_wrong_values(dtype):
    a, b = torch.randn(37, 64, dtype=torch.float64).to(dtype), torch.randn(64, 29, dtype=torch.float64).to(dtype)
    oracle, baseline = a.double() @ b.double(), a @ b
    assert_matches(a.flip(1) @ b.flip(0), oracle, baseline)
    swapped = baseline.clone()
    swapped[[3, 4]] = baseline[[4, 3]]
    off = baseline.clone()
    worst = off.abs().argmax()
    off.view(-1)[worst] *= 1.1
    nan = baseline.clone()
    nan[0, 0] = torch.nan
    for wrong in (torch.zeros_like(baseline), swapped, off, nan, baseline[:-1]):
        with pytest.raises(AssertionError):
            assert_matches(wrong, oracle, baseline)


def test_reference_by_hand():
    # d = 2, h = 2, o = 1, relu. Expert 0: z = (x0, x1 - 1), y = 2 relu(z0) + 3 relu(z1) + 10.
    # Expert 1: z = (-x0, x0 + x1 + 1), y = relu(z0) - relu(z1).
    w1 = torch.tensor([[[1.0, 0], [0, 1]], [[-1, 0], [1, 1]]])
    b1 = torch.tensor([[0.0, -1], [0, 1]])
    w2 = torch.tensor([[[2.0, 3]], [[1, -1]]])
    b2 = torch.tensor([[10.0], [0]])
    x = torch.tensor([[1.0, 2], [-3, 4], [5, 6]])
    idx = torch.tensor([[0, 1], [1, -1], [1, 1]])
    gates = torch.tensor([[0.5, 2], [3, 7], [1, 10]])
    # Token 0: expert 0: z = (1, 1), 2 + 3 + 10 = 15; expert 1: z = (-1, 4), -4. 0.5 * 15 + 2 * -4 = -0.5.
    # Token 1: expert 1: z = (3, 2), 1; the other slot is unused. 3 * 1 = 3.
    # Token 2: expert 1 twice: z = (-5, 12), -12. (1 + 10) * -12 = -132.
    expected = torch.tensor([[-0.5], [3], [-132]])
    args = (x, w1, b1, w2, b2, gates)
    torch.testing.assert_close(reference.moe_mlp(*args, idx, activation="relu"), expected)
    plan = ops.plan_routing(idx, 2)
    for backend in ("auto", "cpu", "reference"):
        torch.testing.assert_close(ops.moe_mlp(*args, plan, activation="relu", backend=backend), expected)


def test_gated_reference_by_hand():
    # d = h = o = 1, relu: first half z0 = 2 x, second half z1 = 5 x: y = relu(2 x) * 5 x = 10 x^2 for x > 0, else 0.
    w1, w2 = torch.tensor([[[2.0], [5]]]), torch.tensor([[[1.0]]])
    x, gates, idx = torch.tensor([[3.0], [-3]]), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64)
    y = reference.moe_mlp(x, w1, None, w2, None, gates, idx, activation="relu", glu=True)
    torch.testing.assert_close(y, torch.tensor([[90.0], [0]]))


def test_grouped_reference_by_hand():
    w, b = torch.tensor([[[1.0, 2]], [[3, 4]]]), torch.tensor([[0.5], [-1]])
    x, ids = torch.tensor([[1.0, 1], [1, 2], [9, 9]]), torch.tensor([1, 0, -1])
    expected = torch.tensor([[6.0], [5.5], [0]])  # 3 + 4 - 1; 1 + 4 + 0.5; unused
    for backend in ("auto", "reference"):
        torch.testing.assert_close(ops.grouped_linear(x, w, b, ids, backend=backend), expected)


# --- plans ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.data(), st.integers(0, 40), st.integers(1, 5), st.integers(1, 9), st.sampled_from([torch.int32, torch.int64]))
def test_plan_invariants(data, m, k, e, dtype):
    ids = data.draw(st.lists(st.integers(-1, e - 1), min_size=m * k, max_size=m * k))
    idx = torch.tensor(ids, dtype=dtype).view(m, k)
    order, inverse, offsets, tiles = ops.plan_routing(idx, e)
    assert order.dtype == inverse.dtype == offsets.dtype == torch.int32
    # the definition: a stable sort by id, unused slots last
    expected = sorted(range(m * k), key=lambda slot: (ids[slot] if ids[slot] >= 0 else e, slot))
    assert order.tolist() == expected
    assert inverse[order.long()].tolist() == list(range(m * k))
    assert offsets.tolist() == [sum(0 <= i < bound for i in ids) for bound in range(e + 1)]
    assert tables.slot_ids(ops.Plan(order, inverse, offsets, tiles)).tolist() == ids
    assert all(map(torch.equal, (order, inverse, offsets, tiles), tables._plan_op(idx, e)))


@pytest.mark.parametrize("bad", [3, -2, 100])
def test_plan_refuses_ids_out_of_range(bad):
    with pytest.raises(ValueError, match=rf"idx: got ids .*{bad}.*expected 0\.\.2"):
        ops.plan_routing(torch.tensor([[0, 1], [bad, 2]]), 3)


# --- moe_mlp against the oracle ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "e", "k"), [(1, 5, 2), (7, 7, 3), (63, 5, 1), (97, 7, 7), (97, 13, 4), (7, 1, 1), (1, 3, 3), (63, 2, 2)]
)
def test_matches_the_oracle(path, dtype, m, e, k):
    check_moe_mlp(*make(m, 12, 20, 9, e, k, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_every_form_of_expert(path, dtype, activation, glu, bias):
    leaves, idx = make(63, 16, 24, 11, 5, 2, glu=glu, bias=bias, dtype=dtype)
    check_moe_mlp(leaves, idx, activation=activation, glu=glu)


@pytest.mark.parametrize("which", [(0,), (1, 2), (3, 4), (2,), (4,), (5,), (0, 5), (1, 3)])
@pytest.mark.parametrize("glu", [False, True])
def test_only_the_needed_gradients(path, which, glu):
    """Frozen inputs get nothing, and the others the same as when all are trained, also with unused slots."""
    leaves, idx = make(31, 8, 12, 6, 5, 2, glu=glu, idx=torch.randint(-1, 5, (31, 2)))
    cotangent = torch.randn(31, 6)
    plan = ops.plan_routing(idx, 5)
    every = torch.autograd.grad(ops.moe_mlp(*leaves, plan, glu=glu), leaves, cotangent)
    some = [t.detach().requires_grad_(i in which) for i, t in enumerate(leaves)]
    ops.moe_mlp(*some, plan, glu=glu).backward(cotangent)
    for i, t in enumerate(some):
        assert (t.grad is not None) == (i in which)
        if i in which:
            torch.testing.assert_close(t.grad, every[i])


@pytest.mark.parametrize("dtype", DTYPES)
def test_unused_slots_and_duplicates(path, dtype):
    idx = torch.randint(-1, 5, (41, 4))
    idx[0], idx[1], idx[2] = -1, 3, torch.tensor([2, 2, -1, 2])
    got = check_moe_mlp(*make(41, 12, 20, 9, 5, 4, dtype=dtype, idx=idx), activation="silu")
    assert got["y"][0].eq(0).all() and got["x"][0].eq(0).all()
    assert got["gates"][idx == -1].eq(0).all() and got["gates"][idx >= 0].ne(0).all()


def test_nothing_in_an_unused_slot_matters(path):
    """NaN in tokens and gates that no slot uses reaches nothing."""
    leaves, idx = make(20, 8, 12, 6, 5, 2)
    idx[3:6] = -1
    plan, cotangent = ops.plan_routing(idx, 5), torch.randn(20, 6)
    clean = differentiate(lambda ts: ops.moe_mlp(*ts, plan), leaves, cotangent)
    dirty = [t.detach().clone().requires_grad_() for t in leaves]
    with torch.no_grad():
        dirty[0][3:6], dirty[5][3:6] = torch.nan, torch.nan
    cotangent[3:6] = torch.nan
    for a, b in zip(clean, differentiate(lambda ts: ops.moe_mlp(*ts, plan), dirty, cotangent), strict=True):
        assert torch.equal(a, b)


def test_all_slots_unused(path):
    leaves, _ = make(5, 4, 6, 3, 4, 2)
    plan = ops.plan_routing(torch.full((5, 2), -1), 4)
    for t in differentiate(lambda ts: ops.moe_mlp(*ts, plan), leaves, torch.randn(5, 3)):
        assert t.eq(0).all()


@pytest.mark.parametrize("glu", [False, True])
def test_no_tokens(path, glu):
    leaves, _ = make(0, 4, 6, 3, 4, 2, glu=glu)
    plan = ops.plan_routing(torch.zeros(0, 2, dtype=torch.int64), 4)
    got = differentiate(lambda ts: ops.moe_mlp(*ts, plan, glu=glu), leaves, torch.randn(0, 3))
    assert [list(t.shape) for t in got] == [[0, 3], *(list(t.shape) for t in leaves)]
    assert all(t.eq(0).all() for t in got)


@pytest.mark.parametrize("poison", [False, True])
def test_empty_expert_gets_an_exact_zero(path, poison):
    """Experts without rows neither give nor take anything, NaN in their weights included."""
    idx = torch.tensor([0, 2, 4])[torch.randint(3, (30, 2))]
    leaves, idx = make(30, 8, 12, 6, 6, 2, idx=idx)
    empty = torch.tensor([1, 3, 5])
    if poison:
        with torch.no_grad():
            for t in leaves[1:5]:
                t[empty] = torch.nan
    plan = ops.plan_routing(idx, 6)
    y, dx, dw1, db1, dw2, db2, dgates = differentiate(lambda ts: ops.moe_mlp(*ts, plan), leaves, torch.randn(30, 6))
    for t in (dw1, db1, dw2, db2):
        assert t[empty].eq(0).all() and t[[0, 2, 4]].flatten(1).ne(0).any(1).all()
    assert all(t.isfinite().all() for t in (y, dx, dgates))


def test_a_nan_token_stays_with_its_experts(path):
    """A token that is NaN spoils its own row and the gradients of its experts, no other expert's."""
    idx = torch.tensor([0] * 5 + [1] * 15 + [2] * 10).view(-1, 1)  # experts 3 and 4 are empty
    leaves, idx = make(30, 8, 12, 6, 5, 1, idx=idx)
    for spoilt in (0, 5, 19, 29):
        x = leaves[0].detach().clone()
        x[spoilt] = torch.nan
        args, plan = [x.requires_grad_(), *leaves[1:]], ops.plan_routing(idx, 5)
        y, _, *dw, _ = differentiate(lambda ts, plan=plan: ops.moe_mlp(*ts, plan), args, torch.randn(30, 6))
        expert, others = int(idx[spoilt]), torch.arange(30) != spoilt
        assert y[spoilt].isnan().all() and y[others].isfinite().all()
        for t in dw[:3]:
            assert t[expert].isnan().any() and t[torch.arange(5) != expert].isfinite().all()


def test_all_tokens_on_one_expert(path):
    check_moe_mlp(*make(63, 12, 20, 9, 7, 1, idx=torch.full((63, 1), 4)))


def test_strided_and_expanded_inputs(path):
    """Columns, steps and transposes of larger tensors, an expanded gate, an expanded cotangent."""
    e, k, m, d, h, o = 5, 3, 17, 8, 12, 6
    x = torch.randn(2 * m, 2 * d)[::2, ::2]
    w1, w2 = torch.randn(d, h, e).permute(2, 1, 0), torch.randn(o, e, h).transpose(0, 1)
    b1, b2 = torch.randn(h, e).t(), torch.randn(e, 2 * o)[:, :o]
    gates = torch.rand(m, 1).expand(m, k)
    idx = torch.stack([torch.randperm(e)[:k] for _ in range(m)], 1).t()
    assert not any(t.is_contiguous() for t in (x, w1, w2, b1, b2, gates, idx))
    leaves = [t.detach().requires_grad_() for t in (x, w1, b1, w2, b2, gates)]
    check_moe_mlp(leaves, idx)
    cotangent = torch.randn(o).expand(m, o)
    expected = differentiate(lambda ts: reference.moe_mlp(*ts, idx), leaves, cotangent)
    got = differentiate(lambda ts: ops.moe_mlp(*ts, ops.plan_routing(idx, e)), leaves, cotangent)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_one_expert_is_the_dense_mlp(path):
    leaves, idx = make(9, 8, 12, 6, 1, 1)
    x, w1, b1, w2, b2, gates = leaves
    dense = torch.nn.functional.linear(torch.nn.functional.gelu(x @ w1[0].t() + b1[0]), w2[0], b2[0])
    torch.testing.assert_close(ops.moe_mlp(*leaves, ops.plan_routing(idx, 1)), gates * dense)


def test_the_order_of_tokens_does_not_matter(path):
    leaves, idx = make(40, 8, 12, 6, 5, 2)
    x, *weights, gates = leaves
    p = torch.randperm(40)
    y = ops.moe_mlp(x, *weights, gates, ops.plan_routing(idx, 5))
    torch.testing.assert_close(ops.moe_mlp(x[p], *weights, gates[p], ops.plan_routing(idx[p], 5)), y[p])


def test_the_choice_of_path():
    assert cpu.use_padded([0, 16, 32, 48])  # equal and few
    assert cpu.use_padded([0, 3, 3, 40])  # one busy expert, but cheap to pad
    assert not cpu.use_padded([0, 0, 0, 400])  # everything on one
    assert not cpu.use_padded([0, 0, 0])  # nothing to do


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("glu", [False, True])
def test_uninitialised_memory_is_never_read(path, dtype, glu):
    """torch fills new tensors with NaN in this mode; a lane that nobody wrote would show."""
    torch.use_deterministic_algorithms(True)
    try:
        check_moe_mlp(*make(23, 8, 12, 6, 5, 3, glu=glu, dtype=dtype, idx=torch.randint(-1, 4, (23, 3))), glu=glu)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(0, 0), (1, 8), (8, 8), (9, 16), (127, 128), (128, 128), (130, 144), (300, 320), (1030, 1152)],
)
def test_rows_of_products_of_two_byte_numbers(rows, expected):
    """Multiples of 8, of 16 from 128 on, of 32 from 256, of 128 from 1024; as they are for other numbers."""
    assert cpu.rounded(rows, torch.bfloat16) == cpu.rounded(rows, torch.float16) == expected
    assert cpu.rounded(rows, torch.float32) == cpu.rounded(rows, torch.float64) == rows


class Products(TorchDispatchMode):
    """Notes the sizes of all matrix products and activations."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in ("mm", "gelu")):
            self.sizes |= {size for t in args if isinstance(t, torch.Tensor) and t.ndim > 1 for size in t.shape}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("limit", PATHS.values())
def test_products_of_two_byte_numbers_come_in_few_sizes(limit, monkeypatch):
    """Everything given to oneDNN, which compiles anew for every size, is a multiple of 8."""
    monkeypatch.setattr(cpu, "PADDED_ROWS", limit)
    sizes = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves, _ = make(37, 16, 24, 8, 4, 1, dtype=dtype)
        plan = ops.plan_routing(torch.tensor([0] * 3 + [1] * 21 + [3] * 13)[:, None], 4)
        x, w1, _, w2, b2, gates = leaves = [t.detach() for t in leaves]
        dy = torch.randn(37, 8).to(dtype)
        with Products() as seen:
            z = cpu.moe_mlp(*leaves, plan, "gelu", False, True)[1]
            cpu.moe_mlp_backward(dy, x, z, w1, w2, b2, gates, plan, "gelu", False, [True] * 6)
        sizes.append({size for size in seen.sizes if size % 8 and size > 4})  # of 4 experts, 1 row of biases
    assert not sizes[0] and sizes[1]


# --- without gradient, from ids ---------------------------------------------------------------------------------------


@pytest.fixture(params=["dense", "grouped", "loop"])
def way(request, monkeypatch):
    """A function with the oracle's arguments that runs one of the ways of inference.py."""
    if request.param == "loop":
        monkeypatch.setattr(inference, "GROUPED_MM_ROWS", -1)
    body = inference.dense if request.param == "dense" else inference.grouped

    @torch.no_grad()
    def run(*args, activation="gelu", glu=False):
        return body(*args, activation, glu)

    return run


def check_forward(way, leaves, idx, **options):
    """The result under the tolerance rule, several draws of tokens and gates pooled."""
    pools = [], [], []
    inputs = [t if t is None else t.detach() for t in leaves]
    for _ in range(16 if idx.shape[0] < 16 else 4):
        exact = [t if t is None else t.double() for t in inputs]
        pools[0].append(way(*inputs, idx, **options))
        pools[1].append(reference.moe_mlp(*exact, idx, **options))
        pools[2].append(reference.moe_mlp(*inputs, idx, **options))
        inputs = [torch.randn_like(inputs[0]), *inputs[1:5], torch.rand_like(inputs[5])]
    assert_matches(*map(torch.stack, pools))
    return pools[0][0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "e", "k"), [(1, 5, 2), (7, 7, 3), (63, 5, 1), (97, 7, 7), (97, 13, 4), (7, 1, 1), (1, 3, 3)]
)
def test_ways_match_the_oracle(way, dtype, m, e, k):
    check_forward(way, *make(m, 16, 24, 9, e, k, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_ways_do_every_form_of_expert(way, dtype, activation, glu, bias):
    leaves, idx = make(63, 16, 24, 11, 5, 2, glu=glu, bias=bias, dtype=dtype)
    check_forward(way, leaves, idx, activation=activation, glu=glu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ways_with_unused_slots_and_duplicates(way, dtype):
    idx = torch.randint(-1, 5, (41, 4), dtype=torch.int32)
    idx[0], idx[1], idx[2] = -1, 3, torch.tensor([2, 2, -1, 2])
    leaves, _ = make(41, 16, 24, 9, 5, 4, dtype=dtype)
    assert check_forward(way, leaves, idx)[0].eq(0).all()
    assert check_forward(way, leaves, torch.full((41, 4), -1)).eq(0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_ways_never_let_an_unchosen_value_in(way, value):
    """Unchosen experts, and tokens and gates in unused slots, may hold anything."""
    idx = torch.tensor([0, 2, 4])[torch.randint(3, (30, 2))]
    idx[3:6], idx[9, 1] = -1, -1
    leaves, idx = make(30, 16, 24, 9, 6, 2, idx=idx)
    clean = [t.detach().clone() for t in leaves]
    dirty = [t.clone() for t in clean]
    for t in dirty[1:5]:
        t[[1, 3, 5]] = value
    dirty[0][3:6], dirty[5][3:6], dirty[5][9, 1] = value, value, value
    y = way(*clean, idx)
    assert y.ne(0).any(1).sum() == 27 and torch.equal(way(*dirty, idx), y)
    dirty[0][0] = torch.nan
    assert torch.equal(way(*dirty, idx).isnan().any(1).nonzero(), torch.tensor([[0]]))
    dirty[4][4] = torch.nan
    assert torch.equal(way(*dirty, idx).isnan().any(1), (idx == 4).any(1) | (torch.arange(30) == 0))


def test_ways_take_strided_and_unaligned_inputs(way):
    e, k, m, d, h, o = 5, 3, 17, 8, 12, 6
    x = torch.randn(2 * m, 2 * d)[::2, ::2]
    w2 = torch.randn(e * o * h + 1)[1:].view(e, o, h)  # where no vector load starts
    b1, b2 = torch.randn(h, e).t(), torch.randn(e, 2 * o)[:, :o]
    gates, idx = torch.rand(m, 1).expand(m, k), torch.rand(e, m).topk(k, 0).indices.t()
    assert w2.data_ptr() % 16 and not any(t.is_contiguous() for t in (x, b1, b2, gates, idx))
    for w1 in (torch.randn(d, h, e).permute(2, 1, 0), torch.randn(e, 1, d).expand(e, h, d)):
        check_forward(way, [x, w1, b1, w2, b2, gates], idx)
    check_forward(way, *make(17, 5, 7, 3, 5, 3))  # rows that are not a multiple of 16 bytes long


def test_ways_never_read_uninitialised_memory(way):
    torch.use_deterministic_algorithms(True)
    try:
        leaves, idx = make(23, 16, 24, 9, 5, 3, glu=True, idx=torch.randint(-1, 4, (23, 3)))
        check_forward(way, leaves, idx, glu=True)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_experts_are_read_one_by_one(dtype):
    """Layers of 5 MB in float32, 1 MB an expert; 1, 3, no, 40 and 6 rows, the expert without any holding NaN."""
    idx = torch.tensor([0] + [1] * 3 + [3] * 40 + [4] * 6)[torch.randperm(50), None]
    leaves, _ = make(50, 256, 1024, 256, 5, 1, dtype=dtype)
    leaves = [t.detach() for t in leaves]
    assert leaves[1][0].numel() * dtype.itemsize >= inference.LARGE_EXPERT
    for leaf in leaves[1:5]:
        leaf[2] = torch.nan
    check_forward(lambda *args: inference.grouped(*args, "gelu", False), leaves, idx)


@pytest.mark.parametrize("bad", [5, -2])
def test_ways_refuse_ids_out_of_range(way, bad):
    leaves, idx = make(20, 16, 24, 9, 5, 2)
    idx[7, 1] = bad
    with pytest.raises(ValueError, match=rf"idx: got ids .*{bad}.*expected 0\.\.4"):
        way(*leaves, idx)


@pytest.mark.parametrize(
    ("m", "k", "e", "d", "h", "dtype", "threads", "expected"),
    [
        (64, 4, 16, 96, 96, torch.float32, 1, "grouped"),
        (64, 4, 16, 96, 96, torch.float32, 2, "dense"),  # one product of all experts is large enough to share
        (196, 4, 16, 96, 96, torch.float32, 2, "grouped"),  # shared or not, it is four times the work
        (64, 4, 4, 96, 96, torch.float32, 2, "dense"),  # nothing to choose
        (2, 4, 16, 96, 96, torch.float32, 1, "dense"),  # hardly anything to compute
        (2, 4, 16, 768, 3072, torch.float32, 1, "grouped"),  # reading eight more experts takes longer than a sort
        (64, 4, 16, 96, 96, torch.bfloat16, 1, "dense"),  # products of two-byte numbers start slowly
        (2048, 4, 16, 96, 96, torch.float32, 1, None),  # the rows leave the cache
        (256, 4, 16, 192, 192, torch.float32, 1, "grouped"),
        (256, 4, 16, 192, 192, torch.float32, 2, None),  # products of 64 rows are worth sharing
        (1 << 20, 4, 4, 96, 96, torch.float32, 1, None),  # too much memory
        (600, 1, 4, 384, 1536, torch.float32, 1, None),
        (300, 1, 4, 384, 1536, torch.float32, 1, "grouped"),
        (300, 1, 4, 384, 1536, torch.bfloat16, 1, None),  # of rows in numbers that oneDNN has not met
        (0, 4, 16, 96, 96, torch.float32, 1, None),
    ],
)
def test_the_choice_of_way(m, k, e, d, h, dtype, threads, expected):
    w1, w2 = torch.empty(e, h, d, dtype=dtype, device="meta"), torch.empty(e, d, h, dtype=dtype, device="meta")
    got = inference.choose(m, k, w1, w2, threads)
    assert got is (None if expected is None else getattr(inference, expected))


def test_small_products_run_on_one_thread(monkeypatch):
    seen = []
    monkeypatch.setattr(inference, "_grouped", lambda *args: seen.append(torch.get_num_threads()) or 1 // args[0])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        inference.grouped(1)
        with pytest.raises(ZeroDivisionError):
            inference.grouped(0)
        assert seen == [1, 1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("k", [2, 5])
def test_routed_mlp_is_moe_mlp(monkeypatch, k):
    """The same numbers by every route: with gradient, without, counted, under autocast, by the oracle."""
    leaves, idx = make(30, 16, 24, 9, 5, k, idx=torch.randint(-1, 5, (30, k)))
    plan, cotangent = ops.plan_routing(idx, 5), torch.randn(30, 9)
    taken = []
    for name in ("dense", "grouped"):
        body = getattr(inference, name)
        monkeypatch.setattr(inference, name, lambda *args, name=name, body=body: taken.append(name) or body(*args))
    planned = differentiate(lambda ts: ops.moe_mlp(*ts, plan), leaves, cotangent)
    assert all(map(torch.equal, planned, differentiate(lambda ts: ops.routed_mlp(*ts, idx), leaves, cotangent)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert torch.equal(ops.routed_mlp(*leaves, idx), planned[0])
    assert counter.get_total_flops() == 2 * 30 * k * 24 * (16 + 9)
    torch.testing.assert_close(ops.routed_mlp(*leaves, idx, backend="reference"), planned[0])
    assert taken == []
    with torch.no_grad():
        torch.testing.assert_close(ops.routed_mlp(*leaves, idx), planned[0])
        assert len(taken) == 1
        assert torch.equal(ops.routed_mlp(*leaves, idx, backend="cpu"), planned[0])
        frozen = [t.detach() for t in leaves]
        with torch.enable_grad():
            torch.testing.assert_close(ops.routed_mlp(*frozen, idx), planned[0])
        with torch.autocast("cpu", torch.bfloat16):
            low = ops.routed_mlp(*leaves, idx)
        assert len(taken) == 3 and low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), planned[0], rtol=0.05, atol=0.05)
        assert torch.equal(low, ops.routed_mlp(*(t.bfloat16() for t in leaves[:5]), leaves[5], idx))
        wide = [t.detach().double() for t in leaves]
        torch.testing.assert_close(ops.routed_mlp(*wide, idx).float(), planned[0])
        assert ops.routed_mlp(*(t[:0] if i in (0, 5) else t for i, t in enumerate(leaves)), idx[:0]).shape == (0, 9)


# --- grouped_linear ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("m", [0, 1, 63, 97])
def test_grouped_linear_matches_the_oracle(dtype, bias, m):
    x, w = torch.randn(m, 24).to(dtype), torch.randn(7, 10, 24).to(dtype)
    b = torch.randn(7, 10).to(dtype) if bias else None
    leaves = [t.requires_grad_() for t in (x, w, b) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    ids = torch.randint(-1, 6, (m,))  # group 6 stays empty
    cotangent = torch.randn(m, 10).to(dtype).double()

    def call(function):
        return lambda ts: function(ts[0], ts[1], ts[2] if bias else None, ids)

    actual = differentiate(call(ops.grouped_linear), leaves, cotangent)
    oracle = differentiate(call(reference.grouped_linear), exact, cotangent)
    baseline = differentiate(call(reference.grouped_linear), leaves, cotangent)
    for name, *tensors in zip(("y", "x", "w", "b"), actual, oracle, baseline, strict=False):
        assert_matches(*tensors, name)
    assert actual[2][6].eq(0).all() and actual[0][ids == -1].eq(0).all()


def test_grouped_linear_skips_frozen_inputs():
    x, w, b, ids = torch.randn(9, 4), torch.randn(3, 5, 4), torch.randn(3, 5), torch.randint(3, (9,))
    every = [t.clone().requires_grad_() for t in (x, w, b)]
    cotangent = torch.randn(9, 5)
    grads = torch.autograd.grad(ops.grouped_linear(*every, ids), every, cotangent)
    for i in range(3):
        some = [t.clone().requires_grad_(i == j) for j, t in enumerate((x, w, b))]
        ops.grouped_linear(*some, ids).backward(cotangent)
        assert [t.grad is not None for t in some] == [i == j for j in range(3)]
        torch.testing.assert_close(some[i].grad, grads[i])


# --- autograd contracts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("glu", [False, True])
def test_gradcheck(path, glu):
    leaves, idx = make(6, 3, 4, 2, 3, 2, glu=glu, dtype=torch.float64, idx=torch.randint(-1, 3, (6, 2)))
    plan = ops.plan_routing(idx, 3)
    assert torch.autograd.gradcheck(lambda *ts: ops.moe_mlp(*ts, plan, glu=glu), leaves, fast_mode=True)


def test_gradcheck_grouped_linear():
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((6, 3), (3, 4, 3), (3, 4))]
    ids = torch.tensor([0, 2, -1, 2, 0, 0])
    assert torch.autograd.gradcheck(lambda *ts: ops.grouped_linear(*ts, ids), leaves, fast_mode=True)


def test_second_derivative_is_refused():
    leaves, idx = make(6, 3, 4, 2, 3, 2)
    plan = ops.plan_routing(idx, 3)
    x, w = leaves[0], torch.randn(3, 2, 3, requires_grad=True)
    for y in (ops.moe_mlp(*leaves, plan), ops.grouped_linear(x, w, None, idx[:, 0])):
        (dx,) = torch.autograd.grad(y, x, torch.randn_like(y), create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            dx.square().sum().backward()
    y = ops.moe_mlp(*leaves, plan, backend="reference")
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y), create_graph=True)
    dx.square().sum().backward()
    assert leaves[1].grad.ne(0).any()


@pytest.mark.parametrize("glu", [False, True])
def test_saved_bytes(path, glu):
    """Kept for the backward: x, z, weights, gates and the tables. Not the hidden activations, not the outputs."""
    m, d, h, o, e, k = 50, 8, 12, 6, 5, 2
    leaves, idx = make(m, d, h, o, e, k, glu=glu)
    x, w1, b1, w2, b2, gates = leaves
    plan = ops.plan_routing(idx, e)

    def saved(function):
        total = {}

        def pack(t):
            total[t.data_ptr()] = t.numel() * t.element_size()
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            y = function()
        assert y.requires_grad
        return sum(total.values())

    def size(*tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    z = 4 * m * k * w1.shape[1]
    kept = size(w1, w2, b2, gates, *plan) + z
    assert saved(lambda: ops.moe_mlp(*leaves, plan, glu=glu)) == kept + size(x)
    frozen = [t.detach() for t in (w1, b1, w2, b2)]
    assert saved(lambda: ops.moe_mlp(x, *frozen, gates, plan, glu=glu)) == kept  # only the gradient of w1 reads x
    with torch.no_grad():
        assert ops._forward(*leaves, *plan, "gelu", glu, False, "cpu")[1].numel() == 0  # inference keeps nothing


# --- torch contracts --------------------------------------------------------------------------------------------------


def test_opcheck(path):
    leaves, idx = make(11, 4, 6, 3, 5, 2, idx=torch.randint(-1, 5, (11, 2)))
    torch.library.opcheck(tables._plan_op, (idx, 5))
    plan = ops.plan_routing(idx, 5)
    torch.library.opcheck(ops._forward_op, (*leaves, *plan, "silu", False, True, "cpu"))
    ids = ops.plan_routing(torch.randint(3, (11, 1)), 3)
    w = torch.randn(3, 6, 4, requires_grad=True)
    torch.library.opcheck(grouped_linear._forward_op, (leaves[0], w, None, *ids, "cpu"))


class Layer(torch.nn.Module):
    """Router, plan and experts, as small as they get."""

    def __init__(self, d=8, h=12, e=5, k=2):
        super().__init__()
        self.k, self.e = k, e
        self.router = torch.nn.Parameter(torch.randn(2, e, d))
        self.w1, self.b1 = torch.nn.Parameter(torch.randn(e, h, d)), torch.nn.Parameter(torch.randn(e, h))
        self.w2, self.b2 = torch.nn.Parameter(torch.randn(e, d, h)), torch.nn.Parameter(torch.randn(e, d))

    def forward(self, x, task):
        logits = ops.grouped_linear(x, self.router, None, task)
        gates, idx = logits.softmax(-1).topk(self.k)
        plan = ops.plan_routing(idx, self.e)
        return ops.moe_mlp(x, self.w1, self.b1, self.w2, self.b2, gates, plan)


def compare_compiled(backend):
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for m in (37, 50):
        x, task, cotangent = torch.randn(m, 8), torch.randint(2, (m,)), torch.randn(m, 8)
        results = []
        for function in (layer, compiled):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            y = function(leaf, task)
            y.backward(cotangent)
            results.append([y, leaf.grad, *(p.grad for p in layer.parameters())])
        for a, b in zip(*results, strict=True):
            assert a.ne(0).any()
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, task), layer(x, task))


def test_compiles_whole():
    compare_compiled("aot_eager")


@pytest.mark.slow
def test_compiles_with_inductor():
    compare_compiled("inductor")


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_any_number_of_tokens(strict):
    layer = Layer()
    x, task = torch.randn(37, 8), torch.randint(2, (37,))
    m = torch.export.Dim("m", min=1)
    with torch.no_grad():
        program = torch.export.export(layer, (x, task), dynamic_shapes=({0: m}, {0: m}), strict=strict)
        targets = {str(node.target) for node in program.graph.nodes}
        assert {"moe_mtl.moe_mlp.default", "moe_mtl.plan_routing.default", "moe_mtl.grouped_linear.default"} <= targets
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        for n in (1, 37, 90):
            x, task = torch.randn(n, 8), torch.randint(2, (n,))
            torch.testing.assert_close(loaded(x, task), layer(x, task))


@pytest.mark.parametrize("glu", [False, True])
def test_counted_flops(path, glu):
    m, d, h, o, e, k = 30, 8, 12, 6, 5, 2
    leaves, idx = make(m, d, h, o, e, k, glu=glu)
    plan, rows = ops.plan_routing(idx, e), m * k
    first, second = 2 * rows * d * h * (1 + glu), 2 * rows * h * o
    with FlopCounterMode(display=False) as forward:
        y = ops.moe_mlp(*leaves, plan, glu=glu)
    assert forward.get_total_flops() == first + second
    with FlopCounterMode(display=False) as backward:
        y.backward(torch.randn_like(y))
    assert backward.get_total_flops() == 2 * (first + second)
    # frozen experts, no token gradient: the router alone needs dy w2 and nothing else
    frozen = [t.detach() for t in leaves[:5]]
    y = ops.moe_mlp(*frozen, leaves[5], plan, glu=glu)
    with FlopCounterMode(display=False) as backward:
        y.backward(torch.randn_like(y))
    assert backward.get_total_flops() == second
    x, w = leaves[0].detach(), torch.randn(3, 4, d, requires_grad=True)
    with FlopCounterMode(display=False) as grouped:
        y = ops.grouped_linear(x, w, None, torch.randint(3, (m,)))
        y.backward(torch.randn_like(y))
    assert grouped.get_total_flops() == 2 * (2 * m * d * 4)


def test_counting_flops_changes_nothing():
    leaves, idx = make(30, 8, 12, 6, 5, 2)
    plan, cotangent = ops.plan_routing(idx, 5), torch.randn(30, 6)
    plain = differentiate(lambda ts: ops.moe_mlp(*ts, plan), leaves, cotangent)
    with FlopCounterMode(display=False):
        counted = differentiate(lambda ts: ops.moe_mlp(*ts, plan), leaves, cotangent)
    assert all(map(torch.equal, plain, counted))


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(path, inside):
    """bf16 inside, float32 gates, float32 gradients of float32 leaves; also when the backward runs in the region."""
    leaves, idx = make(40, 8, 12, 6, 5, 2)
    plan, cotangent = ops.plan_routing(idx, 5), torch.randn(40, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.moe_mlp(*leaves, plan)
        with contextlib.nullcontext() if inside else torch.autocast("cpu", enabled=False):
            got = torch.autograd.grad(y, leaves, cotangent)
        assert ops.grouped_linear(leaves[0], torch.randn(3, 4, 8), None, torch.zeros(40).long()).dtype == torch.bfloat16
    cast = [t.detach().bfloat16().requires_grad_() for t in leaves[:5]] + [leaves[5]]
    direct = ops.moe_mlp(*cast, plan)
    expected = torch.autograd.grad(direct, cast, cotangent)
    assert y.dtype == torch.bfloat16 and torch.equal(y, direct)
    for a, b, leaf in zip(got, expected, leaves, strict=True):
        assert a.dtype == leaf.dtype and torch.equal(a, b.to(leaf.dtype))
    plain = differentiate(lambda ts: ops.moe_mlp(*ts, plan), leaves, cotangent.float())
    y = ops.moe_mlp(*leaves, plan)
    with torch.autocast("cpu", torch.bfloat16):  # a float32 forward has a float32 backward wherever it runs
        assert all(map(torch.equal, plain[1:], torch.autograd.grad(y, leaves, cotangent.float())))
        exact = [t.detach().double() for t in leaves]
        assert ops.moe_mlp(*exact, plan).dtype == torch.float64


@pytest.mark.parametrize("limit", PATHS.values())
def test_autocast_casts_what_is_used_and_writes_gradients_in_float32(limit, monkeypatch):
    """NaN in an expert without rows stays there, and its gradient is an exact float32 zero."""
    monkeypatch.setattr(cpu, "PADDED_ROWS", limit)
    leaves, idx = make(40, 8, 12, 6, 5, 2, idx=torch.tensor([0, 1, 3, 4]).repeat(20).view(40, 2))
    with torch.no_grad():
        for leaf in leaves[1:5]:
            leaf[2] = torch.nan
    kept = []
    with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ops.routed_mlp(*leaves, idx)
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    # no copy of a bank is kept, the weights themselves are
    assert {t.data_ptr() for t in kept if t.ndim == 3} == {leaves[1].data_ptr(), leaves[3].data_ptr()}
    for leaf, grad in zip(leaves[1:5], torch.autograd.grad(y.float().square().sum(), leaves)[1:5], strict=True):
        assert grad.dtype == torch.float32 and not grad[2].any() and grad[[0, 1, 3, 4]].isfinite().all()
        assert grad.shape == leaf.shape and grad[0].any()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(6, 5)}, "w1: .*d = 5"),
        ({"w2": torch.randn(3, 2, 5)}, "w1, w2: "),
        ({"b1": torch.randn(3, 5)}, "b1: "),
        ({"b2": torch.randn(2, 2)}, "b2: "),
        ({"gates": torch.rand(5, 2)}, "gates: .*m = 6"),
        ({"gates": torch.ones(6, 2).long()}, "gates: .*float"),
        ({"gates": torch.rand(6, 1)}, "plan: made for 12 slots"),
        ({"w1": torch.randn(3, 4, 3).double()}, "w1: got torch.float64 .* x is torch.float32"),
        ({"x": torch.randn(2, 6, 3)}, "x, w1, w2, gates: "),
        ({"x": torch.ones(6, 3, dtype=torch.int32)}, "x: got torch.int32"),
        ({"activation": "gelo"}, "activation: .*did you mean 'gelu'"),
        ({"backend": "trition"}, "backend: got 'trition', known: .*did you mean 'triton'"),
        ({"glu": True}, "w1, w2: .*glu"),
    ],
)
def test_bad_arguments_are_named(change, message):
    leaves, idx = make(6, 3, 4, 2, 3, 2)
    args = dict(zip(("x", "w1", "b1", "w2", "b2", "gates"), leaves, strict=True))
    args["plan"] = ops.plan_routing(idx, 3)
    with pytest.raises(ValueError, match=message):
        ops.moe_mlp(**(args | change))


def test_bad_ids_of_routed_mlp_are_named():
    leaves, idx = make(6, 3, 4, 2, 3, 2)
    for bad, message in (
        (idx[:5], r"idx: got \[5, 2\] on cpu, but gates are \[6, 2\]"),
        (idx.float(), "idx: .*int64"),
        (idx + 3, "idx: got ids"),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            ops.routed_mlp(*leaves, bad)
    with pytest.raises(ValueError, match=r"gates: .*m = 6"):
        ops.routed_mlp(*leaves[:5], leaves[5][:5], idx)


def test_bad_arguments_of_the_others_are_named():
    x, w = torch.randn(6, 3), torch.randn(2, 4, 3)
    ids = torch.zeros(6, dtype=torch.int64)
    for bad, message in (
        ((x[:, :2], w, None, ids), "x, w: "),
        ((x, w, torch.randn(4), ids), "b: "),
        ((x, w, None, ids[:5]), "ids: .*one id per row"),
        ((x, w, None, ids + 2), "idx: got ids 2"),
        ((x, w.double(), None, ids), "w: got torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.grouped_linear(*bad)
    for bad, experts in ((torch.rand(3, 2), 2), (torch.zeros(3).long(), 2), (torch.zeros(3, 1).long(), 0)):
        with pytest.raises(ValueError, match=r"idx: |num_experts: "):
            ops.plan_routing(bad, experts)


# --- what a backend or the ops would stumble over ---------------------------------------------------------------------


def test_grouped_mm_takes_weights_whose_rows_are_padded():
    leaves, idx = make(8, 16, 24, 16, 4, 2)
    x, w1, b1, w2, b2, gates = (t.detach() for t in leaves)
    padded = torch.randn(4, 24, 17)[:, :, :16].copy_(w1)
    y = ops.routed_mlp(x, padded, b1, w2, b2, gates, idx, backend="grouped_mm")
    torch.testing.assert_close(y, ops.routed_mlp(x, w1, b1, w2, b2, gates, idx))


def test_what_is_no_plan_is_refused():
    leaves, idx = make(8, 16, 24, 16, 4, 2)
    with pytest.raises(ValueError, match=r"plan: got Tensor, expected what plan_routing makes"):
        ops.moe_mlp(*leaves, idx)
    plan = ops.plan_routing(idx, 4)
    with pytest.raises(ValueError, match=r"plan: got tables of .* which no plan_routing made"):
        ops.moe_mlp(*leaves, plan._replace(inverse=plan.inverse[:3]))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_ids_of_a_linear_layer_are_checked(backend):
    x, w = torch.randn(3, 4), torch.randn(2, 5, 4)
    with pytest.raises(ValueError, match=r"ids: got torch.float32, expected int64 or int32"):
        ops.grouped_linear(x, w, None, torch.zeros(3), backend=backend)
    with pytest.raises(ValueError, match=r"got ids 0..2, expected 0..1"):
        ops.grouped_linear(x, w, None, torch.tensor([0, 1, 2]), backend=backend)


@pytest.mark.parametrize(
    ("major", "shared_kib", "arch"), [(8, 163, 80), (8, 99, 80), (9, 227, 90), (10, 227, 100), (12, 99, 89)]
)
def test_a_chip_with_less_shared_memory_than_hopper_counts_as_older(monkeypatch, major, shared_kib, arch):
    seen = SimpleNamespace(
        major=major, minor=0, multi_processor_count=7, shared_memory_per_block_optin=1024 * shared_kib
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: seen)
    assert configs.chip.__wrapped__(torch.device("cuda", 0)) == (arch, 7)


def test_whole_numbers_are_no_tokens_under_autocast():
    leaves, idx = make(8, 16, 24, 16, 4, 2)
    x, *rest = (t.detach() for t in leaves)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"x: got torch.int64"):
        ops.routed_mlp(x.long(), *rest, idx)
