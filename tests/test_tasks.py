"""Tasks and losses: hand-computed values, masks, shapes, label ranges, saving."""

import json
import math

import numpy as np
import pytest
import torch

from moe_mtl.losses import LOSS_KINDS, LOSSES
from moe_mtl.tasks import CLASS_KINDS, KINDS, Task, check_tasks, nearest

NAN = float("nan")

TASKS = {
    "classification": Task.classification("scene", 3),
    "multilabel": Task.multilabel("tags", 4),
    "binary": Task.binary("click"),
    "regression": Task.regression("age"),
    "tagging": Task.tagging("slots", ["O", "B-x", "I-x"]),
    "segmentation": Task.segmentation("semseg", 5),
    "depth": Task.depth(),
    "normals": Task.normals(),
    "binary_map": Task.binary_map("edges", metric="edge_f"),
}


def make_batch(task: Task, b: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """A random prediction and a fully labelled target."""
    hw, c = (6, 5), task.channels
    match task.kind:
        case "classification":
            return torch.randn(b, c), torch.randint(0, c, (b,))
        case "multilabel":
            return torch.randn(b, c), torch.randint(0, 2, (b, c)).float()
        case "binary":
            return torch.randn(b), torch.randint(0, 2, (b,)).float()
        case "regression":
            return torch.randn(b), torch.randn(b)
        case "tagging":
            return torch.randn(b, c, 7), torch.randint(0, c, (b, 7))
        case "segmentation":
            return torch.randn(b, c, *hw), torch.randint(0, c, (b, *hw))
        case "depth":
            return torch.rand(b, *hw) + 0.5, torch.rand(b, *hw) + 0.5
        case "normals":
            return tuple(torch.nn.functional.normalize(torch.randn(b, 3, *hw), dim=1) for _ in range(2))
        case "binary_map":
            return torch.randn(b, *hw), torch.randint(0, 2, (b, *hw)).float()


def test_every_kind_has_a_constructor():
    assert {task.kind for task in TASKS.values()} == KINDS == set(TASKS)


# --- losses by hand -------------------------------------------------------------------------------------------------


def test_cross_entropy_by_hand():
    # logits (ln 2, 0, 0): softmax = (2, 1, 1) / 4, so class 0 costs ln 2 and class 1 costs ln 4; mean 1.5 ln 2
    logits = torch.tensor([[math.log(2), 0.0, 0.0]]).repeat(2, 1)
    loss = TASKS["classification"].compute_loss(logits, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(1.5 * math.log(2))


def test_label_smoothing_by_hand():
    # smoothing 0.3 over 3 classes: target (0.8, 0.1, 0.1); -0.8 ln(1/2) - 0.2 ln(1/4) = (0.8 + 0.4) ln 2
    loss = LOSSES["cross_entropy"](torch.tensor([[math.log(2), 0.0, 0.0]]), torch.tensor([0]), label_smoothing=0.3)
    assert loss.item() == pytest.approx(1.2 * math.log(2))


def test_bce_by_hand():
    # logit ln 3: p = 3/4. Label 1 costs ln(4/3), label 0 costs ln 4; pos_weight 5 multiplies only the first
    logits, labels = torch.full((1, 2), math.log(3)), torch.tensor([[1.0, 0.0]])
    torch.testing.assert_close(LOSSES["bce"](logits, labels), torch.tensor([[math.log(4 / 3), math.log(4)]]))
    torch.testing.assert_close(
        LOSSES["bce"](logits, labels, pos_weight=5.0), torch.tensor([[5 * math.log(4 / 3), math.log(4)]])
    )


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("l1", {}, [0.5, 3.0]),  # differences 0.5 and -3
        ("mse", {}, [0.25, 9.0]),
        ("huber", {}, [0.125, 2.5]),  # 0.5 * 0.25 inside delta 1; 1 * (3 - 0.5) outside
        ("huber", {"delta": 2.0}, [0.125, 4.0]),  # 2 * (3 - 1)
    ],
)
def test_regression_losses_by_hand(name, args, expected):
    loss = LOSSES[name](torch.tensor([1.5, -2.0]), torch.tensor([1.0, 1.0]), **args)
    torch.testing.assert_close(loss, torch.tensor(expected))


