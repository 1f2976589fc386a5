"""Comparisons of the evidence study: paired by seed, on both clocks, with interval, test and power.

The arms of a seed share base policy, data order and test problems, so differences are paired. Intervals and tests are
over seeds; docs/evidence.md says which of them is primary.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pandas as pd

from ..method.stats import (
    detectable_difference,
    holm,
    interquartile_mean,
    mean_interval,
    paired_t_test,
    probability_of_improvement,
    stratified_bootstrap,
)
from ..runs.folder import moving_average
from ..streams import TEST_ITEMS
from .results import Evidence

PRIMARY = ("LUFFY", "ExGRPO", "RLEP", "NPO early", "NPO late", "NPO", "AutoNPO")
"""Arms of the primary comparison with GRPO; Holm's adjustment is over these."""

CLOCKS = ("compute", "policy")
AT_CLOCK = {"compute": "compute", "policy": "policy step"}
LEVEL_SHARE = 0.8
"""Reference level of the speed-up: this share of the way from GRPO's first steps to its plateau."""
SPEED_UP_COUNTS = ("without scout", "with scout", "with scout and off-line")
"""What the guided run's steps count: its trajectory, all optimiser steps, off-line rollouts too."""


@dataclass(frozen=True)
class Difference:
    """Mean difference of two arms over seeds.

    Attributes:
        arm: Arm.
        against: What it is compared with.
        clock: "compute": both at the end of the budget; "policy": the other at the policy step where the arm ends.
        measure: What differs.
        value: Mean over seeds, None with no seed.
        low: Lower end of the 95 % t interval, None with fewer than two seeds.
        high: Upper end.
        p: Two-sided paired t test.
        seeds: Seeds that both arms finished.
        detectable: Difference that the test finds with probability 0.8.
        improvement: Probability that a run of the arm beats one of the other.
    """

    arm: str
    against: str
    clock: str
    measure: str
    value: float | None
    low: float | None
    high: float | None
    p: float | None
    seeds: int
    detectable: float | None
    improvement: float | None

    @property
    def text(self) -> str:
        """The difference in words for a table: mean and interval."""
        if self.value is None:
            return "–"
        interval = "" if self.low is None else f" ({self.low:+.3f} to {self.high:+.3f})"
        return f"{self.value:+.3f}{interval}"


def difference(
    arm: pd.Series, other: pd.Series, *, names: tuple[str, str], clock: str = "compute", measure: str = "test pass rate"
) -> Difference:
    """Difference of two arms, each a score by seed; seeds that one of them lacks are left out and not counted."""
    both = pd.concat([arm, other], axis=1, keys=["arm", "other"]).dropna()
    values = (both["arm"] - both["other"]).to_numpy(dtype=float)
    several = len(values) > 1
    estimate = mean_interval(values) if several else None
    return Difference(
        arm=names[0],
        against=names[1],
        clock=clock,
        measure=measure,
        value=float(values.mean()) if len(values) else None,
        low=estimate.low if estimate else None,
        high=estimate.high if estimate else None,
        p=paired_t_test(values) if several else None,
        seeds=len(values),
        detectable=detectable_difference(values) if several else None,
        improvement=probability_of_improvement(*both.to_numpy(dtype=float).T) if len(values) else None,
    )


def against_grpo(
    evidence: Evidence, arm: str, clock: str = "compute", measure: str = "pass_rate", sampling: str = "paper"
) -> Difference:
    """An arm minus GRPO on one clock, mean over suites.

    Args:
        evidence: Results.
        arm: Arm.
        clock: "compute" or "policy"; the policy clock knows sampling "paper" only.
        measure: Column of the scores.
        sampling: How test responses are sampled.
    """
    own = evidence.finals(sampling, measure)[arm]
    if clock == "compute":
        other = evidence.finals(sampling, measure)["GRPO"]
    else:
        other = evidence.at_policy_step("GRPO", policy_ends(evidence, arm), measure)
    return difference(own, other, names=(arm, "GRPO"), clock=clock, measure=f"{measure} ({sampling})")


