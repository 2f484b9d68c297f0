"""The gradient of the gates: dp[t, j] = <da, h> + <dy[t], b2[e]> of the slot's row and expert; zero if unused."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_mtl.kernels.triton_launch import cdiv, launch, next_power_of_2
from moe_mtl.kernels.triton_math import cast, dot, load_block

BLOCK_M, BLOCK_E, BLOCK_K = 64, 64, 64


@triton.jit(
    do_not_specialize=["columns", "tokens", "num_experts"], do_not_specialize_on_alignment=["inverse", "offsets"]
)
def gate_grad_kernel(
    parts,
    dy,
    b,
    inverse,
    offsets,
    out,
    columns,
    tokens,
    num_experts,
    width,
    dy_stride,
    SLOTS: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A block of tokens and of experts: the slots of these experts, and with the last block the unused ones.

    Products with the biases of all these experts are made, and each slot takes its own.
    """
    ts = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = ts < tokens
    es = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    begin = tl.load(offsets + tl.program_id(1) * EXPERTS)
    end = tl.load(offsets + tl.minimum((tl.program_id(1) + 1) * EXPERTS, num_experts))
    last = tl.program_id(1) == tl.num_programs(1) - 1
    if BIAS:
        begins = tl.load(offsets + es, mask=es < num_experts, other=0)
        ends = tl.load(offsets + 1 + es, mask=es < num_experts, other=0)
        ks = tl.arange(0, BLOCK_K)
        dy_at = dy + ts.to(tl.int64)[:, None] * dy_stride + ks[None, :]
        b_at = b + es.to(tl.int64)[None, :] * width + ks[:, None]
        products = tl.zeros([BLOCK_M, EXPERTS], tl.float32)
        for start in range(0, width, BLOCK_K):
            inside = ks < width - start
            left = load_block(dy_at, live, inside, False, EVEN)
            right = load_block(b_at, inside, es < num_experts, EVEN, False)
            products = dot(left, right, products, PRECISION)
            dy_at += BLOCK_K
            b_at += BLOCK_K
    for j in range(SLOTS):
        slots = ts * SLOTS + j
        rows = tl.load(inverse + slots, mask=live, other=0)
        real = live & (rows >= begin) & (rows < end)
        grad = tl.zeros([BLOCK_M], tl.float32)
        for c in range(columns):
            grad += tl.load(parts + tl.cast(c, tl.int64) * tokens * SLOTS + rows, mask=real, other=0.0)
        if BIAS:
            own = (rows[:, None] >= begins[None, :]) & (rows[:, None] < ends[None, :])
            grad += tl.sum(tl.where(own, products, 0.0), 1)
        tl.store(out + slots, cast(grad, out.dtype.element_ty), mask=real | (live & last & (rows >= end)))


def gate_grad(
    parts: Tensor,
    dy: Tensor,
    b2: Tensor | None,
    inverse: Tensor,
    offsets: Tensor,
    k: int,
    precision: str,
    dtype: torch.dtype,
) -> Tensor:
    """Gradients of the gates [m, k].

    Args:
        parts: what the columns of the hidden units add, float32 [c, r]; see `hidden_grad`.
        dy: [m, o], last axis contiguous.
        b2: [e, o], contiguous, or None.
        inverse: of the plan, int32 [r].
        offsets: of the plan, int32 [e + 1].
        k: slots per token.
        precision: "ieee" or "tf32", of float32 products.
        dtype: of the result.
    """
    (tokens, width), experts = dy.shape, offsets.shape[0] - 1
    out = torch.empty(tokens, k, dtype=dtype, device=dy.device)
    block_e = min(BLOCK_E, max(16, next_power_of_2(experts))) if b2 is not None else next_power_of_2(experts)
    launch(
        gate_grad_kernel,
        (cdiv(tokens, BLOCK_M), cdiv(experts, block_e)),
        (parts, dy, b2, inverse, offsets, out, parts.shape[0], tokens, experts, width, dy.stride(0)),
        {
            "SLOTS": k,
            "BIAS": b2 is not None,
            "EVEN": width % BLOCK_K == 0,
            "EXPERTS": block_e,
            "PRECISION": "ieee" if b2 is None else precision,
            "BLOCK_M": BLOCK_M,
            "BLOCK_K": BLOCK_K,
        },
        warps=4 if dy.element_size() == 2 else 8,
    )
    return out
