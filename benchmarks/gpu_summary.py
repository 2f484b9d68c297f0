"""The short table that `make gpu` prints last, from the files its steps leave: at most `MOST_LINES` lines."""

import json
from collections import defaultdict
from pathlib import Path

from records import read
from shapes import SHAPES

CHECKS = ("fp32", "tf32", "fp16", "bf16", "table", "plan", "determinism", "graph", "memory")
MOST_LINES = 38
MOST_FAILURES = 6
COLUMNS = ("train ms", "TFLOP/s", "limit", "target", "graph", "x grouped", "infer us", "graph")
WIDTHS = (9, 8, 6, 7, 6, 10, 9, 7)
SHOWN = ("inference y", "y", "dx", "dw1", "dw2", "dgates")


def part_of(name: str, part: int) -> str:
    """What a part of a step is called; the first as the step."""
    return f"{name}.{part}" if part else name


def files_of(out: Path, name: str) -> list[Path]:
    """What the parts of a step left."""
    return sorted([*out.glob(f"{name}.json"), *out.glob(f"{name}.[0-9]*.json")])


def summary(out: Path, codes: dict[str, int], checks: list[str]) -> tuple[list[str], bool]:
    """The lines, and whether anything is wrong or was not checked to the end.

    Args:
        out: the folder of the run.
        codes: exit code of every step that was started.
        checks: the steps that decide whether the ops are right.
    """
    lines, failures, wrong = [], [], False
    if (out / "machine.json").exists():
        lines += json.loads((out / "machine.json").read_text())["lines"]
    for name in checks:
        line, found, good = _check(out, name, codes)
        lines.append(line)
        failures += found
        wrong |= not good
    lines += [f"  {failure[:150]}" for failure in failures[:MOST_FAILURES]]
    if len(failures) > MOST_FAILURES:
        lines[-1] += f" ... {len(failures) - MOST_FAILURES} more in the logs"
    if "harness" in codes:
        wrong |= codes["harness"] != 0
        lines += _harness(out) if (out / "results.csv").exists() else []
        lines += [] if codes["harness"] == 0 else [f"harness      FAILED, exit code {codes['harness']}: harness.log"]
    if "tune" in codes:
        log = (out / "tune.log").read_text().splitlines()
        lines.append(f"{'tune':13}{log[-1] if codes['tune'] == 0 else 'FAILED: tune.log'}")
    lines.append("SOMETHING IS WRONG" if wrong else "all checks passed")
    return lines[:MOST_LINES], wrong


def _check(out: Path, name: str, codes: dict[str, int]) -> tuple[str, list[str], bool]:
    """The line of a step, its failures, and whether all its parts passed."""
    parts = {part: code for part, code in codes.items() if part == name or part.startswith(f"{name}.")} or {name: None}
    for part, code in parts.items():
        if not (out / f"{part}.json").exists():
            return f"{name:13}FAILED, exit code {code}, no result: {part}.log", [], False
    found = [json.loads((out / f"{part}.json").read_text()) for part in parts]
    failures = [failure for one in found for failure in one["failures"]]
    good = all(one["done"] for one in found) and not failures and not any(parts.values())
    state = "passed" if good else f"FAILED {len(failures)}" if failures else "NOT FINISHED"
    worst = {key: max(one["errors"].get(key, 0.0) for one in found) for key in SHOWN}
    errors = " ".join(f"{key} {error:.0e}" for key, error in worst.items() if error)
    return f"{name:13}{state}, {sum(one['cases'] for one in found)} checks  {errors}".rstrip(), failures, good


def _harness(out: Path) -> list[str]:
    """One line per shape: ours in training and in inference, beside the limit and torch's grouped product."""
    times: dict[str, dict[tuple[str, str], dict[str, str]]] = defaultdict(dict)
    for row in read(out / "results.csv"):
        times[row["shape"]][row["provider"], row["mode"]] = row
    head = zip(COLUMNS, WIDTHS, strict=True)
    lines = [f"{'bf16':26}" + "".join(f"{name:>{width}}" for name, width in head)]
    for shape in SHAPES:
        rows = times.get(shape.name)
        if not rows or ("moe_mtl", "fwd+bwd") not in rows:
            continue
        train, infer = rows["moe_mtl", "fwd+bwd"], rows.get(("moe_mtl", "fwd"))
        grouped = rows.get(("F.grouped_mm", "fwd+bwd"))
        graphs = [rows.get(("moe_mtl", f"graph {mode}")) for mode in ("fwd+bwd", "fwd")]
        cells = (
            f"{float(train['median_ms']):.3f}",
            f"{float(train['tflops']):.0f}",
            f"{float(train['limit_share']):.0%}",
            f"{shape.share:.0%}" if shape.share else "-",
            f"{float(graphs[0]['limit_share']):.0%}" if graphs[0] else "-",
            f"{float(grouped['median_ms']) / float(train['median_ms']):.2f}" if grouped else "-",
            f"{1e3 * float(infer['median_ms']):.1f}" if infer else "-",
            f"{1e3 * float(graphs[1]['median_ms']):.1f}" if graphs[1] else "-",
        )
        lines.append(f"{shape.name:26}" + "".join(f"{c:>{width}}" for c, width in zip(cells, WIDTHS, strict=True)))
    return lines
