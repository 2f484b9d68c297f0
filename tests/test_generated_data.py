"""Generated sets: what is known of them is so."""

import numpy as np
import pytest
import torch

from moe_mtl.data import ClickLog, EntireSpaceLog, ExpertRecovery, MultiTabBench, RelatedRegression
from moe_mtl.data._impressions import draw_impressions, offset_for, sigmoid
from moe_mtl.data.expert_recovery import jaccard

SMALL = {"num_train": 200, "num_val": 50, "num_test": 60}
GENERATED = (ClickLog, EntireSpaceLog, ExpertRecovery, MultiTabBench, RelatedRegression)


@pytest.mark.parametrize("kind", GENERATED)
def test_a_seed_gives_the_same_rows_and_another_other_ones(kind):
    sizes = {**SMALL, "num_train": 2000}  # enough for every action of a log to occur
    a, b, c = kind(**sizes), kind(**sizes), kind(**sizes, seed=1)
    assert [len(a.split(name)) for name in ("train", "val", "test")] == [2000, 50, 60]
    for name in ("train", "val", "test"):
        left, right, other = (one.split(name) for one in (a, b, c))
        assert left.rows.keys() == right.rows.keys()
        assert all(torch.equal(left.rows[key], right.rows[key]) for key in left.rows)
        assert all(torch.equal(left.flat[key].nan_to_num(), right.flat[key].nan_to_num()) for key in left.flat)
        assert any(not torch.equal(left.flat[key].nan_to_num(), other.flat[key].nan_to_num()) for key in left.flat)
    assert a.columns() == b.columns()


@pytest.mark.parametrize("kind", GENERATED)
def test_empty_splits_are_refused(kind):
    with pytest.raises(ValueError, match="num_val: got 0, expected at least 1 row"):
        kind(**{**SMALL, "num_val": 0}).task_list()


# ---- related regressions


@pytest.mark.parametrize("cosine", [0.0, 0.5, 1.0])
def test_directions_have_the_cosine(cosine):
    weights = RelatedRegression(cosine=cosine).weights()
    assert np.linalg.norm(weights, axis=1) == pytest.approx([1, 1])
    assert weights[0] @ weights[1] == pytest.approx(cosine, abs=1e-12)


def test_labels_are_the_formula_and_alike_where_the_cosine_is_one():
    data = RelatedRegression(cosine=1.0, preset="paper", num_train=500, num_val=10, num_test=10)
    train = data.split("train")
    z = train.rows["vector"].double().numpy() @ data.weights()[0]
    # y = z + sum over j = 1..10 of sin(j z + (j - 1)^2), and noise of 0.01
    expected = z + sum(np.sin(j * z + (j - 1) ** 2) for j in range(1, 11))
    for name in ("first", "second"):
        error = train.flat[name].numpy() - expected
        assert np.abs(error).max() < 0.06 and np.std(error) == pytest.approx(0.01, rel=0.15)
    assert data.correlation() > 0.999
    apart = [RelatedRegression(cosine=c, num_train=5000).correlation() for c in (0.0, 0.5, 0.9, 1.0)]
    assert apart == sorted(apart) and abs(apart[0]) < 0.05


def test_bad_settings_of_related_regressions():
    with pytest.raises(ValueError, match=r"cosine: got 1\.5"):
        RelatedRegression(cosine=1.5)
    with pytest.raises(ValueError, match="dim: got 1"):
        RelatedRegression(dim=1)


# ---- MultiTab's


def test_tasks_of_multitab_are_polynomials_of_correlated_projections():
    # a task of degree 1 is its projection; two such tasks correlate as their projections do
    data = MultiTabBench(degrees=(1, 1, 1), rho=0.4, noise=0.01, num_train=40_000)
    flat = data.split("train").flat
    found = np.corrcoef(np.stack([flat[f"y{i}"].numpy() for i in range(3)]))
    # the standard error of a correlation is (1 - 0.16) / sqrt(40,000) = 0.004
    assert found[np.triu_indices(3, 1)] == pytest.approx([0.4] * 3, abs=0.02)
    # of degree 2, y = z + z^2 with z the task's projection, which degree 1 of the same seed is
    curved = MultiTabBench(degrees=(2, 1, 1), rho=0.4, noise=0.01, num_train=40_000).split("train").flat
    z = flat["y0"].numpy()
    assert np.corrcoef(curved["y0"].numpy(), z + z**2)[0, 1] > 0.99
    with pytest.raises(ValueError, match="degrees: got 3 tasks and dim 2"):
        MultiTabBench(degrees=(1, 1, 1), dim=2)
    with pytest.raises(ValueError, match="rho"):
        MultiTabBench(degrees=(1, 1, 1), rho=-0.9).task_list()


