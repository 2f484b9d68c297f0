"""The warp-specialized kernels' own source, on a machine in NumPy whose partitions run in random order."""

import random

import pytest
import torch

from moe_mtl.kernels import plan as tables
from moe_mtl.kernels import reference
from moe_mtl.kernels.configs import Config
from tests import gluon_language
from tests.gluon_machine import Fault

CASES = {  # rows of each expert, unused rows, programs
    "ends inside tiles, an empty expert": ((70, 0, 129, 5), 3, 2),
    "no slot used": ((0, 0, 0), 9, 3),
    "one row": ((1,), 0, 2),
    "programs without a tile": ((64, 10), 0, 7),
    "one program, an odd number of tiles": ((100, 100, 1), 2, 1),
    "whole tiles": ((128, 256), 0, 2),
}
SIZES = {  # block_m, slots, summed axis, width; blocks are 64 columns and 32 of the summed axis
    "one step": (64, 3, 32, 128),
    "fewer steps than slots, ragged columns": (64, 3, 64, 80),
    "more steps than slots": (64, 3, 160, 64),
    "tall tiles, ragged columns": (128, 2, 96, 136),
}
ROLES = ("up", "up without z", "down", "input_grad", "hidden_grad")
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
    (counts, unused, programs), (block_m, stages, inner, width) = CASES[case], SIZES[sizes]
    torch.manual_seed(seed)
    gluon_language.seeds = random.Random(seed)
    ids = torch.cat([torch.full((count,), expert) for expert, count in enumerate((*counts, unused))])
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    rows, used, experts = len(ids), int(offsets[-1]), len(counts)
    tiles = tables.tile_table(offsets, rows, block_m)
    config = Config(block_m, 64, 32, stages=stages, epilogues=2, warp_specialized=True)
    transposed = role in ("input_grad", "hidden_grad")
    a = torch.randn(rows, inner).bfloat16()
    w = torch.randn(experts, *((inner, width) if transposed else (width, inner))).div(inner**0.5).bfloat16()
    b = None if transposed else torch.randn(experts, width).bfloat16()
    weights = w.double() if transposed else w.double().mT
    exact = torch.cat([a[ids == e].double() @ weights[e] + (0 if b is None else b[e].double()) for e in range(experts)])
    act = reference.ACTIVATIONS[activation]
    with torch.no_grad():
        if role.startswith("up"):
            save = role == "up"
            h, z = kernels.gluon_product.up(a, w, b, offsets, tiles, activation, save, config, programs)
            pairs = [(h, act(exact)), *[(z, exact)] * save]
            assert save or z.numel() == 0
        elif role == "hidden_grad":
            z, gates, order = torch.randn(rows, width).bfloat16(), torch.rand(rows), torch.randperm(rows).int()
            args = (a, w, z, gates, order, offsets, tiles, activation, config, programs)
            dz, ph, parts = kernels.gluon_hidden_grad.hidden_grad(*args)
            zs, p = z[:used].double(), gates[order[:used].long()][:, None].double()
            with torch.enable_grad():
                leaf = zs.requires_grad_()
                (slope,) = torch.autograd.grad(act(leaf).sum(), leaf)
            h = act(zs.detach())
            sums = torch.nn.functional.pad(exact * h, (0, -width % 64)).unflatten(1, (-1, 64)).sum(2)
            pairs = [(dz, p * exact * slope), (ph, p * h), (parts.mT, sums)]
        else:
            out = a.new_empty(rows, width)
            kernels.gluon_product.down(a, w, b, offsets, tiles, config, programs, out=out, transposed=transposed)
            pairs = [(out, exact)]
    for i, (actual, expected) in enumerate(pairs):
        error = (actual[:used].double() - expected).norm() / expected.norm().clamp(min=1e-30)
        if not error < (1e-5 if actual.dtype == torch.float32 else 8e-3):  # NaN where nobody wrote
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
    "z is not waited for": [("gluon_hidden_grad", "mbarrier.wait(z_ready.index(ME), z_phase)", "pass")],
    "z's buffer is not waited for": [("gluon_hidden_grad", "mbarrier.wait(z_empty.index(me), z_phase)", "pass")],
    "z's phase is not flipped": [("gluon_hidden_grad", "z_phase ^= 1\n        z_first", "z_first")],
    "rows past the end are stored": [("gluon_product", "live = (rows < end)", "live = (rows < first + BLOCK_M)")],
    "columns past the width are stored": [("gluon_product", "cols < width - i * PART", "cols < width")],
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
