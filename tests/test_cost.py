"""FLOPs by hand, parameters with sharing, and that latency calls what it says in the order it says."""

import copy
import math

import pytest
import torch
from torch import nn

from moe_mtl.backbones import moefy
from moe_mtl.backbones.timm_vit import build_vit
from moe_mtl.cost import cost_table, count_flops, count_parameters, dense_of_equal_size, latency
from moe_mtl.multitask import evaluating
from moe_mtl.registry import create_model
from moe_mtl.sparse import extract
from moe_mtl.tasks import Task
from tests.test_encoders import routed, texts


class Toy(nn.Module):
    """A shared linear layer and one linear head per task."""

    def __init__(self, tasks):
        super().__init__()
        self.tasks = tuple(tasks)
        self.shared = nn.Linear(5, 7)
        self.drop = nn.Dropout(0.5)
        self.heads = nn.ModuleDict({task.name: nn.Linear(7, task.channels) for task in tasks})

    def forward(self, x, tasks=None):
        y = self.drop(self.shared(x))
        return {name: self.heads[name](y) for name in (tasks or [task.name for task in self.tasks])}


TASKS = (Task.classification("a", 3), Task.classification("b", 11))


def test_flops_of_linear_layers():
    # [4, 5] @ [5, 7] is 4*5*7 multiply-adds = 140 = 280 FLOPs; heads 4*7*3 = 84 -> 168 and 4*7*11 = 308 -> 616
    model, x = Toy(TASKS), torch.randn(4, 5)
    assert count_flops(model, x) == 280 + 168 + 616
    assert count_flops(model, x, tasks=["a"]) == 280 + 168
    assert count_flops(model, x, tasks=["b"]) == 280 + 616


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_counts(dtype):
    # scores [n d] @ [d n] and values [n n] @ [n d], per head: 2 * 2 * n * n * d FLOPs
    class Attention(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    assert count_flops(Attention(), torch.randn(2, 3, 10, 4, dtype=dtype)) == 2 * 3 * 2 * 2 * 10 * 10 * 4


def test_parameters_that_are_inputs_of_a_layer_count_as_well():
    model, x = routed("deberta"), texts()  # whose layers are given a table of positions
    learns = [p.requires_grad for p in model.parameters()]
    one, every = count_flops(model, x, "intent"), count_flops(model, x)
    assert 0 < one < every and one == count_flops(extract(model, "intent"), x) == count_flops(model, x, ["intent"])
    assert [p.requires_grad for p in model.parameters()] == learns
    assert count_flops(copy.deepcopy(model).requires_grad_(False), x) == every


def test_a_shared_parameter_counts_once_and_buffers_do_not():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))
    model[1].weight = model[0].weight
    assert count_parameters(model) == 16 + 4 + 4


def test_evaluating_gives_every_module_its_own_mode_back():
    model = Toy(TASKS).train()
    model.heads["a"].eval()
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise RuntimeError("inside")
    assert model.training and model.drop.training and model.heads["b"].training
    assert not model.heads["a"].training
    assert torch.is_grad_enabled()


