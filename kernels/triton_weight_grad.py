"""Gradients of an expert's weights and bias: dw[e] = sum_i a[i]^T b[i], db[e] = sum_i s[i] a[i] over its rows i.

Few large experts have fewer tiles than the chip has processors, so the rows of an expert can be split: every part goes
to a place of its own in float32 and a second pass adds them in a fixed order. The same call gives the same bits. An
expert without rows gets exact zeros.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_mtl.kernels.configs import Config
from moe_mtl.kernels.triton_launch import cdiv, describable, described, launch, options_of
from moe_mtl.kernels.triton_math import cast, dot, load_block

ONES = tl.constexpr(16)  # columns of the product that makes a bias, the fewest there are
SUMMED = 1024  # numbers of a program of the second pass


@triton.jit(do_not_specialize=["num_experts", "splits"], do_not_specialize_on_alignment=["order", "offsets"])
def weight_grad_kernel(
    a,
    b,
    scale,
    order,
    offsets,
    dw,
    db,
    a_stride,
    b_stride,
    num_experts,
    rows_out,
    cols_out,
    splits,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
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
    top, left = row * BLOCK_M, column * BLOCK_N
    if BIAS:
        # the programs of the first column add up the bias in a loop of their own, so that the others' stays lean
        if column == 0:
            acc, total = _accumulate(
                a, b, scale, order, a_stride, b_stride, rows_out, cols_out, begin, end, top, left, True,
                SCALED, SLOTS, GATHER, EVEN_M, EVEN_N, DESCRIBED_A, DESCRIBED_B, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            acc, total = _accumulate(
                a, b, scale, order, a_stride, b_stride, rows_out, cols_out, begin, end, top, left, False,
                SCALED, SLOTS, GATHER, EVEN_M, EVEN_N, DESCRIBED_A, DESCRIBED_B, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        acc, total = _accumulate(
            a, b, scale, order, a_stride, b_stride, rows_out, cols_out, begin, end, top, left, False,
            SCALED, SLOTS, GATHER, EVEN_M, EVEN_N, DESCRIBED_A, DESCRIBED_B, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    ms, ns = top + tl.arange(0, BLOCK_M), left + tl.arange(0, BLOCK_N)
    place = (split * num_experts + expert).to(tl.int64)
    dw_at = dw + place * rows_out * cols_out + ms.to(tl.int64)[:, None] * cols_out + ns[None, :]
    tl.store(dw_at, cast(acc, dw.dtype.element_ty), mask=(ms < rows_out)[:, None] & (ns < cols_out)[None, :])
    if BIAS:  # noqa: SIM102 (a constant decides whether the comparison is compiled)
        if column == 0:
            tl.store(db + place * rows_out + ms, cast(total, db.dtype.element_ty), mask=ms < rows_out)


@triton.jit
def _accumulate(
    a,
    b,
    scale,
    order,
    a_stride,
    b_stride,
    rows_out,
    cols_out,
    begin,
    end,
    top,
    left,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
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
    """Sums over rows begin to end; those of the bias by a product with the factors, cheaper than a sum."""
    whole = begin + (end - begin) // BLOCK_K * BLOCK_K
    ms, ns, ks = top + tl.arange(0, BLOCK_M), left + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    m_inside, n_inside = ms < rows_out, ns < cols_out
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_M, ONES], tl.float32)
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
        if BIAS:
            total = _add_rows(total, x, scale, start + ks, ks >= 0, SCALED, BLOCK_K)
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
        if BIAS:
            total = _add_rows(total, x, scale, whole + ks, live, SCALED, BLOCK_K)
    return acc, tl.sum(total, 1) / ONES  # its columns are the same


@triton.jit
def _add_rows(total, x, scale, rows, live, SCALED: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sums of the rows of a block, times their factors where SCALED, added to every column of the total."""
    if x.dtype == tl.float32:  # a product in TF32 would round what is only added up
        if SCALED:
            x *= tl.load(scale + rows, mask=live, other=0.0)[:, None]
        total += tl.sum(x, 0)[:, None]
    else:
        factors = tl.full([BLOCK_K, ONES], 1.0, tl.float32)
        if SCALED:
            factors *= tl.load(scale + rows, mask=live, other=0.0)[:, None]
        total = dot(tl.trans(x), cast(factors, x.dtype), total, "ieee")
    return total


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
    wanted = cdiv(processors, max(tiles, 1))
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
    bias: bool = False,
    scale: Tensor | None = None,
    gather: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """dw [e, o, i] and, with `bias`, db [e, o], in the dtype of `a`; the second is None without.

    Args:
        a: gradients of a layer's outputs, sorted rows [r, o], last axis contiguous.
        b: its inputs, sorted rows [r, i]; by token [m, i] where `gather`; last axis contiguous.
        order: of the plan, int32 [r].
        offsets: of the plan, int32 [e + 1].
        k: slots per token.
        precision: "ieee" or "tf32", of float32 products.
        config: tile sizes.
        processors: of the chip, to be kept busy.
        bias: whether db is wanted.
        scale: factors of the sorted rows in db, float32 [r], or None for 1; rounded to the dtype of `a`.
        gather: see `b`.
    """
    experts, (rows_out, cols_out) = offsets.shape[0] - 1, (a.shape[1], b.shape[1])
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    tiles = experts * cdiv(rows_out, block_m) * cdiv(cols_out, block_n)
    splits = splits_for(tiles, order.shape[0], experts, processors, block_k)
    sums = [a.new_empty(experts, rows_out, cols_out), a.new_empty(experts if bias else 0, rows_out)]
    parts = sums if splits == 1 else [t.new_empty(splits, *t.shape, dtype=torch.float32) for t in sums]
    engine_a, engine_b = describable(a), not gather and describable(b)
    launch(
        weight_grad_kernel,
        (tiles * splits,),
        (
            described(a, block_k, block_m) if engine_a else a,
            described(b, block_k, block_n) if engine_b else b,
            *(scale, order, offsets, *parts, a.stride(0), b.stride(0), experts, rows_out, cols_out, splits),
        ),
        {
            "BIAS": bias,
            "SCALED": scale is not None,
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
        for part, whole in zip(parts, sums, strict=True):
            if whole.numel():
                grid = (cdiv(whole.numel(), SUMMED),)
                launch(add_parts_kernel, grid, (part, whole, whole.numel(), splits), {"BLOCK": SUMMED}, warps=4)
    return sums[0], sums[1] if bias else None
