"""The expert ops: the one door to this folder. Axis letters are those of `moe_mtl.routing`."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_mtl.kernels import inference, reference
from moe_mtl.kernels.dense import dense_mlp
from moe_mtl.kernels.dispatch import (
    autocast,
    backend_module,
    batched,
    casts_late,
    check_kind,
    check_name,
    filled,
    needs_grad,
    plain,
    refuse,
    resolve,
    shape,
    traced,
    transformed,
    wanted,
)
from moe_mtl.kernels.grouped_linear import grouped_linear
from moe_mtl.kernels.plan import Plan, check_ids, plan_routing, slot_ids

__all__ = ["Plan", "check_activation", "dense_mlp", "grouped_linear", "moe_mlp", "plan_routing", "routed_mlp"]


def moe_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gates: Tensor,
    plan: Plan,
    *,
    activation: str = "gelu",
    glu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Routed two-layer MLPs: y[i] = sum_j gates[i, j] * (w2[e] act(w1[e] x[i] + b1[e]) + b2[e]), e = idx[i, j].

    Slots with id -1 add an exact zero and receive a zero gradient, whatever their token and gate hold. An expert
    without rows receives an exact zero gradient. Kept for the backward: x, the pre-activation, weights, gates, plan.

    Args:
        x: tokens [m, d]; float32, bfloat16, float16 or float64. Autocast casts x and the weights, never the gates.
        w1: [e, h, d], or [e, 2h, d] with `glu`: the first h rows go through the activation, the last h multiply it.
        b1: [e, h], or [e, 2h] with `glu`, or None.
        w2: [e, o, h].
        b2: [e, o] or None.
        gates: combination weights [m, k], any float dtype (float32 beside low-precision x).
        plan: `plan_routing` of the ids [m, k].
        activation: "gelu" (exact), "silu" or "relu".
        glu: gated linear unit.
        backend: "auto"; "triton"; "grouped_mm", torch's grouped product; "cpu", sorted segments in plain torch, which
            run on any device; "reference", the oracle. See `moe_mtl.kernels.dispatch.resolve`.

    Returns:
        y [m, o] in the dtype of x.

    Raises:
        ValueError: a shape, dtype, device, activation or backend does not fit.
        RuntimeError: differentiated twice (every backend but the reference).
    """
    x, w1, b1, w2, b2 = _prepare(x, w1, b1, w2, b2, gates, activation, glu, backend)
    if not isinstance(plan, Plan):
        raise ValueError(f"plan: got {type(plan).__name__}, expected what plan_routing makes of the ids")
    if plan.order.shape != plan.inverse.shape or {t.device for t in plan} != {plan.order.device}:
        raise ValueError(f"plan: got tables of {[shape(t) for t in plan]}, which no plan_routing made")
    if plan.order.shape[0] != gates.shape[0] * gates.shape[1] or plan.offsets.shape[0] != w1.shape[0] + 1:
        raise ValueError(
            f"plan: made for {plan.order.shape[0]} slots and {plan.offsets.shape[0] - 1} experts, but gates are "
            f"{shape(gates)} and w1 holds {w1.shape[0]} experts"
        )
    if plan.order.device != x.device:
        raise ValueError(f"plan: got {plan.order.device}, but x is on {x.device}")
    return _planned(x, w1, b1, w2, b2, gates, plan, activation, glu, backend)


