"""Shared-bottom and single-task MLPs: the dense controls of the models for tables.

Paper: Caruana 1997, Multitask Learning, https://doi.org/10.1023/A:1007379606734 (hard parameter sharing).
Differs: none known; sizes and encodings are those of the models they are compared with.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from torch import Tensor, nn

from moe_mtl.expert_stack import ExpertStack
from moe_mtl.multitask import SingleTaskSet
from moe_mtl.registry import VECTOR_KINDS, configure, register_model
from moe_mtl.routing import Routing
from moe_mtl.tasks import Task
from moe_mtl.towers import Towers
from moe_mtl.vector import VectorConfig, VectorModel, picture_encoder, table_encoder


@dataclass(frozen=True, kw_only=True)
class BottomConfig(VectorConfig):
    """A dense model.

    Attributes:
        widths: of the bottom's layers.
        activation: of the bottom.
        norm: of the bottom, "none", "batch" or "layer".
    """

    widths: Sequence[int] = (256,)
    activation: str = "relu"
    norm: str = "none"


class Bottom(nn.Module):
    """One MLP whose output every task reads; a trunk without gates.

    Args:
        mlp: the MLP, as a stack of one.
    """

    def __init__(self, mlp: ExpertStack):
        super().__init__()
        self.mlp = mlp
        self.moe_layers: dict[str, Any] = {}

    def forward(self, x: Tensor, tasks: Sequence[int]) -> tuple[Tensor, dict[str, Routing]]:
        """The same vectors [b, h] for every task, [t, b, h], and no routing."""
        return self.mlp(x).transpose(0, 1).expand(len(tasks), -1, -1), {}

    def check_like(self, like: Sequence[int]) -> None:
        """Refuses nothing."""

    def add_task(self, like: Sequence[int] = ()) -> None:
        """Does nothing: nothing here belongs to a task."""

    def own_parameters(self, task: int) -> list[nn.Parameter]:
        """None."""
        return []

    def for_tasks(self, tasks: Sequence[int]) -> Self:
        """A copy: nothing here belongs to a task."""
        return copy.deepcopy(self)


def build(tasks: Sequence[Task], config: BottomConfig, encoder: nn.Module) -> VectorModel:
    """The shared-bottom model a config describes on top of an encoder, with fresh weights."""
    how = {"activation": config.activation, "norm": config.norm, "dropout": config.dropout}
    bottom = ExpertStack(1, encoder.dim, config.widths, **how)  # type: ignore[arg-type]
    return VectorModel(tasks, encoder, Bottom(bottom), Towers(tasks, bottom.out_dim, config.tower, config.dropout))


def _shared(tasks: Sequence[Task], config: BottomConfig, encoder: nn.Module) -> nn.Module:
    model: Any = build(tasks, config, encoder)
    model.options = asdict(config)  # what `create_model` records
    return model


def _single(tasks: Sequence[Task], config: BottomConfig, encoder: Callable[[BottomConfig], nn.Module]) -> nn.Module:
    model: Any = SingleTaskSet({task.name: build((task,), config, encoder(config)) for task in tasks})
    model.options = asdict(config)
    return model


@register_model(modality="table")
def shared_bottom_table(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """One MLP of 256 units for all tasks of a table, a tower per task."""
    config = configure(BottomConfig, {}, overrides)
    return _shared(tasks, config, table_encoder(config))


@register_model(modality="image", kinds=VECTOR_KINDS)
def shared_bottom_lenet(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """A LeNet and one MLP of 256 units for all tasks on small pictures, a tower per task."""
    config = configure(BottomConfig, {}, overrides)
    return _shared(tasks, config, picture_encoder(config))


@register_model(modality="table")
def single_task_table(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """One MLP of 256 units per task of a table."""
    return _single(tasks, configure(BottomConfig, {}, overrides), table_encoder)


@register_model(modality="image", kinds=VECTOR_KINDS)
def single_task_lenet(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """A LeNet and one MLP of 256 units per task on small pictures."""
    return _single(tasks, configure(BottomConfig, {}, overrides), picture_encoder)
