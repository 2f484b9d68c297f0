"""Calls made again from the record of a like one, with compiled kernels that are played by interpreted ones.

A played kernel gets what a launcher gets: a grid, addresses as integers, descriptors and constants by place.
"""

import ctypes
import importlib
import sys
import weakref
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from moe_mtl.kernels import configs, dispatch, ops, reference
from moe_mtl.kernels import plan as tables
from tests import gluon_language
from tests.kernel_cases import differentiate, make

triton = pytest.importorskip("triton")
gpu = importlib.import_module("moe_mtl.kernels.gpu")
launching, planning, replaying, *users = (
    importlib.import_module(f"moe_mtl.kernels.triton_{name}")
    for name in (
        *("launch", "plan", "replay", "up", "down", "combine", "fused", "hidden_grad", "weight_grad", "gate_grad"),
        "sort_rows",
    )
)
combine = users[2].combine
pytestmark = pytest.mark.skipif(not dispatch.interpreted(), reason="TRITON_INTERPRET=1 is not set")
SMALL = configs.Config(32, 32, 32)


class Played:
    """A compiled kernel that interprets."""

    function, packed_metadata = 7, (4, 1, 0)

    def __init__(self, kernel, args, options):
        self.kernel, self.options = kernel, options
        self.like = [
            (t.dtype, t.shape, t.stride(), t.untyped_storage().nbytes() - t.storage_offset() * t.element_size())
            if isinstance(t, torch.Tensor)
            else None
            for t in args
        ]

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *values):
        assert (stream, function, metadata) == (5, self.function, self.packed_metadata)
        assert launch_metadata is enter is leave is None
        args = [value if like is None else at(value, *like) for value, like in zip(values, self.like, strict=True)]
        self.kernel[(x, y, z)](*args, **self.options)


def at(address, dtype, shape, strides, left):
    """The tensor at an address, with all that is left of its memory behind it."""
    if not left:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * left).from_address(address), dtype=dtype).as_strided(shape, strides)


@pytest.fixture
def made(monkeypatch):
    """Names of the kernels launched by calls in full, not by replays; the CPU is taken for a GPU."""
    names = []

    def launch(kernel, grid, args, constants, warps, stages=3, **options):
        record, launching.watcher.record = launching.watcher.record, None
        with _disable_current_modes():  # the interpreter is made of torch operations
            launching.launch(kernel, grid, args, constants, warps, stages, **options)
        launching.watcher.record = record
        names.append(kernel.fn.__name__)
        if record is not None:
            values = (*args, *constants.values())
            record.add(Played(kernel, values, {"num_warps": warps}), grid, values)

    for module in (planning, *users):
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(replaying, "replays_on", lambda device: True)
    monkeypatch.setattr(replaying, "current_stream", lambda device: 5)
    monkeypatch.setattr(configs, "pick", lambda *_: SMALL)  # a new function: nothing that is known stems from it
    torch.use_deterministic_algorithms(True)  # new tensors are full of NaN
    yield names
    torch.use_deterministic_algorithms(False)


def routed(idx, experts):
    """A plan as on a GPU, with its tables of tiles."""
    return tables.Plan(*planning.plan(idx.flatten(), experts))


def same(call, names, times=4):
    """Results of like calls, the third and later of which launch nothing themselves."""
    results = [call(seed) for seed in range(2)]
    assert names
    names.clear()
    results += [call(seed) for seed in range(2, times)]
    assert names == []
    return results


@pytest.mark.parametrize(
    ("dtype", "m", "d", "h", "o", "glu", "bias"),
    [
        (torch.float32, 13, 20, 33, 24, False, True),
        (torch.bfloat16, 13, 24, 32, 16, True, True),
        (torch.float16, 40, 32, 40, 32, False, False),
        (torch.bfloat16, 1, 17, 5, 3, False, True),
    ],
)
def test_training_and_inference(made, monkeypatch, dtype, m, d, h, o, glu, bias):
    """Other tokens, weights, gates and ids of the same kind: bits of the kernels called in full."""

    def draw(seed):
        torch.manual_seed(seed)
        leaves, idx = make(m, d, h, o, 4, 2, glu=glu, bias=bias, dtype=dtype)
        if seed == 2:
            idx = torch.where(torch.rand(idx.shape) < 0.4, -1, idx)
        return leaves, routed(idx, 4), torch.randn(m, o).to(dtype)

    def train(seed):
        leaves, plan, cotangent = draw(seed)
        return differentiate(lambda ts: ops.moe_mlp(*ts, plan, glu=glu, backend="triton"), leaves, cotangent)

    def infer(seed):
        leaves, plan, _ = draw(seed)
        with torch.no_grad():
            return [ops.moe_mlp(*leaves, plan, glu=glu, backend="triton")]

    got = [same(train, made), same(infer, made)]
    monkeypatch.setattr(replaying, "replays_on", lambda device: False)
    for run, results in zip((train, infer), got, strict=True):
        for seed, tensors in enumerate(results):
            for ours, full in zip(tensors, run(seed), strict=True):
                assert ours.isfinite().all() and torch.equal(ours, full)
                assert (ours.shape, ours.stride(), ours.dtype) == (full.shape, full.stride(), full.dtype)


