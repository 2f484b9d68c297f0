"""Columns of a table, what encoders make of their values, and stacks of experts against plain modules."""

import copy
import math

import pytest
import torch
from torch import nn

from moe_mtl.columns import Column, check_rows, read_columns
from moe_mtl.embeddings import FieldColumns, FlatColumns
from moe_mtl.expert_stack import ExpertStack
from moe_mtl.task_linear import TaskLinear
from moe_mtl.tasks import Task
from moe_mtl.towers import Towers

AGE = Column(name="age", kind="numeric", mean=10.0, std=4.0, edges=(0, 4, 12), has_missing=True)
SIZE = Column(name="size", kind="numeric", mean=1.0, std=2.0)
JOB = Column(name="job", kind="categorical", categories=("cook", "nurse"))
TOWN = Column(name="town", kind="categorical", categories=("x", "y", "z"))
TAGS = Column(name="tags", kind="multihot", categories=("p", "q", "r"))
PIXELS = Column(name="pixels", kind="vector", size=2)
COLUMNS = (AGE, SIZE, JOB, TOWN, TAGS, PIXELS)
NAN = math.nan


def rows():
    return {
        "numeric": torch.tensor([[6.0, 3.0], [NAN, 1.0]]),
        "categorical": torch.tensor([[1, 3], [0, 2]]),
        "multihot": torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]),
        "vector": torch.tensor([[0.5, -0.5], [2.0, 4.0]]),
    }


# ---- columns


def test_a_column_survives_as_plain_data():
    for column in COLUMNS:
        assert Column.from_dict(column.to_dict()) == column
    assert SIZE.to_dict() == {"name": "size", "kind": "numeric", "mean": 1.0, "std": 2.0}
    assert [column.width for column in COLUMNS] == [1, 1, 1, 1, 3, 2]


@pytest.mark.parametrize("values, message", [
    ({"kind": "number"}, "kind: column 'c' has the unknown kind 'number'; .*numeric"),
    ({"kind": "numeric", "std": 0.0}, r"std: column 'c' has 0\.0, expected above 0; drop a constant column"),
    ({"kind": "numeric", "edges": [1.0]}, r"edges: column 'c' has \(1\.0,\), expected ascending"),
    ({"kind": "numeric", "edges": [1.0, 1.0]}, "edges: column 'c'"),
    ({"kind": "categorical"}, "categories: column 'c' of kind categorical has none"),
    ({"kind": "multihot"}, "categories: column 'c' of kind multihot has none"),
    ({"kind": "vector"}, "size: column 'c' has 0, expected at least 1"),
])  # fmt: skip
def test_impossible_columns_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Column(name="c", **values)


def test_lists_of_columns():
    assert read_columns([JOB, SIZE.to_dict()]) == (JOB, SIZE)
    with pytest.raises(ValueError, match="columns: got none"):
        read_columns([])
    with pytest.raises(ValueError, match="columns: job given twice"):
        read_columns([JOB, SIZE, JOB])


@pytest.mark.parametrize("change, message", [
    ({"numeric": None}, r"x\['numeric'\]: got nothing, expected \[b, 2\]"),
    ({"numeric": torch.zeros(2, 3)}, r"x\['numeric'\]: got \[2, 3\], expected \[b, 2\]"),
    ({"categorical": torch.zeros(2, 2)}, r"x\['categorical'\]: got torch.float32, expected torch.int64"),
    ({"vector": torch.zeros(2, 2, dtype=torch.int64)}, r"x\['vector'\]: got torch.int64, expected floating point"),
    ({"multihot": torch.zeros(3, 3)}, r"x\['multihot'\]: got 3 rows, the others have 2"),
])  # fmt: skip
def test_rows_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        check_rows(rows() | change, COLUMNS)
    with pytest.raises(ValueError, match="x: got Tensor, expected rows as a dict"):
        check_rows(torch.zeros(2, 3), COLUMNS)
    assert check_rows(rows(), COLUMNS) == 2


