"""Sort tables: which rows of a routing belong to which expert."""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_mtl.kernels.dispatch import shape, traced


class Plan(NamedTuple):
    """Sort tables of one routing, shared by every op that routes the same way. A kernel's tile table would be a field.

    Attributes:
        order: the flat slot (token * k + j) of every sorted row, int32 [r], r = m k. Stable: within an expert, slots
            ascend, so results do not depend on the sort. Unused slots (id -1) come last.
        inverse: the sorted row of every slot, int32 [r].
        offsets: where each expert's rows start, int32 [e + 1]; offsets[e] rows are used.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor


def plan_routing(idx: Tensor, num_experts: int) -> Plan:
    """Sorts slots by expert.

    Args:
        idx: expert ids [m, k], int32 or int64, each 0..num_experts-1, or -1 where the slot is unused (padding). Ids may
            repeat within a row.
        num_experts: experts e.

    Raises:
        ValueError: idx is not an integer matrix, or (checked on the CPU only, elsewhere it would stall) an id is out of
            range.
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


def _plan(idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = idx.reshape(-1)
    if flat.device.type != "cpu" or any_unused(flat, num_experts):
        flat = torch.where(flat < 0, num_experts, flat)
    ids, order = flat.sort(stable=True)
    edges = torch.arange(num_experts + 1, dtype=ids.dtype, device=ids.device)
    offsets = torch.searchsorted(ids, edges, out_int32=True)
    inverse = torch.empty_like(order, dtype=torch.int32)
    inverse.scatter_(0, order, torch.arange(order.shape[0], dtype=torch.int32, device=order.device))
    return order.int(), inverse, offsets


_plan_op = torch.library.custom_op("moe_mtl::plan_routing", _plan, mutates_args=())


@_plan_op.register_fake
def _(idx, num_experts):
    rows = idx.shape[0] * idx.shape[1]
    table = idx.new_empty(rows, dtype=torch.int32)
    return table, torch.empty_like(table), idx.new_empty(num_experts + 1, dtype=torch.int32)
