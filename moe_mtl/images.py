"""Batches of images: what a model refuses, and the range of colours that it was made for."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn


class Colours(NamedTuple):
    """What becomes of colours of 0..1 before a model sees them: `mean` is subtracted, the rest divided by `std`.

    Attributes:
        mean: per colour, or one for all.
        std: per colour, or one for all.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @classmethod
    def of(cls, mean: Sequence[float] | None, std: Sequence[float] | None) -> Self:
        """Colours as a configuration or a library names them, None for nothing to subtract or divide by.

        Raises:
            ValueError: a standard deviation that is not above 0.
        """
        given = ([] if values is None else [float(value) for value in values] for values in (mean, std))
        mean, std = (tuple(values) or neutral for values, neutral in zip(given, ((0.0,), (1.0,)), strict=True))
        if not all(value > 0 for value in std):
            raise ValueError(f"std: got {list(std)}, expected numbers above 0")
        return cls(mean, std)


AS_THEY_ARE = Colours()


def write_colours(model: Any, args: dict[str, Any]) -> None:
    """Puts the colours of a model, or of a set of single-task models, into its options where these name colours."""
    colours = next((part.colours for part in _parts(model) if hasattr(part, "colours")), None)
    if isinstance(colours, tuple) and len(colours) == 2 and "mean" in args and "std" in args:
        args |= {name: list(values) for name, values in Colours.of(*colours)._asdict().items()}


def learn_colours(model: Any, x: Tensor, *, whole: bool) -> str | None:
    """Notes, in a model and in its configuration, that it learns from colours as they are, where images are of 0..1.

    Args:
        model: of images, or a set of single-task models; others are left alone.
        x: images it is about to learn from. Colours outside 0..1 were scaled by whoever made them, as the model had it.
        whole: all its tasks learn; a model of which others are to stay what they are keeps its colours.

    Returns:
        What to tell the user; None where the colours are those the model was made for.
    """
    scaled = [part for part in _parts(model) if isinstance(getattr(part, "colours", None), Colours)]
    scaled = [part for part in scaled if part.colours != AS_THEY_ARE]
    if not scaled or not x.numel() or x.min() < 0 or x.max() > 1:
        return None
    mean, std = (", ".join(f"{value:.3g}" for value in values) for values in scaled[0].colours)
    told = f"images: colours of 0 to 1, of a model made for mean {mean} and std {std}"
    if not whole:
        return f"{told}; moe_mtl.Predictor scales pictures so: scale these, or the tasks learn from other colours"
    for part in scaled:
        part.colours = AS_THEY_ARE
    config = getattr(model, "config", None)
    args = config.get("args") if isinstance(config, dict) else None
    if isinstance(args, dict):
        write_colours(model, args)
    return f"{told}; from now on moe_mtl.Predictor leaves them as they are"


def _parts(model: Any) -> list[Any]:
    """A model and those it is a set of. In a model of one's own `models` may be anything."""
    models = getattr(model, "models", None)
    return [model, *(models.values() if isinstance(models, nn.ModuleDict) else ())]


def check_images(x: Any, dtype: torch.dtype) -> None:
    """Refuses what is no batch of images.

    Args:
        x: what a model was called with.
        dtype: of the model.

    Raises:
        ValueError: names what came, or its shape or dtype.
    """
    if not isinstance(x, Tensor):
        raise ValueError(
            f"x: got {type(x).__name__}, expected a tensor of images [b, c, h, w]: the batch's entry 'image', or what "
            "moe_mtl.data.collate makes of samples; moe_mtl.Predictor takes pictures of any form"
        )
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(
            f"x: got {x.dtype} {list(x.shape)}, expected floating point images [b, c, h, w]; "
            "add the batch axis to a single image, divide uint8 by 255"
        )
    if x.shape[0] == 0:
        raise ValueError("x: got an empty batch")
    if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"x: got {x.dtype} images, the model is {dtype}; cast one of them or use torch.autocast")
