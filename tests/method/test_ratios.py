"""Ratios: every mode by enumeration on a tabular policy, log-normal closed forms, and extreme log ratios."""

import json
import math
import sys
from dataclasses import asdict

import pytest
import torch

from npo_core.method.ratios import MAX_LOG_WEIGHT, RATIO_MODES, diagnostics, gradient_weight, log_ratio

REFUSED = (ValueError, TypeError)
ACTIONS = 6


def _column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def _ones(logps: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(logps, dtype=torch.bool)


@pytest.fixture
def tabular():
    """Logits of a one-token policy, a behaviour policy with ratios on both sides of the truncation, and advantages."""
    generator = torch.Generator().manual_seed(3)
    theta = torch.randn(ACTIONS, generator=generator, dtype=torch.float64).mul(1.5).requires_grad_()
    behaviour = (torch.randn(ACTIONS, generator=generator, dtype=torch.float64) * 1.5).log_softmax(0)
    advantages = torch.randn(ACTIONS, generator=generator, dtype=torch.float64)
    rho = (theta.detach().log_softmax(0) - behaviour).exp()
    assert rho.min() < 0.5 < 2.0 < rho.max()
    return theta, behaviour, advantages


def _score_function_gradient(theta, coefficients):
    """sum_a coefficient_a grad log pi(a), with grad log pi(a) = onehot(a) - pi written out by hand."""
    pi = theta.detach().softmax(0)
    return coefficients - coefficients.sum() * pi


@pytest.mark.parametrize("mode", RATIO_MODES)
def test_gradient_by_enumeration(mode, tabular):
    """E_q[weight * A]: autograd through exp(log_ratio) against c * A * grad log pi, summed over all actions."""
    theta, q_logps, advantages = tabular
    logps, behaviour = theta.log_softmax(0)[:, None], q_logps[:, None]
    mask = _ones(behaviour)
    weight = log_ratio(logps, behaviour, mask, mode).exp()
    objective = (q_logps.exp() * weight[:, 0] * advantages).sum()
    (autograd,) = torch.autograd.grad(objective, theta)
    c = gradient_weight(logps, behaviour, mask, mode)
    assert not c.requires_grad
    torch.testing.assert_close(autograd, _score_function_gradient(theta, q_logps.exp() * c[:, 0] * advantages))


def test_exact_mode_is_the_on_policy_gradient(tabular):
    """Importance sampling is unbiased: E_q[rho A grad log pi] = E_pi[A grad log pi] = grad sum_a pi(a) A(a)."""
    theta, q_logps, advantages = tabular
    (on_policy,) = torch.autograd.grad((theta.softmax(0) * advantages).sum(), theta)
    c = gradient_weight(theta.log_softmax(0)[:, None], q_logps[:, None], _ones(q_logps[:, None]), "exact")
    torch.testing.assert_close(on_policy, _score_function_gradient(theta, q_logps.exp() * c[:, 0] * advantages))


def test_shaped_mode_is_luffys_objective(tabular):
    """Autograd through rho/(rho+gamma), written plainly."""
    theta, q_logps, advantages = tabular
    rho = (theta.log_softmax(0) - q_logps).exp()
    (plain,) = torch.autograd.grad((q_logps.exp() * rho / (rho + 0.3) * advantages).sum(), theta)
    c = gradient_weight(theta.log_softmax(0)[:, None], q_logps[:, None], _ones(q_logps[:, None]), "shaped", gamma=0.3)
    torch.testing.assert_close(plain, _score_function_gradient(theta, q_logps.exp() * c[:, 0] * advantages))


def test_truncation_is_a_constant_and_keeps_the_gradient_above_it():
    policy = _column(math.log(0.8), math.log(0.3)).requires_grad_()
    behaviour = _column(math.log(0.1), math.log(0.2))  # rho = 8 and 1.5
    log_weight = log_ratio(policy, behaviour, _ones(behaviour), "truncated", truncation=2.0)
    torch.testing.assert_close(log_weight.exp().detach(), _column(2.0, 1.5))
    (gradient,) = torch.autograd.grad(log_weight.exp().sum(), policy)
    torch.testing.assert_close(gradient, _column(2.0, 1.5))  # a differentiated minimum would give 0 and 1.5


HAND_RHO = _column(0.5, 1.0, 3.0)
HAND = {
    # mode: (weights, coefficients) for rho = 0.5, 1, 3, truncation 2, gamma 0.1
    "current": ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
    "exact": ([0.5, 1.0, 3.0], [0.5, 1.0, 3.0]),
    "truncated": ([0.5, 1.0, 2.0], [0.5, 1.0, 2.0]),
    "shaped": ([0.5 / 0.6, 1 / 1.1, 3 / 3.1], [0.05 / 0.36, 0.1 / 1.21, 0.3 / 9.61]),
}


@pytest.mark.parametrize("mode", RATIO_MODES)
def test_hand_numbers(mode):
    behaviour = torch.full_like(HAND_RHO, -2.0)
    arguments = (behaviour + HAND_RHO.log(), behaviour, _ones(behaviour), mode)
    weights, coefficients = HAND[mode]
    torch.testing.assert_close(log_ratio(*arguments), _column(*weights).log())
    torch.testing.assert_close(gradient_weight(*arguments), _column(*coefficients))


def test_current_mode_is_exactly_one_and_passes_the_gradient():
    policy = torch.tensor([[-1.3, -0.2]], requires_grad=True)
    value = log_ratio(policy, torch.tensor([[-9.0, -3.0]]), torch.ones(1, 2, dtype=torch.bool), "current")
    assert value.tolist() == [[0.0, 0.0]]
    value.sum().backward()
    assert policy.grad.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("mode", RATIO_MODES)
@pytest.mark.parametrize("padding", [math.nan, math.inf, -math.inf, 300.0])
def test_padding_never_counts(mode, padding):
    policy = torch.tensor([[-1.0, padding, -2.0]], requires_grad=True)
    behaviour = torch.tensor([[-1.5, padding, -1.0]], requires_grad=True)
    mask = torch.tensor([[True, False, True]])
    # A truncation below 1 is the case in which a ratio of 1 in the padding would itself be truncated.
    value = log_ratio(policy, behaviour, mask, mode, truncation=0.5)
    weight = gradient_weight(policy, behaviour, mask, mode, truncation=0.5)
    assert value[0, 1] == 0.0 and weight[0, 1] == 0.0
    assert value.isfinite().all() and (weight[mask] > 0).all()
    value.sum().backward()
    assert policy.grad.isfinite().all() and policy.grad[0, 1] == 0.0
    assert behaviour.grad is None


@pytest.mark.parametrize("mode", RATIO_MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_stable_at_five_hundred_nats(mode, dtype):
    policy = torch.tensor([[0.0, -500.0]], dtype=dtype, requires_grad=True)
    behaviour = torch.tensor([[-500.0, 0.0]], dtype=dtype)
    mask = torch.ones(1, 2, dtype=torch.bool)
    value = log_ratio(policy, behaviour, mask, mode)
    weight = gradient_weight(policy, behaviour, mask, mode)
    value.sum().backward()
    assert value.isfinite().all() and weight.isfinite().all() and policy.grad.isfinite().all()
    assert value.dtype == weight.dtype == torch.promote_types(dtype, torch.float32)
    expected_log = {
        "current": [0.0, 0.0],
        "exact": [500.0, -500.0],
        "truncated": [math.log(2.0), -500.0],
        "shaped": [0.0, -500.0 - math.log(0.1)],
    }[mode]
    expected_weight = {
        "current": [1.0, 1.0],
        "exact": [math.exp(MAX_LOG_WEIGHT), 0.0],
        "truncated": [2.0, 0.0],
        "shaped": [0.0, 0.0],
    }[mode]
    assert value[0].tolist() == pytest.approx(expected_log, rel=1e-6, abs=1e-6)
    assert weight[0].tolist() == pytest.approx(expected_weight, rel=1e-5, abs=1e-30)


def test_shaped_coefficient_is_largest_at_gamma():
    rho = torch.logspace(-6, 3, 1001, dtype=torch.float64)[:, None]
    c = gradient_weight(rho.log(), torch.zeros_like(rho), _ones(rho), "shaped", gamma=0.1)
    assert c.max().item() == pytest.approx(0.25, rel=1e-3)
    assert rho[c.argmax()].item() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "none"},
        {"mode": "exact", "truncation": 0.0},
        {"mode": "exact", "gamma": -0.1},
        {"mode": "shaped", "gamma": math.nan},
        {"mode": "truncated", "truncation": math.inf},
    ],
)
@pytest.mark.parametrize("function", [log_ratio, gradient_weight])
def test_bad_settings_are_refused(function, options):
    logps = torch.zeros(1, 2)
    with pytest.raises(REFUSED):
        function(logps, logps, torch.ones(1, 2, dtype=torch.bool), **options)


