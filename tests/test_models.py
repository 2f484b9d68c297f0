"""Contracts of every vision model and of the wrapping MultiTaskModel, over gates and models."""

import copy
import math
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_mtl import create_model, extract, list_models
from moe_mtl.gates import GATES
from moe_mtl.heads import unit
from moe_mtl.layers import ContextMoE
from moe_mtl.registry import register_model
from moe_mtl.tasks import Task
from moe_mtl.testing import assert_matches

MIXTURES = ("softmax", "sigmoid", "exclusive", "soft_slots")  # gates over all experts, which take no k
TASKS = (
    Task.segmentation("semseg", 5),
    Task.depth(),
    Task.normals(),
    Task.binary_map("edges", metric="edge_f"),
    Task.classification("scene", 3),
    Task.regression("tilt"),
)
SHAPES = {
    "semseg": (5, 16, 16),
    "depth": (16, 16),
    "normals": (3, 16, 16),
    "edges": (16, 16),
    "scene": (3,),
    "tilt": (),
}
TINY = {"image_size": 16, "patch_size": 4, "dim": 16, "depth": 4, "num_heads": 2, "head_width": 8}


def tiny(gate="noisy_topk", tasks=TASKS, seed=0, **overrides):
    torch.manual_seed(seed)
    options = {**TINY, "experts": 5, "k": None if gate in MIXTURES else 2, "gate": gate, **overrides}
    return create_model("m3vit_micro", tasks=tasks, **options)


