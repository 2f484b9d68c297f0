"""Prompts per task before a frozen encoder: by hand, against peft, tasks apart, never pooled, saved, trained."""

import copy

import pytest
import torch
from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding, MultitaskPromptTuningConfig
from torch import nn

import moe_mtl
from moe_mtl import create_model, extract
from moe_mtl.backbones.hf_encoder import count_positions
from moe_mtl.backbones.hf_model import MoeMtlModel
from moe_mtl.data import Snips
from moe_mtl.models.text_prompt import TaskPrompts
from moe_mtl.parameter_groups import decays
from moe_mtl.tasks import Task
from moe_mtl.trainer import Trainer
from moe_mtl.trainer_config import TrainerConfig
from tests.test_encoders import ENCODERS, NAMES, TASKS, texts
from tests.text_cases import save_encoder, write_snips

every_encoder = pytest.mark.parametrize("kind", ENCODERS)


def build(kind="bert", **options):
    """A model on a random encoder, in float64, its prompts and heads moved so that tasks differ."""
    torch.manual_seed(0)
    config = ENCODERS[kind]().config.to_dict()
    model = create_model("text_prompt", **{"tasks": TASKS, "encoder": config, "tokens": 4, **options}).double().eval()
    with torch.no_grad():
        for parameter in (*model.prompts.parameters(), *model.heads.parameters()):
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def of_task(model, task):
    """Names of what belongs to a task alone."""
    lists = [f"prompts.{name}.{task}" for name in ("columns", "rows", "own")]
    return {name for name, _ in model.named_parameters() if name in lists or name.startswith(f"heads.{NAMES[task]}.")}


# ---- prompts


def test_prompts_by_hand():
    # P = [[1, 2], [3, 4]]; task 0: U = (1, 2), V = (1, -1): U V = [[1, -1], [2, -2]]; task 1: U = (0, 1), V = (5, 7)
    prompts = TaskPrompts(nn.Embedding(9, 2), 2, 2, 1)
    with torch.no_grad():
        prompts.shared.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        for i, (u, v) in enumerate([([1.0, 2.0], [1.0, -1.0]), ([0.0, 1.0], [5.0, 7.0])]):
            prompts.columns[i].copy_(torch.tensor(u).unsqueeze(1))
            prompts.rows[i].copy_(torch.tensor(v).unsqueeze(0))
    first, second = [[1.0, -2.0], [6.0, -8.0]], [[0.0, 0.0], [15.0, 28.0]]
    assert prompts([0, 1]).tolist() == [first, second] and prompts([1]).tolist() == [second]
    prompts.keep_tasks([1, 0])
    prompts.multiply_out()
    assert prompts([0, 1]).tolist() == [second, first]
    assert sorted(name for name, _ in prompts.named_parameters()) == ["own.0", "own.1"]


@pytest.mark.parametrize("rank", [1, 3])
def test_prompts_are_those_of_peft(rank):
    torch.manual_seed(0)
    words = nn.Embedding(30, 6)
    ours = TaskPrompts(words, 3, 4, rank)
    how = {"task_type": "FEATURE_EXTRACTION", "num_virtual_tokens": 4, "token_dim": 6, "num_transformer_submodules": 1}
    theirs = MultitaskPromptEmbedding(MultitaskPromptTuningConfig(num_ranks=rank, num_tasks=3, **how), words)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter))
        theirs.embedding.weight.copy_(ours.shared)
        theirs.prefix_task_cols.copy_(torch.stack(tuple(ours.columns)))
        theirs.prefix_task_rows.copy_(torch.stack(tuple(ours.rows)))
    ids = torch.tensor([2, 0])
    a, b = ours(ids.tolist()), theirs(torch.arange(4).expand(2, 4), ids)
    torch.testing.assert_close(a, b)
    cotangent = torch.randn_like(a)
    a.backward(cotangent)
    b.backward(cotangent)
    torch.testing.assert_close(ours.shared.grad, theirs.embedding.weight.grad)
    for task in ids.tolist():
        torch.testing.assert_close(ours.columns[task].grad, theirs.prefix_task_cols.grad[task])
        torch.testing.assert_close(ours.rows[task].grad, theirs.prefix_task_rows.grad[task])
    assert ours.columns[1].grad is None and ours.rows[1].grad is None  # where peft has zeros
    assert not theirs.prefix_task_cols.grad[1].any()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_prompts_start_as_words_alike_for_every_task(rank):
    torch.manual_seed(0)
    words = nn.Embedding(30, 6)
    found = TaskPrompts(words, 2, 5, rank)(range(2))
    for prompt in found.flatten(0, 1) if rank == 0 else found[0]:
        assert (prompt - words.weight).abs().amax(dim=1).min() < 0.3 * bool(rank) + 1e-9
    if rank:  # the shared prompt times entries that are 1 give or take 0.06
        torch.testing.assert_close(found[0], found[1], rtol=0.3, atol=0.01)


