"""Frozen encoders with adapters: the calls of every model, what is trained, extraction and folders, per method."""

import copy

import pytest
import torch
import transformers

from moe_mtl import create_model, extract, load, save
from moe_mtl.backbones.hf_encoder import TextModel, describe_encoder
from moe_mtl.data import NLUMix
from moe_mtl.models.text_adapters import average_adapters, matching_rank, scalearn
from moe_mtl.new_task import parameters_of_task
from moe_mtl.parameter_groups import parameter_groups
from moe_mtl.tasks import Task
from moe_mtl.trainer import Trainer
from moe_mtl.trainer_config import TrainerConfig
from tests.test_encoders import ENCODERS, SIZES, encoder, texts
from tests.text_cases import save_encoder, write_banking77, write_snips

TASKS = (Task.classification("intent", 5), Task.binary("spam"), Task.tagging("slots", ["O", "B-x", "I-x"]))
NAMES = [task.name for task in TASKS]
SECOND = {"stage": "transfer", "sources": ["one", "two"], "scale_dropout": 0.0}
MODELS = {
    "lora": ("text_lora", {"rank": 2, "alpha": 4.0}),
    "poly": ("text_poly", {"rank": 2, "skills": 3}),
    "mhr": ("text_poly", {"rank": 2, "skills": 3, "heads": 4}),
    "sources": ("text_scalearn", {"rank": 2, "alpha": 4.0}),
    "transfer": ("text_scalearn", {"rank": 2, "alpha": 4.0, **SECOND}),
    "uniform": ("text_scalearn", {"rank": 2, "alpha": 4.0, **SECOND, "uniform": True}),
}
FULL = ("lora", "poly", "transfer")  # with encoders of every structure
every_model = pytest.mark.parametrize("which", MODELS)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def make(which="poly", kind="bert", shaken=True, tasks=TASKS, **options):
    """A model on a small random encoder; shaken, adapters, routing and heads are no longer what they start as."""
    name, given = MODELS[which]
    torch.manual_seed(3)
    model = create_model(name, tasks=tasks, **{"encoder": describe_encoder(encoder(kind)), **given, **options})
    with torch.no_grad():
        for parameter in model.parameters() if shaken else ():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def of_task(model, task):
    """Names of the parameters that one task alone uses."""
    return [n for n, _ in model.named_parameters() if n.startswith(f"heads.{task}.") or n.endswith(f"_{task}")]


# ---- the calls ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which, kind", [(w, k) for w in MODELS for k in ENCODERS if k == "bert" or w in FULL])
def test_a_task_alone_per_sample_and_extracted_is_what_it_is_among_others(which, kind):
    model, x = make(which, kind), texts()
    with torch.no_grad():
        full, ids = model(x), torch.tensor([1, 2, 1])
        assert [tuple(p.shape) for p in full.values()] == [(3, 5), (3,), (3, 3, 7)] and list(full) == NAMES
        for name in NAMES:
            torch.testing.assert_close(model(x, tasks=[name])[name], full[name], **CLOSE)
        assert list(model(x, tasks=["slots", "spam"])) == ["slots", "spam"]
        torch.testing.assert_close(model(x, tasks=["slots", "spam"])["spam"], full["spam"], **CLOSE)
        found = model(x, tasks=ids)
        assert found.keys() == {"spam", "slots"} and found["spam"][0].tolist() == [0, 2]
        for name, (rows, prediction) in found.items():
            torch.testing.assert_close(prediction, full[name][rows], **CLOSE)
        one = {name: values[1:2] for name, values in x.items()}
        torch.testing.assert_close(model(one)["intent"], full["intent"][1:2], **CLOSE)
        small = extract(model, "slots")
        torch.testing.assert_close(small(x)["slots"], full["slots"], **CLOSE)
    same(model(x), full)  # evaluation is deterministic