def images(b=3, seed=1, dtype=torch.float32):
    return torch.randn(b, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def targets(b=3, seed=2):
    g = torch.Generator().manual_seed(seed)
    return {
        "semseg": torch.randint(0, 5, (b, 16, 16), generator=g),
        "depth": torch.rand(b, 16, 16, generator=g) * 5,
        "normals": torch.nn.functional.normalize(torch.randn(b, 3, 16, 16, generator=g), dim=1),
        "edges": torch.randint(0, 2, (b, 16, 16), generator=g).float(),
        "scene": torch.randint(0, 3, (b,), generator=g),
        "tilt": torch.randn(b, generator=g),
    }


def total_loss(model, x, y, tasks=None):
    predictions = model(x, tasks=tasks)
    known = {task.name: task for task in model.tasks}
    return sum(known[name].compute_loss(p, y[name]) for name, p in predictions.items())


@pytest.mark.parametrize("name", [n for n in list_models() if n.endswith(("_micro", "_tiny"))])
def test_every_model_predicts_every_task_and_every_parameter_learns(name):
    torch.manual_seed(0)
    all_experts = {"every": 1, "experts": 3, "k": 3} if name.startswith("m3vit") else {}
    sizes = {**TINY, "depth": 2, **all_experts}
    model = create_model(name, tasks=TASKS, **sizes)
    x, y = images(8), targets(8)
    predictions = model(x)
    assert {n: tuple(p.shape) for n, p in predictions.items()} == {n: (8, *s) for n, s in SHAPES.items()}
    total_loss(model, x, y).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    assert [n for n, p in model.named_parameters() if not p.grad.any()] == []
    for layer in getattr(model, "moe_layers", {}).values():
        assert all(p.grad.flatten(1).any(dim=1).all() for p in layer.experts.parameters())  # every single expert


def test_larger_sizes_are_the_published_ones():
    with torch.device("meta"):
        small = create_model("m3vit_small", tasks=TASKS[:1])
    layers = small.moe_layers
    assert list(layers) == [f"blocks.{i}" for i in range(1, 12, 2)]
    moe = layers["blocks.1"]
    assert (moe.experts.num_experts, moe.gate.k, moe.experts.dim) == (16, 4, 384)
    assert tuple(moe.experts.w1.shape) == (16, 384, 384)  # hidden ratio 1
    assert small.backbone.cls_token is not None
    dense = small.backbone.blocks[0].mlp
    assert dense.fc1.out_features == 4 * 384


@pytest.mark.parametrize("gate", GATES)
class TestGatesInModels:
    def test_router_learns_from_the_task_loss_for_every_k(self, gate):
        for k in (5,) if gate in MIXTURES else (1, 2, 5):
            model = tiny(gate, k=k)
            total_loss(model, images(), targets()).backward()
            for name, p in model.named_parameters():
                if ".gate." in name:
                    assert p.grad is not None and p.grad.abs().max() > 0, f"k={k}: {name}"

    def test_eval_is_deterministic_and_a_batch_of_one_works(self, gate):
        model = tiny(gate).eval()
        x = images()
        a, b = model(x), model(x)
        assert all(torch.equal(a[n], b[n]) for n in a)
        one = model(x[:1])
        for name in one:
            assert one[name].shape == (1, *SHAPES[name])
            torch.testing.assert_close(one[name], a[name][:1], atol=1e-4, rtol=1e-4)

    def test_one_task_equals_the_slice_of_all(self, gate):
        model, x = tiny(gate).eval().double(), images(dtype=torch.float64)
        full = model(x)
        for name in SHAPES:
            torch.testing.assert_close(model(x, tasks=[name])[name], full[name], atol=1e-10, rtol=1e-10)
        single = copy.deepcopy(model).float()
        for name in SHAPES:
            assert_matches(single(x.float(), tasks=[name])[name], full[name], single(x.float())[name])

    def test_tasks_come_in_the_order_asked_for(self, gate):
        model, x = tiny(gate).eval(), images()
        full = model(x)
        some = model(x, tasks=["tilt", "semseg"])
        assert list(some) == ["tilt", "semseg"]
        for name in some:
            torch.testing.assert_close(some[name], full[name], atol=1e-4, rtol=1e-4)

    def test_one_task_per_sample(self, gate):
        model, x = tiny(gate).eval(), images(5)
        full = model(x)
        ids = torch.tensor([4, 0, 4, 1, 0])
        mixed = model(x, tasks=ids)
        assert {n: rows.tolist() for n, (rows, _) in mixed.items()} == {"semseg": [1, 4], "depth": [3], "scene": [0, 2]}
        for name, (rows, prediction) in mixed.items():
            torch.testing.assert_close(prediction, full[name][rows], atol=1e-4, rtol=1e-4)

    def test_one_task_runs_nothing_of_another(self, gate):
        model, x = tiny(gate).eval(), images()
        full = model(x)
        for keep, task in enumerate(TASKS):
            broken, alone = copy.deepcopy(model), model.for_tasks(task.name)
            with torch.no_grad():
                for name, head in broken.heads.items():
                    if name != task.name:
                        for p in head.parameters():
                            p.fill_(math.nan)
                for layer in broken.moe_layers.values():
                    per_task = [m for m in layer.gate.modules() if isinstance(m, torch.nn.ParameterList)]
                    assert len(per_task) == {"dselect_k": 2, "task_blind": 0}.get(gate, 2 if gate in MIXTURES else 1)
                    for p in (p for entries in per_task for i, p in enumerate(entries) if i != keep):
                        p.fill_(math.nan)
            alike = model(x, tasks=[task.name])[task.name]
            assert torch.equal(broken(x, tasks=[task.name])[task.name], alike)
            torch.testing.assert_close(alike, full[task.name], atol=1e-4, rtol=1e-4)

            counted = []
            for m in (model, alone):
                with FlopCounterMode(display=False) as counter:
                    m(x, tasks=[task.name])
                counted.append(counter.get_total_flops())
            assert counted[0] == counted[1] > 0

    def test_extracted_model_agrees_and_holds_no_other_task(self, gate):
        model, x = tiny(gate).eval(), images()
        for task in TASKS:
            alone = extract(model, task.name, fold=False)  # folded, sums are rounded elsewhere: tests/test_folded.py
            assert [t.name for t in alone.tasks] == [task.name]
            assert torch.equal(alone(x)[task.name], model(x, tasks=[task.name])[task.name])
            # what it holds is the model minus other heads and other tasks' entries in the gates, no more and no less
            others = [n for n in SHAPES if n != task.name]
            dropped = {f"heads.{n}.{p}" for n in others for p, _ in model.heads[n].named_parameters()}
            entries = {n for n, _ in model.named_parameters() if re.search(r"gate\..*\.[1-9]$", n)}
            names = {n for n, _ in model.named_parameters()} - dropped - entries
            assert {n for n, _ in alone.named_parameters()} == names
            assert bool(entries) == (gate != "task_blind")
            assert not {p.data_ptr() for p in alone.parameters()} & {p.data_ptr() for p in model.parameters()}
        two = extract(model, ["tilt", "depth"])
        full = model(x, tasks=["tilt", "depth"])
        for name, prediction in two(x).items():
            torch.testing.assert_close(prediction, full[name], atol=1e-5, rtol=1e-5)

    def test_routing_is_returned_per_layer_and_nothing_stays_on_the_model(self, gate):
        model, x = tiny(gate).eval(), images(2)
        _, routings = model(x, return_routing=True)
        assert list(routings) == ["blocks.1", "blocks.3"]
        for routing in routings.values():
            tasks = len(TASKS) if GATES[gate].task_dependent else 1
            assert routing.logits.shape == (tasks * 2 * 16, 5)
        assert model.context.routings == {} and not model.context.active
        _, routings = model(x, tasks=["depth"], return_routing=True)
        assert all(r.logits.shape == (2 * 16, 5) for r in routings.values())

    def test_sizes_at_the_edge(self, gate):
        for experts, k in ((1, 1), (3, 3)):
            model = tiny(gate, experts=experts, k=k)
            loss = total_loss(model, images(2), targets(2))
            loss.backward()
            assert loss.isfinite()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_everything_before_the_first_experts_runs_once_for_all_tasks():
    model, x = tiny().eval(), images(2)
    seen = []
    for i, block in enumerate(model.backbone.blocks):
        block.attn.register_forward_hook(lambda m, args, out, i=i: seen.append((i, out.shape[0])))
    model(x)
    assert seen == [(0, 2), (1, 2), (2, 12), (3, 12)]  # the experts are in blocks 1 and 3
    seen.clear()
    model(x, tasks=["depth"])
    assert [b for _, b in seen] == [2, 2, 2, 2]


def test_stochastic_depth_drops_samples_not_tasks():
    model, x = tiny(drop_path=0.5).train(), images(2)
    seen = []
    model.backbone.blocks[1].attn.register_forward_hook(lambda m, args, out: seen.append(out.shape[0]))
    model(x)
    assert seen == [12]  # stacked at the input of the block


def test_decoder_experts_follow_a_backbone_that_runs_once():
    model, x = tiny(blocks=[], decoder=2).eval(), images(3)
    seen = []
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda m, args, out: seen.append(out.shape[0]))
    full = model(x)
    assert seen == [3, 3, 3, 3, 18, 18]
    assert list(model.moe_layers) == ["blocks.4", "blocks.5"]
    torch.testing.assert_close(model(x, tasks=["depth"])["depth"], full["depth"])
    with pytest.raises(ValueError, match=r"blocks: got \[\]"):
        tiny(blocks=[])


