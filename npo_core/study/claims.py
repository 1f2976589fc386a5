"""Verdicts on the paper's claims, one row each: the paper's figure, ours on both clocks, and how it was decided.

The rules are in docs/evidence.md, with the date of each and what was known by then. Nothing here looks at more than the
committed results, so `python -m npo_core claims` makes the same rows in seconds.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_json
from ..method.stats import mean_interval, needed_items
from ..runs.validation import WORLD
from .comparisons import (
    PRIMARY,
    Difference,
    against_grpo,
    between,
    difference,
    entropy_widening,
    policy_ends,
    primary,
    speed_up,
    speed_up_bound,
)
from .findings import SCHEMA, results_folder
from .results import Evidence
from .signal_claims import interior_peak, shapes
from .verdicts import (
    FEW,
    NOT,
    PARTLY,
    REPRODUCED,
    STUDY,
    Claim,
    in_words,
    numbers,
    opposite_of,
    powers,
    side,
    verdict_of,
)

EQUAL = 0.01
"""Largest difference in test pass rate that counts as about equal."""
SMALL_OVERHEAD = 0.1
"""Largest share of off-line rollouts that counts as a small overhead."""

NEEDED = ("GRPO", *PRIMARY, "NPO, exact ratio", "LUFFY, no correction")
"""Arms without which the claims cannot be decided."""


def claims(evidence: Evidence, signal: Mapping[str, Any] | None = None) -> list[Claim]:
    """All claims with their verdicts.

    Args:
        evidence: Results of the study.
        signal: Content of `signal.json`, or None: then the claims about S, Q and V are "not measured".

    Raises:
        ValueError: An arm that a claim needs is not part of the results.
    """
    if missing := lacking(evidence):
        raise ValueError(f"The results lack the arms {', '.join(missing)}; `python -m npo_core study` runs all.")
    decide: list[Callable[[Evidence], Claim]] = [
        _early_speed_up, _late_breakthrough, _table, _ordering, _entropy, _correction, _growing_gap, _overhead,
    ]  # fmt: skip
    return [interior_peak(signal), shapes(signal), *(rule(evidence) for rule in decide)]


def lacking(evidence: Evidence) -> list[str]:
    """Arms that a claim needs and that are not part of the results."""
    return [arm for arm in NEEDED if arm not in evidence.arms]


def _both_clocks(evidence: Evidence, arms: Sequence[str]) -> tuple[list[Difference], list[Difference]]:
    chosen = [arm for arm in arms if arm in evidence.arms]
    return [against_grpo(evidence, arm) for arm in chosen], [against_grpo(evidence, arm, "policy") for arm in chosen]


def _early_speed_up(evidence: Evidence) -> Claim:
    table, bound = speed_up(evidence), speed_up_bound(evidence)
    texts, lows, opposite = {}, {}, []
    for count in table.columns:
        values = table[count].dropna().to_numpy(dtype=float)
        estimate = mean_interval(values) if len(values) > 1 else None
        lows[count] = None if estimate is None else estimate.low
        texts[count] = "–" if estimate is None else f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"
        if estimate is not None and estimate.high < 1:
            opposite.append(count)
    if lows.get("with scout") is None:
        verdict = FEW
    else:
        verdict = REPRODUCED if lows["with scout"] > 1 else PARTLY if lows["without scout"] > 1 else NOT
    most = f"{bound.min():.2f} to {bound.max():.2f}" if bound.notna().any() else "–"
    return Claim(
        "early speed-up",
        "Early-stage guidance reaches GRPO's level sooner",
        "≈ 2.1×",
        f"{texts.get('with scout', '–')} with the scout, {texts.get('with scout and off-line', '–')} with its off-line "
        "rollouts too",
        f"{texts.get('without scout', '–')} without the scout",
        verdict,
        f"steps of GRPO over those of NPO early to 80 % of its rise; {int(table.notna().all(axis=1).sum())} of "
        f"{len(evidence.about['seeds'])} seeds reach it; with the scout no more than {most} is possible, the rise "
        "being so short",
        STUDY,
        table.reset_index(names="seed").replace({np.nan: None}).to_dict("records"),
        opposite,
    )


def _late_breakthrough(evidence: Evidence) -> Claim:
    compute, policy = _both_clocks(evidence, ["NPO late"])
    return Claim(
        "plateau",
        "A late intervention breaks the plateau",
        "figure 1a, no number",
        in_words(compute),
        in_words(policy),
        verdict_of(compute, policy),
        powers(compute),
        STUDY,
        numbers(compute, policy),
        opposite_of(compute),
    )


def _table(evidence: Evidence) -> Claim:
    compute, policy = _both_clocks(evidence, ["NPO early", "NPO", "AutoNPO"])
    return Claim(
        "Table 1",
        "NPO and AutoNPO end above GRPO",
        "+1.87 (early), +2.59 (early+late), +2.90 points (AutoNPO), one run",
        in_words(compute),
        in_words(policy),
        verdict_of(compute, policy),
        powers(compute) + "; Holm-adjusted p: " + _holm_words(evidence, [entry.arm for entry in compute]),
        STUDY,
        numbers(compute, policy),
        opposite_of(compute),
    )


def _holm_words(evidence: Evidence, arms: Sequence[str]) -> str:
    table = primary(evidence)
    if "p_holm" not in table:
        return "–"
    rows = table[(table["clock"] == "compute") & table["arm"].isin(arms)]
    return ", ".join(f"{row.arm} {row.p_holm:.2f}" for row in rows.itertuples())


def _ordering(evidence: Evidence) -> Claim:
    others = ("RLEP", "ExGRPO", "LUFFY", "GRPO")
    found = [between(evidence, arm, other) for arm in ("NPO", "AutoNPO") for other in others]
    within = between(evidence, "AutoNPO", "NPO")
    verdict = verdict_of(found)
    if verdict == REPRODUCED and side(within) == -1:
        verdict = PARTLY
    return Claim(
        "ordering",
        "AutoNPO ≥ NPO > RLEP, ExGRPO, LUFFY, GRPO",
        "63.15 ≥ 62.84 > 61.48, 61.16, 58.68, 60.25, one run; to tell the first two apart takes "
        f"{needed_items(0.6315, 0.6284):,} items each, were they independent",
        in_words([*found, within]),
        "the clock of compute alone orders arms that end at different steps",
        verdict,
        powers([*found, within]),
        STUDY,
        numbers(found, [within]),
        opposite_of([*found, within]),
    )


def _entropy(evidence: Evidence) -> Claim:
    finals, measure = evidence.finals("paper", "entropy"), "entropy, nats a token"

    def minus(arm: str, other: str, clock: str = "compute") -> Difference:
        scores = finals[other]
        if clock == "policy":
            scores = evidence.at_policy_step(other, policy_ends(evidence, arm), "entropy")
        return difference(finals[arm], scores, names=(arm, other), clock=clock, measure=measure)

    compute = [minus(arm, "GRPO") for arm in ("NPO", "AutoNPO")]
    policy = [minus(arm, "GRPO", "policy") for arm in ("NPO", "AutoNPO")]
    widened = []
    for arm in ("NPO early", "NPO late", "AutoNPO"):
        ratio = entropy_widening(evidence, arm)
        names = (arm, "its own first pass")
        widened.append(difference(ratio, ratio * 0 + 1, names=names, measure="entropy ratio of the replay, minus 1"))
    verdict = verdict_of([*policy, *widened])
    if verdict == REPRODUCED and any(side(found) != 1 for found in compute):
        verdict = PARTLY
    control = [minus("NPO", "NPO, no guide")] if "NPO, no guide" in evidence.arms else []
    return Claim(
        "entropy",
        "Entropy stays higher than GRPO's and widens at interventions",
        "figure 4b, no number",
        in_words([*compute, *control]) + ". Replay over first pass, minus 1: " + in_words(widened),
        in_words(policy),
        verdict,
        "equal policy step and the replays decide: entropy falls with steps, and arms that rolled back make fewer; "
        "full-vocabulary entropy of on-policy tokens, last 20 steps; replay: first 20 steps after a roll-back; "
        + powers([*policy, *widened]),
        STUDY,
        numbers(compute, policy, widened, control),
        opposite_of([*policy, *widened]),
    )


def _correction(evidence: Evidence) -> Claim:
    npo = between(evidence, "NPO", "NPO, exact ratio")
    luffy = between(evidence, "LUFFY", "LUFFY, no correction")
    if npo.low is None or npo.high is None or luffy.low is None:
        verdict, undecided = FEW, ""
    else:
        parts = [npo.low > -EQUAL and npo.high < EQUAL, luffy.low > 0]
        verdict = REPRODUCED if all(parts) else PARTLY if any(parts) else NOT
        half = (npo.high - npo.low) / 2
        undecided = f"; undecided for NPO: the interval is ±{half:.3f} wide" if side(npo) == 0 and not parts[0] else ""
    return Claim(
        "correction",
        "The importance correction is unnecessary for NPO and necessary for LUFFY",
        "figure 4c: NPO about equal, LUFFY collapses",
        in_words([npo, luffy]),
        "both arms of a pair end at the same policy step",
        verdict,
        f"about equal: interval within ±{EQUAL}; necessary: interval above 0{undecided}; {powers([npo, luffy])}",
        STUDY,
        numbers([npo, luffy]),
        opposite_of([luffy]),
    )


def _growing_gap(evidence: Evidence) -> Claim:
    compute = [against_grpo(evidence, "NPO early"), between(evidence, "NPO", "NPO early")]
    gap = [against_grpo(evidence, arm, "policy") for arm in ("NPO early", "NPO")]
    return Claim(
        "growing gap",
        "The gap to GRPO grows with each intervention",
        "+1.87 after one, +2.59 points after two",
        in_words(compute),
        in_words(gap),
        verdict_of(compute),
        powers(compute),
        STUDY,
        numbers(compute, gap),
        opposite_of(compute),
    )


def _overhead(evidence: Evidence) -> Claim:
    shares, again = {}, {}
    for arm in ("AutoNPO", "NPO"):
        runs = [run for run in evidence.about["runs"] if run["arm"] == arm]
        shares[arm] = [run["offline_rollouts"] / run["rollouts"] for run in runs]
        again[arm] = [1 - run["policy_steps"] / run["compute_steps"] for run in runs]
    found = {arm: mean_interval(np.array(values)) for arm, values in shares.items() if len(values) > 1}
    small = [arm for arm, estimate in found.items() if estimate.high <= SMALL_OVERHEAD]
    return Claim(
        "overhead",
        "The overhead is small: the guided segment needs no extra rollouts",
        "no number",
        "; ".join(
            f"{arm}: off-line rollouts {np.mean(shares[arm]):.1%} of all"
            + (f" ({found[arm].low:.1%} to {found[arm].high:.1%})" if arm in found else "")
            + f", steps done again {np.mean(again[arm]):.1%}"
            for arm in shares
            if shares[arm]
        ),
        "the policy clock does not see rolled-back steps",
        FEW if len(found) < len(shares) else REPRODUCED if len(small) == len(shares) else PARTLY if small else NOT,
        f"interval of the share of off-line rollouts at most {SMALL_OVERHEAD:.0%}, per arm; steps done again cost more "
        "and are charged in every comparison",
        STUDY,
        [{"arm": arm, "offline": shares[arm], "again": again[arm]} for arm in shares],
        [arm for arm, estimate in found.items() if estimate.low > SMALL_OVERHEAD],
    )


def signal_results(folder: Path | None = None) -> dict[str, Any] | None:
    """Content of `signal.json` in a folder of results (the project's `data/results` if None), or None without one."""
    path = (results_folder() if folder is None else Path(folder)) / "signal.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write(evidence: Evidence, folder: Path | None = None) -> str:
    """Write `claims.json` beside the results, of which `signal.json` may be one; return the table in Markdown."""
    folder = results_folder() if folder is None else Path(folder)
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
    head = ("claim", "paper", "ours, equal compute", "ours, equal policy step", "verdict", "decided by", "command")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in found:
        other = f"; the other way: {', '.join(row.opposite)}" if row.opposite else ""
        shown = replace(row, command=f"`{row.command}`", verdict=row.verdict + other)
        cells = (shown.claim, shown.paper, shown.compute, shown.policy, shown.verdict, shown.grounds, shown.command)
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)
