"""The card of a pretrained model: one Markdown page, every number of which comes from the JSON that eval.py wrote.

A card says what the model is and how to load it, what it learned from and by which recipe, its metrics beside its
baselines with the tasks that lose named, what all tasks and one task cost, how its experts are used, and what the
numbers do not show.
"""

import textwrap
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from moe_mtl.card_page import HUB_TASKS, count, front_matter, page, short, table
from moe_mtl.cost import AGREES
from moe_mtl.gates import resolve_k
from moe_mtl.results import format_metric, width_of
from moe_mtl.trainer_config import FREE_TO_CHANGE

WIDTH = 100  # of the lines of code

# data set -> where it comes from and under which terms, and what a model of it cannot be expected to do
DATA = {
    "ProcRoom": (
        "Rooms rendered from a seed by `moe_mtl.data.ProcRoom`, with exact labels. No photograph and nobody else's "
        "work is in them, nothing is downloaded; they come under the licence of the code.",
        "It has seen generated rooms only: nothing here says how it does on photographs.",
    ),
    "NYUv2": (
        "Frames of NYU Depth v2, read from a folder of yours; neither images nor labels come with this library, and "
        "their owners state no licence for the labels.",
        "It has seen indoor scenes of one data set only.",
    ),
    "CensusIncome": (
        "Census-Income (KDD), Lane and Kohavi 2000, https://archive.ics.uci.edu/dataset/117/census+income+kdd, licence "
        "CC BY 4.0; read from a folder of yours. Names of columns and categories are in the model's configuration.",
        "It tells of answers to a survey in the United States of 1994 and 1995, with their unequal chances by sex and "
        "race, which are among its columns: no ground for decisions about people.",
    ),
}

# what `moe_mtl.diagnostics.diagnose` tells of a layer -> heading and format of its column
ROUTING = {
    "mutual_information": ("mutual information, nats", ".3f"),
    "mutual_information_share": ("of the possible", ".0%"),
    "load_entropy": ("evenness of load", ".0%"),
    "gate_entropy": ("gate entropy, nats", ".2f"),
    "dead_experts": ("dead experts", "d"),
}


def card(results: Mapping[str, Any]) -> str:
    """The card of a model as Markdown, with the head that model hubs read.

    Args:
        results: what eval.py writes, see its docstring, labelled `<model>.<tag>`; and `limits`, a person's words on
            what not to expect of the model. A comparison, cost, usage, recipe or limit that is absent is left out.
    """
    name = results["label"]
    sections = [
        ("", _summary(results)),
        ("Use", _use(results)),
        ("Scores", _scores(results)),
        ("Cost", _cost(results)),
        ("Experts", _experts(results)),
        ("Data", _data(results)),
        ("Training", _training(results)),
        ("Limits", _limits(results)),
        ("File", _file(results)),
    ]
    return page(_head(results), name, sections)


# ---- sections -------------------------------------------------------------------------------------------------------


def _head(results: Mapping[str, Any]) -> str:
    from huggingface_hub import EvalResult

    data = results["data"]
    kinds: dict[str, str] = {task["name"]: task["kind"] for task in results["tasks"]}
    hub_tasks = HUB_TASKS["table" if _image_size(results) is None else "image"]
    scores = [
        EvalResult(
            task_type=hub_tasks.get(kinds[task], kinds[task].replace("_", "-")),
            task_name=task,
            dataset_type=data["name"].lower(),
            dataset_name=data["name"],
            dataset_config=task,  # tasks of one kind stay apart
            dataset_split=data["split"],
            metric_type=metric,
            metric_value=round(value, 6),
        )
        for task, metrics in results["metrics"].items()
        for metric, value in metrics.items()
        if value is not None
    ]
    return front_matter(
        kinds.values(),
        model_name=results["label"],
        datasets=[data["name"]],
        metrics=list(dict.fromkeys(metric for metrics in results["metrics"].values() for metric in metrics)),
        eval_results=scores or None,
    )


