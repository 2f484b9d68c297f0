"""CGC, PLE and AdaTT: private experts per task beside shared ones, in one level or several.

Paper: Tang et al. 2020, PLE, https://dl.acm.org/doi/10.1145/3383313.3412236 (section 4.1 CGC, 4.2 PLE); AdaTT inspired
    by Li et al. 2023, https://dl.acm.org/doi/10.1145/3580305.3599769 (abstract, and public descriptions of its levels).
Differs: gates have a bias, zero to begin with; inputs are encoded as in `moe_mtl.embeddings`. The paper's loss weights
    that decay per epoch are a matter of the balancer. In AdaTT the residual path mixes a task's own experts by a gate
    of its own, where the paper learns plain weights for them in some variants.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from moe_mtl.levels import build_trunk
from moe_mtl.registry import configure, register_model
from moe_mtl.tasks import Task
from moe_mtl.towers import Towers
from moe_mtl.vector import ExpertsConfig, VectorModel, table_encoder


@dataclass(frozen=True, kw_only=True)
class PLEConfig(ExpertsConfig):
    """Levels of private and shared experts.

    Attributes:
        levels: how many; one is CGC.
        private: experts of every task, per level.
        shared: experts of all tasks, per level.
        fusion: what a task sees: "own", its private and the shared experts (PLE), or "all", every expert, with its own
            added on a residual path (AdaTT).
    """

    levels: int = 1
    private: int = 2
    shared: int = 2
    fusion: str = "own"

    def __post_init__(self):
        for name, least in (("levels", 1), ("private", 0), ("shared", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")
        if self.fusion not in ("own", "all"):
            raise ValueError(f"fusion: got {self.fusion!r}, expected 'own' or 'all'")
        if self.private + self.shared == 0 or (self.fusion == "all" and self.private == 0):
            raise ValueError("private, shared: got none of them; a task needs an expert, AdaTT one of its own")


def make_layout(tasks: int, config: PLEConfig) -> dict[str, Any]:
    """Streams and experts of every level.

    Streams 0..t-1 are the tasks', stream t is the shared one, which reads all experts and is missing in the last level
    and where there is no shared expert. Experts stand task by task, then the shared ones; from the second level on each
    reads the stream it belongs to.
    """
    private, shared = config.private, config.shared
    total = tasks * private + shared
    own = [list(range(t * private, (t + 1) * private)) for t in range(tasks)]
    common = list(range(tasks * private, total))
    levels = []
    for level in range(config.levels):
        streams, last = list(range(tasks)), level == config.levels - 1
        visible = [[*mine, *common] for mine in own] if config.fusion == "own" else [list(range(total))] * tasks
        residual = own if config.fusion == "all" else None
        if shared and not last:
            streams, visible = [*streams, tasks], [*visible, list(range(total))]
            residual = None if residual is None else [*residual, common]
        spec: dict[str, Any] = {"experts": total, "streams": streams, "gate": {"visible": visible}}
        spec["own"] = None if residual is None else {"visible": residual}
        if level:
            spec["sources"] = [t for t in range(tasks) for _ in range(private)] + [tasks] * shared
        levels.append(spec)
    return {"outputs": list(range(tasks)), "levels": levels}


def build(tasks: Sequence[Task], config: PLEConfig, encoder: nn.Module) -> VectorModel:
    """The model a config describes on top of an encoder, with fresh weights."""
    trunk = build_trunk(
        config.layout or make_layout(len(tasks), config),
        encoder.dim,  # type: ignore[arg-type]
        config.widths,
        gate_args=config.gate_args,
        expert_args={"activation": config.activation, "norm": config.norm, "dropout": config.dropout},
    )
    model: Any = VectorModel(tasks, encoder, trunk, Towers(tasks, trunk.out_dim, config.tower, config.dropout))
    model.options = asdict(config)  # what `create_model` records
    return model


def _table(tasks: Sequence[Task], defaults: dict[str, Any], overrides: dict[str, Any]) -> nn.Module:
    config = configure(PLEConfig, defaults, overrides)
    return build(tasks, config, table_encoder(config))


@register_model(modality="table")
def cgc_table(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """CGC on a table: one level of 2 experts per task and 2 shared ones of 64 units."""
    return _table(tasks, {}, overrides)


@register_model(modality="table")
def ple_table(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """PLE on a table: two levels of 2 experts per task and 2 shared ones of 64 units."""
    return _table(tasks, {"levels": 2}, overrides)


@register_model(modality="table")
def adatt_table(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """AdaTT on a table: two levels of 2 experts per task and a shared one; a task sees all and adds its own."""
    return _table(tasks, {"levels": 2, "shared": 1, "fusion": "all"}, overrides)
