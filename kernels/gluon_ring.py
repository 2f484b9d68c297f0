"""What the warp-specialized kernels share: who does what when, the order of tiles, a tile's product.

One persistent program per processor, of 9 warps and more registers than a program of four could have, in partitions:

    consumer 0   the default partition, 4 warps   tiles 0, 2, 4, ... of the program: products and all that follows
    consumer 1   a worker, 4 warps                tiles 1, 3, 5, ...
    producer     a worker, 1 warp                 asks the copy engine (TMA) for the operands of all tiles, in order

Tiles. The plan's table of tiles begins with those that hold rows; how many they are (`live_tiles`) follows from the
plan's offsets. Program p has the tiles p, p + programs, p + 2 programs, ... of them and of all columns, in the order of
`grouped_order`: the partitions agree on the sequence by arithmetic alone. A program without a tile runs no loop.

The ring of operands has STAGES slots. Block number B, counted over all tiles of the program, `steps` blocks a tile,
lies in slot B % STAGES and is the (B // STAGES)-th use of it. Barriers of a slot:

    ready[slot]  count 1: the producer's `expect` arrives, and the copy engine's bytes complete the phase
    empty[slot]  count 1: the consumer whose tile the block belongs to arrives when its products have read the block

    producer   before block B: wait(empty[slot], ((B // STAGES) & 1) ^ 1)
    consumer   before block B: wait(ready[slot], (B // STAGES) & 1)

A wait for parity q returns when the phase of parity q has completed. On a fresh barrier the phase before the first, of
parity 1, counts as completed, so the producer's first STAGES waits pass. Parity tells phases apart only for who is at
most one phase behind or ahead. The producer waits before use u for the end of use u - 1, without which there is no use
u + 1. A consumer is not overtaken: the phase after the one it waits for completes only after it has itself arrived on
`empty`. But it skips the blocks of the other one, so without more it could wait for use u while use u - 1 is under way;
parity would say that use u - 2 has completed, and it would go on with what is not there. Hence turns:

    turn[c]      count 1: the other consumer arrives once it has issued the last product of a tile

    consumer c   before its u-th tile: wait(turn[c], (u & 1) ^ (1 - c))        consumer 0's first wait passes

With the turn, every block before the tile has been seen by a wait on `ready`: block B - STAGES, use u - 1 of the slot,
belongs to this tile or to one before. Turns alternate strictly, and a consumer passes the turn on only behind a barrier
of its warps after its own wait for it, so nobody is overtaken by two.

Products of the consumers follow each other (ping-pong scheduling), in the order in which blocks are loaded, and the
consumer that has passed the turn on finishes its tile meanwhile. The turn is passed on with the last product in flight:
the tensor cores do not pause.

Every `arrive` stands behind a barrier of the partition's warps. One thread arrives for all; without the barrier the
first warp could hand a slot back while another still reads it, or still waits for the phase that is about to be
overtaken. Reads of registers from shared memory are followed by `fence_async_shared` before the copy engine may write
there; products and the copy engine need no fence between them.

The way out of products (gradients of weights are stored by threads alone). A tile leaves in parts of its columns,
through a buffer of its consumer: written as products lie in registers, then taken by the copy engine, which neither
computes addresses nor waits. A tile that ends with its expert's rows, inside, is stored by the threads instead, row by
row. Two rules: between writing and asking the engine, a fence and a barrier of the warps; before writing again,
`store_wait`, which only the thread that asked knows the end of, and a barrier. Nobody may end before the engine has
read all buffers.

A loop over the parts is a loop in the code too (`shifted`): unrolled, the code of two consumers does not fit the
processor's cache of instructions, and all of it takes up to 1.4 times as long.
"""

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moe_mtl.kernels.triton_launch import next_power_of_2
from moe_mtl.kernels.triton_product import grouped_order

warp_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.6; of the partition's warps

WORKERS = gl.constexpr([4, 1])  # warps of the partitions beside the default one
REGISTERS = gl.constexpr([240, 24])  # of a thread there; 2 * 128 * 240 + 128 * 24 of the processor's 65536


@gluon.jit
def live_tiles(offsets, experts, BLOCK_M: gl.constexpr, EXPERTS: gl.constexpr):
    """How many row tiles hold rows: every expert's rows are cut into blocks of BLOCK_M."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    at = gl.arange(0, EXPERTS, layout=layout)
    begin = gl.load(offsets + at, mask=at < experts, other=0)
    end = gl.load(offsets + at + 1, mask=at < experts, other=0)
    return gl.sum((end - begin + (BLOCK_M - 1)) // BLOCK_M, 0)


@gluon.constexpr_function
def product_layout(columns):
    """How a consumer's products lie in registers: rows over its 4 warps, all columns in each."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def row_layout(columns):
    """For loads and stores of 16 bytes a thread: whole rows of that many columns, by 4 warps."""
    across = columns // 8
    return gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])