def _summary(results: Mapping[str, Any]) -> str:
    model, weights = results["model"], results["weights"]
    args, tasks = model["args"], [task["name"] for task in results["tasks"]]
    text = (
        f"`{model['name']}`, one model for {count(len(tasks), 'task')} ({', '.join(tasks)}): "
        f"{short(model['parameters'])} parameters"
    )
    if "gate" in args and results.get("usage"):
        active = resolve_k(args["gate"], args["experts"], args.get("k"))
        layers = count(len(results["usage"]), "layer")
        text += f", {layers} of {args['experts']} experts of which a `{args['gate']}` gate gives each token {active}"
    return f"{text}; a file of {weights['bytes'] / 1e6:.1f} MB in {weights['dtype']}."


def _use(results: Mapping[str, Any]) -> str:
    size = _image_size(results)
    code = _use_of_table(results) if size is None else _use_of_images(results, size)
    rows = [[f"`{task['name']}`", task["kind"], str(task["channels"])] for task in results["tasks"]]
    shapes = "Shapes per kind stand in `moe_mtl.tasks`."
    text = [f"```python\n{code}```", table(["task", "kind", "#channels"], rows), shapes]
    columns = results["model"]["args"].get("columns")
    if columns:
        kinds = [f"one of {len(c['categories'])}" if c.get("categories") else c["kind"] for c in columns]
        listed = [f"`{column['name']}` ({kind})" for column, kind in zip(columns, kinds, strict=True)]
        text.append(f"Columns: {', '.join(listed)}.")
    return "\n\n".join(text)


def _use_of_table(results: Mapping[str, Any]) -> str:
    task, kind = (results["tasks"][0][key] for key in ("name", "kind"))
    columns = results["model"]["args"].get("columns") or []
    same = f'moe_mtl.Predictor(alone)(row)["{task}"]'
    if kind in ("binary", "classification"):
        same = f'assert {same}["label"] == prediction["label"]'
    numbers = [f' | {{"{column["name"]}": 40}}' for column in columns if column["kind"] == "numeric"]
    given = numbers[0] if numbers else ""
    return f"""\
import moe_mtl

predict = moe_mtl.Predictor("{results["label"]}")
row = {{column["name"]: None for column in predict.model.config["args"]["columns"]}}  # None where a value is missing
predictions = predict(row{given})  # {{task: answer}}, all tasks; of a data frame a list of such
prediction = predict(row, tasks=["{task}"])["{task}"]  # runs the path of that task only

alone = moe_mtl.extract(predict.model, "{task}")  # a model of its own
{same if same.startswith("assert") else f"{same}  # the same, up to rounding"}
"""


def _use_of_images(results: Mapping[str, Any], size: tuple[int, int]) -> str:
    task = results["tasks"][0]["name"]
    return f"""\
import moe_mtl
import torch

model = moe_mtl.create_model("{results["label"]}", pretrained=True)
x = torch.rand(1, 3, {size[0]}, {size[1]})  # images in 0..1
predictions = model(x)  # {{task: prediction}}, all tasks
prediction = model(x, tasks=["{task}"])["{task}"]  # runs the path of that task only

alone = moe_mtl.extract(model, "{task}")  # a model of its own; create_model(..., tasks=["{task}"]) gives it directly
assert torch.allclose(alone(x)["{task}"], prediction, atol=1e-4)
"""


def _scores(results: Mapping[str, Any]) -> str:
    data, baselines, spread = results["data"], _baselines(results), results.get("spread")
    rows = []
    for task, metrics in results["metrics"].items():
        for metric, value in metrics.items():
            info = results["metric_info"][task][metric]
            better = "higher" if info["higher_is_better"] else "lower"
            others = [other["metrics"].get(task, {}).get(metric) for other in baselines]
            values = [format_metric(number, info["unit"]) for number in (value, *others)]
            if spread:
                values.insert(1, _spread(spread[task][metric], info["unit"]))
            rows.append([f"`{task}`", metric.replace("_", " "), better, *values])
    head = ["task", "metric", "better", "#this model", *(f"#{other['label']}" for other in baselines)]
    if spread:
        head.insert(4, f"#mean ± deviation of {len(results['seeds'])} seeds")
    text = [
        f"On {data['samples']:,} samples of the split `{data['split']}` of {data['name']}, where they have labels.",
        table(head, rows),
    ]
    text += [_comparison(other) for other in baselines if other.get("gain")]
    return "\n\n".join(text)


