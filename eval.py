"""Scores a trained model on every task, measures what one task costs alone, and writes the numbers and a report page.

    python eval.py runs/demo
    python eval.py runs/demo --split=val --limit=500 --tasks=depth,normals
    python eval.py m3vit_micro.procroom --report=report.html
    python eval.py runs/mine --baseline=runs/single/results.json --baseline=runs/shared/results.json
    python eval.py runs/nyu --data.root=data/nyuv2
    python eval.py runs/demo --help

Rows of a table, of whatever file, are encoded with the columns the model was trained with, and classes are the model's.

The JSON (--out, by default results.json in the model folder; results/NAME.json for a pretrained model) holds

    label          --label, or the pretrained model's, the recipe's or the architecture's name
    model          name, args, folder, parameters
    weights        file, bytes, sha256, dtype in the file; scores are in float32 whatever that is
    data           name, spec, split, samples, labels: {task: digest of the labels scored}, of tasks that are not dense
    tasks          as `Task.to_dict` writes them
    metrics        {task: {metric: value}}; null where the labels of the split define none
    metric_info    {task: {metric: {unit, higher_is_better}}}
    baselines      [{label, model, parameters, data, metrics, gain}] of each --baseline, in their order; gain is
                   `moe_mtl.scoring.multi_task_gain` against it
    seeds          of this training and each --repeat
    spread         {task: {metric: {mean, std}}} over them
    cost           {batch size: rows of `moe_mtl.cost.Cost`}
    dense          name, args, parameters of the untrained model in the "dense" rows of cost; null without one
    agreement      {task: {alone, extracted}}: largest difference from the full pass over the largest value predicted
    usage          {layer: {tasks, slots, mass, entropy, weight, spread}}, see `moe_mtl.diagnostics.LayerUsage`
    routing        {layer: what `moe_mtl.diagnostics.diagnose` returns}
    pruned         {task: {mass, parameters, share, layers}}: the task extracted without experts that have up to `mass`
                   of its gate weight on the first batch; `share` of the exactly extracted model's parameters is left;
                   layers as in `moe_mtl.sparse.LayerExtraction`
    activity       {stack of experts: what `moe_mtl.activity.Activity.to_dict` tells}; of models on tables
    recipe, seed, training, versions, date
"""

import argparse
import json
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

