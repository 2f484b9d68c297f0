"""docs/texts.md out of what the studies left in benchmarks/texts/ and text_speed.json; no number is typed.

python benchmarks/texts_doc.py
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout will do

import numpy as np
import study
from tables_doc import spread, table
from text_studies import RESULTS

from moe_mtl.hub import replace_file

DOCUMENT = study.ROOT / "docs" / "texts.md"
SPEED = Path(__file__).with_name("text_speed.json")
HEAD = """# Task-routed encoders of texts, measured

Written by `python benchmarks/texts_doc.py` from the files in `benchmarks/texts/`; the commands that make those stand
with each table, FOLDER being one with the data sets. The encoder is MiniLM of six layers (`make minilm`), trained in
bfloat16 with its word embeddings frozen and scored in float32. Scores are percentages of the test texts; settings were
chosen on validation texts, and the test texts of a run scored once. Where several seeds were run, means and standard
deviations. Minutes are of one core while the other did something else: they say little.

Slots are spans of BIO tags. Constrained is the F1 of the likeliest sequence of tags in which every I- tag continues a
span (`moe_mtl.bio`, what a `Predictor` answers); where a table says nothing, of the best tag of each token by itself.
"""
TASKS = {
    "snips_intent": "SNIPS intent",
    "snips_slots": "SNIPS slots",
    "banking77": "BANKING77",
    "nlupp_intents": "NLU++ intents",
    "nlupp_slots": "NLU++ slots",
    "upos": "EWT parts of speech",
}
F1 = {"micro_f1": ", F1", "span_f1": ", F1", "constrained_span_f1": ", F1, constrained"}  # accuracy has no suffix
EXACT = {"constrained_exact_match": "SNIPS exact match, constrained", "exact_match": "SNIPS exact match"}
CONSTRAINED = "constrained_span_f1"
Run = Mapping[str, Any]


def by_name(name: str) -> dict[str, list[dict[str, Any]]]:
    """The runs of a study by name, in the order they first come in the folder."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in study.read(name, results=RESULTS):
        found.setdefault(run["name"], []).append(run)
    return found


def metric_of(runs: Iterable[Run], task: str) -> str | None:
    """The first metric of a task, the same in all of these runs; None where none of them has the task.

    Raises:
        ValueError: runs were scored by different metrics, so that a table of them would compare what cannot be.
    """
    found = {next(iter(run["test"][task])) for run in runs if task in run["test"]}
    if len(found) > 1:
        raise ValueError(f"{task}: scored by {sorted(found)} in one study; run the study again with one version")
    return next(iter(found), None)


def named(task: str, metric: str | None) -> str:
    """A task and its metric as the head of a column."""
    return TASKS[task] + F1.get(metric or "", "")


def headline(run: Run, task: str, split: str = "test", metric: str | None = None) -> float:
    """A metric of a task, its first when None, in percent; NaN where the run has none."""
    scores = run.get(split, {}).get(task)
    return float("nan") if scores is None else 100 * scores[metric or next(iter(scores))]


def scores(runs: Sequence[Run], tasks: Sequence[str], split: str = "test") -> list[str]:
    """Cells of a table, one per task."""
    return [spread([headline(run, task, split) for run in runs], 2) for task in tasks]


def complete(parts: Sequence[Run], tasks: Sequence[str]) -> bool:
    """Whether single-task runs are there for all of these tasks."""
    return set(tasks) <= {task for part in parts for task in part["test"]}


def together(parts: Sequence[Run]) -> dict[str, Any]:
    """Single-task runs of one seed as one: all their scores, the sum of their sizes and times."""
    merged = {split: {task: s for part in parts for task, s in part[split].items()} for split in ("val", "test")}
    return {**merged, **{key: sum(part[key] for part in parts) for key in ("parameters", "seconds")}}


def exact(runs: Sequence[Run], key: str) -> str:
    """Requests of SNIPS that are right in intent and every slot."""
    return spread([100 * run.get(key, {}).get("test", float("nan")) for run in runs], 2)


def exact_keys(runs: Iterable[Run]) -> list[str]:
    """The ways to count such requests that these runs know."""
    runs = list(runs)
    return [key for key in EXACT if any(key in run for run in runs)]


def heading(title: str, text: str, command: str) -> list[str]:
    """A title, what was done, how to do it again."""
    return [f"## {title}", "", text, f"`python benchmarks/text_studies.py {command} --root=FOLDER`.", ""]


def joint() -> str:
    """One model for six tasks of four data sets against its controls."""
    text = (
        "Six tasks of four data sets, no text with labels of two of them. The joint models draw a source per update, "
        "in proportion to the fifth root of its size; a single-task model gets as many updates as its source was drawn."
        " Where models are weighed, the loss of NLU++ intents, a mean over 62 labels, counts five times, and "
        "feed-forward networks per task stand in layers 3 and 5, those with experts in the routed model."
    )
    return six_tasks("joint", "Six tasks in one encoder", text)


