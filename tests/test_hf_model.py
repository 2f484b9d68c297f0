"""Text models as models of transformers: round trips, pipelines, its Trainer, accelerate, the hub."""

import copy
import inspect
import math
from collections import UserDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import moe_mtl
from moe_mtl import create_model, extract, moefy
from moe_mtl.backbones.hf_model import (
    MoeMtlConfig,
    MoeMtlForSequenceClassification,
    MoeMtlForTokenClassification,
    MoeMtlModel,
    to_transformers,
)
from moe_mtl.data import Snips
from moe_mtl.tasks import Task
from tests.test_encoders import ENCODERS, encoder, texts
from tests.text_cases import save_encoder, write_snips

TASKS = (Task.classification("intent", 3, classes=["a", "b", "c"]), Task.tagging("slots", ["O", "B-x", "I-x"]))
TASKS += (Task.regression("score"), Task.binary("spam"), Task.multilabel("topics", 2))


def shaken(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="module")
def model(folder):
    torch.manual_seed(0)
    return shaken(create_model("text_moe", tasks=TASKS, encoder=folder, experts=3, every=1))


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=0, rtol=0)


@pytest.mark.parametrize("kind", ENCODERS)
def test_round_trip_of_every_encoder(kind, tmp_path):
    found = shaken(moefy(encoder(kind), TASKS, experts=3, k=2, every=2, gate="task_embedding"))
    x = texts()
    MoeMtlModel.of(found).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    read, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(read) is MoeMtlModel and not any(
        info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    same(read.model.state_dict(), found.state_dict())
    with torch.no_grad():  # where a weight lies in memory decides in which order a product is summed
        torch.testing.assert_close(read(**x).predictions, found(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            read(**x, tasks=["score"]).predictions, found(x, tasks=["score"]), atol=1e-5, rtol=1e-5
        )
    assert transformers.AutoConfig.from_pretrained(tmp_path).tasks == list(TASKS)


@pytest.mark.parametrize("kind", ["bert", "t5_gated"])
def test_a_moefied_encoder_can_be_saved_here_too(kind, tmp_path):
    found = shaken(moefy(encoder(kind), TASKS, experts=3, k=2, blocks=[-1], gate_args={"noise_std": 0.5}))
    moe_mtl.save(found, tmp_path)
    with torch.no_grad():
        same(moe_mtl.load(tmp_path)(texts()), found(texts()))


def test_dense_and_pruned_models(tmp_path, folder, model):
    dense = shaken(create_model("text_shared_bottom", tasks=TASKS, encoder=folder))
    x = {"input_ids": torch.tensor([[2, 7, 8, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    small = extract(model, "intent", calibration=[{"text": x}])
    for name, one in (("dense", dense), ("small", small)):
        to_transformers(one).save_pretrained(tmp_path / name)
        auto = transformers.AutoModel if name == "dense" else transformers.AutoModelForSequenceClassification
        read = auto.from_pretrained(tmp_path / name)
        assert sum(p.numel() for p in read.parameters()) == sum(p.numel() for p in one.parameters())
        with torch.no_grad():
            expected, got = one(x), read(**x)
        torch.testing.assert_close(got.predictions if name == "dense" else {"intent": got.logits}, expected)
    assert read.config.kept_experts


def test_pipelines_of_one_task(tmp_path, folder, model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    one = to_transformers(extract(model, "intent"))
    assert type(one) is MoeMtlForSequenceClassification
    one.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classify = transformers.pipeline("text-classification", model=str(tmp_path), device="cpu")
    (found,) = classify(["play rome"], top_k=None)
    with torch.no_grad():
        chances = model(dict(tokenizer("play rome", return_tensors="pt")), tasks=["intent"])["intent"][0].softmax(-1)
    assert {row["label"]: row["score"] for row in found} == pytest.approx(
        dict(zip("abc", chances.tolist(), strict=True))
    )

    tagger = to_transformers(extract(model, "slots"))
    assert type(tagger) is MoeMtlForTokenClassification
    tag = transformers.pipeline(
        "token-classification", model=tagger, tokenizer=tokenizer, device="cpu", ignore_labels=[]
    )
    x = tokenizer("weather in oslo", return_tensors="pt")
    with torch.no_grad():
        best = model(dict(x), tasks=["slots"])["slots"][0].argmax(dim=0)
    assert [row["entity"] for row in tag("weather in oslo")] == [TASKS[1].classes[i] for i in best[1:-1].tolist()]


def test_a_binary_task_has_the_one_label_of_its_probability():
    for classes, name in (((), "LABEL_0"), (("ham", "spam"), "spam")):
        config = MoeMtlConfig(task_specs=[Task.binary("mail", classes=classes).to_dict()])
        assert config.id2label == {0: name} and config.num_labels == 1


def test_losses_are_those_of_the_tasks(model):
    wrapped, x = MoeMtlModel.of(model), texts()
    labels = {"intent": torch.tensor([0, 2, -100]), "score": torch.tensor([1.0, float("nan"), 3.0])}
    with torch.no_grad():
        out = wrapped(**x, **labels)
        assert set(out.predictions) == {"intent", "score"}  # what has no label is not run
        expected = sum(t.compute_loss(out.predictions[t.name], labels[t.name]) for t in TASKS if t.name in labels)
        torch.testing.assert_close(out.loss, expected)
        for task, label in [
            (TASKS[0], labels["intent"]),
            (TASKS[2], labels["score"]),
            (TASKS[3], torch.tensor([1, 0, 1])),
            (TASKS[4], torch.tensor([[1.0, 0], [0, 1], [1, 1]])),
        ]:
            one = to_transformers(extract(model, task.name))
            got = one(**x, labels=label)
            reference = task.compute_loss(
                model(x, tasks=[task.name])[task.name],
                label.to(torch.float32 if label.ndim > 1 or task.kind != "classification" else label.dtype),
            )
            torch.testing.assert_close(got.loss, reference)
            assert got.logits.ndim == 2


def test_trainer_of_transformers_trains_all_tasks(tmp_path, folder):
    data = Snips(root=str(write_snips(tmp_path / "snips")), tokenizer=folder)
    wrapped = to_transformers(create_model("text_moe", tasks=data.task_list(), encoder=folder, experts=2, every=1))
    before = copy.deepcopy(wrapped.state_dict())

    def flat(batch):
        return {**batch["text"], **{task.name: batch[task.name] for task in data.task_list()}}

    how = {"use_cpu": True, "report_to": [], "remove_unused_columns": False, "disable_tqdm": True, "max_steps": 6}
    how |= {"learning_rate": 1e-2, "per_device_train_batch_size": 8, "save_steps": 6, "logging_steps": 1}
    how |= {"label_names": [task.name for task in data.task_list()], "seed": 1}
    args = transformers.TrainingArguments(output_dir=str(tmp_path / "out"), **how)
    trainer = transformers.Trainer(
        wrapped, args, train_dataset=data.split("train"), eval_dataset=data.split("val"), data_collator=flat
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    assert trainer.evaluate()["eval_loss"] < losses[0]
    changed = [name for name, value in wrapped.state_dict().items() if not torch.equal(value, before[name])]
    assert any(".gate." in name for name in changed) and any(".experts." in name for name in changed)
    read = transformers.AutoModel.from_pretrained(tmp_path / "out" / "checkpoint-6")
    with torch.no_grad():
        same(read(**texts()).predictions, wrapped.eval()(**texts()).predictions)


def rows_of(folder, count=16):
    """Rows as a user of transformers makes them, not all with all labels, and what pads them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [
        {
            **tokenizer(("play rome", "sing it be in the", "weather")[i % 3]),
            "intent": -100 if i == 5 else i % 3,
            "score": math.nan if i == 3 else i / 4,
            "spam": i % 2,
            "topics": [1.0, float(i % 2)],
            "note": "no column of the model",
        }
        for i in range(count)
    ]
    return rows, transformers.DataCollatorWithPadding(tokenizer)


def trainer_of(wrapped, out, rows, collator, **how):
    how = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "seed": 1, **how}
    args = transformers.TrainingArguments(output_dir=str(out), **how)
    return transformers.Trainer(wrapped, args, train_dataset=rows, eval_dataset=rows[:6], data_collator=collator)


def test_trainer_needs_no_options(tmp_path, folder, model):
    rows, collator = rows_of(folder)
    wrapped = to_transformers(copy.deepcopy(model))
    trainer = trainer_of(wrapped, tmp_path, rows, collator, max_steps=4, learning_rate=1e-2, logging_steps=1)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    batch = collator([{key: value for key, value in row.items() if key != "note"} for row in rows[:6]])
    with torch.no_grad():
        out = wrapped.eval()(**batch)
    assert list(out.predictions) == ["intent", "score", "spam", "topics"]  # tags of words came with no labels
    assert trainer.evaluate()["eval_loss"] == pytest.approx(out.loss.item(), rel=1e-4)
    found = trainer.predict(rows[:6])
    assert found.predictions["topics"].shape == (6, 2)
    named = trainer_of(wrapped, tmp_path, rows, collator, label_names=["intent", "spam"])
    assert [labels.shape for labels in named.predict(rows[:6]).label_ids] == [(6,), (6,)]
    assert wrapped(**batch, return_loss=False).loss is None


def test_forward_names_the_tasks_of_the_model_it_is_of(model):
    wrapped = MoeMtlModel.of(model)
    names = list(inspect.signature(wrapped.forward).parameters)
    assert names[:3] == ["input_ids", "attention_mask", "token_type_ids"] and names[-1] == "targets"
    assert {task.name for task in TASKS} < set(names)
    assert not {task.name for task in TASKS} & set(inspect.signature(MoeMtlModel.forward).parameters)
    odd = create_model("text_shared_bottom", tasks=[Task.binary("class"), Task.binary("tasks")], encoder=TINY)
    assert "class" not in inspect.signature(MoeMtlModel.of(odd).forward).parameters  # no name of a parameter
    twin = copy.deepcopy(wrapped)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert not twin(**texts()).predictions["intent"].any() and wrapped(**texts()).predictions["intent"].any()


TINY = {"model_type": "bert", "vocab_size": 120, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"intermediate_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Gradients(transformers.TrainerCallback):
    """Keeps the gradients an update is made of."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **how):
        self.found = [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("tasks", [["spam", "topics"], ["spam"]])
def test_gradients_do_not_grow_with_the_steps_they_are_accumulated_over(tmp_path, folder, tasks):
    torch.manual_seed(0)
    rows, collator = rows_of(folder)
    rows = [{"labels" if tasks == [key] else key: value for key, value in row.items()} for row in rows]
    known = [task for task in TASKS if task.name in tasks]
    made = create_model("text_moe", tasks=known, encoder=TINY, gate="softmax", k=2, experts=2)
    found = []
    for size, steps in ((16, 1), (4, 4)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        trainer = trainer_of(
            to_transformers(made), tmp_path, rows, collator, learning_rate=0.0, max_grad_norm=0, **sizes
        )
        trainer.add_callback(gradients := Gradients())
        trainer.train()
        found.append(gradients.found)
    assert found[0] and any(gradient.abs().max() > 1e-3 for gradient in found[0])
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-4)


DTYPES = {"none": {}, "auto": {"dtype": "auto"}, "bf16": {"dtype": torch.bfloat16}, "fp16": {"dtype": torch.float16}}


@pytest.mark.parametrize("asked", DTYPES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_is_what_models_of_transformers_have(asked, stored, tmp_path, model):
    bert = transformers.BertModel(transformers.BertConfig(**{k: v for k, v in TINY.items() if k != "model_type"}))
    bert.to(stored).save_pretrained(tmp_path / "bert")
    expected = transformers.AutoModel.from_pretrained(tmp_path / "bert", **DTYPES[asked]).dtype
    to_transformers(copy.deepcopy(model).to(stored)).save_pretrained(tmp_path / "ours")
    read = transformers.AutoModel.from_pretrained(tmp_path / "ours", **DTYPES[asked])
    assert {p.dtype for p in (*read.parameters(), *read.buffers()) if p.is_floating_point()} == {expected}
    assert read.dtype == expected and all(torch.isfinite(p).all() for p in read.parameters())
    with torch.no_grad():
        assert {p.dtype for p in read(**texts()).predictions.values()} == {expected}


@pytest.mark.parametrize("name", ["text_moe", "text_single_task", "text_prompt", "text_lora"])
def test_what_a_tokenizer_returns_is_an_input(name, folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = tokenizer(["play rome", "sing it be in"], padding=True, return_tensors="pt")
    made, plain = shaken(create_model(name, tasks=TASKS[:2], encoder=folder)), dict(found)
    ids = torch.tensor([1, 0])
    for x in (found, UserDict(plain)):
        same(made(x), made(plain))
        same(made(x, tasks=["slots"]), made(plain, tasks=["slots"]))
        for task, (rows, prediction) in made(plain, tasks=ids).items():
            torch.testing.assert_close(made(x, tasks=ids)[task], (rows, prediction), atol=0, rtol=0)
        same(extract(made, "intent")(x), extract(made, "intent")(plain))
    if name == "text_moe":
        small = extract(made, "intent", calibration=[found])
        assert small.extraction.layers["layer.1"].tokens == int(plain["attention_mask"].sum())
        assert moe_mtl.prune(made, "intent", [found], mass=0.5)(found)["intent"].shape == (2, 3)


def test_word_embeddings_are_those_of_the_encoder(model):
    assert MoeMtlModel.of(model).get_input_embeddings() is model.backbone.embeddings.word_embeddings


def test_accelerate_prepares_it(model):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    wrapped = MoeMtlModel.of(copy.deepcopy(model)).train()
    before = [parameter.detach().clone() for parameter in wrapped.model.heads["intent"].parameters()]
    prepared, optimizer = accelerator.prepare(wrapped, torch.optim.SGD(wrapped.parameters(), 0.1))
    loss = prepared(**texts(), intent=torch.tensor([0, 1, 2])).loss
    accelerator.backward(loss)
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, wrapped.model.heads["intent"].parameters(), strict=True))


def test_pushing_sends_the_files_of_saving(model, monkeypatch):
    sent = {}

    def upload(self, working_dir, repo_id, files_timestamps, **how):
        sent[repo_id] = {path.name for path in Path(working_dir).iterdir()}

    monkeypatch.setattr(MoeMtlModel, "_upload_modified_files", upload)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, name, **how: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(
        "transformers.utils.hub.create_and_tag_model_card", lambda *a, **how: SimpleNamespace(save=lambda path: None)
    )
    MoeMtlModel.of(model).push_to_hub("someone/model")
    assert {"config.json", "model.safetensors"} <= sent["someone/model"]


def test_mistakes(model):
    with pytest.raises(ValueError, match="model: got Linear, expected a text model"):
        to_transformers(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is of one task, got intent, slots, score, spam, topics; extract one"):
        MoeMtlForSequenceClassification.of(model)
    with pytest.raises(ValueError, match="config: names no encoder or no tasks"):
        MoeMtlModel(MoeMtlConfig())
    with pytest.raises(ValueError, match="did you mean 'intent'"):
        MoeMtlModel.of(model)(**texts(), tasks=["intents"])


def test_attention_is_computed_as_asked_and_alike(folder):
    torch.manual_seed(0)
    eager = create_model("text_shared_bottom", tasks=TASKS, encoder=folder, attention="eager").eval()
    sdpa = create_model("text_shared_bottom", tasks=TASKS, encoder=folder, attention="sdpa").eval()
    sdpa.load_state_dict(eager.state_dict())
    ways = [model.backbone.config._attn_implementation for model in (eager, sdpa)]
    assert ways == ["eager", "sdpa"]
    x = {"input_ids": torch.tensor([[2, 7, 8, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    with torch.no_grad():
        torch.testing.assert_close(eager(x), sdpa(x), atol=1e-5, rtol=1e-5)
    assert to_transformers(eager).config.experts is None  # how this machine computes is no part of the model
