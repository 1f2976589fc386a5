"""Q, V and S over distances, with bootstrap intervals over prompts, from sums that each pair of policies leaves behind.

A *pair* is a policy π that would learn and a source q that would guide: a later checkpoint, an earlier one, an own
resample, a teacher. Every estimate is a ratio of sums over prompts, so one draw of prompts resamples all of them at all
distances at once, and the interval of Δ* knows that Q and V of neighbouring distances move together. Source: paper (Q,
V, S and e^(c·KL)); ours (the other costs, the resampling, the calibration of c).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import scipy.stats
from jaxtyping import Float, Int

from .quantities import ESTIMATES, MEASURED_COSTS, PROXY_COSTS, Cost, Divergence, Quality, Signal
from .signal import (
    Optimum,
    RatioSums,
    fit_quality,
    fit_variance,
    fitted_optimum,
    measured_cost,
    optimal_distance,
    quality,
    variance_cost,
)
from .stats import Estimate

FLAT = 1e-6
"""Growth of ln V over the whole grid below which a fit counts as flat: less is the optimiser's rounding (ours)."""


@dataclass(frozen=True)
class PairSums:
    """What a policy π and a source q leave behind: sums over the rollouts of each prompt, shape (prompts,) each.

    With w = π/q of a token and W their product over a sequence; y ~ q is a rollout of the source, y ~ π one of the
    policy; g is the gradient of 1/|y|·ln π(y) and G that of the token-weighted 1/|y|·Σ w ln π.

    Attributes:
        failed: 1 where all rollouts of π are wrong.
        shown: 1 where π fails and a rollout of q is correct.
        shown_share: Share of q's rollouts that are correct where π fails, 0 elsewhere.
        rollouts: Scored rollouts y ~ q.
        tokens: Their tokens.
        log_ratio: Their Σ (ln q − ln π), nats.
        squared_weight: Their Σ w².
        squared_sequence: Their Σ W².
        own_rollouts: Scored rollouts y ~ π.
        own_tokens: Their tokens.
        own_log_ratio: Their Σ (ln π − ln q), nats.
        own_weight: Their Σ w.
        own_sequence: Their Σ W.
        gradients: Pairs (one y ~ q, one y ~ π) with a measured gradient.
        gradient_own: Σ ‖g‖² over their y ~ π: the on-policy variance that the others are divided by.
        gradient_current: Squared deviations of g from its mean over y ~ q.
        gradient_exact: Σ ‖G‖²/(1 + W) over both y, which estimates E_q‖G‖².
        gradient_sequence: Σ W²‖g‖²/(1 + W) over both y, which estimates E_q[W²‖g‖²].
    """

    failed: Float[np.ndarray, " prompts"]
    shown: Float[np.ndarray, " prompts"]
    shown_share: Float[np.ndarray, " prompts"]
    rollouts: Float[np.ndarray, " prompts"]
    tokens: Float[np.ndarray, " prompts"]
    log_ratio: Float[np.ndarray, " prompts"]
    squared_weight: Float[np.ndarray, " prompts"]
    squared_sequence: Float[np.ndarray, " prompts"]
    own_rollouts: Float[np.ndarray, " prompts"]
    own_tokens: Float[np.ndarray, " prompts"]
    own_log_ratio: Float[np.ndarray, " prompts"]
    own_weight: Float[np.ndarray, " prompts"]
    own_sequence: Float[np.ndarray, " prompts"]
    gradients: Float[np.ndarray, " prompts"]
    gradient_own: Float[np.ndarray, " prompts"]
    gradient_current: Float[np.ndarray, " prompts"]
    gradient_exact: Float[np.ndarray, " prompts"]
    gradient_sequence: Float[np.ndarray, " prompts"]

    def __post_init__(self):
        lengths = {name: len(getattr(self, name)) for name in SUMS}
        if len(set(lengths.values())) != 1 or not len(self.failed):
            raise ValueError(f"every column of a pair has one number per prompt; got lengths {lengths}.")
        for name in SUMS:
            if not bool(np.isfinite(getattr(self, name)).all()):
                raise ValueError(f"column {name} of a pair holds NaN or infinity; check the log-probs behind it.")
        if not self.failed.sum():
            raise ValueError(
                f"Q is undefined: the policy fails none of the {len(self.failed)} prompts. Take harder prompts."
            )


SUMS = tuple(field.name for field in fields(PairSums))
"""Columns of a pair, one number per prompt."""

RATIO_COLUMNS = {
    "source": ("rollouts", "tokens", "log_ratio", "squared_weight", "squared_sequence"),
    "policy": ("own_rollouts", "own_tokens", "own_log_ratio", "own_weight", "own_sequence"),
}
"""Columns that hold the `RatioSums` of each side's rollouts, in their order."""


