"""The machine of the tests of the warp-specialized kernels, in NumPy: tensors, buffers, barriers, and who runs when.

Barriers have phases, counts and bytes; a copy engine completes copies in any order and at any time; products read their
operands as late as the wait for them allows; warps advance in random order. Three of the four warps of a consumer are
"shadows" of the first: they wait and meet at barriers as it does, but neither arrive nor write, which is what Triton
makes of one call by four warps. It is a shadow that asks the engine to copy out of a buffer, and knows when it has.
"""

import random
import threading
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

KINDS = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"}


class Fault(Exception):
    """What a kernel must not do."""


# ---- tensors ---------------------------------------------------------------------------------------------------------


class T(np.ndarray):
    """A tensor of the language. Bfloat16 is kept in float32."""

    def to(self, kind: str, bitcast: bool = False) -> "T":
        if bitcast:
            return self.view({"fp32": np.float32, "i32": np.int32}[kind]).view(T)
        if kind == "bf16":
            bits = np.ascontiguousarray(self, np.float32).view(np.uint32)
            return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).view(T)
        return self.astype({"fp32": np.float32, "i64": np.int64, "i32": np.int32}[kind]).view(T)

    def permute(self, *axes: int) -> "T":
        return self.transpose(*axes)

    def split(self) -> tuple["T", "T"]:
        return self[..., 0], self[..., 1]


class Memory:
    """The numbers of a caller's tensor, and which were written."""

    def __init__(self, t: torch.Tensor):
        self.tensor, self.kind = t, KINDS[t.dtype]
        self.values = (t.float() if self.kind == "bf16" else t).numpy().reshape(-1).copy()
        self.written = np.zeros(self.values.size, bool)

    def load(self, at: Any, mask: Any, other: Any) -> Any:
        at = np.asarray(at)
        mask = np.broadcast_to(True if mask is None else mask, at.shape)
        inside = (at >= 0) & (at < self.values.size)
        if (mask & ~inside).any():
            raise Fault("a load outside the tensor")
        out = np.where(mask, self.values[np.where(inside, at, 0)], other or 0)
        return out.view(T) if at.ndim else out[()].item()

    def store(self, at: Any, value: Any, mask: Any) -> None:
        at, value = np.broadcast_arrays(np.asarray(at), value)
        mask = np.broadcast_to(True if mask is None else mask, at.shape)
        at = at[mask]
        if ((at < 0) | (at >= self.values.size)).any():
            raise Fault("a store outside the tensor")
        if self.written[at].any():
            raise Fault("a place written twice")
        self.values[at], self.written[at] = value[mask], True

    def give_back(self) -> None:
        if self.written.any():
            self.tensor.copy_(torch.from_numpy(self.values).reshape(self.tensor.shape))


class Pointer:
    """To places in a memory."""

    def __init__(self, memory: Memory, at: Any = 0):
        self.memory, self.at = memory, at
        self.dtype = types.SimpleNamespace(element_ty=memory.kind)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, self.at + offset)


@dataclass
class TensorDescriptor:
    """Of a matrix, for copies of blocks: what the host makes."""

    base: torch.Tensor
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    layout: Any


class Described:
    """The same, as a kernel gets it; the memory is that of the tensor where the kernel writes."""

    def __init__(self, of: TensorDescriptor, memory: Memory | None):
        self.memory, self.width = memory, of.strides[0]
        self.values = of.base.as_strided(of.shape, of.strides).float().numpy()
        self.block_type = types.SimpleNamespace(shape=of.block_shape, nbytes=2 * int(np.prod(of.block_shape)))
        self.dtype, self.layout = KINDS[of.base.dtype], of.layout

    def block(self, at: list[int]) -> np.ndarray:
        out = np.zeros(self.block_type.shape, np.float32)
        rows, columns = (slice(a, a + n) for a, n in zip(at, out.shape, strict=True))
        part = self.values[rows, columns]
        out[: part.shape[0], : part.shape[1]] = part
        return out

    def put(self, at: list[int], block: np.ndarray) -> None:
        """What lies outside is not written."""
        sizes = zip(at, block.shape, self.values.shape, strict=True)
        rows, columns = (np.arange(a, min(a + n, end)) for a, n, end in sizes)
        self.memory.store(rows[:, None] * self.width + columns, block[: len(rows), : len(columns)], None)


# ---- shared memory ---------------------------------------------------------------------------------------------------


class Barrier:
    """Counts arrivals and bytes; a phase ends when none are missing."""

    def __init__(self):
        self.count = self.pending = self.bytes = self.phase = 0

    def settle(self) -> None:
        if self.pending < 0:
            raise Fault("more arrivals than the barrier counts")
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count

    def passed(self, parity: int) -> bool:
        """Whether the phase of that parity has ended: the current one has the other."""
        return self.phase & 1 != parity & 1


