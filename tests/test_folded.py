"""One task whose gates do not read the tokens: no gate is left, and its experts are one dense MLP."""

import copy

import pytest
import torch

from moe_mtl import create_model, extract, load, save
from moe_mtl.cost import count_flops
from moe_mtl.experts import ExpertBank
from moe_mtl.folded import FoldedMoE, fold, fold_layers
from moe_mtl.gates import create_gate
from moe_mtl.gates._constant import ConstantGate
from moe_mtl.layers import MoE
from moe_mtl.routing import Routing
from moe_mtl.tasks import Task
from moe_mtl.testing import assert_matches
from tests.test_encoders import encoder, texts
from tests.test_sparse import agree, images, tiny
from tests.test_table_models import make, rows

STATIC = ("assigned", "dselect_k", "task_level")
static = pytest.mark.parametrize("gate", STATIC)


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_one_mlp_is_the_weighted_sum_of_the_experts(glu, bias):
    torch.manual_seed(0)
    bank = ExpertBank(3, 5, 4, out_dim=6, activation="silu", glu=glu, bias=bias).double()
    weights, x = torch.tensor([0.5, 0.0, 2.0]).double(), torch.randn(7, 5).double()
    one = fold(bank, weights)
    assert one.w1.shape == (1, 12 * (1 + glu), 5) and one.w2.shape == (1, 6, 12)
    y = one(x, Routing(torch.ones(7, 1).double(), None, torch.zeros(7, 1), 0))
    expected = bank(x, Routing(weights.expand(7, -1), None, torch.zeros(7, 3), 0))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@static
def test_no_gate_is_left_and_the_task_computes_what_it_did(gate, tmp_path):
    model, x = tiny(gate), images()
    kept, small = extract(model, "tilt", fold=False), extract(model, "tilt")
    agree(small, model, x, ["tilt"])
    for name, layer in small.moe_layers.items():
        assert isinstance(layer, FoldedMoE) and not list(layer.gate.parameters())
        assert small.extraction.layers[name].folded and not kept.extraction.layers[name].folded
        assert small.extraction.layers[name].kept == kept.extraction.layers[name].kept
        assert layer.experts.w1.shape == (1, len(kept.moe_layers[name].kept_experts) * 16, 16)
    ours, theirs = (m(x, return_routing=True)[1] for m in (small, kept))
    for name, routing in ours.items():  # for pictures
        torch.testing.assert_close(routing.dense_weights(), theirs[name].dense_weights())
    # every product that is left is one of the dense model of this width
    assert count_flops(small, x) <= count_flops(kept, x)
    again = load(save(small, tmp_path / "folded"))
    assert again.config == small.config and again.config["folded"] == ["blocks.0", "blocks.1"]
    assert torch.equal(again(x)["tilt"], small(x)["tilt"])
    twice = extract(again, "tilt", [x], mass=0.5)
    assert torch.equal(twice(x)["tilt"], small(x)["tilt"])
    assert [layer.kept for layer in twice.extraction.layers.values()] == [
        layer.kept for layer in small.extraction.layers.values()
    ]


@static
def test_it_trains_and_takes_no_new_task(gate):
    small = extract(tiny(gate).train(), "tilt").train()
    small(images())["tilt"].square().mean().backward()
    assert [name for name, p in small.named_parameters() if p.grad is None or not p.grad.any()] == []
    before = {name: p.clone() for name, p in small.state_dict().items()}
    with pytest.raises(ValueError, match=r"^task: .*extract\(\.\.\., fold=False\)"):
        small.add_task(Task.regression("more"))
    assert small.state_dict().keys() == before.keys() and [t.name for t in small.tasks] == ["tilt"]
    kept = extract(tiny(gate), "tilt", fold=False)
    assert kept.add_task(Task.regression("more"))(images()).keys() == {"tilt", "more"}


def test_several_tasks_and_gates_that_read_tokens_stay():
    assert not extract(tiny("assigned"), ["tilt", "depth"]).config.get("folded")
    assert not extract(tiny("noisy_topk"), "tilt").config.get("folded")
    with pytest.raises(ValueError, match=r"^moe: got a AssignedGate of 4 tasks"):
        FoldedMoE(tiny("assigned").moe_layers["blocks.0"])
    with pytest.raises(ValueError, match=r"^moe: got a NoisyTopKGate of 1 tasks"):
        FoldedMoE(extract(tiny("noisy_topk"), "tilt").moe_layers["blocks.0"])
    with pytest.raises(ValueError, match=r"^ids: got \[2\], but experts \[2, 3\] are folded"):
        extract(tiny("assigned"), "tilt").moe_layers["blocks.0"].keep_experts([2])


def test_padding_gives_zeros_and_no_gradient():
    torch.manual_seed(0)
    moe = MoE(create_gate("assigned", 4, 3, 1, 2), ExpertBank(3, 4, 5))
    moe.keep_experts([0, 1])
    layer, x, valid = FoldedMoE(moe), torch.randn(6, 4), torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    x[2] = torch.nan
    y, _ = layer(x, 0, valid)
    assert (y[~valid] == 0).all()
    assert_matches(y[valid], copy.deepcopy(moe).double()(x[valid].double(), 0)[0], moe(x[valid], 0)[0], "y")
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("name", ["dselect_k_table"])
def test_the_mixture_of_a_table_model_is_constant(name, tmp_path):
    model, x = make(name), rows()
    small = extract(model, "time")
    assert not [n for n, _ in small.named_parameters() if ".gate." in n]
    assert isinstance(small.moe_layers["level.0"].gate, ConstantGate)
    torch.testing.assert_close(small(x)["time"], model(x, tasks=["time"])["time"])
    again = load(save(small, tmp_path))
    assert torch.equal(again(x)["time"], small(x)["time"])
    assert torch.equal(extract(again, "time")(x)["time"], small(x)["time"])
    assert fold_layers(again) == ["level.0"]


def test_private_sublayers_are_folded_and_wrapped_for_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    from moe_mtl.backbones.hf_model import to_transformers

    tasks, config = (Task.classification("intent", 3), Task.regression("score")), encoder("bert").config.to_dict()
    torch.manual_seed(0)
    for model in (
        create_model("text_sublayers", tasks=tasks, encoder=config).eval(),
        create_model("text_moe", tasks=tasks, encoder=config, gate="assigned", experts=4, k=2).eval(),
    ):
        small, x = extract(model, "intent"), texts()
        torch.testing.assert_close(small(x)["intent"], model(x)["intent"])
        again = load(save(small, tmp_path / model.config["name"]))
        torch.testing.assert_close(again(x)["intent"], small(x)["intent"])
        torch.testing.assert_close(extract(again, "intent")(x)["intent"], small(x)["intent"])
    to_transformers(small).save_pretrained(tmp_path / "hf")
    read = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(read(**x).logits, small(x)["intent"])