def policy_ends(evidence: Evidence, arm: str) -> dict[int, int]:
    """Policy step at which each seed of an arm ends."""
    return {run["seed"]: run["policy_steps"] for run in evidence.about["runs"] if run["arm"] == arm}


def between(
    evidence: Evidence, arm: str, other: str, measure: str = "pass_rate", sampling: str = "paper"
) -> Difference:
    """An arm minus another at equal compute, mean over suites."""
    finals = evidence.finals(sampling, measure)
    return difference(finals[arm], finals[other], names=(arm, other), measure=f"{measure} ({sampling})")


def primary(evidence: Evidence) -> pd.DataFrame:
    """The primary comparison: each arm against GRPO at equal compute, with Holm's adjustment; and the policy clock."""
    arms = [arm for arm in PRIMARY if arm in evidence.arms]
    rows = [asdict(against_grpo(evidence, arm, clock)) for arm in arms for clock in CLOCKS]
    table = pd.DataFrame(rows, columns=[field.name for field in fields(Difference)])
    for clock in CLOCKS:
        chosen = (table["clock"] == clock) & table["p"].notna()
        if chosen.any():
            table.loc[chosen, "p_holm"] = holm(table.loc[chosen, "p"].to_numpy(dtype=float))
    return table


def arm_table(evidence: Evidence, rng: np.random.Generator) -> pd.DataFrame:
    """One row per arm: final score, IQM with a stratified bootstrap interval, differences on both clocks, cost.

    `p_holm` is that of the primary comparison; an arm that makes more steps than GRPO has no equal policy step.
    """
    table, rows = primary(evidence), []
    adjusted = table[table["clock"] == "compute"].set_index("arm").get("p_holm", pd.Series(dtype=float))
    furthest = max(policy_ends(evidence, "GRPO").values(), default=0)
    for arm in evidence.arms:
        finals = evidence.finals()[arm].dropna()
        plain = evidence.finals("plain")[arm].dropna()
        chosen = evidence.scores[
            (evidence.scores["arm"] == arm) & evidence.scores["final"] & (evidence.scores["sampling"] == "paper")
        ]
        grid = chosen.pivot(index="seed", columns="suite", values="pass_rate").to_numpy()
        runs = [run for run in evidence.about["runs"] if run["arm"] == arm]
        further = any(run["policy_steps"] > furthest for run in runs)
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
                "equal compute": None if arm == "GRPO" else against_grpo(evidence, arm).text,
                "p_holm": adjusted.get(arm),
                "equal policy step": None if arm == "GRPO" or further else against_grpo(evidence, arm, "policy").text,
                "entropy": float(chosen.groupby("seed")["entropy"].first().mean()),
                "all-wrong groups": float(chosen.groupby("seed")["all_wrong_groups"].first().mean()),
                "policy steps": float(np.mean([run["policy_steps"] for run in runs])) if runs else None,
                "compute steps": float(np.mean([run["compute_steps"] for run in runs])) if runs else None,
                "off-line rollouts": float(np.mean([run["offline_rollouts"] for run in runs])) if runs else None,
                "interventions": float(np.mean([len(run["interventions"]) for run in runs])) if runs else None,
            }
        )
    return pd.DataFrame(rows)


def arm_markdown(evidence: Evidence) -> str:
    """The table of arms in Markdown.

    Bold: the interval excludes 0 and, in the primary comparison, Holm's p of that clock is below 0.05.
    """
    head = ("arm", "pass rate", "at equal compute", "p, Holm", "at equal policy step", "p, Holm")
    lines = _head(*head, "steps on the trajectory", "off-line rollouts")
    adjusted = primary(evidence).set_index(["arm", "clock"]).get("p_holm", pd.Series(dtype=float))
    for row in arm_table(evidence, TEST_ITEMS.generator(0)).to_dict("records"):
        arm, cells = row["arm"], {}
        for clock in CLOCKS:
            found, p = against_grpo(evidence, arm, clock), adjusted.get((arm, clock), np.nan)
            apart = None not in (found.low, found.high) and not found.low <= 0 <= found.high
            sure = apart and (arm not in PRIMARY or p < 0.05)
            known = isinstance(row[f"equal {AT_CLOCK[clock]}"], str)
            cells[clock] = (f"**{found.text}**" if sure else found.text) if known else ""
            cells[f"p {clock}"] = _p_words(p)
        costs = [f"{row[name]:,.0f}" for name in ("policy steps", "off-line rollouts")]
        lines.append(_line(arm, f"{row['pass rate']:.3f}", *cells.values(), *costs))
    return "\n".join(lines)


