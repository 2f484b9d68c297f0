"""What a score is worth: bootstrap intervals, and tests of two models on the same rows or the same seeds.

A bootstrap asks how the value would vary over other test rows, for the models as trained; a test over seeds asks how
it would vary over other trainings. Neither answers the other's question.

Source:
    bootstrap_interval: the percentile interval of Efron and Tibshirani 1993, chapter 13; with groups, whole clusters.
    paired_bootstrap: twice the smaller share of resamples on either side of zero, counted as Davison and Hinkley 1997,
        chapter 4, do: one more above and below the line, so that no p-value is zero.
    paired_test: Student 1908, and the sign-flip test of Fisher 1935.
    auc: the Mann-Whitney form of Hanley and McNeil 1982.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

CHUNK = 2**21  # counts drawn at once, 16 MiB
EXACT_PAIRS = 12  # the sign-flip test goes through 2^12 signs at most


@overload
def auc(target: ArrayLike, score: ArrayLike, weight: None = None) -> float: ...
@overload
def auc(target: ArrayLike, score: ArrayLike, weight: ArrayLike) -> NDArray[np.float64]: ...
def auc(target: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> float | NDArray[np.float64]:
    """Area under the ROC curve: the share of pairs of a positive and a negative whose positive scores higher.

    Exact: pairs are counted in integers, ties as half. The scores are sorted once for all weightings.

    Args:
        target: [n], 0 or 1.
        score: [n], any numbers, higher for the positive class.
        weight: integers [n] or [..., n], how often each row counts; None for once.

    Returns:
        A number, or an array [...] with a weight; NaN where a class has no weight.

    Raises:
        ValueError: another shape, a target that is neither 0 nor 1, a NaN score, or a weight below 0 or not an integer.
    """
    target, score = np.asarray(target), np.asarray(score)
    if target.ndim != 1 or target.shape != score.shape:
        raise ValueError(f"target, score: got shapes {target.shape} and {score.shape}, expected [n] both")
    if not np.isin(target, (0, 1)).all():
        raise ValueError(f"target: got values {np.unique(target)[:5]}, expected 0 and 1; drop rows without a label")
    if np.isnan(score).any():
        raise ValueError("score: it holds NaN; drop those rows")
    counts = np.ones(len(target), dtype=np.int64) if weight is None else np.asarray(weight)
    if not np.issubdtype(counts.dtype, np.integer) or counts.shape[-1:] != target.shape or (counts < 0).any():
        raise ValueError(
            f"weight: got {counts.dtype} {list(counts.shape)}, expected integers from 0 on, [{len(target)}] or "
            f"[..., {len(target)}]: how often each row counts"
        )
    if not len(target):
        return float("nan") if weight is None else np.full(counts.shape[:-1], np.nan)
    order = np.argsort(score, kind="stable")
    score, positive = score[order], target[order] == 1
    start = np.flatnonzero(np.append(True, score[1:] != score[:-1]))  # of runs of equal scores
    counts = counts[..., order].astype(np.int64)
    positives = np.add.reduceat(counts * positive, start, axis=-1)
    negatives = np.add.reduceat(counts * ~positive, start, axis=-1)
    below = negatives.cumsum(axis=-1) - negatives
    won = (positives * (2 * below + negatives)).sum(axis=-1)  # pairs won twice, tied ones once
    pairs = 2 * positives.sum(axis=-1) * negatives.sum(axis=-1)
    with np.errstate(invalid="ignore"):
        value = np.true_divide(won, pairs)
    return float(value) if weight is None else value


def bootstrap_interval(
    metric: Callable[..., Any],
    *arrays: ArrayLike,
    groups: ArrayLike | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """The metric on all rows, with the percentile interval of its value over resampled rows.

    Rows that belong together (the samples of a user, the cells of a molecule) are not independent draws: name their
    group, and whole groups are resampled. The interval is over test rows, not over trainings.

    Args:
        metric: a function of the arrays that gives a number, whatever the order of the rows. One with a parameter
            `weight`, as `auc`, is given all rows and integers [r n] instead, how often each row was drawn in each of r
            resamples, and gives [r] numbers, which saves their sorting.
        arrays: [n ...] each, as target and prediction.
        groups: [n], the group of each row, of any type; None for rows by themselves.
        level: share of the resampled values inside the interval.
        resamples: how many.
        seed: of the resampling; the same seed draws the same rows.

    Returns:
        (value, low, high). Resamples without a value (NaN, as an AUC of one class) are left out; low and high are NaN
        if all are.

    Raises:
        ValueError: no array or row, lengths that differ, a level outside 0..1, or fewer than one resample.
    """
    rows = _rows(arrays, groups)
    _check(level, resamples)
    score = _scorer(metric, arrays)
    values = np.concatenate([score(counts) for counts in _draws(rows, groups, resamples, seed)])
    return float(metric(*map(np.asarray, arrays))), *_percentiles(values, level)


def paired_bootstrap(
    metric: Callable[..., Any],
    target: ArrayLike,
    a: ArrayLike,
    b: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Compares two models on the same rows: metric(target, a) - metric(target, b), both on the same resamples.

    Args:
        metric: a function of target and prediction, as `bootstrap_interval` takes it.
        target: [n ...].
        a: prediction of one model, [n ...].
        b: prediction of the other.
        groups: [n], resampled as wholes; None for rows by themselves.
        level: share of the resampled differences inside the interval.
        resamples: how many; the p-value is at least 2 / (resamples + 1).
        seed: of the resampling.

    Returns:
        difference: above zero where a's metric is the larger.
        low, high: its percentile interval.
        p_value: two-sided, of no difference. Resamples without a value are left out; NaN if all are.

    Raises:
        ValueError: as `bootstrap_interval`.
    """
    rows = _rows((target, a, b), groups)
    _check(level, resamples)
    first, second = _scorer(metric, (target, a)), _scorer(metric, (target, b))
    values = np.concatenate([first(counts) - second(counts) for counts in _draws(rows, groups, resamples, seed)])
    target, a, b = np.asarray(target), np.asarray(a), np.asarray(b)
    low, high = _percentiles(values, level)
    values = values[~np.isnan(values)]
    fewer = min((values <= 0).sum(), (values >= 0).sum())
    p_value = min(1.0, 2 * (1 + float(fewer)) / (1 + len(values))) if len(values) else math.nan
    return {
        "difference": float(metric(target, a)) - float(metric(target, b)),
        "low": low,
        "high": high,
        "p_value": p_value,
    }


