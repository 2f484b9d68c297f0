"""The Triton kernels on the CPU, interpreted: every kernel and gradient against the float64 oracle at small sizes.

Interpreted sums run in another order than a chip's, so errors are held against fixed bounds: about eight roundings of
the dtype, relative to the norm of the oracle.
"""

import importlib
import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from moe_mtl.kernels import configs, dispatch, ops, reference
from moe_mtl.kernels import plan as tables
from tests.kernel_cases import differentiate, make

triton = pytest.importorskip("triton")
tl = triton.language
gpu = importlib.import_module("moe_mtl.kernels.gpu")
triton_combine, triton_gate_grad, triton_launch, triton_math, triton_plan, triton_sort_rows = (
    importlib.import_module(f"moe_mtl.kernels.triton_{name}")
    for name in ("combine", "gate_grad", "launch", "math", "plan", "sort_rows")
)
*layers, triton_weight_grad = (
    importlib.import_module(f"moe_mtl.kernels.triton_{name}") for name in ("up", "down", "hidden_grad", "weight_grad")
)
pytestmark = pytest.mark.skipif(not dispatch.interpreted(), reason="TRITON_INTERPRET=1 is not set")
BOUNDS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
NAMES = ("y", "x", "w1", "b1", "w2", "b2", "gates")
LARGE = configs.Config(32, 64, 64)  # few programs, which are what interpreting takes its time for


def assert_near(actual, oracle, dtype, name="result"):
    """Relative error in the Frobenius norm of a computation in that dtype; finite, and zeros match only zeros."""
    assert actual.isfinite().all(), f"{name}: not finite"
    assert actual.shape == oracle.shape, f"{name}: shape"
    error, size = (actual.double() - oracle).norm(), oracle.norm()
    assert error <= BOUNDS[dtype] * size, f"{name}: relative error {error / size:.1e}"


def check(leaves, idx, cotangent=None, **options):
    """The result, the inference result and every gradient against the oracle, with a random cotangent."""
    plan, dtype = ops.plan_routing(idx, leaves[1].shape[0]), leaves[0].dtype
    if cotangent is None:
        cotangent = torch.randn(leaves[0].shape[0], leaves[3].shape[1])
    cotangent = cotangent.to(dtype)
    exact = [t if t is None else t.detach().double().requires_grad_() for t in leaves]
    got = differentiate(lambda ts: ops.moe_mlp(*ts, plan, backend="triton", **options), leaves, cotangent)
    oracle = differentiate(lambda ts: reference.moe_mlp(*ts, idx, **options), exact, cotangent)
    with torch.no_grad():
        assert_near(ops.moe_mlp(*leaves, plan, backend="triton", **options), oracle[0], dtype, "inference")
    names = [n for n, t in zip(NAMES, [leaves[0], *leaves], strict=True) if t is not None]
    for name, a, b in zip(names, got, oracle, strict=True):
        assert_near(a, b, dtype, name)
    return dict(zip(names, got, strict=True))


def ours(plan, **options):
    return lambda ts: ops.moe_mlp(*ts, plan, backend="triton", **options)


