"""The contract every gate keeps, over all of `GATES`."""

import copy
import math

import pytest
import torch

from moe_mtl.gates import GATES, Gate, create_gate
from moe_mtl.gates._router import check_task
from moe_mtl.gates._topk import TopKGate
from moe_mtl.gates.softmax import SoftmaxGate
from moe_mtl.regularizers import REGULARIZERS, total
from moe_mtl.routing import Routing

DIM, TASKS = 6, 4
PER_TASK = (
    "softmax",
    "soft_slots",
    "sigmoid",
    "exclusive",
    "noisy_topk",
    "expert_choice",
    "assigned",
    "dselect_k",
)  # each parameter is of one task
MIXTURES = [
    "soft_slots",
    *sorted(name for name, gate in GATES.items() if issubclass(gate, SoftmaxGate)),
]  # over all experts: no k
STATIC = ("assigned", "dselect_k", "exclusive", "task_level")  # the task alone decides which experts it can reach
MIXED_IN_TRAINING = ("task_level", "expert_choice")  # over all experts, whatever k
TOPK = sorted(name for name, gate in GATES.items() if issubclass(gate, TopKGate))
SIZES = [(1, 1), (3, 2), (5, 5), (7, 1)]  # experts, k: one expert; not a power of two; all of them; one of many


def make(name: str, experts: int = 5, k: int = 2, dtype=torch.float32, seed: int = 0, **options) -> Gate:
    torch.manual_seed(seed)
    if name == "task_embedding":  # a task vector much wider than the tokens would decide alone
        options = {"embedding_dim": 4} | options
    if name == "exclusive":  # few experts are enough for every task
        options = {"alpha": 0.5, "kind": "exclusion"} | options if experts > 1 else {"alpha": 0.0}
    if name == "dselect_k":  # no selector is at an end of the smooth-step, where gradients and weights are exactly 0
        options = {"gamma": 5.0} | options
    if name == "task_level":  # mixtures whose gradients are not small
        options = {"selection": "softmax", "embedding_dim": 4, "start": 1.0} | options
    gate = create_gate(name, DIM, experts, TASKS, None if name in MIXTURES else k, **options).to(dtype)
    with torch.no_grad():
        for parameter in gate.parameters():  # no parameter at a special value, such as a zero bias
            parameter.add_(0.3 * torch.randn_like(parameter))
    return gate.eval()


