"""Grids of numbers from the evidence study: Table 1 beside the paper's own, and the map of the gain."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from ..study.results import Evidence
from .estimates import interval, quoted, require_arms, signed
from .style import GREY, WIDTH, canvas, settle, style

PAPER_ARMS = {"NPO (early)": "NPO early", "NPO (early+late)": "NPO"}
"""Arms of the paper's methods that have another name here."""
COLORMAP = "RdBu"
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
"""Share of linear red, green and blue in the brightness of a colour; text is white on what is dark."""


def suite_table(evidence: Evidence, paper: pd.DataFrame) -> Figure:
    """Gains over GRPO by method and suite, the paper's below those of the study (paper: Table 1).

    Ours are coloured only where the interval excludes zero; the paper's have no interval and are all coloured.

    Args:
        evidence: Results of the study.
        paper: Table 1: columns `method`, `average` and a suite each, in percent.

    Raises:
        ValueError: There is no GRPO, or no other method of the paper.
    """
    require_arms(evidence, "GRPO")
    paper = paper.set_index("method").drop(index="Base", errors="ignore")
    paper = paper.loc[["GRPO", *paper.index.drop("GRPO")]]
    arms = [PAPER_ARMS.get(method, method) for method in paper.index]
    if not set(arms[1:]) & set(evidence.arms):
        raise ValueError(f"The evidence lacks {quoted(arms[1:])}; the table compares at least one of them with GRPO.")
    chosen = evidence.scores[evidence.scores["final"] & (evidence.scores["sampling"] == "paper")]
    rates = 100 * chosen.pivot_table(index="seed", columns=["arm", "suite"], values="pass_rate")
    means = 100 * evidence.finals()
    suites = ["average", *(name.lower().replace("mm-", "mm").replace("-", "_") for name in paper.columns[1:])]
    scores = {(arm, "average"): means[arm] for arm in means} | {key: rates[key] for key in rates}
    values = [[_gains(scores, arm, suite) for suite in suites] for arm in arms]
    counts = [len(cell) for row in values for cell in row if len(cell)] or [0]
    ours = np.array([[interval(cell) for cell in row] for row in values])
    theirs = paper.to_numpy(float) - np.where(paper.index == "GRPO", 0, 1)[:, None] * paper.loc["GRPO"].to_numpy(float)
    excludes = (ours[..., 1] > 0) | (ours[..., 2] < 0)
    alike = ours[..., 2] - ours[..., 1] < 1e-6  # seeds alike in a few problems: the spread is unknown
    excludes &= ~alike
    excludes[0] = False
    theirs_coloured = np.ones_like(excludes)
    theirs_coloured[0] = False
    seeds = "–".join(map(str, sorted({min(counts), max(counts)})))
    titles = (
        f"This study, small world: gain in points of test pass rate at equal compute, n = {seeds}",
        "The paper, real benchmarks: gain in points of accuracy (percent), one run, no intervals",
    )
    ours_text = [[_cell_text(cell, absolute=i == 0) for cell in row] for i, row in enumerate(ours)]
    theirs_text = [[f"{v:.2f}" if i == 0 else signed(v, 2) for v in row] for i, row in enumerate(theirs)]
    columns = ["mean", *map(in_two_lines, paper.columns[1:])]
    with style():
        figure, grid = canvas(2, 1, (WIDTH, 6.6), gridspec_kw={"height_ratios": [1.35, 1]})
        for axes, cells, texts, names, coloured, marked, title in (
            (grid[0, 0], ours[..., 0], ours_text, arms, excludes, excludes, titles[0]),
            (grid[1, 0], theirs, theirs_text, paper.index, theirs_coloured, np.zeros_like(excludes), titles[1]),
        ):
            limit = np.nanmax(np.abs(cells[1:]), initial=0.0)
            shades = _draw_cells(axes, np.where(coloured, cells, np.nan), texts, marked, limit)
            name_cells(axes, columns, names, title)
            figure.colorbar(shades, ax=axes, label="gain over GRPO (points)", aspect=16, pad=0.01)
        measure = _measure("± half of the 95 % t interval over n seeds", counts)
        if alike.any():
            measure += "; ±0.0: all seeds equal, no interval"
        _legend_of_cells(figure, f"{measure}; the two colour scales differ", counts)
    return settle(figure)