@every_model
def test_adapters_do_something_and_tasks_differ_where_they_should(which):
    model, x = make(which), texts()
    dense = create_model("text_shared_bottom", tasks=TASKS, encoder=describe_encoder(model.backbone)).eval()
    dense.load_state_dict(model.dense_state())
    with torch.no_grad():
        plain = dense.features(x, (0, 1, 2))[0].pooled
        pooled = model.features(x, (0, 1, 2))[0].pooled.unflatten(0, (-1, 3))
    assert len(pooled) == (1 if which == "lora" else 3)
    assert all((own - plain).abs().max() > 1e-3 for own in pooled)
    assert all((own - pooled[0]).abs().max() > 1e-3 for own in pooled[1:])


@pytest.mark.parametrize("which", ["lora", "poly", "mhr", "sources", "transfer"])
def test_the_encoder_computes_at_first_what_it_did(which):
    dense, x = encoder().double(), texts()
    model = make(which, shaken=False).double()
    model.backbone.load_state_dict({**model.backbone.state_dict(), **adapted_names(model, dense.state_dict())})
    with torch.no_grad():
        expected = dense(**x).last_hidden_state
        for found in model.features(x, (0, 1))[0].patches.unflatten(0, (-1, 3)):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def adapted_names(model, state):
    """A dense encoder's tensors under the names that they have in an adapted one; its pooler left out."""
    own = {name.replace(".base_layer.", "."): name for name in model.backbone.state_dict()}
    return {own[name]: tensor for name, tensor in state.items() if name in own}


@pytest.mark.parametrize("which", ["poly", "sources", "transfer"])
def test_tasks_part_at_the_first_adapted_layer(which):
    model, seen = make(which, targets=["output.dense"]), []
    for layer in model.backbone.encoder.layer:
        layer.register_forward_hook(lambda m, args, y: seen.append(y.shape[0]))
    model(texts())
    model(texts(), tasks=["spam"])
    assert seen == [9, 9, 9, 9, 3, 3, 3, 3]


@every_model
def test_padding_changes_nothing(which):
    model, x = make(which), texts()
    with torch.no_grad():
        full = model(x)
        for i, length in enumerate((7, 5, 3)):
            alone = model({name: values[i : i + 1, :length] for name, values in x.items()})
            torch.testing.assert_close(alone["intent"], full["intent"][i : i + 1], rtol=1e-3, atol=1e-4)


@every_model
def test_a_copy_has_a_context_of_its_own(which):
    model = make(which)
    other = copy.deepcopy(model)
    with model.context.open((0, 1)):
        assert other(texts())["spam"].shape == (3,)
    if which != "lora":
        with pytest.raises(RuntimeError, match="call the MultiTaskModel, not its backbone"):
            model.backbone(**texts())


# ---- what is trained ------------------------------------------------------------------------------------------------


@every_model
def test_adapters_and_heads_learn_and_nothing_else_does(which):
    model, x = make(which).train(), texts(6, 9)
    sum((p * torch.randn_like(p)).sum() for p in model(x).values()).backward()
    own = {id(p) for p in model.adapter_parameters()}
    assert own
    for name, parameter in model.named_parameters():
        trained = id(parameter) in own or name.startswith("heads.")
        assert parameter.requires_grad == trained, name
        assert (parameter.grad is not None) == trained, name
        assert not trained or (parameter.grad.isfinite().all() and parameter.grad.any()), name


@every_model
def test_nan_in_what_belongs_to_others_changes_nothing(which):
    model, x = make(which), texts()
    with torch.no_grad():
        expected = model(x, tasks=["spam"])
        ids = model(x, tasks=torch.ones(3, dtype=torch.int64))["spam"][1]
        others = {n for task in ("intent", "slots") for n in of_task(model, task)}
        for name, parameter in model.named_parameters():
            if name in others:
                parameter.fill_(float("nan"))
        same(model(x, tasks=["spam"]), expected)
        assert torch.equal(model(x, tasks=torch.ones(3, dtype=torch.int64))["spam"][1], ids)
        assert extract(model, "spam")(x)["spam"].isfinite().all()
    model(x, tasks=["spam"])["spam"].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("which", ["poly", "mhr", "sources", "transfer", "uniform"])
