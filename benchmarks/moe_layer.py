"""The MoE layer against its peers on this machine: `python benchmarks/moe_layer.py [--dtype bf16] [--rows ...]`.

Every provider runs in the same process, rounds interleaved, and each round is compared with the dense MLP of the same
round: an MLP of hidden width k h, which does as many multiplications per token as k experts of width h. The ratio is
the median over rounds. All routed providers pay for the same router; ours pays for the sort tables as well. Before
timing, each provider's output is checked against the reference.
"""

import argparse
import csv
import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from moe_mtl.experts import ExpertBank
from moe_mtl.gates.noisy_topk import NoisyTopKGate
from moe_mtl.kernels import reference
from moe_mtl.memory import keep_freed_memory
from moe_mtl.routing import Routing

CSV = Path(__file__).with_name("results.csv")
COLUMNS = [
    "date", "op", "provider", "mode", "dtype", "tokens", "dim", "hidden", "experts", "k", "activation", "glu",
    "best_ms", "median_ms", "ratio_dense", "ratio_p20", "ratio_p80", "rounds", "threads", "allocator", "cpu", "torch",
    "commit",
]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One shape; the names are those of the axis legend in moe_mtl.routing."""

    tokens: int
    dim: int
    hidden: int
    experts: int
    k: int
    glu: bool = False

    @property
    def activation(self) -> str:
        return "silu" if self.glu else "gelu"

    def __str__(self) -> str:
        return f"T{self.tokens} D{self.dim} H{self.hidden} E{self.experts} k{self.k}" + " silu-glu" * self.glu


ROWS = (
    Row(1576, 384, 1536, 16, 2),
    Row(1576, 384, 1536, 16, 2, glu=True),
    Row(1576, 384, 384, 16, 4),
    Row(1008, 384, 384, 16, 4),
    Row(197, 384, 384, 16, 4),
    Row(394, 192, 192, 16, 4),
    Row(64, 96, 96, 16, 4),
)


class Dense(nn.Module):
    """The upper bound: one MLP of the same active width."""

    def __init__(self, row: Row):
        super().__init__()
        self.first = nn.Linear(row.dim, row.hidden * row.k * (1 + row.glu))
        self.second = nn.Linear(row.hidden * row.k, row.dim)
        self.glu, self.act = row.glu, F.silu if row.glu else F.gelu

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        if self.glu:
            gate, up = z.chunk(2, dim=-1)
            return self.second(self.act(gate) * up)
        return self.second(self.act(z))


def grouped_mm(bank: ExpertBank, x: Tensor, routing: Routing) -> Tensor:
    """torch's own grouped product, the way its layers are usually written. It takes no bias: added by row."""
    m, k = routing.indices.shape
    ids, order = routing.indices.flatten().sort(stable=True)
    ends = torch.bincount(ids, minlength=bank.num_experts).cumsum(0).int()
    z = F.grouped_mm(x[order // k], bank.w1.mT, offs=ends)
    z = z if bank.b1 is None else z + bank.b1[ids]
    if bank.glu:
        gate, up = z.chunk(2, dim=-1)
        h = F.silu(gate) * up
    else:
        h = F.gelu(z)
    ys = F.grouped_mm(h, bank.w2.mT, offs=ends)
    ys = ys if bank.b2 is None else ys + bank.b2[ids]
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0]))
    return (ys[inverse].view(m, k, -1) * routing.weights[..., None]).sum(1).to(x.dtype)


