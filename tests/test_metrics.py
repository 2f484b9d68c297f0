"""Metrics by hand, accumulation over batches and processes, masks, and the two conventions of multi-task gain."""

import itertools
import math
import statistics

import pytest
import torch
from torchmetrics.utilities import dim_zero_cat

from moe_mtl.bio import best_tags
from moe_mtl.metrics import (
    ANGLE_BIN,
    METRICS,
    R2,
    EdgeF,
    LogLoss,
    MaxF,
    MetricInfo,
    RelError,
    dilate,
    metric_info,
)
from moe_mtl.scoring import TaskMetrics, multi_task_gain
from moe_mtl.tasks import KINDS, Task

NAN = float("nan")


def task_for(metric: str, kind: str, **args) -> Task:
    """A task of that kind with that metric alone."""
    channels = {"classification": 4, "multilabel": 3, "segmentation": 4, "tagging": 5, "normals": 3}.get(kind, 1)
    if kind == "classification" and metric in ("auc", "average_precision", "grouped_auc"):
        channels = 2
    loss = {"classification": "cross_entropy", "segmentation": "cross_entropy", "normals": "cosine"}.get(kind, "l1")
    classes = ("O", "B-x", "I-x", "B-y", "I-y") if kind == "tagging" else ()
    loss = "cross_entropy" if kind == "tagging" else loss
    return Task(name="t", kind=kind, channels=channels, loss=loss, metrics={metric: args}, classes=classes)


def score(task: Task, *batches: tuple[torch.Tensor, torch.Tensor | None]) -> dict[str, float]:
    """The task's metrics over the batches."""
    metrics = TaskMetrics([task])
    for prediction, target in batches:
        metrics.update({task.name: prediction}, {task.name: target})
    return metrics.compute()[task.name]


def make_target(task: Task, b: int = 24, size: int = 12) -> torch.Tensor:
    """A target without missing labels; every label, and every map, has both positives and negatives."""
    hw = (size, size)
    match task.kind:
        case "classification":
            return torch.arange(b) // 3 % task.channels
        case "binary":
            return (torch.arange(b) // 3 % 2).float()
        case "multilabel":
            return (torch.arange(b)[:, None] // (1 + torch.arange(task.channels)) % 2).float()
        case "regression":
            return torch.rand(b) + 1.0
        case "tagging":
            logits = torch.randn(b, task.channels, size)
            return best_tags(logits, torch.ones(b, size, dtype=torch.bool), task.classes)
        case "segmentation":
            return torch.randint(0, task.channels, (b, *hw))
        case "depth":
            return torch.rand(b, *hw) + 1.0
        case "normals":
            return torch.nn.functional.normalize(torch.randn(b, 3, *hw), dim=1)
        case "binary_map":
            return (torch.rand(b, *hw) < 0.1).float()


def perfect(task: Task, target: torch.Tensor) -> torch.Tensor:
    """The prediction that is right everywhere."""
    sure = 60 if "log_loss" in task.metrics else 9
    if task.kind in ("classification", "segmentation", "tagging"):
        return torch.nn.functional.one_hot(target, task.channels).float().movedim(-1, 1) * sure
    if task.kind in ("binary", "multilabel", "binary_map"):
        return (target - 0.5) * sure
    return target.clone()


def noisy(task: Task, target: torch.Tensor) -> torch.Tensor:
    """A prediction that is partly right."""
    truth = perfect(task, target)
    scale = 1.0 if task.kind in ("depth", "regression", "normals") else 2.5  # logits are forgiving
    return truth + scale * truth.std() * torch.randn_like(truth)


IDEAL = {name: 1.0 if info.higher_is_better else 0.0 for name, info in METRICS.items()}
# what holds of every metric for every kind of task it scores; grouped_auc needs groups, see test_ranking_metrics.py
every_metric = pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name, info in METRICS.items() if name != "grouped_auc" for kind in sorted(info.kinds)],
)


# --- the register ---------------------------------------------------------------------------------------------------


def test_every_metric_a_task_constructor_names_exists_and_fits():
    tasks = [
        Task.classification("a", 3),
        Task.binary("i"),
        Task.multilabel("b", 3),
        Task.regression("c"),
        Task.tagging("j", ["O", "B-x", "I-x"]),
        Task.segmentation("d", 3),
        Task.depth("e"),
        Task.normals("f"),
        Task.binary_map("g"),
        Task.binary_map("h", metric="edge_f"),
    ]
    TaskMetrics(tasks)
    assert {task.kind for task in tasks} == KINDS
    assert set().union(*(info.kinds for info in METRICS.values())) == KINDS


def test_directions_and_descriptions():
    lower = {"abs_error", "rel_error", "rmse", "angle_mean", "angle_median", "log_loss"}
    assert {name for name, info in METRICS.items() if not info.higher_is_better} == lower
    assert all(
        len(info.description) > 10 and info.unit in ("share", "label", "degree", "nat", "") for info in METRICS.values()
    )


def test_a_metric_of_ones_own_can_be_registered(monkeypatch):
    info = MetricInfo(lambda task, **args: RelError(), False, "share", frozenset({"depth"}), "relative error, again")
    monkeypatch.setitem(METRICS, "mine", info)
    assert score(Task.depth(metrics={"mine": {}}), (torch.ones(1, 1, 1), torch.full((1, 1, 1), 2.0))) == {"mine": 0.5}


# --- contracts over every metric ------------------------------------------------------------------------------------


