"""What experts do: shares by hand, equal experts, and a set in batches against the set at once."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from moe_mtl.activity import activity, expert_activity
from moe_mtl.expert_stack import ExpertStack


def test_activity_by_hand():
    # mean square (4 * 1 + 4 * 4) / 16 = 1.25, so what is at most 0.0111 is silent
    outputs = torch.tensor([[[1.0, 0.011], [2.0, 2.0]], [[-1.0, 0.0], [2.0, 2.0]]])
    outputs = torch.cat([outputs, torch.tensor([[[1.0, 0.02], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])])
    found = activity(outputs)
    assert found.silent.tolist() == [3 / 8, 4 / 8]
    assert found.dead.tolist() == [0, 0]  # each unit speaks on a quarter of the samples at least
    assert activity(outputs[[1, 3]]).dead.tolist() == [1 / 2, 0]
    assert found.distance.tolist() == [[0, 1], [1, 0]] and found.diversity == 1


def test_distances_are_those_of_numpy():
    outputs = torch.randn(20, 30, 6, generator=torch.Generator().manual_seed(0))
    flat = outputs.double().numpy().transpose(1, 0, 2).reshape(30, -1)
    distance = np.linalg.norm(flat[:, None] - flat[None], axis=-1)
    found = activity(outputs)
    np.testing.assert_allclose(found.distance, distance / distance.max(), rtol=1e-12)
    assert found.diversity == pytest.approx(distance.sum() / (30 * 29) / distance.max())


@pytest.mark.parametrize("experts", [2, 8, 32])
def test_equal_experts_have_no_diversity(experts):
    outputs = torch.randn(50, 1, 16, generator=torch.Generator().manual_seed(0)) + 10
    assert activity(outputs.expand(-1, experts, -1)).diversity == 0


def test_one_expert_has_no_diversity_to_speak_of():
    assert math.isnan(activity(torch.ones(3, 1, 2)).diversity)


def test_a_set_in_batches_is_the_set_at_once():
    torch.manual_seed(0)
    model = nn.Sequential(ExpertStack(3, 5, [4])).train()
    x = torch.randn(10, 5)
    (whole,), (parts,) = (expert_activity(model, each).values() for each in ([x], x.split([1, 6, 3])))
    for name in ("silent", "dead", "distance"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
    assert model.training and not model[0]._forward_hooks
    with pytest.raises(ValueError, match="batches: got none"):
        expert_activity(model, [])
