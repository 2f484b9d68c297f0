"""Models in bounded memory: the experts stay in the file, and those a layer is about to use are read when it runs.

One window, as large as the largest bank, serves all layers in turn. A bank's experts have the places in it that they
have in memory, so the kernels see the same shapes and compute the same bits; places of experts that no token uses are
not read to, and take no memory until some are. What counts as memory of the process is the dense part and the window;
what the system keeps of the file in its page cache is not the process's, and goes when memory is needed.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from moe_mtl import hub
from moe_mtl.experts import WEIGHTS, ExpertBank, shapes_only
from moe_mtl.routing import Routing
from moe_mtl.tensor_file import TensorFile

ALIGNED = 16  # numbers: parts of the window start where a tensor of their own might


def load_bounded(folder: str | os.PathLike[str]) -> nn.Module:
    """The model of a folder, in evaluation mode and float32, whose expert banks are `FileBank`s.

    It predicts what `moe_mtl.load(folder)` predicts, to the bit, and does nothing else: it cannot be trained, copied or
    saved. Experts that are no `ExpertBank`, such as the small ones of models for tables, are in memory like the rest.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: the files are truncated or belong to another architecture.
    """
    folder = Path(folder)
    config, where = hub.read_config(folder)
    with shapes_only():
        model = hub.build(config, where)
    file, state = TensorFile(folder / hub.WEIGHTS), model.state_dict()
    shapes = {name: entry.shape for name, entry in file.entries.items()}
    hub.check_shapes(shapes, {name: t.shape for name, t in state.items()}, file.path)
    for name, tensor in state.items():
        if not tensor.is_meta:
            file.read(name, tensor)
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, ExpertBank)]
    window = Window(max((_places(bank)[1] for _, bank in found), default=0))
    for path, bank in found:
        model.set_submodule(path, FileBank(bank, file, f"{path}.", window))
    return model.eval()


class Window:
    """Memory for the experts of one bank at a time.

    Args:
        size: numbers it has room for.

    Attributes:
        storage: float32 [size]. Pages that nothing was written to take no memory.
        owner: the bank that wrote last.
        held: the experts of that bank which are there.
    """

    def __init__(self, size: int):
        self.storage = torch.empty(size)
        self.owner: FileBank | None = None
        self.held: set[int] = set()


class FileBank(ExpertBank):
    """A bank whose experts stay in a safetensors file; for prediction on a CPU.

    Args:
        bank: of the shapes it has; its weights are not read.
        file: holds them.
        prefix: of their names there.
        window: where they are read to; banks that run one after the other share one.
    """

    def __init__(self, bank: ExpertBank, file: TensorFile, prefix: str, window: Window):
        nn.Module.__init__(self)
        self.num_experts, self.dim, self.hidden, self.out_dim = bank.num_experts, bank.dim, bank.hidden, bank.out_dim
        self.activation, self.glu = bank.activation, bank.glu
        self.file, self.prefix, self.window = file, prefix, window
        places, _ = _places(bank)
        self._parts: dict[str, Tensor] = {
            name: window.storage[start : start + shape.numel()].view(shape) for name, (start, shape) in places.items()
        }

    def forward(self, x: Tensor, routing: Routing, *, backend: str = "auto") -> Tensor:
        """Reads the experts that the tokens use, then runs them; as `ExpertBank.forward`.

        Raises:
            ValueError: as there; gradients are asked for, which would be those of weights that are gone by then; or
                the call is traced, and would be done again without reading.
        """
        self._check_use(x)
        self._check(x, routing)
        every = range(self.num_experts)
        self._read(every if routing.indices is None else self._slots(routing).unique().tolist())
        return super().forward(x, routing, backend=backend)

    def alone(self, x: Tensor) -> Tensor:
        """Reads the only expert, then runs it; as `ExpertBank.alone`, refusing as `forward` does."""
        self._check_use(x)
        self._read([0])
        return super().alone(x)

    def _check_use(self, x: Tensor) -> None:
        """Refuses calls that would use the weights later on."""
        if x.requires_grad and torch.is_grad_enabled():
            self._refuse("trained")
        if torch.compiler.is_compiling():
            self._refuse("exported")

    def _read(self, ids: Iterable[int]) -> None:
        """Fetches the experts of these ids that are not in the window; those of unused slots are left out."""
        window, every = self.window, range(self.num_experts)
        if window.owner is not self:
            window.owner, window.held = self, set()
        for e in ids:
            if e in every and e not in window.held:
                for name, part in self._parts.items():
                    self.file.read(self.prefix + name, part[e], e)
                window.held.add(e)

    def _weights(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        w1, b1, w2, b2 = (self._parts.get(name) for name in WEIGHTS)
        assert w1 is not None and w2 is not None
        return w1, b1, w2, b2

    def __getattr__(self, name: str) -> Any:
        if name in WEIGHTS:
            self._refuse("read as tensors")
        return super().__getattr__(name)

    def for_task(self, ids: Sequence[int], mode: str = "copy") -> NoReturn:
        """Refused: the experts are in a file."""
        self._refuse("cut out")

    def copy_experts(self, ids: Sequence[int]) -> None:
        """Refused: the experts are in a file."""
        self._refuse("copied")

    def keep_experts(self, ids: Sequence[int]) -> None:
        """Refused: the experts are in a file."""
        self._refuse("dropped")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._refuse("saved")

    def __deepcopy__(self, memo: Any) -> NoReturn:
        self._refuse("copied")

    def _refuse(self, what: str) -> NoReturn:
        path = self.file.path
        raise ValueError(
            f"model: its experts stay in {path} and cannot be {what}; take moe_mtl.load({str(path.parent)!r})"
        )

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"num_experts={self.num_experts}, dim={self.dim}, hidden={self.hidden}, in {self.file.path}"


def _places(bank: ExpertBank) -> tuple[Mapping[str, tuple[int, torch.Size]], int]:
    """Where in a window each of a bank's weights starts, with its shape; and where the last ends."""
    places, end = {}, 0
    for name, parameter in bank.named_parameters(recurse=False):
        places[name] = (end, parameter.shape)
        end += -(-parameter.numel() // ALIGNED) * ALIGNED
    return places, end
