"""Task-level gate: numbers by hand, its samples, its temperature, and what is left of it for one task."""

import math

import pytest
import torch

from moe_mtl import create_model, extract
from moe_mtl.gates import create_gate
from moe_mtl.tasks import Task

X = torch.ones(4, 1)


def numbers(*rows, k=1, **options):
    """A gate without embeddings, whose scores are these rows."""
    gate = create_gate("task_level", 1, len(rows[0]), len(rows), k, embedding_dim=None, **options)
    with torch.no_grad():
        for parameter, row in zip(gate.table, rows, strict=True):
            parameter.copy_(torch.tensor(row))
    return gate


def test_weights_by_hand():
    # scores (0, log 4, log 16) at temperature 2: exponentials (1, 2, 4), so weights (1, 2, 4) / 7
    gate = numbers([0.0, math.log(4), math.log(16)], selection="softmax", start=2.0, k=2).train()
    routing = gate(X, 0)
    torch.testing.assert_close(routing.weights, torch.tensor([[1 / 7, 2 / 7, 4 / 7]]).repeat(4, 1))
    assert routing.indices is None
    # in evaluation the two largest, over their sum
    routing = gate.eval()(X, 0)
    assert routing.indices.tolist() == [[2, 1]] * 4
    torch.testing.assert_close(routing.weights, torch.tensor([[4 / 6, 2 / 6]]).repeat(4, 1))
    assert gate.reachable(0) == (1, 2) and gate.train().reachable(0) is None


def test_router_on_an_embedding_by_hand():
    # u = 1, W_1 = 1, b_1 = 0: gelu(1) = Phi(1) = 0.841345; W_2 = (1, -1), b_2 = (0, 1): scores 0.841345 and 0.158655
    gate = create_gate("task_level", 1, 2, 1, 1, embedding_dim=1, start=1.0)
    with torch.no_grad():
        gate.table[0].fill_(1.0)
        gate.hidden.weight.fill_(1.0)
        gate.hidden.bias.zero_()
        gate.router.copy_(torch.tensor([[1.0], [-1.0]]))
        gate.router_bias.copy_(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(
        gate.train()(X, 0).logits, torch.tensor([[0.841345, 0.158655]]).repeat(4, 1), atol=1e-5, rtol=0
    )


def test_temperature_falls_by_a_constant_factor():
    gate = numbers([0.0, 1.0], start=2.0, end=0.5)
    assert gate.temperature.item() == 2.0
    gate.anneal(0.5)  # half way between 2 and 1/2 on a log scale
    assert gate.temperature.item() == pytest.approx(1.0)
    gate.anneal(1.0)
    assert gate.temperature.item() == 0.5
    torch.testing.assert_close(gate.train()(X, 0).logits[0], torch.tensor([0.0, 2.0]))
    other = numbers([0.0, 1.0])
    other.load_state_dict(gate.state_dict())
    assert other.temperature.item() == 0.5


@pytest.mark.parametrize("selection", ["gumbel", "straight_through"])
def test_samples_follow_the_softmax(selection):
    # the arg-max of z + g is expert i with probability softmax(z)_i (Gumbel-max), here 1/8, 2/8 and 5/8
    gate = numbers([0.0, math.log(2), math.log(5)], selection=selection, start=1.0).train()
    torch.manual_seed(0)
    drawn = torch.stack([gate(X[:1], 0).weights[0].argmax() for _ in range(4000)]).bincount(minlength=3) / 4000
    # the standard error is at most sqrt(1/4 / 4000) = 0.008
    torch.testing.assert_close(drawn, torch.tensor([0.125, 0.25, 0.625]), atol=0.03, rtol=0)


def test_one_draw_per_task_and_call():
    gate = numbers([0.0, 0.1, 0.2], [0.3, 0.1, 0.0], selection="gumbel").train()
    torch.manual_seed(0)
    first, second = gate(X, (0, 1)).weights, gate(X, (0, 1)).weights
    assert torch.equal(first[0], first[1]) and torch.equal(first[2], first[3])
    assert not torch.allclose(first, second)
    rows = gate(X, torch.tensor([0, 1, 0, 1])).weights
    assert torch.equal(rows[0], rows[2]) and torch.equal(rows[1], rows[3])


def test_straight_through_is_one_hot_with_the_gradient_of_the_sample():
    gate = numbers([0.0, 0.4, 0.2], start=1.0).train()
    torch.manual_seed(0)
    routing = gate(X[:1], 0)
    weights = routing.weights[0]
    assert sorted(weights.tolist()) == [0.0, 0.0, 1.0]
    cotangent = torch.tensor([1.0, 0.0, -2.0])
    weights.backward(cotangent)
    # d softmax(y)_i / d y_j = p_i (delta_ij - p_j), so the gradient of the scores is p * (c - <p, c>)
    p = routing.noisy_logits[0].detach().softmax(dim=-1)
    torch.testing.assert_close(gate.table[0].grad, p * (cotangent - (p * cotangent).sum()))


def test_no_draw_in_evaluation():
    gate = numbers([0.0, 0.4, 0.2]).eval()
    routing = gate(X, 0)
    assert routing.noisy_logits is None and routing.indices.tolist() == [[1]] * 4
    assert routing.weights.tolist() == [[1.0]] * 4


@pytest.mark.parametrize("options, message", [
    ({"selection": "gumble"}, "selection: unknown 'gumble'; did you mean 'gumbel'"),
    ({"start": 0.0}, "start: got 0.0, expected above 0"),
    ({"end": -1.0}, "end: got -1.0, expected above 0"),
    ({"embedding_dim": 0}, "embedding_dim: got 0"),
])  # fmt: skip
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create_gate("task_level", 4, 3, 2, 1, **options)


def test_an_extracted_task_has_its_expert_alone():
    torch.manual_seed(0)
    tasks = [Task.classification("a", 3), Task.regression("b")]
    args = {"image_size": 16, "patch_size": 8, "dim": 16, "depth": 2, "num_heads": 2, "experts": 4, "head_width": 4}
    model = create_model("m3vit_micro", tasks=tasks, gate="task_level", k=1, **args).eval()
    x = torch.rand(3, 3, 16, 16)
    alone = extract(model, "a")
    assert all(len(layer.kept_experts) == 1 for layer in alone.moe_layers.values())
    torch.testing.assert_close(alone(x)["a"], model(x, tasks=["a"])["a"])
    torch.testing.assert_close(alone(x)["a"], model(x)["a"])
