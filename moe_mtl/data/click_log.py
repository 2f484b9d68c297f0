"""Click log: a generated log of impressions with actions from common to rare and measures of watching.

Rare tasks may be taken over by common ones: PLE's seesaw, HoME's underfitting.

Inspired by the setting of Wang et al. 2024 (HoME, https://arxiv.org/abs/2408.05430), whose log is not public; the
generator is ours.
"""

from dataclasses import dataclass, field

import numpy as np

from moe_mtl.data._frames import Source, TableData
from moe_mtl.data._impressions import AUC, Log, draw_impressions, offset_for, sigmoid
from moe_mtl.tasks import Task

ACTIONS = {"like": 0.05, "share": 0.01, "follow": 0.005}  # rate over all impressions


@dataclass(frozen=True, kw_only=True)
class ClickLog(Log, TableData):
    """Impressions with actions from common to rare and two measures of watching: tasks of two categories.

    Tasks: interactions `click` and the actions of `rates`; watching `long_view`, binary, and `watch_time`, a regression
    of the logarithm of seconds. Every task has a taste of its own and one shared with all; those of a category share
    more.

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
