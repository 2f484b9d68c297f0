"""The expert MLPs on a CPU without gradient: from ids to outputs in as few torch calls as there can be.

With few rows an expert's products take less time than the calls around them, so there is no plan, no chain of calls per
expert, and nothing is kept. Called below autograd by `moe_mtl.kernels.ops`, which owns shapes, dtypes and the meaning
of the arguments; axis letters are those of `moe_mtl.routing`.

dense     Every expert on every token: one product and one batched product, then only the chosen rows are read. What
          an expert makes of tokens that did not choose it, NaN included, goes unread.
grouped   Rows sorted by expert, one product per expert and layer, everything else once for all rows.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_mtl.kernels import cpu
from moe_mtl.kernels.plan import any_unused

# Fitted on an AMD EPYC (Zen 4, 1 MiB of cache per core) with one and two threads: m 1 to 4096, d and h 64 to 384, e 4
# to 64 and k 1 to 16 in float32, a part of these in bfloat16.
MACS_PER_US = {4: 32_000.0, 2: 60_000.0}  # bytes of a number -> multiply-adds of a product of few rows in a microsecond
DENSE_MACS_PER_US = {4: 45_000.0, 2: 60_000.0}  # the same of the products of "dense", per thread
SHARING = 0.85  # part of its speed that a thread keeps where several share a product
EXPERT_US = {4: 7.0, 2: 30.0}  # calls of "grouped" for each expert; products of two-byte numbers start slowly
SORT_US = 20.0  # its other calls, less those of "dense"
GROUPED_BYTES = 5 << 20  # with more rows, the buffers one expert long of cpu.py are faster: they stay in cache
DENSE_BYTES = 64 << 20  # more memory than that is not traded for time
SHARED_MACS = 1_000_000  # a smaller product is done before a second thread is awake
GROUPED_MM_ROWS = 64  # rows per expert up to which one call of grouped_mm beats a loop of torch calls over experts
STREAMED_BYTES = 4 << 20  # up to this size it pays to read weights once before many small products do
STREAMED_WIDTH, STREAMED_ROWS = 1024, 32  # and up to that length of their rows, for a product of so few rows
LARGE_EXPERT = 256 << 10  # bytes of a layer from which each expert is read for itself
FLIPPED_ROWS = range(2, 6)  # of a float32 product that is faster as w x^T

# faster than the same function with out= its own argument
IN_PLACE = {"gelu": torch._C._nn.gelu_, "silu": torch._C._nn.silu_, "relu": torch.relu_}


def choose(tokens: int, k: int, w1: Tensor, w2: Tensor, threads: int) -> Callable[..., Tensor] | None:
    """The fastest way for these sizes, as estimated from them alone; None for a plan and `cpu.moe_mlp`.

    "dense" does e / k times the multiplications of "grouped" and spares its sort and its call per expert; where all
    experts are used it always wins. "grouped" beats the segments of cpu.py while the rows of all experts stay in cache.
    Several threads can share the products of "dense" and the segments, but small products of "grouped" only lose by it:
    they run on one thread, and where they are large enough to be shared a plan is made.

    Args:
        tokens: m.
        k: slots per token.
        w1: [e, (1|2)h, d].
        w2: [e, o, h].
        threads: what torch may use.
    """
    experts, wide, dim = w1.shape
    _, out, hidden = w2.shape
    rows, first, second = tokens * k, wide * dim, out * hidden
    if rows == 0:
        return None
    size, visited = w1.element_size(), min(experts, rows)
    row_bytes, kind = (dim + wide + out) * size, min(size, 4)
    wide_speed = DENSE_MACS_PER_US[kind] * (threads * SHARING if threads > 1 else 1)
    dense_us = tokens * experts * (first + second) / wide_speed
    grouped_us = rows * (first + second) / MACS_PER_US[kind] + SORT_US + EXPERT_US[kind] * visited
    if dense_us <= grouped_us and tokens * experts * row_bytes <= DENSE_BYTES:
        return dense
    if size == 2 and rows > GROUPED_MM_ROWS * experts:
        return None  # cpu.py spares oneDNN new numbers of rows
    if rows * row_bytes > GROUPED_BYTES or (threads > 1 and rows * max(first, second) > SHARED_MACS * visited):
        return None
    return grouped


def dense(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gates: Tensor,
    idx: Tensor,
    activation: str,
    glu: bool,
) -> Tensor:
    """y [m, o] from all experts' outputs on all tokens, of which only the chosen are read.

    Raises:
        ValueError: an id is out of range.
    """
    (m, k), (experts, wide, dim), (_, out, hidden) = idx.shape, w1.shape, w2.shape
    spare = any_unused(idx, experts)
    bias = None if b1 is None else b1.reshape(-1)
    z = cpu.linear(x, w1.reshape(-1, dim), bias, x.new_empty(m, experts * wide)).view(m, experts, wide)
    h = cpu.activate(z, z.new_empty(m, experts, hidden), activation, True) if glu else IN_PLACE[activation](z)
    if experts == k == 1 and not spare:
        return cpu.linear(h[:, 0], w2[0], None if b2 is None else b2[0], x.new_empty(m, out)).mul_(gates.to(x.dtype))
    ys = x.new_empty(experts * m + spare, out)
    cpu.linear_padded(h.transpose(0, 1), w2, b2, ys[: experts * m].view(experts, m, out))
    rows = idx * m + torch.arange(m, dtype=idx.dtype)[:, None]
    if spare:
        ys[-1].zero_()
        unused = idx < 0
        rows, gates = rows.masked_fill_(unused, experts * m), gates.masked_fill(unused, 0)
    return cpu.combine(ys, rows.reshape(-1), k, gates.reshape(-1).to(x.dtype))


def grouped(*args: Any) -> Tensor:
    """y [m, o] from one product per expert and layer, on one thread; arguments of `dense`.

    The number of threads is that of the calling thread and is put back. A thread that calls torch for the first time in
    these microseconds would start with one as well.

    Raises:
        ValueError: an id is out of range.
    """
    threads = torch.get_num_threads()
    if threads == 1 or not torch.backends.openmp.is_available():
        return _grouped(*args)
    torch.set_num_threads(1)
    try:
        return _grouped(*args)
    finally:
        torch.set_num_threads(threads)


def _grouped(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gates: Tensor,
    idx: Tensor,
    activation: str,
    glu: bool,
) -> Tensor:
    k, experts, slots, out = idx.shape[1], w1.shape[0], idx.numel(), w2.shape[1]
    # The tables are made in NumPy, whose calls cost a third of torch's.
    flat = idx.numpy().reshape(-1)
    order = flat.argsort(kind="stable")
    ids = flat[order]
    bounds = ids.searchsorted(np.arange(experts + 1))
    if bounds[0] > 0 or bounds[-1] < slots:
        any_unused(idx, experts)
        order, ids = np.roll(order, -bounds[0]), np.roll(ids, -bounds[0])  # unused slots go last
        bounds -= bounds[0]
        gates = gates.masked_fill(idx < 0, 0)
    used = int(bounds[-1])
    inverse = np.empty_like(order)
    inverse[order] = np.arange(slots)

    rows = torch.from_numpy(ids[:used]), bounds
    z = _products(x.index_select(0, torch.from_numpy(order[:used] // k)), w1, b1, *rows)
    h = cpu.activate(z, z.new_empty(used, w2.shape[2]), activation, True) if glu else IN_PLACE[activation](z)
    ys = _products(h, w2, b2, *rows)
    if used < slots:
        ys, inverse = torch.cat([ys, ys.new_zeros(1, out)]), inverse.clip(max=used)
    return cpu.combine(ys, torch.from_numpy(inverse), k, gates.reshape(-1).to(x.dtype))


def _products(xs: Tensor, w: Tensor, b: Tensor | None, ids: Tensor, bounds: np.ndarray) -> Tensor:
    """w[e] x + b[e] for rows [used, in] sorted by expert: [used, out]."""
    experts, out, width = w.shape
    aligned = w.is_contiguous() and not width * w.element_size() % 16 and w.dtype != torch.float64
    streamed = w.numel() * w.element_size() <= STREAMED_BYTES
    few = xs.shape[0] <= GROUPED_MM_ROWS * experts
    if aligned and few and (streamed or out * width * w.element_size() < LARGE_EXPERT):
        if streamed and xs.shape[0] >= experts:
            w.sum()  # into the cache as one stream: the products would wait for the weights piece by piece
        ys = F.grouped_mm(xs, w.mT, offs=torch.from_numpy(bounds[1:].astype(np.int32)))
        return ys if b is None else ys.add_(b.index_select(0, ids))
    ys = xs.new_empty(xs.shape[0], out)
    parts = zip(pairwise(bounds.tolist()), w.unbind(), cpu.unbind(b, experts), strict=True)
    for (start, stop), w_e, b_e in parts:
        if start < stop:
            _product(xs[start:stop], w_e, b_e, ys[start:stop])
    return ys


def _product(x: Tensor, w: Tensor, b: Tensor | None, out: Tensor) -> None:
    """w x + b of the rows of one expert, into out, with weights that are in no cache yet."""
    rows, width = x.shape
    if width <= STREAMED_WIDTH and w.numel() * w.element_size() <= STREAMED_BYTES:
        if w.dtype == torch.float32 and rows in FLIPPED_ROWS:
            y = torch.mm(w, x.t()).t()
            torch.add(y, b, out=out) if b is not None else out.copy_(y)
            return
        if rows <= STREAMED_ROWS:
            w.sum()  # as in _products
    cpu.linear(x, w, b, out)
