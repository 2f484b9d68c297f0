"""The harness, the checks, the tuning tool and the GPU run: what they compute, refuse and write, without a GPU."""

import csv
import importlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moe_mtl.kernels import configs, cpu, plan
from moe_mtl.kernels.configs import Config, Entry

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = torch.device("cpu")

sys.path.insert(0, str(BENCHMARKS))  # the scripts import each other by name
try:
    checks, config_table, gpu_run, gpu_summary, measure, moe_layer, peers, records, roofline, shapes, tune = (
        importlib.import_module(name)
        for name in (
            *("checks", "config_table", "gpu", "gpu_summary", "measure", "moe_layer", "peers", "records"),
            *("roofline", "shapes", "tune"),
        )
    )
finally:
    sys.path.remove(str(BENCHMARKS))

Shape, Bucket, Report = shapes.Shape, config_table.Bucket, checks.Report
TINY = Shape("tiny", 24, 16, 32, 4, 2)
GATED = replace(TINY, name="tiny, gated", glu=True)
RUN = {"device": CPU, "router": "given", "seen": roofline.Ceilings(1e11, 1e10), "rounds": 2, "seconds": 0.0}


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    """Runs code beside the benchmarks."""
    lines = f"import sys\nsys.path[:0] = [{str(BENCHMARKS.parent)!r}, {str(BENCHMARKS)!r}]\n{code}"
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, env=env, check=False)


# ---- limits ----------------------------------------------------------------------------------------------------------

# microseconds for inference, training forward and backward at 790 TFLOP/s and 4.3 TB/s, from the study of limits
STUDY = {
    "ViT-T M3ViT": (13.5, 16.4, 27.0),
    "ViT-S M3ViT": (31.9, 33.9, 63.7),
    "ViT-S 224, batch 8": (15.0, 17.2, 33.3),
    "ViT-S 224, batch 256": (328, 335, 708),
    "ViT-B M3ViT": (111, 111, 207),
    "BERT-base, ViT-B": (409, 409, 800),
    "ViT-B, fine-grained": (693, 693, 1295),
    "BERT-large, ViT-L": (1439, 1439, 2830),
    "ViT-S, one image": (5.4, 6.2, 10.9),
}


@pytest.mark.parametrize("name", STUDY)
def test_limits_are_those_of_the_study(name):
    shape = next(s for s in shapes.SHAPES if s.name == name)
    found = roofline.limits(shape, 2, 790e12, 4.3e12)
    assert [1e6 * t for t in found] == pytest.approx(STUDY[name], rel=0.02)
    assert found.of("fwd") == found.of("graph fwd") == found.infer
    assert found.of("fwd+bwd") == found.of("graph fwd+bwd") == found.train_fwd + found.bwd


def test_limits_of_a_gated_layer_by_hand():
    # m 10, d 3, h 5, e 2, k 1: x and rows 30 numbers, h 50, z 100, w1 2*10*3 = 60, w2 2*5*3 = 30. At a byte per second
    # and numbers of a byte: up 30+60+50 (+100 for z), down 50+30+30, combine 30+30. Backward: hidden gradient
    # 30+30+100+100+50, dw2 30+50+30, dw1 100+30+60, input gradient 100+60+30, combine 60.
    shape = Shape("", 10, 3, 5, 2, 1, glu=True)
    assert roofline.limits(shape, 1, math.inf, 1.0) == (140 + 110 + 60, 240 + 110 + 60, 310 + 110 + 190 + 190 + 60)
    # products: first layer 2*10*3*10 = 600, second 300; forward each once, backward each twice
    assert roofline.limits(shape, 1, 1.0, math.inf) == (900, 900, 1800)
    assert shape.forward_flops == 900


@pytest.mark.parametrize("shape", [TINY, GATED], ids=str)
def test_flops_of_a_shape_are_those_counted(shape, monkeypatch):
    monkeypatch.setattr(peers, "PEERS", ())
    made, _ = peers.providers(shape, torch.float32, CPU)
    layers = {p.name: p for p in made}
    routing = moe_layer.given_routing(shape, CPU)
    for name in ("moe_mtl", "dense"):
        with FlopCounterMode(display=False) as counter:
            layers[name].run(torch.randn(shape.tokens, shape.dim), routing)
        assert counter.get_total_flops() == shape.forward_flops


