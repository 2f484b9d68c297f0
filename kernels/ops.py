"""The expert ops: argument checks, autograd, autocast, FLOP formulas, and the choice of a backend.

Each op is a whole `torch.library.custom_op`: torch.compile, torch.export and FlopCounterMode see one node per op, and a
backend is free to sort, pad or read counts on the host inside it. Axis letters are those of `moe_mtl.routing`.

Eager calls that nobody traces skip the dispatcher: they run the same bodies through an `autograd.Function`, which saves
about 0.1 ms a layer and direction, a tenth of what 64 tokens of width 96 cost.
"""

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_mtl.kernels import cpu, reference

# Where a kernel for another device joins: name -> module with the four functions of cpu.py.
_BACKENDS: dict[str, Any] = {"cpu": cpu}
_DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


class Plan(NamedTuple):
    """Sort tables of one routing, shared by every op that routes the same way. A kernel's tile table would be a field.

    Attributes:
        order: the flat slot (token * k + j) of every sorted row, int32 [r], r = m k. Stable: within an expert, slots
            ascend, so results do not depend on the sort. Unused slots (id -1) come last.
        inverse: the sorted row of every slot, int32 [r].
        offsets: where each expert's rows start, int32 [e + 1]; offsets[e] rows are used.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor


def plan_routing(idx: Tensor, num_experts: int) -> Plan:
    """Sorts slots by expert.

    Args:
        idx: expert ids [m, k], int32 or int64, each 0..num_experts-1, or -1 where the slot is unused (padding). Ids may
            repeat within a row.
        num_experts: experts e.

    Raises:
        ValueError: idx is not an integer matrix, or (checked on the CPU only, elsewhere it would stall) an id is out of
            range.
    """
    if idx.dim() != 2 or idx.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"idx: got {_shape(idx)} of {idx.dtype}, expected int64 or int32 ids [m, k]")
    if num_experts < 1:
        raise ValueError(f"num_experts: got {num_experts}, expected at least 1")
    return Plan(*(_plan_op if _traced(idx) else _plan)(idx, num_experts))


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
        backend: "auto"; "cpu", sorted segments in plain torch, which run on any device; "reference", the oracle.

    Returns:
        y [m, o] in the dtype of x.

    Raises:
        ValueError: a shape, dtype, device, activation or backend does not fit.
        RuntimeError: differentiated twice (every backend but the reference).
    """
    check_activation(activation)
    if torch.is_autocast_enabled(x.device.type):
        x, w1, b1, w2, b2 = _autocast(x, w1, b1, w2, b2)
    _check_moe_mlp(x, w1, b1, w2, b2, gates, plan, glu)
    backend = _resolve(backend)
    if backend == "reference":
        ids = _ids(plan).view(gates.shape)
        return reference.moe_mlp(x, w1, b1, w2, b2, gates, ids, activation=activation, glu=glu)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w1, b1, w2, b2, gates))
    args = (x, w1, b1, w2, b2, gates, *plan, activation, glu, save, backend)
    if _traced(x):
        return _moe_mlp_op(*args)[0]
    return _MoEMLP.apply(*args) if save else _moe_mlp(*args)[0]


def grouped_linear(x: Tensor, w: Tensor, b: Tensor | None, ids: Tensor, *, backend: str = "auto") -> Tensor:
    """One linear layer per row, chosen by id: y[i] = w[g] x[i] + b[g], g = ids[i]. No row touches another's weights.

    Args:
        x: rows [m, d].
        w: [g, o, d].
        b: [g, o] or None.
        ids: group of each row [m], int64 or int32; -1 gives a zero row and a zero gradient.
        backend: as in `moe_mlp`.

    Returns:
        y [m, o].

    Raises:
        ValueError: a shape, dtype, device, id or backend does not fit.
        RuntimeError: differentiated twice (every backend but the reference).
    """
    if torch.is_autocast_enabled(x.device.type):
        x, w, b = _autocast(x, w, b)
    if x.dim() != 2 or w.dim() != 3 or w.shape[2] != x.shape[1]:
        raise ValueError(f"x, w: got {_shape(x)} and {_shape(w)}, expected [m, d] and [g, o, d]")
    if b is not None and b.shape != w.shape[:2]:
        raise ValueError(f"b: got {_shape(b)}, expected [g, o] = {_shape(w)[:2]}")
    if ids.shape != x.shape[:1]:
        raise ValueError(f"ids: got {_shape(ids)}, expected one id per row, [{x.shape[0]}]")
    _check_kind(x, w=w, b=b)
    backend = _resolve(backend)
    if backend == "reference":
        return reference.grouped_linear(x, w, b, ids)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, b))
    args = (x, w, b, *plan_routing(ids[:, None], w.shape[0]), backend)
    if _traced(x):
        return _grouped_linear_op(*args)
    return _GroupedLinear.apply(*args) if save else _grouped_linear(*args)


