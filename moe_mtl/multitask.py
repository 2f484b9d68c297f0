"""MultiTaskModel: a backbone with task-gated layers and one head per task, behind one call.

model(x)                         {task: prediction}, all tasks
model(x, tasks=["depth"])        only that pathway
model(x, tasks=ids)              int64 [b], one task per sample: {task: (rows, prediction)}
model(x, return_routing=True)    (predictions, {layer: Routing})
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from moe_mtl.heads import Features
from moe_mtl.hub_mixin import HubModel
from moe_mtl.images import AS_THEY_ARE, check_images
from moe_mtl.layers import ContextMoE, MoE, TaskContext
from moe_mtl.routing import Routing, TaskIds
from moe_mtl.tasks import Task, check_tasks, nearest

Predictions = dict[str, Any]


def task_ids(known: Sequence[Task], names: Sequence[str] | str, argument: str = "tasks") -> tuple[int, ...]:
    """Positions of task names; errors are about the argument of that name.

    Raises:
        ValueError: a name that is unknown (the nearest are listed) or given twice, or no name at all.
    """
    order = {task.name: i for i, task in enumerate(known)}
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise ValueError(f"{argument}: got an empty list; name at least one of {', '.join(order)}")
    for name in names:
        if name not in order:
            raise ValueError(f"{argument}: unknown task {name!r}; {nearest(str(name), order)}")
    if len(set(names)) < len(names):
        raise ValueError(f"{argument}: {names} names a task twice")
    return tuple(order[name] for name in names)


def check_new(known: Sequence[Task], task: Task, init_from: Sequence[str] | str | None) -> None:
    """Refuses a task whose name is taken, and nearness, which a model does not measure.

    Raises:
        ValueError: says which.
    """
    (task,) = check_tasks([task])
    names = [one.name for one in known]
    if task.name in names:
        raise ValueError(f"task: the model has a task {task.name!r}; choose another name, or rename that one")
    if init_from in ("nearest", "most_used") and init_from not in names:
        raise ValueError(
            f"init_from: what is {init_from} is measured on samples; call "
            f"moe_mtl.add_task(model, task, init_from={init_from!r}, data=samples)"
        )


def others(known: Sequence[Task], name: str) -> list[int]:
    """The ids of all tasks but one.

    Raises:
        ValueError: there is no such task, or no other.
    """
    (gone,) = task_ids(known, [name], "name")
    if len(known) == 1:
        raise ValueError(f"name: {name!r} is the model's only task; add another first")
    return [i for i in range(len(known)) if i != gone]


def renamed(known: Sequence[Task], old: str, new: str) -> tuple[Task, ...]:
    """The tasks, one of them with another name.

    Raises:
        ValueError: there is no such task, or the new name is taken or cannot be a name.
    """
    (i,) = task_ids(known, [old], "old")
    if new != old and new in [task.name for task in known]:
        raise ValueError(f"new: the model has a task {new!r}; choose another name, or rename that one first")
    return (*known[:i], replace(known[i], name=new), *known[i + 1 :])


def present_ids(x: Tensor, ids: Tensor, count: int) -> list[int]:
    """The distinct task ids of a batch, ascending.

    Raises:
        ValueError: not int64 [b], one per image of x, each 0..count-1; or an empty batch.
    """
    if ids.shape != x.shape[:1] or ids.dtype != torch.int64:
        raise ValueError(f"tasks: got {ids.dtype} ids {list(ids.shape)}; expected int64 [{len(x)}], one per image")
    present = ids.unique().tolist()
    if not present:
        raise ValueError("x: got an empty batch")
    if present[0] < 0 or present[-1] >= count:
        raise ValueError(f"tasks: ids {present[0]} to {present[-1]}, expected 0 to {count - 1}")
    return present


def as_dict(x: Any) -> Any:
    """An input with a plain dict in the place of any other mapping, such as what a tokenizer returns."""
    return x if isinstance(x, Tensor) or type(x) is dict or not isinstance(x, Mapping) else dict(x)


def select_rows(x: Any, rows: Tensor) -> Any:
    """Some of the samples of an input: a tensor [b, ...] or a mapping of them."""
    return tree_map(lambda t: t[rows.to(t.device)], as_dict(x))


def count_rows(x: Any) -> int:
    """How many samples an input has: a tensor [b, ...] or a mapping of them."""
    return tree_leaves(as_dict(x))[0].shape[0]  # len() would fix the number of rows in an exported model


def move(x: Any, device: torch.device | str) -> Any:
    """An input on a device: a tensor or a mapping of them."""
    return tree_map(lambda t: t.to(device), as_dict(x))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts every module in eval mode without gradients, and gives each its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


class MultiTaskModel(HubModel, nn.Module):
    """A backbone shared by tasks, with task-gated experts inside and one head per task.

    The part of the backbone before the first task-dependent layer runs once per image; from there on tasks are stacked
    along the batch, so that one call of each expert bank serves all of them. A single task is the same code with one.

    Args:
        backbone: takes images [b, c, h, w], or other inputs that `features` knows; its task-gated layers are
            `ContextMoE` and share `context`.
        tasks: what it predicts, in the order of the gates' ids.
        heads: one module per task name, `Features` to prediction.
        context: the context of the backbone's MoE layers.
        features: (backbone, inputs) to `Features`.
        fresh_head: makes the head of a task, which `add_task` needs.
    """

    def __init__(
        self,
        backbone: nn.Module,
        tasks: Sequence[Task],
        heads: Mapping[str, nn.Module],
        context: TaskContext,
        features: Callable[[nn.Module, Any], Features],
        fresh_head: Callable[[Task], nn.Module] | None = None,
    ):
        super().__init__()
        self.tasks = check_tasks(tasks)
        self.backbone = backbone
        self.heads = nn.ModuleDict({task.name: heads[task.name] for task in self.tasks})
        self.context = context
        self._features = features
        self._fresh_head = fresh_head

    input = "image"  # the key of a batch whose entry the model takes
    colours = AS_THEY_ARE  # what it expects of images, for whoever feeds it pictures; it scales nothing itself

    @property
    def moe_layers(self) -> dict[str, MoE]:
        """The task-gated layers, by the key of their `Routing`."""
        return {layer.name: layer.moe for layer in self.modules() if isinstance(layer, ContextMoE)}

    def features(self, x: Any, task: TaskIds) -> tuple[Features, dict[str, Routing]]:
        """Backbone features and routings.

        With a sequence of ids the features are stacked per task, [(t b), ...], when any layer depends on the task.
        """
        self.check_input(x)
        with self.context.open(task, self.valid_tokens(x)) as routings:
            return self._features(self.backbone, x), routings

    def forward(self, x: Any, tasks: Sequence[str] | Tensor | None = None, return_routing: bool = False):
        """Predicts.

        Args:
            x: images, float [b, c, h, w]; or what the model says it takes.
            tasks: names of the tasks to run, all when None; or int64 ids [b], one task per sample.
            return_routing: also return {layer: Routing}.

        Returns:
            {task: prediction}, shapes in `moe_mtl.tasks`; with ids per sample {task: (rows, prediction)}, where `rows`
            are the samples of that task, in order.

        Raises:
            ValueError: unknown tasks, ids out of range or not one per sample, or images of the wrong shape or dtype.
        """
        x = as_dict(x)
        if isinstance(tasks, Tensor):
            predictions, routings = self._forward_per_sample(x, tasks)
        else:
            ids = task_ids(self.tasks, tasks) if tasks is not None else tuple(range(len(self.tasks)))
            one, *others = ids
            features, routings = self.features(x, ids if others else one)
            rows = count_rows(x)
            stacked = features.pooled.shape[0] != rows
            predictions = {}
            for position, i in enumerate(ids):
                name = self.tasks[i].name
                own = features.select(slice(position * rows, (position + 1) * rows)) if stacked else features
                predictions[name] = self.heads[name](own)
        return (predictions, routings) if return_routing else predictions

    def _forward_per_sample(self, x: Any, ids: Tensor) -> tuple[Predictions, dict[str, Routing]]:
        leaf = tree_leaves(x)[0]
        present, ids = present_ids(leaf, ids, len(self.tasks)), ids.to(leaf.device)
        features, routings = self.features(x, ids)
        predictions = {}
        for i in present:
            rows = (ids == i).nonzero().flatten()
            name = self.tasks[i].name
            predictions[name] = (rows, self.heads[name](features.select(rows)))
        return predictions, routings

    def for_tasks(self, names: Sequence[str] | str) -> "MultiTaskModel":
        """An independent copy for these tasks alone: their routers and heads, the shared weights, nothing else."""
        ids = task_ids(self.tasks, names)
        gates = [layer.gate for layer in self.moe_layers.values()]
        memo: dict[int, Any] = {id(gate): gate.for_tasks(ids) for gate in gates}  # stand in for the originals
        heads = {self.tasks[i].name: copy.deepcopy(self.heads[self.tasks[i].name], memo) for i in ids}
        memo[id(self.heads)] = nn.ModuleDict(heads).train(self.heads.training)
        model: Any = copy.deepcopy(self, memo)
        model.tasks = tuple(self.tasks[i] for i in ids)
        model.note_experts()
        return model

    def add_task(self, task: Task, init_from: Sequence[str] | str | None = None) -> Self:
        """Adds a task, in place: a fresh head and, in every task-gated layer, a router of its own.

        Everything the model has stays the tensors it is: the other tasks keep their ids and compute what they did. The
        new one is served by the experts there are. An optimizer made before does not know its parameters.

        Args:
            task: of a new name.
            init_from: tasks of the model; the new routers start as the mean of theirs, for one task as a copy. Fresh
                when None. `moe_mtl.add_task` finds the nearest tasks.

        Returns:
            The model itself.

        Raises:
            ValueError: the name is taken; a task of `init_from` is unknown; routers that have no mean, or gates or a
                model that take no new task. The model is then as it was.
        """
        check_new(self.tasks, task, init_from)
        like = () if init_from is None else task_ids(self.tasks, init_from, "init_from")
        head = self.fresh_head(task)
        gates = dict.fromkeys(layer.gate for layer in self.moe_layers.values())
        for gate in gates:
            gate.check_like(like)
        for gate in gates:
            gate.add_task(like)
        self.heads[task.name] = head
        self.tasks = (*self.tasks, task)
        self.note_experts()
        return self

    def own_parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters that serve one task alone: its head, and its entries of the gates.

        Raises:
            ValueError: there is no such task.
        """
        (task,) = task_ids(self.tasks, [name], "name")
        found = self.head_parameters(name)
        for layer in self.moe_layers.values():
            parameters = dict(layer.gate.named_parameters())
            found += [parameters[entry] for entry in layer.gate.own_parameters(task)]
        return found

    def head_parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters of a task's head, in an order that heads of one shape share.

        Raises:
            ValueError: there is no such task.
        """
        task_ids(self.tasks, [name], "name")
        return list(self.heads[name].parameters())

    def fresh_head(self, task: Task) -> nn.Module:
        """A head for a task, as the model's own are made, on its device and in its mode; the model does not change.

        Raises:
            ValueError: the model does not know how, or takes no task of this kind.
        """
        if self._fresh_head is None:
            raise ValueError(f"task: {type(self).__name__} takes no new task: it was made without `fresh_head`")
        return self._fresh_head(task).to(next(self.heads.parameters())).train(self.training)

    def remove_task(self, name: str) -> Self:
        """Takes a task away, in place: its head and what belongs to it in the gates. The ids of later tasks move up.

        Gates are replaced by copies that hold the other tasks alone, equal to the bit. Experts stay; `moe_mtl.extract`
        drops those no task can reach.

        Returns:
            The model itself.

        Raises:
            ValueError: there is no such task, or no other.
        """
        kept = others(self.tasks, name)
        layers = self.moe_layers.values()
        gates = {gate: gate.for_tasks(kept) for gate in dict.fromkeys(layer.gate for layer in layers)}
        for layer in layers:
            layer.gate = gates[layer.gate]
        del self.heads[name]
        self.tasks = tuple(self.tasks[i] for i in kept)
        self.note_experts()
        return self

    def rename_task(self, old: str, new: str) -> Self:
        """Gives a task another name, in place; its id stays.

        Returns:
            The model itself.

        Raises:
            ValueError: there is no such task, or the new name is taken or cannot be a name.
        """
        tasks = renamed(self.tasks, old, new)
        heads = {new if name == old else name: head for name, head in self.heads.items()}
        self.heads.clear()
        self.heads.update(heads)
        self.tasks = tasks
        return self

    def head(self, name: str) -> Callable[[Features], Tensor]:
        """The head of a task, from the features of its route."""
        return self.heads[name]

    def note_experts(self) -> None:
        """Writes what experts there are and what gates hold per task into the configuration that is saved."""
        config = getattr(self, "config", {})
        args = config.get("args", {})
        for name, layer in self.moe_layers.items():
            if "gate_args" in args:
                args["gate_args"].update(layer.gate.task_options())
                args["experts"] = layer.gate.num_experts
            if name in config.get("kept_experts", {}):
                config["kept_experts"][name] = layer.kept_experts

    def valid_tokens(self, x: Any) -> Tensor | None:
        """Which tokens of an input are no padding, bool [b, n]; None where all are, as for images."""
        return None

    def check_input(self, x: Any) -> None:
        """Refuses what is no batch of images; see `check_images`."""
        check_images(x, next(self.parameters()).dtype)


class SingleTaskSet(HubModel, nn.Module):
    """One independent model per task behind the call of a multi-task model: the single-task control.

    Args:
        models: a multi-task model of one task per task name.
    """

    def __init__(self, models: Mapping[str, Any]):
        super().__init__()
        for name, model in models.items():
            if [task.name for task in model.tasks] != [name]:
                raise ValueError(f"models: {name!r} predicts {[task.name for task in model.tasks]}, expected {name!r}")
        self.models = nn.ModuleDict(models)
        self.tasks = check_tasks([model.tasks[0] for model in models.values()])
        self.input = next(iter(models.values())).input

    def forward(self, x: Any, tasks: Sequence[str] | Tensor | None = None, return_routing: bool = False):
        """As `MultiTaskModel.forward`; layers are keyed `task/layer`."""
        x, predictions, routings = as_dict(x), {}, {}
        if isinstance(tasks, Tensor):
            for i in present_ids(tree_leaves(x)[0], tasks, len(self.tasks)):
                name, rows = self.tasks[i].name, (tasks == i).nonzero().flatten()
                own, layers = self.models[name](select_rows(x, rows), return_routing=True)
                predictions[name] = (rows.to(tree_leaves(x)[0].device), own[name])
                routings |= {f"{name}/{layer}": routing for layer, routing in layers.items()}
        else:
            ids = task_ids(self.tasks, tasks) if tasks is not None else range(len(self.tasks))
            for name in (self.tasks[i].name for i in ids):
                own, layers = self.models[name](x, return_routing=True)
                predictions |= own
                routings |= {f"{name}/{layer}": routing for layer, routing in layers.items()}
        return (predictions, routings) if return_routing else predictions

    def for_tasks(self, names: Sequence[str] | str) -> "SingleTaskSet":
        """An independent copy that holds the models of these tasks alone."""
        kept = [self.tasks[i].name for i in task_ids(self.tasks, names)]
        models: dict[str, Any] = {name: copy.deepcopy(self.models[name]) for name in kept}
        alone: Any = SingleTaskSet(models).train(self.training)
        if hasattr(self, "config"):
            alone.config = copy.deepcopy(self.config)
        return alone
