"""DSelect-k: its formulas on numbers worked out by hand, its regularizers, and what becomes exactly sparse."""

import math

import pytest
import torch

from moe_mtl.gates import create_gate
from moe_mtl.gates.dselect_k import smooth_step
from moe_mtl.regularizers import dselect_entropy, dselect_leakage

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def fill(parameter, values):
    with torch.no_grad():
        parameter.copy_(torch.as_tensor(values, dtype=parameter.dtype).reshape(parameter.shape))


def static(experts, z, alpha=None, gamma=1.0, tasks=1):
    """A static gate whose task 0 has these selectors, one row each."""
    gate = create_gate("dselect_k", 4, experts, tasks, len(z), gamma=gamma)
    fill(gate.z[0], z)
    if alpha is not None:
        fill(gate.alpha[0], alpha)
    return gate


def test_smooth_step_by_hand():
    # gamma = 2: S(t) = -t^3 / 4 + 3 t / 4 + 1/2 on [-1, 1]. S(1/2) = -1/32 + 3/8 + 1/2 = 27/32; S'(0) = 3 / (2 gamma).
    t = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    s = smooth_step(t, 2.0)
    torch.testing.assert_close(s.detach(), torch.tensor([0, 0, 0.5, 27 / 32, 1, 1], dtype=torch.float64))
    s.sum().backward()
    torch.testing.assert_close(t.grad, torch.tensor([0, 0, 0.75, 9 / 16, 0, 0], dtype=torch.float64))


def test_weights_by_hand():
    # gamma = 2, four experts, codes (bit 0, bit 1): 0 = 00, 1 = 10, 2 = 01, 3 = 11. Selector 1, z = (1/2, 0): S =
    # (27/32, 1/2), so r = (5, 27, 5, 27) / 64. Selector 2, z = (-1, 1): S = (0, 1), so r = expert 2 alone.
    # softmax(log 3, 0) = (3/4, 1/4): q = 3/4 r1 + 1/4 r2 = (15, 81, 15 + 64, 81) / 256.
    gate = static(4, [[0.5, 0.0], [-1.0, 1.0]], [math.log(3), 0.0], gamma=2.0)
    routing = gate(X, 0)
    torch.testing.assert_close(routing.weights, torch.tensor([[15, 81, 79, 81]]).expand(6, 4) / 256)
    torch.testing.assert_close(routing.logits, routing.weights.log())
    r1 = torch.tensor([5, 27, 5, 27]) / 64
    torch.testing.assert_close(routing.selectors, torch.stack([r1, torch.tensor([0.0, 0, 1, 0])])[None])
    # Entropy: of r1, with the 1e-6 of the definition; of r2, -ln(1 + 1e-6), about 0.
    expected = (-(r1 * (r1 + 1e-6).log()).sum() - math.log(1 + 1e-6)) / 2
    assert dselect_entropy(routing).item() == pytest.approx(expected.item(), abs=1e-6)
    assert dselect_leakage(routing).item() == pytest.approx(1.0)


def test_three_experts_leak_weight():
    # z = 0: S = 1/2, each of the four codes has 1/4, the code 11 has no expert: 3/4 is left, leakage 4/3.
    routing = static(3, [[0.0, 0.0]])(X, 0)
    torch.testing.assert_close(routing.weights, torch.full((6, 3), 0.25))
    assert dselect_leakage(routing).item() == pytest.approx(4 / 3)
    # all weight at the missing code: nothing is left
    assert dselect_leakage(static(3, [[9.0, 9.0]])(X, 0)).item() == math.inf


def test_leakage_pulls_the_selectors_back():
    gate = static(3, [[0.3, 0.3]])
    dselect_leakage(gate(X, 0)).backward()
    assert (gate.z[0].grad > 0).all()  # descent lowers both bits, away from the code 11


