"""docs/controls.md and docs/controls.png out of what the runs of benchmarks/controls.py left; no number is typed."""

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moe_mtl.hub import replace_file
from moe_mtl.recipes import get_recipe
from moe_mtl.scoring import multi_task_gain
from moe_mtl.tasks import Task

Record = Mapping[str, Any]
Key = tuple[str, str]  # recipe and budget

REFERENCE, SINGLE, SHARED = "m3vit_micro_procroom", "single_task_micro_procroom", "shared_bottom_micro_procroom"
UPCYCLED = "m3vit_micro_upcycled_procroom"
LABELS = {
    REFERENCE: "m3vit_micro: experts in every second block",
    "m3vit_micro_last_procroom": "m3vit_micro: experts in the last block",
    UPCYCLED: "m3vit_micro: experts in the last block, upcycled late",
    "m3vit_micro_decoder_procroom": "m3vit_micro: experts in a decoder block",
    "m3vit_micro_blind_procroom": "task-blind router",
    "m3vit_micro_frozen_procroom": "random routers, never trained",
    "m3vit_micro_assigned_procroom": "experts assigned by hand (oracle)",
    "m3vit_micro_scarce_procroom": "four large experts",
    "m3vit_micro_scarce_frozen_procroom": "four large experts, random routers",
    "m3vit_micro_scarce_assigned_procroom": "four large experts, assigned by hand (oracle)",
    SHARED: "shared bottom, same width",
    "shared_bottom_micro_wide_procroom": "shared bottom, same total parameters",
    SINGLE: "single-task models, same width",
}
BUDGETS = {"steps": "updates", "time": "training time", "long": "updates, long"}
KINDS: dict[str, Callable[[Task], bool]] = {
    "all tasks": lambda task: True,
    "per-pixel tasks": lambda task: task.kind != "classification",
    "per-image tasks": lambda task: task.kind == "classification",
}


def read(folder: Path, current: Callable[[Record], bool]) -> dict[Key, list[Record]]:
    """The records of all runs by recipe and budget, seeds ascending; those of older recipes are left out."""
    found: dict[Key, list[Record]] = defaultdict(list)
    for path in sorted(folder.glob("*.s*.json")):
        record = json.loads(path.read_text())
        if current(record):
            found[record["recipe"], record["budget"]].append(record)
        else:
            print(f"left out: {path.name} was made by an older recipe")
    if (SINGLE, "long") not in found:  # nothing to compare them with
        found.pop((REFERENCE, "long"), None)
    elif (SHARED, "time") in found:
        found[SHARED, "long"] = found[SHARED, "time"]  # by definition of "long"
    order, budgets = list(LABELS), list(BUDGETS)
    return dict(sorted(found.items(), key=lambda item: (budgets.index(item[0][1]), order.index(item[0][0]))))


def single(runs: Mapping[Key, Sequence[Record]], budget: str) -> Sequence[Record]:
    """The single-task models to compare with: those of equal updates, also for runs of equal training time."""
    return runs[SINGLE, "long" if budget == "long" else "steps"]