@every_metric
def test_perfect_is_ideal_and_constant_is_not(name, kind):
    task = task_for(name, kind)
    target = make_target(task)
    tolerance = ANGLE_BIN if name == "angle_median" else 1e-6
    assert score(task, (perfect(task, target), target))[name] == pytest.approx(IDEAL[name], abs=tolerance)
    constant = torch.full_like(perfect(task, target), 0.7)
    assert abs(score(task, (constant, target))[name] - IDEAL[name]) > 0.05


@every_metric
def test_batches_accumulate_to_the_whole_set(name, kind):
    task = task_for(name, kind)
    target = make_target(task)
    prediction = noisy(task, target)
    whole = score(task, (prediction, target))[name]
    parts = score(task, *((prediction[i:j], target[i:j]) for i, j in ((0, 1), (1, 4), (4, 24))))[name]
    assert parts == pytest.approx(whole, rel=1e-9)
    assert whole != pytest.approx(IDEAL[name], abs=1e-3)  # a trivial value would prove nothing


@every_metric
def test_unlabelled_samples_and_batches_change_nothing(name, kind):
    task = task_for(name, kind)
    target = make_target(task)
    prediction = noisy(task, target)
    missing = torch.stack([task.missing(t) for t in target])
    padded = (torch.cat([prediction, noisy(task, target)]), torch.cat([target, missing]))
    alone = score(task, (prediction, target))
    assert score(task, padded, (prediction, None), (prediction, missing)) == pytest.approx(alone, rel=1e-12)


@every_metric
def test_unlabelled_entries_change_nothing(name, kind):
    task = task_for(name, kind)
    target = make_target(task)
    prediction = noisy(task, target)
    blank = target.clone()
    if target.ndim == 1:
        blank[:7] = task.missing(target[0])  # shares of 17 and of 24 differ
    else:
        blank[..., ::2] = task.missing(target)[..., ::2]
    labelled = task.valid(blank)
    labelled = labelled if labelled.ndim == prediction.ndim else labelled.unsqueeze(1)
    other = torch.where(labelled, prediction, noisy(task, target))
    assert not torch.equal(other, prediction)
    assert score(task, (other, blank)) == score(task, (prediction, blank))
    assert score(task, (prediction, blank)) != score(task, (prediction, target))


@every_metric
def test_no_label_at_all_is_nan(name, kind):
    task = task_for(name, kind)
    target = make_target(task)
    prediction = noisy(task, target)
    missing = torch.stack([task.missing(t) for t in target])
    assert math.isnan(score(task)[name])
    assert math.isnan(score(task, (prediction, None))[name])
    assert math.isnan(score(task, (prediction, missing))[name])


@every_metric
def test_two_processes_sum_their_states(name, kind):
    # what each process would gather: its own state and the other's, in the order torchmetrics asks for them
    task = task_for(name, kind)
    target = make_target(task)
    prediction = noisy(task, target)
    ranks = [metric_info(name).factory(task) for _ in range(2)]
    for metric, rows in zip(ranks, (slice(0, 2), slice(2, 24)), strict=True):
        metric.update(prediction[rows], target[rows], task.valid(target[rows]))
    states = [getattr(ranks[1], state) for state in ranks[1]._reductions]
    theirs = iter([dim_zero_cat(state) if isinstance(state, list) else state for state in states])
    ranks[0].distributed_available_fn = lambda: True
    ranks[0].dist_sync_fn = lambda mine, group=None: [mine, next(theirs)]
    assert ranks[0].compute().item() == pytest.approx(score(task, (prediction, target))[name], rel=1e-9)
    assert next(theirs, None) is None


def test_every_compute_takes_part_in_the_exchange():
    # a process that got no label since the last compute must still send its states, or the others wait for ever
    metrics = TaskMetrics([Task.depth(metrics={"rmse": {}})])
    rmse = metrics._metrics["depth"]["rmse"]
    sent = []
    rmse.distributed_available_fn = lambda: True
    rmse.dist_sync_fn = lambda mine, group=None: sent.append(mine) or [mine]
    for calls in (1, 2):
        assert math.isnan(metrics.compute()["depth"]["rmse"])
        assert len(sent) == calls * len(rmse.metric_state)


@every_metric
def test_half_precision_and_gradients_do_not_matter(name, kind):
    task = task_for(name, kind)
    target = make_target(task)
    prediction = noisy(task, target).bfloat16()
    half = score(task, (prediction.requires_grad_(), target))[name]
    assert half == pytest.approx(score(task, (prediction.detach().float(), target))[name], rel=1e-6)


# --- by hand --------------------------------------------------------------------------------------------------------


def test_accuracy_by_hand():
    # right, wrong, unlabelled, right: 2 of 3
    logits = torch.tensor([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0], [0.0, 1.0]])
    task = Task.classification("scene", 2)
    assert score(task, (logits, torch.tensor([0, 1, -100, 1]))) == {"accuracy": pytest.approx(2 / 3)}


def test_binary_accuracy_by_hand():
    # entries: right, wrong / unlabelled, right -> 2 of 3; logit 0 counts as no
    logits, labels = torch.tensor([[1.0, 1.0], [9.0, 0.0]]), torch.tensor([[1.0, 0.0], [NAN, 0.0]])
    assert score(Task.multilabel("tags", 2), (logits, labels)) == {"binary_accuracy": pytest.approx(2 / 3)}


def test_binary_accuracy_of_one_logit_a_sample():
    # right, wrong, unlabelled
    task = Task.binary("click", metrics={"binary_accuracy": {}})
    assert score(task, (torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, NAN]))) == {"binary_accuracy": 0.5}


LN = math.log