# ---- in an encoder


@every_encoder
def test_a_prompt_of_words_is_a_text_with_these_words_before_it(kind):
    """Prompts are seen as words are, and are gone from the features."""
    model, x = build(kind, rank=0), texts()
    before = torch.tensor([[7, 9, 31, 4], [11, 12, 13, 14], [8, 8, 8, 8], [21, 3, 5, 40]])
    dense = model.backbone
    with torch.no_grad():
        for own, ids in zip(model.prompts.own, before, strict=True):
            own.copy_(dense.get_input_embeddings()(ids))
        features, routings = model.features(x, (0, 1, 2, 3))
        found, pooled = features.patches.unflatten(0, (4, 3)), features.pooled.unflatten(0, (4, 3))
        for task, ids in enumerate(before):
            whole = torch.cat([ids.expand(3, -1), x["input_ids"]], dim=1)
            mask = torch.cat([torch.ones(3, 4, dtype=torch.int64), x["attention_mask"]], dim=1)
            expected = dense(input_ids=whole, attention_mask=mask).last_hidden_state[:, 4:]
            real = x["attention_mask"].bool()
            torch.testing.assert_close(found[task][real], expected[real])
            means = torch.stack([row[keep].mean(dim=0) for row, keep in zip(expected, real, strict=True)])
            torch.testing.assert_close(pooled[task], means)
    assert routings == {} and features.patches.shape == (12, 7, 16)
    assert (found[0] - found[1]).abs().max() > 1e-4


@every_encoder
def test_a_task_alone_extracted_and_per_sample_is_what_it_is_among_others(kind):
    model, x = build(kind), texts()
    full = model(x)
    assert {name: tuple(p.shape) for name, p in full.items()} == {
        "intent": (3, 5), "spam": (3,), "score": (3,), "tags": (3, 3)
    }  # fmt: skip
    for name in NAMES:
        torch.testing.assert_close(model(x, tasks=[name])[name], full[name])
        torch.testing.assert_close(extract(model, name)(x)[name], full[name])
        one = {key: values[1:2, :5] for key, values in x.items()}  # a batch of one, without its padding
        torch.testing.assert_close(model(one)[name], full[name][1:2])
    some = extract(model, ["tags", "spam"])
    for name, prediction in some(x).items():
        torch.testing.assert_close(prediction, full[name])
    rows, prediction = model(x, tasks=torch.tensor([1, 0, 1]))["spam"]
    assert rows.tolist() == [0, 2]
    torch.testing.assert_close(prediction, full["spam"][[0, 2]])
    ids_alone = {"input_ids": x["input_ids"][:1]}  # without a mask every token counts
    torch.testing.assert_close(model(ids_alone)["spam"], full["spam"][:1])


@pytest.mark.parametrize("rank", [0, 1])
def test_nan_in_another_task_changes_nothing(rank):
    model, x = build(rank=rank), texts()
    poisoned = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in poisoned.named_parameters():
            if name in of_task(model, 1):
                parameter.fill_(torch.nan)
    assert poisoned(x, tasks=["spam"])["spam"].isnan().all()
    for call in (
        lambda m: m(x, tasks=["score"])["score"],
        lambda m: m(x, tasks=["intent", "score"])["score"],
        lambda m: m(x, tasks=torch.tensor([2, 0, 2]))["score"][1],
    ):
        results = []
        for one in (model, poisoned):
            one.zero_grad()
            prediction = call(one)
            prediction.square().sum().backward()
            shared = [] if rank == 0 else [one.prompts.shared.grad]
            results.append([prediction, *shared, *(p.grad for n, p in one.named_parameters() if n in of_task(one, 2))])
        for clean, other in zip(*results, strict=True):
            assert clean.isfinite().all() and torch.equal(clean, other)


def test_a_task_that_takes_no_part_in_a_step_stays_bit_equal():
    model, x = build().train(), texts()
    own = [p for n, p in model.named_parameters() if any(n in of_task(model, task) for task in range(4))]
    optimizer = torch.optim.AdamW(own, lr=0.1, weight_decay=0.1)  # the shared prompt is left as it is

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


def test_the_encoder_is_frozen_and_prompts_learn():
    model = build().train()
    sum((p * torch.randn_like(p)).sum() for p in model(texts()).values()).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("backbone."):
            assert not parameter.requires_grad and parameter.grad is None, name
        else:
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    assert not any(name.startswith("backbone") for name in decays(model))
    assert {name for name, decay in decays(model).items() if name.startswith("prompts") and decay} == set()


# ---- what is left of it for one task


