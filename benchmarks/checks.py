"""Whether the expert ops are right on this machine: values and all gradients against float64, under the tolerance rule.

The rule is `moe_mtl.testing.assert_matches`: at most twice the error of plain torch in the same dtype. For TF32, plain
torch is the definition with the low 13 bits of every factor cut off, because torch itself uses TF32 only where cuBLAS
likes to. Fresh memory is filled with NaN (and the largest integer) while our code runs, and zeros in place of a result
must fail.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_mtl.kernels import configs, ops, plan, reference
from moe_mtl.testing import assert_matches

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SIZES = {
    "tokens": (1, 2, 17, 37, 64, 300),
    "k": (1, 2, 3, 4),
    "experts": (1, 5, 6, 16),
    "dim": (16, 48, 50, 96, 192),
    "hidden": (16, 48, 50, 96, 192),
    "out": (16, 48, 50, 96, 192),
    "glu": (False, True),
    "bias": (True, False),
    "activation": ("gelu", "silu", "relu"),
    "ids": ("any", "some unused", "one expert empty", "one expert", "none used"),
}
EIGHT_ROUNDINGS = 1e-6  # of float32, relative to the norm
LEAVES = ("x", "w1", "b1", "w2", "b2", "gates")


@dataclass(frozen=True)
class Case:
    """One call; sizes are those of the axis legend in moe_mtl.routing, `ids` is one of `SIZES["ids"]`."""

    tokens: int
    k: int
    experts: int
    dim: int
    hidden: int
    out: int
    glu: bool = False
    bias: bool = True
    activation: str = "gelu"
    ids: str = "any"

    def __str__(self) -> str:
        parts = f"T{self.tokens} k{self.k} E{self.experts} D{self.dim} H{self.hidden} O{self.out} {self.activation}"
        return f"{parts}{' glu' * self.glu}{' bias' * self.bias}, ids: {self.ids}"


@dataclass
class Report:
    """What a check found.

    Attributes:
        errors: largest relative error of each result, root-mean-square against float64.
        failures: what broke the rule, one line each.
        cases: how many were checked.
    """

    errors: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    cases: int = 0

    def add(self, other: "Report") -> None:
        for name, error in other.errors.items():
            self.errors[name] = max(error, self.errors.get(name, 0.0))
        self.failures += other.failures
        self.cases += other.cases


def cases(count: int) -> list[Case]:
    """Cases in which every size occurs with every other sooner or later: the first is plain, the others are drawn."""
    draw = random.Random(0)
    drawn = [Case(**{name: draw.choice(values) for name, values in SIZES.items()}) for _ in range(count - 1)]
    return [Case(64, 2, 5, 48, 96, 48), *drawn][:count]


@contextmanager
def precision(kind: str) -> Iterator[None]:
    """float32 products in TF32 where the kind says so, exactly otherwise."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, or the largest integer: torch does that for deterministic runs."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        assert torch.empty(7).isnan().all(), "fresh memory is not poisoned"
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def draw_leaves(case: Case, kind: str, device: torch.device) -> tuple[list[Tensor | None], Tensor]:
    """x, w1, b1, w2, b2, gates (float32, in the dtype but for the gates) and ids [m, k]."""
    m, e, wide = case.tokens, case.experts, case.hidden * (1 + case.glu)
    sizes = ((m, case.dim), (e, wide, case.dim), (e, wide), (e, case.out, case.hidden), (e, case.out))
    leaves: list[Tensor | None] = [torch.randn(size, device=device) for size in sizes]
    leaves[1] /= case.dim**0.5
    leaves[3] /= case.hidden**0.5
    if not case.bias:
        leaves[2] = leaves[4] = None
    leaves = [t if t is None else t.to(DTYPES[kind]).requires_grad_() for t in leaves]
    leaves.append(torch.rand(m, case.k, device=device).requires_grad_())
    return leaves, draw_ids(case, device)


def draw_ids(case: Case, device: torch.device) -> Tensor:
    """Expert ids [m, k], int64; within a token they may repeat."""
    idx = torch.randint(0, case.experts, (case.tokens, case.k), device=device)
    if case.ids == "some unused":
        return idx.masked_fill(torch.rand(idx.shape, device=device) < 0.3, -1)
    if case.ids == "one expert empty":
        return idx.clamp(min=min(1, case.experts - 1))
    if case.ids == "one expert":
        return torch.full_like(idx, case.experts - 1)
    return torch.full_like(idx, -1) if case.ids == "none used" else idx


