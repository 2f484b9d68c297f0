"""The Routing record and the spelling of task arguments."""

import pytest
import torch

from moe_mtl.routing import Routing, task_per_row


def sparse_routing(**changes) -> Routing:
    fields = {
        "weights": torch.tensor([[0.5, 0.25], [0.75, 0.125]]),
        "indices": torch.tensor([[2, 0], [1, 2]]),
        "logits": torch.tensor([[0.0, -1.0, 1.0], [0.0, 2.0, 1.0]]),
        "task": (1, 0),
    }
    return Routing(**fields | changes)


@pytest.mark.parametrize(
    "task, rows, expected",
    [
        (2, 3, [2, 2, 2]),
        ((2, 0), 6, [2, 2, 2, 0, 0, 0]),
        ([1, 1], 4, [1, 1, 1, 1]),
        (range(3), 3, [0, 1, 2]),
        (torch.tensor([1, 0, 2]), 3, [1, 0, 2]),
        (torch.tensor([1, 0], dtype=torch.int32), 2, [1, 0]),
        (4, 0, []),
    ],
)
def test_task_per_row(task, rows, expected):
    ids = task_per_row(task, rows)
    assert ids.dtype == torch.int64
    assert ids.tolist() == expected


@pytest.mark.parametrize("task, rows", [((0, 1), 5), ((), 4), (torch.tensor([0, 1]), 3), (torch.tensor(0), 1)])
def test_task_per_row_refuses_what_does_not_fit(task, rows):
    with pytest.raises(ValueError, match=r"^task: "):
        task_per_row(task, rows)


def test_dense_weights_put_each_weight_under_its_expert():
    assert sparse_routing().dense_weights().tolist() == [[0.25, 0.0, 0.5], [0.0, 0.75, 0.125]]


def test_dense_weights_carry_the_gradient_back():
    weights = torch.rand(2, 2, requires_grad=True)
    cotangent = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad(sparse_routing(weights=weights).dense_weights(), weights, cotangent)
    assert torch.equal(grad, cotangent.gather(1, torch.tensor([[2, 0], [1, 2]])))


def test_dense_mixture_is_its_own_dense_weights():
    logits = torch.tensor([[0.0, -1.0, 1.0]])
    routing = Routing(logits.softmax(-1), None, logits, 0)
    assert routing.dense_weights() is routing.weights
    assert routing.k == routing.num_experts == 3


def test_sizes_probabilities_and_ids():
    routing = sparse_routing()
    assert (routing.k, routing.num_experts) == (2, 3)
    assert routing.task_ids().tolist() == [1, 0]
    assert torch.equal(routing.probs(), routing.logits.softmax(-1))
    with pytest.raises(ValueError, match=r"^routing.task is None"):
        sparse_routing(task=None).task_ids()
