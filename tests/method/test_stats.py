"""Statistics against numbers worked out by hand or by enumeration."""

import inspect
from itertools import combinations
from math import comb

import numpy as np
import pytest
import scipy.stats

from npo_core.method.stats import (
    Estimate,
    bootstrap_interval,
    detectable_difference,
    holm,
    interquartile_mean,
    mcnemar_exact,
    needed_items,
    paired_difference,
    paired_t_test,
    pass_at_k,
    probability_of_improvement,
    stratified_bootstrap,
)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n):
    for c in range(n + 1):
        verdicts = [i < c for i in range(n)]
        for k in range(1, n + 1):
            subsets = list(combinations(verdicts, k))
            expected = sum(map(any, subsets)) / len(subsets)
            assert float(pass_at_k(n, c, k)) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_at_its_limits_is_exact_and_never_overflows():
    assert pass_at_k(8, np.array([0, 8, 6]), 3).tolist() == [0.0, 1.0, 1.0]
    # C(10000, 500) has about 850 digits.
    assert float(pass_at_k(10_000, 3, 500)) == pytest.approx(1 - comb(9997, 500) / comb(10_000, 500), rel=1e-12)


def test_pass_at_k_takes_another_n_per_item():
    result = pass_at_k(np.array([4, 8]), np.array([1, 1]), 2)
    assert result.tolist() == pytest.approx([0.5, 0.25])
    assert float(pass_at_k(np.int64(4), np.int64(1), np.int64(2))) == pytest.approx(0.5)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 0), (4, 1, 5), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="needs"):
        pass_at_k(n, c, k)


def test_interquartile_mean_drops_the_outer_quarters_of_all_scores_pooled():
    scores = np.array([[100.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, -100.0]])
    assert interquartile_mean(scores) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert interquartile_mean(np.array([1.0, 2.0, 6.0])) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="finite"):
        interquartile_mean(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="at least 1"):
        interquartile_mean(np.array([]))


def test_bootstrap_interval_of_a_mean_has_the_width_of_its_standard_error():
    values = rng(1).normal(size=400)
    estimate = bootstrap_interval(values, np.mean, rng(2), resamples=2000)
    error = values.std() / 20
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.n == 400
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert estimate == bootstrap_interval(values, np.mean, rng(2), resamples=2000)
    assert estimate != bootstrap_interval(values, np.mean, rng(3), resamples=2000)


def test_bootstrap_interval_uses_the_statistic_it_is_given():
    values = np.array([0.0, 0.0, 0.0, 10.0, 10.0])
    assert bootstrap_interval(values, np.median, rng(), resamples=200).value == 0.0
    assert bootstrap_interval(values, np.max, rng(), resamples=200).high == 10.0
    assert bootstrap_interval(np.full(6, 0.25), np.mean, rng(), resamples=50) == Estimate(0.25, 0.25, 0.25, 6)


@pytest.mark.parametrize(("values", "resamples"), [([1.0], 10), ([1.0, np.inf], 10), ([1.0, 2.0], 0)])
def test_bootstrap_interval_refuses(values, resamples):
    with pytest.raises(ValueError):
        bootstrap_interval(np.array(values), np.mean, rng(), resamples=resamples)


def test_stratified_bootstrap_never_mixes_tasks():
    # Each task is constant over runs, so resampling within tasks cannot change anything; pooled resampling would.
    scores = np.array([[0.0, 1.0, 5.0], [0.0, 1.0, 5.0]])
    estimate = stratified_bootstrap(scores, rng(), np.mean, resamples=50)
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (2.0, 2.0, 2.0, 2)


def test_stratified_bootstrap_resamples_runs_within_a_task():
    # One task of two runs at 0 and 1: the resampled mean is 0, 1/2 or 1 with chances 1/4, 1/2 and 1/4.
    estimate = stratified_bootstrap(np.array([[0.0], [1.0]]), rng(), np.mean, resamples=400)
    assert (estimate.value, estimate.low, estimate.high) == (0.5, 0.0, 1.0)
    default = stratified_bootstrap(np.arange(16.0).reshape(4, 4), rng(), resamples=50)
    assert default.value == pytest.approx(interquartile_mean(np.arange(16.0)))
    with pytest.raises(ValueError, match="two runs"):
        stratified_bootstrap(np.ones((1, 3)), rng())


def test_paired_difference_uses_the_pairs():
    # The items differ much, the methods by exactly 0.1 on each: pairing removes the items' spread.
    a = np.linspace(0.0, 50.0, 30) + 0.1
    b = np.linspace(0.0, 50.0, 30)
    estimate = paired_difference(a, b, rng(), resamples=100)
    assert [estimate.value, estimate.low, estimate.high] == pytest.approx([0.1, 0.1, 0.1])
    assert estimate.n == 30


def test_paired_difference_of_verdicts_has_a_sign():
    a, b = np.array([True] * 30 + [False] * 10), np.array([False] * 30 + [False] * 10)
    estimate = paired_difference(a, b, rng())
    assert estimate.value == 0.75
    assert 0.5 < estimate.low < 0.75 < estimate.high < 0.95
    assert paired_difference(b, a, rng()).value == -0.75
    with pytest.raises(ValueError, match="paired"):
        inspect.unwrap(paired_difference)(a, b[:-1], rng())


