"""Frozen text encoders whose tasks share low-rank adapters: one for all, an inventory, or those of source tasks.

Paper: LoRA with alignment, Polytropon and multi-head routing, ScaLearn: see `moe_mtl.adapters`, one method per file.
Differs: as these say. The encoders are of transformers, and every task has a head of its own, which is trained too.

text_lora       one adapter for all tasks, with Align-LoRA's loss as an option: the baseline
text_poly       an inventory of adapters that tasks mix; heads > 1 for multi-head routing. `train_own` of a model trains
                routing logits alone, `average_adapters` makes a text_lora of the mean of all skills
text_scalearn   an adapter per task; `scalearn` makes a model that scales these, frozen
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from moe_mtl.adapters import AdapterMethod, AdapterModel, AlignedLoraModel, Lora, Poly, ScaLearn
from moe_mtl.backbones.hf_encoder import describe_encoder
from moe_mtl.models.text_moe import TextConfig, build
from moe_mtl.registry import configure, create_model, register_model
from moe_mtl.tasks import Task

Model = TypeVar("Model", bound=AdapterModel)


@dataclass(frozen=True, kw_only=True)
class TextLoraConfig(TextConfig):
    """One LoRA for all tasks.

    Attributes:
        rank: of the adapter.
        alpha: scale of what it adds, times the rank.
        dropout: of its input, in training.
        targets: names of the adapted linear maps inside a layer, such as "query"; all when None.
        alignment: coefficient of the alignment loss, which needs batches with a task per sample; the authors' 0.01 to
            0.2. 0 for none.
        alignment_kind: "mmd" or "kl".
    """

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.0
    targets: Sequence[str] | None = None
    alignment: float = 0.0
    alignment_kind: Literal["mmd", "kl"] = "mmd"


@dataclass(frozen=True, kw_only=True)
class TextPolyConfig(TextConfig):
    """An inventory of adapters.

    Attributes:
        rank: of each skill.
        skills: adapters per map.
        heads: blocks of features with routing of their own; 1 is Polytropon, more are multi-head routing.
        targets: names of the adapted linear maps inside a layer, such as "query"; all when None.
    """

    rank: int = 4
    skills: int = 4
    heads: int = 1
    targets: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True)
class TextScaLearnConfig(TextConfig):
    """Adapters of source tasks, and scales of them.

    Attributes:
        stage: "sources", in which each task trains an adapter, or "transfer", in which it scales those of the sources.
        sources: names of the source tasks; for the second stage, which `scalearn` makes.
        rank: of each adapter.
        alpha: scale of what an adapter adds, times the rank.
        dropout: of the adapters' input, in the first stage.
        uniform: one scale per map and source rather than one per output feature.
        scale_dropout: of the scales, in the second stage.
        targets: names of the adapted linear maps inside a layer, such as "query"; all when None.
    """

    stage: Literal["sources", "transfer"] = "sources"
    sources: Sequence[str] | None = None
    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.0
    uniform: bool = False
    scale_dropout: float = 0.3
    targets: Sequence[str] | None = None


@register_model(modality="text")
def text_lora(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """A frozen encoder with one LoRA for all tasks."""
    config = configure(TextLoraConfig, {}, overrides)
    method = Lora(config.rank, config.alpha, config.dropout)
    aligned = {"alignment": config.alignment, "alignment_kind": config.alignment_kind}
    return _assemble(AlignedLoraModel, tasks, config, method, **aligned)


@register_model(modality="text")
def text_poly(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """A frozen encoder with an inventory of adapters that tasks mix."""
    config = configure(TextPolyConfig, {}, overrides)
    return _assemble(AdapterModel, tasks, config, Poly(config.rank, config.skills, config.heads))


@register_model(modality="text")
def text_scalearn(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """A frozen encoder with an adapter per task, or with learned scales of such adapters."""
    config = configure(TextScaLearnConfig, {}, overrides)
    if config.stage not in ("sources", "transfer"):
        raise ValueError(f"stage: got {config.stage!r}, expected 'sources' or 'transfer'")
    if (config.stage == "transfer") == (config.sources is None):
        raise ValueError(
            f"sources: got {config.sources} with stage={config.stage!r}; the first stage takes the tasks themselves, "
            "the second the names of the source tasks. `scalearn(model)` makes it from a trained first stage"
        )
    method = ScaLearn(config.rank, config.alpha, config.dropout, config.sources, config.uniform, config.scale_dropout)
    return _assemble(AdapterModel, tasks, config, method)


def average_adapters(model: nn.Module) -> AlignedLoraModel:
    """The text_lora whose adapter is the mean of all skills, to be tuned further: MHR-mu, of Caccia et al. 2023.

    It computes what the inventory does under uniform routing. Heads are copied.

    Args:
        model: a text_poly.

    Raises:
        ValueError: another model.
    """
    source = _check(model, Poly, "text_poly")
    options = {"rank": source.method.rank, "alpha": 1.0}  # (alpha / r) is the 1 / r of the inventory
    lora = _successor(source, "text_lora", source.tasks, options)
    with torch.no_grad():
        for name, layer in lora.adapted.items():
            a, b = source.method.mean(source.adapted[name])
            for parameter, value in zip(lora.method.trained(layer), (a, b), strict=True):
                parameter.copy_(value.mT)
    return lora


def scalearn(
    model: nn.Module, tasks: Sequence[Task] | None = None, *, uniform: bool = False, scale_dropout: float = 0.3
) -> AdapterModel:
    """The second stage of ScaLearn: the adapters frozen, scales of them per target task, and heads, to be trained.

    Args:
        model: a text_scalearn of the first stage, trained.
        tasks: the targets; those of the model when None. Known ones start with the head they have.
        uniform: one scale per map and source rather than one per output feature.
        scale_dropout: of the scales, in training. The authors' scripts have 0.3, and a learning rate of 6e-3.

    Raises:
        ValueError: another model, or an option out of range.
    """
    first = _check(model, ScaLearn, "text_scalearn")
    if first.method.sources is not None:
        raise ValueError("model: is a second stage already; pass the trained first stage (stage='sources')")
    sources = [task.name for task in first.tasks]
    how = {"rank": first.method.rank, "alpha": first.method.alpha, "dropout": first.method.dropout}
    how |= {"stage": "transfer", "sources": sources, "uniform": uniform, "scale_dropout": scale_dropout}
    second = _successor(first, "text_scalearn", first.tasks if tasks is None else tasks, how)
    with torch.no_grad():
        for name, layer in second.adapted.items():
            for source in sources:
                for part in ("a", "b"):
                    getattr(layer, f"{part}_{source}").copy_(getattr(first.adapted[name], f"{part}_{source}"))
    return second


def matching_rank(model: nn.Module) -> int:
    """The rank of a text_lora, on the same maps, with nearest to as many trained parameters as the adapters of a model.

    A rank costs r (d_in + d_out) per map. An inventory of s skills of rank r costs s r (d_in + d_out) and t h s routing
    logits per map; heads cost the same everywhere.

    Args:
        model: of this file.

    Raises:
        ValueError: another model.
    """
    if not isinstance(model, AdapterModel):
        raise ValueError(f"model: got {type(model).__name__}, expected one with adapters")
    bases: list[Any] = [layer.base_layer for layer in model.adapted.values()]
    per_rank = sum(base.in_features + base.out_features for base in bases)
    return max(1, round(sum(p.numel() for p in model.adapter_parameters()) / per_rank))


def _assemble(kind: type[Model], tasks: Sequence[Task], config: Any, method: AdapterMethod, **options: Any) -> Model:
    dense = build(tasks, TextConfig(encoder=config.encoder, attention=config.attention))
    model: Any = kind(dense, method, config.targets, config.attention, **options)
    encoder = describe_encoder(model.backbone)
    model.options = asdict(replace(config, encoder=encoder))  # what `create_model` records
    return model


def _check(model: Any, kind: type[AdapterMethod], name: str) -> Any:
    if not isinstance(getattr(model, "method", None), kind):
        raise ValueError(f"model: got {type(model).__name__}, expected a {name}")
    return model


def _successor(model: AdapterModel, name: str, tasks: Sequence[Task], options: dict[str, Any]) -> Any:
    """A new model on the encoder, targets and heads of another, whose adapters are fresh."""
    targets = model.config["args"].get("targets")
    how = {"encoder": describe_encoder(model.backbone), "attention": model.attention, "targets": targets, **options}
    new: Any = create_model(name, tasks=tasks, **how)
    known = model.dense_state()
    state = new.state_dict()
    for key in state:
        plain = key.replace(".base_layer.", ".")
        if plain in known and known[plain].shape == state[key].shape:
            state[key] = known[plain]
    new.load_state_dict(state)
    return new.to(next(model.parameters())).train(model.training)