def secondary_markdown(evidence: Evidence) -> str:
    """The secondary endpoints in Markdown: each arm on its own, then minus GRPO at equal compute, unadjusted.

    Bold: the interval excludes 0. Suites: those in which Holm's p over the suites is below 0.05, with the difference.
    """
    head = ("arm", "IQM over seeds and suites", "IQM over suites", "chance to beat a run of GRPO", "avg@8 at T = 1")
    lines = _head(*head, "pass@8 at T = 1", "entropy", "all-wrong groups", "suites apart")
    robust = evidence.scores[evidence.scores["final"] & (evidence.scores["sampling"] == "paper")]
    by_seed = robust.groupby(["seed", "arm"])["pass_rate"].agg(_iqm).unstack("arm")
    finals = [("plain", "pass_rate"), ("plain", "pass_at_8"), ("paper", "entropy"), ("paper", "all_wrong_groups")]
    for row in arm_table(evidence, TEST_ITEMS.generator(0)).to_dict("records"):
        arm, own = row["arm"], f"{row['IQM']:.3f}"
        if row["IQM low"] is not None:
            own += f" ({row['IQM low']:.3f} to {row['IQM high']:.3f})"
        if arm == "GRPO":
            level = [f"{row[name]:.3f}" for name in ("pass rate at T = 1", "pass@8 at T = 1", "entropy")]
            lines.append(_line(arm, own, "", "", *level, f"{row['all-wrong groups']:.3f}", ""))
            continue
        found = [difference(by_seed[arm], by_seed["GRPO"], names=(arm, "GRPO"), measure="IQM over suites")]
        found += [against_grpo(evidence, arm, "compute", column, sampling) for sampling, column in finals]
        texts = [f"**{one.text}**" if one.low is not None and one.low * one.high > 0 else one.text for one in found]
        improvement = against_grpo(evidence, arm).improvement
        chance = "–" if improvement is None else f"{improvement:.2f}"
        lines.append(_line(arm, own, texts[0], chance, *texts[1:], _apart(evidence, arm)))
    return "\n".join(lines)


def _iqm(scores: pd.Series) -> float:
    return float(interquartile_mean(scores.to_numpy()))


def _apart(evidence: Evidence, arm: str) -> str:
    table = by_suite(evidence, arm)
    if "p_holm" not in table:
        return "–"
    return ", ".join(f"{row.suite} {row.value:+.2f}" for row in table[table["p_holm"] < 0.05].itertuples()) or "none"