def test_log_loss_of_binary_labels_by_hand():
    # odds 3 to 1 on: the probability of yes is 3/4 for logit ln 3, 1/4 for -ln 3
    # yes at 3/4, no at 3/4, no at 1/4, unlabelled: -(ln 3/4 + ln 1/4 + ln 3/4) / 3
    task = Task.binary("click", metrics={"log_loss": {}})
    logits, labels = torch.tensor([LN(3), LN(3), -LN(3), 5.0]), torch.tensor([1.0, 0.0, 0.0, NAN])
    expected = (2 * LN(4 / 3) + LN(4)) / 3
    assert score(task, (logits, labels))["log_loss"] == pytest.approx(expected, rel=1e-6)
    # pooled: the batches of one and two samples have means ln 4/3 and (ln 4 + ln 4/3) / 2, which weigh 1 to 2
    parts = score(task, (logits[:1], labels[:1]), (logits[1:], labels[1:]))
    assert parts["log_loss"] == pytest.approx(expected, rel=1e-6)


def test_log_loss_of_one_class_alone_is_defined():
    task = Task.binary("click", metrics={"log_loss": {}})
    assert score(task, (torch.zeros(2), torch.ones(2)))["log_loss"] == pytest.approx(LN(2))


def test_log_loss_of_classes_by_hand():
    # logits ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8. Labels 2, 0 and none: (ln 8/5 + ln 8) / 2
    task = Task.classification("income", 3, metrics={"log_loss": {}})
    logits = torch.tensor([[LN(1), LN(2), LN(5)]]).repeat(3, 1)
    expected = (LN(8 / 5) + LN(8)) / 2
    assert score(task, (logits, torch.tensor([2, 0, -100])))["log_loss"] == pytest.approx(expected, rel=1e-6)
    other = Task.classification("income", 3, metrics={"log_loss": {}}, ignore_index=255)
    assert score(other, (logits, torch.tensor([2, 0, 255])))["log_loss"] == pytest.approx(expected, rel=1e-6)


def test_log_loss_of_several_labels_is_their_mean():
    # label 0: yes at 3/4 twice -> ln 4/3. label 1: no at 3/4 once, once unlabelled -> ln 4. label 2: never labelled
    # mean over two labels (ln 4/3 + ln 4) / 2; pooled over the entries it would be (2 ln 4/3 + ln 4) / 3
    task = Task.multilabel("tags", 3, metrics={"log_loss": {}})
    labels = torch.tensor([[1.0, 0.0, NAN], [1.0, NAN, NAN]])
    result = score(task, (torch.full((2, 3), LN(3)), labels))
    assert result["log_loss"] == pytest.approx((LN(4 / 3) + LN(4)) / 2, rel=1e-6)


def test_log_loss_of_a_confident_mistake_is_its_logit():
    # -ln sigmoid(-200) = 200 + ln(1 + e^-200); the probability itself is 0 in float32. And e^-40 is not lost beside 1
    task = Task.binary("click", metrics={"log_loss": {}})
    assert score(task, (torch.tensor([200.0]), torch.zeros(1)))["log_loss"] == pytest.approx(200.0)
    assert score(task, (torch.tensor([40.0]), torch.ones(1)))["log_loss"] == pytest.approx(math.exp(-40), rel=1e-6)


def test_log_loss_of_a_label_between_no_and_yes():
    # a label of 1/4 at probability 3/4: -(1/4 ln 3/4 + 3/4 ln 1/4)
    metric = LogLoss()
    metric.update(torch.tensor([LN(3)]), torch.tensor([0.25]), torch.tensor([True]))
    assert metric.compute().item() == pytest.approx(LN(4 / 3) / 4 + 3 * LN(4) / 4, rel=1e-6)


def explained(prediction: list, target: list, **task) -> float:
    """r2 of a regression task, in batches of two."""
    prediction, target = torch.tensor(prediction), torch.tensor(target)
    task = Task.regression("t", metrics={"r2": {}}, **task)
    return score(task, *zip(prediction.split(2), target.split(2), strict=True))["r2"]


def test_r2_by_hand():
    # labels 1 2 6 -, mean 3, squares about it 4 + 1 + 9 = 14; predictions 1 3 4: squared errors 0 + 1 + 4 = 5
    assert explained([1.0, 3.0, 4.0, 9.0], [1.0, 2.0, 6.0, NAN]) == pytest.approx(9 / 14)
    # the mean label explains nothing; 6 has squared errors 25 + 16 + 0 = 41
    assert explained([3.0] * 3, [1.0, 2.0, 6.0]) == pytest.approx(0.0)
    assert explained([6.0] * 3, [1.0, 2.0, 6.0]) == pytest.approx(1 - 41 / 14)


def test_r2_of_several_values_is_their_mean():
    # value 0: 9/14 as above. value 1: labels 0 2 -, squares 2, predictions 0 1: error 1 -> 1/2. value 2: all labels
    # equal, left out. (9/14 + 1/2) / 2
    prediction = [[1.0, 0.0, 1.0], [3.0, 1.0, 2.0], [4.0, 7.0, 3.0]]
    target = [[1.0, 0.0, 0.1], [2.0, 2.0, 0.1], [6.0, NAN, 0.1]]
    assert explained(prediction, target, num_values=3) == pytest.approx((9 / 14 + 1 / 2) / 2)


@pytest.mark.parametrize("labels", [[0.1] * 7, [5.0], [0.1] * 3 + [NAN]])
def test_r2_of_labels_that_are_all_equal_is_nan(labels):
    assert math.isnan(explained([0.3] * len(labels), labels))
    metric = R2()
    metric.update(torch.zeros(7), torch.full((7,), 0.1, dtype=torch.float64), torch.ones(7).bool())
    assert metric.moments[2].item() != 0  # seven times 0.1 is not 0.7: a variance of 1e-33, a share of minus 1e31
    assert math.isnan(metric.compute().item())


