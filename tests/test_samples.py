"""Samples in whatever form they come: what goes through, and what is refused as none."""

import datasets
import pandas
import pytest
import torch
from torch.utils.data import Subset

from moe_mtl import create_model, finetune
from moe_mtl.samples import input_of, read_samples
from moe_mtl.tasks import Task

ENCODER = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER |= {"vocab_size": 50, "intermediate_size": 16}


def of_texts():
    return create_model("text_shared_bottom", tasks=[Task.classification("mood", 3)], encoder=ENCODER)


def texts(count=8):
    """Token ids of 3 to 6 tokens as lists, as `datasets.Dataset.map(tokenizer)` leaves them."""
    ids = [[5 + j for j in range(3 + i % 4)] for i in range(count)]
    return [{"text": {"input_ids": n, "attention_mask": [1] * len(n)}, "mood": i % 3} for i, n in enumerate(ids)]


@pytest.mark.parametrize("form", [
    list, datasets.Dataset.from_list, lambda rows: datasets.Dataset.from_list(rows).with_format("torch"),
    lambda rows: Subset(rows, range(len(rows))),
])  # fmt: skip
def test_texts_are_padded_in_every_form(form):
    model = of_texts()
    x = input_of(model, read_samples(model, form(texts()), "data"), [1, 3, 0])
    assert x["input_ids"].tolist() == [[5, 6, 7, 8, 0, 0], [5, 6, 7, 8, 9, 10], [5, 6, 7, 0, 0, 0]]
    assert x["attention_mask"].sum(dim=1).tolist() == [4, 6, 3]
    finetune(model, form(texts()), train="router+head", steps=1, progress=False)


@pytest.mark.parametrize("data, came", [
    (pandas.DataFrame({"text": ["a"], "mood": [1]}), "DataFrame"),
    (torch.rand(6, 3), "Tensor of Tensor"),
    (["a", "b"], "list of str"),
    ([({"text": "a"}, 1)], "list of tuple"),
    ({"text": "a"}, "dict"),
    (iter([]), "list_iterator"),
])  # fmt: skip
def test_what_is_no_samples_is_refused(data, came):
    with pytest.raises(ValueError, match=f"data: got a {came}, expected samples: a list of dicts"):
        read_samples(of_texts(), data, "data")