def tokens(m: int, dtype=torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(m, DIM, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def shares(name: str, routing: Routing) -> torch.Tensor:
    """The weights the logits stand for: their softmax, but for gates whose weights do not share out 1."""
    by_name = {"dselect_k": torch.exp, "sigmoid": torch.sigmoid}
    return by_name[name](routing.logits) if name in by_name else routing.probs()


def dense(routing: Routing) -> torch.Tensor:
    """Logits and weights over all experts side by side: independent of the order of the selected experts."""
    return torch.cat([routing.logits, routing.dense_weights()], dim=1)


def own_parameters(gate: Gate, task: int) -> dict[str, torch.nn.Parameter]:
    """The parameters of one task, recognised by the list position in their name."""
    return {name: p for name, p in gate.named_parameters() if name.split(".")[-1] == str(task)}


every_gate = pytest.mark.parametrize("name", sorted(GATES))


@every_gate
@pytest.mark.parametrize("experts, k", SIZES)
@pytest.mark.parametrize("training", [False, True])
def test_routing_is_well_formed(name, experts, k, training):
    gate = make(name, experts, k).train(training)
    routing = gate(tokens(8), (0, 2))
    assert routing.logits.shape == (8, experts)
    assert routing.weights.shape == (8, experts if training and name in MIXED_IN_TRAINING else gate.k)
    assert (routing.weights > 0).all() or name == "exclusive" or (training and name == "expert_choice")
    assert (routing.weights.sum(-1) <= 1 + 1e-6).all() or name == "sigmoid"
    if routing.indices is not None:
        assert routing.indices.dtype == torch.int64
        assert (routing.indices.sort(-1).values.diff(dim=-1) > 0).all()  # no expert twice
        assert 0 <= routing.indices.min() <= routing.indices.max() < experts
    leaks = name == "sigmoid" or (name == "dselect_k" and experts.bit_count() > 1)
    if gate.k == experts and not leaks:
        torch.testing.assert_close(routing.weights.sum(-1), torch.ones(8))


@every_gate
def test_selection_agrees_with_a_sort_of_the_logits(name):
    gate = make(name, 5, 2)
    routing = gate(tokens(9), 1)
    for row in range(9):
        order = routing.logits[row].argsort(descending=True)[: gate.k]
        expected = torch.zeros(5)
        expected[order] = shares(name, routing)[row][order]
        torch.testing.assert_close(routing.dense_weights()[row], expected)


@every_gate
@pytest.mark.parametrize("experts, k", [s for s in SIZES if s[0] > 1])  # one expert: nothing to choose
@pytest.mark.parametrize("normalize", ["none", "detached"])
@pytest.mark.parametrize("task", [1, (1, 3), torch.tensor([1, 3, 3, 1, 1, 3, 1, 3])], ids=["id", "blocks", "rows"])
def test_router_gets_a_gradient_from_the_weights_alone(name, experts, k, normalize, task):
    gate = make(name, experts, k, **({"normalize": normalize} if name in TOPK else {})).train()
    routing = gate(tokens(8), task)
    if name == "assigned" and k == 1:  # the one expert of a task has weight 1
        assert list(gate.parameters()) == []
        return
    routing.weights.backward(torch.randn(routing.weights.shape, generator=torch.Generator().manual_seed(2)))
    asked = {1} if isinstance(task, int) else {1, 3}
    for parameter_name, parameter in gate.named_parameters():
        owner = parameter_name.split(".")[-1]
        if owner.isdigit() and int(owner) not in asked:
            assert parameter.grad is None or not parameter.grad.any(), parameter_name
        else:
            assert parameter.grad.isfinite().all(), parameter_name
            assert parameter.grad.abs().max() > 1e-5, parameter_name


@every_gate
def test_eval_is_deterministic_and_batch_of_one_works(name):
    gate = make(name)
    x = tokens(7)
    assert torch.equal(dense(gate(x, 2)), dense(gate(x, 2)))
    torch.testing.assert_close(dense(gate(x[:1], 2)), dense(gate(x, 2))[:1])
    assert gate(x[:0], (0, 1)).weights.shape == (0, gate.k)


@every_gate
@pytest.mark.parametrize("ids", [(1,), (0, 1), (1, 3), (3, 0, 2), (2, 2), range(TASKS)], ids=str)
def test_blocks_rows_and_single_tasks_agree(name, ids):
    gate = make(name, dtype=torch.float64)
    n = 3
    x = tokens(n * len(ids), torch.float64)
    blocks = dense(gate(x, ids))
    alone = torch.cat([dense(gate(x[i * n : (i + 1) * n], task)) for i, task in enumerate(ids)])
    rows = dense(gate(x, torch.tensor(ids).repeat_interleave(n)))
    torch.testing.assert_close(blocks, alone, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(rows, alone, rtol=1e-13, atol=1e-13)


@every_gate
def test_the_three_spellings_agree_in_gradients(name):
    gate, x = make(name, dtype=torch.float64), tokens(6, torch.float64)
    cotangent = torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def gradients(*calls):
        gate.zero_grad()
        x.requires_grad_().grad = None
        torch.cat([dense(gate(x[rows], task)) for rows, task in calls]).backward(cotangent)
        return [x.grad] + [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in gate.parameters()]

    alone = gradients((slice(0, 3), 3), (slice(3, 6), 1))
    for task in ((3, 1), torch.tensor([3, 3, 3, 1, 1, 1])):
        torch.testing.assert_close(gradients((slice(0, 6), task)), alone, rtol=1e-12, atol=1e-12)


@every_gate
@pytest.mark.parametrize("task", [2, (2, 0), torch.tensor([2, 0, 0, 2, 2, 2])], ids=["id", "blocks", "rows"])
def test_nan_in_another_tasks_router_changes_nothing(name, task):
    gate, x = make(name), tokens(6)
    poisoned = copy.deepcopy(gate)
    with torch.no_grad():
        for other in (1, 3):
            for parameter in own_parameters(poisoned, other).values():
                parameter.fill_(torch.nan)
    assert name == "task_blind" or any(p.isnan().any() for p in poisoned.parameters())
    cotangent = torch.randn(6, 10, generator=torch.Generator().manual_seed(4))
    results = []
    for one in (gate, poisoned):
        out = dense(one(x, task))
        out.backward(cotangent)
        results.append([out.detach()] + [torch.zeros_like(p) if p.grad is None else p.grad for p in one.parameters()])
    for clean, other in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, other)


@every_gate
@pytest.mark.parametrize("experts, k", SIZES)
def test_every_gate_lives_with_the_regularizers(name, experts, k):
    gate = make(name, experts, k).train()
    # smooth load needs noise, or nothing to choose
    smooth = name in TOPK or gate.k == experts
    coefficients = {regularizer: 0.5 for regularizer in REGULARIZERS if regularizer != "load" or smooth}
    loss, parts = total({"a": gate(tokens(8), (0, 2)), "b": gate(tokens(4), 1)}, coefficients)
    assert loss.isfinite()
    assert set(parts) == set(coefficients)
    if loss.requires_grad:
        loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in gate.parameters())


@every_gate
def test_reachable_experts_are_those_the_weights_use(name):
    gate = make(name, 7, 2)
    for task in range(TASKS):
        ids = gate.reachable(task)
        assert (ids is None) == (name not in STATIC)
        if ids is not None:
            used = gate(tokens(9), task).dense_weights() > 0
            assert used.all(0).nonzero().flatten().tolist() == list(ids)


@every_gate
@pytest.mark.parametrize("task", [0, (0, 2), torch.tensor([0, 2, 2, 0, 0, 2, 2, 0, 2])], ids=["id", "blocks", "rows"])
def test_experts_that_are_not_kept_are_never_chosen_and_weights_stay_shares_of_all(name, task):
    gate, x = make(name, 7, 2), tokens(9 if isinstance(task, torch.Tensor) else 8)
    full = gate(x, task)
    for ids in ([0, 1, 3, 4, 6], [0, 2], [3]):
        small = copy.deepcopy(gate)
        small.keep_experts(torch.tensor(ids))
        routing = small(x, task)
        assert small.k == routing.k == min(gate.k, len(ids))
        assert set(routing.indices.flatten().tolist()) <= set(ids)
        assert torch.equal(routing.logits, full.logits)
        chosen = torch.zeros(full.logits.shape).scatter(1, routing.indices, 1.0)
        torch.testing.assert_close(routing.dense_weights(), shares(name, full) * chosen)
        gone = [e for e in range(7) if e not in ids]
        untouched = full.dense_weights()[:, gone].sum(1) == 0
        torch.testing.assert_close(routing.dense_weights()[untouched], full.dense_weights()[untouched])
        in_bank = small.in_bank(routing)
        assert in_bank.num_experts == len(ids)
        assert torch.equal(torch.tensor(ids)[in_bank.indices], routing.indices)
        assert torch.equal(in_bank.logits, full.logits[:, ids])
        again = make(name, 7, 2, seed=5)
        again.keep_experts(torch.tensor(sorted({6} | set(range(len(ids) - 1)))))
        again.load_state_dict(small.state_dict())  # which experts are left is part of the state
        assert torch.equal(dense(again(x, task)), dense(routing))


@every_gate
def test_tasks_differ_unless_the_gate_is_blind(name):
    gate, x = make(name), tokens(16)
    a, b = gate(x, 0), gate(x, 3)
    if gate.task_dependent:
        assert (a.logits - b.logits).abs().max() > 0.1
        if name == "task_level":  # tasks may agree on the experts
            assert not torch.equal(a.dense_weights(), b.dense_weights())
        else:
            assert not torch.equal(a.dense_weights() > 0, b.dense_weights() > 0) or a.indices is None
    else:
        assert torch.equal(dense(a), dense(b))


@every_gate
def test_only_a_blind_gate_serves_every_task_at_once(name):
    gate, x = make(name), tokens(5)
    if gate.task_dependent:
        with pytest.raises(ValueError, match=r"^task: got None"):
            gate(x, None)
    else:
        routing = gate(x, None)
        assert routing.task is None
        assert torch.equal(dense(routing), dense(gate(x, 2)))


@every_gate
@pytest.mark.parametrize("task", [1, torch.tensor([0, 1, 3, 3, 2, 1, 0, 1])], ids=["id", "rows"])
def test_token_order_is_irrelevant(name, task):
    gate, x = make(name, dtype=torch.float64), tokens(8, torch.float64)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(5))
    moved = gate(x[order], task if isinstance(task, int) else task[order])
    torch.testing.assert_close(dense(moved), dense(gate(x, task))[order], rtol=1e-13, atol=1e-13)


