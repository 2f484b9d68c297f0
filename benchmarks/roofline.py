"""The least time an MoE layer needs on a machine: its kernels' FLOPs and bytes over what the machine was seen to do.

A kernel reads its inputs once, writes its outputs once, and takes the longer of the time for its FLOPs and the time for
its bytes. A layer takes the sum over its kernels:

    forward    up: x, w1 -> h (and the pre-activation z, when a backward follows)
               down: h, w2 -> ys; combine: ys -> y
    backward   hidden gradient: dy, w2, z -> dz, p h
               weight gradients: dy, p h -> dw2; dz, x -> dw1
               input gradient: dz, w1 -> dxs; combine: dxs -> dx

Gathered rows count once, as re-reads hit the cache; biases, gates and sort tables are not counted. Intermediates count
as memory traffic although small ones may stay in the cache, so a small layer can come out below its limit.
"""

import time
from typing import NamedTuple

import torch
from shapes import Shape

MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}


class Limits(NamedTuple):
    """Least seconds.

    Attributes:
        infer: a forward without a backward to come.
        train_fwd: a forward that stores the pre-activation.
        bwd: a backward with the gradients of inputs, weights and gates.
    """

    infer: float
    train_fwd: float
    bwd: float

    def of(self, mode: str) -> float:
        """For a mode of the harness: "fwd" or "fwd+bwd", under a CUDA graph or not."""
        return self.train_fwd + self.bwd if mode.endswith("fwd+bwd") else self.infer


class Ceilings(NamedTuple):
    """What the machine was seen to do at best: FLOP/s of a large matrix product, bytes/s read and written by a copy."""

    flops_per_s: float
    bytes_per_s: float


def limits(shape: Shape, dtype_bytes: int, flops_per_s: float, bytes_per_s: float) -> Limits:
    """Least seconds of a layer, from its shape, the bytes of a number and the ceilings of the machine."""
    x, rows, h, z = (n * dtype_bytes * w for n, w in (
        (shape.tokens, shape.dim), (shape.rows, shape.dim), (shape.rows, shape.hidden), (shape.rows, shape.wide)
    ))  # fmt: skip
    w1, w2 = (shape.experts * shape.dim * w * dtype_bytes for w in (shape.wide, shape.hidden))
    first, second = 2 * shape.rows * shape.dim * shape.wide, 2 * shape.rows * shape.dim * shape.hidden

    def kernel(flops: int, *tensors: int) -> float:
        return max(flops / flops_per_s, sum(tensors) / bytes_per_s)

    combine = kernel(0, rows, x)
    down = kernel(second, h, w2, rows) + combine
    hidden_grad = kernel(second, x, w2, z, z, h)
    weight_grads = kernel(second, x, h, w2) + kernel(first, z, x, w1)
    input_grad = kernel(first, z, w1, rows) + combine
    return Limits(
        infer=kernel(first, x, w1, h) + down,
        train_fwd=kernel(first, x, w1, z, h) + down,
        bwd=hidden_grad + weight_grads + input_grad,
    )


def saved_limit(shape: Shape, dtype_bytes: int, tiles: int) -> int:
    """Bytes a forward may save for its backward: x, the pre-activation, float32 gates and int32 tables.

    Args:
        shape: the layer.
        dtype_bytes: of a number.
        tiles: rows of the plan's table of tiles, three numbers each.
    """
    tables = 2 * shape.rows + shape.experts + 1 + 3 * tiles
    return dtype_bytes * (shape.tokens * shape.dim + shape.rows * shape.wide) + 4 * (shape.rows + tables)


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measures both: the best of several rounds, about a second in all."""
    n = MATMUL_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = _best(device, lambda: a @ b)
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return Ceilings(2 * n**3 / product, 2 * COPY_BYTES[device.type] / _best(device, lambda: target.copy_(source)))


def _best(device: torch.device, step) -> float:
    """Seconds of the fastest of 8 rounds of 3 calls."""
    rounds = []
    for _ in range(9):  # the first warms up
        _wait(device)
        start = time.perf_counter()
        for _ in range(3):
            step()
        _wait(device)
        rounds.append((time.perf_counter() - start) / 3)
    return min(rounds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
