"""Multi-task text models as models of transformers: AutoConfig, AutoModel, pipelines, its Trainer, the hub.

    shared = MoeMtlModel.of(model)                     # a `TextModel`, whole
    shared.save_pretrained("folder")                   # and push_to_hub("name")
    one = MoeMtlForSequenceClassification.of(moe_mtl.extract(model, "intent"))
    transformers.pipeline("text-classification", model=one, tokenizer=tokenizer)("play jazz")

`import moe_mtl.backbones.hf_model` registers the classes; AutoModel.from_pretrained("folder") works after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
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
            names = spec.get("classes") or [f"LABEL_{i}" for i in range(spec["channels"])]
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
    model = moefy_encoder(read_encoder(config.encoder), config.tasks, make, **where)
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


class MoeMtlModel(MoeMtlPreTrainedModel):
    """All tasks: labels come, and predictions go, under the names of the tasks."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        tasks: Sequence[str] | None = None,
        **labels: Any,
    ) -> MultiTaskOutput:
        """Predictions of some tasks, and the loss where labels are given.

        Args:
            input_ids: int64 [b, n].
            attention_mask: [b, n], 0 for padding.
            token_type_ids: [b, n], where the encoder has them.
            tasks: names of the tasks to run; None for those with labels, or all without any.
            **labels: per task, as in `moe_mtl.tasks`.

        Raises:
            ValueError: an unknown task, or inputs that do not fit the encoder.
        """
        known = {task.name: task for task in self.model.tasks}
        given = {name: value for name, value in labels.items() if name in known and value is not None}
        task_ids(self.model.tasks, tasks or list(known))
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        predictions = self._predict(tasks or list(given) or None, inputs)
        losses = [known[n].weight * known[n].compute_loss(predictions[n], given[n]) for n in given if n in predictions]
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
        if labels is None:
            return None, prediction
        labels = labels if task.kind in ("classification", "tagging") else labels.float()
        return task.compute_loss(prediction, labels.view_as(prediction) if task.is_scalar else labels), prediction


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