@every_gate
def test_padding_is_passed_on_and_touches_no_other_row(name):
    gate, x = make(name, dtype=torch.float64), tokens(6, torch.float64)
    valid = torch.tensor([True, True, False, True, False, True])
    routing = gate(x, 1, valid)
    assert routing.valid is valid
    garbage = x.masked_fill(~valid.unsqueeze(1), 1e6)
    torch.testing.assert_close(dense(gate(garbage, 1, valid))[valid], dense(gate(x, 1))[valid], rtol=1e-13, atol=1e-13)


@every_gate
@pytest.mark.parametrize("task", [1, (0, 3), torch.tensor([0, 1, 3, 3])], ids=["id", "blocks", "rows"])
def test_routers_compute_in_float32_under_autocast_and_for_half_tokens(name, task):
    gate, x = make(name), tokens(4)
    with torch.autocast("cpu", torch.bfloat16):
        cast = gate(x, task)
    assert cast.logits.dtype == cast.weights.dtype == torch.float32
    assert torch.equal(dense(cast), dense(gate(x, task)))
    assert torch.equal(dense(gate(x.bfloat16(), task)), dense(gate(x.bfloat16().float(), task)))
    half = copy.deepcopy(gate).bfloat16()(x.bfloat16(), task)
    assert half.logits.dtype == half.weights.dtype == torch.float32


