"""`list_models` by what a model takes, predicts and costs; and that what is said of every model is true."""

import json

import pytest
import torch
from safetensors.torch import save_file

from moe_mtl import create_model, hub, list_models, pretrained, registry
from moe_mtl.registry import MODALITIES, register_model, summary
from moe_mtl.tasks import KINDS, Task

MAKE = {
    "binary": Task.binary,
    "classification": lambda name: Task.classification(name, 3),
    "multilabel": lambda name: Task.multilabel(name, 3),
    "regression": Task.regression,
    "tagging": lambda name: Task.tagging(name, ("O", "B-x", "I-x")),
    "segmentation": lambda name: Task.segmentation(name, 3),
    "depth": Task.depth,
    "normals": Task.normals,
    "binary_map": Task.binary_map,
}
VIT = {"image_size": 16, "patch_size": 8, "dim": 16, "depth": 2, "num_heads": 2, "head_width": 4}
BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 20,
}
OPTIONS = {
    "table": {"columns": [{"name": "job", "kind": "categorical", "categories": ["a", "b"]}]},
    "text": {"encoder": BERT},
}
TIMM = {"backbone": "vit_tiny_patch16_224", "backbone_args": {"img_size": 32, "embed_dim": 24, "depth": 2}}


def make(name, modality, kinds):
    tasks = [MAKE[kind](f"{kind}_{i}") for kind in kinds for i in range(3 if len(kinds) == 1 else 1)]
    options = OPTIONS.get(modality, {})
    if modality == "image" and not name.endswith("_lenet"):
        options = TIMM if name.startswith("timm") else VIT
    if name == "esmm_table":
        options = {**options, "own_loss": True}
    return create_model(name, tasks=tasks, **options)


def kinds_of(name):
    return [kind for kind in sorted(KINDS) if name in list_models(kind=kind)]


@pytest.mark.parametrize("modality, name", [(m, name) for m in MODALITIES for name in list_models(modality=m)])
def test_a_model_takes_and_predicts_what_is_said_of_it(modality, name):
    kinds = kinds_of(name)
    model = make(name, modality, kinds)
    assert model.input == modality and {task.kind for task in model.tasks} == set(kinds) and summary(name)
    if modality == "image" and "segmentation" in kinds:
        return  # its heads take any kind
    for kind in sorted(KINDS - set(kinds)):
        with pytest.raises(ValueError, match=f"is of kind {kind}|of kind {kind} needs"):
            make(name, modality, [kind])


def test_every_model_has_one_modality():
    by_modality = [set(list_models(modality=m)) for m in MODALITIES]
    assert set.union(*by_modality) == set(list_models()) and sum(map(len, by_modality)) == len(list_models())
    assert "m3vit_micro" in by_modality[0] and "mmoe_lenet" in by_modality[0]
    assert "mmoe_table" in by_modality[1] and "text_moe" in by_modality[2]


def test_filters_add_up():
    assert list_models("text_*", kind="tagging") == list_models(kind="tagging") == list_models(modality="text")
    both = list_models(kind=["depth", "classification"])
    assert "m3vit_tiny" in both and not any(name.endswith(("_table", "_lenet")) for name in both)
    assert list_models(kind=("depth", "tagging")) == [] and list_models(kind=[]) == list_models()
    assert list_models("m3vit_*", modality="table") == []
    assert "esmm_table" in list_models(kind="binary") and "esmm_table" not in list_models(kind="regression")


def test_size_of_architectures():
    def parameters(name):
        return sum(p.numel() for p in create_model(name, tasks=[Task.binary("t")]).parameters())

    size = parameters("m3vit_micro")
    assert "m3vit_micro" in list_models(max_params=size) and "m3vit_micro" not in list_models(max_params=size - 1)
    found = list_models(max_params=30_000_000)
    assert "m3vit_tiny" in found and "m3vit_base" not in found and "shared_bottom_small" in found
    assert {name for name in found if name.endswith("_table") or name.startswith(("text_", "timm_"))} == set()
    state = torch.get_rng_state()
    registry._default_size.cache_clear()
    list_models("m3vit_micro", max_params=size)
    assert torch.equal(state, torch.get_rng_state())


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A ViT of two tasks and a LeNet of one."""
    monkeypatch.setattr(pretrained, "weights_root", lambda: tmp_path)
    hub.save(
        create_model("shared_bottom_micro", tasks=[Task.depth(), Task.binary("a")], **VIT),
        tmp_path / "shared_bottom_micro.x",
    )
    hub.save(create_model("mmoe_lenet", tasks=[Task.binary("a")]), tmp_path / "mmoe_lenet.x")
    return tmp_path


def test_pretrained_weights(weights):
    vit, lenet = "shared_bottom_micro.x", "mmoe_lenet.x"
    assert list_models(pretrained=True, modality="image") == [lenet, vit]
    assert list_models(pretrained=True, modality="text") == []
    assert list_models(pretrained=True, kind="depth") == list_models(pretrained=True, kind=["binary", "depth"]) == [vit]
    assert list_models(pretrained=True, kind="segmentation") == []  # it could, but was not trained to
    size = sum(
        tensor.numel() for tensor in create_model(vit, tasks=[Task.depth(), Task.binary("a")]).state_dict().values()
    )
    assert list_models(pretrained=True, max_params=size) == [vit]
    assert list_models(pretrained=True, max_params=size - 1) == []
    assert list_models("mmoe*", pretrained=True, kind="binary") == [lenet]


def test_weights_of_an_architecture_that_is_not_there(weights):
    folder = weights / "m3vit_nano.x"
    folder.mkdir()
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"name": "m3vit_nano", "tasks": []}))
    with pytest.raises(ValueError, match=r"unknown model 'm3vit_nano'; did you mean 'm3vit_"):
        list_models(pretrained=True, modality="image")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"modality": "images"}, "modality: unknown 'images'; did you mean 'image'"),
        ({"kind": "segmentatoin"}, "kind: unknown 'segmentatoin'; did you mean 'segmentation'"),
        ({"kind": ["depth", "dept"]}, "kind: unknown 'dept'; did you mean 'depth'"),
        ({"max_params": 0}, "max_params: got 0, expected at least 1"),
    ],
)
def test_unknown_values(wrong, message):
    for also in (False, True):
        with pytest.raises(ValueError, match=message):
            list_models(pretrained=also, **wrong)


def test_a_model_is_registered_with_what_it_takes():
    with pytest.raises(ValueError, match="modality: unknown 'sound'"):
        register_model(modality="sound")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kinds: unknown 'dept'"):
        register_model(modality="image", kinds=["dept"])