def test_r2_counts_what_the_mask_says():
    # the first example with a label the mask leaves out
    metric = R2()
    prediction, target = torch.tensor([1.0, 3.0, 4.0, 9.0]), torch.tensor([1.0, 2.0, 6.0, -50.0])
    metric.update(prediction, target, torch.tensor([True, True, True, False]))
    assert metric.compute().item() == pytest.approx(9 / 14)


def test_r2_of_labels_far_from_zero():
    # as labels 0 1 2 3: squares 5, squared errors 4 * 1/4 -> 1 - 1/5; sums of y and of y^2 would lose them all
    far = [1e8 + i for i in range(4)]
    metric = R2()
    for y in far:  # one sample a batch
        y = torch.tensor([y], dtype=torch.float64)
        metric.update(y + 0.5, y, torch.tensor([True]))
    assert metric.compute().item() == pytest.approx(0.8, rel=1e-9)


def test_an_empty_batch_changes_nothing():
    task = Task.regression("t", metrics={"r2": {}, "rmse": {}})
    batch = (torch.tensor([1.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 6.0]))
    empty = (torch.zeros(0), torch.zeros(0))
    assert score(task, empty, batch, empty) == score(task, batch)


def as_logits(ids: list[int], classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor([[ids]]), classes).float().movedim(-1, 1)


def test_miou_and_pixel_accuracy_by_hand():
    # labels    0 0 0 1 1 ignored      class 0: hit 2, union 3 + 2 - 2 = 3 -> 2/3
    # predicted 0 0 1 1 3 0            class 1: hit 1, union 2 + 2 - 1 = 3 -> 1/3
    # class 2 is nowhere: left out. class 3 is predicted only: union 1, 0. mIoU = (2/3 + 1/3 + 0) / 3 = 1/3
    # pixels: 3 of the 5 labelled are right
    task = Task.segmentation("semseg", 4)
    result = score(task, (as_logits([0, 0, 1, 1, 3, 0], 4), torch.tensor([[[0, 0, 0, 1, 1, -100]]])))
    assert result == {"miou": pytest.approx(1 / 3), "pixel_accuracy": pytest.approx(3 / 5)}
    assert list(result) == list(task.metrics)  # the headline stays first


def test_miou_is_of_the_set_not_the_mean_over_batches():
    # batch 1: all four pixels are 0 and predicted 0 -> IoU 1.
    # batch 2: labels 1 1, predicted 1 0 -> IoU of 1 is 1/2, of 0 is 0/1 -> 1/4. Mean over batches 5/8.
    # set: class 0 hit 4, union 4 + 5 - 4 = 5; class 1 hit 1, union 2 -> (4/5 + 1/2) / 2 = 0.65
    task = Task.segmentation("semseg", 2)
    batches = [
        (as_logits([0, 0, 0, 0], 2), torch.tensor([[[0, 0, 0, 0]]])),
        (as_logits([1, 0], 2), torch.tensor([[[1, 1]]])),
    ]
    assert score(task, *batches)["miou"] == pytest.approx(0.65)
    assert statistics.mean(score(task, batch)["miou"] for batch in batches) == pytest.approx(5 / 8)


DEPTH = Task.depth(metrics={"abs_error": {}, "rel_error": {}, "rmse": {}, "delta_1": {}})


def test_depth_errors_by_hand():
    # labels 2 4 1 -, predictions 3 2 1.2 9: differences 1, -2, 0.2
    # abs (1 + 2 + 0.2)/3; rel (1/2 + 2/4 + 0.2)/3 = 0.4; rmse sqrt((1 + 4 + 0.04)/3); ratios 1.5, 2, 1.2 -> 1/3
    result = score(DEPTH, (torch.tensor([[[3.0, 2.0, 1.2, 9.0]]]), torch.tensor([[[2.0, 4.0, 1.0, NAN]]])))
    expected = {"abs_error": 3.2 / 3, "rel_error": 0.4, "rmse": math.sqrt(5.04 / 3), "delta_1": 1 / 3}
    assert result == pytest.approx(expected, rel=1e-6)


def test_pixels_weigh_the_same_whatever_their_batch():
    # batch 1: one pixel, error 3. batch 2: three pixels, error 1. Pooled: abs 6/4, rmse sqrt(12/4) = sqrt 3;
    # the mean over batches would be 2 for both
    one = (torch.tensor([[[5.0, 1.0, 1.0]]]), torch.tensor([[[2.0, NAN, NAN]]]))
    three = (torch.tensor([[[3.0, 3.0, 3.0]]]), torch.tensor([[[2.0, 2.0, 2.0]]]))
    result = score(DEPTH, one, three)
    assert result["abs_error"] == pytest.approx(1.5)
    assert result["rmse"] == pytest.approx(math.sqrt(3))
    assert statistics.mean(score(DEPTH, batch)["rmse"] for batch in (one, three)) == pytest.approx(2.0)


def test_ratios_leave_out_labels_that_are_not_positive():
    # label 0 has no ratio: abs and rmse count it (errors 1 and 1), rel and delta_1 see the second pixel only;
    # a prediction below zero is off, although max(-1/2, 2/-1) < 1.25
    result = score(DEPTH, (torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[0.0, 2.0]]])))
    assert result == pytest.approx({"abs_error": 1.0, "rel_error": 0.5, "rmse": 1.0, "delta_1": 0.0})
    assert score(DEPTH, (torch.tensor([[[-1.0, 2.0]]]), torch.tensor([[[2.0, 2.0]]])))["delta_1"] == 0.5


