"""moefy on pretrained-like timm models: the dense function at step 0, for every structure the adapter knows."""

import pytest
import timm
import torch
from torch import nn

from moe_mtl import create_model, extract, moefy
from moe_mtl.backbones import upcycle
from moe_mtl.gates import GATES
from moe_mtl.tasks import Task

TASKS = (Task.segmentation("semseg", 4), Task.depth(), Task.classification("scene", 3))
SMALL = {"img_size": 32, "embed_dim": 24, "depth": 4, "num_heads": 2}
STRUCTURES = {
    "vit": ("vit_tiny_patch16_224", {"patch_size": 8}),
    "vit_registers": ("vit_tiny_patch16_224", {"patch_size": 8, "reg_tokens": 2, "no_embed_class": True}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {"patch_size": 8}),
    "vit_swiglu": ("vit_tiny_patch16_224", {"patch_size": 8, "mlp_layer": timm.layers.SwiGLUPacked}),
    "vit_geglu": ("vit_tiny_patch16_224", {"patch_size": 8, "mlp_layer": timm.layers.GluMlp, "act_layer": nn.GELU}),
    "eva": ("eva02_tiny_patch14_224", {"patch_size": 8}),
    "beit": ("beit_base_patch16_224", {"patch_size": 8}),
    "relpos": ("vit_relpos_small_patch16_224", {"patch_size": 8}),
    "rope": ("vit_small_patch16_rope_mixed_224", {"patch_size": 8}),
}


def dense(structure="vit", seed=0):
    name, options = STRUCTURES[structure]
    torch.manual_seed(seed)
    backbone = timm.create_model(name, **SMALL, **options)
    with torch.no_grad():  # trained-like: nothing sits at a special initial value
        for p in backbone.parameters():
            p.add_(0.05 * torch.randn_like(p))
    for module in backbone.modules():  # relpos drops units of its position network in training
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return backbone.double()


