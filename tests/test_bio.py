"""BIO tags: which may follow which, and the likeliest sequence that keeps to it."""

from itertools import product

import pytest
import torch

from moe_mtl.bio import best_tags, is_bio, may_follow
from moe_mtl.metrics import ConstrainedSpanF1, SpanF1
from moe_mtl.scoring import TaskMetrics
from moe_mtl.tasks import Task

SCHEMES = {
    "bio": ["O", "B-x", "I-x", "B-y", "I-y"],
    "no O": ["B-x", "I-x", "B-y", "I-y"],
    "a type without I-": ["O", "B-x", "B-y", "I-y"],
    "a type without B-": ["O", "I-x", "B-y", "I-y"],
    "any order": ["I-y", "B-x", "O", "B-y", "I-x"],
}


def keeps_to_it(tags, classes):
    """Whether every I- tag continues a span; types without a B- tag are free."""
    for before, tag in zip([None, *tags], tags, strict=False):
        name = classes[tag]
        if name[:2] == "I-" and f"B-{name[2:]}" in classes:
            last = None if before is None else classes[before]
            if last not in (name, f"B-{name[2:]}"):
                return False
    return True


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_sequence_that_keeps_to_it_is_likelier(scheme):
    classes = SCHEMES[scheme]
    torch.manual_seed(0)
    logits, labelled = 3 * torch.randn(40, len(classes), 6), torch.rand(40, 6) < 0.7
    labelled[0], labelled[1] = True, False
    found, changed = best_tags(logits, labelled, classes), 0
    assert found.dtype == torch.int64
    for y, valid, tags in zip(logits, labelled, found, strict=True):
        y, tags = y[:, valid], tags[valid].tolist()
        sequences = [tags for tags in product(range(len(classes)), repeat=len(tags)) if keeps_to_it(tags, classes)]
        assert tuple(tags) == max(sequences, key=lambda s: sum(float(y[tag, i]) for i, tag in enumerate(s)))
        changed += tags != y.argmax(dim=0).tolist()
    assert changed > 5  # so the rule did something


def test_tags_that_keep_to_it_stay():
    classes = SCHEMES["bio"]
    tags = torch.tensor([[1, 2, 2, 3, 4, 0], [0, 1, 1, 2, 0, 3]])
    logits = torch.nn.functional.one_hot(tags, 5).movedim(-1, 1).float()
    assert torch.equal(best_tags(logits, torch.ones(2, 6, dtype=torch.bool), classes), tags)


def test_tokens_without_a_label_are_passed_over():
    classes = ["O", "B-x", "I-x"]
    tags = torch.tensor([[1, 0, 2, 0, 2]])  # pieces of words between them, which say O
    logits = torch.nn.functional.one_hot(tags, 3).movedim(-1, 1).float()
    labelled = torch.tensor([[True, False, True, False, True]])
    assert best_tags(logits, labelled, classes)[labelled].tolist() == [1, 2, 2]
    assert best_tags(logits, torch.ones_like(labelled), classes)[0].tolist() != [1, 0, 2, 0, 2]
    assert best_tags(logits[..., :0], labelled[:, :0], classes).shape == (1, 0)
    assert best_tags(logits[:0], labelled[:0], classes).shape == (0, 5)


def test_the_rule_alone():
    table = may_follow(["O", "B-x", "I-x", "B-y", "I-y"])
    assert table.tolist() == [
        [True, True, False, True, False],  # opens
        [True, True, False, True, False],  # after O
        [True, True, True, True, False],  # after B-x
        [True, True, True, True, False],  # after I-x
        [True, True, False, True, True],  # after B-y
        [True, True, False, True, True],
    ]
    assert may_follow(["NOUN", "VERB"]).all()
    assert is_bio(["O", "B-x"]) and not is_bio(["O", "NOUN"]) and not is_bio([])


def test_tags_of_another_kind_are_the_best_ones():
    logits = torch.randn(3, 2, 4)
    found = best_tags(logits, torch.ones(3, 4, dtype=torch.bool), ["NOUN", "VERB"])
    assert torch.equal(found, logits.argmax(dim=1))


@pytest.mark.parametrize("shapes", [((2, 4, 6), (2, 6)), ((2, 5, 6), (2, 5)), ((5, 6), (1, 6))])
def test_shapes_that_do_not_fit(shapes):
    with pytest.raises(ValueError, match=r"logits, labelled: got .*, expected \[b, 5, n\] and \[b, n\]"):
        best_tags(torch.zeros(shapes[0]), torch.ones(shapes[1], dtype=torch.bool), SCHEMES["bio"])


def test_spans_are_scored_both_ways():
    classes = ["O", "B-x", "I-x", "B-y", "I-y"]
    target = torch.tensor([[1, 2, -100, 0], [0, 3, 4, -100]])
    logits = torch.zeros(2, 5, 4)
    logits[0, [1, 4, 0, 0], [0, 1, 2, 3]] = 2.0  # B-x I-y . O, with I-x next
    logits[0, 2, 1] = 1.5
    logits[1, [0, 3, 4, 2], [0, 1, 2, 3]] = 2.0
    task = Task.tagging("slots", classes)
    assert list(task.metrics) == ["constrained_span_f1", "span_f1", "accuracy"]
    metrics = TaskMetrics([task])
    for row in (slice(0, 1), slice(1, 2)):
        metrics.update({"slots": logits[row]}, {"slots": target[row]})
    found = metrics.compute()["slots"]
    assert found["constrained_span_f1"] == 1.0 and found["span_f1"] == pytest.approx(2 * 1 / (3 + 2))
    assert issubclass(ConstrainedSpanF1, SpanF1)
    with pytest.raises(ValueError, match="classes: span F1 needs the BIO tags"):
        ConstrainedSpanF1(["NOUN"])
