"""New tasks for a trained model: routers that start from others, tasks that stay what they were, few-shot training."""

import copy

import pandas
import pytest
import torch
import transformers

import moe_mtl
from moe_mtl import create_model, extract, load, save
from moe_mtl.backbones.hf_model import MoeMtlModel
from moe_mtl.data import Table, TextSplit
from moe_mtl.diagnostics import expert_usage
from moe_mtl.gates import GATES, create_gate
from moe_mtl.new_task import FewShot, add_task, parameters_of_task, train_only
from moe_mtl.tasks import Task
from moe_mtl.trainer import Trainer, TrainerConfig
from tests import test_table_models as tables
from tests.test_encoders import SIZES, texts
from tests.test_gates import MIXTURES, dense, make, own_parameters, tokens
from tests.text_cases import save_encoder

every_gate = pytest.mark.parametrize("name", sorted(GATES))
TASKS = (Task.depth(), Task.classification("scene", 3), Task.regression("tilt"))
NAMES = [task.name for task in TASKS]
NEW = Task.classification("room", 4)
NO_MEAN = ("assigned", "dselect_k")  # tasks of these gates have no mean; of assigned, unless they share experts
LOG3 = torch.tensor(3.0).log()


def tiny(gate="noisy_topk", tasks=TASKS, **overrides):
    """A small ViT in eval mode with routers at random values."""
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "dim": 16, "depth": 2, "num_heads": 2, "head_width": 8, "every": 1}
    sizes |= {"experts": 7, "k": None if gate in MIXTURES else 2}
    if gate == "exclusive":  # one expert each, four for all
        sizes["gate_args"] = {"alpha": 0.5}
    model = create_model("m3vit_micro", tasks=tasks, **{**sizes, "gate": gate, **overrides}).eval()
    with torch.no_grad():
        for layer in model.moe_layers.values():
            for parameter in layer.gate.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def images(b=3, seed=1):
    return torch.randn(b, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def outputs(model, x, names=NAMES):
    """Predictions of several tasks at once, of each alone, and of one task per sample."""
    found = model(x, tasks=names) | {f"{name} alone": model(x, tasks=[name])[name] for name in names}
    order = [task.name for task in model.tasks]
    ids = torch.tensor([order.index(name) for name in (names * 3)[:3]])
    return found | {f"{name} of a sample": y for name, (_, y) in model(x, tasks=ids).items()}


# ---- gates ----------------------------------------------------------------------------------------------------------


@every_gate
def test_a_gate_serves_one_more_task_and_the_others_as_before(name):
    gate, x = make(name, 7, 2), tokens(8)
    calls = [0, 3, (1, 2), (3, 0), torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])]
    before, held = [dense(gate(x, task)) for task in calls], dict(gate.named_parameters())
    if name == "exclusive":  # every expert is closed to a task here: see the test of what a new task sees
        held["hidden"] = gate.hidden_from
    gate.add_task()
    assert gate.num_tasks == 5
    for task, expected in zip(calls, before, strict=True):
        assert torch.equal(dense(gate(x, task)), expected)
    now = dict(gate.named_parameters())
    assert all(now[key] is parameter for key, parameter in held.items() if key in now)  # the same tensors
    assert sorted(set(now) - set(held)) == sorted(own_parameters(gate, 4)) == sorted(gate.own_parameters(4))
    # the new task is like one of a gate made for five: its router learns, in training and from its first step
    routing = gate.train()(x, 4)
    routing.weights.backward(torch.randn(routing.weights.shape, generator=torch.Generator().manual_seed(2)))
    for key, parameter in own_parameters(gate, 4).items():
        assert parameter.requires_grad and (name == "dselect_k" or parameter.grad.abs().max() > 1e-6), key
    for task in range(4):
        for parameter in own_parameters(gate, task).values():
            assert parameter.grad is None or not parameter.grad.any()


@every_gate
def test_a_copied_router_is_a_tasks_own_at_first_and_apart(name):
    gate, x = make(name, 7, 2), tokens(8)
    gate.add_task([2])
    assert torch.equal(dense(gate(x, 4)), dense(gate(x, 2)))
    assert torch.equal(dense(gate(x, (4, 0))), dense(gate(x, (2, 0))))
    before = dense(gate(x, 2))
    with torch.no_grad():
        for parameter in own_parameters(gate, 4).values():
            parameter.add_(torch.randn_like(parameter))
    assert torch.equal(dense(gate(x, 2)), before)
    assert torch.equal(dense(gate(x, 4)), before) != gate.task_dependent
    with pytest.raises(ValueError, match=r"task: got id 5, expected 0 to 4"):
        gate.add_task([5])
    assert gate.num_tasks == 5


