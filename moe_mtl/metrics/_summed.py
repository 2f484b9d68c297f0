"""What metrics of running sums share."""

import torch
from torch import Tensor
from torchmetrics import Metric


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole in float64, NaN where whole is 0."""
    return part.double() / torch.where(whole > 0, whole.double(), float("nan"))


class Summed(Metric):
    """Base of metrics whose states are sums: no gradient, one `update` a batch.

    `state_group` names metrics whose states and `update` are the same, so that a task using several computes them once.
    """

    state_group: str | None = None
    full_state_update = False
    is_differentiable = False

    def add_sums(self, *names: str, size: int | None = None, dtype: torch.dtype = torch.float64) -> None:
        """Adds zero states of shape [] or [size]; float64, since float32 loses counts above 16.7 million."""
        for name in names:
            self.add_state(name, torch.zeros(() if size is None else size, dtype=dtype), dist_reduce_fx="sum")
