"""Back through the second layer and the activation, in one product: all the backward needs of the hidden units.

da = w2[e]^T dy of the row's token; from it, with the pre-activation z read again and h = act(z) computed again:
the gradient of the pre-activation dz = p da act'(z); p h, whose product with dy is the gradient of w2; and the part of
the gate's gradient <da, h> that a tile's columns make.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_mtl.kernels.configs import Config
from moe_mtl.kernels.triton_math import activate, cast, derivative, dot, grouped_order, halves


@triton.jit(do_not_specialize=["row_tiles", "slots_per_token", "slots"])
def hidden_grad_kernel(
    dy,
    w,
    z,
    gates,
    order,
    tiles,
    dz,
    ph,
    parts,
    dy_stride,
    w_stride,
    out_dim,
    hidden,
    row_tiles,
    slots_per_token,
    slots,
    ACTIVATION: tl.constexpr,
    GLU: tl.constexpr,
    STORE_DZ: tl.constexpr,
    STORE_PH: tl.constexpr,
    STORE_PARTS: tl.constexpr,
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
    first = tl.load(tiles + 3 * tile + 1)
    rows = first + tl.arange(0, BLOCK_M)
    live = rows < tl.load(tiles + 3 * tile + 2)
    rows = tl.where(live, rows, first)  # rows past the segment repeat its first: their results are never stored
    slot = tl.load(order + rows)
    ks = tl.arange(0, BLOCK_K)
    ns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (ns < hidden)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if STORE_DZ or STORE_PARTS:
        dy_at = dy + (slot // slots_per_token).to(tl.int64)[:, None] * dy_stride + ks[None, :]
        w_at = w + expert * w_stride + ks[:, None] * hidden + ns[None, :]
        for start in range(0, out_dim, BLOCK_K):
            if EVEN_K:
                left = tl.load(dy_at)
                right = tl.load(w_at, mask=inside, other=0.0)
            else:
                left = tl.load(dy_at, mask=(ks < out_dim - start)[None, :], other=0.0)
                right = tl.load(w_at, mask=inside & (ks < out_dim - start)[:, None], other=0.0)
            acc = dot(left, right, acc, PRECISION)
            dy_at += BLOCK_K
            w_at += BLOCK_K * hidden
    gate = tl.load(gates + slot).to(tl.float32)[:, None]
    left = column * BLOCK_N
    parts += column.to(tl.int64) * slots + rows
    if EPILOGUES == 2:
        low, high = halves(acc)
        part = _finish(low, left, rows, live, gate, z, dz, ph, hidden, ACTIVATION, GLU, STORE_DZ, STORE_PH)
        left += BLOCK_N // 2
        part += _finish(high, left, rows, live, gate, z, dz, ph, hidden, ACTIVATION, GLU, STORE_DZ, STORE_PH)
    else:
        part = _finish(acc, left, rows, live, gate, z, dz, ph, hidden, ACTIVATION, GLU, STORE_DZ, STORE_PH)
    if STORE_PARTS:
        tl.store(parts, part, mask=live)


@triton.jit
def _finish(
    acc,
    left,
    rows,
    live,
    gate,
    z,
    dz,
    ph,
    hidden,
    ACTIVATION: tl.constexpr,
    GLU: tl.constexpr,
    STORE_DZ: tl.constexpr,
    STORE_PH: tl.constexpr,
):
    """Stores one part of a tile's columns; returns what they add to the gates' gradients."""
    wide = hidden * (1 + GLU)
    ns = left + tl.arange(0, acc.shape[1])
    keep = live[:, None] & (ns < hidden)[None, :]
    at = rows.to(tl.int64)[:, None] * wide + ns[None, :]
    first_z = tl.load(z + at, mask=keep, other=0.0).to(tl.float32)
    h = activate(first_z, ACTIVATION)
    if GLU:
        act = h
        second_z = tl.load(z + at + hidden, mask=keep, other=0.0).to(tl.float32)
        h = act * second_z
    if STORE_PH:
        ph_at = ph + rows.to(tl.int64)[:, None] * hidden + ns[None, :]
        tl.store(ph_at, cast(gate * h, ph.dtype.element_ty), mask=keep)
    part = tl.sum(acc * h, 1)
    if STORE_DZ:
        da = gate * acc
        if GLU:
            tl.store(dz + at + hidden, cast(da * act, dz.dtype.element_ty), mask=keep)
            da *= second_z
        tl.store(dz + at, cast(da * derivative(first_z, ACTIVATION), dz.dtype.element_ty), mask=keep)
    return part


def hidden_grad(
    dy: Tensor,
    w2: Tensor,
    z: Tensor,
    gates: Tensor,
    order: Tensor,
    tiles: Tensor,
    activation: str,
    glu: bool,
    precision: str,
    config: Config,
    *,
    need_dz: bool,
    need_ph: bool,
    need_parts: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dz [r, (1|2)h], p h [r, h] and the parts of the gates' gradients [c, r], float32; empty where not needed.

    Rows of unused slots are not written.

    Args:
        dy: [m, o], last axis contiguous.
        w2: [e, o, h], each expert contiguous.
        z: [r, (1|2)h], contiguous.
        gates: [m, k], contiguous.
        order: of the plan, int32 [r].
        tiles: the plan's tiles of `config.block_m` rows, int32 [n, 3].
        activation: "gelu", "silu" or "relu".
        glu: gated linear unit.
        precision: "ieee" or "tf32", of float32 products.
        config: tile sizes.
        need_dz: whether dz is wanted.
        need_ph: whether p h is wanted.
        need_parts: whether the gates' gradient is wanted.
    """
    (rows, wide), (_, out_dim, hidden) = z.shape, w2.shape
    columns = triton.cdiv(hidden, config.block_n)
    dz = dy.new_empty(rows if need_dz else 0, wide)
    ph = dy.new_empty(rows if need_ph else 0, hidden)
    parts = dy.new_empty(columns if need_parts else 0, rows, dtype=torch.float32)
    hidden_grad_kernel[(tiles.shape[0] * columns,)](
        dy,
        w2,
        z,
        gates,
        order,
        tiles,
        dz,
        ph,
        parts,
        dy.stride(0),
        w2.stride(0),
        out_dim,
        hidden,
        tiles.shape[0],
        gates.shape[1],
        rows,
        ACTIVATION=activation,
        GLU=glu,
        STORE_DZ=need_dz,
        STORE_PH=need_ph,
        STORE_PARTS=need_parts,
        EVEN_K=out_dim % config.block_k == 0,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=config.group,
        EPILOGUES=config.epilogues,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return dz, ph, parts
