"""Two stages of task-level experts: routes are kept, frozen and followed by experts fresh from the encoder."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn.functional import gelu

import moe_mtl
from moe_mtl import create_model, extract
from moe_mtl.data import Snips
from moe_mtl.gates import create_gate
from moe_mtl.parameter_groups import decays
from moe_mtl.tasks import Task
from moe_mtl.trainer import Trainer
from moe_mtl.trainer_config import TrainerConfig
from moe_mtl.two_stage import copy_routes, follows_routes, restart_from_routes
from tests.test_encoders import TASKS, encoder, texts
from tests.text_cases import save_encoder, write_all, write_snips

SECOND = {"selection": "softmax", "start": 300.0, "end": 1.0, "frozen": True}


@pytest.fixture
def folder(tmp_path):
    """A pretrained encoder."""
    encoder().save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def first_stage(folder, **options):
    """A trained model of the first stage: routes, experts and heads are none that were drawn."""
    torch.manual_seed(1)
    args = {"tasks": TASKS, "encoder": str(folder), "gate": "task_level", "experts": 3, "k": 1, **options}
    model = create_model("text_moe", **args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    for layer in model.moe_layers.values():
        layer.gate.anneal(1.0)
    return model.eval()


def reached(model):
    return {name: [moe.gate.reachable(t) for t in range(len(model.tasks))] for name, moe in model.moe_layers.items()}


# ---- the temperature


def test_the_softmax_cools_from_nearly_even_to_the_scores_by_hand():
    # scores 300 (0, log 2, log 5): at temperature 300 the weights are (1, 2, 5) / 8; half way, at sqrt(300), the
    # scores over it are sqrt(300) (0, log 2, log 5)
    gate = create_gate("task_level", 1, 3, 1, 1, embedding_dim=None, **SECOND).train()
    with torch.no_grad():
        gate.table[0].copy_(300 * torch.tensor([0.0, math.log(2), math.log(5)]))
    x = torch.ones(2, 1)
    assert gate.temperature.item() == 300.0
    routing = gate(x, 0)
    torch.testing.assert_close(routing.weights, torch.tensor([[1 / 8, 2 / 8, 5 / 8]]).repeat(2, 1))
    assert routing.noisy_logits is None and torch.equal(routing.weights, gate(x, 0).weights)  # nothing is drawn
    gate.anneal(0.5)
    assert gate.temperature.item() == pytest.approx(math.sqrt(300))
    expected = math.sqrt(300) * torch.tensor([[0.0, math.log(2), math.log(5)]])
    torch.testing.assert_close(gate(x, 0).logits, expected.repeat(2, 1), rtol=1e-5, atol=1e-5)
    gate.anneal(1.0)
    assert gate.temperature.item() == 1.0
    # scores such as routes are learned with are nearly even at first: (0, 1, 2) over 300 differ by 1/300 at most
    with torch.no_grad():
        gate.table[0].copy_(torch.tensor([0.0, 1.0, 2.0]))
    gate.anneal(0.0)
    a, b, c = gate(x, 0).weights[0].tolist()
    assert b / a == pytest.approx(math.exp(1 / 300)) and c / a == pytest.approx(math.exp(2 / 300))
    # in evaluation the largest serves alone, whatever the temperature
    assert gate.eval()(x, 0).weights.tolist() == [[1.0]] * 2 and gate(x, 0).indices.tolist() == [[2]] * 2


def test_frozen_routes_do_not_learn_and_what_comes_before_does():
    torch.manual_seed(0)
    gate, stem = create_gate("task_level", 4, 3, 2, 1, embedding_dim=4, **SECOND).train(), torch.nn.Linear(4, 4)
    assert not any(parameter.requires_grad for parameter in gate.parameters())
    assert gate.extra_repr().endswith("temperature=300, frozen=True")
    routing = gate(stem(torch.randn(6, 4)), (0, 1))
    assert not routing.weights.requires_grad and routing.weights.shape == (6, 3)
    small = gate.for_tasks([1])
    assert small.frozen and not any(parameter.requires_grad for parameter in small.parameters())
    gate.add_task([0])
    assert len(gate.table) == 3 and not any(parameter.requires_grad for parameter in gate.parameters())
    plain = create_gate("task_level", 4, 3, 2, 1, embedding_dim=4)
    assert all(parameter.requires_grad for parameter in plain.parameters()) and "frozen" not in plain.extra_repr()


# ---- the second stage


def test_routes_are_kept_and_experts_are_the_encoders(folder):
    trained, x = first_stage(folder), texts()
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    model = restart_from_routes(trained, folder)
    assert follows_routes(model) and not follows_routes(trained)
    assert reached(model.eval()) == reached(trained)
    assert len({ids for layer in reached(trained).values() for ids in layer}) > 1  # tasks have different experts
    dense = encoder().eval()
    for name, moe in model.moe_layers.items():
        gate, old = moe.gate, trained.moe_layers[name].gate
        for a, b in zip(gate.parameters(), old.parameters(), strict=True):
            assert torch.equal(a, b) and a is not b and not a.requires_grad
        assert (gate.selection, gate.start, gate.end, gate.temperature.item()) == ("softmax", 300.0, 1.0, 300.0)
        source = dense.encoder.layer[int(name.removeprefix("layer."))].intermediate.dense.weight
        assert all(torch.equal(w, source) for w in moe.experts.w1)
    # in evaluation and in training it starts as the dense encoder
    real = x["attention_mask"].bool()
    with torch.no_grad():
        expected = dense(**x).last_hidden_state
        for mode in (False, True):
            for moe in model.eval().moe_layers.values():  # without dropout
                moe.gate.train(mode)
            for found in model.features(x, (0, 1, 2, 3))[0].patches.unflatten(0, (4, -1)):
                torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    # experts learn, routes do not, and weight decay leaves them alone
    model.train()
    assert not any(".gate." in name for name in decays(model))
    sum(p.square().sum() for p in model(x).values()).backward()
    assert all(moe.experts.w1.grad.abs().amax(dim=(1, 2)).min() > 0 for moe in model.moe_layers.values())


def test_it_trains_and_the_arg_max_alone_is_what_a_task_keeps(tmp_path):
    folder = save_encoder(tmp_path / "mini")
    data = Snips(root=str(write_snips(tmp_path / "snips")), tokenizer=str(folder))
    trained = first_stage(folder, tasks=data.task_list(), every=1)
    model = restart_from_routes(trained, folder, start=30.0, end=0.5)
    how = {"steps": 6, "batch_size": 4, "lr": 1e-2, "warmup": 1, "eval_every": 0, "weight_decay": 0.1}
    Trainer(model, data, TrainerConfig(out=str(tmp_path / "run"), device="cpu", progress=False, **how)).fit()
    read, x = moe_mtl.load(tmp_path / "run"), data.split("train").__getitems__([0, 1, 2])["text"]
    assert reached(read) == reached(trained) and follows_routes(read)
    full = read(x)
    for i, task in enumerate(read.tasks):
        alone = extract(read, task.name)
        for name, moe in alone.moe_layers.items():
            gate, bank = read.moe_layers[name].gate, read.moe_layers[name].experts
            # the temperature of the last update, the sixth: 30 (0.5 / 30)^(5/6)
            assert gate.temperature.item() == pytest.approx(30 * (0.5 / 30) ** (5 / 6), rel=1e-5)
            assert tuple(moe.kept_experts) == gate.reachable(i) and moe.experts.w1.shape[0] == 1
            found, routing = moe(torch.ones(1, 16), 0)
            assert routing.weights.tolist() == [[1.0]]
            w1, b1, w2, b2 = (getattr(bank, name)[gate.reachable(i)[0]] for name in ("w1", "b1", "w2", "b2"))
            torch.testing.assert_close(found[0], gelu(w1 @ torch.ones(16) + b1) @ w2.T + b2)  # one dense MLP
        torch.testing.assert_close(alone(x)[task.name], full[task.name], rtol=1e-4, atol=1e-5)


def test_routes_outlive_another_encoder_of_as_many_layers(tmp_path, folder):
    trained = first_stage(folder)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48
    )
    model = restart_from_routes(trained, config.to_dict())  # routes know tasks and layers, no width
    assert reached(model.eval()) == reached(trained) and model.backbone.config.hidden_size == 24


def test_mistakes(folder):
    trained = first_stage(folder)
    with pytest.raises(ValueError, match="model: got 'text_moe' with gate 'noisy_topk'; expected a text model"):
        restart_from_routes(create_model("text_moe", tasks=TASKS, encoder=str(folder)), folder)
    with pytest.raises(ValueError, match="model: got 'Linear' with gate None"):
        restart_from_routes(torch.nn.Linear(2, 2), folder)
    with pytest.raises(ValueError, match="has no gate 'task_level', so no routes to take"):
        copy_routes(create_model("text_moe", tasks=TASKS, encoder=str(folder)), trained.state_dict())
    args = {"encoder": str(folder), "gate": "task_level", "experts": 3, "k": 1, "gate_args": SECOND}
    for options, where in [
        ({"experts": 4}, "gate.router"),
        ({"every": 1}, "layer.0"),
        ({"blocks": [1]}, "layer.3"),
        ({"tasks": TASKS[:3]}, "gate.table.3"),
        ({"tasks": (*TASKS, Task.binary("more"))}, "gate.table.4"),
    ]:
        model = create_model("text_moe", **{"tasks": TASKS, **args, **options})
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=rf"trained: its routes do not fit the model in .*{where}"):
            copy_routes(model, trained.state_dict())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_both_recipes_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("train_script", Path(__file__).resolve().parents[1] / "train.py")
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    write_all(tmp_path / "texts")
    save_encoder(tmp_path / "mini")
    small = ["--data.root=texts", "--data.tokenizer=mini", "--model.args.encoder=mini", "--trainer.batch_size=4"]
    small += ["--trainer.device=cpu", "--trainer.progress=false", "--trainer.eval_every=0", "--trainer.steps=3"]
    small += ["--trainer.precision=fp32"]
    assert train.main(["text_task_level_nlu", "--trainer.out=first", *small]) == 0, capsys.readouterr().err
    start = "--model.start=first/checkpoints/step_00000003"
    assert train.main(["text_task_level_stage2_nlu", "--trainer.out=second", start, *small]) == 0
    assert "starts from the 3 steps of first" in capsys.readouterr().out
    first, second = moe_mtl.load("first"), moe_mtl.load("second")
    for a, b in zip(first.moe_layers.values(), second.moe_layers.values(), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.gate.parameters(), b.gate.parameters(), strict=True))
        assert b.gate.temperature.item() == pytest.approx(300 * 300 ** (-2 / 3))
    assert train.main(["text_task_level_stage2_nlu", "--trainer.out=third", *small]) == 1  # never along no routes
    assert "model.start: runs/text_task_level_nlu/checkpoints/" in capsys.readouterr().err