def test_saved_bytes_are_distinct_storages_without_parameters():
    layer, x = nn.Linear(8, 4), torch.randn(16, 8, requires_grad=True)

    def run():
        hidden = layer(x)
        return (hidden * hidden[:, :1]).exp()

    # the layer saves x (and its weight), the product both factors, which are one storage, exp its result
    assert measure.saved_bytes(run, list(layer.parameters())) == 4 * (16 * 8 + 16 * 4 + 16 * 4)


def test_rounds_are_paired():
    calls = {"a": 0, "b": 0}

    def step(name):
        calls[name] += 1
        time.sleep(0.011)  # longer than a round has to be: not repeated

    times = measure.interleaved({name: partial(step, name) for name in calls}, CPU, rounds=7, seconds=60)
    assert [len(t) for t in times.values()] == [7, 7]
    assert calls == {"a": 9, "b": 9}  # two calls before the rounds
    times = measure.interleaved({"a": partial(step, "a")}, CPU, rounds=100, seconds=0)
    assert len(times["a"]) == measure.LEAST_ROUNDS


# ---- the harness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [TINY, GATED], ids=str)
def test_every_provider_is_timed_and_reported(shape):
    result = moe_layer.measured(shape, "fp32", **RUN)
    expected = {"dense", "moe_mtl", "moe_mtl grouped_mm", "reference loop", "F.grouped_mm"}
    expected |= {"transformers batched_mm", "transformers grouped_mm", *["transformers eager"] * shape.glu}
    assert set(result.seconds) == {"fwd", "fwd+bwd"}
    for by_name in result.seconds.values():
        assert set(by_name) == expected
        assert all(len(seconds) == 2 for seconds in by_name.values())
    assert set(result.saved) == expected - {"dense"}
    assert result.saved["moe_mtl"] <= result.allowed < result.saved["reference loop"]
    text = "\n".join(moe_layer.report(result))
    assert all(name in text for name in expected)
    rows = moe_layer.rows_of(result, {})
    assert len(rows) == 2 * len(expected)
    assert set().union(*rows) <= set(records.COLUMNS)


def fixed(shape=shapes.SHAPES[8], train=1.0, graph=1.0, grouped=2.0, saved=100):
    """A result with the limits 1 and 4 s (inference, training)."""
    seconds = {
        "fwd": {"dense": [1.0, 2.0], "moe_mtl": [2.0, 4.0], "F.grouped_mm": [3.0, 3.0]},
        "fwd+bwd": {"dense": [1.0, 1.0], "moe_mtl": [train, train], "F.grouped_mm": [grouped, grouped]},
        "graph fwd": {"dense": [1.0, 1.0], "moe_mtl": [graph, graph]},
    }
    return moe_layer.Result(shape, roofline.Limits(1.0, 1.5, 2.5), seconds, {"moe_mtl": saved}, 100)


def test_ratios_and_shares_by_hand():
    result = fixed(train=8.0)
    assert result.ratios("fwd", "moe_mtl") == [2.0, 2.0]
    assert result.ratios("fwd", "F.grouped_mm") == [1.5, 3.0]
    assert result.share("fwd", "moe_mtl") == pytest.approx(1 / 3)  # limit 1, median 3
    assert result.share("fwd+bwd", "moe_mtl") == pytest.approx(4 / 8)
    flops = shapes.SHAPES[8].forward_flops
    assert result.tflops("fwd", "moe_mtl") == pytest.approx(flops / 3 / 1e12)
    assert result.tflops("fwd+bwd", "moe_mtl") == pytest.approx(3 * flops / 8 / 1e12)