def test_delta_1_is_symmetric_and_strict():
    # ratios 1.25 (not below), 1/1.25 (not below), 1.2, 1/1.2
    labels = torch.tensor([[[4.0, 5.0, 5.0, 6.0]]])
    assert score(DEPTH, (torch.tensor([[[5.0, 4.0, 6.0, 5.0]]]), labels))["delta_1"] == 0.5


def vectors(*columns: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor(columns).T.reshape(1, 3, 1, len(columns))


def at(degrees: float, length: float = 1.0) -> tuple[float, float, float]:
    return (length * math.cos(math.radians(degrees)), length * math.sin(math.radians(degrees)), 0.0)


def test_angles_by_hand():
    # 10, 20, 25, 40 and 180 degrees off the x axis (any length), one pixel unlabelled: mean 275/5, median 25,
    # within 11.25: 1/5, 22.5: 2/5, 30: 3/5
    prediction = vectors(at(10, 3.0), at(20, 0.1), at(25), at(40), at(180, 2.0), at(90))
    result = score(Task.normals(), (prediction, vectors(*[at(0)] * 5, (0.0, 0.0, 0.0))))
    expected = {"angle_mean": 55.0, "angle_median": 25.0, "within_11": 0.2, "within_22": 0.4, "within_30": 0.6}
    assert result == pytest.approx(expected, abs=0.005 + 1e-6)


def test_normals_whose_components_cancel_count():
    # (a, -a, 0) sums to zero but is a valid normal: 90 degrees off here, and the only pixel
    a = 0.5**0.5
    result = score(Task.normals(), (vectors((a, a, 0.0)), vectors((a, -a, 0.0))))
    assert result["angle_mean"] == pytest.approx(90.0)


def test_a_vector_of_length_zero_is_a_right_angle_off():
    result = score(Task.normals(), (vectors((0.0, 0.0, 0.0)), vectors(at(30))))
    assert result["angle_mean"] == pytest.approx(90.0)


def test_an_exact_prediction_is_zero_degrees_off():
    # the float32 dot product of a unit vector with itself misses 1 in the last bit, which acos makes 0.02 degrees
    target = make_target(Task.normals(), b=2, size=32)
    assert score(Task.normals(), (target * 3, target))["angle_mean"] < 1e-4


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_median_against_sorting(count):
    angles = [180 * x for x in torch.rand(count).tolist()]
    result = score(Task.normals(), (vectors(*map(at, angles)), vectors(*[at(0)] * count)))
    assert result["angle_median"] == pytest.approx(statistics.median(angles), abs=0.005 + 1e-4)


def test_thresholds_on_angles_are_strict_up_to_rounding():
    for metric, degrees in (("within_11", 11.25), ("within_22", 22.5), ("within_30", 30.0)):
        prediction = vectors(at(degrees - 0.001), at(degrees + 0.001))
        assert score(Task.normals(), (prediction, vectors(at(0), at(0))))[metric] == 0.5


# --- best F ---------------------------------------------------------------------------------------------------------


def logit(p: list[float]) -> torch.Tensor:
    return torch.logit(torch.tensor([[p]]))


def test_max_f_by_hand():
    # labels 1 1 0 0 - with probabilities 0.9 0.4 0.6 0.1 0.9, thresholds 1/4, 1/2, 3/4:
    #   1/4: predicted 3, hits 2 -> P 2/3, R 1   -> 1.3 * 2/3 / (0.3 * 2/3 + 1)   = 0.7222
    #   1/2: predicted 2, hits 1 -> P 1/2, R 1/2 -> 1.3 * 1/4 / (0.3 * 1/2 + 1/2) = 0.5
    #   3/4: predicted 1, hits 1 -> P 1,   R 1/2 -> 1.3 * 1/2 / (0.3 + 1/2)       = 0.8125, the best
    task = Task.binary_map("saliency", metrics={"max_f": {"thresholds": 3}})
    batch = (logit([0.9, 0.4, 0.6, 0.1, 0.9]), torch.tensor([[[1.0, 1.0, 0.0, 0.0, NAN]]]))
    assert score(task, batch)["max_f"] == pytest.approx(0.8125)
    equal = Task.binary_map("saliency", metrics={"max_f": {"thresholds": 3, "beta2": 1.0}})
    # with beta2 = 1: 0.8, 0.5, 2/3
    assert score(equal, batch)["max_f"] == pytest.approx(0.8)


def test_one_threshold_serves_the_whole_set():
    # each image alone is perfect at its own threshold (0.5 and 0.25); together: at 1/4 all of 0.4 0.3 pass,
    # batch 1: probabilities 0.8 0.4, labels 1 0; batch 2: 0.3 0.1, labels 1 0.
    #   1/4: predicted 3, hits 2: P 2/3, R 1 -> 0.8 (F1); 1/2: predicted 1, hit 1: P 1, R 1/2 -> 2/3
    task = Task.binary_map("m", metrics={"max_f": {"thresholds": 3, "beta2": 1.0}})
    batches = [(logit([0.8, 0.4]), torch.tensor([[[1.0, 0.0]]])), (logit([0.3, 0.1]), torch.tensor([[[1.0, 0.0]]]))]
    assert [score(task, batch)["max_f"] for batch in batches] == [1.0, 1.0]
    assert score(task, *batches)["max_f"] == pytest.approx(0.8)


def test_nothing_predicted_is_zero_and_no_positive_is_nan():
    task = Task.binary_map("m")
    nothing = torch.full((1, 2, 2), -20.0)
    assert score(task, (nothing, torch.ones(1, 2, 2)))["max_f"] == 0.0
    assert math.isnan(score(task, (nothing, torch.zeros(1, 2, 2)))["max_f"])


def test_a_probability_at_the_threshold_counts_as_predicted():
    # one threshold, 1/2: logit 0 passes, a hair below does not
    task = Task.binary_map("m", metrics={"max_f": {"thresholds": 1}})
    assert score(task, (torch.zeros(1, 1, 1), torch.ones(1, 1, 1)))["max_f"] == 1.0
    assert score(task, (torch.full((1, 1, 1), -1e-3), torch.ones(1, 1, 1)))["max_f"] == 0.0


def line(column: int, size: int = 24) -> torch.Tensor:
    image = torch.zeros(1, size, size)
    image[:, :, column] = 1.0
    return image


EDGES = Task.binary_map("edges", metric="edge_f")


def test_an_edge_one_pixel_off_matches_and_five_off_does_not():
    target = line(10)
    assert score(EDGES, ((line(10) - 0.5) * 9, target))["edge_f"] == 1.0
    assert score(EDGES, ((line(11) - 0.5) * 9, target))["edge_f"] == 1.0
    assert score(EDGES, ((line(12) - 0.5) * 9, target))["edge_f"] == 0.0
    assert score(EDGES, ((line(15) - 0.5) * 9, target))["edge_f"] == 0.0
    # half of the line right, the rest five off: P = R = 1/2
    half = torch.cat([line(10)[:, :12], line(15)[:, 12:]], dim=1)
    # the label's pixel in row 11 is matched, the one in row 12 too (its neighbour above): R = 13/24, P = 12/24
    assert score(EDGES, ((half - 0.5) * 9, target))["edge_f"] == pytest.approx(2 * 0.5 * 13 / 24 / (0.5 + 13 / 24))


def test_the_tolerance_grows_with_the_diagonal():
    # 0.1 of the diagonal of 24 x 24 (33.9) is 3.39 pixels: three off matches, four does not
    task = Task.binary_map("edges", metrics={"edge_f": {"tolerance": 0.1}})
    assert score(task, ((line(13) - 0.5) * 9, line(10)))["edge_f"] == 1.0
    assert score(task, ((line(14) - 0.5) * 9, line(10)))["edge_f"] == 0.0


def test_edge_f_against_thresholding_and_distances_one_by_one():
    # the definition, pixel pair by pixel pair and threshold by threshold
    size, radius, thresholds = 15, 2.3, 7
    target = (torch.rand(2, size, size) < 0.04).float()
    valid = torch.rand(2, size, size) < 0.9
    prediction = torch.randn(2, size, size)
    yx = torch.cartesian_prod(torch.arange(size), torch.arange(size)).double()
    near = torch.cdist(yx, yx) <= radius
    best = 0.0
    for i in range(1, thresholds + 1):
        found = (prediction.sigmoid() >= i / (thresholds + 1)) & valid
        real = (target > 0) & valid
        hits_p = hits_r = 0
        for p, r in zip(found.flatten(1), real.flatten(1), strict=True):
            hits_p += int((p & (near & r[None]).any(1)).sum())
            hits_r += int((r & (near & p[None]).any(1)).sum())
        precision, recall = hits_p / max(int(found.sum()), 1), hits_r / int(real.sum())
        best = max(best, 2 * precision * recall / max(precision + recall, 1e-9))
    metric = EdgeF(thresholds=thresholds, tolerance=radius / math.hypot(size, size))
    metric.update(prediction, target.masked_fill(~valid, NAN), valid)
    assert metric.compute().item() == pytest.approx(best)
    assert 0.1 < best < 0.95


@pytest.mark.parametrize("radius", [1.0, 1.5, 2.0, 3.7])
def test_dilation_is_a_disc(radius):
    point = torch.zeros(1, 11, 11)
    point[0, 5, 4] = 1.0
    y, x = torch.meshgrid(torch.arange(11) - 5, torch.arange(11) - 4, indexing="ij")
    assert torch.equal(dilate(point, radius)[0] > 0, y**2 + x**2 <= radius**2)


def test_dilation_at_borders_and_below_zero():
    assert dilate(torch.tensor([[[-3.0, -5.0], [-7.0, -4.0]]]), 1.0).tolist() == [[[-3.0, -3.0], [-3.0, -4.0]]]


def test_options_of_best_f_are_checked():
    for make in (lambda: EdgeF(thresholds=0), lambda: EdgeF(tolerance=1.5), lambda: MaxF(beta2=0.0)):
        with pytest.raises(ValueError, match="expected thresholds >= 1, beta2 > 0"):
            make()


# --- all tasks ------------------------------------------------------------------------------------------------------

ALL = [Task.segmentation("semseg", 4), Task.depth(), Task.normals(), Task.binary_map("saliency")]


def all_batches(n: int = 3):
    for _ in range(n):
        targets = {task.name: make_target(task, b=2) for task in ALL}
        yield {task.name: noisy(task, targets[task.name]) for task in ALL}, targets


def test_all_tasks_at_once_equal_each_metric_alone():
    # metrics of a task share their states; each must still read as if it were the only one
    batches = list(all_batches())
    metrics = TaskMetrics(ALL)
    for predictions, targets in batches:
        metrics.update(predictions, {"image": torch.zeros(2, 3, 12, 12), **targets})
        metrics.compute()  # in between must not disturb
    together = metrics.compute()
    assert list(together) == [task.name for task in ALL]
    for task in ALL:
        pairs = [(p[task.name], t[task.name]) for p, t in batches]
        for name in task.metrics:
            alone = Task(**{**task.to_dict(), "metrics": {name: {}}})
            assert together[task.name][name] == score(alone, *pairs)[name]
            assert isinstance(together[task.name][name], float)


def test_metrics_that_look_alike_after_a_batch_stay_apart():
    # after an exact batch all sums of errors are zero, so states cannot be told apart by value
    task = Task.binary_map("m", metrics={"max_f": {}, "edge_f": {}, "binary_accuracy": {}})
    exact = ((line(3) - 0.5) * 9, line(3))
    off = ((line(4) - 0.5) * 9, line(3))
    result = score(task, exact, off)
    # pixels: half of the lines hit -> P = R = 1/2, and 48 of 1152 pixels wrong; edges: all within a pixel
    assert result == pytest.approx({"max_f": 0.5, "edge_f": 1.0, "binary_accuracy": 1 - 48 / 1152})


def test_reset_forgets():
    (first, second) = all_batches(2)
    metrics = TaskMetrics(ALL)
    metrics.update(*first)
    before = metrics.compute()
    metrics.reset()
    assert all(math.isnan(value) for values in metrics.compute().values() for value in values.values())
    metrics.update(*second)
    only_second = TaskMetrics(ALL)
    only_second.update(*second)
    assert metrics.compute() == only_second.compute() != before


def test_absent_tasks_are_nan_and_leave_the_others_alone():
    predictions, targets = next(all_batches(1))
    metrics = TaskMetrics(ALL)
    metrics.update(predictions, {"depth": targets["depth"], "normals": None})  # no entry, None
    metrics.update({"depth": predictions["depth"]}, targets)  # the other tasks were not run
    result = metrics.compute()
    assert result["depth"] == pytest.approx(score(ALL[1], (predictions["depth"], targets["depth"])), rel=1e-12)
    assert all(math.isnan(v) for name in ("semseg", "normals", "saliency") for v in result[name].values())


@pytest.mark.parametrize("metric", METRICS)
def test_a_batch_without_samples_changes_nothing(metric):
    for kind in METRICS[metric].kinds:
        task = task_for(metric, kind, **({"by": "user"} if metric == "grouped_auc" else {}))
        target = make_target(task)
        metrics = TaskMetrics([task])
        values = []
        for rows in (slice(0, 0), slice(None), slice(0, 0)):
            users = torch.arange(len(target))[rows] % 2
            metrics.update({"t": perfect(task, target)[rows]}, {"t": target[rows], "user": users})
            values.append(metrics.compute()["t"][metric])
        assert math.isnan(values[0]) and values[1] == values[2], kind


def test_to_moves_the_states_and_chains():
    metrics = TaskMetrics(ALL)
    batches = list(all_batches(2))
    metrics.update(*batches[0])
    assert metrics.to("cpu") is metrics
    metrics.update(*batches[1])
    unmoved = TaskMetrics(ALL)
    for batch in batches:
        unmoved.update(*batch)
    assert metrics.compute() == unmoved.compute()
    assert metrics.to("meta").device.type == "meta"


def test_a_task_without_metrics_is_skipped():
    tasks = [Task.depth(), Task.classification("scene", 2, metrics={})]
    metrics = TaskMetrics(tasks)
    metrics.update({"scene": torch.zeros(1, 2)}, {"scene": torch.tensor([0])})
    assert list(metrics.compute()) == ["depth"]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Task.segmentation("semseg", 3, metrics={"mean_iou": {}}), "unknown 'mean_iou'; did you mean 'miou'"),
        (Task.depth(metrics={"rmsee": {}}), "did you mean 'rmse'"),
        (Task.depth(metrics={"miou": {}}), "does not fit task 'depth' of kind 'depth'; use abs_error"),
        (Task.binary_map("e", metrics={"edge_f": {"treshold": 3}}), "'edge_f' of task 'e' refuses .*treshold"),
    ],
)
def test_bad_metrics_are_refused(task, message):
    with pytest.raises(ValueError, match=message):
        TaskMetrics([task])


