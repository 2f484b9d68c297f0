"""What every op does around its kernel: argument checks, autocast, and the choice of a backend and of the way to call.

Each op is a whole `torch.library.custom_op`: torch.compile, torch.export and FlopCounterMode see one node per op, and a
backend is free to sort, pad or read counts on the host inside it. Eager calls that nobody traces skip the dispatcher:
they run the same bodies through an `autograd.Function`, which saves about 0.1 ms a layer and direction, a tenth of what
64 tokens of width 96 cost.
"""

import difflib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_mtl.kernels import cpu

# Where a kernel for another device joins: name -> module with the four functions of cpu.py.
BACKENDS: dict[str, Any] = {"cpu": cpu}
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


def shape(t: Tensor) -> list[int]:
    """The sizes, for a message."""
    return list(t.shape)


def check_name(argument: str, name: str, known) -> None:
    """Refuses a name that is not among the known ones.

    Raises:
        ValueError: with the known names, and the nearest.
    """
    if name not in known:
        near = difflib.get_close_matches(str(name), list(known), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{argument}: got {name!r}, known: {', '.join(known)}{hint}")


def resolve(backend: str) -> str:
    """The backend that will run. "auto" is the segment code, the only one, for every device."""
    if backend == "auto":
        return "cpu"
    check_name("backend", backend, ("auto", "reference", *BACKENDS))
    return backend


def check_kind(x: Tensor, **others: Tensor | None) -> None:
    """Refuses a dtype no kernel takes, and tensors of another dtype or device than x.

    Raises:
        ValueError: with the argument's name.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"x: got {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    for name, t in others.items():
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            raise ValueError(f"{name}: got {t.dtype} on {t.device}, but x is {x.dtype} on {x.device}")


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast would cast them, unchanged where it is off; the first decides the device.

    `torch.library.register_autocast` would cast the gates too, which stay float32.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def traced(x: Tensor) -> bool:
    """Whether someone watches the dispatcher (compile, export, a dispatch mode, functorch) and must see the op."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward may come."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def plain(body: Callable, device: torch.device, *args):
    """Runs a body with the dtypes it was given, also inside an autocast region."""
    if not torch.is_autocast_enabled(device.type):
        return body(*args)
    with torch.autocast(device.type, enabled=False):
        return body(*args)


def refuse(ctx, *grads):
    """The backward of a backward."""
    raise RuntimeError(
        "moe_mtl expert ops are differentiable once: this backward was differentiated again (create_graph=True). "
        'Use backend="reference" where a second derivative is needed.'
    )


def filled(grads: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Gradients as a custom op can return them: an empty tensor for None."""
    return tuple(like.new_empty(0) if g is None else g for g in grads)


def wanted(grads: tuple[Tensor, ...], need: list[bool], others: int) -> tuple[Tensor | None, ...]:
    """Gradients as autograd wants them: None where not needed, and for the other arguments of the op."""
    return *(g if n else None for g, n in zip(grads, need, strict=True)), *(None,) * others
