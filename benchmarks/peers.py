"""The providers of the harness: our layer with each backend, a dense MLP of equal FLOPs, and installed peers.

All routed providers share one bank of experts, or hold a copy of its weights in a layout of their own, and get the same
routing. A peer that is not installed is left out; one that is installed and does not run is named with its error.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from shapes import Shape
from torch import Tensor, nn
from torch.nn import functional as F

from moe_mtl.experts import ExpertBank
from moe_mtl.kernels import dispatch, reference
from moe_mtl.routing import Routing

COPIED_BYTES = {"cpu": 0.5e9, "cuda": 16e9}  # of weights, up to which transformers' batched_mm may copy them per token


@dataclass(frozen=True)
class Provider:
    """One way to compute the layer.

    Attributes:
        name: in the tables.
        run: y of tokens and their routing.
        parameters: what is trained.
        routed: whether it uses the routing.
        ours: whether it is this library's.
    """

    name: str
    run: Callable[[Tensor, Routing], Tensor]
    parameters: list[nn.Parameter] = field(default_factory=list)
    routed: bool = True
    ours: bool = False


class Dense(nn.Module):
    """One MLP of hidden width k h: as many multiplications per token as k experts of width h."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.first = nn.Linear(shape.dim, shape.k * shape.wide)
        self.second = nn.Linear(shape.k * shape.hidden, shape.dim)
        self.glu = shape.glu

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        if not self.glu:
            return self.second(F.gelu(z))
        gate, up = z.chunk(2, dim=-1)
        return self.second(F.silu(gate) * up)


