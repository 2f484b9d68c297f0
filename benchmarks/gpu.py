"""All that a machine with an NVIDIA GPU has to show, in at most 10 minutes and without a network: `make gpu`, or

    python3 benchmarks/gpu.py OUTDIR

in a bare checkout, with torch and triton and no installation. In this order:

    machine       versions, ceilings of products and copies
    fp32 ... bf16 every kernel against float64 at small odd sizes, fresh memory poisoned, zeros must fail
    table         every entry of kernels/configs.json for this chip, against float64
    plan          the sort tables of the GPU's kernels against torch's
    determinism   runs give the same bits, replayed ones too
    graph         a captured forward on other tokens and ids; nothing waits for the GPU
    memory        what a forward saves, as autograd and as the allocator see it
    tune          benchmarks/tune.py; OUTDIR/configs.json, the table in the tree stays
    harness       benchmarks/moe_layer.py with the table in the tree, bf16; OUTDIR/results.csv

Each is a process of its own with a deadline, so one that fails, hangs or breaks the GPU context leaves the others
alone; the dtypes are several each, since compiling kernels is what takes the time. What it prints is OUTDIR/<name>.log.
A short table comes last. Exit code 1 where something is wrong or was not checked to the end, 2 without a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # a bare checkout will do

import torch  # noqa: E402
from checks import (  # noqa: E402
    DTYPES,
    Case,
    Report,
    cases,
    check_config,
    check_frozen,
    check_linear,
    check_mlp,
    check_plan,
    draw_ids,
    draw_leaves,
    poisoned,
    precision,
)
from gpu_summary import CHECKS, files_of, part_of, summary  # noqa: E402
from measure import captured, saved_bytes, sync_forbidden  # noqa: E402
from records import machine  # noqa: E402
from roofline import ceilings, saved_limit  # noqa: E402
from shapes import SHAPES  # noqa: E402

from moe_mtl.kernels import configs, ops  # noqa: E402

CHECKED_BY = 0.34  # of all seconds
TUNED_BY = 0.6
MEASURED_BY = 0.97
GRACE_S = 15  # beyond its seconds, before a step is ended from outside
FROZEN_CASES = 3

Step = Iterator[Report]  # one report after the other, until all is checked


def values(kind: str, device: torch.device, count: int, part: int = 0, parts: int = 1) -> Step:
    """Every kernel in one dtype: training, inference, one linear layer, and gradients asked for alone.

    Args:
        kind: of `checks.DTYPES`.
        device: where the kernels run.
        count: cases of all parts together.
        part: which part of them is checked, from 0.
        parts: how many there are.
    """
    draws = 0 if device.type == "cuda" else 2  # the interpreter is slow
    for i, case in [*enumerate(cases(count))][part::parts]:
        yield check_mlp(case, kind, device, "triton", draws)
        yield check_linear(case, kind, device, "triton", draws)
        if i < FROZEN_CASES:
            yield check_frozen(case, kind, device, "triton")


def table(device: torch.device) -> Step:
    """Every entry that this chip and this Triton use."""
    from moe_mtl.kernels.triton_launch import runs_gluon

    arch, _ = configs.chip(device)
    known = [entry.arch for entry in configs.entries() if entry.arch <= arch]
    for entry in configs.entries():
        if known and entry.arch == max(known) and (runs_gluon(device) or not entry.config.warp_specialized):
            yield check_config(entry, device)


def plans(device: torch.device) -> Step:
    """Sort tables of few and many slots and experts."""
    many = (1, 3, 64, 2049, 8192, 8193, 32256, 100864) if device.type == "cuda" else (3, 130)
    for rows in many:
        for experts in (1, 2, 5, 16, 64, 127) if device.type == "cuda" else (5,):
            for dtype in (torch.int32, torch.int64):
                yield check_plan(rows, experts, dtype, device)


def determinism(device: torch.device) -> Step:
    """The same call gives the same bits: outputs and every gradient, with weight gradients split and not split.

    Called in full, then watched, then made again from the record (`moe_mtl.kernels.triton_replay`). Few large experts
    without gated units are what warp-specialized kernels are for, those of weights' gradients if they are not too few.
    """
    sizes = (
        ((2048, 4, 4, 384, 768, 384), (4096, 3, 16, 768, 768, 768), (300, 2, 16, 192, 96, 192))
        if device.type == "cuda"
        else ((9, 2, 3, 16, 16, 16),)
    )
    for case in (Case(*size, glu=glu, ids="some unused") for size in sizes for glu in (False, True)):
        for kind in DTYPES:
            leaves, idx = draw_leaves(case, kind, device)
            cotangent = torch.randn(case.tokens, case.out, device=device).to(DTYPES[kind])
            options = {"activation": case.activation, "glu": case.glu, "backend": "triton"}
            runs = []
            for _ in range(4):
                with poisoned(), precision(kind):
                    y = ops.routed_mlp(*leaves, idx, **options)
                    runs.append([y, *torch.autograd.grad(y, leaves, cotangent)])
            same = all(torch.equal(a, b) for others in runs[1:] for a, b in zip(runs[0], others, strict=True))
            yield Report(cases=1, failures=[] if same else [f"{kind} {case}: runs differ"])


def graph(device: torch.device) -> Step:
    """Replays of a captured forward agree bit for bit with eager calls; no op waits for the GPU."""
    small, large = (300, 4, 16, 384, 384, 384), (2048, 4, 4, 384, 768, 384)
    for size, glu in ((small, False), (small, True), (large, False)):
        for kind in DTYPES:
            case = Case(*size, glu=glu, bias=not glu, activation="silu" if glu else "gelu")
            leaves, idx = draw_leaves(case, kind, device)
            held = [t if t is None else t.detach() for t in leaves]
            options = {"activation": case.activation, "glu": glu, "backend": "triton"}
            kept: list[torch.Tensor] = []
            failures = []
            with precision(kind):
                with torch.no_grad():
                    replayed = captured(lambda: kept.append(ops.routed_mlp(*held, idx, **options)))  # noqa: B023
                    for ids in ("any", "some unused", "one expert", "none used"):
                        held[0].normal_()
                        held[5].uniform_()
                        idx.copy_(draw_ids(replace(case, ids=ids), device))
                        replayed.replay()
                        if not torch.equal(kept[-1], ops.routed_mlp(*held, idx, **options)):
                            failures.append(f"{kind} {case}: a replay with other tokens, ids: {ids}, differs")
                try:
                    with sync_forbidden():
                        for _ in range(3):  # the last of like calls is a replay
                            y = ops.moe_mlp(*leaves, ops.plan_routing(idx, case.experts), **options)
                            torch.autograd.grad(y, [t for t in leaves if t is not None], torch.ones_like(y))
                except RuntimeError as error:
                    failures.append(f"{kind} {case}: waits for the GPU: {error}")
            yield Report(cases=1, failures=failures)


def memory(device: torch.device) -> Step:
    """x, pre-activation, gates and tables, nothing else, at the shapes of the harness in bf16."""
    for shape in SHAPES:
        case = Case(
            shape.tokens, shape.k, shape.experts, shape.dim, shape.hidden, shape.dim, shape.glu, not shape.glu,
            shape.activation,
        )  # fmt: skip
        leaves, idx = draw_leaves(case, "bf16", device)

        def run(leaves=leaves, idx=idx, shape=shape) -> torch.Tensor:
            return ops.routed_mlp(*leaves, idx, activation=shape.activation, glu=shape.glu, backend="triton")

        tiles = ops.plan_routing(idx, shape.experts).tiles.shape[0]
        allowed = saved_limit(shape, 2, tiles)
        seen = saved_bytes(run, [t for t in leaves[1:5] if t is not None])
        before = _requested()
        y = run()
        taken = _requested() - before - y.nbytes
        fresh = allowed - leaves[0].nbytes - leaves[5].nbytes  # x and gates were there before
        failures = []
        if seen > allowed:
            failures.append(f"{shape.name}: autograd holds {seen} bytes, allowed are {allowed}")
        if taken > fresh:
            failures.append(f"{shape.name}: a forward leaves {taken} bytes behind, allowed are {fresh}")
        del y
        yield Report(cases=1, failures=failures)


def _requested() -> int:
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


def describe(device: torch.device) -> list[str]:
    """Versions and ceilings."""
    facts = machine(device.type)
    where, said = facts["gpu"] or facts["cpu"], []
    for kind in ("bf16", "tf32", "fp32"):
        with precision(kind):
            seen = ceilings(device, DTYPES[kind])
        said.append(f"{kind} {seen.flops_per_s / 1e12:.4g} TFLOP/s")
    return [
        f"{where}, torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}",
        f"{', '.join(said)}, copy {seen.bytes_per_s / 1e12:.3g} TB/s",
    ]


def run_step(
    name: str, out: Path, device: torch.device, seconds: float, count: int, part: int = 0, parts: int = 1
) -> int:
    """Runs one step, or a part of it, in this process and keeps its file in OUTDIR up to date."""
    deadline = time.monotonic() + seconds
    if name == "machine":
        (out / "machine.json").write_text(json.dumps({"lines": describe(device)}))
        return 0
    steps: dict[str, Callable[[], Step]] = {
        kind: lambda kind=kind: values(kind, device, count, part, parts) for kind in DTYPES
    }
    own = {"table": table, "plan": plans, "determinism": determinism, "graph": graph, "memory": memory}
    steps |= {name: lambda step=step: step(device) for name, step in own.items()}
    torch.manual_seed(0)
    total, done = Report(), False

    def keep() -> None:
        found = {"cases": total.cases, "failures": total.failures, "errors": total.errors, "done": done}
        (out / f"{part_of(name, part)}.json").write_text(json.dumps(found, indent=1))

    for report in steps[name]():
        for line in report.failures:
            print(line, flush=True)
        total.add(report)
        keep()
        if time.monotonic() > deadline:
            print(f"stopped after {total.cases} checks: {seconds:.0f} seconds are over")
            return 1
    done = True
    keep()
    print(f"{total.cases} checks, {len(total.failures)} failures, largest errors {total.errors}")
    return int(bool(total.failures))


def spawn(command: list[object], log: Path) -> subprocess.Popen:
    env = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        return subprocess.Popen([sys.executable, *map(str, command)], stdout=file, stderr=subprocess.STDOUT, env=env)


def wait(running: dict[str, subprocess.Popen], until: float) -> dict[str, int]:
    """Exit codes; what still runs then is ended."""
    codes = {}
    for name, process in running.items():
        try:
            codes[name] = process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            codes[name] = process.wait()
    return codes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for logs and results; made when missing")
    parser.add_argument("--seconds", type=float, default=540, help="for everything")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: with TRITON_INTERPRET=1, checks only"
    )
    parser.add_argument("--cases", type=int, default=16, help="sizes per dtype")
    parser.add_argument("--parts", type=int, help="processes per dtype; by default as the processors allow")
    parser.add_argument("--step", help="only that, in this process")
    parser.add_argument("--part", type=int, default=0, help="of the step's parts, only that, from 0")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: make gpu needs an NVIDIA GPU and a CUDA build of torch")
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    parts = args.parts or max(1, (os.cpu_count() or 1) // len(DTYPES) - 1)
    if args.step:
        return run_step(args.step, args.out, torch.device(args.device), args.seconds, args.cases, args.part, parts)
    began = time.monotonic()
    for name in ("machine", *CHECKS, "configs"):
        for old in files_of(args.out, name):
            old.unlink()
    (args.out / "results.csv").unlink(missing_ok=True)

    def left(share: float) -> float:
        return max(1.0, began + share * args.seconds - time.monotonic())

    def step(name: str, share: float, part: int = 0) -> subprocess.Popen:
        options = ["--device", args.device, "--cases", args.cases, "--step", name, "--seconds", left(share)]
        options += ["--part", part, "--parts", parts]
        return spawn([HERE / "gpu.py", args.out, *options], args.out / f"{part_of(name, part)}.log")

    on_gpu = args.device == "cuda"
    codes = {}
    if on_gpu:  # alone: it measures
        codes |= wait({"machine": step("machine", CHECKED_BY)}, time.monotonic() + left(CHECKED_BY))
    checks = [name for name in CHECKS if on_gpu or name not in ("table", "graph", "memory")]
    running = {
        part_of(name, part): step(name, CHECKED_BY, part)
        for name in checks
        for part in range(parts if name in DTYPES else 1)
    }
    codes |= wait(running, time.monotonic() + left(CHECKED_BY) + GRACE_S)
    if on_gpu:
        seconds = left(TUNED_BY)
        tune = [HERE / "tune.py", "--seconds", max(1.0, seconds - GRACE_S), "--out", args.out / "configs.json"]
        codes |= wait({"tune": spawn(tune, args.out / "tune.log")}, time.monotonic() + seconds)
        seconds = left(MEASURED_BY)
        harness = [HERE / "moe_layer.py", "--device", "cuda", "--dtype", "bf16", "--csv", args.out / "results.csv"]
        harness += ["--seconds", 0.4, "--budget", max(1.0, seconds - 3 * GRACE_S)]  # the last shape takes its time
        codes |= wait({"harness": spawn(harness, args.out / "harness.log")}, time.monotonic() + seconds)
    lines, wrong = summary(args.out, codes, checks)
    print("\n".join(lines))
    print(f"{time.monotonic() - began:.0f} s; logs in {args.out}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
