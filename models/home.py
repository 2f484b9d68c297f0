"""HoME: two levels of normalised experts in a hierarchy of task categories, with feature gates and self-gates.

Paper: Wang et al. 2024, HoME, https://arxiv.org/abs/2408.05430 (expert normalisation with Swish, hierarchy mask,
    feature gates, self-gates).
Differs: one low-rank map per feature gate, where several may be mixed; its second factor starts at zero, so that the
    gate starts as the identity. Numbers of experts and widths are those of public re-implementations, not the paper's.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_mtl.expert_stack import ExpertStack
from moe_mtl.gates import create_gate
from moe_mtl.levels import Level, self_gate
from moe_mtl.registry import configure, register_model
from moe_mtl.routing import Routing
from moe_mtl.tasks import Task, nearest
from moe_mtl.towers import Towers
from moe_mtl.vector import ExpertsConfig, VectorModel, table_encoder


@dataclass(frozen=True, kw_only=True)
class HoMEConfig(ExpertsConfig):
    """A HoME.

    Attributes:
        categories: names of the tasks of every category; None for one category of all tasks.
        shared: level 1, experts of all categories.
        category: experts of every category, at both levels.
        common: level 2, experts of all tasks.
        private: level 2, experts of every task.
        ranks: of the feature gates of level 1 and level 2.
        norm: "batch" as in the paper; "layer" does not depend on the batch.
    """

    categories: Sequence[Sequence[str]] | None = None
    shared: int = 4
    category: int = 2
    common: int = 2
    private: int = 1
    ranks: Sequence[int] = (64, 16)
    activation: str = "silu"
    norm: str = "batch"

    def __post_init__(self):
        for name in ("shared", "category", "common", "private"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1 expert")
        if len(self.ranks) != 2 or min(self.ranks) < 1:
            raise ValueError(f"ranks: got {list(self.ranks)}, expected one of at least 1 for each of the two levels")


class FeatureGates(nn.Module):
    """x * 2 sigma(x A_g B_g), one low-rank gate per group, all groups in one product; the identity to begin with.

    Args:
        groups: gates g.
        dim: width d of the features.
        rank: of the maps.
    """

    def __init__(self, groups: int, dim: int, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.empty(groups, rank, dim).uniform_(-1, 1) * dim**-0.5)
        self.up = nn.Parameter(torch.zeros(groups, dim, rank))

    def forward(self, x: Tensor, groups: Sequence[int] | None = None) -> Tensor:
        """Gated features [g, b, d] of one input [b, d] for all gates, or of one [g, b, d] for each of some gates."""
        every = groups is None or list(groups) == list(range(len(self.down)))
        down, up = (p if every else p[list(groups or ())] for p in (self.down, self.up))
        if x.ndim == 2:
            low = F.linear(x, down.flatten(0, 1)).unflatten(1, down.shape[:2]).transpose(0, 1)
        else:
            low = torch.bmm(x, down.mT)
        return x * (2 * torch.bmm(low, up.mT).sigmoid())

    def for_groups(self, groups: Sequence[int]) -> Self:
        """A copy with these gates alone."""
        small = copy.copy(self)
        small._parameters = {name: nn.Parameter(p.detach()[list(groups)]) for name, p in self._parameters.items()}  # type: ignore[union-attr]
        return small


class Hierarchy(nn.Module):
    """The trunk of HoME: a level of category streams and a shared one, then a level of task streams.

    Args:
        first: its streams are the categories 0..c-1 and the shared one, c.
        second: its streams are the tasks; experts read the groups of `gates[1]`.
        gates: feature gates of both levels. Level 1 has one per category and one, the last, for shared experts; level 2
            those of `groups`.
        category_of: the category of each task, by task.
        outputs: the stream of the second level that each task reads.
        groups: ids of the groups of level 2: 0 common, 1..c categories, then tasks.
        reads: for every id of a group, the stream of level 1 it reads.
    """

    def __init__(
        self,
        first: Level,
        second: Level,
        gates: Sequence[FeatureGates],
        *,
        category_of: Sequence[int],
        outputs: Sequence[int],
        groups: Sequence[int],
        reads: Sequence[int],
    ):
        super().__init__()
        self.first, self.second, self.gates = first, second, nn.ModuleList(gates)
        self.category_of, self.outputs = tuple(category_of), tuple(outputs)
        self.groups, self.reads = tuple(groups), tuple(reads)
        self.shared = max(reads)

    @property
    def moe_layers(self) -> dict[str, Level]:
        """Both levels, by the key of their `Routing`."""
        return {"level.0": self.first, "level.1": self.second}

    @property
    def stream_tasks(self) -> dict[int, tuple[int, ...]]:
        """The tasks of every category, by the number of its stream in the routing of the first level."""
        count = len(self.outputs)
        return {
            count + c: tuple(i for i, category in enumerate(self.category_of) if category == c)
            for c in set(self.category_of)
        }

    def _groups(self, streams: Sequence[int]) -> list[int]:
        """The groups of level 2 that these task streams need."""
        assert self.second.sources is not None
        return sorted({self.second.sources[e] for e in self.second.needed(streams)})

    def forward(self, x: Tensor, tasks: Sequence[int]) -> tuple[Tensor, dict[str, Routing]]:
        """Vectors [t, b, h] of these tasks from vectors [b, d], and the routing of both levels."""
        streams = [self.outputs[i] for i in tasks]
        groups, wanted = self._groups(streams), sorted({self.category_of[i] for i in tasks})
        held = [*wanted, self.shared]
        z, category_routing = self.first(self.gates[0](x), held, range(self.shared + 1))
        place = {stream: i for i, stream in enumerate(held)}
        gated = self.gates[1](z[[place[self.reads[g]] for g in groups]], [self.groups.index(g) for g in groups])
        own = z[[place[self.category_of[i]] for i in tasks]]
        read = torch.cat([own, z[-1:].expand_as(own)], dim=-1)
        y, task_routing = self.second(gated, streams, groups, read)
        number = len(self.outputs)  # categories are no tasks: numbers from there on
        shown = replace_task(category_routing, [number + c for c in held])
        return y, {"level.0": shown, "level.1": replace_task(task_routing, list(tasks))}

    def check_like(self, like: Sequence[int]) -> None:
        """Refuses what `add_task` cannot start from.

        Raises:
            ValueError: no task is named, or tasks of several categories; or as `moe_mtl.gates.Gate.check_like` has it.
        """
        found = {self.category_of[i] for i in like}
        if len(found) != 1:
            raise ValueError(
                f"init_from: got tasks of {len(found)} categories; a new task joins one, and sees the experts of tasks "
                "in it: name one task or several of one category"
            )
        self.second.check_like([self.outputs[i] for i in like])

    def add_task(self, like: Sequence[int] = ()) -> None:
        """Serves, in place, one more task: a stream of level 2 in the category of these tasks, over their experts."""
        stream = 1 + max(self.second.streams)
        self.second.add_stream(stream, [self.outputs[i] for i in like])
        self.outputs = (*self.outputs, stream)
        self.category_of = (*self.category_of, self.category_of[like[0]])

    def own_parameters(self, task: int) -> list[nn.Parameter]:
        """The parameters that serve one task alone: its stream's entries of the gates of level 2."""
        return self.second.own_parameters(self.outputs[task])

    def for_tasks(self, tasks: Sequence[int]) -> Self:
        """A copy for these tasks alone: their category streams, gates and feature gates, and all experts."""
        streams = [self.outputs[i] for i in tasks]
        held = [*sorted({self.category_of[i] for i in tasks}), self.shared]
        groups = self._groups(streams)
        small = type(self)(
            self.first.for_streams(held),
            self.second.for_streams(streams),
            [copy.deepcopy(self.gates[0]), self.gates[1].for_groups([self.groups.index(g) for g in groups])],  # type: ignore[operator]
            category_of=[self.category_of[i] for i in tasks],
            outputs=streams,
            groups=groups,
            reads=self.reads,
        )
        return small.train(self.training)

    def layout(self) -> dict[str, Any]:
        """What `make_trunk` builds this trunk from, as plain data."""
        parts = {name: list(getattr(self, name)) for name in ("category_of", "outputs", "groups", "reads")}
        return {**parts, "levels": [self.first.spec(), self.second.spec()]}


