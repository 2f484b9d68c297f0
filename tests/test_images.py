"""What models of images refuse, and the colours they are made for."""

import copy

import numpy as np
import pytest
import timm
import torch

from moe_mtl import Predictor, create_model, extract, finetune, load, moefy, save
from moe_mtl.as_trained import read_splits
from moe_mtl.images import AS_THEY_ARE, Colours
from moe_mtl.tasks import Task
from moe_mtl.trainer import Trainer
from moe_mtl.trainer_config import TrainerConfig

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


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": 60}, "image_size: got 60, expected pixels, .* a multiple of patch_size=8"),
        ({"image_size": (64,)}, r"image_size: got \(64,\)"),
        ({"image_size": "64"}, "image_size: got '64'"),
        ({"image_size": [64, 60]}, r"image_size: got \[64, 60\]"),
        ({"image_size": 64.0}, "image_size: got 64.0"),
        ({"patch_size": 0}, "patch_size: got 0, expected a whole number, at least 1"),
        ({"dim": 32.0}, "dim: got 32.0"),
        ({"depth": -1}, "depth: got -1"),
        ({"num_heads": 5}, "num_heads: got 5, expected a divisor of dim=32"),
        ({"mlp_ratio": 0}, "mlp_ratio: got 0, which leaves no hidden unit of dim=32"),
        ({"drop_path": 1.5}, "drop_path: got 1.5, expected 0 to below 1"),
        ({"drop_path": float("nan")}, "drop_path: got nan"),
        ({"decoder": -1}, "decoder: got -1, expected a whole number, at least 0"),
        ({"every": 1.5}, "every: got 1.5, expected 1 to 2"),
        ({"blocks": 1}, "blocks: got 1, expected a list of block numbers from -2 to 1"),
        ({"blocks": [0.5]}, r"blocks: got \[0.5\]"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_sizes_that_make_no_model_are_refused_before_it_is_trained(options, message):
    sizes = {"dim": 32, "depth": 2, "experts": 3, "k": 2}
    with pytest.raises(ValueError, match=f"^{message}"):
        create_model("m3vit_micro", tasks=TASKS, **{**sizes, **options})


OWN = ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))


def moefied(**options):
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    cfg = dict(zip(("mean", "std"), OWN, strict=True))
    vit = timm.create_model("vit_tiny_patch16_224", pretrained_cfg_overlay=cfg, **sizes, **options)
    return moefy(vit, TASKS, experts=2, k=1).eval()


class Rows(list):
    def task_list(self):
        return TASKS

    def split(self, name):
        return self


def rows(scale=lambda image: image):
    g = torch.Generator().manual_seed(1)
    return Rows({"image": scale(torch.rand(3, 16, 16, generator=g)), "left": i % 3, "right": i % 2} for i in range(4))


def train(model, data):
    how = TrainerConfig(out=None, steps=1, batch_size=4, eval_every=0, progress=False)
    return Trainer(model, data, how).fit()


def agrees(model, reads):
    """Whether a predictor's answers are the model's for the image it is to have read."""
    image = rows()[0]["image"]
    with torch.no_grad():
        return torch.allclose(
            Predictor(model)(image, raw=True)["left"], model(reads(image)[None])["left"][0], atol=1e-6
        )


def scaled(image):
    mean, std = (torch.tensor(values)[:, None, None] for values in OWN)
    return (image - mean) / std


def test_colours_of_a_backbone_are_saved_with_the_model(tmp_path):
    model = moefied()
    assert model.colours == OWN and agrees(model, scaled)
    for made in (model, extract(model, "left")):
        again = load(save(made, tmp_path / "m"))
        assert again.colours == OWN and agrees(again, scaled) and again.config == made.config


