"""What the Triton kernels share: products, activations and their derivatives, the order of tiles.

Axis letters are those of `moe_mtl.routing`. Addresses are computed in int64 wherever a row or an expert is multiplied
by a stride; tables are int32.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32. The interpreter multiplies the bit patterns of bfloat16, so there both go up first."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def cast(x, TYPE: tl.constexpr):
    """x rounded to the nearest number of that type. The interpreter cuts bfloat16 off, so there it is rounded first."""
    if INTERPRETED:  # noqa: SIM102 (both are constants of the compiler)
        if TYPE == tl.bfloat16:  # noqa: SIM300
            bits = x.to(tl.int32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
            x = tl.where(x == x, rounded, x)
    return x.to(TYPE)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z) of float32 values; NaN stays NaN."""
    if ACTIVATION == "gelu":
        y = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "silu":
        y = z * tl.sigmoid(z)
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.where(z < 0, 0.0, z)
    return y


@triton.jit
def derivative(z, ACTIVATION: tl.constexpr):
    """act'(z) of float32 values."""
    if ACTIVATION == "gelu":
        y = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(z)
        y = s * (1.0 + z * (1.0 - s))
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.where(z <= 0, 0.0, 1.0)
    return y


@triton.jit
def grouped_order(pid, row_tiles, col_tiles, GROUP: tl.constexpr):
    """Row and column tile of a program: GROUP row tiles use a column of weights before the next column's turn."""
    span = GROUP * col_tiles
    first = (pid // span) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    within = pid % span
    return first + within % size, within // size


@triton.jit
def halves(x):
    """The left and the right half of [rows, columns]."""
    rows: tl.constexpr = x.shape[0]
    columns: tl.constexpr = x.shape[1]
    return tl.split(tl.permute(tl.reshape(x, [rows, 2, columns // 2]), [0, 2, 1]))
