"""ESMM: click and conversion rates over all impressions; the conversion rate is what makes their product right.

Paper: Ma et al. 2018, ESMM, https://arxiv.org/abs/1804.07931 (section 2.3, eq. 2-4).
Differs: products are taken of logits, exactly (`moe_mtl.entire_space`); the rate given a click is a prediction too.
    Towers of 256 and 128 units (DeepCTR's), where the paper has 360, 200 and 80; inputs are encoded as in
    `moe_mtl.embeddings`. With `experts` the towers stand on an MMoE instead of the shared embeddings alone.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from moe_mtl.entire_space import Reading, StageHeads, StageTrunk, check_binary, stages_of
from moe_mtl.levels import Trunk, build_trunk
from moe_mtl.models.mmoe import MMoEConfig
from moe_mtl.registry import configure, register_model
from moe_mtl.tasks import Task, nearest
from moe_mtl.towers import TaskMLP
from moe_mtl.vector import VectorModel, table_encoder


@dataclass(frozen=True, kw_only=True)
class StagesConfig(MMoEConfig):
    """A model of stages, which `moe_mtl.entire_space` describes.

    Attributes:
        experts: experts of an MMoE below the towers; 0 for none.
    """

    experts: int = 0


@dataclass(frozen=True, kw_only=True)
class ESMMConfig(StagesConfig):
    """An ESMM.

    Attributes:
        roles: names of three tasks: click, conversion given click, click and conversion; None for the tasks as they
            come. A model of some of them needs the names of all.
        own_loss: let the conversion given click have a loss of its own on the labels it has, which the paper avoids:
            these are the clicked rows alone. Without it the task has to have weight 0.
    """

    roles: Sequence[str] | None = None
    own_loss: bool = False
    tower: Sequence[int] = (256, 128)


def base_trunk(config: StagesConfig, stages: int, dim: int) -> Trunk | None:
    """The MMoE below the towers of so many stages, or None."""
    if config.experts < 0:
        raise ValueError(f"experts: got {config.experts}, expected 0 for none or a number of experts")
    if not config.experts:
        return None
    streams = list(range(stages))
    return build_trunk(
        config.layout or {"outputs": streams, "levels": [{"experts": config.experts, "streams": streams}]},
        dim,
        config.widths,
        gate=config.gate,
        k=config.k,
        gate_args=config.gate_args,
        expert_args={"activation": config.activation, "norm": config.norm, "dropout": config.dropout},
    )


def find_roles(tasks: Sequence[Task], config: ESMMConfig) -> tuple[str, str, str]:
    """Names of the click, the conversion given click, and both.

    Raises:
        ValueError: there are not three tasks or names, a task has no role, is not binary, or has a loss it should not.
    """
    names = [task.name for task in tasks]
    if config.roles is None and len(tasks) != 3:
        raise ValueError(
            f"tasks: got {len(tasks)} ({', '.join(names)}), expected three in this order: click, conversion given "
            "click, click and conversion; to leave one out, name all three in roles=[...]"
        )
    roles = list(names if config.roles is None else config.roles)
    if len(roles) != 3:
        raise ValueError(f"roles: got {roles}, expected three: click, conversion given click, click and conversion")
    for name in names:
        if name not in roles:
            raise ValueError(f"tasks: {name!r} has no role; {nearest(name, roles)}")
    check_binary(tasks, roles, "roles")
    for task in tasks:
        if task.name == roles[1] and task.weight != 0 and not config.own_loss:
            raise ValueError(
                f"tasks: {task.name!r} has weight {task.weight:g}, but its labels are those of clicked rows alone; "
                f"pass Task.binary({task.name!r}, weight=0), so that only the product teaches it, or own_loss=True"
            )
    return roles[0], roles[1], roles[2]


@register_model(modality="table", kinds=("binary",))
def esmm_table(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """ESMM on a table: towers of 256 and 128 units for click and conversion on shared embeddings, and their product."""
    config = configure(ESMMConfig, {}, overrides)
    roles = find_roles(tasks, config)
    known = (Reading("stage", (0,)), Reading("stage", (1,)), Reading("product", (0, 1)))
    readings = [known[roles.index(task.name)] for task in tasks]
    encoder, stages = table_encoder(config), stages_of(readings)
    base = base_trunk(config, len(stages), encoder.dim)
    towers = TaskMLP(encoder.dim if base is None else base.out_dim, config.tower, len(stages), config.dropout)
    trunk = StageTrunk(readings, stages, towers, base)
    model: Any = VectorModel(tasks, encoder, trunk, StageHeads(tasks, readings, towers.out_dim))
    model.options = asdict(replace(config, roles=roles))  # what `create_model` records
    return model
