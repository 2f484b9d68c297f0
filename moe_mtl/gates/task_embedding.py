"""Task-embedding gate: one router for all tasks, told which task it serves by a learned vector beside each token.

Paper: Fan et al. 2022, https://arxiv.org/abs/2210.14793 (M3ViT, the task-conditioned variant).
Differs: the task MLP belongs to the gate, where the authors' code shares one among all layers; the product with the
    concatenation [x, s_t] is computed as W_x x + W_s s_t, so s_t is not repeated for every token.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_mtl.gates._topk import Normalize, TopKGate
from moe_mtl.routing import TaskIds
from moe_mtl.task_linear import append, select, uniform_parameter


class TaskEmbeddingGate(TopKGate):
    """The k largest of softmax(W [x, s_t] + noise), with s_t = LayerNorm(V gelu(u_t + a) + b).

    u_t is the task's column of the first layer of an MLP over the task one-hot: the only parameter that belongs to one
    task. W [e, d + d_t], V, a, b and the norm are shared.

    Args:
        dim: width d of the tokens.
        num_experts: experts e.
        num_tasks: tasks t.
        k: experts used per token.
        embedding_dim: width d_t of the task vector; 64 is the value in the authors' configuration.
        noise_std: as in `TopKGate`.
        normalize: as in `TopKGate`.
        frozen: as in `TopKGate`; the task vectors are fixed too.

    Raises:
        ValueError: as in `TopKGate`, or `embedding_dim` is below 1.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        num_tasks: int,
        k: int,
        *,
        embedding_dim: int = 64,
        noise_std: float = 1.0,
        normalize: Normalize = "none",
        frozen: bool = False,
    ):
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim: got {embedding_dim}, expected at least 1")
        self.embedding_dim = embedding_dim  # before the constructor, which calls `make_router`
        super().__init__(dim, num_experts, num_tasks, k, noise_std=noise_std, normalize=normalize, frozen=frozen)

    def make_router(self) -> None:
        """W [e, d + d_t], and the task vectors' table and MLP."""
        width = self.embedding_dim
        self.weight = uniform_parameter(self.num_experts, self.dim + width, fan_in=self.dim + width)
        self.table = nn.ParameterList([uniform_parameter(width, fan_in=self.num_tasks) for _ in range(self.num_tasks)])
        self.table_bias = uniform_parameter(width, fan_in=self.num_tasks)
        self.project = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def embed(self, task: TaskIds, dtype: torch.dtype = torch.float32) -> Tensor:
        """The task vectors s_t: [1, d_t] for one id, [blocks, d_t] for one per block, [m, d_t] for one per row."""
        if isinstance(task, Tensor):
            # Rows are gathered before the MLP: after it, a task that was not asked for would enter the gradients.
            rows = torch.stack(tuple(self.table)).index_select(0, task)
        else:
            rows = torch.stack([self.table[i] for i in ((task,) if isinstance(task, int) else task)])
        hidden = F.gelu((rows + self.table_bias).to(dtype))
        vector = F.linear(hidden, self.project.weight.to(dtype), self.project.bias.to(dtype))
        return F.layer_norm(vector, self.norm.normalized_shape, self.norm.weight.to(dtype), self.norm.bias.to(dtype))

    def scores(self, x: Tensor, task: TaskIds) -> Tensor:
        """W_x x + W_s s_t, [m, e]."""
        token_weight, task_weight = self.weight.to(x.dtype).split((self.dim, self.embedding_dim), dim=1)
        scores, shift = F.linear(x, token_weight), F.linear(self.embed(task, x.dtype), task_weight)
        if isinstance(task, int | Tensor):
            return scores + shift
        blocks = scores.unflatten(0, (len(task), scores.shape[0] // len(task)))
        return (blocks + shift.unsqueeze(1)).flatten(0, 1)

    def zero_scores(self) -> None:
        """Makes, in place, the shared router zero; the task vectors stay, so that it can learn from them."""
        nn.init.zeros_(self.weight)

    def append_task(self, like: Sequence[int]) -> None:
        """Adds, in place, the table entry of one more task."""
        append(self.table, like, uniform_parameter(self.embedding_dim, fan_in=self.num_tasks + 1))

    def keep_tasks(self, tasks: Sequence[int]) -> None:
        """Drops, in place, the table entries of every task but these; the rest is shared and stays."""
        self.table = select(self.table, tasks)