def routed_mlp(
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
    backend: str = "auto",
) -> Tensor:
    """`moe_mlp` of ids that serve one call: the same result, without a plan where that is faster.

    Calls on a CPU that need no gradient go through `moe_mtl.kernels.inference` where its estimate says so. Under
    `torch.export`, and so in ONNX, the graph gets the oracle's loop over experts: plain torch operations, no op of
    ours, any number of tokens. Everything else makes a plan.

    Args:
        idx: expert ids [m, k], as `plan_routing` takes them.
        x: as in `moe_mlp`, likewise all others.

    Returns:
        y [m, o] in the dtype of x.

    Raises:
        ValueError: as in `moe_mlp` and `plan_routing`.
        RuntimeError: as in `moe_mlp`.
    """
    x, w1, b1, w2, b2 = _prepare(x, w1, b1, w2, b2, gates, activation, glu, backend)
    check_ids(idx)
    if idx.shape != gates.shape or idx.device != x.device:
        raise ValueError(f"idx: got {shape(idx)} on {idx.device}, but gates are {shape(gates)} on {x.device}")
    if backend == "auto":
        if torch.compiler.is_exporting() or transformed():
            return reference.moe_mlp(x, w1, b1, w2, b2, gates, idx, activation=activation, glu=glu)
        if x.device.type == "cpu" and not needs_grad(x, w1, b1, w2, b2, gates) and not traced(x):
            way = inference.choose(*idx.shape, w1, w2, torch.get_num_threads())
            if way is not None:
                return way(x, *autocast(w1, b1, w2, b2), gates, idx, activation, glu)
    return _planned(x, w1, b1, w2, b2, gates, plan_routing(idx, w1.shape[0]), activation, glu, backend)


def check_activation(name: str) -> None:
    """Refuses an activation no kernel has.

    Raises:
        ValueError: with the known names, and the nearest.
    """
    check_name("activation", name, reference.ACTIVATIONS)


def _prepare(x, w1, b1, w2, b2, gates, activation, glu, backend):
    """The checks that need no ids, and the autocast, of the weights unless the backend does it; see `casts_late`."""
    check_activation(activation)
    late = casts_late(backend, x, w1, b1, w2, b2)
    if late:
        (x,) = autocast(x)
    else:
        x, w1, b1, w2, b2 = autocast(x, w1, b1, w2, b2)
    xs, s1, s2, gs = x.shape, w1.shape, w2.shape, gates.shape
    if len(xs) != 2 or len(s1) != 3 or len(s2) != 3 or len(gs) != 2:
        raise ValueError(
            f"x, w1, w2, gates: got {list(xs)}, {list(s1)}, {list(s2)}, {list(gs)}, expected [m, d], [e, h, d], "
            "[e, o, h], [m, k]"
        )
    if s1[2] != xs[1]:
        raise ValueError(f"w1: got {list(s1)} for tokens {list(xs)}, expected the last axis to be d = {xs[1]}")
    if s2[0] != s1[0] or s1[1] != s2[2] * (1 + glu):
        expected = "[e, 2h, d] and [e, o, h] (glu)" if glu else "[e, h, d] and [e, o, h]"
        raise ValueError(f"w1, w2: got {list(s1)} and {list(s2)}, expected {expected}")
    if b1 is not None and b1.shape != s1[:2]:
        raise ValueError(f"b1: got {shape(b1)}, expected {list(s1[:2])}")
    if b2 is not None and b2.shape != s2[:2]:
        raise ValueError(f"b2: got {shape(b2)}, expected [e, o] = {list(s2[:2])}")
    if gs[0] != xs[0] or gs[1] < 1 or not gates.is_floating_point():
        raise ValueError(f"gates: got {list(gs)} of {gates.dtype}, expected floats [m, k] with m = {xs[0]}")
    check_kind(x, **({} if late else {"w1": w1, "b1": b1, "w2": w2, "b2": b2}))
    if gates.device != x.device:
        raise ValueError(f"gates: got {gates.device}, but x is on {x.device}")
    return x, w1, b1, w2, b2


def _planned(x, w1, b1, w2, b2, gates, plan, activation, glu, backend) -> Tensor:
    backend = resolve(backend, x, *w1.shape[1:], *w2.shape[1:])
    if backend == "reference":
        ids = slot_ids(plan).view(gates.shape)
        return reference.moe_mlp(x, w1, b1, w2, b2, gates, ids, activation=activation, glu=glu)
    save = needs_grad(x, w1, b1, w2, b2, gates) or (torch.is_grad_enabled() and batched())
    args = (x, w1, b1, w2, b2, gates, *plan, activation, glu, save, backend)
    if traced(x):
        return _forward_op(*args)[0]
    return _MoEMLP.apply(*args) if save else _forward(*args)[0]


