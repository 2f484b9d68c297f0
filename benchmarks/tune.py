"""Measures tile sizes of the Triton kernels on this GPU, for benchmarks/shapes.py, and writes kernels/configs.json.

    python benchmarks/tune.py                   prints what was measured and the lines that would change
    python benchmarks/tune.py --write           writes kernels/configs.json
    python benchmarks/tune.py --out FILE        writes there instead

Every kernel is called through its launcher, alone, as `moe_mtl.kernels.gpu` calls it in training and inference; times
are those of the GPU, from CUDA graphs, caches warm. Per kernel at most 16 configs are tried, those of the table among
them, and warp-specialized ones only where the call can run them. One that does not compile, does not fit the chip,
spills registers or computes something else than the table's is left out and named. The best config of each bucket of
shapes goes into the table (benchmarks/config_table.py).
"""

import argparse
import difflib
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a bare checkout will do

import torch  # noqa: E402
from checks import DTYPES, precision  # noqa: E402
from compile_kernels import SHARED_KIB  # noqa: E402
from config_table import MOST, Bucket, best, bucket_of, merged, newest_known, picked, text  # noqa: E402
from launches import Problem, problems  # noqa: E402
from measure import graph_seconds, interleaved  # noqa: E402
from peers import told  # noqa: E402
from shapes import SHAPES, Shape  # noqa: E402
from torch import Tensor  # noqa: E402

from moe_mtl.kernels import configs  # noqa: E402
from moe_mtl.kernels.configs import KERNELS, Config, Entry  # noqa: E402

