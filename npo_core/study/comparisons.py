"""Tables of the evidence study: arms on three clocks, secondary endpoints, suites, and the course of training.

Differences are paired by seed (`differences.py`), at what `clocks.py` holds equal; docs/evidence.md has the plan.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from ..method.stats import holm, interquartile_mean, mean_interval, stratified_bootstrap
from ..runs.folder import moving_average
from ..streams import TEST_ITEMS
from .clocks import against_reference, at_equal, compare, ends, interpolated, short_by
from .differences import Difference, difference
from .families import AT_CLOCK, CLOCKS, FAMILIES, REFERENCES
from .findings import markdown_table
from .results import Evidence

LEVEL_SHARE = 0.8
"""Reference level of the speed-up: this share of the way from GRPO's first steps to the top of its rise."""
RISE_FIRST, RISE_WINDOW = 10, 20
"""Steps that the rise starts from, and steps in a row whose largest mean is its top (as in docs/gates.md)."""
END_STEPS, BROKEN = 20, 0.01
"""A run whose pass rate over its last compute steps is below this share ended broken, whatever broke it."""
COSTS = (
    ("policy_steps", "policy steps"), ("compute_steps", "compute steps"), ("offline_rollouts", "off-line rollouts"),
    ("rollouts", "all rollouts"), ("trained_tokens", "trained tokens"),
)  # fmt: skip
"""What a run has spent, by its name in the results and in words."""
EARLY = "NPO early"
"""Arm whose speed-up is told."""
SPEED_UP_COUNTS = {"policy": "without scout", "compute": "with scout", "rollouts": "with scout and off-line"}
"""What the guided run's steps count on each clock: its trajectory, all optimiser steps, off-line rollouts too."""


def between(
    evidence: Evidence, arm: str, other: str, measure: str = "pass_rate", sampling: str = "paper"
) -> Difference:
    """An arm minus another, each at its own end, mean over suites."""
    finals = evidence.finals(sampling, measure)
    return difference(finals[arm], finals[other], names=(arm, other), measure=f"{measure} ({sampling})")


def primary(evidence: Evidence) -> pd.DataFrame:
    """The primary comparison: every arm minus the reference of each clock, where the results hold one.

    Returns:
        A row per arm and clock with the fields of `Difference`, and `p_holm` for the arms of the family "guidance
        pays". An arm that makes more steps than GRPO has no row at equal policy step or equal compute steps.
    """
    rows = [{**asdict(found), "p_holm": p_holm} for found, p_holm in _against_references(evidence)]
    return pd.DataFrame(rows, columns=[*(field for field in Difference.__dataclass_fields__), "p_holm"])


def _against_references(evidence: Evidence) -> Iterator[tuple[Difference, float | None]]:
    """What `primary` holds, with None where a table of numbers would make NaN of it."""
    guided = {clock: {one.pair.arm: one.p_holm for one in compare(evidence, FAMILIES[0], clock)} for clock in CLOCKS}
    for arm in evidence.arms:
        for clock in CLOCKS:
            if arm in REFERENCES[clock] or not set(REFERENCES[clock]) & set(evidence.arms):
                continue
            most = max(max(ends(evidence, name, clock).values(), default=0) for name in REFERENCES[clock])
            if max(ends(evidence, arm, clock).values(), default=0) <= most:
                yield against_reference(evidence, arm, clock), guided[clock].get(arm)


