"""What `make gpu` checks, as far as a machine without a GPU can tell, and how it reports."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from moe_mtl.kernels import configs, cpu
from tests.benchmark_modules import (
    BENCHMARKS,
    CPU,
    checks,
    gpu_run,
    gpu_summary,
    python,
    records,
    shapes,
    tune,
)

Report = checks.Report

# ---- checks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", checks.DTYPES)
def test_checks_pass_what_is_right(kind):
    report = Report()
    for case in (*checks.cases(3), checks.Case(17, 2, 3, 50, 16, 48, ids="none used")):
        report.add(checks.check_mlp(case, kind, CPU, "cpu"))
        report.add(checks.check_linear(case, kind, CPU, "cpu"))
        report.add(checks.check_frozen(case, kind, CPU, "cpu"))
    assert report.failures == []
    assert report.cases == 12
    assert {"y", "inference y", "dx", "dw1", "db1", "dw2", "db2", "dgates", "linear dx"} <= set(report.errors)


def test_a_line_that_nobody_uses_is_said(monkeypatch):
    """Warp-specialized lines are for calls that can run them; a check in which none can has checked nothing."""
    entry = next(entry for entry in configs.entries() if entry.config.warp_specialized)
    used = []

    def check_mlp(case, kind, device, backend):
        used.append(configs.pick(entry.kernel, 90, 16, False, 1000, 512, able))
        return Report(cases=1)

    monkeypatch.setattr(checks, "check_mlp", check_mlp)
    for able in (True, False):
        report = checks.check_config(entry, CPU)
        assert report.cases == 4 and len(report.failures) == 4 * (not able)
    assert used[:4] == [entry.config] * 4 and not any(config.warp_specialized for config in used[4:])
    assert report.failures[0].startswith("up Config(") and report.failures[0].endswith("no call could run it")


def test_gradients_of_weights_are_checked_where_they_have_many_tiles(monkeypatch):
    entry = next(e for e in configs.entries() if e.config.warp_specialized and e.kernel == "weight_grad")
    found = []
    monkeypatch.setattr(configs, "chip", lambda device: (90, 132))
    monkeypatch.setattr(checks, "check_mlp", lambda case, *_: (found.append(case), Report(cases=1))[1])
    checks.check_config(entry, CPU)
    for case in found:
        for rows, columns in ((case.hidden, case.dim), (case.out, case.hidden)):
            assert case.experts * -(-rows // 128) * -(-columns // 128) >= 4 * 132
    assert len(found) == 3 and any(case.out % 128 and case.hidden % 128 and case.dim % 128 for case in found)


@pytest.mark.parametrize("index, name", list(enumerate(["dx", "dw1", "db1", "dw2", "db2", "dgates"])))
def test_checks_name_a_wrong_gradient(index, name, monkeypatch):
    backward = cpu.moe_mlp_backward

    def off(*args):
        grads = list(backward(*args))
        if grads[index] is not None:
            grads[index] = grads[index] + 0.02 * grads[index].roll(1, 0)
        return tuple(grads)

    monkeypatch.setattr(cpu, "moe_mlp_backward", off)
    case = checks.cases(1)[0]
    failures = checks.check_mlp(case, "bf16", CPU, "cpu").failures
    assert len(failures) == 1 and f"bf16 {case}: {name}: rms error" in failures[0]


def test_checks_see_memory_that_was_not_written(monkeypatch):
    forward = cpu.moe_mlp

    def partly_written(*args):
        y, z = forward(*args)
        fresh = torch.empty_like(y)
        fresh[1:] = y[1:]
        return fresh, z

    monkeypatch.setattr(cpu, "moe_mlp", partly_written)
    case, draws = checks.cases(1)[0], 4
    failures = checks.check_mlp(case, "fp32", CPU, "cpu").failures
    assert f"fp32 {case}: y: {draws * case.out} values are not finite" in failures


def test_checks_see_a_gradient_that_depends_on_the_others(monkeypatch):
    backward = cpu.moe_mlp_backward

    def off(*args):
        need = args[-1]
        grads = backward(*args)
        return grads if all(need) else tuple(g if g is None else 2 * g for g in grads)

    monkeypatch.setattr(cpu, "moe_mlp_backward", off)
    failures = checks.check_frozen(checks.cases(1)[0], "fp32", CPU, "cpu").failures
    assert [line.split(": ")[2] for line in failures] == [f"d{name} alone" for name in checks.LEAVES]


def test_zeros_in_place_of_a_result_fail():
    oracle = torch.randn(4, 50, dtype=torch.float64)
    useless = ([[torch.zeros(50)]], [[oracle[0]]], [[1e3 * torch.ones(50)]])  # a baseline that allows anything
    assert checks._judged(["y"], useless, "case").failures == ["case: y: zeros would pass"]


def test_plain_torch_in_tf32_is_as_coarse_as_tf32():
    x, w = torch.randn(64, 256), torch.randn(128, 256)
    exact = x.double() @ w.double().T
    with checks._plain_torch("tf32"):
        y = nn.functional.linear(x, w)
    error = ((y - exact).norm() / exact.norm()).item()
    assert 2e-4 < error < 2e-3  # ten bits: fp32 has 1e-7, bf16 2e-3 and more


def test_the_cases_hold_every_size():
    drawn = checks.cases(24)
    for name, values in checks.SIZES.items():
        assert {getattr(case, name) for case in drawn} == set(values)
    assert drawn == checks.cases(30)[:24]


def test_the_kernels_pass_the_checks_in_the_interpreter(tmp_path):
    case = checks.Case(17, 2, 3, 24, 32, 16, ids="some unused")
    report = checks.check_mlp(case, "bf16", CPU, "triton", draws=1)
    report.add(checks.check_linear(case, "bf16", CPU, "triton", draws=1))
    assert (report.failures, report.cases) == ([], 2)
    assert gpu_run.run_step("plan", tmp_path, CPU, 60, 1) == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["done"] and found["cases"] == 4 and not found["failures"]


# ---- the run on a GPU ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    command = [sys.executable, BENCHMARKS / "gpu.py", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (2, 1, "")
    assert done.stdout.startswith("no GPU here: ")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(sys, "argv", ["tune.py", f"--out={tmp_path / 'configs.json'}"])
    assert tune.main() == 2
    assert capsys.readouterr().out.startswith("no GPU here: ")


def results(out: Path, failures=(), done=True, missing=()):
    """What the steps of a run leave."""
    (out / "machine.json").write_text(json.dumps({"lines": ["NVIDIA H200, torch 2.11", "bf16 790 TFLOP/s"]}))
    for name in gpu_summary.CHECKS:
        if name not in missing:
            found = {"cases": 48, "failures": list(failures), "errors": {"y": 2e-3, "dx": 3e-3}, "done": done}
            (out / f"{name}.json").write_text(json.dumps(found))
    common = {"best_ms": 1, "ratio_dense": 1, "shape": "ViT-S, one image"}
    times = (("moe_mtl", "fwd+bwd", 0.02, 0.8), ("F.grouped_mm", "fwd+bwd", 0.03, 0.5), ("moe_mtl", "fwd", 0.015, 0.4))
    times += (("moe_mtl", "graph fwd", 0.0105, 0.5), ("moe_mtl", "graph fwd+bwd", 0.018, 0.9))
    rows = [
        common | {"provider": p, "mode": m, "median_ms": t, "limit_share": s, "tflops": 400} for p, m, t, s in times
    ]
    rows += [rows[0] | {"shape": shape.name} for shape in shapes.SHAPES[:8]]
    records.append(out / "results.csv", rows)
    (out / "tune.log").write_text("...\n31 buckets measured, 100 s\n")
    return dict.fromkeys((*gpu_summary.CHECKS, "harness", "tune"), int(bool(failures) or not done))


def test_the_summary_is_short_and_says_what_passed(tmp_path):
    lines, wrong = gpu_summary.summary(tmp_path, results(tmp_path), list(gpu_summary.CHECKS))
    assert not wrong and lines[-1] == "all checks passed" and len(lines) <= 40
    assert "bf16         passed, 48 checks  y 2e-03 dx 3e-03" in lines
    row = next(line for line in lines if line.startswith("ViT-S, one image"))
    assert row.split()[3:] == ["0.020", "400", "80%", "50%", "90%", "1.50", "15.0", "10.5"]
    assert "tune         31 buckets measured, 100 s" in lines


@pytest.mark.parametrize(
    "left, said",
    [
        ({"failures": [f"bf16 case {i}: dx: too far" for i in range(50)]}, "FAILED 50, 48 checks"),
        ({"done": False}, "NOT FINISHED, 48 checks"),
        ({"missing": ("bf16",)}, "FAILED, exit code 0, no result: bf16.log"),
    ],
)
def test_the_summary_says_what_is_wrong(left, said, tmp_path):
    lines, wrong = gpu_summary.summary(tmp_path, results(tmp_path, **left), list(gpu_summary.CHECKS))
    assert wrong and lines[-1] == "SOMETHING IS WRONG" and len(lines) <= 40
    assert any(line.startswith(f"bf16         {said}") for line in lines)


def test_parts_of_a_step_are_one_line(tmp_path):
    codes = results(tmp_path) | {"bf16.1": 0, "bf16.2": 0}
    for part, error in ((1, 4e-3), (2, 1e-3)):
        found = {"cases": 5, "failures": [], "errors": {"y": error}, "done": True}
        (tmp_path / f"{gpu_summary.part_of('bf16', part)}.json").write_text(json.dumps(found))
    lines, wrong = gpu_summary.summary(tmp_path, codes, list(gpu_summary.CHECKS))
    assert not wrong and "bf16         passed, 58 checks  y 4e-03 dx 3e-03" in lines
    lines, wrong = gpu_summary.summary(tmp_path, codes | {"bf16.1": 1}, list(gpu_summary.CHECKS))
    assert wrong and any(line.startswith("bf16         NOT FINISHED, 58 checks") for line in lines)
    (tmp_path / "bf16.2.json").unlink()
    lines, wrong = gpu_summary.summary(tmp_path, codes, list(gpu_summary.CHECKS))
    assert wrong and "bf16         FAILED, exit code 0, no result: bf16.2.log" in lines


def test_parts_hold_every_case(monkeypatch):
    seen = []
    for name in ("check_mlp", "check_linear", "check_frozen"):
        monkeypatch.setattr(gpu_run, name, lambda case, *_, name=name: seen.append((name, case)) or Report(cases=1))
    for part in range(3):
        assert list(gpu_run.values("bf16", CPU, 8, part, 3))
    drawn = checks.cases(8)
    expected = [(name, case) for name in ("check_mlp", "check_linear") for case in drawn]
    expected += [("check_frozen", case) for case in drawn[: gpu_run.FROZEN_CASES]]
    assert sorted(map(str, seen)) == sorted(map(str, expected))


def test_a_failed_harness_is_wrong_a_failed_sweep_is_said(tmp_path):
    codes = results(tmp_path)
    lines, wrong = gpu_summary.summary(tmp_path, codes | {"tune": 1}, list(gpu_summary.CHECKS))
    assert not wrong and "tune         FAILED: tune.log" in lines
    lines, wrong = gpu_summary.summary(tmp_path, codes | {"harness": 1}, list(gpu_summary.CHECKS))
    assert wrong and any(line.startswith("harness      FAILED") for line in lines)


def test_a_step_stops_at_its_deadline_and_keeps_what_it_found(tmp_path, monkeypatch):
    def plans(device):
        for i in range(100):
            time.sleep(0.01)
            yield Report(cases=1, failures=["plan: wrong"] * (i == 1))

    monkeypatch.setattr(gpu_run, "plans", plans)
    assert gpu_run.run_step("plan", tmp_path, CPU, 0.05, 1) == 1
    found = json.loads((tmp_path / "plan.json").read_text())
    assert not found["done"] and 1 < found["cases"] < 100 and found["failures"] == ["plan: wrong"]


def test_what_hangs_is_ended(tmp_path):
    code = "import time, sys; print('begun'); time.sleep(60 * int(sys.argv[1]))"
    running = {name: gpu_run.spawn(["-c", code, hangs], tmp_path / name) for name, hangs in (("fine", 0), ("hung", 1))}
    running["fine"].wait()
    codes = gpu_run.wait(running, time.monotonic() + 0.5)
    assert codes["fine"] == 0 and codes["hung"] != 0
    assert (tmp_path / "hung").read_text() == "begun\n"


def test_everything_imports_in_a_bare_checkout():
    blocked = (
        "accelerate datasets einops hypothesis jsonargparse matplotlib peft pytest rich safetensors tensorboard timm "
        "torchmetrics torchvision transformers yaml"
    )
    done = python(f"""
sys.modules |= dict.fromkeys({blocked.split()!r})  # as if they were not installed
import gpu, moe_layer, tune
import torch
torch.manual_seed(0)
case = gpu.cases(1)[0]
print(gpu.check_mlp(case, "fp32", torch.device("cpu"), "cpu", 1).failures)
""")
    assert done.stdout == "[]\n", done.stderr
