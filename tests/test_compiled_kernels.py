"""Every line of the table of tile sizes, compiled ahead of time for chips that need not be there."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "benchmarks" / "compile_kernels.py"
WARP_SPECIALIZED = {"product", "hidden_grad", "weight_grad"}


def run(folder: Path, *options: str) -> list[dict]:
    """The tool's reports, from a process of its own: kernels of this one are interpreted."""
    out = folder / "report.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    call = [sys.executable, TOOL, "--workers", "1", "--json", out, *options]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(out.read_text())


def check(reports: list[dict], arch: int) -> None:
    """No spills, shared memory within the chip, tensor cores (the tool's faults); Hopper's own for large tiles."""
    assert {report["kernel"].split()[0] for report in reports} >= {
        *("count", "place", "up", "fused", "down", "combine", "hidden_grad", "gate_grad", "weight_grad")
    }
    assert not any(report["faults"] for report in reports)
    special = [r for r in reports if "warp-specialized" in r["kernel"]]
    assert {r["kernel"].split()[0] for r in special} == (WARP_SPECIALIZED if arch == 90 else set())
    if arch == 90:
        for sizes in ("stages 5", "stages 6 bias", "transposed", "128x32 stages 4", "stages 6 part 32"):
            ends = [" even" in r["kernel"] for r in special if sizes in r["kernel"]]
            assert {True, False} == set(ends)  # results that are whole tiles, and that are not
        large = [r for r in reports if r["kernel"].split()[1] in ("bf16", "fp16") and " 128 128 " in r["kernel"]]
        assert large and all(report["wgmma"] for report in large)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", [80, 90])
def test_every_line_of_the_table(arch, tmp_path):
    check(run(tmp_path, "--arch", str(arch), "--dtype", "bf16", "fp32", "--quick"), arch)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_of_every_shape_and_dtype(arch, tmp_path):
    check(run(tmp_path, "--arch", str(arch)), arch)


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL.parent))
    spec = importlib.util.spec_from_file_location("compile_kernels", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compile_kernels", module)
    spec.loader.exec_module(module)
    return module


def test_faults_are_found(tool):
    fine = {"arch": 90, "spills": 0, "stack": 0, "shared_kib": 227.0, "tensor_core": 4}
    assert tool.faults(fine, True) == [] and tool.faults(fine | {"tensor_core": 0}, False) == []
    assert tool.faults(fine | {"spills": 2}, True) == ["spills"] == tool.faults(fine | {"stack": 8}, True)
    assert tool.faults(fine | {"shared_kib": 227.5}, True) == ["more than 227 KiB of shared memory"]
    assert tool.faults(fine | {"tensor_core": 0}, True) == ["no tensor-core instruction"]
    assert tool.faults(fine | {"wgmma": 0}, True, True) == ["no product of a warpgroup"]
    assert tool.faults(fine | {"wgmma": 4}, True, True) == []
    assert tool.faults(fine | {"warnings": ["(C7510) serialized"]}, True) == ["the assembler warns: (C7510) serialized"]