@pytest.mark.parametrize("name", sorted(set(GATES) - {"dselect_k", "assigned", "exclusive"}))
def test_the_mean_of_routers(name):
    gate, x = make(name, dtype=torch.float64), tokens(6, torch.float64)
    gate.add_task([0, 1, 3])
    for key, parameter in own_parameters(gate, 4).items():
        prefix = key.rpartition(".")[0]
        found = dict(gate.named_parameters())
        expected = (found[f"{prefix}.0"] + found[f"{prefix}.1"] + found[f"{prefix}.3"]) / 3
        torch.testing.assert_close(parameter, expected, rtol=1e-12, atol=1e-12)
    if name in ("noisy_topk", "expert_choice", "softmax", "sigmoid", "task_bias"):  # scores are linear in them
        scores = torch.stack([gate(x, task).logits for task in (0, 1, 3)]).mean(dim=0)
        torch.testing.assert_close(gate(x, 4).logits, scores, rtol=1e-12, atol=1e-12)


def test_tasks_of_some_gates_have_no_mean():
    refused = {
        "init_from: selectors name experts by binary codes": make("dselect_k"),
        "init_from: hidden units of different tasks' routers do not match": make("softmax", hidden=(3,)),
        "init_from: the 2 slots of an expert have no order": make("soft_slots", slots=2),
        r"init_from: tasks assigned to different experts have no mean, .* \[\[0, 1\], \[2, 3\]\]": make("assigned"),
    }
    for message, gate in refused.items():
        before = copy.deepcopy(gate.state_dict())
        like = [0, 2] if "assigned" in message else [0, 1]
        for refuse in (gate.check_like, gate.add_task):
            with pytest.raises(ValueError, match=message):
                refuse(like)
        assert gate.num_tasks == 4 and same(gate.state_dict(), before)
        gate.add_task([1])
        assert torch.equal(dense(gate(tokens(4), 4)), dense(gate(tokens(4), 1)))
    one = create_gate("dselect_k", 6, 1, 2)  # a single expert: nothing to choose, nothing to mix up
    one.add_task([0, 1])
    assert one(tokens(3), 2).weights.eq(1).all()


def test_assigned_experts_of_a_new_task():
    table = [[3, 0], [0, 3], [1, 4]]
    gate = create_gate("assigned", 6, 6, 3, 2, assignment=table)
    with torch.no_grad():
        for task, numbers in enumerate(([0.0, 2.0], [4.0, 1.0], [5.0, 6.0])):
            gate.weight[task].copy_(torch.tensor(numbers))
    gate.add_task([0, 1])  # expert 3 has 0 and 1, expert 0 has 2 and 4, in the order of the first
    assert gate.indices[3].tolist() == [3, 0]
    assert gate.weight[3].tolist() == [0.5, 3.0]
    gate.add_task()  # experts 2 and 5 serve nobody
    assert gate.indices[4].tolist() == [2, 5] and gate.weight[4].tolist() == [0.0, 0.0]
    assert gate.task_options()["assignment"] == [*table, [3, 0], [2, 5]]
    pruned = create_gate("assigned", 6, 6, 3, 2, assignment=table)
    pruned.keep_experts(torch.tensor([0, 1, 3, 4]))
    pruned.add_task()  # of those that are left, 1 and 4 serve one task, 0 and 3 two
    assert pruned.indices[3].tolist() == [1, 4]
    single = create_gate("assigned", 6, 4, 3, 1)
    single.add_task()
    assert single.indices.tolist() == [[0], [1], [2], [3]] and not list(single.parameters())


def test_experts_that_a_new_task_can_see():
    gate = create_gate("softmax", 2, 4, 2, visible=[[0, 1], [0, 2]])
    with torch.no_grad():
        for task in (0, 1):
            gate.router.weight[task].copy_(torch.arange(8.0).view(4, 2) + 10 * task)
            gate.router.bias[task].copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]) * (task + 1))
    fresh = copy.deepcopy(gate)
    fresh.add_task()
    assert fresh.reachable(2) == (0,)  # what all see
    gate.add_task([0, 1])
    assert gate.reachable(2) == (0, 1, 2)
    # expert 0 is seen by both: their mean; expert 1 by the first alone, expert 2 by the second
    assert gate.router.weight[2].tolist() == [[5.0, 6.0], [2.0, 3.0], [14.0, 15.0], [0.0, 0.0]]
    assert gate.router.bias[2].tolist() == [1.5, 2.0, 6.0, 0.0]
    assert gate.task_options() == {"visible": [[0, 1], [0, 2], [0, 1, 2]]}