def _p_words(p: float) -> str:
    return "" if not np.isfinite(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _head(*names: str) -> list[str]:
    return [_line(*names), "|" + "---|" * len(names)]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def by_suite(evidence: Evidence, arm: str, against: str = "GRPO") -> pd.DataFrame:
    """Differences per suite at equal compute, Holm-adjusted over the suites."""
    chosen = evidence.scores[evidence.scores["final"] & (evidence.scores["sampling"] == "paper")]
    grid = chosen.pivot_table(index="seed", columns=["arm", "suite"], values="pass_rate")
    rows = []
    for suite in evidence.about["suites"]:
        found = difference(grid[arm, suite], grid[against, suite], names=(arm, against), measure=suite)
        rows.append({"suite": suite, **asdict(found)})
    table = pd.DataFrame(rows)
    if table["p"].notna().all():
        table["p_holm"] = holm(table["p"].to_numpy(dtype=float))
    return table


# Course of training


def entropy_widening(evidence: Evidence, arm: str, steps: int = 20) -> pd.Series:
    """Entropy of the first replayed steps over that of the same policy steps before the roll-back, mean per seed.

    The policy rolled back to is younger, so its own entropy at those steps is what a replay must exceed: 1 says that
    the entropy is merely back where it was, more that guidance widened it.
    """
    found: dict[int, list[float]] = {}
    own = evidence.training[evidence.training["arm"] == arm]
    for run in evidence.about["runs"]:
        if run["arm"] != arm:
            continue
        lines = own[own["seed"] == run["seed"]]
        for number, jump in enumerate(run["interventions"]):
            start = jump["policy_step"] - jump["distance"]
            stop = min(start + steps, jump["policy_step"])
            window = lines[(lines["policy_step"] > start) & (lines["policy_step"] <= stop)]
            before = window[window["branch"] <= number].groupby("policy_step")["entropy"].last()
            after = window[window["branch"] == number + 1].set_index("policy_step")["entropy"]
            both = pd.concat([before, after], axis=1, keys=["before", "after"]).dropna()
            if len(both):
                found.setdefault(run["seed"], []).append(float(both["after"].mean() / both["before"].mean()))
    return pd.Series({seed: float(np.mean(values)) for seed, values in found.items()}, dtype=float)


def speed_up(evidence: Evidence, arm: str = "NPO early") -> pd.DataFrame:
    """`speed_up_ratios` of an arm over GRPO, a row per seed that finished both."""
    rows = {}
    for seed in evidence.about["seeds"]:
        slow, fast = _lines(evidence, "GRPO", seed), _lines(evidence, arm, seed)
        if not slow or not fast:
            continue
        run = next(run for run in evidence.about["runs"] if (run["arm"], run["seed"]) == (arm, seed))
        if not run["interventions"]:
            rows[seed] = dict.fromkeys(SPEED_UP_COUNTS, np.nan)
            continue
        per_step = run["config"]["prompts_per_step"] * run["config"]["num_generations"]
        offline = run["offline_rollouts"] / len(run["interventions"]) / per_step
        rows[seed] = speed_up_ratios(slow, fast, offline)
    return pd.DataFrame.from_dict(rows, orient="index")


def speed_up_bound(evidence: Evidence, arm: str = "NPO early") -> pd.Series:
    """Largest speed-up possible with the scout counted, by seed: GRPO's steps to the level over the scout's and one."""
    bound = {}
    for run in evidence.about["runs"]:
        if run["arm"] == arm and run["interventions"]:
            slow = _lines(evidence, "GRPO", run["seed"])
            reached = _reached(slow, reference_level(slow), 0) if slow else None
            if reached is not None:
                bound[run["seed"]] = reached["compute_step"] / (run["interventions"][0]["compute_step"] + 1)
    return pd.Series(bound, dtype=float)


def reference_level(lines: Sequence[dict[str, Any]]) -> float:
    """On-policy pass rate `LEVEL_SHARE` of the way from the first fortieth of a run's steps to its second quarter."""
    rates = [line["pass_rate"] for line in lines]
    first, plateau = np.mean(rates[: max(1, len(rates) // 40)]), np.mean(rates[len(rates) // 4 : len(rates) // 2])
    return float(first + LEVEL_SHARE * (plateau - first))


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
        return dict.fromkeys(SPEED_UP_COUNTS, np.nan)
    steps = (b["policy_step"], b["compute_step"], b["compute_step"] + offline)
    return {count: a["compute_step"] / step for count, step in zip(SPEED_UP_COUNTS, steps, strict=True)}


def _lines(evidence: Evidence, arm: str, seed: int) -> list[dict[str, Any]]:
    own = evidence.training[(evidence.training["arm"] == arm) & (evidence.training["seed"] == seed)]
    return own.sort_values("compute_step").to_dict("records")


def _reached(lines: Sequence[dict[str, Any]], level: float, branch: int) -> dict[str, Any] | None:
    averages = moving_average(lines, "pass_rate")
    return next(
        (line for line, value in zip(lines, averages, strict=True) if line["branch"] >= branch and value >= level), None
    )