RUN, WEIGHTS = "run.json", "model.safetensors"  # what train.py leaves
COST_BATCHES = (1, 32)
MOST = max(COST_BATCHES)
SHOWN = 4  # samples in the pictures


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Runs the command line; returns what it wrote as JSON.

    Raises:
        ValueError, FileNotFoundError: the folder, a task, an option or the data is not what it should be.
    """
    folder, pretrained, options = find_model(argv)
    run = read_run(folder)
    given = parse(folder, run, options)
    out = Path(given.out or (f"results/{pretrained}.json" if pretrained else folder / "results.json"))
    for option, path in (("out", out), ("report", given.report)):
        if path:
            check_writable(option, Path(path))

    import torch  # slow to import, as what follows; a mistyped option need not wait for it

    from moe_mtl.activity import expert_activity
    from moe_mtl.as_trained import read_splits
    from moe_mtl.batches import in_order
    from moe_mtl.cost import agreement, cost_table, count_parameters, dense_of_equal_size
    from moe_mtl.hub import load
    from moe_mtl.multitask import count_rows, select_rows, task_ids
    from moe_mtl.results import (
        check_samples,
        compare,
        describe_pruned,
        describe_routing,
        describe_weights,
        finite,
        prune_each,
        read_baseline,
        show,
        spread,
        write,
    )
    from moe_mtl.sparse import extract

    device = torch.device("cuda" if torch.cuda.is_available() and given.device == "auto" else "cpu")
    model: Any = load(folder).to(device)
    names = given.tasks.split(",") if given.tasks else [task.name for task in model.tasks]
    tasks = [model.tasks[i] for i in task_ids(model.tasks, names)]
    baselines = [read_baseline(path, tasks) for path in given.baseline or ()]
    repeats = [read_baseline(path, tasks, "repeat") for path in given.repeat or ()]

    (samples,) = read_splits(model, given.data, given.split, tasks=names)
    data = {"name": type(given.data).__name__, "spec": asdict(given.data), "split": given.split}
    count = sum(map(len, in_order(samples, 4096, given.limit)))
    for option, others in (("baseline", baselines), ("repeat", repeats)):  # scoring takes long
        for other in others:
            check_samples({**data, "samples": count}, other, option)
    scored = score(model, samples, tasks, given.batch_size, given.limit)
    shown, inputs, usage = scored.pop("shown"), scored.pop("inputs"), scored.pop("usage")
    activity = expert_activity(model, [inputs])
    dense = dense_of_equal_size(model) if given.dense == "auto" else None
    extracted, dense_extracted = (
        {name: extract(whole, [name]) for name in names} if whole is not None else {} for whole in (model, dense)
    )
    pruned = prune_each(model, names, inputs)
    cost = {}  # the other tasks are part of "all tasks" whatever --tasks says
    for batch in COST_BATCHES:
        x = select_rows(inputs, torch.arange(batch) % count_rows(inputs))
        cost[str(batch)] = [
            asdict(row) for row in cost_table(model, x, extracted, given.rounds, dense, dense_extracted)
        ]
    results: dict[str, Any] = {
        "label": given.label or pretrained or run.get("recipe") or model.config["name"],
        "model": {**model.config, "folder": str(folder), "parameters": count_parameters(model)},
        "weights": describe_weights(folder / WEIGHTS),
        "data": {**data, "samples": scored.pop("samples"), "labels": scored.pop("labels")},
        "tasks": [task.to_dict() for task in tasks],
        **scored,
        "baselines": [],
        "seeds": [],
        "spread": {},
        "cost": cost,
        "dense": None if dense is None else {**dense.config, "parameters": count_parameters(dense)},
        "agreement": agreement(model, extracted, select_rows(inputs, torch.arange(count_rows(inputs))[:MOST])),
        **describe_routing(usage, names),
        "pruned": describe_pruned(pruned, extracted),
        "activity": {name: one.to_dict() for name, one in activity.items()},
        "recipe": run or None,
        "seed": run.get("trainer", {}).get("seed"),
        "training": describe_training(folder, run),
        "versions": versions(device),
        "date": given.date or datetime.now(UTC).date().isoformat(),
    }
    write(out, results)  # before the comparison, which a metric without a value refuses
    if baselines:
        results["baselines"] = compare(results, baselines, tasks)
        write(out, results)
    if repeats:
        results["spread"] = spread(results, repeats, tasks)
        results["seeds"] = [results["seed"], *(other["seed"] for other in repeats)]
        write(out, results)
    results = finite(results)
    show(results)
    print(f"numbers: {out}")
    if given.report:
        from moe_mtl.pictures import draw
        from moe_mtl.report import write_report

        reports = {name: one.extraction for name, one in pruned.items()}
        pictures = draw(model, tasks, shown, usage, activity, read_log(folder), reports)
        print(f"report: {write_report(given.report, results, pictures)}")
    return results


# ---- what was asked for ---------------------------------------------------------------------------------------------


def find_model(argv: Sequence[str]) -> tuple[Path, str | None, list[str]]:
    """The model folder a command line names first, its name where it is a pretrained one, and the options that follow.

    The file of a pretrained model that is asked for by name must be the published one.
    """
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0)
    if not argv or argv[0].startswith("-"):
        raise ValueError(
            "name a model first: python eval.py FOLDER_OR_NAME [options]; a folder as train.py or moe_mtl.save wrote "
            "it, a pretrained model, or owner/name on the hub"
        )
    folder, pretrained = Path(argv[0]), None
    if not all((folder / name).is_file() for name in ("config.json", WEIGHTS)):
        from moe_mtl.locate import find  # slow to import; a folder does without

        folder = find(argv[0])
        pretrained = argv[0].replace("/", "--") if "/" in argv[0] else folder.name
    return folder, pretrained, list(argv[1:])


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
    parser = jsonargparse.ArgumentParser(prog="eval.py MODEL", exit_on_error=False)
    add = parser.add_argument
    add("--recipe", default=recipe, help="whose data to score on")
    add("--data", type=type(data), default=data)
    add("--split", default="test", help="which split")
    add("--limit", type=int | None, default=None, help="score only the first samples")
    add("--batch_size", type=int | None, default=None, help="samples per pass; 64 pictures or texts, 4096 rows")
    add("--tasks", type=str | None, default=None, help="comma-separated names; all by default")
    add("--out", type=str | None, default=None, help="the JSON")
    add("--label", type=str | None, default=None, help="what to call the model where it is a baseline of others")
    add("--report", type=str | None, default=None, help="an HTML page to write")
    add("--baseline", action="append", help="JSON of another eval.py, such as of single-task models; may be repeated")
    add("--repeat", action="append", help="JSON of another eval.py of this training with another seed; may be repeated")
    add("--dense", choices=("auto", "none"), default="auto", help="auto: time a dense model of as many parameters too")
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


def check_writable(option: str, path: Path) -> None:
    """Refuses a file that cannot be written, before hours are spent on what it is to hold."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{option}: {path} cannot be written; pass --{option}=FILE in a folder where you may write")