class Buffers:
    """Buffers, or barriers, one behind the other."""

    dtype = "bf16"

    def __init__(self, shape: list[int], barriers: bool = False):
        self.type = types.SimpleNamespace(shape=list(shape))
        self.each = [Barrier() if barriers else Buffer(shape[1:]) for _ in range(shape[0])]

    def index(self, i: int) -> Any:
        return self.each[i]


class Buffer:
    """A buffer, or a view of one.

    Attributes:
        known: where something was written or copied.
        readers: products and copies that read it.
        fresh: copied into, and not read since.
        version: how many copies it has taken.
        stores: how often each warp has written into it, of each partition.
    """

    def __init__(self, shape: list[int]):
        self.data, self.known, self.root = np.full(shape, np.nan, np.float32), np.zeros(shape, bool), self
        self.readers, self.fresh, self.version = 0, False, 0
        self.stores: dict[int, Counter[Warp]] = {}

    def permute(self, axes: tuple[int, ...]) -> "Buffer":
        view = Buffer([])
        view.data, view.known, view.root = self.data.transpose(axes), self.known.transpose(axes), self.root
        return view

    def load(self, layout: Any) -> T:
        world.turn()
        if world.shadow():
            return np.zeros(self.data.shape, np.float32).view(T)
        if not self.known.all():
            raise Fault("read before it was written")
        self.root.fresh = False
        return self.data.copy().view(T)

    def store(self, value: T) -> None:
        world.turn()
        if hasattr(here, "warp"):
            self.root.stores.setdefault(here.warp.partition, Counter())[here.warp] += 1
        if not world.shadow():
            if self.root.readers:
                raise Fault("written while a product or the engine reads it")
            self.data[...], self.known[...] = value, True


class Accumulator:
    """A product's result, and the products that are still to be added, each with its number in the partition."""

    def __init__(self, value: Any, pending: tuple = ()):
        self.value, self.pending = value, list(pending)


# ---- who runs when ---------------------------------------------------------------------------------------------------


class Warp:
    """A thread: a partition's first warp, of number 0, or a shadow of it."""

    def __init__(self, function: Callable, args: tuple, partition: int, number: int, slow: bool):
        self.function, self.args, self.partition, self.number, self.slow = function, args, partition, number, slow
        self.asked: list[list[bool]] = []  # copies out of buffers: whether the engine has read them
        self.products = 0  # how many it has issued
        self.go = threading.Semaphore(0)
        self.until: Callable[[], bool] = lambda: True


class World:
    """A program: exactly one of its warps runs, and the next is drawn at every turn."""

    def __init__(self, seed: int, program: int, programs: int):
        self.random = random.Random(seed)
        self.haste = self.random.choice((0.0, 0.05, 0.4))  # of the copy engine; it copies when nobody can go on anyway
        self.program, self.programs = program, programs
        self.warps: list[Warp] = []
        self.copies: list[Callable[[], None]] = []
        self.fault: Exception | None = None
        self.meeting: dict[int, list[int]] = {}  # partition -> warps at its barrier, meetings that have ended

    def shadow(self) -> bool:
        warp = getattr(here, "warp", None)
        return warp is not None and warp.number > 0

    def turn(self, until: Callable[[], bool] = lambda: True) -> None:
        """Lets others run; comes back when `until` holds."""
        warp = getattr(here, "warp", None)
        if warp is not None:  # the partitions have started
            warp.until = until
            self.pick()
            warp.go.acquire()
            if self.fault is not None:
                raise Fault("stopped")

    def pick(self) -> None:
        """Draws who runs next; before that, copies may end."""
        while self.fault is None and self.warps:
            able = [warp for warp in self.warps if warp.until()]
            quick = [warp for warp in able if not warp.slow]
            if self.copies and (not able or self.random.random() < (self.haste if quick else 0.9)):
                try:
                    self.copies.pop(self.random.randrange(len(self.copies)))()
                except Fault as fault:
                    self.fault = fault
            elif able:
                able = quick if quick and self.random.random() < 0.95 else able
                self.random.choice(able).go.release()
                return
            else:
                self.fault = Fault("deadlock")
        for warp in self.warps:  # to end
            warp.go.release()

    def run(self, warps: list[Warp]) -> None:
        def body(warp: Warp) -> None:
            here.warp = warp
            warp.go.acquire()
            try:
                if self.fault is None:
                    warp.function(*warp.args)
            except Exception as error:
                self.fault = self.fault or error
            self.warps.remove(warp)
            self.pick()

        self.warps = list(warps)
        threads = [threading.Thread(target=body, args=(warp,), daemon=True) for warp in warps]
        for thread in threads:
            thread.start()
        self.pick()
        for thread in threads:
            thread.join()
        if self.fault is None and self.copies:
            self.fault = Fault("copies in flight at the end")
        if self.fault is not None:
            raise self.fault


world = World(0, 0, 1)  # that of the program that runs
here = threading.local()
