"""Q, V and S against enumeration, closed forms and hand-computed numbers."""

import inspect
import math

import numpy as np
import pytest
import torch
from oracles import gradient_variance, signal_quality

from npo_core.method.quantities import PROXIES
from npo_core.method.signal import (
    LOG_CAP,
    MAX_LOG_COST,
    RatioSums,
    fit_quality,
    fit_variance,
    fitted_optimum,
    measured_cost,
    optimal_distance,
    quality,
    ratio_sums,
    shown,
    squared_deviations,
    variance_cost,
)


def rng(seed=0):
    return np.random.default_rng(seed)


DIRECTIONS = ("source", "policy")

# Prompt by prompt: failed and shown, failed and not shown, solved and shown, failed and shown twice, solved and not.
SOURCE = np.array([[0, 1, 0], [0, 0, 0], [1, 1, 1], [1, 1, 0], [0, 0, 0]], dtype=bool)
POLICY = np.array([[0, 0], [0, 0], [1, 0], [0, 0], [1, 1]], dtype=bool)


def q(source, policy, k, draws=None):
    failed = (~policy.any(axis=1)).astype(float)
    return quality(failed * shown(source, k), failed, draws)


def test_a_prompt_is_shown_by_k_rollouts_as_surely_as_k_drawn_from_its_own_hold_a_correct_one():
    assert shown(SOURCE, 3).tolist() == [1, 0, 1, 1, 0]
    assert shown(SOURCE, 1) == pytest.approx([1 / 3, 0, 1, 2 / 3, 0])
    # by enumeration of the pairs
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = [np.mean([row[list(pair)].any() for pair in pairs]) for row in SOURCE]
    assert shown(SOURCE, 2) == pytest.approx(expected)
    for k in (0, 4):
        with pytest.raises(ValueError):
            shown(SOURCE, k)


def test_quality_counts_only_failed_prompts():
    assert q(SOURCE, POLICY, 3) == pytest.approx([2 / 3])
    assert q(SOURCE, POLICY, 1) == pytest.approx([(1 / 3 + 2 / 3) / 3])
    expected, failing = signal_quality(torch.tensor(SOURCE), torch.tensor(POLICY))
    assert q(SOURCE, POLICY, 3)[0] == pytest.approx(expected) and failing == 3


def test_quality_of_a_draw_is_that_of_the_prompts_drawn_and_undefined_without_a_failing_one():
    draws = np.array([[1, 1, 1, 1, 1], [3, 1, 0, 0, 1], [0, 0, 2, 0, 3]])
    found = q(SOURCE, POLICY, 3, draws)
    assert found[:2] == pytest.approx([2 / 3, 3 / 4]) and math.isnan(found[2])


def test_quality_at_distance_zero_is_positive_by_selection():
    # Half of the prompts have success rate 1/2, half 0; one rollout each. Of 3/4 that fail, 1/3 are solvable: Q = 1/6.
    generator = rng()
    rate = np.tile([0.5, 0.0], 20_000)[:, None]
    first, second = (generator.random((40_000, 1)) < rate for _ in range(2))
    assert q(second, first, 1)[0] == pytest.approx(1 / 6, abs=0.01)


def cost_of(policy, source, mask, proxy, *, c=1.0, direction="source"):
    """V of a sample, from padded log-probs."""
    rows = [(π - q)[kept].double().numpy() for π, q, kept in zip(policy, source, mask, strict=True)]
    return float(variance_cost(ratio_sums(rows, direction).total(), proxy, c))


def lognormal(sigma, tokens, direction="source", batch=1):
    """Log-probs whose ln w is normal on quantiles, with E_q[w] = 1; from the policy's tokens its mean is +σ²/2."""
    z = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(tokens, dtype=torch.float64) + 0.5) / tokens)
    shift = -0.5 if direction == "source" else 0.5
    source = torch.full((batch, tokens), -1.5, dtype=torch.float64)
    return source + sigma * z + shift * sigma**2, source, torch.ones(batch, tokens, dtype=torch.bool)


