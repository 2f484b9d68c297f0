"""ScaLearn: an adapter per source task, then learned scales of what these frozen adapters add, per target task.

Paper: Frohmann et al. 2024, ScaLearn: Simple and Highly Parameter-Efficient Task Transfer by Learning to Scale,
    https://arxiv.org/abs/2310.01217 (ScaLearn and ScaLearnUniform). How scales start, their dropout and the sum without
    a softmax are those of the authors' code, CPJKU/ScaLearn.
Differs: low-rank adapters beside linear maps rather than a bottleneck after each layer, so the scales are per adapted
    map; no variants that share scales over layers (ScaLearn++); the sources can be trained together, on one encoder.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_mtl.adapters._method import AdapterContext, AdapterMethod, PerTask
from moe_mtl.adapters.lora import check_rank

TOTAL, SPREAD = 2.0, 0.001  # scales of s sources start around TOTAL / s


class ScaLearn(AdapterMethod):
    """First y = W x + (alpha / r) B_t A_t x with adapters per task, then W x + sum_s omega_ts * (alpha / r) B_s A_s x.

    Args:
        rank: r.
        alpha: scale of what an adapter adds, times r.
        dropout: of the adapters' input, while these are trained.
        sources: names of the tasks whose adapters are scaled; None while each task trains its own.
        uniform: one scale per map and source (ScaLearnUniform) rather than one per output feature.
        scale_dropout: of the scales, in training.

    Raises:
        ValueError: a number out of range, or no source.
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 32.0,
        dropout: float = 0.0,
        sources: Sequence[str] | None = None,
        uniform: bool = False,
        scale_dropout: float = 0.0,
    ):
        check_rank(rank, alpha, dropout)
        if not 0 <= scale_dropout < 1:
            raise ValueError(f"scale_dropout: got {scale_dropout}, expected from 0 to below 1")
        if sources is not None and (not sources or len(set(sources)) < len(sources)):
            raise ValueError(f"sources: got {list(sources)}, expected different names of tasks, at least one")
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.sources, self.uniform, self.scale_dropout = sources, uniform, scale_dropout

    def inject(self, encoder: nn.Module, maps: Sequence[str], tasks: Sequence[str], context: AdapterContext) -> None:
        """A `SourceAdapters`, or a `ScaledAdapters`, in the place of each map."""
        for name in maps:
            parent, _, leaf = name.rpartition(".")
            base: Any = encoder.get_submodule(name)
            layer: nn.Module
            if self.sources is None:
                layer = SourceAdapters(base, tasks, self.rank, self.alpha / self.rank, self.dropout, context)
            else:
                how = (self.uniform, self.scale_dropout)
                layer = ScaledAdapters(base, self.sources, self.rank, self.alpha / self.rank, context, tasks, *how)
            setattr(encoder.get_submodule(parent), leaf, layer)

    def trained(self, layer: Any) -> Iterable[nn.Parameter]:
        """The adapters, then the scales."""
        return [p for task in layer.tasks for p in layer.own(task)]

    def own(self, layer: Any, task: str) -> Iterable[nn.Parameter]:
        """The adapter of a task, then its scales."""
        return layer.own(task)

    def delta(self, layer: Any, task: str) -> Tensor:
        """What the adapters add for a task, without dropout, [out, in]."""
        return layer.delta(task)

    def keep_tasks(self, layer: Any, tasks: Sequence[str]) -> None:
        """Keeps the adapters, or the scales, of these tasks; all sources stay while they are scaled."""
        layer.keep_tasks(tasks)

    def add_task(self, layer: Any, task: str, like: Sequence[str]) -> None:
        """Adds an adapter, or scales: the mean of those of `like`, or fresh ones."""
        layer.add_task(task, like)

    def rename_task(self, layer: Any, old: str, new: str) -> None:
        """Renames the adapter, or the scales, of a task; sources that are scaled keep their names."""
        layer.rename_task(old, new)


class _Adapted(PerTask):
    """A frozen linear map in a new layer; T5 reads the `weight` of its maps."""

    base_layer: nn.Linear

    @property
    def weight(self) -> Tensor:
        """The map's own."""
        return self.base_layer.weight


