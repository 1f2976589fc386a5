"""The effective learning signal S = Q / V of a trajectory source at distance Δ, and the distance that maximises it.

Q(Δ) is how much of what the policy fails the source can show; V(Δ) is what its trajectories cost through the importance
weight w = π/q, with π the policy that is updated and q the source that wrote the tokens. The paper states both in
words; the estimators, the rollout counts, the direction of the KL and its constant are not public, so they are ours.

V is a second moment, 1 for identical policies and never below. A variance would be 0 there and S would diverge.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Real
from scipy.optimize import curve_fit
from torch import Tensor

from .stats import Estimate

FAILURES = ("all", "any")
"""What counts as failing a prompt: every rollout wrong, or at least one."""

PROXIES = ("second_moment", "sequence", "kl")
"""Estimators of the variance cost."""

DIRECTIONS = ("source", "policy")
"""Which of the two policies sampled the tokens."""

MAX_LOG_COST = 700.0
"""Largest ln V that is returned, so that V stays a finite float64 (ours)."""


@dataclass(frozen=True)
class Optimum:
    """The best distance on a grid.

    Attributes:
        distance: Δ* in the unit of the grid (policy steps).
        signal: the signal S at Δ*.
        at_edge: Δ* is the first or last grid point, so the maximum may lie outside the grid: report it as an edge.
        low: lower end of the 95 % interval of Δ*, a grid point; None without resamples.
        high: upper end of the 95 % interval of Δ*, a grid point; None without resamples.
    """

    distance: float
    signal: float
    at_edge: bool
    low: float | None
    high: float | None


class QualityFit(NamedTuple):
    """Q(Δ) = q_inf·(1 − e^(−Δ/tau)): q_inf in [0, 1], tau in policy steps, rmse in units of Q."""

    q_inf: float
    tau: float
    rmse: float


class VarianceFit(NamedTuple):
    """V(Δ) = e^(beta·Δ): beta per policy step, rmse in units of ln V."""

    beta: float
    rmse: float


def signal_quality(
    source_correct: Bool[Tensor, "prompts k"],
    policy_correct: Bool[Tensor, "prompts k2"],
    *,
    rng: np.random.Generator,
    resamples: int = 1000,
    fail: str = "all",
) -> Estimate:
    """Source quality Q: of the prompts that the policy fails, the fraction with a verified-correct source trajectory.

    Source: paper (definition); ours (what "fails" means, the rollout counts, the interval). Three cautions. Q grows
    with k, so compare distances at equal k. "Fails" is itself judged from k2 samples, so bad luck selects prompts too,
    and an unchanged policy has Q > 0: for Q at distance 0 pass a SECOND, independent sample of the policy as the
    source. The interval is a percentile bootstrap over the failing prompts; when they all agree it has no width, which
    says that the sample does not vary and not that Q is known, so read it beside `n`.

    Args:
        source_correct: verdicts of the source's rollouts, prompts × k.
        policy_correct: verdicts of the policy's rollouts on the same prompts, prompts × k2.
        rng: source of the bootstrap resamples.
        resamples: number of resamples.
        fail: "all", the policy fails a prompt when all of its k2 rollouts are wrong; "any", when at least one is.

    Returns:
        Estimate of Q in [0, 1], with n = number of prompts that the policy fails.

    Raises:
        ValueError: no prompt fails (Q is undefined), both samples are the same tensor, the prompts do not match, a
            sample is empty, or an option is unknown.
    """
    if fail not in FAILURES:
        raise ValueError(f"fail is one of {FAILURES}; got {fail!r}.")
    if resamples < 1:
        raise ValueError(f"resamples is a whole number >= 1; got {resamples}. 1000 is usual.")
    if source_correct is policy_correct:
        raise ValueError(
            "source_correct and policy_correct are the same tensor, so the prompts that fail would be judged by the "
            "very rollouts that selected them. For Q at distance 0 sample the policy a second time, with another seed."
        )
    shapes = tuple(source_correct.shape), tuple(policy_correct.shape)
    if any(len(shape) != 2 or shape[1] == 0 for shape in shapes) or shapes[0][0] != shapes[1][0]:
        raise ValueError(
            f"needs verdicts of shape prompts x rollouts over the same prompts, with at least one rollout; got "
            f"{shapes[0]} for the source and {shapes[1]} for the policy. Align both by uid."
        )
    failed = ~policy_correct.any(dim=1) if fail == "all" else ~policy_correct.all(dim=1)
    n = int(failed.sum())
    if n == 0:
        raise ValueError(
            f"Q is undefined: the policy fails none of the {shapes[1][0]} prompts (fail={fail!r}), and a fraction of "
            "nothing must not be divided. Probe prompts from the mistake pool, or harder ones."
        )
    quality = int(source_correct[failed].any(dim=1).sum()) / n
    # Resampling n yes/no prompts with return and averaging them is a binomial draw.
    low, high = np.quantile(rng.binomial(n, quality, size=resamples) / n, (0.025, 0.975))
    return Estimate(value=quality, low=float(low), high=float(high), n=n)


def variance_cost(
    policy_logps: Float[Tensor, "batch tokens"],
    source_logps: Float[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
    proxy: str,
    *,
    c: float | int = 1.0,
    log_cap: float | int = 20.0,
    direction: str = "source",
) -> float:
    """Variance cost V ≥ 1 of putting the source's trajectories into the policy's update; exactly 1 for equal log-probs.

    Source: paper ("cost through the importance weight"; e^KL per token in AutoNPO); ours (the three estimators).

    - "second_moment": token mean of w², w = π/q.
    - "sequence": mean over sequences of W², W = the product of a sequence's weights.
    - "kl": exp(c·KL), KL = token mean of ln(sampler) − ln(other). For log-normal weights c = 2 gives the token second
      moment, and c near the response length the sequence-level KL; with a small c, V stays near 1 and the best
      distance collapses to the largest Q.

    The tokens were sampled by one of the two policies, named by `direction`. From the source's tokens the moment is
    E_q[w²] and the divergence KL(q‖π); from the policy's tokens it is E_π[w] (the same number, over prefixes that π
    visits) and KL(π‖q). The moments are heavy-tailed: far from the policy nearly all of the source's own tokens have
    w < 1, the sample misses the rare large weights and reads too low. Look at the effective sample size beside them.

    The KL is the plain mean, held at 0 from below, and not the k3 estimator r − 1 − ln r: k3 is less noisy near Δ = 0,
    but its r is an exponential, so far away one token decides V. The price is a standard error of about
    σ(ln w)/√tokens, which c multiplies.

    E[w] = 1 implies V ≥ 1, so a sample value below 1 is sampling error and is returned as 1.

    Args:
        policy_logps: ln π of the sampled tokens, natural log, at temperature 1 without top-p or top-k.
        source_logps: ln q of the same tokens.
        mask: True on response tokens; the other entries may hold anything. Rows without a token are left out.
        proxy: "second_moment", "sequence" or "kl".
        c: the constant of "kl", ≥ 0; without effect on the others.
        log_cap: largest ln w (second_moment) or ln W (sequence); larger ones are truncated to it, which lowers V.
        direction: "source" or "policy", the one that sampled the tokens.

    Returns:
        V in [1, e^700]: computed as ln V and cut at MAX_LOG_COST before the exponential, so it never overflows.

    Raises:
        ValueError: an option is unknown or out of range, shapes differ, the mask is empty, or a masked log-prob is not
            finite.
    """
    if proxy not in PROXIES:
        raise ValueError(f"proxy is one of {PROXIES}; got {proxy!r}.")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is one of {DIRECTIONS}, the policy that sampled the tokens; got {direction!r}.")
    if not (math.isfinite(c) and c >= 0):
        raise ValueError(f"c is a finite number >= 0; got {c}. Use about the response length for a sequence-level KL.")
    if not (math.isfinite(log_cap) and log_cap > 0):
        raise ValueError(f"log_cap is a finite number > 0; got {log_cap}. 20 truncates weights at e^20.")
    if not policy_logps.shape == source_logps.shape == mask.shape:
        raise ValueError(
            f"log-probs and mask have one shape, batch x tokens; got {tuple(policy_logps.shape)}, "
            f"{tuple(source_logps.shape)} and {tuple(mask.shape)}. Pad them alike."
        )
    if not bool(mask.any()):
        raise ValueError("the mask selects no token, so V is undefined. Pass at least one response with tokens.")
    log_weight = policy_logps.double() - source_logps.double()
    if not bool(torch.isfinite(log_weight[mask]).all()):
        raise ValueError(
            "log-probs under the mask must be finite; got NaN or infinity. Compute them from the full vocabulary, "
            "without top-p, top-k or a suppressed token, or correct the mask."
        )
    if proxy == "kl":
        sign = 1.0 if direction == "policy" else -1.0
        log_cost = c * max(sign * float(log_weight[mask].mean()), 0.0)
    else:
        if proxy == "sequence":
            samples = torch.where(mask, log_weight, 0.0).sum(dim=1)[mask.any(dim=1)]
        else:
            samples = log_weight[mask]
        order = 1.0 if direction == "policy" else 2.0
        log_moment = order * samples.clamp(max=log_cap)
        # Shift by the maximum instead of logsumexp − ln n: equal log-probs then give ln V = 0 without rounding.
        largest = log_moment.max()
        log_cost = float(largest + (log_moment - largest).exp().mean().log())
    return math.exp(min(max(log_cost, 0.0), MAX_LOG_COST))


def gradient_variance(per_sample_gradients: Float[Tensor, "batch params"], weights: Float[Tensor, " batch"]) -> float:
    """Measured variance of the weighted per-sample gradient w·g, against which the proxies of V are judged (ours).

    The trace of the unbiased sample covariance, which estimates E‖w·g‖² − ‖E[w·g]‖². The variance of a batch's mean
    gradient is this number divided by the batch size. It is 0 for identical samples, so compare ratios to the
    on-policy value with a V, not the number itself.

    Args:
        per_sample_gradients: one flattened gradient per trajectory, batch × params.
        weights: one importance weight per trajectory.

    Returns:
        Variance ≥ 0, in squared gradient units.

    Raises:
        ValueError: fewer than two samples, shapes that do not match, or a value that is not finite.
    """
    shapes = tuple(per_sample_gradients.shape), tuple(weights.shape)
    if len(shapes[0]) != 2 or shapes[1] != shapes[0][:1] or shapes[0][0] < 2:
        raise ValueError(
            f"needs gradients of shape batch x params and one weight each, with batch >= 2; got {shapes[0]} and "
            f"{shapes[1]}. A variance needs two samples."
        )
    weighted = per_sample_gradients.double() * weights.double()[:, None]
    if not bool(torch.isfinite(weighted).all()):
        raise ValueError("weighted gradients must be finite; got NaN or infinity. Check the weights' truncation.")
    return float(weighted.var(dim=0, correction=1).sum())


def optimal_distance(
    distances: Real[np.ndarray, " distances"],
    signal: Float[np.ndarray, " distances"],
    *,
    signal_samples: Float[np.ndarray, "resamples distances"] | None = None,
) -> Optimum:
    """Δ* = argmax of S over a grid of distances. Source: paper (argmax of Q/V); ours (the edge flag, the interval).

    A tie goes to the smaller distance. The interval is the 2.5 % to 97.5 % range of the argmax over resamples, widened
    to grid points; resample the same prompts at every distance, since S is compared between distances.

    Args:
        distances: grid in policy steps, strictly increasing.
        signal: S = Q/V at each distance.
        signal_samples: bootstrap resamples of S, resamples × distances.

    Returns:
        Optimum; low and high are None without `signal_samples`.

    Raises:
        ValueError: the grid is empty, not finite or not increasing, shapes do not match, or S is not finite.
    """
    grid = _as_grid(distances, signal, name="signal", at_least=1)
    values = np.asarray(signal, dtype=np.float64)
    best = int(np.argmax(values))
    low = high = None
    if signal_samples is not None:
        if signal_samples.ndim != 2 or signal_samples.shape[1] != grid.size or signal_samples.shape[0] == 0:
            raise ValueError(
                f"signal_samples has shape resamples x {grid.size}, with at least one resample; got "
                f"{signal_samples.shape}."
            )
        if not bool(np.isfinite(signal_samples).all()):
            raise ValueError("signal_samples must be finite; got NaN or infinity. Drop resamples where Q is undefined.")
        winners = grid[np.argmax(signal_samples, axis=1)]
        low = float(np.quantile(winners, 0.025, method="lower"))
        high = float(np.quantile(winners, 0.975, method="higher"))
    return Optimum(
        distance=float(grid[best]),
        signal=float(values[best]),
        at_edge=best in (0, grid.size - 1),
        low=low,
        high=high,
    )


def fit_quality(distances: Real[np.ndarray, " distances"], q: Float[np.ndarray, " distances"]) -> QualityFit:
    """Least-squares fit of Q(Δ) = q_inf·(1 − e^(−Δ/tau)), 0 ≤ q_inf ≤ 1 (ours; the paper: concave, rising, saturating).

    The form has Q(0) = 0, whereas an independent resample of the policy has Q(0) > 0: `rmse` shows that misfit. Where
    the data do not bend yet, only the slope q_inf/tau is determined, and q_inf runs to its bound; where they are flat
    from the first distance on, tau is only known to lie below that distance.

    Args:
        distances: policy steps, ≥ 0, strictly increasing, at least three.
        q: measured Q, in [0, 1].

    Returns:
        QualityFit(q_inf, tau, rmse).

    Raises:
        ValueError: too few points, values out of range, or Q is 0 everywhere (tau is then undetermined).
        RuntimeError: from scipy, when the fit does not converge.
    """
    grid = _as_grid(distances, q, name="q", at_least=3)
    values = np.asarray(q, dtype=np.float64)
    if grid[0] < 0:
        raise ValueError(f"distances are >= 0; got {grid.tolist()}. Distance is the source's step minus the policy's.")
    if values.min() < 0 or values.max() > 1 or values.max() == 0:
        raise ValueError(f"q is in [0, 1] and not 0 everywhere; got {values.tolist()}. Nothing rises, so tau is open.")

    def model(delta: np.ndarray, q_inf: float, tau: float) -> np.ndarray:
        return -q_inf * np.expm1(-delta / tau)

    # Start where the data reach 63 % of their maximum: that is tau on a curve that has saturated.
    reached = grid[(values >= (1 - math.exp(-1)) * values.max()) & (grid > 0)]
    start = (values.max(), reached[0] if reached.size else grid[-1])
    smallest_tau = 1e-6 * grid[-1]
    fitted, _ = curve_fit(
        model, grid, values, p0=start, bounds=((0.0, smallest_tau), (1.0, np.inf)), x_scale=(1.0, grid[-1])
    )
    return QualityFit(float(fitted[0]), float(fitted[1]), _rmse(model(grid, *fitted) - values))


def fit_variance(distances: Real[np.ndarray, " distances"], v: Float[np.ndarray, " distances"]) -> VarianceFit:
    """Least-squares fit of ln V(Δ) = beta·Δ, beta ≥ 0. Source: paper (V ≲ e^(βΔ)); ours (fitted in logs).

    In logs, since V spans orders of magnitude and its last point would otherwise decide alone. The paper's relation is
    a bound, this is a fit through the points.

    Args:
        distances: policy steps, ≥ 0, strictly increasing, at least two.
        v: measured V, ≥ 1.

    Returns:
        VarianceFit(beta, rmse), rmse of ln V.

    Raises:
        ValueError: too few points, or values out of range.
    """
    grid = _as_grid(distances, v, name="v", at_least=2)
    values = np.asarray(v, dtype=np.float64)
    if grid[0] < 0:
        raise ValueError(f"distances are >= 0; got {grid.tolist()}. Distance is the source's step minus the policy's.")
    if values.min() < 1:
        raise ValueError(f"v is a second moment, so >= 1; got {values.tolist()}. Use variance_cost, not a variance.")
    log_v = np.log(values)

    def model(delta: np.ndarray, beta: float) -> np.ndarray:
        return beta * delta

    start = max(float(log_v[-1] / grid[-1]), 1e-12)
    fitted, _ = curve_fit(model, grid, log_v, p0=(start,), bounds=(0.0, np.inf), x_scale=(1.0 / grid[-1],))
    return VarianceFit(float(fitted[0]), _rmse(model(grid, *fitted) - log_v))


def fitted_optimum(tau: float | int, beta: float | int) -> float:
    """Δ* = tau·ln(1 + 1/(beta·tau)), the maximum of (1 − e^(−Δ/tau))·e^(−beta·Δ) (ours, for the paper's shapes).

    Args:
        tau: distance scale of Q, in policy steps, > 0.
        beta: growth rate of ln V per policy step, > 0.

    Returns:
        Δ* in policy steps.

    Raises:
        ValueError: tau or beta is not a finite number above 0; with beta = 0 the signal never falls.
    """
    if not (math.isfinite(tau) and tau > 0 and math.isfinite(beta) and beta > 0):
        raise ValueError(
            f"tau and beta are finite and > 0; got tau={tau}, beta={beta}. With beta = 0 distance costs nothing and "
            "there is no interior optimum: report an edge."
        )
    return tau * math.log1p(1.0 / (beta * tau))


def _as_grid(distances: np.ndarray, values: np.ndarray, *, name: str, at_least: int) -> np.ndarray:
    grid = np.asarray(distances, dtype=np.float64)
    if grid.ndim != 1 or grid.size < at_least or np.shape(values) != grid.shape:
        raise ValueError(
            f"distances and {name} are one-dimensional, of one length >= {at_least}; got {grid.shape} and "
            f"{np.shape(values)}."
        )
    if not (bool(np.isfinite(grid).all()) and bool(np.all(np.diff(grid) > 0))):
        raise ValueError(f"distances are finite and strictly increasing; got {grid.tolist()}. Sort them, drop doubles.")
    if not bool(np.isfinite(values).all()):
        raise ValueError(f"{name} must be finite; got {np.asarray(values).tolist()}. Leave undefined distances out.")
    return grid


def _rmse(residual: np.ndarray) -> float:
    return float(np.sqrt(np.mean(residual**2)))
