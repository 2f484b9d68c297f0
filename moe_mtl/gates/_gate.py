"""The contract every gate keeps."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from moe_mtl.routing import Routing, TaskIds
from moe_mtl.task_linear import entries_of

# The logit of an expert that a task cannot use: softmax makes it exactly 0, and statistics of logits stay finite.
UNREACHABLE = -1e4


class Gate(nn.Module, ABC):
    """Maps tokens and their task to expert weights.

    A gate stores nothing between calls, adds no loss and never calls `backward`; everything a loss or a picture may
    need is in the `Routing` it returns. Router arithmetic is float32 whatever the autocast dtype.

    Args:
        dim: width d of the tokens.
        num_experts: experts e in the bank.
        num_tasks: tasks t; ids are 0..t-1.
        k: experts used per token, 1..e.

    Attributes:
        kept: ids of the experts that are left, ascending, int64; None while all of them are. See `keep_experts`.
        kept_ids: the same as numbers, which an exported forward may read.
        rows: where each of the e experts stands in a bank of the kept ones, int64 [e], -1 for those not in it; or None.

    Raises:
        ValueError: a size is below 1 or k exceeds num_experts.
    """

    compute_class: Literal["dense", "token", "task", "weight"]
    # False: the same weights for every task, so features stay shared and tasks need not be stacked after this gate.
    task_dependent: ClassVar[bool] = True
    # True: experts read mixtures of the tokens of a sample (see `SoftSlotsGate.slots`), so a layer must know samples.
    per_sample: ClassVar[bool] = False
    # False: the weights of a token may sum to something else than 1, or cannot be made to (see `moefy`).
    shares_out: bool = True
    # what `resolve_k` takes where no k is named
    default_k: ClassVar[int] = 4
    kept: Tensor | None
    rows: Tensor | None
    kept_ids: tuple[int, ...] | None = None

    def __init__(self, dim: int, num_experts: int, num_tasks: int, k: int):
        super().__init__()
        for name, value in (("dim", dim), ("num_experts", num_experts), ("num_tasks", num_tasks), ("k", k)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        if k > num_experts:
            raise ValueError(f"k: got {k}, more than the {num_experts} experts; use k <= num_experts")
        self.dim, self.num_experts, self.num_tasks, self.k = dim, num_experts, num_tasks, k
        self.register_buffer("kept", None)
        self.register_buffer("rows", None)

    @abstractmethod
    def forward(self, x: Tensor, task: TaskIds | None, valid: Tensor | None = None) -> Routing:
        """Routes tokens.

        Args:
            x: tokens [m, d].
            task: one id; one id per equal contiguous block of rows; int64 ids [m]; or, for a gate that does not depend
                on the task, None for rows that serve every task at once.
            valid: bool [m], False for padding, which no statistic counts.
        """

    def each(self, x: Tensor, tasks: Sequence[int], valid: Tensor | None = None) -> Routing:
        """Routes the same tokens for each of several tasks.

        It is what `forward` gives for the tokens repeated once per task, [(t m), d], without repeating them where the
        gate can do without.

        Args:
            x: tokens [m, d].
            tasks: ids.
            valid: bool [m], False for padding.

        Returns:
            The routing of t equal blocks of m rows, one per id.
        """
        count = len(tasks)
        return self(x.repeat(count, 1), tuple(tasks), None if valid is None else valid.repeat(count))

    def reachable(self, task: int) -> tuple[int, ...] | None:
        """Ids of the experts this task can ever use, when that does not depend on the input; None for all."""
        return None

    def anneal(self, progress: float) -> None:
        """Tells a gate with a schedule, in place, how much of the training is over, 0 to 1; others do nothing."""

    def task_options(self) -> dict[str, Any]:
        """The options of the constructor that hold something for every task, as plain data; other gates have none.

        They are what a configuration must say to build this gate for the tasks it has now.
        """
        return {}

    @abstractmethod
    def zero_scores(self) -> None:
        """Makes, in place, every score zero until the gate learns: all experts then weigh the same."""

    @abstractmethod
    def for_tasks(self, tasks: Sequence[int]) -> Self:
        """A gate for these tasks alone, renumbered 0, 1, ... in the given order, holding no parameter of another."""

    def own_parameters(self, task: int) -> list[str]:
        """Names, as `named_parameters` has them, of what belongs to this task alone: its entry of every list."""
        return entries_of(self, task)

    @abstractmethod
    def check_like(self, like: Sequence[int]) -> None:
        """Refuses what `add_task` cannot start from, before anything changes.

        Raises:
            ValueError: see `add_task`.
        """

    @abstractmethod
    def add_task(self, like: Sequence[int] = ()) -> None:
        """Serves, in place, one more task, whose id is the number of those there were.

        What belongs to the others, or to all, stays the tensors it is.

        Args:
            like: ids of tasks; what belongs to the new one alone starts as the mean of theirs, for one task a copy.
                Fresh when empty.

        Raises:
            ValueError: ids out of range, tasks whose parameters have no mean, or a gate that takes no new task.
        """

    def keep_experts(self, ids: Tensor) -> None:
        """Makes, in place, every expert but these impossible to choose; k becomes their number where it was larger.

        A weight is still what it was: a share of all e experts, so nothing changes for a token that chose none of the
        others. A `Routing` keeps the ids, the columns and the logits of all e experts.

        Args:
            ids: of the e experts, ascending, int64.
        """
        self.kept, self.kept_ids = ids, tuple(ids.tolist())
        self.rows = ids.new_full((self.num_experts,), -1).scatter(0, ids, torch.arange(len(ids), device=ids.device))
        self.k = min(self.k, len(ids))

    def give_experts(self, task: int, ids: Sequence[int]) -> None:
        """Gives a task, in place, new experts in the place of some that it uses; other tasks cannot see the new ones.

        They are numbered from the number of experts there were on, in the order of `ids`, and stand last in the bank.
        While they are copies, all tasks compute what they did.

        Args:
            task: id.
            ids: of experts that the task can reach.

        Raises:
            ValueError: a gate whose tasks share what chooses experts.
        """
        count, held = self.num_experts, None if self.rows is None else int((self.rows >= 0).sum())
        self.num_experts = count + len(ids)
        if self.kept is not None and self.rows is not None and held is not None:
            self.kept = torch.cat([self.kept, torch.arange(count, self.num_experts, device=self.kept.device)])
            self.kept_ids = tuple(self.kept.tolist())
            new = torch.arange(held, held + len(ids), device=self.rows.device)
            self.rows = torch.cat([self.rows, new])

    @property
    def gives_experts(self) -> bool:
        """Whether `give_experts` knows how."""
        return type(self).give_experts is not Gate.give_experts

    def in_bank(self, routing: Routing) -> Routing:
        """A routing of this gate as a bank of the kept experts reads it: ids and columns are those of the bank."""
        if self.kept is None or self.rows is None or routing.indices is None:
            return routing
        logits = routing.logits.index_select(-1, self.kept)
        return Routing(routing.weights, self.rows[routing.indices], logits, routing.task, routing.valid)

    def strongest(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        """The k largest of each row among the kept experts, and their ids, of probabilities [m, e]: two [m, k]."""
        if self.kept is None:
            return probs.topk(self.k, dim=-1)
        weights, places = probs.index_select(-1, self.kept).topk(self.k, dim=-1)
        return weights, self.kept[places]

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"dim={self.dim}, num_experts={self.num_experts}, num_tasks={self.num_tasks}, k={self.k}"
