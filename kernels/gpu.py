"""Expert kernels in Triton and Gluon: what `moe_mtl.kernels.ops` runs on a GPU.

Called below autograd by `moe_mtl.kernels.ops`, which owns shapes, dtypes and the meaning of the arguments. Rows are
sorted by expert and never padded: kernels gather them, or read a sorted copy where that is faster. Products add up in
float32. Rows of unused slots lie after all others; nobody writes them or uses what stands there.
"""

from typing import Any

import torch
from torch import Tensor

from moe_mtl.kernels import configs
from moe_mtl.kernels.plan import Plan, tiles_of
from moe_mtl.kernels.triton_combine import combine
from moe_mtl.kernels.triton_down import down
from moe_mtl.kernels.triton_fused import fused, fused_fits
from moe_mtl.kernels.triton_gate_grad import gate_grad
from moe_mtl.kernels.triton_hidden_grad import hidden_grad
from moe_mtl.kernels.triton_launch import describable, loads_blocks, warp_specializes, warp_specializes_sums
from moe_mtl.kernels.triton_replay import replayed
from moe_mtl.kernels.triton_sort_rows import sort_rows
from moe_mtl.kernels.triton_up import up
from moe_mtl.kernels.triton_weight_grad import weight_grad

SORTED_FROM = 768  # numbers made of each row, from which products of sorted rows pay for the sorting
SORTED_ROWS = 2048  # rows from which they do; sorting fewer takes as long as launching a kernel


def sorts_first(x: Tensor, rows: int, made: int) -> bool:
    """Whether rows are brought into expert order before a product instead of gathered by it.

    Args:
        x: tokens [m, d].
        rows: r, of all slots.
        made: numbers the product makes of each.
    """
    blocks = x.element_size() == 2 and x.shape[1] % 8 == 0 and loads_blocks(x.device)
    return blocks and made >= SORTED_FROM and rows >= SORTED_ROWS


