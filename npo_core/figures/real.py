"""The evidence on the real model: arms over executed steps and over rollouts, and at the end by length of the word.

What is drawn is in docs/evidence.md: the probability of the right response, which is computed and not sampled, and the
test pass rate sampled at temperature 1.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..study.real_results import REAL_ARMS, RealResults
from .style import ARM_LOOKS, GREY, SEED, WIDTH, canvas, settle, style

AXES = {
    "compute_step": "executed steps\n(a fall: the run goes back)",
    "rollouts": "rollouts in all\n(level before a fall: those off line)",
}
"""Clocks of the curves."""
PALE = 0.35
"""Opacity of a single seed behind the mean."""
APART = 0.09
"""Distance of two arms beside each other at a length, in letters."""
TRAINED, SAMPLED, BACK = range(3)
"""Points of a course at one executed step, in order: a checkpoint, guides sampled with it, what is gone on with."""


def real_arms(results: RealResults) -> Figure:
    """Every arm's probability of the right response on two clocks, and its final pass rate by length (ours).

    A seed's curve starts at the base policy; off line it learns nothing, and it falls where its run goes back. The mean
    has a point at the executed steps that all seeds of the arm have; on the right it stands at their mean rollouts.

    Args:
        results: Results of the study of the real model.

    Raises:
        ValueError: No run.
    """
    if not results.arms:
        raise ValueError("The results of the real model hold no run; `python -m npo_core real-study` makes some.")
    courses = {arm: _courses(results, arm) for arm in results.arms}
    with style():
        figure, grid = canvas(2, 2, (WIDTH, 6.2), gridspec_kw={"height_ratios": [1.15, 1.0]})
        for axes, clock in zip(grid[0], AXES, strict=True):
            for arm, seeds in courses.items():
                _draw(axes, seeds, clock, arm)
            axes.set_xlabel(AXES[clock])
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.xaxis.set_major_formatter("{x:,.0f}")
        grid[0, 1].sharey(grid[0, 0])
        grid[0, 1].tick_params(labelleft=False)
        grid[0, 0].set_ylabel("probability of the right response\n(mean over test words)")
        for axes in grid[1]:
            axes.remove()
        below = figure.add_subplot(grid[1, 0].get_gridspec()[1, :])
        _by_length(below, results)
        for place, arms in (("upper", _arm_marks(results)), ("lower", _marks(courses))):
            figure.legend(handles=arms, loc=f"outside {place} center", ncols=3, frameon=False)
    return settle(figure)


def _courses(results: RealResults, arm: str) -> list[pd.DataFrame]:
    """Of each seed the probability over both clocks; `point` tells those at one executed step apart."""
    table, found = results.exact.scores, []
    means = table.groupby(["arm", "seed", "policy_step", "compute_step", "rollouts"], as_index=False)[
        "probability"
    ].mean()
    bases = means[means["policy_step"] == 0]["probability"]
    for run in results.about["runs"]:
        if run["arm"] != arm:
            continue
        own = means[(means["arm"] == arm) & (means["seed"] == run["seed"]) & (means["policy_step"] > 0)]
        rows = own[[*AXES, "policy_step", "probability"]].assign(point=TRAINED).to_dict("records")
        if len(bases):  # all runs begin there, whichever arm it was computed for
            start = {"compute_step": 0, "rollouts": 0, "policy_step": 0, "probability": bases.mean(), "point": TRAINED}
            rows.append(start)
        for jump in run["interventions"]:
            rows += _back(rows, jump, run["config"])
        found.append(pd.DataFrame(rows).sort_values(["compute_step", "point"], ignore_index=True))
    return found


def _back(
    rows: Sequence[Mapping[str, Any]], jump: Mapping[str, Any], config: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The points of a roll-back: guides are sampled, then an earlier policy goes on; none if that is not known."""
    to, when = jump["policy_step"] - jump["distance"], jump["compute_step"]
    before = [row for row in rows if row["compute_step"] <= when]
    known = [row for row in before if row["policy_step"] == to]
    later = [row for row in rows if row["compute_step"] > when]
    if not jump["distance"] or not known or not later:
        return []
    following = min(later, key=lambda row: row["compute_step"])
    steps = following["compute_step"] - when
    spent = following["rollouts"] - steps * config["prompts_per_step"] * config["num_generations"]
    guide, origin = (max(some, key=lambda row: row["compute_step"]) for some in (before, known))
    moment = {"compute_step": when, "rollouts": spent}
    return [{**guide, **moment, "point": SAMPLED}, {**origin, **moment, "point": BACK}]


