"""docs/tables.md out of what the studies left in benchmarks/tables/ and table_step.json; no number is typed.

python benchmarks/tables_doc.py
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout will do

import numpy as np
import study

from moe_mtl.hub import replace_file
from moe_mtl.statistics import paired_test

DOCUMENT = study.ROOT / "docs" / "tables.md"
STEP = Path(__file__).with_name("table_step.json")
HEAD = """# Models for tables, measured

Written by `python benchmarks/tables_doc.py` from the files in `benchmarks/tables/`; the commands that make those stand
with each table. Means and standard deviations are over seeds. Settings are chosen on validation rows; test rows are
scored once, for the chosen ones.
"""
LABELS = {
    "gradient_boosting": "gradient boosting (scikit-learn)",
    "gradient_boosting_mean": "mean of five gradient boostings",
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
    "home_relu": "HoME, ReLU without normalisation",
    "one_gate": "one gate for both tasks",
    "noisy_topk": "top-k gate",
    "softmax": "softmax gate",
    "clicked_rows": "shared bottom on clicked rows",
    "clicked_rows_mmoe": "MMoE on clicked rows",
    "esmm": "ESMM",
    "esmm_experts": "ESMM on an MMoE",
    "aitm": "AITM",
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; every column but the first is aligned right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean and standard deviation over seeds."""
    if np.isnan(values).all():
        return ""
    text = f"{np.mean(values):.{digits}f}"
    return f"{text} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


def interval(found: Mapping[str, float]) -> str:
    """A difference with its interval and p-value."""
    return f"{found['difference']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f}), p {found['p_value']:.2g}"