def transformers_eager(row: Row, bank: ExpertBank) -> nn.Module:
    """transformers' loop over experts (Mixtral's, experts_implementation "eager"), sharing our weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=row.dim, intermediate_size=row.hidden, num_local_experts=row.experts, num_experts_per_tok=row.k
    )
    config._experts_implementation = "eager"
    experts = MixtralExperts(config)
    experts.gate_up_proj, experts.down_proj = bank.w1, bank.w2
    return experts


def providers(row: Row, dtype: torch.dtype) -> tuple[dict[str, Callable[[Tensor], Tensor]], list[nn.Parameter]]:
    """name -> layer, and all their parameters."""
    gate = NoisyTopKGate(row.dim, row.experts, 1, row.k)
    bank = ExpertBank(row.experts, row.dim, row.hidden, activation=row.activation, glu=row.glu, bias=not row.glu)
    bank.to(dtype)
    dense = Dense(row).to(dtype)

    def loop(x: Tensor) -> Tensor:
        routing = gate(x, 0)
        return reference.moe_mlp(
            x,
            bank.w1,
            bank.b1,
            bank.w2,
            bank.b2,
            routing.weights,
            routing.indices,
            activation=row.activation,
            glu=row.glu,
        )

    layers = {
        "dense": dense,
        "moe_mtl": lambda x: bank(x, gate(x, 0)),
        "reference loop": loop,
        "F.grouped_mm": lambda x: grouped_mm(bank, x, gate(x, 0)),
    }
    if row.glu:
        experts = transformers_eager(row, bank)

        def eager(x: Tensor) -> Tensor:
            routing = gate(x, 0)
            return experts(x, routing.indices, routing.weights)

        layers["transformers eager"] = eager
    return layers, [*gate.parameters(), *bank.parameters(), *dense.parameters()]


def check(layers: dict[str, Callable], x: Tensor) -> None:
    """No timing of a wrong answer: every routed provider agrees with the reference loop."""
    with torch.no_grad():
        torch.manual_seed(1)
        expected = layers["reference loop"](x).float()
        for name, layer in layers.items():
            torch.manual_seed(1)  # the gate draws its noise anew
            error = (layer(x).float() - expected).norm() / expected.norm()
            if name != "dense" and error > (1e-5 if x.dtype == torch.float32 else 2e-2):
                raise SystemExit(f"{name}: relative error {error:.1e} against the reference, not timed")


def measure(row: Row, dtype: torch.dtype, rounds: int, seconds: float) -> dict[tuple[str, str], list[float]]:
    """(mode, provider) -> seconds per round, the same round at the same place in every list."""
    torch.manual_seed(0)
    layers, parameters = providers(row, dtype)
    x = torch.randn(row.tokens, row.dim, dtype=dtype)
    cotangent = torch.randn(row.tokens, row.dim, dtype=dtype)
    check(layers, x)
    leaf = x.clone().requires_grad_()

    def forward(layer):
        with torch.no_grad():
            layer(x)

    def forward_backward(layer):
        layer(leaf).backward(cotangent)
        leaf.grad = None
        for p in parameters:
            p.grad = None

    times: dict[tuple[str, str], list[float]] = {}
    for mode, step in (("fwd", forward), ("fwd+bwd", forward_backward)):
        repeats = {}
        for name, layer in layers.items():
            step(layer)
            start = time.perf_counter()
            step(layer)
            # short calls are repeated within a round, so that a round is long against the clock and a time slice
            repeats[name] = max(1, min(50, int(0.01 / (time.perf_counter() - start))))
        began = time.perf_counter()
        for i in range(rounds):
            if i >= 5 and time.perf_counter() - began > seconds:
                break
            for name, layer in layers.items():
                start = time.perf_counter()
                for _ in range(repeats[name]):
                    step(layer)
                times.setdefault((mode, name), []).append((time.perf_counter() - start) / repeats[name])
    return times


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=CSV.parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--allocator",
        choices=("keep", "default"),
        default="keep",
        help="keep: freed memory stays in the process, as train.py has it; default: the C library's way",
    )
    parser.add_argument("--rounds", type=int, default=31, help="at most this many rounds per shape and mode")
    parser.add_argument("--seconds", type=float, default=8, help="at most this long per shape and mode, but 5 rounds")
    parser.add_argument("--rows", type=int, nargs="*", help=f"which shapes, 0 to {len(ROWS) - 1}; all by default")
    parser.add_argument("--no-csv", action="store_true", help=f"print only, append nothing to {CSV.name}")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.allocator == "keep":
        keep_freed_memory()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]

    console = Console(width=max(120, Console().width))
    load = os.getloadavg()[0]
    if busy := load > 0.5:
        console.print(
            f"The machine is busy (load {load:.1f}): threads wait for each other and no number below means anything. "
            f"Nothing is appended to {CSV.name}.",
            style="bold red",
        )
    where = f"{args.threads} threads, allocator {args.allocator}, {cpu_name()}, torch {torch.__version__}"
    table = Table(title=f"MoE layer, {args.dtype}, {where}")
    for column in ("shape", "provider", "fwd ms", "x dense", "fwd+bwd ms", "x dense", "p20-p80"):
        table.add_column(column, justify="left" if column in ("shape", "provider") else "right")
    lines = []
    for row in ROWS if args.rows is None else [ROWS[i] for i in args.rows]:
        times = measure(row, dtype, args.rounds, args.seconds)
        cells: dict[str, list[str]] = {}
        for (mode, name), seconds in times.items():
            ratios = sorted(a / b for a, b in zip(seconds, times[mode, "dense"], strict=True))
            middle = statistics.median(ratios)
            low, high = ratios[len(ratios) // 5], ratios[-1 - len(ratios) // 5]
            cells.setdefault(name, []).extend([f"{1e3 * min(seconds):.3f}", f"{middle:.2f}"])
            if mode == "fwd+bwd":
                cells[name].append(f"{low:.2f}-{high:.2f}")
            facts = (
                datetime.date.today().isoformat(), "moe_layer", name, mode, args.dtype, row.tokens, row.dim, row.hidden,
                row.experts, row.k, row.activation, int(row.glu), f"{1e3 * min(seconds):.4f}",
                f"{1e3 * statistics.median(seconds):.4f}", f"{middle:.3f}", f"{low:.3f}", f"{high:.3f}", len(seconds),
                args.threads, args.allocator, cpu_name(), torch.__version__, commit(),
            )  # fmt: skip
            lines.append(facts)
        for i, (name, values) in enumerate(cells.items()):
            table.add_row(str(row) if i == 0 else "", name, *values, end_section=i == len(cells) - 1)
    console.print(table)
    if not args.no_csv and not busy:
        new = not CSV.exists()
        with CSV.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(COLUMNS)
            writer.writerows(lines)


if __name__ == "__main__":
    main()