# --- checks and dispatch ----------------------------------------------------------------------------------------------


def _shape(t: Tensor) -> list[int]:
    return list(t.shape)


def _check_name(argument: str, name: str, known) -> None:
    if name not in known:
        near = difflib.get_close_matches(str(name), list(known), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{argument}: got {name!r}, known: {', '.join(known)}{hint}")


def check_activation(name: str) -> None:
    """Refuses an activation no kernel has.

    Raises:
        ValueError: with the known names, and the nearest.
    """
    _check_name("activation", name, reference.ACTIVATIONS)


def _resolve(backend: str) -> str:
    """The backend that will run. "auto" is the segment code, the only one, for every device."""
    if backend == "auto":
        return "cpu"
    _check_name("backend", backend, ("auto", "reference", *_BACKENDS))
    return backend


def _check_kind(x: Tensor, **others: Tensor | None) -> None:
    if x.dtype not in _DTYPES:
        raise ValueError(f"x: got {x.dtype}, expected one of {', '.join(map(str, _DTYPES))}")
    for name, t in others.items():
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            raise ValueError(f"{name}: got {t.dtype} on {t.device}, but x is {x.dtype} on {x.device}")


def _check_moe_mlp(x, w1, b1, w2, b2, gates, plan, glu) -> None:
    if x.dim() != 2 or w1.dim() != 3 or w2.dim() != 3 or gates.dim() != 2:
        raise ValueError(
            f"x, w1, w2, gates: got {_shape(x)}, {_shape(w1)}, {_shape(w2)}, {_shape(gates)}, expected [m, d], "
            "[e, h, d], [e, o, h], [m, k]"
        )
    experts, wide = w1.shape[:2]
    if w1.shape[2] != x.shape[1]:
        raise ValueError(f"w1: got {_shape(w1)} for tokens {_shape(x)}, expected the last axis to be d = {x.shape[1]}")
    if w2.shape[0] != experts or wide != w2.shape[2] * (1 + glu):
        expected = "[e, 2h, d] and [e, o, h] (glu)" if glu else "[e, h, d] and [e, o, h]"
        raise ValueError(f"w1, w2: got {_shape(w1)} and {_shape(w2)}, expected {expected}")
    if b1 is not None and b1.shape != w1.shape[:2]:
        raise ValueError(f"b1: got {_shape(b1)}, expected {_shape(w1)[:2]}")
    if b2 is not None and b2.shape != w2.shape[:2]:
        raise ValueError(f"b2: got {_shape(b2)}, expected [e, o] = {_shape(w2)[:2]}")
    if gates.shape[0] != x.shape[0] or gates.shape[1] < 1 or not gates.is_floating_point():
        raise ValueError(f"gates: got {_shape(gates)} of {gates.dtype}, expected floats [m, k] with m = {x.shape[0]}")
    if plan.order.shape[0] != gates.shape[0] * gates.shape[1] or plan.offsets.shape[0] != experts + 1:
        raise ValueError(
            f"plan: made for {plan.order.shape[0]} slots and {plan.offsets.shape[0] - 1} experts, but gates are "
            f"{_shape(gates)} and w1 holds {experts} experts"
        )
    _check_kind(x, w1=w1, b1=b1, w2=w2, b2=b2)
    if gates.device != x.device or plan.order.device != x.device:
        raise ValueError(f"gates, plan: got {gates.device} and {plan.order.device}, but x is on {x.device}")


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Casts as autocast would. register_autocast would cast the gates too, which stay float32."""
    device = next(t for t in tensors if t is not None).device.type
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _traced(x: Tensor) -> bool:
    """Whether someone watches the dispatcher (compile, export, a dispatch mode, functorch) and must see the op."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _plain(body: Callable, device: torch.device, *args):
    """Runs a body with the dtypes it was given, also inside an autocast region."""
    if not torch.is_autocast_enabled(device.type):
        return body(*args)
    with torch.autocast(device.type, enabled=False):
        return body(*args)


def _ids(plan: Plan) -> Tensor:
    """Expert id of every slot, int64 [r]; -1 where unused."""
    ids = torch.searchsorted(plan.offsets, plan.inverse, right=True) - 1
    return ids.masked_fill(ids == plan.offsets.shape[0] - 1, -1)


def _refuse(ctx, *grads):
    raise RuntimeError(
        "moe_mtl expert ops are differentiable once: this backward was differentiated again (create_graph=True). "
        'Use backend="reference" where a second derivative is needed.'
    )


# --- plan -------------------------------------------------------------------------------------------------------------


def _plan(idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = idx.reshape(-1)
    if flat.device.type == "cpu" and flat.shape[0]:
        low, high = (int(v) for v in torch.aminmax(flat))
        if low < -1 or high >= num_experts:
            raise ValueError(f"idx: got ids {low}..{high}, expected 0..{num_experts - 1}, or -1 for an unused slot")
        padded = low < 0
    else:
        padded = True
    if padded:
        flat = torch.where(flat < 0, num_experts, flat)
    ids, order = flat.sort(stable=True)
    edges = torch.arange(num_experts + 1, dtype=ids.dtype, device=ids.device)
    offsets = torch.searchsorted(ids, edges, out_int32=True)
    inverse = torch.empty_like(order, dtype=torch.int32)
    inverse.scatter_(0, order, torch.arange(order.shape[0], dtype=torch.int32, device=order.device))
    return order.int(), inverse, offsets


@torch.library.custom_op("moe_mtl::plan_routing", mutates_args=())
def _plan_op(idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return _plan(idx, num_experts)


@_plan_op.register_fake
def _(idx, num_experts):
    rows = idx.shape[0] * idx.shape[1]
    table = idx.new_empty(rows, dtype=torch.int32)
    return table, torch.empty_like(table), idx.new_empty(num_experts + 1, dtype=torch.int32)


# --- moe_mlp ----------------------------------------------------------------------------------------------------------


def _moe_mlp(x, w1, b1, w2, b2, gates, order, inverse, offsets, activation, glu, save, backend):
    run = _BACKENDS[backend].moe_mlp
    return _plain(run, x.device, x, w1, b1, w2, b2, gates, order, inverse, offsets, activation, glu, save)


def _moe_mlp_backward(dy, x, z, w1, w2, b2, gates, order, inverse, offsets, activation, glu, backend, need):
    run = _BACKENDS[backend].moe_mlp_backward
    return _plain(run, dy.device, dy, x, z, w1, w2, b2, gates, order, inverse, offsets, activation, glu, need)


@torch.library.custom_op("moe_mtl::moe_mlp", mutates_args=())
def _moe_mlp_op(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gates: Tensor,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    activation: str,
    glu: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _moe_mlp(x, w1, b1, w2, b2, gates, order, inverse, offsets, activation, glu, save, backend)


@_moe_mlp_op.register_fake
def _(x, w1, b1, w2, b2, gates, order, inverse, offsets, activation, glu, save, backend):
    return x.new_empty(x.shape[0], w2.shape[1]), x.new_empty(order.shape[0] if save else 0, w1.shape[1])


@torch.library.custom_op("moe_mtl::moe_mlp_backward", mutates_args=())
def _moe_mlp_backward_op(
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
    activation: str,
    glu: bool,
    backend: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = _moe_mlp_backward(dy, x, z, w1, w2, b2, gates, order, inverse, offsets, activation, glu, backend, need)
    return tuple(dy.new_empty(0) if g is None else g for g in grads)


@_moe_mlp_backward_op.register_fake
def _(dy, x, z, w1, w2, b2, gates, order, inverse, offsets, activation, glu, backend, need):
    shapes = ((dy.shape[0], w1.shape[2]), w1.shape, w1.shape[:2], w2.shape, w2.shape[:2])
    grads = [dy.new_empty(s if n else 0) for s, n in zip(shapes, need[:5], strict=True)]
    return *grads, gates.new_empty(gates.shape) if need[5] else dy.new_empty(0)


def _moe_mlp_setup(ctx, inputs, output) -> None:
    x, w1, _, w2, b2, gates, order, inverse, offsets, ctx.activation, ctx.glu, _, ctx.backend = inputs
    ctx.need = list(ctx.needs_input_grad[:6])
    z = output[1]
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    # only dw1 reads x, so frozen experts do not keep it alive
    ctx.save_for_backward(x if ctx.need[1] else None, z, w1, w2, b2, gates, order, inverse, offsets)


def _moe_mlp_grads(ctx, dy, _dz=None):
    if dy is None:
        return (None,) * 13
    run = _moe_mlp_backward_op if torch.is_grad_enabled() or _traced(dy) else _moe_mlp_backward
    grads = run(dy, *ctx.saved_tensors, ctx.activation, ctx.glu, ctx.backend, ctx.need)
    return *(g if n else None for g, n in zip(grads, ctx.need, strict=True)), *(None,) * 7


_moe_mlp_op.register_autograd(_moe_mlp_grads, setup_context=_moe_mlp_setup)
_moe_mlp_backward_op.register_autograd(_refuse)


class _MoEMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        y, z = _moe_mlp(*inputs)
        _moe_mlp_setup(ctx, inputs, (y, z))
        return y

    backward = staticmethod(_moe_mlp_grads)


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


# --- grouped_linear ---------------------------------------------------------------------------------------------------


def _grouped_linear(x, w, b, order, inverse, offsets, backend):
    return _plain(_BACKENDS[backend].grouped_linear, x.device, x, w, b, order, inverse, offsets)


def _grouped_linear_backward(dy, x, w, order, inverse, offsets, backend, need):
    return _plain(_BACKENDS[backend].grouped_linear_backward, dy.device, dy, x, w, order, inverse, offsets, need)


@torch.library.custom_op("moe_mtl::grouped_linear", mutates_args=())
def _grouped_linear_op(
    x: Tensor, w: Tensor, b: Tensor | None, order: Tensor, inverse: Tensor, offsets: Tensor, backend: str
) -> Tensor:
    return _grouped_linear(x, w, b, order, inverse, offsets, backend)


@_grouped_linear_op.register_fake
def _(x, w, b, order, inverse, offsets, backend):
    return x.new_empty(x.shape[0], w.shape[1])


@torch.library.custom_op("moe_mtl::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward_op(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    backend: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _grouped_linear_backward(dy, x, w, order, inverse, offsets, backend, need)
    return tuple(dy.new_empty(0) if g is None else g for g in grads)


@_grouped_linear_backward_op.register_fake
def _(dy, x, w, order, inverse, offsets, backend, need):
    shapes = ((dy.shape[0], w.shape[2]), w.shape, w.shape[:2])
    return tuple(dy.new_empty(s if n else 0) for s, n in zip(shapes, need, strict=True))


def _grouped_linear_setup(ctx, inputs, output) -> None:
    x, w, _, order, inverse, offsets, ctx.backend = inputs
    ctx.need = list(ctx.needs_input_grad[:3])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if ctx.need[1] else None, w, order, inverse, offsets)


def _grouped_linear_grads(ctx, dy):
    if dy is None:
        return (None,) * 7
    run = _grouped_linear_backward_op if torch.is_grad_enabled() or _traced(dy) else _grouped_linear_backward
    grads = run(dy, *ctx.saved_tensors, ctx.backend, ctx.need)
    return *(g if n else None for g, n in zip(grads, ctx.need, strict=True)), None, None, None, None


_grouped_linear_op.register_autograd(_grouped_linear_grads, setup_context=_grouped_linear_setup)
_grouped_linear_backward_op.register_autograd(_refuse)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        y = _grouped_linear(*inputs)
        _grouped_linear_setup(ctx, inputs, y)
        return y

    backward = staticmethod(_grouped_linear_grads)


@register_flop_formula(torch.ops.moe_mtl.grouped_linear)
def _(x, w, *args, out_shape=None, **kwargs) -> int:
    """2 m d o; rows with id -1 are counted."""
    return 2 * x[0] * w[1] * w[2]


@register_flop_formula(torch.ops.moe_mtl.grouped_linear_backward)
def _(dy, x, w, *args, out_shape=None, **kwargs) -> int:
    """2 m d o for dx and for dw."""
    return 2 * dy[0] * w[1] * w[2] * sum(args[-1][:2])
