"""What a call of the expert ops costs the host, on a machine without a GPU: `python benchmarks/host.py`.

Triton compiles for Hopper and launches as on one, but into a driver that does nothing: a stand-in for libcuda, built
from the lines below with the C compiler that Triton needs anyway. Tensors are those of a CPU, small ones. So the times
are those of Python, torch and Triton, for calls made in full and for calls made again from a record
(`moe_mtl.kernels.triton_replay`), interleaved; the driver's own, and torch's allocator on a GPU, come on top.

First every launch of a replay is compared with that of the call in full: kernel, grid, constants, descriptors, and
addresses in arguments; also with the kernels of large layers, warp-specialized ones among them.
"""

import argparse
import ctypes
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout will do

import torch
from records import triton_version
from torch import Tensor

ROUNDS, CALLS = 60, 10
DRIVER = """
#include <stdint.h>
#include <string.h>
#define ANSWERS(name, ...) int name(__VA_ARGS__)
ANSWERS(cuInit, unsigned f) { return 0; }
ANSWERS(cuDriverGetVersion, int *v) { *v = 12080; return 0; }
ANSWERS(cuDeviceGet, int *d, int i) { *d = 0; return 0; }
ANSWERS(cuDeviceGetAttribute, int *v, int a, int d) { *v = a == 10 ? 32 : a == 16 ? 132 : 232448; return 0; }
ANSWERS(cuCtxGetCurrent, void **c) { *c = (void *)1; return 0; }
ANSWERS(cuCtxSetCurrent, void *c) { return 0; }
ANSWERS(cuCtxGetLimit, size_t *v, int l) { *v = 0; return 0; }
ANSWERS(cuCtxSetLimit, int l, size_t v) { return 0; }
ANSWERS(cuDevicePrimaryCtxRetain, void **c, int d) { *c = (void *)1; return 0; }
ANSWERS(cuModuleLoadData, void **m, const void *d) { *m = (void *)2; return 0; }
ANSWERS(cuModuleGetFunction, void **f, void *m, const char *n) {
  static char at[4096]; static int i; *f = at + ++i % 4096; return 0; }
ANSWERS(cuFuncGetAttribute, int *v, int a, void *f) { *v = a == 0 ? 1024 : a == 3 ? 0 : 64; return 0; }
ANSWERS(cuFuncSetAttribute, void *f, int a, int v) { return 0; }
ANSWERS(cuFuncSetCacheConfig, void *f, int c) { return 0; }
ANSWERS(cuGetErrorString, int c, const char **s) { *s = "none"; return 0; }
ANSWERS(cuPointerGetAttribute, uint64_t *v, int a, uint64_t p) { *v = p; return 0; }
ANSWERS(cuTensorMapEncodeTiled, void *m, int t, unsigned r, void *a, const void *d, const void *s, const void *b,
        const void *e, int i, int w, int l, int o) { memset(m, 1, 128); return 0; }
ANSWERS(cuLaunchKernelEx, const void *c, void *f, void **p, void **x) { return 0; }
ANSWERS(cuOccupancyMaxActiveClusters, int *n, void *f, const void *c) { *n = 1; return 0; }
"""


