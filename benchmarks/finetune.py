"""A task that comes late, with few labels: what each way to fine-tune reaches, how long it takes, what others lose.

    python benchmarks/finetune.py edges                    edges come to a ViT of six other tasks of ProcRoom
    python benchmarks/finetune.py scene                    kinds of rooms come to the same
    python benchmarks/finetune.py census --root=FOLDER     college comes to a model of income and marital status
    python benchmarks/finetune.py texts --root=FOLDER      BANKING77 comes to an encoder of SNIPS, NLU++ and tags

The model that knows the other tasks and the one of the new task alone, on all its training samples, are trained first
and kept in runs/finetune/. What is done is not done again. Results: benchmarks/finetune/, table: docs/finetune.md.
"""

import argparse
import inspect
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout will do

import study
import torch
from accelerate.utils import set_seed
from tables_doc import table
from text_studies import KNOWN, minilm
from torch.utils.data import Subset

import moe_mtl
from moe_mtl.batches import in_order, shuffled
from moe_mtl.data import CensusIncome, NLUMix, ProcRoom, collate
from moe_mtl.fine_tuning import Train
from moe_mtl.hub import replace_file
from moe_mtl.memory import keep_freed_memory
from moe_mtl.recipes import get_recipe
from moe_mtl.registry import create_model
from moe_mtl.samples import input_of
from moe_mtl.scoring import TaskMetrics
from moe_mtl.tasks import Task
from moe_mtl.trainer import Trainer
from moe_mtl.trainer_config import TrainerConfig

RESULTS, RUNS = study.ROOT / "benchmarks" / "finetune", study.ROOT / "runs" / "finetune"
DOCUMENT = study.ROOT / "docs" / "finetune.md"
WAYS: tuple[Train, ...] = get_args(Train)
PROBE = 64  # samples whose predictions of the other tasks are compared before and after
HEAD = """# A task that comes late

Written by `benchmarks/finetune.py` from the files in `benchmarks/finetune/`. A model is trained without a task, which
then comes with a few labelled samples: `moe_mtl.add_task(model, task, init_from="nearest", data=samples)` and
`moe_mtl.finetune(model, samples, train=...)`, a fifth of the samples held out to stop on where nothing else is said.
Beside it a model of that task alone, trained on all its samples with as many updates as the first. Test samples, one
seed; "unchanged" says whether predictions of the other tasks are the same to the bit. Seconds are of one thread, other
work beside it.
"""


@dataclass(frozen=True)
class Late:
    """A task that comes late.

    Attributes:
        new: name of the task.
        base: name of the model that knows the others, and of its folder.
        data: of the tasks known before.
        with_new: the same samples with labels of the new task as well, or of it alone.
        model: name and options of the model that knows the others.
        alone: of the one of the new task alone.
        config: of both trainings.
        own_config: of the training of the new task alone, where it wants another.
        head_from: a known task whose head the new one starts as.
        shots: samples of the new task.
        tuning: options of `finetune`.
    """

    new: str
    base: str
    data: Any
    with_new: Any
    model: tuple[str, Mapping[str, Any]]
    alone: tuple[str, Mapping[str, Any]]
    config: TrainerConfig
    shots: int
    tuning: Mapping[str, Any]
    own_config: TrainerConfig | None = None
    head_from: str | None = None

    def task(self) -> Task:
        """The new task."""
        return next(task for task in self.with_new.task_list() if task.name == self.new)


@dataclass(frozen=True)
class Without:
    """A data set without some of its tasks.

    Attributes:
        data: the data set.
        left_out: names of these.
    """

    data: Any
    left_out: tuple[str, ...]

    def task_list(self) -> tuple[Task, ...]:
        """The other tasks."""
        return tuple(task for task in self.data.task_list() if task.name not in self.left_out)

    def split(self, name: str) -> Any:
        """The samples, whose labels of those tasks nobody reads."""
        return self.data.split(name)


def procroom(new: str, tuning: Mapping[str, Any], head_from: str | None = None) -> Late:
    """A task of ProcRoom, to a ViT of six others; 200 pictures."""
    made, data = get_recipe("m3vit_micro_procroom"), ProcRoom()
    alone = get_recipe("single_task_micro_procroom")
    return Late(
        new, "procroom", Without(data, ("edges", "scene")), data, (made.model.name, made.model.args),
        (alone.model.name, alone.model.args), replace(made.trainer, eval_every=0), 200, {"batch_size": 16, **tuning},
        own_config=replace(alone.trainer, eval_every=0, balancer="equal"), head_from=head_from,
    )  # fmt: skip