# ---- experts to be found


def test_labels_are_read_outs_of_the_true_experts():
    data = ExpertRecovery(num_tasks=4, clusters=2, experts=6, k=2, noise=0.0, **SMALL)
    truth, (weight, bias) = data.true_experts(), data.expert_weights()
    assert truth[0] == truth[2] and truth[1] == truth[3] and not set(truth[0]) & set(truth[1])
    train = data.split("train")
    x = train.rows["vector"].numpy()
    outputs = np.tanh(np.einsum("nd,ehd->neh", x, weight) + bias)
    for task, ids in enumerate(truth):
        y = train.flat[f"y{task}"].numpy()
        ones = np.ones((len(x), 1))

        def left_over(chosen, y=y, ones=ones):
            features = np.concatenate([outputs[:, list(chosen)].mean(axis=1), ones], axis=1)
            fit, *_ = np.linalg.lstsq(features, y, rcond=None)
            return np.std(features @ fit - y)

        assert left_over(ids) < 1e-5  # a linear read-out of their mean, whatever its weights
        assert all(left_over(pair) > 0.1 for pair in ([ids[0]], [e for e in range(6) if e not in ids][:2]))
    with pytest.raises(ValueError, match="k: got 7"):
        ExpertRecovery(experts=6, k=7)


def test_jaccard_by_hand():
    assert jaccard([1, 2], [2, 1]) == 1.0 and jaccard([1], [2, 1]) == 0.5 and jaccard([3], [2, 1]) == 0.0


# ---- logs


def test_rates_of_the_click_log():
    data = ClickLog(num_train=40_000)
    flat = data.split("train").flat
    for name, rate in {"click": 0.2, "like": 0.05, "share": 0.01, "follow": 0.005, "long_view": 0.3}.items():
        error = (rate * (1 - rate) / 40_000) ** 0.5
        assert flat[name].mean().item() == pytest.approx(rate, abs=5 * error), name
    names = [task.name for task in data.task_list()]
    assert sorted(name for row in data.categories() for name in row) == sorted(names)


@pytest.mark.parametrize("common", [0.0, 0.3, 0.9])
def test_tastes_have_that_part_in_common(common):
    log = draw_impressions(ClickLog(num_train=20_000))
    tastes = np.stack([log.affinity(kind, common) for kind in range(1, 13)])
    assert tastes.std(axis=1) == pytest.approx([1] * 12, abs=0.2)
    # the common part is the root of that share in each; 12 tastes have 66 pairs, few items most of the rows
    assert np.corrcoef(tastes)[np.triu_indices(12, 1)].mean() == pytest.approx(common, abs=0.1)


@pytest.mark.parametrize("bias", [0.0, 0.8])
def test_conversions_over_the_entire_space(bias):
    data = EntireSpaceLog(bias=bias, num_train=60_000)
    log, p_click, p_conversion = data.probabilities()
    assert (p_click.mean(), p_conversion.mean()) == (pytest.approx(0.1), pytest.approx(0.1))
    train, test = data.split("train").flat, data.split("test").flat
    clicked = train["click"] == 1
    assert train["conversion"].isnan().equal(~clicked)  # known after a click alone
    assert not test["conversion"].isnan().any()  # and everywhere for testing
    both = train["click_and_conversion"]
    assert torch.equal(both[clicked], train["conversion"][clicked]) and both[~clicked].sum() == 0
    among_clicked = p_conversion[log.part == "train"][clicked.numpy()].mean()
    # without bias clicked rows convert much like all others, some items being shown most; with it, twice as often
    assert among_clicked > 0.2 if bias else 0.07 < among_clicked < 0.14
    weights = {task.name: task.weight for task in data.task_list()}
    assert weights["conversion"] == 0 and weights["click"] > 0
    assert EntireSpaceLog(conversion_weight=1.0).task_list()[1].weight == 1.0


def test_the_offset_gives_the_rate():
    scores = np.random.default_rng(0).standard_normal(1000) * 3
    assert sigmoid(scores + offset_for(scores, 0.02)).mean() == pytest.approx(0.02, rel=1e-6)


@pytest.mark.parametrize("options, message", [
    ({"click_rate": 0.0}, "click_rate: got 0.0"),
    ({"conversion_rate": 1.0}, "conversion_rate: got 1.0"),
    ({"bias": 1.5}, "bias: got 1.5"),
    ({"conversion_weight": -1.0}, "conversion_weight: got -1.0"),
])  # fmt: skip
def test_bad_settings_of_the_entire_space(options, message):
    with pytest.raises(ValueError, match=message):
        EntireSpaceLog(**options)
