"""VectorModel: multi-task models of one vector per sample: encoder, task-gated trunk, one tower per task.

The call is that of `moe_mtl.multitask.MultiTaskModel`; the input is what the encoder takes, for tables the rows of
`moe_mtl.columns`.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from moe_mtl.columns import Column, read_columns
from moe_mtl.embeddings import FlatColumns
from moe_mtl.heads import Features
from moe_mtl.hub_mixin import HubModel
from moe_mtl.lenet import LeNet
from moe_mtl.multitask import check_new, others, present_ids, renamed, select_rows, task_ids
from moe_mtl.routing import Routing
from moe_mtl.task_linear import entries_of
from moe_mtl.tasks import Task, check_tasks
from moe_mtl.towers import Towers, check_vector_task


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


class VectorModel(HubModel, nn.Module):
    """Encoder, trunk and towers behind the call of a multi-task model.

    Args:
        tasks: what it predicts.
        encoder: inputs to vectors [b, d]; its `input` names the batch's entry it takes.
        trunk: (vectors [b, d], ids of tasks) to (a vector per task [t, b, h], {layer: Routing}); has `for_tasks`,
            `moe_layers` and, where it is made from one, `layout`; to take new tasks `check_like`, `add_task` and
            `own_parameters`.
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
        model.note_experts()
        return model

    def features(self, x: Any, task: int | Sequence[int]) -> tuple[Features, dict[str, Routing]]:
        """The vectors that the towers of these tasks read, [(t b), h], and what was routed."""
        vectors, routings = self.trunk(self.encoder(x), (task,) if isinstance(task, int) else tuple(task))
        pooled = vectors.flatten(0, 1)
        return Features(pooled.unsqueeze(1), pooled, (1, 1), (1, 1)), routings

    def fresh_head(self, task: Task) -> nn.Module:
        """A tower for a task, as the model's own are made, from `Features`, on its device; the model does not change.

        Raises:
            ValueError: the model takes no new task, or none of this kind.
        """
        towers = self._open_towers()
        dim, *widths = (layer.weight[0].shape[1] for layer in (*towers.layers, towers.out))  # type: ignore[union-attr]
        head = TowerHead(Towers([task], dim, widths, towers.dropout))  # type: ignore[arg-type]
        return head.to(next(towers.parameters())).train(self.training)

    def head(self, name: str) -> Callable[[Features], Tensor]:
        """The tower of a task, from the features of its route."""
        (task,) = task_ids(self.tasks, [name], "name")
        return lambda features: self.towers(features.pooled.unsqueeze(0), (task,))[name]

    def own_parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters that serve one task alone: its tower, and its entries of the gates.

        Raises:
            ValueError: there is no such task, or the model takes no new tasks and has nothing to name.
        """
        (task,) = task_ids(self.tasks, [name], "name")
        return self.head_parameters(name) + self.trunk.own_parameters(task)  # type: ignore[operator]

    def head_parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters of a task's tower, in an order that towers of one shape share.

        Raises:
            ValueError: there is no such task, or the model takes no new tasks and has nothing to name.
        """
        (task,) = task_ids(self.tasks, [name], "name")
        towers = self._open_towers()
        parameters = dict(towers.named_parameters())
        return [parameters[entry] for entry in entries_of(towers, task)]

    def add_task(self, task: Task, init_from: Sequence[str] | str | None = None) -> Self:
        """Adds a task, in place: a fresh tower and, where the trunk is gated, gates of its own over the experts.

        Everything the model has stays the tensors it is: the other tasks keep their ids and compute what they did.

        Args:
            task: of a new name.
            init_from: tasks of the model; the new gates start as the mean of theirs, for one task as a copy. Fresh when
                None. `moe_mtl.add_task` finds the nearest tasks.

        Returns:
            The model itself.

        Raises:
            ValueError: the name is taken; a task of `init_from` is unknown; gates that have no mean, or a model that
                takes no new task, or none of this kind. The model is then as it was.
        """
        check_new(self.tasks, task, init_from)
        like = () if init_from is None else task_ids(self.tasks, init_from, "init_from")
        towers, trunk = self._open_towers(), self.trunk
        check_vector_task(task)
        trunk.check_like(like)  # type: ignore[operator]
        trunk.add_task(like)  # type: ignore[operator]
        towers.add_task(task)
        self.tasks = (*self.tasks, task)
        self.note_experts()
        return self

    def remove_task(self, name: str) -> Self:
        """Takes a task away, in place, with its tower and what leads to it alone. The ids of later tasks move up.

        Raises:
            ValueError: there is no such task, or no other.
        """
        kept = others(self.tasks, name)
        parts: Any = self
        self.trunk, self.towers = parts.trunk.for_tasks(kept), parts.towers.for_tasks(kept)
        self.tasks = tuple(self.tasks[i] for i in kept)
        self.note_experts()
        return self

    def rename_task(self, old: str, new: str) -> Self:
        """Gives a task another name, in place; its id stays.

        Raises:
            ValueError: there is no such task, the new name is taken or cannot be a name, or the model's stages are
                known by their names.
        """
        towers = self._open_towers()
        self.tasks = towers.tasks = renamed(self.tasks, old, new)
        self.note_experts()
        return self

    def _open_towers(self) -> Towers:
        """The towers of a model that takes new tasks.

        Raises:
            ValueError: it does not.
        """
        if not isinstance(self.towers, Towers) or not hasattr(self.trunk, "add_task"):
            name = getattr(self, "config", {}).get("name", type(self).__name__)
            raise ValueError(f"task: the tasks of {name} are stages of one process; build it for all of them")
        return self.towers

    def note_experts(self) -> None:
        """Writes what streams and experts there are into the configuration the model is saved with."""
        config = getattr(self, "config", {})
        if "layout" in config.get("args", {}):
            config["args"]["layout"] = self.trunk.layout()  # type: ignore[operator]
        for name, layer in self.moe_layers.items():
            if name in config.get("kept_experts", {}):
                config["kept_experts"][name] = layer.kept_experts


class TowerHead(nn.Module):
    """The tower of one task, as a head: `Features` to its prediction."""

    def __init__(self, towers: Towers):
        super().__init__()
        self.towers = towers

    def forward(self, features: Features) -> Tensor:
        """The prediction from one vector per sample."""
        return self.towers(features.pooled.unsqueeze(0), (0,))[self.towers.tasks[0].name]


def picture_encoder(config: VectorConfig) -> LeNet:
    """The encoder of pictures of one colour to one vector each."""
    return LeNet(config.side)


def table_encoder(config: VectorConfig) -> FlatColumns:
    """The encoder of a table's columns to one vector per row."""
    columns: Sequence[Column] = read_columns(config.columns)
    return FlatColumns(columns, config.embedding_dim, config.numeric)  # type: ignore[arg-type]
