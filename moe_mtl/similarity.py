"""How near a new task is to those a model knows, measured on a few dozen samples of each.

    task_similarity(model, Task.classification("banking", 77), data)     # {"snips_slots": 0.71, "snips_intent": 0.68}

Paper: Achille et al. 2019, Task2Vec, https://arxiv.org/abs/1902.03545, and Vu et al. 2020, TaskEmb,
    https://arxiv.org/abs/2005.00770 (by Fisher: a task is the diagonal of the Fisher information of a network's
    weights, a head fitted before); Fifty et al. 2021, TAG, https://arxiv.org/abs/2109.04617 (by gradient: tasks are
    near when a step on one lowers the loss of the other); Vu et al. 2020, TextEmb (by embedding: a task is the mean
    over its samples of an encoder's pooled output). Tasks compare by cosine.
Differs: the network is the multi-task model itself, and the new task takes the route of the task it is compared with;
    the embedding is the mean over the routes of all tasks. Fisher: squares of the gradients of small batches, with the
    labels there are, no average over filters; roots of them are compared, which a few weights do not decide alone.
    Gradient: TAG's affinity to first order without its scale, at the end of the training instead of all along it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from moe_mtl.batches import shuffled
from moe_mtl.data import collate, pad_batch
from moe_mtl.heads import Features
from moe_mtl.multitask import MultiTaskModel, evaluating, move
from moe_mtl.samples import has_label, read_training
from moe_mtl.tasks import Task, nearest
from moe_mtl.vector import VectorModel

Routed = MultiTaskModel | VectorModel

By = Literal["fisher", "gradient", "embedding"]
Batches = list[dict[str, Any]]
Head = Callable[[Features], Tensor]


def task_similarity(
    model: Routed,
    task: Task,
    data: Any,
    *,
    by: By = "fisher",
    samples: int = 64,
    batch_size: int = 8,
    head_steps: int = 60,
    head_lr: float = 1e-3,
    seed: int = 0,
) -> dict[str, float]:
    """How near a task is to each task of a model. The model stays as it is, and so do the random generators.

    "fisher": the cosine between the root mean squares of the tasks' gradients, over batches, for the weights that all
    tasks share, which are neither heads nor gates. It tells whether the same weights matter to both. "gradient": the
    cosine between the mean gradients themselves. It tells whether a step on one task would help the other, and is
    mostly noise once the model has learned its tasks. For each known task both gradients are taken along its route; the
    new task's head is first trained on the features this route gives its samples, since a random head's gradient says
    little.

    "embedding": the cosine between the mean pooled features of the tasks' samples. It is cheap and looks at inputs
    alone: tasks that are labelled on the same inputs are equally near.

    Args:
        model: knows tasks.
        task: the new one; it need not be in the model, and is not compared with itself where it is.
        data: samples by number, dicts of an input and labels: a list, a split of `moe_mtl.data`, any map-style data
            set; or a data set of `moe_mtl.data`, of which "train" is taken, a table's with the model's columns. A task
            of the model that no sample has a label of is left out.
        by: "fisher", "gradient" or "embedding".
        samples: of each task at most, drawn at random.
        batch_size: samples per pass.
        head_steps: updates of the new task's head, a batch each.
        head_lr: learning rate of these.
        seed: of the draw and of the head.

    Returns:
        {task of the model: value from -1 to 1, from 0 for "fisher"}, nearest first.

    Raises:
        ValueError: an unknown `by`, a number out of range, or data that are no samples, or without samples of the new
            task or of any other.
    """
    if by not in get_args(By):
        raise ValueError(f"by: unknown {by!r}; {nearest(str(by), get_args(By))}")
    for name, value in (("samples", samples), ("batch_size", batch_size), ("head_steps", head_steps)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    known = [one for one in model.tasks if one.name != task.name]
    found = draw(read_training(model, data, "data"), [task, *known], samples, seed)
    for names in ([task.name], [one.name for one in known]):
        if not any(name in found for name in names):
            raise ValueError(
                f"data: no sample has a label of {' or '.join(names) or 'another task'}; pass samples of the new task "
                "and of tasks of the model"
            )
    device = next(model.parameters()).device
    batches = {
        one.name: [move(batch, device) for batch in _batches(model, found[one.name], one, batch_size)]
        for one in (task, *known)
        if one.name in found
    }
    new, values = batches.pop(task.name), {}
    with torch.random.fork_rng(), evaluating(model):
        if by == "embedding":
            own = mean_features(model, new)
            values = {name: cosine([own], [mean_features(model, theirs)]) for name, theirs in batches.items()}
        else:
            for route, one in enumerate(model.tasks):
                if one.name in batches:
                    torch.manual_seed(seed)
                    head = fit_head(model, task, new, route, head_steps, head_lr)
                    ours = shared_gradient(model, task, new, head, route, squared=by == "fisher")
                    head = model.head(one.name)
                    theirs = shared_gradient(model, one, batches[one.name], head, route, squared=by == "fisher")
                    values[one.name] = cosine(ours, theirs)
    return dict(sorted(values.items(), key=lambda pair: -pair[1]))


# ---- samples --------------------------------------------------------------------------------------------------------


def draw(data: Any, tasks: Sequence[Task], count: int, seed: int) -> dict[str, list[Mapping[str, Any]]]:
    """Samples with a label of each of these tasks, so many at most, in random order; tasks without any are left out."""
    order = shuffled(len(data), seed, 0)
    found: dict[str, list[Mapping[str, Any]]] = {task.name: [] for task in tasks}
    if hasattr(data, "labelled"):  # the data set knows which without making every sample
        for name, rows in found.items():
            has = set(data.labelled(name))
            rows += [data[i] for i in [i for i in order if i in has][:count]]
    else:
        for i in order:
            sample = data[i]
            for task in tasks:
                if len(found[task.name]) < count and has_label(sample, task):
                    found[task.name].append(sample)
            if all(len(rows) == count for rows in found.values()):
                break
    return {name: rows for name, rows in found.items() if rows}


def _batches(model: Routed, rows: Sequence[Mapping[str, Any]], task: Task, size: int) -> Batches:
    parts = [rows[at : at + size] for at in range(0, len(rows), size)]
    if model.input != "text":
        return [collate(part, [task], inputs=(model.input,)) for part in parts]
    pad = getattr(getattr(model.backbone, "config", None), "pad_token_id", None) or 0
    return [pad_batch(part, [task], pad) for part in parts]


# ---- what is compared -----------------------------------------------------------------------------------------------


@torch.no_grad()
def mean_features(model: Routed, batches: Batches) -> Tensor:
    """The mean over samples and over the routes of all tasks of the pooled features, float64 [d]."""
    ids = tuple(range(len(model.tasks))) if len(model.tasks) > 1 else 0
    pooled = [model.features(batch[model.input], ids)[0].pooled.double() for batch in batches]
    return torch.stack([rows.sum(dim=0) for rows in pooled]).sum(dim=0) / sum(len(rows) for rows in pooled)


def fit_head(model: Routed, task: Task, batches: Batches, route: int, steps: int, lr: float) -> nn.Module:
    """A head for a task, trained for so many updates on the features that the route of another gives its samples."""
    with torch.no_grad():
        seen = [(model.features(batch[model.input], route)[0], batch[task.name]) for batch in batches]
    head = model.fresh_head(task)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr)
    with torch.enable_grad():
        for step in range(steps):
            features, target = seen[step % len(seen)]
            optimizer.zero_grad()
            task.compute_loss(head(features), target).backward()
            optimizer.step()
    return head


def shared_parameters(model: Routed) -> list[nn.Parameter]:
    """The parameters that neither a head nor a gate holds."""
    gates = [gate for layer in model.moe_layers.values() for gate in (layer.gate, getattr(layer, "own", None)) if gate]
    own = {id(p) for gate in gates for p in gate.parameters()}
    own |= {id(p) for task in model.tasks for p in model.own_parameters(task.name)}
    return [p for p in model.parameters() if id(p) not in own]


def shared_gradient(
    model: Routed, task: Task, batches: Batches, head: Head, route: int, *, squared: bool
) -> list[Tensor]:
    """The gradient for the shared parameters of a task's loss, its samples on the route of a task of the model.

    The mean over batches, each by its share of the samples; with `squared` the root of the mean of squares.
    """
    shared, samples = shared_parameters(model), sum(len(batch[task.name]) for batch in batches)
    total = [torch.zeros_like(p) for p in shared]
    with torch.enable_grad(), _learning(shared):
        for batch in batches:
            loss = task.compute_loss(head(model.features(batch[model.input], route)[0]), batch[task.name])
            share = len(batch[task.name]) / samples
            for mine, found in zip(total, torch.autograd.grad(loss, shared, allow_unused=True), strict=True):
                if found is not None:
                    mine.add_(found.square() if squared else found, alpha=share)
    return [mine.sqrt() for mine in total] if squared else total


@contextmanager
def _learning(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Lets parameters that were frozen take gradients for a while."""
    before = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, learns in zip(parameters, before, strict=True):
            p.requires_grad_(learns)


def cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The cosine between two vectors given in pieces; 0 where one of them is zero."""

    def product(p: Sequence[Tensor], q: Sequence[Tensor]) -> float:
        return sum(float((x.double() * y.double()).sum()) for x, y in zip(p, q, strict=True))

    length = (product(a, a) * product(b, b)) ** 0.5
    return product(a, b) / length if length else 0.0
