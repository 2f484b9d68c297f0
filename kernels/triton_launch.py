"""How the kernels are launched, and with which blocks of memory for the copy engine."""

import os
import threading
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_mtl.kernels import configs
from moe_mtl.kernels.configs import Config

# Gluon, in which the warp-specialized kernels are written, is experimental and may change with any version of Triton:
# these compile the kernels (tests/test_compiled_kernels.py, `make test-triton36`), and 3.6 has run them on a GPU. With
# another version, or MOE_MTL_GLUON=0, the others run.
GLUON_KNOWN = ("3.6.", "3.7.")
GLUON = os.environ.get("MOE_MTL_GLUON", "1") not in ("", "0")
MOST_EXPERTS = 4096  # whose offsets a program of them reads at once
TILE = 128  # rows, and columns, of a tile of weights
TILES_EACH = 4  # of a processor, from which the warp-specialized kernel makes gradients of weights faster


class _Watcher(threading.local):
    """Who is told of every launch of this thread; see `moe_mtl.kernels.triton_replay`."""

    record: Any = None


watcher = _Watcher()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple,
    constants: dict[str, Any],
    warps: int,
    stages: int = 3,
    **options: int,
) -> None:
    """Launches a kernel on the device of its first argument.

    Args:
        kernel: of `triton.jit` or `gluon.jit`; its parameters are the arguments and then the constants, in order.
        grid: programs, up to three axes.
        args: tensors, `TensorDescriptor`s of Triton or of Gluon, integers, None; the first a tensor or a descriptor.
        constants: the compile-time constants, all of them, in the order of the parameters.
        warps: per program.
        stages: steps in flight.
        options: more options of the compiler.

    Raises:
        TypeError: the constants are not the kernel's last parameters in order.
    """
    device = (args[0] if isinstance(args[0], Tensor) else args[0].base).device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, args, constants, warps, stages, **options)
    compiled = kernel[grid](*args, **constants, num_warps=warps, num_stages=stages, **options)
    if watcher.record is not None:  # compiled kernels take constants by place
        expected = list(kernel.arg_names[len(args) :])
        if list(constants) != expected:
            raise TypeError(f"constants: got {list(constants)}, expected {expected} after {len(args)} arguments")
        watcher.record.add(compiled, grid, (*args, *constants.values()))
    return None


def options_of(config: Config) -> dict[str, int]:
    """The options of the compiler in a config."""
    more = {"maxnreg": config.registers} if config.registers else {}
    return {"warps": config.warps, "stages": config.stages, **more}


def described(t: Tensor, *block: int) -> Tensor | TensorDescriptor:
    """A tensor for loads of whole blocks, which a chip's copy engine does (TMA, from Hopper on); see `describable`."""
    return TensorDescriptor(t, t.shape, t.stride(), list(block))


def describable(t: Tensor) -> bool:
    """Whether blocks of it can be loaded by `described`: 16-bit numbers, rows of whole 16 bytes, from Hopper on."""
    *strides, last = t.stride()
    return (
        t.element_size() == 2
        and last == 1
        and all(stride and stride % 8 == 0 for stride in strides)
        and t.data_ptr() % 16 == 0
        and t.numel() > 0
        and loads_blocks(t.device)
    )


def loads_blocks(device: torch.device) -> bool:
    """Whether a chip loads blocks by itself; the interpreter does as if."""
    return configs.chip(device)[0] not in range(1, 90)


def runs_gluon(device: torch.device) -> bool:
    """Whether the warp-specialized kernels run there: they are made of Hopper's products and barriers."""
    return GLUON and configs.chip(device)[0] == configs.HOPPER and triton.__version__.startswith(GLUON_KNOWN)


def warp_specializes(a: Tensor, w: Tensor, width: int, transposed: bool = False) -> bool:
    """Whether the warp-specialized kernels can multiply sorted rows with the weights of their experts.

    They read whole blocks, and write them or whole 16 bytes. Without `transposed` the copy engine's zeros follow the
    summed axis; with it, the next expert's weights do, so it must end with a block.

    Args:
        a: rows [r, k].
        w: [e, n, k], or [e, k, n] where `transposed`.
        width: of the result.
        transposed: see `w`.
    """
    return (
        runs_gluon(a.device)
        and describable(a)
        and describable(w)
        and w.is_contiguous()
        and width % 8 == 0
        and w.shape[0] <= MOST_EXPERTS
        and max(a.shape[0] * width, w.shape[0] * w.shape[1], w.shape[0] * width) < 2**31  # what 32 bits count
        and (not transposed or w.shape[1] % configs.SUMMED == 0)
    )


def warp_specializes_sums(a: Tensor, b: Tensor, experts: int) -> bool:
    """Whether the warp-specialized kernel can make the gradients of weights, and whether it should.

    It writes whole 16 bytes. Each processor has several of its tiles: with fewer, one product follows another in its
    epilogue too seldom, and rows would have to be split to give all processors work, which this kernel does not do.

    Args:
        a: gradients of the layer's outputs, sorted rows [r, o].
        b: its inputs, sorted rows [r, i].
        experts: e.
    """
    rows_out, cols_out = a.shape[1], b.shape[1]
    return (
        runs_gluon(a.device)
        and describable(a)
        and describable(b)
        and cols_out % 8 == 0
        and rows_out * cols_out < 2**31  # places in the weights of an expert
        and a.shape[0] < 2**31 - TILE
        and experts * cdiv(rows_out, TILE) * cdiv(cols_out, TILE) >= TILES_EACH * configs.chip(a.device)[1]
    )


def cdiv(size: int, block: int) -> int:
    """How many blocks cover it. Triton's own functions for this take ten times as long as the sum."""
    return -(-size // block)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (number - 1).bit_length()