def images(b=2, size=32):
    return torch.randn(b, 3, size, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def stacked_features(model, x):
    features, routings = model.features(x, tuple(range(len(model.tasks))))
    return features, routings


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("training", [False, True])
def test_step_zero_is_the_dense_model(structure, training):
    backbone, x = dense(structure), images()
    model = moefy(backbone, TASKS, experts=5, k=2)
    backbone.eval()
    model.train(training)
    with torch.no_grad():
        tokens = backbone.forward_features(x)
        pooled = backbone.forward_head(tokens, pre_logits=True)
        features, routings = stacked_features(model, x)
    assert len(routings) == 2
    for task in range(len(TASKS)):
        own = features.select(slice(task * 2, task * 2 + 2))
        torch.testing.assert_close(own.pooled, pooled, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(own.patches, tokens[:, backbone.num_prefix_tokens :], atol=1e-9, rtol=1e-9)
    # the routers disagree, so it is the experts that agree
    a, b = (routings["blocks.1"].indices.unflatten(0, (len(TASKS), -1))[i] for i in (0, 1))
    assert not torch.equal(a, b)


INEXACT = {"sigmoid", "expert_choice", "soft_slots"}  # their weights do not sum to 1, or what experts read is no token


@pytest.mark.parametrize("gate", sorted(GATES))
def test_every_gate_starts_dense(gate):
    backbone, x = dense(), images()
    k = 4 if gate in ("softmax", "exclusive", "sigmoid", "soft_slots") else 1
    if gate in INEXACT:
        with pytest.raises(ValueError, match=rf"^gate: the weights of '{gate}' with 4 experts do not sum to 1"):
            moefy(backbone, TASKS, gate=gate, experts=4, k=k)
        return
    model = moefy(backbone, TASKS, gate=gate, experts=4, k=k)
    backbone.eval()
    features, _ = stacked_features(model.eval(), x)
    expected = backbone.forward_features(x)[:, 1:].repeat(1 if gate == "task_blind" else len(TASKS), 1, 1)
    torch.testing.assert_close(features.patches, expected, atol=1e-9, rtol=1e-9)


def test_gates_that_split_or_copy_inexactly_are_refused():
    with pytest.raises(ValueError, match=r"^gate: the weights of 'dselect_k' with 3 experts"):
        moefy(dense(), TASKS, gate="dselect_k", experts=3, k=1)
    with pytest.raises(ValueError, match=r"^hidden: 'split' needs every expert, but with gate 'exclusive' task 0 sees"):
        moefy(dense(), TASKS, gate="exclusive", experts=4, k=4, hidden="split")


@pytest.mark.parametrize("structure", ["vit", "vit_swiglu", "vit_geglu", "eva"])
@pytest.mark.parametrize("gate", sorted(set(GATES) - {*INEXACT, "exclusive"}))
def test_split_is_exact_and_costs_output_biases_only(structure, gate):
    backbone, x = dense(structure), images()
    model = moefy(backbone, TASKS, gate=gate, experts=4, k=4, hidden="split")
    backbone.eval()
    features, _ = stacked_features(model.train(), x)
    patches = backbone.forward_features(x)[:, backbone.num_prefix_tokens :]
    expected = patches.repeat(1 if gate == "task_blind" else len(TASKS), 1, 1)
    torch.testing.assert_close(features.patches, expected, atol=1e-9, rtol=1e-9)
    mlp, experts = backbone.blocks[1].mlp, model.moe_layers["blocks.1"].experts
    extra_output_biases = 3 * backbone.embed_dim
    biases = 0 if mlp.fc2.bias is None else extra_output_biases
    assert sum(p.numel() for p in experts.parameters()) == sum(p.numel() for p in mlp.parameters()) + biases


@pytest.mark.parametrize(
    "options",
    [
        {"experts": 5, "k": 1},
        *({"gate": g, "experts": 4, "k": 4, "hidden": "split"} for g in ("softmax", "noisy_topk")),
    ],
)
def test_routers_and_experts_learn_from_step_zero(options):
    model = moefy(dense(), TASKS, **options)
    predictions = model(images())
    g = torch.Generator().manual_seed(5)
    sum((p * torch.randn(p.shape, generator=g, dtype=p.dtype)).sum() for p in predictions.values()).backward()
    for layer in model.moe_layers.values():
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.gate.parameters())
        assert layer.experts.w1.grad.abs().max() > 0


def test_the_given_backbone_is_left_alone():
    backbone, x = dense().eval(), images()
    before = backbone(x)
    model = moefy(backbone, TASKS, experts=4, k=2)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(backbone(x), before)
    assert model(x)["scene"].abs().max() == 0


def test_moefied_model_runs_one_task_and_extracts():
    model, x = moefy(dense(), TASKS, experts=4, k=2).eval(), images()
    alone = extract(model, "depth")
    assert torch.equal(alone(x)["depth"], model(x, tasks=["depth"])["depth"])


def test_upcycle_gives_a_model_the_weights_of_its_dense_twin():
    tasks, sizes = TASKS, {"image_size": 16, "dim": 24, "depth": 4, "num_heads": 2}
    routed = {"experts": 3, "k": 2, "hidden_ratio": 4.0, "gate_args": {"normalize": "detached"}}
    dense = create_model("shared_bottom_micro", tasks=tasks, **sizes).eval()
    model = create_model("m3vit_micro", tasks=tasks, **sizes, **routed).eval()
    routers = {name: value.clone() for name, value in model.state_dict().items() if ".gate." in name}
    upcycle(model, dense.state_dict())
    x = images(2, 16).float()
    for task, prediction in model(x).items():
        torch.testing.assert_close(prediction, dense(x)[task], rtol=1e-4, atol=1e-5)
    assert routers and all(torch.equal(model.state_dict()[name], value) for name, value in routers.items())
    # experts of another routed model come as they are
    twin = create_model("m3vit_micro", tasks=tasks, **sizes, **routed).eval()
    upcycle(model, twin.state_dict())
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())
    # what does not fit is refused whole
    for other, odd in (({"depth": 3}, r"blocks\.3"), ({"mlp_ratio": 2.0}, r"experts\.b1")):
        misfit = create_model("shared_bottom_micro", tasks=tasks, **{**sizes, **other})
        with pytest.raises(ValueError, match=f"dense: its weights do not fit the model in .*{odd}"):
            upcycle(model, misfit.state_dict())
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())


def test_cost_is_said(capsys):
    backbone = dense()
    backbone.reset_classifier(0)
    model = moefy(backbone, TASKS, experts=4, k=2)
    counts = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (backbone, model.backbone)]
    assert f"{counts[0]:.3f} M -> {counts[1]:.3f} M" in capsys.readouterr().err and counts[1] > counts[0]


def test_dense_gate_needs_no_k():
    assert moefy(dense(), TASKS, gate="softmax", experts=4).moe_layers["blocks.1"].gate.k == 4


