"""What models of images refuse."""

import numpy as np
import pytest
import torch

from moe_mtl import create_model
from moe_mtl.tasks import Task

TASKS = [Task.classification("left", 3), Task.binary("right")]
MODELS = {
    "m3vit_micro": {"image_size": 16, "dim": 16, "depth": 2, "num_heads": 2, "experts": 3, "k": 2},
    "single_task_micro": {"image_size": 16, "dim": 16, "depth": 2, "num_heads": 2},
    "mmoe_lenet": {"side": 16},
}


def model_and_images(name):
    torch.manual_seed(0)
    x = torch.rand(2, 1 if name.endswith("lenet") else 3, 16, 16)
    return create_model(name, tasks=TASKS, **MODELS[name]).eval(), x


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x.numpy(), r"^x: got ndarray, expected a tensor of images \[b, c, h, w\]"),
        (lambda x: {"image": x}, "^x: got dict, .* the batch's entry 'image'"),
        (lambda x: list(x), "^x: got list, "),
        (lambda x: x[0], "^x: got torch.float32 .* add the batch axis"),
        (lambda x: x[:0], "^x: got an empty batch"),
        (lambda x: x.mul(255).byte(), "^x: got torch.uint8 .* divide uint8 by 255"),
        (lambda x: x.double(), "^x: got torch.float64 images, the model is torch.float32"),
    ],
    ids=["array", "dict", "list", "one", "none", "uint8", "double"],
)
def test_what_is_no_batch_of_images_is_refused_by_its_name(name, change, message):
    model, x = model_and_images(name)
    assert set(model(x)) == {"left", "right"}
    with pytest.raises(ValueError, match=message):
        model(change(x))


@pytest.mark.parametrize("name", MODELS)
def test_autocast_takes_images_of_another_precision(name):
    model, x = model_and_images(name)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x.bfloat16())
    for task, y in model(x.bfloat16().float()).items():
        assert np.abs(found[task].detach().float().numpy() - y.detach().numpy()).max() < 0.05