@pytest.mark.parametrize("slots", [300, 9000])
def test_plans(made, slots):
    def plan(seed):
        torch.manual_seed(seed)
        idx = torch.randint(-1, 5, (slots,))
        return idx, planning.plan(idx, 5)

    for idx, (order, inverse, offsets, tiles) in same(plan, made):
        ids, expected = torch.where(idx < 0, 5, idx).sort(stable=True)
        assert torch.equal(order.long(), expected) and torch.equal(inverse[expected], torch.arange(slots).int())
        assert torch.equal(offsets, torch.searchsorted(ids, torch.arange(6)).int())
        assert torch.equal(tiles[: slots // 32 + 6], tables.tile_table(offsets, slots, 32))


def test_grouped_linear(made):
    """Rows of unused slots are zeros, which a replay makes anew."""

    def run(seed):
        torch.manual_seed(seed)
        x, w, b, dy = (torch.randn(*size) for size in ((9, 8), (3, 16, 8), (3, 16), (9, 16)))
        ids = torch.randint(-1, 3, (9,))
        plan = routed(ids, 3)
        dx, dw, db = gpu.grouped_linear_backward(dy, x, w, plan, [True] * 3)
        used, one = ids[:, None] >= 0, torch.nn.functional.one_hot(ids.clamp(min=0), 3) * (ids[:, None] >= 0)
        return (
            (gpu.grouped_linear(x, w, b, plan), torch.where(used, torch.einsum("mi,moi->mo", x, w[ids]) + b[ids], 0)),
            (dx, torch.where(used, torch.einsum("mo,moi->mi", dy, w[ids]), 0)),
            (dw, torch.einsum("mg,mo,mi->goi", one.float(), dy, x)),
            (db, one.float().T @ dy),
        )

    for pairs in same(run, made):
        for got, expected in pairs:
            torch.testing.assert_close(got, expected)


def test_what_decides_about_a_call(made):
    """Other strides, alignments and options are other calls."""
    leaves, idx = make(8, 16, 16, 16, 3, 2, dtype=torch.bfloat16)
    plan = routed(idx, 3)
    x, *others = [t.detach() for t in leaves]
    wide, odd = torch.randn(8, 40).bfloat16(), torch.randn(8 * 16 + 1).bfloat16()
    for call in (
        lambda: ops.moe_mlp(x, *others, plan, backend="triton"),
        lambda: ops.moe_mlp(wide[:, :16], *others, plan, backend="triton"),
        lambda: ops.moe_mlp(odd[1:].view(8, 16), *others, plan, backend="triton"),
        lambda: ops.moe_mlp(x, *others, plan, activation="relu", backend="triton"),
        lambda: ops.moe_mlp(x, others[0], None, *others[2:], plan, backend="triton"),
    ):
        full = call()
        for again in range(3):
            made.clear()
            assert torch.equal(call(), full) and bool(made) == (again == 0)


class Simulated:
    """A warp-specialized kernel, on the machine of its tests."""

    def __init__(self, kernel):
        self.fn = kernel

    def __getitem__(self, grid):
        def launch(*args, num_warps, num_stages=3, **constants):
            gluon_language.launch(self.fn, grid, args, constants, num_warps)

        return launch


def test_warp_specialized_kernels(made, monkeypatch):
    """Their descriptors have a layout, and there are as many programs as processors, or fewer."""
    kernels, launch = gluon_language.load(), users[0].launch  # that of the fixture
    for name in ("gluon_product", "gluon_hidden_grad", "gluon_weight_grad"):
        module = getattr(kernels, name)
        monkeypatch.setattr(module, "launch", lambda kernel, *rest: launch(Simulated(kernel), *rest))
        monkeypatch.setitem(sys.modules, f"moe_mtl.kernels.{name}", module)
    special = configs.Config(64, 64, configs.SUMMED, stages=2, epilogues=2, warp_specialized=True)
    monkeypatch.setattr(configs, "pick", lambda *call: special if call[-1] is True else SMALL)
    monkeypatch.setattr(configs, "chip", lambda device: (0, 3))
    monkeypatch.setattr(launching, "runs_gluon", lambda device: True)
    monkeypatch.setattr(launching, "TILES_EACH", 1)
    monkeypatch.setattr(gpu, "sorts_first", lambda *_: True)

    def run(seed):
        torch.manual_seed(seed)
        leaves, idx = make(80, 40, 64, 64, 3, 1, dtype=torch.bfloat16)
        cotangent = torch.randn(80, 64).bfloat16()
        got = differentiate(lambda ts: ops.moe_mlp(*ts, routed(idx, 3), backend="triton"), leaves, cotangent)
        exact = [t.detach().double().requires_grad_() for t in leaves]
        return got, differentiate(lambda ts: reference.moe_mlp(*ts, idx), exact, cotangent)

    results = [run(0)]
    names = ("product_kernel", "hidden_grad_kernel", "weight_grad_kernel")
    assert [made.count(name) for name in names] == [3, 1, 2]
    for got, expected in (*results, *same(run, made)):
        for a, b in zip(got, expected, strict=True):
            assert (a.double() - b).norm() < 1e-2 * b.norm()


@pytest.mark.parametrize("needed", ["x", "w1", "b1", "w2", "b2", "gates"])
def test_gradients_alone(made, needed):
    """Which are needed decides about a call, too."""
    names = ("x", "w1", "b1", "w2", "b2", "gates")
    leaves, idx = make(8, 16, 16, 16, 3, 2)
    plan, cotangent = routed(idx, 3), torch.randn(8, 16)
    leaves = [t.detach().requires_grad_(name == needed) for name, t in zip(names, leaves, strict=True)]
    leaf = leaves[names.index(needed)]
    (oracle,) = torch.autograd.grad(reference.moe_mlp(*leaves, idx), leaf, cotangent)
    for again in range(4):
        made.clear()
        (grad,) = torch.autograd.grad(ops.moe_mlp(*leaves, plan, backend="triton"), leaf, cotangent)
        torch.testing.assert_close(grad, oracle)
        assert bool(made) == (again < 2)


def test_a_call_that_copies_is_made_in_full(made):
    leaves, idx = make(8, 16, 16, 16, 3, 2)
    plan = routed(idx, 3)
    others = [t.detach() for t in leaves[1:]]
    turned = torch.randn(16, 8).T
    for _ in range(4):
        made.clear()
        got = ops.moe_mlp(turned, *others, plan, backend="triton")
        assert made
        torch.testing.assert_close(got, reference.moe_mlp(turned, *others, idx))
        turned = torch.randn(16, 8).T


def test_arguments_in_one_memory(made):
    """Overlapping arguments are told apart by which they are, views of them by where they lie."""

    @replaying.replayed
    def add(x, y, gates):
        return combine(x[2:], gates, y[:4], y[4:], 1)

    memory = torch.randn(12, 4)
    for shift in (0, 1, 2, 3):
        rows = memory[shift : shift + 6]
        got = add(rows, torch.tensor([3, 2, 1, 0, 4], dtype=torch.int32), torch.ones(4, 1))
        assert torch.equal(got, rows[[5, 4, 3, 2]])


def test_one_tensor_in_two_places(made):
    """Its record would take a later call's two tensors for one."""
    leaves, idx = make(8, 16, 16, 16, 3, 2)
    x, w1, b1, w2, b2, gates = (t.detach() for t in leaves)
    plan = routed(idx, 3)
    for second, w in ((b1, w1), (b1, w1), (b1, w2), (b2, w2), (b2, w1), (b2, w2), (b1, w1)):
        got = ops.moe_mlp(x, w1, b1, w, second, gates, plan, backend="triton")
        torch.testing.assert_close(got, reference.moe_mlp(x, w1, b1, w, second, gates, idx))
    made.clear()
    got = ops.moe_mlp(x, w1, b1, w1, b1, gates, plan, backend="triton")  # like one that was recorded by now
    torch.testing.assert_close(got, reference.moe_mlp(x, w1, b1, w1, b1, gates, idx))
    assert made == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # 16 bits are described as blocks
def test_buffers_are_freed_after_their_last_use(made, dtype):
    """Not at the end of the call: a backward holds what it still needs, and last its results."""
    leaves, idx = make(16, 16, 16, 16, 3, 2, dtype=dtype)
    x, w1, _, w2, b2, gates = (t.detach() for t in leaves)
    dy, z = torch.randn(16, 16).to(dtype), torch.randn(32, 16).to(dtype)
    args = (dy, x, z, w1, w2, b2, gates, routed(idx, 3), "gelu", False, [True] * 6)
    for _ in range(2):
        gpu.moe_mlp_backward(*args)
    replay = [*gpu.moe_mlp_backward.known.values()][-1]
    buffers, alive = [], []

    def watched(make):
        t = make()
        buffers.append(weakref.ref(t))
        return t

    def counting(run, args):
        alive.append(sum(buffer() is not None for buffer in buffers))
        run(*args)

    for step in replay.steps:
        step.makes[:] = [(holder, partial(watched, make)) for holder, make in step.makes]
        step.run = partial(lambda run, *args: counting(run, args), step.run)
    results = replay([t for t in (*args[:7], *args[7]) if isinstance(t, torch.Tensor)])
    assert all(t.isfinite().all() for t in results)
    # dys, gates, dz, p h, parts of gates' gradients | dgates | dw2, db2 | dw1, db1 | dxs | dx
    assert len(alive) == 7 and len(buffers) == 12
    assert alive == [2, 5, 6, 7, 6, 7, 7]
    assert sum(buffer() is not None for buffer in buffers) == len(results) == 6


def test_kinds_are_forgotten_in_order(made, monkeypatch):
    monkeypatch.setattr(replaying, "KEPT", 2)

    @replaying.replayed
    def added(x, times):
        return combine(x, None, torch.arange(4).int(), torch.tensor([4]).int(), times)

    x = torch.randn(4, 4)
    for times in (1, 2, 4):
        added(x, times)
    assert [key[-1] for key in added.known] == [2, 4]


def test_a_profiler_sees_every_launch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    device = torch.device("cuda", 0)
    assert replaying.replays_on(device) and not replaying.replays_on(torch.device("cuda", 1))
    assert not replaying.replays_on(torch.device("cpu"))
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(print)
    try:
        assert not replaying.replays_on(device)
    finally:
        hook.remove(print)
    assert replaying.replays_on(device)
    for name in ("launch_enter_hook", "launch_exit_hook"):
        with monkeypatch.context() as changed:
            changed.setattr(triton.knobs.runtime, name, None)
            assert replaying.replays_on(device)
            changed.setattr(triton.knobs.runtime, name, print)
            assert not replaying.replays_on(device)


def test_launches_tell_who_watches(monkeypatch):
    """The compiled kernel, the grid, and all that the kernel takes, in order; other orders are refused."""

    class Kernel:
        arg_names = ("x", "y", "BLOCK", "EVEN")

        def __getitem__(self, grid):
            return lambda *args, **options: ("compiled", grid, args, options)

    class Record(list):
        def add(self, *launch):
            self.append(launch)

    x, record = torch.ones(2), Record()
    launching.launch(Kernel(), (3,), (x, 4), {"EVEN": True, "BLOCK": 8}, warps=4)  # nobody watches
    monkeypatch.setattr(launching.watcher, "record", record)
    launching.launch(Kernel(), (3, 2), (x, 4), {"BLOCK": 8, "EVEN": True}, warps=4, maxnreg=64)
    ((compiled, grid, args),) = record
    options = {"BLOCK": 8, "EVEN": True, "num_warps": 4, "num_stages": 3, "maxnreg": 64}
    assert compiled == ("compiled", (3, 2), (x, 4), options) and (grid, args) == ((3, 2), (x, 4, 8, True))
    for wrong in ({"EVEN": True, "BLOCK": 8}, {"BLOCK": 8}, {"BLOCK": 8, "EVEN": True, "MORE": 1}):
        with pytest.raises(TypeError, match=f"constants: got .*'{[*wrong][-1]}'.* after 2 arguments"):
            launching.launch(Kernel(), (3,), (x, 4), wrong, warps=4)
