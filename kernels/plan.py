"""Sort tables: which rows of a routing belong to which expert, and how kernels cut them into tiles."""

import os
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from moe_mtl.kernels.dispatch import runs_triton, shape, traced

TILE_ROWS = (32, 64, 128)  # heights of tiles a kernel can ask for
DEBUG = os.environ.get("MOE_MTL_DEBUG", "") not in ("", "0")  # also checks what stalls a GPU
SORTED_BY_TRITON = 127  # experts up to which a block's ranks fit into registers


class Plan(NamedTuple):
    """Sort tables of one routing, shared by every op that routes the same way.

    Attributes:
        order: the flat slot (token * k + j) of every sorted row, int32 [r], r = m k. Stable: within an expert, slots
            ascend, so results do not depend on the sort. Unused slots (id -1) come last.
        inverse: the sorted row of every slot, int32 [r].
        offsets: where each expert's rows start, int32 [e + 1]; offsets[e] rows are used.
        tiles: for each height in `TILE_ROWS`, one table after the other, the tiles that cover every used row once:
            expert, first row, row after the last, int32 [n, 3], with expert -1 past the last tile. A table has
            `tile_bound` lines, whatever the routing, so nobody asks the device. Empty on a CPU.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor
    tiles: Tensor


def plan_routing(idx: Tensor, num_experts: int) -> Plan:
    """Sorts slots by expert.

    Args:
        idx: expert ids [m, k], int32 or int64, each 0..num_experts-1, or -1 where the slot is unused (padding). Ids may
            repeat within a row.
        num_experts: experts e.

    Raises:
        ValueError: idx is not an integer matrix, or an id is out of range. The latter is checked on the CPU; elsewhere
            it would stall, so ids out of range count as unused slots there, unless MOE_MTL_DEBUG=1 is set.
    """
    check_ids(idx)
    if num_experts < 1:
        raise ValueError(f"num_experts: got {num_experts}, expected at least 1")
    return Plan(*(_plan_op if traced(idx) else _plan)(idx, num_experts))


def check_ids(idx: Tensor) -> None:
    """Refuses what is not a matrix of ids.

    Raises:
        ValueError: not int64 or int32 [m, k].
    """
    if idx.dim() != 2 or idx.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"idx: got {shape(idx)} of {idx.dtype}, expected int64 or int32 ids [m, k]")


def any_unused(idx: Tensor, num_experts: int) -> bool:
    """Whether a slot is unused (id -1). Reads the ids on the host.

    Raises:
        ValueError: an id is out of range.
    """
    if idx.numel() == 0:
        return False
    low, high = (int(v) for v in torch.aminmax(idx))
    if low < -1 or high >= num_experts:
        raise ValueError(f"idx: got ids {low}..{high}, expected 0..{num_experts - 1}, or -1 for an unused slot")
    return low < 0


def slot_ids(plan: Plan) -> Tensor:
    """Expert id of every slot, int64 [r]; -1 where unused."""
    ids = torch.searchsorted(plan.offsets, plan.inverse, right=True) - 1
    return ids.masked_fill(ids == plan.offsets.shape[0] - 1, -1)


def tile_bound(rows: int, num_experts: int, height: int) -> int:
    """How many tiles of that height can be needed at most: every expert may end in a part of one."""
    return -(-rows // height) + num_experts


def tile_table(offsets: Tensor, rows: int, height: int) -> Tensor:
    """The tiles of one height, int32 [n, 3]; see `Plan`.

    Args:
        offsets: of the plan, int32 [e + 1].
        rows: r, used or not.
        height: rows of a tile.
    """
    experts = offsets.shape[0] - 1
    begins, stops = offsets[:-1], offsets[1:]
    ends = (stops - begins + height - 1).div(height, rounding_mode="floor").cumsum(0)
    at = torch.arange(tile_bound(rows, experts, height), device=offsets.device)
    expert = torch.searchsorted(ends, at, right=True)
    own = expert.clamp(max=experts - 1)
    first = begins[own] + (at - torch.cat([ends.new_zeros(1), ends])[own]) * height
    real = expert < experts
    stop = torch.minimum(first + height, stops[own])
    parts = (torch.where(real, expert, -1), torch.where(real, first, 0), torch.where(real, stop, 0))
    return torch.stack(parts, 1).int()


def tiles_of(plan: Plan, height: int) -> Tensor:
    """The plan's tiles of one height; made now where the plan has none.

    Raises:
        ValueError: no table has that height.
    """
    rows, experts = plan.order.shape[0], plan.offsets.shape[0] - 1
    if height not in TILE_ROWS:
        raise ValueError(f"height: got {height}, expected one of {TILE_ROWS}")
    if not plan.tiles.shape[0]:
        return tile_table(plan.offsets, rows, height)
    stops = list(accumulate(tile_bound(rows, experts, h) for h in TILE_ROWS))
    place = TILE_ROWS.index(height)
    return plan.tiles[stops[place] - tile_bound(rows, experts, height) : stops[place]]


def _plan(idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    flat = idx.reshape(-1)
    if flat.shape[0] >= 2**31:
        raise ValueError(f"idx: got {shape(idx)}, more slots than int32 tables can number; split the tokens")
    on_cpu = flat.device.type == "cpu"
    some_unused = any_unused(flat, num_experts) if on_cpu or DEBUG else True
    if flat.shape[0] and num_experts <= SORTED_BY_TRITON and runs_triton(flat.device):
        from moe_mtl.kernels import triton_plan

        return triton_plan.plan(flat, num_experts)
    if some_unused:
        flat = torch.where((flat < 0) | (flat >= num_experts), num_experts, flat)
    ids, order = flat.sort(stable=True)
    edges = torch.arange(num_experts + 1, dtype=ids.dtype, device=ids.device)
    offsets = torch.searchsorted(ids, edges, out_int32=True)
    inverse = torch.empty_like(order, dtype=torch.int32)
    inverse.scatter_(0, order, torch.arange(order.shape[0], dtype=torch.int32, device=order.device))
    tiles = [] if on_cpu else [tile_table(offsets, flat.shape[0], height) for height in TILE_ROWS]
    return order.int(), inverse, offsets, torch.cat(tiles) if tiles else inverse.new_empty(0, 3)


_plan_op = torch.library.custom_op("moe_mtl::plan_routing", _plan, mutates_args=())


@_plan_op.register_fake
def _(idx, num_experts):
    rows = idx.shape[0] * idx.shape[1]
    tiles = 0 if idx.device.type == "cpu" else sum(tile_bound(rows, num_experts, height) for height in TILE_ROWS)
    table = idx.new_empty(rows, dtype=torch.int32)
    return table, torch.empty_like(table), table.new_empty(num_experts + 1), table.new_empty(tiles, 3)