@gluon.jit
def split_columns(x, PARTS: gl.constexpr):
    """The columns in 1, 2, 4 or 8 equal parts, from left to right: other names of registers, nothing moves."""
    xs = (x,)
    for _ in gl.static_range(PARTS.bit_length() - 1):
        halves = ()
        for j in gl.static_range(len(xs)):
            y = xs[j]
            halves += y.reshape(y.shape[0], 2, y.shape[1] // 2).permute(0, 2, 1).split()
        xs = halves
    return xs


@gluon.jit
def parts_of(acc, PARTS: gl.constexpr, PART: gl.constexpr):
    """A tile's sums in equal parts of PART columns, from left to right, each laid out as a product of its width."""
    pieces = split_columns(acc, PARTS)
    layout: gl.constexpr = product_layout(PART)
    parts = ()
    for i in gl.static_range(PARTS):
        parts += (gl.convert_layout(pieces[i], layout),)
    return parts


@gluon.jit
def shifted(parts):
    """Without the first, the last one twice: for a loop over parts that takes the first one each time."""
    rest = ()
    for i in gl.static_range(1, len(parts)):
        rest += (parts[i],)
    return rest + (parts[len(parts) - 1],)  # noqa: RUF005 (the language has no such thing)


@gluon.jit
def held_back(x):
    """x, of which the compiler knows nothing: a loop with so many rounds is not unrolled, and what is made of x inside
    a loop is not made before it, where it would take registers all the time."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], gl.int32, False, 1)


@gluon.jit
def look_up(number, walk, GROUP: gl.constexpr):
    """Expert, first row, the row after the last, and column of a tile; those of the last tile where there are no more.

    Without any tile, the first line of the table.
    """
    tiles, row_tiles, col_tiles, _ = walk
    number = gl.maximum(gl.minimum(number, row_tiles * col_tiles - 1), 0)
    tile, column = grouped_order(number, gl.maximum(row_tiles, 1), col_tiles, GROUP)
    return gl.load(tiles + 3 * tile), gl.load(tiles + 3 * tile + 1), gl.load(tiles + 3 * tile + 2), column


@gluon.jit
def multiply(
    ring,
    block,
    steps,
    turn_phase,
    ME: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):
    """A tile's product in float32 [BLOCK_M, BLOCK_N]; hands back every slot and passes the turn on.

    Slot B - 1 goes back after product B has been issued and B - 1 has ended: at most one is in flight, and tensor cores
    never wait for the handing back.

    Args:
        ring: buffers of rows and of weights, and the barriers `ready`, `empty`, `turn`.
        block: number of the tile's first block.
        steps: blocks of the tile.
        turn_phase: parity of the turn to wait for.
        ME: which consumer.
        BLOCK_M: rows of the tile.
        BLOCK_N: columns.
        TRANSPOSED: blocks of weights are [k, n], not [n, k].
    """
    a_bufs, w_bufs, ready, empty, turn = ring
    STAGES: gl.constexpr = a_bufs.type.shape[0]
    slot = block % STAGES
    phase = (block // STAGES) & 1
    acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, product_layout(BLOCK_N))
    mbarrier.wait(turn.index(ME), turn_phase)
    mbarrier.wait(ready.index(slot), phase)
    acc = _issue(a_bufs.index(slot), w_bufs.index(slot), acc, False, TRANSPOSED)
    acc = warpgroup_mma_wait(1, deps=(acc,))
    for _ in range(1, steps):
        before = slot
        slot += 1
        phase = gl.where(slot == STAGES, phase ^ 1, phase)
        slot = gl.where(slot == STAGES, 0, slot)
        mbarrier.wait(ready.index(slot), phase)
        acc = _issue(a_bufs.index(slot), w_bufs.index(slot), acc, True, TRANSPOSED)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        warp_barrier()
        mbarrier.arrive(empty.index(before), count=1)
    warp_barrier()
    mbarrier.arrive(turn.index(1 - ME), count=1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    warp_barrier()
    mbarrier.arrive(empty.index(slot), count=1)
    return acc


@gluon.jit
def _issue(a, w, acc, USE: gl.constexpr, TRANSPOSED: gl.constexpr):
    if not TRANSPOSED:
        w = w.permute((1, 0))
    return warpgroup_mma(a, w, acc, use_acc=USE, is_async=True)


def described(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A matrix, or the matrices [e, n, k] one below the other, for copies of blocks of that many rows and columns."""
    width = t.shape[-1]
    lines = t.shape[0] if t.dim() == 2 else t.shape[0] * t.shape[1]
    return TensorDescriptor(t, [lines, width], [t.stride(-2), 1], [rows, columns], _layout(rows, columns, t.dtype))


@cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    kind = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([rows, columns], kind)


def counted(experts: int) -> int:
    """EXPERTS of `live_tiles`: at least one for each thread of four warps."""
    return max(128, next_power_of_2(experts))
