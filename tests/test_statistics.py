"""Bootstrap and paired tests: by hand where few rows allow it, against closed forms and known coverage elsewhere."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from moe_mtl import statistics
from moe_mtl.metrics import AUC
from moe_mtl.statistics import auc, bootstrap_interval, paired_bootstrap, paired_test

NAN = float("nan")


def mean(*columns: np.ndarray) -> float:
    return float(columns[0].mean())


def mean_error(target: np.ndarray, prediction: np.ndarray) -> float:
    return float(np.abs(target - prediction).mean())


def unweighted_auc(target: np.ndarray, score: np.ndarray) -> float:
    """The same number by resampling rows one set at a time."""
    return auc(target, score)


# --- auc ------------------------------------------------------------------------------------------------------------


def test_auc_by_hand():
    # by score: yes 4, no 3, yes 2, no 1: 4 beats both, 2 beats one of two -> 3/4
    assert auc([0, 1, 0, 1], [1, 2, 3, 4]) == 3 / 4
    # the upper yes ties one no and beats two, 2.5; the lower loses one and ties two, 1 -> 3.5/6
    assert auc([1, 0, 1, 0, 0], [2.0, 2.0, 1.0, 1.0, 1.0]) == pytest.approx(3.5 / 6)
    assert auc([True, False], [-math.inf, -math.inf]) == 0.5
    assert isinstance(auc([0, 1], [0, 1]), float)


def test_weighted_auc_by_hand():
    # the first example with yes 2 three times and no 3 twice, so 4 yes and 3 no: yes 4 beats 3, each yes 2 beats one
    # of three -> (3 + 3 * 1) / 12. With no 3 left out: all pairs won
    weights = np.array([[1, 3, 2, 1], [1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 0, 1]])
    assert auc([0, 1, 0, 1], [1, 2, 3, 4], weights) == pytest.approx([6 / 12, 1.0, 3 / 4, NAN], nan_ok=True)
    assert auc([0, 1, 0, 1], [1, 2, 3, 4], weights.reshape(2, 2, 4)).shape == (2, 2)
    assert auc([0, 1, 0, 1], [1, 2, 3, 4], weights[0].astype(np.uint8)) == pytest.approx(0.5)


@settings(deadline=None)
@given(st.data(), st.integers(1, 25))
def test_a_weight_is_a_row_repeated(data, n):
    target = data.draw(arrays(np.int64, n, elements=st.integers(0, 1)))
    score = data.draw(arrays(np.int64, n, elements=st.integers(-3, 3))) / 3
    weight = data.draw(arrays(np.int64, (3, n), elements=st.integers(0, 4)))
    one_by_one = [auc(np.repeat(target, w), np.repeat(score, w)) for w in weight]
    assert auc(target, score, weight) == pytest.approx(one_by_one, nan_ok=True)
    metric = AUC()
    metric.update(torch.tensor(score), torch.tensor(target).double(), torch.ones(n, dtype=torch.bool))
    assert auc(target, score) == pytest.approx(metric.compute().item(), rel=1e-12, nan_ok=True)


def test_auc_without_both_classes_is_nan():
    assert math.isnan(auc([], []))
    assert math.isnan(auc([1, 1], [0.1, 0.2]))
    assert np.isnan(auc([], [], np.zeros((2, 0), dtype=int))).tolist() == [True, True]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auc([0, 1], [0.1]), r"target, score: got shapes \(2,\) and \(1,\)"),
        (lambda: auc([[0, 1]], [[0.1, 0.2]]), r"expected \[n\] both"),
        (lambda: auc([0, NAN], [0.1, 0.2]), "target: .* drop rows without a label"),
        (lambda: auc([-1, 1], [0.1, 0.2]), "target: got values .*expected 0 and 1"),
        (lambda: auc([0, 1], [0.1, NAN]), "score: it holds NaN"),
        (lambda: auc([0, 1], [0.1, 0.2], [0.5, 1.0]), "weight: got float64"),
        (lambda: auc([0, 1], [0.1, 0.2], [-1, 1]), "expected integers from 0 on"),
        (lambda: auc([0, 1], [0.1, 0.2], [1, 1, 1]), r"weight: got int64 \[3\]"),
    ],
)
def test_bad_scores_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- bootstrap ------------------------------------------------------------------------------------------------------


def test_bootstrap_of_two_rows_by_hand():
    # rows 0 and 1: a resample has mean 0, 1/2 or 1 with probability 1/4, 1/2, 1/4. The middle 90 % reaches both ends,
    # the middle 40 % (from 0.3 to 0.7) lies inside 1/2
    assert bootstrap_interval(mean, [0.0, 1.0], level=0.9) == (0.5, 0.0, 1.0)
    assert bootstrap_interval(mean, [0.0, 1.0], level=0.4) == (0.5, 0.5, 0.5)
    assert bootstrap_interval(mean, [3.0]) == (3.0, 3.0, 3.0)


def test_groups_are_drawn_whole():
    # groups a: 0 0 0, b: 1. Of two draws: a a (1/4) mean 0, a b (1/2) mean 1/4, b b (1/4) mean 1; never 1/2
    values, groups = [0.0, 0.0, 1.0, 0.0], ["a", "a", "b", "a"]
    assert bootstrap_interval(mean, values, groups=groups, level=0.9) == (0.25, 0.0, 1.0)
    assert bootstrap_interval(mean, values, groups=groups, level=0.4) == (0.25, 0.25, 0.25)
    # one group alone: always the same rows
    assert bootstrap_interval(mean, values, groups=[5] * 4) == (0.25, 0.25, 0.25)


def test_rows_copied_inside_their_group_tell_nothing_new():
    values = np.random.default_rng(1).normal(size=60)
    alone = bootstrap_interval(mean, values)
    copied = np.repeat(values, 10)
    assert bootstrap_interval(mean, copied, groups=np.repeat(np.arange(60), 10)) == pytest.approx(alone)
    _, low, high = bootstrap_interval(mean, copied)  # as if they were 600 rows: narrower by sqrt 10
    assert (high - low) / (alone[2] - alone[1]) == pytest.approx(10**-0.5, rel=0.15)


def test_the_interval_of_a_mean_is_known():
    # the standard error is that of n draws from the rows themselves, std / sqrt n; 0.9 is +-1.645 of it
    values = np.random.default_rng(2).normal(size=400)
    value, low, high = bootstrap_interval(mean, values, level=0.9, resamples=4000)
    error = values.std() / 20
    assert value == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((value - 1.645 * error, value + 1.645 * error), abs=0.15 * error)


def test_the_interval_covers_as_often_as_it_says():
    random = np.random.default_rng(3)
    found = [bootstrap_interval(mean, random.exponential(size=80), level=0.8, resamples=200) for _ in range(300)]
    # 0.8 with a standard error of 0.023; a skewed sample of 80 covers a little less
    assert 0.72 < np.mean([low <= 1.0 <= high for _, low, high in found]) < 0.87


@pytest.mark.parametrize("grouped", [False, True])
def test_weights_give_the_resamples_themselves(grouped, monkeypatch):
    random = np.random.default_rng(4)
    target, score = random.integers(0, 2, 50), random.integers(0, 9, 50)
    groups = random.integers(0, 12, 50) if grouped else None
    together = bootstrap_interval(auc, target, score, groups=groups, resamples=100)
    assert together == bootstrap_interval(unweighted_auc, target, score, groups=groups, resamples=100)
    assert together[1] < together[0] < together[2]
    monkeypatch.setattr(statistics, "CHUNK", 350)  # seven resamples a time
    assert bootstrap_interval(auc, target, score, groups=groups, resamples=100) == together


def test_the_seed_decides():
    values = np.arange(30.0) ** 2
    assert bootstrap_interval(mean, values) == bootstrap_interval(mean, values, seed=0)
    assert bootstrap_interval(mean, values) != bootstrap_interval(mean, values, seed=1)


def test_resamples_without_a_value_are_left_out():
    # one yes above one no: only the resample that has both has an AUC, and it is 1
    assert bootstrap_interval(auc, [0, 1], [0.0, 1.0]) == (1.0, 1.0, 1.0)
    assert np.isnan(bootstrap_interval(auc, [1, 1], [0.0, 1.0])).all()
    assert all(math.isnan(value) for value in paired_bootstrap(auc, [1, 1], [0.0, 1.0], [1.0, 0.0]).values())


def test_arrays_of_several_axes_and_metrics_without_a_signature():
    x = np.array([[1.0, 2.0], [1.0, 2.0]])
    assert bootstrap_interval(lambda x, y: float((x * y[:, None]).sum()), x, [1.0, 1.0]) == (6.0, 6.0, 6.0)
    assert bootstrap_interval(max, [2.0, 2.0]) == (2.0, 2.0, 2.0)
    assert bootstrap_interval(mean, torch.tensor([2.0, 2.0])) == (2.0, 2.0, 2.0)


# --- paired bootstrap -----------------------------------------------------------------------------------------------


def test_paired_bootstrap_of_two_rows_by_hand():
    # errors of a are 0 and 3, of b 1 and 0: differences -1 and 3, a resample's mean -1, 1 or 3 with 1/4, 1/2, 1/4.
    # a quarter is at or below zero: p is twice that
    found = paired_bootstrap(mean_error, [0.0, 0.0], [0.0, 3.0], [1.0, 0.0], level=0.9, resamples=20000)
    assert found == pytest.approx({"difference": 1.0, "low": -1.0, "high": 3.0, "p_value": 0.5}, abs=0.02)


def test_models_that_agree_do_not_differ():
    target, a = np.arange(20) % 2, np.random.default_rng(5).normal(size=20)
    assert paired_bootstrap(auc, target, a, a) == {"difference": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}


def test_a_model_better_on_every_row_has_the_smallest_p_value():
    found = paired_bootstrap(mean_error, np.zeros(10), np.full(10, 3.0), np.full(10, 2.0), resamples=99)
    assert found == {"difference": 1.0, "low": 1.0, "high": 1.0, "p_value": 2 / 100}


def test_swapping_the_models_mirrors_the_result():
    random = np.random.default_rng(6)
    target = random.integers(0, 2, 80)
    a, b = target + random.normal(size=80), target + 2 * random.normal(size=80)
    one, other = paired_bootstrap(auc, target, a, b), paired_bootstrap(auc, target, b, a)
    assert one["difference"] == pytest.approx(auc(target, a) - auc(target, b)) == pytest.approx(-other["difference"])
    assert (one["low"], one["high"]) == pytest.approx((-other["high"], -other["low"]))
    assert 0 < one["p_value"] == other["p_value"] < 1
    assert one == pytest.approx(paired_bootstrap(unweighted_auc, target, a, b))


def test_both_models_are_scored_on_the_same_rows():
    # rows differ a thousand times more than the models: unpaired, the difference would drown
    hard = np.random.default_rng(7).normal(size=100) * 1000
    found = paired_bootstrap(mean_error, np.zeros(100), np.abs(hard) + 1, np.abs(hard))
    assert found["low"] == pytest.approx(1.0) == found["high"]


def test_groups_of_paired_rows_are_drawn_whole():
    # the difference is 1 in group 0 (3 rows) and -1 in group 1 (one row): of two draws 1, 1/2 or -1
    options = {"groups": [0, 0, 0, 1], "resamples": 20000}
    found = paired_bootstrap(mean_error, np.zeros(4), [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0], **options)
    assert found == pytest.approx({"difference": 0.5, "low": -1.0, "high": 1.0, "p_value": 0.5}, abs=0.02)


def test_the_p_value_of_equal_models_is_rarely_small():
    random = np.random.default_rng(8)
    values = []
    for _ in range(300):
        a, b = random.normal(size=(2, 60))
        values.append(paired_bootstrap(mean_error, np.zeros(60), a, b, resamples=200)["p_value"])
    assert 0.13 < np.mean(np.array(values) < 0.2) < 0.28


# --- over seeds -----------------------------------------------------------------------------------------------------


def test_two_pairs_by_hand():
    # differences 1 and 3: mean 2, standard deviation sqrt 2, standard error 1, t = 2 with 1 degree of freedom, whose
    # distribution function is 1/2 + atan(t) / pi: p = 1 - 2 atan(2) / pi, and the 0.95 quantile is tan(0.45 pi)
    found = paired_test([1.0, 5.0], [0.0, 2.0], level=0.9)
    reach = math.tan(0.45 * math.pi)
    expected = {"difference": 2.0, "standard_error": 1.0, "low": 2 - reach, "high": 2 + reach}
    expected |= {"p_value": 1 - 2 * math.atan(2) / math.pi, "permutation_p_value": 0.5}
    assert found == pytest.approx(expected)


def test_three_pairs_by_hand():
    # differences -1, -2, -3: mean -2, standard error 1 / sqrt 3, t = -2 sqrt 3 with 2 degrees of freedom, where
    # p = 1 - |t| / sqrt(2 + t^2) = 1 - sqrt(12 / 14); the quantile of 0.975 is 0.95 sqrt(2 / (1 - 0.95^2)).
    # Signs: only all equal reach a sum of 6, 2 of 8
    found = paired_test([0.0, 0.0, 0.0], [1.0, 2.0, 3.0])
    reach = 0.95 * math.sqrt(2 / (1 - 0.95**2)) / math.sqrt(3)
    expected = {"difference": -2.0, "standard_error": 3**-0.5, "low": -2 - reach, "high": -2 + reach}
    expected |= {"p_value": 1 - math.sqrt(12 / 14), "permutation_p_value": 2 / 8}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("n", [2, 5, 30])
def test_against_scipy(n):
    a, b = np.random.default_rng(n).normal(size=(2, n))
    found, known = paired_test(a, b + 0.5, level=0.8), stats.ttest_rel(a, b + 0.5)
    interval = known.confidence_interval(0.8)
    assert found["p_value"] == pytest.approx(known.pvalue)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))


@settings(deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=2, max_size=7))
def test_sign_flips_are_counted_exactly(tenths):
    # in exact arithmetic; tenths are rounded in floating point, so that equal sums come out unequal
    exact = [Fraction(t, 10) for t in tenths]
    sums = [abs(sum(s * x for s, x in zip(signs, exact, strict=True))) for signs in _signs(len(exact))]
    expected = sum(s >= abs(sum(exact)) for s in sums) / len(sums)
    assert paired_test([t / 10 for t in tenths], [0.0] * len(tenths))["permutation_p_value"] == expected


def _signs(n: int) -> list[tuple[int, ...]]:
    return list(itertools.product((1, -1), repeat=n))


def test_signs_of_twelve_pairs_and_no_more():
    assert paired_test(np.arange(12) + 1.0, np.zeros(12))["permutation_p_value"] == 2 / 2**12
    assert math.isnan(paired_test(np.arange(13) + 1.0, np.zeros(13))["permutation_p_value"])


def test_differences_without_spread():
    zero = {"difference": 0.0, "standard_error": 0.0, "low": 0.0, "high": 0.0}
    assert paired_test([1.0, 2.0], [1.0, 2.0]) == {**zero, "p_value": 1.0, "permutation_p_value": 1.0}
    found = paired_test([1.0, 2.0, 3.0], [0.0, 1.0, 2.0])
    assert found == {**zero, "difference": 1.0, "low": 1.0, "high": 1.0, "p_value": 0.0, "permutation_p_value": 0.25}


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval(mean), r"arrays: got shapes \[\], expected at least one"),
        (lambda: bootstrap_interval(mean, 3.0), r"arrays: got shapes \[\(\)\]"),
        (lambda: bootstrap_interval(mean, []), "at least 1"),
        (lambda: bootstrap_interval(mean, [1, 2], [1, 2, 3]), r"\[\(2,\), \(3,\)\], expected the same number of rows"),
        (lambda: bootstrap_interval(mean, [1, 2], groups=[1]), "arrays, groups: .*same number of rows"),
        (lambda: bootstrap_interval(mean, [1, 2], groups=[[1], [2]]), r"groups: got shape \(2, 1\)"),
        (lambda: bootstrap_interval(mean, [1, 2], level=95), "level: got 95, .* as 0.95"),
        (lambda: bootstrap_interval(mean, [1, 2], resamples=0), "resamples: got 0"),
        (lambda: bootstrap_interval(lambda x, weight=1: 0.0, [1, 2], resamples=9), r"metric: for a weight \[9, 2\]"),
        (lambda: paired_bootstrap(mean_error, [1, 2], [1, 2], [1]), "same number of rows"),
        (lambda: paired_bootstrap(mean_error, [1, 2], [1, 2], [1, 2], level=0), "level: got 0"),
        (lambda: paired_test([1.0], [2.0]), r"a, b: got shapes \(1,\) and \(1,\), .* n at least 2"),
        (lambda: paired_test([1.0, 2.0], [2.0]), "expected .n. both"),
        (lambda: paired_test([1.0, NAN], [2.0, 1.0]), "not finite; leave out the seeds"),
        (lambda: paired_test([1.0, 2.0], [2.0, 1.0], level=1.0), "level: got 1.0"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
