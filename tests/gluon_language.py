"""Runs the source of the warp-specialized kernels without a GPU and without Triton, partitions as threads.

`load` executes the modules with stand-ins for Gluon and for `triton_launch.launch`, which runs a kernel's programs one
after the other on tensors of the CPU, 16-bit ones bfloat16. Found are deadlocks, buffers overwritten while a product
reads them or before anyone has read them, wrong phases, places written twice or outside a tensor, and wrong numbers.
Fences, the memory model, registers and the compiler are not looked at.
"""

import random
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests import gluon_machine as machine
from tests.gluon_machine import (
    Accumulator,
    Barrier,
    Buffer,
    Buffers,
    Described,
    Fault,
    Memory,
    Pointer,
    T,
    TensorDescriptor,
    Warp,
    World,
)

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
MODULES = ("triton_math", "triton_product", "gluon_ring", "gluon_product", "gluon_hidden_grad", "gluon_weight_grad")
WARPS = 4  # of a consumer

seeds = random.Random(0)
launched: list[str] = []  # names of kernels


def launch(kernel: Callable, grid: tuple[int], args: tuple, constants: dict[str, Any], warps: int) -> None:
    """Stands in for `triton_launch.launch`."""
    launched.append(kernel.__name__)
    memories = {id(t): Memory(t) for t in args if isinstance(t, torch.Tensor)}
    given: list[Any] = [Pointer(memories[id(t)]) if isinstance(t, torch.Tensor) else t for t in args]
    given = [Described(t, memories.get(id(t.base))) if isinstance(t, TensorDescriptor) else t for t in given]
    for program in range(grid[0]):
        machine.world = World(seeds.randrange(10**9), program, grid[0])
        kernel(*given, *constants.values())
    for memory in memories.values():
        memory.give_back()


# ---- the language ----------------------------------------------------------------------------------------------------


def load_from(pointer: Pointer, mask: Any = None, other: Any = None) -> Any:
    machine.world.turn()
    return pointer.memory.load(pointer.at, mask, other)


def store_to(pointer: Pointer, value: Any, mask: Any = None) -> None:
    machine.world.turn()
    if not machine.world.shadow():
        pointer.memory.store(pointer.at, value, mask)


def init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.pending = count


def wait(barrier: Barrier, phase: int) -> None:
    machine.world.turn(lambda: barrier.passed(phase))


def arrive(barrier: Barrier, count: int = 1, nbytes: int = 0, pred: bool = True) -> None:
    machine.world.turn()
    if pred and not machine.world.shadow():
        barrier.bytes += nbytes
        barrier.pending -= count
        barrier.settle()


def warp_barrier() -> None:
    """Of the warps of a partition."""
    if not hasattr(machine.here, "warp"):  # they have not started
        return
    meeting = machine.world.meeting.setdefault(machine.here.warp.partition, [0, 0])
    meeting[0] += 1
    mine = meeting[1]
    if meeting[0] == WARPS:
        meeting[:] = 0, mine + 1
    machine.world.turn(lambda: meeting[1] > mine)


def copy(descriptor: Described, at: list[int], barrier: Barrier, buffer: Buffer) -> None:
    machine.world.turn()
    values = descriptor.block(at)

    def done() -> None:
        if buffer.readers:
            raise Fault("overwritten while a product reads it")
        if buffer.fresh:
            raise Fault("overwritten before anyone has read it")
        buffer.data[...], buffer.known[...] = values, True
        buffer.fresh, buffer.version = True, buffer.version + 1
        barrier.bytes -= descriptor.block_type.nbytes
        barrier.settle()

    machine.world.copies.append(done)


def written_by_all(buffer: Buffer) -> None:
    for stores in buffer.stores.values():
        if len(stores) != WARPS or len(set(stores.values())) > 1:
            raise Fault("read by a product or the engine before every warp has written")


def copy_out(descriptor: Described, at: list[int], buffer: Buffer) -> None:
    machine.world.turn()
    warp = machine.here.warp
    if warp.number != 1:
        return
    written_by_all(buffer)
    buffer.readers += 1
    read = [False]
    warp.asked.append(read)

    def done() -> None:
        if not buffer.known.all():
            raise Fault("copied out before it was written")
        descriptor.put(at, buffer.data)
        buffer.readers -= 1
        read[0] = True

    machine.world.copies.append(done)


def store_wait(pendings: int) -> None:
    """Until at most so many copies out of buffers are unread, of those that this warp has asked for."""
    asked = machine.here.warp.asked
    earlier = asked[: len(asked) - pendings]
    machine.world.turn(lambda: all(read for (read,) in earlier))


def product(a: Buffer, w: Buffer, acc: Any, use_acc: bool, is_async: bool) -> Accumulator:
    machine.world.turn()
    acc = acc if isinstance(acc, Accumulator) else Accumulator(acc)
    for buffer in (a.root, w.root):
        written_by_all(buffer)
    if machine.world.shadow():
        return acc
    for buffer in (a.root, w.root):
        buffer.readers += 1
    machine.here.warp.products += 1
    newest = (machine.here.warp.products, a, w, use_acc, a.root.version, w.root.version)
    return Accumulator(acc.value, (*acc.pending, newest))


