"""DTRN: fields that every task transforms and weighs for itself, before anything is shared.

Paper: inspired by Liu et al. 2023, DTRN, https://arxiv.org/abs/2308.05996 (abstract: per task, interests by a
    parameter-efficient hypernetwork and refined features by a net like SENet).
Differs: rebuilt from the abstract. Tables have no behaviour sequences, so the hypernetwork's map acts on the vector of
    every column, as a residual; the top is one MLP and a tower per task. Sizes are ours.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Self

import torch
from torch import Tensor, nn

from moe_mtl.expert_stack import ExpertStack
from moe_mtl.fields import FieldsConfig, FieldTrunk, field_encoder, field_weights
from moe_mtl.registry import configure, register_model
from moe_mtl.task_linear import TaskLinear, append, select
from moe_mtl.tasks import Task
from moe_mtl.towers import TaskMLP, Towers
from moe_mtl.vector import VectorModel


class TaskFields(nn.Module):
    """Fields transformed by a matrix that a hypernetwork makes of the task's embedding, then weighed by the task's net.

    With u the task's embedding and e a row's fields [f, d]: v = e + e H(u); s the mean of each field of v over its
    numbers; the result is v times 2 sigma(W_t relu(V_t s)), a weight per field. H is shared, V_t and W_t are the
    task's; both have biases.

    Args:
        tasks: how many t.
        fields: how many f.
        dim: width d of a field.
        task_dim: width of a task's embedding.
        bottleneck: hidden units of a task's net.
    """

    def __init__(self, tasks: int, fields: int, dim: int, task_dim: int, bottleneck: int):
        super().__init__()
        self.embeddings = nn.ParameterList([nn.Parameter(torch.randn(task_dim)) for _ in range(tasks)])
        self.maker = nn.Linear(task_dim, dim * dim)
        self.squeeze = TaskMLP(fields, (bottleneck,), tasks)
        self.excite = TaskLinear(bottleneck, fields, tasks, bias=True)

    def forward(self, fields: Tensor, tasks: Sequence[int]) -> Tensor:
        """Fields [b, f, d] to those of these tasks, [t, b, f, d]."""
        embeddings = torch.stack([self.embeddings[i] for i in tasks])
        maps = self.maker(embeddings.to(fields.dtype)).unflatten(1, (fields.shape[2], -1))  # [t, d, d]
        changed = fields + torch.matmul(fields.flatten(0, 1), maps).unflatten(1, fields.shape[:2])
        hidden = self.squeeze(changed.mean(dim=-1), tasks)
        return changed * field_weights(self.excite.blocks(hidden, tasks)).unsqueeze(-1)

    def append_task(self, like: Sequence[int]) -> None:
        """Adds, in place, the embedding and the net of one more task: the mean of those of these tasks, or fresh."""
        append(self.embeddings, like, torch.randn(self.embeddings[0].shape))
        self.squeeze.append_task(like)
        self.excite.append_task(like)

    def for_tasks(self, tasks: Sequence[int]) -> Self:
        """A copy for these tasks alone, in this order."""
        own: dict[int, Any] = {id(part): part.for_tasks(tasks) for part in (self.squeeze, self.excite)}
        return copy.deepcopy(self, {**own, id(self.embeddings): select(self.embeddings, tasks)})


@register_model(modality="table")
def dtrn_table(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """DTRN on a table: fields of 16 numbers that each task transforms and weighs, then an MLP of 128 units."""
    config = configure(FieldsConfig, {}, overrides)
    encoder = field_encoder(config)
    refine = TaskFields(len(tasks), encoder.fields, encoder.dim, config.task_dim, config.bottleneck)
    mlp = ExpertStack(1, encoder.fields * encoder.dim, config.widths, dropout=config.dropout)
    towers = Towers(tasks, mlp.out_dim, config.tower, config.dropout)
    model: Any = VectorModel(tasks, encoder, FieldTrunk(refine, mlp), towers)
    model.options = asdict(config)  # what `create_model` records
    return model
