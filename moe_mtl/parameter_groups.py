"""Which parameters of a model learn, how fast, and with what weight decay."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from moe_mtl.trainer_config import TrainerConfig, matches


def decays(model: nn.Module) -> dict[str, bool]:
    """Whether weight decay applies to each trainable parameter: not to vectors, biases, embeddings and tokens.

    A model may name further exceptions in `no_weight_decay()`, as timm's models do.
    """
    exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            exempt.add(f"{path}.weight".lstrip("."))
    found = {}
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        # the biases of stacked experts are matrices: [e, h]
        vector = parameter.ndim < 2 or leaf in ("b1", "b2") or leaf.endswith(("bias", "embed", "embedding", "token"))
        if parameter.requires_grad:
            found[name] = not vector and name not in exempt
    return found


def parameter_groups(model: nn.Module, config: TrainerConfig) -> list[dict[str, Any]]:
    """The trainable parameters by weight decay and factor on the learning rate, decayed ones first.

    Parameters with the factor 0 are frozen, in place: they get no gradient and no weight decay.

    Raises:
        ValueError: a pattern of `lr_scales` that no parameter's name matches, a factor below 0, or nothing to train.
    """
    decayed, parameters = decays(model), dict(model.named_parameters())
    if not decayed:
        raise ValueError("model: none of its parameters requires a gradient; nothing is left to train")
    for pattern, factor in config.lr_scales.items():
        if not factor >= 0:
            raise ValueError(f"lr_scales: got {factor} for {pattern!r}, expected at least 0, which freezes")
        if not any(matches(name, pattern) for name in decayed):
            raise ValueError(f"lr_scales: {pattern!r} matches no trainable parameter; they are named as {min(decayed)}")
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name in sorted(decayed, key=decayed.__getitem__, reverse=True):  # stable: the model's order within each
        scale = [1.0, *(factor for pattern, factor in config.lr_scales.items() if matches(name, pattern))][-1]
        if scale:
            groups.setdefault((decayed[name], scale), []).append(parameters[name])
        else:
            parameters[name].requires_grad_(False)
    if not groups:
        raise ValueError("lr_scales: freezes every parameter; nothing is left to train")
    return [
        {"params": found, "weight_decay": config.weight_decay if decay else 0.0, "scale": scale}
        for (decay, scale), found in groups.items()
    ]


def names_in_order(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the parameters in groups, by whose order an optimizer knows them; those of a balancer have none: ""."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names.get(id(parameter), "") for group in groups for parameter in group["params"]]


def frozen_statistics(model: nn.Module) -> list[nn.Module]:
    """Modules with running statistics and no parameter that learns: normalised by what they have, which stays."""

    def kept(module: nn.Module) -> bool:
        parameters = list(module.parameters())
        running = any(name.startswith("running_") for name, _ in module.named_buffers(recurse=False))
        return running and bool(parameters) and not any(p.requires_grad for p in parameters)

    return [module for module in model.modules() if kept(module)]