def build_driver(folder: Path) -> None:
    """Makes the stand-in, before Triton looks for a driver.

    Raises:
        SystemExit: there is no C compiler.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise SystemExit("no C compiler here: host.py builds a stand-in for the driver; install gcc or clang")
    (folder / "driver.c").write_text(DRIVER)
    library = folder / "libcuda.so.1"
    how = ["-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *how, "-o", library, folder / "driver.c"], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


@contextmanager
def pretended_hopper() -> Iterator[None]:
    """Within it Triton and the kernels take the CPU for a Hopper GPU."""
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    import moe_mtl.kernels.triton_plan  # noqa: F401 (what is patched must be there)
    from moe_mtl.kernels import configs, dispatch, triton_replay

    capability = mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with ExitStack() as patches:
        patches.enter_context(capability)
        hopper = CudaDriver()
        hopper.get_device_capability = lambda device=None: (9, 0)
        hopper.get_current_device, hopper.get_current_stream = lambda: 0, lambda device: 0
        driver.set_active(hopper)
        for module, name, value in (
            (configs, "chip", lambda device: (90, 132)),
            (triton_replay, "replays_on", lambda device: True),
            (triton_replay, "current_stream", lambda device: 0),
            (dispatch, "interpreted", lambda: True),
        ):
            patches.enter_context(mock.patch.object(module, name, value))
        yield


@contextmanager
def as_if_large() -> Iterator[None]:
    """Within it the kernels and tile sizes of small layers are those of large ones."""
    from moe_mtl.kernels import configs, gpu, triton_launch

    pick = configs.pick

    def of_a_large_one(kernel: str, arch: int, bits: int, glu: bool, rows: int, width: int, *can: bool) -> Any:
        return pick(kernel, arch, bits, glu, 10**4, 10**4, *can)

    with (
        mock.patch.object(configs, "pick", of_a_large_one),
        mock.patch.object(gpu, "sorts_first", lambda *_: True),
        mock.patch.object(triton_launch, "TILES_EACH", 0),
    ):
        yield


class Calls:
    """The ops on one small layer in bf16: 64 tokens, 2 of 4 experts each.

    Args:
        bits: of numbers, 16 or 32.
        glu: gated units, without biases.
        need: which gradients the backward makes: of x, w1, b1, w2, b2, gates.
    """

    def __init__(self, bits: int = 16, glu: bool = False, need: Sequence[bool] = (True,) * 6, width: int = 64):
        from moe_mtl.kernels import gpu, triton_plan
        from moe_mtl.kernels.plan import Plan

        torch.manual_seed(0)
        tokens, experts, k, dtype = 64, 4, 2, torch.bfloat16 if bits == 16 else torch.float32
        self.idx = torch.rand(tokens, experts).topk(k).indices.flatten()
        drawn = ((tokens, width), (experts, width * (1 + glu), width), (experts, width, width), (tokens, width))
        x, w1, w2, dy = (torch.randn(*size).to(dtype) for size in drawn)
        b1, b2 = (None, None) if glu else (torch.randn(experts, width).to(dtype) for _ in range(2))
        z, gates = torch.randn(tokens * k, w1.shape[1]).to(dtype), torch.rand(tokens, k)
        self.leaves, self.cotangent = (x, w1, b1, w2, b2, gates), dy
        need = [wanted and t is not None for wanted, t in zip(need, self.leaves, strict=True)]
        plan = Plan(*triton_plan.plan.body(self.idx, experts))
        self.parts: dict[str, tuple[Any, tuple]] = {
            "sort tables": (triton_plan.plan, (self.idx, experts)),
            "forward": (gpu.moe_mlp, (*self.leaves, plan, "gelu", glu, True)),
            "inference": (gpu.moe_mlp, (*self.leaves, plan, "gelu", glu, False)),
            "backward": (gpu.moe_mlp_backward, (dy, x, z, w1, w2, b2, gates, plan, "gelu", glu, need)),
        }

    def whole(self) -> dict[str, Callable[[], Any]]:
        """`ops.moe_mlp` as a layer calls it: checks, autograd and all."""
        from moe_mtl.kernels import ops, triton_plan
        from moe_mtl.kernels.plan import Plan

        leaves = [t if t is None else t.clone().requires_grad_() for t in self.leaves]
        wanted = [t for t in leaves if t is not None]

        def forward() -> Tensor:
            plan = Plan(*triton_plan.plan(self.idx, leaves[1].shape[0]))
            return ops.moe_mlp(*leaves, plan, backend="triton")

        def infer() -> None:
            with torch.no_grad():
                forward()

        return {
            "inference, all": infer,
            "training, all": lambda: torch.autograd.grad(forward(), wanted, self.cotangent),
        }


@contextmanager
def launches() -> Iterator[list[tuple]]:
    """Kernel, grid and arguments of all launches within."""
    from triton.compiler import CompiledKernel

    seen: list[tuple] = []
    launcher = CompiledKernel.run.fget

    def run(kernel: Any) -> Callable[..., None]:
        def watched(x: int, y: int, z: int, stream: int, function: int, *args: Any) -> None:
            seen.append((kernel.name, (x, y, z), function, args[4:]))
            launcher(kernel)(x, y, z, stream, function, *args)

        return watched

    with mock.patch.object(CompiledKernel, "run", property(run)):
        yield seen


def differing(function: Any, args: tuple) -> tuple[int, list[str]]:
    """How many launches a replay of a call makes, and where they are not those of the call in full."""
    inputs = [t for arg in args for t in (arg if isinstance(arg, tuple) else (arg,)) if isinstance(t, Tensor)]
    made = []
    function.known.clear()
    with launches() as seen:
        for _ in range(3):
            seen.clear()
            results = function(*args)
            made.append((list(seen), results))
    (full, _), _, (again, _) = made
    if len(full) != len(again):
        return len(again), [f"{len(again)} launches, in full {len(full)}"]
    said = []
    for (name, *how, ours), (other, *others, theirs) in zip(again, full, strict=True):
        same = (name, how) == (other, others) and len(ours) == len(theirs)
        for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
            same = same and _told(a, isinstance(b, Tensor), inputs) == _told(b, False, inputs)
            if not same:
                said.append(f"{name}, argument {i}: {a}, in full {b}")
                break
    return len(again), said


def _told(value: Any, address: bool, inputs: list[Tensor]) -> Any:
    """An argument of a launch, without what differs between calls: where buffers lie."""
    if isinstance(value, Tensor) or address:
        at = value.data_ptr() if isinstance(value, Tensor) else value
        inside = [(i, at - t.data_ptr()) for i, t in enumerate(inputs) if 0 <= at - t.data_ptr() < max(t.nbytes, 1)]
        return inside or (at and "a buffer")
    if hasattr(value, "base"):
        rest = {name: what for name, what in vars(value).items() if name != "base"}
        return _told(value.base, False, inputs), {name: str(what) for name, what in rest.items()}
    return value


def check() -> tuple[int, list[str]]:
    """Compares launches over dtypes, gated units and needed gradients, and those of large layers."""
    total, said = 0, []

    def compare(what: str, bits: int, *how: Any) -> None:
        nonlocal total
        for name, (function, args) in Calls(bits, *how, width=64 if bits == 16 else 40).parts.items():
            count, wrong = differing(function, args)
            total += count
            said.extend(f"{what}, {name}: {line}" for line in wrong)

    for bits in (16, 32):
        for glu in (False, True):
            for need in ((True,) * 6, (False, True, True, False, False, False)):
                compare(f"{bits} bits, glu {glu}", bits, glu, need)
    with as_if_large(), launches() as seen:
        compare("as if large", 16)
    gluon = {name for name, *_, args in seen if hasattr(args[0], "block_shape") and hasattr(args[0], "layout")}
    wanted = ("product_kernel", "hidden_grad_kernel", "weight_grad_kernel")
    said += [f"as if large: no Gluon {name}" for name in wanted if name not in gluon]
    return total, said


def measure() -> list[str]:
    """Least time of each call over the rounds, in full and replayed, which take turns."""
    from moe_mtl.kernels import triton_replay

    calls = Calls()
    steps = {name: partial(function, *args) for name, (function, args) in calls.parts.items()} | calls.whole()
    times: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        for name, step in steps.items():
            for again in (False, True):
                with mock.patch.object(triton_replay, "replays_on", lambda device, again=again: again):
                    for _ in range(2):
                        step()
                    began = time.perf_counter()
                    for _ in range(CALLS):
                        step()
                    times[name, again].append((time.perf_counter() - began) / CALLS)
    lines = [f"{'':16}{'in full, us':>12}{'replayed, us':>14}{'ratio':>7}"]
    for name in steps:
        full, again = times[name, False], times[name, True]
        ratio = statistics.median(a / b for a, b in zip(full, again, strict=True))
        lines.append(f"{name:16}{1e6 * min(full):12.0f}{1e6 * min(again):14.0f}{ratio:7.2f}")
    return lines


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the launches, measure nothing")
    args = parser.parse_args()
    if torch.cuda.is_available():
        print("there is a GPU here: benchmarks/moe_layer.py measures with it")
        return 2
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        build_driver(Path(folder))
        with pretended_hopper():
            count, wrong = check()
            print("\n".join([f"{count} launches compared, {len(wrong)} differ", *wrong]), flush=True)
            if wrong or args.check:
                return int(bool(wrong))
            print(f"torch {torch.__version__}, triton {triton_version()}, one thread", *measure(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