def test_targets_are_reached_or_missed():
    def reached(on_gpu=True, **values):
        return [good for _, _, good in moe_layer.targets(fixed(**values), on_gpu)]

    # half of the limit, 1.3 times the grouped layer, saved bytes, 12 us in a graph
    assert reached(train=7.9, grouped=10.4, saved=100, graph=11e-6) == [True, True, True, True]
    assert reached(train=8.1, grouped=10.4, saved=101, graph=13e-6) == [False, False, False, False]
    assert reached(on_gpu=False, train=100.0, saved=99) == [True]
    ratios = [ratio for _, ratio, _ in moe_layer.targets(fixed(train=4.0, grouped=5.2, saved=50, graph=24e-6), True)]
    assert ratios == pytest.approx([2.0, 1.0, 2.0, 0.5])


def agree(providers):
    x, routing = torch.randn(24, 16, requires_grad=True), moe_layer.given_routing(TINY, CPU)
    notes = []
    kept = moe_layer.agreeing(providers, "fp32", x, routing, torch.randn(24, 16), notes)
    return [p.name for p in kept], notes


def test_a_peer_that_is_wrong_or_fails_is_named_and_not_timed():
    made, _ = peers.providers(TINY, torch.float32, CPU)
    right = next(p.run for p in made if p.name == "moe_mtl")

    def failing(x, routing):
        raise RuntimeError("no kernel\nhere")

    def detached(x, routing):  # right output, wrong gradient of the gates
        return right(x, replace(routing, weights=routing.weights * 2 - routing.weights.detach()))

    others = [
        peers.Provider("wrong", lambda x, routing: 1.001 * right(x, routing)),
        peers.Provider("failing", failing),
        peers.Provider("half", detached),
    ]
    kept, notes = agree([*made, *others])
    assert kept == [p.name for p in made]
    assert len(notes) == 3
    assert notes[0].startswith("wrong: wrong by 1.0e-03")
    assert notes[1] == "failing: RuntimeError: no kernel here"
    assert notes[2].startswith("half: wrong by 1.0e+00")


@pytest.mark.parametrize("index", range(1, 7))
def test_a_wrong_gradient_of_ours_ends_the_run(index, monkeypatch):
    made, _ = peers.providers(TINY, torch.float32, CPU)
    backward = cpu.moe_mlp_backward

    def off(*args):
        grads = list(backward(*args))
        grads[index - 1] = grads[index - 1] * 1.001
        return tuple(grads)

    monkeypatch.setattr(cpu, "moe_mlp_backward", off)
    with pytest.raises(SystemExit, match="moe_mtl: wrong by"):
        agree(made)


def test_red_ops_are_found_before_anything_is_timed(monkeypatch, capsys):
    assert moe_layer.red_ops(CPU, "fp32") == []
    forward = cpu.moe_mlp
    monkeypatch.setattr(cpu, "moe_mlp", lambda *args: (forward(*args)[0] + 1e-4, forward(*args)[1]))
    monkeypatch.setattr(moe_layer, "measured", lambda *args: pytest.fail("timed"))
    options = ["--device=cpu", "--no-csv", "--allocator=default", f"--threads={torch.get_num_threads()}"]
    monkeypatch.setattr(sys, "argv", ["moe_layer.py", *options])
    with pytest.raises(SystemExit) as refused:
        moe_layer.main()
    first, second = str(refused.value).splitlines()[:2]
    assert first == "the ops are wrong on this machine, nothing is timed:"
    assert second.startswith("  backend 'auto': fp32 ") and ": y: rms error" in second


@pytest.mark.parametrize("load", [0.0, 3.0])
def test_the_command_measures_and_appends(load, tmp_path, monkeypatch, capsys):
    heavy = replace(TINY, name="heavy", tokens=10**9)
    monkeypatch.setattr(moe_layer, "SHAPES", (TINY, heavy))
    monkeypatch.setattr(moe_layer, "red_ops", lambda *args: [])
    monkeypatch.setattr(moe_layer, "ceilings", lambda *args: roofline.Ceilings(1e11, 1e10))
    monkeypatch.setattr(peers, "PEERS", ())
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    path, threads = tmp_path / "results.csv", torch.get_num_threads()
    options = ["--device=cpu", f"--csv={path}", "--rounds=1", f"--threads={threads}", "--allocator=default"]
    monkeypatch.setattr(sys, "argv", ["moe_layer.py", *options])
    for _ in range(2):
        assert moe_layer.main() == 0
    said = capsys.readouterr().out
    assert "heavy: left out" in said and "tiny: T24 D16 H32 E4 k2" in said
    assert ("THE MACHINE IS BUSY (load 3.0)" in said) == bool(load)
    if load:
        assert not path.exists()
        return
    rows = records.read(path)
    assert len(rows) == 2 * 2 * 5
    assert {row["shape"] for row in rows} == {"tiny"}
    filled = ("cpu", "device", "torch", "triton", "commit", "router", "tflops")
    assert all(row[name] for row in rows for name in filled)
    path.write_text("date,op\n")
    with pytest.raises(SystemExit, match="its columns are not those"):
        moe_layer.main()


