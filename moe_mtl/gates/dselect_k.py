"""DSelect-k gate: k selectors per task, each smoothly choosing one expert by its binary code, exactly at last.

Paper: Hazimeh et al. 2021, https://arxiv.org/abs/2106.03760 (section 3: smooth-step, binary encoding, static and
    per-example gates, entropy regulariser, leakage term for numbers of experts that are no power of two).
Differs: the regularisers are `dselect_entropy` and `dselect_leakage` of `moe_mtl.regularizers`, means over selectors
    and rows where the authors' code sums, so that their strength does not depend on the batch. One expert needs no
    selector and one selector no mixing weight: they have no parameters.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from moe_mtl.gates._gate import UNREACHABLE
from moe_mtl.gates._router import RouterGate, rows_of
from moe_mtl.routing import Routing, TaskIds
from moe_mtl.task_linear import TaskLinear, append, select


def smooth_step(t: Tensor, gamma: float) -> Tensor:
    """0 up to -gamma/2, 1 from gamma/2 on, between them -2 t^3 / gamma^3 + 3 t / (2 gamma) + 1/2."""
    inside = -2 / gamma**3 * t**3 + 3 / (2 * gamma) * t + 0.5
    half = gamma / 2
    return torch.where(t <= -half, 0.0, torch.where(t >= half, 1.0, inside))


class DSelectKGate(RouterGate):
    """Weights q = sum_s softmax(alpha)_s r(z_s); r(z)_i multiplies S(z_j) or 1 - S(z_j) over the bits j of i.

    S is the smooth-step. Once every |z_j| is at least gamma / 2, a selector names one expert exactly, its gradient is
    exactly zero and it stays: at most k experts are then used. With E no power of two the codes from E on take part of
    the weight, so q sums to less than 1 until the selectors have left them.

    The logits of a `Routing` are log q, and -10^4 where q is 0: their softmax is q over its sum.

    Args:
        dim: width d of the tokens.
        num_experts: experts e.
        num_tasks: tasks t.
        k: selectors; the most experts with a weight above 0, at convergence.
        gamma: width of the smooth-step. Larger ones keep gradients alive longer.
        per_example: z and alpha are linear maps of the token, per task, instead of parameters of the task. Experts then
            depend on the token, and all are reachable.

    Raises:
        ValueError: a size is out of range, or gamma is not above 0.
    """

    compute_class: Literal["dense", "token", "task", "weight"] = "task"
    codes: Tensor

    def __init__(
        self, dim: int, num_experts: int, num_tasks: int, k: int, *, gamma: float = 1.0, per_example: bool = False
    ):
        super().__init__(dim, num_experts, num_tasks, k)
        if not gamma > 0:
            raise ValueError(f"gamma: got {gamma}, expected above 0")
        self.gamma, self.per_example, self.selectors = gamma, per_example, k
        self.k = num_experts  # the mixture is over all experts, whatever their weights
        if per_example:
            self.compute_class = "dense"
        self.bits = (num_experts - 1).bit_length()
        self.shares_out = num_experts == 2**self.bits
        codes = torch.arange(num_experts).unsqueeze(1) >> torch.arange(self.bits)
        self.register_buffer("codes", (codes & 1).bool(), persistent=False)  # [e, bits]
        self.z = self._fresh(k * self.bits, gamma / 100) if self.bits else None
        self.alpha = self._fresh(k, 0.05) if self.bits and k > 1 else None

    def _fresh(self, size: int, bound: float) -> TaskLinear | nn.ParameterList:
        """`size` numbers per task, or maps to them, all uniform within the bound."""
        found = (
            TaskLinear(self.dim, size, self.num_tasks, bias=True)
            if self.per_example
            else nn.ParameterList([nn.Parameter(torch.empty(size)) for _ in range(self.num_tasks)])
        )
        for parameter in found.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        return found

    def scores(self, x: Tensor, task: TaskIds) -> Tensor:
        """The numbers the selectors are made of, z of all k and then alpha, [m, k bits + k]; none where not needed."""
        return self._joined(x, [self._of_rows(part, x, task) for part in (self.z, self.alpha) if part is not None])

    def scores_each(self, x: Tensor, tasks: Sequence[int]) -> Tensor:
        """The same for each task, maps in one product."""
        if not self.per_example:
            return self.scores(x[:, :1].repeat(len(tasks), 1), tuple(tasks))
        parts = [part.each(x, tasks) for part in (self.z, self.alpha) if isinstance(part, TaskLinear)]
        return self._joined(x.repeat(len(tasks), 1) if not parts else x, parts)

    @staticmethod
    def _joined(x: Tensor, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=1) if parts else x.new_zeros(x.shape[0], 0)

    @staticmethod
    def _of_rows(part: TaskLinear | nn.ParameterList, x: Tensor, task: TaskIds) -> Tensor:
        if isinstance(part, TaskLinear):
            return part(x, task)
        return rows_of(part, task, x.shape[0]).to(x.dtype)

    def choose(self, logits: Tensor, task: TaskIds | None, valid: Tensor | None) -> Routing:
        """The mixture that the selectors' numbers [m, k bits + k] make."""
        assert task is not None  # `forward` has refused it
        rows, units = logits.shape[0], logits
        blocks = 1 if isinstance(task, int) else len(task)
        if not (self.per_example or isinstance(task, Tensor)):  # the rows of a block are equal: one will do
            units = logits.unflatten(0, (blocks, rows // blocks))[:, :1].flatten(0, 1)
        selectors, weights = self._select(units)
        if units is not logits:
            weights = weights.unsqueeze(1).expand(-1, rows // blocks, -1).flatten(0, 1)
        used = weights > 0
        shown = torch.where(used, weights, 1.0).log().where(used, UNREACHABLE)
        if self.kept is None:
            return Routing(weights, None, shown, task, valid, selectors=selectors)
        indices = self.kept.expand(rows, -1)
        return Routing(weights.index_select(-1, self.kept), indices, shown, task, valid, selectors=selectors)

    def _select(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """r [u, k, e] and q [u, e] from the selectors' numbers [u, k bits + k]."""
        k, bits = self.selectors, self.bits
        z, alpha = numbers[:, : k * bits].unflatten(1, (k, bits)) if bits else None, numbers[:, k * bits :]
        if z is None:
            r = numbers.new_ones(numbers.shape[0], k, 1)
        else:
            s = smooth_step(z, self.gamma).unsqueeze(2)  # [u, k, 1, bits]
            r = torch.where(self.codes, s, 1 - s).prod(dim=-1)
        mix = alpha.softmax(dim=-1) if alpha.shape[1] else numbers.new_full((1, k), 1 / k)
        return r, (mix.unsqueeze(-1) * r).sum(dim=1)

    def reachable(self, task: int) -> tuple[int, ...] | None:
        """Ids of the experts with a weight above 0 as the parameters are now; None for a per-example gate."""
        if self.per_example:
            return None
        with torch.no_grad():
            device = self.codes.device
            parts = [part[task] for part in (self.z, self.alpha) if isinstance(part, nn.ParameterList)]
            numbers = torch.cat(parts) if parts else torch.zeros(0, device=device)
            weights = self._select(numbers.unsqueeze(0).to(torch.promote_types(numbers.dtype, torch.float32)))[1]
        return tuple(weights[0].nonzero().flatten().tolist())

    @torch.no_grad()
    def zero_scores(self) -> None:
        """Makes, in place, every z and alpha zero: all experts then weigh the same."""
        for parameter in self.parameters():
            parameter.zero_()

    def check_like(self, like: Sequence[int]) -> None:
        """Refuses ids out of range, and the mean of several tasks.

        Raises:
            ValueError: says which.
        """
        super().check_like(like)
        if len(like) > 1 and self.bits:
            raise ValueError(
                "init_from: selectors name experts by binary codes and in no order, so the mean of several tasks would "
                "name other experts than they do; name one task"
            )

    def append_task(self, like: Sequence[int]) -> None:
        """Adds, in place, the selectors of one more task."""
        for part, size, bound in (
            (self.z, self.selectors * self.bits, self.gamma / 100),
            (self.alpha, self.selectors, 0.05),
        ):
            if isinstance(part, TaskLinear):
                part.append_task(like)
                for entries in () if like or part.bias is None else (part.weight, part.bias):
                    nn.init.uniform_(entries[-1], -bound, bound)
            elif part is not None:
                append(part, like, torch.empty(size).uniform_(-bound, bound))

    def keep_tasks(self, tasks: Sequence[int]) -> None:
        """Drops, in place, the selectors of every task but these."""
        for name in ("z", "alpha"):
            part = getattr(self, name)
            if isinstance(part, TaskLinear):
                part.keep_tasks(tasks)
            elif part is not None:
                setattr(self, name, select(part, tasks))

    def extra_repr(self) -> str:
        """Sizes and options, for printing."""
        how = f"selectors={self.selectors}, gamma={self.gamma}, per_example={self.per_example}"
        return f"{super().extra_repr()}, {how}"
