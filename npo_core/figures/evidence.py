"""The evidence study: arms against GRPO over seeds on two clocks (docs/evidence.md); tables of it are in `grids.py`.

Every difference is paired by seed; a seed that one side lacks is left out, and the number of those left is written.
"""

import textwrap
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..study.arms import ARMS
from ..study.clocks import ends, paired, reference, score_at
from ..study.families import REFERENCES
from ..study.results import Evidence
from .curves import CLOCKS, CURVES
from .estimates import axis_of, difference_text, interval, quoted, reference_note, require_arms
from .record import AVERAGE_WEIGHT, RunRecord
from .style import ARM_LOOKS, COLORS, GREY, MEAN, SEED, WIDTH, canvas, settle, style

GROUPS = {"baseline": "Baselines", "npo": "NPO", "control": "Controls"}
"""Titles of the kinds of arms."""
AT_EQUAL = {
    "policy": ("s", COLORS[1], "at equal policy step"),
    "compute": ("o", COLORS[0], "at equal compute steps"),
    "rollouts": ("D", COLORS[2], "at equal total rollouts"),
}
"""Marker, colour and name of the clock that a comparison holds equal."""
METRICS = {"pass_rate": CURVES["npo/pass_rate"], "entropy": CURVES["npo/entropy"]}
PAIRS = (("NPO", "NPO, exact ratio"), ("LUFFY", "LUFFY, no correction"))
"""Arms that differ in the importance ratio of the guided slot only."""
PALE = 0.35
"""Opacity of the seeds behind the one that is shown in full."""


def arm_differences(evidence: Evidence) -> Figure:
    """Final test pass rate of every arm minus its reference, on three clocks (ours).

    At equal policy step GRPO is scored where the arm ends, at equal total rollouts the better of longer runs and larger
    groups where they have spent as many. Arms that spend more than GRPO by plan are references and left out. Where an
    interval is much longer than the seeds lie apart, the frame cuts it off.

    Raises:
        ValueError: There is no GRPO, or nothing but GRPO.
    """
    require_arms(evidence, "GRPO")
    references = {name for names in REFERENCES.values() for name in names}
    arms = [arm for arm in evidence.arms if arm not in references]
    if not arms:
        raise ValueError("The evidence holds no arm but GRPO; there is nothing to compare it with.")
    clocks = [clock for clock in AT_EQUAL if set(REFERENCES[clock]) & set(evidence.arms)]
    found: dict[str, dict[str, np.ndarray]] = {}
    for arm in arms:
        pairs = {clock: paired(evidence, arm, reference(evidence, arm, clock), clock) for clock in clocks}
        found[arm] = {clock: (own - other).dropna().to_numpy() for clock, (own, other) in pairs.items()}
    counts = [len(values) for row in found.values() for values in row.values()]
    edges, far = axis_of(found)
    groups = {kind: [arm for arm in arms if ARMS[arm].kind == kind] for kind in GROUPS}
    groups = {kind: members for kind, members in groups.items() if members}
    with style():
        ratios = {"height_ratios": [len(members) + 0.2 for members in groups.values()]}
        size = (WIDTH, 1.2 + 0.3 * len(groups) + 0.48 * len(arms))
        figure, grid = canvas(len(groups), 1, size, sharex=True, gridspec_kw=ratios)
        for axes, (kind, members) in zip(grid[:, 0], groups.items(), strict=True):
            for place, arm in enumerate(members):
                for clock, shift in zip(clocks, np.linspace(-0.25, 0.25, len(clocks)), strict=True):
                    marker, color, name = AT_EQUAL[clock]
                    values = found[arm][clock]
                    if arm in far and len(values):
                        _draw_arrow(axes, place + shift, values, color, f"{arm}, {name}")
                    else:
                        _draw_estimate(axes, place + shift, values, color, marker, f"{arm}, {name}")
            axes.set_xlim(edges)
            axes.axvline(0, color=GREY, lw=1.0, ls="--", zorder=1)
            _rows(axes, [_row_label(arm, [len(v) for v in found[arm].values()], evidence) for arm in members])
            axes.set_title(GROUPS[kind], loc="left", fontweight="bold")
        measured = "test pass rate minus the reference's, paired by seed (fraction, mean over suites)"
        grid[-1, 0].set_xlabel(measured + reference_note(evidence, arms))
        marks = [
            Line2D([], [], color=color, marker=marker, ms=6, label=name, **MEAN)
            for marker, color, name in map(AT_EQUAL.get, clocks)
        ]
        marks += [
            *_interval_marks(counts),
            Line2D([], [], color=GREY, lw=1.0, ls="--", label="as good as the reference"),
        ]
        figure.legend(handles=marks, loc="outside lower center", ncols=3, frameon=False)
    return settle(figure)


