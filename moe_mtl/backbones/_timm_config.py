"""How a timm backbone is named: its architecture and plain options, by which it can be built again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Timm = Any  # a module of timm, read by structure: its attributes are not declared
PLAIN = (bool, int, float, str, type(None))
# attributes that say how something is computed or was initialised, not what
HOW = ("fused_attn", "grad_checkpointing", "training", "weight_init_mode")


@contextmanager
def importing() -> Iterator[None]:
    """Where timm is imported: says what to do about a torchvision that does not fit the torch beside it.

    Raises:
        ImportError: torchvision, which timm imports, is built for CUDA and torch for a CPU.
    """
    try:
        yield
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        raise ImportError(
            f"timm: its torchvision does not load ({error}); it is a CUDA build beside a torch for CPUs. Install "
            "torchvision from the index that torch came from, or `pip install ./tools/cpu-torchvision` in a checkout"
        ) from error


def read_vit(architecture: str, options: Mapping[str, Any]) -> Timm:
    """A timm model with fresh weights, without classifier.

    Raises:
        ImportError: see `importing`.
        ValueError: timm has no such architecture, or it does not take these options.
    """
    with importing():
        import timm

    try:
        return timm.create_model(architecture, num_classes=0, **options)
    except Exception as error:  # timm has no error of its own for options that do not fit
        raise ValueError(
            f"backbone: timm.create_model({architecture!r}, {', '.join(options) or 'no options'}) fails: {error}; see "
            "timm.list_models() for names"
        ) from error


def describe_vit(backbone: Timm) -> dict[str, Any]:
    """What `read_vit` needs to build a timm model again, as plain data: its architecture and options.

    timm records the name only, and the tag of its weights, which is kept where it is not the architecture's default:
    the range of colours depends on it. Options are read off the model where it differs from the plain one, and the
    result is compared with it module by module: what is built again must have the same parameters, and compute the
    same of them. Nothing is allocated for it.

    Raises:
        ValueError: it cannot be built again; why.
    """
    known = getattr(backbone, "pretrained_cfg", None) or {}
    architecture = known.get("architecture")
    if not architecture:
        raise ValueError(f"this {type(backbone).__name__} was not made by timm.create_model, which gives it a name")
    try:
        again = _shape(architecture, {})
        if (tag := known.get("tag")) and tag != again.pretrained_cfg["tag"]:
            architecture = f"{architecture}.{tag}"
            again = _shape(architecture, {})
        plain, own = _options(again), _options(backbone)
        if options := {name: value for name, value in own.items() if value != plain.get(name)}:
            again = _shape(architecture, options)
        found = difference(again, backbone)
    except ValueError as error:
        raise ValueError(f"its architecture {architecture!r} could not be built again: {error}") from error
    if found:
        told = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise ValueError(
            f"built again as timm's {architecture!r}{f' with {told}' if told else ''}, its {found}; it has options "
            "that cannot be read off it. create_model('timm_moe', backbone=..., backbone_args=...) takes all plain ones"
        )
    return {"backbone": architecture, "backbone_args": options}


def difference(ours: nn.Module, theirs: nn.Module) -> str | None:
    """The first thing in which two models differ that decides what they compute, in words; None where nothing does.

    Compared are names and shapes of tensors, the classes of modules, and their plain attributes.
    """
    here, there = ours.state_dict(), theirs.state_dict()
    for name in [*here, *there]:
        shapes = [list(state[name].shape) if name in state else "missing" for state in (here, there)]
        if shapes[0] != shapes[1]:
            return f"{name} is {shapes[0]} instead of {shapes[1]}"
    modules = dict(theirs.named_modules())
    for name, module in ours.named_modules():
        other = modules.pop(name, None)
        if type(module) is not type(other):
            return f"{name or 'model'} is a {_class(module)} instead of a {_class(other)}"
        facts = [_facts(module), _facts(other)]
        for key in [*facts[0], *facts[1]]:
            values = [fact.get(key) for fact in facts]
            if values[0] != values[1]:
                return f"{name + '.' if name else ''}{key} is {values[0]!r} instead of {values[1]!r}"
    return f"{next(iter(modules))} is missing" if modules else None


def _facts(module: nn.Module | None) -> dict[str, Any]:
    """The plain attributes of a module, numbers, names, and tuples of them, that decide what it computes."""
    found = {}
    for key, value in vars(module).items():
        parts = value if isinstance(value, tuple | list) else (value,)
        if not key.startswith("_") and key not in HOW and all(isinstance(part, PLAIN) for part in parts):
            found[key] = value
        elif isinstance(value, Tensor):
            found[key] = list(value.shape)
    return found


def _class(module: nn.Module | None) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _shape(architecture: str, options: Mapping[str, Any]) -> Timm:
    """The model with shapes but no numbers, as `moefy` leaves it: without classifier."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        backbone = read_vit(architecture, options)
    backbone.reset_classifier(0)
    return backbone


def _options(backbone: Timm) -> dict[str, Any]:
    """Options of timm's vision transformers that a model shows, as plain data."""
    patch, blocks = getattr(backbone, "patch_embed", None), list(getattr(backbone, "blocks", ()))
    first, last = (blocks[0], blocks[-1]) if blocks else (None, None)
    size, stem = getattr(patch, "img_size", None), getattr(patch, "proj", None)
    hidden = getattr(getattr(getattr(first, "mlp", None), "fc1", None), "out_features", None)
    width = getattr(backbone, "embed_dim", None)
    found = {
        "img_size": None if size is None else list(size),
        "patch_size": getattr(stem, "stride", (None,))[0],
        "in_chans": getattr(stem, "in_channels", None),
        "embed_dim": width,
        "depth": len(blocks),
        "num_heads": getattr(getattr(first, "attn", None), "num_heads", None),
        "mlp_ratio": hidden and width and hidden / width,
        "global_pool": getattr(backbone, "global_pool", None),
        "reg_tokens": getattr(backbone, "num_reg_tokens", None),
        "drop_path_rate": getattr(getattr(last, "drop_path1", None), "drop_prob", 0.0),
        "class_token": getattr(backbone, "has_class_token", None),
        "no_embed_class": getattr(backbone, "no_embed_class", None),
        "drop_rate": getattr(getattr(backbone, "head_drop", None), "p", None),
        "pos_drop_rate": getattr(getattr(backbone, "pos_drop", None), "p", None),
        "attn_drop_rate": getattr(getattr(getattr(first, "attn", None), "attn_drop", None), "p", None),
        "dynamic_img_size": getattr(backbone, "dynamic_img_size", None),
    }
    return {name: value for name, value in found.items() if value is not None and isinstance(value, (*PLAIN, list))}
