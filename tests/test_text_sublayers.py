"""Encoders with a sublayer per task: the dense encoder at first, tasks apart, each task's copies its own."""

import copy

import pytest
import torch

import moe_mtl
from moe_mtl import create_model, extract
from moe_mtl.backbones.hf_attention import TaskAttention, find_attention
from moe_mtl.backbones.hf_encoder import find_layers
from tests.test_encoders import ENCODERS, NAMES, TASKS, encoder, hidden, texts

every_encoder = pytest.mark.parametrize("kind", ENCODERS)
both = pytest.mark.parametrize("sublayer", ["ffn", "attention"])


def build(kind="bert", sublayer="attention", **options):
    """A model on a random encoder, in float64."""
    config = encoder(kind).config.to_dict()
    return create_model("text_sublayers", tasks=TASKS, encoder=config, sublayer=sublayer, **options).double().eval()


def started(kind, sublayer, tmp_path):
    """A dense encoder, and the model that reads its folder."""
    dense = encoder(kind)
    dense.save_pretrained(tmp_path)
    return dense.double(), create_model(
        "text_sublayers", tasks=TASKS, encoder=str(tmp_path), sublayer=sublayer
    ).double()


def shaken(model):
    """Every parameter moved, so that copies and experts differ."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def owned(model, task):
    """What belongs to a task alone: names of its copies' and head's parameters, and of banks, where it has a row."""
    attention = [f".copies.{task}.", f"heads.{NAMES[task]}."]
    return [name for name, _ in model.named_parameters() if any(part in name for part in attention)]


def poison(model, task):
    """NaN in everything that belongs to a task."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in owned(model, task):
                parameter.fill_(torch.nan)
            elif ".experts." in name:
                parameter[task] = torch.nan


@both
@every_encoder
def test_features_are_those_of_the_dense_encoder_at_first(kind, sublayer, tmp_path):
    dense, model = started(kind, sublayer, tmp_path)
    model.eval()
    x = texts()
    with torch.no_grad():
        expected = dense(**x).last_hidden_state
    real = x["attention_mask"].bool()
    for found in hidden(model, x):
        torch.testing.assert_close(found[real], expected[real], rtol=1e-9, atol=1e-9)
    a, b, *_ = hidden(shaken(model), x)
    assert (a - b)[real].abs().max() > 1e-3


@both
@every_encoder
def test_a_task_alone_extracted_and_per_sample_is_what_it_is_among_others(kind, sublayer):
    model, x = shaken(build(kind, sublayer)), texts()
    full = model(x)
    assert {name: tuple(p.shape) for name, p in full.items()} == {
        "intent": (3, 5), "spam": (3,), "score": (3,), "tags": (3, 3)
    }  # fmt: skip
    for name in NAMES:
        torch.testing.assert_close(model(x, tasks=[name])[name], full[name])
        alone = extract(model, name)
        torch.testing.assert_close(alone(x)[name], full[name])
        assert not alone.training
        one = {key: values[1:2, :5] for key, values in x.items()}  # a batch of one, without its padding
        torch.testing.assert_close(model(one)[name], full[name][1:2])
        torch.testing.assert_close(alone(one)[name], full[name][1:2])
    some = extract(model, ["tags", "spam"])  # in another order
    found = some(x)
    assert list(found) == ["tags", "spam"]
    for name, prediction in found.items():
        torch.testing.assert_close(prediction, full[name])
        torch.testing.assert_close(some(x, tasks=[name])[name], full[name])
    for ids in ([1, 0, 1], [3, 3, 3], [2, 1, 0]):
        for i in set(ids):
            rows, prediction = model(x, tasks=torch.tensor(ids))[NAMES[i]]
            assert rows.tolist() == [row for row, of in enumerate(ids) if of == i]
            torch.testing.assert_close(prediction, full[NAMES[i]][rows])


