"""Scores a trained model on every task, measures what one task costs alone, and writes the numbers and a report page.

    python eval.py runs/demo
    python eval.py runs/demo --split=val --limit=500 --tasks=depth,normals
    python eval.py runs/nyu --data.root=data/nyuv2 --report=report.html --baseline=runs/single/results.json
    python eval.py runs/demo --help

The JSON (--out, by default results.json in the model folder) holds

    model          name, folder, options, parameters, number of expert layers
    data           name, spec, split, samples
    tasks          as `Task.to_dict` writes them
    metrics        {task: {metric: value}}; null where the split has no label
    metric_info    {task: {metric: {unit, higher_is_better}}}
    cost           {batch size: rows of `moe_mtl.cost.Cost`}
    agreement      {task: {alone, extracted}}: largest difference from the full pass over the largest value predicted
    usage          {layer: {tasks, slots, mass}}: shares of the experts, see `moe_mtl.viz.LayerUsage`
    baseline, gain what --baseline named, and `moe_mtl.scoring.multi_task_gain` against it
    recipe, seed, training, versions, date
"""

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import jsonargparse

from moe_mtl.recipes import get_recipe
from moe_mtl.tasks import Task, nearest

RUN = "run.json"  # what train.py leaves beside the model
COST_BATCHES = (1, 32)
SHOWN = 4  # samples in the pictures


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Runs the command line; returns what it wrote as JSON.

    Raises:
        ValueError, FileNotFoundError: the folder, a task, an option or the data is not what it should be.
    """
    folder, options = model_folder(argv)
    run = read_run(folder)
    given = parse(folder, run, options)

    import torch  # slow to import, as what follows; a mistyped option need not wait for it

    from moe_mtl.cost import agreement, cost_table, count_parameters
    from moe_mtl.hub import load, replace_file
    from moe_mtl.multitask import task_ids
    from moe_mtl.sparse import extract

    device = torch.device("cuda" if torch.cuda.is_available() and given.device == "auto" else "cpu")
    model: Any = load(folder).to(device)
    names = given.tasks.split(",") if given.tasks else [task.name for task in model.tasks]
    tasks = [model.tasks[i] for i in task_ids(model.tasks, names)]
    baseline = read_baseline(given.baseline, tasks) if given.baseline else None

    scored = score(model, given.data.split(given.split), tasks, given.batch_size, given.limit)
    shown, images, usage = scored.pop("shown"), scored.pop("images"), scored.pop("usage")
    extracted = {task.name: extract(model, [task.name]) for task in tasks}
    # the other tasks are part of "all tasks" whatever --tasks says
    repeated = {n: images[torch.arange(n) % len(images)] for n in COST_BATCHES}
    cost = {n: [asdict(row) for row in cost_table(model, x, extracted, given.rounds)] for n, x in repeated.items()}
    results: dict[str, Any] = {
        "model": {**model.config, "folder": str(folder), "parameters": count_parameters(model)},
        "data": {
            "name": type(given.data).__name__,
            "spec": asdict(given.data),
            "split": given.split,
            "samples": scored.pop("samples"),
        },
        "tasks": [task.to_dict() for task in tasks],
        **scored,
        "usage": {
            layer: {"tasks": names, "slots": shares.slots.tolist(), "mass": shares.mass.tolist()}
            for layer, shares in usage.items()
        },
        "cost": {str(batch): rows for batch, rows in cost.items()},
        "agreement": agreement(model, extracted, images[: max(COST_BATCHES)]),
        "recipe": run or None,
        "seed": run.get("trainer", {}).get("seed"),
        "training": describe_training(folder, run),
        "versions": versions(device),
        "date": given.date or datetime.now(UTC).date().isoformat(),
    }
    out = Path(given.out or folder / "results.json")
    out.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        text = json.dumps(finite(results), indent=1, allow_nan=False) + "\n"
        replace_file(out, lambda path: path.write_text(text))

    write()  # before the comparison, which a metric without a value refuses
    if baseline:
        from moe_mtl.scoring import multi_task_gain

        same_data(results["data"], baseline["data"])
        results |= {"baseline": baseline, "gain": multi_task_gain(results["metrics"], baseline["metrics"], tasks)}
        write()
    results = finite(results)
    show(results)
    print(f"numbers: {out}")
    if given.report:
        from moe_mtl.report import draw, write_report

        print(f"report: {write_report(given.report, results, draw(model, tasks, shown, usage))}")
    return results


# ---- what was asked for ---------------------------------------------------------------------------------------------


def model_folder(argv: Sequence[str]) -> tuple[Path, list[str]]:
    """The folder a command line names first, and the options that follow."""
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0)
    if not argv or argv[0].startswith("-"):
        raise ValueError(
            "name a model folder first: python eval.py FOLDER [options], as train.py or moe_mtl.save wrote it"
        )
    folder = Path(argv[0])
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        what = f"holds no {' and no '.join(missing)}" if folder.is_dir() else "is not a folder"
        raise FileNotFoundError(f"{folder} {what}; expected a folder written by train.py or moe_mtl.save")
    return folder, list(argv[1:])


def read_run(folder: Path) -> dict[str, Any]:
    """The configuration train.py left beside the model; empty when it did not make the model."""
    path = folder / RUN
    if not path.exists():
        return {}
    try:
        run = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); delete it and pass --recipe") from error
    return run if isinstance(run, dict) else {}


def parse(folder: Path, run: Mapping[str, Any], options: Sequence[str]) -> Any:
    """The options, typed and checked; `data` is that of the run with the changes of the command line."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default=run.get("recipe"))
    recipe = first.parse_known_args(options)[0].recipe
    if not recipe:
        raise ValueError(f"{folder} has no {RUN} that names its recipe; pass --recipe=NAME for the data to score it on")
    data = get_recipe(recipe).data
    if recipe == run.get("recipe"):
        try:
            data = type(data)(**run.get("data", {}))
        except TypeError as error:
            raise ValueError(f"{folder / RUN} does not describe {type(data).__name__} data ({error})") from error
    parser = jsonargparse.ArgumentParser(prog="eval.py FOLDER", exit_on_error=False)
    add = parser.add_argument
    add("--recipe", default=recipe, help="whose data to score on")
    add("--data", type=type(data), default=data)
    add("--split", default="test", help="which split")
    add("--limit", type=int | None, default=None, help="score only the first samples")
    add("--batch_size", type=int, default=64, help="samples per pass when scoring")
    add("--tasks", type=str | None, default=None, help="comma-separated names; all by default")
    add("--out", type=str | None, default=None, help="the JSON; results.json in the model folder by default")
    add("--report", type=str | None, default=None, help="an HTML page to write")
    add("--baseline", type=str | None, default=None, help="JSON of another eval.py, usually of single-task models")
    add("--rounds", type=int, default=5, help="timed calls per row of the cost table")
    add("--device", choices=("auto", "cpu"), default="auto", help="auto: the GPU where there is one")
    add("--date", type=str | None, default=None, help="the date to write down; today by default")
    try:
        given = parser.instantiate(parser.parse_args(list(options)))
    except argparse.ArgumentError as error:
        _, unknown, rest = str(error).partition("nrecognized arguments: ")
        known = [f"--{name}" for name in parser.get_defaults().keys(branches=False)]
        hint = f"; {nearest(rest.split()[0].partition('=')[0], known)}" if unknown else ""
        raise ValueError(f"{error}{hint}") from error
    for name in ("limit", "batch_size", "rounds"):
        if given[name] is not None and given[name] < 1:
            raise ValueError(f"{name}: got {given[name]}, expected at least 1")
    return given


