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
from moe_mtl.kernels.triton_math import cast, dot


@triton.jit(do_not_specialize=["num_experts", "slots_per_token", "splits"])
def weight_grad_kernel(
    a,
    b,
    order,
    scale,
    offsets,
    dw,
    db,
    a_stride,
    b_stride,
    num_experts,
    rows_out,
    cols_out,
    slots_per_token,
    splits,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of an expert's weights, over one part of its rows."""
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
    end = tl.minimum(end, begin + share)
    ms = row * BLOCK_M + tl.arange(0, BLOCK_M)
    ns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    m_inside, n_inside = ms < rows_out, ns < cols_out
    if BIAS:
        # the programs of the first column add up the bias in a loop of their own, so that the others' stays lean
        if column == 0:
            acc, total = _accumulate(
                a + ms[None, :], b + ns[None, :], order, scale, a_stride, b_stride, slots_per_token, begin, end,
                m_inside, n_inside, acc, total, True, SCALED, GATHER_A, GATHER_B, PRECISION, BLOCK_K,
            )  # fmt: skip
        else:
            acc, total = _accumulate(
                a + ms[None, :], b + ns[None, :], order, scale, a_stride, b_stride, slots_per_token, begin, end,
                m_inside, n_inside, acc, total, False, SCALED, GATHER_A, GATHER_B, PRECISION, BLOCK_K,
            )  # fmt: skip
    else:
        acc, total = _accumulate(
            a + ms[None, :], b + ns[None, :], order, scale, a_stride, b_stride, slots_per_token, begin, end,
            m_inside, n_inside, acc, total, False, SCALED, GATHER_A, GATHER_B, PRECISION, BLOCK_K,
        )  # fmt: skip
    place = (split * num_experts + expert).to(tl.int64)
    dw_at = dw + place * rows_out * cols_out + ms.to(tl.int64)[:, None] * cols_out + ns[None, :]
    tl.store(dw_at, cast(acc, dw.dtype.element_ty), mask=m_inside[:, None] & n_inside[None, :])
    if BIAS:  # noqa: SIM102 (a constant decides whether the comparison is compiled)
        if column == 0:
            tl.store(db + place * rows_out + ms, cast(total, db.dtype.element_ty), mask=m_inside)


@triton.jit
def _accumulate(
    a_at,
    b_at,
    order,
    scale,
    a_stride,
    b_stride,
    slots_per_token,
    begin,
    end,
    m_inside,
    n_inside,
    acc,
    total,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums over rows begin to end. Rows past the end count as zeros on both sides: 0 times NaN is NaN."""
    for start in range(begin, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        live = rows < end
        a_rows, b_rows, slots = rows, rows, rows
        if GATHER_A or GATHER_B or SCALED:
            slots = tl.load(order + rows, mask=live, other=0)
        if GATHER_A:
            a_rows = slots // slots_per_token
        if GATHER_B:
            b_rows = slots // slots_per_token
        left = tl.load(
            a_at + a_rows.to(tl.int64)[:, None] * a_stride, mask=live[:, None] & m_inside[None, :], other=0.0
        )
        right = tl.load(
            b_at + b_rows.to(tl.int64)[:, None] * b_stride, mask=live[:, None] & n_inside[None, :], other=0.0
        )
        acc = dot(tl.trans(left), right, acc, PRECISION)
        if BIAS:
            summand = left.to(tl.float32)
            if SCALED:
                summand *= tl.load(scale + slots, mask=live, other=0.0).to(tl.float32)[:, None]
            total += tl.sum(summand, 0)
    return acc, total


def splits_for(tiles: int, rows: int, experts: int, processors: int, block_k: int) -> int:
    """How many parts the rows of an expert are cut into: enough that all processors work, each on 8 blocks or more."""
    wanted = triton.cdiv(2 * processors, max(tiles, 1))
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
    bias: bool,
    scale: Tensor | None = None,
    gather_a: bool = False,
    gather_b: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """dw [e, o, i] and, with `bias`, db [e, o], in the dtype of `a`; the second is None without.

    Args:
        a: gradients of a layer's outputs, sorted rows [r, o]; by token [m, o] where `gather_a`.
        b: its inputs, sorted rows [r, i]; by token [m, i] where `gather_b`. Last axes contiguous.
        order: of the plan, int32 [r].
        offsets: of the plan, int32 [e + 1].
        k: slots per token.
        precision: "ieee" or "tf32", of float32 products.
        config: tile sizes.
        processors: of the chip, to be kept busy.
        bias: whether db is wanted.
        scale: factor of every slot's row in db [r], or None for 1.
        gather_a: see `a`.
        gather_b: see `b`.
    """
    experts, (rows_out, cols_out) = offsets.shape[0] - 1, (a.shape[1], b.shape[1])
    tiles = experts * triton.cdiv(rows_out, config.block_m) * triton.cdiv(cols_out, config.block_n)
    splits = splits_for(tiles, order.shape[0], experts, processors, config.block_k)
    dtype = a.dtype if splits == 1 else torch.float32
    dw = a.new_empty(splits, experts, rows_out, cols_out, dtype=dtype)
    db = a.new_empty(splits, experts if bias else 0, rows_out, dtype=dtype)
    weight_grad_kernel[(tiles * splits,)](
        a,
        b,
        order,
        scale,
        offsets,
        dw,
        db,
        a.stride(0),
        b.stride(0),
        experts,
        rows_out,
        cols_out,
        k,
        splits,
        BIAS=bias,
        SCALED=scale is not None,
        GATHER_A=gather_a,
        GATHER_B=gather_b,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    sums = [t[0] if splits == 1 else t.sum(0).to(a.dtype) for t in (dw, db)]
    return sums[0], sums[1] if bias else None
