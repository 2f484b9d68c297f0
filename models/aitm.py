"""AITM: steps of a conversion, each over all impressions, every step told what the step before it knows.

Paper: Xi et al. 2021, AITM, https://arxiv.org/abs/2105.08489 (section 3.2 the AIT module, 3.3 the calibrator; sizes of
    the authors' code for Ali-CCP).
Differs: one dropout rate for all layers, 0 by default, where the code has 0.1, 0.3 and 0.3; the maps of the AIT
    module start as linear layers do, not from N(0, 0.01), and there is no L2 penalty but the trainer's weight decay;
    inputs are encoded as in `moe_mtl.embeddings`. The rate of a step given the one before is a prediction too where a
    task asks for it. With `experts` the towers stand on an MMoE instead of the shared embeddings alone.
"""

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_mtl.entire_space import Reading, StageHeads, StageTrunk, check_binary, stages_of
from moe_mtl.models.esmm import StagesConfig, base_trunk
from moe_mtl.registry import configure, register_model
from moe_mtl.task_linear import TaskLinear, uniform_parameter
from moe_mtl.tasks import Task, nearest
from moe_mtl.towers import TaskMLP
from moe_mtl.vector import VectorModel, table_encoder


@dataclass(frozen=True, kw_only=True)
class AITMConfig(StagesConfig):
    """An AITM.

    Attributes:
        steps: names of the tasks that are steps of the chain, each over all impressions, in order; None for the tasks
            whose weight is not 0, as they come.
        conditional: {task: [step, earlier step]} for rates given an earlier step; None for one per task that is no
            step, of the next step given the last in the order of the tasks. A model of some of the tasks needs both
            options.
        calibrator: weight of the mean over impressions of the sum over steps of max(p_t - p_(t-1), 0).
    """

    steps: Sequence[str] | None = None
    conditional: Mapping[str, Sequence[str]] | None = None
    calibrator: float = 0.6
    embedding_dim: int = 5
    tower: Sequence[int] = (128, 64, 32)


