"""The source of the warp-specialized gradients of weights, on a machine in NumPy with partitions in random order."""

import random
from collections import Counter

import pytest
import torch

from moe_mtl.kernels import configs
from moe_mtl.kernels.configs import Config
from tests import gluon_language
from tests.gluon_machine import Fault

CASES = {  # rows of each expert, unused rows, programs
    "ends inside blocks, empty experts": ((70, 0, 129, 5, 0), 3, 2),
    "no slot used": ((0, 0, 0), 9, 3),
    "one row": ((1,), 40, 2),
    "programs without a tile": ((64, 10), 0, 50),
    "one program": ((100, 33, 0, 0, 1, 31, 300), 1, 1),
    "whole blocks": ((128, 256, 32), 0, 2),
    "three programs": ((40, 0, 7, 97, 64, 0, 0, 35), 5, 3),
}
SIZES = {  # block_m, slots, parts, rows and columns of weights; blocks are 32 rows, and tiles 64 columns
    "one tile": (64, 3, 2, 64, 64),
    "two slots, ragged": (64, 2, 2, 136, 72),
    "tall tiles, ragged rows": (128, 3, 1, 136, 128),
    "many slots, ragged columns": (64, 5, 2, 64, 80),
}
BIASES = ("no bias", "bias", "bias with factors")


@pytest.fixture(autouse=True)
def nothing_is_zero_by_chance():
    torch.use_deterministic_algorithms(True)  # new tensors are full of NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def kernels():
    return gluon_language.load()