def test_an_extracted_task_has_a_finished_prompt_alone(tmp_path):
    model, x = build(), texts()
    alone = extract(model, "score")
    assert [name for name, _ in alone.named_parameters() if name.startswith("prompts")] == ["prompts.own.0"]
    assert torch.equal(alone.prompts([0]), model.prompts([2]))
    assert alone.config["args"]["rank"] == 0 and model.config["args"]["rank"] == 1
    pair = extract(model, ["tags", "spam"])
    assert pair.prompts.rank == 1 and torch.equal(pair.prompts([0, 1]), model.prompts([3, 1]))
    for i, one in enumerate((model, alone, pair)):
        one = one.float()
        read = moe_mtl.load(moe_mtl.save(one, tmp_path / str(i)))
        assert not any(p.requires_grad for p in read.backbone.parameters())
        with torch.no_grad():
            for name, prediction in read(x).items():
                torch.testing.assert_close(prediction, one(x)[name])


@pytest.mark.parametrize("rank", [0, 2])
def test_tasks_come_and_go(rank):
    model, x = build(rank=rank), texts()
    full = model(x)
    model.add_task(Task.binary("late"), init_from="score")
    assert torch.equal(model.prompts([4]), model.prompts([2]))
    model.add_task(Task.regression("later"))
    assert not torch.equal(model.prompts([5]), model.prompts([2]))
    found = model(x)
    assert list(found) == [*NAMES, "late", "later"]
    model.remove_task("spam")
    for one in (found, model(x)):
        for name in set(one) & set(full):
            torch.testing.assert_close(one[name], full[name], rtol=1e-9, atol=1e-12)
    assert len(model.prompts([0, 1, 2, 3, 4])) == 5


def test_it_trains_on_texts(tmp_path):
    folder = save_encoder(tmp_path / "mini")
    data = Snips(root=str(write_snips(tmp_path / "snips")), tokenizer=str(folder))
    model = create_model("text_prompt", tasks=data.task_list(), encoder=str(folder), tokens=4)
    before = copy.deepcopy(model.state_dict())
    how = {"steps": 30, "batch_size": 8, "lr": 1e-2, "warmup": 5, "eval_every": 0, "weight_decay": 0.1}
    losses = []
    trainer = Trainer(model, data, TrainerConfig(out=str(tmp_path / "run"), device="cpu", progress=False, **how))
    trainer.fit(on_step=lambda step, found: losses.append(sum(found.values())))
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if not name.startswith("backbone.")}
    x = data.split("train").__getitems__([0, 1, 2])["text"]
    with torch.no_grad():
        for name, prediction in moe_mtl.load(tmp_path / "run")(x).items():
            torch.testing.assert_close(prediction, model(x)[name])


# ---- mistakes


@pytest.mark.parametrize("kind, positions", [("bert", 40), ("roberta", 38), ("t5", None)])
def test_text_and_prompt_must_fit(kind, positions):
    model = build(kind)
    assert count_positions(model.backbone) == positions
    if positions is None:
        assert model(texts(2, 100))["spam"].shape == (2,)
        return
    model(texts(2, positions - 4))
    with pytest.raises(
        ValueError,
        match=rf"input_ids: got texts of {positions - 3} tokens; of the encoder's {positions} positions the prompt "
        rf"takes 4; .*max_length={positions - 4}\)",
    ):
        model(texts(2, positions - 3))
    with pytest.raises(ValueError, match=f"tokens: got {positions}, which leave no room for a text in {positions}"):
        build(kind, tokens=positions)


def test_mistakes():
    model = build()
    with pytest.raises(ValueError, match="x: got position_ids; a prompt goes with input_ids, attention_mask and"):
        model({**texts(), "position_ids": torch.zeros(3, 7, dtype=torch.int64)})
    with pytest.raises(ValueError, match="x: got Tensor, expected a tokenizer's output"):
        model(torch.zeros(2, 3))
    for options, message in [
        ({"tokens": 0}, "tokens: got 0, expected at least 1"),
        ({"rank": -1}, "rank: got -1, expected at least 0"),
        ({"encoder": ""}, "encoder: name the folder"),
        ({"ranks": 1}, "ranks: no such model option; did you mean 'rank'"),
        ({"tasks": [Task.depth("map")]}, "tasks: 'map' is of kind depth; for texts"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(**options)
    with pytest.raises(ValueError, match="model: a 'text_prompt' is more than its encoder and experts"):
        MoeMtlModel.of(model)
    other = copy.deepcopy(model)
    assert other.prompts.shared is not model.prompts.shared


@pytest.mark.parametrize("rank", [0, 1])
def test_a_tasks_own_is_its_head_and_its_prompt(rank):
    model = build(rank=rank)
    for task, name in enumerate(NAMES):
        own = {id(p) for p in model.own_parameters(name)}
        assert {n for n, p in model.named_parameters() if id(p) in own} == of_task(model, task)