def arm_table(evidence: Evidence, rng: np.random.Generator) -> pd.DataFrame:
    """One row per arm: final score, IQM with a stratified bootstrap interval, differences on three clocks, cost.

    The columns "equal policy step", "equal compute steps" and "equal total rollouts" hold the difference to the clock's
    reference in words, or None where there is none; see `primary`.
    """
    rows = []
    found = {(one.arm, one.clock): _words(one, p_holm) for one, p_holm in _against_references(evidence)}
    for arm in evidence.arms:
        finals = evidence.finals()[arm].dropna()
        plain = evidence.finals("plain")[arm].dropna()
        chosen = evidence.scores[
            (evidence.scores["arm"] == arm) & evidence.scores["final"] & (evidence.scores["sampling"] == "paper")
        ]
        grid = chosen.pivot(index="seed", columns="suite", values="pass_rate").to_numpy()
        runs = [run for run in evidence.about["runs"] if run["arm"] == arm]
        estimate = mean_interval(finals.to_numpy()) if len(finals) > 1 else None
        robust = stratified_bootstrap(grid, rng) if len(grid) > 1 else None
        rows.append(
            {
                "arm": arm,
                "seeds": len(finals),
                "failed": len(evidence.failed.get(arm, [])),
                "pass rate": float(finals.mean()),
                "low": estimate.low if estimate else None,
                "high": estimate.high if estimate else None,
                "IQM": robust.value if robust else interquartile_mean(grid) if grid.size else None,
                "IQM low": robust.low if robust else None,
                "IQM high": robust.high if robust else None,
                "pass rate at T = 1": float(plain.mean()),
                "pass@8 at T = 1": float(evidence.finals("plain", "pass_at_8")[arm].mean()),
                **{f"equal {AT_CLOCK[clock]}": found.get((arm, clock)) for clock in CLOCKS},
                "entropy": float(chosen.groupby("seed")["entropy"].first().mean()),
                "all-wrong groups": float(chosen.groupby("seed")["all_wrong_groups"].first().mean()),
                **{name.replace("_", " "): _mean(runs, name) for name, _ in COSTS},
                "interventions": float(np.mean([len(run["interventions"]) for run in runs])) if runs else None,
            }
        )
    return pd.DataFrame(rows)


def _mean(runs: Sequence[dict[str, Any]], name: str) -> float | None:
    return float(np.mean([run[name] for run in runs])) if runs else None


def _words(one: Difference, p_holm: float | None) -> str:
    """A difference as a table shows it: bold where it is sure."""
    sure = one.low is not None and not one.low <= 0 <= one.high and (p_holm is None or p_holm < 0.05)
    return f"**{one.text}**" if sure else one.text


def arm_markdown(evidence: Evidence) -> str:
    """The table of arms in Markdown, with the seeds that each has finished of those planned, and what failed.

    Bold: the interval excludes 0 and, for the arms of the family "guidance pays", Holm's p on that clock is below 0.05.
    """
    head = ("arm", "seeds", "pass rate", *(f"at equal {AT_CLOCK[clock]}" for clock in CLOCKS))
    head = (*head, "rollouts that the reference is short", *(words for _, words in COSTS))
    rows = []
    for row in arm_table(evidence, TEST_ITEMS.generator(0)).to_dict("records"):
        known = (row[f"equal {AT_CLOCK[clock]}"] for clock in CLOCKS)
        cells = [text if isinstance(text, str) else "" for text in known]
        cells.append(_number(short_by(evidence, row["arm"]), ",.0f") if cells[-1] else "")
        costs = [_number(row[name.replace("_", " ")], ",.0f") for name, _ in COSTS]
        seeds = f"{row['seeds']} of {len(evidence.about['seeds'])}"
        rows.append((row["arm"], seeds, _number(row["pass rate"]), *cells, *costs))
    told = [
        markdown_table(head, rows),
        "Trained tokens: of all responses that take part in a step, guides among them. How long off-line rollouts "
        "are is not recorded; they count in the rollouts. Short: the reference is taken at its newest checkpoint.",
    ]
    against = primary(evidence)
    chosen = against[against["clock"] == "rollouts"].groupby("against")["arm"].apply(list).to_dict()
    told += [f"At equal total rollouts against {other}: {'; '.join(arms)}." for other, arms in chosen.items()]
    if evidence.same:
        told.append(f"No arm of its own here, being GRPO itself: {'; '.join(evidence.same)}.")
    if evidence.about["failed"]:
        lost = [f"{one['arm']}, seed {one['seed']}: {one['reason'].rstrip('.')}" for one in evidence.about["failed"]]
        told.append(f"Failed, and left out of means: {'; '.join(lost)}.")
    if broke := broken(evidence):
        ones = [f"{arm}, seed {', '.join(map(str, seeds))}" for arm, seeds in broke.items()]
        told.append(
            f"Hardly anything right in the last {END_STEPS} steps, and counted in the means: {'; '.join(ones)}."
        )
    return "\n\n".join(told)