def providers(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[list[Provider], dict[str, str]]:
    """All that can be made here, the dense MLP and ours first, and name -> error of those that cannot."""
    with device:
        bank = ExpertBank(
            shape.experts, shape.dim, shape.hidden, activation=shape.activation, glu=shape.glu, bias=not shape.glu
        ).to(dtype)
        dense = Dense(shape).to(dtype)
    held = list(bank.parameters())
    made = [Provider("dense", lambda x, routing: dense(x), list(dense.parameters()), routed=False)]
    made += [
        Provider("moe_mtl", bank, held, ours=True),
        *(Provider(f"moe_mtl {name}", _with_backend(bank, name), held, ours=True) for name in _others(device)),
        Provider("reference loop", lambda x, routing: _loop(bank, x, routing), held),
        Provider("F.grouped_mm", lambda x, routing: grouped_mm(bank, x, routing), held),
    ]
    failed: dict[str, str] = {}
    for name, module, make in PEERS:
        if importlib.util.find_spec(module) is None:
            continue
        try:
            with device:
                made += [Provider(name, run, [*held, *more]) for run, more in make(shape, bank)]
        except Exception as error:  # whatever is wrong with a peer, the others are measured
            failed[name] = told(error)
    return made, failed


def told(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _others(device: torch.device) -> Iterator[str]:
    """Backends that "auto" does not take on that device, and that can run there."""
    auto = dispatch.resolve("auto", torch.empty(0, device=device))
    for name in dispatch.BACKENDS:
        if name != auto and (name != "triton" or dispatch.runs_triton(device)):
            yield name


def _with_backend(bank: ExpertBank, backend: str) -> Callable[[Tensor, Routing], Tensor]:
    return lambda x, routing: bank(x, routing, backend=backend)


def _loop(bank: ExpertBank, x: Tensor, routing: Routing) -> Tensor:
    weights = (bank.w1, bank.b1, bank.w2, bank.b2, routing.weights, routing.indices)
    return reference.moe_mlp(x, *weights, activation=bank.activation, glu=bank.glu)


def grouped_mm(bank: ExpertBank, x: Tensor, routing: Routing) -> Tensor:
    """torch's own grouped product, the way its layers are usually written. It takes no bias: added by row."""
    m, k = routing.indices.shape
    ids, order = routing.indices.flatten().sort(stable=True)
    ends = torch.searchsorted(ids, torch.arange(bank.num_experts, device=x.device), right=True, out_int32=True)
    z = F.grouped_mm(x[order // k], bank.w1.mT, offs=ends)
    z = z if bank.b1 is None else z + bank.b1[ids]
    if bank.glu:
        gate, up = z.chunk(2, dim=-1)
        h = F.silu(gate) * up
    else:
        h = F.gelu(z)
    ys = F.grouped_mm(h, bank.w2.mT, offs=ends)
    ys = ys if bank.b2 is None else ys + bank.b2[ids]
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=x.device))
    return (ys[inverse].view(m, k, -1) * routing.weights[..., None]).sum(1).to(x.dtype)


# ---- peers: each yields ways to run it and the parameters it holds of its own ----------------------------------------

Made = Iterator[tuple[Callable[[Tensor, Routing], Tensor], list[nn.Parameter]]]


def _transformers(implementation: str) -> Callable[[Shape, ExpertBank], Made]:
    def make(shape: Shape, bank: ExpertBank) -> Made:
        experts = _mixtral(bank) if shape.glu else _plain_experts(bank)
        experts.config._experts_implementation = implementation
        if implementation == "eager" and not shape.glu:
            return  # no model of transformers has a loop over plain GELU experts with biases
        copied = shape.rows * shape.dim * (shape.wide + shape.hidden) * bank.w1.element_size()
        if implementation == "batched_mm" and copied > COPIED_BYTES[bank.w1.device.type]:
            raise MemoryError(f"left out, it would copy {copied / 1e9:.0f} GB of weights, a set per routed row")
        yield lambda x, routing: experts(x, routing.indices, routing.weights).to(x.dtype), []

    return make


def _mixtral(bank: ExpertBank) -> nn.Module:
    """Mixtral's experts on our weights, which have the same layout."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=bank.dim, intermediate_size=bank.hidden, num_local_experts=bank.num_experts, hidden_act="silu"
    )
    with torch.device("meta"):
        experts = MixtralExperts(config)
    experts.gate_up_proj, experts.down_proj = bank.w1, bank.w2
    return experts


def _plain_experts(bank: ExpertBank) -> nn.Module:
    """Experts without a gated unit and with biases behind transformers' interface, on our weights."""
    from transformers.integrations import use_experts_implementation

    @use_experts_implementation(has_gate=False, has_bias=True)
    class PlainExperts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, self.act_fn = bank.num_experts, F.gelu
            self.up_proj, self.up_proj_bias = bank.w1, bank.b1
            self.down_proj, self.down_proj_bias = bank.w2, bank.b2

        def forward(self, hidden_states, top_k_index, top_k_weights):
            """Replaced by the interface."""

    return PlainExperts(SimpleNamespace())


def _scattermoe(shape: Shape, bank: ExpertBank) -> Made:
    from scattermoe.mlp import GLUMLP, MLP

    make = GLUMLP if shape.glu else MLP
    act = nn.SiLU() if shape.glu else nn.GELU()
    layer = make(shape.dim, shape.hidden, shape.experts, shape.k, bias=not shape.glu, activation=act).to(bank.w1.dtype)
    with torch.no_grad():  # its second half goes through the activation, ours is the first
        layer.experts.weight.copy_(bank.w1.roll(shape.hidden, 1) if shape.glu else bank.w1)
        layer.output_experts.weight.copy_(bank.w2)
        if not shape.glu:
            layer.experts.bias.copy_(bank.b1)
            layer.output_experts.bias.copy_(bank.b2)
    yield lambda x, routing: layer(x, routing.weights.to(x.dtype), routing.indices), list(layer.parameters())


def _megablocks(shape: Shape, bank: ExpertBank) -> Made:
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import ParallelDroplessMLP

    if not shape.glu:
        return  # its experts have no biases
    dtype = bank.w1.dtype
    experts = ParallelDroplessMLP(
        Arguments(
            hidden_size=shape.dim, ffn_hidden_size=shape.hidden, moe_num_experts=shape.experts, moe_top_k=shape.k,
            mlp_type="glu", mlp_impl="grouped", activation_fn=F.silu, bias=False, return_bias=False,
            fp16=dtype == torch.float16, bf16=dtype == torch.bfloat16, memory_optimized_mlp=True,
        )
    )  # fmt: skip
    gate, up = bank.w1.chunk(2, dim=1)
    with torch.no_grad():
        for ours, theirs in ((gate, experts.mlp.w1), (up, experts.mlp.v1), (bank.w2.mT, experts.mlp.w2)):
            theirs.copy_(ours.reshape(theirs.shape))

    def run(x: Tensor, routing: Routing) -> Tensor:
        return experts.forward_once(x, routing.weights.to(x.dtype), routing.indices)[0].view_as(x)

    yield run, list(experts.parameters())


def _sonic_moe(shape: Shape, bank: ExpertBank) -> Made:
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    kind = ActivationType.SWIGLU if shape.glu else ActivationType.GELU
    tokens = torch.arange(shape.tokens).repeat_interleave(shape.k).int()

    def run(x: Tensor, routing: Routing) -> Tensor:
        return moe_general_routing_inputs(
            x, routing.weights.reshape(-1), tokens, routing.indices.reshape(-1).int(),
            bank.w1.permute(1, 2, 0), bank.b1, bank.w2.permute(1, 2, 0), bank.b2,
            shape.experts, torch.cuda.current_stream().cuda_stream, kind, not torch.is_grad_enabled(), shape.glu,
        )[0]  # fmt: skip

    yield run, []


PEERS = (
    ("transformers eager", "transformers", _transformers("eager")),
    ("transformers batched_mm", "transformers", _transformers("batched_mm")),
    ("transformers grouped_mm", "transformers", _transformers("grouped_mm")),
    ("scattermoe", "scattermoe", _scattermoe),
    ("megablocks", "megablocks", _megablocks),
    ("sonic-moe", "sonicmoe", _sonic_moe),
)
