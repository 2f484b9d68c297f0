"""LeNet: a small convolutional encoder of pictures, for models of one vector per sample.

Paper: LeCun et al. 1998, https://doi.org/10.1109/5.726791 (two convolutions of 5x5, each followed by a pooling).
Differs: ReLU and maxima instead of squashing functions and averages; all maps of a layer see all of the one before.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from moe_mtl.images import check_images


class LeNet(nn.Module):
    """Pictures to vectors: (5x5 convolution, ReLU, 2x2 maximum) twice.

    Args:
        side: height and width of the pictures in pixels, at least 16.
        channels: colours of a picture.
        maps: of the two convolutions.

    Attributes:
        dim: width of the result.

    Raises:
        ValueError: the pictures are too small.
    """

    input = "image"

    def __init__(self, side: int, channels: int = 1, maps: tuple[int, int] = (10, 20)):
        super().__init__()
        if side < 16:
            raise ValueError(f"side: got {side} pixels, expected at least 16")
        self.side, self.channels = side, channels
        self.first = nn.Conv2d(channels, maps[0], 5)
        self.second = nn.Conv2d(maps[0], maps[1], 5)
        self.dim = maps[1] * (((side - 4) // 2 - 4) // 2) ** 2

    def forward(self, x: Tensor) -> Tensor:
        """Pictures [b, c, side, side] to vectors [b, dim].

        Raises:
            ValueError: another shape or dtype, or something else than images.
        """
        check_images(x, self.first.weight.dtype)
        if x.shape[1:] != (self.channels, self.side, self.side):
            raise ValueError(
                f"x: got {list(x.shape)}, expected pictures [b, {self.channels}, {self.side}, {self.side}]"
            )
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        return F.max_pool2d(F.relu(self.second(x)), 2).flatten(1)
