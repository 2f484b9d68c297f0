"""Tile sizes of the Triton kernels, by chip, dtype and shape: a table in configs.json, nothing tuned while running.

`benchmarks/tune.py` writes the table from a sweep; tests/test_compiled_kernels.py compiles every entry.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("configs.json")
KERNELS = ("up", "down", "hidden_grad", "weight_grad", "fused")


@dataclass(frozen=True)
class Config:
    """Sizes of one kernel's tiles.

    Attributes:
        block_m: rows of a tile; one of `moe_mtl.kernels.plan.TILE_ROWS`, but for weight_grad, where it counts outputs.
        block_n: columns of a tile.
        block_k: how much of the summed axis a step takes.
        warps: per program.
        stages: steps in flight.
        group: row tiles that use a column of weights before the next column's turn.
        epilogues: parts of a tile's columns, 1, 2 or 4, that are finished one after the other, which saves registers.
        registers: per thread, at most; None for as many as the compiler wants. Few let two programs share a processor,
            so that one multiplies while the other finishes its tile.
        warp_specialized: what the kernels of `moe_mtl.kernels.gluon_ring` take: block_k is `SUMMED`, warps are 4, those
            of a partition, stages are slots of the ring, epilogues 1, 2, 4 or 8, and registers None.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 3
    group: int = 8
    epilogues: int = 1
    registers: int | None = None
    warp_specialized: bool = False


SUMMED = 64  # block_k of warp-specialized configs
INTERPRETED = Config(32, 32, 32)
HOPPER = 90  # its compute capability
HOPPER_SHARED = 227 * 1024  # bytes a program can have, which the lines for 90 count on


@dataclass(frozen=True)
class Entry:
    """A line of the table: the first that fits is taken.

    Attributes:
        kernel: one of `KERNELS`.
        arch: the chip's compute capability, 80 or 90; a chip takes the newest not newer than itself.
        bits: of a number, 16 or 32.
        glu: for experts with a gated linear unit, which have twice the first layer; None for both.
        max_rows: up to that many rows per expert; None for any number.
        max_width: up to that width of the result; None for any.
        config: what to use. A line whose config is warp-specialized speaks of calls that can run such kernels.
    """

    kernel: str
    arch: int
    bits: int
    config: Config
    glu: bool | None = None
    max_rows: int | None = None
    max_width: int | None = None

    def fits(
        self, kernel: str, arch: int, bits: int, glu: bool, rows: float, width: int, warp_specialized: bool = False
    ) -> bool:
        """Whether this line speaks of such a call."""
        return (
            (self.kernel, self.arch, self.bits) == (kernel, arch, bits)
            and self.glu in (None, glu)
            and (warp_specialized or not self.config.warp_specialized)
            and (self.max_rows is None or rows <= self.max_rows)
            and (self.max_width is None or width <= self.max_width)
        )


@cache
def entries() -> tuple[Entry, ...]:
    """The table."""
    lines = json.loads(TABLE.read_text())
    return tuple(Entry(**(line | {"config": Config(**line["config"])})) for line in lines)


@cache
def pick(kernel: str, arch: int, bits: int, glu: bool, rows: int, width: int, warp_specialized: bool = False) -> Config:
    """The tile sizes for a call.

    Args:
        kernel: one of `KERNELS`.
        arch: the chip's compute capability, 90 for 9.0; 0 for the interpreter.
        bits: of a number.
        glu: experts with a gated linear unit.
        rows: per expert on average.
        width: of the result.
        warp_specialized: the call can run a warp-specialized kernel; see `triton_launch.warp_specializes`.

    Raises:
        ValueError: no line of the table fits.
    """
    if arch == 0:
        return INTERPRETED
    known = [a for a in sorted({entry.arch for entry in entries()}) if a <= arch]
    for entry in entries():
        if known and entry.fits(kernel, known[-1], bits, glu, rows, width, warp_specialized):
            return entry.config
    raise ValueError(f"backend: {TABLE.name} has no {kernel} for compute capability {arch / 10:.1f}; use backend='cpu'")


@cache
def chip(device: torch.device) -> tuple[int, int]:
    """Compute capability (90 for 9.0) and number of processors of a device; 0 and 1 where kernels are interpreted.

    A newer chip with less memory beside its processors than Hopper, as consumers' are, counts as the last before it.
    """
    if device.type != "cuda":
        return 0, 1
    properties = torch.cuda.get_device_properties(device)
    arch = 10 * properties.major + properties.minor
    if arch >= HOPPER and properties.shared_memory_per_block_optin < HOPPER_SHARED:
        arch = 89
    return arch, properties.multi_processor_count