def replace_task(routing: Routing, task: Sequence[int]) -> Routing:
    """The same routing with other numbers for its blocks."""
    return replace(routing, task=tuple(task))


def make_layout(tasks: Sequence[Task], config: HoMEConfig) -> dict[str, Any]:
    """Streams, groups and experts of both levels.

    Raises:
        ValueError: `categories` does not name every task once.
    """
    names = [task.name for task in tasks]
    categories = [names] if config.categories is None else [list(row) for row in config.categories]
    given = [name for row in categories for name in row]
    for name in given:
        if name not in names:
            raise ValueError(f"categories: unknown task {name!r}; {nearest(name, names)}")
    if sorted(given) != sorted(names) or not all(categories):
        raise ValueError(f"categories: got {categories}, expected every task of {names} once, no category empty")
    count = len(categories)
    category_of = [next(c for c, row in enumerate(categories) if name in row) for name in names]

    def ids(sizes: Sequence[int]) -> list[list[int]]:
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]

    *by_category, shared = ids([config.category] * count + [config.shared])
    everything = [e for row in (*by_category, shared) for e in row]
    first = {
        "experts": len(everything),
        "streams": list(range(count + 1)),
        "sources": [c for c in range(count) for _ in range(config.category)] + [count] * config.shared,
        "gate": {"visible": [*([*row, *shared] for row in by_category), everything]},
        "own": {"visible": [*by_category, shared]},
    }
    sizes = [config.common] + [config.category] * count + [config.private] * len(names)
    common, *rest = ids(sizes)
    by_category, by_task = rest[:count], rest[count:]
    second = {
        "experts": sum(sizes),
        "streams": list(range(len(names))),
        "sources": [g for g, size in enumerate(sizes) for _ in range(size)],
        "gate": {"visible": [[*common, *by_category[c], *mine] for c, mine in zip(category_of, by_task, strict=True)]},
        "own": {"visible": by_task},
    }
    return {
        "category_of": category_of,
        "outputs": list(range(len(names))),
        "groups": list(range(len(sizes))),
        "reads": [count, *range(count), *category_of],
        "levels": [first, second],
    }