def test_task_blind_model_never_stacks():
    model, x = tiny("task_blind").eval(), images(2)
    seen = []
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda m, args, out: seen.append(out.shape[0]))
    model(x)
    assert seen == [2, 2, 2, 2]


@pytest.mark.parametrize("gate", GATES)
def test_training_one_tasks_own_parameters_leaves_the_others_bit_equal(gate):
    model, x, y = tiny(gate), images(), targets()
    before = model.eval()(x)
    own = [*model.heads["depth"].parameters()]
    for layer in model.moe_layers.values():
        own += [m[1] for m in layer.gate.modules() if isinstance(m, torch.nn.ParameterList)]
    optimizer = torch.optim.AdamW(own, lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        total_loss(model, x, y, ["depth"]).backward()
        optimizer.step()
    after = model(x)
    assert [n for n in SHAPES if not torch.equal(before[n], after[n])] == ["depth"]


def test_a_forward_that_fails_leaves_the_model_usable_and_two_at_once_are_refused():
    model, x = tiny().eval(), images()
    before = model(x)
    hook = model.backbone.blocks[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    hook.remove()
    assert all(torch.equal(before[n], p) for n, p in model(x).items())
    hook = model.backbone.blocks[2].register_forward_pre_hook(lambda *_: model(x))
    with pytest.raises(RuntimeError, match="threads must not share"):
        model(x)


def test_single_task_set_has_the_calls_of_a_model():
    torch.manual_seed(0)
    model, x = create_model("single_task_micro", tasks=TASKS, **TINY).eval(), images()
    full = model(x)
    assert torch.equal(model(x, tasks=["depth"])["depth"], full["depth"])
    mixed = model(x, tasks=torch.tensor([1, 4, 1]))
    assert {n: rows.tolist() for n, (rows, _) in mixed.items()} == {"depth": [0, 2], "scene": [1]}
    torch.testing.assert_close(mixed["depth"][1], full["depth"][[0, 2]], atol=1e-5, rtol=1e-5)
    two = extract(model, ["tilt", "depth"])
    assert [t.name for t in two.tasks] == ["tilt", "depth"] and not two.training
    assert torch.equal(two(x)["depth"], full["depth"])
    with pytest.raises(ValueError, match=r"'a' predicts \['depth'\]"):
        type(model)({"a": model.models["depth"]})


def test_placement_is_a_dial():
    assert list(tiny(blocks=[-1]).moe_layers) == ["blocks.3"]
    assert list(tiny(every=1).moe_layers) == [f"blocks.{i}" for i in range(4)]
    for bad in ({"every": 0}, {"every": 5}):
        with pytest.raises(ValueError, match="every"):
            tiny(**bad)
    with pytest.raises(ValueError, match="blocks"):
        tiny(blocks=[4])


def test_other_image_sizes_work():
    model = tiny().eval()
    y = model(torch.randn(1, 3, 24, 32))
    assert y["semseg"].shape == (1, 5, 24, 32)


def test_copies_have_a_context_of_their_own():
    model = tiny().eval()
    twin, x = copy.deepcopy(model), images()
    assert twin.context is not model.context
    assert all(m.context is twin.context for m in twin.modules() if isinstance(m, ContextMoE))
    assert all(torch.equal(a, b) for a, b in zip(twin(x).values(), model(x).values(), strict=True))


def test_predictions_are_in_range():
    y = tiny()(images())
    assert (y["depth"] > 0).all()
    torch.testing.assert_close(y["normals"].norm(dim=1), torch.ones(3, 16, 16), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_unit_vectors(dtype):
    y = (30 * torch.randn(2, 3, 4, 5, dtype=torch.float64)).to(dtype).requires_grad_()
    expected = torch.nn.functional.normalize(y.double(), dim=1)
    assert unit(y).dtype == dtype
    torch.testing.assert_close(unit(y).double(), expected, atol=torch.finfo(dtype).eps, rtol=0)
    cotangent = torch.randn_like(expected)
    (ours,) = torch.autograd.grad(unit(y), y, cotangent.to(dtype))
    (theirs,) = torch.autograd.grad(expected, y, cotangent.to(dtype).double())
    torch.testing.assert_close(ours.double(), theirs.double(), atol=2 * torch.finfo(dtype).eps, rtol=0.02)
    assert not unit(torch.zeros(1, 3, 1, 1, dtype=dtype)).any()


@pytest.mark.parametrize("tasks", [None, ["depth"]])
def test_compiles_without_graph_breaks_with_its_gradients(tasks):
    model, x, y = tiny().eval(), images(), targets()
    expected = model(x, tasks=tasks)
    total_loss(model, x, y, tasks).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    predictions = compiled(x, tasks=tasks)
    for name, prediction in predictions.items():
        torch.testing.assert_close(prediction, expected[name], atol=1e-5, rtol=1e-5)
    known = {task.name: task for task in TASKS}
    sum(known[name].compute_loss(p, y[name]) for name, p in predictions.items()).backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # strict: the context's attributes
@pytest.mark.parametrize("strict", [False, True])
def test_extracted_model_exports_with_a_dynamic_batch(strict):
    model, x = tiny().eval(), images(3)
    alone = extract(model, "depth")
    dynamic = ({0: torch.export.Dim("b", min=2, max=64)},)
    program = torch.export.export(alone, (x,), dynamic_shapes=dynamic, strict=strict)
    for b in (2, 5):
        y = images(b, seed=7)
        torch.testing.assert_close(program.module()(y)["depth"], alone(y)["depth"], atol=1e-5, rtol=1e-5)


class TestBadInput:
    def test_unknown_task_names_the_nearest(self):
        with pytest.raises(ValueError, match="'dept'; did you mean 'depth'"):
            tiny()(images(), tasks=["dept"])
        with pytest.raises(ValueError, match="did you mean 'semseg'"):
            extract(tiny(), "semsegg")

    @pytest.mark.parametrize(
        "tasks, message",
        [
            ([], "empty list"),
            (["depth", "depth"], "twice"),
            (torch.tensor([0, 1]), "one per image"),
            (torch.tensor([0.0, 1, 2]), "int64"),
            (torch.tensor([0, 1, 9]), "ids 0 to 9"),
            (torch.tensor([-1, 1, 2]), "ids -1 to 2"),
        ],
    )
    def test_tasks(self, tasks, message):
        with pytest.raises(ValueError, match=message):
            tiny()(images(3), tasks=tasks)

    @pytest.mark.parametrize(
        "x, message",
        [
            (torch.randn(3, 16, 16), "add the batch axis"),
            (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "divide uint8"),
            (torch.randn(1, 1, 16, 16), "1 channels, the model takes 3"),
            (torch.randn(1, 3, 18, 16), "18x16 are not a whole number of 4x4"),
            (torch.randn(1, 3, 16, 16).double(), "the model is torch.float32"),
        ],
    )
    def test_images(self, x, message):
        with pytest.raises(ValueError, match=message):
            tiny()(x)

    def test_unknown_model_and_option_name_the_nearest(self):
        with pytest.raises(ValueError, match="did you mean 'm3vit_micro'"):
            create_model("m3vit_mirco", tasks=TASKS)
        with pytest.raises(ValueError, match="did you mean 'experts'"):
            create_model("m3vit_micro", tasks=TASKS, expert=4)
        with pytest.raises(ValueError, match="did you mean 'noisy_topk'"):
            create_model("m3vit_micro", tasks=TASKS, gate="noisy_topkk")
        with pytest.raises(ValueError, match="gate: no such model option"):
            create_model("shared_bottom_micro", tasks=TASKS, gate="noisy_topk")
        with pytest.raises(ValueError, match="multiple of 4"):
            create_model("m3vit_micro", tasks=TASKS, head_width=6)
        with pytest.raises(ValueError, match="plain data"):
            create_model("m3vit_micro", tasks=TASKS, blocks=range(1, 3))

    def test_no_tasks_and_duplicates(self):
        with pytest.raises(ValueError, match="at least one"):
            create_model("m3vit_micro", tasks=[])
        with pytest.raises(ValueError, match="duplicate"):
            create_model("m3vit_micro", tasks=[Task.depth(), Task.depth()])

    def test_backbone_called_alone(self):
        with pytest.raises(RuntimeError, match="call the MultiTaskModel"):
            tiny().backbone(images())

    def test_duplicate_registration(self):
        def m3vit_micro(tasks):
            raise AssertionError

        with pytest.raises(ValueError, match="already registered"):
            register_model(modality="image")(m3vit_micro)


def test_list_models_takes_a_pattern():
    assert "m3vit_micro" in list_models()
    assert all(name.startswith("shared_bottom") for name in list_models("shared_bottom*")) and list_models("shared*")
