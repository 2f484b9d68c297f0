"""Back through the second layer and the activation, warp-specialized: what `triton_hidden_grad` computes, all of it.

da = w2[e]^T dy of the row; dz = p da act'(z); p h with h = act(z); parts = sums of da h over a tile's columns.

On top of `gluon_ring`, each consumer has a buffer for its tile of z, which the copy engine fills while products run; dz
takes its place there on the way out, a part after the other. Barriers, count 1 each:

    z_ready[c]   the producer's `expect` and the bytes of the tile: before the u-th tile of consumer c, wait(u & 1)
    z_empty[c]   the consumer when it begins its u-th tile, dz of the one before having left: before use u, wait(u & 1)

The producer asks for z behind block STAGES of the same tile, behind the last where there are fewer. By then the
consumer has handed back the tile's first slot, so it has begun with the tile, and the buffer is free without waiting.
Nobody waits forever: to begin with a tile takes nothing but the end of the consumer's last one, whose blocks and z the
producer has asked for before.
"""

import torch
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
from moe_mtl.kernels.triton_math import activate_and_derive
from moe_mtl.kernels.triton_product import grouped_order


@gluon.jit(do_not_specialize_on_alignment=["tiles", "offsets", "order"], do_not_specialize=["experts", "slots"])
def hidden_grad_kernel(
    dys_desc,
    w_desc,
    z_desc,
    dz_desc,
    ph_desc,
    gates,
    order,
    offsets,
    tiles,
    dz,
    ph,
    parts,
    experts,
    out_dim,
    hidden,
    slots,
    ACTIVATION: gl.constexpr,
    EVEN_N: gl.constexpr,
    EXPERTS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """All tiles of a program. Blocks are those of the descriptors; PART columns are those of z's."""
    BLOCK_M: gl.constexpr = dys_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = dys_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = w_desc.block_type.shape[1]
    PART: gl.constexpr = z_desc.block_type.shape[1]
    PARTS: gl.constexpr = BLOCK_N // PART
    dtype: gl.constexpr = dys_desc.dtype
    a_bufs = gl.allocate_shared_memory(dtype, [STAGES] + dys_desc.block_type.shape, dys_desc.layout)  # noqa: RUF005
    w_bufs = gl.allocate_shared_memory(dtype, [STAGES] + w_desc.block_type.shape, w_desc.layout)  # noqa: RUF005
    z_bufs = (  # each an allocation of its own: the compiler puts barriers between uses of one
        gl.allocate_shared_memory(dtype, [PARTS] + z_desc.block_type.shape, z_desc.layout),  # noqa: RUF005
        gl.allocate_shared_memory(dtype, [PARTS] + z_desc.block_type.shape, z_desc.layout),  # noqa: RUF005
    )
    ph_bufs = (
        gl.allocate_shared_memory(dtype, [2] + ph_desc.block_type.shape, ph_desc.layout),  # noqa: RUF005
        gl.allocate_shared_memory(dtype, [2] + ph_desc.block_type.shape, ph_desc.layout),  # noqa: RUF005
    )
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    z_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    z_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
        mbarrier.init(z_ready.index(i), count=1)
        mbarrier.init(z_empty.index(i), count=1)
    fence_async_shared()

    hidden = hidden // 8 * 8  # as it is: tells the compiler that rows of results begin at whole 16 bytes
    row_tiles = live_tiles(offsets, experts, BLOCK_M, EXPERTS)
    col_tiles = gl.cdiv(hidden, BLOCK_N)
    steps = gl.cdiv(out_dim, BLOCK_K)
    ring = (a_bufs, w_bufs, ready, empty, turn)
    zs = (z_bufs, z_ready, z_empty)
    walk = (tiles, row_tiles, col_tiles, steps)
    outs = (gates, order, dz, ph, dz_desc, ph_desc, parts, ph_bufs, hidden, slots)
    gl.warp_specialize(
        [
            (_consume, (0, ring, zs, walk, outs, ACTIVATION, EVEN_N, GROUP, BLOCK_M, BLOCK_N, PART)),
            (_consume, (1, ring, zs, walk, outs, ACTIVATION, EVEN_N, GROUP, BLOCK_M, BLOCK_N, PART)),
            (_produce, (dys_desc, w_desc, z_desc, ring, zs, walk, out_dim, GROUP, BLOCK_N, BLOCK_K, PART)),
        ],
        WORKERS,
        REGISTERS,
    )


@gluon.jit
def _produce(
    dys_desc,
    w_desc,
    z_desc,
    ring,
    zs,
    walk,
    out_dim,
    GROUP: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    PART: gl.constexpr,
):
    """Asks for the operands and z of all tiles."""
    a_bufs, w_bufs, ready, empty, _ = ring
    z_bufs, z_ready, z_empty = zs
    tiles, row_tiles, col_tiles, steps = walk
    STAGES: gl.constexpr = a_bufs.type.shape[0]
    PARTS: gl.constexpr = BLOCK_N // PART
    BYTES: gl.constexpr = dys_desc.block_type.nbytes + w_desc.block_type.nbytes
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    z_step = gl.minimum(steps - 1, STAGES)  # z is asked for behind this block
    me = gl.to_tensor(0)
    z_phase = gl.to_tensor(0)
    for number in range(gl.program_id(0), row_tiles * col_tiles, gl.num_programs(0)):
        tile, column = grouped_order(number, row_tiles, col_tiles, GROUP)
        expert = gl.load(tiles + 3 * tile)
        first = gl.load(tiles + 3 * tile + 1)
        w_first = expert * out_dim
        for step in range(steps):
            mbarrier.wait(empty.index(slot), phase)
            bar = ready.index(slot)
            mbarrier.expect(bar, BYTES)
            tma.async_copy_global_to_shared(dys_desc, [first, step * BLOCK_K], bar, a_bufs.index(slot))
            at = [w_first + step * BLOCK_K, column * BLOCK_N]
            tma.async_copy_global_to_shared(w_desc, at, bar, w_bufs.index(slot))
            slot += 1
            phase = gl.where(slot == STAGES, phase ^ 1, phase)
            slot = gl.where(slot == STAGES, 0, slot)
            if step == z_step:
                mbarrier.wait(z_empty.index(me), z_phase)
                z_bar = z_ready.index(me)
                mbarrier.expect(z_bar, PARTS * z_desc.block_type.nbytes)
                for i in gl.static_range(PARTS):
                    place = [first, column * BLOCK_N + i * PART]
                    if me == 0:
                        tma.async_copy_global_to_shared(z_desc, place, z_bar, z_bufs[0].index(i))
                    else:
                        tma.async_copy_global_to_shared(z_desc, place, z_bar, z_bufs[1].index(i))
        z_phase = gl.where(me == 1, z_phase ^ 1, z_phase)
        me ^= 1


@gluon.jit
def _consume(
    ME: gl.constexpr,
    ring,
    zs,
    walk,
    outs,
    ACTIVATION: gl.constexpr,
    EVEN_N: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PART: gl.constexpr,
):
    """Every other tile."""
    z_bufs, z_ready, z_empty = zs
    _, row_tiles, col_tiles, steps = walk
    gates, order, dz, ph, dz_desc, ph_desc, parts, ph_bufs, hidden, slots = outs
    PARTS: gl.constexpr = BLOCK_N // PART
    part_layout: gl.constexpr = product_layout(PART)
    layout: gl.constexpr = row_layout(PART)
    programs, total = gl.num_programs(0), row_tiles * col_tiles
    block = ME * steps
    phase = gl.to_tensor(0)  # of z; of the turns too, but that consumer 0 begins
    below = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, part_layout))
    begin = gl.program_id(0) + ME * programs
    _, first, end, column = look_up(begin, walk, GROUP)
    # rows past the segment repeat its first: their results are never stored
    slots_of_rows = gl.load(order + gl.where(first + below < end, first + below, first))
    for number in range(begin, total, 2 * programs):
        tma.store_wait(pendings=0)
        warp_barrier()
        mbarrier.arrive(z_empty.index(ME), count=1)
        # what a tile needs is looked up a step of the chain at a time, with work between
        gate = gl.load(gates + slots_of_rows)
        _, next_first, next_end, next_column = look_up(number + 2 * programs, walk, GROUP)
        acc = multiply(ring, block, steps, phase ^ (1 - ME), ME, BLOCK_M, BLOCK_N, True)
        block += 2 * steps
        left = column * BLOCK_N
        factor = gate.to(gl.float32)[:, None]
        das = parts_of(acc, PARTS, PART)
        sums = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, part_layout))
        whole = first + BLOCK_M <= end
        mbarrier.wait(z_ready.index(ME), phase)
        phase ^= 1
        for i in range(held_back(gl.to_tensor(PARTS))):
            z_buf, ph_buf = z_bufs[ME].index(i), ph_bufs[ME].index(i & 1)
            da = das[0]
            das = shifted(das)
            # past the width z is the engine's zeros, and so is act
            act, slope = activate_and_derive(z_buf.load(part_layout).to(gl.float32), ACTIVATION, False)
            sums += gl.sum(da * act, 1)
            tma.store_wait(pendings=3)  # ph of the part before the last has left; what was asked for later may not
            warp_barrier()
            ph_buf.store((factor * act).to(ph.dtype.element_ty))
            z_buf.store((factor * da * slope).to(dz.dtype.element_ty))
            fence_async_shared()
            warp_barrier()
            if whole:
                tma.async_copy_shared_to_global(ph_desc, [first, left + i * PART], ph_buf)
                tma.async_copy_shared_to_global(dz_desc, [first, left + i * PART], z_buf)
            else:
                rows = held_back(first) + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
                cols = left + i * PART + gl.arange(0, PART, layout=gl.SliceLayout(0, layout))
                keep = (rows < end)[:, None]
                if not EVEN_N:
                    keep = keep & (cols < hidden)[None, :]
                at = rows.to(gl.int64)[:, None] * hidden + cols[None, :]
                gl.store(ph + at, ph_buf.load(layout), mask=keep)
                gl.store(dz + at, z_buf.load(layout), mask=keep)
                fence_async_shared()
        slots_of_rows = gl.load(order + gl.where(next_first + below < next_end, next_first + below, next_first))
        gl.store(parts + column * slots + first + below, sums, mask=first + below < end)
        first, end, column = next_first, next_end, next_column
    tma.store_wait(pendings=0)


