"""A training step of MMoE on a table against dense and per-expert peers: `python benchmarks/table_step.py`.

    python benchmarks/table_step.py [--batch 4096] [--columns 500] [--experts 8] [--width 64] [--tasks 2]

A step is forward, losses, backward and AdamW on one batch of random rows. All providers run in one process, rounds
interleaved; ratios to the shared bottom of as many parameters are medians of the rounds' ratios. The peers are our own
modules in the manner of the libraries they are named after: one module per expert, called in a loop, and one gate and
tower per task, called in a loop; what differs between them is how a task's mixture is written.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout will do

import torch
from measure import interleaved
from records import machine
from torch import Tensor, nn

from moe_mtl import create_model
from moe_mtl.memory import keep_freed_memory
from moe_mtl.tasks import Task

OUT = Path(__file__).with_name("table_step.json")
BOUND = 1.3  # of the step of the shared bottom

# experts' outputs [e, b, h] and one task's weights [b, e] to its mixture [b, h]
MIXTURES: dict[str, Callable[[list[Tensor], Tensor], Tensor]] = {
    "LibMTL style": lambda outputs, gate: torch.einsum("ebh,be->bh", torch.stack(outputs), gate),
    "DeepCTR style": lambda outputs, gate: (gate.unsqueeze(1) @ torch.stack(outputs, dim=1)).squeeze(1),
    "FuxiCTR style": lambda outputs, gate: (gate.unsqueeze(-1) * torch.stack(outputs, dim=1)).sum(dim=1),
}


class PerExpert(nn.Module):
    """MMoE as one module per expert, gate and tower."""

    def __init__(self, dim: int, experts: int, width: int, tower: int, tasks: int, mix: Callable):
        super().__init__()
        self.mix = mix
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(dim, width), nn.ReLU()) for _ in range(experts)])
        self.gates = nn.ModuleList([nn.Linear(dim, experts) for _ in range(tasks)])
        self.towers = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, tower), nn.ReLU(), nn.Linear(tower, 1)) for _ in range(tasks)]
        )

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = x["vector"]
        outputs = [expert(rows) for expert in self.experts]
        mixed = [self.mix(outputs, gate(rows).softmax(dim=-1)) for gate in self.gates]
        return {f"task{i}": tower(y).squeeze(1) for i, (tower, y) in enumerate(zip(self.towers, mixed, strict=True))}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def build(args: argparse.Namespace) -> dict[str, nn.Module]:
    """The models by name; the shared bottom is as wide as MMoE's parameters allow."""
    tasks = [Task.binary(f"task{i}") for i in range(args.tasks)]
    columns = [{"name": "x", "kind": "vector", "size": args.columns}]
    common: dict[str, Any] = {"tasks": tasks, "columns": columns, "tower": [args.tower]}
    mmoe = create_model("mmoe_table", experts=args.experts, widths=[args.width], **common)
    width = min(
        range(1, 4 * args.experts * args.width),
        key=lambda w: abs(
            (args.columns + 1) * w + args.tasks * ((w + 1) * args.tower + args.tower + 1) - parameters(mmoe)
        ),
    )
    models = {"shared bottom": create_model("shared_bottom_table", widths=[width], **common), "moe_mtl": mmoe}
    for name, mix in MIXTURES.items():
        models[name] = PerExpert(args.columns, args.experts, args.width, args.tower, args.tasks, mix)
    return models


def training_step(model: nn.Module, args: argparse.Namespace) -> Callable[[], None]:
    """One update on a fixed batch."""
    generator = torch.Generator().manual_seed(0)
    x = {"vector": torch.randn(args.batch, args.columns, generator=generator)}
    labels = {f"task{i}": torch.randint(2, (args.batch,), generator=generator).float() for i in range(args.tasks)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tasks = [Task.binary(name) for name in labels]

    def step() -> None:
        predictions = model(x)
        loss = sum(task.compute_loss(predictions[task.name], labels[task.name]) for task in tasks)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()

    return step


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds, rows per second and the ratio to the shared bottom of every provider."""
    models = build(args)
    steps = {name: training_step(model, args) for name, model in models.items()}
    times = interleaved(steps, torch.device("cpu"), args.rounds, args.seconds)
    base = times["shared bottom"]
    found = []
    for name, own in times.items():
        ratios = sorted(a / b for a, b in zip(own, base, strict=True))
        found.append(
            {
                "provider": name,
                "parameters": parameters(models[name]),
                "ms": 1e3 * statistics.median(own),
                "rows_per_second": args.batch / statistics.median(own),
                "ratio": statistics.median(ratios),
                "ratio_p20": ratios[len(ratios) // 5],
                "ratio_p80": ratios[-1 - len(ratios) // 5],
            }
        )
    return found


def main(options: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, value in (("batch", 4096), ("columns", 500), ("experts", 8), ("width", 64), ("tower", 32), ("tasks", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(options)
    keep_freed_memory()
    found = measure(args)
    print(f"{'':16}{'parameters':>12}{'ms':>8}{'rows/s':>10}{'ratio':>8}  p20 to p80")
    for row in found:
        print(
            f"{row['provider']:16}{row['parameters']:12,}{row['ms']:8.1f}{row['rows_per_second']:10,.0f}"
            f"{row['ratio']:8.2f}  {row['ratio_p20']:.2f} to {row['ratio_p80']:.2f}"
        )
    sizes = {name: getattr(args, name) for name in ("batch", "columns", "experts", "width", "tower", "tasks")}
    args.out.write_text(
        json.dumps({**machine("cpu"), "threads": torch.get_num_threads(), **sizes, "rows": found}, indent=1) + "\n"
    )
    ratio = next(row["ratio"] for row in found if row["provider"] == "moe_mtl")
    print(f"moe_mtl over the shared bottom: {ratio:.2f} (bound {BOUND}): {'met' if ratio <= BOUND else 'MISSED'}")


if __name__ == "__main__":
    main(sys.argv[1:])
