"""Each gate's formula on numbers worked out by hand, and the noise of the sparse gates."""

import math

import pytest
import torch

from moe_mtl.gates import GATES, create_gate
from moe_mtl.gates._topk import TopKGate
from moe_mtl.regularizers import total

every_topk_gate = pytest.mark.parametrize("name", sorted(n for n, gate in GATES.items() if issubclass(gate, TopKGate)))
LOG = math.log
ONE = torch.ones(1, 1)


def fill(parameter: torch.Tensor, values) -> None:
    with torch.no_grad():
        parameter.copy_(torch.as_tensor(values, dtype=parameter.dtype).reshape(parameter.shape))


def close(actual: torch.Tensor, expected, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), atol=atol, rtol=0)


def test_softmax_gate_by_hand():
    # x = 1, W = (0, 0, log 5), c = (0, log 2, 0): scores log(1, 2, 5), so weights (1, 2, 5) / 8.
    gate = create_gate("softmax", 1, 3, 2)
    fill(gate.router.weight[1], [0, 0, LOG(5)])
    fill(gate.router.bias[1], [0, LOG(2), 0])
    routing = gate(ONE, 1)
    close(routing.weights, [[0.125, 0.25, 0.625]])
    close(routing.logits, [[0.0, LOG(2), LOG(5)]])
    assert routing.indices is None
    assert not create_gate("softmax", 1, 3, 2).router.bias[0].any()


@pytest.mark.parametrize("name", ["noisy_topk", "task_blind"])
def test_topk_by_hand(name):
    # x = 1, W = log(1, 2, 5): softmax (1, 2, 5) / 8; the two largest are 5/8 and 2/8, which sum to 7/8.
    def gate(normalize):
        built = create_gate(name, 1, 3, 2, 2, normalize=normalize).eval()
        weight = built.weight if name == "task_blind" else built.router.weight[1]
        fill(weight, [0, LOG(2), LOG(5)])
        return built, weight

    built, weight = gate("none")
    routing = built(ONE, 1)
    assert routing.indices.tolist() == [[2, 1]]
    close(routing.weights, [[5 / 8, 2 / 8]])
    # d p_2 / d l_j = p_2 (delta_2j - p_j) = 5/8 (-1/8, -2/8, 3/8), and x = 1 makes it the gradient of W.
    routing.weights.backward(torch.tensor([[1.0, 0.0]]))
    close(weight.grad, [[-5 / 64], [-10 / 64], [15 / 64]])

    built, weight = gate("detached")
    routing = built(ONE, 1)
    close(routing.weights, [[5 / 7, 2 / 7]])
    # The sum 7/8 is a constant to the gradient: the same numbers divided by 7/8.
    routing.weights.backward(torch.tensor([[1.0, 0.0]]))
    close(weight.grad, [[-5 / 56], [-10 / 56], [15 / 56]])


def test_task_embedding_by_hand():
    # a = 0, V = 1, b = 0. u_0 = (0, 1): gelu gives (0, g), whose LayerNorm is (-1, 1) whatever g, up to its epsilon.
    # u_1 = (1, 0) gives (1, -1). With W_x = (0, log 2, 0) and W_s rows (0, c_e), c = (0, 0, log 5), x = 1:
    # task 0 scores log(1, 2, 5), task 1 log(1, 2, 1/5), whose softmax is (1, 2, 0.2) / 3.2.
    gate = create_gate("task_embedding", 1, 3, 2, 1, embedding_dim=2).eval()
    fill(gate.table[0], [0, 1])
    fill(gate.table[1], [1, 0])
    fill(gate.table_bias, [0, 0])
    fill(gate.project.weight, [[1, 0], [0, 1]])
    fill(gate.project.bias, [0, 0])
    fill(gate.weight, [[0, 0, 0], [LOG(2), 0, 0], [0, 0, LOG(5)]])
    close(gate.embed((0, 1)), [[-1.0, 1.0], [1.0, -1.0]], atol=1e-4)
    routing = gate(torch.ones(2, 1), (0, 1))
    assert routing.indices.tolist() == [[2], [1]]
    close(routing.weights, [[5 / 8], [2 / 3.2]], atol=1e-4)


def test_task_embedding_is_an_mlp_over_the_one_hot_beside_each_token():
    torch.manual_seed(0)
    gate, x = create_gate("task_embedding", 6, 5, 4, 2, embedding_dim=3).eval(), torch.randn(4, 6)
    first = torch.nn.Linear(4, 3)
    fill(first.weight, torch.stack(tuple(gate.table), dim=1))
    fill(first.bias, gate.table_bias.detach())
    mlp = torch.nn.Sequential(first, torch.nn.GELU(), gate.project, gate.norm)
    vector = mlp(torch.eye(4)[2])
    expected = torch.cat([x, vector.expand(4, 3)], dim=1) @ gate.weight.T
    torch.testing.assert_close(gate(x, 2).logits, expected)


