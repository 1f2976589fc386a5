"""Statistics of scores: pass@k, robust means, bootstrap intervals and exact tests.

Everything random takes a `numpy.random.Generator`, so a figure's interval can be made again. An interval over items
speaks about those items and that one run; only an interval over seeds supports "A is better than B". The paper reports
neither, so every choice in this file is ours. rliable is left out: it ignores `random_state` and fails with pandas 3.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.optimize
import scipy.stats
from jaxtyping import Bool, Float, Int, Real

ROUNDING = 1e-12
"""Differences of scores that are nearer than this, or this share of the largest, are equal (ours)."""

Scores = Real[np.ndarray, " items"] | Bool[np.ndarray, " items"]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval (ours).

    Attributes:
        value: the statistic of the data, in the statistic's own unit.
        low: lower end of the 95 % interval, same unit.
        high: upper end of the 95 % interval, same unit.
        n: number of independent units that were resampled (items, prompts or runs).
    """

    value: float
    low: float
    high: float
    n: int


def pass_at_k(
    n: int | np.integer | Int[np.ndarray, "*items"],
    c: int | np.integer | Int[np.ndarray, "*items"],
    k: int | np.integer,
) -> Float[np.ndarray, "*items"]:
    """Unbiased pass@k, 1 − C(n−c, k)/C(n, k): the chance that k of n samples, drawn without return, hold a correct one.

    Source: Chen et al. 2021 (arXiv 2107.03374). Computed as a product of k ratios, so nothing overflows, c = 0 gives
    exactly 0, and n − c < k gives exactly 1.

    Args:
        n: samples per item, one number or one per item.
        c: correct samples per item, 0 ≤ c ≤ n.
        k: samples drawn, 1 ≤ k ≤ n.

    Returns:
        pass@k in [0, 1], one per item; an array without axes when n and c are numbers.

    Raises:
        ValueError: k or c is out of range.
    """
    drawn, total, correct = int(k), np.asarray(n), np.asarray(c)
    if drawn < 1 or np.any(total < drawn):
        raise ValueError(
            f"pass@k needs 1 <= k <= n; got k={drawn} and n={total.tolist()}. Draw more samples, or lower k."
        )
    if np.any(correct < 0) or np.any(correct > total):
        raise ValueError(
            f"pass@k needs 0 <= c <= n; got c={correct.tolist()} and n={total.tolist()}. Check the counts."
        )
    draws = np.arange(drawn)
    # With fewer than k wrong samples one factor is exactly 0, so the signs of those after it do not matter.
    wrong_left = np.asarray(total - correct)[..., None] - draws
    left = total[..., None] - draws
    return np.asarray(1.0 - np.prod(wrong_left / left, axis=-1))


def interquartile_mean(scores: Real[np.ndarray, "*shape"] | Bool[np.ndarray, "*shape"]) -> float:
    """Mean of the middle half of all scores pooled, the lowest and highest quarter dropped (Agarwal et al. 2021).

    A quarter is rounded down to whole scores, so with fewer than four scores it is the plain mean.

    Args:
        scores: any shape, e.g. runs × tasks; pooled over all axes.

    Returns:
        The interquartile mean, in the scores' unit.

    Raises:
        ValueError: there is no score, or one is not finite.
    """
    return float(scipy.stats.trim_mean(_as_scores(scores, at_least=1).ravel(), 0.25))


def bootstrap_interval(
    values: Scores,
    statistic: Callable[[np.ndarray], float | np.floating],
    rng: np.random.Generator,
    *,
    resamples: int = 1000,
) -> Estimate:
    """A statistic with the 95 % percentile bootstrap interval over the values (ours).

    Values that are all equal give an interval of no width: that says the sample does not vary, not that the truth is
    known, so read it beside `n`.

    Args:
        values: one value per independent unit.
        statistic: maps a one-dimensional array to a number, e.g. `np.mean`.
        rng: source of the resamples.
        resamples: number of resamples.

    Returns:
        Estimate with n = number of values.

    Raises:
        ValueError: fewer than two values, a value that is not finite, or resamples < 1.
    """
    data = _as_scores(values, at_least=2)
    return _bootstrap((data,), lambda sample: float(statistic(sample)), rng, resamples=resamples, n=data.size)


def mean_interval(values: Scores) -> Estimate:
    """Mean with its 95 % interval from Student's t: for a handful of seeds, where a bootstrap is too narrow (ours).

    Values that are all equal give an interval of no width, as with `bootstrap_interval`; `paired_t_test` allows for it.

    Args:
        values: One value per seed.

    Returns:
        Estimate with n = number of values.

    Raises:
        ValueError: Fewer than two values, or a value that is not finite.
    """
    data = _as_scores(values, at_least=2)
    half = scipy.stats.t.ppf(0.975, data.size - 1) * data.std(ddof=1) / np.sqrt(data.size)
    return Estimate(
        value=float(data.mean()), low=float(data.mean() - half), high=float(data.mean() + half), n=data.size
    )


