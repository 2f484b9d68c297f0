"""One linear layer per row, chosen by id: what a router does for tokens of several tasks.

Axis letters are those of `moe_mtl.routing`; `g` counts groups.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_mtl.kernels import reference
from moe_mtl.kernels.dispatch import (
    autocast,
    backend_module,
    check_kind,
    filled,
    needs_grad,
    plain,
    refuse,
    resolve,
    shape,
    traced,
    wanted,
)
from moe_mtl.kernels.plan import Plan, plan_routing


def grouped_linear(x: Tensor, w: Tensor, b: Tensor | None, ids: Tensor, *, backend: str = "auto") -> Tensor:
    """One linear layer per row, chosen by id: y[i] = w[g] x[i] + b[g], g = ids[i]. No row touches another's weights.

    Args:
        x: rows [m, d].
        w: [g, o, d].
        b: [g, o] or None.
        ids: group of each row [m], int64 or int32; -1 gives a zero row and a zero gradient.
        backend: as in `moe_mtl.kernels.ops.moe_mlp`.

    Returns:
        y [m, o].

    Raises:
        ValueError: a shape, dtype, device, id or backend does not fit.
        RuntimeError: differentiated twice (every backend but the reference).
    """
    x, w, b = autocast(x, w, b)
    if x.dim() != 2 or w.dim() != 3 or w.shape[2] != x.shape[1]:
        raise ValueError(f"x, w: got {shape(x)} and {shape(w)}, expected [m, d] and [g, o, d]")
    if b is not None and b.shape != w.shape[:2]:
        raise ValueError(f"b: got {shape(b)}, expected [g, o] = {shape(w)[:2]}")
    if ids.shape != x.shape[:1]:
        raise ValueError(f"ids: got {shape(ids)}, expected one id per row, [{x.shape[0]}]")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids: got {ids.dtype}, expected int64 or int32")
    check_kind(x, w=w, b=b)
    backend = resolve(backend, x, *w.shape[1:])
    plan = plan_routing(ids[:, None], w.shape[0])
    if backend == "reference":
        return reference.grouped_linear(x, w, b, ids)
    args = (x, w, b, *plan, backend)
    if traced(x):
        return _forward_op(*args)
    return _GroupedLinear.apply(*args) if needs_grad(x, w, b) else _forward(*args)


def _forward(
    x: Tensor, w: Tensor, b: Tensor | None, order: Tensor, inverse: Tensor, offsets: Tensor, tiles: Tensor, backend: str
) -> Tensor:
    return plain(backend_module(backend).grouped_linear, x.device, x, w, b, Plan(order, inverse, offsets, tiles))


def _backward(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    backend: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    run = backend_module(backend).grouped_linear_backward
    return filled(plain(run, dy.device, dy, x, w, Plan(order, inverse, offsets, tiles), need), dy)


_forward_op = torch.library.custom_op("moe_mtl::grouped_linear", _forward, mutates_args=())
_backward_op = torch.library.custom_op("moe_mtl::grouped_linear_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(x, w, *_):
    return x.new_empty(x.shape[0], w.shape[1])


@_backward_op.register_fake
def _(dy, x, w, order, inverse, offsets, tiles, backend, need):
    shapes = ((dy.shape[0], w.shape[2]), w.shape, w.shape[:2])
    return tuple(dy.new_empty(s if n else 0) for s, n in zip(shapes, need, strict=True))


def _setup(ctx, inputs, output) -> None:
    x, w, _, order, inverse, offsets, tiles, ctx.backend = inputs
    ctx.need = list(ctx.needs_input_grad[:3])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if ctx.need[1] else None, w, order, inverse, offsets, tiles)


def _grads(ctx, dy):
    if dy is None:
        return (None,) * 8
    run = _backward_op if torch.is_grad_enabled() or traced(dy) else _backward
    return wanted(run(dy, *ctx.saved_tensors, ctx.backend, ctx.need), ctx.need, 5)


_forward_op.register_autograd(_grads, setup_context=_setup)
_backward_op.register_autograd(refuse)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        y = _forward(*inputs)
        _setup(ctx, inputs, y)
        return y

    backward = staticmethod(_grads)


@register_flop_formula(torch.ops.moe_mtl.grouped_linear)
def _(x, w, *args, out_shape=None, **kwargs) -> int:
    """2 m d o; rows with id -1 are counted."""
    return 2 * x[0] * w[1] * w[2]


@register_flop_formula(torch.ops.moe_mtl.grouped_linear_backward)
def _(dy, x, w, *args, out_shape=None, **kwargs) -> int:
    """2 m d o for dx and for dw."""
    return 2 * dy[0] * w[1] * w[2] * sum(args[-1][:2])
