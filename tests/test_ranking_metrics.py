"""Metrics of order by hand, against their definitions pair by pair, in batches, in groups and on two processes."""

import itertools
import math
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_mtl.metrics import METRICS, AveragePrecision, GroupedAUC, MetricInfo, metric_info
from moe_mtl.scoring import TaskMetrics
from moe_mtl.statistics import auc as array_auc
from moe_mtl.tasks import Task

NAN = float("nan")
BOTH = {"auc": {}, "average_precision": {}}
CLICK = Task.binary("click", metrics=BOTH)
GROUPED = Task.binary("click", metrics={"grouped_auc": {"by": "user"}})


def score(task: Task, *batches: tuple) -> dict[str, float]:
    """The task's metrics over batches (prediction, target) or (prediction, target, user), lists or tensors."""
    metrics = TaskMetrics([task])
    for prediction, target, *rest in batches:
        dtype = torch.int64 if task.kind == "classification" else torch.float32
        columns = {name: torch.as_tensor(ids) for name, ids in zip(["user"], rest, strict=False)}
        target = torch.as_tensor(target, dtype=dtype)
        metrics.update({task.name: torch.as_tensor(prediction, dtype=torch.float32)}, {task.name: target, **columns})
    return metrics.compute()[task.name]


def pairwise(target, scores) -> float:
    """AUC from its definition, one pair at a time."""
    won = [
        (p > n) + (p == n) / 2 for p, y in zip(scores, target, strict=True) if y == 1 for n in _of(target, scores, 0)
    ]
    return sum(won) / len(won) if won else NAN


def _of(target, scores, wanted) -> list:
    return [s for y, s in zip(target, scores, strict=True) if y == wanted]


def stepwise(target, scores) -> float:
    """Average precision from its definition, one threshold at a time: sum (R_n - R_(n-1)) P_n."""
    if len(set(target)) < 2:
        return NAN
    total, last = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        found = [y for y, s in zip(target, scores, strict=True) if s >= threshold]
        recall = sum(found) / sum(target)
        total += (recall - last) * sum(found) / len(found)
        last = recall
    return total


# --- by hand --------------------------------------------------------------------------------------------------------


def test_auc_and_average_precision_by_hand():
    # by score: 4 yes, 3 no, 2 yes, 1 no. Pairs: 4 beats both, 2 beats one of two -> 3/4.
    # precision at the positives: 1/1 and 2/3, mean 5/6
    result = score(CLICK, ([1.0, 2.0, 3.0, 4.0], [0, 1, 0, 1]))
    assert result == pytest.approx({"auc": 3 / 4, "average_precision": 5 / 6})


def test_ties_by_hand():
    # scores 2: yes no; 1: yes no no. Pairs, 2 * 3: the upper yes ties one and beats two, 2.5; the lower yes loses one
    # and ties two, 1 -> 3.5/6. Precision: at 2 1/2 (tied no included), at 1 2/5; recall rises by 1/2 each -> 0.45
    result = score(CLICK, ([2.0, 2.0, 1.0, 1.0, 1.0], [1, 0, 1, 0, 0]))
    assert result == pytest.approx({"auc": 3.5 / 6, "average_precision": 0.45})
    # all tied: chance, and the share of positives
    assert score(CLICK, ([7.0] * 5, [0, 1, 0, 0, 0])) == pytest.approx({"auc": 0.5, "average_precision": 0.2})
    # equal numbers of either sign
    assert score(CLICK, ([0.0, -0.0], [0, 1]))["auc"] == 0.5


def test_reversed_is_the_worst():
    # no above yes: no pair is won; precision 1/3 and 2/4 at the positives
    result = score(CLICK, ([4.0, 3.0, 2.0, 1.0], [0, 0, 1, 1]))
    assert result == pytest.approx({"auc": 0.0, "average_precision": (1 / 3 + 2 / 4) / 2})


def test_unlabelled_samples_do_not_rank():
    # the first example with a sample above all and one between, both unlabelled
    result = score(CLICK, ([9.0, 1.0, 2.0, 2.5, 3.0, 4.0], [NAN, 0, 1, NAN, 0, 1]))
    assert result == pytest.approx({"auc": 3 / 4, "average_precision": 5 / 6})