def test_a_new_task_of_an_exclusive_gate():
    shared = create_gate("exclusive", 6, 6, 2, alpha=0.5, kind="exclusivity")
    both = sorted(set(shared.reachable(0)) & set(shared.reachable(1)))
    shared.add_task()
    assert len(both) == 3 and list(shared.reachable(2)) == both
    closed = create_gate("exclusive", 6, 6, 2, alpha=0.5, kind="exclusion")
    closed.add_task()
    assert closed.reachable(2) == tuple(range(6))
    none = create_gate("exclusive", 6, 6, 2, alpha=1.0, kind="exclusivity")
    with pytest.raises(ValueError, match="init_from: every expert is closed to some task"):
        none.add_task()
    none.add_task([1])
    assert none.reachable(2) == none.reachable(1)
    shared = create_gate("exclusive", 6, 6, 2, alpha=0.5, kind="exclusivity")
    shared.keep_experts(torch.tensor([e for e in range(6) if e not in both]))  # what all see is gone
    with pytest.raises(ValueError, match="init_from: every expert is closed to some task"):
        shared.check_like(())


def test_a_frozen_router_stays_frozen():
    gate = make("noisy_topk", frozen=True)
    gate.add_task()
    gate.add_task([4])
    assert not any(parameter.requires_grad for parameter in gate.parameters())
    assert torch.equal(gate.router.weight[5], gate.router.weight[4])


def test_selectors_of_a_token_start_small():
    gate = create_gate("dselect_k", 6, 8, 2, 2, per_example=True, gamma=1.0)
    gate.add_task()
    assert 0 < gate.z.weight[2].abs().max() <= 0.01 and 0 < gate.z.bias[2].abs().max() <= 0.01
    assert 0.01 < gate.alpha.weight[2].abs().max() <= 0.05


# ---- models ---------------------------------------------------------------------------------------------------------


def start(gate):
    """What the router of a new task can start from, for a gate of this name."""
    return [None, "scene"] if gate in NO_MEAN else [None, "scene", ["depth", "tilt"]]


