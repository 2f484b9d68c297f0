"""VectorModel: multi-task models of one vector per sample: encoder, task-gated trunk, one tower per task.

The call is that of `moe_mtl.multitask.MultiTaskModel`; the input is what the encoder takes, for tables the rows of
`moe_mtl.columns`.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from moe_mtl.columns import Column, read_columns
from moe_mtl.embeddings import FlatColumns
from moe_mtl.lenet import LeNet
from moe_mtl.multitask import present_ids, select_rows, task_ids
from moe_mtl.tasks import Task, check_tasks


@dataclass(frozen=True, kw_only=True)
class VectorConfig:
    """What all models of one vector per sample share.

    Attributes:
        columns: of the table, as `Column.to_dict` writes them; a data set's `columns()`. A recipe fills them in. Models
            for pictures have none.
        side: height and width of the pictures of a model for pictures, in pixels.
        embedding_dim: width of the embedding of a category or a set.
        numeric: encoding of numbers, "standard" or "piecewise", see `moe_mtl.embeddings.NumericEncoder`.
        tower: widths of the hidden layers of every task's tower.
        dropout: share of units dropped in experts and towers in training.
    """

    columns: Sequence[Mapping[str, Any]] = ()
    side: int = 36
    embedding_dim: int = 8
    numeric: str = "piecewise"
    tower: Sequence[int] = (64,)
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(VectorConfig):
    """A vector model with experts.

    Attributes:
        widths: of an expert's layers; the last is that of a task's vector.
        activation: of the experts.
        norm: of the experts, "none", "batch" or "layer".
        gate_args: options of the gates.
        layout: streams and experts of every level, see `moe_mtl.levels.build_trunk`; None for the family's own. A model
            extracted from another has its layout here.
    """

    widths: Sequence[int] = (64,)
    activation: str = "relu"
    norm: str = "none"
    gate_args: Mapping[str, Any] = field(default_factory=dict)
    layout: Mapping[str, Any] | None = None


class VectorModel(nn.Module):
    """Encoder, trunk and towers behind the call of a multi-task model.

    Args:
        tasks: what it predicts.
        encoder: inputs to vectors [b, d]; its `input` names the batch's entry it takes.
        trunk: (vectors [b, d], ids of tasks) to (a vector per task [t, b, h], {layer: Routing}); has `for_tasks`,
            `moe_layers` and `layout`.
        towers: (vectors [t, b, h], ids of tasks) to {task: prediction}; has `for_tasks`.
    """

    def __init__(self, tasks: Sequence[Task], encoder: nn.Module, trunk: nn.Module, towers: nn.Module):
        super().__init__()
        self.tasks = check_tasks(tasks)
        self.encoder, self.trunk, self.towers = encoder, trunk, towers

    @property
    def input(self) -> str:
        """The key of a batch whose entry the model takes: "table" or "image"."""
        return self.encoder.input  # type: ignore[return-value]

    @property
    def moe_layers(self) -> dict[str, Any]:
        """The task-gated layers, by the key of their `Routing`."""
        return self.trunk.moe_layers  # type: ignore[return-value]

    @property
    def stream_tasks(self) -> dict[int, tuple[int, ...]]:
        """The tasks that share a stream, by its number in the routings; see `moe_mtl.diagnostics.ExpertUsage`."""
        return getattr(self.trunk, "stream_tasks", {})

    def forward(self, x: Any, tasks: Sequence[str] | Tensor | None = None, return_routing: bool = False):
        """Predicts.

        Args:
            x: what the encoder takes: rows of a table as a dict of tensors, or images.
            tasks: names of the tasks to run, all when None; or int64 ids [b], one task per sample. These run task by
                task, each on its own samples.
            return_routing: also return {layer: Routing}, keyed `task/layer` for ids per sample.

        Returns:
            {task: prediction}, shapes in `moe_mtl.tasks`; with ids per sample {task: (rows, prediction)}, where `rows`
            are the samples of that task, in order.

        Raises:
            ValueError: unknown tasks, ids out of range or not one per sample, or inputs that do not fit.
        """
        if isinstance(tasks, Tensor):
            return self._forward_per_sample(x, tasks, return_routing)
        ids = task_ids(self.tasks, tasks) if tasks is not None else tuple(range(len(self.tasks)))
        vectors, routings = self.trunk(self.encoder(x), ids)
        predictions = self.towers(vectors, ids)
        return (predictions, routings) if return_routing else predictions

    def _forward_per_sample(self, x: Any, ids: Tensor, return_routing: bool):
        predictions, routings = {}, {}
        for i in present_ids(tree_leaves(x)[0], ids, len(self.tasks)):
            name, rows = self.tasks[i].name, (ids == i).nonzero().flatten()
            own, layers = self(select_rows(x, rows), tasks=[name], return_routing=True)
            predictions[name] = (rows.to(tree_leaves(x)[0].device), own[name])
            routings |= {f"{name}/{layer}": routing for layer, routing in layers.items()}
        return (predictions, routings) if return_routing else predictions

    def for_tasks(self, names: Sequence[str] | str) -> Self:
        """An independent copy for these tasks alone: what leads to them, nothing that belongs to another."""
        ids = task_ids(self.tasks, names)
        parts: Any = self
        memo: dict[int, Any] = {id(part): part.for_tasks(ids) for part in (parts.trunk, parts.towers)}
        model = copy.deepcopy(self, memo)
        model.tasks = tuple(self.tasks[i] for i in ids)
        if "layout" in getattr(model, "config", {}).get("args", {}):
            model.config["args"]["layout"] = model.trunk.layout()  # type: ignore[operator]
        return model


def picture_encoder(config: VectorConfig) -> LeNet:
    """The encoder of pictures of one colour to one vector each."""
    return LeNet(config.side)


def table_encoder(config: VectorConfig) -> FlatColumns:
    """The encoder of a table's columns to one vector per row."""
    columns: Sequence[Column] = read_columns(config.columns)
    return FlatColumns(columns, config.embedding_dim, config.numeric)  # type: ignore[arg-type]