def by_name(name: str) -> dict[str, list[dict[str, Any]]]:
    """The runs of a study by name, in the order of LABELS; a name is a model's, or has it between dots."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in study.read(name):
        found.setdefault(run["name"], []).append(run)
    order = list(LABELS)
    return dict(sorted(found.items(), key=lambda item: min(order.index(p) for p in item[0].split(".") if p in order)))


def metric(runs: Sequence[Mapping[str, Any]], task: str, name: str, split: str = "test") -> list[float]:
    """A metric of a task, by seed."""
    return [run[split][task][name] for run in runs]


def mean_metric(runs: Sequence[Mapping[str, Any]], name: str, split: str = "test") -> list[float]:
    """The mean of a metric over tasks, by seed."""
    return [float(np.mean([scores[name] for scores in run[split].values()])) for run in runs]


def section(title: str, text: str, command: str, *parts: str) -> str:
    """A heading, what was done, how to do it again, and tables."""
    return "\n".join([f"## {title}", "", f"{text}", f"`python benchmarks/{command}`.", "", *parts])


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
        [f"mean of {seeds} {best} - {LABELS[n]}, bootstrap of test rows", *(interval(row[t]) for t in tasks)]
        for n, row in found["mean_against"].items()
    ]
    averaged = [
        [LABELS[n], *(f"{row[t]:.4f}" for t in tasks)]
        for n, row in sorted(found["mean_of_seeds"].items(), key=lambda item: -sum(item[1].values()))
    ]
    compared += [
        [f"{best} - {LABELS[n]}, paired over {seeds} seeds", *(interval(row[t]) for t in tasks)]
        for n, row in found["paired"].items()
    ]
    return "\n".join(
        [
            "## Census-Income (KDD)",
            "",
            "AUC of income above 50,000 dollars and of never married. 99,762 people, rows % 5: 0 to 2 for training,",
            "3 for validation, 4 for testing. Every family was tried with the same 16 settings.",
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
            f"Test AUC of the mean of the {seeds} seeds' predictions:",
            "",
            table(["", *tasks], averaged),
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


def related_regression() -> str:
    """Shared bottom, one gate and a gate per task as two tasks grow apart."""
    found = by_name("related_regression")
    names = list(dict.fromkeys(name.split(".", 2)[1] for name in found))
    rows = []
    for preset in dict.fromkeys(name.split(".", 2)[0] for name in found):
        for cosine in sorted({name.split(".", 2)[2] for name in found if name.startswith(preset)}, key=float):
            runs = {name: mean_metric(found[f"{preset}.{name}.{cosine}"], "r2") for name in names}
            gaps = [interval(paired_test(runs["mmoe"], runs[other])) for other in ("one_gate", "shared_bottom")]
            rows.append([f"{preset}, {cosine}", *(spread(values) for values in runs.values()), *gaps])
    size = {name: found[f"learnable.{name}.0.5"][0]["parameters"] for name in names}
    head = ["sines, cosine", *(f"{LABELS[name]} ({size[name]:,} parameters)" for name in names)]
    return section(
        "Correlated regressions",
        "Mean R² of two tasks on the test rows, by the cosine between their directions. The learning rate of every "
        "model is the best of three on validation at 0.5. Differences are paired over seeds, with 95 % intervals.",
        "table_studies.py related_regression",
        table([*head, "MMoE - one gate", "MMoE - shared bottom"], rows),
    )


def expert_recovery() -> str:
    """Which gates find the experts that made the labels."""
    found = by_name("expert_recovery")
    rows = []
    for gate in dict.fromkeys(name.split(".")[0] for name in found):
        starts = [runs for name, runs in found.items() if name.split(".")[0] == gate]
        by_seed: dict[str, list[float]] = {}
        for runs in zip(*starts, strict=True):
            tasks = list(runs[0]["val"])
            best = [max(runs, key=lambda run, t=task: run["val"][t]["r2"]) for task in tasks]
            for key in ("jaccard", "jaccard_of_largest", "experts_used"):
                by_seed.setdefault(key, []).append(float(np.mean([run[key][i] for i, run in enumerate(best)])))
            score = np.mean([run["test"][task]["r2"] for task, run in zip(tasks, best, strict=True)])
            by_seed.setdefault("r2", []).append(float(score))
        every = np.mean([run["jaccard"] for runs in starts for run in runs])
        *shares, r2 = by_seed.values()
        rows.append([LABELS[gate], *(spread(values, 2) for values in shares), spread(r2), f"{every:.2f}"])
    head = ["", "Jaccard of used experts", "of the 2 largest", "experts used", "R²", "Jaccard, all starts"]
    return section(
        "Recovery of experts",
        "Six tasks in three clusters, each the mean of two of eight fixed experts; only gates and read-outs are "
        "learned, and shared by no two tasks. Of every task and seed the best of four starts on validation, for every "
        "gate.",
        "table_studies.py expert_recovery",
        table(head, rows),
    )


def multi_mnist() -> str:
    """DSelect-k against softmax and top-k on two digits."""
    rows = []
    for name, runs in by_name("multi_mnist").items():
        one_hot = [run["one_hot"] for run in runs if run["one_hot"] is not None]
        cells = [spread(metric(runs, task, "accuracy")) for task in ("left", "right")]
        used = ", ".join(" ".join(map(str, run["experts_used"])) for run in runs)
        rows.append([LABELS[name], *cells, used, f"{sum(one_hot)} of {len(one_hot)}" if one_hot else ""])
    head = ["gate", "left digit", "right digit", "experts of both tasks, by seed", "seeds with one-hot selectors"]
    return section(
        "Two digits",
        "Accuracy on Multi-MNIST with a LeNet, 8 experts and k = 2 where the gate has a k; DSelect-k's entropy "
        "regularizer is on from a quarter of the updates.",
        "table_studies.py multi_mnist --root=FOLDER",
        table(head, rows),
    )


def routed(name: str, title: str, text: str, command: str) -> str:
    """Families side by side: each task's first metric, difference to the shared bottom, units of the experts."""
    found = by_name(name)
    first = {task: next(iter(scores)) for task, scores in next(iter(found.values()))[0]["test"].items()}
    rows, units, against = [], [], []
    bottom = found["shared_bottom"]
    for model, runs in found.items():
        cells = [spread(metric(runs, task, key)) for task, key in first.items()]
        rows.append([LABELS[model], f"{runs[0]['parameters'] / 1e3:.0f}", *cells])
        for level in runs[0]["activity"]:
            shares = [[run["activity"][level][key] for run in runs] for key in ("silent", "dead", "diversity")]
            units.append([f"{LABELS[model]}, {level.removesuffix('.experts')}", *(spread(v, 3) for v in shares)])
        if model != "shared_bottom":
            tests = [paired_test(metric(runs, t, k), metric(bottom, t, k)) for t, k in first.items()]
            against.append([LABELS[model], *(interval(test) for test in tests)])
    head = [f"{task}, {key.replace('_', ' ')}" for task, key in first.items()]
    return section(
        title,
        text,
        command,
        table(["test", "k parameters", *head], rows),
        "Difference to the shared bottom, paired over seeds, with 95 % intervals:\n",
        table(["", *first], against),
        "Units of the experts on validation rows: activations that are zero or nearly, units that are so on 99 % of "
        "the rows, and the mean distance between experts' outputs over the largest.\n",
        table(["experts", "silent activations", "dead units", "diversity"], units),
    )


