"""RunLog: where a training run writes its numbers: metrics.jsonl, tensorboard, the terminal."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from moe_mtl import checkpoint as checkpoints
from moe_mtl import hub


class RunLog:
    """Opened with `with`. Drops the records past `step`, which a resumed run will write again.

    Args:
        out: folder of the run; None for the terminal alone.
        step: updates done.
        steps: updates of the whole run.
        progress: show a live line, or a line per record where there is no terminal.
    """

    def __init__(self, out: Path | None, *, step: int, steps: int, progress: bool = True):
        self.out, self.step, self.steps, self.progress = out, step, steps, progress

    def __enter__(self) -> "RunLog":
        console = Console(stderr=True)
        self.live = self.progress and console.is_terminal
        self.lines = self.progress and not self.live
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self.display = Progress(*columns, console=console, disable=not self.live)
        self.bar = self.display.add_task("", total=self.steps, completed=self.step)
        self.file = self.board = None
        if self.out is not None:
            path = self.out / "metrics.jsonl"
            kept = [line for line in _whole_records(path) if json.loads(line)["step"] <= self.step]
            hub.replace_file(path, lambda temporary: temporary.write_text("".join(kept)))
            self.file = path.open("a")
            self.board = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.step + 1)
        self.display.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.display.stop()
        if self.file is not None and self.board is not None:
            self.file.close()
            self.board.close()

    def record(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Writes one record; numbers that are not finite become null, which JSON has."""
        if self.file is not None and self.board is not None:
            self.file.write(json.dumps({"step": step, "split": split, **_finite(values)}, allow_nan=False) + "\n")
            self.file.flush()
            for name, value in _flat(values):
                self.board.add_scalar(f"{split}/{name}", value, step)
        scores = {t: next(iter(m.values())) for t, m in values.get("metrics", {}).items() if m}
        shown = scores or values.get("loss", {})
        text = "  ".join(f"{name} {value:.3f}" for name, value in shown.items())
        if self.live:
            if split == "val":
                self.display.console.print(f"step {step}  {split}  {text}")
                return
            self.display.update(self.bar, completed=step, description=text)
        elif self.lines:
            self.display.console.print(f"step {step}/{self.steps}  {split}  {text}", soft_wrap=True)

    def flush(self) -> None:
        """Puts the records on disk."""
        if self.out is not None and self.board is not None:
            checkpoints.flush_to_disk(self.out / "metrics.jsonl")
            self.board.flush()


def _whole_records(path: Path) -> Sequence[str]:
    """Lines of a log up to the first that a kill cut short."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return lines[:-1] if lines and not lines[-1].endswith("\n") else lines


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
