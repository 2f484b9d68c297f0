"""First layer of the expert MLPs: rows gathered on load, bias and activation before the store.

z[i] = w1[e] x[order[i] // k] + b1[e] for sorted row i of expert e; h = act(z), or act(first half) * second half.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_mtl.kernels.configs import Config
from moe_mtl.kernels.triton_math import activate, cast, dot, grouped_order, halves


@triton.jit(do_not_specialize=["row_tiles", "slots_per_token"])
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
    slots_per_token,
    ACTIVATION: tl.constexpr,
    GLU: tl.constexpr,
    BIAS: tl.constexpr,
    STORE_Z: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EPILOGUES: tl.constexpr,
):
    """One tile of rows and hidden units."""
    tile, column = grouped_order(tl.program_id(0), row_tiles, tl.cdiv(hidden, BLOCK_N), GROUP)
    expert = tl.load(tiles + 3 * tile).to(tl.int64)
    if expert < 0:
        return
    rows = tl.load(tiles + 3 * tile + 1) + tl.arange(0, BLOCK_M)
    live = rows < tl.load(tiles + 3 * tile + 2)
    tokens = tl.load(order + rows, mask=live, other=0) // slots_per_token
    ks = tl.arange(0, BLOCK_K)
    ns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    a_at = x + tokens.to(tl.int64)[:, None] * x_stride + ks[None, :]
    b_at = w + expert * w_stride + ns[None, :] * dim + ks[:, None]
    inside = (ns < hidden)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_up = acc
    # rows past the segment repeat the first token: their results are never stored
    for start in range(0, dim, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_at)
            first = tl.load(b_at, mask=inside, other=0.0)
        else:
            a = tl.load(a_at, mask=(ks < dim - start)[None, :], other=0.0)
            first = tl.load(b_at, mask=inside & (ks < dim - start)[:, None], other=0.0)
        acc = dot(a, first, acc, PRECISION)
        if GLU:
            if EVEN_K:
                second = tl.load(b_at + hidden * dim, mask=inside, other=0.0)
            else:
                second = tl.load(b_at + hidden * dim, mask=inside & (ks < dim - start)[:, None], other=0.0)
            acc_up = dot(a, second, acc_up, PRECISION)
        a_at += BLOCK_K
        b_at += BLOCK_K
    left = column * BLOCK_N
    if BIAS:
        b += expert * hidden * (1 + GLU)
    if EPILOGUES == 2:
        low, high = halves(acc)
        low_up, high_up = low, high
        if GLU:
            low_up, high_up = halves(acc_up)
        _finish(low, low_up, left, rows, live, b, z, h, hidden, ACTIVATION, GLU, BIAS, STORE_Z)
        _finish(high, high_up, left + BLOCK_N // 2, rows, live, b, z, h, hidden, ACTIVATION, GLU, BIAS, STORE_Z)
    else:
        _finish(acc, acc_up, left, rows, live, b, z, h, hidden, ACTIVATION, GLU, BIAS, STORE_Z)


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
):
    """Bias, activation and stores of one part of a tile's columns."""
    ns = left + tl.arange(0, acc.shape[1])
    inside = ns < hidden
    keep = live[:, None] & inside[None, :]
    if BIAS:
        acc += tl.load(b + ns, mask=inside, other=0.0).to(tl.float32)[None, :]
    z_at = z + rows.to(tl.int64)[:, None] * (hidden * (1 + GLU)) + ns[None, :]
    if STORE_Z:
        tl.store(z_at, cast(acc, z.dtype.element_ty), mask=keep)
    y = activate(acc, ACTIVATION)
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
) -> tuple[Tensor, Tensor]:
    """Hidden units h [r, h] and pre-activations z [r, (1|2)h] (empty unless `save`), sorted by expert.

    Rows of unused slots are not written.

    Args:
        x: tokens [m, d], last axis contiguous.
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
    """
    (_, wide, dim), rows = w1.shape, order.shape[0]
    hidden = wide // (1 + glu)
    h = x.new_empty(rows, hidden)
    z = x.new_empty(rows if save else 0, wide)
    up_kernel[(tiles.shape[0] * triton.cdiv(hidden, config.block_n),)](
        x,
        w1,
        b1,
        order,
        tiles,
        z,
        h,
        x.stride(0),
        w1.stride(0),
        dim,
        hidden,
        tiles.shape[0],
        k,
        ACTIVATION=activation,
        GLU=glu,
        BIAS=b1 is not None,
        STORE_Z=save,
        EVEN_K=dim % config.block_k == 0,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=config.group,
        EPILOGUES=config.epilogues,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return h, z
