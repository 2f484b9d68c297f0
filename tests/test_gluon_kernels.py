"""The warp-specialized kernels' own source, on a machine in NumPy whose partitions run in random order."""

import importlib
import itertools
import random
import sys

import pytest
import torch

from moe_mtl.kernels import configs, dispatch, ops, reference
from moe_mtl.kernels import plan as tables
from moe_mtl.kernels.configs import Config
from tests import gluon_language
from tests.gluon_machine import Fault
from tests.kernel_cases import differentiate, make

CASES = {  # rows of each expert, unused rows, programs
    "ends inside tiles, an empty expert": ((70, 0, 129, 5), 3, 2),
    "no slot used": ((0, 0, 0), 9, 3),
    "one row": ((1,), 0, 2),
    "programs without a tile": ((64, 10), 0, 7),
    "one program, an odd number of tiles": ((100, 100, 1), 2, 1),
    "whole tiles": ((128, 256), 0, 2),
}
SIZES = {  # block_m, slots, parts, summed axis, width; blocks are 64 columns and 32 of the summed axis
    "one step": (64, 3, 2, 32, 128),
    "fewer steps than slots, ragged columns": (64, 3, 2, 64, 80),
    "more steps than slots": (64, 3, 4, 160, 64),
    "tall tiles, ragged columns": (128, 2, 2, 96, 136),
}
ROLES = ("up", "up without z", "up without bias", "down", "down without bias", "input_grad", "hidden_grad")
ACTIVATIONS = ("gelu", "silu", "relu")


@pytest.fixture(autouse=True)
def nothing_is_zero_by_chance():
    torch.use_deterministic_algorithms(True)  # new tensors are full of NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def kernels():
    return gluon_language.load()


def check(kernels, role: str, case: str, sizes: str, activation: str, seed: int) -> None:
    """One launch against float64.

    Raises:
        Fault: what the machine, or the comparison, says.
    """
    (counts, unused, programs), (block_m, stages, parts, inner, width) = CASES[case], SIZES[sizes]
    torch.manual_seed(seed)
    gluon_language.seeds = random.Random(seed)
    ids = torch.cat([torch.full((count,), expert) for expert, count in enumerate((*counts, unused))])
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    rows, used, experts = len(ids), int(offsets[-1]), len(counts)
    tiles = tables.tile_table(offsets, rows, block_m)
    config = Config(block_m, 64, 32, stages=stages, epilogues=parts, warp_specialized=True)
    transposed = role in ("input_grad", "hidden_grad")
    a = torch.randn(rows, inner).bfloat16()
    w = torch.randn(experts, *((inner, width) if transposed else (width, inner))).div(inner**0.5).bfloat16()
    b = None if transposed or role.endswith("bias") else torch.randn(experts, width).bfloat16()
    weights = w.double() if transposed else w.double().mT
    exact = torch.cat([a[ids == e].double() @ weights[e] + (0 if b is None else b[e].double()) for e in range(experts)])
    act = reference.ACTIVATIONS[activation]
    with torch.no_grad():
        if role.startswith("up"):
            save = role != "up without z"
            h, z = kernels.gluon_product.up(a, w, b, offsets, tiles, activation, save, config, programs)
            pairs = [(h, act(exact)), *[(z, exact)] * save]
            assert save or z.numel() == 0
        elif role == "hidden_grad":
            z, gates, order = torch.randn(rows, width).bfloat16(), torch.rand(rows), torch.randperm(rows).int()
            args = (a, w, z, gates, order, offsets, tiles, activation, config, programs)
            dz, ph, gate_parts = kernels.gluon_hidden_grad.hidden_grad(*args)
            zs, p = z[:used].double(), gates[order[:used].long()][:, None].double()
            with torch.enable_grad():
                leaf = zs.requires_grad_()
                (slope,) = torch.autograd.grad(act(leaf).sum(), leaf)
            h = act(zs.detach())
            sums = torch.nn.functional.pad(exact * h, (0, -width % 64)).unflatten(1, (-1, 64)).sum(2)
            pairs = [(dz, p * exact * slope), (ph, p * h), (gate_parts.mT, sums)]
        else:
            out = a.new_empty(rows, width)
            kernels.gluon_product.down(a, w, b, offsets, tiles, config, programs, out=out, transposed=transposed)
            pairs = [(out, exact)]
    for i, (actual, expected) in enumerate(pairs):
        error = (actual[:used].double() - expected).norm() / expected.norm().clamp(min=1e-30)
        if not error < (5e-5 if actual.dtype == torch.float32 else 8e-3):  # NaN where nobody wrote
            raise Fault(f"result {i}: error {error:.1e}")
        if not actual[used:].isnan().all():
            raise Fault(f"result {i}: unused rows are written")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("role", ROLES)
