"""Every regularizer on numbers worked out by hand, and what holds for all of them."""

import math
from dataclasses import replace

import pytest
import torch

from moe_mtl.gates import create_gate
from moe_mtl.regularizers import REGULARIZERS, importance, load, mutual_information, switch_balance, total, z_loss
from moe_mtl.routing import Routing

# those of a gate's scores; those of DSelect-k's selectors are tested in test_dselect_k.py
OF_SCORES = sorted(name for name in REGULARIZERS if not name.startswith("dselect"))
every_regularizer = pytest.mark.parametrize("name", OF_SCORES)
PER_TASK = sorted(set(OF_SCORES) - {"mutual_information"})  # which compares tasks, so has no value inside one
LOG2, LOG3 = math.log(2), math.log(3)


def two_tokens(task=(0, 1), **changes) -> Routing:
    """Router probabilities (3/4, 1/4) and (1/2, 1/2); the first token goes to expert 0, the second to expert 1."""
    fields = {
        "weights": torch.tensor([[0.75], [0.5]]),
        "indices": torch.tensor([[0], [1]]),
        "logits": torch.tensor([[LOG3, 0.0], [0.0, 0.0]]),
        "task": task,
    }
    return Routing(**fields | changes)


def random_routing(m=12, experts=5, k=2, seed=0, sigma=0.5, dtype=torch.float64, task=(0, 2), valid=None) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(m, experts, dtype=dtype, generator=generator)
    return choose(logits, sigma * torch.randn(m, experts, dtype=dtype, generator=generator), k, sigma, task, valid)


def choose(logits, noise, k, sigma, task=0, valid=None) -> Routing:
    noisy = logits + noise
    weights, indices = noisy.softmax(-1).topk(k, -1)
    return Routing(weights, indices, logits, task, valid, noisy, torch.tensor(sigma, dtype=logits.dtype))


def regularize(name, routing, per_task, **options):
    """The value of a regularizer, inside tasks where it has such a value."""
    return REGULARIZERS[name](routing, **options, **({"per_task": per_task} if name in PER_TASK else {}))


def approx(value, abs=1e-6):
    return pytest.approx(value, abs=abs)


def test_importance_by_hand():
    # Mean probabilities (5/8, 3/8): mean 1/2, population variance (1/8)^2, CV^2 = (1/64) / (1/4) = 1/16.
    assert importance(two_tokens()).item() == approx(1 / 16)
    # Inside the tasks: (3/4, 1/4) has CV^2 (1/16) / (1/4) = 1/4, (1/2, 1/2) has 0; their average is 1/8.
    assert importance(two_tokens(), per_task=True).item() == approx(1 / 8)


def test_importance_of_the_selected_weights_by_hand():
    # Weights over all experts (3/4, 0) and (0, 1/2): mean (3/8, 1/4), mean of that 5/16, deviation 1/16, CV^2 = 1/25.
    assert importance(two_tokens(), source="weights").item() == approx(1 / 25)
    # Inside the tasks each has all its mass on one of two experts: CV^2 = 1.
    assert importance(two_tokens(), source="weights", per_task=True).item() == approx(1.0)
    with pytest.raises(ValueError, match=r"^source: unknown 'weight'; did you mean 'weights'"):
        importance(two_tokens(), source="weight")


def test_z_loss_by_hand():
    # logsumexp of (log 3, 0) is log 4 = 2 log 2, of (0, 0) it is log 2: mean square (4 + 1) / 2 (log 2)^2.
    assert z_loss(two_tokens()).item() == approx(2.5 * LOG2**2)
    # Blocks of unequal size, tasks 0, 0 and 1: (4 + 1) / 2 inside task 0, 1 inside task 1; their average is 1.75.
    logits = torch.tensor([[LOG3, 0.0], [0.0, 0.0], [0.0, 0.0]])
    routing = Routing(torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64), logits, (0, 0, 1))
    assert z_loss(routing, per_task=True).item() == approx(1.75 * LOG2**2)
    assert z_loss(routing).item() == approx(2.0 * LOG2**2)


def test_z_loss_does_not_overflow():
    assert z_loss(two_tokens(logits=torch.tensor([[1000.0, 0.0], [1000.0, 0.0]]))).item() == approx(1e6)


def test_switch_balance_by_hand():
    # f = (1/2, 1/2), P = (5/8, 3/8): 2 (5/16 + 3/16) = 1.
    assert switch_balance(two_tokens()).item() == approx(1.0)
    # Both tokens to expert 0: f = (1, 0): 2 * 5/8.
    both = two_tokens(indices=torch.tensor([[0], [0]]))
    assert switch_balance(both).item() == approx(1.25)
    # Inside the tasks: 2 * 3/4 and 2 * 1/2, average 5/4; with each token at its own expert the same.
    assert switch_balance(both, per_task=True).item() == approx(1.25)
    assert switch_balance(two_tokens(), per_task=True).item() == approx((2 * 0.75 + 2 * 0.5) / 2)
    # Two of three experts: f = (1/2, 1/2, 0), P = (1/2, 1/4, 1/4): 3 (1/4 + 1/8) = 9/8.
    routing = Routing(
        torch.tensor([[0.5, 0.25]]), torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25, 0.25]]).log(), task=0
    )
    assert switch_balance(routing).item() == approx(9 / 8)


