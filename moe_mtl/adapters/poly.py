"""Polytropon and multi-head routing: tasks mix an inventory of low-rank adapters.

Paper: Ponti et al. 2023, Combining Parameter-efficient Modules for Task-level Generalisation (Polytropon),
    https://arxiv.org/abs/2202.13914; Caccia et al. 2023, Multi-Head Adapter Routing for Cross-Task Generalization,
    https://arxiv.org/abs/2211.03831, in the layers of peft.
Differs: what peft does is kept: a relaxed Bernoulli of temperature 1 in training, drawn per sample, and the sigmoid of
    the logits in evaluation, in both cases divided by the sum over skills; what an adapter adds is scaled by 1 / r, and
    there is no alpha; no prior on the allocation. The logits of each task are a parameter of their own, where peft has
    one matrix for all: training those of one task leaves the others bit-equal under weight decay and momentum.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import RelaxedBernoulli

from moe_mtl.adapters._method import ADAPTER, AdapterContext, AdapterMethod, PerTask
from moe_mtl.adapters.lora import check_rank

EPSILON = 1e-12  # peft's
SPREAD = 1e-3  # of the first logits, as in peft


class Poly(AdapterMethod):
    """y = W x + (1 / r) B A x, A and B being the task's mixtures of s skills, per block of features.

    Features are split into h blocks, inputs of A and outputs of B alike. Block j of task t mixes its part of the skills
    with weights w[t, j, s] that sum to one over s; h = 1 is Polytropon.

    Args:
        rank: r of each skill.
        skills: s, adapters in the inventory of a map.
        heads: h, blocks of features with routing of their own.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, rank: int = 4, skills: int = 4, heads: int = 1):
        check_rank(rank, 1.0, 0.0)
        for name, value in (("skills", skills), ("heads", heads)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected an integer of at least 1")
        self.rank, self.skills, self.heads = rank, skills, heads

    def check(self, maps: Mapping[str, nn.Linear]) -> None:
        """Refuses maps whose features do not split into h blocks.

        Raises:
            ValueError: names the first.
        """
        for name, layer in maps.items():
            for width in (layer.in_features, layer.out_features):
                if width % self.heads:
                    raise ValueError(
                        f"heads: {self.heads} blocks do not divide the {width} features of {name}; take a divisor of it"
                    )

    def inject(self, encoder: nn.Module, maps: Sequence[str], tasks: Sequence[str], context: AdapterContext) -> None:
        """peft's Poly layers, with routing logits per task."""
        from peft import PolyConfig, inject_adapter_in_model  # seconds to import

        sizes: dict[str, Any] = {"n_tasks": len(tasks), "n_skills": self.skills, "n_splits": self.heads}
        inject_adapter_in_model(PolyConfig(r=self.rank, target_modules=list(maps), **sizes), encoder, ADAPTER)
        for name in maps:
            layer: Any = encoder.get_submodule(name)
            like = layer.poly_lora_A[ADAPTER]
            layer.poly_router[ADAPTER] = TaskRouter(tasks, self.heads, self.skills).to(like.device)
            layer.register_forward_pre_hook(GiveTaskIds(context), with_kwargs=True)

    def trained(self, layer: Any) -> Iterable[nn.Parameter]:
        """All skills and logits."""
        return layer.poly_lora_A[ADAPTER], layer.poly_lora_B[ADAPTER], *layer.poly_router[ADAPTER].parameters()

    def own(self, layer: Any, task: str) -> Iterable[nn.Parameter]:
        """The routing logits of a task."""
        return (layer.poly_router[ADAPTER].logits(task),)

    def delta(self, layer: Any, task: str) -> Tensor:
        """(1 / r) (A B)^T [out, in] of the task's mixture, without noise."""
        weights = layer.poly_router[ADAPTER].weights(task)
        a = torch.einsum("hs,hsdr->hdr", weights, layer.poly_lora_A[ADAPTER])
        b = torch.einsum("hs,hsrd->hrd", weights, layer.poly_lora_B[ADAPTER])
        a, b = join_blocks(a, b)
        return (a @ b).mT / self.rank

    def mean(self, layer: Any) -> tuple[Tensor, Tensor]:
        """The mean of all skills, A [d, r] and B [r, d_out]."""
        return join_blocks(layer.poly_lora_A[ADAPTER].mean(dim=1), layer.poly_lora_B[ADAPTER].mean(dim=1))

    def keep_tasks(self, layer: Any, tasks: Sequence[str]) -> None:
        """Keeps the logits of these tasks; skills stay, any task may use them all."""
        layer.poly_router[ADAPTER].keep_tasks(tasks)
        layer.n_tasks[ADAPTER] = len(tasks)

    def add_task(self, layer: Any, task: str, like: Sequence[str]) -> None:
        """Adds logits: the mean of those of `like`, or fresh ones. No others change."""
        layer.poly_router[ADAPTER].add_task(task, like)
        layer.n_tasks[ADAPTER] += 1

    def rename_task(self, layer: Any, old: str, new: str) -> None:
        """Renames the logits of a task."""
        layer.poly_router[ADAPTER].rename_task(old, new)


class TaskRouter(PerTask):
    """Routing logits z_<task> [h s] of each task, in the place of peft's router, which has one matrix for all.

    Args:
        tasks: names, in the order of their ids.
        heads: h.
        skills: s.
    """

    parts = ("z",)

    def __init__(self, tasks: Sequence[str], heads: int, skills: int):
        super().__init__()
        self.heads, self.skills = heads, skills
        for task in tasks:
            self.add_task(task)

    def fresh(self) -> Iterable[Tensor]:
        """Logits near zero."""
        start = torch.empty(self.heads * self.skills).uniform_(-SPREAD, SPREAD)
        return [start.to(next(self.parameters(), start))]

    def logits(self, task: str) -> nn.Parameter:
        """The logits of a task, [h s]."""
        return self.own(task)[0]

    def weights(self, task: str) -> Tensor:
        """The weights of a task in evaluation, [h, s]; they sum to one over s."""
        return self._normalised(self.logits(task).sigmoid().unflatten(0, (self.heads, self.skills)))

    def forward(self, task_ids: Tensor, input_ids: Tensor) -> Tensor:
        """Weights per sample.

        Args:
            task_ids: int64 [b].
            input_ids: what the map is given; not read.

        Returns:
            [b, h, s], which sum to one over s; random in training.
        """
        present, where = task_ids.unique(return_inverse=True)
        logits = self.stacked("z", present.tolist(), where).unflatten(1, (self.heads, self.skills))
        if self.training:
            return self._normalised(RelaxedBernoulli(torch.ones_like(logits), logits=logits).rsample())
        return self._normalised(logits.sigmoid())

    @staticmethod
    def _normalised(gates: Tensor) -> Tensor:
        return gates / (gates.sum(dim=-1, keepdim=True) + EPSILON)


class GiveTaskIds:
    """Forward pre-hook of a Poly layer: the task of each of its rows, as peft's keyword argument.

    An object rather than a closure, so that a copy of the model hooks its own context.
    """

    def __init__(self, context: AdapterContext):
        self.context = context

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The layer's arguments with ids."""
        return args, {**kwargs, "task_ids": self.context.task_rows(args[0].shape[0], args[0].device)}


def join_blocks(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A [h, d / h, r] and B [h, r, d_out / h] as [d, r] and [r, d_out]."""
    return a.flatten(0, 1), b.transpose(0, 1).flatten(1, 2)
