"""The CSV of measurements, and what it says of the machine."""

import csv
import datetime
import platform
import subprocess
from pathlib import Path

import torch

CSV = Path(__file__).with_name("results.csv")
COLUMNS = [
    "date", "op", "provider", "mode", "dtype", "tokens", "dim", "hidden", "experts", "k", "activation", "glu",
    "best_ms", "median_ms", "ratio_dense", "ratio_p20", "ratio_p80", "rounds", "threads", "allocator", "cpu", "torch",
    "commit", "shape", "device", "gpu", "triton", "router", "tflops", "limit_share", "saved_bytes",
]  # fmt: skip


def columns_fit(path: Path) -> bool:
    """Whether the file is new or has the columns of today."""
    if not path.exists():
        return True
    with path.open(newline="") as file:
        return next(csv.reader(file), None) == COLUMNS


def append(path: Path, lines: list[dict[str, object]]) -> None:
    """Adds lines to the file, which is made with a header when it is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(lines)


def read(path: Path) -> list[dict[str, str]]:
    """All lines."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def machine(device: str) -> dict[str, object]:
    """Columns that describe where and with what something was measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "",
        "torch": torch.__version__,
        "triton": triton_version(),
        "commit": commit(),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def triton_version() -> str:
    try:
        import triton
    except ModuleNotFoundError:
        return "none"
    return triton.__version__


def commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(command, cwd=CSV.parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"
