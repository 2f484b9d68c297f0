"""Encoders of transformers with task-gated experts: the same features at first, tasks apart, padding never routed."""

import copy

import pytest
import torch
import transformers

from moe_mtl import extract, moefy, save
from moe_mtl.backbones import TextModel
from moe_mtl.backbones.hf_encoder import describe_encoder, moefy_encoder, read_encoder
from moe_mtl.diagnostics import expert_usage
from moe_mtl.gates import GATES
from moe_mtl.regularizers import total
from moe_mtl.tasks import Task

TASKS = (Task.classification("intent", 5), Task.binary("spam"), Task.regression("score"), Task.multilabel("tags", 3))
NAMES = [task.name for task in TASKS]
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32, "max_position_embeddings": 40}
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 4, "num_heads": 2}
MODERN = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
DISTIL = {"vocab_size": 50, "dim": 16, "n_layers": 4, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 40}
ENCODERS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**SIZES)),
    "electra": lambda: transformers.ElectraModel(transformers.ElectraConfig(**SIZES, embedding_size=8)),
    "deberta": lambda: transformers.DebertaV2Model(transformers.DebertaV2Config(**SIZES, **DEBERTA)),
    "distilbert": lambda: transformers.DistilBertModel(transformers.DistilBertConfig(**DISTIL)),
    "modernbert": lambda: transformers.ModernBertModel(transformers.ModernBertConfig(**SIZES, **MODERN)),
    "t5": lambda: transformers.T5EncoderModel(transformers.T5Config(**T5)),
    "t5_gated": lambda: transformers.T5EncoderModel(transformers.T5Config(**T5, feed_forward_proj="gated-silu")),
}
every_encoder = pytest.mark.parametrize("kind", ENCODERS)


def encoder(kind="bert", seed=0):
    torch.manual_seed(seed)
    return ENCODERS[kind]().eval()