def hidden_grad(
    dys: Tensor,
    w2: Tensor,
    z: Tensor,
    gates: Tensor,
    order: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    activation: str,
    config: Config,
    processors: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dz [r, h], p h [r, h] and the parts of the gates' gradients [c, r], float32.

    Rows of unused slots are not written. For operands of which `triton_launch.warp_specializes` holds, and a z of which
    `describable` does.

    Args:
        dys: sorted rows [r, o]; see `sort_rows`.
        w2: [e, o, h].
        z: [r, h], contiguous.
        gates: [m, k], contiguous.
        order: of the plan, int32 [r].
        offsets: of the plan, int32 [e + 1].
        tiles: the plan's tiles of `config.block_m` rows, int32 [n, 3].
        activation: "gelu", "silu" or "relu".
        config: tile sizes.
        processors: of the chip.
    """
    rows, (experts, out_dim, hidden) = z.shape[0], w2.shape
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    columns, part = cdiv(hidden, block_n), block_n // config.epilogues
    dz, ph = dys.new_empty(rows, hidden), dys.new_empty(rows, hidden)
    parts = dys.new_empty(columns, rows, dtype=torch.float32)
    launch(
        hidden_grad_kernel,
        (min(processors, tiles.shape[0] * columns),),
        (
            described(dys, block_m, block_k),
            described(w2, block_k, block_n),
            *(described(t, block_m, part) for t in (z, dz, ph)),
            *(gates, order, offsets, tiles, dz, ph, parts, experts, out_dim, hidden, rows),
        ),
        {
            "ACTIVATION": activation,
            "EVEN_N": hidden % block_n == 0,
            "EXPERTS": counted(experts),
            "STAGES": config.stages,
            "GROUP": config.group,
        },
        config.warps,
    )
    return dz, ph, parts