def bootstrap_weights(prompts: int, resamples: int, rng: np.random.Generator) -> Int[np.ndarray, "draws prompts"]:
    """How often each prompt is drawn: a first row of ones (the data itself), then `resamples` draws with return."""
    if prompts < 2 or resamples < 1:
        raise ValueError(f"a bootstrap needs two prompts and a resample; got {prompts} and {resamples}.")
    draws = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    return np.vstack([np.ones((1, prompts), dtype=draws.dtype), draws])


def pair_estimates(
    pair: PairSums, weights: Int[np.ndarray, "draws prompts"], c: float | int
) -> dict[Quality | Divergence | Cost, Float[np.ndarray, " draws"]]:
    """Quality, KL and costs of a pair, one value per draw of prompts.

    Args:
        pair: The sums.
        weights: Draws, see `bootstrap_weights`.
        c: Constant of the cost "kl".

    Returns:
        Values of all `ESTIMATES`; NaN where a draw holds no failing prompt (quality) or no gradient (measured costs).
        Token KLs are in nats per token and may be negative by noise.
    """
    sides = {
        side: RatioSums(*(weights @ getattr(pair, name) for name in names)) for side, names in RATIO_COLUMNS.items()
    }
    found = {
        Quality.MANY: quality(pair.shown, pair.failed, weights),
        Quality.ONE: quality(pair.shown_share, pair.failed, weights),
        Divergence.OF_SOURCE: sides["source"].token_kl,
        Divergence.OF_POLICY: sides["policy"].token_kl,
        **{cost: variance_cost(sides[cost.side], cost.proxy, c) for cost in PROXY_COSTS},
        **{cost: measured_cost(getattr(pair, cost), pair.gradient_own, weights) for cost in MEASURED_COSTS},
    }
    return {name: found[name] for name in ESTIMATES}


@dataclass(frozen=True)
class SignalCurve:
    """Estimates over a grid of distances, from one policy.

    Attributes:
        distances: Grid in policy steps, strictly increasing, shape (distances,).
        draws: Estimate to values of shape (draws, distances); row 0 is the data, the others are resamples.
        failing: Prompts that the policy fails.
    """

    distances: Float[np.ndarray, " distances"]
    draws: Mapping[Quality | Divergence | Cost, Float[np.ndarray, "draws distances"]]
    failing: int

    def values(self, of: Quality | Divergence | Cost | Signal) -> Float[np.ndarray, " distances"]:
        """Point estimates."""
        return self._draws(of)[0]

    def interval(self, of: Quality | Divergence | Cost | Signal) -> tuple[np.ndarray, np.ndarray]:
        """2.5 % and 97.5 % quantiles over resamples of prompts, two arrays of shape (distances,)."""
        low, high = np.nanquantile(self._draws(of)[1:], (0.025, 0.975), axis=0)
        return low, high

    def _draws(self, of: Quality | Divergence | Cost | Signal) -> np.ndarray:
        return self.draws[of.quality] / self.draws[of.cost] if isinstance(of, Signal) else self.draws[of]

    def optimum(self, signal: Signal) -> Optimum:
        """Δ* = argmax of S, with its interval over resamples and the edge flag."""
        draws = self._draws(signal)
        usable = draws[1:][np.isfinite(draws[1:]).all(axis=1)]
        return optimal_distance(self.distances, draws[0], signal_samples=usable if len(usable) else None)


def signal_curve(
    pairs: Mapping[int, PairSums], c: float | int, rng: np.random.Generator, resamples: int = 1000
) -> SignalCurve:
    """Curve over the distances of some pairs that share policy and prompts.

    Args:
        pairs: Sums by distance in policy steps.
        c: Constant of the cost "kl".
        rng: Source of the resamples; the same prompts are drawn at every distance.
        resamples: Number of resamples.

    Raises:
        ValueError: No pair, or pairs over different prompts.
    """
    sizes = {len(pair.failed) for pair in pairs.values()}
    if len(sizes) != 1:
        raise ValueError(f"the pairs of a curve share their prompts; got {sorted(sizes)} prompts.")
    weights = bootstrap_weights(sizes.pop(), resamples, rng)
    distances = sorted(pairs)
    found = [pair_estimates(pairs[distance], weights, c) for distance in distances]
    draws = {name: np.stack([estimates[name] for estimates in found], axis=1) for name in found[0]}
    failing = int(pairs[distances[0]].failed.sum())
    return SignalCurve(np.array(distances, dtype=np.float64), draws, failing)


