"""finetune: what learns and what does not, new experts, low-rank updates, refusals that change nothing."""

import pytest
import torch
import transformers
from torch.utils.data import Subset

import moe_mtl
from moe_mtl import extract, load, moefy, save
from moe_mtl.adapters.expert_lora import ExpertLora
from moe_mtl.data import TextSplit
from moe_mtl.diagnostics import expert_usage
from moe_mtl.fine_tuning import _moved
from moe_mtl.new_experts import OnlyNew, add_experts
from moe_mtl.samples import samples_of, with_labels
from moe_mtl.tasks import Task
from moe_mtl.trainer import TrainingDiverged
from tests import test_new_task as pictures
from tests import test_table_models as tables
from tests.text_cases import save_encoder

WAYS = ("router+head", "new-experts", "lora", "experts", "all")
KEEP_OTHERS = ("router+head", "new-experts")
FAST = {"steps": 12, "progress": False, "lr": 1e-2}
every_way = pytest.mark.parametrize("train", WAYS)


def rooms(count=24, classes=4):
    """Pictures whose brightest corner is the class."""
    g = torch.Generator().manual_seed(5)
    samples = []
    for i in range(count):
        image, room = torch.randn(3, 16, 16, generator=g), i % classes
        image[:, 8 * (room // 2) : 8 * (room // 2) + 8, 8 * (room % 2) : 8 * (room % 2) + 8] += 2.0
        samples.append({"image": image, "room": torch.tensor(room)})
    return samples


def vit(**overrides):
    return pictures.tiny(**overrides).add_task(pictures.NEW, init_from="depth")


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def of(model, x, names):
    return {name: model(x, tasks=[name])[name] for name in names}


@every_way
def test_each_way_trains_what_it_says_and_leaves_a_plain_model(train, tmp_path):
    model, x = vit(), pictures.images(4)
    before = state(model)
    others = of(model, x, pictures.NAMES)
    tuned = moe_mtl.finetune(model, rooms(), train, **FAST)
    assert tuned is model and not model.training
    after = state(model)
    changed = {
        n for n in before if n not in after or before[n].shape != after[n].shape or not before[n].equal(after[n])
    }
    own = {n for n in changed if n.startswith("heads.room") or (".router.weight.3" in n)}
    experts = {n for n in changed if ".experts." in n}
    assert {n for n in own if n.startswith("heads.")} and {n for n in own if "router" in n}
    assert bool(experts) == (train != "router+head")
    rest = changed - own - experts
    if train == "new-experts":  # only copies of it grew
        assert all(before[n].equal(after[n][: len(before[n])]) for n in experts)
        assert all("router.weight" in n or "hidden_from" in n for n in rest)
    else:
        assert bool(rest) == (train == "all")
    assert same(of(model, x, pictures.NAMES), others) == (train == "router+head")
    moved = model.finetuning.moved
    assert list(moved) == pictures.NAMES and ("other predictions moved" in str(model.finetuning)) != (
        train in KEEP_OTHERS
    )
    if train in KEEP_OTHERS:
        for name, y in of(model, x, pictures.NAMES).items():
            torch.testing.assert_close(y, others[name], rtol=1e-5, atol=1e-5)
    assert (max(moved.values()) == 0) == (train == "router+head") and min(moved.values()) >= 0
    assert all(p.requires_grad for p in model.parameters())
    save(model, tmp_path)
    assert same(of(load(tmp_path), x, ["room", "depth"]), of(model, x, ["room", "depth"]))
    small = extract(model, "room")
    torch.testing.assert_close(small(x)["room"], of(model, x, ["room"])["room"], rtol=1e-5, atol=1e-6)


def test_training_of_new_experts_leaves_other_tasks_bit_equal():
    model, x = vit(), pictures.images(4)
    dense = of(model, x, ["room"])["room"]
    usage = expert_usage(model, [x], tasks=["room"])
    new = add_experts(model, "room", usage, 3)
    assert new == {"blocks.0": (7, 8, 9), "blocks.1": (7, 8, 9)}
    torch.testing.assert_close(of(model, x, ["room"])["room"], dense, rtol=1e-5, atol=1e-6)  # copies, in their place
    others = of(model, x, pictures.NAMES)
    only = OnlyNew({layer.experts: 3 for layer in model.moe_layers.values()})
    torch.testing.assert_close(of(model, x, ["room"])["room"], dense, rtol=1e-5, atol=1e-6)  # still copies
    with torch.no_grad():
        for p in only.parameters:
            p.normal_()
    drawn = {id(p): p.detach().clone() for p in only.parameters}
    assert same(of(model, x, pictures.NAMES), others)
    changed = of(model, x, ["room"])["room"]
    only.merge()
    assert same(of(model, x, pictures.NAMES), others) and torch.equal(of(model, x, ["room"])["room"], changed)
    bank = model.moe_layers["blocks.0"].experts
    assert any(torch.equal(bank.w1[7:], p) for p in drawn.values())
    assert not torch.allclose(of(model, x, ["room"])["room"], dense)
    used = expert_usage(model, [x], tasks=["room", "depth"])["blocks.0"].slots
    assert used[3, 7:].sum() > 0 and used[0, 7:].sum() == 0  # room's, and no other's
    assert extract(model, "depth").extraction.layers["blocks.0"].kept == tuple(range(7))
    kept = set(extract(model, "room").extraction.layers["blocks.0"].kept)
    assert len(kept) == 7 and kept >= {7, 8, 9}


def test_new_experts_stand_in_for_the_most_used():
    model, x = vit(), pictures.images(8)
    mass = expert_usage(model, [x], tasks=["room"])["blocks.0"].mass[3]
    add_experts(model, "room", expert_usage(model, [x], tasks=["room"]), 2)
    gone = set(range(7)) - set(model.moe_layers["blocks.0"].gate.reachable(3))
    assert gone == set(mass.argsort(descending=True)[:2].tolist())


def test_new_experts_of_a_pruned_model(tmp_path):
    model, x = vit(), pictures.images(4)
    pruned = extract(model, ["room", "depth"], calibration=[x], mass=0.3)
    few = [len(layer.kept_experts) for layer in pruned.moe_layers.values()]
    assert min(few) < 7
    before = of(pruned, x, ["room", "depth"])
    moe_mtl.finetune(pruned, rooms(), "new-experts", tasks="room", new_experts=1, **FAST)
    torch.testing.assert_close(of(pruned, x, ["depth"])["depth"], before["depth"], rtol=1e-5, atol=1e-5)
    assert [len(layer.kept_experts) for layer in pruned.moe_layers.values()] == [n + 1 for n in few]
    save(pruned, tmp_path)
    assert same(of(load(tmp_path), x, ["room"]), of(pruned, x, ["room"]))


def test_it_learns_and_keeps_the_best_weights(capsys):
    model = vit()
    moe_mtl.finetune(model, rooms(64), "all", val=rooms(16), steps=200, lr=3e-3, patience=10)
    found = model.finetuning
    assert found.after["room"]["accuracy"] > 0.9 > found.before["room"]["accuracy"]
    assert found.kept <= found.steps <= 200
    assert "finetune: all" in capsys.readouterr().err


def test_how_far_other_tasks_moved_is_told():
    samples = rooms(10)
    x, model = torch.stack([sample["image"] for sample in samples]), vit()
    before = of(model, x, pictures.NAMES)
    moe_mtl.finetune(model, samples, "all", val=False, **{**FAST, "batch_size": 5})
    for name, y in of(model, x, pictures.NAMES).items():
        expected = (y - before[name]).square().mean().sqrt() / before[name].square().mean().sqrt()
        assert model.finetuning.moved[name] == pytest.approx(float(expected), rel=1e-3) and expected > 1e-3


def test_predictions_of_one_sample_have_a_size_to_compare_with():
    before, after = [{"tilt": torch.tensor([2.0])}], [{"tilt": torch.tensor([2.5])}]
    assert _moved(before, after) == {"tilt": 0.25} and _moved([], []) == {}


def test_all_samples_are_learned_from_where_none_is_to_validate_on():
    class Noted(list):
        def __init__(self, rows):
            super().__init__(rows)
            self.read = set()

        def __getitem__(self, i):
            self.read.add(i)
            return super().__getitem__(i)

    found = {}
    for val in (None, False):
        data, model = Noted(rooms(10)), vit()
        learn, validate, _ = samples_of(model, data, val, 0)
        assert len(learn) == (10 if val is False else 8) and (validate is None) == (val is False)
        moe_mtl.finetune(model, data, tasks="room", val=val, **{**FAST, "batch_size": 5, "patience": 1, "lr": 1.0})
        found[val] = model.finetuning
        assert data.read == set(range(10))
    assert found[False].before == {} and (found[False].steps, found[False].kept) == (12, 12)
    assert found[None].before and found[None].steps < 12  # that rate ends it early


def test_low_rank_updates_merge_to_what_they_computed():
    model, x = vit().double(), pictures.images(4).double()
    names, before = [n for n, _ in model.named_parameters()], of(model, x, ["room"])["room"]
    experts = {n: m.experts for n, m in model.named_modules() if hasattr(m, "experts")}
    lora = ExpertLora(model, {f"{n}.experts": part for n, part in experts.items()}, 2, 4.0)
    torch.testing.assert_close(of(model, x, ["room"])["room"], before, rtol=0, atol=1e-12)
    with torch.no_grad():
        for p in lora.parameters:
            p.normal_(std=0.3)
    changed = of(model, x, ["room"])["room"]
    assert not torch.allclose(changed, before)
    lora.merge()
    torch.testing.assert_close(of(model, x, ["room"])["room"], changed, rtol=1e-9, atol=1e-9)
    assert sorted(n for n, _ in model.named_parameters()) == sorted(names)


def table_samples(count=24):
    r = tables.rows(count)
    return [{"table": {k: v[i] for k, v in r.items()}, "extra": torch.tensor(float(i % 2))} for i in range(count)]


@pytest.mark.parametrize("train", WAYS)
@pytest.mark.parametrize("name", ["mmoe_table", "ple_table", "mmoeex_table", "home_table"])
def test_tables(name, train, tmp_path):
    model = tables.make(name).add_task(Task.binary("extra"), init_from="click")
    x = tables.rows(6)
    others = of(model, x, ["click", "time"])
    if name == "home_table" and train == "new-experts":
        before = state(model)
        with pytest.raises(ValueError, match=r"train: level\.1 .* cannot show experts"):
            moe_mtl.finetune(model, table_samples(), train, **FAST)
        assert same(state(model), before)
        return
    before = of(model, x, ["extra"])["extra"]
    moe_mtl.finetune(model, table_samples(), train, **FAST)
    assert not torch.equal(of(model, x, ["extra"])["extra"], before)
    after = of(model, x, ["click", "time"])
    assert same(after, others) == (train == "router+head") or train == "new-experts"
    if train in KEEP_OTHERS:
        for task, y in after.items():
            torch.testing.assert_close(y, others[task], rtol=1e-5, atol=1e-6)
    save(model, tmp_path)
    assert same(of(load(tmp_path), x, ["extra", "click"]), of(model, x, ["extra", "click"]))
    torch.testing.assert_close(extract(model, "extra")(x)["extra"], of(model, x, ["extra"])["extra"])


@every_way
def test_texts(train, tmp_path):
    folder = save_encoder(tmp_path / "encoder")
    tasks = [Task.classification("topic", 2), Task.tagging("city", ["O", "B-city"])]
    torch.manual_seed(0)
    model = moe_mtl.create_model("text_moe", tasks=tasks, encoder=str(folder), experts=3, k=1, blocks=[1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    mood = Task.classification("mood", 2)
    model.eval().add_task(mood)
    texts = [{"text": t, "mood": i % 2} for i, t in enumerate(["play yesterday", "weather in rome ?"] * 8)]
    rows = TextSplit(texts, [mood], tokenizer)
    x = rows.__getitems__([0, 1, 2])["text"]
    others = of(model, x, ["topic", "city"])
    data = [rows[i] for i in range(len(rows))] if train == "lora" else rows  # a plain list will do, too
    moe_mtl.finetune(model, data, train, **FAST)
    after = of(model, x, ["topic", "city"])
    assert same(after, others) or train not in KEEP_OTHERS
    assert model.finetuning.after["mood"]
    save(model, tmp_path / "saved")
    assert same(of(load(tmp_path / "saved"), x, ["mood"]), of(model, x, ["mood"]))


def test_learning_rates_per_group_and_only_the_tasks_asked_for():
    samples = [s | {"scene": torch.tensor(i % 3)} for i, s in enumerate(rooms())]
    model = vit()
    before = state(model)
    moe_mtl.finetune(model, samples, tasks="scene", lr_scales={"*.gate.*": 0.0}, **FAST)
    changed = {n.split(".")[0] + "." + n.split(".")[1] for n, t in model.state_dict().items() if not t.equal(before[n])}
    assert changed == {"heads.scene"} and model.finetuning.tasks == ("scene",)
    both = moe_mtl.finetune(vit(), samples, **FAST).finetuning
    assert both.tasks == ("scene", "room")


def test_a_frozen_part_stays_frozen_and_running_statistics_stand_still():
    model = tables.make("home_table").add_task(Task.binary("extra"), init_from="click")
    statistics = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
    assert statistics
    moe_mtl.finetune(model, table_samples(), **FAST)
    assert all(torch.equal(b, statistics[n]) for n, b in model.named_buffers() if n in statistics)
    moe_mtl.finetune(model, table_samples(), "all", **FAST)
    assert not all(torch.equal(b, statistics[n]) for n, b in model.named_buffers() if n in statistics)


def test_samples_are_held_out_and_few_are_not():
    model = vit()
    learn, held, _ = samples_of(model, rooms(20), None, 0)
    assert isinstance(learn, Subset) and (len(learn), len(held)) == (16, 4)
    assert not set(learn.indices) & set(held.indices)
    assert samples_of(model, rooms(4), None, 0)[1] is None
    moe_mtl.finetune(model, rooms(4), **FAST)
    assert model.finetuning.steps == 12 and model.finetuning.before == {}


def test_an_interrupted_or_diverging_run_leaves_the_model_as_it_was(monkeypatch):
    for train in WAYS:
        model, x = vit(), pictures.images(4)
        before, y = state(model), of(model, x, ["room", "depth"])
        with pytest.raises(TrainingDiverged):
            moe_mtl.finetune(model, rooms(), train, steps=50, lr=1e30, progress=False, grad_clip=0.0)
        assert same(state(model), before) and same(of(model, x, ["room", "depth"]), y)
        assert all(p.requires_grad for p in model.parameters())
    from moe_mtl.trainer import Trainer

    monkeypatch.setattr(Trainer, "fit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        moe_mtl.finetune(model, rooms(), "lora", **FAST)
    assert same(state(model), before)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train": "head"}, "train: unknown 'head'"),
        ({"tasks": ["rom"]}, "tasks: unknown task 'rom'"),
        ({"tasks": ["depth"]}, "tasks: no sample has a label of depth"),
        ({"data": []}, "data: got no samples"),
        ({"data": {"image": 1}}, "data: got a dict"),
        ({"data": [{"image": torch.zeros(3, 16, 16)}] * 6}, "data: no sample has a label of any of"),
        ({"data": rooms(8, classes=6)}, "task 'room' has class ids 0 to"),
        ({"stepz": 3}, "stepz: no such option"),
        ({"out": "runs/x"}, "out: finetune writes no folder"),
        ({"lr_scales": {"nothing.*": 1.0}}, "lr_scales: 'nothing"),
        ({"train": "lora", "rank": 0}, "rank: got 0"),
        ({"train": "new-experts", "new_experts": 8}, "new_experts: got 8, expected 1 to 7"),
    ],
)
def test_refusals_change_nothing(change, message):
    model = vit()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        moe_mtl.finetune(model, change.pop("data", None) if "data" in change else rooms(), **{**FAST, **change})
    assert same(state(model), before) and all(p.requires_grad for p in model.parameters())


def test_models_that_cannot_be_trained_this_way():
    dense = moe_mtl.create_model("shared_bottom_micro", tasks=[Task.classification("room", 4)], image_size=16, depth=1)
    for train in ("lora", "experts", "new-experts"):
        with pytest.raises(ValueError, match="train: the model has no experts"):
            moe_mtl.finetune(dense, rooms(), train, **FAST)
    alone = moe_mtl.create_model("single_task_micro", tasks=[Task.classification("room", 4)], image_size=16, depth=1)
    with pytest.raises(ValueError, match="train: a SingleTaskSet shares nothing"):
        moe_mtl.finetune(alone, rooms(), **FAST)
    moe_mtl.finetune(alone, rooms(), "all", **FAST)
    blind = vit(gate="task_blind")
    with pytest.raises(ValueError, match=r"train: .* cannot show experts"):
        moe_mtl.finetune(blind, rooms(), "new-experts", **FAST)
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 16}
    encoder = transformers.BertModel(transformers.BertConfig(vocab_size=30, **sizes))
    split = moefy(encoder, [Task.classification("room", 4)], experts=2, k=2, every=1, hidden="split")
    text = {"input_ids": torch.ones(4, dtype=torch.int64), "attention_mask": torch.ones(4, dtype=torch.int64)}
    texts = [{"text": text, "room": torch.tensor(i % 4)} for i in range(8)]
    with pytest.raises(ValueError, match="train: experts of hidden='split'"):
        moe_mtl.finetune(split, texts, "new-experts", **FAST)


def test_stages_of_one_process_train_together_alone():
    from tests import test_esmm as stages

    model = stages.make().eval()
    x = stages.rows(24)
    samples = [
        {"table": {k: v[i] for k, v in x.items()}, model.tasks[0].name: torch.tensor(float(i % 2))} for i in range(24)
    ]
    before = state(model)
    moe_mtl.finetune(model, samples, "all", **FAST)
    assert not same(state(model), before)
    with pytest.raises(ValueError, match="task: the tasks of esmm_table are stages"):
        moe_mtl.finetune(model, samples, **FAST)


def test_only_samples_with_labels_of_the_tasks_are_drawn(tmp_path):
    folder = save_encoder(tmp_path / "encoder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tasks = [Task.classification("topic", 2), Task.classification("mood", 2)]
    torch.manual_seed(0)
    model = moe_mtl.create_model("text_shared_bottom", tasks=tasks, encoder=str(folder)).eval()
    texts = [{"text": "play yesterday", "topic": 0}] * 40 + [{"text": "weather in rome ?", "mood": 1}] * 4
    learn = with_labels(model, TextSplit(texts, tasks, tokenizer), ["mood"])
    assert len(learn) == 4 and all("mood" in learn[i] for i in range(4))
    moe_mtl.finetune(model, TextSplit(texts, tasks, tokenizer), tasks="mood", val=learn, **FAST)
    assert model.finetuning.after["mood"]["accuracy"] == 1.0


def test_samples_in_a_list_are_held_out_among_those_with_labels():
    samples = [{**s, "room": s["room"] if i % 3 == 0 else [None, torch.tensor(-100)][i % 2]}
               for i, s in enumerate(rooms(60))]  # fmt: skip
    learn, held, names = samples_of(vit(), samples, None, 0, ["room"])
    assert names == ["room"] and (len(learn), len(held)) == (16, 4)
    assert all(s["room"] is not None and s["room"] >= 0 for part in (learn, held) for s in part)
    few = [{**s, "room": s["room"] if i % 12 == 0 else None} for i, s in enumerate(rooms(40))]
    model = moe_mtl.finetune(vit(), few, tasks=["room"], **FAST)
    assert model.finetuning.steps == model.finetuning.kept == FAST["steps"]  # too few to hold some out
    assert not model.finetuning.before


def test_validation_samples_without_a_label_are_refused():
    without = [{**s, "room": None} for s in rooms(8)]
    with pytest.raises(ValueError, match=r"val: none of the 8 samples .* has a label of room; .* val=False"):
        moe_mtl.finetune(vit(), rooms(8), val=without, **FAST)
