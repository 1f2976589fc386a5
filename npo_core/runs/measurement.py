"""Records of a signal measurement: the pairs of policies it compares, and the summary of what it found.

Nothing here runs a policy: a summary is made from the sums on disk in seconds, with other settings if need be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..files import as_json
from ..method.curve import SUMS, PairSums, SignalCurve, calibrated_c, curve_fits, rank_agreement, signal_curve
from ..method.premise import Premise, premise
from ..method.quantities import ESTIMATES, MEASURED_COSTS, PROXY_COSTS, SIGNALS, Cost, Divergence, Quality, Signal
from ..method.stats import Estimate
from ..streams import PAIRS, PREMISE
from .settings import SignalSettings

PROXIES: tuple[Divergence | Cost, ...] = (*Divergence, *PROXY_COSTS[2:])
"""What is ranked against a measured variance; KL itself, which no c and no floor touches, in the place of e^(c·KL)."""

RESAMPLE = "resample"
"""Name of an origin's second, independent sample: the source at distance 0."""


@dataclass(frozen=True)
class Pair:
    """A policy and a source to compare.

    Attributes:
        origin: Policy step of the policy that would learn.
        source: Name of the source: a policy step as text, "resample", or the name of another policy.
        distance: Policy steps from the origin to the source, negative for a past policy; None for another policy.
    """

    origin: int
    source: str
    distance: int | None

    @property
    def kind(self) -> str:
        """Near-future (any later checkpoint), past, own resample, or the name of another policy."""
        if self.distance is None:
            return self.source
        return "resample" if self.distance == 0 else "future" if self.distance > 0 else "past"

    @property
    def file(self) -> str:
        return f"{self.origin:06d}--{self.source}.parquet"


def distance_grid(available: Sequence[int], count: int) -> list[int]:
    """At most `count` of the available distances: the smallest and the largest, and finer near 0 than far away.

    Args:
        available: Distances in policy steps, > 0.
        count: Largest number of distances, at least 1.
    """
    ordered = sorted(available)
    if len(ordered) <= count:
        return ordered
    # quadratic spacing over the positions, then pushed apart where two fall on one place
    places = np.round(np.linspace(0, 1, count) ** 2 * (len(ordered) - 1)).astype(int)
    for index in range(1, count):
        places[index] = max(places[index], places[index - 1] + 1)
    return [ordered[place] for place in np.minimum(places, len(ordered) - count + np.arange(count))]


def plan_pairs(
    steps: Sequence[int],
    origins: Sequence[int],
    count: int = 20,
    past: int = 3,
    others: Sequence[str] = (),
    also: Sequence[int] = (),
) -> list[Pair]:
    """Pairs of a measurement: from each origin its resample, a grid of later and some earlier checkpoints, the others.

    Args:
        steps: Policy steps with a checkpoint, the base policy being 0.
        origins: Policy steps to measure from.
        count: Distances above 0 from each origin, at most.
        past: Earlier checkpoints from each origin, at most.
        others: Names of policies outside the run.
        also: Distances beside the grid, where there is a checkpoint.

    Raises:
        ValueError: No checkpoint or a single one, an origin without checkpoint, or one with nothing after it.
    """
    ordered = sorted(steps)
    if len(ordered) < 2:
        raise ValueError(
            f"{len(ordered)} checkpoint(s) found (steps {ordered}); a distance needs two, the base policy included."
        )
    pairs = []
    for origin in origins:
        if origin not in ordered:
            raise ValueError(f"There is no checkpoint at origin {origin}. Available steps: {ordered}.")
        later = [step - origin for step in ordered if step > origin]
        if not later:
            raise ValueError(f"Origin {origin} is the last checkpoint; nothing in its future can be measured.")
        earlier = distance_grid([origin - step for step in ordered if step < origin], past) if past else []
        grid = sorted({*distance_grid(later, count), *(set(also) & set(later))})
        pairs.append(Pair(origin, RESAMPLE, 0))
        pairs += [Pair(origin, f"{origin + distance:06d}", distance) for distance in grid]
        pairs += [Pair(origin, f"{origin - distance:06d}", -distance) for distance in earlier]
        pairs += [Pair(origin, name, None) for name in others]
    return pairs


def read_pairs(folder: str | Path, pairs: Sequence[Pair]) -> dict[Pair, PairSums]:
    """Sums of pairs that a measurement left on disk."""
    tables = {pair: pd.read_parquet(Path(folder) / "pairs" / pair.file) for pair in pairs}
    return {pair: PairSums(**{name: table[name].to_numpy() for name in SUMS}) for pair, table in tables.items()}


