"""Expert kernels over torch's own grouped product, for devices where Triton is not installed.

Called below autograd by `moe_mtl.kernels.ops`, which owns shapes, dtypes and the meaning of the arguments. Rows are
copied into expert order; bias, activation and gates are passes of their own. Nothing is read back from the device. The
product wants rows of whole 16 bytes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_mtl.kernels.cpu import activate, activate_backward
from moe_mtl.kernels.plan import Plan


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
    m, k = gates.shape
    if m == 0:
        return x.new_empty(0, w2.shape[1]), x.new_empty(0, w1.shape[1])
    rows = _Rows(plan)
    z = rows.linear(x.index_select(0, plan.order // k), w1, b1)
    h = activate(z, z.new_empty(z.shape[0], w2.shape[2]), activation, glu)
    ys = rows.used(rows.linear(h, w2, b2)).index_select(0, plan.inverse).view(m, k, -1)
    p = rows.used(gates.reshape(-1, 1).index_select(0, plan.order)).index_select(0, plan.inverse).view(m, k, 1)
    return (ys * p).sum(1).to(x.dtype), z if save else x.new_empty(0, w1.shape[1])


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
    need_x, need_w1, need_b1, need_w2, need_b2, need_gates = need
    need_z = need_x or need_w1 or need_b1
    m, k = gates.shape
    if m == 0:
        shapes = ((0, w1.shape[2]), w1.shape, w1.shape[:2], w2.shape, w2.shape[:2], gates.shape)
        return tuple(dy.new_zeros(shape) if wanted else None for shape, wanted in zip(shapes, need, strict=True))
    rows, tokens = _Rows(plan), plan.order // k
    g, z = dy.index_select(0, tokens), rows.used(z)
    p = gates.reshape(-1, 1).index_select(0, plan.order)
    dx = dw1 = db1 = dw2 = db2 = dgates = None
    if need_z or need_gates:
        da = rows.used(rows.linear(g, w2.mT, None))
    if need_w2 or need_gates:
        h = activate(z, z.new_empty(z.shape[0], w2.shape[2]), activation, glu)
    if need_gates:
        dp = (da * h).sum(1, dtype=gates.dtype)
        if b2 is not None:
            dp = dp + (g * b2.index_select(0, rows.ids)).sum(1, dtype=gates.dtype)
        dgates = rows.used(dp[:, None]).index_select(0, plan.inverse).view(m, k)
    if need_w2 or need_b2:
        pg = rows.used((g * p).to(dy.dtype))
        dw2 = rows.outer(pg, h) if need_w2 else None
        db2 = rows.sums(pg) if need_b2 else None
    if need_z:
        dz = activate_backward((da * p).to(dy.dtype), z, torch.empty_like(z), activation, glu)
        dz = rows.used(dz)
        dw1 = rows.outer(dz, x.index_select(0, tokens)) if need_w1 else None
        db1 = rows.sums(dz) if need_b1 else None
    if need_x:
        dxs = rows.used(rows.linear(dz, w1.mT, None))
        dx = dxs.index_select(0, plan.inverse).view(m, k, -1).sum(1)
    return dx, dw1, db1, dw2, db2, dgates


def grouped_linear(x: Tensor, w: Tensor, b: Tensor | None, plan: Plan) -> Tensor:
    """Forward of `ops.grouped_linear`: y [m, o]."""
    if x.shape[0] == 0:
        return x.new_empty(0, w.shape[1])
    rows = _Rows(plan)
    return rows.used(rows.linear(x.index_select(0, plan.order), w, b)).index_select(0, plan.inverse)


def grouped_linear_backward(
    dy: Tensor, x: Tensor | None, w: Tensor, plan: Plan, need: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w and b, in that order; None where `need` is False."""
    if dy.shape[0] == 0:
        shapes = ((0, w.shape[2]), w.shape, w.shape[:2])
        return tuple(dy.new_zeros(shape) if wanted else None for shape, wanted in zip(shapes, need, strict=True))
    rows = _Rows(plan)
    g = rows.used(dy.index_select(0, plan.order))
    dx = rows.used(rows.linear(g, w.mT, None)).index_select(0, plan.inverse) if need[0] else None
    dw = rows.outer(g, x.index_select(0, plan.order)) if need[1] else None
    return dx, dw, rows.sums(g) if need[2] else None


class _Rows:
    """Sorted rows of a plan: products per expert, and what is known of each row."""

    def __init__(self, plan: Plan):
        self.offsets, experts = plan.offsets, plan.offsets.shape[0] - 1
        self.ends = plan.offsets[1:]
        at = torch.arange(plan.order.shape[0], dtype=torch.int32, device=plan.order.device)
        self.ids = torch.searchsorted(self.ends, at, right=True).clamp_(max=experts - 1)
        self.unused = (at >= plan.offsets[-1])[:, None]

    def used(self, t: Tensor) -> Tensor:
        """The rows, zero where no expert is used, whatever stands there."""
        return t.masked_fill(self.unused, 0)

    def linear(self, t: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """w[e] t + b[e] of each row. torch's product takes weights whose rows begin at whole 16 bytes."""
        if any(stride * w.element_size() % 16 for stride in w.stride() if stride != 1):
            w = w.contiguous()
        y = F.grouped_mm(t, w.mT, offs=self.ends)
        return y if b is None else y.add_(b.index_select(0, self.ids))

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """sum of left^T right over the rows of each expert [e, o, i]."""
        return F.grouped_mm(left.t(), right, offs=self.ends)

    def sums(self, t: Tensor) -> Tensor:
        """Sum of the rows of each expert [e, o]."""
        total = torch.segment_reduce(t.float(), "sum", offsets=self.offsets.long(), axis=0, unsafe=True)
        return total.to(t.dtype)
