"""Rows brought into expert order: xs[i] = x[token of sorted row i], and beside them the gates of these rows.

Products of sorted rows are faster than those that gather them, by more than this pass costs where a row is used often.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_mtl.kernels.triton_launch import cdiv, launch, next_power_of_2

HEIGHT = 32  # rows of a tile
WIDEST = 128  # columns of a program


@triton.jit(do_not_specialize_on_alignment=["order", "used"])
def sort_rows_kernel(
    x,
    gates,
    order,
    used,
    xs,
    ps,
    x_stride,
    width,
    SLOTS: tl.constexpr,
    STORE_GATES: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A block of rows and columns."""
    blocks = tl.cdiv(width, BLOCK_N)
    block = tl.program_id(0) % blocks
    rows = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < tl.load(used)
    slots = tl.load(order + rows, mask=live, other=0)
    ns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = live[:, None]
    if not EVEN:
        keep = keep & (ns < width)[None, :]
    values = tl.load(x + (slots // SLOTS).to(tl.int64)[:, None] * x_stride + ns[None, :], mask=keep, other=0.0)
    tl.store(xs + rows.to(tl.int64)[:, None] * width + ns[None, :], values, mask=keep)
    if STORE_GATES:
        tl.store(ps + rows, tl.load(gates + slots, mask=live, other=0.0).to(tl.float32), mask=live & (block == 0))


def sort_rows(
    x: Tensor, order: Tensor, offsets: Tensor, k: int, gates: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """xs [r, d] and the sorted gates [r], float32, None without gates.

    Rows of unused slots are not written.

    Args:
        x: [m, d], last axis contiguous.
        order: of the plan, int32 [r].
        offsets: of the plan, int32 [e + 1].
        k: slots per token.
        gates: [m, k], contiguous, or None.
    """
    rows, width = order.shape[0], x.shape[1]
    block_n = min(WIDEST, next_power_of_2(width))
    blocks = cdiv(width, block_n)
    xs = x.new_empty(rows, width)
    ps = None if gates is None else x.new_empty(rows, dtype=torch.float32)
    launch(
        sort_rows_kernel,
        (cdiv(rows, HEIGHT) * blocks,),
        (x, gates, order, offsets[-1:], xs, ps, x.stride(0), width),
        {
            "SLOTS": k,
            "STORE_GATES": gates is not None,
            "EVEN": width % block_n == 0,
            "BLOCK_M": HEIGHT,
            "BLOCK_N": block_n,
        },
        warps=4,
    )
    return xs, ps
