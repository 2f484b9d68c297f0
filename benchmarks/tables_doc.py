"""docs/tables.md out of what the studies left in benchmarks/tables/ and table_step.json; no number is typed.

python benchmarks/tables_doc.py
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout will do

import numpy as np
import study

from moe_mtl.hub import replace_file

DOCUMENT = study.ROOT / "docs" / "tables.md"
STEP = Path(__file__).with_name("table_step.json")
HEAD = """# Models for tables, measured

Written by `python benchmarks/tables_doc.py` from the files in `benchmarks/tables/`; the commands that make those stand
with each table. Means and standard deviations are over seeds. Settings are chosen on validation rows; test rows are
scored once, for the chosen ones.
"""
LABELS = {
    "gradient_boosting": "gradient boosting (scikit-learn)",
    "logistic_regression": "logistic regression (scikit-learn)",
    "shared_bottom": "shared bottom",
    "single_task": "single-task models",
    "mmoe": "MMoE",
    "cgc": "CGC",
    "ple": "PLE",
    "adatt": "AdaTT",
    "mmoeex": "MMoEEx",
    "dselect_k": "DSelect-k",
    "home": "HoME",
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; every column but the first is aligned right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean and standard deviation over seeds."""
    text = f"{np.mean(values):.{digits}f}"
    return f"{text} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


def interval(found: Mapping[str, float]) -> str:
    """A difference with its interval and p-value."""
    return f"{found['difference']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f}), p {found['p_value']:.2g}"


def census() -> str:
    """Census-Income against scikit-learn's models and the dense controls."""
    found = json.loads((study.RESULTS / "census.json").read_text())
    tasks, seeds = ("income", "marital"), len(found["families"]["mmoe"]["test"]["income"])
    rows = [
        [LABELS[name], "", "", *(f"{split[t]:.4f}" for split in (scores["val"], scores["test"]) for t in tasks)]
        for name, scores in found["baselines"].items()
    ]
    order = sorted(found["families"].items(), key=lambda item: -np.mean([item[1]["val"][t] for t in tasks]))
    for name, scores in order:
        cells = [spread(scores[split][t]) for split in ("val", "test") for t in tasks]
        rows.append([LABELS[name], f"{scores['parameters'] / 1e3:.0f}", f"{scores['seconds']:.0f}", *cells])
    best = LABELS[found["best_mixture"]]
    compared = [[f"{best} (seed {found['compared_seed']}) - {LABELS[n]}, bootstrap of test rows",
                 *(interval(row[t]) for t in tasks)] for n, row in found["against"].items()]  # fmt: skip
    compared += [
        [f"{best} - {LABELS[n]}, paired over {seeds} seeds", *(interval(row[t]) for t in tasks)]
        for n, row in found["paired"].items()
    ]
    return "\n".join(
        [
            "## Census-Income (KDD)",
            "",
            "AUC of income above 50,000 dollars and of never married. 99,762 people, rows % 5: 0 to 2 for training,",
            "3 for validation, 4 for testing. Every family was tried with the same 8 settings.",
            "`python benchmarks/census.py`.",
            "",
            table(
                ["model", "k parameters", "seconds", *(f"{t}, {s}" for s in ("validation", "test") for t in tasks)],
                rows,
            ),
            f"The mixture with the best mean validation AUC over seeds is {best}.",
            "Differences of test AUC, 95 % intervals:",
            "",
            table(["", *tasks], compared),
        ]
    )


def speed() -> str:
    """A training step against dense and per-expert peers."""
    found = json.loads(STEP.read_text())
    rows = [
        [
            row["provider"],
            f"{row['parameters']:,}",
            f"{row['ms']:.1f}",
            f"{row['rows_per_second']:,.0f}",
            f"{row['ratio']:.2f} ({row['ratio_p20']:.2f} to {row['ratio_p80']:.2f})",
        ]
        for row in found["rows"]
    ]
    return "\n".join(
        [
            "## A training step",
            "",
            f"MMoE of {found['experts']} experts of {found['width']} units, {found['tasks']} tasks,",
            f"batch {found['batch']}, {found['columns']} input columns, {found['threads']} threads of {found['cpu']},",
            f"torch {found['torch']}. Ratios are to the shared bottom of as many parameters in the same round, medians",
            "with 20th and 80th percentile.",
            "The peers are modules of ours in the manner of those libraries. `python benchmarks/table_step.py`.",
            "",
            table(["", "parameters", "ms", "rows/s", "ratio"], rows),
        ]
    )


SECTIONS = {study.RESULTS / "census.json": census, STEP: speed}


def main() -> None:
    parts = [section() for path, section in SECTIONS.items() if path.exists()]
    text = "\n".join([HEAD, *parts])
    DOCUMENT.parent.mkdir(exist_ok=True)
    replace_file(DOCUMENT, lambda temporary: temporary.write_text(text))
    print(f"{DOCUMENT}: {len(parts)} of {len(SECTIONS)} sections")


if __name__ == "__main__":
    main()
