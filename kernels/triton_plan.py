"""Sort tables on the GPU: a stable counting sort without a word from the host, in one launch or two.

Up to ONE_LAUNCH slots every program counts the experts of all slots by itself. Above, a first launch counts the slots
of each share, and the second sums these counts. A program then either ranks slots, a block at a time, or makes lines of
the tables of tiles. Unused slots are those of expert `num_experts`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_mtl.kernels.plan import TILE_ROWS, tile_bound
from moe_mtl.kernels.triton_launch import cdiv, launch, next_power_of_2
from moe_mtl.kernels.triton_replay import replayed

ONE_LAUNCH = 8192  # slots
BLOCK = 128  # slots ranked at once, which eight bits can count
CHUNK = 1024  # slots counted at once, at least
SHARES = 256  # programs that rank, as a goal
LARGEST = 16384  # slots of a share, which sixteen bits can count
SUMMED = 8192  # counts loaded at once
COMPARED = 8192  # lines of a table of tiles x experts in one program


@triton.jit
def _ids(idx, at, stop, num_experts):
    """Expert of each slot, num_experts where none is used or `stop` is reached."""
    ids = tl.load(idx + at, mask=at < stop, other=-1)
    used = ids.to(tl.uint64) < num_experts.to(tl.uint64)  # below zero is far above
    return tl.where(used, ids.to(tl.int32), num_experts)


@triton.jit
def _rank(ids, base, at, table, slots, EXPERTS: tl.constexpr):
    """Places a block of slots, from the row of each expert's next slot; returns the rows that come next.

    Four experts share a word of the running counts, eight bits each, which makes a quarter of the sums.
    """
    shift = (ids & 3) * 8
    words = tl.arange(0, EXPERTS // 4)
    own = words[:, None] == (ids >> 2)[None, :]
    ones = tl.where(own, (1 << shift)[None, :], 0).to(tl.uint32)
    upto = tl.sum(tl.where(own, tl.cumsum(ones, 1), 0), 0).to(tl.int32)
    rows = tl.gather(base, ids, 0) + ((upto >> shift) & 255) - 1
    tl.store(table + slots + at, rows, mask=at < slots)
    tl.store(table + rows, at, mask=at < slots)
    sums = tl.sum(ones, 1).to(tl.int32)
    return base + tl.reshape((sums[:, None] >> (tl.arange(0, 4) * 8)[None, :]) & 255, [EXPERTS])


@triton.jit
def _tiles(
    part,
    total,
    ends,
    offsets,
    tiles,
    slots,
    num_experts,
    EXPERTS: tl.constexpr,
    LINES: tl.constexpr,
    SMALL: tl.constexpr,
    MIDDLE: tl.constexpr,
    LARGE: tl.constexpr,
):
    """One part of the tables of tiles, LINES lines of one height; offsets with the first.

    Args:
        part: which, the parts of the lowest height first.
        total: slots of each expert, and of none after the last.
        ends: running sum of total.
    """
    es = tl.arange(0, EXPERTS)
    begins = ends - total
    tl.store(offsets + es, begins, mask=(es <= num_experts) & (part == 0))
    small = tl.cdiv(slots, SMALL) + num_experts
    middle = tl.cdiv(slots, MIDDLE) + num_experts
    large = tl.cdiv(slots, LARGE) + num_experts
    second = tl.cdiv(small, LINES)
    third = second + tl.cdiv(middle, LINES)
    height = tl.where(part < second, SMALL, tl.where(part < third, MIDDLE, LARGE))
    bound = tl.where(part < second, small, tl.where(part < third, middle, large))
    start = tl.where(part < second, 0, tl.where(part < third, small, small + middle))
    first = tl.where(part < second, 0, tl.where(part < third, second, third))
    line = (part - first) * LINES + tl.arange(0, LINES)
    needed = tl.where(es < num_experts, (total + height - 1) // height, 0)
    stops = tl.cumsum(needed, 0)
    expert = tl.sum((stops[None, :] <= line[:, None]).to(tl.int32), 1)
    real = expert < num_experts
    own = tl.minimum(expert, num_experts)
    row = tl.gather(begins - (stops - needed) * height, own, 0) + line * height
    stop = tl.minimum(row + height, tl.gather(ends, own, 0))
    entry = tiles + 3 * (start + line)
    tl.store(entry, tl.where(real, expert, -1), mask=line < bound)
    tl.store(entry + 1, tl.where(real, row, 0), mask=line < bound)
    tl.store(entry + 2, tl.where(real, stop, 0), mask=line < bound)


@triton.jit(do_not_specialize=["slots", "num_experts"])
def sort_kernel(
    idx,
    table,
    offsets,
    tiles,
    slots,
    num_experts,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    LINES: tl.constexpr,
    SMALL: tl.constexpr,
    MIDDLE: tl.constexpr,
    LARGE: tl.constexpr,
):
    """A block of order and inverse, or a part of the tiles: all from the ids, at most CHUNK."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(slots, BLOCK)
    at = pid * BLOCK + tl.arange(0, BLOCK)
    ids = _ids(idx, at, slots, num_experts)
    every = tl.arange(0, CHUNK)
    # slots past the last count as unused ones, which nothing comes after
    pairs = _ids(idx, every, slots, num_experts) * 2 + (every < pid * BLOCK).to(tl.int32)
    others, before = tl.split(tl.reshape(tl.histogram(pairs, 2 * EXPERTS), [EXPERTS, 2]))
    total = others + before
    ends = tl.cumsum(total, 0)
    if pid < blocks:
        _rank(ids, ends - total + before, at, table, slots, EXPERTS)
    else:
        _tiles(pid - blocks, total, ends, offsets, tiles, slots, num_experts, EXPERTS, LINES, SMALL, MIDDLE, LARGE)