@pytest.fixture
def poisoned():
    """torch fills new tensors with NaN in this mode; a lane that nobody wrote would show."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launched(monkeypatch):
    """Name, grid and constants of every product that is launched."""
    seen = []

    def watched(kernel, grid, args, constants, **options):
        seen.append((kernel.fn.__name__.removesuffix("_kernel"), grid, constants))
        triton_launch.launch(kernel, grid, args, constants, **options)

    for module in (*layers, triton_weight_grad):
        monkeypatch.setattr(module, "launch", watched)
    return seen


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launches", [1, 2])
@pytest.mark.parametrize(
    ("slots", "experts", "ids", "dtype"),
    [
        (1, 1, 0, torch.int64),
        (300, 1, None, torch.int64),
        (63, 5, None, torch.int32),
        (700, 16, None, torch.int64),  # several programs
        (1100, 4, 3, torch.int32),  # all on one expert: blocks as full as the eight bits of a count take
        (1100, 127, None, torch.int64),  # tables of tiles made by several programs
        (300, 3, -1, torch.int64),
    ],
)
def test_sort_on_the_gpu_is_the_plan(monkeypatch, launches, slots, experts, ids, dtype):
    monkeypatch.setattr(triton_plan, "ONE_LAUNCH", slots if launches == 1 else 0)
    monkeypatch.setattr(triton_plan, "SHARES", 2)
    monkeypatch.setattr(triton_plan, "LARGEST", 256)  # shares of two blocks, counted in two chunks
    monkeypatch.setattr(triton_plan, "CHUNK", 128)
    monkeypatch.setattr(triton_plan, "SUMMED", 2 * max(8, triton.next_power_of_2(experts + 1)))  # two shares at once
    ids = torch.randint(-1, experts, (slots,), dtype=dtype) if ids is None else torch.full((slots,), ids, dtype=dtype)
    order, inverse, offsets, tiles = triton_plan.plan(ids, experts)
    expected = ops.plan_routing(ids[:, None], experts)
    assert torch.equal(order, expected.order) and torch.equal(inverse, expected.inverse)
    assert torch.equal(offsets, expected.offsets)
    made = [tables.tile_table(offsets, slots, height) for height in tables.TILE_ROWS]
    assert torch.equal(tiles, torch.cat(made))
    plan = tables.Plan(order, inverse, offsets, tiles)
    assert all(torch.equal(tables.tiles_of(plan, h), t) for h, t in zip(tables.TILE_ROWS, made, strict=True))


def test_ids_out_of_range_are_unused_slots_where_nobody_checks():
    ids = torch.tensor([0, 7, 3, 100_000_000_000, -5, 2, 1])
    order, inverse, offsets, _ = triton_plan.plan(ids, 3)
    assert offsets.tolist() == [0, 1, 2, 3] and order.tolist() == [0, 6, 5, 1, 2, 3, 4]
    assert inverse[order.long()].tolist() == list(range(7))


def test_ids_that_are_a_column_of_a_matrix():
    ids = torch.randint(-1, 4, (50, 3))[:, 1]
    assert not ids.is_contiguous()
    for actual, expected in zip(triton_plan.plan(ids, 4), triton_plan.plan(ids.clone(), 4), strict=True):
        assert torch.equal(actual, expected)


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=6), st.integers(0, 40), st.sampled_from([1, 32, 64]))
def test_tiles_cover_each_row_once(counts, unused, height):
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    table = tables.tile_table(offsets, sum(counts) + unused, height).tolist()
    expected = [
        [e, first, min(first + height, int(offsets[e + 1]))]
        for e, count in enumerate(counts)
        for first in range(int(offsets[e]), int(offsets[e]) + count, height)
    ]
    assert table == expected + [[-1, 0, 0]] * (len(table) - len(expected))
    assert len(table) == tables.tile_bound(sum(counts) + unused, len(counts), height)


# --- the expert MLP ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("activation", "glu", "bias"), [("gelu", False, True), ("silu", True, False)])
def test_dtypes(dtype, activation, glu, bias):
    check(*make(37, 48, 40, 50, 5, 2, glu=glu, bias=bias, dtype=dtype), activation=activation, glu=glu)


@pytest.mark.parametrize(
    ("activation", "glu", "bias"), [("relu", False, False), ("silu", False, True), ("gelu", True, True)]
)
def test_forms_of_expert(activation, glu, bias):
    check(*make(20, 16, 40, 12, 3, 2, glu=glu, bias=bias), activation=activation, glu=glu)


@pytest.mark.parametrize(
    ("m", "d", "h", "o", "e", "k"),
    [(1, 16, 16, 16, 1, 1), (2, 50, 33, 70, 6, 4), (64, 7, 96, 1, 5, 3), (17, 96, 5, 34, 6, 1)],
)
def test_odd_sizes(m, d, h, o, e, k):
    check(*make(m, d, h, o, e, k))


@pytest.mark.parametrize("height", [64, 128])
@pytest.mark.parametrize("glu", [False, True])
def test_other_tiles(monkeypatch, height, glu):
    """Every height of tiles, and columns finished in two halves."""
    monkeypatch.setattr(configs, "pick", lambda *_: configs.Config(height, 32, 16, group=2, epilogues=2))
    check(*make(70, 20, 70, 36, 2, 2, glu=glu), glu=glu)


@pytest.mark.parametrize("glu", [False, True])
def test_columns_in_parts(monkeypatch, glu):
    """Columns of a tile finished at once, in halves or in quarters: the same values; gates add up in another order."""
    leaves, idx = make(9, 8, 40, 24, 1, 1, glu=glu)
    plan, cotangent, results = ops.plan_routing(idx, 1), torch.randn(9, 24), []
    for parts in (1, 2, 4):
        monkeypatch.setattr(configs, "pick", lambda *_, parts=parts: configs.Config(32, 64, 64, epilogues=parts))
        results.append(differentiate(ours(plan, glu=glu), leaves, cotangent))
    for other in results[1:]:
        assert all(map(torch.equal, other[:-1], results[0][:-1]))
        torch.testing.assert_close(other[-1], results[0][-1])


@pytest.mark.parametrize("width", [3, 130])
def test_rows_in_expert_order(poisoned, width):
    """And their gates beside them; rows of unused slots are not written."""
    idx, x, gates = torch.randint(-1, 3, (37, 2)), torch.randn(37, 260)[:, :width], torch.rand(37, 2)
    plan = ops.plan_routing(idx, 3)
    xs, ps = triton_sort_rows.sort_rows(x, plan.order, plan.offsets, 2, gates=gates)
    used = int(plan.offsets[-1])
    slots = plan.order[:used].long()
    assert used < 74 and torch.equal(xs[:used], x[slots // 2]) and torch.equal(ps[:used], gates.flatten()[slots])
    assert xs[used:].isnan().all() and ps[used:].isnan().all()


@pytest.mark.parametrize(("glu", "bias"), [(False, True), (True, False)])
def test_products_of_sorted_rows(monkeypatch, poisoned, launched, glu, bias):
    """Rows brought into expert order before the first layer and its weights' gradient: what gathered rows give."""
    monkeypatch.setattr(configs, "pick", lambda *_: LARGE)
    idx = torch.randint(-1, 2, (23, 2))
    leaves, idx = make(23, 24, 40, 16, 2, 2, glu=glu, bias=bias, idx=idx, dtype=torch.bfloat16)
    cotangent = torch.randn(23, 16)
    gathered = differentiate(ours(ops.plan_routing(idx, 2), glu=glu), leaves, cotangent)
    assert [name for name, _, constants in launched if constants.get("GATHER")] == ["up", "weight_grad"]
    launched.clear()
    monkeypatch.setattr(gpu, "SORTED_FROM", 0)
    monkeypatch.setattr(gpu, "SORTED_ROWS", 0)
    got = check(leaves, idx, cotangent, glu=glu)
    assert launched and not any(constants.get("GATHER") for _, _, constants in launched)
    assert all(map(torch.equal, got.values(), gathered))


