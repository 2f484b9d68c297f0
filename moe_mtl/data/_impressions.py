"""Impressions: users and items as latent vectors and who met whom, the ground of the generated logs."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_mtl.data._frames import generated_parts

AUC = {"auc": {}, "log_loss": {}}


@dataclass(frozen=True, kw_only=True)
class Log:
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
        single = match(
            np.linalg.qr(own.standard_normal((latent, latent)))[0]
        ) + 0.5 * self.context @ own.standard_normal(4)
        single, shared = ((z - z.mean()) / z.std() for z in (single, shared))
        return np.sqrt(common) * shared + np.sqrt(1 - common) * single

    def frame(self):
        """User, item and context as columns; vectors are not told."""
        import pandas

        context = {f"context{i}": self.context[:, i] for i in range(self.context.shape[1])}
        return pandas.DataFrame({"user": self.user, "item": self.item, **context})


def draw_impressions(log: Log) -> Impressions:
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