def training_with_interventions(evidence: Evidence, arms: Sequence[str] = ("GRPO", "AutoNPO", "NPO")) -> Figure:
    """On-policy pass rate and entropy over both clocks, with the roll-backs (paper: Figures 4a and 4b).

    A seed's curve is its moving average; after a roll-back it goes on from its state at the step rolled back to. The
    policy clock shows the final trajectory only. A mean is over the steps that all seeds have. Seeds that roll back at
    different steps are drawn one by one too, pale; on the compute clock, where their mean would jump where none of them
    does, one stands for it: the seed whose first roll-back is the median of them.

    Args:
        evidence: Results of the study.
        arms: Arms to draw.

    Raises:
        ValueError: The evidence lacks an arm.
    """
    require_arms(evidence, *arms)
    records = {arm: _records(evidence, arm) for arm in arms}
    runs = sorted(evidence.about["runs"], key=lambda run: run["seed"])  # as the records are
    jumps = {arm: [run["interventions"] for run in runs if run["arm"] == arm] for arm in arms}
    jumping = [arm for arm in arms if any(jumps[arm])]
    moments = {arm: {tuple(jump[clock] for jump in seed for clock in CLOCKS) for seed in jumps[arm]} for arm in jumping}
    alike = [arm for arm in jumping if len(moments[arm]) == 1]
    apart = [arm for arm in jumping if arm not in alike]
    with style():
        figure, grid = canvas(2, 2, (WIDTH, 4.6), sharex="col", sharey="row")
        for row, metric in zip(grid, METRICS, strict=True):
            row[0].set_ylabel(METRICS[metric])
            for axes, clock in zip(row, CLOCKS, strict=True):
                for arm in arms:
                    shown = _median_jump(jumps[arm]) if arm in apart else None
                    _draw_curve(axes, records[arm], metric, clock, arm, shown)
                _draw_rollbacks(axes, {arm: {jump[clock] for jump in jumps[arm][0]} for arm in alike})
            bottom, top = row[0].get_ylim()
            row[0].set_ylim(bottom - 0.06 * len(apart) * (top - bottom), top)
            for axes, clock in zip(row, CLOCKS, strict=True):
                for level, arm in enumerate(apart):
                    places = [jump[clock] for seed in jumps[arm] for jump in seed]
                    axes.vlines(
                        places, 0.055 * level, 0.055 * level + 0.05, color=ARM_LOOKS[arm][0], lw=1.2, alpha=0.6,
                        zorder=3, transform=axes.get_xaxis_transform(), label=f"{arm}, roll-backs of single seeds",
                    )  # fmt: skip
        for axes, clock in zip(grid[1], CLOCKS, strict=True):
            axes.set_xlabel(CLOCKS[clock] + (", final trajectory" if clock == "policy_step" else ""))
        _legend_of_curves(figure, evidence, records)
        marks = _curve_marks(records)
        if apart:
            single = f"{', '.join(apart)}: single seeds; left, thick: one seed of n"
            marks.append(Line2D([], [], color=GREY, lw=0.6, alpha=PALE, label=single))
        if alike:
            marks.append(Line2D([], [], color=GREY, ls="--", lw=1.0, label="roll-back of all seeds of the arm"))
        if apart:
            tick = {"marker": "|", "ms": 7, "mew": 1.2, "ls": ""}
            marks.append(Line2D([], [], color=GREY, label="roll-back of one seed (tick at the bottom)", **tick))
        figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False)
    return settle(figure)


