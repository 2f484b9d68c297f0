"""Multi-task text models as models of transformers: AutoConfig, AutoModel, pipelines, its Trainer, the hub.

    shared = MoeMtlModel.of(model)                     # a `TextModel`, whole
    shared.save_pretrained("folder")                   # and push_to_hub("name")
    one = MoeMtlForSequenceClassification.of(moe_mtl.extract(model, "intent"))
    transformers.pipeline("text-classification", model=one, tokenizer=tokenizer)("play jazz")

`import moe_mtl.backbones.hf_model` registers the classes; AutoModel.from_pretrained("folder") works after it.

transformers' Trainer takes all tasks at once: rows have a column per task beside what the tokenizer writes, and -100 or
NaN in it where there is no label.

    rows = [{**tokenizer("play jazz"), "intent": 2, "rating": 4.5}, {**tokenizer("hi"), "intent": 0, "rating": nan}]
    Trainer(shared, args, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer))

Tags of words need a collator that pads them, which transformers has for a single task alone. `compute_metrics` gets the
labels that `TrainingArguments(label_names=["intent", "rating"])` names. The loss is that of the tasks; regularizers
that balance experts are left to `moe_mtl.trainer`. Activation checkpointing is refused.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from keyword import iskeyword
from types import MethodType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils import ModelOutput

from moe_mtl.backbones._upcycle import ExpertMaker
from moe_mtl.backbones.hf_encoder import TextModel, moefy_encoder, read_encoder
from moe_mtl.folded import fold_layers
from moe_mtl.multitask import task_ids
from moe_mtl.tasks import Task

PROBLEMS = {
    "classification": "single_label_classification",
    "binary": "multi_label_classification",
    "multilabel": "multi_label_classification",
    "regression": "regression",
}


class MoeMtlConfig(PreTrainedConfig):
    """What a text model is made of.

    Attributes:
        encoder: configuration of the encoder, plain data.
        experts: options of its experts, see `moe_mtl.models.text_moe.TextMoEConfig`; None for a dense one.
        task_specs: the tasks as `Task.to_dict` writes them.
        kept_experts: ids of the experts that are left, per layer, where some were dropped.
        folded: the layers whose gate is part of their weights, see `moe_mtl.folded`.
    """

    model_type = "moe_mtl"

    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        experts: dict[str, Any] | None = None,
        task_specs: list[dict[str, Any]] | None = None,
        kept_experts: dict[str, list[int]] | None = None,
        folded: list[str] | None = None,
        **kwargs: Any,
    ):
        self.encoder, self.experts = encoder or {}, experts
        self.task_specs, self.kept_experts, self.folded = task_specs or [], kept_experts or {}, folded or []
        if len(self.task_specs) == 1:  # what pipelines ask for
            (spec,) = self.task_specs
            # of a binary task the probability is that of the second name
            names = spec.get("classes", [])[-spec["channels"] :] or [f"LABEL_{i}" for i in range(spec["channels"])]
            kwargs = {"id2label": dict(enumerate(names)), "problem_type": PROBLEMS.get(spec["kind"]), **kwargs}
            kwargs.setdefault("label2id", {name: i for i, name in enumerate(names)})
        super().__init__(**kwargs)

    @property
    def tasks(self) -> list[Task]:
        """The tasks."""
        return [Task.from_dict(spec) for spec in self.task_specs]


def build(config: MoeMtlConfig) -> TextModel:
    """The model of a configuration, with fresh weights.

    Raises:
        ValueError: it names no encoder or no task.
    """
    if not config.encoder or not config.task_specs:
        raise ValueError("config: names no encoder or no tasks; make the model with MoeMtlModel.of(model)")
    experts = dict(config.experts or {})
    where = {name: experts.pop(name, None) for name in ("every", "blocks")} if experts else {}
    make = ExpertMaker(len(config.task_specs), **experts) if experts else None
    encoder = {**config.encoder, "dtype": torch.get_default_dtype()}  # `from_pretrained` sets what it is asked for
    model = moefy_encoder(read_encoder(encoder), config.tasks, make, **where)
    for name, ids in config.kept_experts.items():
        model.moe_layers[name].keep_experts(ids)
    fold_layers(model, config.folded)
    return model


@dataclass
class MultiTaskOutput(ModelOutput):
    """What `MoeMtlModel` returns.

    Attributes:
        loss: sum over the tasks that came with labels of weight times mean loss; None without labels.
        predictions: prediction per task, shapes as in `moe_mtl.tasks`.
    """

    loss: Tensor | None = None
    predictions: dict[str, Tensor] | None = None


class MoeMtlPreTrainedModel(PreTrainedModel):
    """Base of the three: holds a `TextModel`."""

    config_class = MoeMtlConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    accepts_loss_kwargs = False  # losses are means: Trainer is to divide them by the steps it accumulates
    model: TextModel

    def __init__(self, config: MoeMtlConfig):
        super().__init__(config)
        with torch.device("cpu"):  # upcycling computes with the weights, which the meta device does not have
            self.model = build(config)
        for module in self.model.modules():  # `from_pretrained` empties buffers that files do not hold, and fills those
            vars(module).pop("_is_hf_initialized", None)  # of modules without this mark
        self.post_init()
        # its own look goes no deeper than children that are models of transformers
        self.all_tied_weights_keys |= self.get_expanded_tied_weights_keys(all_submodels=True)

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's word embeddings."""
        encoder: Any = self.model.backbone
        return encoder.get_input_embeddings()

    def _init_weights(self, module: Any) -> None:
        """Nothing: what is not the encoder's, which has a method of its own, was initialised by its constructor."""

    @classmethod
    def of(cls, model: TextModel) -> Self:
        """A text model as one of transformers; its weights are shared, not copied.

        Raises:
            ValueError: not a text model of this library.
        """
        if not isinstance(model, TextModel):
            raise ValueError(f"model: got {type(model).__name__}, expected a text model of moefy or create_model")
        if model.config["name"] not in ("text_moe", "text_shared_bottom"):
            raise ValueError(
                f"model: a {model.config['name']!r} is more than its encoder and experts, which is what these classes "
                "save; use moe_mtl.save"
            )
        found = dict(model.config["args"])
        found.pop("attention", None)  # not what the model is, but how this machine computes it
        layers = model.moe_layers.items()
        kept = {name: moe.kept_experts for name, moe in layers if len(moe.kept_experts) < moe.gate.num_experts}
        config = MoeMtlConfig(
            encoder=found.pop("encoder"),
            experts=found or None,
            task_specs=[task.to_dict() for task in model.tasks],
            kept_experts=kept,
            folded=model.config.get("folded"),
        )
        wrapped = cls(config)
        wrapped.model = model
        return wrapped.train(model.training)

    def _predict(self, tasks: Sequence[str] | None, inputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
        return self.model({key: value for key, value in inputs.items() if value is not None}, tasks=tasks)


def _loss(task: Task, prediction: Tensor, labels: Tensor) -> Tensor:
    """The loss of a task with labels as collators of transformers make them: of any dtype, one number in a row."""
    labels = labels if task.kind in ("classification", "tagging") else labels.float()
    return task.compute_loss(prediction, labels.view_as(prediction) if task.is_scalar else labels)


class _NamingTasks:
    """Decorator of a `forward` that takes labels by name: that of a model has its tasks among the parameters.

    Trainer drops the columns that are none. On the class it stays the function it is.
    """

    def __init__(self, forward: Callable[..., Any]):
        self.forward, self.signature = forward, signature(forward)

    def __get__(self, model: Any, owner: Any = None) -> Callable[..., Any]:
        """The function, or the method of a model."""
        if model is None:
            return self.forward
        run, known = self.forward, self.signature.parameters
        names = [spec["name"] for spec in model.config.task_specs]
        own = [Parameter(n, Parameter.KEYWORD_ONLY, default=None) for n in names if n not in known and not iskeyword(n)]

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return run(self, *args, **kwargs)

        *first, targets = known.values()
        forward.__doc__ = run.__doc__
        forward.__signature__ = self.signature.replace(parameters=[*first, *own, targets])  # type: ignore[attr-defined]
        return MethodType(forward, model)


class MoeMtlModel(MoeMtlPreTrainedModel):
    """All tasks: labels come, and predictions go, under the names of the tasks."""

    @_NamingTasks
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        tasks: Sequence[str] | None = None,
        return_loss: bool = True,
        **targets: Any,
    ) -> MultiTaskOutput:
        """Predictions of some tasks, and the loss where labels are given.

        Args:
            input_ids: int64 [b, n].
            attention_mask: [b, n], 0 for padding.
            token_type_ids: [b, n], where the encoder has them.
            tasks: names of the tasks to run; None for those with labels, or all without any.
            return_loss: False leaves the loss out.
            **targets: labels per task, as in `moe_mtl.tasks`; other names are left out.

        Raises:
            ValueError: an unknown task, or inputs that do not fit the encoder.
        """
        known = {task.name: task for task in self.model.tasks}
        given = {name: value for name, value in targets.items() if name in known and value is not None}
        task_ids(self.model.tasks, tasks or list(known))
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        predictions = self._predict(tasks or list(given) or None, inputs)
        losses = [
            known[name].weight * _loss(known[name], predictions[name], value)
            for name, value in given.items()
            if return_loss and name in predictions
        ]
        return MultiTaskOutput(loss=torch.stack(losses).sum() if losses else None, predictions=predictions)


