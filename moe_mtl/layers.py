"""The MoE layer: gate -> dispatch -> experts -> combine; and the same layer inside a block that knows no tasks."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_mtl.experts import ExpertBank
from moe_mtl.gates import Gate
from moe_mtl.routing import Routing, TaskIds


class MoE(nn.Module):
    """Task-gated mixture of experts on flattened tokens.

    Args:
        gate: decides which experts each token uses.
        experts: the stacked expert bank; its size and width must be the gate's.

    Raises:
        ValueError: gate and bank disagree on the number of experts or the width.
    """

    def __init__(self, gate: Gate, experts: ExpertBank):
        super().__init__()
        for what, ours, theirs in (
            ("num_experts", gate.num_experts, experts.num_experts),
            ("dim", gate.dim, experts.dim),
        ):
            if ours != theirs:
                raise ValueError(f"{what}: the gate has {ours}, the expert bank {theirs}; build both with one value")
        self.gate = gate
        self.experts = experts

    def forward(
        self, x: Tensor, task: TaskIds | None, valid: Tensor | None = None, group: int | None = None
    ) -> tuple[Tensor, Routing]:
        """Mixes experts per token.

        Args:
            x: tokens [m, d].
            task: as `Gate.forward` takes it.
            valid: bool [m]; padding rows use no expert and give zeros.
            group: tokens per sample, side by side; what a gate that mixes the tokens of a sample needs to know.

        Returns:
            Outputs [m, d_out] and the routing that made them.

        Raises:
            ValueError: the gate mixes the tokens of a sample, and `group` is missing.
        """
        if self.gate.per_sample:
            return self._through_slots(x, task, valid, group)
        routing = self.gate(x, task, valid)
        local = self.gate.in_bank(routing)
        # Gates of other classes than "task" name k different experts: of k experts, all, which makes a dense mixture.
        if local.indices is not None and local.k == local.num_experts and self.gate.compute_class != "task":
            local = Routing(local.dense_weights(), None, local.logits, local.task, local.valid)
        return self.experts(x, local), routing

    def _through_slots(
        self, x: Tensor, task: TaskIds | None, valid: Tensor | None, group: int | None
    ) -> tuple[Tensor, Routing]:
        if group is None:
            raise ValueError("group: this gate mixes the tokens of a sample; pass how many tokens a sample has")
        gate: Any = self.gate
        dispatch, combine, routing = gate.slots(x, task, valid, group)
        slots = torch.bmm(dispatch.mT.to(x.dtype), x.unflatten(0, (-1, group)).nan_to_num(0.0))  # [b, s, d]
        rows, count = slots.shape[0] * slots.shape[1], len(self.kept_experts)
        own = torch.arange(slots.shape[1], device=x.device) // gate.slots_per_expert
        ids, weights = own.repeat(slots.shape[0]).unsqueeze(1), combine.new_ones(rows, 1)
        read = self.experts(slots.flatten(0, 1), Routing(weights, ids, combine.new_zeros(rows, count), None))
        y = torch.bmm(combine.to(read.dtype), read.unflatten(0, slots.shape[:2]))
        return y.flatten(0, 1), routing

    def needed(self, tasks: Sequence[int] | None = None) -> list[int]:
        """Ids, ascending, of the held experts that some of these tasks, or of all, can ever use."""
        held = self.kept_experts
        reached = [self.gate.reachable(task) for task in (range(self.gate.num_tasks) if tasks is None else tasks)]
        every = {e for ids in reached for e in (held if ids is None else ids)}
        return [e for e in held if e in every]

    @property
    def kept_experts(self) -> list[int]:
        """Ids of the experts the layer holds, ascending: all of 0..e-1, unless some were dropped."""
        return list(range(self.gate.num_experts) if self.gate.kept_ids is None else self.gate.kept_ids)

    def give_experts(self, task: int, ids: Sequence[int]) -> None:
        """Gives a task, in place, copies of some experts, which stand in for them; as `Gate.give_experts`."""
        held = self.kept_experts
        self.experts.copy_experts([held.index(e) for e in ids])
        self.gate.give_experts(task, ids)

    def keep_experts(self, ids: Sequence[int]) -> None:
        """Drops, in place, every expert but these from the bank; the gate can no longer choose them.

        What the gate returns keeps the ids and columns of all e experts, and its weights are still shares of all.

        Args:
            ids: of the e experts the layer was made with, any order.

        Raises:
            ValueError: `ids` is empty, names an expert twice, or one that the layer does not hold.
        """
        held, ids = self.kept_experts, sorted(ids)
        if not ids or len(set(ids)) < len(ids) or not set(ids) <= set(held):
            raise ValueError(f"ids: got {ids}, expected different experts of {held}, at least one")
        self.experts.keep_experts([held.index(e) for e in ids])
        held_by_gate = itertools.chain(self.gate.parameters(), self.gate.buffers())  # the bank may lie elsewhere
        self.gate.keep_experts(torch.tensor(ids, device=next(held_by_gate).device))


class TaskContext:
    """Carries the tasks of a forward pass to MoE layers inside blocks that take and return plain tensors.

    Owned by the wrapping model, which opens it around its backbone. A plain object, not a module and not a
    `ContextVar`: attribute reads trace under `torch.compile` and strict `torch.export`. One forward at a time: threads
    must not share a model.
    """

    def __init__(self):
        self.active = False
        self.stacked = False
        self.task: TaskIds = ()
        self.valid: Tensor | None = None
        self.routings: dict[str, Routing] = {}

    @contextmanager
    def open(self, task: TaskIds, valid: Tensor | None = None) -> Iterator[dict[str, Routing]]:
        """Sets the tasks for one forward and collects what each layer routed.

        Args:
            task: one id for every sample; a sequence of ids, for which samples are repeated once each at the stacking
                point; or int64 ids [b], one per sample.
            valid: bool [b, n], False for padding tokens; None when every token counts.

        Raises:
            RuntimeError: a forward is under way.
        """
        if self.active:
            raise RuntimeError("this model is in the middle of another forward; threads must not share a model")
        self.active, self.stacked, self.task, self.valid, self.routings = True, False, task, valid, {}
        try:
            yield self.routings
        finally:
            self.active, self.stacked, self.task, self.valid, self.routings = False, False, (), None, {}

    def valid_tokens(self, samples: int) -> Tensor | None:
        """Which of the tokens of so many samples, stacked or not, are no padding: bool [m]; None when all are."""
        if self.valid is None:
            return None
        return self.valid.repeat(samples // self.valid.shape[0], 1).flatten()

    def stack(self, x: Tensor) -> Tensor:
        """Repeats [b, ...] to [(t b), ...] once per forward, when several tasks were asked for."""
        if not self.active:
            raise RuntimeError("a task-routed block ran outside its model: call the MultiTaskModel, not its backbone")
        if isinstance(self.task, Sequence) and not self.stacked:
            self.stacked = True
            return x.repeat(len(self.task), *(1 for _ in x.shape[1:]))
        return x


class ContextMoE(nn.Module):
    """An `MoE` in the place of a block's MLP: plain tensors in and out, the task from a `TaskContext`.

    Args:
        moe: the layer.
        context: the wrapping model's context.
        name: the key of its `Routing` in what the model returns.
    """

    def __init__(self, moe: MoE, context: TaskContext, name: str):
        super().__init__()
        self.moe = moe
        self.context = context
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [b, ..., d] to [b, ..., d_out]; to [t, b, ..., d_out] where tasks part here (see `ExpandTasks`).

        Raises:
            RuntimeError: called outside a forward of the wrapping model, so that the task is unknown.
        """
        context = self.context
        if not context.active:
            raise RuntimeError(
                f"{self.name} has no task: call the MultiTaskModel, not its backbone, and leave the backbone's own "
                "activation checkpointing off (it calls blocks again after the forward)"
            )
        task: TaskIds | None = context.task
        parting = isinstance(task, Sequence) and not context.stacked
        if parting and self.moe.gate.task_dependent:
            stacked = context.stack(x)
            valid = context.valid_tokens(stacked.shape[0])
            y, routing = self.moe(stacked.flatten(0, -2), task, valid, group=x.shape[-2])
            shape: tuple[int, ...] = (stacked.shape[0] // x.shape[0], *x.shape[:-1])
        else:
            if parting:
                task = None  # one pass serves all tasks
            elif isinstance(task, Tensor):
                task = task.repeat_interleave(x[0, ..., 0].numel())
            y, routing = self.moe(x.flatten(0, -2), task, context.valid_tokens(x.shape[0]), group=x.shape[-2])
            shape = x.shape[:-1]
        context.routings[self.name] = routing
        return y.unflatten(0, shape)


class StackTasks:
    """Forward pre-hook of the first task-dependent block: repeats its first argument, the hidden states, per task.

    Serves any block. An object rather than a closure, so that a deep copy of the model hooks the copy's own context.
    """

    def __init__(self, context: TaskContext):
        self.context = context

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        """The block's positional arguments with the hidden states stacked."""
        return (self.context.stack(args[0]), *args[1:])


class ExpandTasks:
    """Forward hook of the first task-dependent block: [t, b, n, d] to [(t b), n, d], the form of a stacked batch.

    For blocks that end in `x + f(mlp(x))` with an f per token: the attention before it runs once for all tasks, the
    experts' output has a leading axis of tasks, and the sum broadcasts over it.
    """

    def __call__(self, module: nn.Module, args: tuple, y: Tensor) -> Tensor:
        """The block's output with the axis of tasks, if there is one, joined to the batch."""
        return y.flatten(0, 1) if y.ndim > args[0].ndim else y


class ExpertBlock(nn.Module):
    """A transformer block without attention: x + mlp(norm(x)), the mlp being replaced by experts.

    Args:
        dim: width d of the tokens.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [b, n, d] to the same shape."""
        return x + self.mlp(self.norm(x))
