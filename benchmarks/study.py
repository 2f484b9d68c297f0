"""Studies: runs that can be stopped and go on, one JSON per run in benchmarks/tables/<study>/ or another folder.

A run is a recipe and a seed under a name. It is done when its JSON is there and was made by the recipe as it stands;
one that was stopped goes on from its last checkpoint. Of tables the predictions on the test rows lie in runs/tables/,
for comparisons that need every row; what is chosen is chosen on validation samples, and test samples are scored only
where a run asks for it.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed

from moe_mtl import checkpoint
from moe_mtl.batches import in_order
from moe_mtl.hub import replace_file
from moe_mtl.recipes import Recipe
from moe_mtl.registry import create_model
from moe_mtl.scoring import TaskMetrics
from moe_mtl.tasks import Task
from moe_mtl.trainer import Trainer
from moe_mtl.trainer_config import TrainerConfig

ROOT = Path(__file__).resolve().parents[1]
RESULTS, RUNS = ROOT / "benchmarks" / "tables", ROOT / "runs" / "tables"
UNCOUNTED = ("out", "progress", "overwrite", "resume", "keep", "save_every", "log_every", "eval_every")
PLACES = ("root", "tokenizer")  # of data: folders of one machine
BATCH = 4096
SAVE = 500  # updates from checkpoint to checkpoint
TEXTS = 64  # per batch, padded to the longest of them
# of options that a run older than they are does not mention
DEFAULTS = {key: value for key, value in asdict(TrainerConfig(steps=1)).items() if key not in (*UNCOUNTED, "seed")}

_DATA: dict[str, Any] = {}  # a data set is read once per process


def run(
    study: str,
    name: str,
    recipe: Recipe,
    seed: int,
    *,
    test: bool = False,
    build: Callable[[Any], Any] | None = None,
    prepare: Callable[[Any, Any], None] | None = None,
    watch: Callable[[Any, Any], Mapping[str, Any]] | None = None,
    keep: bool = False,
    results: Path | None = None,
) -> dict[str, Any]:
    """Trains a recipe with a seed and scores it, unless that was done; returns what the JSON holds.

    Args:
        study: folder of the results.
        name: of the run in it, without the seed.
        recipe: what to train; its `out` is not used.
        seed: of the run.
        test: score the test samples too and, of tables, keep the predictions for them.
        build: data to the model to train, instead of the recipe's fresh one; what it makes, the name must tell.
        prepare: (fresh model, data), in place, before training.
        watch: (trained model, data) to further entries of the JSON.
        keep: keep the folder of the run, which holds the trained model.
        results: folder of the studies; benchmarks/tables when None.

    Returns:
        study, name, seed, recipe, parameters, seconds, "val" and, where asked for, "test": {task: {metric: value}}.
    """
    results = RESULTS if results is None else results
    path, folder = results / study / f"{name}.s{seed}.json", RUNS.with_name(results.name) / study / f"{name}.s{seed}"
    how = asdict(recipe)
    for place in PLACES:
        how["data"].pop(place, None)
    how["trainer"] = {key: value for key, value in how["trainer"].items() if key not in (*UNCOUNTED, "seed")}
    how = json.loads(json.dumps(how))
    if path.exists():
        found = json.loads(path.read_text())
        known = found["recipe"]
        options = {"trainer": {**DEFAULTS, **known["trainer"]}, "data": {**defaults(recipe.data), **known["data"]}}
        same = {**known, **options} == how
        rows = results != RESULTS or predictions_file(study, name, seed).exists()
        if same and (not test or ("test" in found and rows)) and (not keep or folder.exists()):
            return found
    data = _DATA.setdefault(repr(recipe.data), recipe.data)
    fresh = not unfinished(folder, how, recipe.trainer.steps)
    config = replace(recipe.trainer, out=str(folder), seed=seed, overwrite=fresh, progress=False, save_every=SAVE)
    set_seed(seed)
    from_data = data.model_args() if hasattr(data, "model_args") else {}
    if build is None:
        model = create_model(recipe.model.name, tasks=data.task_list(), **{**from_data, **recipe.model.args})
    else:
        model = build(data)
    if prepare is not None:
        prepare(model, data)
    trainer = Trainer(model, data, config, run={"recipe": how})
    model: Any = trainer.fit()
    found = {
        "study": study,
        "name": name,
        "seed": seed,
        "recipe": how,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": trainer.seconds,
        "val": score(model, data.split("val"))[0],
    }
    if test:
        found["test"], predictions = score(model, data.split("test"))
        if predictions:
            file = predictions_file(study, name, seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(file, **predictions)
    if watch is not None:
        found |= watch(model, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(found, indent=1) + "\n"))
    if not keep:
        shutil.rmtree(folder)
    return found


def unfinished(folder: Path, how: Mapping[str, Any], steps: int) -> bool:
    """Whether a folder holds a run of this recipe that has updates left to make."""
    facts, last = folder / "run.json", checkpoint.latest(folder / "checkpoints")
    if last is None or not facts.exists() or json.loads(facts.read_text()).get("recipe") != how:
        return False
    return checkpoint.read(last).step < steps


def defaults(data: Any) -> dict[str, Any]:
    """What the options of a data set are that a run older than they are does not mention."""
    known = [(f.name, f.default if f.default_factory is MISSING else f.default_factory()) for f in fields(data)]
    found = {name: value for name, value in known if value is not MISSING and name not in PLACES}
    return json.loads(json.dumps(found, default=str))


def predictions_file(study: str, name: str, seed: int) -> Path:
    """Where the predictions of a run on the test rows lie."""
    return RUNS / study / f"{name}.s{seed}.npz"


@torch.no_grad()
def score(model: Any, dataset: Any) -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray]]:
    """{task: {metric: value}} on a data set, and of tables the predictions of every task for all of the rows."""
    tasks: tuple[Task, ...] = model.tasks
    texts = hasattr(dataset, "lengths")
    metrics, predictions = TaskMetrics(tasks), {} if texts else {task.name: [] for task in tasks}
    model.eval()
    for rows in in_order(dataset, TEXTS if texts else BATCH):
        batch = dataset.__getitems__(rows)
        labelled = [task.name for task in tasks if task.name in batch]
        found = model(batch[model.input], tasks=labelled if texts else None)
        metrics.update(found, batch)
        for task in predictions:
            predictions[task].append(found[task].numpy())
    scores = metrics.compute()
    if texts:  # tasks of other sources have no label here
        scores = {task: found for task, found in scores.items() if not all(map(math.isnan, found.values()))}
    return scores, {task: np.concatenate(parts) for task, parts in predictions.items()}


def read(study: str, name: str | None = None, results: Path | None = None) -> list[dict[str, Any]]:
    """All runs of a study, or of one name in it, in the order of their seeds."""
    folder = (RESULTS if results is None else results) / study
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.s[0-9]*.json"))]
    return sorted((r for r in found if name in (None, r["name"])), key=lambda r: (r["name"], r["seed"]))


def mean_spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds, as text."""
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"