@pytest.mark.parametrize(
    ("predictions", "targets", "message"),
    [
        ({"dept": torch.ones(1, 2, 2)}, {}, "unknown task 'dept'; did you mean 'depth'"),
        ({"depth": torch.ones(1, 2, 2)}, {"depth": torch.ones(1, 4, 4)}, r"'depth' got shape \[1, 4, 4\]"),
        ({"depth": torch.full((1, 2, 2), NAN)}, {"depth": torch.ones(1, 2, 2)}, "'depth' has NaN"),
        ({"semseg": torch.ones(1, 3, 2, 2)}, {"semseg": torch.zeros(1, 2, 2).long()}, "expected 4 channels"),
        ({"semseg": torch.ones(1, 4, 2, 2)}, {"semseg": torch.full((1, 2, 2), 4)}, r"targets\['semseg'\].*0 to 3"),
        ({"depth": ([0], torch.ones(1, 2, 2))}, {"depth": torch.ones(1, 2, 2)}, r"predictions\['depth'\]: got a tuple"),
        ({"depth": torch.ones(1, 2, 2)}, {"depth": [[[1.0] * 2] * 2]}, r"targets\['depth'\]: got a list"),
    ],
)
def test_bad_batches_are_refused(predictions, targets, message):
    with pytest.raises(ValueError, match=message):
        TaskMetrics(ALL).update(predictions, targets)


