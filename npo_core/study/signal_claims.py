"""Verdicts on what the paper says of S, Q and V, from a measurement over seeds (`signal.json`), where there is one."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..method.premise import LEVEL
from ..method.quantities import Cost, Quality, Signal
from .verdicts import FEW, NOT, PARTLY, REPRODUCED, SIGNAL, UNMEASURED, Claim

MOST = 0.8
"""Share of seeds that must show a shape for it to count."""
CLOSE_FIT = 0.2
"""Largest error of a fitted curve, as a share of its rise over the distances, that counts as that shape."""
LEAST = 3
"""Seeds below which neither their mean nor a share of them decides anything."""
GROWTH = math.log(2)
"""Least rise of ln V over the distances that counts as growth, nats."""

QUALITIES = {Quality.MANY: "8 rollouts", Quality.ONE: "1 rollout"}
COSTS = {Cost.GRADIENT_CURRENT: "ratio current", Cost.GRADIENT_EXACT: "ratio exact"}


PEAK = Claim(
    "interior peak",
    "S(Δ) = Q/V has one interior maximum",
    "Δ* ≈ 20 steps from the base, ≈ 70 from mid-training",
    "",
    "–",
    UNMEASURED,
    "the results hold no signal.json",
    SIGNAL,
)
SHAPES = replace(
    PEAK,
    name="shapes",
    claim="Q is concave and saturates, V grows exponentially",
    paper="V ≲ e^(βΔ), figures 2b and 2c",
)
PREDICTION = replace(
    PEAK,
    name="prediction",
    claim="S(Δ) says which guide helps most",
    paper="argued; no such comparison",
)
PREMISE = replace(
    PEAK,
    name="premise",
    claim="a later policy solves more of what this one fails than another try does",
    paper="Q(Δ) rises, figure 2b; no own resample beside it",
)


def interior_peak(signal: Mapping[str, Any] | None) -> Claim:
    """S has one interior maximum: seeds whose Δ* and its interval over prompts exclude both ends."""
    if signal is None:
        return PEAK
    names = {
        Signal(quality, cost).name: f"{rollouts}, {mode}"
        for quality, rollouts in QUALITIES.items()
        for cost, mode in COSTS.items()
    }
    seeds, rows = len(signal["seeds"]), []
    for origin, entry in signal["origins"].items():
        for name in names:
            best = entry["optimum"][name]
            inside = sum(not one["at_edge"] for one in best)
            ends = entry["distances"][0], entry["distances"][-1]
            sure = sum(one["low"] > ends[0] and one["high"] < ends[1] for one in best)
            rows.append({"origin": origin, "signal": name, "interior": inside, "interval inside": sure})
    enough = {(row["origin"], row["signal"]): row["interval inside"] >= MOST * seeds for row in rows}
    everywhere = [name for name in names if all(enough[origin, name] for origin in signal["origins"])]
    return replace(
        PEAK,
        ours=_by_origin(
            rows,
            lambda row: (
                f"{names[row['signal']]} {row['interval inside']}/{seeds} (maximum alone {row['interior']}/{seeds})"
            ),
        ),
        verdict=_of_seeds(seeds, bool(everywhere), any(enough.values())),
        grounds=f"seeds whose Δ* is interior with its 95 % interval over prompts; {MOST:.0%} of them needed, from "
        "every origin for one definition of S",
        numbers=rows,
    )


def shapes(signal: Mapping[str, Any] | None) -> Claim:
    """Q rises and saturates within the distances, measured V grows like e^(βΔ): seeds for which the fit says so."""
    if signal is None:
        return SHAPES
    seeds, rows = len(signal["seeds"]), []
    for origin, entry in signal["origins"].items():
        grid = entry["distances"]
        for name, words in (QUALITIES | COSTS).items():
            fits = entry["fit"][name]
            good = sum(_saturates(fit, grid) if name in QUALITIES else _grows(fit, grid) for fit in fits)
            rows.append({"origin": origin, "curve": name, "words": words, "seeds": good})
    enough = {(row["origin"], row["curve"]): row["seeds"] >= MOST * seeds for row in rows}
    whole = [
        any(all(enough[origin, name] for origin in signal["origins"]) for name in names) for names in (QUALITIES, COSTS)
    ]
    return replace(
        SHAPES,
        ours=_by_origin(
            rows, lambda row: f"{'Q' if row['curve'] in QUALITIES else 'V'} of {row['words']} {row['seeds']}/{seeds}"
        ),
        verdict=_of_seeds(seeds, all(whole), any(enough.values())),
        grounds="seeds whose fit of Q∞(1 − e^(−Δ/τ)) has τ within the distances, or whose fit of e^(βΔ) at least "
        f"doubles, with an error of at most {CLOSE_FIT:.0%} of the rise (of ln V); {MOST:.0%} of them needed; V as "
        "measured",
        numbers=rows,
    )


def predicts(signal: Mapping[str, Any] | None) -> Claim:
    """S ranks the sources as their gains do: Spearman's ρ, mean over seeds with t interval, in every cell above 0."""
    if signal is None:
        return PREDICTION
    rows = signal["prediction"]
    of_s = [row for row in rows if row["predictor"] == "signal"]
    sure = [row["n"] >= LEAST and row["low"] > 0 for row in of_s]
    words = [
        f"from {row['origin']}, ratio {row['mode']}: {row['predictor']} {_rho(row)}"
        for row in rows
        if row["mean"] is not None
    ]
    word = REPRODUCED if of_s and all(sure) else PARTLY if any(sure) else NOT
    return replace(
        PREDICTION,
        ours="; ".join(words) or "undefined",
        verdict=FEW if min((row["n"] for row in of_s), default=0) < LEAST else word,
        grounds="Spearman's ρ of S with the gain of a guided window over the sources, a value a seed; the 95 % t "
        "interval of the mean lies above 0, from every origin and in both ratio modes",
        numbers=rows,
    )