def test_load_by_hand():
    # sigma = 1/2, clean (0, 1/2), noisy (1/2, 1), k = 1: tau = 1, so P = (Phi(-2), Phi(-1)) = (0.0227501, 0.1586553)
    # and CV^2 of two values is ((a - b) / (a + b))^2 = (0.1359052 / 0.1814054)^2 = 0.561269.
    routing = choose(torch.tensor([[0.0, 0.5]]), torch.tensor([[0.5, 0.5]]), k=1, sigma=0.5)
    assert load(routing).item() == approx(0.561269, abs=1e-5)


def test_load_agrees_with_drawing_the_noise_again():
    """The analytic share against the share counted over fresh noise; thresholds in another space do not agree."""
    tokens, experts, k, sigma, batches, draws = 3, 4, 2, 0.7, 25, 4000
    routing = random_routing(tokens, experts, k, seed=3, sigma=sigma, task=0)
    threshold = routing.noisy_logits.topk(k, -1).values[:, -1:]
    generator = torch.Generator().manual_seed(4)
    noise = sigma * torch.randn(batches, draws, tokens, experts, dtype=torch.float64, generator=generator)
    counted = (routing.logits + noise > threshold).double().mean(dim=(1, 2))  # [batches, experts]
    estimates = counted.var(-1, correction=0) / counted.mean(-1).square()
    mean, standard_error = estimates.mean().item(), estimates.std().item() / math.sqrt(batches)
    assert standard_error < 0.02 * mean
    assert abs(load(routing).item() - mean) < 3 * standard_error
    # The defect this guards against: thresholds taken after softmax, compared with scores before it.
    wrong = replace(routing, noisy_logits=routing.noisy_logits.softmax(-1))
    assert abs(load(wrong).item() - mean) > 10 * standard_error


def test_load_without_noise_is_refused():
    with pytest.raises(ValueError, match=r"^load: this routing has no noise"):
        load(two_tokens())
    gate = create_gate("noisy_topk", 4, 3, 2, 1).eval()
    with pytest.raises(ValueError, match=r"^layer 'blocks.1': load: "):
        total({"blocks.1": gate(torch.randn(5, 4), 0)}, {"load": 0.1})