def test_the_results_in_the_tree_have_the_columns_of_today():
    assert records.columns_fit(records.CSV)
    with records.CSV.open(newline="") as file:
        assert {len(row) for row in csv.reader(file)} == {len(records.COLUMNS)}
    assert all(float(row["median_ms"]) >= float(row["best_ms"]) > 0 for row in records.read(records.CSV))


def test_a_peer_that_cannot_be_made_is_named(monkeypatch):
    def broken(shape, bank):
        raise OSError("no library")
        yield

    monkeypatch.setattr(peers, "PEERS", (("broken", "torch", broken), ("absent", "no_such_package", broken)))
    made, failed = peers.providers(TINY, torch.float32, CPU)
    assert failed == {"broken": "OSError: no library"}
    assert not {"broken", "absent"} & {p.name for p in made}


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


# ---- tuning ----------------------------------------------------------------------------------------------------------

A, B, C = Config(32, 64, 64), Config(64, 64, 64), Config(128, 128, 64, warps=8, epilogues=2)


def test_the_table_is_written_as_it_was_read():
    assert config_table.text(list(configs.entries())) == configs.TABLE.read_text()
    assert config_table.merged(list(configs.entries()), 90, {}) == list(configs.entries())


def test_the_best_config_is_best_on_the_whole():
    times = {"one": {A: 1.0, B: 2.0, C: 1.1}, "two": {A: 3.0, B: 1.0, C: 1.2}}
    assert config_table.best(times, A) == C  # 1.1 * 1.2 against 3 and 2
    assert config_table.best({"one": {A: 1.0, B: 0.99}}, A) == A  # not worth a change
    assert config_table.best({"one": {A: 1.0, B: 0.9}}, A) == B
    assert config_table.best({"one": {A: 1.0, B: 0.1}, "two": {A: 1.0}}, C) == A  # B did not run on two
    with pytest.raises(ValueError, match="no config ran on all"):
        config_table.best({"one": {A: 1.0}, "two": {B: 1.0}}, A)


def test_a_call_falls_into_its_bucket():
    assert config_table.bucket_of("up", 16, False, 48, 257) == Bucket("up", 16, False, 48, 512)
    assert config_table.bucket_of("up", 16, True, 513, 4096) == Bucket("up", 16, True, None, None)


CALLS = list(product(configs.KERNELS, (16, 32), (False, True), (1, 48, 49, 512, 10**4), (64, 256, 257, 512, 4096)))


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_measured_buckets_change_and_nothing_else(arch):
    table = list(configs.entries())
    chosen = {
        Bucket("up", 16, False, None, None): A,
        Bucket("up", 16, True, 48, 256): B,
        Bucket("down", 16, False, 512, 512): C,
        Bucket("fused", 16, False, 48, 256): B,
        Bucket("weight_grad", 32, False, None, 256): A,
    }
    new = config_table.merged(table, arch, chosen)
    before = [entry for entry in table if entry.arch == min(arch, 90)]
    after = [entry for entry in new if entry.arch == arch]
    for kernel, bits, glu, rows, width in CALLS:
        if kernel == "fused" and glu:
            continue
        old = config_table.picked(before, kernel, bits, glu, rows, width)
        expected = chosen.get(config_table.bucket_of(kernel, bits, glu, rows, width), old)
        assert config_table.picked(after, kernel, bits, glu, rows, width) == expected
    assert [entry for entry in new if entry.arch != arch] == [entry for entry in table if entry.arch != arch]
    for kernel, bits in {(entry.kernel, entry.bits) for entry in after}:  # a chip never finds nothing
        last = [entry for entry in after if (entry.kernel, entry.bits) == (kernel, bits)][-1]
        assert (last.glu, last.max_rows, last.max_width) == (None, None, None)
    assert not [entry for entry in after if entry.kernel == "fused" and entry.glu]


