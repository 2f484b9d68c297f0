"""Some of a bank's experts, read where they lie: a window of neighbours, or any of them through a table of ids."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_mtl.experts import WEIGHTS, ExpertBank
from moe_mtl.kernels.dispatch import traced
from moe_mtl.kernels.plan import any_unused
from moe_mtl.routing import Routing


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
        self.made_at = bank.renumbered
        self.num_experts, self.dim, self.hidden, self.out_dim = num_experts, bank.dim, bank.hidden, bank.out_dim
        self.activation, self.glu = bank.activation, bank.glu

    def __getattr__(self, name: str) -> Any:
        return dict(zip(WEIGHTS, self._weights(), strict=True))[name] if name in WEIGHTS else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in WEIGHTS:
            raise AttributeError(f"{name}: a view or table has no weights of its own; set those of its bank")
        super().__setattr__(name, value)

    def _check(self, x: Tensor, routing: Routing) -> None:
        if self.bank.renumbered != self.made_at:
            raise ValueError(
                "bank: experts were dropped from it (keep_experts) after this view or table was made, and those left "
                "have other ids; make it anew with bank.for_task"
            )
        super()._check(x, routing)

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
        if ids.shape != (self.num_experts,) or ids.is_floating_point() or ids.dtype == torch.bool:
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
