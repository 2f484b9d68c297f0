"""Linear maps with weights per task: what routers and towers share."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_mtl.kernels.ops import grouped_linear
from moe_mtl.routing import TaskIds


def uniform_parameter(*shape: int, fan_in: int) -> nn.Parameter:
    """A parameter drawn from U(-1/sqrt(fan_in), 1/sqrt(fan_in)): Kaiming-uniform with a = sqrt(5), as nn.Linear."""
    return nn.Parameter(torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5))


def select(parameters: nn.ParameterList, tasks: Sequence[int]) -> nn.ParameterList:
    """Copies of these entries, in this order, each a parameter of its own."""
    return nn.ParameterList([copy.deepcopy(parameters[i]) for i in tasks])


def entries_of(module: nn.Module, task: int) -> list[str]:
    """Names, as `named_parameters` has them, of a task's entry of every list in a module that has an entry per task."""
    lists = {name: part for name, part in module.named_modules() if isinstance(part, nn.ParameterList)}
    return [f"{name}.{task}".lstrip(".") for name, entries in lists.items() if task < len(entries)]


@torch.no_grad()
def append(parameters: nn.ParameterList, tasks: Sequence[int], fresh: Tensor) -> None:
    """Adds, in place, an entry, a parameter of its own: the mean of these entries, or `fresh` where none is named.

    It takes device and dtype from the others. The mean of a single entry is a copy, equal to the bit.
    """
    value = torch.stack([parameters[i] for i in tasks]).mean(dim=0) if tasks else fresh.detach()
    parameters.append(nn.Parameter(value.to(parameters[-1])))


class TaskLinear(nn.Module):
    """One linear map per task, each a parameter of its own.

    One parameter per task rather than one [t, e, d] tensor: the router of a task that takes no part in a step then has
    no gradient at all, so weight decay and momentum leave it bit-equal, and it can be frozen or dropped alone. Ids per
    row are the exception: which tasks occur is not known without reading them, so absent ones get exact zeros.

    Args:
        dim: width d of the tokens.
        out: outputs e, or a number for each task; results are as wide as the widest map asked for, others give 0 there.
        num_tasks: maps t.
        bias: whether each map adds a bias, zero to begin with.
    """

    def __init__(self, dim: int, out: int | Sequence[int], num_tasks: int, *, bias: bool):
        super().__init__()
        outs = [out] * num_tasks if isinstance(out, int) else list(out)
        self.weight = nn.ParameterList([uniform_parameter(one, dim, fan_in=dim) for one in outs])
        self.bias = nn.ParameterList([nn.Parameter(torch.zeros(one)) for one in outs]) if bias else None

    def forward(self, x: Tensor, task: TaskIds) -> Tensor:
        """Maps each row [m, d] by the matrix of its task, [m, e], in the dtype of `x`."""
        if isinstance(task, int):
            bias = None if self.bias is None else self.bias[task].to(x.dtype)
            return F.linear(x, self.weight[task].to(x.dtype), bias)
        if isinstance(task, Tensor):
            weight, bias = self._stacked(range(len(self.weight)), x.dtype)
            return grouped_linear(x, weight, bias, task)
        return self.blocks(x.unflatten(0, (len(task), x.shape[0] // len(task))), task).flatten(0, 1)

    def each(self, x: Tensor, tasks: Sequence[int]) -> Tensor:
        """Maps the same rows [m, d] by the matrix of each of these tasks in one product, [(t m), e]."""
        return self.blocks(x, tasks).flatten(0, 1)

    def blocks(self, x: Tensor, tasks: Sequence[int]) -> Tensor:
        """Maps a block of rows for each of these tasks [t, m, d], or the same rows for all [m, d], to [t, m, e]."""
        weight, bias = self._stacked(tasks, x.dtype)
        if x.ndim == 2:
            y = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
            return y.unflatten(1, (len(tasks), -1)).transpose(0, 1)
        y = torch.bmm(x, weight.mT)
        return y if bias is None else y + bias.unsqueeze(1)

    def _stacked(self, ids: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The matrices [t, e, d] and biases [t, e] of these tasks."""
        weight = _stack([self.weight[i] for i in ids]).to(dtype)
        return weight, None if self.bias is None else _stack([self.bias[i] for i in ids]).to(dtype)

    @torch.no_grad()
    def zero_scores(self) -> None:
        """Makes, in place, every map zero."""
        for parameter in self.parameters():
            parameter.zero_()

    def append_task(self, like: Sequence[int] = (), out: int | None = None) -> None:
        """Adds, in place, a map for one more task: the mean of those of these tasks, or a fresh one.

        Args:
            like: ids of tasks.
            out: outputs of a fresh map; as many as the last one has when None.
        """
        rows, dim = self.weight[like[0] if like else -1].shape
        wide: int = rows if out is None else out
        append(self.weight, like, uniform_parameter(wide, dim, fan_in=dim))
        if self.bias is not None:
            append(self.bias, like, torch.zeros(wide))

    @torch.no_grad()
    def append_outputs(self, like: Sequence[int], task: int) -> None:
        """Adds, in place, outputs to every map: those of one task are copies of some that it has, the others' zero."""
        ids = list(like)
        for entries in (self.weight, self.bias):
            for i, p in enumerate(() if entries is None else entries):
                rows = p[ids] if i == task else torch.zeros_like(p[ids])
                entries[i] = nn.Parameter(torch.cat([p, rows]), requires_grad=p.requires_grad)  # type: ignore[index]

    def keep_tasks(self, tasks: Sequence[int]) -> None:
        """Drops, in place, every map but these, which take the places 0, 1, ..."""
        self.weight = select(self.weight, tasks)
        self.bias = None if self.bias is None else select(self.bias, tasks)

    def for_tasks(self, tasks: Sequence[int]) -> "TaskLinear":
        """A copy that holds the maps of these tasks alone, in this order."""
        small = copy.copy(self)
        small._modules = dict(self._modules)
        small.keep_tasks(tasks)
        return small


def _stack(parameters: list[Tensor]) -> Tensor:
    """Parameters of all tasks as one tensor, padded with zero rows where they are shorter than the longest."""
    rows = max(len(p) for p in parameters)
    padded = [p if len(p) == rows else F.pad(p, (*(0, 0) * (p.ndim - 1), 0, rows - len(p))) for p in parameters]
    return torch.stack(padded)
