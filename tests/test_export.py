"""Extracted models in other runtimes: torch.export and ONNX, for any batch, torch.compile, and a fresh process."""

import subprocess
import sys

import pytest
import torch

from moe_mtl import create_model, extract, prune, save
from moe_mtl.gates import GATES
from moe_mtl.tasks import Task
from tests.test_encoders import encoder
from tests.test_table_models import make, rows

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
    if gate in (*MIXTURES, "assigned", "dselect_k", "task_level"):  # all experts of the bank are in use
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


# ---- models of dicts: tables and texts ------------------------------------------------------------------------------


def texts(b, seed=1):
    """Texts of six tokens, the first whole, the others with padding."""
    ids = torch.randint(3, 40, (b, 6), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(b, 6, dtype=torch.int64)
    mask[1:, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def of_table(name):
    return prune(make(name), "time", [rows()], mass=0.1), rows, "time"


def of_text(name, **how):
    torch.manual_seed(0)
    tasks = (Task.classification("intent", 3), Task.tagging("slots", ["O", "B-x", "I-x"]))
    model = create_model(name, tasks=tasks, encoder=encoder("bert").config.to_dict(), **how).eval()
    return prune(model, "slots", [texts(3)], mass=0.1), texts, "slots"


FAMILIES = {
    "ple_table": lambda: of_table("ple_table"),
    "dselect_k_table": lambda: of_table("dselect_k_table"),
    "home_table": lambda: of_table("home_table"),
    "text_moe": lambda: of_text("text_moe", experts=3, k=1),
    "text_sublayers": lambda: of_text("text_sublayers"),
    "text_poly": lambda: of_text("text_poly", rank=2, skills=2),
    "text_prompt": lambda: of_text("text_prompt", tokens=2),
}


def dynamic(x):
    batch = {0: torch.export.Dim("b", min=1)}
    return (dict.fromkeys(x, batch),)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_dicts_export_with_any_batch(family):
    model, inputs, task = FAMILIES[family]()
    x = inputs(3)
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic(x))
    assert not [node for node in program.graph.nodes if "moe_mtl" in str(node.target)]
    graph = program.module()
    for b in (1, 2, 7):
        x = inputs(b, seed=b)
        torch.testing.assert_close(graph(x)[task], model(x)[task], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*shares the same shape constraints:UserWarning")  # inputs of one batch
@pytest.mark.parametrize("family", ["ple_table", "text_moe"])
def test_onnx_of_models_of_dicts(family, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, inputs, task = FAMILIES[family]()
    x, file = inputs(3), tmp_path / "model.onnx"
    how = {"dynamo": True, "dynamic_shapes": {"x": dynamic(x)[0]}, "input_names": list(x), "verbose": False}
    torch.onnx.export(model, (), file, kwargs={"x": x}, output_names=[task], **how)  # a dict in args would be kwargs
    session = onnxruntime.InferenceSession(file)
    for b in (1, 7):
        x = inputs(b, seed=b)
        (found,) = session.run(None, {name: t.numpy() for name, t in x.items()})
        torch.testing.assert_close(torch.from_numpy(found), model(x)[task], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["dselect_k_table", "text_moe"])
def test_models_of_dicts_compile_whole(family):
    model, inputs, task = FAMILIES[family]()
    torch.compiler.reset()
    compiled, x = torch.compile(model, fullgraph=True, backend="eager"), inputs(3)
    torch.testing.assert_close(compiled(x)[task], model(x)[task], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_fresh_process_loads_what_was_saved(tmp_path):
    cases = {"table": FAMILIES["ple_table"](), "text": FAMILIES["text_moe"]()}
    cases["vit"] = (extracted("noisy_topk"), images, "depth")
    cases["folded"] = (extracted("assigned"), images, "depth")
    for name, (model, inputs, task) in cases.items():
        x = inputs(3)
        save(model, tmp_path / name)
        torch.save({"x": x, "y": model(x)[task], "task": task}, tmp_path / f"{name}.pt")
    code = (
        "import sys, torch, moe_mtl\n"
        "for name in sys.argv[2:]:\n"
        "    case = torch.load(f'{sys.argv[1]}/{name}.pt')\n"
        "    with torch.no_grad():\n"
        "        y = moe_mtl.load(f'{sys.argv[1]}/{name}')(case['x'])[case['task']]\n"
        "    torch.testing.assert_close(y, case['y'], rtol=1e-5, atol=1e-6)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path, *cases], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
