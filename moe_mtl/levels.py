"""Levels: gate and experts for models of one vector per sample, where several streams mix the same expert outputs.

A stream is what flows to one task, or what tasks share between levels. Every expert reads one stream and is computed
once; every output stream mixes the outputs of the experts it can see with weights of its own.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from moe_mtl.expert_stack import ExpertStack
from moe_mtl.gates import Gate, create_gate, resolve_k
from moe_mtl.gates.sigmoid import SigmoidGate
from moe_mtl.routing import Routing


class Level(nn.Module):
    """Experts and the gate that mixes their outputs, once per output stream.

    Args:
        gate: its "tasks" are the output streams, in the order of `streams`.
        experts: as many as the gate has.
        streams: ids of the output streams; 0, 1, ... when None.
        sources: the input stream each expert reads, by expert; None where there is one input.
        own: a second gate over the same streams and experts, whose weights are added: HoME's self-gate, AdaTT's
            residual path, which see a stream's own experts alone.

    Raises:
        ValueError: a gate and the experts disagree on their number, or the gate and `streams` on theirs; or the gate
            needs samples of several tokens.
    """

    def __init__(
        self,
        gate: Gate,
        experts: ExpertStack,
        *,
        streams: Sequence[int] | None = None,
        sources: Sequence[int] | None = None,
        own: Gate | None = None,
    ):
        super().__init__()
        if gate.per_sample:
            raise ValueError(
                f"gate: {type(gate).__name__} mixes the tokens of a sample, and here a sample is one vector; choose "
                "another gate, or a model with tokens"
            )
        self.streams = tuple(range(gate.num_tasks)) if streams is None else tuple(streams)
        for each in (gate, own):
            if each is not None and each.num_experts != experts.num_experts:
                raise ValueError(
                    f"num_experts: a gate has {each.num_experts}, the stack {experts.num_experts}; build both with one "
                    "value"
                )
            if each is not None and each.num_tasks != len(self.streams):
                raise ValueError(f"streams: got {len(self.streams)}, a gate serves {each.num_tasks}")
        if sources is not None and len(sources) != experts.num_experts:
            raise ValueError(f"sources: got {len(sources)}, expected one for each of {experts.num_experts} experts")
        self.gate, self.experts, self.own = gate, experts, own
        self.sources = None if sources is None else tuple(sources)

    def forward(
        self, x: Tensor, streams: Sequence[int], inputs: Sequence[int] | None = None, read: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """Output streams.

        Args:
            x: one vector per sample that everything reads, [b, d], or input streams [s, b, d].
            streams: ids of the output streams asked for.
            inputs: ids of the input streams in `x`, in order: those that the experts needed read and, without `read`,
                those of `streams`.
            read: what the gate of each stream asked for reads, [s, b, d], instead of the input stream of its id.

        Returns:
            [s, b, h], one per stream asked for; and their routing, in blocks of b rows.
        """
        needed, held = self.needed(streams), self.kept_experts
        rows = None if needed == held else [held.index(e) for e in needed]
        if x.ndim == 2:
            z = self.experts(x, rows)
        else:
            place = {stream: i for i, stream in enumerate(inputs if inputs is not None else range(len(x)))}
            sources = self.sources if self.sources is not None else [0] * self.gate.num_experts
            z = self.experts(x[[place[sources[e]] for e in needed]], rows)
            if read is None:
                mine = [place[s] for s in streams]
                read = x if mine == list(range(len(x))) else x[mine]
        positions = tuple(self.streams.index(s) for s in streams)

        def route(gate: Gate) -> Routing:
            if read is None:
                return gate.each(x, positions)
            # the strides of a flattened tensor would fix the batch of an exported model; a copy is slower
            rows = torch.cat(list(read)) if torch.compiler.is_exporting() else read.flatten(0, 1)
            return gate(rows, positions)

        routing = route(self.gate)
        weights = self._columns(routing, needed)
        if self.own is not None:
            weights = weights + self._columns(route(self.own), needed)
        shares = weights.unflatten(0, (len(positions), -1)).transpose(0, 1).to(z.dtype)  # [b, s, e]
        return torch.bmm(shares, z).transpose(0, 1), routing

    @staticmethod
    def _columns(routing: Routing, needed: Sequence[int]) -> Tensor:
        weights = routing.dense_weights()
        return weights if len(needed) == weights.shape[1] else weights[:, list(needed)]

    def needed(self, streams: Sequence[int] | None = None) -> list[int]:
        """Ids, ascending, of the held experts that these output streams, or all, can ever use."""
        held, gates = self.kept_experts, [gate for gate in (self.gate, self.own) if gate is not None]
        every: set[int] = set()
        for stream in self.streams if streams is None else streams:
            for gate in gates:
                reached = gate.reachable(self.streams.index(stream))
                if reached is None:
                    return held
                every.update(reached)
        return [e for e in held if e in every]

    def read_by(self, streams: Sequence[int]) -> list[int]:
        """The input streams, ascending, that these output streams need: their own and their experts'."""
        sources = () if self.sources is None else (self.sources[e] for e in self.needed(streams))
        return sorted({*streams, *sources})

    def check_like(self, streams: Sequence[int]) -> None:
        """Refuses what `add_stream` cannot start from; see `moe_mtl.gates.Gate.check_like`."""
        for gate in (self.gate, self.own):
            if gate is not None:
                gate.check_like([self.streams.index(s) for s in streams])

    def add_stream(self, stream: int, like: Sequence[int] = ()) -> None:
        """Adds, in place, an output stream that mixes the experts there are.

        Args:
            stream: its id, a new one.
            like: ids of streams; its gate starts as the mean of theirs, fresh when empty.
        """
        for gate in (self.gate, self.own):
            if gate is not None:
                gate.add_task([self.streams.index(s) for s in like])
        self.streams = (*self.streams, stream)

    def own_parameters(self, stream: int) -> list[nn.Parameter]:
        """The parameters of the gates that serve one output stream alone."""
        return [
            dict(gate.named_parameters())[name]
            for gate in (self.gate, self.own)
            if gate is not None
            for name in gate.own_parameters(self.streams.index(stream))
        ]

    def for_streams(self, streams: Sequence[int]) -> Self:
        """A copy with the gates of these output streams alone. Experts stay, whether these streams see them or not."""
        positions = [self.streams.index(s) for s in streams]
        gates = [gate for gate in (self.gate, self.own) if gate is not None]
        level: Self = copy.deepcopy(self, {id(gate): gate.for_tasks(positions) for gate in gates})
        level.streams = tuple(streams)
        return level

    @property
    def kept_experts(self) -> list[int]:
        """Ids of the experts the level holds, ascending: all of 0..e-1, unless some were dropped."""
        return list(range(self.gate.num_experts) if self.gate.kept_ids is None else self.gate.kept_ids)

    def give_experts(self, place: int, ids: Sequence[int]) -> None:
        """Gives the output stream at a place, in place, copies of some experts; as `Gate.give_experts`."""
        held = self.kept_experts
        self.experts.copy_experts([held.index(e) for e in ids])
        self.gate.give_experts(place, ids)
        if self.sources is not None:
            self.sources = (*self.sources, *(self.sources[e] for e in ids))

    def keep_experts(self, ids: Sequence[int]) -> None:
        """Drops, in place, every expert but these; as `moe_mtl.layers.MoE.keep_experts`.

        Raises:
            ValueError: `ids` is empty, names an expert twice, or one that the level does not hold.
        """
        held, ids = self.kept_experts, sorted(ids)
        if not ids or len(set(ids)) < len(ids) or not set(ids) <= set(held):
            raise ValueError(f"ids: got {ids}, expected different experts of {held}, at least one")
        self.experts.keep_experts([held.index(e) for e in ids])
        for gate in (self.gate, self.own):
            if gate is not None:
                gate.keep_experts(torch.tensor(ids, device=self.experts.weight[0].device))

    def spec(self) -> dict[str, Any]:
        """What a layout says of this level, as plain data; see `build_trunk`."""
        return {
            "experts": self.gate.num_experts,
            "streams": list(self.streams),
            "sources": None if self.sources is None else list(self.sources),
            "gate": self.gate.task_options(),
            "own": None if self.own is None else {"kind": self._own_kind(), **self.own.task_options()},
        }

    def _own_kind(self) -> str:
        return "sigmoid" if isinstance(self.own, SigmoidGate) else "softmax"