# ---- measuring ------------------------------------------------------------------------------------------------------


def score(model: Any, dataset: Any, tasks: Sequence[Task], batch_size: int | None, limit: int | None) -> dict[str, Any]:
    """Metrics and expert usage over a data set, and what is pictured.

    Returns:
        metrics, metric_info, samples and the data's labels as in the JSON; usage as `ExpertUsage.compute` gives it;
        inputs, the first batch, on the model's device; shown, (inputs, predictions, targets) on the CPU: of the first
        samples for pictures, of all for tables.
    """
    import torch
    from rich.console import Console
    from rich.progress import track
    from torch.utils.data import DataLoader

    from moe_mtl.batches import in_order
    from moe_mtl.data import collate
    from moe_mtl.diagnostics import ExpertUsage
    from moe_mtl.metrics import metric_info
    from moe_mtl.multitask import count_rows, move
    from moe_mtl.results import LabelDigest
    from moe_mtl.scoring import TaskMetrics

    names, device = [task.name for task in tasks], next(model.parameters()).device
    table, text = model.input == "table", model.input == "text"
    together = partial(collate, tasks=tasks, inputs=(model.input,))
    batches = in_order(dataset, batch_size or (4096 if table else 64), limit)
    if not batches:
        raise ValueError("split: it holds no samples")
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=together)
    metrics, usage, shown, inputs = TaskMetrics(tasks), ExpertUsage.of(model), [], None
    digests = {task.name: LabelDigest(task) for task in tasks if not task.is_dense}
    console = Console(stderr=True)
    with torch.inference_mode():
        for batch in track(loader, "scoring", console=console, transient=True, disable=not console.is_terminal):
            x = move(batch[model.input], device)
            for name, digest in digests.items():
                digest.update(batch.get(name), count_rows(x))
            # texts of one source have the labels of its tasks alone, and others would only be computed
            run = [name for name in names if name in batch] if text else names
            if not run:
                continue
            predictions, routings = model(x, tasks=run, return_routing=True)
            predictions = {name: prediction.float().cpu() for name, prediction in predictions.items()}
            metrics.update(predictions, batch)
            usage.update(routings)
            if not text and (inputs is None or table):
                count = None if table else SHOWN
                targets = {name: batch[name][:count] if batch.get(name) is not None else None for name in names}
                shown.append(({name: p[:count] for name, p in predictions.items()}, targets))
            if inputs is None:
                inputs = x
    if inputs is None:
        raise ValueError(f"split: no sample has a label of {', '.join(names)}")
    first = None if table or text else inputs[:SHOWN].cpu()  # type: ignore[index]
    predicted, labels = (
        {name: joined([part[i][name] for part in shown]) for name in names} if shown else {} for i in (0, 1)
    )
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
        "samples": sum(map(len, batches)),
        "labels": {name: digest.compute() for name, digest in digests.items()},
        "inputs": inputs,
        "shown": (first, predicted, labels),
    }


def joined(parts: Sequence[Any]) -> Any:
    """Tensors of one batch each as one; None where a batch has none."""
    import torch

    return None if any(part is None for part in parts) else torch.cat(list(parts))


def unit_of(task: Task, unit: str) -> str:
    """The unit of a metric's value for a task: labels of depth tasks are metres, other labels have none we know."""
    return {"label": "m" if task.kind == "depth" else "", "degree": "°"}.get(unit, unit)


def describe_training(folder: Path, run: Mapping[str, Any]) -> str | None:
    """One sentence on how the model was trained, from what the run left."""
    trainer = run.get("trainer")
    if not trainer:
        return None
    text = f"Recipe {run.get('recipe')}: {trainer['steps']} steps of {trainer['batch_size']} samples"
    seconds = [record["seconds"] for record in read_log(folder) if record.get("seconds") is not None]
    time = f", {seconds[-1] / 60:.1f} minutes" if seconds else ""
    return f"{text}{time}, seed {trainer['seed']}."


def read_log(folder: Path) -> list[dict[str, Any]]:
    """What the training that made the model wrote down; empty where there is no log."""
    log = folder / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


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


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as problem:
        sys.exit(f"eval.py: {problem}")