def paired_t_test(differences: Scores) -> float:
    """Two-sided p-value of "the mean difference is 0", from Student's t over seeds (ours).

    Args:
        differences: One difference per seed.

    Returns:
        p in [0, 1]; 1 when all differences are 0. When they are all equal and not 0 (scores are fractions of few
        problems) the spread is unknown, not 0: p is then that of the sign test, 2^(1 − n). What differs by the rounding
        of a subtraction (0.3 − 0.2, 0.7 − 0.6) is equal.

    Raises:
        ValueError: Fewer than two differences, or one that is not finite.
    """
    data = _as_scores(differences, at_least=2)
    rounding = ROUNDING * max(1.0, float(np.abs(data).max()))
    if np.ptp(data) <= rounding:
        return 1.0 if abs(data[0]) <= rounding else 2.0 ** (1 - data.size)
    result = scipy.stats.ttest_1samp(data, 0.0)
    return float(result.pvalue)  # pyright: ignore[reportAttributeAccessIssue] (scipy makes the result's class at run time)


def needed_items(first: float, second: float, power: float = 0.8) -> int:
    """Test items per policy that tell two accuracies apart in a two-sided test at 5 % (ours).

    Normal approximation for two independent samples of items; answers of two policies to the same items go together,
    and fewer are then needed.

    Args:
        first: Accuracy of one policy, in [0, 1].
        second: Accuracy of the other, in [0, 1].
        power: Probability of finding the difference, in (0.05, 0.99].

    Raises:
        ValueError: An accuracy or the power is out of range, or the accuracies are equal.
    """
    if not (0 <= first <= 1 and 0 <= second <= 1 and first != second and 0.05 < power <= 0.99):
        raise ValueError(
            f"got accuracies {first} and {second} and power {power}; give two different accuracies from 0 to 1 and a "
            "power between 0.05 and 0.99."
        )
    z = scipy.stats.norm.ppf(0.975) + scipy.stats.norm.ppf(power)
    spread = first * (1 - first) + second * (1 - second)
    return math.ceil(z**2 * spread / (first - second) ** 2)


def detectable_difference(differences: Scores, power: float = 0.8) -> float:
    """Smallest true mean difference that a two-sided paired t test at 5 % finds with a given probability (ours).

    The standard deviation is the observed one, the number of seeds the one at hand.

    Args:
        differences: One difference per seed.
        power: Probability of finding it, in (0.05, 0.99].

    Returns:
        A difference, in the unit of the scores.

    Raises:
        ValueError: Fewer than two differences, one that is not finite, or a power outside (0.05, 0.99].
    """
    if not 0.05 < power <= 0.99:
        raise ValueError(f"power is {power}; it must lie between 0.05, the size of the test, and 0.99.")
    data = _as_scores(differences, at_least=2)
    freedom = data.size - 1
    # the test's power given the sampled deviation, averaged over its quantiles: scipy's noncentral t gives NaN far out
    quantiles = (np.arange(4000) + 0.5) / 4000
    bound = scipy.stats.t.ppf(0.975, freedom) * np.sqrt(scipy.stats.chi2.ppf(quantiles, freedom) / freedom)

    def missing(shift: float) -> float:
        found = scipy.stats.norm.sf(bound - shift) + scipy.stats.norm.cdf(-bound - shift)
        return float(found.mean()) - power

    return float(scipy.optimize.brentq(missing, 0.0, 1e3) * data.std(ddof=1) / np.sqrt(data.size))


def stratified_bootstrap(
    scores: Real[np.ndarray, "runs tasks"],
    rng: np.random.Generator,
    statistic: Callable[[np.ndarray], float | np.floating] = interquartile_mean,
    *,
    resamples: int = 1000,
) -> Estimate:
    """A statistic of runs × tasks with a 95 % percentile interval over runs, each task its own stratum.

    Source: Agarwal et al. 2021 (arXiv 2108.13264). Runs are resampled independently within each task, so every task
    keeps its weight; a run that is good at all tasks at once is therefore not kept together.

    Args:
        scores: one score per run (seed) and task.
        rng: source of the resamples.
        statistic: maps a runs × tasks array to a number; the interquartile mean unless told.
        resamples: number of resamples.

    Returns:
        Estimate with n = number of runs.

    Raises:
        ValueError: fewer than two runs, no task, a score that is not finite, or resamples < 1.
    """
    data = _as_scores(scores, at_least=1)
    if data.ndim != 2 or data.shape[0] < 2:
        raise ValueError(f"needs runs x tasks with at least two runs; got shape {data.shape}. Train more seeds.")
    tasks = tuple(data.T)
    return _bootstrap(
        tasks, lambda *task: float(statistic(np.stack(task, axis=1))), rng, resamples=resamples, n=data.shape[0]
    )