def gain_map(cells: pd.DataFrame) -> Figure:
    """When does guidance pay? Gain of a guided window over learning rate and distance, the premise in words (ours).

    A cell is coloured only where its interval excludes zero: what cannot be told from zero stays white.

    Args:
        cells: A row per cell and seed: `learning_rate`, `distance`, `seed`, `difference` (test pass rate minus GRPO's
            at equal total rollouts, NaN if a run failed), `guide_solves` and `own_solves` (shares of failed prompts).

    Raises:
        ValueError: Columns are missing, or there is no row.
    """
    absent = {"learning_rate", "distance", "seed", "difference", "guide_solves", "own_solves"} - set(cells.columns)
    if absent or cells.empty:
        raise ValueError(f"The map lacks {quoted(sorted(absent)) if absent else 'rows'}; give a row per cell and seed.")
    rates, distances = sorted(set(cells["learning_rate"])), sorted(set(cells["distance"]))
    means, marked = np.full((len(distances), len(rates)), np.nan), np.full((len(distances), len(rates)), False)
    texts, counts = [["not run"] * len(rates) for _ in distances], []
    for (distance, rate), rows in cells.groupby(["distance", "learning_rate"]):
        y, x = distances.index(distance), rates.index(rate)
        values = rows["difference"].dropna().to_numpy(float)
        mean, low, high = interval(values)
        marked[y, x] = low > 0 or high < 0
        means[y, x] = mean if marked[y, x] else np.nan
        counts.append(len(values))
        told = [_cell_text(np.array([mean, low, high]), digits=3) if len(values) else "failed"]
        if rows["guide_solves"].notna().any():  # a premise along a GRPO run that is there
            told.append(f"{rows['guide_solves'].mean():.2f} / {rows['own_solves'].mean():.2f}")
        texts[y][x] = "\n".join(told)
    limit = cells.groupby(["distance", "learning_rate"])["difference"].mean().abs().max()
    with style():
        size = (min(WIDTH, 2.2 + 1.6 * len(rates)), 1.9 + 0.6 * len(distances))
        figure, ((axes,),) = canvas(1, 1, size)
        shades = _draw_cells(axes, means, texts, marked, limit)
        names = [np.format_float_scientific(rate, trim="-", exp_digits=1) for rate in rates]
        axes.set_xticks(np.arange(len(rates)) + 0.5, names)
        axes.set_yticks(np.arange(len(distances)) + 0.5, ["own\nresample" if d == 0 else f"{d:g}" for d in distances])
        axes.invert_yaxis()
        axes.set_ylabel("distance Δ of the guide (policy steps)")
        axes.set_xlabel("learning rate (AdamW)")
        figure.colorbar(shades, ax=axes, label="test pass rate minus GRPO's\n(equal total rollouts)", aspect=30)
        measure = _measure("gain: mean ± half of its 95 % t interval over n seeds", counts)
        seeds = "–".join(map(str, sorted({min(counts), max(counts)})))
        below = "below: share of the base policy's failures that the guide / an own resample solves"
        _legend_of_cells(figure, f"{measure}, n = {seeds}\n{below}", counts)
    return settle(figure)


def _gains(scores: Mapping[tuple[str, str], pd.Series], arm: str, suite: str) -> np.ndarray:
    """An arm minus GRPO by seed, GRPO's row its own score; empty where one of them was not run."""
    own, base = scores.get((arm, suite)), scores.get(("GRPO", suite))
    if own is None or base is None:
        return np.array([])
    return (own if arm == "GRPO" else own - base).dropna().to_numpy(float)


def _cell_text(cell: np.ndarray, absolute: bool = False, digits: int = 1) -> str:
    """Mean over half of its interval, "–" without a seed."""
    mean, _, high = cell
    if np.isnan(mean):
        return "–"
    value = f"{mean:.{digits}f}" if absolute else signed(mean, digits)
    return value if np.isnan(high) else f"{value}\n±{high - mean:.{digits}f}"


def _draw_cells(
    axes: Axes, values: np.ndarray, texts: list[list[str]], marked: np.ndarray, limit: float = 0.0
) -> ScalarMappable:
    """Colour (full at 1.25 × the largest value or limit), text and, where marked, a frame of each cell; row 0 first."""
    norm = CenteredNorm(0, 1.25 * np.nanmax(np.abs(values), initial=np.nanmax([limit, 1e-9])))
    shades = axes.pcolormesh(np.ma.masked_invalid(values), cmap=COLORMAP, norm=norm, edgecolors="white", lw=1.0)
    for (y, x), value in np.ndenumerate(values):
        dark = np.isfinite(value) and np.power(shades.to_rgba(value)[:3], 2.2) @ LUMINANCE < 0.18
        look = {"color": "white" if dark else "black", "fontweight": "bold" if marked[y, x] else "normal"}
        axes.text(x + 0.5, y + 0.5, texts[y][x], ha="center", va="center", linespacing=1.2, **look)
        if marked[y, x]:
            axes.add_patch(Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, fill=False, ec="black", lw=1.2))
    axes.set_ylim(len(values), 0)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    return shades


def in_two_lines(name: str) -> str:
    """A name of two words in two lines, or neighbours would touch."""
    return re.sub("(?<=-)|(?<=[a-z])(?=[A-Z])", "\n", name)


def name_cells(axes: Axes, columns: Sequence[str], rows: Sequence[str], title: str) -> None:
    """Names of the columns and rows of a table whose first column is a mean, and whose first row is in percent."""
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
    axes.set_yticks(np.arange(len(rows)) + 0.5, [f"{rows[0]}\n(percent)", *rows[1:]])
    axes.axhline(1, color=GREY, lw=1.0)
    axes.axvline(1, color=GREY, lw=1.0)
    axes.set_title(title, loc="left")


def _measure(interval_name: str, counts: Sequence[int]) -> str:
    """What the numbers of the cells are, by the seeds that they rest on."""
    names = [interval_name] if max(counts) > 1 else []
    return "; ".join([*names, *(["one seed: no interval"] if 1 in counts else [])])


def _legend_of_cells(figure: Figure, numbers: str, counts: Sequence[int]) -> None:
    marks: list[Patch | Line2D] = [Line2D([], [], ls="", label=numbers)]
    if max(counts) > 1:
        frame = "95 % interval excludes 0 (not adjusted for the number of cells)"
        marks.insert(0, Patch(fc="none", ec="black", lw=1.2, label=frame))
    figure.legend(handles=marks, loc="outside lower center", frameon=False, handlelength=1.6)
