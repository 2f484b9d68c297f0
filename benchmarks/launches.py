"""The launches of a layer that take their tile sizes from the table, to be compiled or timed one by one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from checks import DTYPES
from shapes import Shape
from torch import Tensor

from moe_mtl.kernels import plan
from moe_mtl.kernels.configs import Config


@dataclass(frozen=True)
class Problem:
    """One launch of a layer: a kernel in the role it plays there.

    Attributes:
        kernel: one of `moe_mtl.kernels.configs.KERNELS`.
        role: what for.
        width: of the result, as the table's entries count it.
        run: launches it with a config and returns its results.
        warp_specialized: it can run such kernels.
    """

    kernel: str
    role: str
    width: int
    run: Callable[[Config], tuple[Tensor, ...]]
    warp_specialized: bool = False


def problems(shape: Shape, kind: str, device: torch.device, processors: int) -> list[Problem]:
    """Every launch of an inference, a forward and a backward that takes its sizes from the table.

    On the device "meta" they hold no memory, and are good for compiling.
    """
    from moe_mtl.kernels.gpu import sorts_first
    from moe_mtl.kernels.triton_down import down
    from moe_mtl.kernels.triton_fused import fused, fused_fits
    from moe_mtl.kernels.triton_hidden_grad import hidden_grad
    from moe_mtl.kernels.triton_launch import warp_specializes, warp_specializes_sums
    from moe_mtl.kernels.triton_up import up
    from moe_mtl.kernels.triton_weight_grad import weight_grad

    def values(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=DTYPES[kind])

    e, d, h, k, wide, rows = shape.experts, shape.dim, shape.hidden, shape.k, shape.wide, shape.rows
    sizes = ((shape.tokens, d), (rows, d), (rows, wide), (rows, wide), (rows, h))
    x, dys, z, dz, hidden = (values(*size) for size in sizes)
    gather = not sorts_first(x, rows, wide)
    xs = x if gather else values(rows, d)
    w1, w2 = values(e, wide, d) / d**0.5, values(e, d, h) / h**0.5
    b1, b2 = (None, None) if shape.glu else (values(e, wide), values(e, d))
    gates, sort = torch.rand(shape.tokens, k, device=device), tables_of(shape, device)
    act, glu, exact = shape.activation, shape.glu, "tf32" if kind == "tf32" else "ieee"

    def tables(c: Config) -> tuple[Tensor, Tensor]:
        return sort.order, plan.tiles_of(sort, c.block_m)

    def run_up(save: bool, c: Config) -> tuple[Tensor, ...]:
        if c.warp_specialized:
            from moe_mtl.kernels import gluon_product

            return gluon_product.up(xs, w1, b1, *bounds(c), act, save, c, processors)
        return up(xs, w1, b1, *tables(c), k, act, glu, save, exact, c, gather=gather)

    def bounds(c: Config) -> tuple[Tensor, Tensor]:
        return sort.offsets, plan.tiles_of(sort, c.block_m)

    def run_down(transposed: bool, c: Config) -> tuple[Tensor, ...]:
        out, product = x.new_empty(rows, d), (dz, w1, None) if transposed else (hidden, w2, b2)
        if c.warp_specialized:
            from moe_mtl.kernels import gluon_product

            return (gluon_product.down(*product, *bounds(c), c, processors, out=out, transposed=transposed),)
        return (down(*product, *tables(c), exact, c, out=out, transposed=transposed),)

    def run_hidden_grad(c: Config) -> tuple[Tensor, ...]:
        if c.warp_specialized:
            from moe_mtl.kernels import gluon_hidden_grad

            args = (dys, w2, z, gates, sort.order, *bounds(c), act, c, processors)
            return gluon_hidden_grad.hidden_grad(*args)
        need = {"need_dz": True, "need_ph": True, "need_parts": True}
        return hidden_grad(dys, w2, z, gates, *tables(c), act, glu, exact, c, **need)

    def run_weight_grad(first: bool, c: Config) -> tuple[Tensor, ...]:
        a, b = (dz, xs) if first else (dys, hidden)
        how = {"bias": b1 is not None, "scale": None if first or b2 is None else gates.flatten()}
        if c.warp_specialized:
            from moe_mtl.kernels import gluon_weight_grad

            return gluon_weight_grad.weight_grad(a, b, sort.offsets, c, processors, **how)
        how["gather"] = first and gather
        return weight_grad(a, b, sort.order, sort.offsets, k, exact, c, processors, **how)

    def run_fused(c: Config) -> tuple[Tensor, ...]:
        return (fused(x, w1, b1, w2, b2, sort.order, plan.tiles_of(sort, c.block_m), k, act, exact, c),)

    can_up = not (glu or gather) and warp_specializes(xs, w1, h)
    can_sum = partial(warp_specializes_sums, experts=e)
    infer = Problem("up", "inference", h, partial(run_up, False), can_up)
    return [
        Problem("up", "training", h, partial(run_up, True), can_up),
        Problem("down", "forward", d, partial(run_down, False), not glu and warp_specializes(hidden, w2, d)),
        Problem("down", "input gradient", d, partial(run_down, True), not glu and warp_specializes(dz, w1, d, True)),
        Problem("hidden_grad", "backward", h, run_hidden_grad, not glu and warp_specializes(dys, w2, h, True)),
        Problem("weight_grad", "first layer", d, partial(run_weight_grad, True), not gather and can_sum(dz, xs)),
        Problem("weight_grad", "second layer", h, partial(run_weight_grad, False), can_sum(dys, hidden)),
        Problem("fused", "inference", d, run_fused) if fused_fits(w1, w2, glu) else infer,
    ]


def tables_of(shape: Shape, device: torch.device) -> plan.Plan:
    """A plan of random ids; on the device "meta" of none."""
    if device.type != "meta":
        ids = torch.rand(shape.tokens, shape.experts, device=device).topk(shape.k).indices
        return plan.plan_routing(ids, shape.experts)
    tiles = sum(plan.tile_bound(shape.rows, shape.experts, height) for height in plan.TILE_ROWS)
    sizes = ((shape.rows,), (shape.rows,), (shape.experts + 1,), (tiles, 3))
    return plan.Plan(*(torch.empty(size, dtype=torch.int32, device=device) for size in sizes))