def test_ids_out_of_range_are_refused():
    bad = rows() | {"categorical": torch.tensor([[3, 3], [0, 2]])}
    with pytest.raises(ValueError, match=r"column 'job' has ids 0 to 3, expected 0 \(unseen\) to 2"):
        FlatColumns(COLUMNS)(bad)


# ---- encoders


def test_flat_encoder_by_hand():
    encoder = FlatColumns(COLUMNS, embedding_dim=2)
    with torch.no_grad():
        # rows of the one table: job unseen, cook, nurse, then town unseen, x, y, z
        encoder.categorical.table.weight.copy_(torch.arange(14.0).view(7, 2))
        encoder.multihot.table.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 8.0]]))
    first, second = encoder(rows())
    # age 6: (6 - 10) / 4 = -1; bins [0, 4] and [4, 12] passed by 1 and by 2/8; not missing. size 3: (3 - 1) / 2 = 1
    numbers = [-1.0, 1.0, 1.0, 0.25, 0.0]
    # job 1 is row 1, (2, 3); town 3 is row 3 + 3 = 6, (12, 13); tags p and r: mean of (1, 2) and (5, 8)
    assert first.tolist() == [*numbers, 2.0, 3.0, 12.0, 13.0, 3.0, 5.0, 0.5, -0.5]
    # a missing age: its mean, no bin, and the mark; size 1 is its mean; unseen job, town y; no tag
    assert second.tolist() == [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 10.0, 11.0, 0.0, 0.0, 2.0, 4.0]
    assert encoder.dim == 13
    outside = rows() | {"numeric": torch.tensor([[-5.0, 1.0], [100.0, 1.0]])}
    assert encoder(outside)[:, 2:4].tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_standard_numbers_have_no_bins():
    encoder = FlatColumns((AGE, SIZE), numeric="standard")
    # the two columns and the mark of the one that had missing values
    assert encoder(rows()).tolist() == [[-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


def test_field_encoder_by_hand():
    encoder = FieldColumns(COLUMNS, dim=2)
    with torch.no_grad():
        # features: age, size, age's two bins, age's mark
        encoder.number_table.copy_(torch.tensor([[1.0, 0], [2, 2], [0, 4], [8, 0], [0, 16]]))
        encoder.number_bias.copy_(torch.tensor([[0.5, 0.0], [0.0, 0.25]]))
        encoder.categorical.table.weight.copy_(torch.arange(14.0).view(7, 2))
        encoder.vectors[0].weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
        encoder.vectors[0].bias.zero_()
    fields = encoder(rows())
    assert fields.shape == (2, 6, 2) and encoder.fields == 6
    # age: -1 (1, 0) + 1 (0, 4) + 0.25 (8, 0) + (0.5, 0) = (1.5, 4); size: 1 (2, 2) + (0, 0.25)
    assert fields[0, :2].tolist() == [[1.5, 4.0], [2.0, 2.25]]
    assert fields[0, 2:4].tolist() == [[2.0, 3.0], [12.0, 13.0]] and fields[0, 5].tolist() == [1.0, -1.0]
    # a missing age: the mark's (0, 16) and the bias
    assert fields[1, 0].tolist() == [0.5, 16.0] and fields[1, 4].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", [FlatColumns, FieldColumns])
def test_every_embedding_learns_and_unseen_ones_apart(kind):
    torch.manual_seed(0)
    encoder = kind(COLUMNS, 4)
    out = encoder(rows())
    out.backward(torch.randn_like(out))
    used = encoder.categorical.table.weight.grad.abs().sum(dim=1) > 0
    assert used.tolist() == [True, True, False, False, False, True, True]  # unseen job, cook; towns y and z
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    with pytest.raises(ValueError, match="expected at least 1"):
        kind(COLUMNS, 0)
    with pytest.raises(ValueError, match="numeric: unknown 'binned'"):
        kind(COLUMNS, 4, "binned")


# ---- stacks, maps per task, towers


def plain(stack, e):
    """Expert e of a stack as a sequence of torch's modules."""
    layers = []
    for i, out in enumerate(stack.widths):
        linear = nn.Linear(stack.weight[i].shape[2], out)
        linear.weight, linear.bias = nn.Parameter(stack.weight[i][e]), nn.Parameter(stack.bias[i][e])
        norm = {"none": nn.Identity, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}[stack.norm]
        layers += [linear, norm() if stack.norm == "none" else norm(out), nn.SiLU()]
        if stack.norm != "none":
            layers[-2].weight, layers[-2].bias = nn.Parameter(stack.scale[i][e]), nn.Parameter(stack.shift[i][e])
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize("ids", [None, [1, 2], [2, 0]], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["one_input", "own_inputs"])
def test_a_stack_is_its_experts(norm, ids, shared):
    torch.manual_seed(0)
    stack = ExpertStack(3, 4, [5, 2], activation="silu", norm=norm).double()
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    asked = [0, 1, 2] if ids is None else ids
    x = torch.randn(7, 4, dtype=torch.float64) if shared else torch.randn(len(asked), 7, 4, dtype=torch.float64)
    alone = {e: plain(stack, e) for e in range(3)}
    for training in (True, False):  # statistics of the training step are used in evaluation
        stack.train(training)
        expected = torch.stack([
            alone[e].train(training)(x if shared else x[i]) for i, e in enumerate(asked)
        ], dim=1)  # fmt: skip
        torch.testing.assert_close(stack(x, ids), expected, rtol=1e-12, atol=1e-12)
    small = copy.deepcopy(stack)
    small.keep_experts(asked)
    torch.testing.assert_close(small(x), stack(x, ids), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options, message", [
    ({"widths": []}, "widths: got none"),
    ({"widths": [0]}, "widths: got 0"),
    ({"activation": "rleu"}, "activation: unknown 'rleu'; did you mean 'relu'"),
    ({"norm": "bach"}, "norm: unknown 'bach'; did you mean 'batch'"),
    ({"dropout": 1.0}, r"dropout: got 1\.0"),
    ({"num_experts": 0}, "num_experts: got 0"),
])  # fmt: skip
def test_impossible_stacks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ExpertStack(**{"num_experts": 2, "dim": 3, "widths": [4], **options})


def test_batches_a_stack_cannot_take():
    stack = ExpertStack(2, 3, [4], norm="batch")
    with pytest.raises(ValueError, match=r"x: got shape \[5, 2\], expected \[b, 3\] or \[2, b, 3\]"):
        stack(torch.zeros(5, 2))
    with pytest.raises(ValueError, match="x: got a batch of one in training"):
        stack.train()(torch.zeros(1, 3))
    assert stack.eval()(torch.zeros(1, 3)).shape == (1, 2, 4)


def test_maps_per_task_of_different_widths():
    torch.manual_seed(0)
    maps = TaskLinear(3, [2, 4], 2, bias=True).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    y = maps.blocks(x, (1, 0))
    torch.testing.assert_close(y[0], x[0] @ maps.weight[1].T + maps.bias[1])
    torch.testing.assert_close(y[1, :, :2], x[1] @ maps.weight[0].T + maps.bias[0])
    assert y[1, :, 2:].abs().max() == 0
    torch.testing.assert_close(maps.each(x[0], (1, 0))[:5], y[0])


def test_towers_give_every_kind_its_shape_and_regressions_their_unit():
    torch.manual_seed(0)
    tasks = (Task.binary("a"), Task.classification("b", 4), Task.regression("c", mean=100.0, std=10.0))
    towers = Towers(tasks, 6, [5], 0.0).eval()
    x = torch.randn(3, 7, 6)
    found = towers(x, (0, 1, 2))
    assert {name: tuple(p.shape) for name, p in found.items()} == {"a": (7,), "b": (7, 4), "c": (7,)}
    for i, task in enumerate(tasks):
        torch.testing.assert_close(towers(x[i : i + 1], (i,))[task.name], found[task.name])
        torch.testing.assert_close(towers.for_tasks([i])(x[i : i + 1], (0,))[task.name], found[task.name])
    assert 50 < found["c"].mean() < 150  # in the unit of the labels