# --- multi-task gain ------------------------------------------------------------------------------------------------

GAIN_TASKS = [
    Task.segmentation("semseg", 4, metrics={"miou": {}}),
    Task.normals(metrics={"angle_mean": {}, "within_11": {}}),
]
BASE = {"semseg": {"miou": 0.5, "pixel_accuracy": 0.9}, "normals": {"angle_mean": 20.0, "within_11": 0.4}}
NEW = {"semseg": {"miou": 0.6}, "normals": {"angle_mean": 22.0, "within_11": 0.38}}


def test_gain_by_hand_in_both_conventions():
    # semseg: (0.6 - 0.5)/0.5 = +20 %. normals: angle 2/20 up, which is worse: -10 %; within_11 -0.02/0.4 = -5 %;
    # task mean -7.5 %. delta_task = (20 - 7.5)/2 = 6.25. delta_metric = -(20 - 10 - 5)/3 = -5/3
    gain = multi_task_gain(NEW, BASE, GAIN_TASKS)
    assert gain["delta_task"] == pytest.approx(6.25)
    assert gain["delta_metric"] == pytest.approx(-5 / 3)
    assert gain["per_task"] == pytest.approx({"semseg": 20.0, "normals": -7.5})
    assert (gain["worst_task"], gain["worst_gain"], gain["tasks_worse"]) == ("normals", pytest.approx(-7.5), 1)
    assert gain["absolute"] == []


