"""Some of a bank's experts as a bank, in every mode."""

import copy
import io

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_mtl.expert_subsets import BankTable, BankView
from moe_mtl.experts import ExpertBank
from moe_mtl.gates import create_gate
from moe_mtl.kernels import ops
from moe_mtl.kernels.dense import dense_mlp
from moe_mtl.layers import MoE
from moe_mtl.routing import Routing
from moe_mtl.testing import assert_matches

E, D, H, OUT, M = 7, 16, 24, 8, 45
IDS = {"copy": [5, 0, 3], "view": [2, 3, 4], "table": [5, 0, 3]}
KINDS = ["sparse", "all", "dense", "holes", "padded"]

every_mode = pytest.mark.parametrize("mode", IDS)
borrowing = pytest.mark.parametrize("mode", ["view", "table"])
every_kind = pytest.mark.parametrize("kind", KINDS)


def make_bank(dtype=torch.float32, **options):
    return ExpertBank(E, D, H, out_dim=OUT, **options).to(dtype)


def route(kind, s=3, m=M):
    """A routing over s experts.

    "sparse": two ids per token; "all": an id for each of the s; "dense": weights over all, no ids; "padded": that with
    rows that do not count; "holes": two ids, with unused slots, an expert named twice, and rows that do not count.
    """
    logits, weights = torch.randn(m, s), torch.rand(m, s if kind in ("all", "dense", "padded") else 2)
    indices = None if kind in ("dense", "padded") else torch.rand(m, s).topk(weights.shape[1]).indices
    if kind == "holes":
        indices[::4, 0], indices[1::8], indices[2::8] = -1, 1, -1
    return Routing(weights, indices, logits, 0, torch.arange(m) % 3 > 0 if kind in ("padded", "holes") else None)


def in_full(routing, ids):
    """The same routing with the ids of the bank that `ids` are taken from."""
    local = routing.indices
    if local is None:
        local = torch.arange(len(ids)).expand(len(routing.weights), -1)
    return Routing(routing.weights, torch.tensor([*ids, -1])[local], torch.zeros(len(local), E), 0, routing.valid)


def with_weights(routing, weights):
    return Routing(weights, routing.indices, routing.logits, routing.task, routing.valid)


def differentiate(call, x, routing, cotangent, parameters):
    """[y, gradients of the parameters, x and the weights]."""
    x, weights = x.detach().requires_grad_(), routing.weights.detach().requires_grad_()
    y = call(x, with_weights(routing, weights))
    return [y, *torch.autograd.grad(y, [*parameters, x, weights], cotangent.to(y.dtype))]


def in_place(gradients, ids):
    """Gradients of a copy's parameters at the places of their experts in the full bank, zero elsewhere."""
    return [g.new_zeros(E, *g.shape[1:]).index_copy(0, torch.tensor(ids), g) for g in gradients]


# --- equality with the full bank --------------------------------------------------------------------------------------


@every_mode
@every_kind
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"glu": True, "activation": "silu", "bias": False}),
        (torch.bfloat16, {"activation": "relu"}),
        (torch.float64, {"glu": True}),
    ],
    ids=["f32", "f32-glu", "bf16", "f64-glu"],
)
def test_equals_the_full_bank_on_these_experts(mode, kind, dtype, options):
    """The result, with gradient and without, and every gradient: of the bank, of the tokens, of the weights."""
    bank, ids = make_bank(dtype, **options), IDS[mode]
    exact, subset = copy.deepcopy(bank).double(), bank.for_task(ids, mode)
    assert isinstance(subset, ExpertBank) and subset.num_experts == 3
    parameters = [*(subset if mode == "copy" else bank).parameters()]
    pools = [], [], []
    for _ in range(8):  # pooled: the largest of few rounding errors says little
        x, routing, cotangent = torch.randn(M, D).to(dtype), route(kind), torch.randn(M, OUT).to(dtype)
        routing = with_weights(routing, routing.weights.to(torch.promote_types(dtype, torch.float32)))
        y, *grads = differentiate(subset, x, routing, cotangent, parameters)
        if mode == "copy":
            grads = [*in_place(grads[:-2], ids), *grads[-2:]]
        with torch.no_grad():
            pools[0].append([subset(x, routing), y, *grads])
        for pool, full, dense_x in ((pools[1], exact, x.double()), (pools[2], bank, x)):
            call = lambda x, routing, full=full: full(x, in_full(routing, ids), backend="reference")  # noqa: E731
            y, *grads = differentiate(call, dense_x, routing, cotangent, [*full.parameters()])
            pool.append([y, y, *grads])
    names = ["y without gradient", "y", *(f"gradient of {n}" for n, _ in bank.named_parameters()), "of x", "of weights"]
    for i, name in enumerate(names):
        ours, oracle, baseline = (torch.stack([draw[i] for draw in pool]) for pool in pools)
        assert_matches(ours, oracle.double(), baseline, name)
        with pytest.raises(AssertionError):
            assert_matches(torch.zeros_like(ours), oracle.double(), baseline)


