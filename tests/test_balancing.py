"""Balancers against numbers worked out by hand, and the contract over all of them."""

import copy
import math

import pytest
import torch

from moe_mtl.balancing import BALANCERS, Equal, Uncertainty, create_balancer
from moe_mtl.tasks import Task

# "get" is also the name of a method of nn.ParameterDict: a balancer must not trip over it
TASKS = (Task.depth("depth"), Task.segmentation("get", 3, weight=0.5), Task.regression("count"))


def random_losses(names=("depth", "get", "count")):
    return {name: torch.rand((), requires_grad=True) + 0.1 for name in names}


def moved(balancer):
    """The balancer with its parameters away from their initial values."""
    with torch.no_grad():
        for parameter in balancer.parameters():
            parameter.normal_()
    return balancer


def test_equal_by_hand():
    # 1 * 2 + 0.5 * 3 + 1 * 4 = 7.5; without the segmentation 6
    losses = {"depth": torch.tensor(2.0), "get": torch.tensor(3.0), "count": torch.tensor(4.0)}
    assert Equal(TASKS)(losses).item() == 7.5
    del losses["get"]
    assert Equal(TASKS)(losses).item() == 6.0


def test_uncertainty_by_hand():
    balancer = Uncertainty(TASKS)
    losses = {"depth": torch.tensor(2.0), "get": torch.tensor(3.0)}
    # s = 0. Gaussian: 2 / 2 = 1. Softmax: 3, times weight 0.5 = 1.5
    assert balancer(losses).item() == pytest.approx(2.5)
    with torch.no_grad():
        balancer.log_variance["of_depth"].fill_(math.log(2))
        balancer.log_variance["of_get"].fill_(math.log(4))
    # Gaussian: 2 / (2 * 2) + ln 2 / 2 = 0.5 + 0.346574. Softmax: 0.5 * (3 / 4 + ln 4 / 2) = 0.5 * (0.75 + 0.693147)
    assert balancer(losses).item() == pytest.approx(0.846574 + 0.721574, abs=1e-5)
    # 1 / (2 * 2); 0.5 / 4; untouched: 1 / 2
    assert balancer.factors() == pytest.approx({"depth": 0.25, "get": 0.125, "count": 0.5})


def test_uncertainty_best_s_makes_every_loss_count_one_half():
    balancer = Uncertainty(TASKS)
    losses = {"depth": torch.tensor(0.3), "get": torch.tensor(1.7)}
    with torch.no_grad():  # d/ds: -L / (2 e^s) + 1/2 = 0 at e^s = L; -L / e^s + 1/2 = 0 at e^s = 2 L
        balancer.log_variance["of_depth"].fill_(math.log(0.3))
        balancer.log_variance["of_get"].fill_(math.log(2 * 1.7))
    balancer(losses).backward()
    assert balancer.log_variance["of_depth"].grad.abs() < 1e-6
    assert balancer.log_variance["of_get"].grad.abs() < 1e-6
    factors = balancer.factors()
    assert factors["depth"] * 0.3 == pytest.approx(0.5)
    assert factors["get"] * 1.7 == pytest.approx(0.5 * 0.5)  # times its weight


def test_uncertainty_leaves_absent_tasks_alone():
    balancer = Uncertainty(TASKS)
    optimizer = torch.optim.AdamW(balancer.parameters(), lr=0.1, weight_decay=0.0)
    for names in (("depth", "get", "count"), ("depth",), ("depth",)):
        before = {name: s.item() for name, s in balancer.log_variance.items()}
        optimizer.zero_grad()
        balancer({name: torch.tensor(5.0) for name in names}).backward()
        optimizer.step()
    changed = {name for name, s in balancer.log_variance.items() if s.item() != before[name]}
    assert changed == {"of_depth"}


def test_uncertainty_follows_the_scale_of_a_loss():
    # after training, factor * loss is 1/2 whatever the unit of the loss
    balancer = Uncertainty(TASKS)
    optimizer = torch.optim.AdamW(balancer.parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(400):
        optimizer.zero_grad()
        balancer({"depth": torch.tensor(20.0), "count": torch.tensor(0.02)}).backward()
        optimizer.step()
    factors = balancer.factors()
    assert factors["depth"] * 20.0 == pytest.approx(0.5, rel=0.02)
    assert factors["count"] * 0.02 == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("name", BALANCERS)
def test_factors_are_the_gradient(name):
    balancer = moved(create_balancer(name, TASKS))
    losses = random_losses()
    gradients = torch.autograd.grad(balancer(losses), list(losses.values()))
    factors = balancer.factors()
    for task, gradient in zip(losses, gradients, strict=True):
        assert gradient.item() == pytest.approx(factors[task], rel=1e-5)
        assert gradient.item() > 0


@pytest.mark.parametrize("name", BALANCERS)
def test_order_of_the_losses_does_not_matter_and_weight_scales(name):
    balancer = moved(create_balancer(name, TASKS))
    losses = random_losses()
    backwards = dict(reversed(losses.items()))
    assert balancer(losses).item() == pytest.approx(balancer(backwards).item(), rel=1e-6)
    without = balancer({k: v for k, v in losses.items() if k != "get"})
    # "get" has weight 0.5: with weight 1 its share of the total is twice as large
    heavier = create_balancer(name, (TASKS[0], Task.segmentation("get", 3), TASKS[2]))
    heavier.load_state_dict(balancer.state_dict())
    assert (heavier(losses) - without).item() == pytest.approx(2 * (balancer(losses) - without).item(), rel=1e-4)


@pytest.mark.parametrize("name", [name for name, kind in BALANCERS.items() if kind.affine])
def test_affine_ones_may_be_accumulated(name):
    balancer = moved(create_balancer(name, TASKS))
    one, two = random_losses(), random_losses()
    mixed = {task: 0.3 * one[task] + 0.7 * two[task] for task in one}
    assert balancer(mixed).item() == pytest.approx(0.3 * balancer(one).item() + 0.7 * balancer(two).item(), rel=1e-5)


@pytest.mark.parametrize("name", BALANCERS)
def test_a_restored_balancer_continues_the_same_sequence(name):
    def advance(balancer, optimizer, steps):
        totals = []
        for step in range(steps):
            total = balancer({task: torch.tensor(1.0 + i + step) for i, task in enumerate(("depth", "get", "count"))})
            totals.append(total.item())
            if optimizer is not None:
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
        return totals

    def make():
        balancer = create_balancer(name, TASKS)
        parameters = list(balancer.parameters())
        return balancer, torch.optim.AdamW(parameters, lr=0.1) if parameters else None

    balancer, optimizer = make()
    advance(balancer, optimizer, 3)
    other, other_optimizer = make()
    other.load_state_dict(balancer.state_dict())
    if optimizer is not None:
        other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else both share moments
    assert advance(other, other_optimizer, 3) == advance(balancer, optimizer, 3)


@pytest.mark.parametrize("name", BALANCERS)
def test_refuses_unknown_and_no_losses(name):
    balancer = create_balancer(name, TASKS)
    with pytest.raises(ValueError, match="unknown task 'dept'; did you mean 'depth'"):
        balancer({"dept": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="got none"):
        balancer({})


def test_unknown_balancer_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'uncertainty'"):
        create_balancer("uncertanty", TASKS)