class Trunk(nn.Module):
    """Levels one after another, from one vector per sample to one per task and sample.

    Only the streams and experts that lead to the tasks asked for are computed.

    Args:
        levels: the first reads one input; the others read the output streams of the level before under their ids.
        outputs: the stream of the last level that each task reads, by task.
    """

    def __init__(self, levels: Sequence[Level], outputs: Sequence[int]):
        super().__init__()
        self.levels, self.outputs = nn.ModuleList(levels), tuple(outputs)

    @property
    def out_dim(self) -> int:
        """Width of a task's vector."""
        last: Any = self.levels[-1]
        return last.experts.out_dim

    @property
    def moe_layers(self) -> dict[str, Level]:
        """The levels, by the key of their `Routing`."""
        return {f"level.{i}": level for i, level in enumerate(self._levels())}

    def _levels(self) -> list[Level]:
        return list(self.levels)  # type: ignore[arg-type]

    def plan(self, tasks: Sequence[int]) -> list[list[int]]:
        """The streams that each level must compute for these tasks."""
        plan = [sorted({self.outputs[i] for i in tasks})]
        for level in self._levels()[:0:-1]:
            plan.insert(0, level.read_by(plan[0]))
        return plan

    def forward(self, x: Tensor, tasks: Sequence[int]) -> tuple[Tensor, dict[str, Routing]]:
        """Vectors [t, b, h] of these tasks from vectors [b, d], and the routing of every level.

        A routing's `task` names, per block of rows, the task whose vector the stream is; streams that no task reads
        have numbers from the number of tasks on.
        """
        routings, inputs = {}, None
        task_of = {stream: i for i, stream in reversed(list(enumerate(self.outputs)))}
        for (name, level), streams in zip(self.moe_layers.items(), self.plan(tasks), strict=True):
            x, routing = level(x, streams, inputs)
            shown = tuple(task_of.get(s, len(self.outputs) + s) for s in streams)
            routings[name], inputs = replace(routing, task=shown), streams
        assert inputs is not None
        last = [inputs.index(self.outputs[i]) for i in tasks]
        return x if last == list(range(len(x))) else x[last], routings

    def for_tasks(self, tasks: Sequence[int]) -> Self:
        """A copy for these tasks alone, in this order: the gates of the streams they need, and all experts."""
        levels = [level.for_streams(s) for level, s in zip(self._levels(), self.plan(tasks), strict=True)]
        return type(self)(levels, [self.outputs[i] for i in tasks]).train(self.training)

    def check_like(self, like: Sequence[int]) -> None:
        """Refuses what `add_task` cannot start from.

        Raises:
            ValueError: as `moe_mtl.gates.Gate.check_like` has it.
        """
        for level in self._levels():
            level.check_like([self.outputs[i] for i in like])

    def add_task(self, like: Sequence[int] = ()) -> None:
        """Serves, in place, one more task by a stream of its own through all levels, which mixes the experts there are.

        Args:
            like: ids of tasks; its gates start as the mean of theirs, fresh when empty.
        """
        stream = 1 + max(s for level in self._levels() for s in level.streams)
        for level in self._levels():
            level.add_stream(stream, [self.outputs[i] for i in like])
        self.outputs = (*self.outputs, stream)

    def own_parameters(self, task: int) -> list[nn.Parameter]:
        """The parameters that serve one task alone: its stream's entries of the gates."""
        stream = self.outputs[task]
        if self.outputs.count(stream) > 1:
            return []
        return [p for level in self._levels() if stream in level.streams for p in level.own_parameters(stream)]

    def layout(self) -> dict[str, Any]:
        """What `build_trunk` builds this trunk from, as plain data."""
        return {"outputs": list(self.outputs), "levels": [level.spec() for level in self._levels()]}