def test_cosine_by_hand_and_length_does_not_matter():
    # angle between (1, 1, 0) and (1, 0, 0) is 45 degrees, to (-1, 0, 0) it is 135: 1 - cos = 1 -+ 1/sqrt 2
    prediction = torch.tensor([[1.0, 1.0, 0.0], [7.0, 7.0, 0.0]])
    target = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    torch.testing.assert_close(LOSSES["cosine"](prediction, target), torch.tensor([1 - 0.5**0.5, 1 + 0.5**0.5]))


def test_every_loss_gives_one_value_per_label():
    for task in TASKS.values():
        prediction, target = make_batch(task)
        per_element = LOSSES[task.loss](prediction, target, **task.loss_args)
        assert per_element.shape == task.valid(target).shape
        assert (per_element >= 0).all() and (per_element > 0).any()


# --- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_unlabelled_samples_change_neither_loss_nor_gradient(task):
    prediction, target = make_batch(task)
    extra, _ = make_batch(task)
    padded = torch.cat([target, torch.stack([task.missing(t) for t in target])])
    alone = prediction.clone().requires_grad_()
    both = torch.cat([prediction, extra]).requires_grad_()
    loss_alone, loss_both = task.compute_loss(alone, target), task.compute_loss(both, padded)
    (3.7 * loss_alone).backward()
    (3.7 * loss_both).backward()
    torch.testing.assert_close(loss_both, loss_alone)
    assert alone.grad.abs().max() > 0
    torch.testing.assert_close(both.grad[:4], alone.grad)
    assert torch.equal(both.grad[4:], torch.zeros_like(extra))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("start", ["random", "zero"])
def test_no_label_at_all_is_an_exact_zero_with_zero_gradient(task, start):
    prediction, target = make_batch(task)
    prediction = (prediction if start == "random" else torch.zeros_like(prediction)).requires_grad_()
    assert not task.valid(task.missing(target)).any()
    loss = task.compute_loss(prediction, task.missing(target))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))


def test_ignored_pixels_by_hand():
    # errors 1 and 3 are labelled, the third pixel is not: the mean is over two pixels, 2, not over three
    loss = TASKS["depth"].compute_loss(torch.tensor([[[1.0, 5.0, 99.0]]]), torch.tensor([[[2.0, 2.0, NAN]]]))
    assert loss.item() == 2.0


def test_valid_normals_are_those_with_a_length():
    # (a, -a, 0) sums to zero yet is a normal; zero and NaN vectors are missing, one NaN component is enough
    target = torch.tensor([[0.7, -0.7, 0.0], [0.0, 0.0, 0.0], [NAN, NAN, NAN], [1.0, NAN, 0.0]]).T.reshape(1, 3, 1, 4)
    assert TASKS["normals"].valid(target).tolist() == [[[True, False, False, False]]]
    loss = TASKS["normals"].compute_loss(torch.tensor([0.7, 0.7, 0.0]).reshape(1, 3, 1, 1).repeat(1, 1, 1, 4), target)
    assert loss.item() == pytest.approx(1.0)  # at right angles to the only labelled pixel


def test_a_custom_ignore_index_is_kept():
    task = Task.segmentation("semseg", 3, ignore_index=255)
    target = torch.tensor([[[0, 255]]])
    task.check_target(target)
    assert task.valid(target).tolist() == [[[True, False]]]
    assert task.missing(target[0]).tolist() == [[255, 255]]
    # uniform logits cost ln 3 on the labelled pixel
    assert task.compute_loss(torch.zeros(1, 3, 1, 2), target).item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_predictions_and_labels(task, dtype):
    prediction, target = make_batch(task)
    full = task.compute_loss(prediction, target)
    half = task.compute_loss(prediction.to(dtype), target.to(dtype) if target.is_floating_point() else target)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full.item(), rel=0.05)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_shape_that_does_not_fit_names_the_task(task):
    prediction, target = make_batch(task)
    with pytest.raises(ValueError, match=task.name):
        task.compute_loss(prediction, target[:-1])
    with pytest.raises(ValueError, match=task.name):
        task.compute_loss(prediction[..., None], target)


@pytest.mark.parametrize("kind", ["classification", "segmentation", "multilabel", "normals"])
def test_the_wrong_number_of_channels_is_refused(kind):
    task = TASKS[kind]
    prediction, target = make_batch(task)
    more = torch.cat([prediction, prediction], dim=1)
    with pytest.raises(ValueError, match=rf"{task.channels} channels on axis 1"):
        task.compute_loss(more, torch.cat([target, target], dim=1) if kind in ("multilabel", "normals") else target)


