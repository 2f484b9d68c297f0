"""New experts for a task of a trained model: copies of those it uses most, in their place, for this task alone.

While they are copies the model computes what it did, up to rounding. While nothing but them learns (`OnlyNew`), the
other tasks, which cannot see them, stay as they are to the bit.

Paper: none; inspired by Gururangan et al. 2022, DEMix, https://arxiv.org/abs/2108.05036 (an expert for a new domain
    starts from the nearest there is, and the old ones stay).
Differs: rebuilt from the abstract. There a router picks one expert per domain; here a task's router goes on among all
    it can see.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moe_mtl.diagnostics import LayerUsage
from moe_mtl.expert_stack import ExpertStack
from moe_mtl.multitask import MultiTaskModel, task_ids
from moe_mtl.vector import VectorModel


def add_experts(
    model: MultiTaskModel | VectorModel, task: str, usage: Mapping[str, LayerUsage], count: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Gives a task experts of its own in every layer, in place, that stand in for those it uses most.

    Args:
        model: its routers must know tasks apart: `noisy_topk`, `softmax`, `sigmoid`, `exclusive`, `assigned`. In models
            of several levels the last one gets new experts: what lies before it is read by several tasks.
        task: its name.
        usage: of this task, from `moe_mtl.diagnostics.expert_usage`.
        count: new experts per layer; None for as many as a token uses, at most half of those the task can see.

    Returns:
        Ids of the new experts by layer.

    Raises:
        ValueError: there is no such task, no layer with experts, a gate that cannot give experts to one task, or more
            experts wanted than the task can see. The model is then as it was.
    """
    (i,) = task_ids(model.tasks, [task], "task")
    if getattr(model, "config", {}).get("args", {}).get("hidden") == "split":
        raise ValueError("train: experts of hidden='split' are parts of one MLP, and no part can be added to it")
    places = task_layers(model, i)
    plan = {}
    for name, (layer, place) in places.items():
        if not layer.gate.gives_experts or getattr(layer, "own", None) is not None:
            raise ValueError(
                f"train: {name} ({type(layer.gate).__name__}) cannot show experts to one task alone, so none can have "
                "experts of its own; train 'experts' or 'lora'"
            )
        seen = layer.gate.reachable(place)
        seen = [e for e in layer.kept_experts if seen is None or e in seen]
        wanted = min(layer.gate.k, max(1, len(seen) // 2)) if count is None else count
        if not 1 <= wanted <= len(seen):
            raise ValueError(f"new_experts: got {count}, expected 1 to {len(seen)}, the experts of {name} it can see")
        share = usage[name].mass[i].nan_to_num()
        plan[name] = sorted(seen, key=lambda e: -float(share[e]))[:wanted]
    found = {}
    for name, ids in plan.items():
        layer, place = places[name]
        first = layer.gate.num_experts
        layer.give_experts(place, ids)
        found[name] = tuple(range(first, first + len(ids)))
    model.note_experts()
    return found


def task_layers(model: MultiTaskModel | VectorModel, task: int) -> dict[str, tuple[Any, int]]:
    """The layers that can have experts for one task alone, each with the task's number there.

    Raises:
        ValueError: there is none.
    """
    layers: dict[str, Any] = model.moe_layers
    if isinstance(model, MultiTaskModel):
        found = {name: (layer, task) for name, layer in layers.items()}
    else:
        last, outputs = list(layers)[-1:], getattr(model.trunk, "outputs", ())
        found = {name: (layers[name], layers[name].streams.index(outputs[task])) for name in last if outputs}
    if not found:
        raise ValueError("model: it has no experts")
    return found


class NewRows(nn.Module):
    """A parametrization of stacked experts: all but the last of them are fixed, the last ones learn.

    Args:
        full: of all experts, [e, ...].
        count: how many learn.
    """

    old: Tensor

    def __init__(self, full: Tensor, count: int):
        super().__init__()
        self.count = count
        self.register_buffer("old", full[:-count].detach().clone())

    def forward(self, new: Tensor) -> Tensor:
        """All experts from those that learn."""
        return torch.cat([self.old, new])

    def right_inverse(self, full: Tensor) -> Tensor:
        """Those that learn."""
        return full[-self.count :]


class OnlyNew:
    """Lets the last experts of some layers learn alone, in place, until `merge`.

    Args:
        experts: banks and stacks, each with the number of its new experts.
    """

    def __init__(self, experts: Mapping[nn.Module, int]):
        self.entries: list[tuple[Any, str]] = []
        for part, count in experts.items():
            lists: list[Any] = [part]
            if isinstance(part, ExpertStack):
                lists = [getattr(part, name) for name in ("weight", "bias", "scale", "shift") if hasattr(part, name)]
            for entries in lists:
                for name, p in list(entries.named_parameters(recurse=False)):
                    parametrize.register_parametrization(entries, name, NewRows(p, count), unsafe=True)
                    self.entries.append((entries, name))
        self.parameters = {entries.parametrizations[name].original for entries, name in self.entries}

    def merge(self) -> None:
        """Makes plain parameters of old and new experts together."""
        for entries, name in self.entries:
            parametrize.remove_parametrizations(entries, name, leave_parametrized=True)