@pytest.mark.parametrize("glu", [False, True])
def test_sorted_rows_of_few_experts(monkeypatch, poisoned, glu):
    """Tiles that end within a block of rows, an expert without any, slots that are unused."""
    monkeypatch.setattr(gpu, "SORTED_FROM", 0)
    monkeypatch.setattr(gpu, "SORTED_ROWS", 0)
    monkeypatch.setattr(configs, "pick", lambda *_: configs.Config(32, 64, 64, group=2))
    idx = torch.tensor([0] * 33 + [-1] * 3 + [2] * 5)[:, None]
    check(*make(41, 24, 72, 16, 3, 1, glu=glu, idx=idx, dtype=torch.bfloat16), glu=glu)


def test_sorted_rows_of_no_expert(monkeypatch, poisoned):
    monkeypatch.setattr(gpu, "SORTED_FROM", 0)
    monkeypatch.setattr(gpu, "SORTED_ROWS", 0)
    leaves, idx = make(5, 8, 16, 8, 3, 2, idx=torch.full((5, 2), -1), dtype=torch.bfloat16)
    got = differentiate(ours(ops.plan_routing(idx, 3)), leaves, torch.randn(5, 8))
    assert all(t.eq(0).all() for t in got)


@pytest.mark.parametrize(
    ("d", "h", "o", "glu", "whole"),
    [(24, 40, 16, True, "x w1 w2"), (25, 36, 18, False, ""), (24, 36, 16, False, "x w1"), (20, 40, 18, True, "w2")],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_and_pointers(monkeypatch, launched, dtype, d, h, o, glu, whole):
    """Rows of whole 16 bytes are loaded in blocks and others by pointers, in any mixture."""
    monkeypatch.setattr(configs, "pick", lambda *_: LARGE)
    leaves, idx = make(9, d, h, o, 2, 1, glu=glu, dtype=dtype)
    x, w1, _, w2, _, _ = leaves
    found = {name: triton_launch.describable(t) for name, t in (("x", x), ("w1", w1), ("w2", w2))}
    assert " ".join(name for name, is_whole in found.items() if is_whole) == whole
    check(leaves, idx, glu=glu)
    described = [(name, constants["DESCRIBED_W"]) for name, _, constants in launched if "DESCRIBED_W" in constants]
    expected = [("up", found["w1"]), ("down", found["w2"]), ("hidden_grad", found["w2"]), ("down", found["w1"])]
    assert described[:4] == expected


def test_what_is_loaded_in_blocks():
    t = torch.zeros(4, 6, 32, dtype=torch.bfloat16)
    assert triton_launch.describable(t) and triton_launch.describable(t[1:, :, 8:20])
    others = (t.float(), t[:, :, 4:], t[..., ::2], t[:, :0], t.mT, t.reshape(4, -1)[:, :180].reshape(4, 6, 30))
    assert not any(map(triton_launch.describable, others))


def test_weight_gradients_in_parts(monkeypatch, poisoned):
    """Rows split over programs, of which some get none: the same sums, in float32 until the last."""
    monkeypatch.setattr(triton_weight_grad, "splits_for", lambda *_: 3)
    idx = torch.tensor([0] * 50 + [1] * 3 + [3] * 20)[:, None]
    check(*make(73, 20, 24, 12, 4, 1, idx=idx, dtype=torch.bfloat16))


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 40), (torch.bfloat16, 7), (torch.bfloat16, 40)])
@pytest.mark.parametrize("parts", [1, 3])
def test_bias_gradients(monkeypatch, poisoned, dtype, width, parts):
    """Of rows as they are and by their factors; exact zeros without rows, nothing of rows nobody uses."""
    monkeypatch.setattr(triton_weight_grad, "splits_for", lambda *_: parts)
    plan = ops.plan_routing(torch.tensor([0] * 50 + [1] * 3 + [3] * 20 + [-1] * 4)[:, None], 4)
    a, scale = torch.randn(77, width).to(dtype), 10 ** torch.empty(77).uniform_(-3, 2)
    a[73:] = scale[73:] = torch.nan
    for factors in (None, scale):
        args = (a, a[:, :1], plan.order, plan.offsets, 1, "ieee", configs.INTERPRETED, 1)
        _, db = triton_weight_grad.weight_grad(*args, bias=True, scale=factors)
        rows = a.double() if factors is None else a.double() * factors.double()[:, None]
        for expert, begin, end in ((0, 0, 50), (1, 50, 53), (3, 53, 73)):
            assert_near(db[expert], rows[begin:end].sum(0), dtype)
        assert db[2].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_gradients_of_gates_of_all_sizes(monkeypatch, dtype):
    """Expert by expert, so that small gates do not hide behind another's. The same bits without the weights'."""
    monkeypatch.setattr(configs, "pick", lambda *_: LARGE)
    leaves, idx = make(20, 8, 16, 24, 2, 1, idx=torch.arange(20)[:, None] % 2, dtype=dtype)
    with torch.no_grad():
        leaves[5].copy_(10 ** torch.empty(20, 1).uniform_(-2, 2) * torch.tensor([1e-6, 1e3])[idx])
    plan, cotangent = ops.plan_routing(idx, 2), torch.randn(20, 24).to(dtype)
    _, _, _, db1, _, db2, _ = differentiate(ours(plan), leaves, cotangent)
    oracle = leaves[5].detach().double() * cotangent.double()
    for expert in range(2):
        assert_near(db2[expert], oracle[expert::2].sum(0), dtype)
    for i, together in ((2, db1), (4, db2)):
        some = [t.detach().requires_grad_(i == j) for j, t in enumerate(leaves)]
        assert torch.equal(torch.autograd.grad(ours(plan)(some), some[i], cotangent)[0], together)


