"""Both layers of the expert MLPs in one launch, for inference at small widths: hidden units never leave the chip.

A program takes a tile of rows through all hidden units, a block of them at a time, and holds the whole width of the
result in accumulators of BLOCK_N columns each.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_mtl.kernels.configs import Config
from moe_mtl.kernels.triton_launch import cdiv, describable, described, launch, options_of
from moe_mtl.kernels.triton_math import activate, cast, dot, load_block

WIDEST = 192  # columns up to which it is faster than a launch for each layer


def fused_fits(w1: Tensor, w2: Tensor, glu: bool) -> bool:
    """Whether experts of these sizes can run in one launch; float32 needs more registers than there are."""
    return w1.element_size() == 2 and not glu and w2.shape[1] <= WIDEST and w1.shape[2] <= WIDEST


@triton.jit(do_not_specialize_on_alignment=["order", "tiles"])
def fused_kernel(
    x,
    w1,
    b1,
    w2,
    b2,
    order,
    tiles,
    ys,
    x_stride,
    w1_stride,
    w2_stride,
    dim,
    hidden,
    width,
    SLOTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIAS1: tl.constexpr,
    BIAS2: tl.constexpr,
    EVEN: tl.constexpr,
    DESCRIBED: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of rows, all hidden units, the whole width of the result. DESCRIBED: the weights are descriptors."""
    tile = tl.program_id(0)
    expert = tl.load(tiles + 3 * tile)
    if expert < 0:
        return
    rows = tl.load(tiles + 3 * tile + 1) + tl.arange(0, BLOCK_M)
    live = rows < tl.load(tiles + 3 * tile + 2)
    tokens = tl.load(order + rows, mask=live, other=0) // SLOTS
    x_rows = x + tokens.to(tl.int64)[:, None] * x_stride
    ks = tl.arange(0, BLOCK_N)
    tokens_in, out = (), ()
    for i in tl.static_range(INNER):
        at = ks + i * BLOCK_N
        tokens_in = tokens_in + (load_block(x_rows + at[None, :], live, at < dim, True, EVEN),)  # noqa: RUF005
    for _ in tl.static_range(COLUMNS):
        out = out + (tl.zeros([BLOCK_M, BLOCK_N], tl.float32),)  # noqa: RUF005 (Triton has no stars)
    for start in range(0, hidden, BLOCK_H):
        hs = start + tl.arange(0, BLOCK_H)
        inside = hs < hidden
        z = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        for i in tl.static_range(INNER):
            at = ks + i * BLOCK_N
            if DESCRIBED:
                right = w1.load([expert, start, i * BLOCK_N]).reshape(BLOCK_H, BLOCK_N).T
            else:
                w1_at = w1 + expert.to(tl.int64) * w1_stride + hs[None, :] * dim + at[:, None]
                right = load_block(w1_at, at < dim, inside, EVEN, False)
            z = dot(tokens_in[i], right, z, PRECISION)
        if BIAS1:
            z += tl.load(b1 + expert.to(tl.int64) * hidden + hs, mask=inside, other=0.0).to(tl.float32)[None, :]
        h = cast(activate(z, ACTIVATION, False), x.dtype.element_ty)
        added = ()
        for i in tl.static_range(COLUMNS):
            ns = ks + i * BLOCK_N
            if DESCRIBED:
                right = w2.load([expert, i * BLOCK_N, start]).reshape(BLOCK_N, BLOCK_H).T
            else:
                w2_at = w2 + expert.to(tl.int64) * w2_stride + ns[None, :] * hidden + hs[:, None]
                right = load_block(w2_at, inside, ns < width, False, False)
            added = added + (dot(h, right, out[i], PRECISION),)  # noqa: RUF005
        out = added
    for i in tl.static_range(COLUMNS):
        ns = ks + i * BLOCK_N
        y = out[i]
        if BIAS2:
            y += tl.load(b2 + expert.to(tl.int64) * width + ns, mask=ns < width, other=0.0).to(tl.float32)[None, :]
        at = ys + rows.to(tl.int64)[:, None] * width + ns[None, :]
        tl.store(at, cast(y, ys.dtype.element_ty), mask=live[:, None] & (ns < width)[None, :])


def fused(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    order: Tensor,
    tiles: Tensor,
    k: int,
    activation: str,
    precision: str,
    config: Config,
) -> Tensor:
    """Expert outputs, sorted rows [r, o]. Rows of unused slots are not written.

    Args:
        x: tokens [m, d], last axis contiguous.
        w1: [e, h, d], each expert contiguous.
        b1: [e, h], contiguous, or None.
        w2: [e, o, h], each expert contiguous.
        b2: [e, o], contiguous, or None.
        order: of the plan, int32 [r].
        tiles: the plan's tiles of `config.block_m` rows, int32 [n, 3].
        k: slots per token.
        activation: "gelu", "silu" or "relu".
        precision: "ieee" or "tf32", of float32 products.
        config: `block_n` columns per accumulator and step of the first layer, `block_k` hidden units per step.
    """
    (_, hidden, dim), width, rows = w1.shape, w2.shape[1], order.shape[0]
    ys = x.new_empty(rows, width)
    block_n, block_h = config.block_n, config.block_k
    engine = describable(w1) and describable(w2)
    launch(
        fused_kernel,
        (tiles.shape[0],),
        (
            x,
            described(w1, 1, block_h, block_n) if engine else w1,
            b1,
            described(w2, 1, block_n, block_h) if engine else w2,
            *(b2, order, tiles, ys, x.stride(0), w1.stride(0), w2.stride(0), dim, hidden, width),
        ),
        {
            "SLOTS": k,
            "ACTIVATION": activation,
            "BIAS1": b1 is not None,
            "BIAS2": b2 is not None,
            "EVEN": dim % block_n == 0,
            "DESCRIBED": engine,
            "INNER": cdiv(dim, block_n),
            "COLUMNS": cdiv(width, block_n),
            "PRECISION": precision,
            "BLOCK_M": config.block_m,
            "BLOCK_H": block_h,
            "BLOCK_N": block_n,
        },
        **options_of(config),
    )
    return ys
