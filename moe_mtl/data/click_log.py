"""Click log: a generated log of impressions with a known conversion model and actions of very different rates.

Users and items are latent vectors; an exposure policy prefers popular items; every action is drawn from a known
probability. Conversions happen after clicks alone, so a model trained on clicked rows sees a biased sample (ESMM); actions
from common to rare let rare tasks be taken over by common ones (PLE's seesaw, HoME's underfitting).

Inspired by the settings of Ma et al. 2018 (ESMM, https://arxiv.org/abs/1804.07931) and Wang et al. 2024 (HoME,
https://arxiv.org/abs/2408.05430), whose logs are not public; the generator is ours.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moe_mtl.data._frames import Source, TableData, generated_parts
from moe_mtl.tasks import Task

ACTIONS = {"like": 0.05, "share": 0.01, "follow": 0.005}  # rate over all impressions
AUC = {"auc": {}, "log_loss": {}}


@dataclass(frozen=True, kw_only=True)
class _Log:
    """What both sets draw from.

    Attributes:
        num_users: users.
        num_items: items; their exposure falls with their rank as 1 / rank.
        latent: numbers that describe a user or an item.
        num_train: training impressions.
        num_val: validation impressions.
        num_test: test impressions.
        seed: of everything.
    """

    num_users: int = 2_000
    num_items: int = 500
    latent: int = 8
    num_train: int = 60_000
    num_val: int = 10_000
    num_test: int = 20_000
    seed: int = 0


@dataclass
class Impressions:
    """Drawn impressions.

    Attributes:
        user: ids [n].
        item: ids [n].
        part: split of every row.
        users: vectors [users, latent].
        items: vectors [items, latent].
        context: what else is known of an impression [n, 4].
        generator: goes on from here.
    """

    user: NDArray
    item: NDArray
    part: NDArray
    users: NDArray
    items: NDArray
    context: NDArray
    generator: np.random.Generator

    def affinity(self, kind: int, common: float) -> NDArray:
        """How much a user likes an item in one respect, of unit variance: a part that all respects share, and its own.

        Args:
            kind: number of the respect.
            common: share of the variance that is common to all respects, 0 to 1.
        """
        own = np.random.default_rng([kind, 7])
        latent = self.users.shape[1]

        def match(weight: NDArray) -> NDArray:
            return ((self.users @ weight)[self.user] * self.items[self.item]).sum(axis=1) / latent**0.5

        shared = match(np.linalg.qr(np.random.default_rng(7).standard_normal((latent, latent)))[0])
        single = match(np.linalg.qr(own.standard_normal((latent, latent)))[0]) + 0.5 * self.context @ own.standard_normal(4)
        single, shared = ((z - z.mean()) / z.std() for z in (single, shared))
        return np.sqrt(common) * shared + np.sqrt(1 - common) * single

    def frame(self):
        """User, item and context as columns; vectors are not told."""
        import pandas

        context = {f"context{i}": self.context[:, i] for i in range(self.context.shape[1])}
        return pandas.DataFrame({"user": self.user, "item": self.item, **context})


def draw_impressions(log: _Log) -> Impressions:
    """Users, items and which of them met."""
    generator = np.random.default_rng(log.seed)
    part = generated_parts(log.num_train, log.num_val, log.num_test)
    users, items = (generator.standard_normal((n, log.latent)) for n in (log.num_users, log.num_items))
    exposure = 1 / np.arange(1, log.num_items + 1)
    user = generator.integers(log.num_users, size=len(part))
    item = generator.choice(log.num_items, size=len(part), p=exposure / exposure.sum())
    return Impressions(user, item, part, users, items, generator.standard_normal((len(part), 4)), generator)


def offset_for(scores: NDArray, rate: float) -> float:
    """The number to add to logits so that their mean probability is the rate."""
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sigmoid(scores + middle).mean() < rate else (low, middle)
    return (low + high) / 2


def sigmoid(z: NDArray) -> NDArray:
    """1 / (1 + e^-z)."""
    return 1 / (1 + np.exp(-z))


@dataclass(frozen=True, kw_only=True)
class EntireSpaceLog(_Log, TableData):
    """Impressions, clicks, and conversions after clicks, whose probability is known for every impression.

    Tasks: `click`; `conversion` given a click, labelled in clicked rows of the training and validation split alone and
    not trained by itself (weight 0); `click_and_conversion`. In the test split `conversion` is labelled for every
    impression by a draw from its known probability: what a click would have led to. Inputs: user, item, four numbers.

    Attributes:
        click_rate: mean probability of a click.
        conversion_rate: mean probability of a conversion, given a click, over all impressions.
        bias: correlation of the tastes behind clicks and conversions, -1 to 1: above 0 clicked rows convert more often
            than others would.

    Raises:
        ValueError: a rate is not between 0 and 1, or the bias not from -1 to 1.
    """

    click_rate: float = 0.1
    conversion_rate: float = 0.1
    bias: float = 0.6

    def __post_init__(self):
        for name in ("click_rate", "conversion_rate"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected between 0 and 1")
        if not -1 <= self.bias <= 1:
            raise ValueError(f"bias: got {self.bias}, expected -1 to 1")

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
                Task.binary("conversion", weight=0.0, metrics=AUC),
                Task.binary("click_and_conversion", metrics=AUC),
            ),
            kinds={"user": "categorical", "item": "categorical"},
        )


@dataclass(frozen=True, kw_only=True)
class ClickLog(_Log, TableData):
    """Impressions with actions from common to rare and two measures of watching: tasks of two categories.

    Tasks: interactions `click` and the actions of `rates`; watching `long_view`, binary, and `watch_time`, a regression
    of the logarithm of seconds. Every task has a taste of its own and one shared with all; those of a category share more.

    Attributes:
        click_rate: share of impressions with a click.
        rates: of the further actions.
        common: share of the variance of tastes that all tasks have in common, 0 to 1.
    """

    click_rate: float = 0.2
    rates: dict[str, float] = field(default_factory=lambda: dict(ACTIONS))
    common: float = 0.3

    def categories(self) -> list[list[str]]:
        """The names of the tasks by category: interaction and watching."""
        return [["click", *self.rates], ["long_view", "watch_time"]]

    def source(self) -> Source:
        """Draws the log."""
        log = draw_impressions(self)
        interaction, watching = log.affinity(1, self.common), log.affinity(2, self.common)
        labels, tasks = {}, []
        for i, (name, rate) in enumerate({"click": self.click_rate, **self.rates}.items()):
            z = 2.0 * (0.7 * interaction + 0.7 * log.affinity(10 + i, self.common))
            labels[name] = (log.generator.random(len(z)) < sigmoid(z + offset_for(z, rate))).astype(np.float64)
            tasks.append(Task.binary(name, metrics=AUC))
        z = 2.0 * watching
        labels["long_view"] = (log.generator.random(len(z)) < sigmoid(z + offset_for(z, 0.3))).astype(np.float64)
        labels["watch_time"] = 2.0 + 0.8 * watching + 0.5 * log.generator.standard_normal(len(z))
        own = labels["watch_time"][log.part == "train"]
        tasks += [
            Task.binary("long_view", metrics=AUC),
            Task.regression("watch_time", mean=float(own.mean()), std=float(own.std())),
        ]
        kinds = {"user": "categorical", "item": "categorical"}
        return Source(features=log.frame(), labels=labels, part=log.part, tasks=tuple(tasks), kinds=kinds)
