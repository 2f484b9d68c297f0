"""Fine-tuning a trained model for some of its tasks on samples at hand.

    model.add_task(Task.classification("room", 5))
    moe_mtl.finetune(model, samples, train="router+head")

Which parameters learn is one word:

    router+head   what belongs to the tasks alone: their heads and their entries of the gates
    new-experts   that and experts of their own: copies of those the tasks use most, which stand in for these
    lora          the first and a low-rank update of all experts, merged into them at the end
    experts       the first and all experts
    all           everything that was not frozen before

With the first two nothing changes that other tasks use. With router+head these compute what they did, to the bit; with
new-experts up to rounding, since the products and sums of their routers are over more experts than before.
"""

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from moe_mtl.adapters.expert_lora import ExpertLora
from moe_mtl.diagnostics import expert_usage
from moe_mtl.multitask import evaluating
from moe_mtl.new_experts import OnlyNew, add_experts
from moe_mtl.new_task import FewShot
from moe_mtl.samples import USAGE, inputs_of, samples_of
from moe_mtl.tasks import nearest
from moe_mtl.trainer import Trainer
from moe_mtl.trainer_config import TrainerConfig, matches

Train = Literal["router+head", "new-experts", "lora", "experts", "all"]
Model = TypeVar("Model", bound=nn.Module)
Scores = dict[str, dict[str, float]]

SEEN = 64  # samples on which the predictions of other tasks are compared
NOTICED = 1e-4  # less than that is rounding
SHARED = 0.1  # learning rate of what was trained before and is not a task's own, over that of the rest


@dataclass(frozen=True)
class FineTuning:
    """What `finetune` did.

    Attributes:
        train: which parameters learned.
        tasks: of these tasks.
        trained: how many they were.
        steps: updates made.
        kept: updates after which the weights were taken: those of the lowest loss on the validation samples.
        before: {task: {metric: value}} on the validation samples at the start; empty without such samples.
        after: the same at the end.
        new_experts: ids by task and layer.
        moved: how far the other tasks' predictions moved on 64 samples: the root mean square of the change over that of
            the predictions there were; by task, 0 where nothing changed.
    """

    train: str
    tasks: tuple[str, ...]
    trained: int
    steps: int
    kept: int
    before: Scores = field(default_factory=dict)
    after: Scores = field(default_factory=dict)
    new_experts: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        scores = [
            f"{task} {metric} {value:.4g} to {self.after[task][metric]:.4g}"
            for task, metrics in self.before.items()
            for metric, value in list(metrics.items())[:1]
        ]
        done = f"finetune: {self.train}, {self.trained:,} parameters, {self.steps} updates, best after {self.kept}"
        shown = [f"{task} {value:.1%}" for task, value in self.moved.items() if value >= NOTICED]
        return "; ".join([done, *scores, *([f"other predictions moved: {', '.join(shown)}"] if shown else [])])


