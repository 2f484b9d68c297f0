"""Categorical colours of any number, told apart also with colour-blind eyes."""

from functools import lru_cache

import numpy as np

MISSING = (0.80, 0.80, 0.80)  # pixels without a label: light grey, which no class has


@lru_cache
def categorical_palette(size: int) -> np.ndarray:
    """Colours told apart by readers with and without red-green colour blindness, sRGB in 0..1 [size, 3].

    Each next colour is the one farthest, in OKLab, from white, from the grey of missing labels and from all before it,
    under normal vision, protanopia and deuteranopia, whichever is worst; so a shorter palette is the start of a longer
    one. OKLab: Ottosson 2020; the simulation: Machado, Oliveira, Fernandes 2009, severity 1.
    """
    levels = np.linspace(0.0, 1.0, 12)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    normal = _oklab(candidates)
    candidates = candidates[(normal[:, 0] > 0.3) & (normal[:, 0] < 0.93)]
    seen = _seen_by_all(candidates)
    taken = _seen_by_all(np.array([(1.0, 1.0, 1.0), MISSING]))
    distance = np.linalg.norm(seen[:, :, None] - taken[:, None], axis=-1).min(axis=(0, 2))
    chosen = []
    for _ in range(size):
        best = int(distance.argmax())
        chosen.append(candidates[best])
        distance = np.minimum(distance, np.linalg.norm(seen - seen[:, best : best + 1], axis=-1).min(axis=0))
    return np.array(chosen, dtype=np.float32).reshape(size, 3)


_VISION = np.array(
    [
        np.eye(3),
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    ]
)  # linear RGB to linear RGB as seen with normal vision, protanopia, deuteranopia


def _seen_by_all(srgb: np.ndarray) -> np.ndarray:
    """sRGB [n, 3] as OKLab under each vision, [3, n, 3]."""
    return np.stack([_oklab(srgb, vision) for vision in _VISION])


def _oklab(srgb: np.ndarray, vision: np.ndarray = _VISION[0]) -> np.ndarray:
    """sRGB in 0..1 [n, 3] to OKLab [n, 3], through a vision matrix."""
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    linear = (linear @ vision.T).clip(0.0, 1.0)
    lms = (
        linear
        @ np.array(
            [
                [0.4122214708, 0.5363325363, 0.0514459929],
                [0.2119034982, 0.6806995451, 0.1073969566],
                [0.0883024619, 0.2817188376, 0.6299787005],
            ]
        ).T
    )
    return (
        np.cbrt(lms)
        @ np.array(
            [
                [0.2104542553, 0.7936177850, -0.0040720468],
                [1.9779984951, -2.4285922050, 0.4505937099],
                [0.0259040371, 0.7827717662, -0.8086757660],
            ]
        ).T
    )
