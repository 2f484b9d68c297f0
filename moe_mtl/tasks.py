"""Task: a name, the kind of label, and the head, loss and metrics that go with it.

How labels are written, per kind (b batch, c channels, n tokens, h w pixels), and how a missing one is:

    kind            target                      missing                     prediction
    classification  int64 [b]                   ignore_index                logits [b c]
    binary          float [b] of 0 and 1        NaN                         logits [b]
    multilabel      float [b c] of 0 and 1      NaN                         logits [b c]
    regression      float [b] (or [b c])        NaN                         [b] (or [b c])
    tagging         int64 [b n]                 ignore_index                logits [b c n]
    segmentation    int64 [b h w]               ignore_index                logits [b c h w]
    depth           float [b h w]               NaN                         [b h w]
    normals         float [b 3 h w], unit       norm 0 or NaN               [b 3 h w], unit
    binary_map      float [b h w] of 0 and 1    NaN                         logits [b h w]

A sample that lacks a label altogether simply has no entry (or None) under the task's name.
"""

import inspect
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe_mtl.losses import LOSS_KINDS, LOSSES

Kind = Literal[
    "classification",
    "binary",
    "multilabel",
    "regression",
    "tagging",
    "segmentation",
    "depth",
    "normals",
    "binary_map",
]
DENSE_KINDS = frozenset({"segmentation", "depth", "normals", "binary_map"})
CLASS_KINDS = frozenset({"classification", "tagging", "segmentation"})  # integer targets, one class each
RESERVED = frozenset({"image", "table", "text"})  # names of inputs in a sample
_MODULE = nn.ModuleDict()  # what it has as an attribute no entry of it can be called
KINDS = DENSE_KINDS | CLASS_KINDS | {"binary", "multilabel", "regression"}


def nearest(name: str, known: Iterable[str]) -> str:
    """The sentence an error about an unknown name ends with: the closest names, then all of them."""
    known = sorted(known)
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return f"{hint}known: {', '.join(known) or 'none'}"


def name_of_column(column: str) -> str:
    """The task that a column of labels makes: letters, digits and _ alone, _task behind a name that is taken."""
    name = re.sub(r"\W", "_", column)
    name = name if name.isidentifier() else f"_{name}"
    return f"{name}_task" if is_taken(name) else name


_TYPES: dict[str, tuple[Any, str]] = {  # fields of a task, and what an error asks for
    "name": (str, "a text"),
    "channels": (int, "the number of its outputs, a whole number"),
    "loss_args": (Mapping, "arguments by name"),
    "metrics": (Mapping, "names with their arguments, such as {'rmse': {}}"),
    "weight": (int | float, "a number"),
    "mean": (int | float, "a number"),
    "std": (int | float, "a number"),
    "ignore_index": (int, "a whole number"),
    "classes": (list, "a sequence of names"),
}