def test_against_float64(kernels, role, case):
    for seed, sizes in enumerate(SIZES):
        for activation in ACTIVATIONS if role in ("up", "hidden_grad") else ACTIVATIONS[seed % 3 :][:1]:
            check(kernels, role, case, sizes, activation, seed)


TURN = "    warp_barrier()\n    mbarrier.arrive(turn.index(1 - ME), count=1)\n"
SLOT = "        warp_barrier()\n        mbarrier.arrive(empty.index(before), count=1)\n"
LAST = "    warp_barrier()\n    mbarrier.arrive(empty.index(slot), count=1)\n"
WAIT = "        acc = warpgroup_mma_wait(1, deps=(acc,))\n"
READ = "        tma.store_wait(pendings=0)\n        warp_barrier()\n"
WRITTEN = "            fence_async_shared()\n            warp_barrier()\n"
MINE = "    mbarrier.wait(turn.index(ME), turn_phase)\n"


FAULTS = {  # what is changed: module, old, new
    "the producer's first phase": [("gluon_product", "phase = gl.to_tensor(1)", "phase = gl.to_tensor(0)")],
    "the consumer's phase": [("gluon_ring", "phase = (block // STAGES) & 1", "phase = 0")],
    "a phase is not flipped": [("gluon_ring", "phase = gl.where(slot == STAGES, phase ^ 1, phase)", "pass")],
    "blocks of the other consumer are not skipped": [("gluon_product", "block += 2 * steps", "block += steps")],
    "a slot is handed back before its product has ended": [("gluon_ring", WAIT + SLOT, SLOT + WAIT)],
    "the last slot is not handed back": [("gluon_ring", LAST, "")],
    "no barrier before slots are handed back": [
        ("gluon_ring", SLOT, SLOT.split("\n", 1)[1]),
        ("gluon_ring", LAST, LAST.split("\n", 1)[1]),
    ],
    "no turns": [("gluon_ring", MINE, "")],
    "the turn is passed on before the products": [
        ("gluon_ring", TURN, "    warp_barrier()\n"),
        ("gluon_ring", MINE, MINE + TURN.split("\n", 1)[1]),
    ],
    "the turn's phase": [("gluon_product", "turn_phase = gl.to_tensor(1 - ME)", "turn_phase = gl.to_tensor(1)")],
    "no barrier before the turn": [
        ("gluon_ring", TURN, TURN.split("\n", 1)[1]),
        ("gluon_ring", LAST, LAST.split("\n", 1)[1]),
    ],
    "z is not waited for": [("gluon_hidden_grad", "mbarrier.wait(z_ready.index(ME), phase)", "pass")],
    "z's buffer is not waited for": [("gluon_hidden_grad", "mbarrier.wait(z_empty.index(me), z_phase)", "pass")],
    "z's phase is not flipped": [("gluon_hidden_grad", "phase ^= 1\n        for i", "for i")],
    "dz is on its way when z's buffer is given away": [
        (
            "gluon_hidden_grad",
            READ + "        mbarrier.arrive(z_empty",
            "        warp_barrier()\n        mbarrier.arrive(z_empty",
        )
    ],
    "ph's buffer is not waited for": [("gluon_hidden_grad", "store_wait(pendings=3)", "store_wait(pendings=4)")],
    "the gates of the next tile": [
        ("gluon_hidden_grad", "order + gl.where(next_first + below", "order + gl.where(first + below")
    ],
    "a part's buffer is not waited for": [("gluon_product", READ, "        warp_barrier()\n")],
    "one warp alone waits for it": [("gluon_product", READ, "        tma.store_wait(pendings=0)\n")],
    "copied out before all warps have written": [("gluon_product", WRITTEN, "            fence_async_shared()\n")],
    "the end does not wait for copies": [
        ("gluon_product", "next_column\n    tma.store_wait(pendings=0)", "next_column")
    ],
    "a tile that is cut leaves whole": [("gluon_product", "whole = first + BLOCK_M <= end", "whole = first <= end")],
    "rows past the end are stored": [("gluon_product", "keep = (rows < end)", "keep = (rows < end + 1)")],
    "columns past the width are stored": [("gluon_product", "(cols < width)", "(cols < width + 1)")],
    "the bias of the part before": [("gluon_product", "ahead = ns + (i + 1) * PART", "ahead = ns + i * PART")],
    "both consumers have the same tiles": [("gluon_product", "gl.program_id(0) + ME * programs", "gl.program_id(0)")],
    "weights of the first expert": [("gluon_product", "w_first = expert * w_rows", "w_first = 0")],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault):
    broken = gluon_language.load(*FAULTS[fault])
    roles = ("hidden_grad",) if FAULTS[fault][0][0] == "gluon_hidden_grad" else ("up", "input_grad")
    with pytest.raises(Fault):
        for seed in range(20):
            for role in roles:
                for case in CASES:
                    for sizes in SIZES:
                        check(broken, role, case, sizes, "gelu", seed)


