"""What every op does around its kernel: argument checks, autocast, and the choice of a backend and of the way to call.

Each op is a whole `torch.library.custom_op`: torch.compile, torch.export and FlopCounterMode see one node per op, and a
backend is free to sort, pad or read counts on the host inside it. Eager calls that nobody traces skip the dispatcher:
they run the same bodies through an `autograd.Function`, which saves about 0.1 ms a layer and direction, a tenth of what
64 tokens of width 96 cost.
"""

import difflib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Where a kernel for another device joins: name -> module with the four functions of cpu.py, imported when it is used.
BACKENDS = {"cpu": "moe_mtl.kernels.cpu", "triton": "moe_mtl.kernels.gpu", "grouped_mm": "moe_mtl.kernels.grouped_mm"}
HAS_TRITON = importlib.util.find_spec("triton") is not None
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


def runs_triton(device: torch.device) -> bool:
    """Whether our Triton kernels run there: NVIDIA chips from compute capability 8.0 on."""
    nvidia = HAS_TRITON and device.type == "cuda" and torch.version.cuda is not None
    return nvidia and torch.cuda.get_device_properties(device).major >= 8


def interpreted() -> bool:
    """Whether Triton kernels are interpreted on the CPU, for tests."""
    return HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def resolve(backend: str, x: Tensor, *widths: int) -> str:
    """The backend that will run.

    "auto" takes the reference under torch.func.grad, vjp, jvp and forward mode: no other backend has formulas for them.
    Elsewhere it takes Triton on the GPUs it is written for. On other devices it takes torch's grouped product where
    dtype and widths allow it; for all else, float64 among it, the segments of cpu.py, which run anywhere but ask for
    counts.

    Args:
        backend: "auto", "reference" or a name in `BACKENDS`.
        x: tokens.
        widths: lengths of the rows of all products.

    Raises:
        ValueError: the name is unknown, or that backend cannot run on these tokens.
    """
    if backend != "reference" and transformed():
        if backend != "auto":
            raise ValueError(
                f"backend: {backend!r} has no formulas for torch.func.grad, vjp, jvp or forward mode; use 'auto' or "
                "'reference'"
            )
        return "reference"
    whole_rows = x.dtype != torch.float64 and all(width * x.element_size() % 16 == 0 for width in widths)
    if backend == "auto":
        if x.device.type == "cpu" or x.dtype == torch.float64:
            return "cpu"
        if runs_triton(x.device):
            return "triton"
        return "grouped_mm" if whole_rows else "cpu"
    check_name("backend", backend, ("auto", "reference", *BACKENDS))
    if backend == "grouped_mm" and not whole_rows:
        raise ValueError(
            f"backend: 'grouped_mm' needs rows of whole 16 bytes and no float64, but widths are {list(widths)} of "
            f"{x.dtype}; use 'auto'"
        )
    if backend == "triton":
        if x.dtype == torch.float64:
            raise ValueError("backend: 'triton' has no float64; use 'cpu', which runs on any device, or 'reference'")
        if not (runs_triton(x.device) or interpreted()):
            raise ValueError(
                f"backend: 'triton' needs the package triton and an NVIDIA GPU of compute capability 8.0 or newer, but "
                f"x is on {x.device}; use 'auto'"
            )
    return backend


@cache
def backend_module(name: str) -> Any:
    """The module of a backend in `BACKENDS`."""
    return importlib.import_module(BACKENDS[name])


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
    if not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype not in DTYPES or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a kind of device; torch has none for "meta", whose tensors are shapes alone."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def casts_late(backend: str, *tensors: Tensor | None) -> bool:
    """Whether autocast leaves float32 weights to the backend, which casts them expert by expert and only where needed.

    So does cpu.py, in calls nobody traces: the weights of an expert without rows are not cast, no copy of a bank is
    kept for the backward, and gradients are written in float32 at once.

    Args:
        backend: as the op was called with.
        tensors: x, then the weights.
    """
    x, *weights = tensors
    return (
        backend in ("auto", "cpu")
        and x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and x.dtype != torch.float64
        and all(w is None or (w.dtype == torch.float32 and w.device == x.device) for w in weights)
        and not traced(x)
    )


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


def batched() -> bool:
    """Whether functorch maps over a batch: its tensors do not tell whether they require a gradient."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def transformed() -> bool:
    """Whether functorch differentiates (grad, vjp, jvp) or forward mode is on: custom ops have no formulas for that."""
    if torch.compiler.is_compiling():
        return False
    kinds = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)
    stack = torch._C._functorch.get_interpreter_stack() if batched() else None
    return forward_ad._current_level >= 0 or any(level.key() in kinds for level in stack or ())


def plain(body: Callable, device: torch.device, *args):
    """Runs a body with the dtypes it was given, also inside an autocast region."""
    if not autocasts(device.type):
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
