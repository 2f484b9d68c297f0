"""Single-task models out of multi-task ones."""

from collections.abc import Sequence

from moe_mtl.multitask import MultiTaskModel, SingleTaskSet


def extract(model: MultiTaskModel | SingleTaskSet, tasks: Sequence[str] | str) -> MultiTaskModel | SingleTaskSet:
    """An independent model for some of the tasks: their routers and heads, the shared layers and experts, nothing else.

    Exact: it computes what `model(x, tasks=...)` computes. It is a model like any other: it runs, trains, compiles,
    exports, saves and loads.

    Args:
        model: a multi-task model, or a set of single-task models.
        tasks: one task name or several, in the order the new model shall have.

    Raises:
        ValueError: an unknown task; the nearest names are listed.
    """
    return model.for_tasks(tasks)
