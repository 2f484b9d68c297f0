"""Back through the second layer and the activation, in one product: all the backward needs of the hidden units.

da = w2[e]^T dy of the row; from it, with the pre-activation z read again and h = act(z) computed again: the gradient of
the pre-activation dz = p da act'(z); p h, whose product with dy is the gradient of w2; and the part of the gate's
gradient <da, h> that a tile's columns make.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_mtl.kernels.configs import Config
from moe_mtl.kernels.triton_launch import cdiv, describable, described, launch, options_of
from moe_mtl.kernels.triton_math import activate_and_derive, cast, pieces
from moe_mtl.kernels.triton_product import constants_of, grouped_order, product


@triton.jit(do_not_specialize=["row_tiles", "slots"], do_not_specialize_on_alignment=["order", "tiles"])
def hidden_grad_kernel(
    dys,
    w,
    z,
    gates,
    order,
    tiles,
    dz,
    ph,
    parts,
    w_stride,
    out_dim,
    hidden,
    row_tiles,
    slots,
    ACTIVATION: tl.constexpr,
    GLU: tl.constexpr,
    STORE_DZ: tl.constexpr,
    STORE_PH: tl.constexpr,
    STORE_PARTS: tl.constexpr,
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
    rows = tl.where(live, rows, first)  # rows past the segment repeat its first: their results are never stored
    left = column * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if STORE_DZ or STORE_PARTS:
        acc, _ = product(
            dys, w, rows, first, expert, left, out_dim, hidden, out_dim, w_stride, True, False, EVEN_N, EVEN_K,
            DESCRIBED_A, DESCRIBED_W, PRECISION, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    gate = tl.load(gates + tl.load(order + rows)).to(tl.float32)[:, None]
    parts += column.to(tl.int64) * slots + rows
    acc_parts = pieces(acc, EPILOGUES)
    part = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(EPILOGUES):
        part += _finish(
            acc_parts[i], left + i * (BLOCK_N // EPILOGUES), rows, live, gate, z, dz, ph, hidden,
            ACTIVATION, GLU, STORE_DZ, STORE_PH, EVEN_N,
        )  # fmt: skip
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
    EVEN_N: tl.constexpr,
):
    """Stores one part of a tile's columns; returns what they add to the gates' gradients."""
    ns = left + tl.arange(0, acc.shape[1])
    keep = live[:, None]
    if not EVEN_N:
        keep = keep & (ns < hidden)[None, :]
    at = rows.to(tl.int64)[:, None] * (hidden * (1 + GLU)) + ns[None, :]
    first_z = tl.load(z + at, mask=keep, other=0.0).to(tl.float32)
    act, slope = activate_and_derive(first_z, ACTIVATION, ph.dtype.element_ty == tl.float32)
    h = act
    if GLU:
        second_z = tl.load(z + at + hidden, mask=keep, other=0.0).to(tl.float32)
        h = act * second_z
    if STORE_PH:
        ph_at = ph + rows.to(tl.int64)[:, None] * hidden + ns[None, :]
        tl.store(ph_at, cast(gate * h, ph.dtype.element_ty), mask=keep)
    if STORE_DZ:
        da = gate * acc
        if GLU:
            tl.store(dz + at + hidden, cast(da * act, dz.dtype.element_ty), mask=keep)
            da *= second_z
        tl.store(dz + at, cast(da * slope, dz.dtype.element_ty), mask=keep)
    return tl.sum(acc * h, 1)


def hidden_grad(
    dys: Tensor,
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
        dys: sorted rows [r, o], contiguous; see `sort_rows`.
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
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    columns = cdiv(hidden, block_n)
    dz = dys.new_empty(rows if need_dz else 0, wide)
    ph = dys.new_empty(rows if need_ph else 0, hidden)
    parts = dys.new_empty(columns if need_parts else 0, rows, dtype=torch.float32)
    engine_a, engine_w = describable(dys), describable(w2)
    launch(
        hidden_grad_kernel,
        (tiles.shape[0] * columns,),
        (
            described(dys, block_m, block_k) if engine_a else dys,
            described(w2, 1, block_k, block_n) if engine_w else w2,
            *(z, gates, order, tiles, dz, ph, parts, w2.stride(0), out_dim, hidden),
            *(tiles.shape[0], rows),
        ),
        {
            "ACTIVATION": activation,
            "GLU": glu,
            "STORE_DZ": need_dz,
            "STORE_PH": need_ph,
            "STORE_PARTS": need_parts,
            **constants_of(config, out_dim, hidden, engine_a, engine_w, precision),
        },
        **options_of(config),
    )
    return dz, ph, parts
