"""m3vit_micro on ProcRoom against its controls: a queue of runs that can be stopped and goes on, and their table.

    python benchmarks/controls.py                      every run that is still missing, then the table (`make runs`)
    python benchmarks/controls.py run --seeds=3        three seeds of each
    python benchmarks/controls.py run --workers=2      two runs side by side, each on half of the threads
    python benchmarks/controls.py cost                 seconds per update of every recipe, measured side by side
    python benchmarks/controls.py table                docs/controls.md and its picture, from the files alone

A run is a recipe, a budget and a seed. Budget "steps": as many updates as m3vit_micro_procroom. Budget "time": as many
as fit into its training time, by the measured seconds per update without data loading, which favours cheap models.
Budget "long": as many as the shared bottom's in that time, which brings the costly models nearer to convergence.
What a run leaves is one JSON in benchmarks/controls/; a run is done when its JSON is there and was made by the recipe
as it stands, so changing a recipe or the number of steps asks for its runs again. Checkpoints lie in runs/ meanwhile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from moe_mtl import checkpoint
from moe_mtl.recipes import get_recipe
from moe_mtl.trainer_config import FREE_TO_CHANGE, TrainerConfig

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "controls"
COST = RESULTS / "seconds_per_update.json"
REFERENCE = "m3vit_micro_procroom"  # whose steps and training time are the budgets
SINGLE, SHARED = "single_task_micro_procroom", "shared_bottom_micro_procroom"
UPCYCLED = "m3vit_micro_upcycled_procroom"
DENSE_STEPS = 3000  # of the shared bottom with equal training time; UPCYCLED starts from that checkpoint
# in the order of their worth: the first seed of all, then the second of all
QUEUE = (
    (REFERENCE, "steps"),
    (SHARED, "steps"),
    (SINGLE, "steps"),
    (SHARED, "time"),
    (UPCYCLED, "time"),
    ("m3vit_micro_frozen_procroom", "steps"),
    ("m3vit_micro_assigned_procroom", "steps"),
    ("m3vit_micro_blind_procroom", "steps"),
    ("shared_bottom_micro_wide_procroom", "steps"),
    ("m3vit_micro_decoder_procroom", "time"),
    ("shared_bottom_micro_wide_procroom", "time"),
    ("m3vit_micro_last_procroom", "steps"),
    ("m3vit_micro_decoder_procroom", "steps"),
    ("m3vit_micro_blind_procroom", "time"),
    ("m3vit_micro_scarce_assigned_procroom", "steps"),
    ("m3vit_micro_scarce_frozen_procroom", "steps"),
    ("m3vit_micro_scarce_procroom", "steps"),
    (REFERENCE, "long"),
    (SINGLE, "long"),
)
DENSE = Lock()  # held while a run trains from which another starts
QUIET = ("--trainer.progress=false",)
RECIPES = tuple(dict.fromkeys(recipe for recipe, _ in QUEUE))


@dataclass(frozen=True)
class Run:
    """One run of the queue."""

    recipe: str
    budget: str
    seed: int

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.recipe.removesuffix('_procroom')}.{self.budget}.s{self.seed}"

    @property
    def result(self) -> Path:
        """The JSON it leaves."""
        return RESULTS / f"{self.name}.json"

    @property
    def folder(self) -> str:
        """Where it is trained, below ROOT."""
        return f"runs/controls/{self.name}"

    def steps(self) -> int:
        """Updates within the budget."""
        steps = get_recipe(REFERENCE).trainer.steps
        if self.budget == "steps":
            return steps
        if self.budget == "long":
            return Run(SHARED, "time", self.seed).steps()
        seconds = json.loads(COST.read_text())["seconds"]
        spent = DENSE_STEPS * seconds[SHARED] if self.recipe == UPCYCLED else 0.0
        return round((steps * seconds[REFERENCE] - spent) / seconds[self.recipe])

    def options(self) -> list[str]:
        """What the command line of its training changes in the recipe."""
        changed = [f"--trainer.steps={self.steps()}", f"--trainer.seed={self.seed}"]
        if self.start:
            changed.append(f"--model.start={self.start}")
        if self.is_start:
            changed.append("--trainer.keep=1000")
        return changed

    @property
    def dense(self) -> "Run":
        """The run with equal training time and seed that never has experts."""
        return Run(SHARED, "time", self.seed)

    @property
    def start(self) -> str | None:
        """The checkpoint it starts from, below ROOT."""
        return f"{self.dense.folder}/checkpoints/step_{DENSE_STEPS:08d}" if self.recipe == UPCYCLED else None

    @property
    def is_start(self) -> bool:
        """Whether another run starts from one of its checkpoints."""
        return self == self.dense


def runs(seeds: int) -> list[Run]:
    """The whole queue."""
    return [Run(recipe, budget, seed) for seed in range(seeds) for recipe, budget in QUEUE]


# ---- running --------------------------------------------------------------------------------------------------------


def work_off(seeds: int, workers: int) -> None:
    """Does every run that is still missing, in order, `workers` at a time."""
    if not COST.is_file():
        raise FileNotFoundError(f"{COST} is missing; measure it first: python benchmarks/controls.py cost")
    left = [run for run in runs(seeds) if not (run.result.is_file() and current(json.loads(run.result.read_text())))]
    print(f"{len(left)} of {len(runs(seeds))} runs to do: {', '.join(run.name for run in left) or 'none'}", flush=True)
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    with ThreadPoolExecutor(workers) as pool:
        failed = [name for name in pool.map(partial(attempt, threads=threads), left) if name]
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}; what they said is in output.txt of their folders")


def current(record: Mapping[str, Any]) -> bool:
    """Whether a record was made by its recipe as it stands now, with the updates its budget asks for.

    Options of the trainer that the record does not mention had no effect before there were any: their default stands.
    """
    run = Run(record["recipe"], record["budget"], record["seed"])
    recipe = json.loads(json.dumps(get_recipe(run.recipe).to_dict()))
    recipe["trainer"] |= {"steps": run.steps(), "seed": run.seed}
    known = record["config"] | {"trainer": asdict(TrainerConfig(steps=1)) | record["config"]["trainer"]}
    changed = {path for path, _, _ in checkpoint.differences(json.loads(json.dumps(known)), recipe)}
    return record["steps"] == run.steps() and changed <= FREE_TO_CHANGE - {"trainer.steps"} | {"model.start"}


def attempt(run: Run, threads: int) -> str | None:
    """Does one run and says so; returns its name if it failed, so that the others go on."""
    try:
        if run.start:
            with DENSE:
                if not (ROOT / run.start).is_dir():
                    do(run.dense, threads)
        with DENSE if run.is_start else nullcontext():
            do(run, threads)
    except subprocess.CalledProcessError as error:
        print(f"{run.name}: failed ({error})", flush=True)
        return run.name
    print(f"{run.name}: done", flush=True)
    return None


def do(run: Run, threads: int) -> None:
    """Trains, or goes on training, and scores one run in processes of their own; their output goes beside the model."""
    folder = ROOT / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(folder / "output.txt", "a") as output:
        call = partial(subprocess.run, cwd=ROOT, env=environment, stdout=output, stderr=output, check=True)
        if not finished(folder, run.steps()):
            call([sys.executable, "train.py", run.recipe, f"--trainer.out={run.folder}", *run.options(), *QUIET])
        call([sys.executable, "eval.py", run.folder, "--rounds=1", "--dense=none"])
    from moe_mtl.hub import replace_file

    record = summary(run, folder)
    replace_file(run.result, lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))


def finished(folder: Path, steps: int) -> bool:
    """Whether a training of that many steps came to its end there."""
    newest = checkpoint.latest(folder / "checkpoints")
    return newest is not None and int(newest.name.removeprefix("step_")) == steps


def summary(run: Run, folder: Path) -> dict[str, Any]:
    """What the table needs of eval.py's results and the training log; eval.py takes it as a --baseline, too."""
    results = json.loads((folder / "results.json").read_text())
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows, config = results["cost"]["1"], results["recipe"]
    config["trainer"]["out"] = run.folder
    alone = [row["flops"] for row in rows if row["run"] == "one task"]
    return {
        "label": f"{run.recipe.removesuffix('_procroom')}, {run.steps():,} updates",
        "recipe": run.recipe,
        "budget": run.budget,
        "seed": run.seed,
        "steps": run.steps(),
        "config": config,
        "training_seconds": [record["seconds"] for record in log if "seconds" in record][-1],
        "model": {key: results["model"][key] for key in ("name", "args", "parameters")},
        "flops_all": rows[0]["flops"],
        "flops_one": statistics.mean(alone),
        "data": results["data"],
        "tasks": results["tasks"],
        "metrics": results["metrics"],
        "metric_info": results["metric_info"],
        "routing": results["routing"],
        "versions": results["versions"],
        "date": results["date"],
    }