def _rho(row: Mapping[str, Any]) -> str:
    """ρ with its interval, and in how many seeds it is defined where not in all: a side that ties has none."""
    inside = "" if row["low"] is None else f" ({row['low']:+.2f} to {row['high']:+.2f})"
    some = f", {row['n']} of {len(row['seeds'])} seeds" if row["n"] < len(row["seeds"]) else ""
    return f"{row['mean']:+.2f}{inside}{some}"


def premise_holds(signal: Mapping[str, Any] | None) -> Claim:
    """A later policy solves more failed prompts than an own resample at some Δ: seeds in which Holm's p says so."""
    if signal is None:
        return PREMISE
    seeds, rows = len(signal["seeds"]), []
    for origin, entry in signal["origins"].items():
        for at, distance in enumerate(one["distance"] for one in entry["premise"][0]):
            of_seeds = [seed[at] for seed in entry["premise"]]
            shown, own = (sum(one[name]["value"] for one in of_seeds) / seeds for name in ("shown", "own"))
            held = sum(one["holds"] for one in of_seeds)
            rows.append({"origin": origin, "distance": distance, "shown": shown, "own": own, "seeds": held})
    enough = [
        any(row["seeds"] >= MOST * seeds for row in rows if row["origin"] == origin) for origin in signal["origins"]
    ]
    return replace(
        PREMISE,
        ours=_by_origin(
            rows,
            lambda row: (
                f"Δ = {row['distance']:g}: {row['shown']:.2f} against {row['own']:.2f}, {row['seeds']}/{seeds} seeds"
            ),
        ),
        verdict=_of_seeds(seeds, all(enough), any(enough)),
        grounds="share of the failed prompts that is solved in 8 rollouts, less the own resample's: seeds in which it "
        f"is above 0 and McNemar's p below {LEVEL} after Holm's adjustment over Δ, at some Δ; {MOST:.0%} of them "
        "needed, from every origin",
        numbers=rows,
    )


def _of_seeds(seeds: int, whole: bool, some: bool) -> str:
    """The word for what enough of the seeds show everywhere, or somewhere."""
    return FEW if seeds < LEAST else REPRODUCED if whole else PARTLY if some else NOT


def _by_origin(rows: Sequence[Mapping[str, Any]], words: Callable[[Mapping[str, Any]], str]) -> str:
    """What was counted, an origin after the other."""
    origins = dict.fromkeys(row["origin"] for row in rows)
    return "; ".join(
        f"from {origin}: " + ", ".join(words(row) for row in rows if row["origin"] == origin) for origin in origins
    )


def _saturates(fit: Mapping[str, Any], grid: list[float]) -> bool:
    """Whether a fit of Q bends within the distances and runs close to the points."""
    if fit["tau"] is None or not grid[1] <= fit["tau"] <= grid[-1]:
        return False
    return fit["q_rmse"] <= CLOSE_FIT * -fit["q_inf"] * math.expm1(-grid[-1] / fit["tau"])


def _grows(fit: Mapping[str, Any], grid: list[float]) -> bool:
    """Whether a fit of ln V rises and runs close to the points."""
    if fit["beta"] is None or fit["beta"] * grid[-1] < GROWTH:
        return False
    return fit["v_rmse"] <= CLOSE_FIT * fit["beta"] * grid[-1]
