"""Balancers: how the losses of several tasks become one step. One method per file; `BALANCERS` is the catalogue."""

import inspect
from collections.abc import Sequence
from typing import Any

from moe_mtl.balancing._balancer import Balancer
from moe_mtl.balancing.equal import Equal
from moe_mtl.balancing.uncertainty import Uncertainty
from moe_mtl.tasks import Task, nearest

BALANCERS: dict[str, type[Balancer]] = {
    "equal": Equal,
    "uncertainty": Uncertainty,
}

__all__ = ["BALANCERS", "Balancer", "Equal", "Uncertainty", "create_balancer"]


def create_balancer(name: str, tasks: Sequence[Task], **args: Any) -> Balancer:
    """The balancer of that name for these tasks.

    Raises:
        ValueError: an unknown name or argument; the nearest are listed.
    """
    if name not in BALANCERS:
        raise ValueError(f"balancer: unknown {name!r}; {nearest(name, BALANCERS)}")
    known = [option for option in inspect.signature(BALANCERS[name]).parameters if option != "tasks"]
    for option in args:
        if option not in known:
            raise ValueError(f"{option}: balancer {name!r} has no such option; {nearest(option, known)}")
    return BALANCERS[name](tasks, **args)