def task_bias():
    """Scores of x = 1 from W = (0, log 2, 0): task 0 adds nothing, task 1 (0, 0, log 5)."""
    gate = create_gate("task_bias", 1, 3, 2, 1, noise_std=0.0)
    fill(gate.weight, [0, LOG(2), 0])
    fill(gate.bias[1], [0, 0, LOG(5)])
    return gate


def test_task_bias_by_hand():
    # Task 0: log(1, 2, 1), softmax (1, 2, 1) / 4; task 1: log(1, 2, 5), softmax (1, 2, 5) / 8.
    gate = task_bias()
    for routing in (gate(torch.ones(2, 1), (0, 1)), gate.each(ONE, (0, 1))):
        assert routing.indices.tolist() == [[1], [2]]
        close(routing.weights, [[2 / 4], [5 / 8]])
        close(routing.logits, [[0.0, LOG(2), 0.0], [0.0, LOG(2), LOG(5)]])
    # d p_2 / d l_j = p_2 (delta_2j - p_j) = 5/8 (-1/8, -2/8, 3/8) in task 1: the gradient of its bias, and x = 1 that
    # of W; task 0 has another expert and its own.
    gate(torch.ones(2, 1), (0, 1)).weights.backward(torch.tensor([[0.0], [1.0]]))
    close(gate.bias[1].grad, [-5 / 64, -10 / 64, 15 / 64])
    close(gate.weight.grad, [[-5 / 64], [-10 / 64], [15 / 64]])
    close(gate.bias[0].grad, [0.0, 0.0, 0.0])
    assert not any(bias.any() for bias in create_gate("task_bias", 1, 3, 2, 1).bias)


def test_balance_of_task_bias_over_all_tokens_and_inside_each_task_by_hand():
    # Two tokens x = 1 per task. Inside task 0: f = (0, 1, 0), P = (1, 2, 1) / 4, 3 f P = 3/2; inside task 1:
    # f = (0, 0, 1), P = (1, 2, 5) / 8, 3 f P = 15/8; their mean is 27/16. Over all tokens f = (0, 1, 1) / 2 and
    # P = (3, 6, 7) / 16: 3 (6 + 7) / 32 = 39/32, so specialised tasks are punished less.
    routings = {"layer": task_bias()(torch.ones(4, 1), (0, 1))}
    inside, parts = total(routings, {"switch_balance": 2.0}, {"switch_balance": {"per_task": True}})
    close(inside, 2 * 27 / 16)
    close(parts["switch_balance"], 27 / 16)
    close(total(routings, {"switch_balance": 1.0})[0], 39 / 32)


def test_training_one_task_leaves_the_biases_of_others_bit_equal():
    torch.manual_seed(0)
    gate = create_gate("task_bias", 4, 3, 3, 2)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=0.1, weight_decay=0.1)
    for step, task in enumerate([(0, 1, 2), (1,)]):  # the first step fills the momentum of every bias
        before = [bias.detach().clone() for bias in gate.bias]
        optimizer.zero_grad()
        gate(torch.randn(6, 4), task).weights.square().sum().backward()
        optimizer.step()
        changed = [not torch.equal(a, b) for a, b in zip(before, gate.bias, strict=True)]
        assert changed == ([True] * 3 if step == 0 else [False, True, False])