def correction_ablation(evidence: Evidence) -> Figure:
    """Training with and without importance correction of the guided slot, NPO and LUFFY (paper: Figure 4c).

    Above the curves stands the difference at the end, paired by seed: of the test pass rate, and of the entropy over
    the last steps, as `Evidence` holds them.

    Raises:
        ValueError: The evidence lacks one of the four arms.
    """
    require_arms(evidence, *(arm for pair in PAIRS for arm in pair))
    records = {arm: _records(evidence, arm) for pair in PAIRS for arm in pair}
    measured = {"pass_rate": "final test pass rate", "entropy": "entropy of the last steps"}
    with style():
        figure, grid = canvas(2, 2, (WIDTH, 5.4), sharex=True, sharey="row")
        for row, metric in zip(grid, METRICS, strict=True):
            finals = evidence.finals(column=metric)
            row[0].set_ylabel(METRICS[metric])
            for axes, pair in zip(row, PAIRS, strict=True):
                for arm in pair:
                    _draw_curve(axes, records[arm], metric, "compute_step", arm)
                text = f"{measured[metric]}:\n“{pair[1]}” minus “{pair[0]}”\n"
                text += _paired_text(finals[pair[1]] - finals[pair[0]])
                axes.text(0.5, 0.98, text, transform=axes.transAxes, ha="center", va="top", linespacing=1.3)
            bottom, top = row[0].get_ylim()
            row[0].set_ylim(bottom, bottom + (top - bottom) / 0.76)
            if metric == "pass_rate":
                row[0].set_yticks([tick for tick in row[0].get_yticks() if bottom <= tick <= 1])
        for axes, pair in zip(grid[0], PAIRS, strict=True):
            axes.set_title(f"{pair[0]}: with and without importance correction")
        for axes in grid[1]:
            axes.set_xlabel(CLOCKS["compute_step"])
        _legend_of_curves(figure, evidence, records)
        figure.legend(
            handles=_curve_marks(records, " (band; brackets)"), loc="outside lower center", ncols=2, frameon=False
        )
    return settle(figure)


def controls(evidence: Evidence) -> Figure:
    """Final test pass rate of NPO, of its controls and of GRPO on both clocks: what the gain is due to (ours).

    Raises:
        ValueError: The evidence lacks GRPO, NPO, or every control of NPO.
    """
    require_arms(evidence, "GRPO", "NPO")
    every = [arm for arm, row in ARMS.items() if (row.kind, row.method) == ("control", "npo") and not row.grid]
    arms = ["NPO", *(arm for arm in every if arm in evidence.arms)]
    if len(arms) == 1:
        raise ValueError(f"The evidence lacks {quoted(every)}; NPO is compared with at least one of them.")
    finals, counts, labels = evidence.finals(), [], []
    own, base = COLORS[3], COLORS[0]
    with style():
        figure, ((axes,),) = canvas(1, 1, (WIDTH, 1.6 + 0.58 * (len(arms) + 1)))
        for place, arm in enumerate(["GRPO", *arms]):
            values = finals[arm].dropna().to_numpy()
            sizes = [len(values)]
            if arm == "GRPO":
                _draw_estimate(axes, place, values, base, "o", f"{arm}, at equal compute")
                center, low, high = interval(values)
                axes.axvline(center, color=base, lw=1.0, ls="--", zorder=1, label="GRPO, mean")
                if np.isfinite(low):
                    axes.axvspan(low, high, color=base, alpha=0.1, lw=0, zorder=0)
            else:
                where = _grpo_where_it_ends(evidence, arm).dropna().to_numpy()
                _draw_estimate(axes, place - 0.17, values, own, "o", arm)
                sizes.append(len(where))
                _draw_estimate(axes, place + 0.17, where, base, "s", f"GRPO, where {arm} ends")
            labels.append(_row_label(arm, sizes, evidence))
            counts += sizes
            other = _grpo_where_it_ends(evidence, arm) if arm == "NPO" else finals[arm]
            text = _paired_text(finals["NPO"] - other).replace(", n", "\nn")
            text += "\n(minus GRPO\nwhere NPO ends)" if arm == "NPO" else ""
            axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), va="center")
        axes.text(
            1.02, 1.01, "NPO minus the arm,\npaired by seed\n[95 % t interval]", transform=axes.transAxes, va="bottom"
        )
        _rows(axes, labels)
        axes.set_xlabel("final test pass rate (fraction, mean over suites)")
        marks = [
            Line2D([], [], color=own, marker="o", ms=6, label="arm at the end of its budget", **MEAN),
            Line2D([], [], color=base, marker="o", ms=6, label="GRPO at equal compute (line, band)", **MEAN),
            Line2D([], [], color=base, marker="s", ms=6, label="GRPO at the policy step where the arm ends", **MEAN),
            *_interval_marks(counts),
        ]  # fmt: skip
        figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False)
    return settle(figure)


