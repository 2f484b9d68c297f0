"""MMoE: experts shared by all tasks, one gate per task; and the one-gate control.

Paper: Ma et al. 2018, MMoE, https://dl.acm.org/doi/10.1145/3219819.3220007 (section 4.2, eq. 6-7).
Differs: gates have a bias, zero to begin with; categories are embedded and numbers encoded by quantile bins instead of
    one-hot and raw inputs; any gate of `moe_mtl.gates` can take the place of the softmax.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from moe_mtl.levels import build_trunk
from moe_mtl.registry import VECTOR_KINDS, configure, register_model
from moe_mtl.tasks import Task
from moe_mtl.towers import Towers
from moe_mtl.vector import ExpertsConfig, VectorModel, picture_encoder, table_encoder


@dataclass(frozen=True, kw_only=True)
class MMoEConfig(ExpertsConfig):
    """An MMoE.

    Attributes:
        experts: experts that all tasks share.
        gate: a name in `moe_mtl.gates.GATES`.
        k: experts per sample and task; None for 4, or for all where the gate is dense.
    """

    experts: int = 8
    gate: str = "softmax"
    k: int | None = None


def build(tasks: Sequence[Task], config: MMoEConfig, encoder: nn.Module) -> VectorModel:
    """The model a config describes on top of an encoder, with fresh weights."""
    streams = list(range(len(tasks)))
    layout = config.layout or {"outputs": streams, "levels": [{"experts": config.experts, "streams": streams}]}
    trunk = build_trunk(
        layout,
        encoder.dim,  # type: ignore[arg-type]
        config.widths,
        gate=config.gate,
        k=config.k,
        gate_args=config.gate_args,
        expert_args={"activation": config.activation, "norm": config.norm, "dropout": config.dropout},
    )
    model: Any = VectorModel(tasks, encoder, trunk, Towers(tasks, trunk.out_dim, config.tower, config.dropout))
    model.options = asdict(config)  # what `create_model` records
    return model


@register_model(modality="table")
def mmoe_table(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """MMoE on a table: 8 experts of one layer of 64 units."""
    config = configure(MMoEConfig, {}, overrides)
    return build(tasks, config, table_encoder(config))


@register_model(modality="image", kinds=VECTOR_KINDS)
def mmoe_lenet(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """MMoE on small pictures: a LeNet, then 8 experts of one layer of 64 units."""
    config = configure(MMoEConfig, {}, overrides)
    return build(tasks, config, picture_encoder(config))
