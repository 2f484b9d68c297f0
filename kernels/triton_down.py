"""One linear layer per expert on sorted rows: the second layer of the expert MLPs, and the way back through the first.

c[i] = w[e] a[i] + b[e] for sorted row i of expert e, with the weights' axes in either order. With `gather` the input
row is that of the slot, with `scatter` the result goes to the slot's place: `grouped_linear` with one slot per token.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_mtl.kernels.configs import Config
from moe_mtl.kernels.triton_launch import cdiv, describable, described, launch, options_of
from moe_mtl.kernels.triton_math import cast, pieces
from moe_mtl.kernels.triton_product import constants_of, grouped_order, product


@triton.jit(do_not_specialize=["row_tiles"], do_not_specialize_on_alignment=["order", "tiles"])
def down_kernel(
    a,
    w,
    b,
    order,
    tiles,
    c,
    a_stride,
    w_stride,
    inner,
    width,
    row_tiles,
    TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    DESCRIBED_A: tl.constexpr,
    DESCRIBED_W: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EPILOGUES: tl.constexpr,
):
    """One tile of rows and outputs. DESCRIBED: see `product`."""
    tile, column = grouped_order(tl.program_id(0), row_tiles, tl.cdiv(width, BLOCK_N), GROUP)
    expert = tl.load(tiles + 3 * tile)
    if expert < 0:
        return
    first = tl.load(tiles + 3 * tile + 1)
    rows = first + tl.arange(0, BLOCK_M)
    live = rows < tl.load(tiles + 3 * tile + 2)
    rows = tl.where(live, rows, first)  # rows past the segment repeat its first: their results are never stored
    slots = rows
    if GATHER or SCATTER:
        slots = tl.load(order + rows)
    left = column * BLOCK_N
    source = slots if GATHER else rows
    acc, _ = product(
        a, w, source, first, expert, left, inner, width, a_stride, w_stride, TRANSPOSED, False, EVEN_N, EVEN_K,
        DESCRIBED_A, DESCRIBED_W, PRECISION, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    target = slots if SCATTER else rows
    if BIAS:
        b += expert.to(tl.int64) * width
    acc_parts = pieces(acc, EPILOGUES)
    for i in tl.static_range(EPILOGUES):
        _finish(acc_parts[i], left + i * (BLOCK_N // EPILOGUES), target, live, b, c, width, BIAS, EVEN_N)


@triton.jit
def _finish(acc, left, rows, live, b, c, width, BIAS: tl.constexpr, EVEN_N: tl.constexpr):
    """Bias and store of one part of a tile's columns."""
    ns = left + tl.arange(0, acc.shape[1])
    inside = ns < width
    if BIAS:
        acc += tl.load(b + ns, mask=inside, other=0.0).to(tl.float32)[None, :]
    c_at = c + rows.to(tl.int64)[:, None] * width + ns[None, :]
    keep = live[:, None]
    if not EVEN_N:
        keep = keep & inside[None, :]
    tl.store(c_at, cast(acc, c.dtype.element_ty), mask=keep)


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
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    engine_a, engine_w = not gather and describable(a), describable(w)
    launch(
        down_kernel,
        (tiles.shape[0] * cdiv(width, block_n),),
        (
            described(a, block_m, block_k) if engine_a else a,
            described(w, 1, *((block_k, block_n) if transposed else (block_n, block_k))) if engine_w else w,
            *(b, order, tiles, out, a.stride(0), w.stride(0), inner, width, tiles.shape[0]),
        ),
        {
            "TRANSPOSED": transposed,
            "BIAS": b is not None,
            "GATHER": gather,
            "SCATTER": scatter,
            **constants_of(config, inner, width, engine_a, engine_w, precision),
        },
        **options_of(config),
    )
    return out
