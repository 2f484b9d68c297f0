"""The JSON `eval.py` writes: what it says of weights, routing and baselines, and how it is printed.

`eval.py` lists its keys.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor

from moe_mtl.cost import AGREES, count_parameters
from moe_mtl.diagnostics import LayerUsage, diagnose
from moe_mtl.hub import replace_file
from moe_mtl.pretrained import sha256
from moe_mtl.scoring import multi_task_gain
from moe_mtl.sparse import extract
from moe_mtl.tasks import Task

PRUNED_MASS = 0.05  # share of its gate weight that a task gives up in the report
ELSEWHERE = ("root", "preload", "num_train")  # settings that change no sample that is scored
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


# ---- what is written ------------------------------------------------------------------------------------------------


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Writes results as JSON, whole or not at all; a value that is not finite becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(finite(results), indent=1, allow_nan=False) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text))


def finite(value: Any) -> Any:
    """The same nested data with null for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe_weights(path: Path) -> dict[str, Any]:
    """A weights file: its name, bytes, sha256, and the floating point type its tensors are stored in."""
    with safe_open(path, framework="pt") as file:
        found = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    dtypes = [name for code, name in _DTYPES.items() if code in found]
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path), "dtype": ", ".join(dtypes)}


def describe_routing(usage: Mapping[str, LayerUsage], tasks: Sequence[str]) -> dict[str, Any]:
    """The keys `usage` and `routing`: shares per layer, and what `moe_mtl.diagnostics.diagnose` makes of them."""
    return {
        "usage": {
            layer: {
                "tasks": list(tasks),
                "slots": shares.slots.tolist(),
                "mass": shares.mass.tolist(),
                "entropy": shares.entropy.tolist(),
                "weight": shares.weight.tolist(),
                "spread": shares.spread.tolist(),
            }
            for layer, shares in usage.items()
        },
        "routing": {layer: diagnose(shares) for layer, shares in usage.items()},
    }


def prune_each(model: Any, tasks: Sequence[str], x: Any) -> dict[str, Any]:
    """Every task cut out with the experts that serve it most: `extract` with `PRUNED_MASS` on one batch of inputs."""
    return {name: extract(model, name, [x], mass=PRUNED_MASS) for name in tasks}


def describe_pruned(pruned: Mapping[str, Any], extracted: Mapping[str, Any]) -> dict[str, Any]:
    """The key `pruned`: what is left of each task.

    Args:
        pruned: from `prune_each`.
        extracted: the same tasks with all experts they can reach.
    """
    return {
        name: {
            "mass": PRUNED_MASS,
            "parameters": count_parameters(model),
            "share": count_parameters(model) / count_parameters(extracted[name]),
            "layers": asdict(model.extraction)["layers"],
        }
        for name, model in pruned.items()
        if model.extraction.layers
    }


class LabelDigest:
    """A digest of the labels of one task that are scored: of their values and whose they are, not of the batches."""

    def __init__(self, task: Task):
        self.task = task
        self.counts, self.values = hashlib.sha256(), hashlib.sha256()

    def update(self, labels: Tensor | None, samples: int) -> None:
        """Takes the labels of so many samples, None where none has one."""
        valid = torch.zeros(samples, 1, dtype=torch.bool) if labels is None else self.task.valid(labels).cpu()
        self.counts.update(valid.reshape(samples, -1).sum(dim=1).numpy().tobytes())
        if labels is not None:
            self.values.update(labels.cpu()[valid].numpy().tobytes())

    def compute(self) -> str:
        """The digest of all that came."""
        return hashlib.sha256(self.counts.digest() + self.values.digest()).hexdigest()[:16]


# ---- baselines ------------------------------------------------------------------------------------------------------