def test_how_many_parts():
    assert triton_weight_grad.splits_for(4096, 100_000, 16, 132, 64) == 1  # enough tiles for all processors
    assert triton_weight_grad.splits_for(132, 10**6, 16, 132, 64) == 1  # one each
    assert triton_weight_grad.splits_for(131, 32_256, 16, 132, 64) == 2
    assert triton_weight_grad.splits_for(16, 32_256, 16, 132, 64) == 3  # each part still has 8 blocks of rows
    assert triton_weight_grad.splits_for(1, 10**6, 1, 132, 64) == 16
    assert triton_weight_grad.splits_for(1, 0, 16, 132, 64) == 1


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("which", [(0,), (1, 2), (3, 4), (2,), (4,), (5,)])
def test_only_the_needed_gradients(monkeypatch, which, glu):
    """Frozen inputs get nothing and cost no kernel; the others get what they get when all are trained."""
    leaves, idx = make(20, 8, 12, 6, 3, 2, glu=glu, idx=torch.randint(-1, 3, (20, 2)))
    cotangent, plan = torch.randn(20, 6), ops.plan_routing(idx, 3)
    every = torch.autograd.grad(ours(plan, glu=glu)(leaves), leaves, cotangent)
    some = [t.detach().requires_grad_(i in which) for i, t in enumerate(leaves)]
    used = []
    for name in ("down", "weight_grad", "hidden_grad", "gate_grad"):
        kernel = getattr(gpu, name)
        monkeypatch.setattr(
            gpu, name, lambda *a, kernel=kernel, name=name, **k: (used.append(name), kernel(*a, **k))[1]
        )
    y = ours(plan, glu=glu)(some)
    used.clear()
    y.backward(cotangent)
    for i, t in enumerate(some):
        assert (t.grad is not None) == (i in which)
        if i in which:
            torch.testing.assert_close(t.grad, every[i])
    assert ("weight_grad" in used) == bool({1, 2, 3, 4} & set(which))
    assert ("down" in used) == (0 in which) and ("gate_grad" in used) == (5 in which)
    assert ("hidden_grad" in used) == (which != (4,))


