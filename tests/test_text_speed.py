"""The benchmark of text encoders: what it times, what it says of it, and what its file in the tree holds."""

import importlib
import json
import math
import os
import sys

import pytest
import torch

from tests.benchmark_modules import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))
try:
    text_speed = importlib.import_module("text_speed")
finally:
    sys.path.remove(str(BENCHMARKS))

SIZES = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 60}
TINY = text_speed.MINILM | SIZES
OLD = {"mode": "train", "dtype": "fp32", "threads": 1, "batch": 2, "tokens": 4}
OURS = {"moe_mtl, one task", "extracted", "extracted, an expert per task"}
PEERS = {"transformers Mixtral, eager", "transformers Mixtral, grouped_mm"}
WHOLE = {f"{name}, {what}" for name in ("dense", "moe_mtl") for what in ("all 4 tasks", "a task per text")}


def test_every_provider_is_timed_and_reported(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(text_speed, "MINILM", TINY)
    monkeypatch.setattr(text_speed, "DTYPES", {"fp32": torch.float32})
    path = tmp_path / "speed.json"
    options = ["--batches", "1", "3", "--tokens", "5", "--train-batch=2", "--train-tokens=4", "--threads", "1", "2"]
    monkeypatch.setattr(text_speed, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 0.0, 0.0))
    path.write_text(json.dumps({"rows": [OLD | {"provider": "dense"}, OLD | {"provider": "gone", "threads": 2}]}))
    text_speed.main([*options, "--rounds=1", "--seconds=0", f"--out={path}"])
    old, *rows = sorted(json.loads(path.read_text())["rows"], key=lambda row: -row["threads"])
    assert old == OLD | {"provider": "gone", "threads": 2}  # of a case that was left out
    named: dict[tuple, set] = {}
    for row in rows:
        named.setdefault((row["mode"], row["batch"], row["tokens"]), set()).add(row["provider"])
        assert row["ratio"] > 0 and row["ms"] > 0
    assert named == {
        ("train", 2, 4): {"dense", "moe_mtl, one task"} | PEERS,
        ("infer", 1, 5): {"dense"} | OURS | PEERS,
        ("infer", 3, 5): {"dense"} | OURS | PEERS | WHOLE,
    }
    said = capsys.readouterr().out
    assert all(row["provider"] in said for row in rows)
    assert "train fp32, 2 threads: left out, the machine is busy (load 3.0)" in said
    assert said.count("bound 1.15") == 2 and said.count("bound 1.4") == 1


def test_as_many_weights_work_on_a_token_as_in_the_dense_encoder():
    models = text_speed.build(TINY, "infer")
    dense = sum(p.numel() for p in models["dense"].backbone.parameters())
    # the experts that a token does not use: 3 of 4 in 2 of 4 layers, two matrices of 24 x 48 and their biases each
    unused = 2 * 3 * (2 * 24 * 48 + 24 + 48)
    routers = 2 * 4 * 24  # of a task
    extracted = sum(p.numel() for p in models["extracted"].backbone.parameters())
    assert extracted == dense + unused + routers
    alone = models["extracted, an expert per task"]
    assert [len(layer.kept_experts) for layer in alone.moe_layers.values()] == [1, 1]
    # Mixtral: three matrices of 24 x 32 weigh what two of 24 x 48 do; no biases
    peer = sum(p.numel() for p in models["transformers Mixtral, eager"].backbone.parameters())
    assert peer == dense + 2 * 3 * (3 * 24 * 32) + routers - 2 * (24 + 48)


def test_training_leaves_word_embeddings_and_changes_experts():
    models = text_speed.build(TINY, "train")
    for model in models.values():
        words = model.backbone.get_input_embeddings().weight
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        text_speed.training(model, text_speed.texts(2, 4, 60), bf16=False)()
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert not words.requires_grad and "backbone.embeddings.word_embeddings.weight" not in changed
        assert any("encoder.layer.1" in name for name in changed)


def test_ratios_are_those_of_paired_rounds(monkeypatch):
    times = {"dense": [1.0, 2.0, 4.0], "extracted": [2.0, 2.0, 8.0]}
    monkeypatch.setattr(text_speed, "interleaved", lambda *args: times)
    args = type("Args", (), {"rounds": 3, "seconds": 0})
    rows = text_speed.rows_of({}, args, mode="infer", dtype="fp32", threads=1, batch=2, tokens=5)
    assert [row["ratio"] for row in rows] == [1.0, 2.0]
    assert rows[1]["tokens_per_second"] == pytest.approx(10 / 2.0) and rows[1]["ms"] == 2000.0
    assert text_speed.told(rows).endswith("bound 1.15: MISSED")


def test_the_results_in_the_tree_are_whole():
    found = json.loads(text_speed.OUT.read_text())
    cases = {(row["mode"], row["dtype"], row["threads"], row["batch"], row["tokens"]) for row in found["rows"]}
    infer = {("infer", dtype, 1, b, n) for dtype in ("fp32", "bf16") for b in (1, 32) for n in (16, 64)}
    train = {("train", dtype, 1, 32, 16) for dtype in ("fp32", "bf16")}
    assert cases >= infer | train  # those of two threads need a machine that is free
    assert all(math.isfinite(row["ratio"]) and row["rounds"] >= 5 for row in found["rows"])
