"""Sparse upcycling: the MLP of any library, as weights, to the layer of task-gated experts in its place."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe_mtl.experts import ExpertBank
from moe_mtl.gates import GATES, Gate, create_gate, resolve_k
from moe_mtl.kernels.ops import moe_mlp, plan_routing
from moe_mtl.layers import MoE

Weights = dict[str, Tensor | None]


class ExpertMaker:
    """Makes layers of experts that start as the MLPs they stand for; `moe_mtl.backbones.moefy` explains the options.

    Args:
        num_tasks: tasks t.
        gate: a name in `moe_mtl.gates.GATES`.
        experts: experts per bank.
        k: experts used per token; None for the gate's default.
        hidden: "copy" or "split".
        gate_args: options of the gate.

    Raises:
        ValueError: an unknown gate or kind of copy, or "split" where not every expert is used.

    Attributes:
        options: the arguments, plain data.
    """

    def __init__(
        self,
        num_tasks: int,
        *,
        gate: str,
        experts: int,
        k: int | None,
        hidden: Literal["copy", "split"],
        gate_args: Mapping[str, Any] | None,
    ):
        if hidden not in ("copy", "split"):
            raise ValueError(f"hidden: got {hidden!r}, expected 'copy' or 'split'")
        self.num_tasks, self.gate, self.experts, self.hidden = num_tasks, gate, experts, hidden
        self.k = resolve_k(gate, experts, k)
        self.options = {"gate": gate, "gate_args": dict(gate_args or {}), "experts": experts, "k": k, "hidden": hidden}
        if hidden == "split" and self.k != experts:
            raise ValueError(
                f"hidden: 'split' computes what the dense model did only when every expert is used; got k={self.k} of "
                f"{experts} experts. Use k={experts}, or hidden='copy'"
            )
        # a softmax over all experts: the weights of the chosen add up to less
        chosen = "normalize" in inspect.signature(GATES[gate]).parameters
        self.gate_args: dict[str, Any] = {"normalize": "detached"} if chosen else {}
        if hidden == "split" and chosen:
            self.gate_args["noise_std"] = 0.0  # noise would make the weights unequal in training
        self.gate_args |= gate_args or {}

    def __call__(self, weights: Weights, options: Mapping[str, Any]) -> MoE:
        """The layer of an MLP.

        Args:
            weights: {w1 [(1|2)h, d], b1, w2 [d_out, h], b2} of the MLP.
            options: keyword arguments of an `ExpertBank` with such experts.

        Raises:
            ValueError: hidden units do not split evenly, or the gate cannot make equal experts act as the MLP.
        """
        options, experts = dict(options), self.experts
        if self.hidden == "split" and options["hidden"] % experts:
            raise ValueError(f"experts: {options['hidden']} hidden units do not split into {experts} equal experts")
        router = create_gate(self.gate, options["dim"], experts, self.num_tasks, self.k, **self.gate_args)
        if self.hidden == "split":
            router.zero_scores()
        _check_exact(self.gate, router, self.hidden)
        if self.hidden == "split":
            weights, options = _split(weights, options, experts)
        else:
            weights = {name: w if w is None else w.expand(experts, *w.shape) for name, w in weights.items()}
        w1 = weights["w1"]
        assert w1 is not None
        with w1.device:  # unless the bank is to have shapes alone
            bank = ExpertBank(experts, **options).to(w1.dtype)
        with torch.no_grad():
            for name, w in weights.items():
                if w is not None:
                    getattr(bank, name).copy_(w)
        return MoE(router.to(w1.device), bank)


def _check_exact(name: str, router: Gate, hidden: str) -> None:
    """Refuses a gate with which equal experts do not act as the MLP they come from.

    Raises:
        ValueError: its weights do not sum to 1, or tasks cannot see all experts that a "split" needs.
    """
    if not router.shares_out:
        raise ValueError(
            f"gate: the weights of {name!r} with {router.num_experts} experts do not sum to 1; take another gate"
        )
    for task in range(router.num_tasks if hidden == "split" else 0):
        seen = router.reachable(task)
        if seen is not None and len(seen) < router.num_experts:
            raise ValueError(
                f"hidden: 'split' needs every expert, but with gate {name!r} task {task} sees {len(seen)} of "
                f"{router.num_experts}; use hidden='copy'"
            )


def chosen_blocks(count: int, every: int, blocks: Sequence[int] | None) -> list[int]:
    """The numbers, ascending, of the blocks that get experts; arguments as in `moefy`.

    Raises:
        ValueError: `every` or `blocks` is out of range for a backbone of `count` blocks, or `blocks` is empty.
    """
    if blocks is None:
        if not hasattr(every, "__index__") or not 1 <= every <= count:
            raise ValueError(f"every: got {every!r}, expected 1 to {count} for a backbone of {count} blocks")
        return list(range(every - 1, count, every))
    numbers = list(blocks) if isinstance(blocks, Iterable) else []
    if not numbers or not all(hasattr(i, "__index__") and -count <= i < count for i in numbers):
        raise ValueError(
            f"blocks: got {blocks!r}, expected a list of block numbers from {-count} to {count - 1}: the backbone has "
            f"{count} blocks"
        )
    return sorted({i % count for i in numbers})


@torch.no_grad()
def agrees(mlp: Callable[[Tensor], Tensor], weights: Weights, options: dict[str, Any]) -> bool:
    """Whether an expert with these weights computes what the MLP does, on a few random tokens."""
    w1, generator = weights["w1"], torch.Generator().manual_seed(0)
    assert w1 is not None
    x = torch.randn(1, 9, options["dim"], generator=generator).to(w1)
    single = [None if w is None else w.unsqueeze(0) for w in weights.values()]
    gates, plan = x.new_ones(9, 1), plan_routing(torch.zeros(9, 1, dtype=torch.int64, device=x.device), 1)
    ours = moe_mlp(x[0], *single, gates, plan, activation=options["activation"], glu=options["glu"])  # type: ignore[arg-type]
    theirs = mlp(x)[0]
    rounding = 5e-2 if x.element_size() == 2 else 1e-3
    return theirs.shape == ours.shape and bool((ours - theirs).norm() <= rounding * theirs.norm() + 1e-12)


def detached(w: Tensor | None) -> Tensor | None:
    return None if w is None else w.detach()


def activation_of(act: Callable[[Tensor], Tensor]) -> str | None:
    # told by what it computes: timm has several classes for one function
    probe = torch.linspace(-4, 4, 33, dtype=torch.float32)
    with torch.no_grad():
        y = act(probe.clone())
    for name in ("gelu", "silu", "relu"):
        if torch.equal(y, getattr(nn.functional, name)(probe)):
            return name
    return None


def _split(weights: Weights, options: dict[str, Any], experts: int) -> tuple[Weights, dict[str, Any]]:
    """Deals hidden units out over experts; the second layer is scaled so that equal weights 1/E add up to the MLP."""
    glu, h = options["glu"], options["hidden"] // experts

    def deal(w: Tensor | None) -> Tensor | None:  # [(1|2) e h, ...] -> [e, (1|2) h, ...]
        if w is None:
            return None
        parts = w.unflatten(0, (2 if glu else 1, experts, h)).transpose(0, 1)
        return parts.flatten(1, 2)

    w2, b2 = weights["w2"], weights["b2"]
    assert w2 is not None
    split: Weights = {
        "w1": deal(weights["w1"]),
        "b1": deal(weights["b1"]),
        "w2": w2.unflatten(1, (experts, h)).transpose(0, 1) * experts,
        "b2": None if b2 is None else b2.expand(experts, -1),
    }
    return split, {**options, "hidden": h}
