"""The effective learning signal S = Q / V of a trajectory source at distance Δ, and the distance that maximises it.

Q(Δ) is how much of what the policy fails the source can show; V(Δ) is what its trajectories cost through the importance
weight w = π/q, with π the policy that is updated and q the source that wrote the tokens. The paper states both in
words; the estimators, the rollout counts, the direction of the KL and its constant are not public, so they are ours.

V is a second moment, 1 for identical policies and never below. A variance would be 0 there and S would diverge.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Real
from scipy.optimize import curve_fit

from .quantities import PROXIES, Proxy, Side
from .stats import pass_at_k

MAX_LOG_COST = 700.0
"""Largest ln V that is returned, so that V stays a finite float64 (ours)."""

LOG_CAP = 20.0
"""Nats at which ln w of a token and ln W of a sequence are cut before they are squared; it lowers V (ours)."""


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


def shown(correct: Bool[np.ndarray, "prompts rollouts"], k: int) -> Float[np.ndarray, " prompts"]:
    """How surely k rollouts of a source show each prompt: the chance that one of them, drawn from its own, is correct.

    With k = 1 the share of correct rollouts, with k = all of them 1 where any is correct.

    Args:
        correct: verdicts of the source's rollouts, prompts × rollouts.
        k: rollouts that a guide is taken from, 1 ≤ k ≤ rollouts.

    Raises:
        ValueError: k is out of range.
    """
    return pass_at_k(correct.shape[1], correct.sum(axis=1), k)


def quality(
    shown: Float[np.ndarray, " prompts"],
    failed: Float[np.ndarray, " prompts"],
    draws: Int[np.ndarray, "draws prompts"] | None = None,
) -> Float[np.ndarray, " draws"]:
    """Source quality Q: of the prompts that the policy fails, the share that the source shows.

    Source: paper (definition); ours (what "fails" means: all rollouts are wrong; the rollout count; the resampling).
    Three cautions. Q grows with k, so compare distances at equal k. "Fails" is itself judged from samples, so bad luck
    selects prompts too, and an unchanged policy has Q > 0: for Q at distance 0 sample the policy a second time. An
    interval over resamples of prompts that all agree has no width, which says that the sample does not vary, not that Q
    is known.

    Args:
        shown: `shown` of each prompt that the policy fails, 0 elsewhere.
        failed: 1 where the policy fails.
        draws: how often each prompt is drawn; None for one draw, the data itself.

    Returns:
        Q in [0, 1] for each draw; NaN where a draw holds no failing prompt.
    """
    return _ratio(np.ones((1, len(failed)), dtype=int) if draws is None else draws, shown, failed)


class RatioSums(NamedTuple):
    """What V's proxies need of rollouts that one of two policies sampled: sums over them, of one shape each.

    With w = π/q of a token and W their product over a rollout.

    Attributes:
        rollouts: rollouts with a token.
        tokens: their tokens.
        log_ratio: Σ (ln sampler − ln other), nats.
        weight: Σ w² over the source's tokens, Σ w over the policy's.
        sequence: Σ W² over the source's rollouts, Σ W over the policy's.
    """

    rollouts: Float[np.ndarray, "*shape"]
    tokens: Float[np.ndarray, "*shape"]
    log_ratio: Float[np.ndarray, "*shape"]
    weight: Float[np.ndarray, "*shape"]
    sequence: Float[np.ndarray, "*shape"]

    @property
    def token_kl(self) -> Float[np.ndarray, "*shape"]:
        """KL(sampler‖other), nats per token; may be negative by noise, NaN without a token."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(self.log_ratio / self.tokens)

    def total(self) -> "RatioSums":
        """Over all of them, without axes."""
        return RatioSums(*(np.asarray(values.sum()) for values in self))