class _OneTask(MoeMtlPreTrainedModel):
    """Base of models of one task."""

    def __init__(self, config: MoeMtlConfig):
        super().__init__(config)
        if len(self.model.tasks) != 1:
            names = ", ".join(task.name for task in self.model.tasks)
            raise ValueError(f"config: {type(self).__name__} is of one task, got {names}; extract one of them first")

    def _run(self, labels: Tensor | None, **inputs: Tensor | None) -> tuple[Tensor | None, Tensor]:
        (task,) = self.model.tasks
        prediction = self._predict(None, inputs)[task.name]
        return None if labels is None else _loss(task, prediction, labels), prediction


class MoeMtlForSequenceClassification(_OneTask):
    """One task of a whole text: `extract` a task and wrap it with `of`."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **unused: Any,
    ) -> SequenceClassifierOutput:
        """Logits, or values, [b, c], and the loss where labels are given; arguments as `MoeMtlModel.forward`."""
        loss, logits = self._run(
            labels, input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        )
        return SequenceClassifierOutput(loss=loss, logits=logits.unsqueeze(1) if logits.ndim == 1 else logits)


class MoeMtlForTokenClassification(_OneTask):
    """One tagging task.

    Pipelines of transformers take the best tag of each token; `moe_mtl.bio.best_tags` of the logits are spans for sure.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **unused: Any,
    ) -> TokenClassifierOutput:
        """Logits [b, n, c], and the loss where labels [b, n] are given; arguments as `MoeMtlModel.forward`."""
        loss, logits = self._run(
            labels, input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        )
        return TokenClassifierOutput(loss=loss, logits=logits.transpose(1, 2))


AutoConfig.register("moe_mtl", MoeMtlConfig, exist_ok=True)
AutoModel.register(MoeMtlConfig, MoeMtlModel, exist_ok=True)
AutoModelForSequenceClassification.register(MoeMtlConfig, MoeMtlForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(MoeMtlConfig, MoeMtlForTokenClassification, exist_ok=True)


def to_transformers(model: TextModel) -> MoeMtlPreTrainedModel:
    """A text model as the model of transformers that fits its tasks: of one task what its pipelines take.

    Weights are shared, not copied.

    Raises:
        ValueError: not a text model of this library.
    """
    tasks = getattr(model, "tasks", ())
    if len(tasks) != 1:
        return MoeMtlModel.of(model)
    return (MoeMtlForTokenClassification if tasks[0].kind == "tagging" else MoeMtlForSequenceClassification).of(model)
