"""MultiTab-Net: a transformer over the columns of a table with one learned token per task.

Paper: Sinodinos et al. 2026, MultiTab, https://arxiv.org/abs/2511.09970 (task tokens, masked attention between
    columns, attention between rows; sizes of the authors' configuration for ACS-Income).
Differs: beside attention from task to task, that from columns to task tokens is masked too, so that a task alone is
    what it is among others; with one block, the default, the result is the same. Attention between rows is off, where
    the configuration has it on, and runs on each token by itself instead of all tokens of a row side by side, which
    would mix the tasks. Numbers are encoded as in `moe_mtl.embeddings`. There are no rotary positions.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_mtl.attention import AttentionBlock
from moe_mtl.fields import field_encoder
from moe_mtl.registry import configure, register_model
from moe_mtl.routing import Routing
from moe_mtl.task_linear import TaskLinear, append, select
from moe_mtl.tasks import Task
from moe_mtl.towers import Towers
from moe_mtl.vector import VectorConfig, VectorModel

STD = 0.01  # of the normal distribution all weights are drawn from


@dataclass(frozen=True, kw_only=True)
class MultiTabConfig(VectorConfig):
    """A MultiTab-Net.

    Attributes:
        embedding_dim: width of a token.
        blocks: transformer blocks.
        heads: attention heads; they divide the width.
        hidden: units of the MLP of a block.
        row_attention: let every token also attend to the same token of the other rows, after each block. A prediction
            then depends on the batch it is made in, with one task per sample on the rows of that task; off for serving.
    """

    embedding_dim: int = 16
    blocks: int = 1
    heads: int = 4
    hidden: int = 256
    row_attention: bool = False
    dropout: float = 0.2

    def __post_init__(self):
        for name in ("blocks", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")


class TokenTrunk(nn.Module):
    """Transformer blocks over task tokens and columns; a task's vector is its token at the end.

    A task token reads itself and all columns, a column reads columns alone. In the last block the columns are read and
    not updated.

    Args:
        tasks: task tokens.
        dim: width d of the tokens.
        config: blocks, heads, hidden units, dropout.
    """

    def __init__(self, tasks: int, dim: int, config: MultiTabConfig):
        super().__init__()
        self.dropout = config.dropout
        self.tokens = nn.ParameterList([nn.Parameter(torch.empty(dim).normal_(std=STD)) for _ in range(tasks)])

        def stack(count: int) -> nn.ModuleList:
            sizes = (dim, config.heads, config.hidden, config.dropout)
            return nn.ModuleList([AttentionBlock(*sizes) for _ in range(count)])

        self.blocks, self.rows = stack(config.blocks), stack(config.blocks if config.row_attention else 0)
        self.moe_layers: dict[str, Any] = {}

    def forward(self, fields: Tensor, tasks: Sequence[int]) -> tuple[Tensor, dict[str, Routing]]:
        """Vectors [t, b, d] of these tasks from columns [b, f, d], and no routing."""
        count, last = len(tasks), len(self.blocks) - 1
        tokens = torch.stack([self.tokens[i] for i in tasks]).to(fields.dtype).expand(fields.shape[0], -1, -1)
        x = F.dropout(torch.cat([tokens, fields], dim=1), self.dropout, self.training)
        mask = token_mask(count, x.shape[1], x.device)
        for i, block in enumerate(self.blocks):
            x = block(x[:, :count], x, mask[:count]) if i == last else block(x, mask=mask)
            if self.rows:
                x = self.rows[i](x.transpose(0, 1)).transpose(0, 1)
        return x.transpose(0, 1), {}

    def check_like(self, like: Sequence[int]) -> None:
        """Refuses nothing."""

    def add_task(self, like: Sequence[int] = ()) -> None:
        """Serves, in place, one more task; its token starts as the mean of those of these tasks, or fresh."""
        append(self.tokens, like, torch.empty(self.tokens[0].shape).normal_(std=STD))

    def own_parameters(self, task: int) -> list[nn.Parameter]:
        """The parameters that serve one task alone: its token."""
        return [self.tokens[task]]

    def for_tasks(self, tasks: Sequence[int]) -> Self:
        """A copy with the tokens of these tasks alone, in this order."""
        return copy.deepcopy(self, {id(self.tokens): select(self.tokens, tasks)})


def token_mask(tasks: int, tokens: int, device: torch.device | None = None) -> Tensor:
    """What each of the tokens may attend to, bool [n, n]: the columns, and a task token itself."""
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    mask[:, :tasks] = False
    mask[:tasks, :tasks].fill_diagonal_(True)
    return mask


@torch.no_grad()
def draw_normal(module: nn.Module, std: float) -> None:
    """Draws the weights of every linear map in a module from N(0, std^2) and sets its biases to zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.normal_(std=std)
            layer.bias.zero_()
        elif isinstance(layer, TaskLinear):
            for weight in layer.weight:
                weight.normal_(std=std)


@register_model(modality="table")
def multitab_table(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """MultiTab-Net on a table: one block of 4 heads on tokens of 16 numbers, 256 hidden units."""
    config = configure(MultiTabConfig, {}, overrides)
    encoder = field_encoder(config, STD)
    towers = Towers(tasks, encoder.dim, config.tower, config.dropout)
    model: Any = VectorModel(tasks, encoder, TokenTrunk(len(tasks), encoder.dim, config), towers)
    draw_normal(model, STD)
    model.options = asdict(config)  # what `create_model` records
    return model