def _forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gates: Tensor,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    activation: str,
    glu: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    run = backend_module(backend).moe_mlp
    return plain(run, x.device, x, w1, b1, w2, b2, gates, Plan(order, inverse, offsets, tiles), activation, glu, save)


def _backward(
    dy: Tensor,
    x: Tensor | None,
    z: Tensor,
    w1: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    gates: Tensor,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    activation: str,
    glu: bool,
    backend: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    run = backend_module(backend).moe_mlp_backward
    args = (dy, x, z, w1, w2, b2, gates, Plan(order, inverse, offsets, tiles), activation, glu, need)
    return filled(plain(run, dy.device, *args), dy)


_forward_op = torch.library.custom_op("moe_mtl::moe_mlp", _forward, mutates_args=())
_backward_op = torch.library.custom_op("moe_mtl::moe_mlp_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(x, w1, b1, w2, b2, gates, order, inverse, offsets, tiles, activation, glu, save, backend):
    return x.new_empty(x.shape[0], w2.shape[1]), x.new_empty(order.shape[0] if save else 0, w1.shape[1])


@_backward_op.register_fake
def _(dy, x, z, w1, w2, b2, gates, *args):
    need = args[-1]
    shapes = ((dy.shape[0], w1.shape[2]), w1.shape, w1.shape[:2], w2.shape, w2.shape[:2])
    grads = [dy.new_empty(s if n else 0) for s, n in zip(shapes, need[:5], strict=True)]
    return *grads, gates.new_empty(gates.shape) if need[5] else dy.new_empty(0)


def _setup(ctx, inputs, output) -> None:
    x, w1, _, w2, b2, gates, order, inverse, offsets, tiles, ctx.activation, ctx.glu, _, ctx.backend = inputs
    ctx.need = list(ctx.needs_input_grad[:6])
    z = output[1]
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    # only dw1 reads x, so frozen experts do not keep it alive
    ctx.save_for_backward(x if ctx.need[1] else None, z, w1, w2, b2, gates, order, inverse, offsets, tiles)


def _grads(ctx, dy, _dz=None):
    if dy is None:
        return (None,) * 14
    run = _backward_op if torch.is_grad_enabled() or traced(dy) else _backward
    return wanted(run(dy, *ctx.saved_tensors, ctx.activation, ctx.glu, ctx.backend, ctx.need), ctx.need, 8)


_forward_op.register_autograd(_grads, setup_context=_setup)
_backward_op.register_autograd(refuse)


class _MoEMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        y, z = _forward(*inputs)
        _setup(ctx, inputs, (y, z))
        return y

    backward = staticmethod(_grads)


@register_flop_formula(torch.ops.moe_mtl.moe_mlp)
def _(x, w1, b1, w2, b2, gates, *args, out_shape=None, **kwargs) -> int:
    """2 r h (d (1|2) + o), biases not counted as in aten.addmm. Unused slots are counted: shapes do not tell."""
    rows = gates[0] * gates[1]
    return 2 * rows * (w1[1] * w1[2] + w2[1] * w2[2])


@register_flop_formula(torch.ops.moe_mtl.moe_mlp_backward)
def _(dy, x, z, w1, w2, b2, gates, *args, out_shape=None, **kwargs) -> int:
    """One product of the size of the first layer for dx and for dw1, of the second for dy w2 and for dw2."""
    rows, need = gates[0] * gates[1], args[-1]
    first, second = 2 * rows * w1[1] * w1[2], 2 * rows * w2[1] * w2[2]
    need_x, need_w1, need_b1, need_w2, _, need_gates = need
    return first * (need_x + need_w1) + second * ((need_x or need_w1 or need_b1 or need_gates) + need_w2)
