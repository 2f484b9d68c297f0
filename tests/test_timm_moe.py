"""Models on backbones of timm by name; and what `moefy` makes of one has such a name, or it is said why not."""

import re
from functools import partial

import pytest
import timm
import torch
from timm.layers import LayerNorm, SwiGLUPacked
from torch import nn

from moe_mtl import create_model, extract, load, moefy, save
from moe_mtl.backbones._timm_config import describe_vit, difference, read_vit
from moe_mtl.inputs import ImageReader
from moe_mtl.tasks import Task

TASKS = (Task.segmentation("semseg", 4), Task.depth(), Task.classification("scene", 3))
SMALL = {"img_size": 32, "embed_dim": 24, "depth": 4, "num_heads": 2, "patch_size": 8}
NAMED = {
    "vit": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 2, "no_embed_class": True}),
    "pooled": ("vit_tiny_patch16_224", {"global_pool": "avg", "dynamic_img_size": True, "drop_path_rate": 0.1}),
    "dropping": ("vit_tiny_patch16_224", {"drop_rate": 0.1, "pos_drop_rate": 0.2, "attn_drop_rate": 0.3}),
    "no class token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "eva dropping": ("eva02_tiny_patch14_224", {"drop_rate": 0.1, "attn_drop_rate": 0.2}),
    "one channel": ("vit_tiny_patch16_224", {"in_chans": 1, "mlp_ratio": 2.0}),
    "deit": ("deit_tiny_distilled_patch16_224", {}),
    "eva": ("eva02_tiny_patch14_224", {}),
    "beit": ("beit_base_patch16_224", {}),
    "relpos": ("vit_relpos_small_patch16_224", {}),
    "rope": ("vit_small_patch16_rope_mixed_224", {}),
}
UNNAMED = {
    "swiglu": ({"mlp_layer": SwiGLUPacked}, r"blocks\.0\.mlp\.fc2\.weight is \[24, 96\] instead of \[24, 48\]"),
    "act": ({"act_layer": nn.SiLU}, r"blocks\.0\.mlp\.act is a .*\.GELU instead of a .*\.SiLU"),
    "scale": ({"init_values": 1e-3}, r"blocks\.0\.ls1\.gamma is missing instead of \[24\]"),
    "norm": ({"norm_layer": partial(LayerNorm, eps=1e-3)}, r"norm1\.eps is 1e-06 instead of 0\.001"),
}


def backbone(name, options):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **options})


def images(channels=3):
    return torch.randn(2, channels, 32, 32, generator=torch.Generator().manual_seed(3))


def same(a, b, x):
    with torch.no_grad():
        a, b = a(x), b(x)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("structure", NAMED)
def test_what_moefy_makes_of_a_timm_model_is_saved(structure, tmp_path):
    name, options = NAMED[structure]
    model = moefy(backbone(name, options), TASKS, gate="noisy_topk", experts=3, k=1, blocks=[-1], head_width=8).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    again = load(save(model, tmp_path / "m"))
    x = images(options.get("in_chans", 3))
    assert same(model, again, x) and again.config == model.config and model.config["name"] == "timm_moe"
    assert again.config["args"]["backbone"] == name and again.config["args"]["blocks"] == [-1]
    alone = extract(model, ["scene", "depth"], calibration=[x])
    assert same(alone, load(save(alone, tmp_path / "alone")), x)


def test_colours_are_read_as_the_weights_want_them(tmp_path):
    for name, mean in (("vit_base_patch16_224", 0.5), ("vit_base_patch16_224.mae", 0.485)):
        model = moefy(backbone(name, {}), TASKS, experts=3, k=1, blocks=[-1], head_width=8)
        again = load(save(model, tmp_path / name))
        assert model.config["args"]["backbone"] == name
        assert [ImageReader.of(one).mean[0] for one in (model, again)] == [mean, mean]


@pytest.mark.parametrize(
    "gate, k, hidden", [("softmax", 4, "split"), ("exclusive", 4, "copy"), ("task_bias", 1, "copy")]
)
def test_every_option_of_moefy_is_kept(gate, k, hidden, tmp_path):
    vit = backbone(*NAMED["vit"])
    model = moefy(vit, TASKS, gate=gate, experts=4, k=k, every=4, hidden=hidden, head_width=8).eval()
    assert same(model, load(save(model, tmp_path)), images())