def read_baseline(path: str, tasks: Sequence[Task]) -> dict[str, Any]:
    """The part of another result that a comparison needs: model, data and the metrics of these tasks."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"baseline: {path} is not a file; expected the JSON an earlier eval.py wrote")
    try:
        other = json.loads(Path(path).read_text())
        metrics = {task.name: other["metrics"][task.name] for task in tasks}
        model, data = other["model"]["name"], other["data"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"baseline: {path} is not a result of eval.py for these tasks ({error!r})") from error
    nan_for_null = {t: {m: math.nan if v is None else v for m, v in row.items()} for t, row in metrics.items()}
    return {"model": model, "data": data, "metrics": nan_for_null}


def same_data(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuses a baseline that was scored on other samples."""
    for key in ("name", "split", "samples"):
        if ours[key] != theirs.get(key):
            raise ValueError(
                f"baseline: scored on {key} {theirs.get(key)!r}, this model on {ours[key]!r}; score both alike"
            )


# ---- measuring ------------------------------------------------------------------------------------------------------


def score(model: Any, dataset: Any, tasks: Sequence[Task], batch_size: int, limit: int | None) -> dict[str, Any]:
    """Metrics and expert usage over a data set, and the first batch to picture.

    Returns:
        metrics, metric_info and samples as in the JSON; usage as `ExpertUsage.compute` gives it; images [b c h w], of
        the first batch, on the model's device; shown, (images, predictions, targets) of its first samples on the CPU.
    """
    import torch
    from rich.console import Console
    from rich.progress import track
    from torch.utils.data import DataLoader, Subset

    from moe_mtl.data import collate
    from moe_mtl.metrics import metric_info
    from moe_mtl.scoring import TaskMetrics
    from moe_mtl.viz import ExpertUsage

    names, device = [task.name for task in tasks], next(model.parameters()).device
    if limit is not None:
        dataset = Subset(dataset, range(min(limit, len(dataset))))
    if len(dataset) == 0:
        raise ValueError("split: it holds no samples")
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=partial(collate, tasks=tasks))
    metrics, usage, shown, images = TaskMetrics(tasks), ExpertUsage(model.tasks), None, None
    console = Console(stderr=True)
    with torch.inference_mode():
        for batch in track(loader, "scoring", console=console, transient=True, disable=not console.is_terminal):
            x = batch["image"].to(device)
            predictions, routings = model(x, tasks=names, return_routing=True)
            predictions = {name: prediction.float().cpu() for name, prediction in predictions.items()}
            metrics.update(predictions, batch)
            usage.update(routings)
            if images is None:
                images = x
                first = {name: batch[name][:SHOWN] if batch.get(name) is not None else None for name in names}
                shown = (x[:SHOWN].cpu(), {name: p[:SHOWN] for name, p in predictions.items()}, first)
    info = {m: metric_info(m) for task in tasks for m in task.metrics}
    return {
        "metrics": metrics.compute(),
        "metric_info": {
            task.name: {
                m: {"unit": unit_of(task, info[m].unit), "higher_is_better": info[m].higher_is_better}
                for m in task.metrics
            }
            for task in tasks
        },
        "usage": usage.compute(names),
        "samples": len(dataset),
        "images": images,
        "shown": shown,
    }


