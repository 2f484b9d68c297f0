"""Banks of experts: the stacked weights of E small MLPs, called once for all tokens."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_mtl.kernels import ops
from moe_mtl.routing import Routing


class ExpertBank(nn.Module):
    """E two-layer MLPs in one stack: y[i] = sum_j weights[i, j] * expert_{indices[i, j]}(x[i]).

    Each expert starts as `nn.Linear` layers of its sizes would: weights and biases uniform in +-1/sqrt(fan in), drawn
    expert by expert.

    Args:
        num_experts: experts e.
        dim: width d of the tokens.
        hidden: width h inside an expert.
        out_dim: width o of the result; None for `dim`.
        activation: "gelu" (exact), "silu" or "relu".
        glu: gated linear unit: the first layer makes 2h values, act(first half) * second half go on.
        bias: biases on both layers.

    Attributes:
        w1: [e, h, d], or [e, 2h, d] with `glu`.
        b1: [e, h], or [e, 2h] with `glu`, or None.
        w2: [e, o, h].
        b2: [e, o] or None.

    Raises:
        ValueError: a size is below 1, or the activation is unknown.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        *,
        out_dim: int | None = None,
        activation: str = "gelu",
        glu: bool = False,
        bias: bool = True,
    ):
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        for name, value in (("num_experts", num_experts), ("dim", dim), ("hidden", hidden), ("out_dim", out_dim)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        ops.check_activation(activation)
        self.num_experts, self.dim, self.hidden, self.out_dim = num_experts, dim, hidden, out_dim
        self.activation, self.glu = activation, glu
        wide = hidden * (1 + glu)
        self.w1 = nn.Parameter(torch.empty(num_experts, wide, dim))
        self.b1 = nn.Parameter(torch.empty(num_experts, wide)) if bias else None
        self.w2 = nn.Parameter(torch.empty(num_experts, out_dim, hidden))
        self.b2 = nn.Parameter(torch.empty(num_experts, out_dim)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws every expert anew."""
        for e in range(self.num_experts):
            for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
                bound = 1 / math.sqrt(weight.shape[2])
                weight[e].uniform_(-bound, bound)
                if bias is not None:
                    bias[e].uniform_(-bound, bound)

    def forward(self, x: Tensor, routing: Routing, *, backend: str = "auto") -> Tensor:
        """Runs each token through its experts.

        Under `torch.export` the graph holds plain torch operations alone, for any number of tokens.

        Args:
            x: tokens [m, d].
            routing: what the gate returned for these tokens. Rows where `valid` is False give zero and no gradient.
            backend: as in `moe_mtl.kernels.ops.routed_mlp`.

        Returns:
            y [m, o].

        Raises:
            ValueError: the routing is for another number of tokens or experts.
        """
        if routing.num_experts != self.num_experts or routing.weights.shape[0] != x.shape[0]:
            raise ValueError(
                f"routing: got {routing.weights.shape[0]} tokens over {routing.num_experts} experts, expected "
                f"{x.shape[0]} tokens over {self.num_experts}"
            )
        idx = routing.indices
        if idx is None:
            idx = torch.arange(self.num_experts, device=x.device).expand(x.shape[0], -1)
        if routing.valid is not None:
            idx = idx.masked_fill(~routing.valid[:, None], -1)
        gates = routing.weights
        if gates.dtype in (torch.bfloat16, torch.float16):
            gates = gates.float()
        return ops.routed_mlp(
            x,
            self.w1,
            self.b1,
            self.w2,
            self.b2,
            gates,
            idx,
            activation=self.activation,
            glu=self.glu,
            backend=backend,
        )

    @torch.no_grad()
    def keep_experts(self, ids: Sequence[int]) -> None:
        """Drops, in place, the weights of every expert but these, which take the places 0, 1, ...

        The parameters are new: an optimizer made before still holds the old ones.

        Args:
            ids: of this bank's experts.

        Raises:
            ValueError: `ids` is empty, names an expert twice, or one that the bank does not hold.
        """
        ids = list(ids)
        if not ids or len(set(ids)) < len(ids) or not all(e in range(self.num_experts) for e in ids):
            raise ValueError(f"ids: got {ids}, expected different experts of 0 to {self.num_experts - 1}, at least one")
        for name, parameter in list(self.named_parameters(recurse=False)):
            setattr(self, name, nn.Parameter(parameter[ids], requires_grad=parameter.requires_grad))
        self.num_experts = len(ids)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return (
            f"num_experts={self.num_experts}, dim={self.dim}, hidden={self.hidden}, out_dim={self.out_dim}, "
            f"activation={self.activation!r}, glu={self.glu}, bias={self.b1 is not None}"
        )
