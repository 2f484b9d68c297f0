"""Expert stacks: E small MLPs whose outputs are all wanted, computed side by side, for models of one vector per sample.

`moe_mtl.experts.ExpertBank` mixes the experts of one routing and never holds their outputs; here T tasks mix the same
outputs, each with weights of its own, so the outputs are computed once.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_mtl.tasks import nearest

Norm = Literal["none", "batch", "layer"]
NORMS = ("none", "batch", "layer")
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "identity": lambda x: x}


class ExpertStack(nn.Module):
    """E MLPs of the same sizes: (linear, norm, activation, dropout) per layer, the last one included.

    Weights start uniform with variance 1 / fan in, biases at zero.

    Args:
        num_experts: experts e.
        dim: width d of the inputs.
        widths: of the layers; the last is that of the outputs, h.
        activation: "relu", "gelu", "silu" (Swish), "tanh" or "identity".
        norm: "batch" normalises each unit of each expert over the batch (HoME), with running statistics in evaluation;
            "layer" normalises each expert's layer over its units and needs no batch.
        dropout: share of the units dropped after each activation in training.

    Raises:
        ValueError: a size is below 1, there is no layer, or an unknown activation or norm.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        widths: Sequence[int],
        *,
        activation: str = "relu",
        norm: Norm = "none",
        dropout: float = 0.0,
    ):
        super().__init__()
        for name, value in (("num_experts", num_experts), ("dim", dim), *(("widths", width) for width in widths)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        if not widths:
            raise ValueError("widths: got none, an expert needs at least one layer")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: unknown {activation!r}; {nearest(activation, ACTIVATIONS)}")
        if norm not in NORMS:
            raise ValueError(f"norm: unknown {norm!r}; {nearest(str(norm), NORMS)}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: got {dropout}, expected 0 to below 1")
        self.num_experts, self.dim, self.widths = num_experts, dim, tuple(widths)
        self.activation, self.norm, self.dropout = activation, norm, dropout
        fan_in = (dim, *widths)
        self.weight = nn.ParameterList(
            [
                nn.Parameter(torch.empty(num_experts, out, into).uniform_(-1, 1) * (3 / into) ** 0.5)
                for into, out in zip(fan_in, widths, strict=False)
            ]
        )
        self.bias = nn.ParameterList([nn.Parameter(torch.zeros(num_experts, out)) for out in widths])
        if norm != "none":
            self.scale = nn.ParameterList([nn.Parameter(torch.ones(num_experts, out)) for out in widths])
            self.shift = nn.ParameterList([nn.Parameter(torch.zeros(num_experts, out)) for out in widths])
        if norm == "batch":
            for i, out in enumerate(widths):
                self.register_buffer(f"running_mean_{i}", torch.zeros(num_experts, out))
                self.register_buffer(f"running_var_{i}", torch.ones(num_experts, out))

    @property
    def out_dim(self) -> int:
        """Width h of the outputs."""
        return self.widths[-1]

    def forward(self, x: Tensor, ids: Sequence[int] | None = None) -> Tensor:
        """Outputs of the experts.

        Args:
            x: inputs [b, d] that every expert reads, or [e, b, d], one block for each expert asked for.
            ids: of the experts to run, by their place in the stack; all when None.

        Returns:
            [b, e, h].

        Raises:
            ValueError: `x` does not fit; or a batch of one in training with batch norm.
        """
        count = self.num_experts if ids is None else len(ids)
        if x.shape[-1] != self.dim or x.ndim not in (2, 3) or (x.ndim == 3 and len(x) != count):
            raise ValueError(f"x: got shape {list(x.shape)}, expected [b, {self.dim}] or [{count}, b, {self.dim}]")
        z = x
        for i in range(len(self.widths)):
            weight, bias = self._of(self.weight[i], ids), self._of(self.bias[i], ids)
            if z.ndim == 2:
                z = F.linear(z, weight.flatten(0, 1), bias.flatten()).unflatten(1, weight.shape[:2])
            else:  # [e, b, d] of an input per expert, or the [b, e, h] of the layer below
                z = torch.baddbmm(bias.unsqueeze(1), z if i == 0 else z.transpose(0, 1), weight.mT).transpose(0, 1)
            z = ACTIVATIONS[self.activation](self._normalise(z, i, ids))
            z = F.dropout(z, self.dropout, self.training)
        return z

    @staticmethod
    def _of(parameter: Tensor, ids: Sequence[int] | None) -> Tensor:
        """The rows of these experts: a view where they are neighbours."""
        if ids is None:
            return parameter
        if _neighbours(ids):
            return parameter.narrow(0, ids[0], len(ids))
        return parameter[list(ids)]

    def _normalise(self, z: Tensor, layer: int, ids: Sequence[int] | None) -> Tensor:
        if self.norm == "none":
            return z
        scale, shift = self._of(self.scale[layer], ids), self._of(self.shift[layer], ids)
        if self.norm == "layer":
            return F.layer_norm(z, z.shape[-1:]) * scale + shift
        if self.training and len(z) < 2:
            raise ValueError("x: got a batch of one in training; batch norm needs two rows, or take norm='layer'")
        mean = self._of(getattr(self, f"running_mean_{layer}"), ids).flatten()
        var = self._of(getattr(self, f"running_var_{layer}"), ids).flatten()
        own = ids is None or _neighbours(ids)  # views, which the update reaches
        y = F.batch_norm(z.flatten(1), mean, var, scale.flatten(), shift.flatten(), self.training)
        if self.training and not own:  # statistics of copied rows go back to where they came from
            with torch.no_grad():
                getattr(self, f"running_mean_{layer}")[list(ids or ())] = mean.view_as(scale)
                getattr(self, f"running_var_{layer}")[list(ids or ())] = var.view_as(scale)
        return y.view_as(z)

    def copy_experts(self, ids: Sequence[int]) -> None:
        """Adds, in place, copies of some experts, which take the last places; parameters are new."""
        self.keep_experts([*range(self.num_experts), *ids])

    @torch.no_grad()
    def keep_experts(self, ids: Sequence[int]) -> None:
        """Drops, in place, every expert but these, which take the places 0, 1, ...; parameters are new.

        One that is named twice is there twice.
        """
        ids = list(ids)
        for entries in (getattr(self, name) for name in ("weight", "bias", "scale", "shift") if hasattr(self, name)):
            for i, parameter in enumerate(entries):
                entries[i] = nn.Parameter(parameter[ids], requires_grad=parameter.requires_grad)
        for name, buffer in self.named_buffers(recurse=False):
            self.register_buffer(name, buffer[ids])
        self.num_experts = len(ids)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return (
            f"num_experts={self.num_experts}, dim={self.dim}, widths={self.widths}, activation={self.activation!r}, "
            f"norm={self.norm!r}, dropout={self.dropout}"
        )


def _neighbours(ids: Sequence[int]) -> bool:
    """Whether ids stand side by side in ascending order."""
    return list(ids) == list(range(ids[0], ids[0] + len(ids)))
