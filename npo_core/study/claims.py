"""Verdicts on the paper's claims, a row per claim and clock: the paper's figure, ours, and how it was decided.

The rules are in docs/evidence.md. Nothing here looks at more than the committed results, so `python -m npo_core claims`
makes the same rows in seconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..files import read_json, write_json
from ..method.stats import Estimate, mean_interval
from ..runs.validation import WORLD
from .clocks import compare, short_by
from .comparisons import SPEED_UP_COUNTS, speed_up, speed_up_bound
from .families import AT_CLOCK, FAMILIES, Family, needed_arms
from .findings import SCHEMA, markdown_table, results_folder
from .results import Evidence, require_world
from .signal_claims import interior_peak, predicts, premise_holds, shapes
from .verdicts import FEW, NOT_SHOWN, OTHER_WAY, REPRODUCED, STUDY, Claim, in_words, powers, summary, verdict

SMALL_OVERHEAD = 0.1
"""Largest share of off-line rollouts that counts as a small overhead."""


def claims(evidence: Evidence, signal: Mapping[str, Any] | None = None) -> list[Claim]:
    """All claims with their verdicts, a row per clock.

    Args:
        evidence: Results of the study.
        signal: Content of `signal.json`, or None: then the claims about S, Q and V are "not measured".

    Raises:
        ValueError: An arm that a claim needs is not part of the results.
    """
    if missing := lacking(evidence):
        raise ValueError(f"The results lack the arms {', '.join(missing)}; `python -m npo_core study` runs all.")
    rows = [of_signal(signal) for of_signal in (premise_holds, interior_peak, shapes, predicts)]
    rows += [_family(evidence, family, clock) for family in FAMILIES for clock in family.clocks]
    return [*rows, *_early_speed_up(evidence), *_overhead(evidence)]


def lacking(evidence: Evidence) -> list[str]:
    """Arms that a claim needs and that are not part of the results, but those that are GRPO itself."""
    return [arm for arm in needed_arms() if arm not in [*evidence.arms, *evidence.same]]


def _family(evidence: Evidence, family: Family, clock: str) -> Claim:
    compared = compare(evidence, family, clock)
    found, several = [one.found for one in compared], len({one.found.against for one in compared}) > 1
    words = {f"{one.found.arm} − {one.found.against}" if several else one.found.arm: verdict(one) for one in compared}
    adjusted = ", ".join(f"{one.p_holm:.3f}" for one in compared if one.p_holm is not None)
    grounds = f"{powers(found)}; Holm's p: {adjusted}" if adjusted else powers(found)
    held = [pair.arm for pair in family.pairs if pair.against is None and pair.arm in evidence.arms]
    if clock == "rollouts" and held and compared:
        short = [by for arm in held if (by := short_by(evidence, arm)) is not None]
        grounds += f"; references have spent {np.mean(short):,.0f} rollouts less on average" if short else ""
    for arm in sorted({pair.against for pair in family.pairs} & set(evidence.same)):
        grounds += f"; without {arm}, which is GRPO itself here"
    return Claim(
        family.name,
        family.claim,
        family.paper,
        clock,
        in_words(compared),
        summary(words),
        grounds,
        STUDY,
        [
            {**asdict(one.found), "p_holm": one.p_holm, "verdict": word}
            for one, word in zip(compared, words.values(), strict=True)
        ],
    )


def _against(value: float, estimate: Estimate | None) -> str:
    """Which side of a value an interval lies on, as a verdict of a claim to lie above it."""
    if estimate is None:
        return FEW
    return REPRODUCED if estimate.low > value else OTHER_WAY if estimate.high < value else NOT_SHOWN


def _early_speed_up(evidence: Evidence) -> list[Claim]:
    """Reproduced only where every seed reaches the level: the mean over those that do is a mean of the lucky ones."""
    table, bound, rows = speed_up(evidence), speed_up_bound(evidence), []
    most = f"{bound.min():.2f} to {bound.max():.2f}" if bound.notna().any() else "–"
    for clock, count in SPEED_UP_COUNTS.items():
        reached = table[count].dropna() if count in table else pd.Series(dtype=float)
        estimate = mean_interval(reached.to_numpy(dtype=float)) if len(reached) > 1 else None
        text = "–" if estimate is None else f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"
        some = f", {len(reached)} of {len(table)} reach it" if len(reached) < len(table) else ""
        rows.append(
            Claim(
                "early speed-up",
                "Early-stage guidance reaches GRPO's level sooner",
                "≈ 2.1×" if clock == "policy" else "no number",
                clock,
                f"{text}, {count}{some}",
                NOT_SHOWN if some and len(table) > 1 else _against(1.0, estimate),
                f"steps of GRPO over those of NPO early to 80 % of GRPO's rise; {len(reached)} of {len(table)} seeds "
                f"reach it, and all must; with the scout no more than {most} is possible",
                STUDY,
                [{"seed": int(seed), "ratio": float(value)} for seed, value in reached.items()],
            )
        )
    return rows


def _overhead(evidence: Evidence) -> list[Claim]:
    rows = []
    for arm in ("AutoNPO", "NPO"):
        runs = [run for run in evidence.about["runs"] if run["arm"] == arm]
        shares = np.array([run["offline_rollouts"] / run["rollouts"] for run in runs])
        again = np.array([1 - run["policy_steps"] / run["compute_steps"] for run in runs])
        found = mean_interval(shares) if len(shares) > 1 else None
        ends = "" if found is None else f" ({found.low:.1%} to {found.high:.1%})"
        small = FEW if found is None else REPRODUCED if found.high <= SMALL_OVERHEAD else NOT_SHOWN
        rows.append(
            Claim(
                f"overhead of {arm}",
                "The overhead is small: the guided segment needs no extra rollouts",
                "no number",
                "",
                f"off-line rollouts {shares.mean():.1%} of all{ends}, steps done again {again.mean():.1%}"
                if len(shares)
                else "–",
                OTHER_WAY if found is not None and found.low > SMALL_OVERHEAD else small,
                f"interval of the share of off-line rollouts at most {SMALL_OVERHEAD:.0%}; steps done again cost more "
                "and are charged on the other clocks",
                STUDY,
                [{"offline": shares.tolist(), "again": again.tolist()}],
            )
        )
    return rows


def signal_results(folder: Path | None = None) -> dict[str, Any] | None:
    """Content of `signal.json` in a folder of results (the project's `data/results` if None), or None without one.

    Raises:
        ResultsRefused: It was measured in another small world.
    """
    path = results_folder(folder) / "signal.json"
    if not path.is_file():
        return None
    found = read_json(path)
    require_world(found, path)
    return found


def write(evidence: Evidence, folder: Path | None = None) -> str:
    """Write `claims.json` beside the results, of which `signal.json` may be one; return the table in Markdown."""
    folder = results_folder(folder)
    found = claims(evidence, signal_results(folder))
    about = {"schema": SCHEMA, "world": WORLD, "seeds": evidence.about["seeds"], "failed": evidence.about["failed"]}
    write_json(folder / "claims.json", about | {"claims": [asdict(row) for row in found]})
    return markdown(found)


def decide(evidence: Evidence, folder: Path | None = None) -> str:
    """What `write` returns; where arms that a claim needs were not run, a sentence that names them."""
    if missing := lacking(evidence):
        return f"No verdicts: arms that the claims need were not run ({', '.join(missing)})."
    return write(evidence, folder)


def markdown(found: Sequence[Claim]) -> str:
    """The claims as a Markdown table."""
    head = ("claim", "paper", "clock", "ours", "verdict", "decided by")
    rows = [(r.claim, r.paper, AT_CLOCK.get(r.clock, "–"), r.ours, r.verdict, r.grounds) for r in found]
    return markdown_table(head, [[cell.replace("|", "/") for cell in row] for row in rows])
