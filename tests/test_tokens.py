"""Texts as tokens, through tokenizers of every family: spaces between words, cutting, words without tokens."""

import json

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from moe_mtl.answers import answer
from moe_mtl.data import TextSplit
from moe_mtl.data._tokens import encode_texts, encoder_positions
from moe_mtl.inputs import TextReader
from moe_mtl.tasks import Task
from tests.text_cases import save_encoder

CORPUS = ["play some jazz by miles davis in paris tomorrow", "what is the weather in rome", "my new card is lost"] * 20
WORDS = ["play", "jazz", "in", "paris"]
MARKS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
INTENT, SLOTS = Task.classification("intent", 3), Task.tagging("slots", ["O", "B-city", "I-city"])


def fast(raw, trainer):
    """A tokenizer of transformers of this one, trained."""
    raw.train_from_iterator(CORPUS, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, **names, model_input_names=["input_ids", "attention_mask"]
    )


def byte_level(pre_tokenizer):
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return fast(raw, trainers.BpeTrainer(vocab_size=400, special_tokens=MARKS, initial_alphabet=alphabet))


def roberta():
    made = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    state = json.loads(made.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in state["merges"]]
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    ends = {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    return transformers.RobertaTokenizerFast(vocab=state["vocab"], merges=merges, **names, **ends)


def metaspace(scheme="always"):
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(prepend_scheme=scheme), decoders.Metaspace()
    return fast(raw, trainers.UnigramTrainer(vocab_size=100, special_tokens=MARKS, unk_token="[UNK]"))


def word_piece():
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return fast(raw, trainers.WordPieceTrainer(vocab_size=120, special_tokens=MARKS))


FAMILIES = {
    "roberta": roberta,
    "bytes": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)),
    "bytes trimmed": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)),
    "bytes in a sequence": lambda: byte_level(
        pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ])
    ),
    "bytes after a space": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "metaspace": metaspace,
    "metaspace, never first": lambda: metaspace("never"),
    "word pieces": word_piece,
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request):
    return FAMILIES[request.param]()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = str(save_encoder(tmp_path_factory.mktemp("encoder")))
    return folder, transformers.AutoTokenizer.from_pretrained(folder)


def encode(text, tokenizer, **how):
    (found,) = encode_texts([text], tokenizer, wheres=["x"], **{"max_length": 100, "truncate": False, **how})
    return found


# ---- spaces


def test_words_have_the_tokens_of_the_string_they_make(tokenizer):
    words, string = encode(WORDS, tokenizer), encode(" ".join(WORDS), tokenizer)
    assert words.ids["input_ids"].tolist() == string.ids["input_ids"].tolist()
    assert words.word_ids == string.word_ids
    assert string.ids["input_ids"].tolist() == tokenizer(" ".join(WORDS))["input_ids"]
    for word, (start, stop) in zip(words.word_ids, words.offsets, strict=True):
        assert word is None or 0 <= start <= stop <= len(WORDS[word])
    assert words.text == WORDS


def test_offsets_are_those_in_the_word(tokenizer):
    words = encode(WORDS, tokenizer)
    ends = {word: stop for word, (_, stop) in zip(words.word_ids, words.offsets, strict=True) if word is not None}
    assert ends == {i: len(word) for i, word in enumerate(WORDS)}


def test_training_and_prediction_read_words_alike(tokenizer):
    slots = Task.tagging("slots", ["O", "B-city"])
    (sample,) = TextSplit([{"text": WORDS, "slots": [0, 0, 0, 1]}], [slots], tokenizer)
    (batch,) = TextReader(tokenizer, 64, False).batches([WORDS], 8)
    assert sample["text"]["input_ids"].tolist() == batch.x["input_ids"][0].tolist()
    assert sample["text"]["input_ids"].tolist() == tokenizer(" ".join(WORDS))["input_ids"]


@pytest.mark.parametrize("text, spans", [
    ("play  jazz in paris", ["play  jazz in paris"]),
    (("play jazz", " in paris "), ["play jazz", "in paris"]),
    (WORDS, ["play jazz in paris"]),
])  # fmt: skip
def test_answers_hold_words_without_the_space_before(tokenizer, text, spans):
    note = encode(text, tokenizer)
    logits = torch.zeros(3, len(note.word_ids))
    logits[1] = 5.0  # every word is a city
    found = answer(SLOTS, logits, note)
    assert found["words"] == [span["text"] for span in found["spans"]] == WORDS
    logits[2] = 9.0  # all of them are one
    assert [span["text"] for span in answer(SLOTS, logits, note)["spans"]] == spans


# ---- cutting


