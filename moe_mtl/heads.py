"""Heads: shared features to one task's prediction. LayerNorm and GroupNorm only, so that a batch of one works."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from moe_mtl.tasks import Task


@dataclass(frozen=True)
class Features:
    """What a backbone hands to the heads.

    Attributes:
        patches: patch tokens [b, n, d], row-major over `grid`; for text, the tokens.
        pooled: one vector per sample [b, d].
        grid: patches per column and row; (1, n) for text.
        image_size: height and width of the input in pixels; (1, n) for text.
    """

    patches: Tensor
    pooled: Tensor
    grid: tuple[int, int]
    image_size: tuple[int, int]

    def select(self, rows: Tensor | slice) -> "Features":
        """The same for some of the samples."""
        return Features(self.patches[rows], self.pooled[rows], self.grid, self.image_size)


class PooledHead(nn.Module):
    """One vector per image to class logits, label logits or values: norm, hidden layer, output.

    Args:
        task: an image-level task.
        dim: width d of the features.
    """

    def __init__(self, task: Task, dim: int):
        super().__init__()
        self.scalar, self.mean, self.std = task.is_scalar, task.mean, task.std
        self.norm = nn.LayerNorm(dim)
        self.hidden = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, task.channels)

    def forward(self, features: Features) -> Tensor:
        """Prediction [b, c]; [b] for a binary task and a regression of one value."""
        y = self.out(F.gelu(self.hidden(self.norm(features.pooled)))) * self.std + self.mean
        return y.squeeze(-1) if self.scalar else y


class TokenHead(nn.Module):
    """Every token to the logits of its tags: norm, hidden layer, output.

    Args:
        task: a tagging task.
        dim: width d of the tokens.
    """

    def __init__(self, task: Task, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.hidden = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, task.channels)

    def forward(self, features: Features) -> Tensor:
        """Prediction [b, c, n]."""
        return self.out(F.gelu(self.hidden(self.norm(features.patches)))).transpose(1, 2)


class DenseHead(nn.Module):
    """Patch tokens to one prediction per pixel by two sub-pixel upsamplings with a convolution after each.

    Token [d] -> `width` maps at half resolution -> 3x3 convolution -> 3x3 convolution to 4c maps -> c at full
    resolution. Depth is made positive by softplus, normals have unit length.

    Args:
        task: a dense task.
        dim: width d of the tokens.
        patch_size: pixels per patch side, even.
        width: feature maps at half resolution, a multiple of 4.

    Raises:
        ValueError: an odd patch size, or a width that is not a multiple of 4.
    """

    def __init__(self, task: Task, dim: int, patch_size: int, width: int = 16):
        super().__init__()
        if patch_size % 2:
            raise ValueError(f"patch_size: got {patch_size}, the dense head upsamples by 2 last and needs an even one")
        if width < 4 or width % 4:
            raise ValueError(f"width: got {width} feature maps, the dense head needs a multiple of 4")
        self.kind = task.kind
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, width * (patch_size // 2) ** 2)
        self.upscale = patch_size // 2
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.conv_norm = nn.GroupNorm(4, width)
        self.out = nn.Conv2d(width, task.channels * 4, 3, padding=1)

    def forward(self, features: Features) -> Tensor:
        """Prediction [b, c, h, w]; [b, h, w] for depth and binary maps."""
        (gh, gw), r = features.grid, self.upscale
        y = self.expand(self.norm(features.patches))
        y = rearrange(y, "b (gh gw) (c rh rw) -> b c (gh rh) (gw rw)", gh=gh, gw=gw, rh=r, rw=r)
        y = F.gelu(self.conv_norm(self.conv(F.gelu(y))))
        y = F.pixel_shuffle(self.out(y), 2)
        if y.shape[-2:] != features.image_size:
            y = F.interpolate(y, size=features.image_size, mode="bilinear", align_corners=False)
        if self.kind == "depth":
            return F.softplus(rearrange(y, "b 1 h w -> b h w"))
        if self.kind == "normals":
            return unit(y)
        return rearrange(y, "b 1 h w -> b h w") if self.kind == "binary_map" else y


def unit(y: Tensor) -> Tensor:
    """Vectors along axis 1 divided by their length, in float32 at least; the zero vector stays zero.

    On a CPU many times faster than `F.normalize`, whose norm over an axis of three is slow.
    """
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    return (wide * wide.square().sum(dim=1, keepdim=True).clamp_min(1e-24).rsqrt()).to(y.dtype)


def make_head(task: Task, dim: int, patch_size: int, width: int = 16) -> nn.Module:
    """The head of a task on features of width `dim`."""
    if task.is_dense:
        return DenseHead(task, dim, patch_size, width)
    return TokenHead(task, dim) if task.kind == "tagging" else PooledHead(task, dim)
