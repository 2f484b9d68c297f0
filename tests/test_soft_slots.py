"""Soft slots: dispatch and combine by hand, samples apart, padding, and the layer inside a model."""

import math

import pytest
import torch

from moe_mtl import create_model, extract
from moe_mtl.experts import ExpertBank
from moe_mtl.gates import create_gate
from moe_mtl.layers import MoE
from moe_mtl.tasks import Task

LOG2, LOG3 = math.log(2), math.log(3)


def by_hand():
    """Two experts of one slot on tokens of width 2; the slots look along the axes, scaled by log 2 and by log 3."""
    gate = create_gate("soft_slots", 2, 2, 2)
    with torch.no_grad():
        for slot, scale in zip(gate.slot, (LOG2, LOG3), strict=True):
            slot.copy_(torch.tensor([[5.0, 0.0], [0.0, 0.1]]))  # lengths do not matter
            gate.scale[0 if scale == LOG2 else 1].fill_(scale)
    return gate


def test_dispatch_and_combine_by_hand():
    # tokens (7, 0) and (0, 2): unit vectors along the axes, so scores log 3 where they match and 0 elsewhere.
    # dispatch, over tokens: (3, 1) / 4 for slot 0, (1, 3) / 4 for slot 1; combine, over slots: the same by symmetry
    dispatch, combine, routing = by_hand().slots(torch.tensor([[7.0, 0.0], [0.0, 2.0]]), 1, None, 2)
    torch.testing.assert_close(dispatch, torch.tensor([[[0.75, 0.25], [0.25, 0.75]]]))
    torch.testing.assert_close(combine, torch.tensor([[[0.75, 0.25], [0.25, 0.75]]]))
    torch.testing.assert_close(routing.weights, combine[0])
    torch.testing.assert_close(routing.logits.softmax(-1), combine[0])
    # task 0 has the scale log 2: 2/3 and 1/3
    assert by_hand().slots(torch.eye(2), 0, None, 2)[0][0, 0].tolist() == pytest.approx([2 / 3, 1 / 3])


def test_padding_is_not_read():
    # the second token is padding: slots read the first alone
    valid = torch.tensor([True, False])
    dispatch, combine, _ = by_hand().slots(torch.tensor([[7.0, 0.0], [torch.nan, 2.0]]), 1, valid, 2)
    assert dispatch[0].tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert combine[0, 1].tolist() == [0.0, 0.0]


def layer(experts=3, slots=2, tasks=2, dim=6, dtype=torch.float64):
    torch.manual_seed(0)
    moe = MoE(create_gate("soft_slots", dim, experts, tasks, slots=slots), ExpertBank(experts, dim, 5))
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return moe.to(dtype)


def truth(moe, x, task):
    """One sample [n, d] by loops over slots."""
    gate, bank = moe.gate, moe.experts
    slots = torch.nn.functional.normalize(gate.slot[task], dim=-1)
    scores = gate.scale[task] * torch.nn.functional.normalize(x, dim=-1) @ slots.T
    y = torch.zeros(len(x), bank.dim, dtype=x.dtype)
    for j in range(scores.shape[1]):
        read = (scores[:, j].softmax(0).unsqueeze(1) * x).sum(0)
        e = j // gate.slots_per_expert
        hidden = torch.nn.functional.gelu(bank.w1[e] @ read + bank.b1[e])
        y += scores.softmax(1)[:, j : j + 1] * (bank.w2[e] @ hidden + bank.b2[e])
    return y


def test_the_layer_is_the_loop():
    moe = layer()
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    expected = torch.cat([truth(moe, x[0], 0), truth(moe, x[1], 0), truth(moe, x[2], 1), truth(moe, x[3], 1)])
    for task in ((0, 1), torch.tensor([0, 0, 1, 1]).repeat_interleave(5)):
        y, routing = moe(x.flatten(0, 1), task, group=5)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        assert routing.weights.shape == (20, 3)


def test_a_sample_alone_is_what_it_is_in_a_batch():
    moe = layer()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    whole = moe(x.flatten(0, 1), 1, group=5)[0].unflatten(0, (3, 5))
    torch.testing.assert_close(moe(x[1], 1, group=5)[0], whole[1], rtol=1e-12, atol=1e-12)


def test_padding_changes_nothing_and_a_sample_of_padding_gives_zeros():
    moe = layer()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    short = moe(x[0, :3], 0, group=3)[0]
    x[0, 3:], x[1] = torch.nan, torch.nan
    valid = torch.tensor([True] * 3 + [False] * 7)
    y = moe(x.flatten(0, 1), 0, valid, group=5)[0]
    torch.testing.assert_close(y[:3], short, rtol=1e-12, atol=1e-12)
    assert y[3:].abs().max() == 0


def test_slots_of_dropped_experts_are_gone():
    moe = layer()
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        moe.experts.w2[1].zero_()
        moe.experts.b2[1].zero_()
    expected = moe(x, 0, group=5)[0]
    moe.keep_experts([0, 2])
    torch.testing.assert_close(moe(x, 0, group=5)[0], expected, rtol=1e-12, atol=1e-12)


def test_every_parameter_learns():
    moe = layer()
    y, _ = moe(torch.randn(10, 6, dtype=torch.float64), (0, 1), group=5)
    y.backward(torch.randn_like(y))
    assert [n for n, p in moe.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_samples_must_be_known():
    moe, x = layer(), torch.randn(10, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="group: this gate mixes the tokens of a sample"):
        moe(x, 0)
    with pytest.raises(ValueError, match="group: 10 tokens do not split into samples of 4"):
        moe(x, 0, group=4)
    columns = [{"name": "x", "kind": "vector", "size": 3}]
    with pytest.raises(ValueError, match="gate: SoftSlotsGate mixes the tokens of a sample"):
        create_model("mmoe_table", tasks=[Task.regression("a")], columns=columns, gate="soft_slots")


def test_in_a_vision_transformer():
    torch.manual_seed(0)
    tasks = [Task.classification("a", 3), Task.depth("b")]
    args = {"image_size": 32, "patch_size": 8, "dim": 16, "depth": 4, "num_heads": 2, "experts": 3, "head_width": 4}
    model = create_model("m3vit_micro", tasks=tasks, gate="soft_slots", gate_args={"slots": 2}, **args).eval()
    x = torch.rand(3, 3, 32, 32)
    full = model(x)
    for name in ("a", "b"):
        for other in (model(x, tasks=[name])[name], extract(model, name)(x)[name]):
            torch.testing.assert_close(other, full[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(x[1:2])[name], full[name][1:2], rtol=1e-4, atol=1e-5)
    ids = torch.tensor([1, 0, 1])
    rows, prediction = model(x, tasks=ids)["b"]
    assert rows.tolist() == [0, 2]
    torch.testing.assert_close(prediction, full["b"][[0, 2]], rtol=1e-4, atol=1e-5)
