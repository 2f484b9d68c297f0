"""Contracts of the field-wise and entire-space models for tables; and what DTRN and APEM compute, written out."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_mtl import create_model, extract, load, save
from moe_mtl.tasks import Task
from moe_mtl.testing import assert_matches

COLUMNS = [
    {"name": "x", "kind": "vector", "size": 5},
    {"name": "age", "kind": "numeric", "mean": 1.0, "std": 2.0, "edges": [0, 1, 2], "has_missing": True},
    {"name": "job", "kind": "categorical", "categories": ["a", "b", "c"]},
    {"name": "tags", "kind": "multihot", "categories": ["p", "q", "r"]},
]
MIXED = (
    Task.binary("click"),
    Task.regression("time", mean=3.0, std=2.0),
    Task.classification("kind", 3),
    Task.multilabel("marks", 2),
    Task.regression("place", 2),
)
CHAIN = (Task.binary("click"), Task.binary("conversion", weight=0), Task.binary("both"))
STEPS = (*CHAIN, Task.binary("again"))
SHAPES = {"time": (), "kind": (3,), "marks": (2,), "place": (2,)}
FIELDS = {"embedding_dim": 4, "dropout": 0.0, "tower": [6]}
# case: model, tasks, options
CASES = {
    "esmm": ("esmm_table", CHAIN, {"embedding_dim": 3, "tower": [6, 4]}),
    "esmm_experts": ("esmm_table", CHAIN, {"embedding_dim": 3, "tower": [6], "experts": 3, "widths": [8]}),
    "aitm": ("aitm_table", STEPS, {"embedding_dim": 3, "tower": [6, 4]}),
    "aitm_experts": ("aitm_table", STEPS, {"embedding_dim": 3, "tower": [6], "experts": 3, "widths": [8]}),
    "multitab": ("multitab_table", MIXED, {**FIELDS, "heads": 2, "hidden": 8}),
    "multitab_deep": ("multitab_table", MIXED, {**FIELDS, "heads": 2, "hidden": 8, "blocks": 2}),
    "dtrn": ("dtrn_table", MIXED, {**FIELDS, "task_dim": 3, "bottleneck": 5, "widths": [8]}),
    "apem": ("apem_table", MIXED, {**FIELDS, "task_dim": 3, "bottleneck": 5, "widths": [8], "hidden": 6, "heads": 2}),
}
every_model = pytest.mark.parametrize("case", CASES)


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


def label(task, b, seed=2):
    g = torch.Generator().manual_seed(seed + sum(map(ord, task.name)))
    if task.kind == "classification":
        return torch.randint(0, task.channels, (b,), generator=g)
    shape = (b,) if task.is_scalar else (b, task.channels)
    draw = torch.randn(shape, generator=g)
    return draw if task.kind == "regression" else (draw > 0).float()


def make(case, seed=0, **overrides):
    name, tasks, options = CASES[case]
    torch.manual_seed(seed)
    model = create_model(name, tasks=tasks, columns=COLUMNS, **{**options, **overrides}).eval()
    with torch.no_grad():  # nothing at a special value, such as a zero bias
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def loss(model, x, tasks=None, weighted=False):
    known, b = {task.name: task for task in model.tasks}, len(x["vector"])
    return sum(
        (known[name].weight if weighted else 1) * known[name].compute_loss(p, label(known[name], b))
        for name, p in model(x, tasks=tasks).items()
    )


def names_of(case):
    return [task.name for task in CASES[case][1]]


@every_model
def test_shapes_and_every_parameter_learns_from_the_tasks_that_have_a_weight(case):
    model, x = make(case).train(), rows(64)
    predictions, routings = model(x, return_routing=True)
    assert {n: tuple(p.shape) for n, p in predictions.items()} == {n: (64, *SHAPES.get(n, ())) for n in names_of(case)}
    assert set(routings) == set(model.moe_layers) == ({"level.0"} if case.endswith("experts") else set())
    loss(model, x, weighted=True).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [n for n, p in model.named_parameters() if not p.grad.any()] == []


@every_model
def test_some_tasks_are_a_slice_of_all_and_extract_alike(case):
    model, x, names = make(case).double(), rows(dtype=torch.float64), names_of(case)
    full = model(x)
    for tasks in (*([name] for name in names), [names[-1], names[0]], [names[1], names[2]]):
        some, small = model(x, tasks=tasks), model.for_tasks(tasks)
        assert list(some) == list(small(x)) == tasks
        for task in tasks:
            torch.testing.assert_close(some[task], full[task], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(small(x)[task], full[task], rtol=1e-12, atol=1e-12)
        theirs = {p.data_ptr() for p in model.parameters()}
        assert not theirs & {p.data_ptr() for p in small.parameters()}


@every_model
def test_a_task_alone_holds_and_reads_only_what_it_needs(case):
    model, x = make(case), rows()
    for name in names_of(case):
        trained = copy.deepcopy(model)
        loss(trained, rows(64), [name]).backward()
        needed = {n: p.grad is not None for n, p in trained.named_parameters()}
        before, random_state = model(x, tasks=[name])[name], torch.get_rng_state()
        small = model.for_tasks(name)
        assert torch.equal(torch.get_rng_state(), random_state)
        held = sum(p.numel() for p in small.parameters())
        assert held == sum(p.numel() for n, p in model.named_parameters() if needed[n])
        broken = copy.deepcopy(model)
        with torch.no_grad():
            for n, parameter in broken.named_parameters():
                if not needed[n]:
                    parameter.fill_(torch.nan)
        assert torch.equal(broken(x, tasks=[name])[name], before)
        assert any(p.isnan().any() for p in broken.parameters()) or name == names_of(case)[-1]


@every_model
def test_one_task_costs_less(case):
    model, x = make(case), rows()

    def flops(**how):
        with FlopCounterMode(display=False) as counter:
            model(x, **how)
        return counter.get_total_flops()

    assert flops(tasks=["click"]) < flops()


@every_model
def test_one_task_per_sample(case):
    model, x, names = make(case), rows(), names_of(case)
    ids = torch.tensor([2, 0, 1, 1, 0, 2, 2, 1, 0, 0, 1, 2])
    predictions, routings = model(x, tasks=ids, return_routing=True)
    full = model(x)
    assert list(predictions) == names[:3]
    for i, task in enumerate(names[:3]):
        own, prediction = predictions[task]
        assert own.tolist() == (ids == i).nonzero().flatten().tolist()
        torch.testing.assert_close(prediction, full[task][own])
    assert all(key.split("/")[0] in names for key in routings)


@every_model
def test_a_batch_of_one_is_a_row_of_a_batch(case):
    model, x = make(case), rows()
    alone = model({kind: t[:1] for kind, t in x.items()})
    for task, prediction in model(x).items():
        torch.testing.assert_close(alone[task], prediction[:1])
    model.train()({kind: t[:1] for kind, t in x.items()})


@every_model
def test_saved_and_loaded_whole_and_extracted(case, tmp_path):
    model, x, names = make(case), rows(), names_of(case)
    again = load(save(model, tmp_path / "all"))
    assert all(torch.equal(again(x)[task], p) for task, p in model(x).items())
    for i, name in enumerate(names):
        small = extract(extract(model, [names[2], name]) if i != 2 else model, name)
        again = load(save(small, tmp_path / name))
        assert torch.equal(again(x)[name], small(x)[name])
        torch.testing.assert_close(again(x)[name], model(x)[name])


@every_model
def test_float32_errs_no_more_than_plain_torch(case):
    model = make(case)
    oracle = copy.deepcopy(model).double()(rows(dtype=torch.float64))
    alone = {name: model(rows(), tasks=[name])[name] for name in names_of(case)}
    for task, prediction in model(rows()).items():
        assert_matches(alone[task], oracle[task], prediction, task)


@every_model
def test_exported_for_any_number_of_rows(case):
    small = make(case).for_tasks(names_of(case)[2])
    batch = torch.export.Dim("b", min=1)
    program = torch.export.export(small, (rows(3),), dynamic_shapes=({kind: {0: batch} for kind in rows(3)},))
    for b in (1, 2, 7):
        torch.testing.assert_close(program.module()(rows(b)), small(rows(b)))


@every_model
def test_what_does_not_fit_is_refused(case):
    model, (name, tasks, options) = make(case), CASES[case]
    with pytest.raises(ValueError, match=r"^x: got Tensor, expected rows"):
        model(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"^tasks: unknown task 'clik'; did you mean 'click'"):
        model(rows(), tasks=["clik"])
    with pytest.raises(ValueError, match=r"^columns: got none"):
        create_model(name, tasks=tasks)
    with pytest.raises(ValueError, match=r"^tasks: 'depth' of kind depth needs|^tasks: got|^tasks: 'depth' is of kind"):
        create_model(name, tasks=[Task.depth()], columns=COLUMNS, **options)


@pytest.mark.parametrize("case", ["esmm_experts", "aitm_experts"])
def test_experts_below_the_towers_are_pruned_and_any_gate_serves(case):
    model, x = make(case, gate="exclusive", experts=8), rows()
    small = extract(model, "click")
    (layer,) = small.moe_layers.values()
    assert len(layer.kept_experts) < 8
    torch.testing.assert_close(small(x)["click"], model(x)["click"])
    # blocks of routing are those of the tasks that read a stage alone; where there is none, of the first that needs it
    stages = {"esmm_experts": (0, 1), "aitm_experts": (0, 2, 3)}[case]
    assert model(x, return_routing=True)[1]["level.0"].task == stages
    both = model.for_tasks("both")
    torch.testing.assert_close(both(x)["both"], model(x)["both"])
    assert set(both(x, return_routing=True)[1]["level.0"].task) == {0}


# ---- DTRN and APEM, written out -------------------------------------------------------------------------------------


def top(model, fields, t):
    """The shared MLP and the tower of task t."""
    mlp, towers = model.trunk.mlp, model.towers
    h = (fields.flatten(1) @ mlp.weight[0][0].T + mlp.bias[0][0]).relu()
    h = (h @ towers.layers[0].weight[t].T + towers.layers[0].bias[t]).relu()
    return h @ towers.out.weight[t].T + towers.out.bias[t]


def shaped(task, out):
    out = out * task.std + task.mean if task.kind == "regression" else out
    return out[:, 0] if task.is_scalar else out


class TestDTRN:
    def test_the_formula(self):
        model, x = make("dtrn").double(), rows(dtype=torch.float64)
        e, refine = model.encoder(x), model.trunk.refine
        for t, task in enumerate(MIXED):
            made = (refine.maker.weight @ refine.embeddings[t] + refine.maker.bias).view(4, 4)
            v = torch.stack([torch.stack([field + field @ made for field in row]) for row in e])
            s = v.sum(-1) / 4
            hidden = (s @ refine.squeeze.layers[0].weight[t].T + refine.squeeze.layers[0].bias[t]).relu()
            z = hidden @ refine.excite.weight[t].T + refine.excite.bias[t]
            fields = torch.stack([v[:, i] * (2 / (1 + (-z[:, [i]]).exp())) for i in range(4)], dim=1)
            torch.testing.assert_close(model(x)[task.name], shaped(task, top(model, fields, t)), rtol=1e-10, atol=1e-10)

    def test_weights_by_hand(self):
        # one field of one number, e = 3; u = 0 leaves the map its bias 1, so v = 3 + 3 = 6. The net's weights are 1,
        # its biases 0 and -6 + log 3: 2 sigma(log 3) = 2 * 3/4, and 6 * 3/2 = 9.
        from moe_mtl.models.dtrn import TaskFields

        fields = TaskFields(1, 1, 1, 2, 1)
        with torch.no_grad():
            fields.embeddings[0].zero_()
            fields.maker.bias.fill_(1)
            fields.squeeze.layers[0].weight[0].fill_(1)
            fields.excite.weight[0].fill_(1)
            fields.excite.bias[0].fill_(-6 + 1.0986122887)
        torch.testing.assert_close(fields(torch.full((1, 1, 1), 3.0), [0]), torch.full((1, 1, 1, 1), 9.0))


class TestAPEM:
    def test_the_selector_written_out(self):
        model, x = make("apem", blocks=0).double(), rows(dtype=torch.float64)
        e, refine = model.encoder(x), model.trunk.refine
        for t, task in enumerate(MIXED):
            s = e.sum(-1) / 4
            hidden = s @ refine.squeeze.weight.T + refine.squeeze.bias + refine.ask.weight @ refine.indicators[t]
            z = hidden.relu() @ refine.excite.weight.T + refine.excite.bias
            fields = e * (2 / (1 + (-z).exp())).unsqueeze(-1)
            torch.testing.assert_close(model(x)[task.name], shaped(task, top(model, fields, t)), rtol=1e-10, atol=1e-10)

    def test_fields_interact_through_the_blocks_only(self):
        # without blocks the vector of a field leaves the others but for a weight; with one their directions change
        for blocks, apart in ((0, True), (1, False)):
            model = make("apem", blocks=blocks)
            e = model.encoder(rows())
            other = torch.cat([e[:, :3], e[:, 3:] + torch.randn(12, 1, 4)], dim=1)
            a, b = (torch.nn.functional.normalize(model.trunk.refine(z, [0])[0, :, 0], dim=-1) for z in (e, other))
            assert torch.allclose(a, b, atol=1e-5) == apart

    def test_set_blocks_do_not_care_for_the_order_of_the_vectors_they_read(self):
        (block,) = make("apem").trunk.refine.blocks
        x = torch.randn(2, 4, 4)
        order = [2, 0, 3, 1]
        induced = block.induced.expand(2, -1, -1)
        torch.testing.assert_close(block.gather(induced, x[:, order]), block.gather(induced, x))
        seen = block.gather(induced, x)
        torch.testing.assert_close(block.spread(x, seen)[:, order], block.spread(x[:, order], seen))

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"heads": 3}, "heads: 3 do not divide the width 4"),
            ({"blocks": -1}, "^blocks: got -1"),
            ({"induced": 0}, "^induced: got 0"),
            ({"bottleneck": 0}, "^bottleneck: got 0"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            make("apem", **options)