MOST_CONFIGS = 16
COMPILE_SHARE = 0.55  # of the seconds
AGREE = {16: 2e-2, 32: 5e-3}  # relative difference to the result of the table's config
ROW_TILES = {  # block_m, block_n, block_k, warps, stages, epilogues, registers
    16: (
        (128, 128, 64, 8, 3), (64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (128, 64, 64, 4, 3), (64, 64, 64, 4, 4),
        (64, 64, 128, 4, 3), (128, 128, 64, 4, 3), (128, 256, 64, 8, 3),
    ),
    32: (
        (64, 128, 32, 4, 3), (128, 64, 32, 4, 3), (128, 128, 32, 8, 3), (64, 64, 16, 4, 4), (128, 128, 16, 8, 3),
        (32, 128, 32, 4, 3), (64, 128, 32, 8, 2),
    ),
}  # fmt: skip
FINISHED = (  # kernels that do more than store a tile: in parts, and with room for a second program beside the first
    (128, 128, 64, 8, 3, 4, 128), (64, 128, 64, 4, 3, 4, 128), (64, 64, 64, 4, 3, 2, 128), (128, 64, 64, 8, 3, 2, 128),
    (64, 128, 64, 4, 3, 4, 168), (64, 128, 64, 4, 4, 2), (64, 64, 64, 4, 6, 2), (64, 128, 64, 4, 3, 2),
    (128, 128, 64, 8, 3, 4), (64, 64, 128, 4, 3, 2),
)  # fmt: skip
WARP_SPECIALIZED = {  # block_m, block_n, stages, epilogues, group
    "up": ((128, 128, 5, 2, 8), (128, 128, 6, 4, 8), (128, 64, 6, 1, 8)),
    "down": ((128, 128, 6, 2, 8), (128, 64, 6, 1, 8), (128, 128, 5, 1, 8)),
    "hidden_grad": ((128, 128, 4, 4, 8), (64, 128, 5, 2, 8), (128, 64, 5, 2, 8)),
    "weight_grad": ((128, 128, 6, 4, 8), (128, 128, 5, 2, 8)),
}
LISTED = {
    "up": {16: FINISHED, 32: ROW_TILES[32]},
    "hidden_grad": {16: FINISHED, 32: ROW_TILES[32]},
    "weight_grad": {
        16: (
            (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (64, 128, 64, 4, 3), (128, 64, 64, 4, 3), (64, 128, 64, 4, 4),
            (64, 64, 64, 4, 4), (128, 256, 64, 8, 3), (128, 128, 64, 4, 3), (128, 64, 64, 4, 4),
        ),
        32: ((64, 64, 32, 4, 3), (128, 64, 16, 4, 3), (64, 128, 16, 4, 3), (128, 128, 16, 8, 3), (32, 64, 32, 4, 3)),
    },
    "fused": {
        16: (
            (64, 64, 64, 4, 2), (64, 64, 64, 8, 2), (64, 64, 32, 4, 3), (128, 64, 64, 8, 2), (128, 64, 32, 8, 3),
            (64, 128, 64, 8, 2), (64, 128, 32, 4, 2), (64, 128, 32, 8, 3), (128, 128, 32, 8, 2), (64, 64, 32, 4, 4),
        ),
        32: (),
    },
}  # fmt: skip


def candidates(kernel: str, bits: int, lines: list[Entry], warp_specialized: bool = False) -> list[Config]:
    """Configs to try: those in the lines of a chip, then listed ones; `MOST_CONFIGS` at most.

    Warp-specialized ones are among them where they are asked for.
    """
    mine = [entry.config for entry in lines if (entry.kernel, entry.bits) == (kernel, bits)]
    more = [
        Config(m, n, configs.SUMMED, 4, stages, group, epilogues, warp_specialized=True)
        for m, n, stages, epilogues, group in (WARP_SPECIALIZED.get(kernel, ()) if bits == 16 else ())
    ]
    listed = [_config(*sizes) for sizes in LISTED.get(kernel, ROW_TILES)[bits]]
    known = dict.fromkeys([*mine, *more, *listed])
    return [config for config in known if warp_specialized or not config.warp_specialized][:MOST_CONFIGS]


def _config(m: int, n: int, k: int, warps: int, stages: int, epilogues=1, registers=None) -> Config:
    return Config(m, n, k, warps, stages, epilogues=epilogues, registers=registers)


# ---- compiling, in processes of their own ----------------------------------------------------------------------------


def compiled(shape: Shape, kind: str, place: int, config: Config, chip: tuple[int, int], shared_kib: int) -> str:
    """Compiles one launch for this chip into Triton's cache on disk; says what is wrong with it, or nothing."""
    from triton.runtime.jit import JITFunction

    launch, kernels = JITFunction.run, []

    def compile_only(function, *args, **kwargs):
        kernels.append(launch(function, *args, **(kwargs | {"warmup": True})))

    try:
        this_chip = mock.patch.object(configs, "chip", lambda _: chip)
        with mock.patch.object(JITFunction, "run", compile_only), this_chip:
            problems(shape, kind, torch.device("meta"), chip[1])[place].run(config)
        for kernel in kernels:
            kernel._init_handles()  # loads it, which tells what it takes
            if kernel.n_spills:
                return f"spills {kernel.n_spills} registers"
            if kernel.metadata.shared > 1024 * shared_kib:
                return f"needs {kernel.metadata.shared / 1024:.0f} KiB of shared memory, {shared_kib} are allowed"
    except Exception as error:  # whatever the compiler says of a candidate
        return told(error)
    return ""


def code_of(shape: Shape, kind: str, place: int, config: Config, chip: tuple[int, int]) -> tuple:
    """What decides the code of a launch: two that agree in it are compiled once."""
    from triton.runtime.jit import JITFunction

    found = []

    def read(function, *args, grid, warmup, **constants):
        kinds = []
        for parameter, arg in zip(function.params, args, strict=False):
            if isinstance(arg, Tensor):
                kinds.append(arg.dtype)
            elif hasattr(arg, "block_shape"):  # a descriptor; Gluon's have a layout, which these two decide
                kinds.append((arg.base.dtype, *arg.block_shape))
            else:  # of integers Triton looks at these two things
                free = arg is None or parameter.do_not_specialize
                kinds.append(arg is None if free else (arg == 1, arg % 16 == 0))
        found.append((function.fn.__module__, function.fn.__name__, *kinds, *constants.items()))

    this_chip = mock.patch.object(configs, "chip", lambda _: chip)
    with mock.patch.object(JITFunction, "run", read), this_chip:
        problems(shape, kind, torch.device("meta"), chip[1])[place].run(config)
    return tuple(found)


def compile_all(
    shapes: list[Shape],
    kind: str,
    lines: list[Entry],
    chip: tuple[int, int],
    shared_kib: int,
    seconds: float,
    kernels: tuple[str, ...] = KERNELS,
) -> dict[tuple[Shape, int, Config], str]:
    """What is wrong with each launch, or nothing; without those that took longer than the seconds."""
    bits, deadline = 8 * DTYPES[kind].itemsize, time.monotonic() + seconds
    workers = max(1, min(12, len(os.sched_getaffinity(0)) - 2))
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    codes: dict[tuple, Future] = {}
    launches: dict[tuple[Shape, int, Config], tuple] = {}
    for shape in shapes:
        with mock.patch.object(configs, "chip", lambda _: chip):
            listed = problems(shape, kind, torch.device("meta"), chip[1])
        for place, problem in enumerate(listed):
            if problem.kernel not in kernels:
                continue
            for config in candidates(problem.kernel, bits, lines, problem.warp_specialized):
                code = launches[shape, place, config] = code_of(shape, kind, place, config, chip)
                if code not in codes:
                    codes[code] = pool.submit(compiled, shape, kind, place, config, chip, shared_kib)
    wait(codes.values(), timeout=max(1.0, deadline - time.monotonic()))
    said = {
        code: told(task.exception()) if task.exception() else task.result()
        for code, task in codes.items()
        if task.done()
    }
    if len(said) < len(codes):
        print(f"{len(codes) - len(said)} of {len(codes)} kernels were not compiled in time")
    pool.shutdown(wait=False, cancel_futures=True)
    return {launch: said[code] for launch, code in launches.items() if code in said}


# ---- timing ----------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What a sweep measured.

    Attributes:
        times: seconds by config, of each problem (its name), of each bucket.
        skipped: config -> why, of each problem.
    """

    times: dict[Bucket, dict[str, dict[Config, float]]]
    skipped: dict[str, dict[Config, str]]


def sweep(
    shapes: list[Shape],
    kind: str,
    device: torch.device,
    lines: list[Entry],
    processors: int,
    faults: Callable[[Shape, int, Config], str],
    clock: Callable[[Callable[[], object]], float],
    seconds: float,
    kernels: tuple[str, ...] = KERNELS,
) -> Found:
    """Times every candidate of every problem.

    Args:
        shapes: in the order in which they are taken.
        kind: one of `DTYPES`.
        device: where the kernels run.
        lines: of the table, for this chip.
        processors: of the chip.
        faults: what is known to be wrong with a launch, or nothing.
        clock: seconds of a call.
        seconds: no new problem after that long.
        kernels: whose problems.
    """
    found, bits = Found({}, {}), 8 * DTYPES[kind].itemsize
    deadline = time.monotonic() + seconds
    for shape in shapes:
        for place, problem in enumerate(problems(shape, kind, device, processors)):
            if time.monotonic() > deadline:
                return found
            if problem.kernel not in kernels:
                continue
            can = problem.warp_specialized
            bucket = bucket_of(problem.kernel, bits, shape.glu, shape.rows // shape.experts, problem.width, can)
            name = f"{shape.name}: {problem.kernel}, {problem.role}"
            times, skipped = {}, found.skipped.setdefault(name, {})
            current = _current(lines, bucket)
            expected = None
            for config in [current, *(c for c in candidates(problem.kernel, bits, lines, can) if c != current)]:
                fault = faults(shape, place, config) if config != current else ""
                try:
                    if not fault:
                        result = _comparable(problem, config)
                        expected = expected or result
                        fault = _wrong(result, expected, AGREE[bits])
                    if not fault:
                        times[config] = clock(partial(problem.run, config))
                except Exception as error:  # a config the chip refuses
                    fault = told(error)
                if fault:
                    skipped[config] = fault
            found.times.setdefault(bucket, {})[name] = times
    return found


def _current(lines: list[Entry], bucket: Bucket) -> Config:
    rows, width = bucket.max_rows or MOST, bucket.max_width or MOST
    return picked(lines, bucket.kernel, bucket.bits, bucket.glu, rows, width, bucket.warp_specialized)


def _comparable(problem: Problem, config: Config) -> list[Tensor]:
    """Results that do not depend on the config: the parts of the gates' gradient are added up."""
    results = [t for t in problem.run(config) if t is not None and t.numel()]
    return [t.sum(0) if problem.kernel == "hidden_grad" and i == 2 else t for i, t in enumerate(results)]


def _wrong(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> str:
    pairs = zip(actual, expected, strict=True)
    worst = max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)
    return "" if worst <= tolerance else f"differs from the table's by {worst:.1e}"


def gpu_seconds(step: Callable[[], object]) -> float:
    """Seconds of a launch on the GPU, from graphs of about 2 ms."""
    step()
    once = min(interleaved({"": step}, torch.device("cuda"), rounds=1, seconds=0)[""])
    return graph_seconds(step, seconds=0.0, calls=max(1, min(200, int(2e-3 / once))))


def choose(found: Found, lines: list[Entry]) -> dict[Bucket, Config]:
    """The best config of every bucket in which one ran on all problems.

    What was measured where warp-specialized kernels can run counts for calls that cannot run them, too, without these.
    """
    chosen, measured = {}, {bucket: dict(times) for bucket, times in found.times.items()}
    for bucket, times in found.times.items():
        if bucket.warp_specialized:
            plain = {name: {c: t for c, t in one.items() if not c.warp_specialized} for name, one in times.items()}
            measured.setdefault(replace(bucket, warp_specialized=False), {}).update(plain)
    for bucket, times in measured.items():
        if set.intersection(*(set(by_config) for by_config in times.values())):
            chosen[bucket] = best(times, _current(lines, bucket))
    return chosen


def report(found: Found, chosen: dict[Bucket, Config], lines: list[Entry]) -> list[str]:
    """Per problem: microseconds with the table's config and with the chosen one, and what was skipped."""
    said = [f"{'problem':58}{'table us':>9}{'new us':>9}{'gain':>6}  config"]
    for bucket, times in found.times.items():
        for name, by_config in times.items():
            old, new = by_config.get(_current(lines, bucket)), by_config.get(chosen.get(bucket))
            cells = "".join(f"{1e6 * t:9.1f}" if t else f"{'-':>9}" for t in (old, new))
            gain = f"{old / new:6.2f}" if old and new else f"{'-':>6}"
            said.append(f"{name:58}{cells}{gain}  {short(chosen[bucket]) if bucket in chosen else ''}")
    for name, skipped in found.skipped.items():
        said += [f"skipped, {name}: {short(config)}: {why}" for config, why in skipped.items()]
    return said


def short(config: Config) -> str:
    more = f" epilogues {config.epilogues}" if config.epilogues != 1 else ""
    more += f" registers {config.registers}" if config.registers else ""
    more += f" group {config.group} warp-specialized" if config.warp_specialized else ""
    return f"{config.block_m}x{config.block_n}x{config.block_k} w{config.warps} s{config.stages}{more}"


def changed(old: str, new: str) -> list[str]:
    """The lines that differ."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0)
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="for compiling and timing together")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--rows", type=int, nargs="*", help=f"which shapes, 0 to {len(SHAPES) - 1}")
    parser.add_argument("--kernels", nargs="*", choices=KERNELS, default=KERNELS, help="which kernels")
    parser.add_argument("--write", action="store_true", help=f"write {configs.TABLE.relative_to(ROOT)}")
    parser.add_argument("--out", type=Path, help="write the table there")
    args = parser.parse_args()
    began = time.monotonic()
    if not torch.cuda.is_available():
        print("no GPU here: tile sizes are measured on one")
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    arch, processors = configs.chip(device)
    table = list(configs.entries())
    known = newest_known(table, arch)
    lines = [entry for entry in table if entry.arch == known]
    shapes = [SHAPES[i] for i in (args.rows if args.rows is not None else range(len(SHAPES)))]
    torch.manual_seed(0)
    shared_kib = SHARED_KIB.get(known, min(SHARED_KIB.values()))
    seconds, kernels = COMPILE_SHARE * args.seconds, tuple(args.kernels)
    said = compile_all(shapes, args.dtype, lines, (arch, processors), shared_kib, seconds, kernels)
    print(f"{len(said)} launches compiled in {time.monotonic() - began:.0f} s")

    def fault(*launch) -> str:
        return said.get(launch, "not compiled in time")

    left = args.seconds - (time.monotonic() - began)
    with precision(args.dtype):
        found = sweep(shapes, args.dtype, device, lines, processors, fault, gpu_seconds, left, kernels)
    chosen = choose(found, lines)
    print("\n".join(report(found, chosen, lines)))
    new = text(merged(table, arch, chosen))
    print("\n".join(["changed lines:", *changed(configs.TABLE.read_text(), new)]))
    print(f"{len(chosen)} buckets measured, {time.monotonic() - began:.0f} s")
    for path in ([configs.TABLE] if args.write else []) + ([args.out] if args.out else []):
        path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