@both
@every_encoder
def test_nan_in_another_task_changes_nothing(kind, sublayer):
    model, x = shaken(build(kind, sublayer)), texts()
    ids = torch.tensor([2, 0, 2])
    calls = {"alone": lambda m: m(x, tasks=["score"])["score"], "rows": lambda m: m(x, tasks=ids)["score"][1]}
    calls["some"] = lambda m: m(x, tasks=["intent", "score"])["score"]
    poisoned = copy.deepcopy(model)
    poison(poisoned, 1)
    assert poisoned(x, tasks=["spam"])["spam"].isnan().all()
    for name, call in calls.items():
        results = []
        for one in (model, poisoned):
            one.zero_grad()
            prediction = call(one)
            prediction.square().sum().backward()
            own = [p.grad for n, p in one.named_parameters() if n in owned(one, 2)]
            assert all(grad.abs().max() > 0 for grad in own)
            results.append([prediction.detach(), *own])
        for clean, other in zip(*results, strict=True):
            assert clean.isfinite().all() and torch.equal(clean, other), name


@both
@every_encoder
def test_an_extracted_task_has_one_copy_and_is_saved_as_such(kind, sublayer, tmp_path):
    model, x = shaken(build(kind, sublayer)).float(), texts()
    alone = extract(model, "score")
    sizes = [len(m.copies) for m in alone.backbone.modules() if isinstance(m, TaskAttention)]
    banks = [moe.experts.num_experts for moe in alone.moe_layers.values()]
    assert (sizes or banks) == [1, 1]
    dense = create_model("text_shared_bottom", tasks=TASKS[2:3], encoder=model.config["args"]["encoder"])
    assert sum(p.numel() for p in alone.parameters()) == sum(p.numel() for p in dense.parameters())
    if kind.startswith("t5"):  # its embeddings stand under two names, which a weights file does not take
        return
    for one in (model, alone, extract(model, ["tags", "spam"])):
        folder = moe_mtl.save(one, tmp_path / str(len(one.tasks)))
        read = moe_mtl.load(folder)
        with torch.no_grad():
            found, expected = read(x), one(x)
        assert found.keys() == expected.keys()
        for name in found:
            torch.testing.assert_close(found[name], expected[name])


@every_encoder
def test_every_copy_runs_on_the_rows_of_its_task(kind):
    model, x = build(kind, blocks=[1, 2]), texts()
    seen = []
    for i, layer in enumerate(find_layers(model.backbone)):
        holder, name = find_attention(layer)
        attention = getattr(holder, name)
        copies = list(attention.copies) if isinstance(attention, TaskAttention) else [attention]
        assert len(copies) == (4 if i in (1, 2) else 1)
        for task, one in enumerate(copies):
            one.register_forward_hook(lambda m, args, y, i=i, task=task: seen.append((i, task, args[0].shape[0])))
    model(x)  # the first layer once, then stacked
    assert seen == [(0, 0, 3), *((i, task, 3) for i in (1, 2) for task in range(4)), (3, 0, 12)]
    seen.clear()
    model(x, tasks=["spam"])
    assert seen == [(0, 0, 3), (1, 1, 3), (2, 1, 3), (3, 0, 3)]
    seen.clear()
    model(x, tasks=torch.tensor([3, 0, 3]))
    assert seen == [(0, 0, 3), (1, 0, 1), (1, 3, 2), (2, 0, 1), (2, 3, 2), (3, 0, 3)]


@both
@every_encoder
def test_padding_changes_nothing(kind, sublayer):
    model, x = shaken(build(kind, sublayer)), texts()
    full = model(x)
    for i, length in enumerate((7, 5, 3)):
        for name, prediction in model({key: values[i : i + 1, :length] for key, values in x.items()}).items():
            torch.testing.assert_close(prediction, full[name][i : i + 1])


def test_first_layer_of_t5_keeps_a_table_of_positions_per_task():
    """Its relative positions reach all later layers: those of the copy, for the rows of its task."""
    model, x = shaken(build("t5", blocks=[0])), texts()
    full = model(x)
    for name in NAMES:
        torch.testing.assert_close(model(x, tasks=[name])[name], full[name])
    rows, prediction = model(x, tasks=torch.tensor([1, 0, 1]))["spam"]
    torch.testing.assert_close(prediction, full["spam"][rows])
    with torch.no_grad():
        attention = model.backbone.encoder.block[0].layer[0].SelfAttention
        attention.copies[1].relative_attention_bias.weight.add_(3.0 * torch.rand(32, 2))
    moved = model(x)
    assert (moved["spam"] - full["spam"]).abs().max() > 1e-6
    for name in set(NAMES) - {"spam"}:
        torch.testing.assert_close(moved[name], full[name], rtol=0, atol=0)