def _number(value: float | None, digits: str = ".3f") -> str:
    """A number of a table; "–" where no seed of the arm gives one."""
    return "–" if value is None or not np.isfinite(value) else f"{value:{digits}}"


def secondary_markdown(evidence: Evidence) -> str:
    """The secondary endpoints in Markdown: each arm on its own, then minus GRPO, unadjusted.

    Entropy and all-wrong groups are compared at equal policy step, the others where each arm ends; the last column is
    that of `arm_markdown` with the reference on a line between its checkpoints before and after the arm's end. Bold:
    the interval excludes 0. Suites: those in which Holm's p over the suites is below 0.05, with the difference.
    """
    course = ("entropy", "all_wrong_groups")
    head = (
        *("arm", "IQM over seeds and suites", "IQM over suites", "chance to beat a run of GRPO", "avg@8 at T = 1"),
        "pass@8 at T = 1",
        *(f"{name.replace('_', '-', 1).replace('_', ' ')}, at equal policy step" for name in course),
        *("suites apart", "at equal total rollouts, reference interpolated"),
    )
    rows = []
    robust = evidence.scores[evidence.scores["final"] & (evidence.scores["sampling"] == "paper")]
    by_seed = robust.groupby(["seed", "arm"])["pass_rate"].agg(_iqm).unstack("arm").reindex(columns=evidence.arms)
    known = {one.arm for one, _ in _against_references(evidence) if one.clock == "rollouts"}
    for row in arm_table(evidence, TEST_ITEMS.generator(0)).to_dict("records"):
        arm, own = row["arm"], _number(row["IQM"])
        if row["IQM low"] is not None and np.isfinite(row["IQM low"]):
            own += f" ({row['IQM low']:.3f} to {row['IQM high']:.3f})"
        last = _words(interpolated(evidence, arm), None) if arm in known else ""
        if arm == "GRPO":
            names = ("pass rate at T = 1", "pass@8 at T = 1", "entropy", "all-wrong groups")
            rows.append((arm, own, "", "", *(_number(row[name]) for name in names), "", last))
            continue
        found = [difference(by_seed[arm], by_seed["GRPO"], names=(arm, "GRPO"), measure="IQM over suites")]
        found += [between(evidence, arm, "GRPO", column, "plain") for column in ("pass_rate", "pass_at_8")]
        found += [at_equal(evidence, arm, "GRPO", "policy", column) for column in course]
        chance = _number(between(evidence, arm, "GRPO").improvement, ".2f")
        first, *texts = (_words(one, None) for one in found)
        rows.append((arm, own, first, chance, *texts, _apart(evidence, arm), last))
    return markdown_table(head, rows)


def _iqm(scores: pd.Series) -> float:
    return float(interquartile_mean(scores.to_numpy()))


def _apart(evidence: Evidence, arm: str) -> str:
    table = by_suite(evidence, arm)
    if "p_holm" not in table:
        return "–"
    return ", ".join(f"{row.suite} {row.value:+.2f}" for row in table[table["p_holm"] < 0.05].itertuples()) or "none"


def by_suite(evidence: Evidence, arm: str) -> pd.DataFrame:
    """Differences to GRPO per suite at equal compute, Holm-adjusted over the suites."""
    chosen = evidence.scores[evidence.scores["final"] & (evidence.scores["sampling"] == "paper")]
    grid = chosen.pivot_table(index=["arm", "seed"], columns="suite", values="pass_rate")
    rows = []
    for suite in evidence.about["suites"]:
        scores = [
            grid.loc[grid.index.get_level_values("arm") == name, suite].droplevel("arm") for name in (arm, "GRPO")
        ]
        found = difference(*scores, names=(arm, "GRPO"), measure=suite)
        rows.append({"suite": suite, **asdict(found)})
    table = pd.DataFrame(rows)
    if table["p"].notna().all():
        table["p_holm"] = holm(table["p"].to_numpy(dtype=float))
    return table


# Course of training