def paired_test(a: ArrayLike, b: ArrayLike, *, level: float = 0.95) -> dict[str, float]:
    """Compares two models over seeds: entry i of both is one seed (one split, one data set).

    Student's interval and p-value take the differences as normal; the sign-flip p-value takes them as symmetric about
    zero, no more, and with n pairs is at least 2 / 2^n: five seeds cannot get below 0.0625.

    Args:
        a: [n] scores of one model, n at least 2.
        b: [n] scores of the other.
        level: of the interval.

    Returns:
        difference: mean of a - b.
        standard_error: of that mean, from the standard deviation with n - 1.
        low, high: Student's interval.
        p_value: two-sided, Student's t with n - 1 degrees of freedom.
        permutation_p_value: two-sided and exact: the share of all signs of the differences whose mean is as far from
            zero; NaN for more than 12 pairs.

    Raises:
        ValueError: other shapes, fewer than 2 pairs, a value that is not finite, or a level outside 0..1.
    """
    from scipy.special import stdtr, stdtrit

    _check(level)
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or len(a) < 2:
        raise ValueError(f"a, b: got shapes {a.shape} and {b.shape}, expected [n] both with n at least 2")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("a, b: they hold a value that is not finite; leave out the seeds without a score in both")
    n, difference = len(a), a - b
    mean, error = float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(n)
    reach = error * float(stdtrit(n - 1, (1 + level) / 2))
    t = abs(mean) / error if error else (math.inf if mean else 0.0)
    return {
        "difference": mean,
        "standard_error": error,
        "low": mean - reach,
        "high": mean + reach,
        "p_value": 2 * float(stdtr(n - 1, -t)),
        "permutation_p_value": _sign_flip(difference) if n <= EXACT_PAIRS else math.nan,
    }


def _sign_flip(difference: NDArray[np.float64]) -> float:
    n = len(difference)
    signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    sums = np.abs(signs @ difference)
    # sums that are equal on paper differ in the last bits
    return float((sums >= sums[0] - 1e-12 * np.abs(difference).sum()).mean())


def _rows(arrays: tuple[ArrayLike, ...], groups: ArrayLike | None) -> int:
    """The common length of the arrays and groups."""
    shapes = [np.shape(array) for array in (*arrays, *(() if groups is None else (groups,)))]
    if not arrays or any(len(shape) == 0 for shape in shapes):
        raise ValueError(f"arrays: got shapes {shapes}, expected at least one, of [n ...] each")
    if len({shape[0] for shape in shapes}) > 1 or shapes[0][0] == 0:
        raise ValueError(f"arrays, groups: got shapes {shapes}, expected the same number of rows, at least 1")
    if groups is not None and len(shapes[-1]) > 1:
        raise ValueError(f"groups: got shape {shapes[-1]}, expected [n], one group a row")
    return shapes[0][0]


def _check(level: float, resamples: int = 1) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: got {level}, expected a share between 0 and 1, as 0.95")
    if resamples < 1:
        raise ValueError(f"resamples: got {resamples}, expected at least 1, usually 1000")


def _draws(rows: int, groups: ArrayLike | None, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """How often each row is drawn, [r rows] a time, until all resamples are through."""
    random = np.random.default_rng(seed)
    group = np.arange(rows) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    size = int(group.max()) + 1
    step = max(1, CHUNK // rows)
    for done in range(0, resamples, step):
        r = min(step, resamples - done)
        drawn = random.integers(0, size, (r, size)) + size * np.arange(r)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=r * size).reshape(r, size)
        yield counts if groups is None else counts[:, group]


def _scorer(
    metric: Callable[..., Any], arrays: tuple[ArrayLike, ...]
) -> Callable[[NDArray[np.int64]], NDArray[np.float64]]:
    """The metric of the arrays as a function of how often each row was drawn, [r n] -> [r]."""
    read = [np.asarray(array) for array in arrays]

    def one_by_one(counts: NDArray[np.int64]) -> NDArray[np.float64]:
        drawn = (np.repeat(np.arange(len(count)), count) for count in counts)
        return np.array([metric(*(array[index] for array in read)) for index in drawn], dtype=np.float64)

    def together(counts: NDArray[np.int64]) -> NDArray[np.float64]:
        values = np.asarray(metric(*read, weight=counts), dtype=np.float64)
        if values.shape != counts.shape[:1]:
            raise ValueError(
                f"metric: for a weight {list(counts.shape)} it gave shape {list(values.shape)}, expected "
                f"[{len(counts)}]; if its weight means something else, pass a function without it"
            )
        return values

    return together if _takes_weight(metric) else one_by_one


def _takes_weight(metric: Callable[..., Any]) -> bool:
    try:
        return "weight" in inspect.signature(metric).parameters
    except ValueError:  # a function of C without a signature
        return False


def _percentiles(values: NDArray[np.float64], level: float) -> tuple[float, float]:
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
