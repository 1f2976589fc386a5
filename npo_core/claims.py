"""Verdicts on the paper's claims, one row each: the paper's figure, ours on both clocks, and how it was decided.

The rules are in docs/evidence.md and were written before the arms ran. Nothing here looks at more than the committed
results, so `python -m npo_core claims` makes the same rows in seconds.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

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
)
from .findings import SCHEMA, results_folder
from .results import Evidence
from .runs import write_json
from .stats import mean_interval

REPRODUCED, PARTLY, NOT, FEW = "reproduced", "partly", "not reproduced", "too few seeds"

EQUAL = 0.01
"""Largest difference in test pass rate that counts as about equal."""
SMALL_OVERHEAD = 0.1
"""Largest share of off-line rollouts that counts as a small overhead."""
INTERIOR_SHARE = 0.8
"""Share of seeds with an interior Δ* from which on S is said to have an interior peak."""
CLOSE_FIT = 0.2
"""Largest error of a fitted Q curve as a share of its ceiling, and of ln V in nats, that counts as that shape."""

STUDY, SIGNAL = "make study", "make signal-study"
NEEDED = ("GRPO", *PRIMARY, "NPO, exact ratio", "LUFFY, no correction")
"""Arms without which the claims cannot be decided."""


@dataclass(frozen=True)
class Claim:
    """One row of the table.

    Attributes:
        name: Short name.
        claim: What the paper says.
        paper: Its figure.
        compute: Ours at equal compute, in words.
        policy: Ours at equal policy step, in words.
        verdict: "reproduced", "partly", "not reproduced", "not testable here" or "too few seeds".
        grounds: What decided it.
        command: What makes the numbers.
        numbers: The differences behind it.
    """

    name: str
    claim: str
    paper: str
    compute: str
    policy: str
    verdict: str
    grounds: str
    command: str
    numbers: Sequence[Mapping[str, Any]] = ()


def claims(evidence: Evidence, signal: Mapping[str, Any] | None = None) -> list[Claim]:
    """All claims with their verdicts.

    Args:
        evidence: Results of the study.
        signal: Content of `signal.json`, or None: then the claims about S, Q and V are left out.

    Raises:
        ValueError: An arm that a claim needs is not part of the results.
    """
    missing = [arm for arm in NEEDED if arm not in evidence.arms]
    if missing:
        raise ValueError(f"The results lack the arms {', '.join(missing)}; `python -m npo_core study` runs all.")
    about_signal = [] if signal is None else [_interior_peak(signal), _shapes(signal)]
    decide: list[Callable[[Evidence], Claim]] = [
        _early_speed_up, _late_breakthrough, _table, _ordering, _entropy, _correction, _growing_gap, _overhead,
    ]  # fmt: skip
    return [*about_signal, *(rule(evidence) for rule in decide)]


def side(found: Difference) -> int | None:
    """1 when the interval lies above zero, −1 below, 0 when it holds zero, None without an interval."""
    if found.low is None or found.high is None:
        return None
    return int(found.low > 0) - int(found.high < 0)


def verdict_of(compute: Sequence[Difference], policy: Sequence[Difference] = ()) -> str:
    """The rule of the plan: reproduced at equal compute, partly on one clock or for a part of the claim, else not."""
    sides = [side(found) for found in compute]
    if not sides or any(value is None for value in sides):
        return FEW
    if all(value == 1 for value in sides):
        return REPRODUCED
    return PARTLY if 1 in [*sides, *(side(found) for found in policy)] else NOT


def _words(found: Sequence[Difference]) -> str:
    return "; ".join(f"{entry.arm} − {entry.against}: {entry.text}" for entry in found)


def _powers(found: Sequence[Difference]) -> str:
    known = [entry for entry in found if entry.detectable is not None]
    if not known:
        return "no interval with fewer than two seeds"
    return "found with power 0.8 if at least: " + ", ".join(f"{entry.arm} {entry.detectable:.3f}" for entry in known)


def _numbers(*groups: Sequence[Difference]) -> list[dict[str, Any]]:
    return [asdict(entry) for group in groups for entry in group]


def _both_clocks(evidence: Evidence, arms: Sequence[str]) -> tuple[list[Difference], list[Difference]]:
    chosen = [arm for arm in arms if arm in evidence.arms]
    return [against_grpo(evidence, arm) for arm in chosen], [against_grpo(evidence, arm, "policy") for arm in chosen]


def _early_speed_up(evidence: Evidence) -> Claim:
    table = speed_up(evidence)
    texts, lows = {}, {}
    for count in table.columns:
        values = table[count].dropna().to_numpy(dtype=float)
        estimate = mean_interval(values) if len(values) > 1 else None
        lows[count] = None if estimate is None else estimate.low
        texts[count] = "–" if estimate is None else f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"
    charged, free = "with scout and off-line", "without scout"
    if lows.get(charged) is None:
        verdict = FEW
    else:
        verdict = REPRODUCED if lows[charged] > 1 else PARTLY if lows[free] > 1 else NOT
    return Claim(
        "early speed-up",
        "Early-stage guidance reaches GRPO's level sooner",
        "≈ 2.1×",
        f"{texts.get(charged, '–')} with scout and off-line rollouts, {texts.get('with scout', '–')} with the scout",
        f"{texts.get(free, '–')} without the scout",
        verdict,
        f"steps of GRPO over those of NPO early to 80 % of its rise; {int(table.notna().all(axis=1).sum())} of "
        f"{len(evidence.about['seeds'])} seeds reach it",
        STUDY,
        table.reset_index(names="seed").replace({np.nan: None}).to_dict("records"),
    )


def _late_breakthrough(evidence: Evidence) -> Claim:
    compute, policy = _both_clocks(evidence, ["NPO late"])
    return Claim(
        "plateau",
        "A late intervention breaks the plateau",
        "figure 1a, no number",
        _words(compute),
        _words(policy),
        verdict_of(compute, policy),
        _powers(compute),
        STUDY,
        _numbers(compute, policy),
    )


def _table(evidence: Evidence) -> Claim:
    compute, policy = _both_clocks(evidence, ["NPO early", "NPO", "AutoNPO"])
    return Claim(
        "Table 1",
        "NPO and AutoNPO end above GRPO",
        "+1.87 (early), +2.59 (early+late), +2.90 points (AutoNPO), one run",
        _words(compute),
        _words(policy),
        verdict_of(compute, policy),
        _powers(compute) + "; Holm-adjusted p: " + _holm_words(evidence, [entry.arm for entry in compute]),
        STUDY,
        _numbers(compute, policy),
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
    behind = side(within) == -1
    verdict = verdict_of(found)
    if verdict == REPRODUCED and behind:
        verdict = PARTLY
    return Claim(
        "ordering",
        "AutoNPO ≥ NPO > RLEP, ExGRPO, LUFFY, GRPO",
        "63.15 ≥ 62.84 > 61.48, 61.16, 58.68, 60.25, one run; AutoNPO − NPO needs some 200,000 items",
        _words([*found, within]),
        "the clock of compute alone orders arms that end at different steps",
        verdict,
        _powers([within]),
        STUDY,
        _numbers(found, [within]),
    )


def _entropy(evidence: Evidence) -> Claim:
    arms = [arm for arm in ("NPO", "AutoNPO") if arm in evidence.arms]
    finals = evidence.finals("paper", "entropy")
    measure = "entropy, nats a token"
    compute = [difference(finals[arm], finals["GRPO"], names=(arm, "GRPO"), measure=measure) for arm in arms]
    policy = [
        difference(
            finals[arm],
            evidence.at_policy_step("GRPO", policy_ends(evidence, arm), "entropy"),
            names=(arm, "GRPO"),
            clock="policy",
            measure=measure,
        )
        for arm in arms
    ]
    widened = []
    for arm in arms:
        ratio = entropy_widening(evidence, arm)
        names = (arm, "its own first pass")
        widened.append(difference(ratio, ratio * 0 + 1, names=names, measure="entropy ratio of the replay, minus 1"))
    return Claim(
        "entropy",
        "Entropy stays higher than GRPO's and widens at interventions",
        "figure 4b, no number",
        _words(compute) + ". Replay over first pass, minus 1: " + _words(widened),
        _words(policy),
        verdict_of([*compute, *widened], policy),
        "full-vocabulary entropy of on-policy tokens, last 20 steps; replay: first 20 steps after a roll-back",
        STUDY,
        _numbers(compute, policy, widened),
    )


def _correction(evidence: Evidence) -> Claim:
    npo = between(evidence, "NPO", "NPO, exact ratio")
    luffy = between(evidence, "LUFFY", "LUFFY, no correction")
    if npo.low is None or luffy.low is None:
        verdict = FEW
    else:
        parts = [npo.low > -EQUAL and npo.high < EQUAL, luffy.low > 0]
        verdict = REPRODUCED if all(parts) else PARTLY if any(parts) else NOT
    return Claim(
        "correction",
        "The importance correction is unnecessary for NPO and necessary for LUFFY",
        "figure 4c: NPO about equal, LUFFY collapses",
        _words([npo, luffy]),
        "both arms of a pair end at the same policy step",
        verdict,
        f"about equal: interval within ±{EQUAL}; necessary: interval above 0",
        STUDY,
        _numbers([npo, luffy]),
    )


def _growing_gap(evidence: Evidence) -> Claim:
    compute = [between(evidence, "NPO", "NPO early")]
    gap = {arm: against_grpo(evidence, arm, "policy") for arm in ("NPO early", "NPO")}
    return Claim(
        "growing gap",
        "The gap to GRPO grows with each intervention",
        "+1.87 after one, +2.59 points after two",
        _words(compute),
        _words(list(gap.values())),
        verdict_of(compute),
        _powers(compute),
        STUDY,
        _numbers(compute, list(gap.values())),
    )


def _overhead(evidence: Evidence) -> Claim:
    shares, again = {}, {}
    for arm in ("AutoNPO", "NPO"):
        runs = [run for run in evidence.about["runs"] if run["arm"] == arm]
        shares[arm] = [run["offline_rollouts"] / run["rollouts"] for run in runs]
        again[arm] = [1 - run["policy_steps"] / run["compute_steps"] for run in runs]
    highest = max((max(values) for values in shares.values() if values), default=float("nan"))
    return Claim(
        "overhead",
        "The overhead is small: the guided segment needs no extra rollouts",
        "no number",
        "; ".join(
            f"{arm}: off-line rollouts {np.mean(shares[arm]):.1%} of all, steps done again {np.mean(again[arm]):.1%}"
            for arm in shares
            if shares[arm]
        ),
        "the policy clock does not see rolled-back steps",
        FEW if len(shares["AutoNPO"]) < 2 else REPRODUCED if highest <= SMALL_OVERHEAD else PARTLY,
        f"off-line rollouts of every run at most {SMALL_OVERHEAD:.0%}; steps done again are the larger cost and are "
        "charged in every comparison",
        STUDY,
        [{"arm": arm, "offline": shares[arm], "again": again[arm]} for arm in shares],
    )


def _interior_peak(signal: Mapping[str, Any]) -> Claim:
    seeds = len(signal["seeds"])
    words = {
        f"signal{k}_gradient_{mode}": f"{rollouts}, ratio {mode}"
        for k, rollouts in (("", "8 rollouts"), ("_1", "1 rollout"))
        for mode in ("current", "exact")
    }
    counts = {
        (origin, name): sum(not best["at_edge"] for best in entry["optimum"][name])
        for origin, entry in signal["origins"].items()
        for name in words
    }
    enough = {key: count >= INTERIOR_SHARE * seeds for key, count in counts.items()}
    everywhere = [name for name in words if all(enough[origin, name] for origin in signal["origins"])]
    return Claim(
        "interior peak",
        "S(Δ) = Q/V has one interior maximum",
        "Δ* ≈ 20 steps from the base, ≈ 70 from mid-training",
        "; ".join(
            f"from {origin}: " + ", ".join(f"{words[name]} {counts[origin, name]}/{seeds}" for name in words)
            for origin in signal["origins"]
        ),
        "a measurement, not a run",
        REPRODUCED if everywhere else PARTLY if any(enough.values()) else NOT,
        f"seeds whose Δ* is interior; {INTERIOR_SHARE:.0%} of them needed, from every origin, for one definition of S",
        SIGNAL,
        [{"origin": origin, "signal": name, "interior": count} for (origin, name), count in counts.items()],
    )


def _shapes(signal: Mapping[str, Any]) -> Claim:
    rows = []
    for origin, entry in signal["origins"].items():
        for quality, fits in entry["fit"].items():
            known = [fit for fit in fits if fit.get("q_inf") and fit.get("q_rmse") is not None]
            if known:
                rows.append(
                    {
                        "origin": origin,
                        "quality": quality,
                        "q_error": float(np.median([fit["q_rmse"] / fit["q_inf"] for fit in known])),
                        "v_error": float(np.median([fit["v_rmse"] for fit in known])),
                    }
                )
    table = pd.DataFrame(rows)
    concave = bool((table.groupby("origin")["q_error"].min() <= CLOSE_FIT).all())
    exponential = bool((table.groupby("origin")["v_error"].min() <= CLOSE_FIT).all())
    some = bool((table[["q_error", "v_error"]] <= CLOSE_FIT).any().any())
    return Claim(
        "shapes",
        "Q is concave and saturates, V grows exponentially",
        "V ≲ e^(βΔ), figures 2b and 2c",
        "; ".join(
            f"from {row.origin}, {row.quality}: error of Q {row.q_error:.0%} of its ceiling, of ln V {row.v_error:.2f}"
            for row in table.itertuples()
        ),
        "a measurement, not a run",
        REPRODUCED if concave and exponential else PARTLY if some else NOT,
        f"fits of Q∞(1 − e^(−Δ/τ)) and e^(βΔ), median over seeds; at most {CLOSE_FIT:.0%} and {CLOSE_FIT} nats",
        SIGNAL,
        rows,
    )


def signal_results(folder: Path | None = None) -> dict[str, Any] | None:
    """Content of `signal.json` in a folder of results (the project's `data/results` if None), or None without one."""
    path = (results_folder() if folder is None else Path(folder)) / "signal.json"
    return json.loads(path.read_text()) if path.is_file() else None


def write(evidence: Evidence, folder: Path | None = None) -> str:
    """Write `claims.json` beside the results, of which `signal.json` may be one; return the table in Markdown."""
    folder = results_folder() if folder is None else Path(folder)
    found = claims(evidence, signal_results(folder))
    about = {"schema": SCHEMA, "seeds": evidence.about["seeds"], "failed": evidence.about["failed"]}
    write_json(folder / "claims.json", about | {"claims": [asdict(row) for row in found]})
    return markdown(found)


def markdown(found: Sequence[Claim]) -> str:
    """The claims as a Markdown table."""
    head = ("claim", "paper", "ours, equal compute", "ours, equal policy step", "verdict", "decided by", "command")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in found:
        shown = replace(row, command=f"`{row.command}`")
        cells = (shown.claim, shown.paper, shown.compute, shown.policy, shown.verdict, shown.grounds, shown.command)
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)
