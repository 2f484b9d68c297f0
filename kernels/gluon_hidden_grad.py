"""Back through the second layer and the activation, warp-specialized: what `triton_hidden_grad` computes, all of it.

da = w2[e]^T dy of the row; dz = p da act'(z); p h with h = act(z); parts = sums of da h over a tile's columns.

On top of `gluon_ring`, each consumer has a buffer for its tile of z, which the copy engine fills while products run; dz
takes its place there on the way out. Barriers, count 1 each:

    z_ready[c]   the producer's `expect` and the bytes of the tile: before the u-th tile of consumer c, wait(u & 1)
    z_empty[c]   the consumer, when dz has left the buffer;         before the producer's u-th use, wait((u & 1) ^ 1)

The producer asks for z behind block STAGES of the same tile, behind the last where there are fewer. By then the
consumer has handed back the tile's first slot, so it is done with its last epilogue, and the buffer is free without
waiting. Nobody waits forever: the end of use u - 1 takes nothing but the epilogue of that tile, whose blocks and z the
producer has asked for before.

Registers limit the epilogue: it takes 64 rows and PART columns at a time, and its addresses are 32 bits.
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
    grouped_order,
    live_tiles,
    multiply,
    product_layout,
    row_layout,
    split_columns,
    split_rows,
    warp_barrier,
)
from moe_mtl.kernels.triton_launch import cdiv, launch
from moe_mtl.kernels.triton_math import activate_and_derive


@gluon.jit(do_not_specialize_on_alignment=["tiles", "offsets", "order"], do_not_specialize=["experts", "slots"])
def hidden_grad_kernel(
    dys_desc,
    w_desc,
    z_desc,
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
    z_bufs = gl.allocate_shared_memory(dtype, [2 * PARTS] + z_desc.block_type.shape, z_desc.layout)  # noqa: RUF005
    ph_bufs = gl.allocate_shared_memory(dtype, [2] + z_desc.block_type.shape, z_desc.layout)  # noqa: RUF005
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

    row_tiles = live_tiles(offsets, experts, BLOCK_M, EXPERTS)
    col_tiles = gl.cdiv(hidden, BLOCK_N)
    steps = gl.cdiv(out_dim, BLOCK_K)
    ring = (a_bufs, w_bufs, ready, empty, turn)
    zs = (z_bufs, z_ready, z_empty)
    walk = (tiles, row_tiles, col_tiles, steps)
    outs = (gates, order, dz, ph, parts, ph_bufs, hidden, slots)
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
    # z is asked for behind this block: if that is block STAGES or a later one, the consumer has begun with this very
    # tile, since it has handed back the slot of its first block, so it is done with its last epilogue
    z_step = gl.minimum(steps - 1, STAGES)
    me = gl.to_tensor(0)
    z_phase = gl.to_tensor(1)
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
                    tma.async_copy_global_to_shared(z_desc, place, z_bar, z_bufs.index(me * PARTS + i))
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
    tiles, row_tiles, col_tiles, steps = walk
    gates, order, dz, ph, parts, ph_bufs, hidden, slots = outs
    PARTS: gl.constexpr = BLOCK_N // PART
    HALVES: gl.constexpr = BLOCK_M // 64
    part_layout: gl.constexpr = product_layout(PART)
    layout: gl.constexpr = row_layout(PART)
    programs = gl.num_programs(0)
    block = ME * steps
    turn_phase = gl.to_tensor(1 - ME)
    z_phase = gl.to_tensor(0)
    for number in range(gl.program_id(0) + ME * programs, row_tiles * col_tiles, 2 * programs):
        tile, column = grouped_order(number, row_tiles, col_tiles, GROUP)
        first = gl.load(tiles + 3 * tile + 1)
        end = gl.load(tiles + 3 * tile + 2)
        summed = gl.arange(0, 64, layout=gl.SliceLayout(1, part_layout))
        gate = ()
        for r in gl.static_range(HALVES):
            place = first + r * 64 + summed
            gate += (gl.load(gates + gl.load(order + gl.where(place < end, place, first))).to(gl.float32),)
        acc = multiply(ring, block, steps, turn_phase, ME, BLOCK_M, BLOCK_N, True)
        block += 2 * steps
        turn_phase ^= 1
        halves = split_rows(acc, HALVES)
        rows = first + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        cols = column * BLOCK_N + gl.arange(0, PART, layout=gl.SliceLayout(0, layout))
        at = rows[:, None] * hidden + cols[None, :]
        mbarrier.wait(z_ready.index(ME), z_phase)
        z_phase ^= 1
        z_first = ME * PARTS
        for r in gl.static_range(HALVES):
            accs = split_columns(halves[r], PARTS)
            total = gl.zeros([64], gl.float32, gl.SliceLayout(1, part_layout))
            below = at + (r * 64) * hidden
            live = (rows + r * 64 < end)[:, None]
            ph_buf = ph_bufs.index(ME).slice(r * 64, 64, dim=0)
            for i in gl.static_range(PARTS):
                z_buf = z_bufs.index(z_first + i).slice(r * 64, 64, dim=0)
                keep = live
                if not EVEN_N:
                    keep = keep & (cols < hidden - i * PART)[None, :]
                dz_at, ph_at = dz + below + i * PART, ph + below + i * PART
                total += _finish(accs[i], z_buf, ph_buf, gate[r], dz_at, ph_at, keep, ACTIVATION, PART)
            place = first + r * 64 + summed
            gl.store(parts + column * slots + place, total, mask=place < end)
        fence_async_shared()
        warp_barrier()
        mbarrier.arrive(z_empty.index(ME), count=1)


@gluon.jit
def _finish(da, z_buf, ph_buf, gate, dz_at, ph_at, keep, ACTIVATION: gl.constexpr, PART: gl.constexpr):
    """Stores a part of a tile, 64 rows by PART columns, through its z and a buffer; sums of its rows for the gates.

    Columns past the width: the engine's zeros in place of z, so act is 0.
    """
    part_layout: gl.constexpr = product_layout(PART)
    layout: gl.constexpr = row_layout(PART)
    da = gl.convert_layout(da, part_layout)
    act, slope = activate_and_derive(z_buf.load(part_layout).to(gl.float32), ACTIVATION, False)
    sums = gl.sum(da * act, 1)
    ph_buf.store((gate[:, None] * act).to(ph_at.dtype.element_ty))
    z_buf.store((gate[:, None] * da * slope).to(dz_at.dtype.element_ty))
    gl.store(dz_at, z_buf.load(layout), mask=keep)
    gl.store(ph_at, ph_buf.load(layout), mask=keep)
    return sums


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

    Rows of unused slots are not written. For operands of which `triton_launch.warp_specializes` holds.

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
    columns = cdiv(hidden, block_n)
    dz, ph = dys.new_empty(rows, hidden), dys.new_empty(rows, hidden)
    parts = dys.new_empty(columns, rows, dtype=torch.float32)
    launch(
        hidden_grad_kernel,
        (min(processors, tiles.shape[0] * columns),),
        (
            described(dys, block_m, block_k),
            described(w2, block_k, block_n),
            described(z, block_m, block_n // config.epilogues),
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
