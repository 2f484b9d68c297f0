"""The pictures of a report, of models in any mode and of sets of independent ones."""

import numpy as np
import pytest
import torch

from moe_mtl.multitask import SingleTaskSet
from moe_mtl.pictures import draw
from moe_mtl.registry import create_model
from moe_mtl.sparse import extract
from moe_mtl.tasks import Task

TASKS = (Task.depth("near"), Task.classification("kind", 3))
X = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"dim": 16, "depth": 2, "num_heads": 2, "experts": 4, "k": 2, "head_width": 4}
    return create_model("m3vit_micro", tasks=TASKS, image_size=(32, 48), **sizes).eval()


def maps(model, predictions):
    """The maps of experts by caption, as images."""
    figures = draw(model, model.tasks, (X, predictions, {}), {}).maps
    return {
        caption: [np.asarray(image.get_array()) for axes in figure.axes for image in axes.images]
        for caption, figure in figures.items()
    }


def test_models_in_training_are_drawn_in_evaluation_and_go_on_training(model):
    predictions, modes = model(X), []
    expected = maps(model, predictions)
    assert list(expected) == ["blocks.1: near, kind"]
    model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    found = maps(model.train(), predictions)
    assert modes == [False] and model.training
    for old, new in zip(expected["blocks.1: near, kind"], found["blocks.1: near, kind"], strict=True):
        np.testing.assert_array_equal(old, new)


def test_independent_models_are_drawn_like_the_one_they_were_cut_out_of(model):
    apart = SingleTaskSet({task.name: extract(model, task.name) for task in TASKS})
    (together,), (cut_out,) = (maps(one, one(X)).items() for one in (model, apart))
    assert together[0] == cut_out[0]
    for old, new in zip(together[1], cut_out[1], strict=True):
        np.testing.assert_array_equal(old, new)
