"""Curves of whole runs: training on three clocks, and the plateau of a run that never intervened."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..files import read_json
from ..runs.folder import offline_rollouts
from .record import AVERAGE_WEIGHT, RunRecord
from .style import COLORS, GREY, WIDTH, arm_looks, canvas, settle, style

CLOCKS = {"compute_step": "compute step (optimiser steps executed)", "policy_step": "policy step"}
"""The two clocks, in the order of the panels: what was spent on the left, where that led on the right."""
DOTTED = (0, (1.0, 0.6))
CURVES = {"npo/pass_rate": "on-policy pass rate (fraction)", "npo/entropy": "token entropy (nats)"}


def training_curves(runs: Mapping[str, str | Path]) -> Figure:
    """On-policy pass rate and token entropy of some runs, over both clocks (paper: Figures 1a, 4a and 4b).

    Thin lines are single steps, thick ones the moving average. Warnings, roll-backs, guided replays and abandoned
    stretches are marked in the colour of their run.

    Args:
        runs: Run folders by the label of the legend.

    Raises:
        ValueError: No run, or a folder without metric lines.
    """
    if not runs:
        raise ValueError("runs is empty; give at least one run folder with its label.")
    records = {label: RunRecord.read(folder) for label, folder in runs.items()}
    colors = {label: color for label, (color, _) in arm_looks(list(records)).items()}
    marks: dict[str, Any] = {
        "single step": Line2D([], [], color=GREY, lw=0.8, alpha=0.5),
        f"moving average (weight {AVERAGE_WEIGHT})": Line2D([], [], color=GREY, lw=1.8),
    }
    with style():
        figure, grid = canvas(2, 2, (WIDTH, 5.4), sharex="col", sharey="row")
        for row, name in zip(grid, CURVES, strict=True):
            row[0].set_ylabel(CURVES[name])
            for axes, clock in zip(row, CLOCKS, strict=True):
                for label, record in records.items():
                    _draw_curve(axes, record, clock, name, label, colors[label], marks)
        for row in grid:
            _draw_jumps(row[1], {colors[label]: record.of_kind("rollback") for label, record in records.items()}, marks)
        for axes, label in zip(grid[1], CLOCKS.values(), strict=True):
            axes.set_xlabel(label)
        lines = [Line2D([], [], color=colors[label], lw=1.8, label=label) for label in records]
        figure.legend(handles=lines, loc="outside upper center", ncols=min(4, len(lines)), frameon=False)
        figure.legend(marks.values(), marks, loc="outside lower center", ncols=3, frameon=False)
    return settle(figure)


def _draw_curve(
    axes: Axes, record: RunRecord, clock: str, name: str, label: str, color: str, marks: dict[str, Any]
) -> None:
    """One metric of one run over one clock, with its marks; kinds of mark that occur are entered in `marks`."""
    steps, values, average = record.values(clock), record.values(name), record.average(name)
    kept = record.kept() if clock == "policy_step" else np.full(len(steps), True)
    axes.plot(steps[kept], values[kept], color=color, lw=0.7, alpha=0.35, label=f"{label}, single step")
    axes.plot(steps[kept], average[kept], color=color, lw=1.8, label=f"{label}, average")
    for branch in sorted({line["branch"] for line in record.lines}):
        own = np.flatnonzero(record.values("branch") == branch)
        lost = own[~kept[own]]
        if len(lost):
            lost = np.r_[lost[0] - 1, lost] if lost[0] > own[0] else lost
            axes.plot(
                steps[lost], average[lost], color=color, lw=1.4, ls=DOTTED, alpha=0.5, label=f"{label}, abandoned"
            )
            marks["abandoned stretch (right panels)"] = Line2D([], [], color=GREY, lw=1.4, ls=DOTTED, alpha=0.5)
    warned = [warning["compute_step"] for warning in record.of_kind("warning")]
    for index in np.flatnonzero(np.isin(record.values("compute_step"), warned)):
        shape = {"ls": "", "marker": "^", "ms": 6, "mec": "black", "mew": 0.7}
        axes.plot(steps[index], average[index], color=color, zorder=5, label=f"{label}, warning", **shape)
        marks["plateau warning"] = Line2D([], [], color=GREY, **shape)
    for rollback in record.of_kind("rollback"):
        axes.axvline(rollback[clock], color=color, ls="--", lw=1.0, label=f"{label}, roll-back")
        marks["roll-back"] = Line2D([], [], color=GREY, ls="--", lw=1.0)
    for replay in record.replays():
        axes.axvspan(*replay[clock], color=color, alpha=0.13, lw=0, label=f"{label}, guided replay")
        marks["guided replay"] = Patch(color=GREY, alpha=0.2, lw=0)


def _draw_jumps(axes: Axes, rollbacks: Mapping[str, Sequence[Mapping[str, Any]]], marks: dict[str, Any]) -> None:
    """Arrows from t back to t − Δ above the curves, in as many rows as keep them apart."""
    jumps = [(color, event["to"], event["policy_step"]) for color, events in rollbacks.items() for event in events]
    rows: list[list[tuple[int, int]]] = []
    placed = []
    for color, low, high in jumps:
        free = (i for i, row in enumerate(rows) if all(high < other[0] or low > other[1] for other in row))
        row = next(free, len(rows))
        rows[row:] = rows[row:] or [[]]
        rows[row].append((low, high))
        placed.append((row, color, low, high))
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, bottom + (top - bottom) / (1 - 0.06 * len(rows)))
    for row, color, low, high in placed:
        height = 0.97 - 0.06 * row
        style = {"arrowstyle": "-|>", "color": color, "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
        place = axes.get_xaxis_transform()
        axes.annotate("", xy=(low, height), xytext=(high, height), xycoords=place, textcoords=place, arrowprops=style)
        marks["from t back to t − Δ (right panels)"] = Line2D(
            [], [], color=GREY, lw=1.2, marker="<", ms=4, markevery=[0]
        )


def plateau(run: str | Path) -> Figure:
    """Rise and plateau of a run without intervention: three metrics over the policy step, with means of its quarters.

    Args:
        run: Run folder, of GRPO as a rule.

    Raises:
        ValueError: The run has a roll-back, or fewer than four steps.
    """
    record = RunRecord.read(run)
    if record.of_kind("rollback"):
        raise ValueError(f"{run} has a roll-back, so its quarters mean nothing; draw it with training_curves.")
    if len(record.lines) < 4:
        raise ValueError(f"{run} has {len(record.lines)} steps; four are the least that can be quartered.")
    steps = record.values("policy_step")
    names = {**CURVES, "npo/all_wrong_groups": "all-wrong groups (fraction)"}
    with style():
        figure, grid = canvas(3, 1, (WIDTH * 0.75, 6.0), sharex=True)
        for axes, (name, label), color in zip(grid[:, 0], names.items(), COLORS, strict=False):
            values = record.values(name)
            axes.plot(steps, values, color=color, lw=0.8, alpha=0.6, label="single step")
            axes.margins(x=0.01, y=0.05)
            bottom, top = axes.get_ylim()
            axes.set_ylim(bottom, bottom + (top - bottom) * 1.18)
            axes.set_ylabel(label.replace(" (", "\n("))
            for quarter in np.array_split(np.arange(len(steps)), 4):
                mean, ends = np.nanmean(values[quarter]), steps[quarter[[0, -1]]]
                axes.plot(ends, [mean, mean], color="black", lw=2.0, label="mean of a quarter")
                axes.text(
                    ends.mean(), 0.97, f"mean {mean:.3f}", transform=axes.get_xaxis_transform(), ha="center", va="top"
                )
        grid[-1, 0].set_xlabel(CLOCKS["policy_step"])
        handles = [Line2D([], [], color=GREY, lw=0.8, alpha=0.6), Line2D([], [], color="black", lw=2.0)]
        labels = ["single step", "mean of a quarter of the run"]
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return settle(figure)


def rollout_curves(runs: Mapping[str, str | Path]) -> Figure:
    """On-policy pass rate of some runs over all rollouts, those of training and those off line (ours).

    Off-line rollouts are jumps to the right: nothing is learnt while they are sampled.

    Args:
        runs: Run folders by the label of the legend.

    Raises:
        ValueError: No run, or a folder without metric lines.
    """
    if not runs:
        raise ValueError("runs is empty; give at least one run folder with its label.")
    looks = arm_looks(list(runs))
    with style():
        figure, ((axes,),) = canvas(1, 1, (WIDTH, 3.2))
        for label, folder in runs.items():
            record, color = RunRecord.read(folder), looks[label][0]
            spent = rollouts_spent(record, Path(folder))
            axes.plot(spent, record.values("npo/pass_rate"), color=color, lw=0.7, alpha=0.35)
            axes.plot(spent, record.average("npo/pass_rate"), color=color, lw=1.8, label=label)
        axes.set_xlabel("rollouts in all (training and off line)")
        axes.set_ylabel(CURVES["npo/pass_rate"])
        handles, labels = axes.get_legend_handles_labels()
        handles += [Line2D([], [], color=GREY, lw=0.7, alpha=0.5), Line2D([], [], color=GREY, lw=1.8)]
        labels += ["single step", f"moving average (weight {AVERAGE_WEIGHT})"]
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False)
    return settle(figure)


def rollouts_spent(record: RunRecord, folder: Path) -> np.ndarray:
    """Rollouts that a run has sampled in all when each of its lines is written.

    Args:
        record: Lines and events of the run.
        folder: Run folder, whose `config.json` tells how many rollouts a step takes.
    """
    config = read_json(folder / "config.json")
    steps = record.values("compute_step")
    offline = np.array([offline_rollouts(record.events, before=step) for step in steps])
    return steps * config["prompts_per_step"] * config["num_generations"] + offline