def read_baseline(path: str, tasks: Sequence[Task], option: str = "baseline") -> dict[str, Any]:
    """The part of another result that a comparison needs.

    Args:
        path: of the file.
        tasks: those it must hold.
        option: what named the file, for errors.

    Returns:
        label, model (its name), parameters, data, seed, and the metrics of these tasks with NaN for null.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no result of eval.py, or lacks one of the tasks.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{option}: {path} is not a file; expected the JSON an earlier eval.py wrote")
    try:
        other = json.loads(Path(path).read_text())
        metrics = {task.name: other["metrics"][task.name] for task in tasks}
        model, data = other["model"], other["data"]
        named = {"label": other.get("label") or model["name"], "model": model["name"]}
        parameters = model["parameters"]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{option}: {path} is not a result of eval.py for these tasks ({error!r})") from error
    nan_for_null = {t: {m: math.nan if v is None else v for m, v in row.items()} for t, row in metrics.items()}
    return {**named, "parameters": parameters, "data": data, "seed": other.get("seed"), "metrics": nan_for_null}


def compare(
    results: Mapping[str, Any], baselines: Sequence[Mapping[str, Any]], tasks: Sequence[Task]
) -> list[dict[str, Any]]:
    """Each baseline with `gain`, what `moe_mtl.scoring.multi_task_gain` says against it; labels made distinct.

    Raises:
        ValueError: a baseline was scored on other samples, or a metric has no value.
    """
    compared, labels = [], set()
    for baseline in baselines:
        _check_alike(results, baseline, tasks, "baseline")
        label, copies = baseline["label"], 1
        while label in labels:
            copies += 1
            label = f"{baseline['label']} ({copies})"
        labels.add(label)
        gain = multi_task_gain(results["metrics"], baseline["metrics"], tasks)
        compared.append({**baseline, "label": label, "gain": gain})
    return compared


def spread(
    results: Mapping[str, Any], repeats: Sequence[Mapping[str, Any]], tasks: Sequence[Task]
) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and standard deviation of every metric over this training and its repeats with other seeds.

    Args:
        results: this model's.
        repeats: parts of the other results, as `read_baseline` returns them.
        tasks: of the model.

    Returns:
        {task: {metric: {"mean", "std"}}}.

    Raises:
        ValueError: a repeat is of another model, has a seed that was there, lacks a metric, or was scored on other
            samples.
    """
    seeds = [results.get("seed")]
    for other in repeats:
        if other["seed"] is None or other["seed"] in seeds:
            raise ValueError(f"repeat: {other['label']} has seed {other['seed']}, expected another than {seeds}")
        seeds.append(other["seed"])
        if other["model"] != results["model"]["name"] or other["parameters"] != results["model"]["parameters"]:
            raise ValueError(
                f"repeat: {other['label']} is a {other['model']} of {other['parameters']:,} parameters, this model a "
                f"{results['model']['name']} of {results['model']['parameters']:,}; expected the same with other seeds"
            )
        _check_alike(results, other, tasks, "repeat")
        lacking = [f"{t} {m}" for t, row in results["metrics"].items() for m in row if m not in other["metrics"][t]]
        if lacking:
            raise ValueError(f"repeat: {other['label']} has no {', '.join(lacking)}; score it again with this eval.py")
    runs = [results["metrics"], *(other["metrics"] for other in repeats)]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for task, row in results["metrics"].items():
        values = {m: torch.tensor([run[task][m] for run in runs], dtype=torch.float64) for m in row}
        found[task] = {m: {"mean": float(v.mean()), "std": float(v.std())} for m, v in values.items()}
    return found


def check_samples(data: Mapping[str, Any], other: Mapping[str, Any], option: str) -> None:
    """Refuses results that were scored on another number of samples, another split or other data.

    Args:
        data: what is, or is about to be, scored: name, split and samples.
        other: results as `read_baseline` returns them.
        option: that named them.

    Raises:
        ValueError: says what was scored there and here.
    """
    ours, theirs = _scored_on(data)[0], _scored_on(other["data"])[0]
    if ours != theirs:
        raise ValueError(f"{option}: {other['label']} was scored on {theirs}, this model on {ours}; score both alike")


def _check_alike(results: Mapping[str, Any], other: Mapping[str, Any], tasks: Sequence[Task], option: str) -> None:
    """Refuses results that were scored on other samples, labels or settings of the data."""
    check_samples(results["data"], other, option)
    here, there = (_scored_on(data)[1] for data in (results["data"], other["data"]))
    mine, others = (data.get("labels") or {} for data in (results["data"], other["data"]))
    known = [task.name for task in tasks if task.name in mine and task.name in others]
    if moved := [name for name in known if mine[name] != others[name]]:
        raise ValueError(
            f"{option}: {other['label']} was scored on other labels of {', '.join(moved)}; score both on the same rows "
            "of the same file"
        )
    # settings tell what labels do not: of dense tasks, and of results without a digest
    changed = [name for name in here if name in there and here[name] != there[name]]
    if changed and len(known) < len(tasks):
        differ = ", ".join(f"{name} {there[name]!r} against {here[name]!r}" for name in changed)
        raise ValueError(f"{option}: {other['label']} was scored on other data ({differ}); score both alike")


