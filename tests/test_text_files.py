"""Texts of one's own: files as people write them, what their labels mean, and mistakes named by file and line."""

import json

import datasets
import pandas
import pytest

from moe_mtl.data import Snips, TextFiles
from tests.text_cases import save_encoder, write_snips


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return str(save_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture
def read(tmp_path, encoder):
    """The tasks and the training rows of a file with this name and content."""

    def read(name, content, **options):
        path = tmp_path / name
        if isinstance(content, list | pandas.DataFrame):
            pandas.DataFrame(content).to_parquet(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        data = TextFiles(root=str(path), tokenizer=encoder, val=0.0, test=0.0, **options)
        return data.task_list(), data._found["files"].splits["train"]

    return read


# ---- lines of CSV and TSV


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", "text,label\nplay, please,a\nsing, please,b\n", r"a.csv:2: has 3 fields, expected 2 \(text, label\); "),
    ("a.csv", "text,label\nplay,a\nsing, please,b\n", "a.csv:3: has 3 fields"),
    ("a.csv", "text,label\nplay, rome,a\nsing,b\n", "a.csv:2: has 3 fields"),
    ("a.csv", "text,label\nplay,a\nsing\n", "a.csv:3: has 1 fields, expected 2 .* an empty one keeps its comma"),
    ("a.csv", 'text,label\nplay,a\n"sing,b\nrome,a\n', r"a.csv:3: is no CSV \(unexpected end of data\); close quotes"),
    ("a.csv", "text,label,text\nplay,a,b\n", "a.csv:1: two columns are called 'text'; rename one"),
    ("a.csv", 'text,label\n"play\n\n\nrome",a\nsing\n', "a.csv:6: has 1 fields"),
    ("a.csv", "text,label\nplay,a\n\n\nsing\n", "a.csv:5: has 1 fields"),
    ("a.csv", "text,label\n\ncafé,a\n".encode("latin-1"), "a.csv:3: byte 0xe9 is no UTF-8; save the file in UTF-8"),
    ("a.tsv", 'text\tlabel\nplay\ta\n"sing\nb"\ta\n', "a.tsv:3: has 1 fields, expected 2 .* no field can hold a tab"),
])  # fmt: skip
def test_lines_that_are_not_sound(read, name, content, message):
    with pytest.raises(ValueError, match=message):
        read(name, content)


def test_quotes_in_tsv_are_characters(read):
    _, rows = read("a.tsv", 'text\tlabel\n"play rome\ta\nsing\tb\nthe pin\ta\n"new\tb\n')
    assert [row["text"] for row in rows] == ['"play rome', "sing", "the pin", '"new']
    assert [row["where"].rsplit(":", 1)[1] for row in rows] == ["2", "3", "4", "5"]


def test_quoted_fields_blank_lines_and_long_texts_are_read(read):
    long = "play " * 40_000
    _, rows = read("a.csv", f'\ufefftext,label\r\n"play, ""it""\n\nnow",a\r\n\r\n,\r\n{long},b\r\n')
    assert [row["text"] for row in rows] == ['play, "it"\n\nnow', long]
    assert [row["where"].rsplit(":", 1)[1] for row in rows] == ["2", "7"]


# ---- JSON and Parquet


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", '{"text":"play","label":"a"}\n' * 36 + '{"text":"play","label":}\n', "a.jsonl:37: is not JSON .Exp"),
    ("a.jsonl", '{"text":"play","label":"a"}\n\n5\n', "a.jsonl:3: got int, expected an object"),
    ("a.json", '[{"text":"play","label":"a"},\n{"text":}]', "a.json:2: is not JSON .Expecting value, column 9."),
    ("a.json", '{"text":"play"}\n{"text":"sing"}', "a.json:2: is not JSON .Extra data.* ends in .jsonl"),
    ("a.json", '{"text":"play"}', "a.json: holds dict, expected a list of objects"),
    ("a.json", '[{"text":5,"label":"a"}]', r"a.json\[0\]: column 'text' holds 5 \(int\), expected a string or a l"),
    ("a.json", '[{"text":["play", 5],"label":"a"}]', r"a.json\[0\]: column 'text' holds \['play', 5\]"),
    ("a.json", '[{"text":"play","label":["a"]}]', r"a.json\[0\]: label \['a'\] of task 'label' is a list, expected"),
    ("a.parquet", [{"text": "play", "label": "a"}, {"text": None, "label": "b"}], r"t\[1\]: column 'text' holds N"),
    ("a.parquet", b"text,label\n", "a.parquet: is no Parquet file"),
])  # fmt: skip
def test_objects_that_are_not_sound(read, name, content, message):
    with pytest.raises(ValueError, match=message):
        read(name, content)


