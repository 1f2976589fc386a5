"""What a signal measurement found: Q, V and S over distances, sources between quality and stability, proxies of V."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from ..method.quantities import MEASURED_COSTS, Cost, Divergence, Quality, Signal
from ..runs.measurement import PROXIES, RESAMPLE
from .scores import LOG_RANGE
from .style import COLORS, GREY, WIDTH, canvas, settle, style

QUALITY_COLORS = {Quality.MANY: "black", Quality.ONE: COLORS[9]}
COST_COLORS = {Cost.KL: COLORS[1], Cost.GRADIENT_CURRENT: COLORS[2], Cost.GRADIENT_EXACT: COLORS[4]}
"""Costs of `signal_curves`; a cost and its S share a colour."""

COST_NAMES = {
    Cost.KL: "exp(c·KL(q‖π))",
    Cost.KL_POLICY: "exp(c·KL(π‖q))",
    Cost.SECOND_MOMENT: "tokens, E[w²] over q",
    Cost.SECOND_MOMENT_POLICY: "tokens, E[w] over π",
    Cost.SEQUENCE: "sequences, E[W²] over q",
    Cost.SEQUENCE_POLICY: "sequences, E[W] over π",
    Cost.GRADIENT_CURRENT: "measured, mode current",
    Cost.GRADIENT_EXACT: "measured, mode exact",
    Cost.GRADIENT_SEQUENCE: "measured, sequence weights",
}
PROXY_NAMES = {
    Divergence.OF_SOURCE: "KL(q‖π), nats per token",
    Divergence.OF_POLICY: "KL(π‖q), nats per token",
    **COST_NAMES,
}

SOURCES = {
    RESAMPLE: ("own resample (Δ = 0)", "s", COLORS[0]),
    "future": ("near future: later checkpoints", "o", COLORS[1]),
    "far": ("far future: the largest distance", "D", COLORS[3]),
    "past": ("past: earlier checkpoints", "v", COLORS[7]),
    "teacher": ("external teacher", "*", COLORS[2]),
}
"""Kind of a source to its name, marker and colour."""

STEPS = ((1,), (1, 3), (1, 2, 5))
"""Round numbers within a decade, from coarse to fine."""

LABEL_PLACES = (
    (8, 3, "left"), (8, -10, "left"), (-8, 3, "right"), (-8, -10, "right"),
    (7, 10, "right"), (7, -18, "right"), (-7, 10, "left"), (-7, -18, "left"),
    (14, 12, "left"), (14, -20, "left"), (-14, 12, "right"), (-14, -20, "right"),
)  # fmt: skip
"""Where a label may stand beside its point, the best place first: offset in points, and alignment."""


def signal_curves(folder: str | Path, quality: str = Quality.MANY) -> Figure:
    """Q, V and S = Q/V over the distance, a column per policy that would learn (paper: Figure 2b and c).

    A cost and its S share a colour. Costs that were not measured are left out.

    Args:
        folder: Folder of a signal measurement.
        quality: What S is formed of: "quality", Q with all rollouts, or "quality_1", Q with one.

    Raises:
        FileNotFoundError: The folder holds no finished measurement.
        ValueError: No pair, none with a distance of 0 or more, or an unknown quality.
    """
    if quality not in tuple(Quality):
        raise ValueError(f"quality is {quality!r}; allowed are {', '.join(Quality)}.")
    quality = Quality(quality)
    table, summary = read_measurement(folder)
    ahead = rows_ahead(table, folder)
    origins = sorted(ahead["origin"].unique())
    costs = {cost: color for cost, color in COST_COLORS.items() if cost in table}
    names = {Quality.MANY: f"Q, {summary['settings']['rollouts']} rollouts", Quality.ONE: "Q, 1 rollout"}
    names |= {cost: f"V and S, {COST_NAMES[cost]}" for cost in costs}
    names[Cost.KL] += f", c = {summary['settings']['c']:g}"
    band, fit = "95 % interval, prompts of one run", "fit: Q = q (1 − exp(−Δ/τ)), V = exp(βΔ)"
    marks: dict[str, Any] = {band: Patch(color=GREY, alpha=0.2, lw=0)}
    with style():
        figure, grid = canvas(3, len(origins), (min(WIDTH, 4.6 + len(origins)), 6.6), sharex="col")
        for axes in grid[0, 1:]:  # V and S differ too much between policies to share an axis
            axes.sharey(grid[0, 0])
            axes.tick_params(labelleft=False)
        for column, origin in zip(grid.T, origins, strict=True):
            rows, found = ahead[ahead["origin"] == origin], summary["origins"][str(origin)]
            column[0].set_title(origin_title(origin))
            smooth = np.linspace(0, rows["distance"].max(), 200)
            shapes = []
            for name, color in QUALITY_COLORS.items():
                _draw_band(column[0], rows, name, color)
                rise = found["fit"][name][Cost.KL]
                if rise["tau"] is not None:
                    shapes.append((column[0], name, -rise["q_inf"] * np.expm1(-smooth / rise["tau"]), color))
            for row, (cost, color) in enumerate(costs.items()):
                _draw_band(column[1], rows, cost, color)
                signal = Signal(quality, cost).name
                _draw_band(column[2], rows, signal, color)
                _draw_optimum(column[2], found["optimum"][signal], row, cost, color, marks)
            log_axis(column[1].yaxis)
            column[2].set_ylim(0, column[2].get_ylim()[1] * 1.15)
            growth = found["fit"][Quality.MANY][Cost.KL]["beta"]
            if growth is not None:
                shapes.append((column[1], Cost.KL, np.exp(growth * smooth), costs[Cost.KL]))
            for axes, name, values, color in shapes:
                axes.plot(smooth, values, color=color, ls="--", lw=0.9, label=f"{name}, fit")
                marks[fit] = Line2D([], [], color=GREY, ls="--", lw=0.9)
            column[2].xaxis.set_major_locator(MaxNLocator(5, integer=True))
            column[2].set_xlabel("distance Δ (policy steps)")
        of = names[quality].removeprefix("Q, ")
        labels = (
            "quality Q\n(share of failures shown)",
            "variance cost V\n(on-policy = 1)",
            f"signal S = Q / V\n(Q, {of})",
        )
        for axes, label in zip(grid[:, 0], labels, strict=True):
            axes.set_ylabel(label)
        colors = {**QUALITY_COLORS, **costs}
        lines = [Line2D([], [], color=colors[name], marker="o", ms=3, lw=1.4, label=names[name]) for name in names]
        wide = len(origins) > 1
        figure.legend(handles=lines, loc="outside upper center", ncols=3 if wide else 2, frameon=False)
        marks = dict(sorted(marks.items()))
        figure.legend(marks.values(), marks, loc="outside lower center", ncols=2, frameon=False)
    return settle(figure)


def quality_stability(folder: str | Path, cost: str | None = None) -> Figure:
    """Sources between quality and stability: Q over V, a panel per policy that would learn (paper: Figures 1b and 2a).

    Thin grey curves join equal S = Q/V; up and to the left is better.

    Args:
        folder: Folder of a signal measurement.
        cost: What stands for V, a `Cost`; by default the measured variance of mode exact or,
            where none was measured, the proxy e^(c·KL).

    Raises:
        FileNotFoundError: The folder holds no finished measurement.
        ValueError: No pair, or a cost that was not measured.
    """
    table, summary = read_measurement(folder)
    cost = cost or (Cost.GRADIENT_EXACT if summary["settings"]["gradients"] else Cost.KL)
    _require(table, cost, tuple(Cost), folder)
    origins = sorted(table["origin"].unique())
    rollouts = summary["settings"]["rollouts"]
    marks: dict[str, Any] = {}
    with style():
        columns = min(len(origins), 3)
        lines = -(-len(origins) // columns)
        figure, grid = canvas(lines, columns, (min(WIDTH, 4.6 + columns), 1.0 + 3.1 * lines), sharey=True)
        for axes in grid.flat[len(origins) :]:
            axes.remove()
        panels = dict(zip(origins, grid.flat, strict=False))
        for origin, axes in panels.items():
            axes.set_title(origin_title(origin))
            rows = table[table["origin"] == origin].sort_values("distance")
            kinds = rows["kind"].mask((rows["distance"] > 0) & (rows["distance"] == rows["distance"].max()), "far")
            for kind in [*SOURCES, *sorted(set(kinds) - set(SOURCES))]:
                own = rows[kinds == kind]
                if len(own):
                    name, marker, color = SOURCES.get(kind, (kind, "X", COLORS[4]))
                    joined = kind == "future"
                    look = {"color": color, "marker": marker, "ms": 9 if marker == "*" else 4.5, "mec": "black"}
                    look |= {"mew": 0.5, "ls": "-" if joined else "", "lw": 0.9, "zorder": 4 if joined else 5}
                    axes.plot(own[cost], own["quality"], label=name, **look)
                    marks[name] = Line2D([], [], **look)
                    axes.hlines(own["quality"], own[f"{cost}_low"], own[f"{cost}_high"], color, lw=0.7, alpha=0.5)
                    axes.vlines(own[cost], own["quality_low"], own["quality_high"], color, lw=0.7, alpha=0.5)
            axes.set_xlabel(f"variance cost V\n({COST_NAMES[cost]})")
        bottom, top = grid[0, 0].get_ylim()
        grid[0, 0].set_ylim(min(bottom, 0.0), top * 1.3)  # room for the names of the curves; Q itself ends at 1
        grid[0, 0].set_yticks([tick for tick in grid[0, 0].get_yticks() if 0 <= tick <= min(1.0, top * 1.3) + 1e-9])
        for axes in panels.values():
            log_axis(axes.xaxis)
            _draw_equal_signal(axes)
        for axes in grid[:, 0]:
            axes.set_ylabel(f"quality Q, {rollouts} rollouts\n(share of failures shown)")
        order = [name for name, *_ in SOURCES.values()]
        marks = dict(sorted(marks.items(), key=lambda mark: order.index(mark[0]) if mark[0] in order else len(order)))
        marks["95 % interval, prompts of one run"] = Line2D([], [], color=GREY, lw=0.7, alpha=0.7)
        marks["equal signal S = Q / V"] = Line2D([], [], color="0.75", lw=0.8)
        figure.legend(marks.values(), marks, loc="outside lower center", ncols=3 if columns > 1 else 2, frameon=False)
        figure.draw_without_rendering()
        for origin, axes in panels.items():
            _label_distances(axes, table[table["origin"] == origin], cost)
    return settle(figure)


def proxy_agreement(folder: str | Path, cost: str = Cost.GRADIENT_EXACT) -> Figure:
    """Proxies of V against a measured cost over the distances, a panel per proxy, with Spearman's ρ (ours).

    Lines show ln V = c·KL with the c that fits all points.

    Args:
        folder: Folder of a signal measurement.
        cost: The measured cost, one of `MEASURED_COSTS`.

    Raises:
        FileNotFoundError: The folder holds no finished measurement.
        ValueError: No pair, none with a distance of 0 or more, or a cost that was not measured.
    """
    table, summary = read_measurement(folder)
    _require(table, cost, MEASURED_COSTS, folder)
    ahead = rows_ahead(table, folder)
    colors = {origin: COLORS[index % len(COLORS)] for index, origin in enumerate(sorted(ahead["origin"].unique()))}
    with style():
        height = 4.6 + 0.3 * len(colors)
        figure, grid = canvas(2, 3, (WIDTH, height), sharey=True)
        for axes, proxy in zip(grid.flat, PROXIES, strict=True):
            ranks = []
            for origin, color in colors.items():
                rows = ahead[ahead["origin"] == origin]
                axes.plot(rows[proxy], rows[cost], "o", color=color, ms=4, alpha=0.8, mew=0, label=str(origin))
                rank = summary["origins"][str(origin)]["agreement"].get(cost, {}).get(proxy)
                ranks.append(f"from {origin}: ρ {interval_text(rank)}")
            axes.set_title("\n".join(ranks), fontsize="medium")
            axes.set_xlabel(PROXY_NAMES[proxy])
            fitted = summary.get("c", {}).get(proxy, {}).get(cost)
            if fitted is not None and fitted["value"] is not None:
                kl = np.array([0.0, max(ahead[proxy].max(), 0.0)])
                axes.plot(kl, np.exp(fitted["value"] * kl), color=GREY, lw=1.0, label="ln V = c·KL")
                place = {"transform": axes.transAxes, "ha": "right", "va": "bottom", "color": GREY}
                axes.text(0.97, 0.04, f"c = {fitted['value']:.3g}".replace("-", "−"), **place)
            if not isinstance(proxy, Divergence) and ahead[proxy].max() > LOG_RANGE * ahead[proxy].min():
                log_axis(axes.xaxis)
        log_axis(grid[0, 0].yaxis)
        for axes in grid[:, 0]:
            axes.set_ylabel(f"V ({COST_NAMES[cost]})")
        lines = [Line2D([], [], ls="", marker="o", ms=4, color=c, label=origin_title(o)) for o, c in colors.items()]
        if any(axes.texts for axes in grid.flat):
            lines.append(Line2D([], [], color=GREY, lw=1.0, label="ln V = c·KL"))
        figure.legend(handles=lines, loc="outside upper center", ncols=min(4, len(lines)), frameon=False)
        text = "a point is a distance Δ ≥ 0 of one run; ρ: Spearman's, [95 % interval over its prompts]"
        note = [Line2D([], [], ls="", label=text)]
        figure.legend(handles=note, loc="outside lower center", frameon=False, handlelength=0)
    return settle(figure)


def log_axis(axis: Axis) -> None:
    """Logarithmic scale with plain numbers: raised exponents would be smaller than the smallest font."""
    axes, name = axis.axes, axis.axis_name
    getattr(axes, f"set_{name}scale")("log")
    axis.set_major_locator(FixedLocator(_round_numbers(*getattr(axes, f"get_{name}lim")())))
    axis.set_major_formatter(lambda value, place: _short(value))
    axis.set_minor_formatter(NullFormatter())


def _round_numbers(low: float, high: float) -> list[float]:
    """About three to six round numbers in a range > 0, evenly spread in logarithm where the range is wide."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in STEPS:
        numbers = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(numbers) > 2:
            return numbers[:: -(-len(numbers) // 6)]
    return [number for number in MaxNLocator(5).tick_values(low, high) if low <= number <= high]


def _short(number: float) -> str:
    text = f"{number:g}"
    if number and not 1e-3 <= number < 1e4:
        digits, exponent = f"{number:e}".split("e")
        text = f"{float(digits):g}e{int(exponent)}"
    return text.replace("-", "−")


def interval_text(found: dict[str, Any] | None) -> str:
    """ "0.52 [0.10, 0.80]", or "undefined"."""
    if found is None or found["value"] is None:
        return "undefined"
    ends = "" if found["low"] is None else f" [{found['low']:.2f}, {found['high']:.2f}]"
    return f"{found['value']:.2f}{ends}".replace("-", "−")


def read_measurement(folder: str | Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    table = pd.read_parquet(Path(folder) / "table.parquet")
    if table.empty:
        raise ValueError(f"{folder} compares nothing: its table has no row. Measure at least one pair of policies.")
    return table.assign(distance=pd.to_numeric(table["distance"])), json.loads(
        (Path(folder) / "signal.json").read_text(encoding="utf-8")
    )


def rows_ahead(table: pd.DataFrame, folder: str | Path) -> pd.DataFrame:
    """Rows of the origin's resample and of later checkpoints, in the order of the distance."""
    rows = table[table["distance"] >= 0].sort_values(["origin", "distance"])
    if rows.empty:
        raise ValueError(f"{folder} has no pair with a distance of 0 or more, so there is no curve to draw.")
    return rows


def _require(table: pd.DataFrame, cost: str, names: Sequence[str], folder: str | Path) -> None:
    available = [name for name in names if name in table]
    if cost not in available:
        raise ValueError(f"{folder} holds no cost {str(cost)!r}; available: {', '.join(available) or 'none'}.")


def origin_title(origin: int) -> str:
    return f"from policy step {origin}" if origin else "from the base policy"


def _draw_band(axes: Axes, rows: pd.DataFrame, name: str, color: str) -> None:
    axes.fill_between(rows["distance"], rows[f"{name}_low"], rows[f"{name}_high"], color=color, alpha=0.16, lw=0)
    axes.plot(rows["distance"], rows[name], "o-", color=color, ms=3, lw=1.4, label=name)


def _draw_optimum(axes: Axes, best: dict[str, Any], row: int, cost: str, color: str, marks: dict[str, Any]) -> None:
    """Δ* on its curve of S, hollow at an edge, and its interval as a bar above the curves."""
    edge = best["at_edge"]
    look = {"ls": "", "marker": "*", "ms": 11, "mew": 1.2 if edge else 0.7, "zorder": 5}
    paint = {"mfc": "white", "mec": color} if edge else {"mfc": color, "mec": "black"}
    axes.plot(best["distance"], best["signal"], label=f"Δ*, {cost}", **look, **paint)
    text = "Δ* at an edge of the distances measured" if edge else "Δ*, the maximum of S"
    marks[text] = Line2D([], [], **look, mfc="white" if edge else GREY, mec=GREY if edge else "black")
    if best["low"] is not None:
        ends, height = [best["low"], best["high"]], [0.96 - 0.04 * row] * 2
        place = axes.get_xaxis_transform()
        bar = {"lw": 2.0, "marker": "|", "ms": 5, "mew": 1.5}  # ends are seen where both are one distance
        axes.plot(ends, height, color=color, transform=place, label=f"interval of Δ*, {cost}", **bar)
        marks["Δ*: its 95 % interval (bars at the top)"] = Line2D([], [], color=GREY, **bar)


def _draw_equal_signal(axes: Axes) -> None:
    """Curves of constant S that leave the panel at its top, with their S at that end."""
    (left, right), top = axes.get_xlim(), axes.get_ylim()[1]
    x = np.geomspace(left, right, 200)
    width = right / left
    for level in _round_numbers(top / right * width**0.08, top / left / width**0.03):
        axes.plot(x, level * x, color="0.75", lw=0.8, zorder=1, scalex=False, scaley=False, label="equal signal")
        look = {"rotation": 90, "ha": "left", "va": "top", "color": GREY, "clip_on": True}
        axes.text(top / level, top * 0.985, f"S = {_short(level)}", **look)
    axes.set_xlim(left, right)


def _label_distances(axes: Axes, rows: pd.DataFrame, cost: str) -> None:
    """Δ beside the largest, the smallest and the middle distance, each where there is room, or not at all."""
    later = rows[rows["distance"] > 0].dropna(subset=[cost, "quality"]).sort_values("distance")
    if later.empty:
        return
    taken = [text.get_window_extent() for text in axes.texts]
    points, path = (axes.transData.transform(table[[cost, "quality"]]) for table in (rows, later))
    along = np.linspace(path[:-1], path[1:], 12).reshape(-1, 2)
    taken += [Bbox.from_bounds(*(place - 4), 8, 8) for place in points]
    taken += [Bbox.from_bounds(*place, 1, 1) for place in along]
    frame = axes.get_window_extent()
    for index in dict.fromkeys([len(later) - 1, 0, len(later) // 2]):
        row = later.iloc[index]
        for x, y, side in LABEL_PLACES:
            place = {"xytext": (x, y), "textcoords": "offset points", "ha": side}
            place["arrowprops"] = {"arrowstyle": "-", "color": GREY, "lw": 0.6, "shrinkA": 0, "shrinkB": 2}
            text = axes.annotate(f"Δ = {row['distance']:g}", (row[cost], row["quality"]), **place)
            text.get_window_extent()  # places the text; its own extent leaves the line to the point out
            box = Text.get_window_extent(text)
            if frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and not box.count_overlaps(taken):
                taken.append(box)
                break
            text.remove()
