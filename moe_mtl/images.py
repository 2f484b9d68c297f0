"""Batches of images: what a model refuses."""

from typing import Any

import torch
from torch import Tensor


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