def build_trunk(
    layout: Mapping[str, Any],
    dim: int,
    widths: Sequence[int],
    *,
    gate: str = "softmax",
    k: int | None = None,
    gate_args: Mapping[str, Any] | None = None,
    expert_args: Mapping[str, Any] | None = None,
) -> Trunk:
    """A trunk from its layout.

    Args:
        layout: "outputs", the stream each task reads, and "levels", a list of dicts: "experts", how many; "streams",
            ids of the output streams; and, where they are not None or missing, "sources", the input stream of each
            expert; "gate", further options of the gate such as `visible`; "own", options of a gate whose weights
            are added, see `self_gate`.
        dim: width of the input.
        widths: of the experts' layers.
        gate: a name in `moe_mtl.gates.GATES`.
        k: experts per stream; None for all where the gate is dense, else 4.
        gate_args: options of the gate, at every level.
        expert_args: options of `ExpertStack`.
    """
    levels = []
    for spec in layout["levels"]:
        experts, streams = spec["experts"], len(spec["streams"])
        options = {**(gate_args or {}), **(spec.get("gate") or {})}
        levels.append(
            Level(
                create_gate(gate, dim, experts, streams, resolve_k(gate, experts, k), **options),
                ExpertStack(experts, dim, widths, **(expert_args or {})),
                streams=spec["streams"],
                sources=spec.get("sources"),
                own=self_gate(dim, experts, spec.get("own")),
            )
        )
        dim = widths[-1]
    return Trunk(levels, layout["outputs"])


def self_gate(dim: int, experts: int, options: Mapping[str, Any] | None) -> Gate | None:
    """The gate of the path that adds a stream's own experts, which `options["visible"]` names; None without options.

    A softmax over them, or a sigmoid of each where a stream has a single one, whose softmax would be the constant 1;
    `options["kind"]` says which where streams that decided it may be gone.
    """
    if options is None:
        return None
    single = any(len(row) == 1 for row in options["visible"])
    kind = options.get("kind", "sigmoid" if single else "softmax")
    return create_gate(kind, dim, experts, len(options["visible"]), visible=options["visible"])