def test_unused_slots_empty_experts_and_duplicates():
    idx = torch.randint(-1, 4, (41, 3))
    idx[0], idx[1], idx[2] = -1, 3, torch.tensor([2, 2, -1])
    leaves, idx = make(41, 12, 20, 9, 6, 3, idx=idx)  # experts 4 and 5 are empty
    got = check(leaves, idx)
    assert got["y"][0].eq(0).all() and got["x"][0].eq(0).all() and got["gates"][idx == -1].eq(0).all()
    with torch.no_grad():
        for t in leaves[1:5]:
            t[4:] = torch.nan
    plan, cotangent = ops.plan_routing(idx, 6), torch.randn(41, 9)
    y, dx, *dw, dgates = differentiate(ours(plan), leaves, cotangent)
    assert all(t.isfinite().all() for t in (y, dx, dgates))
    assert all(t[4:].eq(0).all() and t[:4].flatten(1).ne(0).any(1).all() for t in dw)


def test_gates_of_many_experts(monkeypatch):
    """More experts than one block: every slot is written by the block of its expert, an unused one by the last."""
    monkeypatch.setattr(triton_gate_grad, "BLOCK_E", 16)
    idx = torch.randint(-1, 37, (70, 3))
    for bias in (True, False):
        check(*make(70, 8, 16, 24, 37, 3, bias=bias, idx=idx))


