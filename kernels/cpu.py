"""Expert kernels in plain torch: sorted segments, or one padded batched product when experts see few rows each.

Written for the CPU and run there by default; nothing in it is specific to a device. Called below autograd by
`moe_mtl.kernels.ops`, which owns shapes, dtypes and the meaning of the arguments. Axis letters are those of
`moe_mtl.routing`; `c` is the padded number of rows per expert and `z` the pre-activation.

Never here: a tensor of tokens x experts x hidden, a weight selected by index under autograd (its backward writes a
whole bank of zeros per expert), or the expert outputs kept for the router's gradient, which is <dy w2, h> + <dy, b2>.

In the backward the gate p joins late: da = dy w2 goes without it, because the router's gradient is <da, h> and p may be
zero; p da and p dy carry it from there, multiplied in the dtype of p and rounded once. Bias gradients are sums of these
and not products with p: a matrix-vector product adds up in one running value, a sum in many.

Weights may be wider than the tokens, as under autocast: an expert that has rows is cast when its turn comes, into a
buffer that stays in cache, and gradients are written in the weights' own dtype.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from moe_mtl.kernels.plan import Plan

aten = torch.ops.aten

# name -> (value into out, gradient times derivative into grad_input; in place is allowed)
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "gelu": (
        lambda z, out: torch._C._nn.gelu(z, out=out),
        lambda grad, z, out: aten.gelu_backward.grad_input(grad, z, grad_input=out),
    ),
    "silu": (
        lambda z, out: torch._C._nn.silu(z, out=out),
        lambda grad, z, out: aten.silu_backward.grad_input(grad, z, grad_input=out),
    ),
    "relu": (
        lambda z, out: torch.clamp_min(z, 0, out=out),
        lambda grad, z, out: aten.threshold_backward.grad_input(grad, z, 0, grad_input=out),
    ),
}

# Padding pays up to this many rows per expert: it saves one chain of calls, and one waking of all threads, per expert.
PADDED_ROWS = 32
# Products of two-byte numbers are given multiples of that many rows, and never more than an eighth in vain: oneDNN
# compiles a kernel for every number of rows it meets, which takes as long as the product itself.
ROW_STEP = 8


def combine(ys: Tensor, index: Tensor, k: int, weights: Tensor | None) -> Tensor:
    """Sums k rows of ys per token, weighted: [rows, o], index int32 [m k], weights [m k] or None -> [m, o].

    A bag sum reads each row once and accumulates in float32; float64 has no such kernel on the CPU.
    """
    if k == 1:
        own = ys.index_select(0, index)
        return own if weights is None else own.mul_(weights[:, None])
    if ys.dtype != torch.float64:
        bags = torch.arange(0, index.shape[0], k, dtype=index.dtype, device=index.device)
        return torch.embedding_bag(ys, index, bags, False, 0, False, weights)[0]
    rows = ys.index_select(0, index).view(-1, k, ys.shape[1])
    return rows.sum(1) if weights is None else torch.bmm(weights.view(-1, 1, k), rows).view(-1, ys.shape[1])


def use_padded(bounds: list[int]) -> bool:
    """Whether the padded batched product is the faster path for these segment bounds [e + 1]."""
    used, experts = bounds[-1], len(bounds) - 1
    return used > 0 and _most(bounds) * experts <= used + PADDED_ROWS * experts


def _most(bounds: list[int]) -> int:
    """Rows of the busiest expert."""
    return max(stop - start for start, stop in pairwise(bounds))


def moe_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gates: Tensor,
    plan: Plan,
    activation: str,
    glu: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Forward of `ops.moe_mlp`: y [m, o] and the sorted pre-activations z [r, (1|2)h], empty unless `save`."""
    bounds = plan.offsets.tolist()
    run = _forward_padded if use_padded(bounds) else _forward_segments
    return run(x, w1, b1, w2, b2, gates, plan, bounds, activation, glu, save)


