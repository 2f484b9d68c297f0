"""Answers to tasks, by hand."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from moe_mtl.answers import answer
from moe_mtl.data._texts import EncodedText
from moe_mtl.tasks import Task

LOG3 = 1.0986123  # sigmoid 0.75


def test_a_class_has_its_name_and_its_probability():
    y = torch.tensor([0.0, LOG3])
    assert answer(Task.classification("c", 2, classes=("a", "b")), y) == {
        "label": "b",
        "probability": pytest.approx(0.75),
    }
    assert answer(Task.classification("c", 2), y)["label"] == 1


def test_labels_hold_from_the_threshold_on():
    assert answer(Task.binary("b"), torch.tensor(LOG3)) == {"label": True, "probability": pytest.approx(0.75)}
    assert answer(Task.binary("b"), torch.tensor(LOG3), threshold=0.8)["label"] is False
    named = Task.binary("b", classes=("bad", "good"))
    assert answer(named, torch.tensor(LOG3)) == {"label": "good", "probability": pytest.approx(0.75)}
    assert answer(named, torch.tensor(-LOG3)) == {"label": "bad", "probability": pytest.approx(0.25)}
    with pytest.raises(ValueError, match="classes: 1 names of task 'b', expected those of no and yes"):
        Task.binary("b", classes=("good",))
    task, y = Task.multilabel("m", 3, classes=("x", "y", "z")), torch.tensor([0.0, -LOG3, LOG3])
    assert list(answer(task, y).items()) == [("z", pytest.approx(0.75)), ("x", pytest.approx(0.5))]
    assert answer(task, y, threshold=0.7) == {"z": pytest.approx(0.75)}


def test_values_are_numbers():
    assert answer(Task.regression("r"), torch.tensor(3.5)) == 3.5
    assert answer(Task.regression("r", 2), torch.tensor([1.0, 2.0])) == [1.0, 2.0]


def test_maps_have_the_size_of_the_picture():
    y = torch.full((3, 2, 2), -9.0)
    y[0, :, 0], y[2, :, 1] = 9.0, 9.0
    found = answer(Task.segmentation("s", 3, classes=("a", "b", "c")), y, (2, 2))
    assert found["map"].tolist() == [[0, 2], [0, 2]] and found["shares"] == {"a": 0.5, "c": 0.5}
    assert answer(Task.segmentation("s", 3), y, (4, 4))["map"].tolist() == [[0, 0, 2, 2]] * 4
    depth = torch.tensor([[1.0, 3.0]])
    np.testing.assert_allclose(answer(Task.depth(), depth, (1, 4)), [[1.0, 1.5, 2.5, 3.0]])
    x, z = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    normals = answer(Task.normals(), torch.stack([x, z], dim=1)[:, None], (1, 4))
    assert normals.shape == (1, 4, 3)
    np.testing.assert_allclose(normals[0, 1], np.array([0.75, 0, 0.25]) / np.hypot(0.75, 0.25), atol=1e-6)
    np.testing.assert_allclose(answer(Task.binary_map("e"), torch.tensor([[LOG3]]), (1, 1)), [[0.75]], atol=1e-6)


def tagged(text, tags, words, parts, offsets):
    """The answer for tokens with these tags, marks at both ends; where an I- tag cannot stand, B- is next."""
    classes = ["O", "B-x", "I-x", "B-y", "I-y"]
    note = EncodedText(text, {}, [None, *words, None], [None, *parts, None], [(0, 0), *offsets, (0, 0)])
    ids = torch.tensor([0, *(classes.index(tag) for tag in tags), 0])
    begins = torch.tensor([0, 1, 1, 3, 3])[ids]
    y = torch.maximum(*(scale * F.one_hot(i, 5).T for i, scale in ((ids, 20.0), (begins, 8.0))))
    return answer(Task.tagging("t", classes), y, note)


def test_spans_of_a_string_are_cut_out_of_it():
    offsets = [(0, 2), (3, 6), (6, 8), (8, 9)]  # "in", "new" + "ly", "!"
    found = tagged("in newly!", ["O", "B-x", "O", "I-x"], [0, 1, 1, 2], [0] * 4, offsets)
    assert found["words"] == ["in", "newly", "!"] and found["tags"] == ["O", "B-x", "I-x"]
    assert found["spans"] == [{"label": "x", "text": "newly!", "start": 1, "stop": 3}]
    assert found["probabilities"] == [pytest.approx(1, abs=1e-5)] * 3


def test_where_spans_end():
    words, at = ["a", "b", "c", "d", "e", "f"], [(0, 1)] * 6
    found = tagged(words, ["I-x", "I-x", "B-x", "I-y", "O", "I-y"], range(6), [0] * 6, at)
    assert found["tags"] == ["B-x", "I-x", "B-x", "B-y", "O", "B-y"]  # an I- continues a span, or is not taken
    assert found["probabilities"] == [pytest.approx(p, abs=1e-4) for p in (0, 1, 1, 0, 1, 0)]  # of the tag that is
    assert [(s["label"], s["text"], s["start"], s["stop"]) for s in found["spans"]] == [
        ("x", "a b", 0, 2),
        ("x", "c", 2, 3),
        ("y", "d", 3, 4),  # of another label
        ("y", "f", 5, 6),  # after a gap
    ]


def test_no_span_goes_over_from_one_text_of_a_pair_to_the_other():
    found = tagged(("ab", "cd"), ["B-x", "I-x"], [0, 0], [0, 1], [(0, 2), (0, 2)])
    assert found["words"] == ["ab", "cd"] and found["tags"] == ["B-x", "B-x"]
    assert [s["text"] for s in found["spans"]] == ["ab", "cd"]


def test_types_without_a_b_tag_start_anywhere():
    note = EncodedText(["a", "b", "c"], {}, [0, 1, 2], [0] * 3, [(0, 1)] * 3)
    y = F.one_hot(torch.tensor([1, 1, 2]), 3).T.float()
    found = answer(Task.tagging("t", ["O", "I-x", "I-y"]), y, note)
    assert [(s["label"], s["text"]) for s in found["spans"]] == [("x", "a b"), ("y", "c")]


def test_tags_that_are_no_spans_give_none():
    note = EncodedText("ab", {}, [0], [0], [(0, 2)])
    found = answer(Task.tagging("t", ["NOUN", "VERB"], metric="accuracy"), torch.tensor([[0.0], [LOG3]]), note)
    assert found == {"words": ["ab"], "tags": ["VERB"], "probabilities": [pytest.approx(0.75)]}