def test_nothing_in_an_unused_slot_matters():
    leaves, idx = make(20, 8, 12, 6, 3, 2)
    idx[3:6] = -1
    plan, cotangent = ops.plan_routing(idx, 3), torch.randn(20, 6)
    clean = differentiate(ours(plan), leaves, cotangent)
    dirty = [t.detach().clone().requires_grad_() for t in leaves]
    with torch.no_grad():
        dirty[0][3:6], dirty[5][3:6] = torch.nan, torch.nan
    cotangent[3:6] = torch.nan
    assert all(map(torch.equal, clean, differentiate(ours(plan), dirty, cotangent)))


def test_a_nan_token_stays_with_its_experts():
    idx = torch.tensor([0] * 5 + [1] * 35 + [2] * 10).view(-1, 1)  # expert 3 is empty
    leaves, idx = make(50, 8, 12, 6, 4, 1, idx=idx)
    for spoilt in (0, 39):
        x = leaves[0].detach().clone()
        x[spoilt] = torch.nan
        args = [x.requires_grad_(), *leaves[1:]]
        y, _, *dw, _ = differentiate(ours(ops.plan_routing(idx, 4)), args, torch.randn(50, 6))
        expert, others = int(idx[spoilt]), torch.arange(50) != spoilt
        assert y[spoilt].isnan().all() and y[others].isfinite().all()
        for t in dw[:3]:
            assert t[expert].isnan().any() and t[torch.arange(4) != expert].isfinite().all()


def test_all_tokens_on_one_expert():
    check(*make(70, 12, 20, 9, 5, 1, idx=torch.full((70, 1), 4)))