def moe_mlp_backward(
    dy: Tensor,
    x: Tensor | None,
    z: Tensor,
    w1: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    gates: Tensor,
    plan: Plan,
    activation: str,
    glu: bool,
    need: list[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w1, b1, w2, b2 and gates, in that order; None where `need` is False."""
    bounds = plan.offsets.tolist()
    run = _backward_padded if use_padded(bounds) else _backward_segments
    return run(dy, x, z, w1, w2, b2, gates, plan, bounds, activation, glu, need)


def activate(z: Tensor, out: Tensor, activation: str, glu: bool) -> Tensor:
    """act(z), or act(first half) * second half, into out."""
    value = ACTIVATIONS[activation][0]
    if not glu:
        return value(z, out)
    gate, up = z.chunk(2, dim=-1)
    return value(gate, out).mul_(up)


def activate_backward(da: Tensor, z: Tensor, out: Tensor, activation: str, glu: bool) -> Tensor:
    """The gradient of `activate` for the incoming da, into out, which may be da itself when there is no gate half."""
    value, derivative = ACTIVATIONS[activation]
    if not glu:
        return derivative(da, z, out)
    gate, up = z.chunk(2, dim=-1)
    dgate, dup = out.chunk(2, dim=-1)
    value(gate, dup).mul_(da)
    derivative(torch.mul(da, up, out=dgate), gate, dgate)
    return out


def linear(x: Tensor, w: Tensor, b: Tensor | None, out: Tensor) -> Tensor:
    """x w^T + b of [rows, in], [o, in] and [o], into out."""
    return torch.mm(x, w.t(), out=out) if b is None else torch.addmm(b, x, w.t(), out=out)


def linear_padded(x: Tensor, w: Tensor, b: Tensor | None, out: Tensor) -> Tensor:
    """x w^T + b of [e, rows, in], [e, o, in] and [e, o], into out."""
    return torch.bmm(x, w.mT, out=out) if b is None else torch.baddbmm(b[:, None], x, w.mT, out=out)


def unbind(bias: Tensor | None, experts: int) -> tuple[Tensor | None, ...]:
    """The bias of every expert, as many None where there is none."""
    return (None,) * experts if bias is None else bias.unbind()


def _slot_gates(gates: Tensor, inverse: Tensor, used: int) -> Tensor:
    """Gates by slot, flat; zero where the slot is unused, whatever stands there."""
    flat = gates.reshape(-1)
    return flat if used == flat.shape[0] else flat.masked_fill(inverse >= used, 0)


def rounded(rows: int, dtype: torch.dtype) -> int:
    """Rows of the product that is made for so many; see `ROW_STEP`."""
    if dtype.itemsize != 2:
        return rows
    step = max(ROW_STEP, 1 << max(0, rows.bit_length() - 4))
    return -(-rows // step) * step


def _scratch(w1: Tensor, w2: Tensor, like: Tensor) -> Tensor | None:
    """Room for one layer of one expert in the dtype of the tokens, where weights have another."""
    return None if w1.dtype == like.dtype else like.new_empty(max(w1[0].numel(), w2[0].numel()))


def _cast(w: Tensor, scratch: Tensor | None) -> Tensor:
    """A layer of an expert in the dtype of the tokens; the scratch then holds it."""
    return w if scratch is None else scratch[: w.numel()].view(w.shape).copy_(w)


def _weight_gradient(dz: Tensor, x: Tensor, out: Tensor, scratch: Tensor | None) -> None:
    """dz^T x of [rows, o] and [rows, in], into out [o, in] in the dtype of the weights."""
    if scratch is None:
        torch.mm(dz.t(), x, out=out)
    else:
        out.copy_(torch.mm(dz.t(), x, out=scratch[: out.numel()].view(out.shape)))


def _forward_segments(x, w1, b1, w2, b2, gates, plan, bounds, activation, glu, save):
    (m, k), experts, hidden, used = gates.shape, w1.shape[0], w2.shape[2], bounds[-1]
    tokens = plan.order // k
    most = rounded(_most(bounds), x.dtype)
    # A product's surplus rows lie where the next expert's are written after them.
    length = max(m * k, max(start + rounded(stop - start, x.dtype) for start, stop in pairwise(bounds)))
    z = x.new_empty(length if save else 0, w1.shape[1])
    ys = x.new_empty(length, w2.shape[1])
    # Buffers one expert long stay in cache and are not paged in anew for every expert.
    xs_buffer, h_buffer = x.new_empty(most, x.shape[1]), x.new_empty(most, hidden)
    z_buffer = None if save else x.new_empty(most, w1.shape[1])
    scratch = _scratch(w1, w2, x)
    b1, b2 = (None if b is None else b.to(x.dtype) for b in (b1, b2))
    weights = zip(w1.unbind(), unbind(b1, experts), w2.unbind(), unbind(b2, experts), strict=True)
    for start, stop, (w1_e, b1_e, w2_e, b2_e) in zip(bounds, bounds[1:], weights, strict=False):
        if (rows := stop - start) == 0:
            continue
        all_rows = rounded(rows, x.dtype)
        torch.index_select(x, 0, tokens[start:stop], out=xs_buffer[:rows])
        place = z[start : start + all_rows] if save else z_buffer[:all_rows]
        z_e = linear(xs_buffer[:all_rows], _cast(w1_e, scratch), b1_e, place)
        h = activate(z_e, h_buffer[:all_rows], activation, glu)
        linear(h, _cast(w2_e, scratch), b2_e, ys[start : start + all_rows])
    if used < m * k:
        ys[used:].zero_()
        z[used:].zero_()
    y = combine(ys, plan.inverse, k, _slot_gates(gates, plan.inverse, used).to(x.dtype))
    return y, z[: m * k] if save else z


def _backward_segments(dy, x, z, w1, w2, b2, gates, plan, bounds, activation, glu, need):
    need_x, need_w1, need_b1, need_w2, need_b2, need_gates = need
    need_z = need_x or need_w1 or need_b1
    (m, k), (experts, wide, dim), (_, out_dim, hidden) = gates.shape, w1.shape, w2.shape
    used, most = bounds[-1], rounded(_most(bounds), dy.dtype)
    length = max(m * k, max(start + rounded(stop - start, dy.dtype) for start, stop in pairwise(bounds)))
    tokens = plan.order // k
    p = _slot_gates(gates, plan.inverse, used).index_select(0, plan.order)[:, None]
    dw1 = torch.empty_like(w1) if need_w1 else None
    db1 = w1.new_empty(experts, wide) if need_b1 else None
    dw2 = torch.empty_like(w2) if need_w2 else None
    db2 = w2.new_empty(experts, out_dim) if need_b2 else None
    dp = gates.new_empty(m * k) if need_gates else None
    dxs = dy.new_empty(length, dim) if need_x else None
    g_buffer, x_buffer = dy.new_empty(most, out_dim), dy.new_empty(most, dim) if need_w1 else None
    da_buffer, h_buffer = dy.new_empty(most, hidden), dy.new_empty(most, hidden)
    dz_buffer = dy.new_empty(most, wide) if glu and need_z else da_buffer
    product = dy.new_empty(most, hidden) if need_gates else None
    z_buffer = dy.new_empty(most, wide) if dy.dtype.itemsize == 2 else None
    scratch = _scratch(w1, w2, dy)
    w1, w2 = w1.unbind(), w2.unbind()
    b2 = unbind(None if b2 is None else b2.to(dy.dtype), experts)
    for e, (start, stop) in enumerate(pairwise(bounds)):
        if (rows := stop - start) == 0:
            for grad in (dw1, db1, dw2, db2):
                if grad is not None:
                    grad[e].zero_()
            continue
        p_e, z_e, all_rows = p[start:stop], z[start:stop], rounded(rows, dy.dtype)
        if all_rows > rows:  # surplus rows are zero in every sum over rows
            z_e = z_buffer[:all_rows]
            z_e[:rows].copy_(z[start:stop])
            for buffer in (g_buffer, x_buffer, z_buffer):
                if buffer is not None:
                    buffer[rows:all_rows].zero_()
        g, h, da, dz = (buffer[:all_rows] for buffer in (g_buffer, h_buffer, da_buffer, dz_buffer))
        g_e, da_e = g[:rows], da[:rows]
        torch.index_select(dy, 0, tokens[start:stop], out=g_e)
        if need_z or need_gates:
            torch.mm(g, _cast(w2[e], scratch), out=da)
        if need_w2 or need_gates:
            activate(z_e, h, activation, glu)
        if need_gates:
            dp_e = torch.sum(torch.mul(da_e, h[:rows], out=product[:rows]), 1, dtype=dp.dtype, out=dp[start:stop])
            if b2[e] is not None:
                dp_e += torch.mv(g_e, b2[e])
        if need_b2 or need_w2:
            g_e.mul_(p_e)
        if need_b2:
            db2[e].copy_(g_e.sum(0))
        if need_w2:
            _weight_gradient(g, h, dw2[e], scratch)
        if need_z:
            da_e.mul_(p_e)
            activate_backward(da, z_e, dz, activation, glu)
        if need_b1:
            db1[e].copy_(dz[:rows].sum(0))
        if need_w1:
            torch.index_select(x, 0, tokens[start:stop], out=x_buffer[:rows])
            _weight_gradient(dz, x_buffer[:all_rows], dw1[e], scratch)
        if need_x:
            torch.mm(dz, _cast(w1[e], scratch), out=dxs[start : start + all_rows])
    if used < m * k:
        for tail in (dxs, dp):
            if tail is not None:
                tail[used:].zero_()
    dx = combine(dxs, plan.inverse, k, None) if need_x else None
    dgates = dp.index_select(0, plan.inverse).view(m, k) if need_gates else None
    return dx, dw1, db1, dw2, db2, dgates


def _pad(plan: Plan, bounds: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index maps between sorted rows and the padded block of e x c rows, for products in that dtype.

    Returns:
        Which places hold a row [e, c]; the sorted row in every place [e c], where places past an expert's rows repeat
        its last one, so that a NaN reaches no other expert; the place of every used sorted row [used]; the place of
        every slot [m k], unused slots at e c, one past the block.
    """
    used, slots = bounds[-1], plan.inverse.shape[0]
    starts, last = plan.offsets[:-1, None], (plan.offsets[1:, None] - 1).clamp_min_(0)
    rows = starts + torch.arange(rounded(_most(bounds), dtype), dtype=torch.int32, device=plan.offsets.device)
    filled = rows < plan.offsets[1:, None]
    place = filled.view(-1).nonzero().view(-1)  # places and sorted rows are both ordered by expert
    by_row = place if used == slots else torch.cat([place, place.new_full((slots - used,), filled.numel())])
    return filled, torch.minimum(rows, last).view(-1), place, by_row.index_select(0, plan.inverse)


def _forward_padded(x, w1, b1, w2, b2, gates, plan, bounds, activation, glu, save):
    k, experts, used = gates.shape[1], w1.shape[0], bounds[-1]
    filled, rows, place, slots = _pad(plan, bounds, x.dtype)
    c = filled.shape[1]
    w1, b1, w2, b2 = (None if w is None else w.to(x.dtype) for w in (w1, b1, w2, b2))
    xs = x.index_select(0, plan.order.index_select(0, rows) // k).view(experts, c, -1)
    z = linear_padded(xs, w1, b1, x.new_empty(experts, c, w1.shape[1]))
    h = activate(z, x.new_empty(experts, c, w2.shape[2]), activation, glu)
    spare = used < plan.inverse.shape[0]
    ys = x.new_empty(experts * c + spare, w2.shape[1])
    linear_padded(h, w2, b2, ys[: experts * c].view(experts, c, -1))
    if spare:
        ys[-1].zero_()
    y = combine(ys, slots, k, _slot_gates(gates, plan.inverse, used).to(x.dtype))
    if not save:
        return y, x.new_empty(0, w1.shape[1])
    z = z.view(experts * c, -1)
    if not spare:
        return y, z.index_select(0, place)
    saved = z.new_zeros(plan.inverse.shape[0], z.shape[1])
    torch.index_select(z, 0, place, out=saved[:used])
    return y, saved


def _backward_padded(dy, x, z, w1, w2, b2, gates, plan, bounds, activation, glu, need):
    need_x, need_w1, need_b1, need_w2, need_b2, need_gates = need
    need_z = need_x or need_w1 or need_b1
    (m, k), (experts, wide, _), hidden, used = gates.shape, w1.shape, w2.shape[2], bounds[-1]
    filled, rows, _, slots = _pad(plan, bounds, dy.dtype)
    c, dtype = filled.shape[1], w1.dtype
    w1, w2, b2 = (None if w is None else w.to(dy.dtype) for w in (w1, w2, b2))
    slot = plan.order.index_select(0, rows)
    tokens = slot // k
    p = _slot_gates(gates, plan.inverse, used).index_select(0, slot).view(experts, c)
    p = p.masked_fill_(~filled, 0)[..., None]
    dx = dw1 = db1 = dw2 = db2 = dgates = h = None

    g = dy.index_select(0, tokens).view(experts, c, -1)
    z = z.index_select(0, rows).view(experts, c, wide)
    if need_w2 or need_gates:
        h = activate(z, torch.empty(experts, c, hidden, dtype=z.dtype, device=z.device), activation, glu)
    if need_z or need_gates:
        da = torch.bmm(g, w2)
    if need_gates:
        dp = torch.sum(da * h, 2, dtype=gates.dtype)
        if b2 is not None:
            dp += torch.bmm(g, b2[..., None])[..., 0]
        dp = dp.view(-1)
        if used < m * k:
            dp = torch.cat([dp, dp.new_zeros(1)])
        dgates = dp.index_select(0, slots).view(m, k)
    if need_b2 or need_w2:
        g.mul_(p)
    if need_b2:
        db2 = g.sum(1).to(dtype)
    if need_w2:
        dw2 = torch.bmm(g.mT, h).to(dtype)
    if need_z:
        dz = activate_backward(da.mul_(p), z, torch.empty_like(z) if glu else da, activation, glu)
    if need_b1:
        db1 = dz.sum(1).to(dtype)
    if need_w1:
        dw1 = torch.bmm(dz.mT, x.index_select(0, tokens).view(experts, c, -1)).to(dtype)
    if need_x:
        spare = used < m * k
        dxs = dy.new_empty(experts * c + spare, w1.shape[2])
        torch.bmm(dz, w1, out=dxs[: experts * c].view(experts, c, -1))
        if spare:
            dxs[-1].zero_()
        dx = combine(dxs, slots, k, None)
    for e in (e for e in range(experts) if bounds[e] == bounds[e + 1]):
        for grad in (dw1, db1, dw2, db2):
            if grad is not None:
                grad[e].zero_()
    return dx, dw1, db1, dw2, db2, dgates


def grouped_linear(x: Tensor, w: Tensor, b: Tensor | None, plan: Plan) -> Tensor:
    """Forward of `ops.grouped_linear`: y [m, o]."""
    bounds, groups = plan.offsets.tolist(), w.shape[0]
    xs = x.index_select(0, plan.order)
    ys = x.new_empty(x.shape[0], w.shape[1])
    for start, stop, w_e, b_e in zip(bounds, bounds[1:], w.unbind(), unbind(b, groups), strict=False):
        if stop > start:
            linear(xs[start:stop], w_e, b_e, ys[start:stop])
    ys[bounds[-1] :].zero_()
    return ys.index_select(0, plan.inverse)


def grouped_linear_backward(
    dy: Tensor, x: Tensor | None, w: Tensor, plan: Plan, need: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w and b, in that order; None where `need` is False."""
    need_x, need_w, need_b = need
    bounds = plan.offsets.tolist()
    g = dy.index_select(0, plan.order)
    xs = x.index_select(0, plan.order) if need_w else None
    dxs = dy.new_empty(dy.shape[0], w.shape[2]) if need_x else None
    dw = torch.empty_like(w) if need_w else None
    db = w.new_empty(w.shape[:2]) if need_b else None
    for e, (start, stop, w_e) in enumerate(zip(bounds, bounds[1:], w.unbind(), strict=False)):
        if need_x:
            torch.mm(g[start:stop], w_e, out=dxs[start:stop])
        if need_w:  # a product over zero rows is an exact zero
            torch.mm(g[start:stop].t(), xs[start:stop], out=dw[e])
        if need_b:
            torch.sum(g[start:stop], 0, out=db[e])
    if need_x:
        dxs[bounds[-1] :].zero_()
    return dxs.index_select(0, plan.inverse) if need_x else None, dw, db