def edges(_: str | None) -> Late:
    """Edges, a binary map, to a ViT of six other tasks of ProcRoom (not scene); 200 pictures, the head that of texture.

    None is held out, all updates are made. Chosen for router+head on 500 validation pictures: rate, weight decay,
    number of updates, where the head starts.
    """
    return procroom("edges", {"lr": 2e-3, "weight_decay": 1.0, "val": False}, "texture")


def scene(_: str | None) -> Late:
    """Kinds of rooms, eight classes, to the same; 200 pictures. Alone it hardly gets going in so many updates."""
    return procroom("scene", {"lr": 3e-3})


def census(root: str | None) -> Late:
    """At least some college, to a model of income and marital status; 200 people."""
    data = CensusIncome(root=root, tasks="income,marital,college")
    made = get_recipe("mmoe_census")
    args = {**data.model_args(), **made.model.args}
    return Late(
        "college", "census", Without(data, ("college",)), data, ("mmoe_table", args),
        ("single_task_table", {**data.model_args(), **get_recipe("single_task_census").model.args}),
        replace(made.trainer, eval_every=0), 200, {"batch_size": 32, "lr": 1e-3},
    )  # fmt: skip


def texts(root: str | None) -> Late:
    """77 intents of a bank, to an encoder of other texts; 770 questions, ten of each in the mean."""
    place: dict[str, Any] = {"root": root, "tokenizer": str(minilm())}
    made = get_recipe("text_moe_nlu")
    data, new = NLUMix(**place, **KNOWN), NLUMix(**place, sources=["banking77"], tasks=["banking77"])
    args = {**data.model_args(), **made.model.args}
    config = replace(made.trainer, steps=1500, warmup=150, eval_every=0)
    dense = {**data.model_args(), "attention": "eager"}
    return Late(
        "banking77", "texts", data, new, ("text_moe", args), ("text_shared_bottom", dense), config, 770,
        {"batch_size": 32, "lr": 3e-3, "steps": 600, "precision": "bf16"},
    )  # fmt: skip


STUDIES: dict[str, Callable[[str | None], Late]] = {f.__name__: f for f in (edges, scene, census, texts)}


def trained(late: Late, *, alone: bool) -> tuple[Any, float]:
    """The model of the other tasks, or of the new one alone, and the seconds its training took."""
    folder = RUNS / late.base / (f"{late.new}_alone" if alone else "known")
    seconds = folder / "seconds.json"
    if not seconds.exists():
        set_seed(0)
        data = late.with_new if alone else late.data
        model_name, args = late.alone if alone else late.model
        tasks = [late.task()] if alone else data.task_list()
        config = late.own_config if alone and late.own_config else late.config
        config = replace(config, out=str(folder), progress=False)
        if alone:  # nothing is routed there
            scales = {pattern: scale for pattern, scale in config.lr_scales.items() if ".gate." not in pattern}
            plain = "shuffled" if config.batches == "homogeneous" else config.batches
            config = replace(config, regularizers={}, regularizer_args={}, lr_scales=scales, batches=plain)
        trainer = Trainer(create_model(model_name, tasks=tasks, **args), data, config)
        trainer.fit()
        replace_file(seconds, lambda path: path.write_text(json.dumps(trainer.seconds)))
    return moe_mtl.load(folder), json.loads(seconds.read_text())


def measure(name: str, late: Late, way: Train) -> dict[str, Any]:
    """Adds the task and fine-tunes one way."""
    model, _ = trained(late, alone=False)
    train, test = late.with_new.split("train"), late.with_new.split("test")
    order = shuffled(len(train), 0, 0)
    few = Subset(train, order[: late.shots])
    x = probe(model, late)
    known = [task.name for task in model.tasks]
    before = predictions(model, x, known)
    set_seed(0)
    began = time.perf_counter()
    near = nearness(model, late, few)
    moe_mtl.add_task(model, late.task(), init_from=near, head_from=late.head_from)
    moe_mtl.finetune(model, few, train=way, tasks=late.new, progress=False, **late.tuning)
    seconds = time.perf_counter() - began
    after = predictions(model, x, known)
    found = model.finetuning
    return {
        "study": name, "way": way, "shots": late.shots, "seconds": seconds,
        "starts_from": near, "head_from": late.head_from,
        "trained": found.trained, "steps": found.steps, "kept": found.kept,
        "test": score(model, test, late.task()),
        "unchanged": all(torch.equal(before[task], after[task]) for task in known),
        "largest_change": max(float((before[task] - after[task]).abs().max()) for task in known),
    }  # fmt: skip