def test_a_task_that_takes_no_part_in_a_step_stays_bit_equal():
    model, x = shaken(build()).train(), texts()
    own = [p for task in range(4) for n, p in model.named_parameters() if n in owned(model, task)]
    optimizer = torch.optim.AdamW(own, lr=0.1, weight_decay=0.1)  # what all tasks share is left as it is

    def step(tasks):
        optimizer.zero_grad()
        found = model.train()(x, tasks=tasks)
        sum(p[1].square().sum() if isinstance(p, tuple) else p.square().sum() for p in found.values()).backward()
        optimizer.step()
        with torch.no_grad():
            return model.eval()(x)

    before = step(NAMES)  # fills the momentum of all
    for tasks, moved in ((["spam"], {"spam"}), (torch.tensor([2, 0, 2]), {"intent", "score"})):
        after = step(tasks)
        assert {name for name in NAMES if not torch.equal(after[name], before[name])} == moved
        before = after


@both
def test_every_parameter_of_a_sublayer_learns(sublayer):
    model = shaken(build(sublayer=sublayer)).train()
    sum((p * torch.randn_like(p)).sum() for p in model(texts(8, 15)).values()).backward()
    for name, parameter in model.named_parameters():
        private = ".copies." in name or ".moe." in name or name.startswith("heads")
        # the bias of keys shifts all scores of a query alike, which the softmax takes out
        if private and not name.endswith("key.bias"):
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_feed_forward_copies_are_experts_of_their_task():
    model, x = build(sublayer="ffn"), texts()
    _, routings = model(x, return_routing=True)
    assert list(routings) == ["layer.1", "layer.3"]
    for routing in routings.values():
        assert routing.indices.flatten().tolist() == [task for task in range(4) for _ in range(21)]
        assert (routing.weights == 1).all()
    assert model(x, return_routing=True)[0].keys() == model(x).keys()
    assert build()(x, return_routing=True)[1] == {}


@both
def test_tasks_can_be_taken_away_but_not_added(sublayer, tmp_path):
    model, x = shaken(build(sublayer=sublayer)).float(), texts()
    full = model(x)
    model.remove_task("spam")
    assert list(model(x)) == ["intent", "score", "tags"]
    for one in (model, moe_mtl.load(moe_mtl.save(model, tmp_path))):
        for name, prediction in one(x).items():
            torch.testing.assert_close(prediction, full[name])
    with pytest.raises(ValueError, match="task: TaskSublayersModel takes no new task"):
        model.add_task(moe_mtl.Task.binary("late"))


def test_a_copy_of_the_model_has_a_context_of_its_own():
    model, x = build(), texts()
    other = copy.deepcopy(model)
    with model.context.open((0, 1)):
        assert other(x)["spam"].shape == (3,)


def test_mistakes():
    config = encoder().config.to_dict()

    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            create_model("text_sublayers", **{"tasks": TASKS, "encoder": config, **options})

    refused("sublayer: unknown 'attn'; did you mean 'attention'", sublayer="attn")
    refused("sublayers: no such model option; did you mean 'sublayer'", sublayers="ffn")
    refused("encoder: name the folder of an encoder", encoder="")
    refused("blocks: got", blocks=[4], sublayer="attention")
    refused("every: got 9, expected 1 to 4", every=9, sublayer="attention")
    refused("tasks: 'map' is of kind depth; for texts", tasks=[moe_mtl.Task.depth("map")], sublayer="attention")
    model = build()
    with pytest.raises(RuntimeError, match="has no task: call the MultiTaskModel, not its backbone"):
        for layer in find_layers(model.backbone):
            layer._forward_pre_hooks.clear()
        model.backbone(**texts())


def test_a_tasks_own_is_its_head_and_its_attention():
    model = build()
    own = {id(p) for p in model.own_parameters(NAMES[1])}
    named = {n for n, p in model.named_parameters() if id(p) in own}
    assert named == {n for n, _ in model.named_parameters() if n.startswith(f"heads.{NAMES[1]}.") or ".copies.1." in n}
    assert any(".copies.1." in n for n in named)