@triton.jit(do_not_specialize=["slots", "num_experts", "share"])
def count_kernel(idx, counts, slots, num_experts, share, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):
    """Slots of each expert in a share, int16 (two to a number of `counts`)."""
    pid = tl.program_id(0)
    stop = tl.minimum(slots, (pid + 1) * share)
    total = tl.zeros([EXPERTS], tl.int32)
    for i in range(pid * share, stop, CHUNK):
        at = i + tl.arange(0, CHUNK)
        total += tl.histogram(_ids(idx, at, stop, num_experts), EXPERTS, mask=at < stop)
    halves = counts.to(tl.pointer_type(tl.int16), bitcast=True)
    tl.store(halves + pid * EXPERTS + tl.arange(0, EXPERTS), total.to(tl.int16))


@triton.jit(do_not_specialize=["slots", "num_experts", "share"])
def place_kernel(
    idx,
    counts,
    table,
    offsets,
    tiles,
    slots,
    num_experts,
    share,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LINES: tl.constexpr,
    SMALL: tl.constexpr,
    MIDDLE: tl.constexpr,
    LARGE: tl.constexpr,
):
    """Order and inverse of a share, or a part of the tiles, from the counts of all shares."""
    pid = tl.program_id(0)
    shares = tl.cdiv(slots, share)
    es = tl.arange(0, EXPERTS)
    halves = counts.to(tl.pointer_type(tl.int16), bitcast=True)
    others = tl.zeros([ROWS, EXPERTS], tl.int32)
    before = tl.zeros([ROWS, EXPERTS], tl.int32)
    for i in range(0, shares, ROWS):
        row = i + tl.arange(0, ROWS)[:, None]
        part = tl.load(halves + row * EXPERTS + es[None, :], mask=row < shares, other=0).to(tl.int32)
        others += tl.where(row < pid, 0, part)
        before += tl.where(row < pid, part, 0)
    earlier = tl.sum(before, 0)
    total = tl.sum(others, 0) + earlier
    ends = tl.cumsum(total, 0)
    if pid < shares:
        base = ends - total + earlier
        stop = tl.minimum(slots, (pid + 1) * share)
        at = pid * share + tl.arange(0, BLOCK)
        ids = _ids(idx, at, stop, num_experts)
        for _ in range(pid * share, stop, BLOCK):
            following = _ids(idx, at + BLOCK, stop, num_experts)  # on its way while these are ranked
            base = _rank(ids, base, at, table, slots, EXPERTS)
            at += BLOCK
            ids = following
    else:
        _tiles(pid - shares, total, ends, offsets, tiles, slots, num_experts, EXPERTS, LINES, SMALL, MIDDLE, LARGE)


@replayed
def plan(idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """order, inverse, offsets and tiles of a `Plan`, from the ids of all slots in a row [r]."""
    idx, slots = idx.contiguous(), idx.shape[0]
    table = torch.empty(2, slots, dtype=torch.int32, device=idx.device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=idx.device)
    bounds = [tile_bound(slots, num_experts, rows) for rows in TILE_ROWS]
    tiles = torch.empty(sum(bounds), 3, dtype=torch.int32, device=idx.device)
    experts = max(8, next_power_of_2(num_experts + 1))
    lines = min(256, COMPARED // experts)
    parts = sum(cdiv(bound, lines) for bound in bounds)
    sizes = {"BLOCK": BLOCK, "LINES": lines} | dict(zip(("SMALL", "MIDDLE", "LARGE"), TILE_ROWS, strict=True))
    if slots <= ONE_LAUNCH:
        chunk = max(CHUNK, next_power_of_2(slots))
        grid, args = (cdiv(slots, BLOCK) + parts,), (idx, table, offsets, tiles, slots, num_experts)
        launch(sort_kernel, grid, args, {"EXPERTS": experts, "CHUNK": chunk, **sizes}, warps=8 if chunk < 4096 else 16)
    else:
        share = min(max(next_power_of_2(cdiv(slots, SHARES)), 2 * BLOCK), LARGEST)
        shares = cdiv(slots, share)
        counts = torch.empty(shares, experts // 2, dtype=torch.int32, device=idx.device)
        args = (idx, counts, slots, num_experts, share)
        launch(count_kernel, (shares,), args, {"EXPERTS": experts, "CHUNK": CHUNK}, warps=8)
        args = (idx, counts, table, offsets, tiles, slots, num_experts, share)
        constants = {"EXPERTS": experts, "ROWS": SUMMED // experts, **sizes}
        launch(place_kernel, (shares + parts,), args, constants, warps=8)
    return table[0], table[1], offsets, tiles