# ---- as layers call them ---------------------------------------------------------------------------------------------


@pytest.fixture
def launched(kernels, monkeypatch):
    """Names of the warp-specialized kernels that layers launch; the other kernels are interpreted."""
    pytest.importorskip("triton")
    if not dispatch.interpreted():
        pytest.skip("TRITON_INTERPRET=1 is not set")
    gpu, triton_launch = (importlib.import_module(f"moe_mtl.kernels.{name}") for name in ("gpu", "triton_launch"))
    special = Config(64, 64, configs.SUMMED, stages=3, epilogues=2, warp_specialized=True)
    monkeypatch.setattr(configs, "pick", lambda *call: special if call[-1] else Config(32, 64, 64))
    monkeypatch.setattr(triton_launch, "runs_gluon", lambda device: True)
    monkeypatch.setattr(gpu, "sorts_first", lambda *_: True)
    monkeypatch.setattr(gpu, "fused_fits", lambda *_: False)
    for name in ("gluon_product", "gluon_hidden_grad", "gluon_weight_grad"):
        monkeypatch.setitem(sys.modules, f"moe_mtl.kernels.{name}", getattr(kernels, name))
    gluon_language.launched.clear()
    return gluon_language.launched


NAMES = ("y", "dx", "dw1", "db1", "dw2", "db2", "dgates")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layers(launched, activation):
    """Both layers, and back through both, among the other kernels; ids leave slots unused and an expert empty."""
    torch.manual_seed(0)
    idx = torch.tensor([0, 2, 3, -1])[torch.randint(0, 4, (80, 2))]
    leaves, idx = make(80, 40, 64, 128, 4, 2, idx=idx, dtype=torch.bfloat16)
    plan, options = ops.plan_routing(idx, 4), {"activation": activation}
    cotangent = torch.randn(80, 128).bfloat16()
    exact = [t.detach().double().requires_grad_() for t in leaves]
    oracle = differentiate(lambda ts: reference.moe_mlp(*ts, idx, **options), exact, cotangent)
    got = differentiate(lambda ts: ops.moe_mlp(*ts, plan, backend="triton", **options), leaves, cotangent)
    back = ["hidden_grad_kernel", "weight_grad_kernel", "weight_grad_kernel", "product_kernel"]
    assert launched == ["product_kernel", "product_kernel", *back]
    for name, actual, expected in zip(NAMES, got, oracle, strict=True):
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < 1e-2, f"{name}: error {error:.1e}"
    with torch.no_grad():
        inferred = ops.moe_mlp(*leaves, plan, backend="triton", **options)
    assert torch.equal(inferred, got[0]) and len(launched) == 8


@pytest.mark.parametrize(
    ("sizes", "options", "special"),
    [
        ({}, {"glu": True}, []),  # gated units
        ({"dtype": torch.float32}, {}, []),
        ({"d": 36}, {}, ["product_kernel", "hidden_grad_kernel"]),  # rows of x are not whole 16 bytes
        ({"h": 72}, {}, ["product_kernel"] * 2 + ["hidden_grad_kernel"]),  # ends in a block of back through the first
        ({"o": 72}, {}, ["product_kernel"] * 3),  # of back through the second
    ],
)
def test_what_they_cannot_do_others_do(launched, sizes, options, special):
    made = {"m": 8, "d": 64, "h": 64, "o": 64, "e": 2, "k": 1, "dtype": torch.bfloat16} | sizes
    leaves, idx = make(**made, glu=options.get("glu", False))
    cotangent = torch.randn(8, made["o"])
    plan = ops.plan_routing(idx, 2)
    got = differentiate(lambda ts: ops.moe_mlp(*ts, plan, backend="triton", **options), leaves, cotangent)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    oracle = differentiate(lambda ts: reference.moe_mlp(*ts, idx, **options), exact, cotangent)
    for name, actual, expected in zip(NAMES, got, oracle, strict=True):
        assert (actual.double() - expected).norm() <= 1e-2 * expected.norm(), name
    assert launched == special