def test_training_what_is_ones_own_leaves_other_tasks_bit_equal(which):
    """Under AdamW with weight decay, with momentum from training of everything before; adding the task included."""
    model, x = make(which), texts(4, 8)
    for _ in range(2):  # momentum
        optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
        optimizer.zero_grad()
        sum(p.square().sum() for p in model.train()(x).values()).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        before = model(x, tasks=["intent", "slots"])
        alone = model(x, tasks=["intent"])
    model.add_task(Task.classification("topic", 2), init_from=["intent", "spam"])
    own = of_task(model, "topic")
    model.train_own("topic")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == own
    optimizer.add_param_group({"params": [p for n, p in model.named_parameters() if n in own]})
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if name in own}
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        predictions = model.train()(x)  # the old tasks run too: only what they share could tell them
        sum(p.square().sum() for p in predictions.values()).backward()
        optimizer.step()
    model.eval()
    after = dict(model.named_parameters())
    assert all(not torch.equal(after[name], value) for name, value in start.items())
    with torch.no_grad():
        same(model(x, tasks=["intent", "slots"]), before)
        same(model(x, tasks=["intent"]), alone)
    model.train_adapters()
    own = {id(p) for p in model.adapter_parameters()}
    assert all(p.requires_grad == (id(p) in own or n.startswith("heads.")) for n, p in model.named_parameters())


def test_a_new_task_starts_as_the_mean_of_those_it_is_like():
    model = make("mhr")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.add_task(Task.binary("new"), init_from=["intent", "slots"])
    model.add_task(Task.binary("fresh"))
    after = dict(model.named_parameters())
    for name, value in before.items():  # no logits are started again
        assert torch.equal(after[name], value), name
    (first, *_) = (n.removesuffix("_new") for n in after if n.endswith(".z_new"))
    torch.testing.assert_close(after[f"{first}_new"], (before[f"{first}_intent"] + before[f"{first}_slots"]) / 2)
    assert after[f"{first}_fresh"].abs().max() <= 1e-3
    with pytest.raises(ValueError, match="init_from: unknown task 'intents'; did you mean 'intent'"):
        model.add_task(Task.binary("other"), init_from="intents")
    assert list(model(texts())) == [*NAMES, "new", "fresh"]


@every_model
def test_tasks_are_removed_and_renamed(which, tmp_path):
    model, x = make(which), texts()
    with torch.no_grad():
        expected = model(x)
        model.remove_task("intent").rename_task("slots", "tags")
        found = model(x)
        assert list(found) == ["spam", "tags"] and not of_task(model, "intent") and not of_task(model, "slots")
        torch.testing.assert_close(found, {"spam": expected["spam"], "tags": expected["slots"]}, **CLOSE)
        rows, prediction = model(x, tasks=torch.tensor([1, 0, 1]))["tags"]
        torch.testing.assert_close(prediction, expected["slots"][rows], **CLOSE)
        save(model, tmp_path)
        torch.testing.assert_close(load(tmp_path)(x), found)


def test_scales_do_not_decay_and_frozen_parameters_are_in_no_group():
    model = make("transfer")
    groups = parameter_groups(model, TrainerConfig(out="unused", steps=1, lr_scales={"*.omega_spam": 0.5}))
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)]: (group["weight_decay"], group["scale"]) for group in groups for p in group["params"]}
    assert {how for name, how in found.items() if ".omega_" in name} == {(0.0, 1.0), (0.0, 0.5)}
    assert all(".omega_" in name or name.startswith("heads.") for name in found)


# ---- smaller models, folders ----------------------------------------------------------------------------------------


@every_model
def test_one_task_is_extracted_as_a_dense_encoder(which, tmp_path):
    model, x = make(which), texts()
    state = torch.random.get_rng_state()
    small = extract(model, "slots")
    assert torch.equal(torch.random.get_rng_state(), state)
    dense = create_model("text_shared_bottom", tasks=[TASKS[2]], encoder=describe_encoder(model.backbone))
    assert type(small) is TextModel and small.state_dict().keys() == dense.state_dict().keys()
    assert not any(hook for m in small.modules() for hook in m._forward_pre_hooks)
    assert small.config["name"] == "text_shared_bottom" and not small.training
    save(small, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path)(x), small(x))
    torch.testing.assert_close(small(x)["slots"], model(x)["slots"], **CLOSE)


