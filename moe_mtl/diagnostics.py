"""Which experts each task of a model uses, and what that says: pure functions of usage summed over many batches.

`ExpertUsage` adds up routings, `diagnose` turns the shares of one layer into numbers that JSON can hold.

Paper: Chen et al. 2023, Mod-Squad, https://arxiv.org/abs/2212.08066 (mutual information of task and expert).
Differs: theirs is a loss (`moe_mtl.regularizers.mutual_information`), from the router's softmax; here it is measured,
    from the weights in use and from the choices made.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from moe_mtl.multitask import evaluating
from moe_mtl.routing import Routing
from moe_mtl.tasks import Task

DEAD = 0.01  # an expert with less than this part of the even share 1/E of the choices
BRIEF = ("mutual_information", "load_entropy", "gate_entropy", "dead_experts")  # what training logs of `diagnose`


# ---- which experts each task uses -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerUsage:
    """How often each task uses each expert of one layer; a task that never passed has a row of NaN.

    Attributes:
        slots: share of a task's selected slots (token, choice) that fell on each expert, rows sum to 1, [t, e]. A gate
            that mixes all experts selects none: there it is `mass`.
        mass: share of a task's gate weight, in absolute value, on each expert, rows sum to 1, [t, e].
        entropy: mean over a task's tokens of the entropy of the router's clean softmax over all experts, in nats, [t].
        weight: mean over a task's tokens of the weight of each expert, in absolute value, [t, e].
        spread: standard deviation of that weight over the task's tokens, [t, e]; 0 for a gate that looks at the task
            alone.
    """

    slots: Tensor
    mass: Tensor
    entropy: Tensor
    weight: Tensor
    spread: Tensor


class ExpertUsage:
    """Accumulates expert usage per layer and task from the routings of many batches.

    Args:
        tasks: the model's tasks; their order is that of the ids in the routings.
        streams: {id: ids of tasks} for ids in the routings from the number of tasks on: tokens that several tasks share
            and that count for each of them. Other ids beyond the tasks are left out.
    """

    def __init__(self, tasks: Sequence[Task], streams: Mapping[int, Sequence[int]] | None = None):
        self.tasks = tuple(task.name for task in tasks)
        self._streams = {stream: list(ids) for stream, ids in (streams or {}).items()}
        # per layer float64 [t, 3 e + 2]: slots, weights, their squares, entropy, tokens
        self._sums: dict[str, Tensor] = {}

    @classmethod
    def of(cls, model: Any) -> Self:
        """For a model's tasks and, where it has some, `stream_tasks`."""
        return cls(model.tasks, getattr(model, "stream_tasks", None))

    def update(self, routings: Mapping[str, Routing]) -> None:
        """Adds the routings of one forward pass, padding left out.

        A layer before the tasks part (its routing has no task) counts for every task. The layers of independent models,
        keyed `task/layer`, count for their task under `layer`.
        """
        for key, routing in routings.items():
            owner, _, layer = key.rpartition("/")
            rows = _per_token(routing)
            if owner in self.tasks:
                member = torch.tensor([[name == owner] for name in self.tasks]).expand(-1, len(rows))
            elif routing.task is None:
                layer, member = key, torch.ones(len(self.tasks), len(rows), dtype=torch.bool)
            else:
                layer, ids = key, routing.task_ids().cpu()
                member = ids == torch.arange(len(self.tasks)).unsqueeze(1)
                for stream, members in self._streams.items():
                    member[members] |= ids == stream
            sums = member.double() @ rows
            self._sums[layer] = self._sums[layer] + sums if layer in self._sums else sums

    def compute(self, tasks: Sequence[str] | None = None) -> dict[str, LayerUsage]:
        """Shares per layer, in the order the layers were first seen; rows of all tasks, or of these, in their order."""
        rows_of = [self.tasks.index(name) for name in tasks or self.tasks]
        found = {}
        for layer, sums in self._sums.items():
            experts = (sums.shape[1] - 2) // 3
            slots, weight, squares, entropy, tokens = sums[rows_of].split((experts, experts, experts, 1, 1), dim=1)
            mean = weight / tokens
            found[layer] = LayerUsage(
                slots=slots / slots.sum(-1, keepdim=True),
                mass=weight / weight.sum(-1, keepdim=True),
                entropy=(entropy / tokens).squeeze(1),
                weight=mean,
                spread=(squares / tokens - mean.square()).clamp(min=0).sqrt(),
            )
        return found


def _per_token(routing: Routing) -> Tensor:
    """What every token adds to the sums of its task, float64 [m, 3 e + 2] on the CPU; zero for padding."""
    weights = routing.dense_weights().detach().cpu().double().abs()
    if routing.indices is None:
        slots = weights
    else:
        indices = routing.indices.cpu()
        ones = torch.ones(indices.shape, dtype=torch.float64)
        slots = torch.zeros_like(weights).scatter_add(-1, indices, ones)
    entropy = torch.special.entr(routing.probs().detach()).sum(-1, keepdim=True).cpu().double()
    rows = torch.cat([slots, weights, weights.square(), entropy, torch.ones_like(entropy)], dim=1)
    return rows if routing.valid is None else rows.masked_fill(~routing.valid.cpu().unsqueeze(1), 0.0)


