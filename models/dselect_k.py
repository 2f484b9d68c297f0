"""DSelect-k: an MMoE whose gates choose k experts per task smoothly, and exactly at last.

Paper: Hazimeh et al. 2021, DSelect-k, https://arxiv.org/abs/2106.03760; the entropy and leakage terms are the
    regularizers `dselect_entropy` and `dselect_leakage` of a training run.
Differs: as in `moe_mtl.gates.dselect_k`; static gates by default, which can be extracted with their experts alone.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from moe_mtl.models import mmoe
from moe_mtl.registry import VECTOR_KINDS, configure, register_model
from moe_mtl.tasks import Task
from moe_mtl.vector import picture_encoder, table_encoder


@register_model(modality="table")
def dselect_k_table(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """DSelect-k on a table: 8 experts of 64 units, 2 per task."""
    config = configure(mmoe.MMoEConfig, {"gate": "dselect_k", "k": 2}, overrides)
    return mmoe.build(tasks, config, table_encoder(config))


@register_model(modality="image", kinds=VECTOR_KINDS)
def dselect_k_lenet(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """DSelect-k on small pictures: a LeNet, then 8 experts of 64 units, 2 per task."""
    config = configure(mmoe.MMoEConfig, {"gate": "dselect_k", "k": 2}, overrides)
    return mmoe.build(tasks, config, picture_encoder(config))
