"""Routing: what a gate returns, and the axis letters of the whole library.

b  batch                    e  experts
n  tokens per sample        k  experts used per token
m  tokens, flattened (b n)  r  routed rows (m k), sorted by expert
d  width                    t  tasks
h  expert hidden width
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# One id for all rows; one id per equal contiguous block of rows (tasks stacked along the batch); or one id per row.
TaskIds = int | Sequence[int] | Tensor


def task_per_row(task: TaskIds, rows: int, device: torch.device | str | None = None) -> Tensor:
    """Spells a task argument out as int64 ids [rows].

    Raises:
        ValueError: the rows cannot be split into as many equal blocks as there are ids, or the ids are not [rows].
    """
    if isinstance(task, Tensor):
        if task.shape != (rows,):
            raise ValueError(f"task: got ids of shape {tuple(task.shape)} for {rows} rows; pass one id per row")
        return task.to(device=device or task.device, dtype=torch.int64)
    if isinstance(task, int):
        return torch.full((rows,), task, dtype=torch.int64, device=device)
    if not task or rows % len(task):
        raise ValueError(f"task: {rows} rows do not split into {len(task)} equal blocks, one per id")
    return torch.tensor(tuple(task), dtype=torch.int64, device=device).repeat_interleave(rows // len(task))


@dataclass(frozen=True)
class Routing:
    """Which experts each token uses and with what weight. Gates return it; nothing is stored on modules.

    Attributes:
        weights: combination weights, [m, k] beside `indices`, or [m, e] when every expert is used.
        indices: int64 expert ids [m, k], or None for a dense mixture over all experts.
        logits: the router's clean scores over all experts, float32 [m, e].
        task: the task argument the gate was called with; None when one pass served every task asked for.
        valid: bool [m], False for padding; None when every token counts.
        noisy_logits: the scores the choice was made from, float32 [m, e], in the same space as `logits`;
            None when no noise was added.
        noise_std: standard deviation of that noise, broadcastable to [m, e].
        selectors: of a gate that mixes k selectors, the weights of each over all experts before mixing, [u, k, e]: a
            row per token, or one per task where they do not depend on the token.
    """

    weights: Tensor
    indices: Tensor | None
    logits: Tensor
    task: TaskIds | None
    valid: Tensor | None = None
    noisy_logits: Tensor | None = None
    noise_std: Tensor | None = None
    selectors: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """E, the size of the bank."""
        return self.logits.shape[-1]

    @property
    def k(self) -> int:
        """Experts used per token; E for a dense mixture."""
        return self.weights.shape[-1]

    def probs(self) -> Tensor:
        """Softmax of the clean logits over all experts, float32 [m, e]."""
        return self.logits.softmax(dim=-1)

    def dense_weights(self) -> Tensor:
        """The weights over all experts, zero where an expert is not used, [m, e]."""
        if self.indices is None:
            return self.weights
        return self.weights.new_zeros(self.logits.shape).scatter_add(-1, self.indices, self.weights)

    def task_ids(self) -> Tensor:
        """The task of every token, int64 [m].

        Raises:
            ValueError: the tokens served every task at once.
        """
        if self.task is None:
            raise ValueError("routing.task is None: one pass served every task, so no token belongs to a single one")
        return task_per_row(self.task, self.logits.shape[0], self.logits.device)


torch.export.register_dataclass(Routing, serialized_type_name="moe_mtl.Routing")
