"""Sums of a pair to Q, V and S: against the enumeration of a tabular policy, direct resampling and planted curves."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from oracles import variance_cost
from tabular import SEQUENCES, Tabular, log_weights

from npo_core.method.curve import (
    SUMS,
    PairSums,
    bootstrap_weights,
    calibrated_c,
    curve_fits,
    pair_estimates,
    rank_agreement,
    rank_correlation,
    signal_curve,
)
from npo_core.method.quantities import ESTIMATES, PROXY_COSTS, SIGNALS, Cost, Divergence, Quality, Signal
from npo_core.method.signal import MAX_LOG_COST

POLICIES = [Tabular.drawn(seed) for seed in (0, 1, 2)]
SOURCES = [Tabular.drawn(seed, scale=1.5) for seed in (10, 11, 12)]
SECOND = Signal(Quality.MANY, Cost.SECOND_MOMENT)


def rng(seed=0):
    return np.random.default_rng(seed)


def sums(prompts=4, **columns):
    """A pair of one token per rollout, equal policies and one gradient per prompt, but for the given columns."""
    numbers = dict.fromkeys(SUMS, 1.0) | {"log_ratio": 0.0, "own_log_ratio": 0.0, "shown": 0.0, "shown_share": 0.0}
    return PairSums(**{name: np.broadcast_to(columns.get(name, numbers[name]), prompts).astype(float) for name in SUMS})


def tallied(source_counts, own_counts):
    """The sums of prompts whose rollouts are `SEQUENCES`, shape (prompts, sequences), as often as counted."""
    prompts = []
    for policy, source, of_source, of_own in zip(POLICIES, SOURCES, source_counts, own_counts, strict=True):
        ln_w = [log_weights(policy, source, sequence) for sequence in SEQUENCES]
        token_sums = {
            "rollouts": of_source @ [1.0 for _ in ln_w],
            "tokens": of_source @ [float(len(values)) for values in ln_w],
            "log_ratio": of_source @ [-values.sum() for values in ln_w],
            "squared_weight": of_source @ [np.exp(2 * values).sum() for values in ln_w],
            "squared_sequence": of_source @ [np.exp(2 * values.sum()) for values in ln_w],
            "own_rollouts": of_own @ [1.0 for _ in ln_w],
            "own_tokens": of_own @ [float(len(values)) for values in ln_w],
            "own_log_ratio": of_own @ [values.sum() for values in ln_w],
            "own_weight": of_own @ [np.exp(values).sum() for values in ln_w],
            "own_sequence": of_own @ [np.exp(values.sum()) for values in ln_w],
        }
        prompts.append(token_sums)
    return sums(len(prompts), **{name: np.array([prompt[name] for prompt in prompts]) for name in prompts[0]})


def estimates(pair, c=2.0):
    """Point estimates."""
    weights = np.ones((1, len(pair.failed)), dtype=int)
    return {name: float(values[0]) for name, values in pair_estimates(pair, weights, c).items()}


def chain_rule(of, other, power):
    """KL(of‖other), and the sum over tokens of E_of[(other/of)^power], prefix by prefix."""
    rows = [(1.0, of.first, other.first)]
    rows += [(of.first[token], of.second[token - 1], other.second[token - 1]) for token in (1, 2)]
    kl = sum(chance * (p @ np.log(p / r)) for chance, p, r in rows)
    return kl, sum(chance * (p @ (r / p) ** power) for chance, p, r in rows)


# Exact numbers


def test_estimates_from_all_sequences_are_the_exact_numbers():
    # every response of both policies, as often as it is likely: sums are expectations, and nothing is sampled
    policies, sources = ([policy.probabilities() for policy in group] for group in (POLICIES, SOURCES))
    found = estimates(tallied(1000 * np.array(sources), 1000 * np.array(policies)))
    # w = π/q is (other/of)^1 over q's tokens and (other/of)^−1 over π's: E_q[w²] and E_π[w]
    for suffix, ofs, others, power in (("", SOURCES, POLICIES, 2), ("_policy", POLICIES, SOURCES, -1)):
        kls, moments = zip(*[chain_rule(of, other, power) for of, other in zip(ofs, others, strict=True)], strict=True)
        tokens = sum(1 + of.first[1:].sum() for of in ofs)
        assert found["token_kl" + suffix] == pytest.approx(sum(kls) / tokens)
        assert found["kl" + suffix] == pytest.approx(math.exp(2 * sum(kls) / tokens))
        assert found["second_moment" + suffix] == pytest.approx(sum(moments) / tokens)
    # E_q[W²] = Σ π²/q = E_π[W]: one number from either side
    exact = np.mean([np.sum(p**2 / q) for p, q in zip(policies, sources, strict=True)])
    assert found["sequence"] == pytest.approx(exact)
    assert found["sequence_policy"] == pytest.approx(exact)
    numbers = [found[name] for name in ("token_kl", "token_kl_policy", *PROXY_COSTS[:-1])]
    assert min(abs(a - b) for i, a in enumerate(numbers) for b in numbers[:i]) > 1e-3  # no two could be swapped unseen


def test_token_moments_of_both_sides_are_one_number_where_there_is_one_prefix():
    # over the first token alone, E_q[w²] = E_π[w]; afterwards each side sees the prefixes that it visits itself
    policy, source = POLICIES[0].first, SOURCES[0].first
    w = policy / source
    pair = sums(2, squared_weight=source @ w**2, own_weight=policy @ w)
    assert estimates(pair)["second_moment"] == pytest.approx(estimates(pair)["second_moment_policy"])


def test_estimates_of_samples_are_the_plain_means_over_padded_tokens():
    generator = rng()
    drawn = [[generator.multinomial(40, policy.probabilities()) for policy in group] for group in (SOURCES, POLICIES)]
    found = estimates(tallied(*drawn), c=3.0)
    for direction, counts, suffix in (("source", drawn[0], ""), ("policy", drawn[1], "_policy")):
        logps = {"π": [], "q": []}
        for policy, source, row in zip(POLICIES, SOURCES, counts, strict=True):
            for sequence, count in zip(SEQUENCES, row, strict=True):
                for name, model in (("π", policy), ("q", source)):
                    padded = np.full(2, np.nan)
                    padded[: len(sequence)] = model.token_logps(sequence)
                    logps[name] += [padded] * count
        policy, source = (torch.tensor(np.array(logps[name])) for name in ("π", "q"))
        for proxy in ("kl", "second_moment", "sequence"):
            cost = variance_cost(policy, source, ~policy.isnan(), proxy, c=3.0, direction=direction)
            assert cost > 1.0
            assert found[proxy + suffix] == pytest.approx(cost), (proxy, direction)


def test_a_pair_yields_what_it_says_and_by_hand():
    pair = sums(
        failed=[1, 0, 1, 1], shown=[1, 0, 0, 0], shown_share=[0.5, 0, 0, 0], gradients=[1, 1, 0, 0],
        gradient_own=[2, 2, 0, 0], gradient_current=[1, 2, 0, 0], gradient_exact=[5, 3, 0, 0],
        gradient_sequence=[1, 1, 0, 0],
    )  # fmt: skip
    found = estimates(pair)
    assert set(found) == set(ESTIMATES)
    assert [found[name] for name in ("quality", "quality_1")] == pytest.approx([1 / 3, 1 / 6])
    assert [found[name] for name in PROXY_COSTS] == [1.0] * 6
    measured = [found[f"gradient_{name}"] for name in ("current", "exact", "sequence")]
    assert measured == [0.75, 2.0, 0.5]  # not held at 1: a certain source has short gradients


def test_proxies_are_at_least_one_and_finite_and_kl_may_be_negative():
    low = sums(log_ratio=-1.0, own_log_ratio=-1.0, squared_weight=0.2, own_weight=0.2, squared_sequence=0.2,
               own_sequence=0.2)  # fmt: skip
    found = estimates(low)
    assert [found[name] for name in PROXY_COSTS] == [1.0] * 6
    assert found["token_kl"] == found["token_kl_policy"] == -1.0
    assert estimates(sums(log_ratio=1e6))["kl"] == math.exp(MAX_LOG_COST)


def test_a_draw_without_failing_prompt_has_no_quality_and_one_without_gradient_no_measured_cost():
    pair = sums(2, failed=[1, 0], shown=[1, 0], gradient_own=[0, 1], gradient_exact=[0, 3])
    found = pair_estimates(pair, np.array([[1, 1], [2, 0], [0, 2]]), 1.0)
    np.testing.assert_equal(found["quality"], [1.0, 1.0, math.nan])
    np.testing.assert_equal(found["gradient_exact"], [3.0, math.nan, 3.0])


# Resampling


def test_bootstrap_draws_start_with_the_data_and_each_draws_as_many_prompts():
    weights = bootstrap_weights(7, 500, rng(3))
    assert weights.shape == (501, 7)
    assert (weights[0] == 1).all()
    assert (weights.sum(axis=1) == 7).all()
    assert np.array_equal(weights, bootstrap_weights(7, 500, rng(3)))
    assert not np.array_equal(weights, bootstrap_weights(7, 500, rng(4)))
    # multinomial: mean 1 and variance 1 − 1/7 of each prompt's count
    assert weights[1:].mean(axis=0) == pytest.approx(np.ones(7), abs=0.2)
    assert weights[1:].var() == pytest.approx(6 / 7, abs=0.1)


@pytest.mark.parametrize(("prompts", "resamples"), [(1, 10), (5, 0)])
def test_a_bootstrap_of_nothing_is_refused(prompts, resamples):
    with pytest.raises(ValueError, match="two prompts and a resample"):
        bootstrap_weights(prompts, resamples, rng())


def noisy(prompts=60, seed=0):
    generator = rng(seed)
    failed = generator.random(prompts) < 0.7
    shown = failed & (generator.random(prompts) < 0.5)
    tokens = generator.integers(2, 9, prompts).astype(float)
    return sums(
        prompts, failed=failed, shown=shown, shown_share=shown * generator.random(prompts), tokens=tokens,
        log_ratio=0.2 * tokens + generator.normal(size=prompts),
        squared_weight=tokens * generator.lognormal(0.5, 0.5, prompts),
    )  # fmt: skip


def test_a_draw_is_the_estimate_of_the_prompts_that_were_drawn():
    pair = noisy()
    drawn = rng(1).integers(60, size=(20, 60))
    weights = np.array([np.bincount(indices, minlength=60) for indices in drawn])
    found = pair_estimates(pair, weights, 2.0)
    for row, indices in enumerate(drawn):
        redrawn = estimates(PairSums(**{name: getattr(pair, name)[indices] for name in SUMS}))
        assert {name: values[row] for name, values in found.items()} == pytest.approx(redrawn)


def test_the_interval_of_a_ratio_is_that_of_direct_index_resampling():
    pair = noisy()
    curve = signal_curve({0: pair}, 2.0, rng(), resamples=4000)
    drawn = rng(9).integers(60, size=(4000, 60))
    sides = ((Quality.MANY, pair.shown, pair.failed), (Divergence.OF_SOURCE, pair.log_ratio, pair.tokens))
    for name, above, below in sides:
        ratios = above[drawn].sum(axis=1) / below[drawn].sum(axis=1)
        low, high = np.quantile(ratios, (0.025, 0.975))
        assert high - low > 0.1
        assert np.concatenate(curve.interval(name)) == pytest.approx([low, high], abs=0.06 * (high - low))


def test_quality_and_cost_of_all_distances_are_resampled_together():
    pairs = {5: noisy(seed=0), 15: noisy(seed=1), 10: noisy(seed=2)}
    failed = pairs[5].failed
    pairs = {distance: replace(pair, failed=failed, shown=pair.shown * failed) for distance, pair in pairs.items()}
    curve = signal_curve(pairs, 2.0, rng(7), resamples=300)
    assert curve.distances.tolist() == [5.0, 10.0, 15.0]
    assert curve.failing == failed.sum()
    weights = bootstrap_weights(60, 300, rng(7))
    signal = np.stack([(weights @ pairs[d].shown) / (weights @ failed)
                       / np.maximum(weights @ pairs[d].squared_weight / (weights @ pairs[d].tokens), 1)
                       for d in (5, 10, 15)], axis=1)  # fmt: skip
    assert curve.values(SECOND) == pytest.approx(signal[0])
    quantiles = np.quantile(signal[1:], (0.025, 0.975), axis=0)
    assert np.array(curve.interval(SECOND)) == pytest.approx(quantiles)
    best = curve.optimum(SECOND)
    winners = curve.distances[signal[1:].argmax(axis=1)]
    assert best.distance == curve.distances[signal[0].argmax()]
    expected = [np.quantile(winners, 0.025, method="lower"), np.quantile(winners, 0.975, method="higher")]
    assert [best.low, best.high] == expected
    assert best.low < best.high


def test_draws_where_quality_is_undefined_do_not_count():
    # three prompts, one of which fails: (2/3)³ of the draws leave it out
    pairs = {
        d: sums(3, failed=[1, 0, 0], shown=[s, 0, 0], squared_weight=[v, 1, 1]) for d, s, v in ((1, 1, 1), (2, 1, 5))
    }
    curve = signal_curve(pairs, 2.0, rng(), resamples=400)
    undefined = np.isnan(curve.draws["quality"][1:]).all(axis=1).mean()
    assert undefined == pytest.approx(8 / 27, abs=0.08)
    assert [values.tolist() for values in curve.interval(Quality.MANY)] == [[1.0, 1.0], [1.0, 1.0]]
    best = curve.optimum(SECOND)
    assert (best.distance, best.low, best.high) == (1.0, 1.0, 1.0)


# Curves


def planted(grid, q_inf=0.7, tau=40.0, beta=0.01, c=2.0):
    """Pairs whose Q is q_inf·(1 − e^(−Δ/τ)), whose every cost but e^(c·KL) is e^(βΔ), and whose KL is βΔ/c."""
    pairs = {}
    for distance in grid:
        quality, cost = q_inf * -math.expm1(-distance / tau), math.exp(beta * distance)
        moments = ("squared_weight", "squared_sequence", "own_weight", "own_sequence")
        measured = ("gradient_current", "gradient_exact", "gradient_sequence")
        kl = {"log_ratio": beta * distance / c, "own_log_ratio": beta * distance / c}
        columns = {"shown": quality, "shown_share": quality / 2, **dict.fromkeys((*moments, *measured), cost), **kl}
        pairs[distance] = sums(5, **columns)
    return pairs


@pytest.mark.parametrize(("tau", "beta", "step"), [(40.0, 0.01, 10), (20.0, 0.02, 5), (70.0, 0.002, 50)])
def test_the_best_distance_of_a_planted_curve_is_the_grid_point_nearest_to_the_closed_form(tau, beta, step):
    grid = np.arange(0, 8 * step + 1, step)
    curve = signal_curve(planted(grid.tolist(), tau=tau, beta=beta), 2.0, rng(), resamples=20)
    exact = tau * math.log(1 + 1 / (beta * tau))
    for signal in SIGNALS:
        best = curve.optimum(signal)
        assert best.distance == grid[np.abs(grid - exact).argmin()], signal
        assert not best.at_edge
        assert best.low == best.high == best.distance  # prompts do not differ, so resamples do not either
        share = 0.5 if signal.quality == Quality.ONE else 1.0
        expected = share * 0.7 * (1 - math.exp(-best.distance / tau)) * math.exp(-beta * best.distance)
        assert best.signal == pytest.approx(expected), signal


def test_a_signal_that_rises_to_the_end_has_its_best_distance_at_the_edge():
    curve = signal_curve(planted([0, 10, 20, 30]), 2.0, rng(), resamples=20)
    best = curve.optimum(Signal(Quality.MANY, Cost.KL))
    assert (best.distance, best.at_edge) == (30.0, True)


@pytest.mark.parametrize(("cost", "quality"), [(Cost.GRADIENT_EXACT, Quality.MANY), (Cost.KL, Quality.ONE)])
def test_fits_recover_a_planted_curve(cost, quality):
    curve = signal_curve(planted([0, 10, 20, 40, 80, 160]), 2.0, rng(), resamples=5)
    fit = curve_fits(curve, cost, quality)
    assert fit["reason"] is None
    q_inf = 0.7 if quality == Quality.MANY else 0.35
    assert [fit["q_inf"], fit["tau"], fit["beta"]] == pytest.approx([q_inf, 40.0, 0.01], rel=1e-3)
    assert [fit["q_rmse"], fit["v_rmse"]] == pytest.approx([0.0, 0.0], abs=1e-5)
    assert fit["fitted_optimum"] == pytest.approx(40 * math.log(3.5), rel=1e-3)


def test_a_fit_that_is_not_possible_says_why():
    flat = signal_curve({d: sums() for d in (0, 10, 20)}, 2.0, rng(), resamples=5)
    fit = curve_fits(flat, Cost.KL)
    assert fit["q_inf"] is None and fit["fitted_optimum"] is None
    assert "not 0 everywhere" in fit["reason"]
    free = signal_curve(planted([0, 10, 20, 40], beta=0.0), 2.0, rng(), resamples=5)
    fit = curve_fits(free, Cost.SECOND_MOMENT)
    assert fit["tau"] == pytest.approx(40.0, rel=1e-3)  # what could be fitted stays
    # a cost that does not grow puts no limit to distance; without care the fit's last digits would name one
    assert fit["beta"] == pytest.approx(0.0, abs=1e-8)
    assert fit["fitted_optimum"] is None
    assert "does not grow" in fit["reason"]
    # measured costs below 1, shorter gradients, are no second moments: they count as 1
    short = {d: replace(pair, gradient_exact=pair.gradient_exact * 0.01) for d, pair in planted([0, 10, 20]).items()}
    assert curve_fits(signal_curve(short, 2.0, rng(), 5), Cost.GRADIENT_EXACT)["v_rmse"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("kl", Divergence)
def test_calibration_recovers_a_planted_c(kl):
    # the constant of the proxy (9) must not matter; 3.5 is what the measured cost was made with
    first, second = (
        signal_curve(planted(grid, beta=beta, c=3.5), 9.0, rng(), resamples=50)
        for grid, beta in (([0, 10, 40], 0.01), ([0, 5, 20, 80], 0.03))
    )
    found = calibrated_c([first, second], kl=kl)
    assert [found.value, found.low, found.high] == pytest.approx([3.5] * 3)
    assert found.n == 7


def test_calibration_is_least_squares_through_the_origin():
    # KL 1, 2 and −1, which counts as 0; ln V 3, 4 and 5: c = (3 + 8) / (1 + 4)
    points = {10: (1.0, 3.0), 20: (2.0, 4.0), 30: (-1.0, 5.0)}
    pairs = {d: sums(log_ratio=kl, gradient_exact=math.exp(ln_v)) for d, (kl, ln_v) in points.items()}
    assert calibrated_c([signal_curve(pairs, 2.0, rng(), 10)]).value == pytest.approx(11 / 5)


def test_calibration_needs_a_distance():
    with pytest.raises(ValueError, match="KL is 0 at every distance"):
        calibrated_c([signal_curve({0: sums(), 5: sums(log_ratio=-0.1)}, 2.0, rng(), 5)])


def test_rank_agreement_of_monotone_and_constant_estimates():
    rising = {d: sums(log_ratio=d, own_log_ratio=-d, gradient_exact=1.0 + d**3) for d in (1, 2, 5, 7)}
    curve = signal_curve(rising, 0.1, rng(), resamples=20)
    for name, rho in ((Divergence.OF_SOURCE, 1.0), (Cost.KL, 1.0), (Divergence.OF_POLICY, -1.0)):
        found = rank_agreement(curve, name)
        assert [found.value, found.low, found.high] == pytest.approx([rho] * 3)
        assert found.n == 4
    constant = rank_agreement(curve, Cost.SECOND_MOMENT)
    assert all(math.isnan(number) for number in (constant.value, constant.low, constant.high))
    with pytest.raises(ValueError, match="three distances"):
        rank_agreement(signal_curve({d: rising[d] for d in (1, 2)}, 0.1, rng(), 5), Cost.KL)


def test_rank_correlation_by_hand():
    a = np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 2.0, 9.0], [1.0, math.nan, 3.0, 4.0], [5.0, 5.0, 5.0, 5.0]])
    b = np.array([[10.0, 30.0, 20.0, 40.0]] * 4)
    # ranks 1 3 2 4: 1 − 6·2/(4·15) = 0.8; with the tie 1 2.5 2.5 4: cov 4.5 over √(4.5·5)
    np.testing.assert_allclose(rank_correlation(a, b), [0.8, math.sqrt(0.9), math.nan, math.nan])


# What is refused, and names


def unchecked(**columns):
    """A pair without the shape check of the tests, which would otherwise come first."""
    pair = object.__new__(PairSums)
    vars(pair).update(columns)
    pair.__post_init__()


@pytest.mark.parametrize("name", SUMS)
def test_each_column_must_be_finite_and_of_one_length(name):
    good = {column: getattr(sums(3), column) for column in SUMS}
    unchecked(**good)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"{name} of a pair holds NaN"):
            unchecked(**good | {name: np.array([1.0, bad, 1.0])})
    with pytest.raises(ValueError, match="one number per prompt"):
        unchecked(**good | {name: np.ones(4)})


def test_pairs_without_failing_prompt_or_without_prompt_are_refused():
    with pytest.raises(ValueError, match=r"Q is undefined.*none of the 4"):
        sums(failed=0.0)
    with pytest.raises(ValueError, match="one number per prompt"):
        sums(0)


def test_a_curve_is_over_the_same_prompts():
    with pytest.raises(ValueError, match=r"share their prompts.*\[3, 4\]"):
        signal_curve({0: sums(3), 1: sums(4)}, 2.0, rng())
    with pytest.raises(ValueError, match="share their prompts"):
        signal_curve({}, 2.0, rng())


def test_signals_are_a_quality_over_a_cost():
    assert len(set(SIGNALS)) == len(SIGNALS) == 2 * len(Cost)
    assert tuple(field.name for field in fields(PairSums)) == SUMS
    costs = dict(zip(Cost, (2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0, 19.0, 23.0), strict=True))
    pair = sums(
        shown=0.5, shown_share=0.25, log_ratio=math.log(2), own_log_ratio=math.log(3), squared_weight=5, own_weight=7,
        squared_sequence=11, own_sequence=13, gradient_current=17, gradient_exact=19, gradient_sequence=23,
    )  # fmt: skip
    curve = signal_curve({10: pair}, 1.0, rng(), resamples=2)
    for cost, value in costs.items():
        assert curve.values(cost)[0] == pytest.approx(value)
        assert curve.values(Signal(Quality.MANY, cost))[0] == pytest.approx(0.5 / value)
        assert curve.values(Signal(Quality.ONE, cost))[0] == pytest.approx(0.25 / value)