def _draw(axes: Axes, seeds: Sequence[pd.DataFrame], clock: str, arm: str) -> None:
    color, line = ARM_LOOKS[arm]
    if len(seeds) > 1:
        for course in seeds:
            axes.plot(
                course[clock], course["probability"], lw=0.6, alpha=PALE, color=color, ls=line, label=f"{arm}, seed"
            )
    mean = _mean(seeds)
    axes.plot(mean[clock], mean["probability"], lw=1.8, color=color, ls=line, label=arm)
    points = mean[mean["point"] == TRAINED]
    axes.plot(points[clock], points["probability"], color=color, marker="o", ms=3.5, ls="", label=f"{arm}, points")


def _mean(seeds: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Mean over seeds at the executed steps that all of them have, and where all of them go back."""
    keys = [course.set_index(["compute_step", "point"]) for course in seeds]
    common = reduce(lambda one, other: one.intersection(other), [course.index for course in keys])
    rows = [course.loc[common].sort_index()[["rollouts", "probability"]] for course in keys]
    return (reduce(lambda one, other: one + other, rows) / len(rows)).reset_index()


def _by_length(axes: Axes, results: RealResults) -> None:
    """Final pass rates: a seed is a small dot, the mean over seeds a line."""
    table = results.pass_rate.scores
    finals = table[table["final"] & (table["sampling"] == results.pass_rate.compared)]
    finals = finals.assign(length=finals["suite"].str.split().str[0].astype(int))
    for place, arm in enumerate(results.arms):
        color, line = ARM_LOOKS[arm]
        rates = finals[finals["arm"] == arm].pivot_table(index="length", columns="seed", values="pass_rate")
        x = rates.index + APART * (place - (len(results.arms) - 1) / 2)
        axes.plot(x, rates.mean(axis=1), lw=1.4, color=color, ls=line, label=arm)
        for seed in rates.columns:
            axes.plot(x, rates[seed], marker="o", color=color, label=f"{arm}, seed", **SEED)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("letters of the word")
    axes.set_ylabel("final test pass rate\n(fraction, temperature 1)")


def _arm_marks(results: RealResults) -> list[Line2D]:
    marks = []
    for arm in results.arms:
        color, line = ARM_LOOKS[arm]
        seeds, lost = len(results.seeds), len(results.lacking(arm))
        count = f"n = {seeds - lost}" + (f" of {seeds}" if lost else "")
        marks.append(Line2D([], [], color=color, ls=line, lw=1.8, label=f"{arm} ({count})"))
    missing = [arm for arm in REAL_ARMS if arm not in results.arms]
    return [*marks, *(Line2D([], [], ls="", label=f"{arm}: no run") for arm in missing)]


def _marks(courses: Mapping[str, Sequence[pd.DataFrame]]) -> list[Line2D]:
    marks = [Line2D([], [], color=GREY, lw=1.8, marker="o", ms=3.5, label="mean over seeds")]
    if any(len(seeds) > 1 for seeds in courses.values()):
        marks.append(Line2D([], [], color=GREY, lw=0.6, alpha=PALE, label="single seed"))
    if any(len(seeds) == 1 for seeds in courses.values()):
        marks[0].set_label("mean over seeds, or the one there is")
    marks.append(Line2D([], [], color=GREY, marker="o", label="single seed, by length", **SEED))
    return marks