def _paired_text(differences: pd.Series) -> str:
    """Difference paired by seed, with the number of pairs where seeds are missing."""
    values = differences.dropna().to_numpy()
    return difference_text(values) + (f", n = {len(values)}" if len(values) < len(differences) else "")


def _grpo_where_it_ends(evidence: Evidence, arm: str) -> pd.Series:
    """GRPO's score by seed at the policy step at which the arm ends."""
    return score_at(evidence, "GRPO", "policy", ends(evidence, arm, "policy")).reindex(evidence.about["seeds"])


# Rows


def _draw_arrow(axes: Axes, place: float, values: np.ndarray, color: str, name: str) -> None:
    """A row that leaves the axis: an arrow at the edge, on the side of its mean, and the numbers."""
    below = values.mean() < 0
    edge, text, side, marker = (0.015, 0.035, "left", "<") if below else (0.985, 0.965, "right", ">")
    where = {"transform": axes.get_yaxis_transform()}
    axes.plot(edge, place, color=color, marker=marker, ms=6, label=name, **MEAN, **where)
    axes.text(text, place, difference_text(values), ha=side, va="center", **where)


def _draw_estimate(axes: Axes, place: float, values: np.ndarray, color: str, marker: str, name: str) -> None:
    """Seeds, their mean and its interval in a row."""
    mean, low, high = interval(values)
    if len(values) > 1:
        axes.plot(values, [place] * len(values), color=color, marker=marker, label=f"{name}, seeds", **SEED)
        axes.hlines(place, low, high, color, lw=1.4, zorder=3)
    if len(values):
        axes.plot(mean, place, color=color, marker=marker, ms=6, label=name, **MEAN)


