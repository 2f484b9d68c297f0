"""Back through the second layer and the activation, in one product: all the backward needs of the hidden units.

da = w2[e]^T dy of the row; from it, with the pre-activation z read again and h = act(z) computed again: the gradient of
the pre-activation dz = p da act'(z), and its sum over a tile's rows, of which the gradient of the first bias is made;
p h, whose product with dy is the gradient of w2; and the part of the gate's gradient <da, h> that a tile's columns make.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_mtl.kernels.configs import Config
from moe_mtl.kernels.triton_launch import describable, described, launch, options_of
from moe_mtl.kernels.triton_math import activate_and_derive, cast, dot, grouped_order, load_block, pieces


@triton.jit(do_not_specialize=["row_tiles", "slots"])
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
    sums,
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
    STORE_SUMS: tl.constexpr,
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
    """One tile of rows and hidden units. DESCRIBED: that argument is a descriptor."""
    tile, column = grouped_order(tl.program_id(0), row_tiles, tl.cdiv(hidden, BLOCK_N), GROUP)
    expert = tl.load(tiles + 3 * tile)
    if expert < 0:
        return
    first = tl.load(tiles + 3 * tile + 1)
    rows = first + tl.arange(0, BLOCK_M)
    live = rows < tl.load(tiles + 3 * tile + 2)
    rows = tl.where(live, rows, first)  # rows past the segment repeat its first: their results are never stored
    left = column * BLOCK_N
    ks = tl.arange(0, BLOCK_K)
    ns = left + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if STORE_DZ or STORE_PARTS or STORE_SUMS:
        if not DESCRIBED_A:
            a_at = dys + rows.to(tl.int64)[:, None] * out_dim + ks[None, :]
        if not DESCRIBED_W:
            w_at = w + expert.to(tl.int64) * w_stride + ks[:, None] * hidden + ns[None, :]
        for start in range(0, out_dim, BLOCK_K):
            inside = ks < out_dim - start
            if DESCRIBED_A:
                x = dys.load([first, start])
            else:
                x = load_block(a_at, live, inside, True, EVEN_K)
                a_at += BLOCK_K
            if DESCRIBED_W:
                y = w.load([expert, start, left]).reshape(BLOCK_K, BLOCK_N)
            else:
                y = load_block(w_at, inside, ns < hidden, EVEN_K, EVEN_N)
                w_at += BLOCK_K * hidden
            acc = dot(x, y, acc, PRECISION)
    gate = tl.load(gates + tl.load(order + rows)).to(tl.float32)[:, None]
    parts += column.to(tl.int64) * slots + rows
    sums += tile.to(tl.int64) * hidden * (1 + GLU)
    acc_parts = pieces(acc, EPILOGUES)
    part = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(EPILOGUES):
        part += _finish(
            acc_parts[i], left + i * (BLOCK_N // EPILOGUES), rows, live, gate, z, dz, ph, sums, hidden,
            ACTIVATION, GLU, STORE_DZ, STORE_PH, STORE_SUMS, EVEN_N,
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
    sums,
    hidden,
    ACTIVATION: tl.constexpr,
    GLU: tl.constexpr,
    STORE_DZ: tl.constexpr,
    STORE_PH: tl.constexpr,
    STORE_SUMS: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """Stores one part of a tile's columns; returns what they add to the gates' gradients."""
    wide = hidden * (1 + GLU)
    ns = left + tl.arange(0, acc.shape[1])
    inside = ns < hidden
    keep = live[:, None]
    if not EVEN_N:
        keep = keep & inside[None, :]
    at = rows.to(tl.int64)[:, None] * wide + ns[None, :]
    first_z = tl.load(z + at, mask=keep, other=0.0).to(tl.float32)
    act, slope = activate_and_derive(first_z, ACTIVATION, ph.dtype.element_ty == tl.float32)
    h = act
    if GLU:
        second_z = tl.load(z + at + hidden, mask=keep, other=0.0).to(tl.float32)
        h = act * second_z
    if STORE_PH:
        ph_at = ph + rows.to(tl.int64)[:, None] * hidden + ns[None, :]
        tl.store(ph_at, cast(gate * h, ph.dtype.element_ty), mask=keep)
    part = tl.sum(acc * h, 1)
    if STORE_DZ or STORE_SUMS:
        da = gate * acc
        if GLU:
            _store(da * act, dz + at + hidden, sums + hidden + ns, live, keep, inside, STORE_DZ, STORE_SUMS)
            da *= second_z
        _store(da * slope, dz + at, sums + ns, live, keep, inside, STORE_DZ, STORE_SUMS)
    return part


@triton.jit
def _store(x, at, sum_at, live, keep, inside, STORE: tl.constexpr, STORE_SUM: tl.constexpr):
    """Values of a tile, and the sums of its columns over its rows."""
    if STORE:
        tl.store(at, cast(x, at.dtype.element_ty), mask=keep)
    if STORE_SUM:
        tl.store(sum_at, tl.sum(tl.where(live[:, None], x, 0.0), 0), mask=inside)


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
    need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dz [r, (1|2)h], p h [r, h], parts of the gates' gradients [c, r] and sums of dz over tiles [n, (1|2)h].

    The last two are float32; each is empty where not needed. Rows of unused slots are not written.

    Args:
        dys: sorted rows [r, o], contiguous; see `sorted_grad`.
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
        need_sums: whether the first bias's gradient is wanted.
    """
    (rows, wide), (_, out_dim, hidden) = z.shape, w2.shape
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    columns = triton.cdiv(hidden, block_n)
    dz = dys.new_empty(rows if need_dz else 0, wide)
    ph = dys.new_empty(rows if need_ph else 0, hidden)
    parts = dys.new_empty(columns if need_parts else 0, rows, dtype=torch.float32)
    sums = dys.new_empty(tiles.shape[0] if need_sums else 0, wide, dtype=torch.float32)
    engine_a, engine_w = describable(dys), describable(w2)
    launch(
        hidden_grad_kernel,
        (tiles.shape[0] * columns,),
        (
            described(dys, block_m, block_k) if engine_a else dys,
            described(w2, 1, block_k, block_n) if engine_w else w2,
        )
        + (z, gates, order, tiles, dz, ph, parts, sums, w2.stride(0), out_dim, hidden, tiles.shape[0], rows),
        {
            "ACTIVATION": activation,
            "GLU": glu,
            "STORE_DZ": need_dz,
            "STORE_PH": need_ph,
            "STORE_PARTS": need_parts,
            "STORE_SUMS": need_sums,
            "EVEN_N": hidden % block_n == 0,
            "EVEN_K": out_dim % block_k == 0,
            "DESCRIBED_A": engine_a,
            "DESCRIBED_W": engine_w,
            "PRECISION": precision,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "GROUP": config.group,
            "EPILOGUES": config.epilogues,
        },
        **options_of(config),
    )
    return dz, ph, parts, sums
