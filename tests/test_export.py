"""Extracted models in other runtimes: torch.export and ONNX, for any batch, and torch.compile."""

import pytest
import torch

from moe_mtl import create_model, extract
from moe_mtl.gates import GATES
from moe_mtl.tasks import Task

MIXTURES = ("softmax", "sigmoid", "exclusive", "soft_slots")  # gates over all experts, which take no k
TASKS = (Task.depth(), Task.classification("scene", 3), Task.segmentation("semseg", 5))
EXPERTS = 5


def extracted(gate, task="depth"):
    """A model of one task with one bank of experts, in eval mode."""
    torch.manual_seed(0)
    k = None if gate in MIXTURES else 2
    sizes = {"image_size": 16, "patch_size": 8, "dim": 16, "depth": 2, "num_heads": 2, "head_width": 4}
    return extract(create_model("m3vit_micro", tasks=TASKS, gate=gate, experts=EXPERTS, k=k, **sizes), task).eval()


def images(b, seed=1):
    return torch.randn(b, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def routed(model, x):
    """Ids of the bank's experts that get at least one token."""
    _, routings = model(x, return_routing=True)
    ((name, routing),) = routings.items()
    indices = model.moe_layers[name].gate.in_bank(routing).indices
    return set(range(EXPERTS)) if indices is None else set(indices.unique().tolist())


def one_image_that_leaves_an_expert_empty(model):
    held = set(range(model.backbone.blocks[-1].mlp.moe.experts.num_experts))
    for seed in range(50):
        x = images(1, seed)
        if empty := held - routed(model, x):
            return x, min(empty)
    raise AssertionError("every image uses every expert")


DYNAMIC_BATCH = ({0: torch.export.Dim("b", min=1)},)


@torch.no_grad()
@pytest.mark.parametrize("gate", GATES)
def test_export_agrees_at_every_batch_size(gate):
    model = extracted(gate)
    program = torch.export.export(model, (images(3),), dynamic_shapes=DYNAMIC_BATCH)
    assert not [node for node in program.graph.nodes if "moe_mtl" in str(node.target)]  # runs without this library
    graph = program.module()
    for b in (1, 2, 7):
        x = images(b)
        predictions = graph(x)
        assert list(predictions) == ["depth"]
        torch.testing.assert_close(predictions["depth"], model(x)["depth"])
    if gate in (*MIXTURES, "assigned", "dselect_k"):  # all experts of the bank are in use
        return
    x, empty = one_image_that_leaves_an_expert_empty(model)
    expected = model(x)["depth"]
    torch.testing.assert_close(graph(x)["depth"], expected)
    for name, parameter in graph.named_parameters():
        if ".experts." in name:
            parameter[empty] = torch.nan
    torch.testing.assert_close(graph(x)["depth"], expected)


@torch.no_grad()
@pytest.mark.parametrize("gate", ["noisy_topk", "softmax"])
def test_onnx_agrees_at_every_batch_size(gate, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, file = extracted(gate), tmp_path / "depth.onnx"
    torch.onnx.export(
        model,
        (images(3),),
        file,
        dynamo=True,
        dynamic_shapes=DYNAMIC_BATCH,
        input_names=["image"],
        output_names=["depth"],
        verbose=False,
    )
    session = onnxruntime.InferenceSession(file)
    assert [(output.name, output.shape) for output in session.get_outputs()] == [("depth", ["b", 16, 16])]
    batches = [images(1), images(7)]
    if gate == "noisy_topk":
        batches.append(one_image_that_leaves_an_expert_empty(model)[0])
    for x in batches:
        (depth,) = session.run(None, {"image": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(depth), model(x)["depth"])


def compare_compiled(gate, backend):
    torch.compiler.reset()
    model = extracted(gate, "scene")
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    with torch.no_grad():
        for b in (3, 5):
            x = images(b)
            torch.testing.assert_close(compiled(x)["scene"], model(x)["scene"], rtol=1e-4, atol=1e-5)


def test_compiles_whole():
    compare_compiled("noisy_topk", "eager")


@pytest.mark.slow
@pytest.mark.parametrize(("gate", "backend"), [(gate, "aot_eager") for gate in GATES] + [("noisy_topk", "inductor")])
def test_compiles_with_other_backends(gate, backend):
    compare_compiled(gate, backend)