@every_gate
def test_gate_for_some_tasks(name):
    gate, x = make(name, **({"normalize": "detached", "noise_std": 0.5} if name in TOPK else {})), tokens(8)
    small = gate.for_tasks((3, 1))
    assert type(small) is type(gate)
    assert (small.num_tasks, gate.num_tasks) == (2, TASKS)
    assert torch.equal(dense(small(x, 0)), dense(gate(x, 3)))
    assert torch.equal(dense(small(x, (1, 0))), dense(gate(x, (1, 3))))
    assert small.extra_repr() == gate.extra_repr().replace(f"num_tasks={TASKS}", "num_tasks=2")
    own = sum(p.numel() for p in own_parameters(gate, 0).values())
    saved = sum(p.numel() for p in gate.parameters()) - sum(p.numel() for p in small.parameters())
    assert saved == 2 * own
    assert own > 0 or not gate.task_dependent
    assert not {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in gate.parameters()}
    with pytest.raises(ValueError, match="got id 2, expected 0 to 1"):
        small(x, 2)
    with pytest.raises(ValueError, match="got id 4"):
        gate.for_tasks((0, 4))


@every_gate
def test_a_task_named_twice_gets_two_routers(name):
    pair = make(name).for_tasks((1, 1))
    x = tokens(3)
    before = dense(pair(x, 1)).detach()
    assert torch.equal(dense(pair(x, 0)), before)
    with torch.no_grad():
        for parameter in own_parameters(pair, 0).values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6)))
    assert torch.equal(dense(pair(x, 1)), before)
    assert torch.equal(dense(pair(x, 0)), before) != pair.task_dependent