def check_mlp(case: Case, kind: str, device: torch.device, backend: str, draws: int = 0) -> Report:
    """`routed_mlp` in training and in inference, and every gradient for a random cotangent.

    Several draws of tokens, gates and cotangents are pooled: the largest of few rounding errors says little.

    Args:
        case: sizes and ids.
        kind: one of `DTYPES`.
        device: where.
        backend: of `moe_mtl.kernels.ops`.
        draws: 0 for as many as the number of tokens asks for.
    """
    options = {"activation": case.activation, "glu": case.glu}
    leaves, idx = draw_leaves(case, kind, device)

    def ours(ts):
        with poisoned(), precision(kind):
            with torch.no_grad():
                inferred = ops.routed_mlp(*ts, idx, backend=backend, **options)
            return [inferred, *_differentiated(ops.routed_mlp(*ts, idx, backend=backend, **options), ts, cotangent)]

    def definition(ts):
        y = reference.moe_mlp(*ts, idx, **options)
        return [y.detach(), *_differentiated(y, ts, cotangent)]

    pools: tuple[list, list, list] = ([], [], [])
    for _ in range(draws or (16 if case.tokens < 16 else 4)):
        inputs = [*leaves]
        inputs[0] = torch.randn_like(leaves[0]).requires_grad_()
        inputs[5] = torch.rand_like(leaves[5]).requires_grad_()
        exact = [t if t is None else t.detach().double().requires_grad_() for t in inputs]
        cotangent = torch.randn(case.tokens, case.out, device=device).to(DTYPES[kind])  # rounded before anyone sees it
        pools[0].append(ours(inputs))
        pools[1].append(definition(exact))
        with _plain_torch(kind):
            pools[2].append(definition(inputs))
    names = ["inference y", "y", *(f"d{n}" for n, t in zip(LEAVES, leaves, strict=True) if t is not None)]
    return _judged(names, pools, f"{kind} {case}")


def check_linear(case: Case, kind: str, device: torch.device, backend: str, draws: int = 0) -> Report:
    """`grouped_linear` of the first slot's ids and the sizes of the second layer, and its gradients."""
    ids, dtype = draw_ids(case, device)[:, 0], DTYPES[kind]
    w = (torch.randn(case.experts, case.out, case.hidden, device=device) / case.hidden**0.5).to(dtype).requires_grad_()
    b = torch.randn(case.experts, case.out, device=device).to(dtype).requires_grad_() if case.bias else None
    pools: tuple[list, list, list] = ([], [], [])
    for _ in range(draws or (16 if case.tokens < 16 else 4)):
        inputs = [torch.randn(case.tokens, case.hidden, device=device).to(dtype).requires_grad_(), w, b]
        exact = [t if t is None else t.detach().double().requires_grad_() for t in inputs]
        cotangent = torch.randn(case.tokens, case.out, device=device).to(dtype)
        with poisoned(), precision(kind):
            pools[0].append(_differentiated(ops.grouped_linear(*inputs, ids, backend=backend), inputs, cotangent))
        pools[1].append(_differentiated(reference.grouped_linear(*exact, ids), exact, cotangent))
        with _plain_torch(kind):
            pools[2].append(_differentiated(reference.grouped_linear(*inputs, ids), inputs, cotangent))
    names = ["linear y", "linear dx", "linear dw", *["linear db"] * case.bias]
    return _judged(names, pools, f"{kind} {case}, linear")


def check_frozen(case: Case, kind: str, device: torch.device, backend: str) -> Report:
    """Each gradient asked for alone equals that of a call which asks for all."""
    leaves, idx = draw_leaves(case, kind, device)
    cotangent = torch.randn(case.tokens, case.out, device=device).to(DTYPES[kind])
    options = {"activation": case.activation, "glu": case.glu, "backend": backend}
    report = Report(cases=1)
    with poisoned(), precision(kind):
        _, *together = _differentiated(ops.routed_mlp(*leaves, idx, **options), leaves, cotangent)
        wanted = iter(together)
        for i, leaf in enumerate(leaves):
            if leaf is None:
                continue
            alone = [t if t is None else t.detach().requires_grad_(j == i) for j, t in enumerate(leaves)]
            (grad,) = torch.autograd.grad(ops.routed_mlp(*alone, idx, **options), [alone[i]], cotangent)
            try:
                torch.testing.assert_close(grad, next(wanted))
            except AssertionError as error:
                report.failures.append(f"{kind} {case}: d{LEAVES[i]} alone: {' '.join(str(error).split())}")
    return report


def check_plan(rows: int, experts: int, dtype: torch.dtype, device: torch.device) -> Report:
    """The sort tables of the GPU's kernels equal those of torch on the CPU; a quarter of the slots is unused."""
    from moe_mtl.kernels import triton_plan

    ids = torch.randint(0, experts, (rows, 1)).masked_fill(torch.rand(rows, 1) < 0.25, -1).to(dtype)
    expected = plan.plan_routing(ids, experts)
    tiles = torch.cat([plan.tile_table(expected.offsets, rows, height) for height in plan.TILE_ROWS])
    with poisoned():
        actual = triton_plan.plan(ids.flatten().to(device), experts)
    pairs = zip(("order", "inverse", "offsets", "tiles"), actual, (*expected[:3], tiles), strict=True)
    wrong = [name for name, ours, theirs in pairs if not torch.equal(ours.cpu(), theirs)]
    said = [f"plan of {rows} rows, {experts} experts, {dtype}: {', '.join(wrong)} differ"] if wrong else []
    return Report(failures=said, cases=1)