@every_model
@torch.no_grad()
def test_extraction_is_as_precise_as_the_model(which):
    model, x = make(which).double(), texts()
    small = extract(model, "slots")
    assert {p.dtype for p in small.parameters()} == {torch.float64}
    torch.testing.assert_close(small(x)["slots"], model(x, tasks=["slots"])["slots"], rtol=1e-12, atol=1e-12)


@every_model
def test_several_tasks_keep_the_adapters_and_nothing_of_others(which, tmp_path):
    model, x = make(which), texts()
    small = extract(model, ["slots", "intent"])
    assert type(small) is type(model) and not of_task(small, "spam") and of_task(model, "spam")
    with torch.no_grad():
        expected = model(x)
        found = small(x)
        assert list(found) == ["slots", "intent"]
        for name in found:
            torch.testing.assert_close(found[name], expected[name], **CLOSE)
        _, prediction = small(x, tasks=torch.tensor([0, 1, 0]))["slots"]
        torch.testing.assert_close(prediction, expected["slots"][[0, 2]], **CLOSE)
        save(small, tmp_path)
        read = load(tmp_path)
        same(read.state_dict(), small.state_dict())
        torch.testing.assert_close(read(x), found)
    assert [p.requires_grad for p in read.parameters()] == [p.requires_grad for p in small.parameters()]
    torch.testing.assert_close(extract(small, "intent")(x)["intent"], expected["intent"], **CLOSE)


