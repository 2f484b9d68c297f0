"""APEM: interactions between fields by set attention, then a selector that weighs the fields for every task.

Paper: inspired by Tao et al. 2022, APEM, https://arxiv.org/abs/2301.02494 (abstract: a group transformer of modified
    set attention and squeeze-and-excitation, then a pattern selector with task-indicator vectors).
Differs: rebuilt from the abstract. Set attention is that of induced vectors (Lee et al. 2019,
    https://arxiv.org/abs/1810.00825), fields are in one group, nothing is searched for; the top is one MLP and a tower
    per task. Sizes are ours.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_mtl.attention import AttentionBlock
from moe_mtl.expert_stack import ExpertStack
from moe_mtl.fields import FieldsConfig, FieldTrunk, field_encoder, field_weights
from moe_mtl.registry import configure, register_model
from moe_mtl.task_linear import append, select
from moe_mtl.tasks import Task
from moe_mtl.towers import Towers
from moe_mtl.vector import VectorModel


@dataclass(frozen=True, kw_only=True)
class APEMConfig(FieldsConfig):
    """An APEM.

    Attributes:
        blocks: of set attention; 0 for none.
        heads: attention heads; they divide the width of a field.
        hidden: units of a block's MLPs.
        induced: vectors that the fields exchange through.
    """

    blocks: int = 1
    heads: int = 4
    hidden: int = 64
    induced: int = 4

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("blocks", 0), ("hidden", 1), ("induced", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")


class SetBlock(nn.Module):
    """Set attention through induced vectors, then squeeze-and-excitation over the fields, for all tasks alike.

    Args:
        fields: how many f.
        dim: width d of a field.
        config: heads, hidden units, induced vectors, bottleneck, dropout.
    """

    def __init__(self, fields: int, dim: int, config: APEMConfig):
        super().__init__()
        self.induced = nn.Parameter(torch.empty(config.induced, dim).normal_(std=dim**-0.5))
        sizes = (dim, config.heads, config.hidden, config.dropout)
        self.gather, self.spread = AttentionBlock(*sizes), AttentionBlock(*sizes)
        self.squeeze, self.excite = nn.Linear(fields, config.bottleneck), nn.Linear(config.bottleneck, fields)

    def forward(self, x: Tensor) -> Tensor:
        """Fields [b, f, d] to fields of the same shape."""
        seen = self.gather(self.induced.to(x.dtype).expand(x.shape[0], -1, -1), x)
        x = self.spread(x, seen)
        return x * field_weights(self.excite(F.relu(self.squeeze(x.mean(dim=-1))))).unsqueeze(-1)


class PatternSelector(nn.Module):
    """Fields, through blocks that all tasks share, weighed for every task by one net that reads its indicator vector.

    With s the mean of each field over its numbers and u the task's vector: weights 2 sigma(W relu(V s + U u)).

    Args:
        blocks: (fields [b, f, d]) to fields of the same shape, one after another.
        tasks: how many t.
        fields: how many f.
        task_dim: width of a task's vector.
        bottleneck: hidden units.
    """

    def __init__(self, blocks: Sequence[nn.Module], tasks: int, fields: int, task_dim: int, bottleneck: int):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.indicators = nn.ParameterList([nn.Parameter(torch.randn(task_dim)) for _ in range(tasks)])
        self.squeeze, self.ask = nn.Linear(fields, bottleneck), nn.Linear(task_dim, bottleneck, bias=False)
        self.excite = nn.Linear(bottleneck, fields)

    def forward(self, fields: Tensor, tasks: Sequence[int]) -> Tensor:
        """Fields [b, f, d] to those of these tasks, [t, b, f, d]."""
        x = self.blocks(fields)
        asked = self.ask(torch.stack([self.indicators[i] for i in tasks]).to(x.dtype))
        hidden = F.relu(self.squeeze(x.mean(dim=-1)) + asked.unsqueeze(1))
        return x * field_weights(self.excite(hidden)).unsqueeze(-1)

    def append_task(self, like: Sequence[int]) -> None:
        """Adds, in place, the vector of one more task: the mean of those of these tasks, or fresh."""
        append(self.indicators, like, torch.randn(self.indicators[0].shape))

    def for_tasks(self, tasks: Sequence[int]) -> Self:
        """A copy for these tasks alone, in this order."""
        return copy.deepcopy(self, {id(self.indicators): select(self.indicators, tasks)})


@register_model(modality="table")
def apem_table(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """APEM on a table: a block of set attention on fields of 16 numbers, weighed per task, then an MLP of 128 units."""
    config = configure(APEMConfig, {}, overrides)
    encoder = field_encoder(config)
    blocks = [SetBlock(encoder.fields, encoder.dim, config) for _ in range(config.blocks)]
    refine = PatternSelector(blocks, len(tasks), encoder.fields, config.task_dim, config.bottleneck)
    mlp = ExpertStack(1, encoder.fields * encoder.dim, config.widths, dropout=config.dropout)
    towers = Towers(tasks, mlp.out_dim, config.tower, config.dropout)
    model: Any = VectorModel(tasks, encoder, FieldTrunk(refine, mlp), towers)
    model.options = asdict(config)  # what `create_model` records
    return model
