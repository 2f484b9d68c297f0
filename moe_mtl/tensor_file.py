"""Tensors of a safetensors file, read into memory that is there already.

The safetensors library maps a file: every page that was read counts as memory of the process while the mapping lives.
Here the bytes that are asked for, and no others, are read into the tensor that asks.
"""

import json
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PIECE = 1 << 18  # numbers converted at a time, where the file holds another type


@dataclass(frozen=True)
class Entry:
    """Where a tensor stands in the file.

    Attributes:
        dtype: of its numbers there.
        shape: of the tensor.
        start: its first byte.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


class TensorFile:
    """A safetensors file, open for reading. It stays the file it was if another is moved into its place.

    Processes forked from one that has it open may read at the same time: no read moves a position that they share.

    Args:
        path: a complete file; `moe_mtl.hub.read_config` refuses others.

    Attributes:
        entries: what it holds, by name.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115  it is read for as long as the object lives
        weakref.finalize(self, self._file.close)
        size = int.from_bytes(self._file.read(8), "little")
        header: dict[str, Any] = json.loads(self._file.read(size))
        header.pop("__metadata__", None)
        self.entries = {
            name: Entry(DTYPES[found["dtype"]], tuple(found["shape"]), 8 + size + found["data_offsets"][0])
            for name, found in header.items()
        }

    @torch.no_grad()
    def read(self, name: str, out: Tensor, index: int | None = None) -> None:
        """Fills a tensor, in place and in its own dtype.

        Args:
            name: one of `entries`.
            out: contiguous, on the CPU, of the shape of what is read.
            index: to read one entry of the first axis; all when None.

        Raises:
            ValueError: `out` has another shape, or the file has become shorter.
        """
        entry = self.entries[name]
        shape = entry.shape if index is None else entry.shape[1:]
        if tuple(out.shape) != shape:
            raise ValueError(f"out: got {list(out.shape)} for {name} of {list(shape)}")
        flat, width = out.detach().view(-1), entry.dtype.itemsize
        start = entry.start + (index or 0) * flat.numel() * width
        if out.dtype == entry.dtype:
            self._fill(flat, start, name)
            return
        staged = torch.empty(min(PIECE, flat.numel()), dtype=entry.dtype)
        for at, piece in enumerate(flat.split(PIECE)):
            self._fill(staged[: len(piece)], start + at * PIECE * width, name)
            piece.copy_(staged[: len(piece)])

    def _fill(self, flat: Tensor, start: int, name: str) -> None:
        """Reads as many bytes as a flat tensor has, from a place in the file on."""
        array: Any = flat.view(torch.uint8).numpy()
        view, done = memoryview(array), 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], start + done)
            if not count:
                raise ValueError(f"{self.path} ends within {name}: it was changed while it was in use; load it again")
            done += count