def _row_label(arm: str, sizes: Sequence[int], evidence: Evidence) -> str:
    """Arm with what it is, and how many seeds are left where some are missing."""
    seeds = len(evidence.about["seeds"])
    about = ARMS[arm].about
    lines = [arm, *textwrap.wrap(about, 38 if len(about) <= 38 else 28, break_on_hyphens=False)]
    if min(sizes) < seeds:
        counts = " and ".join(dict.fromkeys(map(str, sizes)))
        lines[0] += f" (n = {counts} of {seeds})"
    return "\n".join(lines)


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    """Labels of rows, the first at the top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.grid(visible=False, axis="y")


def _interval_marks(counts: Sequence[int]) -> list[Line2D]:
    """Entries of a legend for what is drawn of so many seeds."""
    marks = []
    if max(counts) > 1:
        several = sorted({count for count in counts if count > 1})
        seeds = "–".join(map(str, dict.fromkeys((several[0], several[-1]))))
        marks.append(Line2D([], [], color=GREY, lw=1.4, label=f"95 % t interval of the mean over {seeds} seeds"))
        marks.append(Line2D([], [], color=GREY, marker="o", label="single seed", **SEED))
    if 1 in counts:
        marks.append(Line2D([], [], color=GREY, marker="o", ms=6, label="one seed: no interval", **MEAN))
    return marks


# Curves


def _records(evidence: Evidence, arm: str) -> list[RunRecord]:
    """Training of each seed; a branch starts a step before its first line."""
    records = []
    for _, run in evidence.training[evidence.training["arm"] == arm].groupby("seed"):
        lines = run.sort_values("compute_step")[["branch", *CLOCKS, *METRICS]]
        firsts = lines.groupby("branch")["policy_step"].first()
        starts = [{"event": "segment", "branch": branch, "start": step - 1} for branch, step in firsts.items()]
        records.append(RunRecord(lines.to_dict("records"), starts))
    return records


def _median_jump(jumps: Sequence[Sequence[Mapping[str, Any]]]) -> int:
    """Place of the seed whose first roll-back, in compute steps, is the median of those that roll back."""
    first = sorted((seed[0]["compute_step"], place) for place, seed in enumerate(jumps) if seed)
    return first[(len(first) - 1) // 2][1]


def _draw_curve(
    axes: Axes, records: Sequence[RunRecord], metric: str, clock: str, arm: str, shown: int | None = None
) -> None:
    """Mean over seeds of the moving averages with its band, over the steps that all seeds have.

    With a place `shown` every seed is drawn, pale, and on the compute clock that one stands for the mean.
    """
    if not records:
        return
    color, line = ARM_LOOKS[arm]
    kept = [record.kept() if clock == "policy_step" else np.full(len(record.lines), True) for record in records]
    steps = [record.values(clock)[keep] for record, keep in zip(records, kept, strict=True)]
    averages = [record.average(metric)[keep] for record, keep in zip(records, kept, strict=True)]
    look = {"color": color, "ls": line, "label": arm}
    if shown is not None:
        for own, values in zip(steps, averages, strict=True):
            axes.plot(own, values, lw=0.6, alpha=PALE, zorder=1.5, **look | {"label": f"{arm}, single seeds"})
        if clock == "compute_step":
            axes.plot(steps[shown], averages[shown], lw=1.4, zorder=2.5, **look)
            return
    common = reduce(np.intersect1d, steps)
    rows = [values[np.isin(own, common)] for own, values in zip(steps, averages, strict=True)]
    mean, low, high = np.transpose([interval(values) for values in np.transpose(rows)])
    if len(records) > 1:
        axes.fill_between(common, low, high, color=color, alpha=0.18, lw=0)
    axes.plot(common, mean, lw=1.4, **look)


def _draw_rollbacks(axes: Axes, places: Mapping[str, set[int]]) -> None:
    """Dashed lines; the dashes of arms that roll back at one step take turns."""
    for place in sorted(set().union(*places.values())):
        sharing = [arm for arm in places if place in places[arm]]
        for index, arm in enumerate(sharing):
            dashes = (4 * index, (4, 4 * max(len(sharing) - 1, 1)))
            axes.axvline(place, color=ARM_LOOKS[arm][0], lw=1.0, ls=dashes, zorder=1, label=f"{arm}, roll-back")


def _legend_of_curves(figure: Figure, evidence: Evidence, records: Mapping[str, Sequence[RunRecord]]) -> None:
    seeds, lines = len(evidence.about["seeds"]), []
    for arm, runs in records.items():
        count = f"n = {len(runs)}" + (f" of {seeds}" if len(runs) < seeds else "")
        lines.append(Line2D([], [], color=ARM_LOOKS[arm][0], ls=ARM_LOOKS[arm][1], lw=1.6, label=f"{arm} ({count})"))
    figure.legend(handles=lines, loc="outside upper center", ncols=min(4, len(lines)), frameon=False)


def _curve_marks(records: Mapping[str, Sequence[RunRecord]], where: str = "") -> list[Line2D | Patch]:
    average = f"mean over seeds of the moving average (weight {AVERAGE_WEIGHT})"
    marks: list[Line2D | Patch] = [Line2D([], [], color=GREY, lw=1.6, label=average)]
    if any(len(runs) > 1 for runs in records.values()):
        marks.append(Patch(color=GREY, alpha=0.2, lw=0, label=f"95 % t interval over seeds{where}"))
    if any(len(runs) == 1 for runs in records.values()):
        marks.append(Line2D([], [], color=GREY, lw=1.6, label="one seed: no interval"))
    return marks
