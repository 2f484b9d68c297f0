"""Gradients of an expert's weights and bias, warp-specialized: what `triton_weight_grad` computes of sorted rows.

    dw[e] = sum over rows i of expert e of a[i]^T b[i]        db[e] = sum of s[i] a[i], s None for 1

Partitions, ring and turns are those of `gluon_ring`, but tiles have different numbers of blocks.

Tiles. Program p has the tiles p, p + programs, ... of all experts, rows and columns of weights. The tiles of an expert
are neighbours, so its rows stay in the cache. A tile has as many blocks as its expert has rows / BLOCK_K, rounded up;
that of an expert without rows takes its turn, passes it on and stores zeros. Blocks are counted over all tiles of the
program, so a consumer adds those of the other's tile before each of its own.

The last block of an expert may hold rows of the next one, or unused ones, which may be NaN. It comes first: the
consumer writes zeros over them on both sides, fences, meets its other warps, and multiplies. Meanwhile the other
consumer's last product is in flight.

Bias. One tile in each row of them multiplies its blocks of `a` with FACTORS columns, all of which hold the rows'
factors, into a small sum of its own. Factors of 1 are written once. Others are loaded one block ahead and written by
the consumer into its two buffers by turns: those of block t while product t - 1 is in flight, all warps having seen
product t - 2 end.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moe_mtl.kernels.configs import Config
from moe_mtl.kernels.gluon_ring import (
    REGISTERS,
    WORKERS,
    described,
    product_layout,
    row_layout,
    split_columns,
    warp_barrier,
)
from moe_mtl.kernels.triton_launch import cdiv, launch

FACTORS = gl.constexpr(8)  # columns of the product that makes a bias, the fewest there are


@gluon.constexpr_function
def factor_layout():
    """Of factors on their way to shared memory: a row of BLOCK_K numbers as often as FACTORS."""
    return gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])


@gluon.jit(do_not_specialize=["experts", "rows_out", "cols_out"], do_not_specialize_on_alignment=["offsets", "scale"])
def weight_grad_kernel(
    a_desc,
    b_desc,
    offsets,
    scale,
    dw,
    db,
    experts,
    rows_out,
    cols_out,
    BIAS: gl.constexpr,
    SCALED: gl.constexpr,
    EVEN: gl.constexpr,
    STAGES: gl.constexpr,
    PART: gl.constexpr,
):
    """All tiles of a program. Blocks are those of the descriptors; EVEN: rows_out and cols_out are whole tiles."""
    BLOCK_K: gl.constexpr = a_desc.block_type.shape[0]
    BLOCK_M: gl.constexpr = a_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = b_desc.block_type.shape[1]
    dtype: gl.constexpr = a_desc.dtype
    a_bufs = gl.allocate_shared_memory(dtype, [STAGES] + a_desc.block_type.shape, a_desc.layout)  # noqa: RUF005
    b_bufs = gl.allocate_shared_memory(dtype, [STAGES] + b_desc.block_type.shape, b_desc.layout)  # noqa: RUF005
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, PART], dtype)
    out_bufs = gl.allocate_shared_memory(dtype, [2, BLOCK_M, PART], out_layout)
    f_bufs = b_bufs  # in the place of what there is none of
    if BIAS:
        f_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([FACTORS, BLOCK_K], dtype)
        f_bufs = gl.allocate_shared_memory(dtype, [4 if SCALED else 1, FACTORS, BLOCK_K], f_layout)
        if not SCALED:
            f_bufs.index(0).store(gl.full([FACTORS, BLOCK_K], 1.0, dtype, factor_layout()))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    fence_async_shared()
    warp_barrier()

    cols_out = cols_out // 8 * 8  # as it is: tells the compiler that rows begin at whole 16 bytes
    ring = (a_bufs, b_bufs, ready, empty, turn)
    row_tiles, col_tiles = gl.cdiv(rows_out, BLOCK_M), gl.cdiv(cols_out, BLOCK_N)
    walk = (offsets, experts * row_tiles * col_tiles, row_tiles, col_tiles)
    factors = (scale, f_bufs)
    outs = (dw, db, out_bufs, rows_out, cols_out)
    gl.warp_specialize(
        [
            (_consume, (0, ring, walk, factors, outs, BIAS, SCALED, EVEN)),
            (_consume, (1, ring, walk, factors, outs, BIAS, SCALED, EVEN)),
            (_produce, (a_desc, b_desc, ring, walk)),
        ],
        WORKERS,
        REGISTERS,
    )


@gluon.jit
def rows_of(number, walk):
    """The rows that a tile sums: from begin to end."""
    offsets, _, row_tiles, col_tiles = walk
    expert = number // col_tiles // row_tiles
    return gl.load(offsets + expert), gl.load(offsets + expert + 1)


@gluon.jit
def bias_column(above, col_tiles):
    """Which tile of a row adds up the bias, after so many rows; were it always the same, so would be the programs."""
    return (3 * above + above // col_tiles) % col_tiles


@gluon.jit
def _produce(a_desc, b_desc, ring, walk):
    """Asks for the operands of all tiles."""
    a_bufs, b_bufs, ready, empty, _ = ring
    _, tiles, row_tiles, col_tiles = walk
    STAGES: gl.constexpr = a_bufs.type.shape[0]
    BLOCK_K: gl.constexpr = a_bufs.type.shape[1]
    BLOCK_M: gl.constexpr = a_bufs.type.shape[2]
    BLOCK_N: gl.constexpr = b_bufs.type.shape[2]
    BYTES: gl.constexpr = a_desc.block_type.nbytes + b_desc.block_type.nbytes
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    for number in range(gl.program_id(0), tiles, gl.num_programs(0)):
        begin, end = rows_of(number, walk)
        top, left = number // col_tiles % row_tiles * BLOCK_M, number % col_tiles * BLOCK_N
        steps = gl.cdiv(end - begin, BLOCK_K)
        first = begin + (steps - 1) * BLOCK_K  # the last block, then the others
        for step in range(steps):
            mbarrier.wait(empty.index(slot), phase)
            bar = ready.index(slot)
            mbarrier.expect(bar, BYTES)
            tma.async_copy_global_to_shared(a_desc, [first, top], bar, a_bufs.index(slot))
            tma.async_copy_global_to_shared(b_desc, [first, left], bar, b_bufs.index(slot))
            first = begin + step * BLOCK_K
            slot += 1
            phase = gl.where(slot == STAGES, phase ^ 1, phase)
            slot = gl.where(slot == STAGES, 0, slot)


@gluon.jit
def _consume(ME: gl.constexpr, ring, walk, factors, outs, BIAS: gl.constexpr, SCALED: gl.constexpr, EVEN: gl.constexpr):
    """Every other tile."""
    BLOCK_K: gl.constexpr = ring[0].type.shape[1]
    BLOCK_M: gl.constexpr = ring[0].type.shape[2]
    BLOCK_N: gl.constexpr = ring[1].type.shape[2]
    _, tiles, row_tiles, col_tiles = walk
    dw, db, _, rows_out, cols_out = outs
    programs = gl.num_programs(0)
    block = gl.to_tensor(0)
    turn_phase = gl.to_tensor(1 - ME)
    for number in range(gl.program_id(0) + ME * programs, tiles, 2 * programs):
        begin, end = rows_of(number, walk)
        other_begin, other_end = rows_of(gl.maximum(number - programs, 0), walk)
        block += gl.where(number < programs, 0, gl.cdiv(other_end - other_begin, BLOCK_K))
        above, column = number // col_tiles, number % col_tiles
        place = gl.cast(above // row_tiles, gl.int64) * rows_out
        top, left = above % row_tiles * BLOCK_M, column * BLOCK_N
        span = (block, begin, end, turn_phase)
        if BIAS:
            # one tile in a row of them adds up the bias, in a loop of its own, so that the others' stays lean
            if column == bias_column(above, col_tiles):
                acc, total = multiply(ring, span, factors, ME, True, SCALED)
                summed = gl.sum(total, 1) * (1.0 / FACTORS)  # its columns are the same
                ms = top + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, product_layout(FACTORS)))
                gl.store(db + place + ms, summed.to(db.dtype.element_ty), mask=ms < rows_out)
            else:
                acc = multiply(ring, span, factors, ME, False, False)
        else:
            acc = multiply(ring, span, factors, ME, False, False)
        block += gl.cdiv(end - begin, BLOCK_K)
        turn_phase ^= 1
        _finish(acc, dw + place * cols_out, top, left, outs, ME, EVEN)


@gluon.jit
def multiply(ring, span, factors, ME: gl.constexpr, BIAS: gl.constexpr, SCALED: gl.constexpr):
    """Sums of a tile in float32 [BLOCK_M, BLOCK_N], and with BIAS those of `a` times factors [BLOCK_M, FACTORS].

    Hands back every slot and passes the turn on. Slot B - 1 goes back after product B has been issued and B - 1 has
    ended: tensor cores never wait for the handing back.
    """
    a_bufs, b_bufs, ready, empty, turn = ring
    block, begin, end, turn_phase = span
    scale, f_bufs = factors
    STAGES: gl.constexpr = a_bufs.type.shape[0]
    BLOCK_K: gl.constexpr = a_bufs.type.shape[1]
    BLOCK_M: gl.constexpr = a_bufs.type.shape[2]
    BLOCK_N: gl.constexpr = b_bufs.type.shape[2]
    slot = block % STAGES
    phase = (block // STAGES) & 1
    steps = gl.cdiv(end - begin, BLOCK_K)
    if SCALED:
        ks = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, factor_layout()))
        source = begin + (steps - 1) * BLOCK_K + ks
        factor = gl.load(scale + source, mask=(source >= begin) & (source < end), other=0.0)
    mbarrier.wait(turn.index(ME), turn_phase)
    live = (end - begin) % BLOCK_K  # rows of the last block, 0 where all are
    if live > 0:
        mbarrier.wait(ready.index(slot), phase)
        _cut(a_bufs.index(slot), live, BLOCK_K, BLOCK_M)
        _cut(b_bufs.index(slot), live, BLOCK_K, BLOCK_N)
        fence_async_shared()
        warp_barrier()
    acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, product_layout(BLOCK_N))
    if BIAS:
        total = gl.zeros((BLOCK_M, FACTORS), gl.float32, product_layout(FACTORS))
    before = gl.to_tensor(0)  # a value of its own: were it `slot`, the loop's `before = slot` would pass for no change
    for step in range(steps):
        if SCALED:
            f_buf = f_bufs.index(2 * ME + (step & 1))
            spread = gl.zeros((FACTORS, BLOCK_K), gl.float32, factor_layout()) + factor[None, :]
            f_buf.store(spread.to(f_bufs.dtype))
            fence_async_shared()
            warp_barrier()
            source = begin + step * BLOCK_K + ks  # of the next step
            factor = gl.load(scale + source, mask=source < end, other=0.0)
        elif BIAS:
            f_buf = f_bufs.index(0)
        mbarrier.wait(ready.index(slot), phase)
        a = a_bufs.index(slot).permute((1, 0))
        acc = warpgroup_mma(a, b_bufs.index(slot), acc, use_acc=True, is_async=True)
        if BIAS:
            total = warpgroup_mma(a, f_buf.permute((1, 0)), total, use_acc=True, is_async=True)
            acc, total = warpgroup_mma_wait(2, deps=(acc, total))
        else:
            acc = warpgroup_mma_wait(1, deps=(acc,))
        warp_barrier()
        mbarrier.arrive(empty.index(before), count=1, pred=step > 0)
        before = slot
        slot += 1
        phase = gl.where(slot == STAGES, phase ^ 1, phase)
        slot = gl.where(slot == STAGES, 0, slot)
    warp_barrier()
    mbarrier.arrive(turn.index(1 - ME), count=1)
    if BIAS:
        acc, total = warpgroup_mma_wait(0, deps=(acc, total))
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    warp_barrier()
    mbarrier.arrive(empty.index(before), count=1, pred=steps > 0)
    if BIAS:
        return acc, total
    else:  # noqa: RET505 (a constant decides what is compiled)
        return acc


@gluon.jit
def _cut(buf, live, HEIGHT: gl.constexpr, WIDTH: gl.constexpr):
    """Zeros below the first `live` rows of a block."""
    layout: gl.constexpr = row_layout(WIDTH)
    keep = gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, layout)) < live
    buf.store(gl.where(keep[:, None], buf.load(layout), 0.0))


@gluon.jit
def _finish(acc, dw_at, top, left, outs, ME: gl.constexpr, EVEN: gl.constexpr):
    """Stores a tile, PART columns at a time, by way of shared memory: whole rows of 16 bytes a thread."""
    dw, _, out_bufs, rows_out, cols_out = outs
    BLOCK_M: gl.constexpr = out_bufs.type.shape[1]
    PART: gl.constexpr = out_bufs.type.shape[2]
    PARTS: gl.constexpr = acc.shape[1] // PART
    part_layout: gl.constexpr = product_layout(PART)
    layout: gl.constexpr = row_layout(PART)
    rows = top + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    cols = left + gl.arange(0, PART, layout=gl.SliceLayout(0, layout))
    at = dw_at + (rows[:, None] * cols_out + cols[None, :])  # 32 bits; see `warp_specializes_sums`
    accs = split_columns(acc, PARTS)
    out_buf = out_bufs.index(ME)
    for i in gl.static_range(PARTS):
        out_buf.store(gl.convert_layout(accs[i], part_layout).to(dw.dtype.element_ty))
        y = out_buf.load(layout)
        if EVEN:
            gl.store(at + i * PART, y)
        else:
            gl.store(at + i * PART, y, mask=(rows < rows_out)[:, None] & (cols < cols_out - i * PART)[None, :])


def weight_grad(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    config: Config,
    processors: int,
    *,
    bias: bool = False,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dw [e, o, i] and, with `bias`, db [e, o], in the dtype of `a`; the second is None without.

    For operands of which `triton_launch.warp_specializes_sums` holds.

    Args:
        a: gradients of a layer's outputs, sorted rows [r, o].
        b: its inputs, sorted rows [r, i].
        offsets: of the plan, int32 [e + 1].
        config: tile sizes.
        processors: of the chip.
        bias: whether db is wanted.
        scale: factors of the rows in db, float32 [r], or None for 1; rounded to the dtype of `a`.
    """
    experts, (rows_out, cols_out) = offsets.shape[0] - 1, (a.shape[1], b.shape[1])
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    dw = a.new_empty(experts, rows_out, cols_out)
    db = a.new_empty(experts, rows_out) if bias else None
    scale = scale if bias else None
    launch(
        weight_grad_kernel,
        (min(processors, experts * cdiv(rows_out, block_m) * cdiv(cols_out, block_n)),),
        (
            described(a, block_k, block_m),
            described(b, block_k, block_n),
            *(offsets, scale, dw, db, experts, rows_out, cols_out),
        ),
        {
            "BIAS": bias,
            "SCALED": scale is not None,
            "EVEN": rows_out % block_m == 0 and cols_out % block_n == 0,
            "STAGES": config.stages,
            "PART": block_n // config.epilogues,
        },
        config.warps,
    )
    return dw, db