@pytest.mark.parametrize("why", UNNAMED)
def test_options_that_cannot_be_read_off_leave_it_unnamed_and_say_which(why, tmp_path, capsys):
    options, message = UNNAMED[why]
    model = moefy(backbone("vit_tiny_patch16_224", options), TASKS, experts=2, k=1)
    assert not hasattr(model, "config") and model(images())
    assert re.search(rf"moefy: moe_mtl.save will not take the model: .*{message}", capsys.readouterr().err)
    with pytest.raises(ValueError, match=rf"built again as timm's 'vit_tiny_patch16_224' with .*, its .*{message}"):
        save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_backbone_without_a_name(tmp_path):
    made = timm.models.VisionTransformer(**SMALL)
    with pytest.raises(ValueError, match=r"this VisionTransformer was not made by timm\.create_model"):
        save(moefy(made, TASKS, experts=2, k=1), tmp_path / "m")


def test_what_was_changed_after_it_was_made_is_seen():
    for change, message in (
        (lambda vit: setattr(vit.blocks[1].attn, "num_heads", 4), r"blocks\.1\.attn\.num_heads is 2 instead of 4"),
        (lambda vit: vit.blocks.append(nn.Identity()), r"blocks\.4\.norm1\.weight is \[24\] instead of missing"),
        (lambda vit: setattr(vit, "norm", nn.Identity()), r"norm\.weight is \[24\] instead of missing"),
    ):
        vit = backbone(*NAMED["vit"])
        vit.reset_classifier(0)
        assert describe_vit(vit)["backbone_args"]["depth"] == 4
        change(vit)
        with pytest.raises(ValueError, match=message):
            describe_vit(vit)


def test_how_attention_is_computed_is_no_part_of_the_architecture(tmp_path):
    vit = backbone(*NAMED["vit"])
    for block in vit.blocks:
        block.attn.fused_attn = not block.attn.fused_attn
    vit.set_grad_checkpointing(True)
    model = moefy(vit, TASKS, experts=2, k=1).eval()
    again, x = load(save(model, tmp_path)), images()
    for task, prediction in model(x).items():
        torch.testing.assert_close(again(x)[task], prediction)


def test_only_options_that_differ_are_named_and_nothing_random_is_drawn():
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    state = torch.get_rng_state()
    assert describe_vit(vit) == {"backbone": "vit_tiny_patch16_224", "backbone_args": {}}
    assert torch.equal(state, torch.get_rng_state())
    assert difference(read_vit("vit_tiny_patch16_224", {}), vit) is None


@pytest.mark.parametrize("name", ["timm_moe", "timm_shared_bottom", "timm_single_task"])
def test_models_by_name(name, tmp_path):
    options = {"backbone": "vit_tiny_patch16_224", "backbone_args": SMALL, "head_width": 8}
    model = create_model(name, tasks=TASKS, **options, **({"experts": 3, "k": 1} if name == "timm_moe" else {})).eval()
    x = images()
    assert set(model(x)) == {task.name for task in TASKS}
    assert same(model, load(save(model, tmp_path)), x)
    layers = getattr(model, "moe_layers", {})
    assert list(layers) == (["blocks.1", "blocks.3"] if name == "timm_moe" else [])
    sum(p.square().sum() for p in model(x).values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None and ".experts." not in n] == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, r"backbone: name an architecture of timm, for example backbone='vit_tiny"),
        ({"backbone": "vit_tinny"}, r"backbone: timm\.create_model\('vit_tinny', no options\) fails: Unknown model"),
        ({"backbone": "vit_tiny_patch16_224", "backbone_args": {"hats": 3}}, r"create_model\(.*, hats\) fails: .*hats"),
        ({"backbone": "resnet18"}, "ResNet is not a plain vision transformer"),
        ({"backbne": "resnet18"}, "backbne: no such model option; did you mean 'backbone'"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("timm_moe", tasks=TASKS, **options)