def test_selectors_at_the_ends_are_frozen_and_reach_one_expert_each():
    gate = static(8, [[9.0, -9, 9], [9, -9, 9]], [0.2, -0.1])
    routing = gate(X, 0)
    assert routing.weights[0].tolist() == pytest.approx([0, 0, 0, 0, 0, 1, 0, 0])  # both chose expert 101 = 5
    assert gate.reachable(0) == (5,)
    assert (routing.logits[0, :5] == -1e4).all()
    routing.weights.sum().backward()
    assert not gate.z[0].grad.any()


def test_per_example_weights_depend_on_the_token_by_hand():
    # x = (1, 0, 0, 0): z = column 0 of W plus b. One selector of one bit: z = 0.5 - 0.25, gamma = 1:
    # S(1/4) = -2/64 + 3/8 + 1/2 = 27/32.
    gate = create_gate("dselect_k", 4, 2, 1, 1, per_example=True)
    fill(gate.z.weight[0], [0.5, 0, 0, 0])
    fill(gate.z.bias[0], [-0.25])
    weights = gate(torch.eye(4)[:2], 0).weights
    # the second token sees the bias alone: S(-1/4) = 5/32
    torch.testing.assert_close(weights, torch.tensor([[5.0, 27.0], [27.0, 5.0]]) / 32)
    assert gate.reachable(0) is None
    assert gate.compute_class == "dense"


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("experts, k", [(1, 1), (2, 1), (5, 2), (8, 3), (6, 6)])
def test_each_is_forward_on_repeated_tokens(per_example, experts, k):
    gate = create_gate("dselect_k", 4, experts, 3, k, per_example=per_example).double()
    x = X.double()
    one, other = gate.each(x, (2, 0)), gate(x.repeat(2, 1), (2, 0))
    torch.testing.assert_close(one.weights, other.weights, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-13, atol=1e-13)
    assert one.selectors.shape == ((12 if per_example else 2), k, experts)
    rows = gate(x.repeat(2, 1), torch.tensor([2] * 6 + [0] * 6))
    torch.testing.assert_close(rows.weights, other.weights, rtol=1e-13, atol=1e-13)


def test_one_expert_needs_no_parameters():
    gate = create_gate("dselect_k", 4, 1, 2, 1)
    assert list(gate.parameters()) == []
    assert gate(X, 1).weights.tolist() == [[1.0]] * 6
    assert gate.reachable(0) == (0,)


def test_it_starts_near_the_middle():
    torch.manual_seed(0)
    gate = create_gate("dselect_k", 4, 8, 2, 3, gamma=10.0)
    assert 0 < max(z.abs().max() for z in gate.z) <= 0.1
    assert 0 < max(a.abs().max() for a in gate.alpha) <= 0.05
    torch.testing.assert_close(gate(X, 0).weights, torch.full((6, 8), 1 / 8), atol=0.01, rtol=0)


def test_regularizers_leave_padding_out():
    gate = create_gate("dselect_k", 4, 5, 1, 2, per_example=True)
    fill(gate.z.weight[0], 0.3 * torch.randn(gate.z.weight[0].shape))
    valid = torch.tensor([True, False, True, True, False, True])
    for value in (dselect_entropy, dselect_leakage):
        torch.testing.assert_close(value(gate(X, 0, valid)), value(gate(X[valid], 0)))
        assert value(gate(X, 0, torch.zeros(6, dtype=torch.bool))) == 0


def test_other_gates_have_no_selectors():
    routing = create_gate("softmax", 4, 5, 1)(X, 0)
    assert dselect_entropy(routing) == dselect_leakage(routing) == 0


def test_entropy_drives_each_selector_to_one_expert():
    torch.manual_seed(1)
    gate = create_gate("dselect_k", 4, 8, 1, 2)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        dselect_entropy(gate(X, 0)).backward()
        optimizer.step()
    selectors = gate(X, 0).selectors
    assert ((selectors == 0) | (selectors == 1)).all()
    assert len(gate.reachable(0)) <= 2


def test_bad_gamma_is_refused():
    with pytest.raises(ValueError, match=r"^gamma: got 0"):
        create_gate("dselect_k", 4, 8, 1, 2, gamma=0)
