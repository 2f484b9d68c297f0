"""One linear layer per expert on sorted rows: the second layer of the expert MLPs, and the way back through the first.

c[i] = w[e] a[i] + b[e] for sorted row i of expert e, with the weights' axes in either order. With `gather` the input
row is that of the slot, with `scatter` the result goes to the slot's place: `grouped_linear` with one slot per token.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_mtl.kernels.configs import Config
from moe_mtl.kernels.triton_math import cast, dot, grouped_order, halves


@triton.jit(do_not_specialize=["row_tiles"])
def down_kernel(
    a,
    w,
    b,
    order,
    tiles,
    c,
    a_stride,
    w_stride,
    w_stride_n,
    w_stride_k,
    inner,
    width,
    row_tiles,
    BIAS: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EPILOGUES: tl.constexpr,
):
    """One tile of rows and outputs."""
    tile, column = grouped_order(tl.program_id(0), row_tiles, tl.cdiv(width, BLOCK_N), GROUP)
    expert = tl.load(tiles + 3 * tile).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(tiles + 3 * tile + 1)
    stop = tl.load(tiles + 3 * tile + 2)
    rows = first + tl.arange(0, BLOCK_M)
    live = rows < stop
    rows = tl.where(live, rows, first)  # rows past the segment repeat its first: their results are never stored
    slots = rows
    if GATHER or SCATTER:
        slots = tl.load(order + rows)
    source = slots if GATHER else rows
    ks = tl.arange(0, BLOCK_K)
    ns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    a_at = a + source.to(tl.int64)[:, None] * a_stride + ks[None, :]
    w_at = w + expert * w_stride + ns[None, :] * w_stride_n + ks[:, None] * w_stride_k
    inside = (ns < width)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inner, BLOCK_K):
        if EVEN_K:
            left = tl.load(a_at)
            right = tl.load(w_at, mask=inside, other=0.0)
        else:
            left = tl.load(a_at, mask=(ks < inner - start)[None, :], other=0.0)
            right = tl.load(w_at, mask=inside & (ks < inner - start)[:, None], other=0.0)
        acc = dot(left, right, acc, PRECISION)
        a_at += BLOCK_K
        w_at += BLOCK_K * w_stride_k
    target = slots if SCATTER else rows
    if BIAS:
        b += expert * width
    if EPILOGUES == 2:
        low, high = halves(acc)
        _finish(low, column * BLOCK_N, target, live, b, c, width, BIAS)
        _finish(high, column * BLOCK_N + BLOCK_N // 2, target, live, b, c, width, BIAS)
    else:
        _finish(acc, column * BLOCK_N, target, live, b, c, width, BIAS)


@triton.jit
def _finish(acc, left, rows, live, b, c, width, BIAS: tl.constexpr):
    """Bias and store of one part of a tile's columns."""
    ns = left + tl.arange(0, acc.shape[1])
    inside = ns < width
    if BIAS:
        acc += tl.load(b + ns, mask=inside, other=0.0).to(tl.float32)[None, :]
    c_at = c + rows.to(tl.int64)[:, None] * width + ns[None, :]
    tl.store(c_at, cast(acc, c.dtype.element_ty), mask=live[:, None] & inside[None, :])


def down(
    a: Tensor,
    w: Tensor,
    b: Tensor | None,
    order: Tensor,
    tiles: Tensor,
    precision: str,
    config: Config,
    *,
    out: Tensor,
    transposed: bool = False,
    gather: bool = False,
    scatter: bool = False,
) -> Tensor:
    """Rows through the layer of their expert, into out [r, o]. Rows of unused slots are not written.

    Args:
        a: [r, i], last axis contiguous.
        w: [e, o, i], or [e, i, o] where `transposed`; each expert contiguous.
        b: [e, o], contiguous, or None.
        order: of the plan, int32 [r].
        tiles: the plan's tiles of `config.block_m` rows, int32 [n, 3].
        precision: "ieee" or "tf32", of float32 products.
        config: tile sizes.
        out: contiguous.
        transposed: the weights' axes are the other way round.
        gather: rows of `a` are in the order of slots, not sorted.
        scatter: rows of `out` are in the order of slots, not sorted.
    """
    width, inner = (w.shape[2], w.shape[1]) if transposed else (w.shape[1], w.shape[2])
    down_kernel[(tiles.shape[0] * triton.cdiv(width, config.block_n),)](
        a,
        w,
        b,
        order,
        tiles,
        out,
        a.stride(0),
        w.stride(0),
        w.stride(2) if transposed else w.stride(1),
        w.stride(1) if transposed else w.stride(2),
        inner,
        width,
        tiles.shape[0],
        BIAS=b is not None,
        GATHER=gather,
        SCATTER=scatter,
        EVEN_K=inner % config.block_k == 0,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=config.group,
        EPILOGUES=config.epilogues,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out