@pytest.mark.parametrize("function", [log_ratio, gradient_weight])
def test_shapes_that_would_broadcast_are_refused(function):
    logps, mask = torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool)
    for arguments in [
        (logps[0], logps, mask),
        (logps, logps[:1], mask),
        (logps, logps, mask[0]),
        (logps[0],) * 2 + (mask[0],),
    ]:
        with pytest.raises(REFUSED):
            function(*arguments, "exact")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_token_that_is_not_finite_is_named(bad):
    logps = torch.full((2, 3), -1.0)
    broken = logps.clone()
    broken[1, 2] = bad
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="row 1, token 2"):
        log_ratio(broken, logps, mask, "exact")
    with pytest.raises(ValueError, match="row 1, token 2"):
        diagnostics(logps, broken, mask)


def test_diagnostics_by_hand():
    # Ratios 2, 1/2 | 1, padding | a row without a token.
    policy = torch.tensor([[2.0, 0.5], [1.0, 1e9], [1e9, 1e9]], dtype=torch.float64).log()
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    found = diagnostics(policy, torch.zeros_like(policy), mask)
    assert found.token_kl == pytest.approx(0.0, abs=1e-12)
    assert found.sequence_kl == pytest.approx(0.0, abs=1e-12)
    assert found.chi_square == pytest.approx((4 + 0.25 + 1) / 3 - 1)
    assert found.effective_sample_size == pytest.approx(3.5**2 / 5.25 / 3)
    assert found.clip_fraction == pytest.approx(2 / 3)
    assert found.mean_ratio == pytest.approx(3.5 / 3)


