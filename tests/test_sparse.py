"""Extraction: exact without calibration, and with it only the experts the calibration images use."""

import copy
import json
import math
from dataclasses import asdict

import pytest
import torch

from moe_mtl import create_model, extract, load, save
from moe_mtl.gates import GATES
from moe_mtl.sparse import keep_experts
from moe_mtl.tasks import Task
from moe_mtl.testing import assert_matches

MIXTURES = ("softmax", "sigmoid", "exclusive", "soft_slots")  # gates over all experts, which take no k
TASKS = (Task.depth(), Task.classification("scene", 3), Task.regression("tilt"), Task.segmentation("semseg", 4))
NAMES = [task.name for task in TASKS]
E, K, LAYERS = 7, 2, ("blocks.0", "blocks.1")
SHUNNED = 1  # an expert that no token of `tiny(shun=True)` uses, in layer blocks.1
LOG = math.log

every_gate = pytest.mark.parametrize("gate", sorted(GATES))


def tiny(gate="noisy_topk", shun=False, seed=0, **overrides):
    """A two-layer model in eval mode with routers at random values."""
    torch.manual_seed(seed)
    sizes = {"image_size": 16, "patch_size": 4, "dim": 16, "depth": 2, "num_heads": 2, "head_width": 8, "every": 1}
    k = None if gate in MIXTURES else K
    sizes["gate_args"] = {"start": 0.2} if gate == "task_level" else {}  # cool: one of its two experts does little
    model = create_model(
        "m3vit_micro", tasks=TASKS, **{**sizes, "gate": gate, "experts": E, "k": k, **overrides}
    ).eval()
    with torch.no_grad():
        for layer in model.moe_layers.values():
            for parameter in layer.gate.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        if shun:
            model.backbone.blocks[1].norm2.bias[0] = 10  # every token of layer 1 has a 10 there
            router = model.moe_layers["blocks.1"].gate
            for task in range(len(TASKS)):
                if gate == "soft_slots":
                    router.slot[task][SHUNNED] = -torch.eye(router.dim)[0]
                    router.scale[task].fill_(300)
                elif gate == "task_level":
                    router.router_bias[SHUNNED] = -300
                elif gate in MIXTURES:
                    router.router.bias[task][SHUNNED] = -300
                elif gate in ("noisy_topk", "expert_choice"):
                    router.router.weight[task][SHUNNED, 0] = -30
                elif gate == "assigned":  # tasks 0 and 1 have experts 0 and 1
                    router.weight[task][router.indices[task] == SHUNNED] = -300
                elif gate == "dselect_k":  # the lowest bit of every selector is 0, so no odd expert has a weight
                    router.z[task].view(-1, router.bits)[:, 0] = -10
                else:
                    router.weight[SHUNNED, 0] = -30
    return model