def test_assigned_by_hand():
    # Task 1 has experts 3 and 0 with learned numbers (0, log 3): softmax (1, 3) / 4. Task 0 has not learned: halves.
    gate = create_gate("assigned", 1, 4, 2, 2, assignment=[[1, 2], [3, 0]])
    fill(gate.weight[1], [0, LOG(3)])
    routing = gate(torch.tensor([[5.0], [-7.0]]), (0, 1))
    assert routing.indices.tolist() == [[1, 2], [3, 0]]
    close(routing.weights, [[0.5, 0.5], [0.25, 0.75]])
    close(routing.logits, [[-1e4, 0.0, 0.0, -1e4], [LOG(3), -1e4, -1e4, 0.0]])
    close(routing.probs(), [[0.0, 0.5, 0.5, 0.0], [0.75, 0.0, 0.0, 0.25]])
    # d w_0 / d l = w_0 (1 - w_0, -w_1) = (3/16, -3/16) for task 1.
    routing.weights.backward(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    close(gate.weight[1].grad, [3 / 16, -3 / 16])
    assert (gate.reachable(0), gate.reachable(1)) == ((1, 2), (0, 3))


@pytest.mark.parametrize(
    "experts, tasks, k, groups",
    [
        (16, 8, 4, [0, 0, 4, 4, 8, 8, 12, 12]),  # neighbours share
        (16, 3, 4, [0, 4, 8]),  # fewer tasks than groups
        (7, 5, 2, [0, 0, 2, 2, 4]),  # an expert is left over
        (3, 2, 3, [0, 0]),
        (1, 2, 1, [0, 0]),
    ],
)
def test_tasks_are_dealt_over_groups_of_experts(experts, tasks, k, groups):
    gate = create_gate("assigned", 4, experts, tasks, k)
    assert [gate.reachable(task) for task in range(tasks)] == [tuple(range(start, start + k)) for start in groups]


def test_an_assignment_survives_saving_and_the_choice_of_tasks():
    table = [[1, 2], [3, 0], [4, 2]]
    gate = create_gate("assigned", 1, 5, 3, 2, assignment=table)
    assert gate.task_options() == {"assignment": table}
    some = gate.for_tasks((2, 0))
    assert some.task_options() == {"assignment": [[4, 2], [1, 2]]}
    again = create_gate("assigned", 1, 5, 2, 2, **some.task_options())
    assert torch.equal(again(ONE, 0).indices, gate(ONE, 2).indices)
    other = create_gate("assigned", 1, 5, 3, 2)
    other.load_state_dict(gate.state_dict())
    assert other.task_options() == {"assignment": table}


@pytest.mark.parametrize(
    "table, message",
    [
        ([[0, 1]], "got 1 rows, expected one for each of the 2 tasks"),
        ([[0, 1], [2]], r"got \[2\] for task 1, expected k=2 different ids from 0 to 2"),
        ([[0, 1], [2, 2]], r"got \[2, 2\] for task 1"),
        ([[0, 3], [1, 2]], r"got \[0, 3\] for task 0"),
        ([[0, -1], [1, 2]], r"got \[0, -1\] for task 0"),
    ],
)
def test_impossible_assignments_are_refused(table, message):
    with pytest.raises(ValueError, match=f"^assignment: {message}"):
        create_gate("assigned", 1, 3, 2, 2, assignment=table)


@every_topk_gate
def test_noise_has_the_stated_scale_and_decides_the_choice(name):
    experts, noise_std, m = 5, 2.0, 4000
    torch.manual_seed(8)
    gate = create_gate(name, 6, experts, 4, 2, noise_std=noise_std).train()
    routing = gate(torch.randn(m, 6), 0)
    noise = (routing.noisy_logits - routing.logits).flatten()
    sigma = noise_std / experts
    # Standard errors of a mean and of a standard deviation over n normal draws: sigma / sqrt(n), sigma / sqrt(2 n).
    assert abs(noise.mean()) < 4 * sigma / math.sqrt(noise.numel())
    assert abs(noise.std() - sigma) < 4 * sigma / math.sqrt(2 * noise.numel())
    assert routing.noise_std.item() == pytest.approx(sigma)
    probs = routing.noisy_logits.softmax(-1)
    assert torch.equal(routing.indices, probs.topk(2).indices)
    torch.testing.assert_close(routing.weights, probs.topk(2).values)
    assert not torch.equal(routing.indices, routing.probs().topk(2).indices)


@every_topk_gate
def test_no_noise_in_eval_or_at_zero(name):
    torch.manual_seed(9)
    x, noisy = torch.randn(5, 6), create_gate(name, 6, 5, 4, 2, noise_std=3.0).eval()
    quiet = create_gate(name, 6, 5, 4, 2, noise_std=0.0).train()
    quiet.load_state_dict(noisy.state_dict())
    for gate in (quiet, noisy):
        assert gate(x, 1).noisy_logits is None
        assert gate(x, 1).noise_std is None
    assert torch.equal(quiet(x, 1).dense_weights(), noisy(x, 1).dense_weights())
    noisy.train()
    assert not torch.equal(noisy(x, 1).noisy_logits, noisy(x, 1).noisy_logits)


def test_softmax_gate_with_an_mlp_by_hand():
    # x = 1, hidden layer W = (2, -1), b = (-1, 0): relu(1, -1) = (1, 0); scores log 3 * 1 and 0: weights (3, 1) / 4
    gate = create_gate("softmax", 1, 2, 2, hidden=[2])
    (layer,) = gate.layers
    fill(layer.weight[1], [2, -1])
    fill(layer.bias[1], [-1, 0])
    fill(gate.router.weight[1], [[LOG(3), 7], [0, 5]])
    close(gate(ONE, 1).weights, [[0.75, 0.25]])


def test_dropout_of_the_softmax_gate_by_hand():
    gate = create_gate("softmax", 1, 3, 1, dropout=0.5)
    weights = torch.tensor([[0.125, 0.25, 0.625], [0.125, 0.25, 0.625]])
    # the first row loses its second expert: (1, 5) / 6 are left; the second loses all and keeps all
    kept = torch.tensor([[True, False, True], [False, False, False]])
    close(gate.drop(weights, kept), [[1 / 6, 0, 5 / 6], [0.125, 0.25, 0.625]])


def test_dropout_drops_that_share_in_training_alone():
    gate = create_gate("softmax", 1, 4, 1, dropout=0.25)
    torch.manual_seed(0)
    x = torch.ones(20_000, 1)
    dropped = (gate.train()(x, 0).weights == 0).float().mean().item()
    # four weights are all dropped, and then all kept, in 0.25^4 = 0.4 % of the rows: 25 % less that
    assert dropped == pytest.approx(0.25 - 0.25**4, abs=0.01)
    assert (gate.eval()(x, 0).weights > 0).all()


def test_experts_a_task_can_see_by_hand():
    # scores log(1, 2, 5); task 1 sees experts 0 and 2 alone: weights (1, 0, 5) / 6
    gate = create_gate("softmax", 1, 3, 2, visible=[[0, 1, 2], [2, 0]])
    fill(gate.router.weight[1], [0, LOG(2), LOG(5)])
    routing = gate(ONE, 1)
    close(routing.weights, [[1 / 6, 0, 5 / 6]])
    assert routing.weights[0, 1] == 0 and routing.logits[0, 1] == -1e4
    assert gate.reachable(1) == (0, 2) and gate.reachable(0) == (0, 1, 2)


@pytest.mark.parametrize("kind", ["exclusivity", "exclusion"])
def test_exclusive_gate_deals_experts(kind):
    # half of eight experts are dealt over two tasks, two each: exclusively, a task sees its 2 and the 4 open ones and
    # none of the other's; by exclusion, all but its own 2. Either way 4 are open to both and each sees 6
    gate = create_gate("exclusive", 1, 8, 2, alpha=0.5, kind=kind, seed=3)
    seen = [set(gate.reachable(task)) for task in range(2)]
    assert [len(ids) for ids in seen] == [6, 6] and len(seen[0] & seen[1]) == 4
    weights = gate(ONE, 0).weights[0]
    assert set(weights.nonzero().flatten().tolist()) == seen[0] and weights.sum().item() == pytest.approx(1)


def test_sigmoid_by_hand():
    # scores log(1, 3): sigma = 1/2 and 3/4, whatever the other; with a log of -log 3 it is 1/4
    gate = create_gate("sigmoid", 1, 2, 2)
    fill(gate.router.weight[1], [0, LOG(3)])
    close(gate(ONE, 1).weights, [[0.5, 0.75]])
    close(gate(-ONE, 1).weights, [[0.5, 0.25]])


def test_expert_choice_by_hand():
    # two experts, k = 1, three tokens of a task: each expert takes ceil(3 * 1 / 2) = 2. With scores (s, 0) an expert
    # has probability e^s / (1 + e^s) and 1 less that: token s = log 3 has 3/4, log 1 has 1/2, -log 3 has 1/4.
    gate = create_gate("expert_choice", 1, 2, 2, 1)
    fill(gate.router.weight[1], [LOG(3), 0])
    x = torch.tensor([[1.0], [0.0], [-1.0]])
    # expert 0 takes tokens 0 and 1 (3/4, 1/2), expert 1 tokens 2 and 1 (3/4, 1/2)
    close(gate.train()(x, 1).weights, [[0.75, 0], [0.5, 0.5], [0, 0.75]])
    # a token chooses for itself: its better expert, the first of equal ones
    routing = gate.eval()(x, 1)
    assert routing.indices.tolist() == [[0], [0], [1]]
    close(routing.weights, [[0.75], [0.5], [0.75]])


def test_expert_choice_leaves_tokens_out_and_counts_tasks_and_padding_apart():
    gate = create_gate("expert_choice", 1, 2, 2, 1).train()
    for task in range(2):
        fill(gate.router.weight[task], [LOG(3), 0])
    # four tokens, capacity 2: all prefer expert 0, which takes the two best; expert 1 takes the two it likes best, the
    # other two. p_0 = 3^x / (1 + 3^x)
    x = torch.tensor([[3.0], [1.0], [2.0], [4.0]])
    used = gate(x, 0).weights > 0
    assert used.tolist() == [[True, False], [False, True], [False, True], [True, False]]
    # by task: tokens 0 and 1 are of task 0 and 2 and 3 of task 1; capacity ceil(2 / 2) = 1 in each
    expected = [[True, False], [False, True], [False, True], [True, False]]
    assert (gate(x, (0, 1)).weights > 0).tolist() == expected
    assert (gate(x, torch.tensor([0, 0, 1, 1])).weights > 0).tolist() == expected
    # the last token is padding: three are left, capacity 2, and it takes no place
    valid = torch.tensor([True, True, True, False])
    used = gate(x, 0, valid).weights > 0
    assert used.tolist() == [[True, False], [False, True], [True, True], [False, False]]