def test_batches_rank_against_each_other():
    # each batch alone is perfect; together yes 1, no 0 | yes 11, no 10: yes 1 loses against no 10 -> 3/4
    batches = ([1.0, 0.0], [1, 0]), ([11.0, 10.0], [1, 0])
    assert [score(CLICK, batch)["auc"] for batch in batches] == [1.0, 1.0]
    # precision at 11 1/1, at 1 2/3
    assert score(CLICK, *batches) == pytest.approx({"auc": 3 / 4, "average_precision": 5 / 6})


def test_sure_logits_keep_their_order():
    # a float32 sigmoid makes 1 of all of these
    assert score(CLICK, ([20.0, 30.0, 40.0, 50.0], [0, 1, 0, 1]))["auc"] == 0.75
    assert score(CLICK, ([-float("inf"), -float("inf"), 0.0, float("inf")], [0, 1, 0, 1]))["auc"] == 0.625


def test_two_classes_rank_by_the_difference_of_their_logits():
    # differences 1, 2, 3, 4 with neither logit in that order alone: the first example
    task = Task.classification("income", 2, metrics=BOTH)
    logits = [[5.0, 6.0], [0.0, 2.0], [1.0, 4.0], [-9.0, -5.0], [0.0, 0.0]]
    assert score(task, (logits, [0, 1, 0, 1, -100])) == pytest.approx({"auc": 3 / 4, "average_precision": 5 / 6})


def test_several_labels_are_averaged_over_those_with_both_classes():
    # label 0: the first example, 3/4 and 5/6. label 1: no at 2 over yes at 1 -> 0 and 1/2.
    # label 2: no positive, label 3: no negative, label 4: nothing
    task = Task.multilabel("tags", 5, metrics=BOTH)
    labels = [[0, NAN, 0, 1, NAN], [1, 1, 0, 1, NAN], [0, 0, 0, 1, NAN], [1, NAN, 0, 1, NAN]]
    logits = [
        [1.0, 9.0, 0.0, 0.0, 0.0],
        [2.0, 1.0, 1.0, 1.0, 1.0],
        [3.0, 2.0, 2.0, 2.0, 2.0],
        [4.0, -9.0, 3.0, 3.0, 3.0],
    ]
    expected = {"auc": (3 / 4 + 0) / 2, "average_precision": (5 / 6 + 1 / 2) / 2}
    assert score(task, (logits, labels)) == pytest.approx(expected)
    # one label alone is a binary task with an axis more
    one = Task.multilabel("tags", 1, metrics=BOTH)
    assert score(one, ([[1.0], [2.0], [3.0], [4.0]], [[0], [1], [0], [1]])) == pytest.approx(
        {"auc": 3 / 4, "average_precision": 5 / 6}
    )


def test_labels_rank_by_themselves():
    # scores of label 1 are all above those of label 0, whose positives they must not count against
    task = Task.multilabel("tags", 2, metrics=BOTH)
    result = score(task, ([[1.0, 11.0], [2.0, 12.0]], [[0, 0], [1, 1]]))
    assert result == {"auc": 1.0, "average_precision": 1.0}


@pytest.mark.parametrize(
    "batches",
    [[], [([], [])], [([1.0, 2.0], [1, 1])], [([1.0, 2.0], [0, 0])], [([1.0], [NAN])], [([1.0], [1]), ([2.0], [NAN])]],
)
def test_without_both_classes_there_is_no_value(batches):
    assert all(math.isnan(value) for value in score(CLICK, *batches).values())
    users = [(*batch, torch.zeros(len(batch[0]), dtype=torch.int64)) for batch in batches]
    assert math.isnan(score(GROUPED, *users)["grouped_auc"])