def _spread(over: Mapping[str, float | None], unit: str) -> str:
    """Mean and standard deviation; the latter with two digits."""
    mean, std = over["mean"], over["std"]
    text = format_metric(mean, unit)
    if mean is None or std is None:
        return text
    number = text.partition(" ")[0].rstrip("°")
    return f"{number} ± {100 * std if unit == 'share' else std:.2g}{text[len(number) :]}"


def _comparison(other: Mapping[str, Any]) -> str:
    """A sentence on the gain over a baseline, every losing task named."""
    gain = other["gain"]
    losing = sorted((value, task) for task, value in gain["per_task"].items() if value < 0)
    verdict = "no task loses" if not losing else f"{count(len(losing), 'task')} of {len(gain['per_task'])} lost: "
    verdict += ", ".join(f"`{task}` ({value:+.{1 if value <= -0.05 else 2}f} %)" for value, task in losing)
    return (
        f"Against {other['label']} ({short(other['parameters'])} parameters): **delta_task "
        f"{gain['delta_task']:+.2f} %** (mean gain over tasks, higher is better), delta_metric "
        f"{gain['delta_metric']:+.2f} % (over metrics, lower is better); {verdict}."
    )


def _cost(results: Mapping[str, Any]) -> str:
    tables = results.get("cost")
    if not tables:
        return ""
    batches = sorted(tables, key=int)
    groups: dict[str, dict[str, list[Mapping[str, Any]]]] = {}  # run -> batch -> its rows, one per task
    for batch in batches:
        for row in tables[batch]:
            groups.setdefault(row["run"], {}).setdefault(batch, []).append(row)
    lines = []
    for run, rows in groups.items():
        first = rows[batches[0]]
        flops = fmean(row["flops"] / row["batch"] for row in first)
        label = run if first[0]["task"] is None else f"{run}, mean of {len(first)}"
        cells = [f"{flops / 1e6:.1f}", _number(fmean(row["relative_flops"] for row in first), ".0%")]
        cells.append(short(fmean(row["parameters"] for row in first)))
        cells += [f"{1e3 * fmean(row['seconds'] for row in rows[batch]):.2f}" for batch in batches]
        lines.append([label, *cells])
    head = ["runs", "#MFLOPs per sample", "#of all tasks", "#parameters", *(f"#ms, batch {batch}" for batch in batches)]
    note = f"A multiply-add is 2 FLOPs. Times are medians on {results['versions']['device']}."
    if results.get("dense"):
        dense = results["dense"]
        note += (
            f" The dense rows are those of an untrained `{dense['name']}` of width {width_of(dense['args'])}, the one "
            "nearest in parameters."
        )
    text = [table(head, lines), note]
    if results.get("agreement"):
        worst = max(value for row in results["agreement"].values() for value in row.values())
        verdict = "agrees with" if worst <= AGREES else "DIFFERS from"
        text.append(
            f"A task alone or extracted {verdict} the full pass: the largest difference is {worst:.1e} of the largest "
            "value predicted."
        )
    return "\n\n".join(text)


def _experts(results: Mapping[str, Any]) -> str:
    usage, routing = results.get("usage"), results.get("routing") or {}
    if not usage:
        return ""
    text = []
    columns = [key for key in ROUTING if any(layer.get(key) is not None for layer in routing.values())]
    if columns:
        rows = [
            [f"`{layer}`", *(_number(facts.get(key), ROUTING[key][1]) for key in columns)]
            for layer, facts in routing.items()
        ]
        text.append(table(["layer", *(f"#{ROUTING[key][0]}" for key in columns)], rows))
        text.append("Mutual information is that of task and expert: 0 where all tasks use the experts alike.")
    layers, tasks = list(usage), next(iter(usage.values()))["tasks"]
    favourites = [
        [f"`{task}`", *(_favourites(usage[layer]["slots"][position]) for layer in layers)]
        for position, task in enumerate(tasks)
    ]
    text.append("The experts each task chooses most, and the share of its choices that falls on them:")
    text.append(table(["task", *(f"`{layer}`" for layer in layers)], favourites))
    return "\n\n".join(text)


