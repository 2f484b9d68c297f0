"""Pruning: how far, which experts go first, what that costs; and extraction with calibration, for every family."""

import copy
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from moe_mtl import create_model, extract, load, prune, save, thinning
from moe_mtl.cost import count_parameters
from moe_mtl.distilling import difference
from moe_mtl.scoring import TaskMetrics
from moe_mtl.sparse import keep_experts
from moe_mtl.tasks import Task
from moe_mtl.thinning import fewest, thin
from tests.test_encoders import encoder, texts
from tests.test_sparse import LAYERS, E, K, agree, images, kept, tiny, used
from tests.test_table_models import BUILT_FROM_LEVELS, labels, make, rows


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def samples(count=6):
    g = torch.Generator().manual_seed(3)
    return [
        {"image": image, "scene": i % 3, "tilt": float(torch.randn((), generator=g)), "depth": None}
        for i, image in enumerate(images(count, seed=5))
    ]


# ---- how far --------------------------------------------------------------------------------------------------------


def test_mass_by_usage_is_extraction_with_calibration():
    model, x = tiny(shun=True), images()
    before = state(model)
    ours, theirs = prune(model, ["tilt", "scene"], [x], mass=0.3), extract(model, ["tilt", "scene"], [x], mass=0.3)
    assert kept(ours) == kept(theirs) and any(len(ids) < E - 1 for ids in kept(ours).values())
    assert ours.extraction.layers == theirs.extraction.layers
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())  # the model is as it was
    shares = ours.extraction.layers["blocks.1"].mass_by_task["scene"]
    expected = used(model, x, ["scene"])["blocks.1"][0]
    torch.testing.assert_close(torch.tensor(shares).double(), expected / expected.sum(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("tasks", [["depth"], ["scene", "depth"]], ids=["one", "two"])
def test_so_many_experts_are_left_and_they_are_those_most_used(tasks):
    model, x = tiny(), images()
    mass = {name: (m / m.sum(1, keepdim=True)).amax(0) for name, m in used(model, x, tasks).items()}
    small = prune(model, tasks, [x], experts=3)
    for name, ids in kept(small).items():
        assert ids == sorted(mass[name].topk(3).indices.tolist())
    assert kept(prune(model, tasks, [x], experts=np.int64(3))) == kept(small)
    some = prune(model, tasks, [x], experts={"blocks.1": 1})
    assert kept(some) == {"blocks.0": list(range(E)), "blocks.1": [int(mass["blocks.1"].argmax())]}
    assert some.moe_layers["blocks.1"].gate.k == 1 and some(x)[tasks[0]].isfinite().all()


@pytest.mark.parametrize("by", ["usage", "output"])
def test_a_budget_is_met_and_no_expert_more_than_needed_goes(by):
    model, x = tiny(), images()
    whole = count_parameters(extract(model, "depth"))
    each = sum(p[0].numel() for p in model.moe_layers["blocks.0"].experts.parameters())
    for budget, target in ((0.7, 0.7 * whole), (whole - each, whole - each), (1.0, whole)):
        small = prune(model, "depth", [x], budget=budget, by=by)
        report = small.extraction
        assert report.parameters == count_parameters(small) <= target < count_parameters(small) + each
        assert report.whole == whole and report.by == by
    smallest = whole - 2 * (E - 1) * each
    assert [len(ids) for ids in kept(prune(model, "depth", [x], budget=smallest, by=by)).values()] == [1, 1]
    with pytest.raises(ValueError, match=f"^budget: got {smallest - 1}, .* has {smallest:,}, .* of the {whole:,}"):
        prune(model, "depth", [x], budget=smallest - 1, by=by)


@pytest.mark.parametrize("gate", ["assigned", "dselect_k", "task_level"])
def test_a_budget_is_of_what_extraction_leaves_where_gates_go_too(gate):
    model, x = tiny(gate), images()
    whole = count_parameters(extract(model, "depth"))
    bank = model.moe_layers["blocks.0"].experts
    each = sum(p[0].numel() for p in (bank.w1, bank.b1, bank.w2))
    assert prune(model, "depth", [x], budget=1.0).extraction.whole == whole
    report = prune(model, "depth", [x], budget=whole - 1).extraction
    assert (report.whole, report.parameters) == (whole, whole - each)  # one expert, without the bias that all share
    with pytest.raises(ValueError, match=f"of the {whole:,} that extract leaves"):
        prune(model, "depth", [x], budget=1)


def test_by_usage_the_least_used_of_all_layers_go_first():
    model, x = tiny(), images()
    mass = {name: (m / m.sum(1, keepdim=True)).amax(0) for name, m in used(model, x, ["tilt"]).items()}
    order = sorted((float(share), layer, e) for layer, shares in mass.items() for e, share in enumerate(shares))
    each = sum(p[0].numel() for p in model.moe_layers["blocks.0"].experts.parameters())
    small = prune(model, "tilt", [x], budget=count_parameters(extract(model, "tilt")) - 5 * each)
    gone = {(layer, e) for layer in LAYERS for e in range(E) if e not in kept(small)[layer]}
    assert gone == {(layer, e) for _, layer, e in order[:5]}


def test_by_output_what_changes_the_layer_least_goes_first():
    model, x = tiny("softmax"), images()
    with torch.no_grad():
        for layer in model.moe_layers.values():
            layer.gate.router.bias[0][3] = 2.0  # used by far the most ...
            layer.experts.w2[3] *= 1e-3  # ... to add next to nothing
            layer.experts.b2[3] *= 1e-3
    assert all(3 in ids for ids in kept(prune(model, "depth", [x], experts=1)).values())
    assert all(ids == [0, 1, 2, 4, 5, 6] for ids in kept(prune(model, "depth", [x], experts=6, by="output")).values())


@torch.no_grad()
def test_the_rule_by_output_step_by_step():
    model, x, name = tiny("softmax"), images(), "blocks.0"
    layer, seen = model.moe_layers[name], []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x, tasks=["tilt"])
    hook.remove()
    whole, left = layer(seen[0], 2)[0], list(range(E))
    for _ in range(3):
        change = {}
        for e in left:
            trial = copy.deepcopy(layer)
            trial.keep_experts([other for other in left if other != e])
            change[e] = float((trial(seen[0], 2)[0] - whole).square().sum())
        left.remove(min(change, key=change.__getitem__))
    assert kept(prune(model, "tilt", [x], experts={name: E - 3}, by="output"))[name] == left
    usage = kept(prune(model, "tilt", [x], experts={name: E - 3}))[name]
    assert usage != left  # or the test could not tell the rules apart


# ---- no token without an expert -------------------------------------------------------------------------------------


def test_every_task_keeps_an_expert():
    table = [[0, 1], [1, 2], [3, 4], [5, 6]]
    model, x = tiny("assigned", gate_args={"assignment": table}), images()
    names = ["depth", "scene", "tilt"]
    for by in ("usage", "output"):
        small = prune(model, names, [x], experts=2, by=by)
        for ids in kept(small).values():  # expert 1 serves both depth and scene
            assert 1 in ids and len(ids) == 2 and {3, 4} & set(ids)
        for routing in small(x, return_routing=True)[1].values():
            assert routing.weights.sum(1).min() > 0
    with pytest.raises(ValueError, match=r"^experts: got 1 for layer 'blocks.0', expected 2 \(fewer would leave"):
        prune(model, names, [x], experts=1)
    whole = count_parameters(extract(model, names))
    each = sum(p[0].numel() for p in model.moe_layers["blocks.0"].experts.parameters())
    small = prune(model, names, [x], budget=whole - 2 * 3 * each)
    assert [len(ids) for ids in kept(small).values()] == [2, 2]
    with pytest.raises(ValueError, match=f"^budget: .*depth, scene, tilt.* has {whole - 6 * each:,}"):
        prune(model, names, [x], budget=whole - 6 * each - 1)


@pytest.mark.parametrize(
    "sets, size",
    [([{0, 1}, {1, 2}, {3}], 2), ([{0, 1}, {1, 2}, {0, 2}], 2), ([{0}], 1), ([{4}], float("inf")), ([{0, 4}, {1}], 2)],
)
def test_fewest(sets, size):
    assert fewest(sets, [0, 1, 2, 3]) == size


def test_fewest_of_many_tasks_apart_needs_few_tries(monkeypatch):
    tries, covered = [], thinning._covered

    def counted(*args):
        tries.append(args)
        assert len(tries) < 1000
        return covered(*args)

    monkeypatch.setattr(thinning, "_covered", counted)
    apart = [set(range(4 * i, 4 * i + 4)) for i in range(16)]
    assert fewest([*apart, {0, 1, 2, 3, 4}, {5}], range(64)) == 16  # the one more asks for nothing, {5} narrows a set
    assert fewest([*apart, {3, 4}], [e for e in range(64) if e != 5]) == 16


def test_greedy_order_by_hand():
    costs = {"a": {0: 3.0, 1: 1.0, 2: 2.0}, "b": {0: 1.0, 1: 5.0}}
    order = []

    def fits(left, name, e):
        return sum(map(len, left.values())) > 2

    def cost(name, ids):
        order.append((name, list(ids)))
        return costs[name]

    assert thin({"a": [0, 1, 2], "b": [0, 1]}, cost, lambda *_: True, fits) == {"a": [0], "b": [1]}
    assert order[2:] == [("a", [0, 2]), ("b", [1]), ("a", [0])]  # of equal ones the first layer's


# ---- what it costs --------------------------------------------------------------------------------------------------


def test_the_loss_on_held_out_samples_is_measured_and_printed(capsys):
    model, x, data = tiny(), images(), samples()
    small = prune(model, ["scene", "tilt"], [x], experts=2, held_out=data)
    report, printed = small.extraction, capsys.readouterr().err
    batch = torch.stack([sample["image"] for sample in data])
    target = {"scene": torch.tensor([s["scene"] for s in data]), "tilt": torch.tensor([s["tilt"] for s in data])}
    for found, one in ((report.before, extract(model, ["scene", "tilt"])), (report.after, small)):
        metrics = TaskMetrics(one.tasks)
        metrics.update({name: y.detach() for name, y in one(batch).items()}, target)
        for task, values in metrics.compute().items():
            assert found[task] == pytest.approx(values, rel=1e-4)
    assert report.samples == 6 and set(report.change) == {"scene", "tilt"}
    assert printed.startswith(f"prune: {report.parameters:,} of {report.whole:,} parameters left")
    assert "\nscene: accuracy" in printed and "6 held-out samples" in printed
    assert json.loads(json.dumps(asdict(report)))["after"].keys() == {"scene", "tilt"}
    same = prune(model, "tilt", [x], budget=1.0, held_out=data).extraction
    assert same.before == same.after and same.change == {"tilt": 0.0} and same.parameters == same.whole
    quiet = prune(model, "tilt", [x], budget=1.0).extraction
    assert quiet.before == {} and quiet.samples == 0 and len(str(quiet).splitlines()) == 3


def test_a_data_set_ends_where_its_length_says():
    class Endless(torch.utils.data.Dataset):  # any number is a sample to it
        def __len__(self):
            return 6

        def __getitem__(self, i):
            assert i < 100
            return samples()[i % 6]

    model, data = tiny(), Endless()
    ours, theirs = (prune(model, "scene", d, experts=3, held_out=d) for d in (data, samples()))
    assert ours.extraction == theirs.extraction and ours.extraction.samples == 6


# ---- learned again --------------------------------------------------------------------------------------------------


def features(model, x, task=0):
    return model.features(x, task)[0].patches


@pytest.mark.parametrize("tasks", ["depth", ["scene", "depth"]], ids=["one", "two"])
def test_what_is_left_learns_the_features_there_were(tasks):
    model, seen, fresh = tiny(), [{"image": image} for image in images(24, seed=8)], images(8, seed=9)
    before = state(model)
    how = {"experts": 3, "recover": seen, "updates": 80, "lr": 1e-2}
    plain, small = prune(model, tasks, [images()], experts=3), prune(model, tasks, [images()], **how)
    off = [(features(one, fresh) - features(extract(model, tasks), fresh)).square().mean() for one in (plain, small)]
    assert off[1] < 0.8 * off[0]  # on images that were not seen
    report = small.extraction
    assert report.updates == 80 and 0 < report.lacking[1] < 0.6 * report.lacking[0]
    assert "80 updates later" in str(report) and kept(small) == kept(plain) and not small.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    moved = {name for name, t in state(small).items() if not torch.equal(t, state(plain)[name])}
    assert moved and all(".moe." in name for name in moved)  # nothing but experts and gates
    again = prune(model, tasks, [images()], **how)
    assert all(torch.equal(a, b) for a, b in zip(state(again).values(), state(small).values(), strict=True))


def test_frozen_gates_stay_and_a_whole_model_has_nothing_to_learn():
    model, seen = tiny(gate_args={"frozen": True}), samples()
    plain, small = (prune(model, "depth", [images()], experts=2, recover=r, updates=3) for r in (None, seen))
    for name, t in state(small).items():
        assert torch.equal(t, state(plain)[name]) != (".experts." in name), name
    with pytest.raises(ValueError, match=r"^recover: every expert and gate is frozen"):
        prune(tiny().requires_grad_(False), "depth", [images()], experts=2, recover=seen, updates=3)
    whole = prune(model, "depth", [images()], budget=1.0, recover=seen)
    assert whole.extraction.updates == 0 and "later" not in str(whole.extraction)


def test_padding_is_no_feature():
    torch.manual_seed(0)
    tasks = (Task.tagging("slots", ["O", "B-x", "I-x"]),)
    model = create_model("text_moe", tasks=tasks, encoder=encoder("bert").config.to_dict(), experts=4, k=1, every=1)
    for parameter in model.parameters():  # experts start as copies
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    small, x = prune(model.eval(), "slots", [texts()], experts=1), texts()
    expected = difference(small, model, x)
    assert expected > 1e-3
    longer = {name: torch.nn.functional.pad(t, (0, 3)) for name, t in x.items()}
    torch.testing.assert_close(difference(small, model, longer), expected, rtol=1e-4, atol=1e-6)


class TestBadInput:
    @pytest.mark.parametrize(
        "how, message",
        [
            ({}, "mass, experts, budget: got none"),
            ({"mass": 0.1, "experts": 2}, "mass, experts, budget: got mass, experts"),
            ({"mass": 1.0}, "mass: got 1.0"),
            ({"experts": 0}, "experts: got 0 for layer 'blocks.0', expected 1 to 7"),
            ({"experts": 8}, "experts: got 8 for layer 'blocks.0', expected 1 to 7"),
            ({"experts": 2.0}, "experts: got 2.0"),
            ({"experts": {"block.1": 2}}, "experts: no layer 'block.1' with experts; did you mean 'blocks.1'"),
            ({"budget": 0.0}, "budget: got 0.0"),
            ({"budget": 1.5}, "budget: got 1.5, expected a number of parameters"),
            ({"budget": 0}, "budget: got 0"),
            ({"budget": 1e-3}, "budget: got 0.001, at most"),
            ({"experts": 2, "recover": []}, "recover: got no samples"),
            ({"experts": 2, "recover": "images"}, "recover: got a str, expected samples"),
            ({"experts": 2, "updates": 0}, "updates, lr: got 0, 0.001"),
            ({"experts": 2, "by": "outputs"}, "by: unknown 'outputs'; did you mean 'output'"),
            ({"experts": 2, "held_out": [{"image": images(2)}]}, "held_out: no sample has a label of 'scene'"),
            ({"experts": 2, "held_out": [images(2)]}, "held_out: item 0 is a Tensor; expected dicts"),
        ],
    )
    def test_options(self, how, message):
        with pytest.raises(ValueError, match=f"^{message}"):
            prune(tiny(), "scene", [images()], **how)

    def test_what_gives_no_samples(self):
        for bad, message in ((5, "got a int, expected batches"), ([images(0)], "item 0 is an empty batch")):
            with pytest.raises(ValueError, match=f"^calibration: {message}"):
                prune(tiny(), "scene", bad, experts=2)
        with pytest.raises(ValueError, match=r"^held_out: got a int, expected batches"):
            prune(tiny(), "scene", [images()], experts=2, held_out=5)

    def test_calibration_without_a_sample_of_the_task(self):
        data = [{"image": image, "scene": 0} for image in images()]
        with pytest.raises(ValueError, match=r"^calibration: has labels of scene .* tilt; .* without their labels"):
            prune(tiny(), ["scene", "tilt"], data, experts=2)
        assert kept(prune(tiny(), "scene", data, experts=2)) == kept(prune(tiny(), "scene", [images()], experts=2))
        with pytest.raises(ValueError, match=r"^calibration: got no samples"):
            prune(tiny(), "scene", [], experts=2)
        with pytest.raises(ValueError, match=r"^tasks: unknown task 'scenes'"):
            prune(tiny(), "scenes", [images()], experts=2)


# ---- every family ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"{family}_table" for family in BUILT_FROM_LEVELS])
@pytest.mark.parametrize("tasks", [["time"], ["kind", "click"]], ids=["one", "two"])
def test_tables(name, tasks, tmp_path):
    model, x, y = make(name), rows(40), labels(40)
    exact = extract(model, tasks, [{"table": x}])  # on these rows it is the same: shared streams count, too
    for task in tasks:
        torch.testing.assert_close(exact(x)[task], model(x, tasks=tasks)[task])
    single = [{"table": {k: t[i] for k, t in x.items()}, **{n: t[i] for n, t in y.items()}} for i in range(40)]
    for by in ("usage", "output"):
        whole = count_parameters(extract(model, tasks, fold=False))
        how = {"recover": single, "updates": 10, "lr": 1e-2} if by == "output" else {}
        small = prune(model, tasks, single, budget=0.9, by=by, held_out=single, **how)
        assert count_parameters(small) <= 0.9 * whole and small.extraction.samples == 40
        assert all(p.isfinite().all() for p in small(x).values())
    again = load(save(small, tmp_path))
    for task in tasks:
        torch.testing.assert_close(again(x)[task], small(x)[task])
        torch.testing.assert_close(extract(again, task)(x)[task], small(x)[task])


@pytest.mark.parametrize(
    "name, how",
    [
        ("text_moe", {"experts": 4, "k": 2, "every": 1}),
        ("text_moe", {"experts": 4, "k": None, "every": 1, "gate": "softmax"}),
        ("text_sublayers", {}),
        ("text_sublayers", {"sublayer": "attention"}),
        ("text_lora", {"rank": 2}),
        ("text_poly", {"rank": 2, "skills": 2}),
        ("text_prompt", {"tokens": 2}),
        ("text_shared_bottom", {}),
        ("text_single_task", {}),
    ],
)
def test_texts(name, how, tmp_path):
    torch.manual_seed(0)
    tasks = (Task.classification("intent", 3), Task.tagging("slots", ["O", "B-x", "I-x"]), Task.regression("score"))
    model = create_model(name, tasks=tasks, encoder=encoder("bert").config.to_dict(), **how).eval()
    x = texts()
    for some in (["slots"], ["score", "intent"]):
        exact = extract(model, some, [x])
        small = prune(model, some, [x], mass=0.3)
        for task in some:
            torch.testing.assert_close(exact(x)[task], model(x, tasks=some)[task], rtol=1e-4, atol=1e-5)
        again = load(save(small, tmp_path / "-".join(some)))
        for task in some:
            torch.testing.assert_close(again(x)[task], small(x)[task])
            torch.testing.assert_close(extract(again, task)(x)[task], small(x)[task], rtol=1e-4, atol=1e-5)
    if name == "text_moe":
        single = [{"text": {k: v[i] for k, v in x.items()}, "score": torch.tensor(1.0 * i)} for i in range(3)]
        small = prune(model, "score", single, experts=2, by="output", held_out=single)
        assert {len(ids) for ids in kept(small).values()} == {2} and small.extraction.samples == 3


def test_where_k_experts_are_left_nothing_is_dispatched(monkeypatch):
    model, x = tiny(k=K), images()
    small = prune(model, "depth", [x], experts=K)
    monkeypatch.setattr("moe_mtl.kernels.ops.routed_mlp", None)
    assert small(x)["depth"].isfinite().all()
    with pytest.raises(TypeError):
        model(x, tasks=["depth"])


def test_a_pruned_and_trained_model_is_pruned_again():
    model, x = tiny(), images()
    small = prune(model, ["depth", "scene"], [x], experts=5).train()
    small(x)["depth"].mean().backward()
    torch.optim.SGD(small.parameters(), lr=0.1).step()
    two = prune(small.eval(), "scene", [x], experts=3)
    for name, ids in kept(two).items():
        assert len(ids) == 3 and set(ids) <= set(kept(small)[name])
    reference = copy.deepcopy(small)
    keep_experts(reference, kept(two))
    agree(two, reference, x, ["scene"])