@every_model
def test_folders(which, tmp_path):
    model, x = make(which), texts()
    save(model, tmp_path)
    read = load(tmp_path)
    assert type(read) is type(model) and read.config == model.config
    same(read.state_dict(), model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(read(x), model(x))


def test_extracted_tasks_work_in_transformers():
    from moe_mtl.backbones.hf_model import to_transformers

    model, x = make("mhr"), texts()
    wrapped = to_transformers(extract(model, "slots"))
    with torch.no_grad():
        torch.testing.assert_close(wrapped(**x).logits, model(x)["slots"].transpose(1, 2), **CLOSE)
    with pytest.raises(ValueError, match="model: a 'text_poly' is more than its encoder"):
        to_transformers(model)


# ---- which maps -----------------------------------------------------------------------------------------------------


def test_all_maps_of_attention_and_feed_forward_by_structure():
    names = [n.removeprefix("encoder.layer.0.") for n in make().adapted_maps if n.startswith("encoder.layer.0.")]
    attention = [f"attention.self.{part}" for part in ("query", "key", "value")]
    assert names == [*attention, "attention.output.dense", "intermediate.dense", "output.dense"]
    assert len(make("poly", "modernbert").adapted_maps) == 16 and len(make("lora", "t5_gated").adapted_maps) == 28
    assert len(make(targets=["query", "intermediate.dense"]).adapted_maps) == 8
    assert len(make(targets=["attention.output.dense"]).adapted_maps) == 4
    assert len(make(targets=["output.dense"]).adapted_maps) == 8  # the names end so


def test_maps_of_positions_are_left_out():
    torch.manual_seed(0)
    deberta = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    config = {**transformers.DebertaV2Config(**SIZES, **deberta, share_att_key=True).to_dict()}
    model = create_model("text_poly", tasks=TASKS, encoder=config)
    assert {name.rpartition(".")[2] for name in model.adapted_maps} == {"value_proj", "dense"}
    assert model(texts())["spam"].shape == (3,)
    with pytest.raises(ValueError, match="query_proj is given something else than the batch's tokens"):
        create_model("text_poly", tasks=TASKS, encoder=config, targets=["query_proj"])


@pytest.mark.parametrize("which, options, message", [
    ("lora", {"rank": 0}, "rank: got 0, expected an integer of at least 1"),
    ("poly", {"rank": 1.5}, "rank: got 1.5, expected an integer"),
    ("lora", {"alpha": 0}, "alpha: got 0, expected above 0"),
    ("lora", {"dropout": 1.0}, "dropout: got 1.0, expected from 0 to below 1"),
    ("lora", {"alignment": -1.0}, "alignment: got -1.0, expected a coefficient of at least 0"),
    ("lora", {"alignment": 1.0, "alignment_kind": "mdd"}, "alignment_kind: unknown 'mdd'; did you mean 'mmd'"),
    ("poly", {"skills": 0}, "skills: got 0"),
    ("poly", {"heads": 0}, "heads: got 0"),
    ("poly", {"heads": 3}, "heads: 3 blocks do not divide the 16 features of encoder.layer.0.attention.self.query"),
    ("poly", {"targets": ["quary"]}, r"targets: no linear map 'quary' in the layers; .*attention.self.query"),
    ("poly", {"targets": ["LayerNorm"]}, "targets: 'LayerNorm' is a LayerNorm; adapters fit nn.Linear alone"),
    ("poly", {"targets": "query"}, "targets: got 'query', expected a list"),
    ("poly", {"targets": []}, r"targets: got \[\], expected a list"),
    ("poly", {"skill": 2}, "skill: no such model option; did you mean 'skills'"),
    ("poly", {"encoder": ""}, "encoder: name the folder of an encoder"),
    ("sources", {"stage": "second"}, "stage: got 'second', expected 'sources' or 'transfer'"),
    ("sources", {"sources": ["a"]}, "sources: got .* with stage='sources'"),
    ("sources", {"stage": "transfer"}, "sources: got None with stage='transfer'"),
    ("transfer", {"sources": []}, r"sources: got \[\], expected different names"),
    ("transfer", {"scale_dropout": 1.0}, "scale_dropout: got 1.0"),
])  # fmt: skip
def test_options_are_checked(which, options, message):
    with pytest.raises(ValueError, match=message):
        make(which, **options)


def test_encoders_without_linear_maps_are_refused(monkeypatch):
    monkeypatch.setattr("moe_mtl.adapters._targets._takes_tokens", lambda encoder, names: set())
    with pytest.raises(ValueError, match=r"encoder: no layer of BertModel has an nn\.Linear that takes tokens"):
        make()


# ---- from one model to the next -------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["poly", "mhr"])
def test_the_average_is_the_inventory_under_uniform_routing(which, tmp_path):
    model, x = make(which, tasks=TASKS[:2]), texts()
    lora = average_adapters(model)
    assert not lora.training and lora.config["name"] == "text_lora" and lora.config["args"]["rank"] == 2
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".z_" in name:
                parameter.fill_(0.7)  # equal logits
        torch.testing.assert_close(lora(x), model(x), **CLOSE)
        save(lora, tmp_path)
        torch.testing.assert_close(load(tmp_path)(x), lora(x))
    trained = sum(p.numel() for p in lora.adapter_parameters())
    assert trained == sum(2 * (m.base_layer.in_features + m.base_layer.out_features) for m in lora.adapted.values())
    with pytest.raises(ValueError, match="model: got AlignedLoraModel, expected a text_poly"):
        average_adapters(lora)


def test_matching_rank_by_hand():
    # a layer of BERT of width 16 and 32 hidden: 4 maps 16 + 16, 2 maps 16 + 32, so 224 per rank; 6 maps
    # 3 skills of rank 2 are 6 * 224 = 1344, and 3 tasks * 1 * 3 logits * 6 maps = 54 more: 6.24 ranks
    assert matching_rank(make("poly")) == 6
    # with 4 heads 216 logits: 1560 / 224 = 6.96
    assert matching_rank(make("mhr")) == 7
    assert matching_rank(make("lora")) == 2
    assert matching_rank(make("sources")) == 6
    # scales: 3 tasks * 2 sources * (4 * 16 + 32 + 16) = 672 = 3 ranks; uniform 3 * 2 * 6 = 36, less than one
    assert matching_rank(make("transfer")) == 3
    assert matching_rank(make("uniform")) == 1
    with pytest.raises(ValueError, match="model: got Linear"):
        matching_rank(torch.nn.Linear(2, 2))


def test_the_second_stage_scales_the_adapters_of_the_first():
    first, x = make("sources"), texts()
    second = scalearn(first, [TASKS[1], Task.binary("new")], scale_dropout=0.0)
    assert second.config["args"]["stage"] == "transfer" and second.config["args"]["sources"] == NAMES
    with torch.no_grad():
        for name, parameter in second.named_parameters():
            if ".omega_" in name:  # two thirds per source at first, near enough
                assert parameter.sub(2 / 3).abs().max() < 0.01 and parameter.sub(2 / 3).abs().max() > 0
                parameter.zero_()
                parameter[NAMES.index("spam")] = 1.0  # the adapter of one source, whole
        torch.testing.assert_close(second(x)["spam"], first(x)["spam"], **CLOSE)
    adapters = [n for n, p in second.named_parameters() if ".a_" in n or ".b_" in n]
    assert len(adapters) == 2 * 3 * 24 and not any(dict(second.named_parameters())[n].requires_grad for n in adapters)
    uniform = scalearn(first, uniform=True)
    assert list(uniform(x)) == NAMES
    assert {tuple(p.shape) for n, p in uniform.named_parameters() if ".omega_" in n} == {(3, 1)}
    with pytest.raises(ValueError, match="is a second stage already"):
        scalearn(second)
    with pytest.raises(ValueError, match="expected a text_scalearn"):
        scalearn(make("poly"))


# ---- in the trainer -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    write_snips(root / "snips")
    write_banking77(root / "banking77")
    folder = str(save_encoder(tmp_path_factory.mktemp("encoder")))
    return NLUMix(root=str(root), tokenizer=folder, sources=["snips", "banking77"])


@torch.no_grad()
def training_loss(model, data, name):
    """Of one task, over all of its training samples."""
    train = data.split("train")
    batch = train.__getitems__(train.labelled(name))
    (task,) = (task for task in model.tasks if task.name == name)
    return task.compute_loss(model.eval()(batch["text"], tasks=[name])[name], batch[name]).item()


@pytest.mark.parametrize("batches", ["mixed", "homogeneous"])
@pytest.mark.parametrize("which", ["lora", "mhr", "sources"])
def test_training(which, batches, data, tmp_path):
    name, options = MODELS[which]
    options = options | ({"alignment": 0.1} if which == "lora" else {})
    torch.manual_seed(0)
    model = create_model(name, tasks=data.task_list(), encoder=data.tokenizer, **options)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    how = {"batch_size": 24, "lr": 0.03, "warmup": 0, "eval_every": 0, "log_every": 1, "progress": False}
    config = TrainerConfig(out=str(tmp_path), steps=30, batches=batches, device="cpu", **how)
    first = training_loss(model, data, "banking77")
    Trainer(model, data, config).fit()
    assert training_loss(model, data, "banking77") < 0.8 * first
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved and moved <= {n for n, p in model.named_parameters() if p.requires_grad}
    read = load(tmp_path)
    same(read.state_dict(), model.state_dict())
    if which == "lora":
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert ('"alignment": 0.0' in lines[1]) == (batches == "homogeneous") and '"alignment"' in lines[1]


def test_alignment_reaches_the_gradient_of_a_mixed_update(data):
    batch = data.split("train").__getitems__([0, 1, 24, 25])
    grads = []
    for coefficient in (0.0, 5.0):
        torch.manual_seed(0)
        options = {"rank": 2, "alignment": coefficient}
        model = create_model("text_lora", tasks=data.task_list(), encoder=data.tokenizer, **options)
        model.backbone.eval()  # no dropout
        predictions = model.train(True)(batch["text"], tasks=torch.tensor([0, 1, 2, 2]))
        own = model.auxiliary_losses(predictions)
        assert own.keys() == ({"alignment"} if coefficient else set())
        loss = sum(p.square().mean() for _, p in predictions.values()) + sum(own.values())
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.adapter_parameters()]))
    assert (grads[0] - grads[1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["text_poly", "text_scalearn"])
def test_what_is_a_tasks_own_is_known_to_train_only(name):
    model = create_model(name, tasks=TASKS, encoder=describe_encoder(encoder("bert")))
    first = TASKS[0].name
    routed = [parameter for parameter in parameters_of_task(model, first) if not parameter.startswith("heads.")]
    assert len(routed) >= len(model.adapted)  # of every adapted map
    assert not set(parameters_of_task(model, first)) & set(parameters_of_task(model, TASKS[1].name))
    model.train_own(first)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(parameters_of_task(model, first))