def test_strided_and_expanded_inputs():
    e, k, m, d, h, o = 4, 2, 17, 8, 12, 6
    x = torch.randn(2 * m, 2 * d)[::2, ::2]
    w1, w2 = torch.randn(d, h, e).permute(2, 1, 0), torch.randn(o, e, h).transpose(0, 1)
    b1, b2 = torch.randn(h, e).t(), torch.randn(e, 2 * o)[:, :o]
    gates = torch.rand(m, 1).expand(m, k)
    idx = torch.stack([torch.randperm(e)[:k] for _ in range(m)], 1).t()
    assert not any(t.is_contiguous() for t in (x, w1, w2, b1, b2, gates, idx))
    leaves = [t.detach().requires_grad_() for t in (x, w1, b1, w2, b2, gates)]
    check(leaves, idx)
    cotangent = torch.randn(o).expand(m, o)
    oracle = differentiate(
        lambda ts: reference.moe_mlp(*ts, idx), [t.detach().double().requires_grad_() for t in leaves], cotangent
    )
    for a, b in zip(differentiate(ours(ops.plan_routing(idx, e)), leaves, cotangent), oracle, strict=True):
        assert_near(a, b, torch.float32)


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_to_do(rows):
    """No token, or no token with an expert: exact zeros everywhere."""
    leaves, _ = make(rows, 4, 6, 3, 4, 2)
    plan = ops.plan_routing(torch.full((rows, 2), -1), 4)
    got = differentiate(ours(plan), leaves, torch.randn(rows, 3))
    assert [list(t.shape) for t in got] == [[rows, 3], *(list(t.shape) for t in leaves)]
    assert all(t.eq(0).all() for t in got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uninitialised_memory_is_never_read(poisoned, dtype):
    check(*make(23, 8, 40, 6, 5, 3, idx=torch.randint(-1, 4, (23, 3)), dtype=dtype))


def test_one_launch_for_inference(monkeypatch):
    """Two-byte numbers of small width take the fused kernel, whatever the number of accumulators; wider ones do not."""
    used = []
    fused = gpu.fused
    monkeypatch.setattr(gpu, "fused", lambda *a: (used.append(a[0].shape[1]), fused(*a))[1])
    check(*make(37, 50, 40, 70, 5, 2, dtype=torch.float16))
    check(*make(9, 48, 33, 20, 3, 2, dtype=torch.bfloat16, bias=False), activation="relu")
    assert used == [50, 48]
    check(*make(9, 8, 16, 8, 3, 2, dtype=torch.bfloat16, glu=True), glu=True)
    check(*make(9, 8, 16, 8, 3, 2))
    check(*make(3, 8, 16, 400, 3, 2, dtype=torch.float16))
    assert used == [50, 48]


def test_zeros_do_not_pass():
    """The control of this file: kernels that return zeros turn it red."""
    for name in ("combine", "gate_grad"):
        kernel = getattr(gpu, name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu, name, lambda *a, kernel=kernel: kernel(*a).zero_())
            with pytest.raises(AssertionError, match="relative error 1"):
                check(*make(9, 8, 12, 6, 3, 2))


# --- one op -----------------------------------------------------------------------------------------------------------


def test_saved_for_backward():
    """x, the pre-activation, weights, gates and int32 tables; nothing as large as rows x width beside them."""
    leaves, idx = make(40, 8, 12, 6, 4, 2)
    saved = []
    with saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        ours(ops.plan_routing(idx, 4))(leaves)
    known = {t.untyped_storage().data_ptr() for t in leaves}
    fresh = [t for t in saved if t.untyped_storage().data_ptr() not in known]
    assert [list(t.shape) for t in fresh if t.is_floating_point()] == [[80, 12]]
    assert all(t.dtype == torch.int32 for t in fresh if not t.is_floating_point())


def test_opcheck_and_compile():
    leaves, idx = make(9, 6, 10, 5, 3, 2)
    plan = ops.plan_routing(idx, 3)
    torch.library.opcheck(torch.ops.moe_mtl.moe_mlp, (*leaves, *plan, "gelu", False, True, "triton"))
    compiled = torch.compile(ours(plan), fullgraph=True, backend="eager")
    cotangent = torch.randn(9, 5)
    assert all(
        map(torch.equal, differentiate(compiled, leaves, cotangent), differentiate(ours(plan), leaves, cotangent))
    )


def test_second_derivative_is_refused():
    leaves, idx = make(5, 4, 6, 3, 3, 2)
    (grad,) = torch.autograd.grad(ours(ops.plan_routing(idx, 3))(leaves).sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_grouped_linear(dtype, bias):
    x, w = torch.randn(45, 20).to(dtype).requires_grad_(), torch.randn(4, 50, 20).to(dtype).requires_grad_()
    b = torch.randn(4, 50).to(dtype).requires_grad_() if bias else None
    ids, cotangent = torch.randint(-1, 3, (45,)), torch.randn(45, 50).to(dtype)
    leaves = [t for t in (x, w, b) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    got = differentiate(lambda ts: ops.grouped_linear(*(*ts, None)[:3], ids, backend="triton"), leaves, cotangent)
    oracle = differentiate(lambda ts: reference.grouped_linear(*(*ts, None)[:3], ids), exact, cotangent)
    for a, b in zip(got, oracle, strict=True):
        assert_near(a, b, dtype)
    assert got[0][ids == -1].eq(0).all() and got[2][3].eq(0).all()


# --- what the kernels share -------------------------------------------------------------------------------------------


@triton.jit
def activations_kernel(z, y, y2, slope, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    values = tl.load(z + at)
    tl.store(y + at, triton_math.activate(values, ACTIVATION, False))
    both = triton_math.activate_and_derive(values, ACTIVATION, False)
    tl.store(y2 + at, both[0])
    tl.store(slope + at, both[1])


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_activations_of_16_bit_results(activation):
    """Of every size from nothing to infinity, and NaN; to a rounding or two of float32."""
    special = torch.tensor([0.0, -0.0, 1e-30, 1e30, -1e30, torch.inf, -torch.inf, torch.nan])
    z = torch.cat([torch.linspace(-40, 40, 8192 - 8), special])
    y, y2, slope = torch.empty(3, 8192)
    activations_kernel[(1,)](z, y, y2, slope, activation, 8192)
    exact = z.double().requires_grad_()
    oracle = getattr(torch.nn.functional, activation)(exact)
    (derivative,) = torch.autograd.grad(oracle.sum(), exact)
    finite = z.isfinite()
    for values in (y, y2):
        assert ((values - oracle).abs() / oracle.abs().clamp(min=1))[finite].max() < 3e-7
        assert values[-3] == torch.inf and values[-1].isnan()
    assert (slope - derivative)[finite].abs().max() < 1e-6 and slope[-1].isnan()


def test_sums_of_the_host():
    for number in (*range(1, 70), 127, 128, 129, 2**20 - 1, 2**20, 2**20 + 1):
        assert triton_launch.next_power_of_2(number) == 2 ** math.ceil(math.log2(number))
        for block in (1, 7, 64):
            assert triton_launch.cdiv(number, block) == math.ceil(number / block)
    assert triton_launch.cdiv(0, 64) == 0


# --- choice -----------------------------------------------------------------------------------------------------------


def test_the_table_has_an_answer_for_everything():
    for arch in (80, 90):
        for kernel in configs.KERNELS:
            for bits in (16, 32):
                if (kernel, bits) == ("fused", 32):
                    continue
                for glu in (False, True):
                    for rows in (0, 40, 300, 5000):
                        for width in (16, 200, 400, 4096):
                            config = configs.pick(kernel, arch, bits, glu, rows, width)
                            assert kernel == "weight_grad" or config.block_m in tables.TILE_ROWS
    assert configs.pick("up", 100, 16, False, 300, 768) == configs.pick("up", 90, 16, False, 300, 768)
    with pytest.raises(ValueError, match=r"backend: .* compute capability 7\.5"):
        configs.pick("up", 75, 16, False, 300, 768)


def test_no_line_of_the_table_is_hidden():
    """Each line is the first that fits for some call."""
    rows, widths = [0, 48, 49, 128, 129, 512, 513, 10**6], [1, 256, 257, 384, 385, 512, 513, 10**6]
    found = set()
    for line in configs.entries():
        for call in product((False, True), rows, widths, (False, True)):
            found.add(next(e for e in configs.entries() if e.fits(line.kernel, line.arch, line.bits, *call)))
    assert found == set(configs.entries())


def test_what_triton_cannot_do_is_refused(monkeypatch):
    leaves, idx = make(5, 4, 6, 3, 3, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="backend: 'triton' has no float64"):
        ours(ops.plan_routing(idx, 3))(leaves)
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    leaves, idx = make(5, 4, 6, 3, 3, 2)
    with pytest.raises(ValueError, match=r"backend: 'triton' needs .* but x is on cpu"):
        ours(ops.plan_routing(idx, 3))(leaves)
    with pytest.raises(ValueError, match="backend: 'grouped_mm' needs rows of whole 16 bytes"):
        ops.moe_mlp(*leaves, ops.plan_routing(idx, 3), backend="grouped_mm")
