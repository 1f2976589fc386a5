"""Verdicts of the plan of the evidence on the real model: which differences between arms are seen, on which clock.

The rule is in docs/evidence.md, written before the guided runs: a difference is *seen* if it has the same sign in all
three seeds and its mean exceeds the largest spread of either arm, else *not seen*; with fewer seeds there is no
verdict, and there is no p. What clocks hold equal is `clocks.py`'s: both arms where they have counted as much as the
one that ends first, each at its newest score at or before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..files import write_json
from .clocks import ends, paired
from .families import AT_CLOCK, AXES, CLOCKS
from .findings import SCHEMA, markdown_table
from .real_results import CLAIMS, REAL_ARMS, SEEDS, RealResults, read_real, real_folder
from .results import Evidence
from .verdicts import FEW

SEEN, NOT_SEEN = "seen", "not seen"

PASS_RATE, PROBABILITY = "pass_rate", "probability"
ENDPOINTS = {PASS_RATE: "test pass rate at temperature 1", PROBABILITY: "mean probability of the right response"}
"""Measures of the two endpoints, in words."""

OWN, LARGER = "NPO early, own resample", "GRPO, groups of 16"
GUIDED = ("NPO early", "AutoNPO")

PAIRS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    *((arm, "GRPO", CLOCKS) for arm in REAL_ARMS if arm != "GRPO"),
    *((arm, LARGER, ("rollouts",)) for arm in GUIDED),
    *((arm, OWN, CLOCKS) for arm in GUIDED),
)
"""Arm, what it is compared with, and on which clocks. A step of larger groups costs two, so only rollouts compare."""


READING = (
    "Both arms are taken at their newest score by the count at which the first of the two ends. "
    f"A step of {LARGER} samples twice as many rollouts as one of the other arms."
)
"""What a reader of the table must know."""


@dataclass(frozen=True)
class RealClaim:
    """One difference of the plan.

    Attributes:
        arm: Arm.
        against: What it is compared with.
        clock: What is held equal, of `families.CLOCKS`.
        measure: Endpoint, of `ENDPOINTS`.
        differences: Arm minus the other, by seed; seeds that one of them lacks are in `lacking`.
        counted: By seed what arm and other have counted on the clock at the scores that are compared.
        mean: Mean of the differences, None without one.
        spread: Largest minus smallest score over those seeds, of the arm where that is more.
        verdict: "seen", "not seen" or "too few seeds".
        lacking: Seeds that are not compared, each with the reason.
    """

    arm: str
    against: str
    clock: str
    measure: str
    differences: Mapping[int, float]
    counted: Mapping[int, tuple[int, int]]
    mean: float | None
    spread: float | None
    verdict: str
    lacking: Mapping[int, str]


def verdict_of(differences: Sequence[float], spread: float) -> str:
    """The rule of the plan.

    Args:
        differences: A difference per seed.
        spread: Largest spread of either arm over these seeds.
    """
    if len(differences) < len(SEEDS):
        return FEW
    values = np.asarray(differences, dtype=float)
    one_sign = (values > 0).all() or (values < 0).all()
    return SEEN if one_sign and abs(values.mean()) > spread else NOT_SEEN


def real_claims(found: RealResults) -> list[RealClaim]:
    """All differences of the plan, those of arms that were not run too, in the order of `PAIRS`."""
    return [
        _claim(found, arm, against, clock, measure)
        for arm, against, clocks in PAIRS
        for clock in clocks
        for measure in ENDPOINTS
    ]


def _claim(found: RealResults, arm: str, against: str, clock: str, measure: str) -> RealClaim:
    evidence = found.pass_rate if measure == PASS_RATE else found.exact
    scores = _both(evidence, arm, against, clock, measure)
    counts = _both(evidence, arm, against, clock, AXES[clock])
    differences = {int(seed): float(row.arm - row.other) for seed, row in scores.iterrows()}
    spread = float((scores.max() - scores.min()).max()) if len(scores) else None
    return RealClaim(
        arm,
        against,
        clock,
        measure,
        differences,
        {int(seed): (int(row.arm), int(row.other)) for seed, row in counts.iterrows()},
        float(np.mean(list(differences.values()))) if differences else None,
        spread,
        FEW if spread is None else verdict_of(list(differences.values()), spread),
        {seed: _why(evidence, arm, against, clock, measure, seed) for seed in found.seeds if seed not in differences},
    )


def _both(evidence: Evidence, arm: str, against: str, clock: str, measure: str) -> pd.DataFrame:
    return pd.concat(paired(evidence, arm, against, clock, measure), axis=1, keys=["arm", "other"]).dropna()


def _why(evidence: Evidence, arm: str, against: str, clock: str, measure: str, seed: int) -> str:
    """Why two arms are not compared at a seed: a run that is not there, or an arm without a score by then."""
    if absent := [name for name in (arm, against) if seed not in ends(evidence, name, clock)]:
        return f"no run of {' and '.join(absent)}"
    scored = zip((arm, against), paired(evidence, arm, against, clock, measure), strict=True)
    late = [name for name, scores in scored if seed not in scores.dropna()]
    return f"no score yet of {' and '.join(late)} at equal {AT_CLOCK[clock]}"


def write(folder: str | Path | None = None) -> str:
    """Write the verdicts beside the results as `claims.json`; return finals, gate and verdicts in Markdown.

    Args:
        folder: Folder of the results; the project's `data/results/real` if None.

    Raises:
        FileNotFoundError: A file is missing.
        ResultsRefused: See `read_real`.
    """
    folder = real_folder(folder)
    found = read_real(folder)
    rows = real_claims(found)
    about = {"schema": SCHEMA, "whole_seeds": found.whole_seeds, "lacking": lacking(found)}
    write_json(folder / CLAIMS, about | {"claims": [asdict(row) for row in rows]})
    parts = [finals_markdown(found), gate_in_words(found), markdown(rows), READING, lacking_in_words(found)]
    return "\n\n".join(parts)


def lacking(found: RealResults) -> dict[str, list[int]]:
    """Seeds that an arm has no run of, of the arms that lack some."""
    return {arm: seeds for arm in REAL_ARMS if (seeds := found.lacking(arm))}


def lacking_in_words(found: RealResults) -> str:
    """Seeds that are whole, and what is missing of the others."""
    whole = ", ".join(map(str, found.whole_seeds)) or "none"
    told = [f"{arm}: {', '.join(map(str, seeds))}" for arm, seeds in lacking(found).items()]
    return f"Whole seeds (all arms): {whole}." + (f" Seeds without a run: {'; '.join(told)}." if told else "")


def markdown(rows: Sequence[RealClaim]) -> str:
    """The differences as a Markdown table: a line per pair and clock, both endpoints in it."""
    lines = []
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        found = [cell for row in (first, second) for cell in (_difference(row), row.verdict)]
        lines.append((f"{first.arm} − {first.against}", AT_CLOCK[first.clock], *found))
    words = [cell for name in ENDPOINTS.values() for cell in (name, "verdict")]
    return markdown_table(["difference", "at equal", *words], lines)


def _difference(row: RealClaim) -> str:
    """Mean, each seed, spread, and where the two were compared; then what is lacking."""
    told = []
    if row.mean is not None:
        each = ", ".join(f"{seed}: {value:+.3f}" for seed, value in row.differences.items())
        at = " and ".join(f"{np.mean(counts):,.0f}" for counts in zip(*row.counted.values(), strict=True))
        told.append(f"{row.mean:+.3f} ({each}), spread {row.spread:.3f}, at {at}")
    reasons: dict[str, list[str]] = {}
    for seed, reason in row.lacking.items():
        reasons.setdefault(reason, []).append(str(seed))
    told += [f"{reason}, seed {', '.join(seeds)}" for reason, seeds in reasons.items()]
    return "; ".join(told)


def finals_markdown(found: RealResults) -> str:
    """Pass rates at temperature 1 at the end, by arm: mean, seeds, and on which clocks they ended."""
    table = found.pass_rate.scores
    finals = table[table["final"] & (table["sampling"] == found.pass_rate.compared)]
    lines = []
    for arm in found.arms:
        rows = finals[finals["arm"] == arm]
        rates = rows.groupby("seed")["pass_rate"].mean()
        ends_at = [f"{rows[name].mean():,.0f}" for name in ("policy_step", "compute_step", "rollouts")]
        each = ", ".join(f"{rate:.3f}" for rate in rates)
        lines.append((arm, str(len(rates)), f"{rates.mean():.3f} ({each})", *ends_at))
    head = ("arm", "seeds", "pass rate at temperature 1", "policy steps", "executed steps", "rollouts")
    return markdown_table(head, lines)


def gate_in_words(found: RealResults) -> str:
    """The gate of the plan, and how the differences are read after it."""
    if found.premise is None:
        return "The premise is not measured, so whether these arms can test the method is not known."
    gate = found.premise["gate"]
    told = [
        f"from {origin}, Δ = {one['distance']}: {one['shown']:.2f} against {one['own']:.2f}, p {one['p_holm']:.3f}"
        for origin, rows in gate["origins"].items()
        for one in rows
        if one["failed"]
    ]
    words = f"Gate {'passed' if gate['passed'] else 'not passed'} (one-sided, Holm): {'; '.join(told)}."
    return words if gate["passed"] else f"{words} The arms are not read as a test of the method."
