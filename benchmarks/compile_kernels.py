"""Compiles the Triton kernels for a chip that need not be there, and says what they take: `make compile`.

    python benchmarks/compile_kernels.py                      sm_80 and sm_90, all shapes and dtypes
    python benchmarks/compile_kernels.py --arch 90 --dtype bf16 --json report.json

The ops are called on tensors without data, so what is compiled is what the library would launch for these shapes, with
the tile sizes of kernels/configs.json. Per kernel: registers, stack bytes, spills (local loads and stores), shared
memory, tensor-core instructions. Exit code 1 where a kernel spills, does not fit or does a product without the tensor
cores, or where the assembler says that a warp-specialized kernel's products wait for each other. Needs triton and its
bundled assembler, no GPU; not in a process with TRITON_INTERPRET.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a bare checkout will do

import torch  # noqa: E402
from shapes import SHAPES, Shape  # noqa: E402

SHARED_KIB = {80: 99, 90: 227}  # per program; 99 leaves sm_86 and sm_89, which have less than sm_80, in
PROCESSORS = {80: 108, 90: 132}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """What decides the code of a kernel: its name, types, constants and options; gluon: it is warp-specialized."""

    module: str
    kernel: str
    arch: int
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, int], ...]
    gluon: bool = False

    @property
    def name(self) -> str:
        constants = dict(self.constants)
        dtype = re.search(r"[a-z]+\d+", self.signature[0][1]).group()
        parts = [
            self.kernel.removesuffix("_kernel"),
            "tf32" if constants.get("PRECISION") == "tf32" and dtype == "fp32" else dtype,
        ]
        if self.gluon:  # sizes are those of the descriptors' blocks
            blocks = (re.search(r"\[(.*?)\]", kind) for _, kind in self.signature if kind.startswith("tensordesc"))
            parts += ["warp-specialized", *(block[1].replace(", ", "x") for block in blocks)]
            parts += [f"{c.lower()} {constants[c]}" for c in ("STAGES", "PART") if c in constants]
        parts += [str(constants[c]) for c in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_H") if c in constants]
        parts += [constants["ACTIVATION"]] if constants.get("ACTIVATION") else []
        parts += [flag.lower() for flag, value in self.constants if value is True]
        return " ".join([*parts, *(f"{key.removeprefix('num_')[0]}{value}" for key, value in self.options)])


def recorded(arch: int, kind: str, lines: set | None = None) -> set[Launch]:
    """Every launch of a forward, a backward and an inference pass at every shape; see `other_uses` for more.

    And again without the warp-specialized kernels, as with a Triton whose Gluon is not known.

    Args:
        arch: compute capability, 90 for 9.0.
        kind: a name in DTYPES.
        lines: takes the lines of the table that were used.
    """
    import triton

    dtype = DTYPES[kind]
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")

    from moe_mtl.kernels import configs, triton_launch

    found: set[Launch] = set()
    used = set() if lines is None else lines

    def choose(*call):
        line = next(e for e in configs.entries() if e.fits(*call))
        used.add(line)
        return line.config

    def record(function, *args, grid, warmup, num_warps=4, num_stages=3, maxnreg=None, **constants):
        gluon = function.is_gluon()
        given = dict(zip(function.arg_names, args, strict=False)) | constants
        free = {p.name for p in function.params if p.do_not_specialize}  # compiled for any value
        anywhere = {p.name for p in function.params if p.do_not_specialize_on_alignment}
        signature, constant, aligned = [], [], []
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                signature.append((name, POINTERS[value.dtype]))
                aligned += [name] * (name not in anywhere)
            elif hasattr(value, "block_shape"):
                what = f"{POINTERS[value.base.dtype][1:]}{value.block_shape}"
                what += f",{value.layout!r}" if gluon else ""
                signature.append((name, f"tensordesc<{what}>"))
            elif name in free:
                signature.append((name, "i32"))
            elif name.isupper() or value is None or value == 1:
                signature.append((name, "constexpr"))
                constant.append((name, value))
            else:
                signature.append((name, "i32"))
                aligned += [name] * (value % 16 == 0)
        options = (("num_warps", num_warps), ("num_stages", num_stages))
        options += (("maxnreg", maxnreg),) if maxnreg else ()
        module = function.fn.__module__
        code = (tuple(signature), tuple(constant), tuple(aligned), options, gluon)
        found.update(other_uses(Launch(module, function.fn.__name__, arch, *code)))

    chip = mock.patch.object(configs, "chip", lambda device: (arch, PROCESSORS[arch]))
    table = mock.patch.object(configs, "pick", choose)
    with chip, table, mock.patch.object(triton.runtime.jit.JITFunction, "run", record), torch.device("meta"):
        for runs, shape in product((triton_launch.runs_gluon, lambda device: False), SHAPES):
            with mock.patch.object(triton_launch, "runs_gluon", runs):
                _layer(shape, dtype)
    return found


def _layer(shape: Shape, dtype: torch.dtype) -> None:
    """Inference, forward, and backward in several ways, on tensors without data."""
    from moe_mtl.kernels import gpu, plan, triton_plan

    m, k, e, o = shape.tokens, shape.k, shape.experts, shape.dim
    wide, rows = shape.hidden * (1 + shape.glu), shape.tokens * shape.k
    x, dy = torch.empty(m, shape.dim, dtype=dtype), torch.empty(m, o, dtype=dtype)
    w1, w2 = torch.empty(e, wide, shape.dim, dtype=dtype), torch.empty(e, o, shape.hidden, dtype=dtype)
    b1, b2 = (None, None) if shape.glu else (torch.empty(e, wide, dtype=dtype), torch.empty(e, o, dtype=dtype))
    gates, z = torch.empty(m, k), torch.empty(rows, wide, dtype=dtype)
    table, offsets = torch.empty(rows, dtype=torch.int32), torch.empty(e + 1, dtype=torch.int32)
    bounds = sum(plan.tile_bound(rows, e, height) for height in plan.TILE_ROWS)
    sort = plan.Plan(table, table, offsets, torch.empty(bounds, 3, dtype=torch.int32))
    for save in (True, False):
        gpu.moe_mlp(x, w1, b1, w2, b2, gates, sort, shape.activation, shape.glu, save)
        gpu.moe_mlp(x, w1, None, w2, None, gates, sort, shape.activation, shape.glu, save)
    need = [True, True, b1 is not None, True, b2 is not None, True]
    gpu.moe_mlp_backward(dy, x, z, w1, w2, b2, gates, sort, shape.activation, shape.glu, need)
    if not shape.glu:  # without gradients of biases, and these alone
        for need in ([True, True, False, True, False, True], [False, False, True, False, True, False]):
            gpu.moe_mlp_backward(dy, x, z, w1, w2, b2, gates, sort, shape.activation, False, need)
    triton_plan.plan(torch.empty(rows, dtype=torch.int64), e)


def other_uses(launch: Launch) -> Iterator[Launch]:
    """The launch; of a warp-specialized kernel, those for results that end inside a tile and for other activations too.

    No shape here needs them, and these kernels have next to no registers and memory to spare. Widths that end inside a
    tile need not be whole 32 bytes either.
    """
    if not launch.gluon:
        yield launch
        return
    act = dict(launch.constants).get("ACTIVATION")
    numbers = {name for name, kind in launch.signature if kind == "i32"}
    for even in (True, False):
        aligned = tuple(name for name in launch.aligned if even or name not in numbers)
        for name in ("gelu", "silu", "relu") if act else (act,):
            changed = {"EVEN": even, "EVEN_N": even, "ACTIVATION": name}
            constants = tuple((c, changed.get(c, value)) for c, value in launch.constants)
            yield replace(launch, constants=constants, aligned=aligned)


def heaviest(launches: Iterable[Launch]) -> list[Launch]:
    """One launch for each set of tile sizes: the one that does most beside its product.

    Of a warp-specialized kernel two, one of them for results that end inside a tile.
    """
    groups: dict[tuple, list[Launch]] = {}
    for launch in launches:
        constants = dict(launch.constants)
        told = ("STAGES", "PART", "TRANSPOSED", "EVEN", "EVEN_N") if launch.gluon else ("GLU", "PRECISION")
        sizes = tuple(sorted((c, v) for c, v in constants.items() if c.startswith("BLOCK") or c in told))
        blocks = launch.signature[: 3 if launch.gluon else 1]
        groups.setdefault((launch.module, launch.kernel, launch.arch, blocks, sizes, launch.options), []).append(launch)

    def work(launch: Launch) -> tuple:
        flags = sum(value is True for _, value in launch.constants)
        return flags, ("ACTIVATION", "gelu") in launch.constants, launch.name

    return [max(group, key=work) for group in groups.values()]


def compiled(launch: Launch) -> dict[str, Any]:
    """What the assembler says of one kernel."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    function = getattr(importlib.import_module(launch.module), launch.kernel)
    names = function.arg_names
    source = (GluonASTSource if launch.gluon else ASTSource)(
        fn=function,
        signature=dict(launch.signature),
        constexprs={(names.index(name),): value for name, value in launch.constants},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    done = triton.compile(source, target=GPUTarget("cuda", launch.arch, 32), options=dict(launch.options))
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(done.asm["cubin"])
        ptx.write_text(done.asm["ptx"])
        usage, code = (
            subprocess.run([tools / "cuobjdump", option, cubin], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
        again = [tools / "ptxas", "-v", f"--gpu-name=sm_{launch.arch}a", ptx, "-o", Path(folder, "again")]
        said = subprocess.run(again, capture_output=True, text=True, check=True).stderr if launch.gluon else ""
    registers, stack = (int(v) for v in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    report = {
        "kernel": launch.name,
        "arch": launch.arch,
        "registers": registers,
        "stack": stack,
        "spills": len(re.findall(r"\b(?:STL|LDL)", code)),
        "shared_kib": round(done.metadata.shared / 1024, 1),
        "tensor_core": len(re.findall(r"\b(?:HGMMA|HMMA)", code)),
        "wgmma": len(re.findall(r"\bHGMMA", code)),
        "warnings": sorted(set(re.findall(r"\(C\d+\)[^\n]*", said))),
    }
    constants, kind = dict(launch.constants), dict(launch.signature)[names[0]]
    on_tensor_cores = "PRECISION" in constants and (kind != "*fp32" or constants["PRECISION"] == "tf32")
    return report | {"faults": faults(report, on_tensor_cores or launch.gluon, launch.gluon)}


def faults(report: Mapping[str, Any], on_tensor_cores: bool, by_warpgroups: bool = False) -> list[str]:
    """What a compiled kernel must not be."""
    found = []
    if report["spills"] or report["stack"]:
        found.append("spills")
    if report["shared_kib"] > SHARED_KIB[report["arch"]]:
        found.append(f"more than {SHARED_KIB[report['arch']]} KiB of shared memory")
    if on_tensor_cores and not report["tensor_core"]:
        found.append("no tensor-core instruction")
    if by_warpgroups and not report["wgmma"]:
        found.append("no product of a warpgroup")
    if report.get("warnings"):
        found.append(f"the assembler warns: {'; '.join(report['warnings'])}")
    return found


def reports(launches: list[Launch], workers: int) -> Iterator[dict[str, Any]]:
    """One per launch, in order."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(compiled, launches)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="*", choices=sorted(SHARED_KIB), default=sorted(SHARED_KIB))
    parser.add_argument("--dtype", nargs="*", choices=tuple(DTYPES), default=tuple(DTYPES))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="write the reports here, too")
    parser.add_argument("--quick", action="store_true", help="one kernel for each line of the table and dtype")
    parser.add_argument("--kernel", help="only kernels whose name holds this")
    args = parser.parse_args()
    lines: set = set()
    launches = {launch for arch in args.arch for dtype in args.dtype for launch in recorded(arch, dtype, lines)}
    launches = {launch for launch in launches if (args.kernel or "") in launch.name}
    if args.quick:
        launches = set(heaviest(launches))
    print(f"{len(launches)} kernels")
    print(f"{'':>5} {'regs':>4} {'stack':>5} {'spill':>5} {'KiB':>6} {'mma':>4} {'wgmma':>5}  kernel")
    all_reports = []
    for report in reports(sorted(launches, key=lambda la: (la.arch, la.name)), args.workers):
        all_reports.append(report)
        row = f"sm_{report['arch']} {report['registers']:4} {report['stack']:5} {report['spills']:5} "
        row += f"{report['shared_kib']:6} {report['tensor_core']:4} {report['wgmma']:5}  {report['kernel']}"
        print(row + (f"  <- {', '.join(report['faults'])}" if report["faults"] else ""), flush=True)
    if args.json:
        args.json.write_text(json.dumps(all_reports, indent=1) + "\n")
    from moe_mtl.kernels import configs

    unused = [line for line in configs.entries() if line.arch in args.arch and line not in lines]
    if set(args.dtype) >= {"bf16", "fp32"} and unused:
        print(f"no shape uses these lines of {configs.TABLE.name}:", *unused, sep="\n  ")
        return 1
    return any(report["faults"] for report in all_reports)


if __name__ == "__main__":
    sys.exit(main())