@every_mode
@every_kind
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_forced_backend_computes_the_same(mode, kind, backend):
    subset, x, routing = make_bank().for_task(IDS[mode], mode), torch.randn(M, D), route(kind)
    torch.testing.assert_close(subset(x, routing, backend=backend), subset(x, routing))


def test_one_routing_over_all_tasks_is_as_good_as_a_call_per_task():
    """Local ids plus the first expert of the row's task: one call, whose sort tables hold those of every task."""
    bank, starts, s = make_bank(), torch.tensor([0, 2, 4]), 3
    x, parts = torch.randn(3 * M, D), [route("holes", s) for _ in starts]
    cotangent = torch.randn(3 * M, OUT)
    indices = torch.cat([torch.where(r.indices < 0, -1, r.indices + a) for r, a in zip(parts, starts, strict=True)])
    every = Routing(
        torch.cat([r.weights for r in parts]),
        indices,
        torch.zeros(3 * M, E),
        (0, 1, 2),
        torch.cat([r.valid for r in parts]),
    )
    y, *grads = differentiate(bank, x, every, cotangent, [*bank.parameters()])
    alone = []
    for i, (routing, start) in enumerate(zip(parts, starts.tolist(), strict=True)):
        view, rows = bank.for_task(range(start, start + s), "view"), slice(i * M, (i + 1) * M)
        alone.append(differentiate(view, x[rows], routing, cotangent[rows], [*bank.parameters()]))
    ys, *sums, dx, dweights = zip(*alone, strict=True)
    for ours, theirs in zip(
        (y, *grads), (torch.cat(ys), *(sum(g) for g in sums), torch.cat(dx), torch.cat(dweights)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    # tables of a task whose window nobody shares are a piece of the tables of all
    offsets = ops.plan_routing(
        torch.cat([parts[0].indices, torch.where(parts[1].indices < 0, -1, parts[1].indices + s)]), 6
    ).offsets
    own = [ops.plan_routing(r.indices, s).offsets for r in parts[:2]]
    assert torch.equal(offsets[: s + 1], own[0]) and torch.equal(offsets[s:] - offsets[s], own[1])


# --- whose weights, whose state ---------------------------------------------------------------------------------------


def test_a_copy_owes_the_bank_nothing():
    bank = make_bank()
    bank.b1.requires_grad_(False)
    subset = bank.for_task([5, 0, 3])
    assert type(subset) is ExpertBank and not subset.b1.requires_grad and subset.w1.requires_grad
    for name, p in subset.named_parameters():
        assert p.is_leaf and torch.equal(p, getattr(bank, name)[[5, 0, 3]]) and p.is_contiguous()
        assert p.untyped_storage().nbytes() == 3 * p[0].numel() * 4  # nothing of the others comes along
    before = {name: p.clone() for name, p in bank.named_parameters()}
    with torch.no_grad():
        for p in subset.parameters():
            p.fill_(9)
    assert all(torch.equal(p, before[name]) for name, p in bank.named_parameters())
    assert bank.num_experts == E
    again = ExpertBank(3, D, H, out_dim=OUT)
    again.load_state_dict(subset.state_dict())
    assert torch.equal(again.w1, subset.w1)


def test_copying_never_copies_the_other_experts(monkeypatch):
    def refuse(*args):
        raise AssertionError("a whole parameter was copied")

    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", refuse)
    assert make_bank().for_task([1], "copy").w1.shape[0] == 1


def test_a_view_reads_the_banks_storage():
    bank = make_bank()
    view = bank.for_task([2, 3, 4], "view")
    for name in ("w1", "b1", "w2", "b2"):
        assert getattr(view, name).data_ptr() == getattr(bank, name)[2].data_ptr()
        assert torch.equal(getattr(view, name), getattr(bank, name)[2:5])
    assert make_bank(bias=False).for_task([1], "view").b1 is None
    assert list(view.parameters()) == [] and view.state_dict() == {}


def test_a_table_holds_ids_alone():
    bank = make_bank()
    table = bank.for_task([5, 0, 3], "table")
    assert list(table.parameters()) == []
    assert {name: t.tolist() for name, t in table.state_dict().items()} == {"table": [5, 0, 3, -1]}
    assert torch.equal(table.w1, bank.w1[[5, 0, 3]]) and table.w1.untyped_storage().nbytes() < bank.w1.nbytes
    assert make_bank(bias=False).for_task([1], "table").b2 is None


@borrowing
def test_changes_of_the_bank_show_at_once(mode):
    bank, x, routing = make_bank(), torch.randn(M, D), route("sparse")
    subset = bank.for_task(IDS[mode], mode)
    with torch.no_grad():
        for p in bank.parameters():
            p.add_(torch.randn_like(p))
        torch.testing.assert_close(subset(x, routing), bank.for_task(IDS[mode])(x, routing))
    bank.double()
    assert subset(x.double(), with_weights(routing, routing.weights.double())).dtype == torch.float64


def test_switching_a_table_is_switching_the_task():
    bank, x, routing = make_bank(), torch.randn(M, D), route("sparse")
    table, buffer = bank.for_task([5, 0, 3], "table"), None
    for ids in ([5, 0, 3], [6, 2, 4], torch.tensor([4, 6, 0]), (5, 0, 3)):
        table.switch(ids)
        assert buffer in (None, table.table.data_ptr())  # a captured graph reads the same memory
        buffer = table.table.data_ptr()
        torch.testing.assert_close(table(x, routing), bank.for_task(list(ids))(x, routing))
        assert table.in_bank() == list(ids) and table.table[-1] == -1


@borrowing
def test_a_bank_beside_its_subset_is_saved_and_copied_once(mode):
    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bank = make_bank()
            self.subset = self.bank.for_task(IDS[mode], mode)

    pair, x, routing = Pair(), torch.randn(M, D), route("sparse")
    assert {name for name in pair.state_dict() if "bank" not in name} == (
        {"subset.table"} if mode == "table" else set()
    )
    assert sum(p.numel() for p in pair.parameters()) == sum(p.numel() for p in pair.bank.parameters())
    twin = copy.deepcopy(pair)
    assert twin.subset.bank is twin.bank is not pair.bank
    assert torch.equal(twin.subset(x, routing), pair.subset(x, routing))
    with torch.no_grad():
        twin.bank.w1.zero_()
    assert not torch.equal(twin.subset(x, routing), pair.subset(x, routing))
    other, file = Pair(), io.BytesIO()
    if mode == "table":
        other.subset.switch([1, 2, 6])
    torch.save(pair.state_dict(), file)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert torch.equal(other.subset(x, routing), pair.subset(x, routing))
    alone = copy.deepcopy(pair.subset)
    assert alone.bank is not pair.bank and torch.equal(alone(x, routing), pair.subset(x, routing))


@borrowing
def test_drawing_anew_is_the_banks_business(mode):
    bank = make_bank()
    before = bank.w1.clone()
    bank.for_task(IDS[mode], mode).reset_parameters()
    assert torch.equal(bank.w1, before)


@every_mode
def test_subsets_of_subsets(mode):
    bank, x, routing = make_bank(), torch.randn(M, D), route("sparse", 2)
    first = bank.for_task([1, 2, 3, 4], mode)
    expected = bank.for_task([2, 3])(x, routing)
    for second in IDS:
        torch.testing.assert_close(first.for_task([1, 2], second)(x, routing), expected)
    first.keep_experts([1, 2])
    assert first.num_experts == 2 and bank.num_experts == len(bank.w1) == E
    torch.testing.assert_close(first(x, routing), expected)


# --- nothing leaks ----------------------------------------------------------------------------------------------------


@every_mode
@every_kind
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_used_may_hold_anything(mode, kind, value):
    """Experts that are not the task's; tokens, gates and cotangents of rows and slots that nobody uses."""
    bank, ids, x, routing = make_bank(), IDS[mode], torch.randn(M, D), route(kind)
    cotangent, others = torch.randn(M, OUT), [e for e in range(E) if e not in ids]
    dirty, weights, spoilt = copy.deepcopy(bank), routing.weights.clone(), cotangent.clone()
    dirty_x = x.clone()
    unused = torch.zeros(M, dtype=torch.bool) if routing.valid is None else ~routing.valid
    if routing.indices is not None:
        weights[routing.indices < 0] = value
        unused = unused | (routing.indices < 0).all(1)
    weights[unused], dirty_x[unused], spoilt[unused] = value, value, value
    with torch.no_grad():
        for p in dirty.parameters():
            p[others] = value
    results = []
    for full, x_, weights_, cotangent_ in ((bank, x, routing.weights, cotangent), (dirty, dirty_x, weights, spoilt)):
        subset = full.for_task(ids, mode)
        parameters = [*(subset if mode == "copy" else full).parameters()]
        got = differentiate(subset, x_, with_weights(routing, weights_), cotangent_, parameters)
        with torch.no_grad():
            results.append([*got, subset(x_, with_weights(routing, weights_))])
        if mode != "copy":
            assert all(g[others].eq(0).all() and g[ids].flatten(1).ne(0).any(1).all() for g in got[1:-2])
    assert all(map(torch.equal, *results))
    assert results[0][0][unused].eq(0).all() and results[0][-2][unused].eq(0).all()


def test_one_token_that_is_nan_spoils_its_own_row():
    bank, x, routing = make_bank().for_task([1, 2], "view"), torch.randn(M, D), route("dense", 2)
    x[4] = torch.nan
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert bank(x, routing).isnan().any(1).nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("grad", [True, False])
def test_an_expert_of_weight_zero_gets_an_exact_zero_gradient(grad):
    bank, x, routing = make_bank(), torch.randn(M, D), route("dense", E)
    weights = routing.weights.clone()
    weights[:, 4] = 0
    _, *grads = differentiate(bank, x, with_weights(routing, weights), torch.randn(M, OUT), [*bank.parameters()])
    for g in grads[:-2]:
        assert g[4].eq(0).all() and g[:4].flatten(1).ne(0).any(1).all()
    assert grads[-1][:, 4].ne(0).all()  # so that a gate can leave zero again


# --- layers -----------------------------------------------------------------------------------------------------------


@every_mode
def test_a_layer_runs_on_a_subset(mode):
    """What `MoE.keep_experts` computes, with the experts still in the bank."""
    gate, bank, x = create_gate("noisy_topk", D, E, 2, 2).eval(), make_bank(), torch.randn(M, D)
    pruned = MoE(copy.deepcopy(gate), copy.deepcopy(bank))
    ids = sorted(IDS[mode])
    pruned.keep_experts(ids)
    gate.keep_experts(torch.tensor(ids))
    y = bank.for_task(ids, mode)(x, gate.in_bank(gate(x, 1)))
    torch.testing.assert_close(y, pruned(x, 1)[0])


@pytest.mark.parametrize("name", ["noisy_topk", "softmax", "task_embedding", "assigned"])
@pytest.mark.parametrize("ids", [None, [2, 3]], ids=["whole", "pruned"])
def test_a_layer_whose_tokens_use_every_expert_is_one_mlp(name, ids, monkeypatch):
    """Exactly k experts are left, or there never were more. The routing that the layer returns keeps its form."""
    k = 2 if ids else 5
    options = {"assignment": [[2, 3], [0, 1]]} if name == "assigned" and ids else {}
    gate = create_gate(name, D, 5, 2, None if name == "softmax" else k, **options).eval()
    layer, x = MoE(gate, ExpertBank(5, D, H)), torch.randn(M, D, requires_grad=True)
    if ids:
        layer.keep_experts(ids)
    valid = torch.arange(M) % 4 > 0
    routing = gate(x, 0, valid)
    expected = layer.experts(x, gate.in_bank(routing), backend="reference")
    called = []
    monkeypatch.setattr(ops, "dense_mlp", lambda *args, **options: called.append(1) or dense_mlp(*args, **options))
    y, returned = layer(x, 0, valid)
    assert len(called) == (name != "assigned")  # the table of this gate may name experts that are gone
    torch.testing.assert_close(y, expected)
    assert (returned.indices is None) == (routing.indices is None)
    assert torch.equal(returned.dense_weights(), routing.dense_weights())
    cotangent, leaves = torch.randn(M, D), [x, *layer.parameters()]
    leaves = [t for t in leaves if t.requires_grad and (t is x or t.grad_fn is None)]
    ours, theirs = (torch.autograd.grad(t, leaves, cotangent, allow_unused=True) for t in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_a_gate_that_names_an_expert_twice_stays_with_its_ids():
    """Experts 1 and 3 are gone: task 0 is left with expert 0, and expert 2, which is task 1's, may hold anything."""
    layer = MoE(create_gate("assigned", D, 4, 2, 2), ExpertBank(4, D, H))
    layer.keep_experts([0, 2])
    x = torch.randn(M, D)
    before = layer(x, 0)[0]
    with torch.no_grad():
        for p in layer.experts.parameters():
            p[1] = torch.nan
    assert torch.equal(layer(x, 0)[0], before)


# --- tracing and fixed sizes ------------------------------------------------------------------------------------------


@every_mode
@every_kind
@pytest.mark.parametrize("grad", [True, False])
def test_compiles_whole(mode, kind, grad):
    torch.compiler.reset()
    bank = make_bank(glu=True)
    subset, x, routing, cotangent = bank.for_task(IDS[mode], mode), torch.randn(M, D), route(kind), torch.randn(M, OUT)
    compiled = torch.compile(subset, fullgraph=True, backend="eager")
    if grad:
        parameters = [*(subset if mode == "copy" else bank).parameters()]
        results = [differentiate(f, x, routing, cotangent, parameters) for f in (compiled, subset)]
    else:
        with torch.no_grad():
            results = [[f(x, routing)] for f in (compiled, subset)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_compiled_table_switches_without_compiling_again():
    torch.compiler.reset()
    bank, x, routing, graphs = make_bank(), torch.randn(M, D), route("sparse"), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    table = bank.for_task([5, 0, 3], "table")
    compiled = torch.compile(table, fullgraph=True, backend=backend)
    with torch.no_grad():
        for ids in ([5, 0, 3], [6, 2, 4]):
            table.switch(ids)
            torch.testing.assert_close(compiled(x, routing), bank.for_task(ids)(x, routing))
    assert len(graphs) == 1


@every_mode
@every_kind
def test_sizes_follow_from_shapes_alone(mode, kind):
    """Fake tensors have no values: a size or a branch that depends on one raises."""
    with FakeTensorMode(), torch.no_grad():
        bank, given = ExpertBank(E, D, H, out_dim=OUT), kind not in ("dense", "padded")
        weights, logits = torch.rand(M, 2 if kind in ("sparse", "holes") else 3), torch.zeros(M, 3)
        indices = torch.zeros(weights.shape, dtype=torch.int64) if given else None
        valid = torch.ones(M, dtype=torch.bool) if kind in ("padded", "holes") else None
        subset = bank.for_task(IDS[mode], mode)
        assert subset(torch.randn(M, D), Routing(weights, indices, logits, 0, valid)).shape == (M, OUT)
        if mode == "table":
            subset.switch(torch.zeros(3, dtype=torch.int64, device="meta"))  # nobody reads ids that are not on the CPU


@pytest.mark.parametrize("mode", ["copy", "view"])
@every_kind
def test_exports_as_plain_torch(mode, kind):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bank = make_bank()
            self.subset = self.bank.for_task(IDS[mode], mode)

        def forward(self, x, weights, indices, valid):
            indices = None if kind in ("dense", "padded") else indices
            return self.subset(x, Routing(weights, indices, x.new_zeros(x.shape[0], 3), 0, valid))

    layer, m = Layer(), torch.export.Dim("m", min=1)

    def inputs(count):
        routing = route(kind, m=count)
        weights, ids = routing.weights, routing.indices
        ids = torch.zeros(weights.shape, dtype=torch.int64) if ids is None else ids
        return torch.randn(count, D), weights, ids, torch.ones(count).bool() if routing.valid is None else routing.valid

    with torch.no_grad():
        program = torch.export.export(layer, inputs(30), dynamic_shapes=({0: m},) * 4)
        assert not [node for node in program.graph.nodes if "moe_mtl" in str(node.target)]
        for count in (1, 7, 50):
            args = inputs(count)
            torch.testing.assert_close(program.module()(*args), layer(*args))


# --- bad arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[], [1, 1], [0, E], [-1, 0], [0.0, 1.0], ["a"], 3, torch.tensor([0.5])], ids=str)
def test_bad_ids_are_refused(ids):
    bank = make_bank()
    for mode in IDS:
        with pytest.raises(ValueError, match=r"^ids: got .*expected different experts of 0 to 6, at least one"):
            bank.for_task(ids, mode)
    with pytest.raises(ValueError, match=r"^ids: got .*expected different experts of 0 to 6"):
        bank.for_task([0], "table").switch(ids)
    with pytest.raises(ValueError, match=r"^ids: got .*expected different experts of 0 to 6"):
        bank.keep_experts(ids)


@pytest.mark.parametrize("ids", [[0, 2], [3, 2], [6, 0]], ids=str)
def test_a_view_needs_neighbours(ids):
    with pytest.raises(ValueError, match=r"^ids: got .*neighbours in ascending order; use mode=\"table\" or \"copy\""):
        make_bank().for_task(ids, "view")
    view = make_bank().for_task(range(E), "view")
    with pytest.raises(ValueError, match="neighbours"):
        view.keep_experts(ids)
    assert view.num_experts == E and view.start == 0


def test_other_bad_arguments_are_named():
    bank, x = make_bank(), torch.randn(M, D)
    with pytest.raises(ValueError, match=r"^mode: got 'tabel', known: copy, view, table; did you mean 'table'\?"):
        bank.for_task([0], "tabel")
    table = bank.for_task([5, 0, 3], "table")
    for ids in ([1, 2], [1, 2, 3, 4], torch.tensor([1, 2])):
        with pytest.raises(ValueError, match=r"^ids: got .*expected as many integers as before, 3"):
            table.switch(ids)
    assert table.in_bank() == [5, 0, 3]
    for mode in IDS:
        subset = bank.for_task(IDS[mode], mode)
        for routing in (route("sparse", 4), route("dense", m=M - 1)):
            with pytest.raises(
                ValueError, match=r"^routing: got 4[45] tokens over [34] experts, expected 45 tokens over 3"
            ):
                subset(x, routing)
        for bad in (3, -2):
            routing = route("sparse")
            routing.indices[4, 1] = bad
            with pytest.raises(ValueError, match=rf"^idx: got ids .*{bad}.*expected 0\.\.2"):
                subset(x, routing)
    with pytest.raises(ValueError, match=r"^table: on cpu, but x is on meta"):
        table(x.to("meta"), route("sparse"))


def test_types():
    bank = make_bank()
    assert isinstance(bank.for_task([0], "view"), BankView) and isinstance(bank.for_task([0], "table"), BankTable)
    assert "num_experts=2" in repr(bank.for_task([4, 1], "table")) and "bias=True" in repr(bank.for_task([4], "view"))


@pytest.mark.parametrize("mode", ["view", "table"])
def test_subsets_of_a_bank_that_lost_experts_are_refused(mode):
    """Those left have other ids: the same ids would mean other experts."""
    bank = ExpertBank(4, 8, 8)
    subset, logits = bank.for_task([0, 1], mode), torch.randn(3, 2)
    routing = Routing(*logits.softmax(-1).topk(1), logits, task=0)
    subset(torch.randn(3, 8), routing)
    bank.keep_experts([1, 2, 3])
    with pytest.raises(ValueError, match=r"bank: experts were dropped .* bank.for_task"):
        subset(torch.randn(3, 8), routing)
    bank.for_task([0, 1], mode)(torch.randn(3, 8), routing)


@pytest.mark.parametrize("mode", ["view", "table"])
def test_weights_of_a_subset_are_set_in_its_bank(mode):
    subset = ExpertBank(4, 8, 8).for_task([0, 1], mode)
    with pytest.raises(AttributeError, match=r"w1: a view or table has no weights of its own"):
        subset.w1 = torch.nn.Parameter(torch.zeros(2, 8, 8))


def test_masks_are_no_ids():
    bank = ExpertBank(2, 8, 8)
    for mask in ([True, False], torch.tensor([True, False])):
        with pytest.raises(ValueError, match=r"ids: got the mask .* where it is True"):
            bank.for_task(mask)
    with pytest.raises(ValueError, match=r"num_experts: got 2.5, expected a whole number, at least 1"):
        ExpertBank(2.5, 8, 8)


@pytest.mark.parametrize("mode", ["copy", "table"])
def test_subsets_made_in_inference_mode_outlive_it(mode):
    bank = ExpertBank(4, 8, 8)
    with torch.inference_mode():
        subset = bank.for_task([0, 1], mode)
    logits = torch.randn(3, 2)
    subset(torch.randn(3, 8), Routing(*logits.softmax(-1).topk(1), logits, task=0)).sum().backward()
    assert (bank if mode == "table" else subset).w1.grad.any()
    if mode == "table":
        subset.switch([2, 3])