class Transfer(nn.Module):
    """The AIT module: every step's vector mixed with what the step before passes on.

    z_1 = q_1; then p = relu(G_t z_(t-1) + g_t), and z_t is the sum over u in {p, q_t} of V u with weights
    softmax(<K u, Q u> / sqrt(d)). The maps Q, K and V are those of all steps.

    Args:
        dim: width d of the vectors.
        steps: of the chain, at least two.
        dropout: share of the units of p dropped in training.
    """

    def __init__(self, dim: int, steps: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.info = TaskLinear(dim, dim, steps - 1, bias=True)
        self.maps = uniform_parameter(3 * dim, dim, fan_in=dim)  # Q, K and V, one below the other

    def forward(self, towers: Tensor) -> Tensor:
        """Vectors [s, b, d] of the first s steps to mixed ones of the same shape.

        A step needs the one before it, so there is a loop over steps.
        """
        mixed, maps = [towers[0]], self.maps.to(towers.dtype)
        own = F.linear(towers[1:], maps)
        for step in range(len(towers) - 1):
            info = F.dropout(F.relu(self.info(mixed[-1], step)), self.dropout, self.training)
            query, key, value = torch.stack([F.linear(info, maps), own[step]]).chunk(3, dim=-1)
            share = ((query * key).sum(-1) / towers.shape[-1] ** 0.5).softmax(dim=0)
            mixed.append((share.unsqueeze(-1) * value).sum(dim=0))
        return torch.stack(mixed)

    def for_stages(self, count: int) -> Self | None:
        """A copy for the first so many steps; None for one, which gets nothing passed on."""
        if count < 2:
            return None
        return copy.deepcopy(self, {id(self.info): self.info.for_tasks(range(count - 1))})


class AITM(VectorModel):
    """A `VectorModel` of stages with the calibrator as an auxiliary loss.

    Args:
        tasks: what it predicts.
        encoder: as in `VectorModel`.
        trunk: vectors of the steps.
        heads: predictions of the tasks.
        calibrator: weight of the calibrator.
    """

    def __init__(
        self, tasks: Sequence[Task], encoder: nn.Module, trunk: StageTrunk, heads: StageHeads, calibrator: float
    ):
        super().__init__(tasks, encoder, trunk, heads)
        self.calibrator = calibrator

    def auxiliary_losses(self, predictions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weighted calibrator {"calibrator": scalar}, of the steps among these predictions; none with one step.

        Where a step is left out, the one after it is held against the one before it.

        Args:
            predictions: logits {task: [b]}, as the model returns them.
        """
        heads: Any = self.towers
        steps = {r.stages[0]: task.name for task, r in zip(self.tasks, heads.readings, strict=True) if r.how == "stage"}
        rates = [predictions[steps[s]].sigmoid() for s in sorted(steps) if steps[s] in predictions]
        if len(rates) < 2 or not self.calibrator:
            return {}
        excess = torch.stack([(after - before).clamp(min=0) for before, after in itertools.pairwise(rates)])
        return {"calibrator": self.calibrator * excess.sum(dim=0).mean()}


def find_steps(tasks: Sequence[Task], config: AITMConfig) -> tuple[list[str], dict[str, list[str]]]:
    """Names of the steps, and {task: [step, earlier step]} of the rates given an earlier step.

    Raises:
        ValueError: fewer than two steps, a task without a place in the chain, one that is not binary, or a rate given a
            step that does not come before.
    """
    names = [task.name for task in tasks]
    steps = [task.name for task in tasks if task.weight != 0] if config.steps is None else list(config.steps)
    if len(steps) < 2:
        raise ValueError(
            f"tasks: got {len(steps)} steps ({', '.join(steps) or 'none'}), expected two at least, such as click and "
            "then purchase, or their names in steps=[...]"
        )
    check_binary(tasks, steps, "steps")
    if config.conditional is None:
        given: dict[str, list[str]] = {}
        for place, name in enumerate(names):
            if name in steps:
                continue
            before = [other for other in names[:place] if other in steps]
            after = [other for other in names[place:] if other in steps]
            if not before or not after:
                raise ValueError(
                    f"tasks: {name!r} is no step and stands between none; put it between two steps for the rate of the "
                    f"second given the first, or pass conditional={{{name!r}: [step, earlier step]}}"
                )
            given[name] = [after[0], before[-1]]
    else:
        given = {name: list(pair) for name, pair in config.conditional.items()}
    for name in names:
        if name not in steps and name not in given:
            raise ValueError(f"tasks: {name!r} has no place in the chain; {nearest(name, [*steps, *given])}")
    for name, pair in given.items():
        for step in pair:
            if step not in steps:
                raise ValueError(f"conditional: {name!r} names the unknown step {step!r}; {nearest(step, steps)}")
        if name in steps or len(pair) != 2 or steps.index(pair[0]) <= steps.index(pair[1]):
            raise ValueError(f"conditional: {name!r} is {pair}, expected no step's name, and [step, earlier step]")
    for task in tasks:
        if task.name in given and task.weight != 0:
            raise ValueError(
                f"tasks: {task.name!r} has weight {task.weight:g}; a rate given an earlier step follows from the "
                f"steps: pass Task.binary({task.name!r}, weight=0)"
            )
    return steps, given


@register_model(modality="table", kinds=("binary",))
def aitm_table(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """AITM on a table: a tower of 128, 64 and 32 units per step on shared embeddings, and the transfer between them."""
    config = configure(AITMConfig, {}, overrides)
    if config.calibrator < 0:
        raise ValueError(f"calibrator: got {config.calibrator}, expected a weight of at least 0")
    steps, given = find_steps(tasks, config)

    def reading(name: str) -> Reading:
        if name in steps:
            return Reading("stage", (steps.index(name),))
        return Reading("quotient", tuple(steps.index(step) for step in given[name]))

    readings = [reading(task.name) for task in tasks]
    stages = list(range(max(stages_of(readings)) + 1))
    encoder = table_encoder(config)
    base = base_trunk(config, len(stages), encoder.dim)
    towers = TaskMLP(encoder.dim if base is None else base.out_dim, config.tower, len(stages), config.dropout)
    transfer = Transfer(towers.out_dim, len(stages), config.dropout) if len(stages) > 1 else None
    trunk = StageTrunk(readings, stages, towers, base, transfer)
    model: Any = AITM(tasks, encoder, trunk, StageHeads(tasks, readings, towers.out_dim), config.calibrator)
    model.options = asdict(replace(config, steps=steps, conditional=given))  # what `create_model` records
    return model
