"""Banks of experts: the stacked weights of E small MLPs, called once for all tokens; and some of a bank's experts.

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
from torch import Tensor, nn

from moe_mtl.kernels import ops
from moe_mtl.kernels.dispatch import check_name, traced
from moe_mtl.kernels.plan import any_unused
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
        `keep_experts` on this bank they no longer fit it.

        Args:
            ids: of this bank's experts.
            mode: "copy", "view" or "table".

        Raises:
            ValueError: `ids` is empty, names an expert twice or one that the bank does not hold; a view of experts that
                are not neighbours in ascending order; or the mode is unknown.
        """
        check_name("mode", mode, MODES)
        ids = self._checked(ids)
        if mode == "view":
            return BankView(self, ids)
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

    def _checked(self, ids: Sequence[int] | Tensor) -> list[int]:
        """The ids as a list of numbers.

        Raises:
            ValueError: they are empty, no integers, or not different experts of this bank.
        """
        try:
            found = [operator.index(e) for e in ids]
        except TypeError:
            found = []
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


class BorrowedBank(ExpertBank):
    """Some experts of a bank that keeps their weights; what `ExpertBank.for_task` returns for a view and a table.

    Args:
        bank: whose experts they are. Not a submodule: its parameters are its own alone.
        num_experts: how many.

    Attributes:
        bank: the same.
        w1: the weights of these experts alone, and likewise b1, w2 and b2: slices of the bank's for a view, copies
            made when they are read for a table, which runs without them.
    """

    bank: ExpertBank

    def __init__(self, bank: ExpertBank, num_experts: int):
        nn.Module.__init__(self)
        object.__setattr__(self, "bank", bank)
        self.num_experts, self.dim, self.hidden, self.out_dim = num_experts, bank.dim, bank.hidden, bank.out_dim
        self.activation, self.glu = bank.activation, bank.glu

    def __getattr__(self, name: str) -> Any:
        return dict(zip(WEIGHTS, self._weights(), strict=True))[name] if name in WEIGHTS else super().__getattr__(name)

    def reset_parameters(self) -> None:
        """Does nothing: weights are drawn by the bank that holds them."""

    def copy_experts(self, ids: Sequence[int]) -> None:
        """Refuses: these are experts of another bank.

        Raises:
            ValueError: always.
        """
        raise ValueError("ids: a view or table of a bank has no room for more experts; copy them in the bank itself")

    def _own(self, t: Tensor) -> Tensor:
        """What a parameter of the bank holds for these experts."""
        raise NotImplementedError

    def _weights(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        w1, b1, w2, b2 = self.bank._weights()
        b1, b2 = (None if b is None else self._own(b) for b in (b1, b2))
        return self._own(w1), b1, self._own(w2), b2

    def in_bank(self) -> list[int]:
        """The bank's ids of these experts. A table asks its device."""
        raise NotImplementedError

    def for_task(self, ids: Sequence[int], mode: str = "copy") -> ExpertBank:
        """Some of these experts, of the same bank; as `ExpertBank.for_task`."""
        held = self.in_bank()
        return self.bank.for_task([held[e] for e in self._checked(ids)], mode)


class BankView(BorrowedBank):
    """Neighbouring experts of a bank, read where they lie; see `ExpertBank.for_task`.

    Args:
        bank: whose experts they are.
        ids: neighbours of the bank in ascending order, different and in range.

    Attributes:
        start: the bank's id of the first.

    Raises:
        ValueError: the ids are no neighbours in ascending order.
    """

    def __init__(self, bank: ExpertBank, ids: list[int]):
        super().__init__(bank, len(ids))
        self.start = _first_of_window(ids)

    def _own(self, t: Tensor) -> Tensor:
        return t.narrow(0, self.start, self.num_experts)

    def in_bank(self) -> list[int]:
        """The bank's ids of these experts."""
        return list(range(self.start, self.start + self.num_experts))

    def keep_experts(self, ids: Sequence[int]) -> None:
        """Narrows the window, in place, to these of its experts; the bank keeps all.

        Raises:
            ValueError: as in `for_task`.
        """
        ids = self._checked(ids)
        self.start += _first_of_window(ids)
        self.num_experts = len(ids)


class BankTable(BorrowedBank):
    """Any experts of a bank, found through a table of ids; see `ExpertBank.for_task`.

    A dense mixture is computed slot by slot like any other: side by side, as one MLP needs them, the experts would have
    to be copied.

    Args:
        bank: whose experts they are.
        ids: of the bank, different and in range.

    Attributes:
        table: the bank's id of every expert, then -1 for slots without one, int64 [s + 1].
    """

    table: Tensor

    def __init__(self, bank: ExpertBank, ids: list[int]):
        super().__init__(bank, len(ids))
        self.register_buffer("table", torch.tensor([*ids, -1], device=bank.w1.device))

    def switch(self, ids: Sequence[int] | Tensor) -> None:
        """Exchanges the experts for others of the bank, in place.

        Args:
            ids: as many of the bank's experts. A tensor on a GPU is copied without being read by the host: its values
                are not checked, and ids that the bank does not hold count as unused slots.

        Raises:
            ValueError: other than as many different experts of the bank.
        """
        if not isinstance(ids, Tensor) or ids.device.type == "cpu":
            ids = torch.tensor(self.bank._checked(ids))
        if ids.shape != (self.num_experts,) or ids.is_floating_point():
            raise ValueError(
                f"ids: got {ids.dtype} of shape {list(ids.shape)}, expected as many integers as before, "
                f"{self.num_experts}"
            )
        self.table[:-1].copy_(ids)

    def forward(self, x: Tensor, routing: Routing, *, backend: str = "auto") -> Tensor:
        """Runs each token through its experts; as `ExpertBank.forward`.

        Raises:
            ValueError: as there; the table is on another device than x.
        """
        self._check(x, routing)
        if self.table.device != x.device:
            raise ValueError(f"table: on {self.table.device}, but x is on {x.device}; move the table with .to()")
        slots = self._slots(routing)
        if x.device.type == "cpu" and not traced(x):
            any_unused(slots, self.num_experts)
        # -1, an unused slot, reads the last entry; so do ids out of range where they are not checked.
        return self.bank._run_slots(x, routing.weights, self.table[slots.clamp(-1, self.num_experts)], backend)

    def _own(self, t: Tensor) -> Tensor:
        return t.index_select(0, self.table[:-1])

    def in_bank(self) -> list[int]:
        """The bank's ids of these experts. Asks the device."""
        return self.table[:-1].tolist()

    def keep_experts(self, ids: Sequence[int]) -> None:
        """Drops, in place, every entry of the table but these; the bank keeps all.

        Raises:
            ValueError: as in `ExpertBank.keep_experts`.
        """
        ids = self._checked(ids)
        self.table = self.table[[*ids, -1]]
        self.num_experts = len(ids)


def _first_of_window(ids: list[int]) -> int:
    """The first of ids that are neighbours in ascending order.

    Raises:
        ValueError: they are not.
    """
    if ids != list(range(ids[0], ids[0] + len(ids))):
        raise ValueError(f'ids: got {ids}, but a view needs neighbours in ascending order; use mode="table" or "copy"')
    return ids[0]
