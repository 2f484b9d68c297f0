"""Text models with a frozen encoder whose linear maps have adapters: the calls of any `MultiTaskModel`."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from moe_mtl.adapters._method import AdapterContext, AdapterMethod
from moe_mtl.adapters._targets import find_targets
from moe_mtl.adapters.alignment import KINDS
from moe_mtl.backbones.hf_encoder import (
    RepeatInputs,
    TextModel,
    describe_encoder,
    find_layers,
    moefy_encoder,
    read_encoder,
    text_features,
    text_head,
)
from moe_mtl.multitask import task_ids
from moe_mtl.tasks import Task, nearest


class AdapterModel(TextModel):
    """A frozen encoder with adapters in its layers, and a head per task. Adapters and heads are trained.

    Where adapters depend on the task, tasks part at the first layer that has any: `model(x)` is one stacked pass.
    `extract(model, task)` merges the adapters of one task into the weights and gives a plain dense encoder, a model as
    `text_shared_bottom` makes; of several tasks it keeps the adapters.

    Args:
        dense: encoder and heads, which become part of the result.
        method: what kind of adapters.
        targets: names of linear maps inside a layer; all of attention and feed-forward when None.
        attention: how attention is computed, as `read_encoder` takes it; None for its choice.

    Raises:
        ValueError: a target that there is not, or a map that the adapters do not fit.
    """

    def __init__(
        self,
        dense: TextModel,
        method: AdapterMethod,
        targets: Sequence[str] | None = None,
        attention: str | None = None,
    ):
        context = AdapterContext()
        encoder: Any = dense.backbone.requires_grad_(False)
        heads: Any = dense.heads
        head = partial(text_head, dim=encoder.config.hidden_size)
        super().__init__(encoder, dense.tasks, heads, context, text_features, head)
        self.context: AdapterContext
        layers = find_layers(encoder)
        self.method, self.attention = method, attention
        self.adapted_maps = find_targets(encoder, layers, targets)
        maps: dict[str, Any] = {name: encoder.get_submodule(name) for name in self.adapted_maps}
        method.check(maps)
        method.inject(encoder, self.adapted_maps, [task.name for task in self.tasks], context)
        if method.parts_tasks:
            holds = [any(module in self.adapted.values() for module in layer.modules()) for layer in layers]
            for layer in layers[holds.index(True) :]:
                layer.register_forward_pre_hook(RepeatInputs(context), with_kwargs=True)
        self.train_adapters()

    @property
    def adapted(self) -> dict[str, nn.Module]:
        """The adapted layers by the name of their map in the encoder."""
        return {name: self.backbone.get_submodule(name) for name in self.adapted_maps}

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The parameters of the adapters that training changes, routing among them; heads are not."""
        return [p for layer in self.adapted.values() for p in self.method.trained(layer)]

    def train_adapters(self) -> Self:
        """Makes adapters and heads trainable, and nothing else; a fresh or loaded model is like that."""
        return self._train(self.adapter_parameters(), [task.name for task in self.tasks])

    def train_own(self, tasks: Sequence[str] | str) -> Self:
        """Makes only trainable what belongs to some tasks alone, their heads and: with an inventory their routing
        logits (the z-only variant of multi-head routing), with ScaLearn their adapter or scales, with one shared LoRA
        nothing. Whatever trains then, predictions of other tasks stay bit-equal.

        Args:
            tasks: names.

        Returns:
            The model itself. Saved and loaded, all adapters are trainable again.

        Raises:
            ValueError: an unknown task.
        """
        names = [self.tasks[i].name for i in task_ids(self.tasks, tasks)]
        return self._train([p for name in names for p in self.own_parameters(name)], names)

    def own_parameters(self, name: str) -> list[nn.Parameter]:
        """As `MultiTaskModel.own_parameters`, with the task's routing logits, adapter or scales."""
        own = super().own_parameters(name)
        return own + [p for layer in self.adapted.values() for p in self.method.own(layer, name)]

    def _train(self, parameters: Iterable[nn.Parameter], heads: Iterable[str]) -> Self:
        self.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        for name in heads:
            self.heads[name].requires_grad_(True)
        return self

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that must not decay: scales, which start above zero."""
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2].startswith("omega_")}

    def add_task(self, task: Task, init_from: Sequence[str] | str | None = None) -> Self:
        """Adds a task, as `MultiTaskModel.add_task` does; with it its routing logits, adapter or scales.

        What the other tasks have is not touched. Training afterwards with `train_own(task.name)` leaves them bit-equal.
        """
        super().add_task(task, init_from)
        like = () if init_from is None else task_ids(self.tasks, init_from)
        names = [self.tasks[i].name for i in like]
        for layer in self.adapted.values():
            self.method.add_task(layer, task.name, names)
        return self

    def remove_task(self, name: str) -> Self:
        """Takes a task away, as `MultiTaskModel.remove_task` does, with its routing logits, adapter or scales."""
        super().remove_task(name)
        for layer in self.adapted.values():
            self.method.keep_tasks(layer, [task.name for task in self.tasks])
        return self

    def rename_task(self, old: str, new: str) -> Self:
        """Gives a task another name, as `MultiTaskModel.rename_task` does."""
        super().rename_task(old, new)
        for layer in self.adapted.values():
            self.method.rename_task(layer, old, new)
        return self

    def for_tasks(self, names: Sequence[str] | str) -> TextModel:
        """An independent copy for these tasks alone; of one a dense model, adapters merged into its weights."""
        ids = task_ids(self.tasks, names)
        kept = [self.tasks[i].name for i in ids]
        if len(kept) == 1:
            return self.merged(kept[0])
        small: Any = super().for_tasks(kept)
        for layer in small.adapted.values():
            small.method.keep_tasks(layer, kept)
        return small

    def merged(self, task: str) -> TextModel:
        """A dense model of one task that computes what this one does: the adapters added to the weights."""
        (own,) = task_ids(self.tasks, task)
        encoder = describe_encoder(self.backbone)
        with torch.random.fork_rng(devices=[]):  # weights that are replaced must not draw from the user's generator
            dense = moefy_encoder(read_encoder(encoder, self.attention), [self.tasks[own]], None)
        dense.to(next(self.parameters()))  # before the weights come: float64 ones stay what they are
        dense.load_state_dict(self.dense_state(task))
        dense.config = {"name": "text_shared_bottom", "args": {"encoder": encoder, "attention": self.attention}}
        return dense.train(self.training)

    @torch.no_grad()
    def dense_state(self, task: str | None = None) -> dict[str, Tensor]:
        """Names and tensors of the dense model inside: encoder and heads without adapters.

        Args:
            task: whose adapters to add to the weights, and whose head alone to keep; None for all heads and the encoder
                as it was.
        """
        state, maps = {}, self.adapted
        for name, tensor in self.state_dict().items():
            if name.startswith("heads.") and task is not None and not name.startswith(f"heads.{task}."):
                continue
            inside = name.removeprefix("backbone.")
            owner = next((map for map in maps if inside.startswith(f"{map}.")), None)
            if owner is None:
                state[name] = tensor
            elif inside.startswith(f"{owner}.base_layer."):
                leaf = inside.removeprefix(f"{owner}.base_layer.")
                merges = task is not None and leaf == "weight"
                delta = self.method.delta(maps[owner], task) if merges else None  # type: ignore[arg-type]
                state[f"backbone.{owner}.{leaf}"] = tensor if delta is None else tensor + delta.to(tensor)
        return state


class AlignedPredictions(dict[str, Any]):
    """Predictions of a forward in training, with how far apart the low-rank activations of its tasks were.

    Attributes:
        alignment: a scalar, differentiable.
    """

    def __init__(self, predictions: Mapping[str, Any], alignment: Tensor):
        super().__init__(predictions)
        self.alignment = alignment


class AlignedLoraModel(AdapterModel):
    """An `AdapterModel` with one LoRA for all tasks whose low-rank activations are aligned; see `alignment`.

    Args:
        dense: as in `AdapterModel`.
        method: a `Lora`.
        targets: as in `AdapterModel`.
        attention: as in `AdapterModel`.
        alignment: coefficient of the alignment loss; 0 for none.
        alignment_kind: "mmd" or "kl".

    Raises:
        ValueError: as `AdapterModel`; a coefficient below 0, or an unknown kind.
    """

    def __init__(
        self,
        dense: TextModel,
        method: AdapterMethod,
        targets: Sequence[str] | None = None,
        attention: str | None = None,
        alignment: float = 0.0,
        alignment_kind: str = "mmd",
    ):
        if not alignment >= 0:
            raise ValueError(f"alignment: got {alignment}, expected a coefficient of at least 0")
        if alignment_kind not in KINDS:
            raise ValueError(f"alignment_kind: unknown {alignment_kind!r}; {nearest(alignment_kind, KINDS)}")
        super().__init__(dense, method, targets, attention)
        self.alignment, self.alignment_kind = alignment, alignment_kind

    def forward(self, x: Any, tasks: Sequence[str] | Tensor | None = None, return_routing: bool = False):
        """As `MultiTaskModel.forward`; in training with a task per sample the predictions are `AlignedPredictions`.

        Called for named tasks, which one pass over the same texts serves, there is nothing to align.
        """
        if not (self.training and self.alignment and isinstance(tasks, Tensor)):
            return super().forward(x, tasks, return_routing)
        with self.context.collect() as found:
            both: Any = super().forward(x, tasks, return_routing=True)
        predictions, routings = both
        ids = tasks.to(x["input_ids"].device)
        valid = self.valid_tokens(x)
        if valid is None:
            valid = torch.ones_like(x["input_ids"], dtype=torch.bool)
        with torch.autocast(ids.device.type, enabled=False):
            value = KINDS[self.alignment_kind](torch.stack([y.float() for y in found.values()]), ids, valid)
        predictions = AlignedPredictions(predictions, value)
        return (predictions, routings) if return_routing else predictions

    def auxiliary_losses(self, predictions: Mapping[str, Any]) -> dict[str, Tensor]:
        """The weighted alignment {"alignment": scalar}, exactly 0 for a forward of one task; none where it is off.

        Args:
            predictions: as the model returned them.
        """
        if not self.alignment:
            return {}
        if isinstance(predictions, AlignedPredictions):
            return {"alignment": self.alignment * predictions.alignment}
        return {"alignment": torch.zeros((), device=next(self.parameters()).device)}
