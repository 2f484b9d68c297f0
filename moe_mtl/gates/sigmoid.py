"""Sigmoid gate: every expert has a weight of its own between 0 and 1, whatever the others have.

Paper: Wang et al. 2024, HoME, https://arxiv.org/abs/2408.05430 (the self-gate of a group with a single expert).
Differs: the router has a bias, zero to begin with, so that weights start around 1/2.
"""

from torch import Tensor

from moe_mtl.gates.softmax import SoftmaxGate


class SigmoidGate(SoftmaxGate):
    """Weights sigma(W_t x + c_t) of all experts, or of those that the task can see; arguments as in `SoftmaxGate`.

    Weights do not sum to 1, and after dropout those left are what they were. The softmax of a `Routing`'s logits, which
    balancing losses read, is not its weights.
    """

    shares_out = False

    def weigh(self, logits: Tensor) -> Tensor:
        """Weights [m, e] of logits [m, e]."""
        return logits.sigmoid()

    def drop(self, weights: Tensor, kept: Tensor) -> Tensor:
        """Weights [m, e] with those not kept at zero."""
        return weights * kept