def longer() -> str:
    """The same with twice the updates."""
    text = (
        "The models that did best above, and single-task models, with twice as many updates each. The loss of SNIPS "
        "slots counts three times in the joint ones, which is better after 1,200 updates on validation texts."
    )
    return six_tasks("longer", "Six tasks, twice as long", text)


def six_tasks(name: str, title: str, text: str) -> str:
    """The joint models of a study against single-task ones."""
    found = by_name(name)
    alone: dict[int, list[dict[str, Any]]] = {}
    for part in [part for part in found if part.startswith("single_task.")]:
        for run in found.pop(part):
            alone.setdefault(run["seed"], []).append(run)
    models = {**found, "single_task": [together(parts) | {"seed": seed} for seed, parts in sorted(alone.items())]}
    tasks = [task for task in TASKS if any(task in run["test"] for runs in models.values() for run in runs)]
    labels = {
        "text_moe": "routed",
        "text_shared_bottom": "shared bottom",
        "text_shared_bottom.weighed": "shared bottom, weighed",
        "text_sublayers.weighed": "a feed-forward network per task, weighed",
        "single_task": "single-task models",
    }
    everything = [run for runs in models.values() for run in runs]
    ways, plain = exact_keys(everything), [task for task in tasks if metric_of(everything, task) == CONSTRAINED]
    rows = []
    for model, runs in models.items():
        size = f"{runs[0]['parameters'] / 1e6:.1f}"
        gains = [
            gain(run, next(base for base in models["single_task"] if base["seed"] == run["seed"]), tasks)
            for run in runs
            if model != "single_task" and complete(alone.get(run["seed"], ()), tasks)
        ]
        mean, worst = zip(*gains, strict=True) if gains else ((float("nan"),), (float("nan"),))
        minutes = f"{runs[0]['seconds'] / 60:.0f}"
        unconstrained = [spread([headline(run, task, metric="span_f1") for run in runs], 2) for task in plain]
        rows.append([labels.get(model, model), size, minutes, *scores(runs, tasks), *(exact(runs, key) for key in ways),
                     spread(mean, 2), spread(worst, 2), *unconstrained])  # fmt: skip
    head = ["", "M parameters", "minutes of training", *(named(task, metric_of(everything, task)) for task in tasks),
            *(EXACT[key] for key in ways), "mean gain over single-task, %",
            "smallest difference to single-task, points", *(named(task, "span_f1") for task in plain)]  # fmt: skip
    text += " Seeds: " + ", ".join(map(str, sorted({run["seed"] for run in everything}))) + "."
    return "\n".join([*heading(title, text, name), turned(head, rows), *layers(models)])


def gain(run: Run, base: Run, tasks: Sequence[str]) -> tuple[float, float]:
    """Mean relative gain over a baseline in percent, and the smallest difference of a task in points.

    Every headline here is better when larger; over a baseline of 0 the difference stands for the gain.
    """
    pairs = [(headline(run, task), headline(base, task)) for task in tasks]
    gains = [100 * (new / old - 1) if old else new for new, old in pairs]
    return float(np.mean(gains)), min(new - old for new, old in pairs)