@pytest.mark.parametrize("proxy", PROXIES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_cost_at_distance_zero_is_exactly_one(proxy, direction):
    logps = torch.log(torch.rand(7, 11, generator=torch.Generator().manual_seed(0)))
    mask = torch.rand(7, 11, generator=torch.Generator().manual_seed(1)) < 0.7
    assert cost_of(logps, logps.clone(), mask, proxy, c=50.0, direction=direction) == 1.0


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_lognormal_weights_kl_is_half_sigma_squared_and_the_second_moment_its_double(direction, sigma):
    policy, source, mask = lognormal(sigma, 200_000, direction)
    kl = math.log(cost_of(policy, source, mask, "kl", direction=direction))
    assert kl == pytest.approx(sigma**2 / 2, rel=1e-6)
    moment = cost_of(policy, source, mask, "second_moment", direction=direction)
    assert moment == pytest.approx(math.exp(2 * kl), rel=1e-3)
    assert cost_of(policy, source, mask, "kl", c=2, direction=direction) == pytest.approx(moment, rel=1e-3)


def test_costs_by_hand():
    # Two responses, of two tokens and one; w = 2, 1/2 and 3.
    policy = torch.tensor([[2.0, 0.5], [3.0, 1.0]]).log()
    source = torch.zeros(2, 2)
    mask = torch.tensor([[True, True], [True, False]])
    assert cost_of(policy, source, mask, "second_moment") == pytest.approx((4 + 0.25 + 9) / 3)
    assert cost_of(policy, source, mask, "second_moment", direction="policy") == pytest.approx(5.5 / 3)
    assert cost_of(policy, source, mask, "sequence") == pytest.approx((1 + 9) / 2)
    assert cost_of(policy, source, mask, "sequence", direction="policy") == pytest.approx((1 + 3) / 2)
    # The mean of ln w is ln(3)/3; from the policy's tokens that is the KL, from the source's it is below 0.
    assert cost_of(policy, source, mask, "kl", c=6.0, direction="policy") == pytest.approx(9.0)
    assert cost_of(policy, source, mask, "kl", c=6.0, direction="source") == 1.0
    assert cost_of(source, policy, mask, "kl", c=6.0, direction="source") == pytest.approx(9.0)


@pytest.mark.parametrize("proxy", PROXIES)
def test_a_sample_below_one_is_returned_as_one(proxy):
    # Tokens that the source likes better than the policy does: every w = 1/2, although E_q[w] = 1.
    mask = torch.ones(2, 3, dtype=torch.bool)
    policy = torch.full((2, 3), -math.log(2))
    assert cost_of(policy, torch.zeros(2, 3), mask, proxy, c=0.0) == 1.0
    assert cost_of(policy, torch.zeros(2, 3), mask, proxy, direction="policy") == 1.0


def test_a_response_without_tokens_is_no_sequence():
    policy = torch.tensor([[2.0], [4.0], [100.0]]).log()
    mask = torch.tensor([[True], [True], [False]])
    assert cost_of(policy, torch.zeros(3, 1), mask, "sequence") == pytest.approx((4 + 16) / 2)


def test_moments_hold_weights_of_any_range():
    policy, mask = torch.tensor([[10.0, -1e4]]), torch.ones(1, 2, dtype=torch.bool)
    assert cost_of(policy, torch.zeros(1, 2), mask, "second_moment") == pytest.approx(math.exp(20) / 2)


def test_second_moment_of_a_tabular_policy():
    # Every token of q = (3/4, 1/4) in proportion; π = (1/2, 1/2): E_q[w²] = 1/3 + 1 = 4/3. From π's tokens, E_π[w].
    pi, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()
    from_source, from_policy = torch.tensor([[0, 0, 0, 1]]), torch.tensor([[0, 1, 0, 1]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    for tokens, direction in ((from_source, "source"), (from_policy, "policy")):
        cost = cost_of(pi[tokens], q[tokens], mask, "second_moment", direction=direction)
        assert cost == pytest.approx(4 / 3, rel=1e-6)


def test_cost_ignores_what_is_not_masked():
    policy, source, mask = lognormal(0.5, 20, batch=3)
    padded = torch.cat([mask, torch.zeros(3, 2, dtype=torch.bool)], dim=1)
    padded = torch.cat([padded, torch.zeros(1, 22, dtype=torch.bool)])
    junk = torch.full((4, 22), math.nan, dtype=torch.float64)
    far_policy, far_source = junk.clone(), junk.clone()
    far_policy[:3, :20], far_source[:3, :20] = policy, source
    for proxy in PROXIES:
        assert cost_of(far_policy, far_source, padded, proxy) == cost_of(policy, source, mask, proxy)


@pytest.mark.parametrize("proxy", PROXIES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e30])
def test_cost_is_finite_and_at_least_one_at_any_distance(proxy, direction, scale):
    policy = scale * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    source = scale * torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(4, 6, dtype=torch.bool)
    cost = cost_of(policy, source, mask, proxy, c=1e6, direction=direction)
    assert 1.0 <= cost <= math.exp(MAX_LOG_COST)


def test_the_cap_truncates_the_weight_before_it_is_squared():
    policy, source, mask = torch.tensor([[30.0, 10.0]]), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    assert LOG_CAP == 20
    assert cost_of(policy, source, mask, "sequence") == pytest.approx(math.exp(40))
    assert cost_of(policy, source, mask, "second_moment") == pytest.approx((math.exp(40) + math.exp(20)) / 2)


def test_costs_of_several_samples_at_once_are_those_of_each():
    samples = [[rng(seed).normal(-0.1, 0.3, size) for size in (3, 5)] for seed in range(4)]
    one_by_one = [ratio_sums(rows, "source").total() for rows in samples]
    together = RatioSums(*map(np.array, zip(*one_by_one, strict=True)))
    for proxy in PROXIES:
        assert variance_cost(together, proxy, 2.0) == pytest.approx(
            [float(variance_cost(one, proxy, 2.0)) for one in one_by_one]
        )


def test_cost_refuses_bad_input():
    sums = ratio_sums([np.array([0.1])], "source").total()
    with pytest.raises(ValueError, match="proxy is one of"):
        inspect.unwrap(variance_cost)(sums, "variance", 1.0)
    for c in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="c is a finite number"):
            variance_cost(sums, "kl", c)
    with pytest.raises(ValueError, match="must be finite"):
        ratio_sums([np.array([0.0, -math.inf])], "source")
    nothing = ratio_sums([np.zeros(0)], "source").total()
    assert all(math.isnan(variance_cost(nothing, proxy, 1.0)) for proxy in PROXIES)


def test_squared_deviations_average_to_the_gradient_variance():
    gradients = rng().normal(1.0, 2.0, (5, 3))
    found = squared_deviations(gradients)
    assert found.mean() == pytest.approx(gradient_variance(torch.tensor(gradients)))
    # by hand: 0 and 4 lie 2 from their mean, and n/(n − 1) = 2
    assert squared_deviations(np.array([[0.0], [4.0]])).tolist() == [8.0, 8.0]
    with pytest.raises(ValueError, match="two samples; got 1"):
        inspect.unwrap(squared_deviations)(gradients[:1])


def test_squared_deviations_are_unbiased():
    # All 3-samples with return from {0, 1, 5}: their mean variance is the population's variance.
    population = [0.0, 1.0, 5.0]
    samples = [[a, b, c] for a in population for b in population for c in population]
    measured = [squared_deviations(np.array(sample)[:, None]).mean() for sample in samples]
    assert np.mean(measured) == pytest.approx(np.var(population))


def test_squared_deviations_of_single_precision_gradients_keep_a_small_spread_beside_a_large_mean():
    gradients = np.float32(4096.0) + np.array([[0.0], [0.5], [1.0]], dtype=np.float32)
    assert squared_deviations(gradients).mean() == pytest.approx(0.25)


def test_a_measured_cost_is_in_units_of_the_on_policy_variance_of_the_same_draw():
    draws = np.array([[1, 1, 1], [2, 0, 0], [0, 0, 3]])
    found = measured_cost(np.array([4.0, 2.0, 0.0]), np.array([2.0, 2.0, 0.0]), draws)
    assert found[:2].tolist() == [1.5, 2.0] and math.isnan(found[2])


def test_optimum_inside_and_at_the_edges():
    grid = np.array([0, 10, 20, 40])
    inside = optimal_distance(grid, np.array([0.1, 0.4, 0.3, 0.1]))
    assert (inside.distance, inside.signal, inside.at_edge, inside.low, inside.high) == (10.0, 0.4, False, None, None)
    assert optimal_distance(grid, np.array([0.5, 0.4, 0.3, 0.1])).at_edge
    last = optimal_distance(grid, np.array([0.1, 0.2, 0.3, 0.4]))
    assert (last.distance, last.at_edge) == (40.0, True)
    assert optimal_distance(grid[:1], np.array([0.5])).at_edge
    assert optimal_distance(grid, np.array([0.1, 0.4, 0.4, 0.1])).distance == 10.0


def test_optimum_interval_from_resamples():
    grid = np.array([0.0, 10.0, 20.0, 40.0])
    # The best distance is 10 in 90 of 100 resamples, 20 in eight, and 0 and 40 in one each.
    winners = np.array([1] * 90 + [2] * 8 + [0, 3])
    optimum = optimal_distance(grid, np.array([0.1, 0.4, 0.3, 0.1]), signal_samples=np.eye(4)[winners])
    assert (optimum.distance, optimum.low, optimum.high) == (10.0, 10.0, 20.0)


def test_optimum_refuses_bad_input():
    grid, signal = np.array([0.0, 10.0, 20.0]), np.array([0.1, 0.2, 0.1])
    with pytest.raises(ValueError, match="increasing"):
        optimal_distance(grid[::-1], signal)
    with pytest.raises(ValueError, match="increasing"):
        optimal_distance(np.array([0.0, 10.0, 10.0]), signal)
    with pytest.raises(ValueError, match="signal must be finite"):
        optimal_distance(grid, np.array([0.1, np.nan, 0.1]))
    with pytest.raises(ValueError, match="length >= 1"):
        optimal_distance(grid[:0], signal[:0])
    with pytest.raises(ValueError, match="at least one resample"):
        optimal_distance(grid, signal, signal_samples=np.ones((0, 3)))
    with pytest.raises(ValueError, match="signal_samples must be finite"):
        optimal_distance(grid, signal, signal_samples=np.full((2, 3), np.nan))


@pytest.mark.parametrize(("tau", "beta"), [(20.0, 0.01), (70.0, 0.002), (5.0, 0.5)])
def test_oracle_is_the_argmax_on_a_fine_grid(tau, beta):
    grid = np.linspace(0.0, 400.0, 400_001)
    signal = 0.7 * (1 - np.exp(-grid / tau)) / np.exp(beta * grid)
    optimum = optimal_distance(grid, signal)
    assert not optimum.at_edge
    assert fitted_optimum(tau, beta) == pytest.approx(optimum.distance, abs=2e-3)


def test_oracle_needs_a_cost_of_distance():
    assert fitted_optimum(20, 1) == pytest.approx(20 * math.log(1.05))
    for tau, beta in ((20.0, 0.0), (0.0, 0.1), (20.0, math.nan)):
        with pytest.raises(ValueError, match="> 0"):
            fitted_optimum(tau, beta)


def test_fits_recover_the_curves_they_assume():
    grid = np.array([0, 10, 20, 40, 80, 160])
    quality = fit_quality(grid, 0.7 * (1 - np.exp(-grid / 25.0)))
    assert [quality.q_inf, quality.tau, quality.rmse] == pytest.approx([0.7, 25.0, 0.0], rel=1e-4, abs=1e-6)
    variance = fit_variance(grid, np.exp(0.013 * grid))
    assert [variance.beta, variance.rmse] == pytest.approx([0.013, 0.0], rel=1e-5, abs=1e-8)
    assert fitted_optimum(quality.tau, variance.beta) == pytest.approx(fitted_optimum(25.0, 0.013), rel=1e-3)


def test_fits_report_their_misfit():
    grid = np.array([10.0, 20.0, 40.0])
    # ln V = 0.1, 0.2, 0.7: beta = (1 + 4 + 28) / 2100 by least squares through the origin.
    variance = fit_variance(grid, np.exp(np.array([0.1, 0.2, 0.7])))
    beta = 33 / 2100
    assert variance.beta == pytest.approx(beta, rel=1e-6)
    assert variance.rmse == pytest.approx(np.sqrt(np.mean((beta * grid - [0.1, 0.2, 0.7]) ** 2)), rel=1e-6)
    assert fit_quality(np.array([0.0, 10.0, 20.0, 40.0]), np.array([0.4, 0.5, 0.5, 0.5])).rmse > 0.15
    assert fit_variance(grid, np.ones(3)).beta == pytest.approx(0.0, abs=1e-9)


def test_fits_refuse_bad_input():
    grid = np.array([0.0, 10.0, 20.0])
    for q in ([0.0, 0.0, 0.0], [0.0, 0.5, 1.2], [-0.1, 0.2, 0.3]):
        with pytest.raises(ValueError, match="q is in"):
            fit_quality(grid, np.array(q))
    with pytest.raises(ValueError, match="length >= 3"):
        fit_quality(grid[:2], np.array([0.0, 0.4]))
    with pytest.raises(ValueError, match=">= 0"):
        fit_quality(grid - 10, np.array([0.0, 0.4, 0.5]))
    with pytest.raises(ValueError, match="second moment"):
        fit_variance(grid, np.array([0.0, 0.1, 0.2]))
    with pytest.raises(ValueError, match=">= 0"):
        fit_variance(grid - 10, np.array([1.0, 1.1, 1.2]))
