"""The oracle: each op written as the sentence that defines it. Any dtype, any device, differentiable by autograd.

Used by tests and benchmarks, and as backend="reference". Slow on purpose: no sorting, no fusing, no buffers.

Exported models compute with it too. A loop over experts without a branch, in which an expert without rows works on zero
rows, holds for any number of tokens, and onnxruntime runs it faster than all experts on all tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}


def moe_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gates: Tensor,
    idx: Tensor,
    *,
    activation: str = "gelu",
    glu: bool = False,
) -> Tensor:
    """y[i] = sum_j gates[i, j] * (w2[e] act(w1[e] x[i] + b1[e]) + b2[e]) with e = idx[i, j]; -1 adds nothing.

    Args:
        x: tokens [m, d].
        w1: [e, h, d], or [e, 2h, d] with `glu`: the first h rows go through the activation, the last h multiply it.
        b1: [e, h], or [e, 2h] with `glu`, or None.
        w2: [e, o, h].
        b2: [e, o] or None.
        gates: [m, k].
        idx: expert ids [m, k], each 0..e-1 or -1.
        activation: "gelu" (exact), "silu" or "relu".
        glu: gated linear unit.

    Returns:
        y [m, o] in the dtype of x.
    """
    act = ACTIVATIONS[activation]
    y = x.new_zeros(x.shape[0], w2.shape[1])
    for e in range(w1.shape[0]):
        rows, slots = torch.where(idx == e)
        z = F.linear(x[rows], w1[e], None if b1 is None else b1[e])
        if glu:
            first, second = z.chunk(2, dim=-1)
            hidden = act(first) * second
        else:
            hidden = act(z)
        out = F.linear(hidden, w2[e], None if b2 is None else b2[e])
        y = y.index_add(0, rows, (gates[rows, slots, None] * out).to(y.dtype))
    return y


def grouped_linear(x: Tensor, w: Tensor, b: Tensor | None, ids: Tensor) -> Tensor:
    """y[i] = w[g] x[i] + b[g] with g = ids[i]; zero where ids[i] is -1.

    Args:
        x: rows [m, d].
        w: [g, o, d].
        b: [g, o] or None.
        ids: one group per row [m].

    Returns:
        y [m, o].
    """
    y = x.new_zeros(x.shape[0], w.shape[1])
    for g in range(w.shape[0]):
        rows = torch.where(ids == g)[0]
        y = y.index_add(0, rows, F.linear(x[rows], w[g], None if b is None else b[g]))
    return y
