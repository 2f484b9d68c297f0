"""EarlyStopping: the weights of the lowest validation loss so far, and when to give up on a lower one."""

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class EarlyStopping:
    """Watches the validation loss of a model in training.

    Args:
        model: in training. Weights are kept of what learns, and of buffers.
        patience: evaluations in a row that may bring no lower loss.

    Attributes:
        lowest: loss so far.
        step: updates done when it was measured.
        waited: evaluations since that had a loss.
    """

    def __init__(self, model: nn.Module, patience: int):
        self.model, self.patience = model, patience
        self.lowest, self.step, self.waited = math.inf, 0, 0
        self.weights: dict[str, Tensor] = {}

    @property
    def over(self) -> bool:
        """Whether patience is."""
        return self.waited >= self.patience

    def update(self, step: int, losses: Collection[float]) -> None:
        """Takes note of the mean loss of an evaluation after so many updates. Where it is no number, nothing counts."""
        loss = sum(losses) / len(losses) if losses else math.nan
        if math.isnan(loss):
            return
        if loss < self.lowest:
            self.lowest, self.step, self.waited = loss, step, 0
            self.weights = {name: tensor.detach().clone() for name, tensor in self._changing()}
        else:
            self.waited += 1

    def restore(self) -> None:
        """Gives the model the weights of the lowest loss, if one was measured."""
        self._write(self.weights)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The same for a while; the model then goes on with what it had."""
        now = {name: tensor.detach().clone() for name, tensor in self._changing()}
        self.restore()
        try:
            yield
        finally:
            self._write(now)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data, for a checkpoint."""
        return {"lowest": self.lowest, "step": self.step, "waited": self.waited, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.lowest, self.step, self.waited = state["lowest"], state["step"], state["waited"]
        self.weights = dict(state["weights"])

    def _changing(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        yield from self.model.named_buffers()

    @torch.no_grad()
    def _write(self, weights: Mapping[str, Tensor]) -> None:
        for name, tensor in self._changing():
            if name in weights:
                tensor.copy_(weights[name])
