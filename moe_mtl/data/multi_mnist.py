"""Multi-MNIST: two digits in one picture, one task for each.

Source: LeCun et al. 1998, the MNIST files (http://yann.lecun.com/exdb/mnist); pictures as in Sener and Koltun 2018
(https://arxiv.org/abs/1810.04650): one digit at the top left, another at the bottom right, the brighter pixel wins.
"""

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from moe_mtl.tasks import Task, nearest

DIGIT, SIDE = 28, 36  # pixels of a digit and of a picture
FILES = {"train": "train", "val": "train", "test": "t10k"}
HELD = 10_000  # of the training digits, the last, for validation
STREAM = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True, kw_only=True)
class MultiMNIST:
    """Multi-MNIST.

    Tasks: `left`, the digit at the top left, and `right`, that at the bottom right, ten classes each. Pictures are
    [1, 36, 36]. Every digit of a split stands once at the top left; its partner is drawn from the same split. The last
    10,000 training digits are for validation; those of the test file are for testing alone.

    Attributes:
        root: folder with the four MNIST files, as they are or gzipped.
        seed: of the partners.
        limit: pictures per split at most; all when None.

    Raises:
        ValueError: a negative seed, or a limit below 1.
    """

    root: str | None = None
    seed: int = 0
    limit: int | None = None

    def __post_init__(self):
        if self.seed < 0:
            raise ValueError(f"seed: got {self.seed}, expected 0 or more")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: got {self.limit}, expected at least 1, or None for all")

    def task_list(self) -> tuple[Task, ...]:
        """The two digits."""
        return (Task.classification("left", 10), Task.classification("right", 10))

    def split(self, name: str) -> "Pairs":
        """The pictures of one split, "train", "val" or "test".

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: an unknown split, no folder named, or a file that is no MNIST file.
        """
        if name not in FILES:
            raise ValueError(f"name: unknown split {name!r}; {nearest(name, FILES)}")
        digits = read_idx(find(self.root, f"{FILES[name]}-images-idx3-ubyte"), 3)
        labels = read_idx(find(self.root, f"{FILES[name]}-labels-idx1-ubyte"), 1)
        if len(digits) != len(labels) or digits.shape[1:] != (DIGIT, DIGIT):
            raise ValueError(
                f"root: {len(digits)} digits {digits.shape[1:]} and {len(labels)} labels do not belong together"
            )
        held = min(HELD, len(digits) // 6)
        part = {"train": slice(0, len(digits) - held), "val": slice(len(digits) - held, None)}.get(name, slice(None))
        digits, labels = digits[part], labels[part]
        partner = np.random.default_rng([self.seed, STREAM[name]]).permutation(len(digits))
        count = len(digits) if self.limit is None else min(self.limit, len(digits))
        return Pairs(digits, labels, np.arange(count), partner[:count])


class Pairs(Dataset):
    """Pictures of two digits, put together when they are asked for; a batch of indices comes stacked.

    Args:
        digits: uint8 [n, 28, 28].
        labels: [n].
        left: index of the digit at the top left, per picture.
        right: index of that at the bottom right.
    """

    def __init__(self, digits: NDArray, labels: NDArray, left: NDArray, right: NDArray):
        self.digits, self.labels = torch.from_numpy(digits), torch.from_numpy(labels.astype(np.int64))
        self.left, self.right = torch.from_numpy(left), torch.from_numpy(right)

    def __len__(self) -> int:
        return len(self.left)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One sample: `image` float32 [1 36 36] in 0..1, `left` and `right` int64 []."""
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """A batch of samples, stacked: `image` [b 1 36 36], `left` and `right` [b]."""
        ids = torch.as_tensor(indices)
        left, right = self.left[ids], self.right[ids]
        image = torch.zeros(len(ids), SIDE, SIDE, dtype=torch.uint8)
        image[:, :DIGIT, :DIGIT] = self.digits[left]
        corner = image[:, -DIGIT:, -DIGIT:]
        torch.maximum(corner, self.digits[right], out=corner)
        return {"image": image.unsqueeze(1).float() / 255, "left": self.labels[left], "right": self.labels[right]}


def find(root: str | None, name: str) -> Path:
    """An MNIST file in a folder, gzipped or not."""
    if root is None:
        raise ValueError("root: name the folder with the MNIST files, as --data.root=FOLDER")
    found = [Path(root) / f"{form}{end}" for form in (name, name.replace("-idx", ".idx")) for end in (".gz", "")]
    path = next((p for p in found if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"root: {found[0]} is missing")
    return path


def read_idx(path: Path, axes: int) -> NDArray[np.uint8]:
    """An idx file of bytes.

    Raises:
        ValueError: it is truncated, or no such file.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"root: {path} cannot be unpacked ({error})") from error
    shape = tuple(int(n) for n in np.frombuffer(data[4 : 4 + 4 * axes], dtype=">u4"))
    if data[:4] != bytes([0, 0, 8, axes]) or len(data) != 4 + 4 * axes + int(np.prod(shape)):
        raise ValueError(f"root: {path} is no complete idx file of {axes} axes")
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape).copy()
