"""Gradients of an expert's weights: dw[e] = sum_i a[i]^T b[i] over its rows i.

Few large experts have fewer tiles than the chip has processors, so the rows of an expert can be split: every part goes
to a place of its own in float32 and a second pass adds them in a fixed order. The same call gives the same bits. An
expert without rows gets exact zeros.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_mtl.kernels.configs import Config
from moe_mtl.kernels.triton_launch import describable, described, launch, options_of
from moe_mtl.kernels.triton_math import cast, dot, load_block

SUMMED = 1024  # numbers of a program of the second pass


@triton.jit(do_not_specialize=["num_experts", "splits"])
def weight_grad_kernel(
    a,
    b,
    order,
    offsets,
    dw,
    a_stride,
    b_stride,
    num_experts,
    rows_out,
    cols_out,
    splits,
    SLOTS: tl.constexpr,
    GATHER: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    DESCRIBED_A: tl.constexpr,
    DESCRIBED_B: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of an expert's weights, over one part of its rows. DESCRIBED: that argument is a descriptor."""
    row_tiles, col_tiles = tl.cdiv(rows_out, BLOCK_M), tl.cdiv(cols_out, BLOCK_N)
    pid = tl.program_id(0)
    column = pid % col_tiles
    row = (pid // col_tiles) % row_tiles
    part = pid // (col_tiles * row_tiles)
    expert = part // splits
    split = part % splits
    begin = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    share = tl.cdiv(tl.cdiv(end - begin, splits), BLOCK_K) * BLOCK_K
    begin += split * share
    end = tl.maximum(begin, tl.minimum(end, begin + share))
    whole = begin + (end - begin) // BLOCK_K * BLOCK_K
    top, left = row * BLOCK_M, column * BLOCK_N
    ms, ns, ks = top + tl.arange(0, BLOCK_M), left + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    m_inside, n_inside = ms < rows_out, ns < cols_out
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    source = begin + ks
    if GATHER:
        source = tl.load(order + source, mask=source < end, other=0) // SLOTS
    for start in range(begin, whole, BLOCK_K):
        if DESCRIBED_A:
            x = a.load([start, top])
        else:
            x = load_block(
                a + (start + ks).to(tl.int64)[:, None] * a_stride + ms[None, :], ks < 0, m_inside, True, EVEN_M
            )
        if DESCRIBED_B:
            y = b.load([start, left])
        else:
            y = load_block(b + source.to(tl.int64)[:, None] * b_stride + ns[None, :], ks < 0, n_inside, True, EVEN_N)
        # the next block's rows are looked up before it is due: a load that waits for a load is not taken ahead of time
        source = start + BLOCK_K + ks
        if GATHER:
            source = tl.load(order + source, mask=source < end, other=0) // SLOTS
        acc = dot(tl.trans(x), y, acc, PRECISION)
    if whole < end:  # rows past the end count as zeros on both sides: 0 times NaN is NaN
        live = whole + ks < end
        if DESCRIBED_A:
            x = a.load([whole, top])
            x = tl.where(live[:, None], x, 0.0).to(x.dtype)
        else:
            x = load_block(
                a + (whole + ks).to(tl.int64)[:, None] * a_stride + ms[None, :], live, m_inside, False, EVEN_M
            )
        if DESCRIBED_B:
            y = b.load([whole, left])
            y = tl.where(live[:, None], y, 0.0).to(y.dtype)
        else:
            y = load_block(b + source.to(tl.int64)[:, None] * b_stride + ns[None, :], live, n_inside, False, EVEN_N)
        acc = dot(tl.trans(x), y, acc, PRECISION)
    place = (split * num_experts + expert).to(tl.int64)
    dw_at = dw + place * rows_out * cols_out + ms.to(tl.int64)[:, None] * cols_out + ns[None, :]
    tl.store(dw_at, cast(acc, dw.dtype.element_ty), mask=m_inside[:, None] & n_inside[None, :])


@triton.jit(do_not_specialize=["splits"])
def add_parts_kernel(parts, out, size, splits, BLOCK: tl.constexpr):
    """Sums of a block of numbers over all parts, from the first to the last."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        acc += tl.load(parts + tl.cast(split, tl.int64) * size + at, mask=at < size, other=0.0)
    tl.store(out + at, cast(acc, out.dtype.element_ty), mask=at < size)


def splits_for(tiles: int, rows: int, experts: int, processors: int, block_k: int) -> int:
    """How many parts the rows of an expert are cut into: enough that all processors work, each on 8 blocks or more."""
    wanted = triton.cdiv(processors, max(tiles, 1))
    return max(1, min(wanted, rows // max(1, experts * block_k * 8), 16))


def weight_grad(
    a: Tensor,
    b: Tensor,
    order: Tensor,
    offsets: Tensor,
    k: int,
    precision: str,
    config: Config,
    processors: int,
    *,
    gather: bool = False,
) -> Tensor:
    """dw [e, o, i], in the dtype of `a`.

    Args:
        a: gradients of a layer's outputs, sorted rows [r, o], last axis contiguous.
        b: its inputs, sorted rows [r, i]; by token [m, i] where `gather`; last axis contiguous.
        order: of the plan, int32 [r].
        offsets: of the plan, int32 [e + 1].
        k: slots per token.
        precision: "ieee" or "tf32", of float32 products.
        config: tile sizes.
        processors: of the chip, to be kept busy.
        gather: see `b`.
    """
    experts, (rows_out, cols_out) = offsets.shape[0] - 1, (a.shape[1], b.shape[1])
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    tiles = experts * triton.cdiv(rows_out, block_m) * triton.cdiv(cols_out, block_n)
    splits = splits_for(tiles, order.shape[0], experts, processors, block_k)
    dw = a.new_empty(experts, rows_out, cols_out)
    parts = dw if splits == 1 else a.new_empty(splits, *dw.shape, dtype=torch.float32)
    engine_a, engine_b = describable(a), not gather and describable(b)
    launch(
        weight_grad_kernel,
        (tiles * splits,),
        (
            described(a, block_k, block_m) if engine_a else a,
            described(b, block_k, block_n) if engine_b else b,
        )
        + (order, offsets, parts, a.stride(0), b.stride(0), experts, rows_out, cols_out, splits),
        {
            "SLOTS": k,
            "GATHER": gather,
            "EVEN_M": rows_out % block_m == 0,
            "EVEN_N": cols_out % block_n == 0,
            "DESCRIBED_A": engine_a,
            "DESCRIBED_B": engine_b,
            "PRECISION": precision,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
        },
        **options_of(config),
    )
    if splits > 1:
        grid = (triton.cdiv(dw.numel(), SUMMED),)
        launch(add_parts_kernel, grid, (parts, dw, dw.numel(), splits), {"BLOCK": SUMMED}, warps=4)
    return dw
