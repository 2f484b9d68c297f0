"""What products of rows with their expert's weights share: a tile's product, and the order of tiles."""

from typing import Any

import triton
import triton.language as tl

from moe_mtl.kernels.configs import Config
from moe_mtl.kernels.triton_math import dot, load_block


@triton.jit
def grouped_order(pid, row_tiles, col_tiles, GROUP: tl.constexpr):
    """Row and column tile of a program: GROUP row tiles use a column of weights before the next column's turn."""
    span = GROUP * col_tiles
    first = (pid // span) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    within = pid % span
    return first + within % size, within // size


@triton.jit
def product(
    a,
    w,
    source,
    first,
    expert,
    left,
    inner,
    width,
    a_stride,
    w_stride,
    TRANSPOSED: tl.constexpr,
    GLU: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    DESCRIBED_A: tl.constexpr,
    DESCRIBED_W: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows of a times columns of an expert's weights, in float32; with GLU, the same columns of its second half too.

    Args:
        a: rows, or a descriptor of them where DESCRIBED_A.
        w: weights [e, n, k], [e, k, n] where TRANSPOSED, or a descriptor of them where DESCRIBED_W.
        source: rows of `a` to read, int32 [BLOCK_M].
        first: row of a descriptor to begin with.
        expert: whose weights.
        left: first column.
        inner: length of the summed axis.
        width: columns; with GLU of one half.
        a_stride: of a row.
        w_stride: of an expert.
        TRANSPOSED: see `w`.
        GLU: see above; not with TRANSPOSED.
        EVEN_N: the columns are whole blocks.
        EVEN_K: the summed axis is.
        DESCRIBED_A: see `a`.
        DESCRIBED_W: see `w`.
        PRECISION: "ieee" or "tf32", of float32 products.
        BLOCK_N: columns of a tile.
        BLOCK_K: how much of the summed axis a step takes.
    """
    ks = tl.arange(0, BLOCK_K)
    ns = left + tl.arange(0, BLOCK_N)
    if not DESCRIBED_A:
        a_at = a + source.to(tl.int64)[:, None] * a_stride + ks[None, :]
    if not DESCRIBED_W:
        w_at = w + expert.to(tl.int64) * w_stride
        if TRANSPOSED:
            w_at += ks[:, None] * width + ns[None, :]
        else:
            w_at += ns[None, :] * inner + ks[:, None]
    acc = tl.zeros([source.shape[0], BLOCK_N], tl.float32)
    acc_up = acc
    for start in range(0, inner, BLOCK_K):
        inside = ks < inner - start
        if DESCRIBED_A:
            x = a.load([first, start])
        else:
            x = load_block(a_at, source >= 0, inside, True, EVEN_K)
            a_at += BLOCK_K
        if DESCRIBED_W:
            if TRANSPOSED:
                y = w.load([expert, start, left]).reshape(BLOCK_K, BLOCK_N)
            else:
                y = w.load([expert, left, start]).reshape(BLOCK_N, BLOCK_K).T
        else:
            y = load_block(w_at, inside, ns < width, EVEN_K, EVEN_N)
        acc = dot(x, y, acc, PRECISION)
        if GLU:
            if DESCRIBED_W:
                y = w.load([expert, width + left, start]).reshape(BLOCK_N, BLOCK_K).T
            else:
                y = load_block(w_at + width * inner, inside, ns < width, EVEN_K, EVEN_N)
            acc_up = dot(x, y, acc_up, PRECISION)
        if not DESCRIBED_W:
            w_at += BLOCK_K * (width if TRANSPOSED else 1)
    return acc, acc_up


def constants_of(
    config: Config, inner: int, width: int, described_a: bool, described_w: bool, precision: str
) -> dict[str, Any]:
    """The constants with which the parameters of a kernel around a `product` end, in their order.

    Args:
        config: tile sizes.
        inner: length of the summed axis.
        width: columns; with a gated unit of one half.
        described_a: whether the rows are a descriptor.
        described_w: whether the weights are.
        precision: "ieee" or "tf32", of float32 products.
    """
    return {
        "EVEN_N": width % config.block_n == 0,
        "EVEN_K": inner % config.block_k == 0,
        "DESCRIBED_A": described_a,
        "DESCRIBED_W": described_w,
        "PRECISION": precision,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": config.group,
        "EPILOGUES": config.epilogues,
    }
