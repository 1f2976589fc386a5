"""Arms at equal policy step, equal compute steps, equal total rollouts: which scores a comparison takes.

An arm that rolls back ends at an earlier policy step than GRPO, and one that samples off line spends more rollouts, so
"equal" has to name its clock. Ours; the rules are in docs/evidence.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..method.stats import holm
from .differences import Difference, difference
from .families import AT_CLOCK, AXES, CLOCKS, COUNTED, REFERENCES, Family, Pair
from .results import Evidence


def ends(evidence: Evidence, arm: str, clock: str) -> dict[int, int]:
    """What each seed of an arm has counted at its end on a clock.

    Args:
        evidence: Results.
        arm: Arm.
        clock: Name in `CLOCKS`.

    Raises:
        ValueError: Unknown clock.
    """
    if clock not in CLOCKS:
        raise ValueError(f"Unknown clock {clock!r}. Allowed: {', '.join(CLOCKS)}.")
    return {run["seed"]: run[COUNTED[clock]] for run in evidence.about["runs"] if run["arm"] == arm}


def score_at(evidence: Evidence, arm: str, clock: str, at: Mapping[int, int], measure: str = "pass_rate") -> pd.Series:
    """Score of an arm, mean over suites, at the newest scored checkpoint that has counted at most so much.

    Args:
        evidence: Results.
        arm: Arm.
        clock: Name in `CLOCKS`.
        at: Count by seed.
        measure: Column of the scores.

    Returns:
        A score per seed; seeds without such a checkpoint are missing. Where a replay passes a policy step again, the
        later pass counts.
    """
    own = evidence.scores[(evidence.scores["arm"] == arm) & (evidence.scores["sampling"] == "paper")]
    found = {}
    for seed, count in at.items():
        rows = own[(own["seed"] == seed) & (own[AXES[clock]] <= count)]
        if len(rows):
            newest = rows[rows[AXES[clock]] == rows[AXES[clock]].max()]
            found[seed] = newest[newest["compute_step"] == newest["compute_step"].max()][measure].mean()
    return pd.Series(found, dtype=float)


def paired(
    evidence: Evidence, arm: str, other: str, clock: str = "compute", measure: str = "pass_rate"
) -> tuple[pd.Series, pd.Series]:
    """Scores by seed of two arms where both have counted as much as the one that ends first."""
    mine, its = ends(evidence, arm, clock), ends(evidence, other, clock)
    both = {seed: min(count, its[seed]) for seed, count in mine.items() if seed in its}
    return score_at(evidence, arm, clock, both, measure), score_at(evidence, other, clock, both, measure)


def at_equal(
    evidence: Evidence, arm: str, other: str, clock: str = "compute", measure: str = "pass_rate", margin: float = 0.0
) -> Difference:
    """An arm minus another where both have counted as much as the one that ends first, paired by seed.

    Args:
        evidence: Results.
        arm: Arm.
        other: What it is compared with.
        clock: Name in `CLOCKS`.
        measure: Column of the scores; sampled as the paper evaluates.
        margin: What the difference is tested against.
    """
    scores = paired(evidence, arm, other, clock, measure)
    return difference(*scores, names=(arm, other), clock=clock, measure=measure, margin=margin)


def reference(evidence: Evidence, arm: str, clock: str = "compute", measure: str = "pass_rate") -> str:
    """The arm that another is held against on a clock; of several the one with the larger mean over the seeds.

    Args:
        evidence: Results.
        arm: Arm.
        clock: Name in `CLOCKS`.
        measure: Column of the scores.

    Raises:
        ValueError: The results hold no reference of that clock.
    """
    there = [name for name in REFERENCES[clock] if name in evidence.arms and name != arm]
    if not there:
        names = " or ".join(REFERENCES[clock])
        raise ValueError(f"The results lack {names}, the reference at equal {AT_CLOCK[clock]}.")
    at = ends(evidence, arm, clock)
    level = {name: score_at(evidence, name, clock, at, measure).mean() for name in there}
    return max(there, key=lambda name: -1.0 if pd.isna(level[name]) else level[name])


def against_reference(
    evidence: Evidence, arm: str, clock: str = "compute", measure: str = "pass_rate", margin: float = 0.0
) -> Difference:
    """An arm minus the `reference` of a clock; arguments and errors as there, `margin` as in `at_equal`."""
    return at_equal(evidence, arm, reference(evidence, arm, clock, measure), clock, measure, margin)


@dataclass(frozen=True)
class Compared:
    """A pair of a family, compared.

    Attributes:
        pair: What was to be compared.
        found: The difference.
        p_holm: Its p after Holm's adjustment over the pairs of the family that could be compared; None without a p.
    """

    pair: Pair
    found: Difference
    p_holm: float | None


def compare(evidence: Evidence, family: Family, clock: str) -> list[Compared]:
    """All pairs of a family on one clock; pairs whose arms, or whose reference, were not run are left out."""
    found = []
    for pair in family.pairs:
        others = REFERENCES[clock] if pair.against is None else (pair.against,)
        if pair.arm not in evidence.arms or not set(others) & set(evidence.arms):
            continue
        if pair.against is None:
            one = against_reference(evidence, pair.arm, clock, family.measure, pair.margin)
        else:
            one = at_equal(evidence, pair.arm, pair.against, clock, family.measure, pair.margin)
        found.append((pair, one))
    known = [place for place, (_, one) in enumerate(found) if one.p is not None]
    adjusted = holm(np.array([found[place][1].p for place in known], dtype=float)) if known else []
    p_holm = dict(zip(known, map(float, adjusted), strict=True))
    return [Compared(pair, one, p_holm.get(place)) for place, (pair, one) in enumerate(found)]