def test_finer_ranges_of_the_table_are_kept_where_nothing_was_measured():
    table = [Entry("up", 90, 16, A, max_rows=20), Entry("up", 90, 16, B, max_width=1024), Entry("up", 90, 16, C)]
    new = config_table.merged(table, 90, {Bucket("up", 16, True, None, 256): A})
    found = [config_table.picked(new, "up", 16, glu, rows, width).block_m for glu, rows, width in (
        (False, 20, 64), (False, 21, 1024), (False, 21, 1025), (True, 600, 256), (True, 600, 257), (True, 512, 256)
    )]  # fmt: skip
    assert found == [32, 64, 128, 32, 64, 64]


def test_lines_that_say_nothing_are_left_out():
    buckets = {Bucket("down", 16, glu, rows, width) for glu, rows, width in product(
        (False, True), (48, 512, None), (256, 512, None)
    )}  # fmt: skip
    assert config_table.merged(list(configs.entries()), 90, dict.fromkeys(buckets, A)) == [
        *(e if (e.kernel, e.arch, e.bits) != ("down", 90, 16) else Entry("down", 90, 16, A) for e in configs.entries()
          if (e.kernel, e.arch, e.bits) != ("down", 90, 16) or e.max_rows is None)
    ]  # fmt: skip


@pytest.mark.parametrize("arch, bits, kernel", product((80, 90), (16, 32), configs.KERNELS))
def test_at_most_twelve_candidates_the_table_first(arch, bits, kernel):
    lines = [entry for entry in configs.entries() if entry.arch == arch]
    found = tune.candidates(kernel, bits, lines)
    assert len(set(found)) == len(found) <= tune.MOST_CONFIGS
    known = {entry.config for entry in lines if (entry.kernel, entry.bits) == (kernel, bits)}
    assert known <= set(found) and (len(found) > len(known) or not known)
    if kernel != "weight_grad":
        assert {config.block_m for config in found} <= set(plan.TILE_ROWS)


LAUNCHES = """
import torch, tune
from unittest import mock
from triton.runtime.jit import JITFunction
from moe_mtl.kernels import configs, gpu
from shapes import SHAPES

def launches(run):
    found = set()
    def record(function, *args, grid, warmup, **constants):
        name = function.fn.__name__.removesuffix("_kernel")
        if name in configs.KERNELS:
            given = (tuple((a.dtype, a.shape, a.stride()) if isinstance(a, torch.Tensor) else a for a in args))
            found.add((name, grid, given, *sorted(constants.items())))
    chip = mock.patch.object(configs, "chip", lambda device: (90, 132))
    with chip, mock.patch.object(JITFunction, "run", record), torch.device("meta"):
        run()
    return found

def tuned():
    for problem in tune.problems(shape, "bf16", torch.device("meta"), 132):
        problem.run(configs.pick(problem.kernel, 90, 16, shape.glu, shape.rows // shape.experts, problem.width))

def library():
    e, d, wide = shape.experts, shape.dim, shape.wide
    sizes = ((shape.tokens, d), (e, wide, d), (e, d, shape.hidden), (e, wide), (e, d), (shape.rows, wide))
    x, w1, w2, b1, b2, z = (torch.empty(size, dtype=torch.bfloat16) for size in sizes)
    b1, b2 = (None, None) if shape.glu else (b1, b2)
    gates, sort, act = torch.empty(shape.tokens, shape.k), tune._plan(shape, torch.device("meta")), shape.activation
    for save in (True, False):
        gpu.moe_mlp(x, w1, b1, w2, b2, gates, sort, act, shape.glu, save)
    need = [True, True, b1 is not None, True, b2 is not None, True]
    gpu.moe_mlp_backward(x, x, z, w1, w2, b2, gates, sort, act, shape.glu, need)

for shape in SHAPES:
    timed, real = launches(tuned), launches(library)
    assert len(real) == 7, len(real)
    assert timed == real, (shape, timed ^ real)
print("same")
"""


