"""First layer of the expert MLPs: rows sorted or gathered on load, bias and activation before the store.

z[i] = w1[e] x[order[i] // k] + b1[e] for sorted row i of expert e; h = act(z), or act(first half) * second half.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_mtl.kernels.configs import Config
from moe_mtl.kernels.triton_launch import cdiv, describable, described, launch, options_of
from moe_mtl.kernels.triton_math import activate, cast, pieces
from moe_mtl.kernels.triton_product import constants_of, grouped_order, product


@triton.jit(do_not_specialize=["row_tiles"], do_not_specialize_on_alignment=["order", "tiles"])
def up_kernel(
    x,
    w,
    b,
    order,
    tiles,
    z,
    h,
    x_stride,
    w_stride,
    dim,
    hidden,
    row_tiles,
    SLOTS: tl.constexpr,
    GATHER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GLU: tl.constexpr,
    BIAS: tl.constexpr,
    STORE_Z: tl.constexpr,
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
    """One tile of rows and hidden units. DESCRIBED: see `product`."""
    tile, column = grouped_order(tl.program_id(0), row_tiles, tl.cdiv(hidden, BLOCK_N), GROUP)
    expert = tl.load(tiles + 3 * tile)
    if expert < 0:
        return
    first = tl.load(tiles + 3 * tile + 1)
    rows = first + tl.arange(0, BLOCK_M)
    live = rows < tl.load(tiles + 3 * tile + 2)
    left = column * BLOCK_N
    # rows past the segment repeat one: their results are never stored
    if GATHER:  # noqa: SIM108 (a constant decides what is compiled)
        source = tl.load(order + rows, mask=live, other=0) // SLOTS
    else:
        source = tl.where(live, rows, first)
    acc, acc_up = product(
        x, w, source, first, expert, left, dim, hidden, x_stride, w_stride, False, GLU, EVEN_N, EVEN_K,
        DESCRIBED_A, DESCRIBED_W, PRECISION, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if BIAS:
        b += expert.to(tl.int64) * hidden * (1 + GLU)
    acc_parts = pieces(acc, EPILOGUES)
    up_parts = acc_parts
    if GLU:
        up_parts = pieces(acc_up, EPILOGUES)
    for i in tl.static_range(EPILOGUES):
        _finish(
            acc_parts[i], up_parts[i], left + i * (BLOCK_N // EPILOGUES), rows, live, b, z, h, hidden,
            ACTIVATION, GLU, BIAS, STORE_Z, EVEN_N,
        )  # fmt: skip


@triton.jit
def _finish(
    acc,
    acc_up,
    left,
    rows,
    live,
    b,
    z,
    h,
    hidden,
    ACTIVATION: tl.constexpr,
    GLU: tl.constexpr,
    BIAS: tl.constexpr,
    STORE_Z: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """Bias, activation and stores of one part of a tile's columns."""
    ns = left + tl.arange(0, acc.shape[1])
    inside = ns < hidden
    keep = live[:, None]
    if not EVEN_N:
        keep = keep & inside[None, :]
    if BIAS:
        acc += tl.load(b + ns, mask=inside, other=0.0).to(tl.float32)[None, :]
    z_at = z + rows.to(tl.int64)[:, None] * (hidden * (1 + GLU)) + ns[None, :]
    if STORE_Z:
        tl.store(z_at, cast(acc, z.dtype.element_ty), mask=keep)
    y = activate(acc, ACTIVATION, h.dtype.element_ty == tl.float32)
    if GLU:
        if BIAS:
            acc_up += tl.load(b + hidden + ns, mask=inside, other=0.0).to(tl.float32)[None, :]
        if STORE_Z:
            tl.store(z_at + hidden, cast(acc_up, z.dtype.element_ty), mask=keep)
        y *= acc_up
    tl.store(h + rows.to(tl.int64)[:, None] * hidden + ns[None, :], cast(y, h.dtype.element_ty), mask=keep)


def up(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    order: Tensor,
    tiles: Tensor,
    k: int,
    activation: str,
    glu: bool,
    save: bool,
    precision: str,
    config: Config,
    *,
    gather: bool = True,
) -> tuple[Tensor, Tensor]:
    """Hidden units h [r, h] and pre-activations z [r, (1|2)h] (empty unless `save`), sorted by expert.

    Rows of unused slots are not written.

    Args:
        x: tokens [m, d], or their sorted rows [r, d] without `gather`; last axis contiguous.
        w1: [e, (1|2)h, d], each expert contiguous.
        b1: [e, (1|2)h], contiguous, or None.
        order: of the plan, int32 [r].
        tiles: the plan's tiles of `config.block_m` rows, int32 [n, 3].
        k: slots per token.
        activation: "gelu", "silu" or "relu".
        glu: gated linear unit.
        save: whether z is wanted.
        precision: "ieee" or "tf32", of float32 products.
        config: tile sizes.
        gather: see `x`.
    """
    (_, wide, dim), rows = w1.shape, order.shape[0]
    hidden = wide // (1 + glu)
    h = x.new_empty(rows, hidden)
    z = x.new_empty(rows if save else 0, wide)
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    engine_a, engine_w = not gather and describable(x), describable(w1)
    launch(
        up_kernel,
        (tiles.shape[0] * cdiv(hidden, block_n),),
        (
            described(x, block_m, block_k) if engine_a else x,
            described(w1, 1, block_n, block_k) if engine_w else w1,
            *(b1, order, tiles, z, h, x.stride(0), w1.stride(0), dim, hidden, tiles.shape[0]),
        ),
        {
            "SLOTS": k,
            "GATHER": gather,
            "ACTIVATION": activation,
            "GLU": glu,
            "BIAS": b1 is not None,
            "STORE_Z": save,
            **constants_of(config, dim, hidden, engine_a, engine_w, precision),
        },
        **options_of(config),
    )
    return h, z