def check_config(entry: configs.Entry, device: torch.device) -> Report:
    """An entry of the table of tile sizes, forced on sizes that are whole blocks and on sizes that are not."""
    if entry.config.warp_specialized:
        return check_warp_specialized(entry, device)
    pick, report = configs.pick, Report()

    def forced(kernel: str, *call) -> configs.Config:
        return entry.config if kernel == entry.kernel else pick(kernel, *call)

    for sizes in ((256, 256, 256), (144, 208, 176)):
        case = Case(300, 2, 3, *sizes, glu=bool(entry.glu), activation="silu" if entry.glu else "gelu")
        for kind in ("bf16",) if entry.bits == 16 else ("fp32", "tf32"):
            with mock.patch.object(configs, "pick", forced):
                found = check_mlp(replace(case, ids="some unused"), kind, device, "triton")
            found.failures = [f"{entry.kernel} {entry.config}: {line}" for line in found.failures]
            report.add(found)
    return report


def check_warp_specialized(entry: configs.Entry, device: torch.device) -> Report:
    """The same for an entry that is warp-specialized, where calls can run it: in inference, forward and backward.

    Enough rows that every program has several tiles; rows of experts, and columns of all results, end inside tiles. Of
    the summed axes those of the first layer and of its weights' gradient end inside blocks. Gradients of weights have
    their tiles by the number and sizes of experts, 12 of each; the others are checked with one expert, and sizes below
    those of blocks and parts, too.
    """
    from moe_mtl.kernels import gpu, triton_launch

    pick, report, experts = configs.pick, Report(), 3
    even, odd = (256, 256, 256), (200, 192, 320)
    if entry.kernel == "weight_grad":
        even, odd = (512, 384, 512), (456, 320, 424)
        experts = max(experts, triton_launch.cdiv(triton_launch.TILES_EACH * configs.chip(device)[1], 12))
    cases = [
        ("bf16", Case(9000, 3, experts, *even, ids="some unused")),
        ("bf16", Case(9000, 3, experts, *odd, activation="silu", ids="some unused")),
        ("fp16", Case(9000, 3, experts, *odd, bias=False, activation="relu", ids="some unused")),
    ]
    if entry.kernel != "weight_grad":
        cases.append(("bf16", Case(9000, 1, 1, 40, 64, 64 if entry.kernel == "hidden_grad" else 8)))
    for kind, case in cases:
        used = []

        def forced(kernel: str, *call, used=used) -> configs.Config:
            if kernel != entry.kernel or not call[-1]:
                return pick(kernel, *call)
            used.append(kernel)
            return entry.config

        with (
            mock.patch.object(configs, "pick", forced),
            mock.patch.object(gpu, "sorts_first", lambda *_: True),
        ):
            found = check_mlp(case, kind, device, "triton")
        found.failures = [f"{entry.kernel} {entry.config}: {line}" for line in found.failures]
        if not used:
            found.failures.append(f"{entry.kernel} {entry.config}: {kind} {case}: no call could run it")
        report.add(found)
    return report


def _differentiated(y: Tensor, leaves: list[Tensor | None], cotangent: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], cotangent.to(y.dtype))]


def _judged(names: list[str], pools: tuple[list, list, list], what: str) -> Report:
    """The rule for every result, and zeros in its place."""
    report = Report(cases=1)
    for i, name in enumerate(names):
        actual, oracle, baseline = (torch.stack([results[i] for results in pool]) for pool in pools)
        scale = oracle.square().mean().sqrt()
        if scale > 0:
            error = (actual.double() - oracle).square().mean().sqrt() / scale
            report.errors[name] = error.nan_to_num(float("inf")).item()
            if _breaks(torch.zeros_like(actual), oracle, baseline, name) is None:
                report.failures.append(f"{what}: {name}: zeros would pass")
        broken = _breaks(actual, oracle, baseline, name)
        if broken:
            report.failures.append(f"{what}: {broken}")
    return report


def _breaks(actual: Tensor, oracle: Tensor, baseline: Tensor, name: str) -> str | None:
    """What the tolerance rule says; a GPU's float32 sums, made one by one, pass within `EIGHT_ROUNDINGS`."""
    one_by_one = actual.is_cuda and actual.dtype == torch.float32 and bool(actual.isfinite().all())
    if one_by_one and (actual - oracle).norm() <= EIGHT_ROUNDINGS * oracle.norm():
        return None
    try:
        assert_matches(actual, oracle, baseline, name)
    except AssertionError as error:
        return str(error)
    return None


@contextmanager
def _plain_torch(kind: str) -> Iterator[None]:
    """The dtype's own products; those of TF32 are made by cutting the factors."""
    with precision("fp32"):
        if kind != "tf32":
            yield
            return
        with mock.patch.object(F, "linear", _TF32Linear.apply):
            yield


class _TF32Linear(torch.autograd.Function):
    """F.linear, and its gradients, with factors of 10 explicit bits."""

    @staticmethod
    def forward(ctx, x, w, b=None):
        ctx.save_for_backward(x, w)
        ctx.bias = b is not None
        y = _cut(x) @ _cut(w).mT
        return y if b is None else y + b

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        return _cut(dy) @ _cut(w), _cut(dy).mT @ _cut(x), dy.sum(0) if ctx.bias else None


def _cut(t: Tensor) -> Tensor:
    return (t.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)