def test_probability_of_improvement_counts_ties_half():
    a, b = np.array([1.0, 2.0, 3.0]), np.array([2.0, 0.0])
    # 1>0; 2=2, 2>0; 3>2, 3>0: four wins and one tie of six.
    assert probability_of_improvement(a, b) == pytest.approx(4.5 / 6)
    assert probability_of_improvement(b, a) == pytest.approx(1.5 / 6)
    assert probability_of_improvement(a, a) == 0.5
    with pytest.raises(ValueError, match="at least 1"):
        probability_of_improvement(a, np.array([]))


def test_mcnemar_by_hand():
    # Eight discordant items, one for A: 2 · (C(8,0) + C(8,1)) / 2^8.
    assert mcnemar_exact(7, 1) == pytest.approx(2 * 9 / 256)
    assert mcnemar_exact(1, 7) == pytest.approx(2 * 9 / 256)
    assert mcnemar_exact(5, 0) == pytest.approx(2 / 32)
    assert mcnemar_exact(5, 0, "greater") == pytest.approx(1 / 32) and mcnemar_exact(0, 5, "greater") == 1.0
    assert mcnemar_exact(4, 4) == 1.0
    assert mcnemar_exact(0, 0) == 1.0
    with pytest.raises(ValueError, match=">= 0"):
        mcnemar_exact(-1, 3)


def test_holm_by_hand():
    # Sorted: 0.01·4, 0.02·3 → 0.06, 0.03·2 = 0.06, 0.9·1.
    assert holm(np.array([0.9, 0.01, 0.03, 0.02])).tolist() == pytest.approx([0.9, 0.04, 0.06, 0.06])
    # The step down never lets a larger p-value come out smaller, and 1 is the ceiling.
    assert holm(np.array([0.02, 0.015, 0.6])).tolist() == pytest.approx([0.045, 0.045, 0.6])
    assert holm(np.array([0.5, 0.6])).tolist() == [1.0, 1.0]
    assert holm(np.array([0.03])).tolist() == [0.03]
    for wrong in ([], [1.2], [np.nan]):
        with pytest.raises(ValueError, match="p-values"):
            holm(np.array(wrong, dtype=float))


# Paired t test and power


def test_the_paired_t_test_is_scipys():
    a, b = np.array([0.4, 0.5, 0.7, 0.6]), np.array([0.3, 0.5, 0.4, 0.5])
    assert paired_t_test(a - b) == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue)
    assert paired_t_test(np.zeros(3)) == 1.0
    assert paired_t_test(np.full(3, 0.1)) == 0.25, "three signs alike"
    rounded = np.array([0.3, 0.7, 0.8]) - np.array([0.2, 0.6, 0.7])
    assert np.ptp(rounded) > 0 and paired_t_test(rounded) == 0.25, "a difference of 1e-16 is no spread"
    assert paired_t_test(rounded - 0.1) == 1.0
    assert paired_t_test(1e-6 * (a - b)) == pytest.approx(paired_t_test(a - b)), "small ones are not equal for that"


@pytest.mark.parametrize(("n", "power"), [(3, 0.8), (10, 0.8), (10, 0.5)])
def test_the_detectable_difference_is_found_with_the_given_power(n, power):
    differences = np.random.default_rng(1).normal(0.0, 2.0, n)
    found = detectable_difference(differences, power)
    sample = np.random.default_rng(2).normal(found, differences.std(ddof=1), (20_000, n))
    t = sample.mean(axis=1) / (sample.std(axis=1, ddof=1) / np.sqrt(n))
    assert np.mean(np.abs(t) > scipy.stats.t.ppf(0.975, n - 1)) == pytest.approx(power, abs=0.015)


def test_needed_items_are_told_apart_with_the_given_power():
    """Of 400 items each, 0.5 and 0.6 are told apart with the probability that a two-sample z test has there."""
    items = needed_items(0.5, 0.6)
    assert items == needed_items(0.6, 0.5) == 385, "(1.960 + 0.842)² · (0.25 + 0.24) / 0.01 = 384.6"
    z = 0.1 / np.sqrt((0.25 + 0.24) / items)
    assert scipy.stats.norm.sf(1.959964 - z) == pytest.approx(0.8, abs=0.001)
    for wrong in ((0.5, 0.5), (-0.1, 0.5), (0.5, 1.1), (0.4, 0.5, 0.01)):
        with pytest.raises(ValueError, match="two different accuracies"):
            needed_items(*wrong)


def test_the_detectable_difference_has_the_unit_of_the_scores():
    differences = np.array([0.1, -0.2, 0.3])
    assert detectable_difference(10 * differences) == pytest.approx(10 * detectable_difference(differences))
    assert detectable_difference(differences + 5) == pytest.approx(detectable_difference(differences))


@pytest.mark.parametrize("power", [0.05, 1.0, 2.0])
def test_a_power_out_of_range_is_refused(power):
    with pytest.raises(ValueError, match="power is"):
        detectable_difference(np.array([0.1, 0.2]), power)