def _data(results: Mapping[str, Any]) -> str:
    data = results["data"]
    source = DATA.get(data["name"], ("", ""))[0]
    spec = textwrap.fill(", ".join(f"{name}={value!r}" for name, value in data["spec"].items()), WIDTH - 4)
    code = f"""\
from moe_mtl.data import {data["name"]}

data = {data["name"]}(
{textwrap.indent(spec, "    ")}
)
samples = data.split("{data["split"]}")
"""
    return "\n\n".join(filter(None, [source, f"```python\n{code}```"]))


def _training(results: Mapping[str, Any]) -> str:
    recipe = results.get("recipe")
    if not recipe:
        return ""
    settings = {
        key: value
        for key, value in recipe["trainer"].items()
        if key == "steps" or f"trainer.{key}" not in FREE_TO_CHANGE
    }
    listed = "\n".join(f"- {key}: {value}" for key, value in settings.items())
    again = f"The same again, in a checkout: `python train.py --config weights/{results['label']}/run.json`."
    return "\n\n".join(filter(None, [results.get("training"), listed, again]))


def _limits(results: Mapping[str, Any]) -> str:
    size = _image_size(results)
    gains = [other["gain"]["per_task"] for other in _baselines(results) if other.get("gain")]
    losing = sorted({task for gain in gains for task, value in gain.items() if value < 0})
    unscored = sorted(task for task, metrics in results["metrics"].items() if None in metrics.values())
    facts = [
        results.get("limits"),
        DATA.get(results["data"]["name"], ("", ""))[1],
        f"Made for images of {size[0]}x{size[1]} pixels; other sizes run, with an interpolated position embedding, but "
        "were not scored."
        if size
        else "Made for the columns of its data, by name and kind; categories it has not seen share one vector.",
    ]
    if results.get("spread"):
        others = ", ".join(map(str, results["seeds"][1:]))
        facts.append(f"The weights are those of seed {results['seed']}; seeds {others} score as told in Scores.")
    elif results.get("seed") is not None:
        facts.append(
            f"One training run (seed {results['seed']}): how far scores vary between seeds is not known from it."
        )
    if losing:
        facts.append(f"Some baseline does better on {', '.join(losing)}; see Scores.")
    if unscored:
        facts.append(f"Not scored in full, for lack of labels: {', '.join(unscored)}.")
    if not _baselines(results):
        facts.append("It has not been compared with other models here.")
    return "\n".join(f"- {fact}" for fact in facts if fact)


def _file(results: Mapping[str, Any]) -> str:
    weights, versions = results["weights"], results["versions"]
    facts = {
        f"`{weights['file']}`": f"{weights['bytes']:,} bytes, sha256 `{weights['sha256']}`",
        "stored as": f"{weights['dtype']}, read as float32; the scores are of this file",
        "scored": f"{results['date']}, {', '.join(f'{name} {version}' for name, version in versions.items())}",
    }
    return "\n".join(f"- {label}: {value}" for label, value in facts.items())


# ---- pieces ---------------------------------------------------------------------------------------------------------


def _baselines(results: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return results.get("baselines") or []


def _image_size(results: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of the images a model was made for; None for a model on tables."""
    size = results["model"]["args"].get("image_size")
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _favourites(shares: Sequence[float | None], shown: int = 4) -> str:
    """The experts with the largest shares of a task's choices, and their sum: 3 7 1 12 (81 %)."""
    known = {expert: share for expert, share in enumerate(shares) if share}
    top = sorted(known, key=lambda expert: -known[expert])[:shown]
    return f"{' '.join(map(str, top))} ({100 * sum(known[expert] for expert in top):.0f} %)" if top else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form).replace("%", " %")
