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
        line, found, good = _check(out, name, codes.get(name))
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


def _check(out: Path, name: str, code: int | None) -> tuple[str, list[str], bool]:
    path = out / f"{name}.json"
    if not path.exists():
        return f"{name:13}FAILED, exit code {code}, no result: {name}.log", [], False
    found = json.loads(path.read_text())
    good = found["done"] and not found["failures"] and code == 0
    state = "passed" if good else f"FAILED {len(found['failures'])}" if found["failures"] else "NOT FINISHED"
    errors = " ".join(f"{key} {found['errors'][key]:.0e}" for key in SHOWN if key in found["errors"])
    return f"{name:13}{state}, {found['cases']} checks  {errors}".rstrip(), found["failures"], good


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