def product_wait(pending: int, deps: tuple[Any, ...]) -> Any:
    """The oldest products end first, whichever result they are added to."""
    machine.world.turn()
    accs = [acc if isinstance(acc, Accumulator) else Accumulator(acc) for acc in deps]
    while sum(len(acc.pending) for acc in accs) > pending:
        acc = min((acc for acc in accs if acc.pending), key=lambda acc: acc.pending[0][0])
        _, a, w, use_acc, *versions = acc.pending.pop(0)
        if [a.root.version, w.root.version] != versions:
            raise Fault("an operand changed under a product")
        if not (a.known.all() and w.known.all()):
            raise Fault("a product of what was never copied")
        with np.errstate(invalid="ignore"):  # what is unused may be infinite
            acc.value = ((acc.value if use_acc else 0) + a.data @ w.data).astype(np.float32).view(T)
        for buffer in (a.root, w.root):
            buffer.readers -= 1
            buffer.fresh = False
    results = tuple(acc if pending else acc.value for acc in accs)
    return results if len(results) > 1 else results[0]


def specialize(partitions: list[tuple[Callable, tuple]], warps: list[int], registers: list[int]) -> None:
    """A partition of one warp has no shadows."""
    machine.world.run([
        Warp(function, args, number, warp, slow=machine.world.random.random() < 0.25)
        for number, ((function, args), count) in enumerate(zip(partitions, (WARPS, *warps), strict=True))
        for warp in range(count)
    ])  # fmt: skip


def where(condition: Any, x: Any, y: Any) -> Any:
    return np.where(condition, x, y).view(T) if np.ndim(condition) else (x if condition else y)


def minimum(x: Any, y: Any) -> Any:
    return np.minimum(x, y).view(T) if np.ndim(x) or np.ndim(y) else min(x, y)


def assembly(text: str, constraints: str, args: list[Any], kind: str, pure: bool, pack: int) -> Any:
    (x,) = args
    return x if text.startswith("mov") else {"ex2": np.exp2, "rcp": np.reciprocal}[text[:3]](x).view(T)


def allocate(kind: str, shape: list[int], layout: Any) -> Any:
    return Buffer(shape) if len(shape) == 2 and layout != "barriers" else Buffers(shape, layout == "barriers")


def same(x: Any = None, *_: Any) -> Any:
    return x


def nothing(*_: Any, **__: Any) -> None:
    pass


def jit(function: Any = None, **_: Any) -> Any:
    return same if function is None else function


LANGUAGE = types.SimpleNamespace(
    constexpr=same, constexpr_function=same, convert_layout=same, to_tensor=same, static_range=range,
    static_assert=nothing, BlockedLayout=nothing, SliceLayout=nothing, NVMMADistributedLayout=nothing,
    NVMMASharedLayout=types.SimpleNamespace(get_default_for=nothing), barrier=warp_barrier, warp_specialize=specialize,
    allocate_shared_memory=allocate, num_warps=lambda: WARPS,
    arange=lambda a, b, layout=None: np.arange(a, b).view(T), load=load_from, store=store_to, where=where,
    zeros=lambda shape, kind, layout: np.zeros(shape, np.float32).view(T), minimum=minimum, maximum=np.maximum,
    abs=np.abs, sum=lambda x, axis: x.sum(axis), cdiv=lambda a, b: -(-a // b), inline_asm_elementwise=assembly,
    program_id=lambda axis: machine.world.program, num_programs=lambda axis: machine.world.programs,
    cast=same, full=lambda shape, value, kind, layout: np.full(shape, value, np.float32).view(T),
    int32="i32", int64="i64", float32="fp32", bfloat16="bf16",
)  # fmt: skip
HOPPER = types.SimpleNamespace(
    fence_async_shared=nothing, warpgroup_mma=product, warpgroup_mma_wait=product_wait,
    tma=types.SimpleNamespace(
        async_copy_global_to_shared=copy, async_copy_shared_to_global=copy_out, store_wait=store_wait
    ),
    mbarrier=types.SimpleNamespace(
        init=init, wait=wait, arrive=arrive, expect=lambda barrier, nbytes: arrive(barrier, 1, nbytes),
        MBarrierLayout=lambda: "barriers",
    ),
)  # fmt: skip


def stand_ins() -> dict[str, Any]:
    gluon = types.SimpleNamespace(jit=jit, constexpr_function=same, language=LANGUAGE)
    knobs = types.SimpleNamespace(runtime=types.SimpleNamespace(interpret=False))
    host = {"cdiv": LANGUAGE.cdiv, "next_power_of_2": lambda n: 1 << (n - 1).bit_length(), "launch": launch}
    return {
        "triton": types.SimpleNamespace(jit=jit, language=LANGUAGE, knobs=knobs),
        "triton.language": LANGUAGE,
        "triton.experimental": types.SimpleNamespace(gluon=gluon),
        "triton.experimental.gluon": gluon,
        "triton.experimental.gluon.language.nvidia.hopper": HOPPER,
        "triton.experimental.gluon.nvidia.hopper": types.SimpleNamespace(TensorDescriptor=TensorDescriptor),
        "moe_mtl.kernels.triton_launch": types.SimpleNamespace(**host),
    }


def load(*changes: tuple[str, str, str]) -> types.SimpleNamespace:
    """The kernels' modules on this machine.

    Args:
        changes: module, what its source holds, and what stands there instead.
    """
    before = dict(sys.modules)
    sys.modules.update(stand_ins())
    try:
        loaded = {}
        for name in MODULES:
            source = (KERNELS / f"{name}.py").read_text()
            for module, old, new in changes:
                if module == name:
                    assert old in source, f"{name}: no {old!r}"
                    source = source.replace(old, new)
            module = types.ModuleType(f"moe_mtl.kernels.{name}")
            sys.modules[module.__name__] = loaded[name] = module
            exec(compile(source, f"{name}.py", "exec"), module.__dict__)
        return types.SimpleNamespace(**loaded)
    finally:
        sys.modules.clear()
        sys.modules.update(before)
