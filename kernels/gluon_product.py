"""Sorted rows times their expert's weights, warp-specialized: what `triton_up` and `triton_down` compute of such rows.

    first layer      z = x w1^T + b1, h = act(z)
    second layer     y = h w2^T + b2
    input gradient   dx = dz w1                     TRANSPOSED

See `gluon_ring` for the partitions, their barriers and the way out.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from moe_mtl.kernels.configs import Config
from moe_mtl.kernels.gluon_ring import (
    REGISTERS,
    WORKERS,
    counted,
    described,
    held_back,
    live_tiles,
    look_up,
    multiply,
    parts_of,
    product_layout,
    row_layout,
    shifted,
    warp_barrier,
)
from moe_mtl.kernels.triton_launch import cdiv, launch
from moe_mtl.kernels.triton_math import activate
from moe_mtl.kernels.triton_product import grouped_order


@gluon.jit(do_not_specialize=["experts"], do_not_specialize_on_alignment=["tiles", "offsets"])
def product_kernel(
    a_desc,
    w_desc,
    z_desc,
    h_desc,
    b,
    offsets,
    tiles,
    z,
    h,
    experts,
    inner,
    width,
    w_rows,
    BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    STORE_Z: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    EVEN_N: gl.constexpr,
    EXPERTS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """All tiles of a program. Blocks are those of the descriptors, parts those of h; w_rows: rows of w of an expert."""
    BLOCK_M: gl.constexpr = a_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = a_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = w_desc.block_type.shape[1] if TRANSPOSED else w_desc.block_type.shape[0]
    dtype: gl.constexpr = a_desc.dtype
    PART: gl.constexpr = h_desc.block_type.shape[1]
    a_bufs = gl.allocate_shared_memory(dtype, [STAGES] + a_desc.block_type.shape, a_desc.layout)  # noqa: RUF005
    w_bufs = gl.allocate_shared_memory(dtype, [STAGES] + w_desc.block_type.shape, w_desc.layout)  # noqa: RUF005
    h_bufs = (  # each an allocation of its own: the compiler puts barriers between uses of one
        gl.allocate_shared_memory(dtype, h_desc.block_type.shape, h_desc.layout),
        gl.allocate_shared_memory(dtype, h_desc.block_type.shape, h_desc.layout),
    )
    z_bufs = h_bufs
    if STORE_Z:
        z_bufs = (
            gl.allocate_shared_memory(dtype, z_desc.block_type.shape, z_desc.layout),
            gl.allocate_shared_memory(dtype, z_desc.block_type.shape, z_desc.layout),
        )
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    fence_async_shared()

    width = width // 8 * 8  # as it is: tells the compiler that rows of results begin at whole 16 bytes
    row_tiles = live_tiles(offsets, experts, BLOCK_M, EXPERTS)
    col_tiles = gl.cdiv(width, BLOCK_N)
    steps = gl.cdiv(inner, BLOCK_K)
    ring = (a_bufs, w_bufs, ready, empty, turn)
    walk = (tiles, row_tiles, col_tiles, steps)
    outs = (b, z, h, z_desc, h_desc, z_bufs, h_bufs, width)
    gl.warp_specialize(
        [
            (
                _consume,
                (0, ring, walk, outs, BIAS, ACTIVATION, STORE_Z, TRANSPOSED, EVEN_N, GROUP, BLOCK_M, BLOCK_N, PART),
            ),
            (
                _consume,
                (1, ring, walk, outs, BIAS, ACTIVATION, STORE_Z, TRANSPOSED, EVEN_N, GROUP, BLOCK_M, BLOCK_N, PART),
            ),
            (_produce, (a_desc, w_desc, ring, walk, w_rows, TRANSPOSED, GROUP, BLOCK_N, BLOCK_K)),
        ],
        WORKERS,
        REGISTERS,
    )


@gluon.jit
def _produce(
    a_desc,
    w_desc,
    ring,
    walk,
    w_rows,
    TRANSPOSED: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
):
    """Asks for the operands of all tiles."""
    a_bufs, w_bufs, ready, empty, _ = ring
    tiles, row_tiles, col_tiles, steps = walk
    STAGES: gl.constexpr = a_bufs.type.shape[0]
    BYTES: gl.constexpr = a_desc.block_type.nbytes + w_desc.block_type.nbytes
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    for number in range(gl.program_id(0), row_tiles * col_tiles, gl.num_programs(0)):
        tile, column = grouped_order(number, row_tiles, col_tiles, GROUP)
        expert = gl.load(tiles + 3 * tile)
        first = gl.load(tiles + 3 * tile + 1)
        w_first = expert * w_rows
        for step in range(steps):
            mbarrier.wait(empty.index(slot), phase)
            bar = ready.index(slot)
            mbarrier.expect(bar, BYTES)
            tma.async_copy_global_to_shared(a_desc, [first, step * BLOCK_K], bar, a_bufs.index(slot))
            if TRANSPOSED:
                at = [w_first + step * BLOCK_K, column * BLOCK_N]
            else:
                at = [w_first + column * BLOCK_N, step * BLOCK_K]
            tma.async_copy_global_to_shared(w_desc, at, bar, w_bufs.index(slot))
            slot += 1
            phase = gl.where(slot == STAGES, phase ^ 1, phase)
            slot = gl.where(slot == STAGES, 0, slot)


@gluon.jit
def _consume(
    ME: gl.constexpr,
    ring,
    walk,
    outs,
    BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    STORE_Z: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    EVEN_N: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PART: gl.constexpr,
):
    """Every other tile."""
    _, row_tiles, col_tiles, steps = walk
    programs, total = gl.num_programs(0), row_tiles * col_tiles
    block = ME * steps
    turn_phase = gl.to_tensor(1 - ME)
    begin = gl.program_id(0) + ME * programs
    expert, first, end, column = look_up(begin, walk, GROUP)
    for number in range(begin, total, 2 * programs):
        acc = multiply(ring, block, steps, turn_phase, ME, BLOCK_M, BLOCK_N, TRANSPOSED)
        next_expert, next_first, next_end, next_column = look_up(number + 2 * programs, walk, GROUP)
        block += 2 * steps
        turn_phase ^= 1
        _finish(
            acc, expert, first, end, column * BLOCK_N, outs,
            ME, BIAS, ACTIVATION, STORE_Z, EVEN_N, BLOCK_M, BLOCK_N, PART,
        )  # fmt: skip
        expert, first, end, column = next_expert, next_first, next_end, next_column
    tma.store_wait(pendings=0)


@gluon.jit
def _finish(
    acc,
    expert,
    first,
    end,
    left,
    outs,
    ME: gl.constexpr,
    BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    STORE_Z: gl.constexpr,
    EVEN_N: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PART: gl.constexpr,
):
    """Bias, activation and stores of a tile, part after part."""
    b, z, h, z_desc, h_desc, z_bufs, h_bufs, width = outs
    PARTS: gl.constexpr = BLOCK_N // PART
    layout: gl.constexpr = row_layout(PART)
    z_buf, h_buf = z_bufs[ME], h_bufs[ME]
    parts = parts_of(acc, PARTS, PART)
    whole = first + BLOCK_M <= end
    ns = left + gl.arange(0, PART, layout=gl.SliceLayout(0, product_layout(PART)))
    if BIAS:
        b_at = b + expert * width
        bias = gl.load(b_at + ns, mask=ns < width, other=0.0)
    for i in range(held_back(gl.to_tensor(PARTS))):
        y = parts[0]
        parts = shifted(parts)
        if BIAS:
            y += bias.to(gl.float32)[None, :]
            ahead = ns + (i + 1) * PART
            bias = gl.load(b_at + ahead, mask=ahead < width, other=0.0)
        tma.store_wait(pendings=0)
        warp_barrier()
        if STORE_Z:
            z_buf.store(y.to(z.dtype.element_ty))
        if ACTIVATION is not None:
            y = activate(y, ACTIVATION, False)
        h_buf.store(y.to(h.dtype.element_ty))
        if whole:
            fence_async_shared()
            warp_barrier()
            if STORE_Z:
                tma.async_copy_shared_to_global(z_desc, [first, left + i * PART], z_buf)
            tma.async_copy_shared_to_global(h_desc, [first, left + i * PART], h_buf)
        else:
            warp_barrier()
            rows = held_back(first) + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
            cols = left + i * PART + gl.arange(0, PART, layout=gl.SliceLayout(0, layout))
            keep = (rows < end)[:, None]
            if not EVEN_N:
                keep = keep & (cols < width)[None, :]
            at = rows.to(gl.int64)[:, None] * width + cols[None, :]
            if STORE_Z:
                gl.store(z + at, z_buf.load(layout), mask=keep)
            gl.store(h + at, h_buf.load(layout), mask=keep)


def _launch(
    a: Tensor,
    w: Tensor,
    b: Tensor | None,
    offsets: Tensor,
    tiles: Tensor,
    z: Tensor | None,
    h: Tensor,
    *,
    transposed: bool,
    activation: str | None,
    config: Config,
    processors: int,
) -> None:
    """Into h [r, width], and z where it is not None; the rest as in `up` and `down`."""
    experts, w_rows, w_cols = w.shape
    width, inner = (w_cols, w_rows) if transposed else (w_rows, w_cols)
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    z_or_h, part = h if z is None else z, block_n // config.epilogues
    launch(
        product_kernel,
        (min(processors, tiles.shape[0] * cdiv(width, block_n)),),
        (
            described(a, block_m, block_k),
            described(w, *((block_k, block_n) if transposed else (block_n, block_k))),
            described(z_or_h, block_m, part),
            described(h, block_m, part),
            *(b, offsets, tiles, z_or_h, h, experts, inner, width, w_rows),
        ),
        {
            "BIAS": b is not None,
            "ACTIVATION": activation,
            "STORE_Z": z is not None,
            "TRANSPOSED": transposed,
            "EVEN_N": width % block_n == 0,
            "EXPERTS": counted(experts),
            "STAGES": config.stages,
            "GROUP": config.group,
        },
        config.warps,
    )


def up(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    offsets: Tensor,
    tiles: Tensor,
    activation: str,
    save: bool,
    config: Config,
    processors: int,
) -> tuple[Tensor, Tensor]:
    """Hidden units h [r, h] and pre-activations z [r, h] (empty unless `save`), sorted by expert.

    Rows of unused slots are not written. For operands of which `triton_launch.warp_specializes` holds.

    Args:
        x: sorted rows [r, d].
        w1: [e, h, d].
        b1: [e, h], contiguous, or None.
        offsets: of the plan, int32 [e + 1].
        tiles: the plan's tiles of `config.block_m` rows, int32 [n, 3].
        activation: "gelu", "silu" or "relu".
        save: whether z is wanted.
        config: tile sizes.
        processors: of the chip.
    """
    rows, hidden = x.shape[0], w1.shape[1]
    h = x.new_empty(rows, hidden)
    z = x.new_empty(rows if save else 0, hidden)
    outs = (z if save else None, h)
    how = {"transposed": False, "activation": activation, "config": config, "processors": processors}
    _launch(x, w1, b1, offsets, tiles, *outs, **how)
    return h, z


def down(
    a: Tensor,
    w: Tensor,
    b: Tensor | None,
    offsets: Tensor,
    tiles: Tensor,
    config: Config,
    processors: int,
    *,
    out: Tensor,
    transposed: bool = False,
) -> Tensor:
    """Sorted rows through the layer of their expert, into out [r, o]. Rows of unused slots are not written.

    For operands of which `triton_launch.warp_specializes` holds.

    Args:
        a: [r, i].
        w: [e, o, i], or [e, i, o] where `transposed`.
        b: [e, o], contiguous, or None.
        offsets: of the plan, int32 [e + 1].
        tiles: the plan's tiles of `config.block_m` rows, int32 [n, 3].
        config: tile sizes.
        processors: of the chip.
        out: contiguous.
        transposed: the weights' axes are the other way round.
    """
    how = {"transposed": transposed, "activation": None, "config": config, "processors": processors}
    _launch(a, w, b, offsets, tiles, None, out, **how)
    return out