def test_classes_other_than_two_are_refused():
    for name, args in {**BOTH, "grouped_auc": {"by": "user"}}.items():
        with pytest.raises(ValueError, match=r"'income' has 3 classes; auc.* 2, use log_loss or accuracy"):
            TaskMetrics([Task.classification("income", 3, metrics={name: args})])
    with pytest.raises(ValueError, match="prediction: got 3 classes, a ranking needs 2"):
        AveragePrecision().update(torch.zeros(4, 3), torch.zeros(4).long(), torch.ones(4).bool())


# --- against the definitions ----------------------------------------------------------------------------------------

rows = st.lists(st.tuples(st.integers(-3, 3), st.sampled_from([0, 1]), st.integers(0, 3)), max_size=30)
cuts = st.lists(st.integers(0, 30), max_size=3)


def cut(n: int, at: list[int]) -> list[slice]:
    edges = [0, *sorted(min(i, n) for i in at), n]
    return [slice(i, j) for i, j in itertools.pairwise(edges)]


@settings(deadline=None)
@given(rows, cuts)
def test_values_are_their_definitions_however_batched(samples, at):
    scores, target, _ = zip(*samples, strict=True) if samples else ((), (), ())
    batches = [(scores[part], target[part]) for part in cut(len(samples), at)]
    expected = {"auc": pairwise(target, scores), "average_precision": stepwise(target, scores)}
    assert score(CLICK, *batches) == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert array_auc(np.array(target), np.array(scores)) == pytest.approx(expected["auc"], rel=1e-12, nan_ok=True)