@torch.no_grad()
def score(model: Any, samples: Any, task: Task) -> dict[str, float]:
    """The metrics of one task."""
    metrics = TaskMetrics([task])
    for rows in in_order(samples, 64):
        batch = samples.__getitems__(rows) if hasattr(samples, "__getitems__") else [samples[i] for i in rows]
        batch = collate(batch, [task], inputs=(model.input,))
        metrics.update(model(batch[model.input], tasks=[task.name]), batch)
    return metrics.compute()[task.name]


def nearness(model: Any, late: Late, few: Any) -> list[str]:
    """The two nearest tasks, on the samples of the new one and some of the known ones; one where it needs no more."""
    known = late.data.split("train")
    rows = [few[i] for i in range(min(64, len(few)))]
    if not isinstance(late.data, Without):  # its samples have labels of the other tasks, too
        for task in model.tasks:
            rows += [known[i] for i in known.labelled(task.name)[:64]]
    return list(moe_mtl.task_similarity(model, late.task(), rows))[:2]


def probe(model: Any, late: Late) -> Any:
    """Inputs of test samples."""
    return input_of(model, late.with_new.split("test"), range(PROBE))


@torch.no_grad()
def predictions(model: Any, x: Any, names: list[str]) -> dict[str, torch.Tensor]:
    """What each task alone predicts."""
    return {name: model(x, tasks=[name])[name] for name in names}


def write() -> None:
    """docs/finetune.md out of the JSON files."""
    parts = [HEAD]
    for name, make in STUDIES.items():
        files = sorted((RESULTS / name).glob("*.json"), key=lambda path: [*WAYS, "alone"].index(path.stem))
        found = [json.loads(path.read_text()) for path in files]
        if not found:
            continue
        best = next(run for run in found if run["way"] == "alone")
        metric = next(iter(best["test"]))
        rows = [
            [run["way"], str(run["shots"]), f"{run['trained'] / 1e3:.1f}", f"{run['seconds']:.0f}",
             f"{100 * run['test'][metric]:.2f}", f"{100 * run['test'][metric] / best['test'][metric]:.1f}",
             "" if run["way"] == "alone" else "yes" if run["unchanged"] else f"up to {run['largest_change']:.1g}"]
            for run in found
        ]  # fmt: skip
        head = ["learns", "samples", "k trained parameters", "seconds", f"{metric}, %", "of the model alone, %",
                "others unchanged"]  # fmt: skip
        parts += [
            f"## {name}",
            "",
            inspect.getdoc(make) or "",
            f"`python benchmarks/finetune.py {name}{'' if make in (edges, scene) else ' --root=FOLDER'}`.",
            "",
            table(head, rows),
        ]
    replace_file(DOCUMENT, lambda path: path.write_text("\n".join(parts)))


def main(options: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--root", help="folder of the data, where the study reads one")
    args = parser.parse_args(options)
    keep_freed_memory()
    late = STUDIES[args.study](args.root)
    folder = RESULTS / args.study
    folder.mkdir(parents=True, exist_ok=True)
    for way in ("alone", *WAYS):
        path = folder / f"{way}.json"
        if path.exists():
            continue
        if way == "alone":
            model, seconds = trained(late, alone=True)
            test = score(model, late.with_new.split("test"), late.task())
            count = sum(p.numel() for p in model.parameters())
            found = {"study": args.study, "way": way, "shots": len(late.with_new.split("train")), "seconds": seconds,
                     "trained": count, "test": test}  # fmt: skip
        else:
            found = measure(args.study, late, way)
        replace_file(path, lambda temporary: temporary.write_text(json.dumps(found, indent=1) + "\n"))  # noqa: B023
        print(way, f"{found['seconds']:.0f} s", found["test"], flush=True)
    write()


if __name__ == "__main__":
    main(sys.argv[1:])
