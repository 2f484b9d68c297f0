"""Sort tables on the GPU: a stable counting sort in two launches, without a word from the host.

Programs take slots in order, blocks of them at a time. The first launch counts the experts of every program, the
second knows from these counts where each program's rows of each expert begin, and ranks the slots within a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_mtl.kernels.plan import TILE_ROWS, tile_bound

PER_PROGRAM = 2048  # slots
RANKS = 4096  # slots x experts of a block, as many as fit into registers


@triton.jit
def _ids(idx, at, slots, num_experts, EXPERTS: tl.constexpr):
    """Expert of each slot; num_experts where none is used, EXPERTS past the last slot."""
    ids = tl.load(idx + at, mask=at < slots, other=0)
    ids = tl.where((ids < 0) | (ids >= num_experts), num_experts, ids).to(tl.int32)
    return tl.where(at < slots, ids, EXPERTS)


@triton.jit(do_not_specialize=["slots", "num_experts"])
def count_kernel(idx, counts, slots, num_experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, SUBBLOCKS: tl.constexpr):
    """Slots of each expert among this program's."""
    pid = tl.program_id(0)
    es = tl.arange(0, EXPERTS)
    total = tl.zeros([EXPERTS], tl.int32)
    for i in range(SUBBLOCKS):
        at = (pid * SUBBLOCKS + i) * BLOCK + tl.arange(0, BLOCK)
        ids = _ids(idx, at, slots, num_experts, EXPERTS)
        total += tl.sum((ids[:, None] == es[None, :]).to(tl.int32), 0)
    tl.store(counts + pid * EXPERTS + es, total)


@triton.jit(do_not_specialize=["slots", "num_experts", "programs"])
def place_kernel(
    idx,
    counts,
    order,
    inverse,
    offsets,
    tiles,
    slots,
    num_experts,
    programs,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    SUBBLOCKS: tl.constexpr,
    SMALL: tl.constexpr,
    MIDDLE: tl.constexpr,
    LARGE: tl.constexpr,
):
    """Order, inverse and tiles of this program's slots; offsets from the first program."""
    pid = tl.program_id(0)
    es = tl.arange(0, EXPERTS)
    total = tl.zeros([EXPERTS], tl.int32)
    before = tl.zeros([EXPERTS], tl.int32)
    for p in range(programs):
        part = tl.load(counts + p * EXPERTS + es)
        total += part
        before += tl.where(p < pid, part, 0)
    ends = tl.cumsum(total, 0)
    begins = ends - total
    if pid == 0:
        # the column after the last expert counts the unused slots
        tl.store(offsets + es, begins, mask=es <= num_experts)
    real = tl.where(es < num_experts, total, 0)
    base = begins + before
    for i in range(SUBBLOCKS):
        at = (pid * SUBBLOCKS + i) * BLOCK + tl.arange(0, BLOCK)
        ids = _ids(idx, at, slots, num_experts, EXPERTS)
        hits = (ids[:, None] == es[None, :]).to(tl.int32)
        rows = tl.sum(hits * (tl.cumsum(hits, 0) - 1 + base[None, :]), 1)
        tl.store(inverse + at, rows, mask=at < slots)
        tl.store(order + rows, at, mask=at < slots)
        base += tl.sum(hits, 0)
    start = 0
    start = _tiles(tiles, start, pid, programs, slots, num_experts, es, real, begins, SMALL, BLOCK)
    start = _tiles(tiles, start, pid, programs, slots, num_experts, es, real, begins, MIDDLE, BLOCK)
    start = _tiles(tiles, start, pid, programs, slots, num_experts, es, real, begins, LARGE, BLOCK)


@triton.jit
def _tiles(
    tiles, start, pid, programs, slots, num_experts, es, counts, begins, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """This program's share of the table of tiles of ROWS rows, which begins at `start`; returns where the next does."""
    bound = tl.cdiv(slots, ROWS) + num_experts
    per_expert = tl.cdiv(counts, ROWS)
    ends = tl.cumsum(per_expert, 0)
    share = tl.cdiv(tl.cdiv(bound, programs), BLOCK) * BLOCK
    for i in range(pid * share, tl.minimum(bound, (pid + 1) * share), BLOCK):
        at = i + tl.arange(0, BLOCK)
        expert = tl.sum((ends[None, :] <= at[:, None]).to(tl.int32), 1)
        own = expert[:, None] == es[None, :]
        first = tl.sum(tl.where(own, (begins - (ends - per_expert) * ROWS)[None, :], 0), 1) + at * ROWS
        stop = tl.minimum(first + ROWS, tl.sum(tl.where(own, (begins + counts)[None, :], 0), 1))
        real = expert < es.shape[0]
        entry = tiles + 3 * (start + at)
        tl.store(entry, tl.where(real, expert, -1), mask=at < bound)
        tl.store(entry + 1, tl.where(real, first, 0), mask=at < bound)
        tl.store(entry + 2, tl.where(real, stop, 0), mask=at < bound)
    return start + bound


def plan(idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """order, inverse, offsets and tiles of a `Plan`, from the ids of all slots in a row [r]."""
    slots = idx.shape[0]
    table = torch.empty(2, slots, dtype=torch.int32, device=idx.device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=idx.device)
    tiles = torch.empty(
        sum(tile_bound(slots, num_experts, rows) for rows in TILE_ROWS), 3, dtype=torch.int32, device=idx.device
    )
    programs = triton.cdiv(slots, PER_PROGRAM)
    experts = triton.next_power_of_2(num_experts + 1)
    block = min(128, PER_PROGRAM, RANKS // experts)
    counts = torch.empty(programs, experts, dtype=torch.int32, device=idx.device)
    sizes = {"EXPERTS": experts, "BLOCK": block, "SUBBLOCKS": PER_PROGRAM // block, "num_warps": 8}
    count_kernel[(programs,)](idx, counts, slots, num_experts, **sizes)
    place_kernel[(programs,)](
        idx,
        counts,
        table[0],
        table[1],
        offsets,
        tiles,
        slots,
        num_experts,
        programs,
        SMALL=TILE_ROWS[0],
        MIDDLE=TILE_ROWS[1],
        LARGE=TILE_ROWS[2],
        **sizes,
    )
    return table[0], table[1], offsets, tiles
