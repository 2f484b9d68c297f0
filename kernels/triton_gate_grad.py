"""The gradient of the gates: dp[t, j] = <da, h> + <dy[t], b2[e]> of the slot's row and expert; zero if unused."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_mtl.kernels.triton_math import cast

BLOCK_M, BLOCK_N = 32, 64


@triton.jit(do_not_specialize=["columns", "slots", "slots_per_token", "num_experts"])
def gate_grad_kernel(
    parts,
    dy,
    b,
    inverse,
    offsets,
    out,
    columns,
    slots,
    slots_per_token,
    num_experts,
    width,
    dy_stride,
    BIAS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of slots."""
    ss = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = ss < slots
    rows = tl.load(inverse + ss, mask=live, other=0)
    real = live & (rows < tl.load(offsets + num_experts))
    grad = tl.zeros([BLOCK_M], tl.float32)
    for c in range(columns):
        grad += tl.load(parts + tl.cast(c, tl.int64) * slots + rows, mask=real, other=0.0)
    if BIAS:
        es = tl.arange(0, EXPERTS)
        ends = tl.load(offsets + 1 + es, mask=es < num_experts, other=2147483647)
        expert = tl.sum((ends[None, :] <= rows[:, None]).to(tl.int64), 1)
        tokens = (ss // slots_per_token).to(tl.int64)
        for start in range(0, width, BLOCK_N):
            ns = start + tl.arange(0, BLOCK_N)
            keep = real[:, None] & (ns < width)[None, :]
            left = tl.load(dy + tokens[:, None] * dy_stride + ns[None, :], mask=keep, other=0.0).to(tl.float32)
            right = tl.load(b + expert[:, None] * width + ns[None, :], mask=keep, other=0.0).to(tl.float32)
            grad += tl.sum(left * right, 1)
    tl.store(out + ss, cast(grad, out.dtype.element_ty), mask=live)


def gate_grad(
    parts: Tensor, dy: Tensor, b2: Tensor | None, inverse: Tensor, offsets: Tensor, k: int, dtype: torch.dtype
) -> Tensor:
    """Gradients of the gates [m, k].

    Args:
        parts: what the columns of the hidden units add, float32 [c, r]; see `hidden_grad`.
        dy: [m, o], last axis contiguous.
        b2: [e, o], contiguous, or None.
        inverse: of the plan, int32 [r].
        offsets: of the plan, int32 [e + 1].
        k: slots per token.
        dtype: of the result.
    """
    columns, slots = parts.shape
    experts = offsets.shape[0] - 1
    out = torch.empty(slots // k, k, dtype=dtype, device=dy.device)
    gate_grad_kernel[(triton.cdiv(slots, BLOCK_M),)](
        parts,
        dy,
        b2,
        inverse,
        offsets,
        out,
        columns,
        slots,
        k,
        experts,
        dy.shape[1],
        dy.stride(0),
        BIAS=b2 is not None,
        EXPERTS=triton.next_power_of_2(experts),
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        num_warps=4,
    )
    return out