@pytest.mark.parametrize("name", PER_TASK)
@pytest.mark.parametrize("task", [0, (0, 2)], ids=["id", "blocks"])
def test_training_one_task_leaves_the_others_bit_equal(name, task):
    gate, x = make(name).train(), tokens(8)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=0.1, weight_decay=0.1)

    def step(which):
        optimizer.zero_grad()
        routing = gate(x, which)
        routing.weights.backward(torch.randn(routing.weights.shape, generator=torch.Generator().manual_seed(7)))
        optimizer.step()

    step(range(TASKS))  # fills the momentum of every router
    before = {t: dense(gate.eval()(x, t)) for t in range(TASKS)}
    gate.train()
    step(task)
    gate.eval()
    for other in (1, 3):
        assert torch.equal(dense(gate(x, other)), before[other])
    assert not torch.equal(dense(gate(x, 0)), before[0])


@every_gate
@pytest.mark.parametrize("task", [1, (0, 3)], ids=["id", "blocks"])
def test_compiles_without_graph_breaks(name, task):
    torch.compiler.reset()
    gate, x = make(name), tokens(6)
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    routing = compiled(x, task, torch.ones(6, dtype=torch.bool))
    torch.testing.assert_close(dense(routing), dense(gate(x, task)))
    assert routing.task == task
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x, task).logits.dtype == torch.float32


@every_gate
@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_any_number_of_tokens(name, strict):
    gate = make(name)
    shapes = {"x": {0: torch.export.Dim("m")}, "task": None}
    program = torch.export.export(gate, (tokens(6), 2), dynamic_shapes=shapes, strict=strict)
    for m in (1, 11):
        torch.testing.assert_close(dense(program.module()(tokens(m), 2)), dense(gate(tokens(m), 2)))


@every_gate
@pytest.mark.parametrize(
    "task, message",
    [
        (-1, "got id -1, expected 0 to 3"),
        (4, "got id 4"),
        ((0, 9), "got id 9"),
        ((), "got no ids"),
        ("depth", "'depth' of type str"),
        ((0, 1.0), "1.0 of type float"),
        ((0, 1, 2, 3), "6 rows do not split into 4"),
        (torch.tensor([0, 0, 0, 0, 0, 4]), "got ids 0 to 4"),
        (torch.tensor([0, 0, 0, 0, 0, -1]), "got ids -1 to 0"),
        (torch.tensor([0, 1]), r"ids \[2\], expected torch.int64 \[6\]"),
        (torch.zeros(6), "torch.float32 ids"),
    ],
)
def test_impossible_tasks_are_refused(name, task, message):
    with pytest.raises(ValueError, match=rf"^task: .*{message}"):
        make(name)(tokens(6), task)


def test_ids_off_the_cpu_are_not_read():
    check_task(torch.empty(4, dtype=torch.int64, device="meta"), TASKS, 4)


