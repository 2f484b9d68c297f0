"""A mixture in which every token uses every expert: one dense MLP, whose hidden units the gates scale.

No sort, no plan and no call per expert: the first layers lie side by side as one matrix, and the second layers, summed
over experts, are another. Plain torch, on any device. Axis letters are those of `moe_mtl.routing`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_mtl.kernels import cpu, reference
from moe_mtl.kernels.dispatch import autocast, check_kind, check_name, needs_grad, plain, refuse, shape, traced


def dense_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gates: Tensor,
    *,
    activation: str = "gelu",
    glu: bool = False,
) -> Tensor:
    """y[i] = sum_e gates[i, e] * (w2[e] act(w1[e] x[i] + b1[e]) + b2[e]), over all experts.

    Unlike in `moe_mlp`, no slot is ever unused: NaN in any expert or gate reaches the result. An expert whose gates are
    all zero receives an exact zero gradient. Kept for the backward in eager mode: x, the pre-activation, weights and
    gates. Traced calls (`torch.compile`, `torch.export`, function transforms) see plain torch operations.

    Args:
        x: tokens [m, d]; float32, bfloat16, float16 or float64. Autocast casts x and the weights, never the gates.
        w1: [e, h, d], or [e, 2h, d] with `glu`: the first h rows go through the activation, the last h multiply it.
        b1: [e, h], or [e, 2h] with `glu`, or None.
        w2: [e, o, h].
        b2: [e, o] or None.
        gates: combination weights [m, e], any float dtype.
        activation: "gelu" (exact), "silu" or "relu".
        glu: gated linear unit.

    Returns:
        y [m, o] in the dtype of x.

    Raises:
        ValueError: a shape, dtype, device or activation does not fit.
        RuntimeError: differentiated twice in eager mode.
    """
    check_name("activation", activation, reference.ACTIVATIONS)
    x, w1, b1, w2, b2 = autocast(x, w1, b1, w2, b2)
    if x.dim() != 2 or w1.dim() != 3 or w1.shape[2] != x.shape[1]:
        raise ValueError(f"x, w1: got {shape(x)} and {shape(w1)}, expected [m, d] and [e, h, d]")
    if w2.dim() != 3 or w2.shape[0] != w1.shape[0] or w1.shape[1] != w2.shape[2] * (1 + glu):
        expected = "[e, 2h, d] and [e, o, h] (glu)" if glu else "[e, h, d] and [e, o, h]"
        raise ValueError(f"w1, w2: got {shape(w1)} and {shape(w2)}, expected {expected}")
    for name, bias, layer in (("b1", b1, w1), ("b2", b2, w2)):
        if bias is not None and bias.shape != layer.shape[:2]:
            raise ValueError(f"{name}: got {shape(bias)}, expected {shape(layer)[:2]}")
    if gates.shape != (x.shape[0], w1.shape[0]) or not gates.is_floating_point() or gates.device != x.device:
        raise ValueError(
            f"gates: got {shape(gates)} of {gates.dtype} on {gates.device}, expected floats [m, e] = "
            f"{[x.shape[0], w1.shape[0]]} on {x.device}"
        )
    check_kind(x, w1=w1, b1=b1, w2=w2, b2=b2)
    if traced(x):
        h = _hidden(_first(x, w1, b1), activation, glu)
        return _second((h * gates[..., None]).to(h.dtype), w2, b2, gates)
    args = (x, w1, b1, w2, b2, gates, activation, glu)
    return _DenseMLP.apply(*args) if needs_grad(*args[:6]) else plain(_forward, x.device, *args)[0]


def _first(x: Tensor, w1: Tensor, b1: Tensor | None) -> Tensor:
    """Pre-activations [m, e, (1|2)h]."""
    z = F.linear(x, w1.flatten(0, 1), None if b1 is None else b1.flatten())
    return z.view(x.shape[0], *w1.shape[:2])


def _hidden(z: Tensor, activation: str, glu: bool) -> Tensor:
    """Hidden units [m, e, h]."""
    act = reference.ACTIVATIONS[activation]
    if not glu:
        return act(z)
    gate, up = z.chunk(2, dim=-1)
    return act(gate) * up


def _second(h: Tensor, w2: Tensor, b2: Tensor | None, gates: Tensor) -> Tensor:
    """y [m, o] of hidden units [m, e, h] that the gates have scaled."""
    if _rounds(h) and not traced(h) and h.shape[0] >= h.shape[2]:
        y = F.linear(h.flatten(1), _side_by_side(w2))
    else:  # with fewer tokens, outputs of every expert are smaller than a copy of the weights
        y = torch.bmm(h.transpose(0, 1), w2.mT).sum(0)
    return y if b2 is None else torch.addmm(y, gates.to(y.dtype), b2)


def _side_by_side(w2: Tensor) -> Tensor:
    """The second layers as one matrix [o, e h]: a copy."""
    return w2.transpose(0, 1).flatten(1)


def _rounds(t: Tensor) -> bool:
    """Whether the dtype rounds more than the running sum of a product over the units of all experts.

    Other dtypes sum up over each expert and then over experts, as the definition does: one sum over all errs more.
    """
    return t.element_size() == 2


def _forward(x, w1, b1, w2, b2, gates, activation, glu) -> tuple[Tensor, Tensor]:
    """y and the pre-activations z [m, e, (1|2)h]."""
    z = _first(x, w1, b1)
    return _second(_hidden(z, activation, glu).mul_(gates.to(z.dtype)[..., None]), w2, b2, gates), z


def _backward(dy, x, z, w1, w2, b2, gates, activation, glu, need) -> tuple[Tensor | None, ...]:
    """Gradients of x, w1, b1, w2, b2 and gates, in that order; None where `need` is False."""
    need_x, need_w1, need_b1, need_w2, need_b2, need_gates = need
    need_z, scale = need_x or need_w1 or need_b1, gates.to(dy.dtype)[..., None]
    dx = dw1 = db1 = dw2 = db2 = dgates = h = dh = None
    if need_w2 or need_gates:
        h = _hidden(z, activation, glu)
    if need_z or need_gates:
        dh = (dy @ _side_by_side(w2)).view(*z.shape[:2], w2.shape[2])
    if need_gates:
        dgates = (dh * h).sum(-1, dtype=gates.dtype)
        if b2 is not None:
            dgates += dy @ b2.t()
    if need_w2:
        dw2 = (dy.t() @ h.mul_(scale).flatten(1)).view(w2.shape[1], w2.shape[0], w2.shape[2]).transpose(0, 1)
    if need_b2:
        # not a product, which would add up in one running value
        db2 = (scale * dy[:, None]).sum(0).to(dy.dtype)
    if need_z:
        dh.mul_(scale)
        dz = cpu.activate_backward(dh, z, torch.empty_like(z) if glu else dh, activation, glu)
        if need_x:
            dx = dz.flatten(1) @ w1.flatten(0, 1) if _rounds(dz) else torch.bmm(dz.transpose(0, 1), w1).sum(0)
        dw1 = (dz.flatten(1).t() @ x).view(w1.shape) if need_w1 else None
        db1 = dz.sum(0) if need_b1 else None
    return dx, dw1, db1, dw2, db2, dgates


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, *args):
        return plain(_backward, dy.device, dy, *args)

    backward = staticmethod(refuse)


def _grads(ctx, dy):
    grads = _Gradients.apply(dy, *ctx.saved_tensors, ctx.activation, ctx.glu, ctx.needs_input_grad[:6])
    return *grads, None, None


class _DenseMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, gates, activation, glu):
        y, z = plain(_forward, x.device, x, w1, b1, w2, b2, gates, activation, glu)
        ctx.activation, ctx.glu = activation, glu
        # only dw1 reads x, and only dgates reads b2
        need = ctx.needs_input_grad
        ctx.save_for_backward(x if need[1] else None, z, w1, w2, b2 if need[5] else None, gates)
        return y

    backward = staticmethod(_grads)
