"""What experts do: units that never fire, and how different the experts' outputs are.

Paper: Wang et al. 2024, HoME, https://arxiv.org/abs/2408.05430 (expert collapse: the share of activations that are
    zero); Aoki et al. 2021, MMoEEx, https://arxiv.org/abs/2106.10595 (diversity: distances between experts' outputs).
Differs: an activation counts as zero below `SILENT` of the root mean square of its layer, so that smooth activations
    can be told from ReLU's.
"""

from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_mtl.expert_stack import ExpertStack
from moe_mtl.multitask import evaluating

SILENT = 1e-2  # of the root mean square of the layer's outputs
ALWAYS = 0.99  # share of the samples on which a dead unit is silent


@dataclass(frozen=True)
class Activity:
    """The outputs of one stack of experts over a set.

    Attributes:
        silent: share of an expert's activations that are zero, or nearly, [e].
        dead: share of an expert's units that are silent on at least `ALWAYS` of the samples, [e].
        distance: Frobenius distance between the outputs of every two experts over the largest such, [e, e], 0..1.
    """

    silent: Tensor
    dead: Tensor
    distance: Tensor

    @property
    def diversity(self) -> float:
        """Mean of the distances of different experts, 0..1; higher is more diverse. NaN for one expert."""
        count = len(self.distance)
        return float(self.distance.sum() / (count * (count - 1))) if count > 1 else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Plain data: means over experts, and the values of every expert."""
        return {
            "silent": float(self.silent.mean()),
            "dead": float(self.dead.mean()),
            "diversity": self.diversity,
            "silent_by_expert": self.silent.tolist(),
            "dead_by_expert": self.dead.tolist(),
        }


def expert_activity(model: nn.Module, batches: Iterable[Any]) -> dict[str, Activity]:
    """The activity of every `ExpertStack` of a model, by the stack's name.

    Args:
        model: called with each batch.
        batches: inputs of the model. They are read once and their outputs kept, so pass thousands of samples, not
            millions.

    Raises:
        ValueError: no batches.
    """
    outputs: dict[str, list[Tensor]] = {}
    with evaluating(model), _recording(model, outputs):
        for x in batches:
            model(x)
    if not outputs and any(isinstance(module, ExpertStack) for module in model.modules()):
        raise ValueError("batches: got none")
    return {name: activity(torch.cat(parts)) for name, parts in outputs.items()}


def activity(outputs: Tensor) -> Activity:
    """The activity of experts whose outputs are [b, e, h]."""
    z = outputs.double()
    quiet = z.abs() <= SILENT * z.square().mean().sqrt()
    flat = z.transpose(0, 1).flatten(1)
    # from differences: products, which cdist takes for many experts, leave equal outputs apart
    distance = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    distance.fill_diagonal_(0.0)
    return Activity(
        silent=quiet.double().mean(dim=(0, 2)),
        dead=(quiet.double().mean(dim=0) >= ALWAYS).double().mean(dim=1),
        distance=distance / distance.max().clamp(min=torch.finfo(distance.dtype).tiny),
    )


@contextmanager
def _recording(model: nn.Module, outputs: Mapping[str, list[Tensor]]):
    """Keeps what every expert stack returns in `outputs`."""
    found: Any = outputs

    def keep(name: str):
        def hook(module: nn.Module, args: tuple, z: Tensor) -> None:
            found.setdefault(name, []).append(z.detach().cpu())

        return hook

    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, ExpertStack)]
    hooks = [module.register_forward_hook(keep(name)) for name, module in stacks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