def broken(evidence: Evidence) -> dict[str, list[int]]:
    """Seeds of each arm whose mean on-policy pass rate over the last `END_STEPS` steps is below `BROKEN`; ours."""
    found: dict[str, list[int]] = {}
    for (arm, seed), lines in evidence.training.groupby(["arm", "seed"], sort=False):
        if lines.sort_values("compute_step")["pass_rate"].tail(END_STEPS).mean() < BROKEN:
            found.setdefault(arm, []).append(int(seed))
    return {arm: sorted(found[arm]) for arm in evidence.arms if arm in found}


def speed_up(evidence: Evidence) -> pd.DataFrame:
    """`speed_up_ratios` of NPO early over GRPO, a row per seed that finished both."""
    rows = {}
    for seed in evidence.about["seeds"]:
        slow, fast = _lines(evidence, "GRPO", seed), _lines(evidence, EARLY, seed)
        if not slow or not fast:
            continue
        run = next(run for run in evidence.about["runs"] if (run["arm"], run["seed"]) == (EARLY, seed))
        if not run["interventions"]:
            rows[seed] = dict.fromkeys(SPEED_UP_COUNTS.values(), np.nan)
            continue
        per_step = run["config"]["prompts_per_step"] * run["config"]["num_generations"]
        offline = run["offline_rollouts"] / len(run["interventions"]) / per_step
        rows[seed] = speed_up_ratios(slow, fast, offline)
    return pd.DataFrame.from_dict(rows, orient="index")


def speed_up_bound(evidence: Evidence) -> pd.Series:
    """Largest speed-up possible with the scout counted, by seed: GRPO's steps to the level over the scout's and one."""
    bound = {}
    for run in evidence.about["runs"]:
        if run["arm"] == EARLY and run["interventions"]:
            slow = _lines(evidence, "GRPO", run["seed"])
            reached = _reached(slow, reference_level(slow), 0) if slow else None
            if reached is not None:
                bound[run["seed"]] = reached["compute_step"] / (run["interventions"][0]["compute_step"] + 1)
    return pd.Series(bound, dtype=float)


def reference_level(lines: Sequence[dict[str, Any]]) -> float:
    """On-policy pass rate `LEVEL_SHARE` of the way from the first `RISE_FIRST` steps to the largest mean in a row."""
    rates = np.array([line["pass_rate"] for line in lines], dtype=float)
    first, window = rates[:RISE_FIRST].mean(), min(RISE_WINDOW, len(rates))
    top = np.convolve(rates, np.ones(window) / window, mode="valid").max()
    return float(first + LEVEL_SHARE * (top - first))


def speed_up_ratios(slow: Sequence[dict[str, Any]], fast: Sequence[dict[str, Any]], offline: float) -> dict[str, float]:
    """Steps of GRPO over those of a guided run to GRPO's reference level, on the moving average (ours).

    Args:
        slow: Training lines of GRPO with pass_rate, branch, policy_step and compute_step, in order.
        fast: The same of the guided run; its first branch is the scout.
        offline: Off-line rollouts of the first intervention, in steps' worth of rollouts.

    Returns:
        The ratio for each of `SPEED_UP_COUNTS`; NaN where one of them does not reach the level.
    """
    level = reference_level(slow)
    a, b = _reached(slow, level, 0), _reached(fast, level, 1)
    if a is None or b is None:
        return dict.fromkeys(SPEED_UP_COUNTS.values(), np.nan)
    steps = (b["policy_step"], b["compute_step"], b["compute_step"] + offline)
    return {count: a["compute_step"] / step for count, step in zip(SPEED_UP_COUNTS.values(), steps, strict=True)}


def _lines(evidence: Evidence, arm: str, seed: int) -> list[dict[str, Any]]:
    own = evidence.training[(evidence.training["arm"] == arm) & (evidence.training["seed"] == seed)]
    return own.sort_values("compute_step").to_dict("records")


def _reached(lines: Sequence[dict[str, Any]], level: float, branch: int) -> dict[str, Any] | None:
    averages = moving_average(lines, "pass_rate")
    return next(
        (line for line, value in zip(lines, averages, strict=True) if line["branch"] >= branch and value >= level), None
    )
