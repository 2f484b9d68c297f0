"""How the kernels are launched: without binding and specialising the arguments anew where that was done before.

Triton works out on every call which compiled kernel fits the arguments, which takes the host longer than a small kernel
takes the GPU. The compiled kernel is kept here, by all that decides which one it is, and called directly.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_mtl.kernels import configs
from moe_mtl.kernels.configs import Config

_compiled: dict[tuple, Any] = {}
_free: dict[int, tuple[bool, ...]] = {}  # which parameters of a kernel are compiled for any value or alignment


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
        kernel: decorated with `triton.jit`; its parameters are the arguments and then the constants, in order.
        grid: programs, up to three axes.
        args: tensors, `TensorDescriptor`s, integers, None.
        constants: the compile-time constants, all of them, in the order of the parameters.
        warps: per program.
        stages: steps in flight.
        options: more options of the compiler.
    """
    device = (args[0].base if type(args[0]) is TensorDescriptor else args[0]).device
    on_gpu = device.type == "cuda"
    if on_gpu and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, args, constants, warps, stages, **options)
    key = compiled = None
    if on_gpu:
        free = _free.get(id(kernel))
        if free is None:
            free = _free[id(kernel)] = tuple(map(_any_value, kernel.params[: len(args)]))
        kinds = [_kind(arg, any_value) for arg, any_value in zip(args, free, strict=True)]
        key = (id(kernel), device.index, warps, stages, *options.items(), *constants.values(), *kinds)
        compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(*grid, 1, 1)[:3]](*args, *constants.values())
        return None
    _check_order(kernel, args, constants)
    compiled = kernel[grid](*args, **constants, num_warps=warps, num_stages=stages, **options)
    if on_gpu and isinstance(compiled, triton.compiler.CompiledKernel):  # None where someone watches the launches
        _compiled[key] = compiled
    return None


def _check_order(kernel: Any, args: tuple, constants: dict[str, Any]) -> None:
    """Refuses constants that are not the kernel's last parameters in order: compiled kernels take them by place.

    Raises:
        TypeError: with the parameters.
    """
    expected = list(kernel.arg_names[len(args) :])
    if list(constants) != expected:
        raise TypeError(f"constants: got {list(constants)}, expected {expected} after {len(args)} arguments")


def _any_value(parameter: Any) -> bool:
    return bool(parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)


def _kind(arg: Any, any_value: bool) -> Any:
    """What of an argument decides about the code."""
    if type(arg) is int:
        return arg >> 31 if any_value else arg
    if arg is None:
        return None
    if type(arg) is TensorDescriptor:
        return (arg.base.dtype, *arg.block_shape)
    return arg.dtype, not any_value and arg.data_ptr() % 16


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


def cdiv(size: int, block: int) -> int:
    """How many blocks cover it. Triton's own functions for this take ten times as long as the sum."""
    return -(-size // block)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (number - 1).bit_length()