@every_gate
def test_a_model_takes_a_task_and_the_others_stay(name, tmp_path):
    x = images()
    for init_from in start(name):
        model = tiny(name)
        before = outputs(model, x)
        held = dict(model.named_parameters())
        assert model.add_task(NEW, init_from) is model
        assert same(outputs(model, x), before)
        assert all(dict(model.named_parameters())[key] is parameter for key, parameter in held.items())
        assert [task.name for task in model.tasks] == [*NAMES, "room"]
        # the new task is one like any other
        every, alone = model(x), model(x, tasks=["room"])["room"]
        assert every["room"].shape == (3, 4)
        torch.testing.assert_close(every["room"], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(x[:1])["room"], alone[:1], rtol=1e-4, atol=1e-5)
        assert torch.equal(model(x, tasks=["room"])["room"], alone)
        rows, prediction = model(x, tasks=torch.tensor([3, 0, 3]))["room"]
        assert rows.tolist() == [0, 2]
        torch.testing.assert_close(prediction, alone[[0, 2]], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(extract(model, "room")(x)["room"], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(extract(model, "scene")(x)["scene"], before["scene"], rtol=1e-4, atol=1e-5)
        for layer in model.moe_layers.values():
            noted = model.config["args"]["gate_args"]
            assert noted == noted | layer.gate.task_options()
        again = load(save(model, tmp_path / str(init_from)))
        assert again.tasks == model.tasks and same(again.state_dict(), model.state_dict())
        assert same(outputs(again, x, [*NAMES, "room"]), outputs(model, x, [*NAMES, "room"]))


@every_gate
def test_a_new_task_reads_nothing_of_the_others(name):
    model, x = tiny(name).add_task(NEW, "scene"), images()
    expected = model(x, tasks=["room"])["room"]
    with torch.no_grad():
        for other in NAMES:
            for key in parameters_of_task(model, other):
                model.get_parameter(key).fill_(torch.nan)
    assert expected.isfinite().all() and torch.equal(model(x, tasks=["room"])["room"], expected)


def test_a_copied_router_gives_the_features_of_the_task_it_is_copied_from():
    model, x = tiny(), images()
    model.add_task(NEW, "tilt")
    found, _ = model.features(x, (2, 3))
    assert torch.equal(found.pooled[:3], found.pooled[3:])
    fresh, _ = tiny().add_task(NEW).features(x, (2, 3))
    assert (fresh.pooled[:3] - fresh.pooled[3:]).abs().max() > 1e-3


def test_a_text_model_takes_tasks_of_texts(tmp_path):
    torch.manual_seed(0)
    tasks = (Task.classification("intent", 5), Task.binary("spam"))
    model = create_model("text_moe", tasks=tasks, encoder=transformers.BertConfig(**SIZES).to_dict()).eval()
    x = texts()
    before = outputs(model, x, ["intent", "spam"])
    model.add_task(Task.tagging("slots", ["O", "B-x", "I-x"]), ["intent", "spam"]).add_task(Task.regression("score"))
    assert same(outputs(model, x, ["intent", "spam"]), before)
    found = model(x)
    assert found["slots"].shape == (3, 3, 7) and found["score"].shape == (3,)
    again = load(save(model, tmp_path))
    assert same(again(x), found)
    MoeMtlModel.of(model).save_pretrained(tmp_path / "transformers")
    read = MoeMtlModel.from_pretrained(tmp_path / "transformers").model
    assert read.tasks == model.tasks and same(read.state_dict(), model.state_dict())
    torch.testing.assert_close(extract(again, "slots")(x)["slots"], found["slots"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="tasks: 'map' is of kind depth; for texts: classification"):
        model.add_task(Task.depth("map"))


def test_dense_models_and_models_of_one_task_take_tasks_too(tmp_path):
    x = images()
    model = create_model("shared_bottom_micro", tasks=TASKS[1:2], image_size=16, patch_size=4, dim=16, depth=2).eval()
    before = model(x)["scene"]
    model.add_task(Task.normals(), "scene")
    assert model(x)["normals"].shape == (3, 3, 16, 16)
    assert torch.equal(model(x, tasks=["scene"])["scene"], before)
    assert same(load(save(model, tmp_path))(x), model(x))
    single = tiny(tasks=TASKS[:1])
    before = single(x)["depth"]
    single.add_task(NEW)
    assert torch.equal(single(x, tasks=["depth"])["depth"], before)
    assert set(single(x)) == {"depth", "room"}


def test_a_pruned_model_takes_a_task(tmp_path):
    x = images()
    small = extract(tiny("assigned"), NAMES)  # of 7 experts, 6 serve a task
    assert small.moe_layers["blocks.0"].kept_experts == [0, 1, 2, 3, 4, 5]
    before = outputs(small, x)
    small.add_task(NEW)
    assert same(outputs(small, x), before)
    assert same(load(save(small, tmp_path))(x), small(x))


def test_pretrained_weights_take_a_task():
    model = create_model("m3vit_micro.procroom", pretrained=True)
    names, x = [task.name for task in model.tasks], torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before = model(x, tasks=names)
        add_task(model, NEW, ["scene", "count"])
        assert same(model(x, tasks=names), before)
        assert model(x, tasks=["room"])["room"].shape == (2, 4)


def test_a_head_starts_as_a_copy():
    model, x = tiny(), images()
    before = outputs(model, x)
    add_task(model, Task.depth("range"), "depth", head_from="depth")  # the same router, too
    assert torch.equal(model(x, tasks=["range"])["range"], before["depth alone"]) and same(outputs(model, x), before)
    with torch.no_grad():
        model.heads["range"].out.bias.add_(1)
    assert same(outputs(model, x), before)  # a copy
    table, x = tables.make("mmoe_table"), tables.rows()
    add_task(table, Task.classification("sort", 3), "kind", head_from="kind")
    assert torch.equal(table(x, tasks=["sort"])["sort"], table(x, tasks=["kind"])["kind"])


@pytest.mark.parametrize(
    "task, head_from, message",
    [
        (Task.depth("range"), "dept", "head_from: unknown task 'dept'"),
        (Task.regression("lean"), "depth", "head_from: depth is depth with 1 outputs, lean .*; these fit: tilt$"),
        (NEW, "scene", "head_from: scene is classification with 3 outputs, room .* 4; no task of the model fits"),
    ],
)
def test_a_head_that_does_not_fit(task, head_from, message):
    model = tiny()
    with pytest.raises(ValueError, match=message):
        add_task(model, task, "scene", head_from=head_from)
    assert [one.name for one in model.tasks] == NAMES and set(model.heads) == set(NAMES)


@every_gate
def test_tasks_go_and_others_stay(name, tmp_path):
    model, x = tiny(name), images()
    before = model(x, tasks=["depth", "tilt"])
    own = {key: model.get_parameter(key).numel() for key in parameters_of_task(model, "scene")}
    count = sum(parameter.numel() for parameter in model.parameters())
    assert model.remove_task("scene") is model
    assert same(model(x), before)
    assert count - sum(parameter.numel() for parameter in model.parameters()) == sum(own.values())
    assert same(load(save(model, tmp_path))(x), before)
    model.add_task(NEW, "tilt").remove_task("depth")
    assert set(model(x)) == {"tilt", "room"}
    with pytest.raises(ValueError, match="name: unknown task 'scene'; known: room, tilt"):
        model.remove_task("scene")
    with pytest.raises(ValueError, match="name: 'tilt' is the model's only task"):
        model.remove_task("room").remove_task("tilt")


def test_tasks_get_other_names(tmp_path):
    model, x = tiny(), images()
    before = model(x)
    assert model.rename_task("scene", "place").rename_task("tilt", "tilt") is model
    found = model(x)
    assert list(found) == ["depth", "place", "tilt"]
    assert same({"scene": found.pop("place"), **found}, before)
    assert list(load(save(model, tmp_path))(x)) == ["depth", "place", "tilt"]
    with pytest.raises(ValueError, match="old: unknown task 'scene'"):
        model.rename_task("scene", "x")
    with pytest.raises(ValueError, match="new: the model has a task 'depth'"):
        model.rename_task("place", "depth")
    with pytest.raises(ValueError, match="name: 'a b' is not usable as a key"):
        model.rename_task("place", "a b")


@pytest.mark.parametrize("gate, task, init_from, message", [
    ("noisy_topk", Task.binary("scene"), None, "task: the model has a task 'scene'; choose another name"),
    ("noisy_topk", NEW, "scen", "init_from: unknown task 'scen'; did you mean 'scene'"),
    ("noisy_topk", NEW, ["scene", "scene"], "init_from: .* names a task twice"),
    ("noisy_topk", NEW, [], "init_from: got an empty list"),
    ("noisy_topk", NEW, "nearest", r"init_from: what is nearest .* moe_mtl.add_task\("),
    ("noisy_topk", NEW, "most_used", r"init_from: what is most_used .* moe_mtl.add_task\("),
    ("dselect_k", NEW, ["depth", "tilt"], "init_from: selectors name experts"),
])  # fmt: skip
def test_what_is_refused_changes_nothing(gate, task, init_from, message):
    model = tiny(gate)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_task(task, init_from)
    assert model.tasks == TASKS and same(model.state_dict(), before)


def test_models_that_take_no_task_say_so():
    single = create_model("single_task_micro", tasks=TASKS[:2], image_size=16, patch_size=4, dim=16, depth=2)
    with pytest.raises(ValueError, match="model: a SingleTaskSet takes no new task; expected a MultiTaskModel"):
        add_task(single, NEW)
    model = tiny()
    model._fresh_head = None
    with pytest.raises(ValueError, match="task: MultiTaskModel takes no new task"):
        model.add_task(NEW)
    with pytest.raises(TypeError, match="tasks: got str 'room'"):
        model.add_task("room")


# ---- few-shot training ----------------------------------------------------------------------------------------------


def labelled(count=12, seed=3):
    return [{"image": image, "room": i % 4} for i, image in enumerate(images(count, seed))]


def few(model, out, scales, data=None, **changes):
    config = {"steps": 4, "batch_size": 6, "warmup": 0, "lr": 0.05, "weight_decay": 0.5, "eval_every": 0}
    config |= {"device": "cpu", "progress": False, "lr_scales": scales} | changes
    Trainer(model, data or FewShot(tasks=model.tasks, train=labelled()), TrainerConfig(out=str(out), **config)).fit()


@every_gate
def test_a_task_learns_alone_and_nothing_is_forgotten(name, tmp_path):
    options = {"gate_args": {"start": 0.5, "end": 0.2}} if name == "task_level" else {}
    model, x = tiny(name, **options).add_task(NEW, "scene"), images()
    before, new = outputs(model, x), model(x, tasks=["room"])["room"]
    weights = copy.deepcopy(model.state_dict())
    few(model, tmp_path / "alone", train_only(model, "room"))
    assert same(outputs(model, x), before)  # to the bit, with weight decay and momentum
    assert (model(x, tasks=["room"])["room"] - new).abs().max() > 1e-3
    own = set(parameters_of_task(model, "room"))
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]) != (key in own), key
    model.requires_grad_(True)  # what froze the rest
    few(model, tmp_path / "all", {})
    assert not same(outputs(model, x), before)


def test_a_task_of_texts_learns_alone(tmp_path):
    run = torch.no_grad()(lambda *args, **how: model(*args, **how))  # weights with gradients take another way
    folder = str(save_encoder(tmp_path / "encoder"))
    tasks = (Task.classification("intent", 2), Task.binary("spam"))
    model = create_model("text_moe", tasks=tasks, encoder=folder, experts=2, every=1).eval()
    topic = Task.classification("topic", 2, classes=["music", "weather"])
    rows = [{"text": text, "topic": i % 2} for i, text in enumerate(["play yesterday", "weather in oslo"] * 8)]
    data = TextSplit(rows, [topic], transformers.AutoTokenizer.from_pretrained(folder))
    model.add_task(topic, ["intent", "spam"])
    x = {key: value[None] for key, value in data[1]["text"].items()}
    before = run(x, tasks=["intent", "spam"])
    found = FewShot(tasks=model.tasks, train=data, val=data)
    few(model, tmp_path / "run", train_only(model, "topic"), found, steps=40, lr=0.05, weight_decay=0.0)
    assert same(run(x, tasks=["intent", "spam"]), before)
    assert run(x, tasks=["topic"])["topic"].argmax() == 1
    assert same(torch.no_grad()(load(tmp_path / "run"))(x), run(x))


def test_the_parameters_of_a_task_are_named():
    assert parameters_of_task(tiny().add_task(NEW), "room") == [
        *(f"backbone.blocks.{i}.mlp.moe.gate.router.weight.3" for i in (0, 1)),
        *(f"heads.room.{part}" for part in ("norm.weight", "norm.bias", "hidden.weight", "hidden.bias")),
        *(f"heads.room.{part}" for part in ("out.weight", "out.bias")),
    ]
    shared = {"task_embedding": "table", "task_level": "table", "task_bias": "bias"}  # routers that all tasks use
    for gate, entry in shared.items():
        gates = [name for name in parameters_of_task(tiny(gate), "scene") if ".gate." in name]
        assert gates == [f"backbone.blocks.{i}.mlp.moe.gate.{entry}.1" for i in (0, 1)]
    assert all(name.startswith("heads.scene.") for name in parameters_of_task(tiny("task_blind"), "scene"))
    with pytest.raises(ValueError, match="name: unknown task 'rooms'"):
        parameters_of_task(tiny().add_task(NEW), "rooms")
    with pytest.raises(ValueError, match="name: unknown task 'rooms'"):
        train_only(tiny(), "rooms")


def test_the_temperature_of_tasks_that_do_not_learn_stays():
    gate = create_gate("task_level", 6, 4, 3, 2)
    gate.anneal(1.0)
    assert float(gate.temperature) == pytest.approx(0.1)
    for key, parameter in gate.named_parameters():
        parameter.requires_grad_(key == "table.2")
    gate.anneal(0.0)
    assert float(gate.temperature) == pytest.approx(0.1)
    gate.requires_grad_(False).anneal(0.0)  # a schedule of routes that are fixed
    assert float(gate.temperature) == pytest.approx(2.0)


def test_few_shot_data_has_what_it_was_given():
    data = FewShot(tasks=TASKS, train=[1])
    assert data.task_list() == TASKS and data.split("train") == [1]
    for name in ("val", "test"):
        with pytest.raises(ValueError, match=f"split: no samples for '{name}'"):
            data.split(name)


# ---- the nearest tasks ----------------------------------------------------------------------------------------------


def test_the_nearest_tasks_are_found_and_named(capsys):
    x = [{"image": image, "scene": i % 3, "tilt": 0.5, "room": i % 4} for i, image in enumerate(images(8))]
    for by in ("embedding", "fisher"):
        values = moe_mtl.task_similarity(tiny(), NEW, x, by=by, head_steps=5)
        assert set(values) == {"scene", "tilt"}  # no sample has a depth
        model = moe_mtl.add_task(tiny(), NEW, "nearest", data=x, neighbours=1, by=by, head_steps=5)
        nearest = next(iter(values))
        assert f"add_task: room starts from {nearest} ({values[nearest]:.3f})" in capsys.readouterr().err
        for layer in model.moe_layers.values():
            assert torch.equal(layer.gate.router.weight[3], layer.gate.router.weight[NAMES.index(nearest)])
    both = moe_mtl.add_task(tiny(), NEW, "nearest", data=x, by="embedding")
    for layer in both.moe_layers.values():
        expected = (layer.gate.router.weight[1] + layer.gate.router.weight[2]) / 2
        torch.testing.assert_close(layer.gate.router.weight[3], expected)


@pytest.mark.parametrize("options, message", [
    ({"init_from": "nearest"}, "data: init_from='nearest' is measured; pass samples"),
    ({"init_from": "nearest", "data": [], "neighbours": 0}, "neighbours: got 0"),
    ({"init_from": "scene", "data": [], "samples": 3}, "init_from: got 'scene', but data, samples are for"),
    ({"init_from": "nearest", "data": []}, "data: got no samples"),
    ({"init_from": "nearest", "data": 3}, "data: got a int, expected samples"),
])  # fmt: skip
def test_a_wrong_call_is_refused(options, message):
    model = tiny()
    with pytest.raises(ValueError, match=message):
        add_task(model, NEW, **options)
    assert model.tasks == TASKS


# ---- tables ---------------------------------------------------------------------------------------------------------


EXTRA = Task.binary("extra")
FIELDS = ("dtrn_table", "apem_table", "multitab_table")
TAKE_TASKS = (*(name for name in tables.MODELS if name != "single_task_table"), *FIELDS)
every_table = pytest.mark.parametrize("name", TAKE_TASKS)


def table_model(name):
    return (
        tables.make(name)
        if name not in FIELDS
        else create_model(name, tasks=tables.TASKS, columns=tables.COLUMNS).eval()
    )


@torch.no_grad()
def of(model, x, names):
    return {name: model(x, tasks=[name])[name] for name in names}


@every_table
def test_a_table_model_takes_a_task_and_gives_it_back(name, tmp_path):
    model, x = table_model(name), tables.rows()
    before, tensors = of(model, x, tables.NAMES), {n: (id(p), p.clone()) for n, p in model.named_parameters()}
    assert model.add_task(EXTRA, init_from="click") is model
    now = dict(model.named_parameters())
    assert all(id(now[n]) == i and torch.equal(now[n], p) for n, (i, p) in tensors.items())  # the same tensors
    assert same(of(model, x, tables.NAMES), before)
    own = {id(p) for p in model.own_parameters("extra")}
    assert own == {id(p) for n, p in now.items() if n not in tensors}
    save(model, tmp_path)
    again = load(tmp_path)
    assert same(of(again, x, [*tables.NAMES, "extra"]), of(model, x, [*tables.NAMES, "extra"]))
    torch.testing.assert_close(extract(again, "extra")(x)["extra"], of(model, x, ["extra"])["extra"])
    model.rename_task("extra", "more").remove_task("click")
    assert [task.name for task in model.tasks] == ["time", "kind", "more"]
    torch.testing.assert_close(of(model, x, ["more"])["more"], of(again, x, ["extra"])["extra"])
    torch.testing.assert_close(of(model, x, ["kind"])["kind"], before["kind"])


@every_table
def test_only_what_is_the_new_tasks_learns(name):
    model, x = table_model(name), tables.rows()
    model.add_task(EXTRA, init_from="click")
    before, first = of(model, x, tables.NAMES), of(model, x, ["extra"])["extra"]
    samples = [{"table": {k: v[i] for k, v in x.items()}, "extra": torch.tensor(float(i % 2))} for i in range(12)]
    config = TrainerConfig(
        steps=4, lr=1e-2, eval_every=0, progress=False, weight_decay=0.1, lr_scales=train_only(model, "extra")
    )
    Trainer(model, FewShot(tasks=model.tasks, train=samples), config).fit()
    assert same(of(model, x, tables.NAMES), before)
    assert not torch.equal(of(model, x, ["extra"])["extra"], first)


@pytest.mark.parametrize("name", ["cgc_table", "ple_table", "adatt_table", "mmoe_table"])
def test_routers_of_a_new_table_task_start_like_others(name):
    model, x = table_model(name), tables.rows()
    model.add_task(EXTRA, init_from="time")
    _, routing = model(x, return_routing=True)
    last = routing[list(routing)[-1]]
    weights = last.dense_weights().unflatten(0, (len(last.task), -1))
    torch.testing.assert_close(weights[3], weights[1])  # extra, time


def test_table_models_that_take_no_task():
    alone = tables.make("single_task_table")
    with pytest.raises(ValueError, match="model: a SingleTaskSet takes no new task"):
        add_task(alone, EXTRA)
    home = tables.make("home_table", categories=[["click", "time"], ["kind"]])
    with pytest.raises(ValueError, match="init_from: got tasks of 0 categories"):
        home.add_task(EXTRA)
    with pytest.raises(ValueError, match="init_from: got tasks of 2 categories"):
        home.add_task(EXTRA, init_from=["click", "kind"])
    model = tables.make("mmoe_table")
    for bad, message in (
        (Task.depth(), "tasks: 'depth' of kind depth"),
        (tables.TASKS[0], "task: the model has a task"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_task(bad)
    assert [task.name for task in model.tasks] == tables.NAMES and len(model.towers.tasks) == 3


def test_nearness_is_measured_for_tables(capsys):
    model, x = tables.make("mmoe_table"), tables.rows(48)
    samples = [{"table": {k: v[i] for k, v in x.items()}, "extra": (x["vector"][i, 0] > 0).float()} for i in range(48)]
    for name, label in tables.labels(48).items():
        for sample, value in zip(samples, label, strict=True):
            sample[name] = value
    for by in ("fisher", "gradient", "embedding"):
        found = moe_mtl.task_similarity(model, EXTRA, samples, by=by, head_steps=5)
        assert set(found) == set(tables.NAMES) and all(-1 <= v <= 1.000001 for v in found.values())
    add_task(model, EXTRA, "nearest", data=samples, head_steps=5)
    assert "extra starts from" in capsys.readouterr().err


def test_nearness_is_measured_on_a_table_in_a_file(tmp_path, capsys):
    people = pandas.DataFrame({"age": range(20, 80), "job": ["cook", "nurse", "king"] * 20, "rich": [0, 0, 0, 1] * 15})
    people.to_csv(tmp_path / "a.csv", index=False)
    known = Table(root=str(tmp_path / "a.csv"), tasks="rich")
    model = create_model("mmoe_table", tasks=known.task_list(), **known.model_args())
    people.assign(job=people["job"].replace("cook", "pilot"), old=people["age"] > 50).to_csv(tmp_path / "b.csv")
    data = Table(root=str(tmp_path / "b.csv"), tasks="rich,old")
    add_task(copy.deepcopy(model), data.task_list()[1], "most_used", data=data)
    add_task(model, data.task_list()[1], "nearest", data=data)
    assert "old starts from rich" in capsys.readouterr().err and len(model.tasks) == 2
    moe_mtl.finetune(model, data, steps=2, progress=False)
    with pytest.raises(ValueError, match="data: no sample has a label of rich; "):
        moe_mtl.task_similarity(model, Task.binary("old"), Table(root=str(tmp_path / "b.csv"), tasks="old"))


# ---- the most used experts ------------------------------------------------------------------------------------------


def test_a_router_over_the_most_used_experts(tmp_path):
    model, x = tiny(), images()
    before = outputs(model, x)
    add_task(model, NEW, "most_used", data=[{"image": one} for one in images(8)])
    assert same(outputs(model, x), before)
    usage = expert_usage(model, [images(8)], tasks=NAMES)
    for name, layer in model.moe_layers.items():
        share = usage[name].mass[:3].mean(dim=0)
        seen = layer.gate.reachable(3)
        order = share.argsort(descending=True).tolist()
        assert set(seen) == set(order[: len(seen)]) and share[list(seen)].sum() >= 0.8
        assert share[list(seen)].sum() - share[order[len(seen) - 1]] < 0.8 or len(seen) == 2
        assert layer.gate.reachable(0) == tuple(range(7))
    small = extract(model, "room")
    assert [len(layer.kept_experts) for layer in small.moe_layers.values()] == [
        len(layer.gate.reachable(3)) for layer in model.moe_layers.values()
    ]
    save(model, tmp_path)
    assert same(outputs(load(tmp_path), x, ["room", *NAMES[:2]]), outputs(model, x, ["room", *NAMES[:2]]))


def test_a_token_finds_as_many_of_the_most_used_experts_as_it_uses():
    model = tiny(experts=4, k=3)
    with torch.no_grad():
        for block, layer in zip(model.backbone.blocks, model.moe_layers.values(), strict=True):
            block.norm2.bias[0] = 10  # every token has a 10 there: two experts take nearly all of the weight
            for weight in layer.gate.router.weight:
                weight[:, 0] = torch.tensor([5.0, 5.0, -5.0, -6.0])
    add_task(model, NEW, "most_used", data=[{"image": one} for one in images(8)])
    assert {layer.gate.reachable(3) for layer in model.moe_layers.values()} == {(0, 1, 2)}
    assert model(images())["room"].isfinite().all()


def test_the_most_used_experts_need_samples_and_routers_that_can_hide_experts():
    with pytest.raises(ValueError, match="data: init_from='most_used' is measured"):
        add_task(tiny(), NEW, "most_used")
    blind = tiny("task_blind")
    with pytest.raises(ValueError, match=r"init_from: TaskBlindGate of blocks\.0 shows all experts"):
        add_task(blind, NEW, "most_used", data=[{"image": one} for one in images()])
    assert len(blind.tasks) == 3
