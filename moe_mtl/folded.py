"""Layers with nothing left to decide, of one task whose weights no token changes: gates go, an MoE is one dense MLP."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_mtl.experts import ExpertBank
from moe_mtl.gates._constant import constant_of
from moe_mtl.layers import ContextMoE, MoE
from moe_mtl.levels import Level
from moe_mtl.routing import Routing, TaskIds


class FoldedMoE(MoE):
    """The experts of a task side by side as one MLP, their weights multiplied into its second layer.

    sum_j g_j (W2_j act(W1_j x + b1_j) + b2_j) is W2 act(W1 x + b1) + b2 with the W1_j and b1_j stacked, W2 the g_j W2_j
    side by side and b2 = sum_j g_j b2_j. No token is scored or dispatched; what the gate said is kept for pictures.

    Args:
        moe: a layer of one task whose gate decides by the task alone, in evaluation; it is left as it is.

    Attributes:
        gate: a `ConstantGate`, without parameters.
        experts: a bank of one, the MLP.

    Raises:
        ValueError: the layer serves several tasks, or its gate reads the tokens.
    """

    def __init__(self, moe: MoE):
        nn.Module.__init__(self)
        gate = constant_of(moe.gate)
        if gate is None or gate.num_tasks != 1:
            raise ValueError(
                f"moe: got a {type(moe.gate).__name__} of {moe.gate.num_tasks} tasks; only the layer of one task whose "
                "gate does not read the tokens can be folded"
            )
        self.gate, self.experts = gate, fold(moe.experts, gate.weights[0][moe.kept_experts])
        self.train(moe.training)

    def forward(
        self, x: Tensor, task: TaskIds | None, valid: Tensor | None = None, group: int | None = None
    ) -> tuple[Tensor, Routing]:
        """Outputs [m, d_out] of tokens [m, d], and the routing there was; see `MoE.forward`."""
        unused = None if valid is None else ~valid.unsqueeze(1)
        y = self.experts.alone(x if unused is None else x.masked_fill(unused, 0))
        return y if unused is None else y.masked_fill(unused, 0), self.gate(x, task, valid)

    def needed(self, tasks: Sequence[int] | None = None) -> list[int]:
        """Ids, ascending, of the experts the MLP was made of."""
        return self.kept_experts

    def keep_experts(self, ids: Sequence[int]) -> None:
        """Refuses other experts than those that are left: they are one MLP now.

        Raises:
            ValueError: `ids` are others.
        """
        if sorted(ids) != self.kept_experts:
            raise ValueError(f"ids: got {list(ids)}, but experts {self.kept_experts} are folded into one MLP")


@torch.no_grad()
def fold(bank: ExpertBank, weights: Tensor) -> ExpertBank:
    """A bank of one expert that computes what these experts do together.

    Args:
        bank: the experts.
        weights: of each of them, [e].
    """
    w1, b1, w2, b2 = bank._weights()
    parts = 1 + bank.glu  # with a GLU the first halves of all experts come first
    rows = w1.unflatten(1, (parts, bank.hidden)).transpose(0, 1).flatten(0, 2)
    wide = bank.num_experts * bank.hidden
    how: dict[str, Any] = {"out_dim": bank.out_dim, "activation": bank.activation, "glu": bank.glu}
    with torch.device(w1.device), torch.random.fork_rng(devices=[]):
        one = ExpertBank(1, bank.dim, wide, bias=b1 is not None, **how).to(w1.dtype)
    share = weights.to(w2.device).double()  # of shapes alone where the weights stay in a file
    one.w1[0] = rows
    one.w2[0] = (w2.double() * share[:, None, None]).transpose(0, 1).flatten(1).to(w2.dtype)
    if b1 is not None and b2 is not None and one.b1 is not None and one.b2 is not None:
        one.b1[0] = b1.unflatten(1, (parts, bank.hidden)).transpose(0, 1).flatten()
        one.b2[0] = (b2.double() * share[:, None]).sum(0).to(b2.dtype)
    return one.requires_grad_(w1.requires_grad)


def fold_layers(model: Any, names: Sequence[str] | None = None) -> list[str]:
    """Takes away, in place, the gates of a model of one task that do not read the tokens; its routings stay.

    An `MoE` becomes one dense MLP, a `FoldedMoE`; the mixture of a `Level` gets constant weights. Which layers these
    are is recorded in `model.config["folded"]`.

    Args:
        model: in the mode that counts, evaluation: a gate's weights are taken as they are there.
        names: of the layers, by the key of their `Routing`; None for all that can be folded.

    Returns:
        The names of the layers that are folded now, also those that were before.
    """
    layers = model.moe_layers
    able = [name for name, layer in layers.items() if layer.gate.compute_class == "task" and len(model.tasks) == 1]
    chosen = able if names is None else list(names)
    for module in model.modules():
        if isinstance(module, ContextMoE) and module.name in chosen and not isinstance(module.moe, FoldedMoE):
            module.moe = FoldedMoE(module.moe)
    for name in chosen:
        if isinstance(layers[name], Level):
            layers[name].gate = constant_of(layers[name].gate)
    config: dict[str, Any] | None = getattr(model, "config", None)
    if config is not None and chosen:
        config["folded"] = chosen
    return chosen