def test_kl_per_token_and_per_sequence_differ_by_the_length():
    policy = torch.tensor([[-3.0, -2.0, -1.0], [-4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    behaviour = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    found = diagnostics(policy, behaviour, mask)
    assert found.token_kl == pytest.approx((2 + 1 + 0 + 3) / 4)
    assert found.sequence_kl == pytest.approx((3 + 3) / 2)


def test_equal_policies_are_at_distance_zero():
    logps = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    found = diagnostics(logps, logps, torch.ones(3, 5, dtype=torch.bool))
    assert found.token_kl == found.sequence_kl == found.clip_fraction == 0.0
    assert found.effective_sample_size == pytest.approx(1.0) and found.effective_sample_size <= 1.0
    assert found.chi_square == pytest.approx(0.0, abs=1e-12) and found.mean_ratio == pytest.approx(1.0)


def test_clip_range_is_asymmetric_and_its_bounds():
    ratios = torch.tensor([[0.79, 0.81, 1.27, 1.29]])
    logps, mask = ratios.log(), torch.ones(1, 4, dtype=torch.bool)
    assert diagnostics(logps, torch.zeros(1, 4), mask).clip_fraction == 0.5
    assert diagnostics(logps, torch.zeros(1, 4), mask, clip_high=0.2).clip_fraction == 0.75
    assert diagnostics(logps, torch.zeros(1, 4), mask, clip_low=0.3, clip_high=0.3).clip_fraction == 0.0


def test_divergences_of_a_tabular_policy_by_enumeration(tabular):
    """A sample that holds each action exactly in proportion to q turns the estimators into the expectations."""
    counts = torch.tensor([5, 1, 2, 4, 7, 1])
    q = counts.double() / counts.sum()
    pi = tabular[0].detach().softmax(0)
    actions = torch.arange(ACTIONS).repeat_interleave(counts)[None]
    found = diagnostics(pi.log()[actions], q.log()[actions], torch.ones_like(actions, dtype=torch.bool))
    assert found.token_kl == pytest.approx((q * (q / pi).log()).sum().item())
    assert found.chi_square == pytest.approx((pi**2 / q).sum().item() - 1)
    assert found.effective_sample_size == pytest.approx(1 / (pi**2 / q).sum().item())
    assert found.mean_ratio == pytest.approx(1.0)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.6])
def test_log_normal_weights_have_their_closed_forms(sigma):
    """log w ~ N(-sigma^2/2, sigma^2): E[w] = 1, KL = sigma^2/2, E[w^2] = exp(sigma^2), so E[w^2] = exp(2 KL)."""
    noise = torch.randn(400, 1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    log_weight = sigma * noise - sigma**2 / 2
    found = diagnostics(log_weight, torch.zeros_like(log_weight), torch.ones_like(log_weight, dtype=torch.bool))
    assert found.mean_ratio == pytest.approx(1.0, abs=0.005)
    assert found.token_kl == pytest.approx(sigma**2 / 2, rel=0.05)
    assert found.sequence_kl == pytest.approx(1000 * found.token_kl)
    assert found.chi_square == pytest.approx(math.expm1(sigma**2), rel=0.05)
    assert found.effective_sample_size == pytest.approx(math.exp(-(sigma**2)), rel=0.02)
    assert 1 + found.chi_square == pytest.approx(math.exp(2 * found.token_kl), rel=0.02)


def test_diagnostics_stay_finite_and_valid_json_at_five_hundred_nats():
    policy, behaviour = torch.tensor([[0.0, -500.0]]), torch.tensor([[-500.0, 0.0]])
    found = diagnostics(policy, behaviour, torch.ones(1, 2, dtype=torch.bool))
    assert found.chi_square == sys.float_info.max
    assert found.mean_ratio == pytest.approx(math.exp(500) / 2)
    assert found.effective_sample_size == pytest.approx(0.5)
    assert found.token_kl == 0.0 and found.clip_fraction == 1.0
    assert json.loads(json.dumps(asdict(found), allow_nan=False)) == asdict(found)
    assert all(type(value) is float for value in asdict(found).values())


def test_diagnostics_do_not_hold_the_graph_and_refuse_an_empty_mask():
    policy = torch.zeros(1, 2, requires_grad=True)
    diagnostics(policy, torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="no token"):
        diagnostics(policy, torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="clip_low"):
        diagnostics(policy, torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), clip_low=1.0)