@settings(deadline=None)
@given(rows, cuts)
def test_grouped_auc_is_its_definition_however_batched(samples, at):
    scores, target, users = zip(*samples, strict=True) if samples else ((), (), ())
    top = bottom = 0.0
    for user in set(users):
        mine = [i for i, u in enumerate(users) if u == user]
        value = pairwise([target[i] for i in mine], [scores[i] for i in mine])
        if not math.isnan(value):
            top, bottom = top + len(mine) * value, bottom + len(mine)
    batches = [
        (scores[part], target[part], torch.tensor(users[part], dtype=torch.int64)) for part in cut(len(samples), at)
    ]
    expected = top / bottom if bottom else NAN
    assert score(GROUPED, *batches)["grouped_auc"] == pytest.approx(expected, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("decimals", [0, 1, 6])
def test_against_scikit_learn(decimals):
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is no dependency")
    logits = torch.round(torch.randn(2000, 3), decimals=decimals)
    labels = (torch.rand(2000, 3) < torch.sigmoid(logits - 1)).float()
    task = Task.multilabel("tags", 3, metrics={**BOTH, "log_loss": {}})
    p = logits.double().sigmoid().numpy()
    expected = {
        "auc": sklearn.roc_auc_score(labels, logits, average="macro"),
        "average_precision": sklearn.average_precision_score(labels, logits, average="macro"),
        "log_loss": np.mean([sklearn.log_loss(labels[:, i], p[:, i]) for i in range(3)]),
    }
    assert score(task, *zip(logits.split(333), labels.split(333), strict=True)) == pytest.approx(expected, rel=1e-6)
    values, noise = torch.randn(500, 2, dtype=torch.float64), torch.randn(500, 2, dtype=torch.float64)
    r2 = metric_info("r2").factory(Task.regression("x", 2))
    r2.update(values + noise / 3, values, torch.ones(500, 2).bool())
    assert r2.compute().item() == pytest.approx(sklearn.r2_score(values, values + noise / 3), rel=1e-9)


# --- groups ---------------------------------------------------------------------------------------------------------

# user 7: yes 2 over no 1, no 3 -> 1/2, 3 samples. user -1: yes 9 over no 8 -> 1, 2 samples. user 2^60: yes alone, out.
SCORES, LABELS, USERS = [1.0, 2.0, 3.0, 9.0, 8.0, 5.0], [0, 1, 0, 1, 0, 1], [7, 7, 7, -1, -1, 2**60]
GAUC = (3 * 1 / 2 + 2 * 1) / 5


def test_grouped_auc_by_hand():
    assert score(GROUPED, (SCORES, LABELS, USERS)) == {"grouped_auc": pytest.approx(GAUC)}
    # what it is not: the plain mean over users, 3/4, and the AUC of all: yes 2, 9 and 5 beat 1, 3 and 2 of the 3 no
    assert score(CLICK, (SCORES, LABELS))["auc"] == pytest.approx(6 / 9)


def test_ids_that_differ_in_the_last_bit_are_two_groups():
    # in a float64 both would be 2^60: one group, whose yes loses against its no
    ids = [2**60, 2**60 + 1, 2**60, 2**60 + 1]
    assert score(GROUPED, ([1.0, 3.0, 0.0, 2.0], [1, 1, 0, 0], ids))["grouped_auc"] == 1.0


def test_a_user_is_one_group_in_all_batches():
    # in batches of one sample no user has both classes
    batches = [([s], [y], [u]) for s, y, u in zip(SCORES, LABELS, USERS, strict=True)]
    assert score(GROUPED, *batches[::-1])["grouped_auc"] == pytest.approx(GAUC)


def test_unlabelled_samples_do_not_weigh_in_their_group():
    # two unlabelled samples of user -1 would make its weight 4
    batch = ([*SCORES, 0.0, 99.0], [*LABELS, NAN, NAN], [*USERS, -1, -1])
    assert score(GROUPED, batch)["grouped_auc"] == pytest.approx(GAUC)


def test_grouped_auc_of_two_classes():
    task = Task.classification("income", 2, metrics={"grouped_auc": {"by": "user"}})
    logits = torch.stack([torch.ones(6), torch.tensor(SCORES) + 1], dim=1)
    assert score(task, (logits, LABELS, USERS))["grouped_auc"] == pytest.approx(GAUC)


def test_groups_reach_the_metric_that_asks_and_no_other():
    # two tasks with groups of their own, beside metrics that take none
    tasks = [
        Task.binary("click", metrics={"auc": {}, "grouped_auc": {"by": "user"}, "log_loss": {}}),
        Task.binary("buy", metrics={"grouped_auc": {"by": "shop"}}),
    ]
    metrics = TaskMetrics(tasks)
    scores, labels = torch.tensor(SCORES), torch.tensor(LABELS).float()
    batch = {"click": labels, "buy": labels, "user": torch.tensor(USERS), "shop": torch.zeros(6).long(), "table": {}}
    metrics.update({"click": scores, "buy": scores}, batch)
    result = metrics.compute()
    assert list(result["click"]) == ["auc", "grouped_auc", "log_loss"]
    assert result["click"]["grouped_auc"] == pytest.approx(GAUC)
    assert result["buy"]["grouped_auc"] == pytest.approx(6 / 9) == result["click"]["auc"]
    # a task that is not scored needs no groups
    metrics.update({"click": scores, "buy": scores}, {"buy": labels, "shop": torch.zeros(6).long()})
    assert metrics.compute()["click"] == result["click"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "no tensor 'user', whose ids 'grouped_auc' of task 'click' groups by; known: click"),
        ({"users": torch.zeros(2).long()}, "did you mean 'users'"),
        ({"user": None}, "no tensor 'user'"),
        ({"user": [5, 5]}, "no tensor 'user'"),
        ({"user": torch.zeros(2)}, r"groups: 'user' is torch.float32 \[2\], .* int64 \[2\]"),
        ({"user": torch.zeros(3).long()}, r"groups: 'user' is torch.int64 \[3\], .* int64 \[2\]"),
    ],
)
def test_bad_groups_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        TaskMetrics([GROUPED]).update({"click": torch.zeros(2)}, {"click": torch.zeros(2), **columns})


def test_grouped_auc_needs_a_key_and_one_for_the_task(monkeypatch):
    with pytest.raises(ValueError, match=r"'grouped_auc' of task 'click' refuses .*by"):
        TaskMetrics([Task.binary("click", metrics={"grouped_auc": {}})])
    mine = MetricInfo(lambda task, **args: GroupedAUC(**args), True, "share", frozenset({"binary"}), "the same again")
    monkeypatch.setitem(METRICS, "mine", mine)
    same, other = ({"grouped_auc": {"by": "user"}, "mine": {"by": by}} for by in ("user", "shop"))
    result = score(Task.binary("click", metrics=same), (SCORES, LABELS, USERS))
    assert result == pytest.approx({"grouped_auc": GAUC, "mine": GAUC})
    with pytest.raises(ValueError, match=r"'click' groups by .*'mine': 'shop'.*; one task groups by one key"):
        TaskMetrics([Task.binary("click", metrics=other)])