def _plain(value: Any) -> Any:
    """The same data as JSON has it: Python's numbers in the place of numpy's and torch's, lists in that of arrays."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(map(_plain, value)) if isinstance(value, Collection) and not isinstance(value, str) else value


def is_taken(name: str) -> bool:
    """Whether inputs or modules have this name, so that no task can."""
    return name in RESERVED or hasattr(_MODULE, name)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing a model predicts. Plain data: it can be saved as JSON and read back (`to_dict`, `from_dict`).

    Attributes:
        name: the key of its labels in a sample and of its predictions.
        kind: the kind of label; decides the head.
        channels: outputs of the head: classes, labels, or values.
        loss: a name in `moe_mtl.losses.LOSSES`.
        loss_args: keyword arguments of that loss.
        metrics: names in `moe_mtl.metrics.METRICS` with their keyword arguments; the first is the headline.
        weight: factor on the loss in the total; 0 for a task that is only measured.
        mean: typical label of a regression task, in its unit: what heads start from.
        std: spread of the labels of a regression task, in their unit. Heads predict, and losses are taken, in
            multiples of it.
        ignore_index: the integer that marks a missing class label.
        classes: names of the classes, for answers and reports; of a binary task those of no and yes; empty when
            unnamed.
    """

    name: str
    kind: Kind
    channels: int
    loss: str
    loss_args: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    weight: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    ignore_index: int = -100
    classes: Sequence[str] = ()

    def __post_init__(self):
        for name, (types, what) in _TYPES.items():
            value = _plain(getattr(self, name))
            if not isinstance(value, types) or isinstance(value, bool):
                raise ValueError(f"{name}: task {self.name!r} got {value!r}, expected {what}")
            object.__setattr__(self, name, value)
        object.__setattr__(self, "classes", tuple(self.classes))
        if odd := [name for name, args in self.metrics.items() if not isinstance(args, Mapping)]:
            raise ValueError(f"metrics: task {self.name!r} got no arguments of {', '.join(odd)}; {{}} stands for none")
        if not self.name or not self.name.isidentifier():
            raise ValueError(f"name: {self.name!r} is not usable as a key; use letters, digits and underscores")
        if is_taken(self.name):
            raise ValueError(f"name: {self.name!r} is taken by inputs or modules; choose another, as {self.name}_task")
        if self.kind not in KINDS:
            raise ValueError(f"kind: unknown {self.kind!r}; {nearest(self.kind, KINDS)}")
        if self.channels < 1:
            raise ValueError(f"channels: task {self.name!r} needs at least 1 output, got {self.channels}")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight: task {self.name!r} has {self.weight}, expected a finite number of at least 0")
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf) or (
            self.kind != "regression" and (self.mean, self.std) != (0, 1)
        ):
            raise ValueError(
                f"mean, std: task {self.name!r} has {self.mean} and {self.std}; expected finite numbers, std above "
                "0, and 0 and 1 for anything but regression"
            )
        if self.loss not in LOSSES:
            raise ValueError(f"loss: unknown {self.loss!r} for task {self.name!r}; {nearest(self.loss, LOSSES)}")
        if self.kind not in LOSS_KINDS.get(self.loss, KINDS):
            fitting = [loss for loss in LOSSES if self.kind in LOSS_KINDS.get(loss, KINDS)]
            raise ValueError(
                f"loss: {self.loss!r} does not fit task {self.name!r} of kind {self.kind!r}; use {', '.join(fitting)}"
            )
        known = [p for p in inspect.signature(LOSSES[self.loss]).parameters if p not in ("prediction", "target")]
        for option in self.loss_args:
            if option not in known:
                raise ValueError(f"loss_args: {self.loss!r} has no option {option!r}; {nearest(option, known)}")
        if self.classes and self.kind == "binary" and len(self.classes) != 2:
            raise ValueError(f"classes: {len(self.classes)} names of task {self.name!r}, expected those of no and yes")
        if self.classes and self.kind != "binary" and len(self.classes) != self.channels:
            raise ValueError(f"classes: {len(self.classes)} names for {self.channels} channels of task {self.name!r}")

    @classmethod
    def classification(cls, name: str, num_classes: int, **overrides: Any) -> "Task":
        """One of `num_classes` classes per sample."""
        return cls._of("classification", name, num_classes, "cross_entropy", {"accuracy": {}}, overrides)

    @classmethod
    def binary(cls, name: str, **overrides: Any) -> "Task":
        """Yes or no per sample."""
        metrics = {"auc": {}, "average_precision": {}, "log_loss": {}}
        return cls._of("binary", name, 1, "bce", metrics, overrides)

    @classmethod
    def multilabel(cls, name: str, num_labels: int, **overrides: Any) -> "Task":
        """Any subset of `num_labels` labels per sample."""
        return cls._of("multilabel", name, num_labels, "bce", {"binary_accuracy": {}}, overrides)

    @classmethod
    def regression(cls, name: str, num_values: int = 1, **overrides: Any) -> "Task":
        """`num_values` real numbers per sample."""
        return cls._of("regression", name, num_values, "mse", {"rmse": {}, "abs_error": {}}, overrides)

    @classmethod
    def tagging(
        cls, name: str, classes: Sequence[str], *, metric: str = "constrained_span_f1", **overrides: Any
    ) -> "Task":
        """One of these tags per token: spans written as BIO tags, or parts of speech (`metric="accuracy"`)."""
        names = ["accuracy"] if metric == "accuracy" else dict.fromkeys([metric, "span_f1", "accuracy"])
        metrics = {name: {} for name in names}
        return cls._of("tagging", name, len(classes), "cross_entropy", metrics, {"classes": classes, **overrides})

    @classmethod
    def segmentation(cls, name: str, num_classes: int, **overrides: Any) -> "Task":
        """One of `num_classes` classes per pixel."""
        metrics = {"miou": {}, "pixel_accuracy": {}}
        return cls._of("segmentation", name, num_classes, "cross_entropy", metrics, overrides)

    @classmethod
    def depth(cls, name: str = "depth", **overrides: Any) -> "Task":
        """Positive distance per pixel, in metres."""
        return cls._of("depth", name, 1, "l1", {"abs_error": {}, "rel_error": {}, "rmse": {}}, overrides)

    @classmethod
    def normals(cls, name: str = "normals", **overrides: Any) -> "Task":
        """Unit surface normal per pixel, camera frame."""
        metrics = {"angle_mean": {}, "angle_median": {}, "within_11": {}, "within_22": {}, "within_30": {}}
        return cls._of("normals", name, 3, "cosine", metrics, overrides)

    @classmethod
    def binary_map(cls, name: str, *, metric: str = "max_f", **overrides: Any) -> "Task":
        """Yes or no per pixel: edges (`metric="edge_f"`), saliency (`metric="max_f"`)."""
        return cls._of("binary_map", name, 1, "bce", {metric: {}}, overrides)

    @classmethod
    def _of(cls, kind: Kind, name: str, channels: int, loss: str, metrics: Mapping, overrides: Mapping) -> "Task":
        options: dict[str, Any] = {"kind": kind, "channels": channels, "loss": loss, "metrics": metrics, **overrides}
        return cls(name=name, **options)

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def is_dense(self) -> bool:
        """Whether the task predicts one thing per pixel."""
        return self.kind in DENSE_KINDS

    @property
    def is_scalar(self) -> bool:
        """Whether the task predicts one number per sample, so that predictions are [b]."""
        return self.kind == "binary" or (self.kind == "regression" and self.channels == 1)

    def valid(self, target: Tensor) -> Tensor:
        """Where a batched target holds a label: bool, the target's shape (without the channel axis for normals)."""
        if self.kind in CLASS_KINDS:
            return target != self.ignore_index
        if self.kind == "normals":
            return target.square().sum(dim=1) > 0  # NaN compares false
        return ~target.isnan()

    def check_shapes(self, prediction: Tensor, target: Tensor) -> None:
        """Refuses a prediction and target that do not have the shapes of the table above.

        Raises:
            ValueError: the channel axis of the prediction is not `channels` long, or the target does not fit.
        """
        expected = list(prediction.shape)
        channelled = self.kind in CLASS_KINDS | {"multilabel", "normals"} or (
            self.kind == "regression" and self.channels > 1
        )
        if channelled and expected[1:2] != [self.channels]:
            raise ValueError(
                f"prediction: task {self.name!r} got shape {expected}, expected {self.channels} channels on axis 1"
            )
        if self.kind in CLASS_KINDS:
            del expected[1]
        if list(target.shape) != expected:
            raise ValueError(
                f"target: task {self.name!r} got shape {list(target.shape)}, expected {expected} "
                f"for a prediction of {list(prediction.shape)}"
            )

    def compute_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean loss over the labels present, a scalar; an exact zero with zero gradient when there are none.

        Raises:
            ValueError: prediction and target do not have the shapes of the table above, or a loss of your own gives
                other than one value per label.
        """
        self.check_shapes(prediction, target)
        valid = self.valid(target)
        if self.kind in CLASS_KINDS:
            target = target.masked_fill(~valid, 0)
        elif self.kind == "normals":
            target = target.masked_fill(~valid.unsqueeze(1), 0.0)
        else:
            target = target.masked_fill(~valid, 0.0)
        among_channels = self.kind in CLASS_KINDS or self.kind == "normals"
        # before the loss, whose gradient would be NaN where what is predicted is not finite
        prediction = prediction.float().where(valid.unsqueeze(1) if among_channels else valid, 0.0)
        if self.kind == "regression":
            prediction, target = prediction / self.std, target / self.std
        per_element = LOSSES[self.loss](prediction, target, **self.loss_args)
        if per_element.shape != valid.shape:
            raise ValueError(
                f"loss: {self.loss!r} of task {self.name!r} gave shape {list(per_element.shape)}, expected "
                f"one value per label, {list(valid.shape)}"
            )
        return per_element.where(valid, 0.0).sum() / valid.sum().clamp(min=1)

    def missing(self, like: Tensor) -> Tensor:
        """A target of the shape and dtype of one sample's `like` that says: no label."""
        if self.kind in CLASS_KINDS:
            return torch.full_like(like, self.ignore_index)
        return torch.full_like(like, 0.0 if self.kind == "normals" else float("nan"))

    def check_target(self, target: Tensor, where: str = "target") -> None:
        """Refuses labels out of range, naming the task and what came. Costs a pass over the labels.

        Raises:
            ValueError: a class id outside 0..channels-1, a binary label outside 0..1, an infinite value, or a dtype
                that does not fit the kind.
        """
        if self.kind in CLASS_KINDS:
            if target.dtype != torch.int64:
                raise ValueError(f"{where}: task {self.name!r} needs int64 class ids, got {target.dtype}")
            seen = target[target != self.ignore_index]
            if seen.numel() and (seen.min() < 0 or seen.max() >= self.channels):
                raise ValueError(
                    f"{where}: task {self.name!r} has class ids {int(seen.min())} to {int(seen.max())}, expected "
                    f"0 to {self.channels - 1} or {self.ignore_index} for a missing label"
                )
            return
        if not target.is_floating_point():
            raise ValueError(f"{where}: task {self.name!r} needs floating point labels, got {target.dtype}")
        seen = target[~target.isnan()]
        if seen.isinf().any():
            raise ValueError(f"{where}: task {self.name!r} has infinite labels; write a missing one as NaN")
        if self.kind in ("binary", "multilabel", "binary_map") and seen.numel() and (seen.min() < 0 or seen.max() > 1):
            raise ValueError(
                f"{where}: task {self.name!r} has labels {float(seen.min()):g} to {float(seen.max()):g}, "
                "expected 0 to 1 or NaN for a missing label"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready data; `from_dict` reads it back to an equal task."""
        data = asdict(self)
        data["classes"] = list(self.classes)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Task":
        """The task `to_dict` wrote."""
        return cls(**{**data, "classes": tuple(data.get("classes", ()))})


def check_tasks(tasks: Sequence[Task]) -> tuple[Task, ...]:
    """A non-empty tuple of tasks with distinct names, or an error that says which is not."""
    if isinstance(tasks, Task):
        raise TypeError(f"tasks: got one Task, {tasks.name!r}; expected a list of them, [{tasks.name}]")
    tasks = tuple(tasks)
    if not tasks:
        raise ValueError("tasks: got none; pass at least one Task, for example Task.depth()")
    for task in tasks:
        if not isinstance(task, Task):
            raise TypeError(f"tasks: got {type(task).__name__} {task!r}; build it with Task.classification(...) etc.")
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"tasks: duplicate names in {names}")
    return tasks