def test_a_line_separator_of_unicode_ends_no_line(read, tmp_path, encoder):
    rows = [{"text": "play\u2028rome", "label": "a"}, {"text": "sing", "label": "b"}]
    _, found = read("a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert [row["text"] for row in found] == ["play\u2028rome", "sing"]
    root = write_snips(tmp_path / "snips")
    path = root / "train" / "seq.in"
    path.write_text(path.read_text().replace("weather in", "weather\u2028in", 1))
    assert Snips(root=str(root))._found["snips"].splits["train"][0]["text"][:2] == ["weather", "in"]


def test_json_with_a_mark_of_its_encoding_is_read(read):
    _, rows = read("a.json", '\ufeff[{"text":"play","label":"a"}]')
    assert rows[0]["text"] == "play"


def test_lists_in_parquet(read):
    rows = [{"words": ["play", "rome"], "tags": ["O", "B-city"]}, {"words": ["the", "new", "pin"], "tags": ["O"] * 3}]
    (tags,), found = read("a.parquet", rows, text="words", labels="tags:tagging")
    assert tags.classes == ("O", "B-city", "I-city") and [row["tags"] for row in found] == [[0, 1], [0, 0, 0]]
    assert found[0]["text"] == ["play", "rome"]
    rows = [{"text": "play", "topics": ["a", "b"]}, {"text": "sing", "topics": ["a"]}, {"text": "be", "topics": None}]
    (topics,), found = read("b.parquet", rows, labels="topics:multilabel")
    assert topics.classes == ("a", "b") and [row.get("topics") for row in found] == [[1.0, 1.0], [1.0, 0.0], None]


def test_numbers_of_classes_stay_whole_beside_missing_ones(read):
    rows = pandas.DataFrame({"text": ["play", "sing"], "label": pandas.array([1, None], dtype="Int64")})
    (label,), found = read("a.parquet", rows)
    assert label.classes == ("1",) and "label" not in found[1]


# ---- labels


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.parquet"])
def test_minus_one_is_a_label(read, name):
    rows = [{"text": text, "s": s} for text, s in (("play", -1), ("sing", 0), ("rome", 1))]
    content = {"csv": pandas.DataFrame(rows).to_csv(index=False), "json": json.dumps(rows), "parquet": rows}
    (s,), found = read(name, content[name[2:]], labels="s")
    assert s.classes == ("-1", "0", "1") and [row["s"] for row in found] == [0, 1, 2]
    (s,), found = read(name, content[name[2:]], labels="s:regression")
    assert s.mean == 0 and [row["s"] for row in found] == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("value", ["oops", "nan", "inf"])
def test_what_is_no_number_is_named_with_its_line(read, value):
    with pytest.raises(
        ValueError, match=f"a.csv:3: label '{value}' of task 'label' is no number; leave the field empty"
    ):
        read("a.csv", f"text,label\nplay,1.5\nsing,{value}\n", labels="label:regression")


def test_what_stands_between_several_labels_is_decided_for_the_column(read):
    lines = ["text,topics", "play,customer service | billing", "sing,customer service", "rome,", "be,billing"]
    (topics,), rows = read("a.csv", "\n".join(lines), labels="topics:multilabel")
    assert topics.classes == ("billing", "customer service")
    assert [row.get("topics") for row in rows] == [[1.0, 1.0], [0.0, 1.0], None, [1.0, 0.0]]
    (topics,), _ = read("b.csv", "text,topics\nplay,new old\nsing,old\n", labels="topics:multilabel")
    assert topics.classes == ("new", "old")


def test_none_in_a_list_of_tags_is_no_label(read):
    content = json.dumps([{"text": ["play", "it"], "tags": ["VERB", None]}])
    (tags,), rows = read("a.json", content, labels="tags:tagging")
    assert tags.classes == ("VERB",) and rows[0]["tags"] == [0, tags.ignore_index]


def test_columns_whose_names_no_task_can_have(read, encoder):
    content = "text,star rating,type,2nd\nplay,1,x,y\n"
    tasks, rows = read("a.csv", content, labels="star rating:regression,type,2nd")
    assert [task.name for task in tasks] == ["star_rating", "type_task", "_2nd"]
    assert rows[0] == {"text": "play", "where": rows[0]["where"], "star_rating": 1.0, "type_task": 0, "_2nd": 0}
    with pytest.raises(ValueError, match="labels: columns 'a b' and 'a_b' both make a task 'a_b'"):
        read("b.csv", "text,a b,a_b\nplay,1,2\n", labels="a b,a_b")
    with pytest.raises(ValueError, match="text: got 3 columns, a, b, c; expected one, or two of a pair"):
        read("b.csv", "a,b,c,label\nplay,1,2,3\n", text="a,b,c")


def test_a_changed_file_is_read_again(tmp_path, read):
    (before,), _ = read("a.csv", "text,label\nplay,a\nsing,b\n")
    (after,), _ = read("a.csv", "text,label\nplay,x\nsing,y\n")
    assert before.classes == ("a", "b") and after.classes == ("x", "y")


def test_a_text_longer_than_the_encoder_takes_is_named(read, tmp_path, encoder):
    read("a.csv", f"text,label\nplay,a\n{'sing ' * 80},b\n")
    data = TextFiles(root=str(tmp_path / "a.csv"), tokenizer=encoder, val=0.0, test=0.0)
    with pytest.raises(ValueError, match=r"a.csv:3: the text has 82 tokens, max_length is 64; the encoder has no more "
                       r"positions; shorten the text, or pass --data.truncate=true"):  # fmt: skip
        data.split("train")
    cut = TextFiles(root=str(tmp_path / "a.csv"), tokenizer=encoder, val=0.0, test=0.0, truncate=True)
    assert cut.split("train").lengths == [3, 64]


def test_a_training_split_alone_is_split_as_a_file_is(tmp_path, encoder):
    (tmp_path / "train.csv").write_text("text,label\n" + "play,a\nsing,b\n" * 20)
    data = TextFiles(root=str(tmp_path), tokenizer=encoder)
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [32, 4, 4]
    alone = TextFiles(root=str(tmp_path / "train.csv"), tokenizer=encoder)
    rows = [[row["label"] for row in one.split("val")] for one in (data, alone)]
    assert rows[0] == rows[1]


# ---- the hub, from a folder of its format


@pytest.fixture
def hub(tmp_path, encoder, monkeypatch):
    """The tasks and splits of a data set of these features, with a hidden label in its test part."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({
        "text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos", "mixed"]),
        "tokens": datasets.List(datasets.Value("string")), "points": datasets.Value("int64"),
        "tags": datasets.List(datasets.ClassLabel(names=["O", "B-PER", "I-PER", "B-LOC", "I-LOC"])),
    })  # fmt: skip
    row = {"text": "play rome", "tokens": ["play", "rome"], "tags": [0, 1], "points": -1}
    for part, label in (("train", 1), ("validation", 0), ("test", -1)):
        rows = datasets.Dataset.from_list([{**row, "label": label}] * 2, features=features)
        rows.to_parquet(str(tmp_path / "set" / f"{part}-0.parquet"))

    def read(**options):
        data = TextFiles(root=f"hub:{tmp_path / 'set'}", tokenizer=encoder, **options)
        return data.task_list(), data._found["files"].splits

    return read


def test_classes_of_the_hub_keep_names_and_order(hub):
    (label, points), splits = hub(labels="label,points:regression")
    assert label.classes == ("neg", "pos", "mixed")
    assert [[row.get("label") for row in splits[name]] for name in splits] == [[1, 1], [0, 0], [None, None]]
    assert points.mean == -1 and splits["test"][0]["points"] == -1.0
    (label,), splits = hub(labels="label:binary")
    assert splits["train"][0]["label"] == 1.0 and "label" not in splits["test"][0]


def test_tags_of_the_hub_are_spans(hub):
    (tags,), splits = hub(text="tokens", labels="tags:tagging")
    assert tags.classes == ("O", "B-PER", "I-PER", "B-LOC", "I-LOC") and "constrained_span_f1" in tags.metrics
    assert splits["val"][0]["tags"] == [0, 1] and splits["val"][0]["where"].endswith("set[validation][0]")


def test_a_hidden_class_without_a_name_is_no_label(hub):
    with pytest.raises(ValueError, match="labels: column 'points' is empty"):
        hub(labels="points")
