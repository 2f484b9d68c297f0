"""Both layers of the expert MLPs in one launch, for inference at small widths: hidden units never leave the chip.

A program takes a tile of rows through all hidden units, a block of them at a time, and holds the whole width of the
result in accumulators of BLOCK_N columns each.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_mtl.kernels.configs import Config
from moe_mtl.kernels.triton_math import activate, cast, dot

WIDEST = 384  # columns of the result that fit into registers


def fused_fits(w1: Tensor, w2: Tensor, glu: bool) -> bool:
    """Whether experts of these sizes can run in one launch; float32 needs more registers than there are."""
    return w1.element_size() == 2 and not glu and w2.shape[1] <= WIDEST and w1.shape[2] <= WIDEST


@triton.jit(do_not_specialize=["slots_per_token"])
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
    slots_per_token,
    ACTIVATION: tl.constexpr,
    BIAS1: tl.constexpr,
    BIAS2: tl.constexpr,
    EVEN: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of rows, all hidden units, the whole width of the result."""
    tile = tl.program_id(0)
    expert = tl.load(tiles + 3 * tile).to(tl.int64)
    if expert < 0:
        return
    rows = tl.load(tiles + 3 * tile + 1) + tl.arange(0, BLOCK_M)
    live = rows < tl.load(tiles + 3 * tile + 2)
    tokens = tl.load(order + rows, mask=live, other=0) // slots_per_token
    x_rows = x + tokens.to(tl.int64)[:, None] * x_stride
    ks = tl.arange(0, BLOCK_N)
    out = ()
    for _ in tl.static_range(COLUMNS):
        out = out + (tl.zeros([BLOCK_M, BLOCK_N], tl.float32),)  # noqa: RUF005 (Triton has no stars)
    for start in range(0, hidden, BLOCK_H):
        hs = start + tl.arange(0, BLOCK_H)
        inside = hs < hidden
        z = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        for i in tl.static_range(INNER):
            at = ks + i * BLOCK_N
            w1_at = w1 + expert * w1_stride + hs[None, :] * dim + at[:, None]
            if EVEN:
                left = tl.load(x_rows + at[None, :])
                right = tl.load(w1_at, mask=inside[None, :], other=0.0)
            else:
                left = tl.load(x_rows + at[None, :], mask=(at < dim)[None, :], other=0.0)
                right = tl.load(w1_at, mask=inside[None, :] & (at < dim)[:, None], other=0.0)
            z = dot(left, right, z, PRECISION)
        if BIAS1:
            z += tl.load(b1 + expert * hidden + hs, mask=inside, other=0.0).to(tl.float32)[None, :]
        h = cast(activate(z, ACTIVATION), x.dtype.element_ty)
        added = ()
        for i in tl.static_range(COLUMNS):
            ns = ks + i * BLOCK_N
            w2_at = w2 + expert * w2_stride + ns[None, :] * hidden + hs[:, None]
            right = tl.load(w2_at, mask=inside[:, None] & (ns < width)[None, :], other=0.0)
            added = added + (dot(h, right, out[i], PRECISION),)  # noqa: RUF005
        out = added
    for i in tl.static_range(COLUMNS):
        ns = ks + i * BLOCK_N
        y = out[i]
        if BIAS2:
            y += tl.load(b2 + expert * width + ns, mask=ns < width, other=0.0).to(tl.float32)[None, :]
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
    fused_kernel[(tiles.shape[0],)](
        x,
        w1,
        b1,
        w2,
        b2,
        order,
        tiles,
        ys,
        x.stride(0),
        w1.stride(0),
        w2.stride(0),
        dim,
        hidden,
        width,
        k,
        ACTIVATION=activation,
        BIAS1=b1 is not None,
        BIAS2=b2 is not None,
        EVEN=dim % config.block_n == 0,
        INNER=triton.cdiv(dim, config.block_n),
        COLUMNS=triton.cdiv(width, config.block_n),
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_H=config.block_k,
        BLOCK_N=config.block_n,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return ys