def click_log() -> str:
    """The families on tasks from common to rare."""
    text = "Six tasks from common to rare on generated impressions; one setting for all models."
    return routed("click_log", "Click log", text, "table_studies.py click_log")


def movielens() -> str:
    """The families on watching and rating."""
    text = "Whether a movie is watched and how it is rated; one setting for all models."
    return routed("movielens", "MovieLens", text, "table_studies.py movielens --root=FOLDER")


def entire_space() -> str:
    """Conversion rates over all impressions."""
    rows = []
    for name, runs in by_name("entire_space").items():
        cells = [spread(metric(runs, "conversion", key)) for key in ("auc", "log_loss")]
        ratio = spread([run["predicted_over_true"] for run in runs], 3)
        rows.append([LABELS[name], *cells, ratio, spread(metric(runs, "click_and_conversion", "auc"))])
    head = ["", "conversion, AUC", "log loss", "predicted over true rate", "click and conversion, AUC"]
    return section(
        "Conversion over the entire space",
        "A generated log whose conversion rate is known for every impression, also those that were not clicked. Models "
        "on clicked rows learn it there alone.",
        "table_studies.py entire_space",
        table(head, rows),
    )


def tox21() -> str:
    """Twelve assays."""
    found = by_name("tox21")
    tasks = list(next(iter(found.values()))[0]["test"])
    rows = [
        ["mean of 12, validation", *(spread(mean_metric(runs, "auc", "val")) for runs in found.values())],
        ["mean of 12, test", *(spread(mean_metric(runs, "auc")) for runs in found.values())],
        *([task, *(spread(metric(runs, task, "auc"), 3) for runs in found.values())] for task in tasks),
    ]
    return section(
        "Tox21",
        "ROC-AUC from hashed n-grams of SMILES; a molecule is in one split only, missing labels do not count.",
        "table_studies.py tox21 --root=FOLDER",
        table(["", *(LABELS[name] for name in found)], rows),
    )


STUDIES: tuple[Callable[[], str], ...] = (
    related_regression,
    expert_recovery,
    multi_mnist,
    click_log,
    movielens,
    entire_space,
    tox21,
)
SECTIONS: dict[Path, Callable[[], str]] = {
    study.RESULTS / "census.json": census,
    **{study.RESULTS / write.__name__: write for write in STUDIES},
    STEP: speed,
}


def main() -> None:
    parts = [write() for path, write in SECTIONS.items() if path.exists()]
    text = "\n".join([HEAD, *parts])
    DOCUMENT.parent.mkdir(exist_ok=True)
    replace_file(DOCUMENT, lambda temporary: temporary.write_text(text))
    print(f"{DOCUMENT}: {len(parts)} of {len(SECTIONS)} sections")


if __name__ == "__main__":
    main()