def curve_fits(curve: SignalCurve, cost: Cost, quality: Quality = Quality.MANY) -> dict[str, float | str | None]:
    """Fits of the paper's shapes to a curve: q_inf, tau, beta with their errors, and the Δ* that they imply (ours).

    Returns:
        `q_inf`, `tau` (policy steps), `q_rmse` (units of Q), `beta` (per policy step), `v_rmse` (units of ln V),
        `fitted_optimum` (policy steps); None where a shape cannot be fitted, and `reason` then says why.
    """
    out: dict[str, float | str | None] = dict.fromkeys(
        ("q_inf", "tau", "q_rmse", "beta", "v_rmse", "fitted_optimum", "reason")
    )
    grid, reasons = curve.distances, []
    try:
        rise = fit_quality(grid, curve.values(quality))
        out |= {"q_inf": rise.q_inf, "tau": rise.tau, "q_rmse": rise.rmse}
    except (ValueError, RuntimeError) as error:
        reasons.append(f"Q: {error}")
    try:
        growth = fit_variance(grid, np.maximum(curve.values(cost), 1.0))
        out |= {"beta": growth.beta, "v_rmse": growth.rmse}
        if growth.beta * grid[-1] < FLAT:
            reasons.append("V does not grow over the grid, so no best distance follows from the fits: it is an edge.")
    except (ValueError, RuntimeError) as error:
        reasons.append(f"V: {error}")
    if reasons:
        out["reason"] = " ".join(reasons)
    else:
        out["fitted_optimum"] = fitted_optimum(rise.tau, growth.beta)
    return out


def calibrated_c(
    curves: Sequence[SignalCurve], cost: Cost = Cost.GRADIENT_EXACT, kl: Divergence = Divergence.OF_SOURCE
) -> Estimate:
    """The c for which e^(c·KL) is nearest to a measured cost: least squares of ln V on KL through the origin (ours).

    Args:
        curves: Curves with resamples; the points of all count alike. Their resamples are taken as independent.
        cost: What e^(c·KL) is to be near to.
        kl: Whose tokens KL is taken from.

    Returns:
        Estimate with a 95 % interval over resamples of prompts; n = number of points.

    Raises:
        ValueError: Every KL is 0, so c has no effect and no value.
    """
    resamples = min(len(curve.draws[kl]) for curve in curves)
    nats = np.concatenate([np.maximum(curve.draws[kl][:resamples], 0.0) for curve in curves], axis=1)
    log_cost = np.log(np.concatenate([curve.draws[cost][:resamples] for curve in curves], axis=1))
    usable = np.isfinite(log_cost).all(axis=1) & (nats.max(axis=1) > 0)
    if not usable[0]:
        raise ValueError(f"c is undetermined: KL is 0 at every distance, or the cost {str(cost)!r} is not defined.")
    values = (nats * log_cost).sum(axis=1)[usable] / np.square(nats).sum(axis=1)[usable]
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return Estimate(float(values[0]), float(low), float(high), nats.shape[1])


def rank_agreement(curve: SignalCurve, of: Divergence | Cost, cost: Cost = Cost.GRADIENT_EXACT) -> Estimate:
    """Spearman's ρ over distances between an estimate and a measured cost, with an interval over resamples (ours).

    Args:
        curve: A curve with three distances or more.
        of: A proxy.
        cost: What it should rank distances like.

    Returns:
        Estimate with n = number of distances; NaN where one side does not vary.

    Raises:
        ValueError: Fewer than three distances.
    """
    if len(curve.distances) < 3:
        raise ValueError(f"a rank correlation needs three distances; got {len(curve.distances)}.")
    values = rank_correlation(curve.draws[of], curve.draws[cost])
    low, high = _quantiles(values[1:])
    return Estimate(float(values[0]), low, high, len(curve.distances))


def rank_correlation(a: Float[np.ndarray, "rows points"], b: Float[np.ndarray, "rows points"]) -> np.ndarray:
    """Spearman's ρ of each row of a with the same row of b; NaN where a side does not vary or is not finite."""
    first, second = (scipy.stats.rankdata(values, axis=1) for values in (a, b))
    first, second = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (first, second))
    with np.errstate(invalid="ignore", divide="ignore"):
        rho = (first * second).sum(axis=1) / np.sqrt(np.square(first).sum(axis=1) * np.square(second).sum(axis=1))
    return np.where(np.isfinite(a).all(axis=1) & np.isfinite(b).all(axis=1), rho, math.nan)


def _quantiles(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return math.nan, math.nan
    low, high = np.quantile(finite, (0.025, 0.975))
    return float(low), float(high)
