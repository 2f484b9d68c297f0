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
def _normal(z, EXACT: tl.constexpr):
    """P(N <= z) and exp(-z^2 / 2) for a standard normal N.

    Not exact: within 1e-7, by formula 7.1.26 of Abramowitz and Stegun, Handbook of Mathematical Functions, which takes a
    third of the instructions of `erf` and shares the exponential with the derivative.
    """
    density = tl.exp2(-0.7213475204444817 * z * z)
    if EXACT:
        below = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    else:
        t = 1.0 / (1.0 + 0.2316418882663604 * tl.abs(z))
        tail = t * (-0.1422483680 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
        tail = t * (0.1274147960 + tail) * density
        below = tl.where(z < 0, tail, 1.0 - tail)
    return below, density


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """act(z) of float32 values; NaN stays NaN. Not EXACT: as exact as 16-bit results can show."""
    if ACTIVATION == "gelu":
        below, _ = _normal(z, EXACT)
        y = z * below
    elif ACTIVATION == "silu":
        y = z * tl.sigmoid(z)
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.where(z < 0, 0.0, z)
    return y


@triton.jit
def activate_and_derive(z, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """act(z) and act'(z) of float32 values."""
    if ACTIVATION == "gelu":
        below, density = _normal(z, EXACT)
        y = z * below
        slope = below + 0.3989422804014327 * z * density
    elif ACTIVATION == "silu":
        s = tl.sigmoid(z)
        y = z * s
        slope = s + y * (1.0 - s)
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.where(z < 0, 0.0, z)
        slope = tl.where(z <= 0, 0.0, 1.0)
    return y, slope


@triton.jit
def grouped_order(pid, row_tiles, col_tiles, GROUP: tl.constexpr):
    """Row and column tile of a program: GROUP row tiles use a column of weights before the next column's turn."""
    span = GROUP * col_tiles
    first = (pid // span) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    within = pid % span
    return first + within % size, within // size


@triton.jit
def load_block(at, rows_inside, columns_inside, EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr):
    """A block of pointers; zeros where a mask of its rows or columns says so, each looked at unless it is EVEN."""
    if EVEN_ROWS and EVEN_COLUMNS:
        return tl.load(at)
    elif EVEN_ROWS:
        return tl.load(at, mask=columns_inside[None, :], other=0.0)
    elif EVEN_COLUMNS:
        return tl.load(at, mask=rows_inside[:, None], other=0.0)
    else:
        return tl.load(at, mask=rows_inside[:, None] & columns_inside[None, :], other=0.0)


@triton.jit
def _halves(x):
    rows: tl.constexpr = x.shape[0]
    columns: tl.constexpr = x.shape[1]
    return tl.split(tl.permute(tl.reshape(x, [rows, 2, columns // 2]), [0, 2, 1]))


@triton.jit
def pieces(x, COUNT: tl.constexpr):
    """The columns of [rows, columns] in 1, 2 or 4 equal parts, from left to right."""
    if COUNT == 1:
        parts = (x,)
    elif COUNT == 2:
        low, high = _halves(x)
        parts = (low, high)
    else:
        low, high = _halves(x)
        first, second = _halves(low)
        third, fourth = _halves(high)
        parts = (first, second, third, fourth)
    return parts