def test_latency_interleaves_and_rotates():
    calls = []
    result = latency({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert result.keys() == {"a", "b"} and all(0 < seconds < 1 for seconds in result.values())


def test_latency_takes_the_median(monkeypatch):
    # the clock reads 0 1, 0 9, 0 2: durations 1, 9, 2 with median 2
    ticks = iter([0.0, 1.0, 0.0, 9.0, 0.0, 2.0])
    monkeypatch.setattr("moe_mtl.cost.perf_counter", lambda: next(ticks))
    assert latency({"a": lambda: None}, rounds=3) == {"a": 2.0}


def test_latency_refuses_no_rounds():
    with pytest.raises(ValueError, match="rounds: got 0"):
        latency({}, rounds=0)


def test_cost_table_rows():
    model, x = Toy(TASKS), torch.randn(4, 5)
    alone = {"a": Toy(TASKS[:1]), "b": Toy(TASKS[1:])}
    rows = cost_table(model, x, alone, rounds=1)
    assert [(row.run, row.task) for row in rows] == [
        ("all tasks", None),
        ("one task", "a"),
        ("one task", "b"),
        ("one task extracted", "a"),
        ("one task extracted", "b"),
    ]
    total = 42 + 24 + 88  # 5*7+7, 7*3+3, 7*11+11
    assert [row.parameters for row in rows] == [total, total, total, 42 + 24, 42 + 88]
    assert [row.flops for row in rows] == [1064, 448, 896, 448, 896]
    assert rows[0].relative_flops == rows[0].relative_parameters == rows[0].relative_seconds == 1.0
    assert math.isclose(rows[3].relative_flops, 448 / 1064)
    assert math.isclose(rows[3].relative_parameters, 66 / 154)
    assert all(row.batch == 4 and row.seconds > 0 for row in rows)


def test_cost_table_without_extracted_models_has_two_kinds_of_rows():
    rows = cost_table(Toy(TASKS), torch.randn(2, 5), rounds=1)
    assert [row.run for row in rows] == ["all tasks", "one task", "one task"]


def test_cost_table_compares_with_a_dense_model():
    model, dense, x = Toy(TASKS), Toy(TASKS), torch.randn(4, 5)
    dense.shared = nn.Linear(5, 7, bias=False)
    alone = {"b": Toy(TASKS[1:])}
    rows = cost_table(model, x, rounds=1, dense=dense, dense_extracted=alone)
    assert [(row.run, row.task) for row in rows[3:]] == [("dense, all tasks", None), ("dense, one task extracted", "b")]
    assert [row.parameters for row in rows[3:]] == [154 - 7, 42 + 88]
    assert [row.flops for row in rows[3:]] == [1064, 896]
    assert math.isclose(rows[4].relative_flops, 896 / 1064)  # of the model's own tasks


IMAGE_TASKS = (Task.depth(), Task.classification("scene", 5))
SIZES = {"image_size": 32, "dim": 24, "depth": 2, "num_heads": 6, "head_width": 4, "drop_path": 0.1}


@pytest.mark.parametrize("experts", [2, 16])
def test_the_dense_model_of_equal_size_comes_nearest(experts):
    model = create_model("m3vit_micro", tasks=IMAGE_TASKS, **SIZES, experts=experts, k=1)
    dense = dense_of_equal_size(model)
    assert not dense.moe_layers and dense.tasks == model.tasks and not dense.training
    assert dense.config["name"] == "shared_bottom_micro"
    kept = {option: value for option, value in dense.config["args"].items() if option in SIZES and option != "dim"}
    assert kept == {option: value for option, value in SIZES.items() if option != "dim"}
    target, dim = count_parameters(model), dense.config["args"]["dim"]

    def off(dim):
        other = create_model("shared_bottom_micro", tasks=IMAGE_TASKS, **{**SIZES, "dim": dim})
        return abs(count_parameters(other) - target)

    assert dim == min(range(6, 200, 6), key=off)
    assert (dim > 24) == (experts == 16)


def test_the_dense_model_draws_nothing_from_the_generators():
    model = create_model("m3vit_micro", tasks=IMAGE_TASKS, **SIZES)
    before = torch.random.get_rng_state()
    dense_of_equal_size(model)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_models_without_a_dense_sibling():
    vit = build_vit(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=6)
    assert dense_of_equal_size(moefy(vit, IMAGE_TASKS, experts=2, k=1)) is None  # has no name
    assert dense_of_equal_size(create_model("shared_bottom_micro", tasks=IMAGE_TASKS, **SIZES)) is None
    assert dense_of_equal_size(create_model("single_task_micro", tasks=IMAGE_TASKS, **SIZES)) is None
    model = create_model("m3vit_micro", tasks=IMAGE_TASKS, **SIZES)
    model.config["name"] = "m3vit_micro_of_late"  # facts behind the size name no other sibling
    assert dense_of_equal_size(model).config["name"] == "shared_bottom_micro"
    model.config["name"] = "other_size"
    assert dense_of_equal_size(model) is None
