"""Expert usage added up by hand, and every diagnostic on usage whose value is known."""

import json
import math

import pytest
import torch
from torch import nn

from moe_mtl.diagnostics import (
    BRIEF,
    ExpertUsage,
    LayerUsage,
    diagnose,
    expert_load,
    expert_usage,
    load_entropy,
    most_information,
    mutual_information,
    task_cosine,
)
from moe_mtl.routing import Routing
from moe_mtl.tasks import Task

TASKS = (Task.depth("d"), Task.classification("c", 2))
LOG2, LOG3 = math.log(2), math.log(3)


def routing(indices, weights, task, experts=4, **kwargs):
    indices, weights = torch.tensor(indices), torch.tensor(weights)
    return Routing(weights, indices, torch.zeros(len(weights), experts), task, **kwargs)


def shares(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# ---- usage


def test_usage_by_hand():
    # task d: tokens choose (0,1) and (0,2): slots 0 twice, 1 and 2 once of four; mass .75+.5, .25, .5 of 2
    # task c: tokens choose (3,1) and (3,1): slots one half each; mass 1.9 and .1 of 2
    tokens = [[0, 1], [0, 2], [3, 1], [3, 1]]
    weights = [[0.75, 0.25], [0.5, 0.5], [0.9, 0.1], [1.0, 0.0]]
    usage = ExpertUsage(TASKS)
    usage.update({"layer": routing(tokens, weights, (0, 1))})
    result = usage.compute()["layer"]
    torch.testing.assert_close(
        result.slots, torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.5, 0.0, 0.5]], dtype=torch.float64)
    )
    torch.testing.assert_close(
        result.mass,
        torch.tensor([[0.625, 0.125, 0.25, 0.0], [0.0, 0.05, 0.0, 0.95]], dtype=torch.float64),
        atol=1e-7,
        rtol=0,
    )


def test_weights_of_gates_by_hand():
    # task d: expert 0 gets .75 and .5 of two tokens: mean .625, deviation .125; expert 1 .25 and 0: .125 and .125
    # task c: expert 3 gets .9 and 1: mean .95, deviation .05; expert 1 .1 and 0: .05 and .05
    usage = ExpertUsage(TASKS)
    tokens, weights = [[0, 1], [0, 2], [3, 1], [3, 1]], [[0.75, 0.25], [0.5, 0.5], [0.9, 0.1], [1.0, 0.0]]
    usage.update({"layer": routing(tokens, weights, (0, 1))})
    found = usage.compute()["layer"]
    expected = shares([0.625, 0.125, 0.25, 0.0], [0.0, 0.05, 0.0, 0.95])
    torch.testing.assert_close(found.weight, expected, atol=1e-7, rtol=0)
    deviation = shares([0.125, 0.125, 0.25, 0.0], [0.0, 0.05, 0.0, 0.05])
    torch.testing.assert_close(found.spread, deviation, atol=1e-7, rtol=0)


def test_streams_count_for_the_tasks_that_share_them():
    # three numbers beyond the tasks: 2 is a stream of both tasks, 3 one of task c alone, 4 is nobody's
    tokens, weights = [[0], [1], [2]], [[1.0], [1.0], [1.0]]
    usage = ExpertUsage(TASKS, {2: (0, 1), 3: (1,)})
    usage.update({"layer": routing(tokens, weights, (2, 3, 4))})
    assert usage.compute()["layer"].slots.tolist() == [[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]]


def test_usage_in_batches_is_usage_at_once():
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(12, 4, generator=generator).argsort(dim=-1)[:, :2]
    weights, ids = torch.rand(12, 2, generator=generator), torch.arange(12) % 2
    whole, parts = ExpertUsage(TASKS), ExpertUsage(TASKS)
    whole.update({"l": Routing(weights, indices, torch.zeros(12, 4), ids)})
    for rows in (slice(0, 5), slice(5, 12)):
        parts.update({"l": Routing(weights[rows], indices[rows], torch.zeros(12, 4)[rows], ids[rows])})
    torch.testing.assert_close(parts.compute()["l"].slots, whole.compute()["l"].slots)
    torch.testing.assert_close(parts.compute()["l"].mass, whole.compute()["l"].mass)


def test_padding_does_not_count():
    usage = ExpertUsage(TASKS)
    usage.update({"l": routing([[0], [1]], [[1.0], [1.0]], 0, valid=torch.tensor([True, False]))})
    assert usage.compute()["l"].slots[0].tolist() == [1.0, 0.0, 0.0, 0.0]


