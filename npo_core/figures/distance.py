"""What distance does, over seeds: quality, cost and signal of a guide, and what a window guided by it gained."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..method.quantities import Cost, Quality, Signal
from .signal import origin_title
from .style import COLORS, FONT, GREY, WIDTH, canvas, settle, style

MODES = {"current": (COLORS[2], Cost.GRADIENT_CURRENT), "exact": (COLORS[4], Cost.GRADIENT_EXACT)}
"""Colour and measured cost of a ratio mode."""
PANELS = {
    "quality Q": "share of failed prompts\nthat the guide solves",
    "cost V": "gradient variance, as a\nmultiple of on-policy's",
    "signal S": "Q / V\n",
    "gain of the window": "test pass rate minus\nthe unguided one",
}
"""Name of a column to what it shows."""
TICKS = (0, 20, 60, 160, 400)


def gain_over_distance(signal: Mapping[str, Any]) -> Figure:
    """Q, V, S and the gain of a guided window over the distance of its guide, a row per origin (paper: Figure 2).

    Thin lines are seeds, thick ones their mean; V is measured. Distances stand at their square roots, so that near ones
    can be told apart; 0 is an own resample.

    Args:
        signal: Content of `signal.json`, as `claims.signal_results` reads it.

    Raises:
        ValueError: It holds no guided window.
    """
    gains, table = pd.DataFrame(signal["gain"]), pd.DataFrame(signal["table"])
    if gains.empty:
        raise ValueError("signal.json holds no guided window; `python -m npo_core signal-study` trains them.")
    ahead = table[table["distance"] >= 0]
    origins = sorted(set(gains["origin"]))
    with style():
        figure, grid = canvas(len(origins), len(PANELS), (WIDTH, 0.9 + 1.55 * len(origins)), sharex=True)
        for row, origin in zip(grid, origins, strict=True):
            measured, trained = ahead[ahead["origin"] == origin], gains[gains["origin"] == origin]
            _draw(row[0], measured, "quality", "black", "Q")
            for mode, (color, cost) in MODES.items():
                _draw(row[1], measured, cost, color, f"V, {mode}", np.nanmedian)
                _draw(row[2], measured, Signal(Quality.MANY, cost).name, color, f"S, {mode}")
                _draw(row[3], trained[trained["mode"] == mode], "gain", color, f"gain, {mode}")
            row[1].set_yscale("log")
            row[0].set_ylim(bottom=0)
            row[3].axhline(0, color=GREY, lw=1.0, ls="--", zorder=1)
            row[0].set_ylabel(origin_title(origin))
            for axes in row:
                axes.set_xscale("function", functions=(np.sqrt, np.square))
                axes.set_xticks(TICKS)
        for column in grid.T[[0, 1, 3]]:
            ends = np.array([axes.get_ylim() for axes in column])
            for axes in column:
                axes.set_ylim(ends[:, 0].min(), ends[:, 1].max())
        for axes, (title, label) in zip(grid[0], PANELS.items(), strict=True):
            axes.set_title(f"{title}\n{label}", fontsize=FONT)
        for axes in grid[-1]:
            axes.set_xlabel("distance Δ (steps)")
        figure.legend(handles=_marks(signal["seeds"]), loc="outside lower center", ncols=3, frameon=False)
    return settle(figure)


def _draw(axes: Axes, rows: pd.DataFrame, column: str, color: str, label: str, middle: Callable = np.nanmean) -> None:
    """Each seed, and their mean at the distances that all of them have."""
    by_seed = rows.pivot_table(index="distance", columns="seed", values=column)
    for seed in by_seed:
        axes.plot(by_seed.index, by_seed[seed], color=color, lw=0.6, alpha=0.5, label=f"{label}, seed {seed}")
    shared = by_seed.dropna()
    axes.plot(shared.index, middle(shared, axis=1), "o-", color=color, ms=3, lw=1.6, label=label)


def _marks(seeds: Sequence[int]) -> list[Line2D]:
    marks = [Line2D([], [], color=color, lw=1.6, label=f"ratio mode {mode}") for mode, (color, _) in MODES.items()]
    several = f"mean over {len(seeds)} seeds (V: median)" if len(seeds) > 1 else "one seed"
    return [
        *marks,
        Line2D([], [], color=GREY, lw=1.6, marker="o", ms=3, label=several),
        Line2D([], [], color=GREY, lw=0.6, alpha=0.5, label="single seed"),
        Line2D([], [], color=GREY, lw=1.0, ls="--", label="no guide"),
        Line2D([], [], ls="", label="Δ = 0: own resample"),
    ]