def mean_metrics(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """{task: {metric: mean over seeds}}."""
    first = records[0]["metrics"]
    return {
        task: {metric: statistics.mean(record["metrics"][task][metric] for record in records) for metric in row}
        for task, row in first.items()
    }


def gains(records: Sequence[Record], baseline: Sequence[Record], kinds: str = "all tasks") -> list[dict[str, Any]]:
    """`multi_task_gain` of every seed against the baseline's mean over seeds, on the tasks of some kinds."""
    tasks, base = [Task.from_dict(task) for task in records[0]["tasks"]], mean_metrics(baseline)
    chosen = [task for task in tasks if KINDS[kinds](task)]
    return [multi_task_gain(record["metrics"], base, chosen) for record in records]


def spread(values: Sequence[float], digits: int, sign: bool = False) -> str:
    """Mean and, from two seeds on, its standard error."""
    mean = f"{statistics.mean(values):{'+' if sign else ''}.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column left, the others right."""
    lines = [f"| {' | '.join(columns)} |", f"|---{'|---:' * (len(columns) - 1)}|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def dense_steps(record: Record) -> int:
    """Updates of the shared bottom whose checkpoint a run started from."""
    start = record["config"]["model"].get("start")
    return int(Path(start).name.removeprefix("step_")) if start else 0


# ---- the parts of the page ------------------------------------------------------------------------------------------


def quality(runs: Mapping[Key, Sequence[Record]], seconds: Mapping[str, float]) -> str:
    """Gain over the baselines beside what training and running cost, one part per budget."""
    parts = []
    for budget, what in BUDGETS.items():
        if all(own != budget for _, own in runs):
            continue
        rows, alone = [], single(runs, budget)
        for (recipe, own), records in runs.items():
            if own != budget:
                continue
            one, over_single = records[0], gains(records, alone)
            over_shared = gains(records, runs[SHARED, budget]) if (SHARED, budget) in runs else None
            images, before = one["data"]["samples"], dense_steps(one)
            time = before * seconds[SHARED] + one["steps"] * seconds[recipe]
            assert images == alone[0]["data"]["samples"]
            rows.append([
                LABELS[recipe],
                f"{before} dense + {one['steps']}" if before else str(one["steps"]),
                f"{time / (runs[REFERENCE, 'steps'][0]['steps'] * seconds[REFERENCE]):.2f}",
                f"{one['model']['parameters'] / 1e6:.2f}",
                f"{one['flops_all'] / 1e6:.0f}",
                f"{one['flops_one'] / 1e6:.0f}",
                spread([gain["delta_task"] for gain in over_single], 1, sign=True),
                spread([gain["tasks_worse"] for gain in over_single], 0),
                spread([gain["delta_task"] for gain in over_shared], 1, sign=True) if over_shared else "",
                str(len(records)),
            ])  # fmt: skip
        columns = ["model", "updates", "training time", "M parameters", "MFLOPs, all tasks", "one task"]
        columns += ["delta_task over single-task, %", "tasks worse", "over shared bottom, %", "seeds"]
        parts.append(f"### Equal {what}\n\n{table(columns, rows)}")
    return "\n\n".join(parts)


def headline(runs: Mapping[Key, Sequence[Record]]) -> str:
    """The first metric of every task."""
    first = next(iter(runs.values()))[0]
    names = [(task["name"], next(iter(first["metrics"][task["name"]]))) for task in first["tasks"]]
    columns = ["model", "equal"]
    for task, metric in names:
        info = first["metric_info"][task][metric]
        columns.append(f"{task} {metric} {'↑' if info['higher_is_better'] else '↓'}")
    rows = []
    for (recipe, budget), records in runs.items():
        values = [spread([record["metrics"][task][metric] for record in records], 3) for task, metric in names]
        rows.append([LABELS[recipe], BUDGETS[budget], *values])
    return table(columns, rows)


def per_task(runs: Mapping[Key, Sequence[Record]]) -> str:
    """What each task gains or loses against its single-task model."""
    names = [task["name"] for task in runs[SINGLE, "steps"][0]["tasks"]]
    rows = []
    for (recipe, budget), records in runs.items():
        if records is not (alone := single(runs, budget)):
            found = gains(records, alone)
            values = [spread([gain["per_task"][name] for gain in found], 1, sign=True) for name in names]
            rows.append([LABELS[recipe], BUDGETS[budget], *values])
    return table(["model", "equal", *names], rows)


def oracle(runs: Mapping[Key, Sequence[Record]]) -> str:
    """How much of the gap between single-task models and the shared bottom each kind of routing recovers."""
    rows = []
    for (recipe, budget), records in runs.items():
        if budget == "time" or recipe == SHARED or (SHARED, budget) not in runs or (SINGLE, budget) not in runs:
            continue
        row = [LABELS[recipe], str(records[0]["steps"])]
        for kinds in KINDS:
            own, gap = (
                statistics.mean(gain["delta_task"] for gain in gains(which, runs[SHARED, budget], kinds))
                for which in (records, runs[SINGLE, budget])
            )
            row.append(f"{own:+.1f}" + (f" ({100 * own / gap:.0f} %)" if gap > 0 and recipe != SINGLE else ""))
        rows.append(row)
    return table(["model", "updates", *KINDS], rows)


def routing(runs: Mapping[Key, Sequence[Record]]) -> str:
    """Mutual information of task and expert, load and dead experts per layer."""
    rows = []
    for (recipe, budget), records in runs.items():
        for layer in records[0]["routing"]:
            own = [record["routing"][layer] for record in records]
            rows.append([
                LABELS[recipe],
                BUDGETS[budget],
                layer,
                spread([entry["mutual_information"] for entry in own], 3),
                spread([100 * entry["mutual_information_share"] for entry in own], 0),
                spread([entry["load_entropy"] for entry in own], 3),
                spread([entry["dead_experts"] for entry in own], 0),
            ])  # fmt: skip
    return table(
        ["model", "equal", "layer", "I(task; expert), nats", "% of most", "load entropy", "dead experts"], rows
    )


def front(runs: Mapping[Key, Sequence[Record]]) -> Figure:
    """Gain over single-task models against the cost of all tasks, and of one."""
    figure = Figure(figsize=(9.0, 4.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels: list[tuple[str, Callable[[Record], float]]] = [
        ("all tasks in one pass, MFLOPs per image", lambda record: record["flops_all"] / 1e6),
        ("one task alone, MFLOPs per image", lambda record: record["flops_one"] / 1e6),
    ]
    axes = figure.subplots(1, 2, sharey=True)
    looks = {recipe: (f"C{i % 10}", "os^D"[i // 10]) for i, recipe in enumerate(LABELS)}
    for panel, (title, cost) in zip(axes, panels, strict=True):
        named = set[str]()
        for (recipe, budget), records in runs.items():
            if budget == "long":
                continue
            values = [gain["delta_task"] for gain in gains(records, runs[SINGLE, "steps"])]
            colour, form = looks[recipe]
            filled = colour if budget == "steps" else "none"
            marker = {"marker": form, "s": 60, "facecolors": filled, "edgecolors": colour, "linewidths": 1.6}
            label = LABELS[recipe] if panel is axes[0] and recipe not in named else None
            named.add(recipe)
            panel.scatter([cost(records[0])], [statistics.mean(values)], label=label, **marker)
        panel.set_xlabel(title)
        panel.set_xlim(0, 1.08 * max(cost(records[0]) for records in runs.values()))
        panel.grid(alpha=0.3)
        panel.axhline(0, color="grey", linewidth=0.8)
    axes[0].set_ylabel("delta_task over single-task models, %")
    figure.suptitle("filled: equal updates; open: equal training time", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    return figure


def page(runs: Mapping[Key, Sequence[Record]], cost: Record) -> str:
    """docs/controls.md."""
    reference, trainer = runs[REFERENCE, "steps"][0], get_recipe(REFERENCE).trainer
    data, versions, size = reference["data"], reference["versions"], reference["data"]["spec"]["size"]
    return f"""# m3vit_micro and its controls on ProcRoom

Written by `python benchmarks/controls.py table` from the files in `benchmarks/controls/`; `make runs` makes those.

{reference["steps"]} updates of {trainer.batch_size} generated images of {size}x{size} pixels with all
{len(reference["tasks"])} tasks in each, AdamW, peak learning rate {trainer.lr:g}: the same recipe for every model, but
for the learning rate of the single-task models, {get_recipe(SINGLE).trainer.lr:g}. Scored on {data["samples"]} images
of the split "{data["split"]}", on which nothing was chosen. delta_task is the mean over tasks of the mean relative gain
of a task's metrics, in percent; higher is better. Training time is updates times seconds per update, measured side by
side without data loading on {cost["threads"]} thread(s), as a multiple of that of m3vit_micro. "Long" is as many
updates as the shared bottom makes in that time. Of several seeds, a mean and ± its standard error; gains are those of
every seed over the baseline's mean. Made with moe_mtl {versions["moe_mtl"]}, torch {versions["torch"]}.

## Quality and cost

{quality(runs, cost["seconds"])}

![quality against cost](controls.png)

## What each task gains over its single-task model, %

{per_task(runs)}

## Metrics

{headline(runs)}

## Does routing by task recover what sharing loses?

delta_task over the shared bottom of as many updates, in percent, by what a task predicts; in brackets as a share of
what the single-task models gain, where they gain anything.

{oracle(runs)}

## Routing

{routing(runs)}
"""


def write_tables(results: Path, docs: Path, current: Callable[[Record], bool]) -> None:
    """Writes both files out of the records that are `current`, or says what is still missing."""
    runs = read(results, current)
    lacking = [recipe for recipe in (REFERENCE, SINGLE, SHARED) if (recipe, "steps") not in runs]
    if lacking:
        print(f"no table yet: {', '.join(lacking)} at equal updates must be there")
        return
    cost = json.loads((results / "seconds_per_update.json").read_text())
    text, figure = page(runs, cost), front(runs)
    docs.mkdir(exist_ok=True)
    replace_file(docs / "controls.md", lambda path: path.write_text(text))
    replace_file(docs / "controls.png", lambda path: figure.savefig(path, format="png", dpi=110))
    print(f"table: {docs / 'controls.md'}")