def test_a_task_that_never_ran_is_nan_not_zero():
    usage = ExpertUsage(TASKS)
    usage.update({"l": routing([[2]], [[1.0]], 0)})
    result = usage.compute()["l"]
    assert result.slots[0].tolist() == [0.0, 0.0, 1.0, 0.0]
    assert result.slots[1].isnan().all() and result.mass[1].isnan().all()


def test_layers_before_the_tasks_part_count_for_all():
    usage = ExpertUsage(TASKS)
    usage.update({"l": routing([[2]], [[1.0]], None)})
    assert usage.compute()["l"].slots.tolist() == [[0.0, 0.0, 1.0, 0.0]] * 2


def test_independent_models_share_a_layer_name():
    usage = ExpertUsage(TASKS)
    usage.update({"d/l": routing([[2]], [[1.0]], 0), "c/l": routing([[1]], [[1.0]], 0)})
    assert usage.compute().keys() == {"l"}
    assert usage.compute()["l"].slots.tolist() == [[0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]]


def test_dense_mixture_counts_weights():
    usage = ExpertUsage(TASKS[:1])
    usage.update({"l": Routing(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]), None, torch.zeros(2, 3), 0)})
    torch.testing.assert_close(usage.compute()["l"].slots, torch.tensor([[0.75, 0.25, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(usage.compute()["l"].mass, torch.tensor([[0.75, 0.25, 0.0]], dtype=torch.float64))


class Toy(nn.Module):
    """Sends a token of task i to expert (first value + i) modulo 4."""

    tasks = TASKS

    def forward(self, x, tasks=None, return_routing=False):
        assert return_routing and not self.training
        ids = [i for i, task in enumerate(TASKS) if tasks is None or task.name in tasks]
        indices = torch.cat([(x[:, :1].long() + i) % 4 for i in ids])
        return {}, {"l": Routing(torch.ones(len(indices), 1), indices, torch.zeros(len(indices), 4), tuple(ids))}


def test_expert_usage_runs_the_model_in_eval_mode():
    model = Toy().train()
    batches = [torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [0.0]])]
    usage = expert_usage(model, batches)["l"]
    assert usage.slots.tolist() == [[0.75, 0.25, 0.0, 0.0], [0.0, 0.75, 0.25, 0.0]]
    assert model.training
    assert expert_usage(model, batches, tasks=["c"])["l"].slots[0].isnan().all()


# ---- what it says


def test_tasks_with_experts_of_their_own_share_all_the_information_there_is():
    rows = shares([0.5, 0.5, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0.2, 0.3, 0.5])
    assert mutual_information(rows) == pytest.approx(LOG3, abs=1e-12) == most_information(3, 6)


def test_tasks_that_use_the_experts_alike_share_none():
    rows = shares([0.5, 0.25, 0.25], [0.5, 0.25, 0.25])
    assert mutual_information(rows) == 0.0


def test_information_by_hand():
    # p(e|t) = (1, 0) and (1/2, 1/2): p(e) = (3/4, 1/4) has entropy 2 ln 2 - 3/4 ln 3, inside the tasks it is 0 and ln 2
    assert mutual_information(shares([1, 0], [0.5, 0.5])) == pytest.approx(1.5 * LOG2 - 0.75 * LOG3, abs=1e-12)
    # more tasks than experts: three tasks on two experts, p(e) = (2/3, 1/3): ln 3 - 2/3 ln 2, below the most, ln 2
    rows = shares([1, 0], [1, 0], [0, 1])
    assert mutual_information(rows) == pytest.approx(LOG3 - 2 / 3 * LOG2, abs=1e-12)
    assert mutual_information(rows) < most_information(3, 2) == LOG2


def test_tasks_count_alike_and_missing_ones_not_at_all():
    usage = ExpertUsage(TASKS)  # three tokens of one task, one of the other: each task is still one half
    usage.update({"l": routing([[0], [0], [0], [1]], [[1.0]] * 4, torch.tensor([0, 0, 0, 1]))})
    layer = usage.compute()["l"]
    assert mutual_information(layer.slots) == pytest.approx(LOG2, abs=1e-12)
    assert expert_load(layer.slots).tolist() == [0.5, 0.5, 0.0, 0.0]
    rows = torch.cat([layer.slots, torch.full((1, 4), torch.nan)])
    assert mutual_information(rows) == pytest.approx(LOG2, abs=1e-12)
    assert expert_load(rows).tolist() == [0.5, 0.5, 0.0, 0.0]


def test_load_entropy_by_hand():
    assert load_entropy(shares(0.25, 0.25, 0.25, 0.25)) == pytest.approx(1.0, abs=1e-12)
    assert load_entropy(shares(0.5, 0.5, 0.0, 0.0)) == pytest.approx(0.5, abs=1e-12)
    assert load_entropy(shares(1.0, 0.0)) == 0.0
    assert load_entropy(shares(1.0)) == 1.0


def test_task_cosine_by_hand():
    # (1, 0), (1/2, 1/2), (0, 1): 45 degrees between neighbours, 90 between the outer two
    cosine = task_cosine(shares([1, 0], [0.5, 0.5], [0, 1]))
    half = math.sqrt(0.5)
    torch.testing.assert_close(cosine, shares([1, half, 0], [half, 1, half], [0, half, 1]))
    assert task_cosine(shares([1, 0], [math.nan, math.nan]))[0].isnan().tolist() == [False, True]


def test_the_entropy_of_the_router_is_a_mean_over_the_tokens_of_a_task():
    # task d: (1/2, 1/2) and all on one expert, ln 2 and 0; task c: (3/4, 1/4), 2 ln 2 - 3/4 ln 3; the last is padding
    logits = torch.tensor([[0.0, 0.0], [200.0, 0.0], [LOG3, 0.0], [0.0, 0.0]], dtype=torch.float64)
    layer = Routing(torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.int64), logits, torch.tensor([0, 0, 1, 1]))
    usage = ExpertUsage(TASKS)
    usage.update({"l": Routing(**{**vars(layer), "valid": torch.tensor([True, True, True, False])})})
    assert usage.compute()["l"].entropy.tolist() == pytest.approx([LOG2 / 2, 2 * LOG2 - 0.75 * LOG3], abs=1e-12)


def test_padding_may_hold_anything():
    usage = ExpertUsage(TASKS)
    weights, valid = torch.tensor([[1.0], [torch.nan]]), torch.tensor([True, False])
    layer = Routing(weights, torch.tensor([[0], [1]]), torch.tensor([[0.0, 0.0], [torch.nan, 0.0]]), 0, valid)
    usage.update({"l": layer})
    found = usage.compute()["l"]
    assert found.slots[0].tolist() == found.mass[0].tolist() == [1.0, 0.0]
    assert found.entropy[0].item() == pytest.approx(LOG2)


def test_diagnosis_of_a_layer():
    # experts 0 and 1 serve a task each, expert 2 gets 0.4 % of the choices, 3 none; of the even 25 %, 1 % is 0.25 %
    slots = shares([0.992, 0, 0.008, 0], [0, 1, 0, 0], [math.nan] * 4)
    mass = shares([1, 0, 0, 0], [0, 1, 0, 0], [math.nan] * 4)
    found = diagnose(LayerUsage(slots, mass, shares(LOG2, LOG3, math.nan), mass, 0 * mass))
    assert json.loads(json.dumps(found)).keys() == found.keys() and set(BRIEF) <= found.keys()
    assert found["mutual_information"] == pytest.approx(LOG2, abs=1e-12)
    assert found["mutual_information_share"] == pytest.approx(1.0)
    assert found["slot_information"] == pytest.approx(LOG2, abs=1e-12)  # expert 2 tells the task as well
    assert found["load"] == pytest.approx([0.496, 0.5, 0.004, 0.0])
    assert (found["dead_experts"], found["unused_experts"]) == (1, 1)
    assert found["gate_entropy"] == pytest.approx((LOG2 + LOG3) / 2)
    assert found["task_cosine"][0][:2] == pytest.approx([1.0, 0.0])
    less = diagnose(LayerUsage(shares([0.998, 0, 0.002, 0], [0, 1, 0, 0]), mass[:2], shares(0, 0), mass[:2], mass[:2]))
    assert (less["dead_experts"], less["unused_experts"]) == (2, 1)  # 0.1 % is below 0.25 %, but not nothing


def test_one_task_or_one_expert_has_nothing_to_tell():
    for rows in (shares([0.5, 0.5]), shares([1.0], [1.0])):
        found = diagnose(LayerUsage(rows, rows, torch.zeros(len(rows)), rows, 0 * rows))
        assert found["mutual_information"] == found["mutual_information_share"] == 0.0


def test_spread_choices_bound_the_information_of_slots():
    # two tasks, each token chooses two of four experts: disjoint pairs reach ln(4/2) = ln 2
    usage = ExpertUsage(TASKS)
    usage.update({"l": routing([[0, 1], [2, 3]], [[0.9, 0.1], [0.5, 0.5]], (0, 1))})
    found = diagnose(usage.compute()["l"])
    assert found["slot_information"] == pytest.approx(math.log(4 / 2), abs=1e-12)
