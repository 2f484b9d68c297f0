"""TrainerConfig: every dial of training, and the learning rate they add up to. Light to import."""

import math
from dataclasses import dataclass, field, fields
from fnmatch import fnmatch
from numbers import Integral
from typing import Any, Literal, get_args, get_origin


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How a model is trained.

    Attributes:
        out: folder of the run. With None nothing is written, and a run that is stopped is lost.
        steps: optimizer updates. The learning rate reaches its end there.
        batch_size: samples per update.
        accumulate: parts a batch is worked off in, to save memory. The gradient of the task losses is that of the whole
            batch, also where labels are missing; regularizers are computed per part and averaged.
        tasks_per_step: tasks drawn for each update, uniformly and without replacement; all when None. Losses are not
            scaled up for the tasks left out.
        batches: "shuffled"; of data sets of several sources, such as several sets of texts, also "homogeneous" (a
            source per batch, drawn), "mixed" (a source per sample, drawn, and one of its tasks); or "alternating" (a
            task per update, in turn; of any data set).
        temperature: of the draw of sources: in proportion to their size to the power of 1 / temperature.
        high_resource_first: share of the updates, at the beginning, that see the high-resource sources alone: Choi et
            al. 2023, https://arxiv.org/abs/2312.06134.
        high_resource: names of these sources; the largest when empty.
        lr: peak learning rate of AdamW.
        lr_scales: factors on it for the parameters whose name matches a wildcard, such as {"backbone.*": 0.1}, or one
            of several: "*.gate.*|heads.*"; of several factors the last counts. 0 freezes them.
        lr_final: learning rate at the end, as a fraction of the peak.
        warmup: updates over which the learning rate rises linearly.
        weight_decay: decoupled decay of weight matrices; biases, norms, embeddings and balancers get none.
        betas: decay rates of AdamW's two moments.
        grad_clip: largest norm of the whole gradient, of each model in a set of single-task models; longer ones are
            shortened to it. 0 switches it off.
        balancer: a name in `moe_mtl.balancing.BALANCERS`.
        balancer_args: its keyword arguments.
        inner_lr: above 0, updates are two-step (MMoEEx): the loss of each task is that of the last part of the batch
            after a trial step of this learning rate on the first part; see `moe_mtl.two_step`.
        inner_share: share of the batch in the first part.
        second_order: differentiate through the trial step.
        regularizers: coefficients of `moe_mtl.regularizers`, by name. A model without routing ignores them.
        regularizer_args: keyword arguments of those, by name.
        regularize_from: share of the updates, 0 to below 1, after which regularizers count. DSelect-k's entropy, say,
            wants the gates to have looked at all experts first.
        precision: "bf16" is autocast with float32 weights; "auto" is bf16 on a GPU that has it, else fp32 (on a CPU
            bf16 is no faster at the widths of small models).
        device: "auto" is the first GPU, or the CPU where there is none.
        seed: of the order of the samples, the drawn tasks and everything random in model and data.
        num_workers: processes that load data; 0 loads in the training process, the only setting that resumes exactly.
        eval_every: updates between evaluations on "val"; there is one at the end as well. 0 never evaluates.
        patience: evaluations in a row whose loss, the mean over tasks, is no lower than the lowest before, after which
            training ends early. The model then has the weights of the lowest, as it has when all `steps` are done. None
            trains through and keeps the last weights.
        val_limit: use only the first samples of "val"; all when None.
        save_every: updates between checkpoints; there is one at the end as well.
        keep: checkpoints to keep.
        log_every: updates between log records; losses are averaged over them.
        progress: show a live line, or a line per record where there is no terminal.
        resume: go on from the last checkpoint in `out`. False refuses a folder that holds one.
        overwrite: throw away what an earlier run left in `out`.

    Raises:
        ValueError: a value out of range, a word that is none of those known, or no whole number where one is needed.
    """

    steps: int
    out: str | None = None
    batch_size: int = 32
    accumulate: int = 1
    tasks_per_step: int | None = None
    batches: Literal["shuffled", "homogeneous", "mixed", "alternating"] = "shuffled"
    temperature: float = 1.0
    high_resource_first: float = 0.0
    high_resource: list[str] = field(default_factory=list)
    lr: float = 1e-3
    lr_scales: dict[str, float] = field(default_factory=dict)
    lr_final: float = 0.01
    warmup: int = 100
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float = 1.0
    balancer: str = "equal"
    balancer_args: dict[str, Any] = field(default_factory=dict)
    inner_lr: float = 0.0
    inner_share: float = 0.8
    second_order: bool = False
    regularizers: dict[str, float] = field(default_factory=dict)
    regularizer_args: dict[str, dict[str, Any]] = field(default_factory=dict)
    regularize_from: float = 0.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu"] = "auto"
    seed: int = 0
    num_workers: int = 0
    eval_every: int = 500
    patience: int | None = None
    val_limit: int | None = None
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    progress: bool = True
    resume: bool = True
    overwrite: bool = False

    def __post_init__(self):
        for known in fields(self):
            value, kinds = getattr(self, known.name), get_args(known.type)
            if get_origin(known.type) is Literal and value not in kinds:
                raise ValueError(f"{known.name}: got {value!r}, expected {' or '.join(map(repr, kinds))}")
            whole = known.type is int or (int in kinds and value is not None)
            if whole and (not isinstance(value, Integral) or isinstance(value, bool)):
                raise ValueError(f"{known.name}: got {value!r}, expected a whole number")
        least = dict.fromkeys(("steps", "batch_size", "accumulate", "save_every", "keep", "log_every"), 1)
        least |= dict.fromkeys(("warmup", "weight_decay", "grad_clip", "seed", "num_workers"), 0)
        least |= dict.fromkeys(("eval_every", "inner_lr"), 0)
        least |= {name: 1 for name in ("tasks_per_step", "val_limit", "patience") if getattr(self, name) is not None}
        for name, smallest in least.items():
            if not getattr(self, name) >= smallest:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {smallest}")
        if self.out is not None and not str(self.out).strip():  # would be the working directory
            raise ValueError(f"out: got {self.out!r}, expected a folder, '.' for this one, or None to write nothing")
        if self.seed >= 2**32:  # what numpy's generator takes
            raise ValueError(f"seed: got {self.seed}, expected below 2**32")
        if not self.lr > 0 or not 0 <= self.lr_final <= 1:
            raise ValueError(f"lr, lr_final: got {self.lr}, {self.lr_final}; expected lr > 0 and lr_final from 0 to 1")
        if self.patience is not None and not self.eval_every:
            raise ValueError(f"patience: got {self.patience}, but eval_every=0 never evaluates")
        if not 0 < self.inner_share < 1:
            raise ValueError(f"inner_share: got {self.inner_share}, expected above 0 and below 1")
        if not 0 <= self.regularize_from < 1:
            raise ValueError(f"regularize_from: got {self.regularize_from}, expected from 0 to below 1")
        if not self.temperature > 0 or not 0 <= self.high_resource_first < 1:
            raise ValueError(
                f"temperature, high_resource_first: got {self.temperature}, {self.high_resource_first}; expected "
                "above 0, and from 0 to below 1"
            )
        if self.high_resource_first and self.batches not in ("homogeneous", "mixed"):
            raise ValueError(f"high_resource_first: sources are not drawn with batches={self.batches!r}")
        if self.batches in ("mixed", "alternating") and (self.inner_lr > 0 or self.tasks_per_step is not None):
            raise ValueError(f"batches: {self.batches!r} draws tasks itself; leave inner_lr and tasks_per_step out")
        if self.inner_lr > 0 and self.accumulate > 1:
            raise ValueError("accumulate: a two-step update needs the whole batch at once; use 1, or inner_lr 0")
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate: got {self.accumulate} parts of a batch of {self.batch_size}")


# What may differ when a run goes on: how long, where and what is logged, not what is computed. The learning rate
# follows the new number of steps.
FREE_TO_CHANGE = {
    *("trainer.out", "trainer.steps", "trainer.num_workers", "trainer.eval_every", "trainer.val_limit"),
    *(
        "trainer.patience",
        "trainer.save_every",
        "trainer.keep",
        "trainer.log_every",
        "trainer.progress",
        "trainer.device",
    ),
    *("trainer.resume", "trainer.overwrite", "data.root", "data.preload", "recipe"),
}


def lr_factor(step: int, config: TrainerConfig) -> float:
    """Learning rate of update `step` (from 0) over the peak: linear warm-up, then a cosine to `lr_final`."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = min(1.0, (step - config.warmup) / max(1, config.steps - config.warmup))
    return config.lr_final + (1 - config.lr_final) * (1 + math.cos(math.pi * progress)) / 2


def matches(name: str, pattern: str) -> bool:
    """Whether the name of a parameter matches a wildcard, or one of several with a | between them: see `lr_scales`."""
    return any(fnmatch(name, one) for one in pattern.split("|"))