# --- states ---------------------------------------------------------------------------------------------------------


def test_reset_forgets_and_compute_in_between_disturbs_nothing():
    task = Task.binary("click", metrics={**BOTH, "grouped_auc": {"by": "user"}})
    metrics = TaskMetrics([task])

    def add(rows: slice) -> None:
        columns = {"click": torch.tensor(LABELS).float()[rows], "user": torch.tensor(USERS)[rows]}
        metrics.update({"click": torch.tensor(SCORES)[rows]}, columns)

    add(slice(0, 6))
    once = metrics.compute()
    for _ in range(2):
        metrics.reset()
        assert all(math.isnan(value) for value in metrics.compute()["click"].values())
        add(slice(0, 2))
        metrics.compute()
        metrics.to("cpu")
        add(slice(2, 6))
        assert metrics.compute() == once
    assert metrics.to("meta").device.type == "meta"


def test_metrics_of_one_task_keep_one_copy_of_the_scores():
    metrics = TaskMetrics([CLICK])
    metrics.update({"click": torch.tensor(SCORES)}, {"click": torch.tensor(LABELS).float()})
    first, second = metrics._metrics["click"].values(copy_state=False)
    assert all(a is b for a, b in zip(first.score, second.score, strict=True))


TWO_PROCESSES = """
import sys
import torch
import torch.distributed as dist
from moe_mtl.scoring import TaskMetrics
from moe_mtl.tasks import Task

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
tasks = [
    Task.binary("click", metrics={"auc": {}, "average_precision": {}, "grouped_auc": {"by": "user"}, "log_loss": {}}),
    Task.regression("price", 2, metrics={"r2": {}}),
    Task.regression("size", metrics={"r2": {}}),
]
metrics = TaskMetrics(tasks)
scores, labels, users = torch.tensor(SCORES), torch.tensor(LABELS).float(), torch.tensor(USERS)
values = torch.tensor([[1.0, 2.0], [2.0, 5.0], [6.0, 5.0], [3.0, 3.0], [4.0, 1.0], [9.0, 2.0]])
sizes = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 2.0])  # without spread in either process
def batch(rows):
    predictions = {"click": scores[rows], "price": values[rows] + scores[rows, None], "size": scores[rows]}
    targets = {"click": labels[rows], "price": values[rows], "size": sizes[rows], "user": users[rows]}
    metrics.update(predictions, targets)
if rank == 0:  # the other process has no batch at first
    batch([0, 1])
metrics.compute()
if rank == 0:
    batch([2])
else:
    batch([3, 4, 5])
found = metrics.compute()
dist.destroy_process_group()
whole = TaskMetrics(tasks)
metrics = whole
batch([0, 1, 2, 3, 4, 5])
expected = metrics.compute()
for task, of_task in expected.items():
    for name, value in of_task.items():
        assert abs(found[task][name] - value) < 1e-12, (rank, task, name, found, expected)
print("same")
"""


def test_two_processes_score_as_one(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(f"SCORES, LABELS, USERS = {SCORES}, {LABELS}, {USERS}\n{TWO_PROCESSES}")
    root = Path(__file__).resolve().parents[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            cwd=root,
            env={"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for process in ranks:
            out, error = process.communicate(timeout=200)
            assert process.returncode == 0, error
            assert out.split() == ["same"]
    finally:
        for process in ranks:
            process.kill()


def test_the_mean_over_batches_is_another_number():
    logits, labels = torch.randn(200) * 3, (torch.arange(200) % 2).float()
    batches = list(zip(logits.split(10), labels.split(10), strict=True))
    whole = score(CLICK, *batches)["average_precision"]
    assert abs(statistics.mean(score(CLICK, batch)["average_precision"] for batch in batches) - whole) > 0.01
