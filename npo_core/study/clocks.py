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
    """What each seed of an arm has counted at its end on a clock, one of `CLOCKS`.

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
    found = {}
    for seed, count in at.items():
        newest = _newest(evidence, arm, clock, seed, count)
        if len(newest):
            found[seed] = newest[measure].mean()
    return pd.Series(found, dtype=float)


def _newest(evidence: Evidence, arm: str, clock: str, seed: int, count: int) -> pd.DataFrame:
    """Rows of the newest scored checkpoint of a run that has counted at most so much; no row if there is none."""
    rows = _scored(evidence, arm, seed)
    rows = rows[rows[AXES[clock]] <= count]
    newest = rows[rows[AXES[clock]] == rows[AXES[clock]].max()]
    return newest[newest["compute_step"] == newest["compute_step"].max()]


def _scored(evidence: Evidence, arm: str, seed: int) -> pd.DataFrame:
    scores = evidence.scores
    return scores[(scores["arm"] == arm) & (scores["seed"] == seed) & (scores["sampling"] == evidence.compared)]


def score_between(evidence: Evidence, arm: str, at: Mapping[int, int]) -> pd.Series:
    """Test pass rate of an arm where it has spent so many rollouts in all, on a line between the checkpoints around.

    Args:
        evidence: Results.
        arm: Arm.
        at: Rollouts by seed; seeds without a scored checkpoint on either side are left out.
    """
    found = {}
    for seed, count in at.items():
        rows = _scored(evidence, arm, seed)
        course = rows.groupby("rollouts")["pass_rate"].mean().sort_index()
        if len(course) and course.index[0] <= count <= course.index[-1]:
            found[seed] = np.interp(count, course.index, course)
    return pd.Series(found, dtype=float)


def paired(
    evidence: Evidence, arm: str, other: str, clock: str = "compute", measure: str = "pass_rate"
) -> tuple[pd.Series, pd.Series]:
    """Scores by seed of two arms where both have counted as much as the one that ends first."""
    both = _common(evidence, arm, other, clock)
    return score_at(evidence, arm, clock, both, measure), score_at(evidence, other, clock, both, measure)


def _common(evidence: Evidence, arm: str, other: str, clock: str) -> dict[int, int]:
    """By seed, the count of the one that ends first."""
    mine, its = ends(evidence, arm, clock), ends(evidence, other, clock)
    return {seed: min(count, its[seed]) for seed, count in mine.items() if seed in its}


def at_equal(
    evidence: Evidence, arm: str, other: str, clock: str = "compute", measure: str = "pass_rate", margin: float = 0.0
) -> Difference:
    """An arm minus another, `paired`; the difference is tested against the margin."""
    scores = paired(evidence, arm, other, clock, measure)
    return difference(*scores, names=(arm, other), clock=clock, measure=measure, margin=margin)


def reference(evidence: Evidence, arm: str, clock: str = "compute", measure: str = "pass_rate") -> str:
    """The arm that another is held against on a clock; of several the one with the larger mean over the seeds.

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
    """An arm minus the `reference` of a clock; errors as there."""
    return at_equal(evidence, arm, reference(evidence, arm, clock, measure), clock, measure, margin)


def interpolated(evidence: Evidence, arm: str) -> Difference:
    """`against_reference` at equal total rollouts with the reference on a line between its two checkpoints around.

    A secondary number: the plan's own takes the checkpoint before, which has spent fewer rollouts than the arm and so
    is held too low wherever the reference still rises.
    """
    other = reference(evidence, arm, "rollouts")
    at = _common(evidence, arm, other, "rollouts")
    scores = score_at(evidence, arm, "rollouts", at), score_between(evidence, other, at)
    return difference(*scores, names=(arm, other), clock="rollouts", measure="pass_rate, reference interpolated")


def short_by(evidence: Evidence, arm: str) -> float | None:
    """Rollouts that the reference at equal total rollouts has spent less than the arm, mean over seeds, if any."""
    other, short = reference(evidence, arm, "rollouts"), []
    for seed, count in _common(evidence, arm, other, "rollouts").items():
        own, its = (_newest(evidence, name, "rollouts", seed, count)["rollouts"] for name in (arm, other))
        if len(own) and len(its):
            short.append(own.iloc[0] - its.iloc[0])
    return float(np.mean(short)) if short else None


@dataclass(frozen=True)
class Compared:
    """A pair of a family, compared.

    Attributes:
        pair: What was to be compared.
        found: The difference.
        p_holm: Its p after Holm's adjustment over the pairs of the family, of which those without a p count as 1; None
            without a p.
        too_early: The arm that has no policy yet where the other ends, on any seed that both finished; "" if neither.
    """

    pair: Pair
    found: Difference
    p_holm: float | None
    too_early: str = ""


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
    adjusted = holm(np.array([1.0 if one.p is None else one.p for _, one in found])) if found else []
    return [
        Compared(pair, one, None if one.p is None else float(p), _too_early(evidence, one))
        for (pair, one), p in zip(found, adjusted, strict=True)
    ]


def _too_early(evidence: Evidence, one: Difference) -> str:
    """RLEP samples as many rollouts before its first step as others in all: there is no policy of it to compare."""
    mine, its = ends(evidence, one.arm, one.clock), ends(evidence, one.against, one.clock)
    if one.seeds or not set(mine) & set(its):
        return ""
    scores = paired(evidence, one.arm, one.against, one.clock, one.measure)
    return next((arm for arm, found in zip((one.arm, one.against), scores, strict=True) if found.empty), "")
