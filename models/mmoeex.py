"""MMoEEx: an MMoE in which part of the experts belong to one task alone, or are closed to one task.

Paper: Aoki et al. 2021, MMoEEx, https://arxiv.org/abs/2106.10595 (experts by exclusivity and exclusion; the two-step
    update is `TrainerConfig.inner_lr`, see `moe_mtl.two_step`; the diversity score is `moe_mtl.activity`).
Differs: as in `moe_mtl.gates.exclusive`; experts are vectors that are summed, where the authors' census code has scalar
    experts that it concatenates.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from moe_mtl.models import mmoe
from moe_mtl.registry import configure, register_model
from moe_mtl.tasks import Task
from moe_mtl.vector import table_encoder


@register_model(modality="table")
def mmoeex_table(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """MMoEEx on a table: 12 experts of 64 units, three quarters of them of one task alone."""
    config = configure(mmoe.MMoEConfig, {"experts": 12, "gate": "exclusive"}, overrides)
    return mmoe.build(tasks, config, table_encoder(config))
