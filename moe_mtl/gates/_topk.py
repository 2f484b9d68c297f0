"""The choice of k experts from router scores: noise, top-k and normalisation, in one place for all sparse gates.

Paper: Riquelme et al. 2021, https://arxiv.org/abs/2106.05974 (V-MoE: softmax over all experts before top-k, noise of
    standard deviation 1/E); Fan et al. 2022, https://arxiv.org/abs/2210.14793 (M3ViT: the same, noise scale an option);
    Chen et al. 2023, https://arxiv.org/abs/2303.01610 (SMoE-Dropout: a router drawn at random and kept fixed).
Differs: `normalize="detached"` is an addition, for experts that start as copies of one dense MLP. `frozen` takes the
    fixed random router of SMoE-Dropout alone: k does not grow during training, and experts are not cut from one MLP.
"""

import math
from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from moe_mtl.gates._router import RouterGate
from moe_mtl.routing import Routing, TaskIds
from moe_mtl.tasks import nearest

Normalize = Literal["none", "detached"]
NORMALIZE = ("none", "detached")


class TopKGate(RouterGate):
    """Softmax over all e scores, then the k largest; noise on the scores in training only.

    Softmax comes before the choice, so the router has a gradient for every k, k = 1 included.

    Args:
        dim: width d of the tokens.
        num_experts: experts e.
        num_tasks: tasks t.
        k: experts used per token.
        noise_std: the noise on the scores is N(0, (noise_std / e)^2). The default 1 is V-MoE's: small beside the scores
            (standard deviation about 0.6 at initialisation, for tokens of unit variance), yet near-ties alternate, and
            the smooth load of `moe_mtl.regularizers` exists only with noise. M3ViT's published command uses 0.
        normalize: "none" keeps the selected softmax values, which sum to less than 1. "detached" divides them by their
            sum without differentiating it: they sum to 1, so equal experts act as one from the first step, and the
            gradient is that of "none" scaled by that sum. Differentiating the sum too would leave no gradient at k = 1.
        frozen: the router keeps its random start: the control that shows what learning to route is worth. Its
            parameters are saved and loaded like any other, but take no gradient; tokens still get theirs through it.

    Raises:
        ValueError: a size is out of range, `noise_std` is negative or not finite, or `normalize` is unknown.
    """

    compute_class: Literal["dense", "token", "task", "weight"] = "token"

    def __init__(
        self,
        dim: int,
        num_experts: int,
        num_tasks: int,
        k: int,
        *,
        noise_std: float = 1.0,
        normalize: Normalize = "none",
        frozen: bool = False,
    ):
        super().__init__(dim, num_experts, num_tasks, k)
        if not (math.isfinite(noise_std) and noise_std >= 0):
            raise ValueError(f"noise_std: got {noise_std}, expected a finite number of at least 0")
        if normalize not in NORMALIZE:
            raise ValueError(f"normalize: unknown {normalize!r}; {nearest(str(normalize), NORMALIZE)}")
        self.noise_std, self.normalize, self.frozen = noise_std, normalize, frozen
        self.make_router()
        if frozen:
            self.requires_grad_(False)

    @abstractmethod
    def make_router(self) -> None:
        """Creates the parameters behind `scores`; the constructor calls it once the sizes are known."""

    def choose(self, logits: Tensor, task: TaskIds | None, valid: Tensor | None) -> Routing:
        """The top-k routing of clean logits [m, e]."""
        noisy = std = None
        if self.training and self.noise_std > 0:
            std = logits.new_full((), self.noise_std / self.num_experts)
            noisy = logits + std * torch.randn_like(logits)
        probs = (logits if noisy is None else noisy).softmax(dim=-1)
        weights, indices = self.strongest(probs)
        if self.normalize == "detached":
            weights = weights / weights.detach().sum(dim=-1, keepdim=True)
        return Routing(weights, indices, logits, task, valid, noisy_logits=noisy, noise_std=std)

    def extra_repr(self) -> str:
        """Sizes and options, for printing."""
        frozen = ", frozen=True" if self.frozen else ""
        return f"{super().extra_repr()}, noise_std={self.noise_std}, normalize={self.normalize!r}{frozen}"