def make_trunk(layout: Mapping[str, Any], dim: int, config: HoMEConfig) -> Hierarchy:
    """A trunk from its layout, with fresh weights, for inputs of width `dim`."""
    how = {"activation": config.activation, "norm": config.norm, "dropout": config.dropout}
    levels, width = [], config.widths[-1]
    for spec, read, reads in zip(layout["levels"], (dim, 2 * width), (dim, width), strict=True):
        experts, options = spec["experts"], {**config.gate_args, **spec["gate"]}
        levels.append(
            Level(
                create_gate("softmax", read, experts, len(spec["streams"]), **options),
                ExpertStack(experts, reads, config.widths, **how),  # type: ignore[arg-type]
                streams=spec["streams"],
                sources=spec["sources"],
                own=self_gate(read, experts, spec["own"]),
            )
        )
    groups = max(layout["reads"]) + 1
    gates = [FeatureGates(groups, dim, config.ranks[0]), FeatureGates(len(layout["groups"]), width, config.ranks[1])]
    first, second = levels
    names = ("category_of", "outputs", "groups", "reads")
    return Hierarchy(first, second, gates, **{name: layout[name] for name in names})


@register_model(modality="table")
def home_table(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """HoME on a table: 4 shared experts and 2 per category, then 2 common, 2 per category and 1 per task."""
    config = configure(HoMEConfig, {}, overrides)
    encoder = table_encoder(config)
    trunk = make_trunk(config.layout or make_layout(tasks, config), encoder.dim, config)
    towers = Towers(tasks, trunk.second.experts.out_dim, config.tower, config.dropout)
    model: Any = VectorModel(tasks, encoder, trunk, towers)
    model.options = asdict(config)  # what `create_model` records
    return model