class SourceAdapters(_Adapted):
    """A frozen linear map with a low-rank adapter per task: a_<task> [r, d] and b_<task> [d_out, r].

    Args:
        base_layer: the map.
        tasks: names, in the order of their ids.
        rank: r.
        scale: of what an adapter adds.
        dropout: of the adapters' input, in training.
        context: of the wrapping model.
    """

    parts = ("a", "b")

    def __init__(
        self,
        base_layer: nn.Linear,
        tasks: Sequence[str],
        rank: int,
        scale: float,
        dropout: float,
        context: AdapterContext,
    ):
        super().__init__()
        self.base_layer, self.context = base_layer, context
        self.rank, self.scale, self.dropout = rank, scale, dropout
        for task in tasks:
            self.add_task(task)

    def fresh(self) -> Iterable[Tensor]:
        """An adapter that adds nothing yet."""
        return fresh_adapter(self.base_layer, self.rank)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [b, n, d], or stacked ones, to [b, n, d_out]."""
        ids, where = self.context.groups()
        a, b = (self.stacked(part, ids, where) for part in self.parts)
        groups = _split(F.dropout(x, self.dropout, self.training), len(a))
        return _add(self.base_layer(x), groups @ a.mT @ b.mT * self.scale)

    def delta(self, task: str) -> Tensor:
        """What is added for a task, [out, in]."""
        a, b = self.own(task)
        return b @ a * self.scale


class ScaledAdapters(_Adapted):
    """A frozen linear map and frozen adapters a_<source>, b_<source>, with scales omega_<task> [s, d_out] or [s, 1].

    Args:
        base_layer: the map.
        sources: whose adapters there are.
        rank: r.
        scale: of what an adapter adds, before the learned scales.
        context: of the wrapping model.
        tasks: names of the target tasks, in the order of their ids.
        uniform: one scale per source.
        scale_dropout: of the scales, in training.
    """

    parts = ("omega",)

    def __init__(
        self,
        base_layer: nn.Linear,
        sources: Sequence[str],
        rank: int,
        scale: float,
        context: AdapterContext,
        tasks: Sequence[str],
        uniform: bool,
        scale_dropout: float,
    ):
        super().__init__()
        self.base_layer, self.sources, self.context = base_layer, tuple(sources), context
        self.scale, self.scale_dropout, self.width = scale, scale_dropout, 1 if uniform else base_layer.out_features
        for source in sources:
            for part, value in zip("ab", fresh_adapter(base_layer, rank), strict=True):
                self.register_parameter(f"{part}_{source}", nn.Parameter(value, requires_grad=False))
        for task in tasks:
            self.add_task(task)

    def fresh(self) -> Iterable[Tensor]:
        """Scales around TOTAL / s."""
        start = torch.empty(len(self.sources), self.width).normal_(TOTAL / len(self.sources), SPREAD)
        return [start.to(self.base_layer.weight)]

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [b, n, d], or stacked ones, to [b, n, d_out]."""
        omega = self.stacked("omega", *self.context.groups())
        a, b = self._folded(F.dropout(omega, self.scale_dropout, self.training))
        return _add(self.base_layer(x), F.linear(_split(x, len(b)), a) @ b.mT * self.scale)

    def delta(self, task: str) -> Tensor:
        """What is added for a task, [out, in]."""
        a, b = self._folded(self.own(task)[0].unsqueeze(0))
        return b[0] @ a * self.scale

    def _folded(self, omega: Tensor) -> tuple[Tensor, Tensor]:
        """All A below each other [s r, d], and all B with scales [g, s, d_out] in them beside each other [g, out, s r]:
        the sum over sources is one product.
        """
        a = torch.cat([getattr(self, f"a_{source}") for source in self.sources])
        b = torch.stack([getattr(self, f"b_{source}") for source in self.sources])  # [s, out, r]
        return a, (omega.unsqueeze(-1) * b).transpose(1, 2).flatten(2, 3)


def fresh_adapter(base: nn.Linear, rank: int) -> tuple[Tensor, Tensor]:
    """A [r, d], uniform as that of an `nn.Linear`, and B [d_out, r], zero."""
    start = nn.Linear(base.in_features, rank, bias=False).weight.detach()
    return start.to(base.weight), base.weight.new_zeros(base.out_features, rank)


def _split(x: Tensor, groups: int) -> Tensor:
    """[b, ..., d] to [g, m, d], equal blocks of rows together."""
    return x.reshape(groups, -1, x.shape[-1])


def _add(y: Tensor, extra: Tensor) -> Tensor:
    return y + extra.view(y.shape).to(y.dtype)