def finetune(
    model: Model,
    data: Any,
    train: Train = "router+head",
    *,
    tasks: Sequence[str] | str | None = None,
    val: Any = None,
    new_experts: int | None = None,
    rank: int = 8,
    alpha: float = 16.0,
    lr_scales: Mapping[str, float] | None = None,
    steps: int = 400,
    patience: int | None = 5,
    **options: Any,
) -> Model:
    """Trains a model further, in place, on the labels that some samples have.

    Args:
        model: a multi-task model; `add_task` comes before for a new task.
        data: samples: a list of dicts of an input and labels, any map-style data set of such, or a data set of
            `moe_mtl.data` with the splits "train" and "val", of which a table is read with the model's columns and
            classes. Samples without a label of the tasks are left out where that is known without reading all.
        train: which parameters learn, see above.
        tasks: names of the tasks to train; those the samples have labels of when None.
        val: samples to validate on. When None a fifth of `data` is held out, of five samples or more, or its split
            "val" is taken. False for none: all samples are learned from, in all updates.
        new_experts: for "new-experts", how many per layer and task; None for as many as a token uses, at most half of
            those the task can see.
        rank: of the updates of "lora".
        alpha: scale of these, times the rank.
        lr_scales: factors on the learning rate by wildcards on the names of parameters, as in `TrainerConfig`; of what
            does not learn they change nothing. Without, what is not a task's own and no new expert takes a tenth.
        steps: updates at most.
        patience: evaluations, one every twentieth of `steps`, that may bring no lower loss on the validation samples;
            None for all updates and the last weights.
        options: further fields of `TrainerConfig`, such as `lr`, `batch_size` or `seed`.

    Returns:
        The model, in evaluation mode; its attribute `finetuning` is the `FineTuning`, which is also printed to stderr
        unless progress=False.

    Raises:
        ValueError: an unknown way to train, task or option; samples without labels of the tasks, or labels that do not
            fit; a model that cannot be trained this way.
        TrainingDiverged: a loss is not finite.

    Whatever is raised, and when it is interrupted, the model is what it was, its parameters being copies then.
    """
    if train not in get_args(Train):
        raise ValueError(f"train: unknown {train!r}; {nearest(str(train), get_args(Train))}")
    tuned: Any = model
    learn, validate, names = samples_of(tuned, data, val, int(options.get("seed", 0)), tasks)
    others = [task.name for task in tuned.tasks if task.name not in names]
    seen = list(inputs_of(tuned, learn, SEEN)) if others else []
    was = [_predictions(tuned, x, others) for x in seen]
    backup = copy.deepcopy(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        tuning = _Tuning(tuned, train, names, learn, new_experts=new_experts, rank=rank, alpha=alpha)
        few = FewShot(tasks=tuned.tasks, train=learn, val=validate)
        trainer = Trainer(
            model,
            few,
            _config({"steps": steps, "patience": patience, **options}, tuning.scales(lr_scales), learn, validate),
            tasks=names,
        )
        trainer.still += tuning.still
        before = {} if validate is None else trainer.evaluate(validate)["metrics"]
        trainer.fit()
        after = {} if validate is None else trainer.evaluate(validate)["metrics"]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        tuning.merge()
    except BaseException:
        model.__dict__.clear()
        model.__dict__.update(backup.__dict__)
        raise
    for name, p in model.named_parameters():
        p.requires_grad_(flags.get(name, True))
    kept = trainer.early.step if trainer.early and trainer.early.weights else trainer.step
    moved = _moved(was, [_predictions(tuned, x, others) for x in seen])
    found = FineTuning(train, tuple(names), trained, trainer.step, kept, before, after, tuning.new, moved)
    tuned.finetuning = found
    if trainer.config.progress:
        print(found, file=sys.stderr)
    return model.eval()


def _config(options: Mapping[str, Any], scales: Mapping[str, float], learn: Any, validate: Any) -> TrainerConfig:
    """Options of the trainer, those given over those that suit few samples.

    Raises:
        ValueError: there is no such option, or it is out of range.
    """
    for name in options:
        if name not in TrainerConfig.__dataclass_fields__:
            raise ValueError(f"{name}: no such option; {nearest(name, TrainerConfig.__dataclass_fields__)}")
    if "out" in options:
        raise ValueError("out: finetune writes no folder; save the model with moe_mtl.save, or train with Trainer")
    often = max(1, options["steps"] // 20)
    several = len(getattr(learn, "sources", ())) > 1
    defaults: dict[str, Any] = {
        "lr": 1e-3,
        "batch_size": min(32, len(learn)),
        "batches": "homogeneous" if several else "shuffled",
        "warmup": often,
        "eval_every": often,
        "log_every": often,
        "weight_decay": 0.01,
    }
    options = {**defaults, **options, "lr_scales": dict(scales)}
    return TrainerConfig(**(options if validate is not None else {**options, "eval_every": 0, "patience": None}))


# ---- what other tasks lose ------------------------------------------------------------------------------------------


def _predictions(model: Any, x: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """What some tasks predict, each alone, in evaluation mode."""
    with evaluating(model):
        return {name: model(x, tasks=[name])[name].float() for name in names}


def _moved(before: Sequence[dict[str, Tensor]], after: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """See `FineTuning.moved`, from predictions by batch."""
    found = {}
    for name in before[0] if before else ():
        was = torch.cat([batch[name].flatten() for batch in before])
        now = torch.cat([batch[name].flatten() for batch in after])
        found[name] = float((now - was).norm() / was.norm().clamp_min(1e-12))
    return found


# ---- parameters -----------------------------------------------------------------------------------------------------


class _Tuning:
    """A model made ready to train in one of the ways.

    Attributes:
        new: ids of new experts by task and layer.
        still: modules whose running statistics must not move.
    """

    def __init__(
        self,
        model: Any,
        train: Train,
        names: Sequence[str],
        samples: Any,
        *,
        new_experts: int | None,
        rank: int,
        alpha: float,
    ):
        self.model, self.train = model, train
        self.new: dict[str, dict[str, tuple[int, ...]]] = {}
        self.still: list[nn.Module] = []
        self.change: ExpertLora | OnlyNew | None = None
        if train != "all" and not hasattr(model, "own_parameters"):
            raise ValueError(f"train: a {type(model).__name__} shares nothing between tasks; train 'all'")
        self.own = set() if train == "all" else {p for name in names for p in model.own_parameters(name)}
        experts = {} if train in ("router+head", "all") else _experts(model)
        self.shared = {p for part in experts.values() for p in part.parameters()} if train == "experts" else set()
        if train == "lora":
            self.change = ExpertLora(model, experts, rank, alpha)
            self.still = list(experts.values())
        elif train == "new-experts":
            self._add_experts(names, samples, new_experts)

    def _add_experts(self, names: Sequence[str], samples: Any, count: int | None) -> None:
        model = self.model
        usage = expert_usage(model, inputs_of(model, samples, USAGE), tasks=list(names))
        for name in names:
            self.new[name] = add_experts(model, name, usage, count)
        layers, added = model.moe_layers, dict.fromkeys(next(iter(self.new.values())), 0)
        for found in self.new.values():
            for layer, ids in found.items():
                added[layer] += len(ids)
        self.still = [layers[layer].experts for layer in added]
        self.change = OnlyNew({layers[layer].experts: number for layer, number in added.items()})
        self.own = {p for name in names for p in model.own_parameters(name)}  # gates have new parameters

    def scales(self, given: Mapping[str, float] | None) -> dict[str, float]:
        """`TrainerConfig.lr_scales` under which these parameters learn and no others.

        Raises:
            ValueError: a wildcard that no parameter's name matches.
        """
        new = set() if self.change is None else self.change.parameters
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        learn = named if self.train == "all" else {n: p for n, p in named.items() if p in self.own | self.shared | new}
        for pattern in given or {}:
            if not any(matches(name, pattern) for name in named):
                raise ValueError(f"lr_scales: {pattern!r} matches no parameter; they are named as {min(named)}")
        own = self.own if self.train != "all" else {p for task in self.model.tasks for p in self._own(task.name)}
        found = {"*": 0.0}
        for name, p in learn.items():
            default = 1.0 if p in own or p in new else SHARED
            matching = [factor for pattern, factor in (given or {}).items() if matches(name, pattern)]
            found[name] = [default, *matching][-1]
        return found

    def _own(self, name: str) -> list[nn.Parameter]:
        """What belongs to a task alone; nothing in sets of models, and where tasks are stages of one process."""
        try:
            return self.model.own_parameters(name) if hasattr(self.model, "own_parameters") else []
        except ValueError:
            return []

    def merge(self) -> None:
        """Makes plain parameters of what was added for training."""
        if self.change is not None:
            self.change.merge()


def _experts(model: Any) -> dict[str, Any]:
    """The experts of all layers, by their name in the model.

    Raises:
        ValueError: it has none.
    """
    parts = {id(layer.experts) for layer in getattr(model, "moe_layers", {}).values()}
    found = {name: part for name, part in model.named_modules() if id(part) in parts}
    if not found:
        raise ValueError("train: the model has no experts; train 'router+head' or 'all'")
    return found