# ---- seconds per update ---------------------------------------------------------------------------------------------


def measure_cost(rounds: int) -> None:
    """Times one update of every recipe on the same batch, interleaved, and writes the medians.

    Where a file is there, only what it lacks is timed, beside the shared bottom, and scaled to its time in the file:
    budgets of runs that are done must not move. Delete the file to time all anew.
    """
    import torch
    from accelerate.utils import set_seed

    from moe_mtl.cost import latency
    from moe_mtl.data import collate
    from moe_mtl.hub import replace_file
    from moe_mtl.memory import keep_freed_memory
    from moe_mtl.registry import create_model

    keep_freed_memory()
    set_seed(0)
    data, size = get_recipe(REFERENCE).data, get_recipe(REFERENCE).trainer.batch_size
    tasks = data.task_list()
    batch = collate(data.split("train").__getitems__(list(range(size))), tasks=tasks)

    def update_of(recipe: str) -> Callable[[], None]:
        config = get_recipe(recipe).model
        model = create_model(config.name, tasks=tasks, **config.args).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

        def update() -> None:
            optimizer.zero_grad(set_to_none=True)
            predictions = model(batch["image"])
            torch.stack(
                [task.compute_loss(predictions[task.name], batch[task.name]) for task in tasks]
            ).sum().backward()
            optimizer.step()

        return update

    known = json.loads(COST.read_text()) if COST.is_file() else {"threads": torch.get_num_threads(), "seconds": {}}
    torch.set_num_threads(known["threads"])
    lacking = [recipe for recipe in RECIPES if recipe not in known["seconds"]]
    timed = latency({recipe: update_of(recipe) for recipe in dict.fromkeys((SHARED, *lacking))}, rounds, warmup=2)
    scale = known["seconds"].get(SHARED, timed[SHARED]) / timed[SHARED]
    seconds = known["seconds"] | {recipe: scale * timed[recipe] for recipe in lacking}
    record = {"batch_size": size, "rounds": rounds, "threads": known["threads"], "seconds": seconds}
    RESULTS.mkdir(exist_ok=True)
    replace_file(COST, lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    print(json.dumps(record, indent=1))


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=("run", "cost", "table"), default="run")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0, 1, ... of every run")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side")
    parser.add_argument("--rounds", type=int, default=15, help="timed updates per recipe (cost)")
    given = parser.parse_args(argv)
    if given.command == "cost":
        measure_cost(given.rounds)
        return
    if given.command == "run":
        work_off(given.seeds, given.workers)
    from controls_table import write_tables

    write_tables(RESULTS, ROOT / "docs", current)


if __name__ == "__main__":
    main(sys.argv[1:])