def paired_difference(a: Scores, b: Scores, rng: np.random.Generator, *, resamples: int = 1000) -> Estimate:
    """Mean of a − b over paired units, with the 95 % percentile bootstrap interval over pairs (ours).

    Args:
        a: one score per unit (an item's verdict, or a seed's final score) of method A.
        b: the scores of method B on the same units in the same order.
        rng: source of the resamples.
        resamples: number of resamples.

    Returns:
        Estimate of mean(a − b), with n = number of pairs.

    Raises:
        ValueError: a and b differ in length, have fewer than two pairs, or hold a score that is not finite.
    """
    if a.shape != b.shape:
        raise ValueError(f"a and b are paired, so their shapes agree; got {a.shape} and {b.shape}. Align them by uid.")
    difference = _as_scores(a, at_least=2) - _as_scores(b, at_least=2)
    return _bootstrap((difference,), lambda sample: float(sample.mean()), rng, resamples=resamples, n=difference.size)


def probability_of_improvement(
    a: Real[np.ndarray, " runs_a"] | Bool[np.ndarray, " runs_a"],
    b: Real[np.ndarray, " runs_b"] | Bool[np.ndarray, " runs_b"],
) -> float:
    """Chance that a run of A scores higher than a run of B, ties counted half: Mann–Whitney's U / (runs_a · runs_b).

    Source: Agarwal et al. 2021. 0.5 means no difference in order; it says nothing about the size of a gain.

    Args:
        a: scores of A's runs on one task.
        b: scores of B's runs on the same task.

    Returns:
        Probability in [0, 1].

    Raises:
        ValueError: one side is empty or holds a score that is not finite.
    """
    first, second = _as_scores(a, at_least=1), _as_scores(b, at_least=1)
    above = np.count_nonzero(first[:, None] > second[None, :])
    equal = np.count_nonzero(first[:, None] == second[None, :])
    return (above + 0.5 * equal) / (first.size * second.size)


def mcnemar_exact(
    b01: int | np.integer, b10: int | np.integer, alternative: Literal["two-sided", "greater"] = "two-sided"
) -> float:
    """Exact McNemar test of two methods on the same items: a binomial test of the discordant items.

    Args:
        b01: items that A fails and B solves.
        b10: items that A solves and B fails.
        alternative: "greater" asks one-sided whether B solves more.

    Returns:
        p-value of "both are equally likely to be the one that is right"; 1 when the methods never disagree.

    Raises:
        ValueError: a count is negative.
    """
    only_b, only_a = int(b01), int(b10)
    if only_b < 0 or only_a < 0:
        raise ValueError(f"discordant counts are >= 0; got b01={only_b}, b10={only_a}. Count items, not differences.")
    if only_b + only_a == 0:
        return 1.0
    return float(scipy.stats.binomtest(only_b, only_b + only_a, 0.5, alternative=alternative).pvalue)


def holm(p_values: Float[np.ndarray, " tests"]) -> Float[np.ndarray, " tests"]:
    """Holm's step-down adjustment: p-values that hold the family-wise error, e.g. over the eight benchmarks.

    Args:
        p_values: one p-value per test, in [0, 1].

    Returns:
        Adjusted p-values in the order given, at most 1.

    Raises:
        ValueError: there is no p-value, or one is outside [0, 1] or not a number.
    """
    if p_values.size == 0 or not bool(np.all((p_values >= 0) & (p_values <= 1))):
        raise ValueError(f"p-values are one or more numbers in [0, 1]; got {p_values.tolist()}. Check the tests.")
    order = np.argsort(p_values, kind="stable")
    tests_left = p_values.size - np.arange(p_values.size)
    adjusted = np.empty(p_values.size)
    adjusted[order] = np.minimum(np.maximum.accumulate(p_values[order] * tests_left), 1.0)
    return adjusted


def _as_scores(values: np.ndarray, *, at_least: int) -> np.ndarray:
    data = np.asarray(values, dtype=np.float64)
    if data.size < at_least:
        raise ValueError(f"needs at least {at_least} value(s); got {data.size}. Evaluate more items or seeds.")
    if not bool(np.isfinite(data).all()):
        raise ValueError("every value must be finite; got NaN or infinity. Drop or repair those units first.")
    return data


def _bootstrap(
    samples: tuple[np.ndarray, ...],
    statistic: Callable[..., float],
    rng: np.random.Generator,
    *,
    resamples: int,
    n: int,
) -> Estimate:
    if resamples < 1:
        raise ValueError(f"resamples is a whole number >= 1; got {resamples}. 1000 is usual.")
    result = scipy.stats.bootstrap(
        samples,
        statistic,
        n_resamples=resamples,
        vectorized=False,
        confidence_level=0.95,
        method="percentile",
        rng=rng,
    )
    interval = result.confidence_interval
    return Estimate(value=statistic(*samples), low=float(interval.low), high=float(interval.high), n=n)
