"""Data sets of texts: what the readers find, where tags go, padding, and mistakes named by file and line."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import torch
import transformers

from moe_mtl.data import Banking77, NLUMix, NLUpp, Snips, TextFiles, TextSplit, UDEnglishEWT, pad_batch
from moe_mtl.data.nlupp import fold_numbers, tag_words
from moe_mtl.tasks import Task
from tests.text_cases import save_encoder, write_all, write_banking77, write_ewt, write_nlupp, write_snips


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return str(save_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="module")
def tokenizer(encoder):
    return transformers.AutoTokenizer.from_pretrained(encoder)


def words_of(task, sample, tokenizer):
    """(first piece of a word, tag) of every token that carries a tag."""
    ids, tags = sample["text"]["input_ids"], sample[task.name]
    pieces = tokenizer.convert_ids_to_tokens(ids.tolist())
    return [(piece, task.classes[tag]) for piece, tag in zip(pieces, tags.tolist(), strict=True) if tag >= 0]


# ---- readers


def test_snips(tmp_path, encoder, tokenizer):
    data = Snips(root=str(write_snips(tmp_path / "snips")), tokenizer=encoder)
    intent, slots = data.task_list()
    assert intent.classes == ("GetWeather", "PlayMusic")
    assert slots.classes == ("O", "B-city", "I-city", "B-song", "I-song")
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [24, 6, 6]
    first, second = data.split("train")[0], data.split("train")[1]
    assert [int(row["snips_intent"]) for row in (first, second)] == [0, 1]
    assert [tag for _, tag in words_of(slots, first, tokenizer)] == ["O", "O", "B-city"]
    assert words_of(slots, first, tokenizer)[:2] == [("weather", "O"), ("in", "O")]
    assert words_of(slots, second, tokenizer)[0] == ("play", "O")
    assert words_of(slots, second, tokenizer)[1][1] == "B-song"


def test_banking77_holds_out_every_tenth_and_reads_quoted_lines(tmp_path, encoder):
    data = Banking77(root=str(write_banking77(tmp_path / "b")), tokenizer=encoder)
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [18, 2, 4]
    assert data.task_list() == (Task.classification("banking77", 2, classes=["lost_card", "new_pin"]),)
    assert [int(data.split("test")[i]["banking77"]) for i in (0, 1)] == [0, 1]


def test_nlupp(tmp_path, encoder, tokenizer):
    data = NLUpp(root=str(write_nlupp(tmp_path / "n")), tokenizer=encoder)
    intents, slots = data.task_list()
    assert intents.classes == ("lost", "pin") and slots.classes == ("O", "B-city", "I-city")
    sample = data.split("test")[0]
    assert sample["nlupp_intents"].tolist() == [1.0, 1.0]
    assert [tag for _, tag in words_of(slots, sample, tokenizer)] == ["O", "O", "O", "O", "O", "B-city", "O"]


def test_nlupp_folds_never_overlap():
    for setting, train, test in (("large", 17, 2), ("10-fold", 2, 17), ("20-fold", 1, 18)):
        for fold in (0, 19):
            parts = fold_numbers(setting, fold)
            assert [len(parts[s]) for s in ("train", "val", "test")] == [train, 1, test]
            assert sorted(n for part in parts.values() for n in part) == list(range(20))
    with pytest.raises(ValueError, match=r"^setting, fold: got 'small' and 0"):
        fold_numbers("small", 0)  # type: ignore[arg-type]


def test_a_slot_takes_whole_words():
    assert tag_words("at 9 05pm!", {"time": {"span": [3, 7]}}, "x") == (
        ["at", "9", "05pm", "!"],
        ["O", "B-time", "I-time", "O"],
    )
    with pytest.raises(ValueError, match=r"^x: slot 'time' is said to be at 20 to 22"):
        tag_words("at 9", {"time": {"span": [20, 22]}}, "x")


def test_treebank_words_are_those_of_the_syntax(tmp_path, encoder):
    data = UDEnglishEWT(root=str(write_ewt(tmp_path / "e")), tokenizer=encoder, tasks=["upos"])
    (upos,) = data.task_list()
    assert upos.classes == ("AUX", "PART", "PROPN", "PUNCT", "VERB") and list(upos.metrics) == ["accuracy"]
    found = data.split("test")
    assert len(found) == 2
    assert [upos.classes[t] for t in found[0]["upos"].tolist() if t >= 0] == ["AUX", "PART", "VERB", "PUNCT"]


def test_the_mix_keeps_sources_apart(tmp_path, encoder):
    data = NLUMix(
        root=str(write_all(tmp_path)), tokenizer=encoder, tasks=["snips_intent", "banking77", "upos"], limit=5
    )
    train = data.split("train")
    assert {name: len(rows) for name, rows in train.sources.items()} == {
        "snips": 5,
        "banking77": 5,
        "ud_english_ewt": 2,
    }
    assert train.labelled("banking77") == list(train.sources["banking77"])
    assert data.model_args() == {"encoder": encoder}
    assert len(data.split("test")) == 6 + 4 + 2  # a limit is of training alone
    fewer = replace(data, limit=None, limits={"banking77": 3}).split("train")
    assert {name: len(rows) for name, rows in fewer.sources.items()} == {
        "snips": 24, "banking77": 3, "ud_english_ewt": 2}  # fmt: skip


def test_a_limit_draws_at_random_and_a_larger_one_adds_to_it(tmp_path, encoder):
    data = Banking77(root=str(write_banking77(tmp_path / "b")), tokenizer=encoder)

    def labels(limit):
        return [int(row["banking77"]) for row in replace(data, limit=limit).split("train")]

    every, drawn = labels(None), [labels(n) for n in (4, 9, 9)]
    assert drawn[1][:4] == drawn[0] and drawn[1] == drawn[2]
    assert drawn[1] != every[:9] and len(drawn[1]) == 9


def test_tasks_can_weigh_more(tmp_path, encoder):
    data = Banking77(root=str(write_banking77(tmp_path / "b")), tokenizer=encoder, weights={"banking77": 2.5})
    assert [task.weight for task in data.task_list()] == [2.5]
    with pytest.raises(ValueError, match="weights: unknown task 'banking'"):
        replace(data, weights={"banking": 2.0}).task_list()


# ---- files of one's own


ROWS = [
    {"a": "play rome", "b": "sing", "kind": "x", "score": 1.5, "yes": 1, "topics": "t|u", "tags": "O B-city"},
    {"a": "the new pin", "b": "sing", "kind": "y", "score": None, "yes": 0, "topics": "u", "tags": "O O O"},
]


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_files_of_every_kind(tmp_path, encoder, ending):
    frame, path = pandas.DataFrame(ROWS * 10), tmp_path / f"rows.{ending}"
    if ending in ("csv", "tsv"):
        frame.to_csv(path, sep="\t" if ending == "tsv" else ",", index=False)
    elif ending == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=ending == "jsonl")
    labels = "kind,score:regression,yes:binary,topics:multilabel,tags:tagging"
    data = TextFiles(root=str(path), tokenizer=encoder, text="a", labels=labels, test=0.2, val=0.2)
    kinds = {task.name: task.kind for task in data.task_list()}
    assert kinds == {
        "kind": "classification",
        "score": "regression",
        "yes": "binary",
        "topics": "multilabel",
        "tags": "tagging",
    }
    parts = {name: data.split(name) for name in ("train", "val", "test")}
    assert sum(map(len, parts.values())) == 20 and all(map(len, parts.values()))
    for sample in parts["train"]:
        first = int(sample["kind"]) == 0
        assert ("score" in sample) == first and float(sample["yes"]) == first
        assert sample["topics"].tolist() == ([1.0, 1.0] if first else [0.0, 1.0])


def test_a_folder_of_splits_and_pairs(tmp_path, encoder):
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.json").write_text(json.dumps(ROWS))
    data = TextFiles(root=str(tmp_path), tokenizer=encoder, text="a, b", labels="kind")
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [2, 2, 2]
    ids = data.split("val")[0]["text"]["input_ids"].tolist()
    assert ids.count(transformers.AutoTokenizer.from_pretrained(encoder).sep_token_id) == 2


@pytest.mark.parametrize("options, message", [
    ({"text": "c"}, "columns: .* has no column 'c'; "),
    ({"labels": "kind:regression"}, r"rows.json\[0\]: label 'x' of task 'kind' is no number; leave the field empty"),
    ({"labels": "kind:clasification"}, "'kind' has the unknown kind 'clasification'; did you mean 'classification'"),
    ({"labels": "score:binary"}, r"rows.json\[0\]: label 1.5 of the binary task 'score' is neither 0 nor 1"),
    ({"root": "absent.csv"}, "root: absent.csv is neither a file nor a folder"),
    ({"tasks": ["kinds"]}, "tasks: TextFiles has no 'kinds'; did you mean 'kind'"),
])  # fmt: skip
def test_mistakes_in_a_schema(tmp_path, encoder, options, message):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    how = {"root": str(tmp_path / "rows.json"), "text": "a", "labels": "kind", **options}
    with pytest.raises((ValueError, OSError), match=message):
        TextFiles(tokenizer=encoder, **how).split("train")


# ---- mistakes, by file and line


def test_a_line_with_more_tags_than_words(tmp_path, encoder):
    root = write_snips(tmp_path / "s")
    path = root / "train" / "seq.out"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1] + " O", *lines[2:]]))
    with pytest.raises(ValueError, match=r"train/seq.in:2: \d words, but \d tags in seq.out; expected one each"):
        Snips(root=str(root), tokenizer=encoder).task_list()
    path.write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"files of different length .seq.in 24, seq.out 23, label 24 lines"):
        Snips(root=str(root), tokenizer=encoder, max_length=99).task_list()


def test_a_label_that_is_not_in_the_set(tmp_path, encoder):
    root = write_banking77(tmp_path / "b")
    (root / "test.csv").write_text('text,category\nhello,lost_card\n"my\ncard",lost_crad\n')
    with pytest.raises(
        ValueError, match=r"test.csv:4: label 'lost_crad' .* not in the label set; did you mean 'lost_c"
    ):
        Banking77(root=str(root), tokenizer=encoder).task_list()


def test_a_missing_file_a_wrong_column_and_no_conllu(tmp_path, encoder):
    with pytest.raises(FileNotFoundError, match=r"^root: .*train/seq.in is not a file"):
        Snips(root=str(tmp_path), tokenizer=encoder).task_list()
    with pytest.raises(ValueError, match="root: say where NLUpp lies"):
        NLUpp(tokenizer=encoder).task_list()
    root = write_ewt(tmp_path / "e")
    (root / "en_ewt-ud-dev.conllu").write_text("1\ta\tb\n")
    with pytest.raises(ValueError, match=r"dev.conllu:1: has 3 columns, expected the 10"):
        UDEnglishEWT(root=str(root), tokenizer=encoder).task_list()


def test_texts_that_cannot_be_used(tokenizer):
    intent, slots = Task.classification("intent", 2), Task.tagging("slots", ["O", "B-x"])
    for sample, message in [
        ({"text": " ", "where": "f:7"}, "f:7: the text is empty"),
        ({"text": ["a", ""]}, r"texts\[0\]: the text is empty, or one of its words is"),
        ({"text": 5}, "got a text of int, expected a string, a pair or a list of words"),
        ({"text": "play " * 20}, r"has 22 tokens, max_length is 10; raise max_length"),
        ({"text": "play", "intent": 2}, "2 is no id of a class of task 'intent'; expected 0 to 1"),
        ({"text": ["play", "it"], "slots": [0]}, "1 tags of 'slots' for 2 words; expected one tag per word"),
        ({"text": "play it", "slots": [0, 0]}, "2 tags of 'slots' for no list of words"),
        ({"text": ["play"], "slots": [3]}, "3 is no id of a class of task 'slots'"),
    ]:
        with pytest.raises(ValueError, match=message):
            TextSplit([sample], [intent, slots], tokenizer, max_length=10)


def test_a_slow_or_missing_tokenizer_is_refused(tmp_path):
    data = Snips(root=str(write_snips(tmp_path / "s")))
    with pytest.raises(ValueError, match="tokenizer: name the folder of the encoder and its tokenizer"):
        data.split("train")


# ---- tokens


def test_batches_are_padded_and_what_is_missing_is_marked(tokenizer):
    slots, intent = Task.tagging("slots", ["O", "B-x"]), Task.classification("intent", 2)
    rows = [{"text": ["play", "it"], "slots": [0, 1]}, {"text": "weather in the city of oslo", "intent": 1}]
    found = TextSplit(rows, [slots, intent], tokenizer)
    batch = found.__getitems__([0, 1])
    text, n = batch["text"], max(found.lengths)
    assert text["input_ids"].shape == text["attention_mask"].shape == batch["slots"].shape == (2, n)
    assert text["attention_mask"].sum(dim=1).tolist() == found.lengths
    assert (text["input_ids"][0, found.lengths[0] :] == tokenizer.pad_token_id).all()
    assert (batch["slots"] >= 0).sum(dim=1).tolist() == [2, 0] and batch["intent"].tolist() == [-100, 1]


def test_samples_of_ones_own_make_a_batch(tokenizer):
    slots, intent = Task.tagging("slots", ["O", "B-x"]), Task.classification("intent", 2)
    first, second = tokenizer("play"), tokenizer("play what is new")  # lists, as a tokenizer writes them
    count = len(second["input_ids"])
    rows = [{"text": first, "slots": None, "intent": 1}, {"text": dict(second), "slots": [-100, 1, *[0] * (count - 2)]}]
    batch = pad_batch(rows, [slots, intent], pad_id=7)
    assert batch["text"]["input_ids"].tolist() == [first["input_ids"] + [7] * (count - 3), second["input_ids"]]
    assert batch["slots"].tolist() == [[-100] * count, rows[1]["slots"]] and batch["intent"].tolist() == [1, -100]
    assert set(pad_batch([{"text": first, "slots": None}], [slots])) == {"text"}


def test_samples_that_are_no_tokens_or_have_tags_for_others(tokenizer):
    slots, text = Task.tagging("slots", ["O", "B-x"]), dict(tokenizer("play", return_tensors="pt"))
    one = {key: value[0] for key, value in text.items()}
    for sample, message in [
        ({"text": "play"}, r"samples\[1\]\['text'\]: got str, expected what a tokenizer makes of one text"),
        ({}, r"samples\[1\]\['text'\]: got NoneType"),
        ({"text": text}, r"samples\[1\]\['text'\]: got \{'input_ids': \[1, 3\]"),
        ({"text": {"input_ids": one["input_ids"]}}, r"samples\[1\]\['text'\]: holds \['input_ids'\], samples\[0\]"),
        ({"text": one, "slots": [0, 1, 0, 1, 0]}, r"samples\[1\]\['slots'\]: got tags of shape \[5\] for 3 tokens"),
        ({"text": one, "slots": torch.tensor([1])}, r"samples\[1\]\['slots'\]: got tags of shape \[1\] for 3 tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            pad_batch([{"text": one}, sample], [slots])


def test_a_cut_text_keeps_its_end_mark_and_the_tags_that_are_left(tokenizer):
    slots = Task.tagging("slots", ["O", "B-x"])
    row = {"text": ["play"] * 20, "slots": [0, 1] * 10}
    (sample,) = TextSplit([row], [slots], tokenizer, max_length=8, truncate=True)
    assert len(sample["text"]["input_ids"]) == 8 and sample["text"]["input_ids"][-1] == tokenizer.sep_token_id
    assert sample["slots"].tolist() == [-100, 0, 1, 0, 1, 0, 1, -100]


# ---- the real files, where they are


def test_real_files(data_root, encoder):
    data = NLUMix(root=str(data_root), tokenizer=encoder)
    sizes = {name: {s: len(t.splits[s]) for s in t.splits} for name, t in data._found.items()}
    assert sizes == {
        "snips": {"train": 13084, "val": 700, "test": 700},
        "banking77": {"train": 9002, "val": 1001, "test": 3080},
        "nlupp": {"train": 2621, "val": 155, "test": 304},
        "ud_english_ewt": {"train": 12544, "val": 2001, "test": 2077},
    }
    channels = {task.name: task.channels for task in data.task_list()}
    assert channels["banking77"] == 77 and channels["nlupp_intents"] == 62 and channels["upos"] == 17
    words = [len(row["upos"]) for row in data._found["ud_english_ewt"].splits["test"]]
    assert sum(words) == 25_094


@pytest.fixture
def data_root():
    root = Path(os.environ.get("MOE_MTL_DATA", "nowhere"))
    if not (root / "snips").is_dir():
        pytest.skip("texts are not here; set MOE_MTL_DATA to a folder that holds snips/, banking77/ and so on")
    return root


def test_padding_changes_no_prediction(encoder, tokenizer):
    found = TextSplit([{"text": "play rome"}, {"text": "weather in the new oslo ?"}], [], tokenizer)
    model = transformers.AutoModel.from_pretrained(encoder).eval()
    batch = found.__getitems__([0, 1])["text"]
    alone = model(**{k: v[None] for k, v in found[0]["text"].items()}).last_hidden_state
    torch.testing.assert_close(model(**batch).last_hidden_state[:1, : found.lengths[0]], alone, atol=1e-5, rtol=1e-5)