def test_colours_put_in_by_hand_are_saved_too(tmp_path):
    model, single = moefied(), create_model("timm_single_task", tasks=TASKS, mean=[0.5], std=[0.5], **small_timm())
    assert agrees(single, lambda image: (image - 0.5) / 0.5)
    for one in (model, *single.models.values()):
        one.colours = Colours((0.3,), (0.2,))
    for one in (model, single):
        made = dict(one.config["args"])
        again = load(save(one, tmp_path / "m"))
        assert agrees(again, lambda image: (image - 0.3) / 0.2) and one.config["args"] == made


def small_timm():
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return {"backbone": "vit_tiny_patch16_224", "backbone_args": sizes, "head_width": 8}


def test_colours_are_numbers_of_any_library():
    halves = np.full(3, 0.5, dtype=np.float32)
    assert Colours.of(halves, torch.tensor([0.25])) == ((0.5, 0.5, 0.5), (0.25,))
    assert Colours.of(None, []) == AS_THEY_ARE
    assert all(type(value) is float for value in Colours.of(list(halves), None).mean)


def test_a_model_trained_on_colours_of_0_to_1_is_fed_these(tmp_path, capsys):
    model = train(moefied(), rows())
    assert "made for mean 0.1, 0.2, 0.3 and std 0.5, 0.6, 0.7; from now on" in capsys.readouterr().err
    again = load(save(model, tmp_path))
    for one in (model, again):
        assert one.colours == AS_THEY_ARE and agrees(one, lambda image: image)


def test_a_model_trained_on_scaled_colours_keeps_its_scale(capsys):
    model = train(moefied(), rows(scaled))
    assert model.colours == OWN and agrees(model, scaled) and "images:" not in capsys.readouterr().err


def test_training_some_tasks_changes_no_colours_of_the_others(capsys):
    model = finetune(moefied(), rows(), tasks=["left"], steps=1, progress=False)
    assert model.colours == OWN and "scale these, or the tasks learn from other colours" in capsys.readouterr().err


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_is_trained_tuned_and_scored_on_pictures(name):
    model, x = model_and_images(name)
    data = Rows({**row, "image": row["image"][: x.shape[1]]} for row in rows())
    before = copy.deepcopy(model.state_dict())
    train(model, data)
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert finetune(model, list(data), train="all", steps=1, progress=False).finetuning.steps == 1
    (samples,) = read_splits(model, data, "test")
    assert len(samples) == len(data)


class Own(torch.nn.Module):
    """A model of one's own, whose attributes have a meaning of its own."""

    tasks, models, colours, config = TASKS, ("left", "right"), ("red", "green", "blue"), {"args": None}

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 16 * 16, 4)

    def forward(self, x, tasks=None, return_routing=False):
        y = self.layer(x.flatten(1))
        found = {"left": y[:, :3], "right": y[:, 3]}
        found = {name: found[name] for name in tasks or found}
        return (found, {}) if return_routing else found


def test_a_model_of_ones_own_is_trained_whatever_its_attributes_are(tmp_path, capsys):
    how = TrainerConfig(out=str(tmp_path / "run"), steps=1, batch_size=4, eval_every=0, progress=False)
    model = Trainer(Own(), rows(), how).fit()
    assert (model.models, model.colours) == (Own.models, Own.colours)
    assert "gets no model folder: model: was changed" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["timm_moe", "timm_shared_bottom", "timm_single_task"])
def test_fresh_weights_know_no_colours_but_those_they_are_told(name, tmp_path):
    how = small_timm()
    how |= {"experts": 2, "k": 1} if name == "timm_moe" else {}
    assert agrees(create_model(name, tasks=TASKS, **how).eval(), lambda image: image)
    told = create_model(name, tasks=TASKS, mean=OWN[0], std=OWN[1], **how).eval()
    assert agrees(told, scaled) and agrees(load(save(told, tmp_path / "told")), scaled)
    trained = train(told, rows())
    assert agrees(trained, lambda image: image)
    assert agrees(load(save(trained, tmp_path / "trained")), lambda image: image)
    with pytest.raises(ValueError, match=r"^std: got \[0.0\], expected numbers above 0"):
        create_model(name, tasks=TASKS, std=[0.0], **how)