def test_what_is_tuned_is_what_the_library_launches():
    done = python(LAUNCHES, TRITON_INTERPRET="0")
    assert done.stdout == "same\n", done.stderr


def test_a_sweep_times_what_is_right_and_names_the_rest(monkeypatch):
    table, other, broken = Config(32, 32, 32), Config(64, 32, 32), Config(48, 32, 32)
    lines = [Entry(kernel, 90, 16, table) for kernel in configs.KERNELS]
    clock = iter(range(1, 100))
    monkeypatch.setattr(tune, "candidates", lambda *args: [other, table, broken])

    def fault(shape, place, config):
        return "spills" if (place, config) == (3, other) else ""

    shape = Shape("tiny", 9, 16, 16, 2, 2)
    found = tune.sweep([shape], "bf16", CPU, lines, 1, fault, lambda run: next(clock), 1e9)
    times = {name: by_config for by_name in found.times.values() for name, by_config in by_name.items()}
    rows = ("up, training", "down, forward", "down, input gradient", "hidden_grad, backward", "fused, inference")
    weights = ("weight_grad, first layer", "weight_grad, second layer")
    assert set(times) == {f"tiny: {role}" for role in (*rows, *weights)}
    assert times["tiny: up, training"] == {table: 1, other: 2}
    assert set(times["tiny: hidden_grad, backward"]) == {table}
    assert found.skipped["tiny: hidden_grad, backward"][other] == "spills"
    for role in rows:  # the plan has no tiles of 48 rows
        assert "48" in found.skipped[f"tiny: {role}"][broken]
    assert set(found.times) == {Bucket(kernel, 16, False, 48, 256) for kernel in configs.KERNELS}


def test_a_config_that_computes_something_else_is_not_timed(monkeypatch):
    table, other = Config(32, 32, 32), Config(64, 32, 32)
    right = torch.ones(4)
    problem = tune.Problem("up", "wrong", 16, lambda config: (right if config == table else 1.1 * right,))
    monkeypatch.setattr(tune, "problems", lambda *args: [problem])
    monkeypatch.setattr(tune, "candidates", lambda *args: [table, other])
    found = tune.sweep([TINY], "bf16", CPU, [Entry("up", 90, 16, table)], 1, lambda *launch: "", lambda run: 1.0, 1e9)
    assert found.times == {Bucket("up", 16, False, 48, 256): {"tiny: up, wrong": {table: 1.0}}}
    assert found.skipped["tiny: up, wrong"] == {other: "differs from the table's by 1.0e-01"}


def test_a_sweep_ends_in_lines(capsys):
    lines = [entry for entry in configs.entries() if entry.arch == 90]
    bucket = Bucket("up", 16, False, None, 512)
    current = config_table.picked(lines, "up", 16, False, 10**4, 512)
    found = tune.Found({bucket: {"p": {current: 2e-6, A: 1e-6}}}, {"p": {B: "spills 4 registers"}})
    chosen = tune.choose(found, lines)
    assert chosen == {bucket: A}
    text = tune.report(found, chosen, lines)
    assert text[1].split() == ["p", "2.0", "1.0", "2.00", "32x64x64", "w4", "s3"]
    assert text[2] == "skipped, p: 64x64x64 w4 s3: spills 4 registers"
    new = config_table.text(config_table.merged(list(configs.entries()), 90, chosen))
    assert any(
        '"max_width": 512' in line and line.startswith("+") for line in tune.changed(configs.TABLE.read_text(), new)
    )
    assert tune.choose(tune.Found({bucket: {"p": {A: 1.0}, "q": {B: 1.0}}}, {}), lines) == {}


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
case = gpu.cases(1)[0]
print(gpu.check_mlp(case, "fp32", torch.device("cpu"), "cpu", 1).failures)
""")
    assert done.stdout == "[]\n", done.stderr
