"""Low-rank updates of stacked experts: trained in the place of the experts' weights, then merged into them.

Paper: Hu et al. 2022, LoRA, https://arxiv.org/abs/2106.09685, with A and B for every expert of a stack.
Differs: nothing; banks take peft's layers, stacks, whose weights are lists that peft does not know, the ones here.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moe_mtl.adapters.lora import check_rank
from moe_mtl.expert_stack import ExpertStack
from moe_mtl.experts import ExpertBank


class LowRank(nn.Module):
    """W + (alpha / r) B A for every expert, with A [e, r, d] random and B [e, o, r] zero to begin with.

    Args:
        weight: of the experts, [e, o, d].
        rank: r.
        alpha: scale of what is added, times r.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float):
        super().__init__()
        experts, out, dim = weight.shape
        self.scale = alpha / rank
        self.a = nn.Parameter(torch.empty(experts, rank, dim).uniform_(-(dim**-0.5), dim**-0.5).to(weight))
        self.b = nn.Parameter(weight.new_zeros(experts, out, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The weights with what is added, [e, o, d]."""
        return weight + self.scale * (self.b @ self.a)


class ExpertLora:
    """Low-rank updates of the experts of some layers. They compute what they did until the updates learn.

    Args:
        model: whose modules are changed, in place, until `merge`.
        experts: banks and stacks of the model, by name.
        rank: r.
        alpha: scale of what is added, times r.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, model: nn.Module, experts: Mapping[str, nn.Module], rank: int, alpha: float):
        check_rank(rank, alpha, 0.0)
        banks = [name for name, part in experts.items() if isinstance(part, ExpertBank)]
        self.lists: list[tuple[Any, str]] = []
        self.tuner: Any = None
        before = set(model.parameters())
        learns = {p: p.requires_grad for p in before}
        if banks:
            from peft import LoraConfig  # seconds to import
            from peft.tuners.lora import LoraModel

            names = [f"{name}.{weight}" for name in banks for weight in ("w1", "w2")]
            config: Any = LoraConfig(r=rank, lora_alpha=alpha, target_modules=[], target_parameters=names)  # type: ignore[arg-type]
            self.tuner = LoraModel(model, config, "finetune")
        for part in experts.values():
            if isinstance(part, ExpertStack):
                for i in range(len(part.widths)):
                    parametrize.register_parametrization(part.weight, str(i), LowRank(part.weight[i], rank, alpha))
                    self.lists.append((part.weight, str(i)))
        for p, flag in learns.items():  # peft freezes the model
            p.requires_grad_(flag)
        self.parameters = {p for p in model.parameters() if p not in before}

    def merge(self) -> None:
        """Adds the updates to the experts' weights, which are plain parameters again."""
        if self.tuner is not None:
            self.tuner.merge_and_unload()
        for part, name in self.lists:
            parametrize.remove_parametrizations(part, name, leave_parametrized=True)