def images(b=4, seed=1):
    return torch.randn(b, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def used(model, x, tasks):
    """Per layer, the weight each expert got from each task [t, e], summed over tokens in float64."""
    total = {}
    for row, name in enumerate(tasks):
        for layer, routing in model(x, tasks=[name], return_routing=True)[1].items():
            found = total.setdefault(layer, torch.zeros(len(tasks), E, dtype=torch.float64))
            found[row] = routing.dense_weights().double().sum(0)
    return total


def kept(model):
    return {name: list(layer.kept) for name, layer in model.extraction.layers.items()}


def agree(small, model, x, tasks):
    """Both models predict the same for these tasks, under the tolerance rule."""
    ours, theirs, oracle = small(x), model(x, tasks=tasks), copy.deepcopy(model).double()(x.double(), tasks=tasks)
    assert list(ours) == list(tasks)
    for name in tasks:
        assert_matches(ours[name], oracle[name], theirs[name], name)


@every_gate
@pytest.mark.parametrize("tasks", [["tilt"], ["semseg", "depth"]], ids=["one", "two"])
def test_without_calibration_it_is_exact_and_holds_the_reachable_experts_alone(gate, tasks):
    model, x = tiny(gate), images()
    small = extract(model, tasks, fold=False)
    agree(small, model, x, tasks)
    assigned = {"depth": [0, 1], "scene": [0, 1], "tilt": [2, 3], "semseg": [4, 5]}  # the groups of 4 tasks
    ids = sorted(e for name in tasks for e in assigned[name]) if gate == "assigned" else list(range(E))
    if gate in ("dselect_k", "exclusive", "task_level"):
        for layer, held in kept(small).items():
            reached = [model.moe_layers[layer].gate.reachable(NAMES.index(name)) for name in tasks]
            assert held == sorted(set().union(*reached))
            assert len(held) < E or gate == "dselect_k"  # whose selectors are still between experts
    else:
        assert kept(small) == dict.fromkeys(LAYERS, ids)
    for name, layer in small.moe_layers.items():
        assert all(len(p) == len(kept(small)[name]) for p in layer.experts.parameters())
    # parameters: the model's without the other heads, the other tasks' entries of the gates, and the experts dropped
    count = 0
    for name, p in model.named_parameters():
        part = name.split(".")
        of_a_task = part[0] == "heads" or (".gate." in name and part[-1].isdigit())
        if of_a_task and (part[1] if part[0] == "heads" else NAMES[int(part[-1])]) not in tasks:
            continue
        left = len(kept(small)[".".join(part[1:3])]) if ".experts." in name else E
        count += p.numel() * left // E
    assert sum(p.numel() for p in small.parameters()) == count
    assert not {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_nan_in_what_a_task_cannot_reach_changes_nothing():
    model, x = tiny("assigned"), images()
    before = extract(model, "tilt")(x)["tilt"]
    with torch.no_grad():
        for layer in model.moe_layers.values():
            for p in layer.experts.parameters():
                p[[0, 1, 4, 5, 6]] = math.nan
    assert torch.equal(extract(model, "tilt")(x)["tilt"], before)


@every_gate
@pytest.mark.parametrize("tasks", [["depth"], ["scene", "depth"]], ids=["one", "two"])
def test_calibration_drops_exactly_what_no_token_used(gate, tasks):
    model, x = tiny(gate, shun=True), images()
    small = extract(model, tasks, [x[:3], x[3:]], fold=False)
    expected = {layer: (mass.sum(0) > 0).nonzero()[:, 0].tolist() for layer, mass in used(model, x, tasks).items()}
    assert kept(small) == expected
    assert SHUNNED not in expected["blocks.1"]
    agree(small, model, x, tasks)
    for name, layer in small.moe_layers.items():
        found = small.extraction.layers[name]
        assert layer.experts.num_experts == len(layer.experts.w1) == len(found.kept)
        assert found.experts == E
        assert found.dropped_mass == 0 and found.dropped_mass_by_task == dict.fromkeys(tasks, 0.0)
        assert found.tokens == 4 * 16 * (len(tasks) if GATES[gate].task_dependent else 1)
    _, routings = small(images(seed=9), return_routing=True)
    for name, routing in routings.items():  # ids and columns of the full layer, whatever the images
        assert routing.logits.shape[1] == routing.dense_weights().shape[1] == E
        assert set(routing.indices.flatten().tolist()) <= set(expected[name]) if routing.indices is not None else True


@every_gate
def test_dropped_mass_is_what_the_full_model_gave_the_least_used_experts(gate):
    model, x, tasks, limit = tiny(gate), images(6), ["tilt", "scene"], 0.4
    small = extract(model, tasks, [x], mass=limit)
    least = 1 if gate in MIXTURES or gate == "dselect_k" else K
    some = 0
    for name, mass in used(model, x, tasks).items():
        found, shares = small.extraction.layers[name], mass / mass.sum(1, keepdim=True)
        held = [e for e in range(E) if shares[:, e].max() > 0]
        gone = [e for e in held if e not in found.kept]
        lost = shares[:, gone].sum(1)
        assert found.dropped_mass == pytest.approx(float(lost.mean()), rel=1e-5, abs=1e-12)
        assert found.dropped_mass_by_task == pytest.approx(dict(zip(tasks, lost.tolist(), strict=True)), rel=1e-5)
        assert max(lost) <= limit
        use, some = shares.amax(0), some + len(gone)
        assert all(use[a] <= use[b] for a in gone for b in found.kept)
        following = min(found.kept, key=lambda e: use[e])
        assert len(found.kept) == least or (lost + shares[:, following]).max() > limit
    assert some > 0


def test_mass_by_hand():
    # Router probabilities (1, 2, 5, 8) / 16 for depth and 1/4 each for scene, whatever the token.
    model = tiny("softmax", experts=4)
    for layer in model.moe_layers.values():
        layer.gate.zero_scores()
        with torch.no_grad():
            layer.gate.router.bias[0].copy_(torch.tensor([0.0, LOG(2), LOG(5), LOG(8)]))
    x = images(2)

    one = extract(model, "depth", x.unsqueeze(0), mass=0.2).extraction.layers["blocks.0"]  # 1/16 + 2/16 <= 0.2
    assert one.kept == (2, 3)
    assert one.dropped_mass == pytest.approx(3 / 16)
    assert one.dropped_mass_by_task == pytest.approx({"depth": 3 / 16})

    # Together no task may lose more than the limit: scene would lose 1/4 with any expert.
    assert kept(extract(model, ["depth", "scene"], x.unsqueeze(0), mass=0.2))["blocks.1"] == [0, 1, 2, 3]
    both = extract(model, ["depth", "scene"], x.unsqueeze(0), mass=0.3).extraction.layers["blocks.1"]
    assert both.kept == (1, 2, 3)
    assert both.dropped_mass == pytest.approx((1 / 16 + 1 / 4) / 2)
    assert both.dropped_mass_by_task == pytest.approx({"depth": 1 / 16, "scene": 1 / 4})

    # Weights stay shares of all four experts.
    small = extract(model, "depth", [x], mass=0.2)
    routing = small(x, return_routing=True)[1]["blocks.0"]
    torch.testing.assert_close(routing.dense_weights()[0], torch.tensor([0.0, 0.0, 5 / 16, 8 / 16]))


def test_a_gate_that_chooses_k_keeps_k():
    model, x = tiny(k=3), images()
    small = extract(model, "depth", [x], mass=0.99)
    assert {len(ids) for ids in kept(small).values()} == {3}
    assert small(x)["depth"].isfinite().all()


@every_gate
def test_saved_and_loaded_it_is_the_same(gate, tmp_path):
    x = images()
    small = extract(tiny(gate, shun=True), ["scene", "depth"], [x], mass=0.2)
    assert small.config["kept_experts"] == {n: ids for n, ids in kept(small).items() if len(ids) < E}
    again = load(save(small, tmp_path / "model"))
    assert [layer.kept_experts for layer in again.moe_layers.values()] == list(kept(small).values())
    assert again.config == small.config
    ours, theirs = again(x), small(x)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    third = load(save(again, tmp_path / "again"))
    assert torch.equal(third(x)["depth"], theirs["depth"])


def test_an_assigned_model_is_saved_with_the_table_of_its_tasks(tmp_path):
    table, x = [[0, 3], [6, 1], [2, 5], [4, 0]], images()
    for gate_args in ({}, {"assignment": table}):
        model = tiny("assigned", gate_args=gate_args)
        small = extract(model, ["semseg", "scene"])
        again = load(save(small, tmp_path / "model"))
        assert torch.equal(again(x)["semseg"], small(x)["semseg"])
        expected = [table[3], table[1]] if gate_args else [[4, 5], [0, 1]]
        assert again.config["args"]["gate_args"]["assignment"] == expected
        assert model.config["args"]["gate_args"] == gate_args  # the full model keeps its own
        assert kept(small)["blocks.0"] == sorted({e for row in expected for e in row})


@every_gate
def test_extraction_from_an_extracted_model_keeps_the_ids_of_the_full_one(gate):
    model, x = tiny(gate, shun=True), images()
    two = extract(model, ["scene", "depth"], [x], mass=0.1)
    one = extract(two, "depth", [x])
    agree(one, two, x, ["depth"])
    assert extract(two, "depth", [x], mass=0.3)(x)["depth"].isfinite().all()
    for name, mass in used(two, x, ["depth"]).items():
        assert kept(one)[name] == (mass[0] > 0).nonzero()[:, 0].tolist()
        assert set(kept(one)[name]) <= set(kept(two)[name])
    for name, ids in kept(two).items():
        reachable = model.moe_layers[name].gate.reachable(NAMES.index("depth"))
        assert kept(extract(two, "depth"))[name] == sorted(set(ids) & set(range(E) if reachable is None else reachable))
    assert kept(extract(model, "depth", [x])) == kept(extract(extract(model, "depth", fold=False), "depth", [x]))


def test_experts_kept_in_two_steps_have_the_weights_they_had():
    model, bank = tiny(), tiny().moe_layers["blocks.1"].experts
    for ids in ([6, 2, 0, 5], [5, 2], [5]):
        keep_experts(model, {"blocks.1": ids})
        for name, p in model.moe_layers["blocks.1"].experts.named_parameters():
            assert torch.equal(p, getattr(bank, name)[sorted(ids)])
    routing = model(images(), return_routing=True)[1]["blocks.1"]
    assert (routing.indices == 5).all() and routing.k == 1
    assert model.config["kept_experts"] == {"blocks.1": [5]}


@every_gate
def test_one_task_per_sample_and_several_tasks_at_once(gate):
    model, x = tiny(gate, shun=True), images(5)
    small = extract(model, ["scene", "depth"], [x])
    full, ids = small(x), torch.tensor([1, 0, 1, 1, 0])
    for name, (rows, prediction) in small(x, tasks=ids).items():
        assert rows.tolist() == (ids == ["scene", "depth"].index(name)).nonzero()[:, 0].tolist()
        torch.testing.assert_close(prediction, full[name][rows], atol=1e-5, rtol=1e-5)


@every_gate
def test_it_trains(gate):
    small, x = extract(tiny(gate, shun=True), ["scene", "depth"], [images()], mass=0.1).train(), images()
    predictions = small(x)
    (predictions["depth"].mean() + predictions["scene"].square().mean()).backward()
    missing = [name for name, p in small.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []
    before = copy.deepcopy(small.state_dict())
    torch.optim.SGD(small.parameters(), lr=0.1).step()
    moved = {name for name, p in small.named_parameters() if not torch.equal(p, before[name])}
    assert any(".experts.w1" in name for name in moved)
    assert GATES[gate].compute_class == "task" or any(".gate." in name for name in moved)
    frozen = tiny(gate)
    frozen.requires_grad_(False)
    assert not any(p.requires_grad for p in extract(frozen, "depth", [x]).parameters())


def test_it_compiles_without_graph_breaks():
    small, x = extract(tiny(shun=True), "depth", [images()], mass=0.2), images(3)
    torch.compiler.reset()
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)["depth"], small(x)["depth"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gate", ["softmax", "noisy_topk", "assigned"])
def test_it_exports_with_any_batch(gate):
    small, x = extract(tiny(gate, shun=True, blocks=[1]), "depth", [images()], mass=0.2), images(3)
    program = torch.export.export(small, (x,), dynamic_shapes=({0: torch.export.Dim("b", min=2, max=64)},))
    y = images(5, seed=7)
    torch.testing.assert_close(program.module()(y)["depth"], small(y)["depth"], atol=1e-5, rtol=1e-5)


def test_nan_in_dropped_experts_does_not_matter():
    model, x = tiny(shun=True), images()
    expected = extract(model, "depth", [x])
    with torch.no_grad():
        for name, ids in kept(expected).items():
            for p in model.moe_layers[name].experts.parameters():
                p[[e for e in range(E) if e not in ids]] = math.nan
    assert torch.equal(extract(model, "depth", [x])(x)["depth"], expected(x)["depth"])


def test_what_counts_as_calibration():
    # Noise as large as the scores: in training mode the shunned expert would be used.
    model, x = tiny(shun=True, gate_args={"noise_std": 3000.0}).train(), images(6)
    _, routings = model(x, return_routing=True)
    assert (routings["blocks.1"].indices == SHUNNED).any()
    model.backbone.blocks[0].eval()
    samples = [{"image": image, "depth": None} for image in x]
    loader = torch.utils.data.DataLoader(torch.utils.data.StackDataset(image=x), batch_size=4)
    expected = asdict(extract(model, "depth", [x]).extraction)
    assert SHUNNED not in expected["layers"]["blocks.1"]["kept"]
    for calibration in ([x[:4], x[4:]], list(x), x, samples, loader, iter([{"image": x}])):
        small = extract(model, "depth", calibration)
        assert asdict(small.extraction) == expected
        assert [m.training for m in small.modules()] == [m.training for m in extract(model, "depth").modules()]
    assert small.training and not small.backbone.blocks[0].training


def test_the_report_is_plain_data_and_readable():
    small = extract(tiny(shun=True), "depth", [images()], mass=0.3)
    assert json.loads(json.dumps(asdict(small.extraction)))["layers"]["blocks.1"]["tokens"] == 64
    found = small.extraction.layers["blocks.1"]
    line = f"blocks.1: {len(found.kept)} of 7 experts, {found.dropped_mass:.2%} of the gate mass dropped (64 tokens)"
    assert str(small.extraction).splitlines()[1] == line
    assert str(extract(tiny("assigned"), "depth").extraction).splitlines()[1] == "blocks.1: 2 of 7 experts, no gate"
    assert str(extract(tiny(), "depth").extraction) == "blocks.0: 7 of 7 experts\nblocks.1: 7 of 7 experts"


@pytest.mark.parametrize("name", ["shared_bottom_micro", "single_task_micro"])
def test_models_without_experts_pass_through(name):
    sizes = {"image_size": 16, "patch_size": 4, "dim": 16, "depth": 1, "num_heads": 2, "head_width": 8}
    model, x = create_model(name, tasks=TASKS, **sizes).eval(), images()
    small = extract(model, "depth", [x], mass=0.5)
    assert torch.equal(small(x)["depth"], model(x, tasks=["depth"])["depth"])
    assert small.extraction.layers == {} and str(small.extraction) == ""


class TestBadInput:
    @pytest.mark.parametrize("mass", [-0.1, 1.0, math.nan])
    def test_mass(self, mass):
        with pytest.raises(ValueError, match=r"^mass: got .*from 0 to below 1"):
            extract(tiny(), "depth", [images()], mass=mass)

    def test_what_is_no_model(self):
        for model, message in (
            (torch.nn.Linear(1, 1), "got Linear; expected one of create_model"),
            (torch.nn.DataParallel(tiny()), "got DataParallel; pass its .module"),
        ):
            with pytest.raises(ValueError, match=f"^model: {message}"):
                extract(model, "depth")

    def test_mass_without_images(self):
        with pytest.raises(ValueError, match=r"^mass: got 0.1 without calibration"):
            extract(tiny(), "depth", mass=0.1)

    @pytest.mark.parametrize(
        "calibration, message",
        [
            ([], "got no samples"),
            ([images(1)[0, 0]], "item 0 is a Tensor of shape"),
            ([images(1), {"picture": images(1)}], "item 1 is a dict of picture"),
            ([(images(1), 3)], "item 0 is a tuple"),
        ],
    )
    def test_calibration(self, calibration, message):
        with pytest.raises(ValueError, match=f"^calibration: {message}"):
            extract(tiny(), "depth", calibration)

    @pytest.mark.parametrize(
        "kept, message",
        [
            ({"block.1": [0]}, r"no layer 'block.1' with experts; did you mean 'blocks.1'"),
            ({"blocks.1": []}, r"layer 'blocks.1': ids: got \[\]"),
            ({"blocks.1": [2, 2]}, r"layer 'blocks.1': ids: got \[2, 2\]"),
            ({"blocks.1": [5, 7]}, r"layer 'blocks.1': ids: got \[5, 7\], expected different experts of \[0, 1"),
        ],
    )
    def test_experts_to_keep(self, kept, message):
        with pytest.raises(ValueError, match=f"^kept: {message}"):
            keep_experts(tiny(), kept)

    def test_an_expert_that_is_gone_cannot_be_kept(self):
        model = tiny()
        keep_experts(model, {"blocks.1": [4, 2, 0]})
        assert model.config["kept_experts"] == {"blocks.1": [0, 2, 4]}
        with pytest.raises(ValueError, match=r"got \[1, 2\], expected different experts of \[0, 2, 4\]"):
            keep_experts(model, {"blocks.1": [1, 2]})
        bank = model.moe_layers["blocks.1"].experts
        for ids in ([3], [-1], [0, 0], []):
            with pytest.raises(ValueError, match=r"^ids: .* of 0 to 2, at least one"):
                bank.keep_experts(ids)