def test_gradients_that_nobody_wants(launched):
    """All results of `hidden_grad` or another kernel; `grouped_linear` gathers and scatters."""
    leaves, idx = make(8, 64, 64, 64, 2, 1, dtype=torch.bfloat16)
    plan = ops.plan_routing(idx, 2)
    x, *others = (t.detach() for t in leaves)
    y = ops.moe_mlp(x.requires_grad_(), *others, plan, backend="triton")
    torch.autograd.grad(y, x, torch.ones_like(y))
    assert launched == ["product_kernel"] * 3
    ops.grouped_linear(x, others[0], others[1], idx[:, 0], backend="triton")
    assert len(launched) == 3


def test_where_they_can_run(monkeypatch):
    launch = pytest.importorskip("moe_mtl.kernels.triton_launch")
    a, w = torch.empty(64, 128, dtype=torch.bfloat16), torch.empty(2, 64, 128, dtype=torch.bfloat16)
    assert not launch.warp_specializes(a, w, 64)
    monkeypatch.setattr(configs, "chip", lambda device: (90, 132))
    for version, known in (("3.6.0", True), ("3.7.1+git1", True), ("3.8.0", False), ("3.70.0", False)):
        monkeypatch.setattr(launch.triton, "__version__", version)
        assert launch.warp_specializes(a, w, 64) == known
    monkeypatch.setattr(launch.triton, "__version__", "3.7.0")
    assert launch.warp_specializes(a.half(), w.half(), 64) and launch.warp_specializes(a[:, :64], w, 128, True)
    assert not launch.warp_specializes(a.float(), w.float(), 64)
    assert not launch.warp_specializes(a[:, 1:65], w, 64)  # does not begin at whole 16 bytes
    assert not launch.warp_specializes(a, w[:, :32], 32)  # experts that do not lie behind each other
    assert not launch.warp_specializes(a, w, 60)
    assert not launch.warp_specializes(a, w[:, :32].contiguous(), 128, True)  # the summed axis ends inside a block
    many = torch.empty(2**25, 128, dtype=torch.bfloat16, device="meta")
    assert launch.warp_specializes(many, w, 56) and not launch.warp_specializes(many, w, 64)  # 2^31 numbers
    experts = torch.empty(launch.MOST_EXPERTS + 1, 64, 128, dtype=torch.bfloat16, device="meta")
    assert launch.warp_specializes(many, experts[1:], 56) and not launch.warp_specializes(many, experts, 56)
    with monkeypatch.context() as off:
        off.setattr(launch, "GLUON", False)
        assert not launch.warp_specializes(a, w, 64)
    for arch in (0, 80, 89, 100, 120):
        monkeypatch.setattr(configs, "chip", lambda device, arch=arch: (arch, 132))
        assert not launch.warp_specializes(a, w, 64)


def test_the_table():
    """Calls that can run them get them somewhere, for all their kernels, and every such line; others never do."""
    special = {entry for entry in configs.entries() if entry.config.warp_specialized}
    assert {entry.kernel for entry in special} == {"up", "down", "hidden_grad", "weight_grad"}
    for entry in special:
        assert (entry.arch, entry.bits) == (configs.HOPPER, 16)
        assert (entry.config.block_k, entry.config.warps, entry.config.registers) == (configs.SUMMED, 4, None)
        assert entry.config.stages >= 2  # a slot goes back when the next block is being multiplied
        assert entry.config.epilogues in (1, 2, 4, 8) and entry.config.block_m in (64, 128)
        assert entry.glu is False or entry.kernel == "weight_grad"  # gradients of weights know no gated units
    got = set()
    for kernel, glu, rows, width in itertools.product(
        {entry.kernel for entry in special}, (False, True), (48, 512, 513), (256, 512, 513)
    ):
        call = (kernel, configs.HOPPER, 16, glu, rows, width)
        assert not configs.pick(*call).warp_specialized
        if configs.pick(*call, True).warp_specialized:
            got.add(next(entry for entry in configs.entries() if entry.fits(*call, True)))
    assert got == special
