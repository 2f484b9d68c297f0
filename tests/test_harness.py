"""The benchmark of the MoE layer: its limits, what it times, what it refuses to time."""

import csv
import math
import os
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moe_mtl.kernels import cpu
from tests.benchmark_modules import CPU, GATED, TINY, measure, moe_layer, peers, records, roofline, shapes

Shape = shapes.Shape
RUN = {"device": CPU, "router": "given", "seen": roofline.Ceilings(1e11, 1e10), "rounds": 2, "seconds": 0.0}

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
