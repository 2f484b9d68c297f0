"""Contracts of every model for tables: tasks alone, extraction, saving, gradients, and what each family is made of."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_mtl import create_model, extract, load, save
from moe_mtl.models.home import FeatureGates
from moe_mtl.tasks import Task
from moe_mtl.testing import assert_matches

TASKS = (Task.binary("click"), Task.regression("time", mean=3.0, std=2.0), Task.classification("kind", 3))
NAMES = [task.name for task in TASKS]
COLUMNS = [
    {"name": "x", "kind": "vector", "size": 5},
    {"name": "age", "kind": "numeric", "mean": 1.0, "std": 2.0, "edges": [0, 1, 2], "has_missing": True},
    {"name": "job", "kind": "categorical", "categories": ["a", "b", "c"]},
    {"name": "tags", "kind": "multihot", "categories": ["p", "q", "r"]},
]
SMALL = {"columns": COLUMNS, "tower": [6], "embedding_dim": 3}
DENSE = ("shared_bottom_table", "single_task_table")
BUILT_FROM_LEVELS = ("adatt", "cgc", "dselect_k", "home", "mmoe", "mmoeex", "ple")
MODELS = [*(f"{family}_table" for family in BUILT_FROM_LEVELS), *DENSE]
ROUTED = [name for name in MODELS if name not in DENSE]
every_model = pytest.mark.parametrize("name", MODELS)
every_routed_model = pytest.mark.parametrize("name", ROUTED)


def rows(b=12, seed=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    age = torch.randn(b, 1, generator=g)
    age[0] = torch.nan
    return {
        "vector": torch.randn(b, 5, generator=g).to(dtype),
        "numeric": age.to(dtype),
        "categorical": torch.randint(0, 4, (b, 1), generator=g),
        "multihot": torch.randint(0, 2, (b, 3), generator=g).to(dtype),
    }


def labels(b=12, seed=2):
    g = torch.Generator().manual_seed(seed)
    return {
        "click": torch.randint(0, 2, (b,), generator=g).float(),
        "time": torch.randn(b, generator=g),
        "kind": torch.randint(0, 3, (b,), generator=g),
    }


def make(name, tasks=TASKS, seed=0, **overrides):
    torch.manual_seed(seed)
    model = create_model(name, tasks=tasks, **{**SMALL, "widths": [8], **overrides}).eval()
    with torch.no_grad():  # nothing at a special value, such as a zero bias or an identity gate
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def loss(model, x, y, tasks=None):
    known = {task.name: task for task in model.tasks}
    return sum(known[name].compute_loss(p, y[name]) for name, p in model(x, tasks=tasks).items())


@every_model
def test_shapes_routing_and_every_parameter_learns(name):
    model = make(name).train()
    x, y = rows(64), labels(64)
    predictions, routings = model(x, return_routing=True)
    assert {n: tuple(p.shape) for n, p in predictions.items()} == {"click": (64,), "time": (64,), "kind": (64, 3)}
    assert set(routings) == set(model.moe_layers) if name not in DENSE else routings == {}
    loss(model, x, y).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [n for n, p in model.named_parameters() if not p.grad.any()] == []


@every_model
@pytest.mark.parametrize("tasks", [["time"], ["kind", "click"]], ids=["one", "two"])
def test_some_tasks_are_a_slice_of_all_and_extract_alike(name, tasks):
    model, x = make(name).double(), rows(dtype=torch.float64)
    full, some = model(x), model(x, tasks=tasks)
    assert list(some) == tasks
    small = extract(model, tasks)
    for task in tasks:
        torch.testing.assert_close(some[task], full[task], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(small(x)[task], full[task], rtol=1e-12, atol=1e-12)
    theirs = {p.data_ptr() for p in model.parameters()}
    assert not theirs & {p.data_ptr() for p in small.parameters()}
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@every_model
def test_extraction_holds_no_parameter_that_the_task_does_not_need(name):
    model, x = make(name).train(), rows(64)
    loss(model, x, labels(64), ["time"]).backward()
    needed = sum(p.numel() for p in model.parameters() if p.grad is not None and p.grad.any())
    small = extract(model, "time")
    held = sum(p.numel() for p in small.parameters())
    # rows of stacked experts that the task cannot reach have zero gradients; routers keep their rows for such experts
    gates = sum(p.numel() for n, p in small.named_parameters() if ".gate." in n or ".own." in n)
    stacks = [level.experts for level in getattr(small, "moe_layers", {}).values()]
    unreached = sum(
        int((~p.grad.flatten(1).any(dim=1)).sum()) * p[0].numel()
        for level in getattr(model, "moe_layers", {}).values()
        for p in level.experts.parameters()
        if p.grad is not None
    )
    assert held <= needed + gates
    assert unreached > 0 or not any(len(s.weight[0]) < 8 for s in stacks) or name.startswith("adatt")


@every_model
def test_nan_in_everything_a_task_does_not_need_changes_nothing(name):
    model, x = make(name), rows()
    before = model(x, tasks=["time"])["time"]
    trained = copy.deepcopy(model).train()
    loss(trained, rows(64), labels(64), ["time"]).backward()
    poisoned = 0
    with torch.no_grad():
        for parameter, twin in zip(model.parameters(), trained.parameters(), strict=True):
            if twin.grad is None:  # not even read
                parameter.fill_(torch.nan)
                poisoned += parameter.numel()
        for level in getattr(model, "moe_layers", {}).values():
            stream = NAMES.index("time")
            if level.streams == tuple(range(len(NAMES))):  # the last level: experts no gate of the task can reach
                others = sorted(set(range(level.gate.num_experts)) - set(level.needed([stream])))
                for parameter in level.experts.parameters():
                    parameter[others] = torch.nan
    assert poisoned > 0
    assert torch.equal(model(x, tasks=["time"])["time"], before)


@every_model
def test_one_task_costs_less(name):
    model, x = make(name), rows()

    def flops(**how):
        with FlopCounterMode(display=False) as counter:
            model(x, **how)
        return counter.get_total_flops()

    assert flops(tasks=["time"]) < flops(tasks=["time", "kind"]) < flops()


@every_model
def test_one_task_per_sample(name):
    model, x = make(name), rows()
    ids = torch.tensor([2, 0, 1, 1, 0, 2, 2, 1, 0, 0, 1, 2])
    predictions, routings = model(x, tasks=ids, return_routing=True)
    full = model(x)
    for i, task in enumerate(NAMES):
        own, prediction = predictions[task]
        assert own.tolist() == (ids == i).nonzero().flatten().tolist()
        torch.testing.assert_close(prediction, full[task][own])
    assert all(key.split("/")[0] in NAMES for key in routings)
    with pytest.raises(ValueError, match=r"^tasks: ids 0 to 3"):
        model(x, tasks=ids + (ids == 2).long())


@every_model
def test_a_batch_of_one_is_a_row_of_a_batch(name):
    model, x = make(name), rows()
    alone = model({kind: t[:1] for kind, t in x.items()})
    for task, prediction in model(x).items():
        torch.testing.assert_close(alone[task], prediction[:1])


@every_model
def test_saved_and_loaded_whole_and_extracted(name, tmp_path):
    model, x = make(name), rows()
    again = load(save(model, tmp_path / "all"))
    assert all(torch.equal(again(x)[task], p) for task, p in model(x).items())
    small = extract(extract(model, ["kind", "time"]), "time")
    again = load(save(small, tmp_path / "one"))
    assert torch.equal(again(x)["time"], small(x)["time"])
    torch.testing.assert_close(again(x)["time"], model(x)["time"])


@every_routed_model
def test_training_one_task_moves_no_other_tasks_own_parameters(name):
    model, x, y = make(name).train(), rows(), labels()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    loss(model, x, y).backward()
    optimizer.step()
    before = {n: p.clone() for n, p in model.named_parameters() if "towers" in n or "level.gate" in n}
    optimizer.zero_grad(set_to_none=True)
    loss(model, x, y, ["time"]).backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert moved
    assert {n.split(".")[-1] for n in moved} == {str(NAMES.index("time"))}


@every_routed_model
@pytest.mark.parametrize("tasks", [TASKS[:1], TASKS])
def test_sizes_at_the_edge(name, tasks):
    families = {"mmoe": "experts", "dselect": "experts", "mmoeex": "experts"}
    option = families.get(name.split("_")[0])
    for experts in (3, 1) if option and not name.startswith("mmoeex") else (None,):
        how = {} if experts is None else {option: experts, **({"k": 1} if name.startswith("dselect") else {})}
        model = make(name, tasks, **how)
        assert all(p.isfinite().all() for p in model(rows()).values())


@every_model
def test_what_does_not_fit_is_refused(name):
    model = make(name)
    with pytest.raises(ValueError, match=r"^x: got Tensor, expected rows"):
        model(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"^x\['vector'\]: got \[12, 4\], expected \[b, 5\]"):
        model({**rows(), "vector": torch.randn(12, 4)})
    with pytest.raises(ValueError, match=r"column 'job' has ids 0 to 9, expected 0 \(unseen\) to 3"):
        model({**rows(), "categorical": torch.tensor([[9], *[[0]] * 11])})
    with pytest.raises(ValueError, match=r"^tasks: unknown task 'tim'; did you mean 'time'"):
        model(rows(), tasks=["tim"])
    with pytest.raises(ValueError, match=r"^columns: got none"):
        create_model(name, tasks=TASKS)
    with pytest.raises(ValueError, match=r"^tasks: 'depth' of kind depth needs an image"):
        create_model(name, tasks=[Task.depth()], **SMALL)


class TestMMoE:
    def test_the_formula(self):
        model, x = make("mmoe_table", experts=3).double(), rows(dtype=torch.float64)
        v = model.encoder(x)
        level = model.moe_layers["level.0"]
        experts = [(v @ level.experts.weight[0][e].T + level.experts.bias[0][e]).relu() for e in range(3)]
        for t, task in enumerate(NAMES):
            router = level.gate.router
            g = (v @ router.weight[t].T + router.bias[t]).softmax(-1)
            y = sum(g[:, [e]] * experts[e] for e in range(3))
            (layer,) = model.towers.layers
            hidden = (y @ layer.weight[t].T + layer.bias[t]).relu()
            out = hidden @ model.towers.out.weight[t].T + model.towers.out.bias[t]
            expected = {"click": out[:, 0], "time": 3 + 2 * out[:, 0], "kind": out}[task]
            torch.testing.assert_close(model(x)[task], expected, rtol=1e-10, atol=1e-10)

    def test_float32_errs_no_more_than_plain_torch(self):
        model = make("mmoe_table")
        oracle = copy.deepcopy(model).double()(rows(dtype=torch.float64))
        for task, prediction in model(rows()).items():
            assert_matches(prediction, oracle[task], model(rows())[task], task)

    def test_any_gate_serves(self):
        for gate in ("noisy_topk", "task_embedding", "assigned", "dselect_k", "exclusive", "sigmoid", "task_blind"):
            k = None if gate in ("exclusive", "sigmoid") else 2
            model, x = make("mmoe_table", gate=gate, k=k, experts=6), rows()
            full, one = model(x), extract(model, "kind")
            torch.testing.assert_close(one(x)["kind"], full["kind"])


class TestPLE:
    def test_the_shared_gate_reaches_every_expert(self):
        # L = 2, 3 tasks, 2 private experts each and 1 shared: the shared stream of level 1 mixes all 7
        model = make("ple_table", private=2, shared=1)
        first, last = model.moe_layers.values()
        assert first.streams == (0, 1, 2, 3)
        assert first.gate.reachable(3) == tuple(range(7))
        assert first.gate.reachable(1) == (2, 3, 6)
        assert last.streams == (0, 1, 2)  # no shared output at the end
        assert last.sources == (0, 0, 1, 1, 2, 2, 3)
        z, _ = first(model.encoder(rows()), [3])
        z.square().sum().backward()
        assert first.experts.weight[0].grad.flatten(1).any(dim=1).all()

    def test_one_task_needs_all_lower_experts_but_its_own_last_ones_only(self):
        small = extract(make("ple_table", private=2, shared=1), "time")
        first, last = small.moe_layers.values()
        assert (first.kept_experts, last.kept_experts) == (list(range(7)), [2, 3, 6])
        assert (first.streams, last.streams) == ((1, 3), (1,))

    def test_three_levels_need_the_streams_of_every_task_below(self):
        model = make("ple_table", levels=3)
        assert model.trunk.plan([0]) == [[0, 1, 2, 3], [0, 3], [0]]

    def test_cgc_by_hand(self):
        # one level, 1 private expert per task and 1 shared: task 1 mixes experts 1 and 3 alone
        model, x = make("cgc_table", private=1, shared=1).double(), rows(dtype=torch.float64)
        v, level = model.encoder(x), model.moe_layers["level.0"]
        f = {e: (v @ level.experts.weight[0][e].T + level.experts.bias[0][e]).relu() for e in (1, 3)}
        g = (v @ level.gate.router.weight[1][[1, 3]].T + level.gate.router.bias[1][[1, 3]]).softmax(-1)
        expected = g[:, [0]] * f[1] + g[:, [1]] * f[3]
        torch.testing.assert_close(level(v, [1])[0][0], expected, rtol=1e-10, atol=1e-10)

    def test_adatt_adds_a_tasks_own_experts(self):
        # with the fusion gate on expert 6 (shared) alone, what is left of task 0 is its own experts' mixture on top
        model, x = make("adatt_table", levels=1, shared=2).double(), rows(dtype=torch.float64)
        v, level = model.encoder(x), model.moe_layers["level.0"]
        with torch.no_grad():
            level.gate.router.weight[0].zero_()
            level.gate.router.bias[0].copy_(torch.tensor([0.0] * 6 + [1000.0, 0.0]))
        z = level.experts(v)
        a = (v @ level.own.router.weight[0][:2].T + level.own.router.bias[0][:2]).softmax(-1)
        expected = z[:, 6] + a[:, [0]] * z[:, 0] + a[:, [1]] * z[:, 1]
        torch.testing.assert_close(level(v, [0])[0][0], expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize(
        "options, message",
        [({"levels": 0}, "levels"), ({"private": 0, "shared": 0}, "private"), ({"fusion": "x"}, "fusion")],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            make("ple_table", **options)


CATEGORIES = [["click", "kind"], ["time"]]


class TestHoME:
    def test_feature_gates_start_as_the_identity(self):
        gates, x = FeatureGates(3, 5, 2), torch.randn(4, 5)
        assert torch.equal(gates(x), x.expand(3, 4, 5))

    def test_feature_gates_by_hand(self):
        # x = (1, 2), A = (1, 1), B = (log 3, 0): x A = 3, 2 sigma(3 log 3) = 2 * 27/28, 2 sigma(0) = 1.
        gates = FeatureGates(1, 2, 1)
        with torch.no_grad():
            gates.down.copy_(torch.ones(1, 1, 2))
            gates.up.copy_(torch.tensor([[[1.0986122887], [0.0]]]))
        torch.testing.assert_close(gates(torch.tensor([[1.0, 2.0]])), torch.tensor([[[27 / 14, 2.0]]]))

    def test_the_hierarchy_mask(self):
        model = make("home_table", categories=CATEGORIES)
        first, second = model.moe_layers.values()
        # level 1: categories 0 and 1 with 2 experts each (0 1, 2 3), then 4 shared ones; the shared stream sees all
        assert first.gate.reachable(0) == (0, 1, 4, 5, 6, 7)
        assert first.gate.reachable(1) == (2, 3, 4, 5, 6, 7)
        assert first.gate.reachable(2) == tuple(range(8))
        # level 2: 2 common (0 1), categories (2 3, 4 5), then one per task (6, 7, 8); time is of category 1
        assert second.gate.reachable(0) == (0, 1, 2, 3, 6)
        assert second.gate.reachable(1) == (0, 1, 4, 5, 7)
        assert second.own.reachable(2) == (8,)
        assert second.sources == (0, 0, 1, 1, 2, 2, 3, 4, 5)

    def test_one_task_leaves_the_other_category_out(self):
        model, x = make("home_table", categories=CATEGORIES), rows()
        small = extract(model, "time")
        torch.testing.assert_close(small(x)["time"], model(x)["time"])
        assert small.trunk.first.streams == (1, 2)
        assert small.moe_layers["level.1"].kept_experts == [0, 1, 4, 5, 7]
        assert len(small.trunk.gates[1].down) == 3  # common, its category, the task

    def test_experts_are_normalised_over_the_batch_and_not_in_evaluation(self):
        model, x = make("home_table").train(), rows(64)
        model(x)
        stack = model.moe_layers["level.0"].experts
        assert stack.running_mean_0.abs().max() > 0
        model.eval()
        one = {kind: t[:1] for kind, t in x.items()}
        torch.testing.assert_close(model(one)["time"], model(x)["time"][:1])
        with pytest.raises(ValueError, match="batch norm needs two rows, or take norm='layer'"):
            model.train()(one)
        make("home_table", norm="layer").train()(one)

    @pytest.mark.parametrize(
        "categories, message",
        [
            ([["click"], ["time"]], "every task"),
            ([["click", "kind", "tme"]], "did you mean 'time'"),
            ([NAMES, []], "empty"),
        ],
    )
    def test_bad_categories(self, categories, message):
        with pytest.raises(ValueError, match=message):
            make("home_table", categories=categories)


def test_extracted_experts_of_batch_norm_keep_their_statistics():
    model, x = make("home_table").train(), rows(64)
    for _ in range(3):
        model(x, tasks=["time"])
        model(x)
    model.eval()
    torch.testing.assert_close(extract(model, "time")(x)["time"], model(x)["time"])


def test_exclusive_experts_are_dealt_evenly_and_saved_with_the_model(tmp_path):
    model = make("mmoeex_table")
    gate = model.moe_layers["level.0"].gate
    seen = [set(gate.reachable(t)) for t in range(3)]
    common = set.intersection(*seen)
    assert len(common) == 3  # 12 experts, 9 of them of one task
    assert [len(s - common) for s in seen] == [3, 3, 3]
    again = load(save(extract(model, "kind"), tmp_path))
    assert again.moe_layers["level.0"].kept_experts == sorted(seen[2])