def test_the_conventions_can_disagree_in_sign():
    # task mean: semseg +4, normals -3 -> +0.5; metric mean: (4 - 3 - 3)/3 < 0, so delta_metric is positive (worse)
    new = {"semseg": {"miou": 0.52}, "normals": {"angle_mean": 20.6, "within_11": 0.388}}
    gain = multi_task_gain(new, BASE, GAIN_TASKS)
    assert gain["delta_task"] == pytest.approx(0.5)
    assert gain["delta_metric"] == pytest.approx(2 / 3)


def test_no_change_is_no_gain():
    gain = multi_task_gain(BASE, BASE, GAIN_TASKS)
    assert (gain["delta_task"], gain["delta_metric"], gain["tasks_worse"]) == (0.0, 0.0, 0)


@pytest.mark.parametrize(("metric", "direction"), [(n, 1 if i.higher_is_better else -1) for n, i in METRICS.items()])
def test_more_of_a_good_metric_is_a_gain(metric, direction):
    task = task_for(metric, min(METRICS[metric].kinds))
    gain = multi_task_gain({"t": {metric: 0.6}}, {"t": {metric: 0.5}}, [task])
    expected = 10 if metric == "r2" else direction * 20  # of a half, or a difference
    assert gain["delta_task"] == pytest.approx(expected)
    assert gain["delta_metric"] == pytest.approx(-expected)


def test_a_baseline_near_zero_is_compared_by_difference():
    # 100 * (0.03 - 0) for the share, and -100 * (0.5 - 0) for the angle
    new = {"semseg": {"miou": 0.03}, "normals": {"angle_mean": 0.5, "within_11": 0.4}}
    base = {"semseg": {"miou": 0.0}, "normals": {"angle_mean": 1e-9, "within_11": 0.4}}
    gain = multi_task_gain(new, base, GAIN_TASKS)
    assert gain["per_task"] == pytest.approx({"semseg": 3.0, "normals": -25.0})
    assert gain["absolute"] == ["semseg/miou", "normals/angle_mean"]


def test_variance_explained_is_compared_by_difference():
    task = Task.regression("t", metrics={"r2": {}, "rmse": {}})
    gain = multi_task_gain({"t": {"r2": 0.1, "rmse": 2.0}}, {"t": {"r2": -0.02, "rmse": 1.0}}, [task])
    assert gain["per_metric"]["t"] == pytest.approx({"r2": 12.0, "rmse": -100.0})
    assert gain["absolute"] == ["t/r2"]


def test_published_row_of_nyuv2():
    # LibMTL NYUv2, hard sharing: GLS against EW, all nine metrics; the task average is published as +1.82
    names = ["miou", "pixel_accuracy", "abs_error", "rel_error", "angle_mean", "angle_median"]
    names += ["within_11", "within_22", "within_30"]
    owner = dict(zip(names, ["semseg"] * 2 + ["depth"] * 2 + ["normals"] * 5, strict=True))
    rows = {
        "EW": [54.10, 75.78, 0.3771, 0.1596, 23.53, 17.20, 34.55, 60.75, 72.06],
        "GLS": [54.46, 76.01, 0.3793, 0.1566, 22.73, 16.16, 36.76, 62.94, 73.68],
    }
    results = {
        row: {
            task: {n: v for n, v in zip(names, values, strict=True) if owner[n] == task}
            for task in ("semseg", "depth", "normals")
        }
        for row, values in rows.items()
    }
    tasks = [
        Task.segmentation("semseg", 13),
        Task.depth(metrics={"abs_error": {}, "rel_error": {}}),
        Task.normals(),
    ]
    assert multi_task_gain(results["GLS"], results["EW"], tasks)["delta_task"] == pytest.approx(1.82, abs=0.005)


def test_what_is_missing_is_named():
    for which, keep in itertools.product(("results", "baseline"), ("task", "metric", "nan", "none")):
        broken = {task: dict(values) for task, values in NEW.items()}
        if keep == "task":
            del broken["normals"]
        elif keep == "metric":
            del broken["normals"]["within_11"]
        else:
            broken["normals"]["within_11"] = NAN if keep == "nan" else None  # as JSON has it
        results, base = (broken, BASE) if which == "results" else (NEW, broken)
        with pytest.raises(ValueError, match=rf"{which}: .*normals") as error:
            multi_task_gain(results, base, GAIN_TASKS)
        assert keep == "task" or "within_11" in str(error.value)


def test_tasks_without_metrics_are_refused():
    with pytest.raises(ValueError, match="lists a metric"):
        multi_task_gain(NEW, BASE, [Task.depth(metrics={})])
