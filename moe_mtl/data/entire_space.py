"""Entire-space log: impressions, clicks and conversions after clicks, whose probability is known for every impression.

A model of conversions that is trained on clicked rows sees a biased sample of the impressions it is used on.

Inspired by the setting of Ma et al. 2018 (ESMM, https://arxiv.org/abs/1804.07931), whose log is not this one; the
generator is ours.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_mtl.data._frames import Source, TableData
from moe_mtl.data._impressions import AUC, Impressions, Log, draw_impressions, offset_for, sigmoid
from moe_mtl.tasks import Task


@dataclass(frozen=True, kw_only=True)
class EntireSpaceLog(Log, TableData):
    """Impressions, clicks, and conversions after clicks, whose probability is known for every impression.

    Tasks: `click`; `conversion` given a click, labelled in clicked rows of the training and validation split alone;
    `click_and_conversion`. In the test split `conversion` is labelled for every
    impression by a draw from its known probability: what a click would have led to. Inputs: user, item, four numbers.

    Attributes:
        click_rate: mean probability of a click.
        conversion_rate: mean probability of a conversion, given a click, over all impressions.
        bias: correlation of the tastes behind clicks and conversions, -1 to 1: above 0 clicked rows convert more often
            than others would.
        conversion_weight: of the loss of `conversion`. 0 for models that learn it through the other two tasks; 1 for
            one that is trained on clicked rows.

    Raises:
        ValueError: a rate is not between 0 and 1, the bias not from -1 to 1, or the weight negative.
    """

    click_rate: float = 0.1
    conversion_rate: float = 0.1
    bias: float = 0.6
    conversion_weight: float = 0.0

    def __post_init__(self):
        for name in ("click_rate", "conversion_rate"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected between 0 and 1")
        if not -1 <= self.bias <= 1:
            raise ValueError(f"bias: got {self.bias}, expected -1 to 1")
        if self.conversion_weight < 0:
            raise ValueError(f"conversion_weight: got {self.conversion_weight}, expected at least 0")

    def probabilities(self) -> tuple[Impressions, NDArray, NDArray]:
        """The impressions, and the true probability of a click and of a conversion given a click, [n] each."""
        log = draw_impressions(self)
        first, second = log.affinity(1, 0.0), log.affinity(2, 0.0)
        taste = self.bias * first + np.sqrt(1 - self.bias**2) * second
        logits = [2.0 * first, 2.0 * taste]
        rates = (self.click_rate, self.conversion_rate)
        p_click, p_conversion = (sigmoid(z + offset_for(z, rate)) for z, rate in zip(logits, rates, strict=True))
        return log, p_click, p_conversion

    def source(self) -> Source:
        """Draws the log."""
        log, p_click, p_conversion = self.probabilities()
        draws = log.generator.random((2, len(log.part)))
        click = (draws[0] < p_click).astype(np.float64)
        would = (draws[1] < p_conversion).astype(np.float64)
        seen = (click == 1) | (log.part == "test")
        return Source(
            features=log.frame(),
            labels={"click": click, "conversion": np.where(seen, would, np.nan), "click_and_conversion": click * would},
            part=log.part,
            tasks=(
                Task.binary("click", metrics=AUC),
                Task.binary("conversion", weight=self.conversion_weight, metrics=AUC),
                Task.binary("click_and_conversion", metrics=AUC),
            ),
            kinds={"user": "categorical", "item": "categorical"},
        )
