"""Gradients of the results, brought into expert order once, with all that one look at them gives.

dys[i] = dy[token of sorted row i]; beside it, where wanted, <dys[i], b[e]>, which the gradient of the gates needs, and for
every tile of rows the sum of p dys, of which the gradient of the second bias is made.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_mtl.kernels.triton_launch import launch
from moe_mtl.kernels.triton_math import cast

HEIGHT = 32  # rows of a tile
WIDEST = 256  # columns of a step


@triton.jit
def sorted_grad_kernel(
    dy,
    gates,
    b,
    order,
    tiles,
    dys,
    dots,
    parts,
    dy_stride,
    width,
    SLOTS: tl.constexpr,
    STORE_ROWS: tl.constexpr,
    STORE_DOTS: tl.constexpr,
    STORE_PARTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of rows, all columns."""
    tile = tl.program_id(0)
    expert = tl.load(tiles + 3 * tile).to(tl.int64)
    if expert < 0:
        return
    rows = tl.load(tiles + 3 * tile + 1) + tl.arange(0, BLOCK_M)
    live = rows < tl.load(tiles + 3 * tile + 2)
    slots = tl.load(order + rows, mask=live, other=0)
    tokens = (slots // SLOTS).to(tl.int64)
    if WEIGHTED:
        gate = tl.load(gates + slots, mask=live, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, width, BLOCK_N):
        ns = start + tl.arange(0, BLOCK_N)
        inside = ns < width
        keep = live[:, None] & inside[None, :]
        block = tl.load(dy + tokens[:, None] * dy_stride + ns[None, :], mask=keep, other=0.0)
        if STORE_ROWS:
            tl.store(dys + rows.to(tl.int64)[:, None] * width + ns[None, :], block, mask=keep)
        values = block.to(tl.float32)
        if STORE_DOTS:
            total += tl.sum(values * tl.load(b + expert * width + ns, mask=inside, other=0.0).to(tl.float32)[None, :], 1)
        if STORE_PARTS:
            if WEIGHTED:
                values *= gate[:, None]
            tl.store(parts + tile.to(tl.int64) * width + ns, tl.sum(values, 0), mask=inside)
    if STORE_DOTS:
        tl.store(dots + rows, total, mask=live)


@triton.jit(do_not_specialize=["num_experts"])
def bias_grad_kernel(
    parts,
    offsets,
    db,
    num_experts,
    width,
    EXPERTS: tl.constexpr,
    HEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One expert and a block of columns: its tiles follow each other in the table."""
    expert = tl.program_id(0)
    ns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    es = tl.arange(0, EXPERTS)
    begins = tl.load(offsets + es, mask=es < num_experts, other=0)
    tiles = tl.cdiv(tl.load(offsets + 1 + es, mask=es < num_experts, other=0) - begins, HEIGHT)
    first = tl.sum(tl.where(es < expert, tiles, 0))
    last = first + tl.sum(tl.where(es == expert, tiles, 0))
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, last, BLOCK_M):
        ts = start + tl.arange(0, BLOCK_M)
        at = parts + ts.to(tl.int64)[:, None] * width + ns[None, :]
        acc += tl.load(at, mask=(ts < last)[:, None] & (ns < width)[None, :], other=0.0)
    at = db + expert.to(tl.int64) * width + ns
    tl.store(at, cast(tl.sum(acc, 0), db.dtype.element_ty), mask=ns < width)


def sorted_grad(
    dy: Tensor,
    gates: Tensor | None,
    b: Tensor | None,
    order: Tensor,
    tiles: Tensor,
    k: int,
    *,
    need_rows: bool,
    need_dots: bool,
    need_parts: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """dys [r, o], the products with the bias [r] and the parts of its gradient [n, o], float32; empty where not needed.

    Rows of unused slots are not written. The products are None without a bias.

    Args:
        dy: [m, o], last axis contiguous.
        gates: [m, k], contiguous; None counts as 1.
        b: [e, o], contiguous, or None.
        order: of the plan, int32 [r].
        tiles: the plan's tiles of `HEIGHT` rows, int32 [n, 3].
        k: slots per token.
        need_rows: whether dys is wanted.
        need_dots: whether the products are wanted, where there is a bias.
        need_parts: whether the parts are wanted.
    """
    rows, width = order.shape[0], dy.shape[1]
    dys = dy.new_empty(rows if need_rows else 0, width)
    dots = dy.new_empty(rows, dtype=torch.float32) if need_dots and b is not None else None
    parts = dy.new_empty(tiles.shape[0] if need_parts else 0, width, dtype=torch.float32)
    if need_rows or dots is not None or need_parts:
        launch(
            sorted_grad_kernel,
            (tiles.shape[0],),
            (dy, gates, b, order, tiles, dys, dots, parts, dy.stride(0), width),
            {
                "SLOTS": k,
                "STORE_ROWS": need_rows,
                "STORE_DOTS": dots is not None,
                "STORE_PARTS": need_parts,
                "WEIGHTED": gates is not None,
                "BLOCK_M": HEIGHT,
                "BLOCK_N": min(WIDEST, triton.next_power_of_2(width)),
            },
            warps=4,
        )
    return dys, dots, parts


def bias_grad(parts: Tensor, offsets: Tensor, height: int, dtype: torch.dtype) -> Tensor:
    """Gradients of a bias [e, o]; exact zeros for experts without rows.

    Args:
        parts: sums over every tile of rows, float32 [n, o].
        offsets: of the plan, int32 [e + 1].
        height: rows of a tile.
        dtype: of the result.
    """
    experts, width = offsets.shape[0] - 1, parts.shape[1]
    db = parts.new_empty(experts, width, dtype=dtype)
    launch(
        bias_grad_kernel,
        (experts, triton.cdiv(width, 64)),
        (parts, offsets, db, experts, width),
        {"EXPERTS": triton.next_power_of_2(experts), "HEIGHT": height, "BLOCK_M": 32, "BLOCK_N": 64},
        warps=4,
    )
    return db
