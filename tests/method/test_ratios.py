"""Ratios: every mode by enumeration on a tabular policy, log-normal closed forms, and extreme log ratios."""

import math

import pytest
import torch
from oracles import log_ratio

from npo_core.method.ratios import MAX_LOG_WEIGHT, RATIO_MODES, gradient_weight

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
    weight = log_ratio(logps, behaviour, mode).exp()
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


HAND_RHO = _column(0.5, 1.0, 3.0)
HAND = {
    # mode: coefficients for rho = 0.5, 1, 3, truncation 2, gamma 0.1
    "current": [1.0, 1.0, 1.0],
    "exact": [0.5, 1.0, 3.0],
    "truncated": [0.5, 1.0, 2.0],  # a differentiated minimum would give 0 for the last
    "shaped": [0.05 / 0.36, 0.1 / 1.21, 0.3 / 9.61],
}


@pytest.mark.parametrize("mode", RATIO_MODES)
def test_hand_numbers(mode):
    behaviour = torch.full_like(HAND_RHO, -2.0)
    found = gradient_weight(behaviour + HAND_RHO.log(), behaviour, _ones(behaviour), mode)
    torch.testing.assert_close(found, _column(*HAND[mode]))


@pytest.mark.parametrize("mode", RATIO_MODES)
@pytest.mark.parametrize("padding", [math.nan, math.inf, -math.inf, 300.0])
def test_padding_never_counts(mode, padding):
    policy = torch.tensor([[-1.0, padding, -2.0]], requires_grad=True)
    behaviour = torch.tensor([[-1.5, padding, -1.0]])
    mask = torch.tensor([[True, False, True]])
    # A truncation below 1 is the case in which a ratio of 1 in the padding would itself be truncated.
    weight = gradient_weight(policy, behaviour, mask, mode, truncation=0.5)
    assert weight[0, 1] == 0.0 and (weight[mask] > 0).all() and not weight.requires_grad


@pytest.mark.parametrize("mode", RATIO_MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_stable_at_five_hundred_nats(mode, dtype):
    policy = torch.tensor([[0.0, -500.0]], dtype=dtype)
    behaviour = torch.tensor([[-500.0, 0.0]], dtype=dtype)
    weight = gradient_weight(policy, behaviour, torch.ones(1, 2, dtype=torch.bool), mode)
    assert weight.isfinite().all() and weight.dtype == torch.promote_types(dtype, torch.float32)
    expected = {
        "current": [1.0, 1.0],
        "exact": [math.exp(MAX_LOG_WEIGHT), 0.0],
        "truncated": [2.0, 0.0],
        "shaped": [0.0, 0.0],
    }[mode]
    assert weight[0].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-30)


def test_shaped_coefficient_is_largest_at_gamma():
    rho = torch.logspace(-6, 3, 1001, dtype=torch.float64)[:, None]
    c = gradient_weight(rho.log(), torch.zeros_like(rho), _ones(rho), "shaped", gamma=0.1)
    assert c.max().item() == pytest.approx(0.25, rel=1e-3)
    assert rho[c.argmax()].item() == pytest.approx(0.1, rel=0.05)


def test_a_token_that_guide_and_rollouts_share_is_pushed_down_by_shaped_and_not_by_current():
    """Centred advantages: what the rollouts lose, A times their share p of the token, the guide must give back, A c.

    c - p is the expected push on a token that every guide has. Shaped, q = 1, it holds only p = sqrt(gamma) - gamma.
    """
    p = torch.linspace(0.01, 0.999, 500, dtype=torch.float64)[:, None]
    one, mask = torch.zeros_like(p), _ones(p)
    held = math.sqrt(0.1) - 0.1
    push = gradient_weight(p.log(), one, mask, "shaped", gamma=0.1) - p
    assert (push[p > held] < 0).all() and (push[p < held] > 0).all()
    assert push[-1].item() == pytest.approx(0.1 * 0.999 / 1.099**2 - 0.999), "a likely token gets back a twelfth"
    assert (gradient_weight(p.log(), one, mask, "current") > p).all()


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
def test_bad_settings_are_refused(options):
    logps = torch.zeros(1, 2)
    with pytest.raises(REFUSED):
        gradient_weight(logps, logps, torch.ones(1, 2, dtype=torch.bool), **options)


def test_shapes_that_would_broadcast_are_refused():
    logps, mask = torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool)
    for arguments in [
        (logps[0], logps, mask),
        (logps, logps[:1], mask),
        (logps, logps, mask[0]),
        (logps[0],) * 2 + (mask[0],),
    ]:
        with pytest.raises(REFUSED):
            gradient_weight(*arguments, "exact")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_token_that_is_not_finite_is_named(bad):
    logps = torch.full((2, 3), -1.0)
    broken = logps.clone()
    broken[1, 2] = bad
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="row 1, token 2"):
        gradient_weight(broken, logps, mask, "exact")
    with pytest.raises(ValueError, match="row 1, token 2"):
        gradient_weight(logps, broken, mask, "current")
