"""One low-rank adapter per linear map, shared by all tasks.

Paper: Hu et al. 2022, LoRA, https://arxiv.org/abs/2106.09685, in the layers of peft.
Differs: nothing; which maps get adapters is a choice of the model.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from moe_mtl.adapters._method import ADAPTER, AdapterContext, AdapterMethod


class Lora(AdapterMethod):
    """y = W x + (alpha / r) B A x with A [r, d] and B [d_out, r]; B starts at zero.

    Args:
        rank: r.
        alpha: scale of what the adapter adds, times r.
        dropout: of the adapter's input, in training.

    Raises:
        ValueError: a number out of range.
    """

    parts_tasks = False

    def __init__(self, rank: int = 8, alpha: float = 32.0, dropout: float = 0.0):
        check_rank(rank, alpha, dropout)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout

    def inject(self, encoder: nn.Module, maps: Sequence[str], tasks: Sequence[str], context: AdapterContext) -> None:
        """peft's LoRA layers, whose low-rank activations the context can collect."""
        from peft import LoraConfig, inject_adapter_in_model  # seconds to import

        alpha: Any = self.alpha  # declared as an integer there
        config = LoraConfig(r=self.rank, lora_alpha=alpha, lora_dropout=self.dropout, target_modules=list(maps))
        inject_adapter_in_model(config, encoder, ADAPTER)
        for name in maps:
            layer: Any = encoder.get_submodule(name)
            layer.lora_A[ADAPTER].register_forward_hook(KeepActivations(context, name))

    def trained(self, layer: Any) -> Iterable[nn.Parameter]:
        """A and B."""
        return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight

    def delta(self, layer: Any, task: str) -> Tensor:
        """(alpha / r) B A [out, in], the same for all tasks."""
        return layer.get_delta_weight(ADAPTER)


class KeepActivations:
    """Forward hook of A: hands x A [b, n, r] to the context while it collects.

    An object rather than a closure, so that a copy of the model hooks its own context.
    """

    def __init__(self, context: AdapterContext, name: str):
        self.context, self.name = context, name

    def __call__(self, module: nn.Module, args: tuple, y: Tensor) -> None:
        """Notes an output."""
        if self.context.activations is not None:
            self.context.activations[self.name] = y


def check_rank(rank: int, alpha: float, dropout: float) -> None:
    """Refuses options of low-rank adapters that are out of range.

    Raises:
        ValueError: names the option and what came.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank: got {rank!r}, expected an integer of at least 1")
    if not alpha > 0:
        raise ValueError(f"alpha: got {alpha}, expected above 0; what adapters add is scaled by alpha / rank")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: got {dropout}, expected from 0 to below 1")
