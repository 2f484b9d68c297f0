"""Banks of experts: the stacked weights of E small MLPs, called once for all tokens.

Rows of several tasks need no call per task: a routing whose ids point into the whole bank serves them in one call, for
tasks that own neighbouring experts with local ids plus the first expert of the row's task.
"""

import copy
import math
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_mtl.kernels import ops
from moe_mtl.kernels.dispatch import check_name
from moe_mtl.kernels.reference import ACTIVATIONS
from moe_mtl.routing import Routing

MODES = ("copy", "view", "table")
WEIGHTS = ("w1", "b1", "w2", "b2")
_shapes_only: ContextVar[bool] = ContextVar("shapes_only", default=False)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Banks made within it take no memory: they have the shapes of their weights alone, on torch's meta device."""
    token = _shapes_only.set(True)
    try:
        yield
    finally:
        _shapes_only.reset(token)


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

    renumbered = 0  # how often experts were dropped, after which the others have new ids

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
            if not hasattr(value, "__index__") or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected a whole number, at least 1")
        ops.check_activation(activation)
        self.num_experts, self.dim, self.hidden, self.out_dim = num_experts, dim, hidden, out_dim
        self.activation, self.glu = activation, glu
        wide, device = hidden * (1 + glu), "meta" if _shapes_only.get() else None
        self.w1 = nn.Parameter(torch.empty(num_experts, wide, dim, device=device))
        self.b1 = nn.Parameter(torch.empty(num_experts, wide, device=device)) if bias else None
        self.w2 = nn.Parameter(torch.empty(num_experts, out_dim, hidden, device=device))
        self.b2 = nn.Parameter(torch.empty(num_experts, out_dim, device=device)) if bias else None
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

        A routing without ids, over all experts, is computed as the dense MLP it is (`ops.dense_mlp`), unless a backend
        is forced. One with ids is not, however many: only the gate knows that they name every expert.

        Under `torch.export` the graph holds plain torch operations alone, for any number of tokens.

        Args:
            x: tokens [m, d].
            routing: what the gate returned for these tokens. Rows where `valid` is False give zero and no gradient.
            backend: as in `moe_mtl.kernels.ops.routed_mlp`.

        Returns:
            y [m, o].

        Raises:
            ValueError: the routing is for another number of tokens or experts; or as in `routed_mlp`.
        """
        self._check(x, routing)
        if routing.indices is not None or backend != "auto":
            return self._run_slots(x, routing.weights, self._slots(routing), backend)
        if routing.valid is None:
            return ops.dense_mlp(x, *self._weights(), routing.weights, activation=self.activation, glu=self.glu)
        unused = ~routing.valid[:, None]
        x, gates = x.masked_fill(unused, 0), routing.weights.masked_fill(unused, 0)
        y = ops.dense_mlp(x, *self._weights(), gates, activation=self.activation, glu=self.glu)
        return y.masked_fill(unused, 0)

    def alone(self, x: Tensor) -> Tensor:
        """The outputs [m, o] of tokens [m, d] from a bank of one expert, which is a dense MLP."""
        w1, b1, w2, b2 = (None if p is None else p[0] for p in self._weights())
        assert w1 is not None and w2 is not None
        z, act = F.linear(x, w1, b1), ACTIVATIONS[self.activation]
        if not self.glu:
            return F.linear(act(z), w2, b2)
        first, second = z.chunk(2, dim=-1)
        return F.linear(act(first) * second, w2, b2)

    def _check(self, x: Tensor, routing: Routing) -> None:
        """Refuses a routing of other tokens or experts.

        Raises:
            ValueError: with both numbers.
        """
        if routing.num_experts != self.num_experts or routing.weights.shape[0] != x.shape[0]:
            raise ValueError(
                f"routing: got {routing.weights.shape[0]} tokens over {routing.num_experts} experts, expected "
                f"{x.shape[0]} tokens over {self.num_experts}"
            )

    def _weights(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """w1, b1, w2 and b2 as `forward` reads them."""
        return self.w1, self.b1, self.w2, self.b2

    def _slots(self, routing: Routing) -> Tensor:
        """The expert of every slot [m, k], -1 where it is unused."""
        idx = routing.indices
        if idx is None:
            idx = torch.arange(self.num_experts, device=routing.weights.device).expand(routing.weights.shape[0], -1)
        return idx if routing.valid is None else idx.masked_fill(~routing.valid[:, None], -1)

    def _run_slots(self, x: Tensor, gates: Tensor, idx: Tensor, backend: str) -> Tensor:
        """y [m, o] of tokens [m, d], their gates [m, k] and the ids of their experts in this bank [m, k]."""
        if gates.dtype in (torch.bfloat16, torch.float16):
            gates = gates.float()
        form: dict[str, Any] = {"activation": self.activation, "glu": self.glu, "backend": backend}
        return ops.routed_mlp(x, *self._weights(), gates, idx, **form)

    def for_task(self, ids: Sequence[int], mode: str = "copy") -> "ExpertBank":
        """Some of the experts, as a bank in which they have the ids 0, 1, ... in the given order.

        It is called like any bank, with routings over its own experts, such as `Gate.in_bank` returns. A dense mixture,
        weights over its experts without ids, runs as one MLP in the first two modes.

        copy   A bank with weights of its own, which owes this one nothing: to ship, to train apart, to export.
        view   A window of neighbouring experts. It reads this bank's storage: nothing is copied, changes of this bank
               show at once, and gradients arrive in this bank's parameters.
        table  Any experts in any order, found in this bank through a table of ids: nothing is copied, and `switch`
               exchanges the experts by writing a few bytes, also between replays of a CUDA graph. Gradients arrive in
               this bank's parameters.

        View and table have no parameters: an optimizer takes this bank's. Its other experts get zeros for gradients,
        not None, so an optimizer that decays weights decays theirs too. A `state_dict` holds nothing of a view and the
        ids of a table. Both follow this bank when it moves or changes its dtype; `.to()` on a table moves the ids
        alone. A deep copy of one copies this bank too, a deep copy of a module with both keeps them together. After
        `keep_experts` on this bank they are refused: its experts have other ids.

        Args:
            ids: of this bank's experts.
            mode: "copy", "view" or "table".

        Raises:
            ValueError: `ids` is empty, names an expert twice or one that the bank does not hold; a view of experts that
                are not neighbours in ascending order; or the mode is unknown.
        """
        from moe_mtl.expert_subsets import BankTable, BankView  # which are banks themselves

        check_name("mode", mode, MODES)
        ids = self._checked(ids)
        if mode == "view":
            return BankView(self, ids)
        with torch.inference_mode(False):  # what is made here outlives it: to be switched, to be trained
            if mode == "table":
                return BankTable(self, ids)
            pruned = self._pruned(ids)
            # What the memo holds is taken for the copy of a parameter: no expert that is left out is ever copied.
            bank = copy.deepcopy(self, {id(p): pruned[name] for name, p in self.named_parameters(recurse=False)})
        bank.num_experts = len(ids)
        return bank

    @torch.no_grad()
    def copy_experts(self, ids: Sequence[int]) -> None:
        """Adds, in place, copies of some experts, which take the last places. The parameters are new.

        Args:
            ids: of this bank's experts.

        Raises:
            ValueError: as in `keep_experts`.
        """
        ids = self._checked(ids)
        for name, p in dict(self.named_parameters(recurse=False)).items():
            setattr(self, name, nn.Parameter(torch.cat([p, p[ids]]), requires_grad=p.requires_grad))
        self.num_experts += len(ids)

    def keep_experts(self, ids: Sequence[int]) -> None:
        """Drops, in place, the weights of every expert but these, which take the places 0, 1, ...

        The parameters are new: an optimizer made before still holds the old ones.

        Args:
            ids: of this bank's experts.

        Raises:
            ValueError: `ids` is empty, names an expert twice, or one that the bank does not hold.
        """
        ids = self._checked(ids)
        for name, parameter in self._pruned(ids).items():
            setattr(self, name, parameter)
        self.num_experts = len(ids)
        self.renumbered += 1

    def _checked(self, ids: Sequence[int] | Tensor) -> list[int]:
        """The ids as a list of numbers.

        Raises:
            ValueError: they are empty, no integers, or not different experts of this bank.
        """
        try:
            masked = any(isinstance(e, bool) or (isinstance(e, Tensor) and e.dtype == torch.bool) for e in ids)
            found = [operator.index(e) for e in ids]
        except TypeError:
            masked, found = False, []
        if masked:
            raise ValueError(f"ids: got the mask {ids}, expected the ids of experts: where it is True")
        if not found or len(set(found)) < len(found) or not all(e in range(self.num_experts) for e in found):
            raise ValueError(f"ids: got {ids}, expected different experts of 0 to {self.num_experts - 1}, at least one")
        return found

    @torch.no_grad()
    def _pruned(self, ids: list[int]) -> dict[str, nn.Parameter]:
        """Parameters of these experts alone, by name."""
        return {
            name: nn.Parameter(parameter[ids], requires_grad=parameter.requires_grad)
            for name, parameter in self.named_parameters(recurse=False)
        }

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return (
            f"num_experts={self.num_experts}, dim={self.dim}, hidden={self.hidden}, out_dim={self.out_dim}, "
            f"activation={self.activation!r}, glu={self.glu}, bias={self.b1 is not None}"
        )