class _Launch:
    """What the kernels of one call share: the plan, the precision of products, the choice of tile sizes."""

    def __init__(self, like: Tensor, plan: Plan, glu: bool = False):
        self.arch, self.processors = configs.chip(like.device)
        self.plan, self.glu, self.bits = plan, glu, 8 * like.element_size()
        self.precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"

    def config(self, kernel: str, width: int, warp_specialized: bool = False) -> configs.Config:
        rows = self.plan.order.shape[0] // (self.plan.offsets.shape[0] - 1)
        return configs.pick(kernel, self.arch, self.bits, self.glu, rows, width, warp_specialized)

    def tiles(self, config: configs.Config) -> Tensor:
        return tiles_of(self.plan, config.block_m)

    def up(
        self, x: Tensor, w1: Tensor, b1: Tensor | None, k: int, activation: str, save: bool, gather: bool
    ) -> tuple[Tensor, Tensor]:
        hidden = w1.shape[1] // (1 + self.glu)
        config = self.config("up", hidden, not (gather or self.glu) and warp_specializes(x, w1, hidden))
        tiles = self.tiles(config)
        if config.warp_specialized:
            from moe_mtl.kernels import gluon_product

            return gluon_product.up(x, w1, b1, self.plan.offsets, tiles, activation, save, config, self.processors)
        how = (activation, self.glu, save, self.precision, config)
        return up(x, w1, b1, self.plan.order, tiles, k, *how, gather=gather)

    def down(
        self,
        a: Tensor,
        w: Tensor,
        b: Tensor | None,
        out: Tensor,
        *,
        transposed: bool = False,
        gather: bool = False,
        scatter: bool = False,
    ) -> Tensor:
        can = not (gather or scatter or self.glu) and warp_specializes(a, w, out.shape[1], transposed)
        config = self.config("down", out.shape[1], can)
        tiles = self.tiles(config)
        if config.warp_specialized:
            from moe_mtl.kernels import gluon_product

            args = (a, w, b, self.plan.offsets, tiles, config, self.processors)
            return gluon_product.down(*args, out=out, transposed=transposed)
        how = {"transposed": transposed, "gather": gather, "scatter": scatter}
        return down(a, w, b, self.plan.order, tiles, self.precision, config, out=out, **how)

    def hidden_grad(
        self, dys: Tensor, w2: Tensor, z: Tensor, gates: Tensor, activation: str, **need: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden = w2.shape[2]
        can = not self.glu and all(need.values()) and describable(z) and warp_specializes(dys, w2, hidden, True)
        config = self.config("hidden_grad", hidden, can)
        tables = (self.plan.offsets, self.tiles(config))
        if config.warp_specialized:
            from moe_mtl.kernels.gluon_hidden_grad import hidden_grad as all_of_it

            return all_of_it(dys, w2, z, gates, self.plan.order, *tables, activation, config, self.processors)
        how = (activation, self.glu, self.precision, config)
        return hidden_grad(dys, w2, z, gates, self.plan.order, tables[1], *how, **need)

    def sort_rows(self, x: Tensor, k: int, **how: Any) -> tuple[Tensor, Tensor | None]:
        return sort_rows(x, self.plan.order, self.plan.offsets, k, **how)

    def weight_grad(
        self, a: Tensor, b: Tensor, k: int, *, gather: bool = False, **how: Any
    ) -> tuple[Tensor, Tensor | None]:
        order, offsets = self.plan.order, self.plan.offsets
        can = not gather and warp_specializes_sums(a, b, offsets.shape[0] - 1)
        config = self.config("weight_grad", b.shape[1], can)
        if config.warp_specialized:
            from moe_mtl.kernels.gluon_weight_grad import weight_grad as of_sorted_rows

            return of_sorted_rows(a, b, offsets, config, self.processors, **how)
        args = (a, b, order, offsets, k, self.precision, config, self.processors)
        return weight_grad(*args, gather=gather, **how)


@replayed
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
    x, w1, b1, w2, b2, gates = _rows(x), _stacked(w1), _whole(b1), _stacked(w2), _whole(b2), gates.contiguous()
    k = gates.shape[1]
    if x.shape[0] == 0:
        return x.new_empty(0, w2.shape[1]), x.new_empty(0, w1.shape[1])
    launch = _Launch(x, plan, glu)
    if not save and fused_fits(w1, w2, glu):
        config = launch.config("fused", w2.shape[1])
        ys = fused(x, w1, b1, w2, b2, plan.order, launch.tiles(config), k, activation, launch.precision, config)
        return combine(ys, gates, plan.inverse, plan.offsets, k), x.new_empty(0, w1.shape[1])
    gather = not sorts_first(x, plan.order.shape[0], w1.shape[1])
    xs = x if gather else launch.sort_rows(x, k)[0]
    h, z = launch.up(xs, w1, b1, k, activation, save, gather)
    ys = launch.down(h, w2, b2, x.new_empty(plan.order.shape[0], w2.shape[1]))
    return combine(ys, gates, plan.inverse, plan.offsets, k), z


@replayed
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
    if dy.shape[0] == 0:
        shapes = ((0, w1.shape[2]), w1.shape, w1.shape[:2], w2.shape, w2.shape[:2])
        zeros = [dy.new_zeros(shape) if wanted else None for shape, wanted in zip(shapes, need[:5], strict=True)]
        return *zeros, torch.zeros_like(gates) if need_gates else None
    dy, w1, w2, b2, gates = _rows(dy), _stacked(w1), _stacked(w2), _whole(b2), gates.contiguous()
    k, launch = gates.shape[1], _Launch(dy, plan, glu)
    need_dz = need_x or need_w1 or need_b1
    dz = ph = dx = dw1 = db1 = dw2 = db2 = dgates = None
    dys, ps = launch.sort_rows(dy, k, gates=gates if need_b2 else None)
    if need_dz or need_w2 or need_gates:
        wanted = {"need_dz": need_dz, "need_ph": need_w2, "need_parts": need_gates}
        dz, ph, parts = launch.hidden_grad(dys, w2, z, gates, activation, **wanted)
    if need_gates:
        dgates = gate_grad(parts, dy, b2, plan.inverse, plan.offsets, k, launch.precision, gates.dtype)
    if need_w2:
        dw2, db2 = launch.weight_grad(dys, ph, k, bias=need_b2, scale=ps)
    elif need_b2:
        _, db2 = launch.weight_grad(dys, dys[:, :1], k, bias=True, scale=ps)
    del dys, ph  # their memory is free for what follows
    if need_w1:
        x = _rows(x)
        gather = not sorts_first(x, plan.order.shape[0], w1.shape[1])
        xs = x if gather else launch.sort_rows(x, k)[0]
        dw1, db1 = launch.weight_grad(dz, xs, k, bias=need_b1, gather=gather)
        del xs
    elif need_b1:
        _, db1 = launch.weight_grad(dz, dz[:, :1], k, bias=True)
    if need_x:
        dxs = launch.down(dz, w1, None, dy.new_empty(plan.order.shape[0], w1.shape[2]), transposed=True)
        dx = combine(dxs, None, plan.inverse, plan.offsets, k)
    return dx, dw1, db1, dw2, db2, dgates


@replayed
def grouped_linear(x: Tensor, w: Tensor, b: Tensor | None, plan: Plan) -> Tensor:
    """Forward of `ops.grouped_linear`: y [m, o]."""
    y = x.new_zeros(x.shape[0], w.shape[1])
    if x.shape[0] == 0:
        return y
    return _Launch(x, plan).down(_rows(x), _stacked(w), _whole(b), y, gather=True, scatter=True)


@replayed
def grouped_linear_backward(
    dy: Tensor, x: Tensor | None, w: Tensor, plan: Plan, need: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w and b, in that order; None where `need` is False."""
    need_x, need_w, need_b = need
    if dy.shape[0] == 0:
        shapes = ((0, w.shape[2]), w.shape, w.shape[:2])
        return tuple(dy.new_zeros(shape) if wanted else None for shape, wanted in zip(shapes, need, strict=True))
    dy, w, launch = _rows(dy), _stacked(w), _Launch(dy, plan)
    dx = dw = db = None
    dys, _ = launch.sort_rows(dy, 1)
    if need_x:
        out = dy.new_zeros(dy.shape[0], w.shape[2])
        dx = launch.down(dys, w, None, out, transposed=True, scatter=True)
    if need_w:
        dw, db = launch.weight_grad(dys, _rows(x), 1, bias=need_b, gather=True)
    elif need_b:
        _, db = launch.weight_grad(dys, dys[:, :1], 1, bias=True)
    return dx, dw, db


def _rows(t: Tensor) -> Tensor:
    """A matrix whose rows are contiguous, at any distance from each other."""
    return t if t.stride(1) == 1 else t.contiguous()


def _stacked(w: Tensor) -> Tensor:
    """Weights each expert of which is contiguous."""
    return w if w.stride(2) == 1 and w.stride(1) == w.shape[2] else w.contiguous()


def _whole(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.contiguous()