def routed(kind="bert", shaken=True, **options):
    """A moefied encoder; shaken, its experts differ."""
    model = moefy(encoder(kind), TASKS, **{"experts": 4, "k": 2, **options}).eval()
    with torch.no_grad():
        for layer in model.moe_layers.values() if shaken else ():
            for parameter in layer.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def texts(b=3, n=7, seed=1):
    """Texts of different lengths; the first has no padding."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(b, n, dtype=torch.int64)
    for i in range(1, b):
        mask[i, n - 2 * i :] = 0
    return {"input_ids": torch.randint(3, 50, (b, n), generator=generator) * mask, "attention_mask": mask}


def hidden(model, x, ids=(0, 1, 2, 3)):
    """The last hidden states per task, [t, b, n, d]."""
    with torch.no_grad():
        features, _ = model.features(x, tuple(ids))
    return features.patches.unflatten(0, (len(ids), -1))


@every_encoder
def test_features_are_those_of_the_dense_encoder_at_first(kind):
    dense, x = encoder(kind).double(), texts()
    model = moefy(dense, TASKS, experts=4, k=2).eval()
    assert isinstance(model, TextModel) and list(model.moe_layers) == ["layer.1", "layer.3"]
    with torch.no_grad():
        expected = dense(**x).last_hidden_state
    real = x["attention_mask"].bool()
    for found in hidden(model, x):
        torch.testing.assert_close(found[real], expected[real], rtol=1e-9, atol=1e-9)
    # the experts differ once they have moved, and so do the tasks
    with torch.no_grad():
        for layer in model.moe_layers.values():
            layer.experts.w2.add_(torch.randn_like(layer.experts.w2))
    a, b, *_ = hidden(model, x)
    assert (a - b)[real].abs().max() > 1e-3
    assert next(dense.parameters()) is not next(model.parameters())


@every_encoder
def test_a_task_alone_and_extracted_is_what_it_is_among_others(kind):
    model, x = routed(kind), texts()
    full = model(x)
    assert {name: tuple(p.shape) for name, p in full.items()} == {
        "intent": (3, 5), "spam": (3,), "score": (3,), "tags": (3, 3)
    }  # fmt: skip
    for name in NAMES:
        torch.testing.assert_close(model(x, tasks=[name])[name], full[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(extract(model, name)(x)[name], full[name], rtol=1e-4, atol=1e-5)
    some = model(x, tasks=["tags", "spam"])
    assert list(some) == ["tags", "spam"]
    torch.testing.assert_close(some["spam"], full["spam"], rtol=1e-4, atol=1e-5)
    ids = torch.tensor([1, 0, 1])
    rows, prediction = model(x, tasks=ids)["spam"]
    assert rows.tolist() == [0, 2]
    torch.testing.assert_close(prediction, full["spam"][[0, 2]], rtol=1e-4, atol=1e-5)


@every_encoder
def test_padding_changes_nothing_and_is_not_counted(kind):
    model, x = routed(kind), texts()
    full, routings = model(x, return_routing=True)
    for i, length in enumerate((7, 5, 3)):
        alone = {name: values[i : i + 1, :length] for name, values in x.items()}
        for name, prediction in model(alone).items():
            torch.testing.assert_close(prediction, full[name][i : i + 1], rtol=1e-3, atol=1e-4)
    valid = x["attention_mask"].bool().flatten().repeat(len(TASKS))
    for routing in routings.values():
        assert torch.equal(routing.valid, valid)
    unpadded = {name: values[:1] for name, values in x.items()}
    assert all(routing.valid is None for routing in model(unpadded, return_routing=True)[1].values())
    # usage and balance over a text of its own and the same one padded are equal
    short = {name: values[2:, :3] for name, values in x.items()}
    longer = {name: values[2:] for name, values in x.items()}
    for layer, usage in expert_usage(model, [short]).items():
        torch.testing.assert_close(expert_usage(model, [longer])[layer].slots, usage.slots)
    losses = [total(model(one, return_routing=True)[1], {"importance": 1.0})[0] for one in (short, longer)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)


@every_encoder
def test_every_parameter_of_gates_and_experts_learns(kind):
    model = routed(kind, k=4).train()
    predictions = model(texts(8, 15))
    sum((p * torch.randn_like(p)).sum() for p in predictions.values()).backward()
    for name, parameter in model.named_parameters():
        if ".moe." in name or name.startswith("heads"):
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("gate", sorted(set(GATES) - {"sigmoid", "expert_choice", "soft_slots"}))
def test_every_exact_gate_in_an_encoder(gate):
    dense, x = encoder().double(), texts()
    k = {"softmax": 4, "exclusive": 4}.get(gate, 2)
    model = moefy(dense, TASKS, gate=gate, experts=4, k=k).eval()
    with torch.no_grad():
        expected = dense(**x).last_hidden_state
    real = x["attention_mask"].bool()
    features, _ = model.features(x, tuple(range(len(TASKS))))
    found = features.patches.unflatten(0, (-1, 3))  # a task-blind gate leaves one pass for all
    for one in found:
        torch.testing.assert_close(one[real], expected[real], rtol=1e-9, atol=1e-9)
    assert len(found) == (1 if gate == "task_blind" else len(TASKS))


def test_split_experts_are_exact_and_cost_their_output_biases_only():
    dense, x = encoder().double(), texts()
    model = moefy(dense, TASKS, gate="softmax", experts=4, k=4, hidden="split").eval()
    with torch.no_grad():
        expected = dense(**x).last_hidden_state
    real = x["attention_mask"].bool()
    torch.testing.assert_close(hidden(model, x)[0][real], expected[real], rtol=1e-9, atol=1e-9)
    extra = sum(p.numel() for p in model.moe_layers["layer.1"].experts.parameters()) - (2 * 16 * 32 + 32 + 16)
    assert extra == 3 * 16


def test_tasks_part_at_the_first_layer_with_experts():
    model, seen = routed(), []
    for layer in model.backbone.encoder.layer:
        layer.register_forward_hook(lambda m, args, y: seen.append(y.shape[0]))
    model(texts())
    assert seen == [3, 12, 12, 12]
    seen.clear()
    model(texts(), tasks=["spam"])
    assert seen == [3, 3, 3, 3]


def test_a_copy_has_a_context_of_its_own():
    model, x = routed(), texts()
    other = copy.deepcopy(model)
    with model.context.open((0, 1)):
        assert other(x)["spam"].shape == (3,)


def change(**values):
    return {**texts(), **values}


@pytest.mark.parametrize("x, message", [
    (torch.zeros(2, 3), "x: got Tensor, expected a tokenizer's output"),
    ({"attention_mask": torch.ones(2, 3)}, "expected a tokenizer's output"),
    (change(attention_mask=torch.ones(3, 6)), r"attention_mask: got \[3, 6\], expected that of input_ids, \[3, 7\]"),
    (texts(1, 41), "input_ids: got texts of 41 tokens, the encoder has 40 positions"),
    (change(input_ids=torch.full((3, 7), 50)), "input_ids: got ids 50 to 50, the encoder's vocabulary has 50"),
    (change(attention_mask=torch.zeros(3, 7)), "attention_mask: a text has no token at all"),
])  # fmt: skip
def test_texts_that_do_not_fit_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        routed()(x)


HEADED = {
    "bert_classes": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)),
    "bert_words": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)),
    "modernbert": lambda: transformers.ModernBertForTokenClassification(
        transformers.ModernBertConfig(**SIZES, **MODERN)
    ),
    "t5": lambda: transformers.T5ForTokenClassification(transformers.T5Config(**T5)),
}


@pytest.mark.parametrize("kind", HEADED)
def test_of_a_model_with_a_head_the_encoder_is_taken(kind, capsys):
    torch.manual_seed(0)
    dense, x = HEADED[kind]().eval().double(), texts()
    model = moefy(dense, TASKS, experts=4, k=2).eval()
    with torch.no_grad():
        expected = dense.base_model(**x).last_hidden_state
    real = x["attention_mask"].bool()
    for found in hidden(model, x):
        torch.testing.assert_close(found[real], expected[real], rtol=1e-9, atol=1e-9)
    before = sum(p.numel() for p in dense.base_model.parameters()) / 1e6
    assert f"backbone parameters {before:.3f} M ->" in capsys.readouterr().err
    again = read_encoder(describe_encoder(model.backbone))  # what a saved model is built from
    assert type(again) is type(dense.base_model)


def test_a_configuration_that_contradicts_itself_is_refused_by_name(tmp_path):
    config = transformers.ModernBertConfig(**SIZES, **MODERN)
    model = moefy_encoder(transformers.ModernBertModel(config), [Task.classification("intent", 3)], None)
    encoder = {**describe_encoder(model.backbone), "layer_types": ["full_attention"]}
    with pytest.raises(ValueError, match=r"encoder: transformers takes no such configuration .*validate_layer_type"):
        read_encoder(encoder)
    model.config = {"name": "text_shared_bottom", "args": {"encoder": encoder, "attention": None}}
    with pytest.raises(ValueError, match="model: was changed since it was made"):
        save(model, tmp_path)


@pytest.mark.parametrize("buckets", [4, -1])
def test_relative_positions_do_not_end(buckets):
    how = {**SIZES, **DEBERTA, "max_position_embeddings": 8, "position_buckets": buckets}
    x = texts(2, 20)
    for biased in (False, True):
        dense = transformers.DebertaV2Model(transformers.DebertaV2Config(**how, position_biased_input=biased)).eval()
        model = moefy(dense, TASKS, experts=4, k=2).eval()
        if biased:
            with pytest.raises(ValueError, match="got texts of 20 tokens, the encoder has 8 positions"):
                model(x)
        else:
            with torch.no_grad():
                expected = dense(**x).last_hidden_state
            real = x["attention_mask"].bool()
            torch.testing.assert_close(hidden(model, x)[0][real], expected[real], rtol=1e-4, atol=1e-5)


def test_encoders_whose_layers_see_other_tokens_are_refused():
    windows = transformers.LongformerConfig(**SIZES, attention_window=4)
    with pytest.raises(
        ValueError, match="backbone: LongformerModel pads texts by itself, which experts would take for"
    ):
        moefy(transformers.LongformerModel(windows), TASKS)
    chunked = transformers.BertConfig(**SIZES, chunk_size_feed_forward=1)
    with pytest.raises(ValueError, match="backbone: chunk_size_feed_forward is 1, but experts need all tokens"):
        moefy(transformers.BertModel(chunked), TASKS)
    dense = moefy_encoder(transformers.BertModel(chunked), TASKS, None)  # nothing is routed
    assert dense(texts())["spam"].shape == (3,)


def test_encoders_that_are_none_are_refused():
    with pytest.raises(ValueError, match="backbone: GPT2Model is not an encoder this adapter knows"):
        moefy(transformers.GPT2Model(transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20)), TASKS)
    with pytest.raises(ValueError, match="backbone: T5Model is not an encoder"):
        moefy(transformers.T5Model(transformers.T5Config(**T5)), TASKS)
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration is not an encoder .* T5EncoderModel"):
        moefy(transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)), TASKS)
    with pytest.raises(ValueError, match="is not one of gelu"):
        moefy(transformers.BertModel(transformers.BertConfig(**SIZES, hidden_act="gelu_new")), TASKS)
    with pytest.raises(ValueError, match="tasks: 'map' is of kind depth; for texts"):
        moefy(encoder(), [Task.depth("map")])
    with pytest.raises(ValueError, match="gate: the weights of 'soft_slots'"):
        moefy(encoder(), TASKS, gate="soft_slots", experts=4)
