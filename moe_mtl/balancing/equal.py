"""Equal weighting: the sum of the losses, each times its `Task.weight`.

Paper: none; the control every method is compared with (also called scalarisation or EW).
Differs: a sum, not a mean over tasks, so that a task contributes the same whether or not others are present.
"""

from collections.abc import Mapping

from torch import Tensor

from moe_mtl.balancing._balancer import Balancer


class Equal(Balancer):
    """Constant weights."""

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """sum_t weight_t L_t over the tasks given."""
        self._check(losses)
        return sum(self._weight_of[name] * loss for name, loss in losses.items())  # type: ignore[return-value]

    def factors(self) -> dict[str, float]:
        """The weights of the tasks."""
        return dict(self._weight_of)
