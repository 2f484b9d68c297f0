"""Back to token order: y[t] = sum_j p[t, j] ys[row of slot (t, j)], one read per row, no atomics."""

import triton
import triton.language as tl
from torch import Tensor

from moe_mtl.kernels.triton_launch import cdiv, launch
from moe_mtl.kernels.triton_math import cast

BLOCK_M, BLOCK_N = 16, 128


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["inverse", "used"])
def combine_kernel(
    ys,
    gates,
    inverse,
    used,
    y,
    tokens,
    width,
    SLOTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of tokens and their width."""
    ts = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live, inside = ts < tokens, ns < width
    limit = tl.load(used)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for j in range(SLOTS):
        slots = ts * SLOTS + j
        rows = tl.load(inverse + slots, mask=live, other=0)
        real = live & (rows < limit)  # the other slots are unused
        at = ys + rows.to(tl.int64)[:, None] * width + ns[None, :]
        part = tl.load(at, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(gates + slots, mask=real, other=0.0).to(tl.float32)[:, None]
        acc += part
    at = y + ts.to(tl.int64)[:, None] * width + ns[None, :]
    tl.store(at, cast(acc, y.dtype.element_ty), mask=live[:, None] & inside[None, :])


def combine(ys: Tensor, gates: Tensor | None, inverse: Tensor, offsets: Tensor, k: int) -> Tensor:
    """Sums the k rows of each token, weighted by the gates if there are any: [m, o].

    Args:
        ys: sorted rows [r, o], contiguous; those of unused slots are not read.
        gates: [m, k], contiguous, or None.
        inverse: of the plan, int32 [r].
        offsets: of the plan, int32 [e + 1].
        k: slots per token.
    """
    rows, width = ys.shape
    y = ys.new_empty(rows // k, width)
    grid = (cdiv(y.shape[0], BLOCK_M), cdiv(width, BLOCK_N))
    launch(
        combine_kernel,
        grid,
        (ys, gates, inverse, offsets[-1:], y, y.shape[0], width),
        {"SLOTS": k, "WEIGHTED": gates is not None, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N},
        warps=4,
    )
    return y