def test_of_a_pair_the_longer_text_is_cut_first(bert):
    _, tokenizer = bert
    found = encode(("play " * 30, "rome"), tokenizer, max_length=10, truncate=True)
    assert [found.parts.count(part) for part in (0, 1)] == [6, 1]
    assert tokenizer.decode(found.ids["input_ids"][-3:]) == "[SEP] rome [SEP]"
    found = encode(("play " * 30, "rome " * 30), tokenizer, max_length=11, truncate=True)
    assert [found.parts.count(part) for part in (0, 1)] == [4, 4]
    with pytest.raises(ValueError, match="max_length: got 4, expected at least 5"):
        encode(("play " * 30, "rome"), tokenizer, max_length=4, truncate=True)


def test_how_much_the_encoder_takes(bert, tmp_path):
    folder, tokenizer = bert[0], transformers.AutoTokenizer.from_pretrained(bert[0])
    assert encoder_positions(folder, tokenizer) == 64
    transformers.RobertaConfig(max_position_embeddings=40, pad_token_id=1).save_pretrained(tmp_path)
    assert encoder_positions(str(tmp_path), tokenizer) == 38
    transformers.T5Config().save_pretrained(tmp_path)
    assert encoder_positions(str(tmp_path), tokenizer) is None
    (tmp_path / "config.json").unlink()
    tokenizer.save_pretrained(tmp_path)
    assert encoder_positions(str(tmp_path), tokenizer) is None
    tokenizer.model_max_length = 128
    assert encoder_positions(str(tmp_path), tokenizer) == 128


# ---- labels


def test_a_tag_that_no_token_can_carry(bert):
    _, tokenizer = bert
    kinds = Task.tagging("kinds", ["NOUN", "VERB"], metric="accuracy")
    for task, tags, name in ((SLOTS, [0, 1, 2], "B-city"), (SLOTS, [0, 2, 0], "I-city"), (kinds, [0, 1, 0], "VERB")):
        sample = {"text": ["play", "\u200b", "rome"], task.name: tags, "where": "f:3"}
        with pytest.raises(
            ValueError, match=rf"f:3: word 2, '\\u200b', has no tokens, and so no place for its tag '{name}"
        ):
            TextSplit([sample], [task], tokenizer)
    for tags in ([0, 0, 1], [1, 2, 0], [1, 2, 2], [0, -100, 0]):  # outside, or going on with a span
        (sample,) = TextSplit([{"text": ["play", "\u200b", "rome"], "slots": tags}], [SLOTS], tokenizer)
        assert sample["slots"].tolist() == [-100, tags[0], tags[2], -100]
    text = {"text": ["play"] * 9 + ["\u200b"], "slots": [0] * 9 + [1]}
    with pytest.raises(ValueError, match="word 10"):
        TextSplit([text], [SLOTS], tokenizer)
    assert len(TextSplit([text], [SLOTS], tokenizer, max_length=6, truncate=True)[0]["slots"]) == 6


@pytest.mark.parametrize("of", [np.int64, torch.tensor, np.array, int])
def test_labels_may_be_arrays(bert, of):
    samples = [{"text": ["play", "rome"], "intent": of(2), "slots": [of(0), of(1)]}]
    (sample,) = TextSplit(samples, [INTENT, SLOTS], bert[1])
    assert int(sample["intent"]) == 2 and sample["slots"].tolist() == [-100, 0, 1, -100]
    assert sample["intent"].dtype == sample["slots"].dtype == torch.int64


@pytest.mark.parametrize("of", [np.array, torch.tensor, list])
def test_lists_of_labels_may_be_arrays(bert, of):
    topics = Task.multilabel("topics", 2)
    samples = [{"text": ["play", "rome"], "topics": of([1.0, 0.0]), "slots": of([0, 1])}]
    (sample,) = TextSplit(samples, [topics, SLOTS], bert[1])
    assert sample["topics"].tolist() == [1.0, 0.0] and sample["slots"].tolist() == [-100, 0, 1, -100]


def test_labels_that_do_not_fit_are_named_with_their_line(bert):
    for task, label, message in [
        (Task.multilabel("m", 3), [1.0], r"f:3: got \[1.0\] for task 'm', expected 3 numbers of 0 and 1"),
        (Task.binary("b"), 5.0, "f:3: task 'b' has labels 5 to 5, expected 0 to 1"),
        (INTENT, np.int64(3), "f:3: 3 is no id of a class of task 'intent'; expected 0 to 2"),
        (INTENT, 1.0, "f:3: 1.0 is no id of a class"),
        (SLOTS, 0, "f:3: 1 tags of 'slots' for no list of words"),
    ]:
        with pytest.raises(ValueError, match=message):
            TextSplit([{"text": "play it", task.name: label, "where": "f:3"}], [task], bert[1])