def test_mutual_information_by_hand():
    # p(e|t) = (3/4, 1/4) and (1/2, 1/2), p(e) = (5/8, 3/8): I = H(5/8) - (H(3/4) + ln 2) / 2, H the binary entropy.
    def entropy(p):
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    expected = entropy(5 / 8) - (entropy(3 / 4) + LOG2) / 2
    assert 0.03 < expected < 0.04
    assert mutual_information(two_tokens()).item() == approx(-expected)
    # Tokens of a task are averaged before anything else: task 4 has (3/4, 1/4) and (1/2, 1/2), task 1 (5/8, 3/8).
    logits = torch.tensor([[LOG3, 0.0], [0.0, 0.0], [math.log(5 / 3), 0.0]])
    ids = torch.tensor([4, 4, 1])
    routing = Routing(torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64), logits, ids)
    assert mutual_information(routing).item() == approx(0.0)
    # Tasks count alike, not tokens: (5/8, 3/8) of two tokens and (1/2, 1/2) of one have the mean (9/16, 7/16).
    uneven = replace(routing, logits=torch.tensor([[LOG3, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    assert mutual_information(uneven).item() == approx(-(entropy(9 / 16) - (entropy(5 / 8) + LOG2) / 2))


def test_mutual_information_leaves_a_task_of_padding_out():
    logits = torch.tensor([[LOG3, 0.0], [0.0, 0.0], [5.0, 0.0]])
    routing = Routing(torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64), logits, (0, 1, 2))
    padded = replace(routing, valid=torch.tensor([True, True, False]))
    torch.testing.assert_close(mutual_information(padded), mutual_information(two_tokens()))
    assert mutual_information(routing) < 2 * mutual_information(padded) < 0


def test_mutual_information_ends_at_experts_of_their_own():
    apart = two_tokens(logits=torch.tensor([[300.0, 0.0], [0.0, 300.0]], requires_grad=True))  # softmax rounds to 0
    assert mutual_information(apart).item() == approx(-LOG2)
    (grad,) = torch.autograd.grad(mutual_information(apart), apart.logits)
    assert grad.isfinite().all()
    assert mutual_information(two_tokens(logits=torch.tensor([[3.0, 1.0], [3.0, 1.0]]))).item() == approx(0.0)


@pytest.mark.parametrize("task", [1, None, (0,), (2, 2), torch.tensor([1, 1])], ids=str)
def test_mutual_information_of_one_task_is_zero_and_can_be_differentiated(task):
    logits = torch.tensor([[LOG3, 0.0], [0.0, 0.0]], requires_grad=True)
    value = mutual_information(two_tokens(task, logits=logits))
    assert value.item() == 0
    (grad,) = torch.autograd.grad(value, logits)
    assert grad.abs().max() < 1e-7


def test_lowering_mutual_information_parts_the_tasks():
    # task 0 leans to expert 0, task 1 to expert 1; each shall lean more
    logits = torch.tensor([[0.5, 0.0], [0.0, 0.5]], requires_grad=True)
    (grad,) = torch.autograd.grad(mutual_information(two_tokens(logits=logits)), logits)
    assert (torch.sign(grad) == torch.tensor([[-1.0, 1.0], [1.0, -1.0]])).all()
    with torch.no_grad():
        after = mutual_information(two_tokens(logits=logits - grad))
    assert after < mutual_information(two_tokens(logits=logits)) < 0


@pytest.mark.parametrize("per_task", [False, True])
def test_one_expert_and_all_experts(per_task):
    one = Routing(torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.int64), torch.randn(4, 1), (0, 1))
    assert importance(one, per_task=per_task).item() == 0
    assert importance(one, source="weights", per_task=per_task).item() == 0
    assert load(one, per_task=per_task).item() == 0
    assert switch_balance(one, per_task=per_task).item() == approx(1.0)
    assert mutual_information(one).item() == 0
    logits = torch.tensor([[LOG3, 0.0], [0.0, 0.0]])
    mixture = Routing(logits.softmax(-1), None, logits, (0, 1))
    expected = 1 / 8 if per_task else 1 / 16  # as the top-k routing with the same scores
    for source in ("probs", "weights"):
        assert importance(mixture, source=source, per_task=per_task).item() == approx(expected)
    assert load(mixture, per_task=per_task).item() == 0
    assert switch_balance(mixture, per_task=per_task).item() == approx(1.0)
    assert z_loss(mixture).item() == approx(2.5 * LOG2**2)


@pytest.mark.parametrize("name, options", [(name, {}) for name in OF_SCORES] + [("importance", {"source": "weights"})])
def test_gradients_are_those_of_the_formula(name, options):
    base = random_routing(m=6, experts=4)
    noise = (base.noisy_logits - base.logits).detach()

    def value(logits, per_task):
        return regularize(name, choose(logits, noise, 2, 0.5, (0, 2)), per_task, **options)

    logits = base.logits.clone().requires_grad_()
    for per_task in (False, True):
        assert torch.autograd.gradcheck(lambda x, p=per_task: value(x, p), (logits,))
        (grad,) = torch.autograd.grad(value(logits, per_task), logits)
        assert grad.abs().max() > 1e-3


@pytest.mark.parametrize(
    "gate, name",
    [("softmax", "importance"), ("softmax", "z_loss")]  # the others are constants of a dense mixture
    + [(gate, name) for gate in ("noisy_topk", "task_embedding", "task_blind") for name in OF_SCORES],
)
def test_gradient_reaches_the_router(gate, name):
    torch.manual_seed(0)
    gate = create_gate(gate, 6, 5, 3, None if gate == "softmax" else 2).train()
    loss, _ = total({"a": gate(torch.randn(8, 6), (0, 2))}, {name: 1.0})
    loss.backward()
    used = [p.grad for p in gate.parameters() if p.grad is not None]
    assert used
    assert all(grad.isfinite().all() for grad in used)
    assert max(grad.abs().max() for grad in used) > 1e-4


@every_regularizer
@pytest.mark.parametrize("per_task", [False, True])
@pytest.mark.parametrize("task", [1, (0, 2), (2, 2), "rows"], ids=str)
def test_padding_changes_neither_value_nor_gradient(name, per_task, task):
    valid = torch.tensor([True, False, True, True, True, False, True, True])
    ids = torch.tensor([0, 1, 1, 0, 2, 2, 0, 1]) if task == "rows" else task
    full = random_routing(m=8, task=ids, valid=valid)
    noise, keep = (full.noisy_logits - full.logits), full.task_ids()[valid]
    poison = torch.where(valid.unsqueeze(-1), 0.0, torch.nan)

    def run(logits, noise, task, valid):
        logits = logits.clone().requires_grad_()
        value = regularize(name, choose(logits, noise, 2, 0.5, task, valid), per_task)
        (grad,) = torch.autograd.grad(value, logits)
        return value, grad

    value, grad = run(full.logits[valid], noise[valid], keep, None)
    padded, padded_grad = run(full.logits + poison, noise, ids, valid)
    torch.testing.assert_close(padded, value)
    torch.testing.assert_close(padded_grad[valid], grad)
    assert not padded_grad[~valid].any()
    assert value != 0 or (name == "mutual_information" and keep.unique().numel() == 1)


@pytest.mark.parametrize("name", PER_TASK)
def test_per_task_is_the_average_of_the_tasks_alone(name):
    full = random_routing(m=12, task=(2, 0, 2))

    def alone(rows, task):
        return REGULARIZERS[name](
            choose(full.logits[rows], (full.noisy_logits - full.logits)[rows], 2, 0.5, task), per_task=False
        )

    first = alone([*range(4), *range(8, 12)], 2)
    expected = (first + alone(list(range(4, 8)), 0)) / 2
    torch.testing.assert_close(REGULARIZERS[name](full, per_task=True), expected)
    rows = replace(full, task=full.task_ids())
    torch.testing.assert_close(REGULARIZERS[name](rows, per_task=True), expected)
    # Rows that serve every task at once are one task.
    together = replace(full, task=None)
    torch.testing.assert_close(REGULARIZERS[name](together, per_task=True), REGULARIZERS[name](full))
    # A task whose every token is padding says nothing and weighs nothing.
    valid = torch.tensor([True] * 4 + [False] * 4 + [True] * 4)
    torch.testing.assert_close(REGULARIZERS[name](replace(full, valid=valid), per_task=True), first)


@every_regularizer
@pytest.mark.parametrize("per_task", [False, True])
def test_no_valid_token_gives_zero(name, per_task):
    routing = random_routing(m=4, valid=torch.zeros(4, dtype=torch.bool))
    assert regularize(name, routing, per_task).item() == 0


@every_regularizer
def test_token_order_is_irrelevant(name):
    full = random_routing(task=torch.arange(12) % 3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    moved = choose(full.logits[order], (full.noisy_logits - full.logits)[order], 2, 0.5, full.task[order])
    torch.testing.assert_close(REGULARIZERS[name](moved), REGULARIZERS[name](full))
    assert REGULARIZERS[name](full) != 0


def test_total_weighs_parts_and_averages_layers():
    routings = {"a": two_tokens(), "b": two_tokens(logits=torch.zeros(2, 2))}
    loss, parts = total(routings, {"importance": 2.0, "z_loss": 0.5, "switch_balance": 0.0})
    # Layer b has equal scores: importance 0, logsumexp log 2.
    assert parts.keys() == {"importance", "z_loss"}
    assert parts["importance"].item() == approx((1 / 16 + 0) / 2)
    assert parts["z_loss"].item() == approx((2.5 + 1) / 2 * LOG2**2)
    assert loss.item() == approx(2.0 * 1 / 32 + 0.5 * 1.75 * LOG2**2)
    _, parts = total(routings, {"importance": 1.0}, {"importance": {"per_task": True, "source": "weights"}})
    assert parts["importance"].item() == approx(1.0)


def test_total_keeps_the_graph_in_the_loss_only():
    logits = torch.tensor([[LOG3, 0.0], [0.0, 0.0]], requires_grad=True)
    loss, parts = total({"a": two_tokens(logits=logits)}, {"z_loss": 3.0})
    assert not parts["z_loss"].requires_grad
    # d/dl of the mean of squares: lse * softmax (two tokens cancel the 2), times 3.
    expected = 3 * torch.tensor([[2 * LOG2], [LOG2]]) * torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)


@pytest.mark.parametrize("coefficients", [{}, {"load": 0.0, "importance": 0}])
def test_total_without_work_is_zero(coefficients):
    loss, parts = total({"a": two_tokens()}, coefficients)  # load would be refused if it ran
    assert loss.item() == 0
    assert parts == {}


def test_total_without_layers_is_zero():
    loss, parts = total({}, {"importance": 1.0})
    assert loss.item() == 0
    assert parts == {}


def test_total_refuses_unknown_names():
    with pytest.raises(ValueError, match=r"^regularizer: unknown 'importnce'; did you mean 'importance'"):
        total({}, {"importnce": 0.0})
    with pytest.raises(ValueError, match=r"^regularizer: unknown 'zloss'; did you mean 'z_loss'"):
        total({"a": two_tokens()}, {"z_loss": 1.0}, {"zloss": {"per_task": True}})


def test_total_compiles_without_graph_breaks():
    torch.compiler.reset()
    routing = random_routing()
    coefficients = dict.fromkeys(OF_SCORES, 1.0)
    options = {name: {"per_task": True} for name in PER_TASK}
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled({"a": routing}, coefficients, options), total({"a": routing}, coefficients, options)
    )