def test_gated_experts_are_not_filled_from_weights_that_do_not_tell_their_order():
    backbone = dense("vit_geglu")
    model, other = moefy(backbone, TASKS, experts=2, k=1), moefy(backbone, TASKS, experts=2, k=1)
    weights = {**model.state_dict(), **{f"backbone.{name}": w for name, w in backbone.state_dict().items()}}
    with pytest.raises(ValueError, match=r"^model: the experts of backbone\.blocks\.1\.mlp are gated linear units"):
        upcycle(other, weights)


def test_a_compiled_backbone_is_taken_as_what_it_compiles():
    backbone, x = dense().eval(), images()
    model = moefy(torch.compile(backbone, backend="eager"), TASKS, experts=2, k=1).eval()
    twin = moefy(backbone, TASKS, experts=2, k=1)
    assert list(model.state_dict()) == list(twin.state_dict()) and model.config == twin.config
    assert set(model(x)) == {task.name for task in TASKS}


class TestRefusals:
    @pytest.mark.parametrize(
        "name, options, message",
        [
            ("resnet18", {}, "ResNet is not a plain vision transformer"),
            ("hiera_tiny_224", {}, "Hiera is not a plain vision transformer"),
            # its patches are pixels of a small network's maps
            (
                "vit_tiny_r_s16_p8_224",
                {"img_size": 64},
                "`patch_embed.proj` .square patches of the image",
            ),
        ],
    )
    def test_structure(self, name, options, message):
        with pytest.raises(ValueError, match=message):
            moefy(timm.create_model(name, **options), TASKS[2:])

    @pytest.mark.parametrize("backbone, kind", [("vit_tiny_patch16_224", "str"), (None, "NoneType")])
    def test_what_is_no_model(self, backbone, kind):
        with pytest.raises(ValueError, match=rf"^backbone: got {kind}, expected a model, such as timm\.create_model"):
            moefy(backbone, TASKS)

    def test_tasks(self):
        tagging = Task.tagging("words", ["O", "B-x"])
        with pytest.raises(ValueError, match=r"^tasks: 'words' is of kind tagging, which texts have"):
            moefy(dense(), [tagging], experts=2, k=1)
        model = moefy(dense(), TASKS, experts=2, k=1)
        with pytest.raises(ValueError, match=r"^tasks: 'words' is of kind tagging"):
            model.add_task(tagging)
        assert model.tasks == TASKS and set(model(images())) == {task.name for task in TASKS}
        with pytest.raises(TypeError, match=r"^tasks: got one Task, 'depth'; expected a list of them"):
            moefy(dense(), Task.depth())

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"proj_drop_rate": 0.1}, "dropout"),
            ({"act_layer": nn.Tanh}, "activation"),
            ({"scale_mlp_norm": True}, "normalises"),
        ],
    )
    def test_mlp(self, options, message):
        backbone = timm.create_model("vit_tiny_patch16_224", **SMALL, **options)
        with pytest.raises(ValueError, match=message):
            moefy(backbone, TASKS)

    def test_mlp_that_does_more_than_its_layers(self):
        backbone = timm.create_model("vit_tiny_patch16_224", **SMALL)
        for block in backbone.blocks:
            block.mlp = timm.layers.GlobalResponseNormMlp(24, 96)
            nn.init.constant_(block.mlp.grn.weight, 0.5)
        with pytest.raises(ValueError, match="something else"):
            moefy(backbone, TASKS)

    @pytest.mark.parametrize(
        "name, options, message",
        [
            ("vit_tiny_patch16_224", {"global_pool": "", **SMALL}, "pools them to"),
            ("vit_tiny_patch16_224", {"img_size": 48}, "built for 48x48"),
            ("samvit_base_patch16", {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}, "plain ViT"),
        ],
    )
    def test_features(self, name, options, message):
        small = {**SMALL, "img_size": options.get("img_size", 32)}
        model = moefy(timm.create_model(name, **{**small, **options}), TASKS[2:], experts=3, k=1)
        with pytest.raises(ValueError, match=message):
            model(images().float())

    def test_split_needs_every_expert(self):
        with pytest.raises(ValueError, match="k=4, or hidden='copy'"):
            moefy(dense(), TASKS, experts=4, k=2, hidden="split")
        with pytest.raises(ValueError, match="do not split into 5"):
            moefy(dense(), TASKS, gate="softmax", experts=5, k=5, hidden="split")

    def test_options(self):
        with pytest.raises(ValueError, match="'copy' or 'split'"):
            moefy(dense(), TASKS, hidden="half")
        with pytest.raises(ValueError, match="more than the 3 experts"):
            moefy(dense(), TASKS, experts=3, k=4)