@every_gate
def test_wrong_tokens_and_masks_are_refused(name):
    gate = make(name)
    with pytest.raises(ValueError, match=r"^x: got shape \[2, 3, 6\]"):
        gate(torch.zeros(2, 3, DIM), 0)
    with pytest.raises(ValueError, match=r"^x: got shape \[2, 5\]"):
        gate(torch.zeros(2, 5), 0)
    for valid in (torch.ones(3), torch.ones(2, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"^valid: "):
            gate(tokens(3), 0, valid)


class TestFrozenRouters:
    @pytest.mark.parametrize("name", TOPK)
    @pytest.mark.parametrize(
        "regularizers", [{}, {"importance": 0.1, "load": 0.1, "z_loss": 0.1}], ids=["plain", "aux"]
    )
    def test_training_leaves_the_router_as_it_was_drawn(self, name, regularizers):
        gate, stem = make(name, frozen=True).train(), torch.nn.Linear(DIM, DIM)
        before = copy.deepcopy(gate.state_dict())
        optimizer = torch.optim.AdamW([*stem.parameters(), *gate.parameters()], lr=0.1, weight_decay=0.5)
        routing = gate(stem(tokens(8)), (0, 2))
        extra, _ = total({"a": routing}, regularizers)
        (routing.weights.square().sum() + extra).backward()
        assert stem.weight.grad.abs().max() > 1e-4  # the layers before still learn through it
        optimizer.step()
        assert len(before) > 0
        assert all(torch.equal(before[key], value) for key, value in gate.state_dict().items())

    @pytest.mark.parametrize("name", TOPK)
    def test_regularizers_of_a_frozen_first_layer_have_a_value_and_no_gradient(self, name):
        gate = make(name, frozen=True).train()
        extra, parts = total({"a": gate(tokens(8), (0, 2))}, {"importance": 1.0, "load": 1.0})
        assert not extra.requires_grad
        assert all(part > 0 for part in parts.values())
        elsewhere = torch.ones((), requires_grad=True)
        (elsewhere + extra).backward()
        assert elsewhere.grad == 1

    @pytest.mark.parametrize("name", TOPK)
    def test_it_routes_saves_loads_and_splits_as_a_trained_one(self, name):
        trained, frozen = make(name), make(name, seed=1, frozen=True)
        assert not torch.equal(dense(trained(tokens(5), 1)), dense(frozen(tokens(5), 1)))
        frozen.load_state_dict(trained.state_dict())
        assert torch.equal(dense(trained(tokens(5), 1)), dense(frozen(tokens(5), 1)))
        for gate in (frozen, frozen.for_tasks((3, 1)), copy.deepcopy(frozen)):
            assert not any(p.requires_grad for p in gate.parameters())
            assert gate.extra_repr().endswith(", frozen=True")
        assert all(p.requires_grad for p in trained.parameters())
        assert "frozen" not in trained.extra_repr()


def test_create_gate_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="unknown 'noisy_top'; did you mean 'noisy_topk'"):
        create_gate("noisy_top", 4, 3, 2, 1)
    with pytest.raises(ValueError, match=r"^noise: gate 'noisy_topk' has no such option; did you mean 'noise_std'"):
        create_gate("noisy_topk", 4, 3, 2, 1, noise=1.0)
    with pytest.raises(
        ValueError, match=r"^noise_std: gate 'softmax' has no such option; known: dropout, hidden, visible"
    ):
        create_gate("softmax", 4, 3, 2, noise_std=1.0)
    with pytest.raises(ValueError, match=r"^k: got 2, but the softmax gate uses all 3"):
        create_gate("softmax", 4, 3, 2, 2)
    with pytest.raises(ValueError, match=r"^normalize: unknown 'detach'; did you mean 'detached'"):
        create_gate("task_blind", 4, 3, 2, 1, normalize="detach")
    with pytest.raises(ValueError, match=r"^k: got 4"):
        create_gate("task_blind", 4, 3, 2, 4)
    with pytest.raises(ValueError, match=r"^embedding_dim: "):
        create_gate("task_embedding", 4, 3, 2, 1, embedding_dim=0)
    with pytest.raises(ValueError, match=r"^frozen: gate 'softmax' has no such option"):
        create_gate("softmax", 4, 3, 2, frozen=True)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"^noise_std: "):
            create_gate("noisy_topk", 4, 3, 2, 1, noise_std=bad)
    assert create_gate("noisy_topk", 4, 3, 2).k == 3


def test_compute_classes():
    assert {name: gate.compute_class for name, gate in GATES.items()} == {
        "softmax": "dense",
        "sigmoid": "dense",
        "soft_slots": "dense",
        "exclusive": "dense",
        "noisy_topk": "token",
        "expert_choice": "token",
        "task_level": "task",
        "dselect_k": "task",
        "task_embedding": "token",
        "task_bias": "token",
        "task_blind": "token",
        "assigned": "task",
    }


@pytest.mark.parametrize("name", GATES)
def test_nan_in_padding_reaches_neither_weights_nor_gradients(name):
    gate = create_gate(name, 6, 4, 2, 4 if name in MIXTURES else 2).eval()
    x, valid = torch.randn(5, 6), torch.tensor([True, True, False, True, False])
    cotangent = torch.randn(3, gate.k)
    gradients = []
    for padding in (0.0, float("nan")):
        gate.zero_grad()
        routing = gate(x.masked_fill(~valid[:, None], padding), 1, valid)
        (routing.weights[valid] * cotangent).sum().backward()
        gradients.append([p.grad.clone() for p in gate.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for clean, poisoned in zip(*gradients, strict=True):
        assert torch.equal(clean, poisoned)