def curves(pairs: Mapping[Pair, PairSums], settings: SignalSettings) -> dict[int, SignalCurve]:
    """Curve of each origin over its distances ≥ 0."""
    return {
        origin: signal_curve(
            {p.distance: sums for p, sums in pairs.items() if p.origin == origin and (p.distance or 0) >= 0
             and p.distance is not None},
            settings.c,
            PAIRS.generator(settings.seed, origin),
            settings.resamples,
        )
        for origin in dict.fromkeys(pair.origin for pair in pairs)
    }  # fmt: skip


def premises(pairs: Mapping[Pair, PairSums], origin: int, settings: SignalSettings) -> list[Premise]:
    """Who solves what the policy at `origin` fails, by distance; none where resample or later policies are missing."""
    here = {pair.distance: sums for pair, sums in pairs.items() if pair.origin == origin and pair.distance is not None}
    later = {distance: sums.shown for distance, sums in here.items() if distance > 0}
    if 0 not in here or not later:
        return []
    rng = PREMISE.generator(settings.seed, origin)
    return premise(here[0].failed, here[0].shown, later, rng, settings.resamples)


def read_premise(record: Mapping[str, Any]) -> Premise:
    """A record of `signal.json` as it was written."""
    estimates = {name: Estimate(**record[name]) for name in ("shown", "own", "gain")}
    return Premise(**{**record, **estimates})


def summarise(pairs: Mapping[Pair, PairSums], settings: SignalSettings) -> dict[str, Any]:
    """Estimates of all pairs, fits and Δ* of all origins, rank agreement of the proxies, calibrated c.

    Returns:
        A dictionary that JSON can hold; undefined numbers are None. `table` has a row per pair.
    """
    measured = settings.gradients > 0
    costs = tuple(Cost) if measured else PROXY_COSTS
    found = curves(pairs, settings)
    summary: dict[str, Any] = {"settings": asdict(settings), "origins": {}, "table": _table(pairs, settings)}
    for origin, curve in found.items():
        entry: dict[str, Any] = {"failing": curve.failing, "agreement": {}}
        entry["optimum"] = {signal.name: asdict(curve.optimum(signal)) for signal in SIGNALS if signal.cost in costs}
        entry["fit"] = {quality: {cost: curve_fits(curve, cost, quality) for cost in costs} for quality in Quality}
        if measured and len(curve.distances) >= 3:
            entry["agreement"] = {
                cost: {proxy: asdict(rank_agreement(curve, proxy, cost)) for proxy in PROXIES}
                for cost in MEASURED_COSTS
            }
        entry["premise"] = [asdict(one) for one in premises(pairs, origin, settings)]
        summary["origins"][str(origin)] = entry
    if measured:
        summary["c"] = {
            kl: {cost: _constant(list(found.values()), cost, kl) for cost in MEASURED_COSTS} for kl in Divergence
        }
    return as_json(summary)


def _constant(curves: Sequence[SignalCurve], cost: Cost, kl: Divergence) -> dict[str, Any]:
    """The calibrated c; no numbers where it has none: policies that do not differ have a table all the same."""
    try:
        return asdict(calibrated_c(curves, cost, kl))
    except ValueError:
        return {"value": None, "low": None, "high": None, "n": sum(len(curve.distances) for curve in curves)}


def _table(pairs: Mapping[Pair, PairSums], settings: SignalSettings) -> list[dict[str, Any]]:
    """A row per pair with point estimates and their intervals over prompts."""
    rows = []
    for pair, sums in pairs.items():
        distance = 0 if pair.distance is None else pair.distance
        rng = PAIRS.generator(settings.seed, pair.origin)
        curve = signal_curve({distance: sums}, settings.c, rng, settings.resamples)
        row = {**asdict(pair), "kind": pair.kind, "failing": curve.failing}
        for of in (*ESTIMATES, *SIGNALS):
            name, cost = (of.name, of.cost) if isinstance(of, Signal) else (str(of), of)
            if settings.gradients == 0 and cost in MEASURED_COSTS:
                continue
            low, high = curve.interval(of)
            row |= {name: curve.values(of)[0], f"{name}_low": low[0], f"{name}_high": high[0]}
        rows.append(as_json(row))
    return rows
