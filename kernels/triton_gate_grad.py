"""The gradient of the gates: dp[t, j] = <da, h> + <dy[t], b2[e]> of the slot's row and expert; zero if unused."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_mtl.kernels.triton_launch import launch
from moe_mtl.kernels.triton_math import cast

BLOCK = 256


@triton.jit(do_not_specialize=["columns", "slots"])
def gate_grad_kernel(parts, dots, inverse, used, out, columns, slots, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """A block of slots."""
    ss = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = ss < slots
    rows = tl.load(inverse + ss, mask=live, other=0)
    real = live & (rows < tl.load(used))
    grad = tl.zeros([BLOCK], tl.float32)
    for c in range(columns):
        grad += tl.load(parts + tl.cast(c, tl.int64) * slots + rows, mask=real, other=0.0)
    if BIAS:
        grad += tl.load(dots + rows, mask=real, other=0.0)
    tl.store(out + ss, cast(grad, out.dtype.element_ty), mask=live)


def gate_grad(
    parts: Tensor, dots: Tensor | None, inverse: Tensor, offsets: Tensor, k: int, dtype: torch.dtype
) -> Tensor:
    """Gradients of the gates [m, k].

    Args:
        parts: what the columns of the hidden units add, float32 [c, r]; see `hidden_grad`.
        dots: what the second bias adds, float32 [r]; see `sorted_grad`; None without a bias.
        inverse: of the plan, int32 [r].
        offsets: of the plan, int32 [e + 1].
        k: slots per token.
        dtype: of the result.
    """
    columns, slots = parts.shape
    out = torch.empty(slots // k, k, dtype=dtype, device=parts.device)
    launch(
        gate_grad_kernel,
        (triton.cdiv(slots, BLOCK),),
        (parts, dots, inverse, offsets[-1:], out, columns, slots),
        {"BIAS": dots is not None, "BLOCK": BLOCK},
        warps=4,
    )
    return out
