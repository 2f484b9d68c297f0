"""Which experts go first: a greedy order, by what they are used for or by what a layer's output loses without them."""

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor

from moe_mtl.calibration import Call

Kept = dict[str, list[int]]
Cost = Callable[[str, Sequence[int]], dict[int, float]]  # layer and the experts it holds -> what each costs to drop
Check = Callable[[Kept, str, int], bool]  # the experts all layers hold, the layer and the expert to drop


def thin(held: Mapping[str, Sequence[int]], cost: Cost, may: Check, fits: Check) -> Kept:
    """Drops experts one by one, each time the one that costs least over all layers.

    A layer's next is its cheapest expert that may go; where it does not fit, the layer is done. Of equal ones the first
    layer's goes, and there the lowest id.

    Args:
        held: ids of the experts of each layer.
        cost: of every expert of a layer, given those that are left; asked again after each drop in that layer.
        may: whether an expert can be done without at all.
        fits: whether its going is within what was asked for.
    """
    kept = {name: list(ids) for name, ids in held.items()}
    costs = {name: cost(name, ids) for name, ids in kept.items()}
    while True:
        options = []
        for place, name in enumerate(kept):
            possible = [(costs[name][e], place, e, name) for e in kept[name] if may(kept, name, e)]
            if possible and fits(kept, name, min(possible)[2]):
                options.append(min(possible))
        if not options:
            return kept
        _, _, e, name = min(options)
        kept[name].remove(e)
        costs[name] = cost(name, kept[name])


def by_usage(mass: Mapping[str, Tensor]) -> Cost:
    """The largest share of its gate weight that a task gave the expert, before any was dropped.

    Args:
        mass: by layer, rows sum to 1, [t, e].
    """

    def cost(name: str, kept: Sequence[int]) -> dict[int, float]:
        use = mass[name].amax(dim=0).tolist()
        return {e: use[e] for e in kept}

    return cost


def by_output(layers: Mapping[str, Any], calls: Mapping[str, Sequence[Sequence[Call]]]) -> Cost:
    """|y' - y|^2 / |y|^2 over the recorded calls, the largest over tasks: y' is what the layer gives without the expert
    and without those already gone, y what it gave with all. The gate chooses among those left, as it will.

    What layers before have lost is not followed: every layer is called with what it was called with in the full model.

    Args:
        layers: in eval mode; they stay as they are.
        calls: by layer, for each task.
    """

    @torch.no_grad()
    def change(name: str, ids: Sequence[int]) -> float:
        trial = copy.deepcopy(layers[name]).eval()
        trial.keep_experts(ids)
        worst = 0.0
        for mine in calls[name]:
            lost = sum(float((trial(*c.args, **c.options)[0] - c.y).double().square().sum()) for c in mine)
            worst = max(worst, lost / max(sum(float(c.y.double().square().sum()) for c in mine), 1e-30))
        return worst

    def cost(name: str, kept: Sequence[int]) -> dict[int, float]:
        rest = {e: [other for other in kept if other != e] for e in kept}
        served = {e: all(need & set(ids) for need in needs(layers[name])) for e, ids in rest.items()}
        return {e: change(name, ids) if served[e] else float("inf") for e, ids in rest.items()}

    return cost


# ---- no token without an expert -------------------------------------------------------------------------------------


def without(kept: Kept, name: str, e: int) -> Kept:
    """What is left when expert e of a layer goes."""
    return {**kept, name: [other for other in kept[name] if other != e]}


def needs(layer: Any) -> list[set[int]]:
    """What each task, or stream, of a layer can reach of the experts it holds: of each one must stay."""
    streams = getattr(layer, "streams", range(layer.gate.num_tasks))
    return [set(layer.needed([stream])) for stream in streams]


def fewest(wanted: Sequence[set[int]], kept: Sequence[int]) -> float:
    """The size of the smallest choice among the kept that has one of each set; infinite where there is none.

    Sets that hold another one ask for nothing more, and those that share no expert are chosen from apart, which leaves
    few to be tried in every way.
    """
    sets = {frozenset(s & set(kept)) for s in wanted}
    if frozenset() in sets:
        return float("inf")
    groups: list[list[frozenset[int]]] = []
    for one in (s for s in sets if not any(other < s for other in sets)):
        near = [group for group in groups if any(one & s for s in group)]
        groups = [group for group in groups if group not in near] + [[one, *(s for group in near for s in group)]]
    return sum(next(size for size in count(1) if _covered(group, size)) for group in groups)


def _covered(sets: Sequence[frozenset[int]], size: int) -> bool:
    """Whether some `size` elements have one of each set."""
    if not sets or size == 0:
        return not sets
    return any(_covered([s for s in sets if e not in s], size - 1) for e in sorted(min(sets, key=len)))
