"""Task-level gate: which experts serve is a matter of the task alone, learned through samples or a cooling softmax.

Paper: Ye et al. 2022, https://arxiv.org/abs/2205.12701 (task-level mixture-of-experts: a router on task embeddings,
    softmax, Gumbel-softmax or its straight-through form, temperature lowered in training, the arg-max alone for
    inference; in a second stage, see `moe_mtl.two_stage`, fixed routes and a plain softmax cooled from 300 to 1); Jang
    et al. 2017, https://arxiv.org/abs/1611.01144 (Gumbel-softmax).
Differs: the temperature falls by a constant factor over the whole training, from `start` to `end`, where the authors
    lower it by exp(-3e-4) per update; embeddings start at random. `k` above 1 keeps the k largest for inference.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_mtl.gates._gate import UNREACHABLE
from moe_mtl.gates._router import RouterGate, rows_of
from moe_mtl.routing import Routing, TaskIds
from moe_mtl.task_linear import append, select, uniform_parameter
from moe_mtl.tasks import nearest

Selection = Literal["softmax", "gumbel", "straight_through"]


class TaskLevelGate(RouterGate):
    """Scores z_t of the task: W_2 gelu(W_1 u_t + b_1) + b_2 of its learned embedding u_t, or learned numbers.

    In training every expert is mixed: weights softmax(z_t / tau), softmax((z_t + g) / tau) with one Gumbel draw g per
    task and call, or, straight-through, the k largest of the latter over their sum, with the gradient of all. In
    evaluation the k largest of softmax(z_t / tau) serve, divided by their sum: for k = 1 the arg-max, with weight 1.

    The logits of a `Routing` are z_t / tau, in evaluation -10^4 for the experts that do not serve: their softmax is the
    weights.

    Args:
        dim: width d of the tokens.
        num_experts: experts e.
        num_tasks: tasks t.
        k: experts per task in evaluation, and of a straight-through sample. With k = e there is nothing to choose, and
            nothing is drawn.
        selection: "softmax", "gumbel" or "straight_through".
        embedding_dim: width of a task's embedding and of the router's hidden layer; None for e numbers per task and no
            router.
        start: temperature tau at the beginning of training.
        end: temperature at its end, see `anneal`.
        frozen: the routes do not learn; the temperature falls all the same. For routes that were learned before, see
            `moe_mtl.two_stage`; as they are drawn, the control that shows what learning them is worth.

    Attributes:
        temperature: tau as it is now, a scalar tensor, saved with the weights.

    Raises:
        ValueError: a size is out of range, a temperature not above 0, or the selection unknown.
    """

    compute_class: Literal["dense", "token", "task", "weight"] = "task"
    default_k: ClassVar[int] = 1
    temperature: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        num_tasks: int,
        k: int = 1,
        *,
        selection: Selection = "straight_through",
        embedding_dim: int | None = 64,
        start: float = 2.0,
        end: float = 0.1,
        frozen: bool = False,
    ):
        super().__init__(dim, num_experts, num_tasks, k)
        if selection not in get_args(Selection):
            raise ValueError(f"selection: unknown {selection!r}; {nearest(str(selection), get_args(Selection))}")
        if embedding_dim is not None and embedding_dim < 1:
            raise ValueError(f"embedding_dim: got {embedding_dim}, expected at least 1, or None")
        for name, value in (("start", start), ("end", end)):
            if not value > 0:
                raise ValueError(f"{name}: got {value}, expected above 0")
        self.selection, self.start, self.end, self.chosen, self.frozen = selection, start, end, k, frozen
        self.register_buffer("temperature", torch.tensor(float(start)))
        width = num_experts if embedding_dim is None else embedding_dim
        std = 0.01 if embedding_dim is None else 1.0  # scores that are nearly even, or embeddings of unit variance
        self.table = nn.ParameterList([nn.Parameter(torch.empty(width).normal_(std=std)) for _ in range(num_tasks)])
        self.hidden = None if embedding_dim is None else nn.Linear(width, width)
        self.router = None if embedding_dim is None else uniform_parameter(num_experts, width, fan_in=width)
        self.router_bias = None if embedding_dim is None else nn.Parameter(torch.zeros(num_experts))
        if frozen:
            self.requires_grad_(False)

    def anneal(self, progress: float) -> None:
        """Sets the temperature, in place: start (end / start)^progress.

        A gate of which only some parameters learn keeps its temperature: tasks that do not learn share it.
        """
        if len({parameter.requires_grad for parameter in self.parameters()}) < 2:
            self.temperature.fill_(self.start * (self.end / self.start) ** progress)

    def scores(self, x: Tensor, task: TaskIds) -> Tensor:
        """z_t / tau of each row's task, [m, e]; of tokens only their number matters."""
        if isinstance(task, Tensor):  # rows are gathered first: after the router, NaN of another task would enter it
            return self._route(rows_of(self.table, task, x.shape[0]), x.dtype)
        ids = [task] if isinstance(task, int) else task
        return self._blocks(ids, x.shape[0] // len(ids), x.dtype)

    def scores_each(self, x: Tensor, tasks: Sequence[int]) -> Tensor:
        """The same for a block of rows per task."""
        return self._blocks(tasks, x.shape[0], x.dtype)

    def _blocks(self, tasks: Sequence[int], rows: int, dtype: torch.dtype) -> Tensor:
        """z_t / tau of so many rows for each of these tasks."""
        scores = self._route(torch.stack([self.table[i] for i in tasks]), dtype)
        return scores.unsqueeze(1).expand(-1, rows, -1).flatten(0, 1)

    def _route(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """z_t / tau from embeddings or learned numbers, a row each."""
        scores = rows.to(dtype)
        if self.hidden is not None and self.router is not None and self.router_bias is not None:
            hidden = F.gelu(F.linear(scores, self.hidden.weight.to(dtype), self.hidden.bias.to(dtype)))
            scores = F.linear(hidden, self.router.to(dtype), self.router_bias.to(dtype))
        return scores / self.temperature.to(dtype)

    def choose(self, logits: Tensor, task: TaskIds | None, valid: Tensor | None) -> Routing:
        """The mixture, or in evaluation the k largest, of logits [m, e]."""
        assert task is not None  # `forward` has refused it
        if not self.training:
            logits = self._only_largest(logits)
            weights, indices = self.strongest(logits.softmax(dim=-1))
            return Routing(weights, indices, logits, task, valid)
        noisy = None
        if self.selection != "softmax" and self.chosen < self.num_experts:
            noisy = logits + rows_of(self._gumbel(logits) / self.temperature, task, logits.shape[0])
        soft = weights = (logits if noisy is None else noisy).softmax(dim=-1)
        if self.selection == "straight_through" and noisy is not None:
            weights = self._only_largest(soft.detach().log()).softmax(dim=-1) + (soft - soft.detach())
        if self.kept is None:
            return Routing(weights, None, logits, task, valid, noisy_logits=noisy)
        indices = self.kept.expand(logits.shape[0], -1)
        return Routing(weights.index_select(-1, self.kept), indices, logits, task, valid, noisy_logits=noisy)

    def _only_largest(self, logits: Tensor) -> Tensor:
        """The logits [m, e] with all but the k largest of each row out of reach."""
        top = logits.topk(self.chosen, dim=-1).indices
        return torch.full_like(logits, UNREACHABLE).scatter(-1, top, logits.gather(-1, top))

    def _gumbel(self, like: Tensor) -> Tensor:
        """A draw of the standard Gumbel distribution for every task and expert, [t, e]."""
        return -torch.empty(self.num_tasks, self.num_experts, dtype=like.dtype, device=like.device).exponential_().log()

    def reachable(self, task: int) -> tuple[int, ...] | None:
        """Ids of the k experts that serve the task, ascending; None in training, where all of them do."""
        if self.training:
            return None
        with torch.no_grad():
            logits = self._blocks([task], 1, torch.promote_types(self.table[task].dtype, torch.float32))
            routing = self.choose(logits, task, None)
        return tuple(routing.dense_weights()[0].nonzero().flatten().tolist())

    @torch.no_grad()
    def zero_scores(self) -> None:
        """Makes, in place, every score zero: the router, whose embeddings stay, or the learned numbers."""
        for parameter in self.table if self.router is None else (self.router, self.router_bias):
            parameter.zero_()  # type: ignore[union-attr]

    def append_task(self, like: Sequence[int]) -> None:
        """Adds, in place, the embedding, or the learned numbers, of one more task."""
        std = 0.01 if self.hidden is None else 1.0
        append(self.table, like, torch.empty(self.table[0].shape).normal_(std=std))

    def keep_tasks(self, tasks: Sequence[int]) -> None:
        """Drops, in place, the embeddings of every task but these; the router is shared and stays."""
        self.table = select(self.table, tasks)

    def extra_repr(self) -> str:
        """Sizes and options, for printing."""
        frozen = ", frozen=True" if self.frozen else ""
        heat = f"temperature={float(self.temperature):.3g}"
        return f"{super().extra_repr()}, selection={self.selection!r}, {heat}{frozen}"
