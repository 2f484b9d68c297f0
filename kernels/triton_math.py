"""What the Triton kernels share: products, activations and their derivatives, loads and parts of blocks.

Axis letters are those of `moe_mtl.routing`. Addresses are computed in int64 wherever a row or an expert is multiplied
by a stride, or in 32 bits where a condition says that they suffice; tables are int32.
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
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
            x = tl.where(x == x, rounded, x)
    return x.to(TYPE)


@triton.jit
def _exp2(x):
    """2^x to 2e-7 of itself, 0 below 2^-126."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)


@triton.jit
def _reciprocal(x):
    """1 / x to 2e-7 of itself."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)


@triton.jit
def _tail(z):
    """P(N > |z|) and exp(-z^2 / 2) for a standard normal N, within 1e-7.

    Formula 7.1.26 of Abramowitz and Stegun, Handbook of Mathematical Functions: a third of the instructions of `erf`,
    and the exponential serves the derivative too.
    """
    u = z * 0.8493218002880191
    density = _exp2(-(u * u))
    t = _reciprocal(1.0 + 0.2316418882663604 * tl.abs(z))
    series = 0.1274147960 + t * (-0.1422483680 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
    return series * (t * density), density


@triton.jit
def _sigmoid(z, EXACT: tl.constexpr):
    if EXACT:
        return tl.sigmoid(z)
    return _reciprocal(1.0 + _exp2(z * -1.4426950408889634))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """act(z) of float32 values; NaN stays NaN. Not EXACT: to a few 1e-7, more than 16-bit results can show."""
    if ACTIVATION == "gelu":
        if EXACT:
            y = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
        else:
            tail, _ = _tail(z)
            y = 0.5 * z + tl.abs(z) * (0.5 - tail)
    elif ACTIVATION == "silu":
        y = z * _sigmoid(z, EXACT)
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.where(z < 0, 0.0, z)
    return y


@triton.jit
def activate_and_derive(z, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """act(z) and act'(z) of float32 values."""
    if ACTIVATION == "gelu":
        if EXACT:
            below = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
            density = tl.exp(-0.5 * z * z)
            y = z * below
        else:
            tail, density = _tail(z)
            half = 0.5 - tail
            sign = z.to(tl.int32, bitcast=True) & -2147483648
            below = 0.5 + (half.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
            y = 0.5 * z + tl.abs(z) * half
        slope = below + (0.3989422804014327 * z) * density
    elif ACTIVATION == "silu":
        s = _sigmoid(z, EXACT)
        y = z * s
        slope = s + y * (1.0 - s)
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.where(z < 0, 0.0, z)
        slope = tl.where(z <= 0, 0.0, 1.0)
    return y, slope


@triton.jit
def load_block(at, rows_inside, columns_inside, EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr):
    """A block of pointers; zeros where a mask of its rows or columns says so, each looked at unless it is EVEN."""
    if EVEN_ROWS and EVEN_COLUMNS:
        return tl.load(at)
    if EVEN_ROWS:
        return tl.load(at, mask=columns_inside[None, :], other=0.0)
    if EVEN_COLUMNS:
        return tl.load(at, mask=rows_inside[:, None], other=0.0)
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