def test_logits_without_a_class_axis_are_refused():
    with pytest.raises(ValueError, match="3 channels on axis 1"):
        TASKS["classification"].compute_loss(torch.zeros(4), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("task", "target", "message"),
    [
        (TASKS["classification"], torch.tensor([0, 3]), r"0 to 2"),
        (TASKS["classification"], torch.tensor([-1, 2]), r"class ids -1 to 2"),
        (TASKS["classification"], torch.tensor([0.0, 1.0]), "int64"),
        (TASKS["binary_map"], torch.tensor([0.0, 255.0]), "0 to 1"),
        (TASKS["multilabel"], torch.tensor([[-0.5, 1.0]]), "0 to 1"),
        (TASKS["depth"], torch.tensor([1, 2]), "floating point"),
        (TASKS["depth"], torch.tensor([1.0, math.inf]), "infinite"),
    ],
)
def test_labels_out_of_range_are_refused(task, target, message):
    with pytest.raises(ValueError, match=message) as error:
        task.check_target(target, "train[7]")
    assert task.name in str(error.value) and "train[7]" in str(error.value)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_good_and_missing_labels_pass(task):
    _, target = make_batch(task)
    task.check_target(target)
    task.check_target(task.missing(target))
    assert task.valid(target).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "no spaces"}, "name"),
        ({"name": ""}, "name"),
        ({"kind": "segmentatoin"}, "did you mean 'segmentation'"),
        ({"loss": "cross_entrpy"}, "did you mean 'cross_entropy'"),
        ({"channels": 0}, "at least 1"),
        ({"classes": ("a", "b")}, "2 names for 3 channels"),
        ({"name": 3}, "name: task 3 got 3, expected a text"),
        ({"channels": 3.0}, "channels: task 'scene' got 3.0, expected .* whole number"),
        ({"channels": ["a", "b"]}, r"channels: task 'scene' got \['a', 'b'\]"),
        ({"weight": "1"}, "weight: task 'scene' got '1', expected a number"),
        ({"metrics": ["accuracy"]}, r"metrics: task 'scene' got \['accuracy'\], expected names with their arguments"),
        ({"metrics": {"accuracy": None}}, "metrics: task 'scene' got no arguments of accuracy; {} stands for none"),
        ({"loss_args": None}, "loss_args: task 'scene' got None"),
        ({"classes": "abc"}, "classes: task 'scene' got 'abc', expected a sequence"),
        ({"weight": -1.0}, "weight: task 'scene' has -1.0"),
        ({"weight": NAN}, "weight: task 'scene' has nan"),
        ({"kind": "regression", "loss": "mse", "mean": NAN}, "mean, std: .* nan and 1.0"),
        ({"kind": "regression", "loss": "mse", "std": math.inf}, "mean, std: .* 0.0 and inf"),
    ],
)
def test_bad_tasks_are_refused(kwargs, message):
    good = {"name": "scene", "kind": "classification", "channels": 3, "loss": "cross_entropy"}
    Task(**good)
    with pytest.raises(ValueError, match=message):
        Task(**good | kwargs)


def test_check_tasks():
    depth = TASKS["depth"]
    assert check_tasks([depth, TASKS["normals"]]) == (depth, TASKS["normals"])
    with pytest.raises(ValueError, match="got none"):
        check_tasks([])
    with pytest.raises(ValueError, match="duplicate"):
        check_tasks([depth, Task.regression("depth")])
    with pytest.raises(TypeError, match="'depth'"):
        check_tasks(["depth"])


def test_nearest():
    assert nearest("dept", ["depth", "normals"]) == "did you mean 'depth'? known: depth, normals"
    assert nearest("xyz", ["depth"]) == "known: depth"
    assert nearest("xyz", []) == "known: none"


# --- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task",
    [*TASKS.values(), Task.classification("s", 2, classes=["a", "b"], weight=0.5, loss_args={"label_smoothing": 0.1})],
    ids=lambda task: task.name,
)
def test_a_task_survives_json(task):
    again = Task.from_dict(json.loads(json.dumps(task.to_dict())))
    assert again == task
    prediction, target = make_batch(task)
    assert torch.equal(again.compute_loss(prediction, target), task.compute_loss(prediction, target))