def turned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a model per column."""
    first, *columns = zip(head, *rows, strict=True)
    return table(first, [list(line) for line in columns])


def layers(models: Mapping[str, Sequence[Run]]) -> list[str]:
    """How much the experts of each layer tell of the task, of the routed models."""
    rows = []
    for name, runs in models.items():
        for layer in runs[0].get("routing", {}):
            values = [[run["routing"][layer][key] for run in runs] for key in ("mutual_information", "load_entropy")]
            rows.append([name, layer, *(spread(v, 3) for v in values)])
    head = ["model", "layer", "I(task; expert), nats", "entropy of the load, share of its maximum"]
    return ["Routing on validation texts:\n", table(head, rows)] if rows else []


def plain(name: str, title: str, text: str, tasks: Sequence[str], *, validation: bool = False) -> str:
    """A study as a table with a row per run: sizes, time, scores of these tasks."""
    found = by_name(name)
    everything = [run for runs in found.values() for run in runs]
    ways = exact_keys(everything)
    rows = []
    for label, runs in found.items():
        size, trained = (f"{runs[0][key] / 1e6:.2f}" for key in ("parameters", "trained_parameters"))
        chosen = scores(runs, tasks, "val") if validation else []
        rows.append(
            [label, size, trained, f"{runs[0]['seconds'] / 60:.1f}", *chosen, *scores(runs, tasks),
             *(exact(runs, key) for key in ways)]
        )  # fmt: skip
    splits = ("validation: ", "test: ") if validation else ("",)
    head = ["", "M parameters", "of these trained", "minutes",
            *(s + named(task, metric_of(everything, task)) for s in splits for task in tasks)]  # fmt: skip
    shown = table([*head, *(EXACT[key] for key in ways)], rows)
    return "\n".join([*heading(title, text, name), shown, *layers(found)])


PAIR = ("snips_intent", "snips_slots", "banking77")


def routing() -> str:
    """Ways to route."""
    text = (
        "SNIPS and BANKING77, the same training for all: how tokens or tasks find their experts, and what is private "
        "to a task instead."
    )
    return plain("routing", "Ways to route", text, PAIR)


def scarce() -> str:
    """Low-resource transfer."""
    text = "770 of the 9,002 training questions of BANKING77, about ten per intent, beside all of SNIPS, and alone."
    return plain("scarce", "Few labels beside many", text, PAIR)


def added() -> str:
    """An unrelated task beside two others."""
    text = (
        "Parts of speech of web texts are trained beside SNIPS and BANKING77, which keep as many updates of their own "
        "as in the study of ways to route; the rows there of the same name are the models without it."
    )
    return plain("added", "An unrelated task added", text, (*PAIR, "upos"))


def newcomers(name: str) -> str:
    """Ways to learn a new task, and what the known tasks lose."""
    rows = []
    found = by_name(name)
    for label, runs in found.items():
        if "banking77" not in runs[0]["test"]:
            continue
        new = spread([headline(run, "banking77") for run in runs], 2)
        lost = ""
        if "known_before" in runs[0]:
            drops = [
                max(100 * (run["known_before"][t][m] - v) for t, scored in run["known_after"].items()
                    for m, v in list(scored.items())[:1])
                for run in runs
            ]  # fmt: skip
            lost = spread(drops, 2)
        near = runs[0].get("similarity") or {}
        rows.append([label, f"{runs[0]['trained_parameters'] / 1e3:.0f}", f"{runs[0]['seconds']:.0f}", new, lost,
                     ", ".join(f"{task} {value:.2f}" for task, value in near.items())])  # fmt: skip
    head = ["model, start, trained", "k trained parameters", "seconds", "BANKING77", "forgetting, points", "similarity"]
    return table(head, rows)


def arrival() -> str:
    """A new task, few-shot."""
    text = (
        "Models trained on SNIPS, NLU++ and parts of speech; then BANKING77 comes as a new task with 385 of its "
        "questions, five per intent in the mean. Its router and head alone are trained (own), or everything (all). "
        "Its router starts fresh, or as a copy of the router of the nearest or farthest task, measured on 64 texts of "
        "each (`moe_mtl.task_similarity`). Forgetting is the largest loss of a known task on its validation texts."
    )
    return "\n".join([*heading("A new task from few labels", text, "arrival"), newcomers("arrival")])


def adapters() -> str:
    """Adapters in a frozen encoder."""
    text = (
        "A frozen encoder on SNIPS and BANKING77, a task per text. One LoRA has the rank that gives it nearly as many "
        "trained parameters as the inventories of four skills. Methods are trained at two learning rates, the second "
        "(fast) three times the first, and the validation texts choose; where there is one row, at the first alone. "
        "scalearn_sources has an adapter per task and shares nothing: the first stage of ScaLearn."
    )
    return plain("adapters", "Adapters in a frozen encoder", text, PAIR, validation=True)


def adapter_arrival() -> str:
    """A new task for adapters."""
    text = (
        "As in the study of a new task, with frozen encoders and adapters: what is the new task's own (own: its head, "
        "and for multi-head routing its routing alone, z-only), one LoRA that is the mean of all skills (average), or "
        "all adapters."
    )
    parts = heading("A new task for adapters", text, "adapter_arrival")
    return "\n".join([*parts, newcomers("adapter_arrival")])


def speed() -> str:
    """Routed encoders against dense ones."""
    found = json.loads(SPEED.read_text())
    rows = [
        [row["mode"], str(row["threads"]), row["dtype"], f"{row['batch']} x {row['tokens']}", row["provider"],
         f"{row['ms']:.1f}", f"{row['ratio']:.2f}", f"{row['ratio_p20']:.2f} to {row['ratio_p80']:.2f}"]
        for row in found["rows"]
    ]  # fmt: skip
    text = (
        f"Time of the routed encoder over that of the dense one, medians of interleaved rounds, on {found['cpu']}, "
        f"torch {found['torch']}. 4 experts, one per token, in every second layer; what differs in the peers stands in "
        "the script. The tokens of a single text read up to four experts where a dense network reads one, which the "
        "batch of 32 shares out; where the task alone decides, one expert is read."
    )
    head = ["", "threads", "numbers", "texts x tokens", "model", "ms", "over dense", "20th to 80th percentile"]
    return "\n".join(["## Speed", "", text, "`python benchmarks/text_speed.py`.", "", table(head, rows)])


STUDIES: tuple[Callable[[], str], ...] = (joint, longer, routing, scarce, added, arrival, adapters, adapter_arrival)


def main() -> None:
    parts = [write() for write in STUDIES if (RESULTS / write.__name__).exists()]
    parts += [speed()] if SPEED.exists() else []
    text = "\n".join([HEAD, *parts])
    replace_file(DOCUMENT, lambda temporary: temporary.write_text(text))
    print(f"{DOCUMENT}: {len(parts)} of {len(STUDIES) + 1} sections")


if __name__ == "__main__":
    main()