def unit_of(task: Task, unit: str) -> str:
    """The unit of a metric's value for a task: labels of depth tasks are metres, other labels have none we know."""
    return {"label": "m" if task.kind == "depth" else "", "degree": "°"}.get(unit, unit)


def describe_training(folder: Path, run: Mapping[str, Any]) -> str | None:
    """One sentence on how the model was trained, from what the run left."""
    trainer = run.get("trainer")
    if not trainer:
        return None
    text = f"Recipe {run.get('recipe')}: {trainer['steps']} steps of {trainer['batch_size']} samples"
    log = folder / "metrics.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    seconds = [record["seconds"] for record in records if record.get("seconds") is not None]
    time = f", {seconds[-1] / 60:.1f} minutes" if seconds else ""
    return f"{text}{time}, seed {trainer['seed']}."


def versions(device: Any) -> dict[str, str]:
    """What the numbers were made with."""
    import torch

    from moe_mtl import __version__

    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    return {
        "moe_mtl": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{machine}, {torch.get_num_threads()} of {os.cpu_count()} threads",
    }


# ---- showing --------------------------------------------------------------------------------------------------------


def show(results: Mapping[str, Any]) -> None:
    """Prints the scores, the cost and the agreement."""
    from rich.console import Console
    from rich.table import Table

    from moe_mtl.cost import AGREES
    from moe_mtl.report import format_metric

    console = Console()
    data, baseline = results["data"], results.get("baseline")
    table = Table(title=f"{results['model']['name']} on {data['samples']} {data['split']} samples of {data['name']}")
    for column in ("task", "metric", "value", *(["baseline"] if baseline else []), "better"):
        table.add_column(column, justify="right" if column in ("value", "baseline") else "left")
    for task, metrics in results["metrics"].items():
        for i, (metric, value) in enumerate(metrics.items()):
            info = results["metric_info"][task][metric]
            other = [format_metric(baseline["metrics"][task].get(metric), info["unit"])] if baseline else []
            direction = "higher" if info["higher_is_better"] else "lower"
            table.add_row(task if i == 0 else "", metric, format_metric(value, info["unit"]), *other, direction)
        table.add_section()
    console.print(table)

    batches = sorted(results["cost"], key=int)
    table = Table(title="cost")
    for column in ("runs", "task", "MFLOPs", "k parameters", *(f"ms, batch {batch}" for batch in batches)):
        table.add_column(column, justify="left" if column in ("runs", "task") else "right", no_wrap=column == "runs")
    for rows in zip(*(results["cost"][batch] for batch in batches), strict=True):
        first = rows[0]
        numbers = [first["flops"] / first["batch"] / 1e6, first["parameters"] / 1e3]
        numbers += [row["seconds"] * 1e3 for row in rows]
        table.add_row(first["run"], first["task"] or "all", *(f"{number:.1f}" for number in numbers))
    console.print(table)

    worst, where = max(
        (value, f"{task}, {how}") for task, row in results["agreement"].items() for how, value in row.items()
    )
    verdict = "agree with" if worst <= AGREES else "[red]DIFFER from[/red]"
    console.print(
        f"one task alone and extracted {verdict} the full pass: largest relative difference {worst:.1e} ({where})",
        soft_wrap=True,
    )
    if results.get("gain"):
        gain = results["gain"]
        console.print(
            f"against {results['baseline']['model']}: delta_task {gain['delta_task']:+.2f} % (higher is better), "
            f"delta_metric {gain['delta_metric']:+.2f} % (lower is better), {gain['tasks_worse']} tasks worse",
            soft_wrap=True,
        )


def finite(value: Any) -> Any:
    """The same nested data with null for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as problem:
        sys.exit(f"eval.py: {problem}")