def check(kernels, case: str, sizes: str, bias: str, seed: int) -> None:
    """One launch against float64; unused rows are infinite, so that a factor of zero does not hide them.

    Raises:
        Fault: what the machine, or the comparison, says.
    """
    (counts, unused, programs), (block_m, stages, parts, rows_out, cols_out) = CASES[case], SIZES[sizes]
    torch.manual_seed(seed)
    gluon_language.seeds = random.Random(seed)
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    used, rows = int(offsets[-1]), int(offsets[-1]) + unused
    a, b, s = torch.randn(rows, rows_out).bfloat16(), torch.randn(rows, cols_out).bfloat16(), torch.rand(rows)
    for t in (a, b, s):
        t[used:] = torch.inf
    config = Config(block_m, 64, 32, stages=stages, epilogues=parts, warp_specialized=True)
    scale = s if bias == "bias with factors" else None
    how = {"bias": bias != "no bias", "scale": scale}
    dw, db = kernels.gluon_weight_grad.weight_grad(a, b, offsets, config, programs, **how)
    assert (db is None) == (bias == "no bias")
    spans = [slice(begin, end) for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    factors = (torch.ones(rows) if scale is None else s.bfloat16()).double()[:, None]
    for e, span in enumerate(spans):
        exact = a[span].double().mT @ b[span].double()
        results = {"dw": (dw[e], exact)}
        if db is not None:
            results["db"] = (db[e], (a[span].double() * factors[span]).sum(0))
        for name, (actual, expected) in results.items():
            error = (actual.double() - expected).norm()
            if not error <= 8e-3 * expected.norm():  # NaN where nobody wrote
                raise Fault(f"{name} of expert {e}: error {error:.1e} of {expected.norm():.1e}")


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(kernels, case, bias):
    for seed in range(2):
        for sizes in SIZES:
            check(kernels, case, sizes, bias, seed)


@pytest.mark.parametrize(
    ("experts", "row_tiles", "col_tiles"),
    [(8, 24, 6), (8, 6, 24), (16, 6, 6), (64, 6, 6), (16, 12, 3), (16, 3, 12), (32, 8, 8)],
)
def test_biases_are_shared_out(kernels, experts, row_tiles, col_tiles):
    """A program of 132 adds up about as many as another, though its tiles are a whole number of rows apart."""
    rows, programs = experts * row_tiles, Counter()
    for above in range(rows):
        column = kernels.gluon_weight_grad.bias_column(above, col_tiles)
        assert 0 <= column < col_tiles
        programs[(above * col_tiles + column) % 132] += 1
    assert max(programs.values()) <= rows / 132 + 2


SLOT = "        warp_barrier()\n        mbarrier.arrive(empty.index(before), count=1, pred=step > 0)\n"
LAST = "    warp_barrier()\n    mbarrier.arrive(empty.index(before), count=1, pred=steps > 0)\n"
TURN = "    warp_barrier()\n    mbarrier.arrive(turn.index(1 - ME), count=1)\n"
TOTAL = "        if BIAS:\n            total = warpgroup_mma("
CUT = "        _cut({0}_bufs.index(slot), live, BLOCK_K, BLOCK_{1})\n"
SEEN = "        fence_async_shared()\n        warp_barrier()\n    acc"
READY = "        mbarrier.wait(ready.index(slot), phase)\n"
WRITTEN = "            f_buf.store(spread.to(f_bufs.dtype))\n"
FAULTS = {  # what is changed: old, new
    "the producer's first phase": [("phase = gl.to_tensor(1)", "phase = gl.to_tensor(0)")],
    "the consumer's phase": [("phase = (block // STAGES) & 1", "phase = 0")],
    "a phase is not flipped": [("phase = gl.where(slot == STAGES, phase ^ 1, phase)", "pass")],
    "blocks of the other consumer are not counted": [("block += gl.where(number", "gl.where(number")],
    "blocks of the tile itself are not counted": [("        block += gl.cdiv(end - begin, BLOCK_K)\n", "")],
    "the other's blocks are taken for as many": [("cdiv(other_end - other_begin", "cdiv(end - begin")],
    "the first tile counts one before it": [("gl.where(number < programs,", "gl.where(number < 0,")],
    "a slot is handed back before its product has ended": [(SLOT, ""), (TOTAL, SLOT + TOTAL)],
    "a slot is handed back in the first step": [("pred=step > 0", "pred=True")],
    "a slot of no block is handed back": [("pred=steps > 0", "pred=True")],
    "the last slot is not handed back": [(LAST, "")],
    "no barrier before slots are handed back": [
        (SLOT, SLOT.split("\n", 1)[1]),
        (LAST, LAST.split("\n", 1)[1]),
    ],
    "one product less is waited for": [("warpgroup_mma_wait(1,", "warpgroup_mma_wait(2,")],
    "one less with a bias": [("warpgroup_mma_wait(2,", "warpgroup_mma_wait(3,")],
    "no turns": [("    mbarrier.wait(turn.index(ME), turn_phase)\n", "")],
    "the turn's phase": [("turn_phase = gl.to_tensor(1 - ME)", "turn_phase = gl.to_tensor(1)")],
    "the turn's phase is not flipped": [("        turn_phase ^= 1\n", "")],
    "the turn is passed on with blocks alone": [("turn.index(1 - ME), count=1", "turn.index(1 - ME), pred=steps > 0")],
    "no barrier before the turn": [(TURN, TURN.split("\n", 1)[1]), (LAST, LAST.split("\n", 1)[1])],
    "other rows are not cut off": [("    if live > 0:", "    if live < 0:")],
    "of a alone they are": [(CUT.format("b", "N"), "")],
    "of b alone they are": [(CUT.format("a", "M"), "")],
    "cut a row too late": [("layout)) < live", "layout)) <= live")],
    "cut a row too early": [("layout)) < live", "layout)) < live - 1")],
    "cut before the block is there": [(READY + "        _cut", "        _cut")],
    "multiplied before all warps have cut": [(SEEN, "    acc")],
    "the last block is not the first": [
        ("first = begin + (steps - 1) * BLOCK_K", "first = begin"),
        ("            first = begin + step * BLOCK_K", "            first = begin + (step + 1) * BLOCK_K"),
    ],
    "rows of the first expert": [("first = begin + step * BLOCK_K", "first = step * BLOCK_K")],
    "factors of another step": [("source = begin + step * BLOCK_K + ks", "source = begin + (step + 1) * BLOCK_K + ks")],
    "factors past the end": [("mask=(source >= begin) & (source < end)", "mask=source < end + 40")],
    "multiplied before all warps have written factors": [
        (WRITTEN + "            fence_async_shared()\n            warp_barrier()\n", WRITTEN)
    ],
    "one buffer of factors": [("f_bufs.index(2 * ME + (step & 1))", "f_bufs.index(2 * ME)")],
    "factors of the other consumer": [("f_bufs.index(2 * ME + (step & 1))", "f_bufs.index(step & 1)")],
    "the bias of every column": [("if column == bias_column(", "if column >= 0 * bias_column(")],
    "the bias of no column": [("if column == bias_column(", "if column == col_tiles + bias_column(")],
    "rows past the last are stored": [("(rows < rows_out)[:, None]", "(rows < rows_out + 1)[:, None]")],
    "columns past the last are stored": [("(cols < cols_out - i * PART)", "(cols < cols_out)")],
    "both consumers have the same tiles": [("gl.program_id(0) + ME * programs", "gl.program_id(0)")],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault):
    broken = gluon_language.load(*(("gluon_weight_grad", old, new) for old, new in FAULTS[fault]))
    with pytest.raises(Fault):
        for seed in range(20):
            for case in CASES:
                for sizes in SIZES:
                    for bias in reversed(BIASES):
                        check(broken, case, sizes, bias, seed)


def test_where_they_run(monkeypatch):
    """Sorted rows of 16-bit numbers, whole 16 bytes, and four tiles for each processor."""
    launch = pytest.importorskip("moe_mtl.kernels.triton_launch")
    a, b = torch.empty(64, 768, dtype=torch.bfloat16), torch.empty(64, 1536, dtype=torch.bfloat16)
    can = launch.warp_specializes_sums
    assert not can(a, b, 8)
    monkeypatch.setattr(launch.triton, "__version__", "3.7.0")
    monkeypatch.setattr(configs, "chip", lambda device: (90, 132))
    assert can(a, b, 8) and can(b, a, 8) and can(a.half(), b.half(), 8)
    assert not can(a, b, 7)  # 7 * 6 * 12 tiles are less than 4 * 132
    assert can(a[:, :641], b[:, :1416], 8) and not can(a[:, :640], b, 8)  # tiles that are not full count
    assert not can(a.float(), b.float(), 8)
    assert not can(a[:, 1:], b, 8) and not can(a, b[:, 1:], 8)  # do not begin at whole 16 bytes
    assert not can(a, b[:, :1412], 8)  # places of results do not
    assert not can(a[:0], b[:0], 8)
    many = torch.empty(1, 2**16, dtype=torch.bfloat16, device="meta")
    assert can(many, many[:, : 2**15 - 8], 1) and not can(many, many[:, : 2**15], 1)  # 2^31 numbers of an expert
    rows = torch.empty(2**31 - launch.TILE, 768, dtype=torch.bfloat16, device="meta")
    assert can(rows[1:], rows[1:], 15) and not can(rows, rows, 15)
    for arch in (0, 80, 89, 100, 120):
        monkeypatch.setattr(configs, "chip", lambda device, arch=arch: (arch, 132))
        assert not can(a, b, 8)