def expert_usage(model: Any, batches: Iterable[Any], tasks: Sequence[str] | None = None) -> dict[str, LayerUsage]:
    """Which experts each task of a model uses, {layer: shares [t, e]}.

    Args:
        model: has `tasks` and returns its routings.
        batches: inputs, tensors [b ...] or dicts of them, moved nowhere: pass them on the model's device.
        tasks: run only these; the other rows are NaN.
    """
    usage = ExpertUsage.of(model)
    with evaluating(model):
        for x in batches:
            usage.update(model(x, tasks=tasks, return_routing=True)[1])
    return usage.compute()


# ---- what that says -------------------------------------------------------------------------------------------------


def mutual_information(shares: Tensor) -> float:
    """I(task; expert) in nats, every task being equally likely.

    I = 1/T sum_t sum_e p(e|t) ln(p(e|t) / p(e)) with p(e) = 1/T sum_t p(e|t): the entropy of the experts less their
    mean entropy inside a task. 0 when all tasks use the experts alike, `most_information(T, E)` when the expert tells
    the task (E >= T) or the task the expert (E <= T). A token's k choices fall on k experts, so that of `slots` is
    ln(E/k) at most.

    Args:
        shares: p(e|t), `slots` or `mass` of a `LayerUsage`, rows sum to 1, [t, e]; rows of NaN are left out.
    """
    rows = _present(shares)
    if not len(rows):
        return math.nan
    return max(0.0, float(_entropy(rows.mean(0)) - _entropy(rows).mean()))


def most_information(tasks: int, experts: int) -> float:
    """The largest I(task; expert) there can be, min(ln T, ln E) nats."""
    return math.log(min(tasks, experts))


def expert_load(shares: Tensor) -> Tensor:
    """Share of the choices that fall on each expert, every task counting the same, [e].

    Args:
        shares: `slots` of a `LayerUsage`, [t, e]; rows of NaN are left out.
    """
    return _present(shares).mean(0)


def load_entropy(load: Tensor) -> float:
    """Entropy of the load [e] over ln E, its largest value: 1 when even, 0 when one expert does everything."""
    return float(_entropy(load)) / math.log(len(load)) if len(load) > 1 else 1.0


def task_cosine(shares: Tensor) -> Tensor:
    """Cosine between the usage of every two tasks, [t, t]: 1 for the same mixture of experts, 0 for disjoint ones.

    Args:
        shares: `slots` or `mass` of a `LayerUsage`, [t, e]; a row of NaN gives a row and a column of NaN.
    """
    unit = shares / shares.norm(dim=-1, keepdim=True)
    return unit @ unit.mT


def task_divergence(shares: Tensor) -> Tensor:
    """Jensen-Shannon divergence between the usage of every two tasks, nats, [t, t]: 0 for the same, ln 2 for disjoint.

    H((p + q) / 2) - (H(p) + H(q)) / 2 with entropies H.

    Args:
        shares: `slots` or `mass` of a `LayerUsage`, [t, e]; a row of NaN gives a row and a column of NaN.
    """
    alone = _entropy(shares)
    together = _entropy((shares.unsqueeze(0) + shares.unsqueeze(1)) / 2)
    return (together - (alone.unsqueeze(0) + alone.unsqueeze(1)) / 2).clamp(min=0)


def diagnose(usage: LayerUsage) -> dict[str, Any]:
    """The diagnostics of one layer as plain numbers and lists; a task that never passed is left out of every mean.

    Returns:
        mutual_information: I(task; expert) of the gate weight (`mass`), nats.
        mutual_information_share: that over `most_information`; 0 where there is one task or one expert.
        slot_information, slot_information_share: the same of the choices (`slots`).
        load: share of the choices per expert, tasks counting the same, [e].
        load_entropy: how even that is, 0 to 1.
        dead_experts: how many experts get less than `DEAD` of the even share.
        unused_experts: how many of them no token ever chose.
        gate_entropy: mean over tasks and their tokens of the entropy of the router's softmax, nats.
        task_cosine: cosine between the `slots` of every two tasks, [t][t].
    """
    load = expert_load(usage.slots)
    most = most_information(max(1, len(_present(usage.slots))), len(load))
    of_mass, of_slots = mutual_information(usage.mass), mutual_information(usage.slots)
    return {
        "mutual_information": of_mass,
        "mutual_information_share": of_mass / most if most else 0.0,
        "slot_information": of_slots,
        "slot_information_share": of_slots / most if most else 0.0,
        "load": load.tolist(),
        "load_entropy": load_entropy(load),
        "dead_experts": int((load < DEAD / len(load)).sum()),
        "unused_experts": int((load == 0).sum()),
        "gate_entropy": float(usage.entropy.nanmean()),
        "task_cosine": task_cosine(usage.slots).tolist(),
    }


def _present(shares: Tensor) -> Tensor:
    return shares[~shares.isnan().any(-1)]


def _entropy(shares: Tensor) -> Tensor:
    return torch.special.entr(shares).sum(-1)