def test_numbers_of_numpy_and_torch_are_saved_like_pythons():
    labels = np.array([0, 2, 1])
    task = Task.classification("scene", labels.max() + 1, classes=np.array(["a", "b", "c"]), weight=np.float32(0.5))
    assert task == Task.classification("scene", 3, classes=["a", "b", "c"], weight=0.5)
    assert Task.classification("scene", torch.tensor(labels).max() + 1, ignore_index=np.int64(9)).channels == 3
    prices = np.array([1.5, 2.5], dtype=np.float32)
    value = Task.regression("price", mean=prices.mean(), std=torch.tensor(0.5))
    assert value == Task.regression("price", mean=2.0, std=0.5)
    edges = Task.binary_map(
        "edges", loss_args={"pos_weight": np.float32(3)}, metrics={"max_f": {"beta2": np.float64(1)}}
    )
    for one in (task, value, edges):
        assert Task.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_constructors_take_overrides():
    task = Task.depth("inverse_depth", loss="huber", loss_args={"delta": 0.5}, weight=2.0)
    assert (task.name, task.loss, task.weight, task.kind) == ("inverse_depth", "huber", 2.0, "depth")
    # difference 3: 0.5 * (3 - 0.25); the weight belongs to the total, not to the task's own loss
    assert task.compute_loss(torch.tensor([[[4.0]]]), torch.tensor([[[1.0]]])).item() == pytest.approx(1.375)


@pytest.mark.parametrize("name", ["image", "text", "type", "train", "training", "_modules", "keys", "half"])
def test_names_that_inputs_or_modules_have_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}_task"):
        Task.classification(name, 3)


def test_unknown_loss_arguments_are_refused_at_once():
    with pytest.raises(ValueError, match="did you mean 'delta'"):
        Task.depth(loss="huber", loss_args={"detla": 1.0})


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_gives_one_value_per_label_or_is_refused(kind, loss):
    # as many samples as classes, rows and columns: what broadcasts would go unseen
    prediction, target = torch.rand(3, 3, 3, 3), torch.ones(3, 3, 3, 3)
    options = {"name": "t", "kind": kind, "channels": 3, "loss": loss}
    if kind not in LOSS_KINDS[loss]:
        with pytest.raises(ValueError, match=f"loss: '{loss}' does not fit task 't' of kind '{kind}'; use "):
            Task(**options)
        return
    task = Task(**options)
    axes = {"classification": 1, "tagging": 2, "segmentation": 3, "normals": 4, "binary": 1, "multilabel": 2}
    axes = axes.get(kind, 2 if kind == "regression" else 3)
    target = target[(0,) * (4 - axes)].to(torch.int64 if kind in CLASS_KINDS else torch.float32)
    prediction = prediction[(0,) * (4 - axes - (kind in CLASS_KINDS))]
    first, *rest = (float(task.compute_loss(prediction[i : i + 1], target[i : i + 1])) for i in range(3))
    assert task.compute_loss(prediction, target).item() == pytest.approx((first + sum(rest)) / 3)


def test_a_loss_of_ones_own_that_is_no_value_per_label_is_refused(monkeypatch):
    monkeypatch.setitem(LOSSES, "mine", lambda prediction, target: (prediction - target).square().mean())
    with pytest.raises(ValueError, match=r"loss: 'mine' of task 'age' gave shape \[\], expected .*\[2\]"):
        Task.regression("age", loss="mine").compute_loss(torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize("worst", [math.inf, NAN])
def test_what_is_predicted_where_there_is_no_label_reaches_neither_loss_nor_gradient(worst):
    for task in TASKS.values():
        prediction, target = make_batch(task)
        target[0] = task.missing(target[0])
        expected = task.compute_loss(prediction, target)
        prediction[0] = worst
        prediction.requires_grad_()
        loss = task.compute_loss(prediction, target)
        loss.backward()
        assert torch.equal(loss, expected) and prediction.grad[1:].isfinite().all(), task.kind
        assert not prediction.grad[0].any(), task.kind  # NaN would go on to weights that all samples share


def test_tasks_can_be_keys():
    assert {Task.depth(): 1}[Task.depth()] == 1
