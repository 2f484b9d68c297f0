"""Models that see a table as one vector per column (field): their encoder, and a trunk that refines fields per task."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from moe_mtl.columns import read_columns
from moe_mtl.embeddings import FieldColumns
from moe_mtl.expert_stack import ExpertStack
from moe_mtl.routing import Routing
from moe_mtl.task_linear import entries_of
from moe_mtl.vector import VectorConfig


@dataclass(frozen=True, kw_only=True)
class FieldsConfig(VectorConfig):
    """A model that refines fields per task, then reads them side by side with an MLP that all tasks share.

    Attributes:
        embedding_dim: width of every field's vector.
        task_dim: width of a task's embedding.
        bottleneck: hidden units of the nets that weigh the fields.
        widths: of the MLP's layers.
    """

    embedding_dim: int = 16
    task_dim: int = 16
    bottleneck: int = 16
    widths: Sequence[int] = (128,)

    def __post_init__(self):
        for name in ("task_dim", "bottleneck"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")


def field_encoder(config: VectorConfig, std: float | None = None) -> FieldColumns:
    """The encoder of a table's columns to one vector each, embeddings drawn from N(0, std^2)."""
    return FieldColumns(read_columns(config.columns), config.embedding_dim, config.numeric, std)  # type: ignore[arg-type]


class FieldTrunk(nn.Module):
    """Fields as each task sees them, then one MLP on all fields side by side; a trunk without experts.

    Args:
        refine: (fields [b, f, d], ids of tasks) to fields per task [t, b, f, d]; has `for_tasks` and `append_task`.
        mlp: the MLP, as a stack of one.
    """

    def __init__(self, refine: nn.Module, mlp: ExpertStack):
        super().__init__()
        self.refine, self.mlp = refine, mlp
        self.moe_layers: dict[str, Any] = {}

    def forward(self, fields: Tensor, tasks: Sequence[int]) -> tuple[Tensor, dict[str, Routing]]:
        """Vectors [t, b, h] of these tasks from fields [b, f, d], and no routing."""
        y = self.refine(fields, tasks)
        return self.mlp(y.flatten(2).flatten(0, 1)).view(*y.shape[:2], self.mlp.out_dim), {}

    def check_like(self, like: Sequence[int]) -> None:
        """Refuses nothing."""

    def add_task(self, like: Sequence[int] = ()) -> None:
        """Serves, in place, one more task; what is its own starts as the mean of that of these tasks, or fresh."""
        self.refine.append_task(like)  # type: ignore[operator]

    def own_parameters(self, task: int) -> list[nn.Parameter]:
        """The parameters that serve one task alone."""
        parameters = dict(self.refine.named_parameters())
        return [parameters[name] for name in entries_of(self.refine, task)]

    def for_tasks(self, tasks: Sequence[int]) -> Self:
        """A copy for these tasks alone, in this order."""
        small = type(self)(self.refine.for_tasks(tasks), copy.deepcopy(self.mlp))  # type: ignore[operator]
        return small.train(self.training)


def field_weights(logits: Tensor) -> Tensor:
    """Weights of fields, 0 to 2, from logits; 1 for a logit of 0, so that fields keep their scale to begin with."""
    return 2 * logits.sigmoid()