def ratio_sums(log_weights: Sequence[Float[np.ndarray, " _"]], side: Side) -> RatioSums:
    """`RatioSums` of each rollout, to be added up over a prompt, or all of them (`total`).

    From the source's tokens the moments are E_q[w²] and the divergence KL(q‖π), from the policy's E_π[w] (the same
    number, over prefixes that π visits) and KL(π‖q). The moments are heavy-tailed: far from the policy nearly all of
    the source's own tokens have w < 1, the sample misses the rare large weights and reads too low.

    Args:
        log_weights: ln w = ln π − ln q of the tokens of each rollout, nats, at temperature 1 without top-p or top-k.
        side: who sampled the rollouts.

    Raises:
        ValueError: a value is not finite.
    """
    if not all(bool(np.isfinite(values).all()) for values in log_weights):
        raise ValueError(
            "log-probs must be finite, not NaN or infinity. Compute them from the full vocabulary, without top-p, "
            "top-k or a suppressed token."
        )
    order, sign = (2.0, -1.0) if side == "source" else (1.0, 1.0)
    whole = np.array([values.sum() for values in log_weights], dtype=np.float64)
    tokens = np.array([len(values) for values in log_weights], dtype=np.float64)
    has_tokens = tokens > 0
    return RatioSums(
        rollouts=has_tokens.astype(np.float64),
        tokens=tokens,
        log_ratio=sign * whole,
        weight=np.array([np.exp(order * np.minimum(values, LOG_CAP)).sum() for values in log_weights]),
        sequence=np.where(has_tokens, np.exp(order * np.minimum(whole, LOG_CAP)), 0.0),
    )


def variance_cost(sums: RatioSums, proxy: Proxy, c: float | int) -> Float[np.ndarray, "*shape"]:
    """Variance cost V ≥ 1 of putting the source's trajectories into the policy's update; exactly 1 for equal log-probs.

    Source: paper ("cost through the importance weight"; e^KL per token in AutoNPO); ours (the three estimators).

    - "second_moment": token mean of w².
    - "sequence": mean over rollouts of W².
    - "kl": exp(c·KL), KL = token mean of ln(sampler) − ln(other). For log-normal weights c = 2 gives the token second
      moment, and c near the response length the sequence-level KL; with a small c, V stays near 1 and the best
      distance collapses to the largest Q.

    The KL is the plain mean, held at 0 from below, and not the k3 estimator r − 1 − ln r: k3 is less noisy near Δ = 0,
    but its r is an exponential, so far away one token decides V. The price is a standard error of about
    σ(ln w)/√tokens, which c multiplies. E[w] = 1 implies V ≥ 1, so a sample value below 1 is sampling error and is
    returned as 1.

    Args:
        sums: over the rollouts of a sample, or of several samples at once.
        proxy: "kl", "second_moment" or "sequence".
        c: the constant of "kl", ≥ 0; without effect on the others.

    Returns:
        V in [1, e^700], of the sums' shape; NaN where there is no token.

    Raises:
        ValueError: an unknown proxy, or c is out of range.
    """
    if proxy not in PROXIES:
        raise ValueError(f"proxy is one of {PROXIES}; got {proxy!r}.")
    if not (math.isfinite(c) and c >= 0):
        raise ValueError(f"c is a finite number >= 0; got {c}. Use about the response length for a sequence-level KL.")
    if proxy == "kl":
        return np.asarray(np.exp(np.clip(c * sums.token_kl, 0.0, MAX_LOG_COST)))
    above, below = (sums.weight, sums.tokens) if proxy == "second_moment" else (sums.sequence, sums.rollouts)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.maximum(np.divide(above, below), 1.0))


def squared_deviations(gradients: Float[np.ndarray, "samples params"]) -> Float[np.ndarray, " samples"]:
    """Squared distance of each gradient to their mean, scaled so that the mean of the result is the unbiased variance.

    The mean is the trace of the sample covariance: the measured V in ratio mode current.

    Raises:
        ValueError: Fewer than two samples.
    """
    if len(gradients) < 2:
        raise ValueError(f"a variance needs two samples; got {len(gradients)}.")
    centred = gradients - gradients.mean(axis=0, dtype=np.float64)
    return np.square(centred).sum(axis=1) * (len(gradients) / (len(gradients) - 1))


def measured_cost(
    weighted: Float[np.ndarray, " prompts"],
    on_policy: Float[np.ndarray, " prompts"],
    draws: Int[np.ndarray, "draws prompts"],
) -> Float[np.ndarray, " draws"]:
    """V as what it stands for: the variance of the weighted gradient over the on-policy one (ours).

    Not bounded by 1: a source that is more certain than the policy can have shorter gradients; noise goes both ways.

    Args:
        weighted: squared length of the weighted gradients of each prompt, or their squared deviations.
        on_policy: the same of the policy's own gradients.
        draws: how often each prompt is drawn.

    Returns:
        V for each draw; NaN where a draw holds no gradient.
    """
    return _ratio(draws, weighted, on_policy)


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


def _ratio(draws: np.ndarray, above: np.ndarray, below: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return (draws @ above) / (draws @ below)


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
