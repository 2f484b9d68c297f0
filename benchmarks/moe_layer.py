"""The MoE layer against its peers on this machine: `make bench`, or

    python benchmarks/moe_layer.py [--device cuda] [--dtype bf16] [--rows 0 3 8]

Every provider runs in the same process, rounds interleaved, and each round is compared with the dense MLP of the same
round: an MLP of hidden width k h, which does as many multiplications per token as k experts of width h. Times are
medians over rounds, ratios medians of the rounds' ratios with their 20th and 80th percentile. TFLOP/s counts the
products alone: 4 T k D H forward (6 with a gated unit), three times that with the backward. "limit" is the share of the
speed that the roofline allows (benchmarks/roofline.py), from ceilings measured in the same run. "saved" is what the
experts keep for their backward, without weights.

All routed providers pay for the same router: the library's gate (`--router noisy_topk`, the default on a CPU), or none:
weights and ids are given (`--router given`, the default on a GPU, where the limit speaks of the experts alone). Ours
pays for the sort tables as well. On a GPU, forward and forward with backward are also timed under a CUDA graph.

Nothing is timed that is not right: first the ops' outputs and gradients are checked on small sizes, where a failure
ends the run, then every provider's output against the reference at every shape.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout will do

import torch
from checks import DTYPES, SIZES, Case, check_mlp, precision
from measure import WaitsForGPU, captured, interleaved, saved_bytes
from peers import Provider, providers, told
from records import CSV, append, columns_fit, cpu_name, machine, triton_version
from roofline import Ceilings, Limits, ceilings, limits, saved_limit
from shapes import SHAPES, Shape
from torch import Tensor

from moe_mtl.gates.noisy_topk import NoisyTopKGate
from moe_mtl.kernels import dispatch, ops
from moe_mtl.memory import keep_freed_memory
from moe_mtl.routing import Routing

CPU_FLOPS = 20e9  # of a forward; larger shapes take minutes each on a CPU
BUSY = 0.5  # load above which a CPU is not free to measure
OVER_GROUPED_MM = 1.3
GRAPH_TARGETS_US = {"ViT-S, one image": 12.0}
TOLERANCE = {"fp32": 1e-5, "tf32": 5e-3, "fp16": 1e-2, "bf16": 4e-2}  # relative norm, between two of the same dtype
OURS, GROUPED, REFERENCE = "moe_mtl", "F.grouped_mm", "reference loop"


@dataclass
class Result:
    """What was measured of one shape.

    Attributes:
        shape: the layer.
        seconds: by mode and provider, one per round.
        saved: bytes kept for the backward by each routed provider.
        allowed: bytes that ours may keep.
        limits: least seconds.
        notes: what did not run and why.
    """

    shape: Shape
    limits: Limits
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)
    allowed: int = 0
    notes: list[str] = field(default_factory=list)

    def median(self, mode: str, name: str) -> float:
        return statistics.median(self.seconds[mode][name])

    def ratios(self, mode: str, name: str, to: str = "dense") -> list[float]:
        """Of the rounds, in ascending order."""
        times = self.seconds[mode]
        return sorted(a / b for a, b in zip(times[name], times[to], strict=True))

    def tflops(self, mode: str, name: str) -> float:
        return self.shape.forward_flops * (3 if mode.endswith("bwd") else 1) / self.median(mode, name) / 1e12

    def share(self, mode: str, name: str) -> float:
        """Of the limit: 1 is as fast as it."""
        return self.limits.of(mode) / self.median(mode, name)


def red_ops(device: torch.device, kind: str) -> list[str]:
    """What is wrong with the ops about to be timed, on small sizes, for every backend that runs here."""
    auto = dispatch.resolve("auto", torch.empty(0, device=device))
    backends = ["auto", *(b for b in ("cpu", "grouped_mm") if b != auto)]
    said = []
    torch.manual_seed(0)
    for backend in backends:
        for glu, ids in ((False, SIZES["ids"][1]), (True, SIZES["ids"][2])):
            case = Case(64, 2, 5, 48, 96, 48, glu=glu, bias=not glu, activation="silu" if glu else "gelu", ids=ids)
            try:
                found = check_mlp(case, kind, device, backend).failures
            except Exception as error:  # a backend that nobody chose may be unable to run here
                found = [told(error)] if backend == "auto" else []
            said += [f"backend {backend!r}: {line}" for line in found]
    return said


def given_routing(shape: Shape, device: torch.device) -> Routing:
    """Softmax of random logits, the k largest; the weights are a leaf that takes a gradient."""
    logits = torch.randn(shape.tokens, shape.experts, device=device)
    weights, indices = logits.softmax(-1).topk(shape.k)
    return Routing(weights.requires_grad_(), indices, logits, task=0)


def agreeing(
    made: list[Provider], kind: str, x: Tensor, routing: Routing, cotangent: Tensor, notes: list[str]
) -> list[Provider]:
    """Those that agree with the reference loop: output, gradients of tokens and weights, of ours every gradient.

    A peer that is wrong or fails is named in the notes.

    Raises:
        SystemExit: one of ours is wrong or fails.
    """

    def outcome(provider: Provider, ours: bool) -> list[Tensor]:
        y = provider.run(x, routing)
        leaves = [x, routing.weights, *(provider.parameters if ours else [])]
        return [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]

    expected = outcome(next(p for p in made if p.name == REFERENCE), True)
    kept = []
    for provider in made:
        wrong = ""
        try:
            actual = outcome(provider, provider.ours) if provider.routed else []
            pairs = zip(actual, expected, strict=False)  # a peer has fewer gradients to compare
            errors = [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs]
            wrong = "".join(f" {error:.1e}" for error in errors if not error <= TOLERANCE[kind])
            said = f"{provider.name}: wrong by{wrong} (relative to the reference), not timed" if wrong else ""
        except Exception as failure:  # a peer that cannot run here must not end the run
            said = f"{provider.name}: {told(failure)}"
        if not said:
            kept.append(provider)
        elif provider.name == OURS or (provider.ours and wrong):
            raise SystemExit(said)
        else:
            notes.append(said)
    return kept


def measured(
    shape: Shape, kind: str, device: torch.device, router: str, seen: Ceilings, rounds: int, seconds: float
) -> Result:
    """Times every provider in every mode."""
    torch.manual_seed(0)
    dtype = DTYPES[kind]
    result = Result(shape, limits(shape, dtype.itemsize, *seen))
    made, failed = providers(shape, dtype, device)
    result.notes += [f"{name}: {error}" for name, error in failed.items()]
    x, cotangent = (torch.randn(shape.tokens, shape.dim, device=device).to(dtype) for _ in range(2))
    leaf, given = x.clone().requires_grad_(), given_routing(shape, device)
    gate = NoisyTopKGate(shape.dim, shape.experts, 1, shape.k).to(device)
    made = agreeing(made, kind, leaf, given, cotangent, result.notes)
    plan = ops.plan_routing(given.indices, shape.experts)
    result.allowed = saved_limit(shape, dtype.itemsize, plan.tiles.shape[0])
    trained = {id(p): p for provider in made for p in provider.parameters} | {id(p): p for p in gate.parameters()}
    cleared = [leaf, given.weights, *trained.values()]

    def output(provider: Provider, tokens: Tensor) -> Tensor:
        return provider.run(tokens, gate(tokens, 0) if router == "noisy_topk" and provider.routed else given)

    def forward(provider: Provider) -> None:
        with torch.no_grad():
            output(provider, x)

    def forward_backward(provider: Provider) -> None:
        output(provider, leaf).backward(cotangent)
        for t in cleared:
            t.grad = None

    for mode, step in (("fwd", forward), ("fwd+bwd", forward_backward)):
        steps = {p.name: partial(step, p) for p in made}
        ran = _tried(steps, result.notes, mode, needed=("dense", OURS))
        steps = {name: steps[name] for name in ran}
        result.seconds[mode] = interleaved(steps, device, rounds, seconds)
        if device.type == "cuda":
            mode = f"graph {mode}"
            graphs = _tried({name: partial(captured, s) for name, s in steps.items()}, result.notes, mode)
            if "dense" in graphs:
                replays = {name: graph.replay for name, graph in graphs.items()}
                result.seconds[mode] = interleaved(replays, device, rounds, seconds)
    for provider in made:
        if provider.routed and provider.name in result.seconds["fwd+bwd"]:
            run = partial(provider.run, leaf, given)
            result.saved[provider.name] = saved_bytes(run, list(trained.values()))
    return result


def _tried(steps: dict[str, Callable], notes: list[str], mode: str, needed: tuple[str, ...] = ()) -> dict[str, Any]:
    """What each step returns; one that fails is named in the notes, unless it is needed."""
    results, waiting = {}, []
    for name, step in steps.items():
        try:
            results[name] = step()
        except WaitsForGPU:
            waiting.append(name)
        except Exception as failure:  # a peer that cannot run here must not end the run
            if name in needed:
                raise
            notes.append(f"{name}, {mode}: {told(failure)}")
    if waiting:
        notes.append(f"{mode}: not {', '.join(waiting)}, which wait for the GPU")
    return results


# ---- printing --------------------------------------------------------------------------------------------------------


def report(result: Result) -> list[str]:
    """The table of one shape."""
    shape, least = result.shape, result.limits
    lines = [
        f"{shape.name}: {shape}",
        f"  limit: forward {_time(least.infer)}, forward + backward {_time(least.train_fwd + least.bwd)}; "
        f"x, pre-activation and tables: {result.allowed / 1e6:.2f} MB",
    ]
    for pair in (("fwd", "fwd+bwd"), ("graph fwd", "graph fwd+bwd")):
        modes = [mode for mode in pair if result.seconds.get(mode)]
        if not modes:
            continue
        lines.append(f"  {'':24}" + "".join(f"|{mode:^49}" for mode in modes) + "|   saved")
        head = f"{'time':>11}{'TFLOP/s':>9}{'x dense':>9}{'p20-p80':>14}{'limit':>6}"
        lines.append(f"  {'':24}" + f"|{head}" * len(modes) + "|      MB")
        for name in result.seconds[modes[0]]:
            cells = "".join(f"|{_cell(result, mode, name):49}" for mode in modes)
            saved = f"{result.saved[name] / 1e6:8.2f}" if name in result.saved else ""
            lines.append(f"  {name:24}{cells}|{saved}".rstrip())
    return lines + [f"  {note}" for note in result.notes]


def _cell(result: Result, mode: str, name: str) -> str:
    if name not in result.seconds[mode]:
        return ""
    ratios = result.ratios(mode, name)
    low, high = _percentiles(ratios)
    speed = f"{_time(result.median(mode, name)):>11}{result.tflops(mode, name):9.3g}"
    return f"{speed}{statistics.median(ratios):9.2f}{f'{low:.2f}-{high:.2f}':>14}{result.share(mode, name):6.0%}"


def _percentiles(ratios: list[float]) -> tuple[float, float]:
    return ratios[len(ratios) // 5], ratios[-1 - len(ratios) // 5]


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:.1f} us" if seconds < 1e-3 else f"{1e3 * seconds:.2f} ms"


def targets(result: Result, on_gpu: bool) -> list[tuple[str, float, bool]]:
    """What was aimed at: a line, the ratio to the target (1 is just reached), and whether it was reached.

    Speed has targets on a GPU only, in training for the eager call.
    """
    shape, mode, found = result.shape, "fwd+bwd", []

    def add(what: str, ratio: float) -> None:
        found.append((what, ratio, ratio >= 1))

    if on_gpu and shape.share is not None:
        share, graph = result.share(mode, OURS), ""
        if OURS in result.seconds.get(f"graph {mode}", {}):
            graph = f" ({result.share(f'graph {mode}', OURS):.0%} in a graph)"
        add(f"training at {share:.0%} of the limit{graph}, target {shape.share:.0%}", share / shape.share)
    if on_gpu and GROUPED in result.seconds[mode]:
        speedup = statistics.median(result.ratios(mode, GROUPED, OURS))
        add(f"training {speedup:.2f}x as fast as {GROUPED}, target {OVER_GROUPED_MM}", speedup / OVER_GROUPED_MM)
    saved = result.saved[OURS]
    add(f"saves {saved / 1e6:.2f} MB, target {result.allowed / 1e6:.2f} MB", result.allowed / saved)
    if on_gpu and shape.name in GRAPH_TARGETS_US and OURS in result.seconds.get("graph fwd", {}):
        took, aim = 1e6 * result.median("graph fwd", OURS), GRAPH_TARGETS_US[shape.name]
        add(f"inference in {took:.1f} us in a graph, target {aim:g} us", aim / took)
    return found


def rows_of(result: Result, common: dict[str, object]) -> list[dict[str, object]]:
    """One line of the CSV per mode and provider."""
    shape, lines = result.shape, []
    sizes = {
        "shape": shape.name, "tokens": shape.tokens, "dim": shape.dim, "hidden": shape.hidden, "experts": shape.experts,
        "k": shape.k, "activation": shape.activation, "glu": int(shape.glu),
    }  # fmt: skip
    for mode, by_name in result.seconds.items():
        for name, seconds in by_name.items():
            ratios = result.ratios(mode, name)
            low, high = _percentiles(ratios)
            times = {
                "provider": name, "mode": mode, "best_ms": f"{1e3 * min(seconds):.4f}",
                "median_ms": f"{1e3 * result.median(mode, name):.4f}", "rounds": len(seconds),
                "ratio_dense": f"{statistics.median(ratios):.3f}", "ratio_p20": f"{low:.3f}",
                "ratio_p80": f"{high:.3f}", "tflops": f"{result.tflops(mode, name):.4g}",
                "limit_share": f"{result.share(mode, name):.3f}", "saved_bytes": result.saved.get(name, ""),
            }  # fmt: skip
            lines.append(common | sizes | times)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="fp32 on a CPU, bf16 on a GPU by default")
    parser.add_argument("--router", choices=("noisy_topk", "given"), help="see above")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument(
        "--allocator",
        choices=("keep", "default"),
        default="keep",
        help="keep: freed memory stays in the process, as train.py has it; default: the C library's way",
    )
    parser.add_argument("--rounds", type=int, default=31, help="at most this many rounds per shape and mode")
    parser.add_argument("--seconds", type=float, default=8, help="at most this long per shape and mode, but 5 rounds")
    parser.add_argument("--budget", type=float, help="no new shape after that many seconds")
    parser.add_argument("--rows", type=int, nargs="*", help=f"which shapes, 0 to {len(SHAPES) - 1}")
    parser.add_argument("--all", action="store_true", help="also the shapes that take minutes each on a CPU")
    parser.add_argument("--csv", type=Path, default=CSV, help="append the results there")
    parser.add_argument("--no-csv", action="store_true", help="print only")
    args = parser.parse_args()
    began = time.perf_counter()
    device = torch.device(args.device)
    kind = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    router = args.router or ("given" if args.device == "cuda" else "noisy_topk")
    if not columns_fit(args.csv):
        raise SystemExit(f"{args.csv}: its columns are not those of benchmarks/records.py; nothing would be appended")
    torch.set_num_threads(args.threads)
    if args.allocator == "keep":
        keep_freed_memory()
    busy = device.type == "cpu" and os.getloadavg()[0] > BUSY
    if busy:
        print(
            f"THE MACHINE IS BUSY (load {os.getloadavg()[0]:.1f}): threads wait for each other and no number below "
            "means anything. Nothing is appended.\n"
        )
    if red := red_ops(device, kind):
        raise SystemExit("the ops are wrong on this machine, nothing is timed:\n  " + "\n  ".join(red))
    with precision(kind):
        seen = ceilings(device, DTYPES[kind])
        where = cpu_name() if device.type == "cpu" else torch.cuda.get_device_name()
        print(
            f"{where}, {kind}, router: {router}, torch {torch.__version__}, triton {triton_version()}"
            + (f", {args.threads} threads, allocator {args.allocator}" if device.type == "cpu" else "")
            + f"\nceilings: {seen.flops_per_s / 1e12:.4g} TFLOP/s, {seen.bytes_per_s / 1e9:.4g} GB/s"
        )
        common = machine(args.device) | {"op": "moe_layer", "dtype": kind, "router": router}
        common |= {"threads": args.threads, "allocator": args.allocator} if device.type == "cpu" else {}
        aims = []
        for shape in SHAPES if args.rows is None else [SHAPES[i] for i in args.rows]:
            if device.type == "cpu" and shape.forward_flops > CPU_FLOPS and not (args.all or args.rows):
                print(f"\n{shape.name}: left out, {shape.forward_flops / 1e9:.0f} GFLOP; --all measures it")
                continue
            if args.budget and time.perf_counter() - began > args.budget:
                print(f"\n{shape.name}: left out, the {args.budget:g} seconds are over")
                continue
            result = measured(shape, kind, device, router, seen, args.rounds, args.seconds)
            print("\n" + "\n".join(report(result)), flush=True)
            aims += [(shape, *aim) for aim in targets(result, device.type == "cuda")]
            if not args.no_csv and not busy:
                append(args.csv, rows_of(result, common))
            del result
            gc.collect()  # layers of peers hold each other
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print("\ntargets (1 is just reached)")
    for shape, what, ratio, reached in aims:
        print(f"  {shape.name:26} {ratio:6.2f} {'reached' if reached else 'MISSED '}  {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