def _scored_on(data: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What was scored, as text, and the settings that decide which samples these are."""
    what = f"{data.get('samples')} {data.get('split')} samples of {data.get('name')}"
    spec = json.loads(json.dumps(data.get("spec", {})))  # a file has lists where the configuration has tuples
    return what, {name: value for name, value in spec.items() if name not in ELSEWHERE}


# ---- what is shown --------------------------------------------------------------------------------------------------


def format_metric(value: float | None, unit: str = "") -> str:
    """A score with its unit: a share in percent, anything else with four significant digits.

    None and NaN have no value: nothing was labelled, or what was does not define the metric, as one class no AUC.
    """
    if value is None or value != value:
        return "no value"
    return f"{100 * value:.1f} %" if unit == "share" else f"{value:.4g}{'' if unit == '°' else ' '}{unit}".rstrip()


def width_of(args: Mapping[str, Any]) -> str:
    """The width of a dense model, from its options."""
    return str(args["dim"]) if "dim" in args else ", ".join(map(str, args["widths"]))


def show(results: Mapping[str, Any]) -> None:
    """Prints the scores, the cost, the routing, the agreement and the gains."""
    console = Console(markup=False, emoji=False)  # a label may hold brackets and colons
    for table in (_scores(results), _cost(results), _routing(results)):
        if table.row_count:
            console.print(table)
    worst, where = max(
        (value, f"{task}, {how}") for task, row in results["agreement"].items() for how, value in row.items()
    )
    verdict, style = ("agree with", None) if worst <= AGREES else ("DIFFER from", "red")
    line = f"one task alone and extracted {verdict} the full pass: largest relative difference {worst:.1e} ({where})"
    console.print(line, style=style, soft_wrap=True)
    for baseline in results.get("baselines", []):
        gain = baseline["gain"]
        line = (
            f"against {baseline['label']}: delta_task {gain['delta_task']:+.2f} % (higher is better), "
            f"delta_metric {gain['delta_metric']:+.2f} % (lower is better), {gain['tasks_worse']} tasks worse"
        )
        console.print(line, soft_wrap=True)


def _scores(results: Mapping[str, Any]) -> Table:
    data, baselines = results["data"], results.get("baselines", [])
    table = Table(title=f"{results['label']} on {data['samples']} {data['split']} samples of {data['name']}")
    table.add_column("task")
    table.add_column("metric")
    for column in ("value", *(baseline["label"] for baseline in baselines)):
        table.add_column(column, justify="right")
    table.add_column("better")
    for task, metrics in results["metrics"].items():
        for i, (metric, value) in enumerate(metrics.items()):
            info = results["metric_info"][task][metric]
            values = [value, *(baseline["metrics"][task].get(metric) for baseline in baselines)]
            direction = "higher" if info["higher_is_better"] else "lower"
            shown = (format_metric(each, info["unit"]) for each in values)
            table.add_row(task if i == 0 else "", metric, *shown, direction)
        table.add_section()
    return table


def _cost(results: Mapping[str, Any]) -> Table:
    batches = sorted(results["cost"], key=int)
    table = Table(title="cost")
    for column in ("runs", "task", "MFLOPs", "k parameters", *(f"ms, batch {batch}" for batch in batches)):
        table.add_column(column, justify="left" if column in ("runs", "task") else "right", no_wrap=column == "runs")
    previous = None
    for rows in zip(*(results["cost"][batch] for batch in batches), strict=True):
        first = rows[0]
        if previous not in (None, first["run"]):
            table.add_section()
        previous = first["run"]
        numbers = [first["flops"] / first["batch"] / 1e6, first["parameters"] / 1e3]
        numbers += [row["seconds"] * 1e3 for row in rows]
        table.add_row(first["run"], first["task"] or "all", *(f"{number:.1f}" for number in numbers))
    return table


def _routing(results: Mapping[str, Any]) -> Table:
    table = Table(title="routing")
    table.add_column("layer")
    for column in ("I(task; expert), nats", "of most", "load entropy", "dead experts"):
        table.add_column(column, justify="right")
    for layer, found in results["routing"].items():
        table.add_row(
            layer,
            f"{found['mutual_information']:.3f}",
            f"{found['mutual_information_share']:.0%}",
            f"{found['load_entropy']:.0%}",
            f"{found['dead_experts']} of {len(found['load'])}",
        )
    return table
