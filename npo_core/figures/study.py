"""Results of the studies over seeds, from their committed JSON files: manual interventions, and gain against signal."""

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..method.stats import mean_interval
from ..runs.measurement import RESAMPLE
from ..study.findings import read
from .curves import CLOCKS, CURVES
from .record import AVERAGE_WEIGHT, RunRecord
from .signal import COST_COLORS, COST_NAMES, SOURCES, interval_text, log_axis, origin_title
from .style import COLORS, GREY, WIDTH, canvas, settle, style

DISTANCE_LOOKS = (("o", COLORS[1]), ("^", COLORS[9]), ("v", COLORS[4]), ("P", COLORS[8]), ("X", COLORS[7]))
"""Markers and colours of distances between the own resample and the end of the run, and of other sources."""
MODE_LOOKS = {
    "current": ("o", COST_COLORS["gradient_current"]),
    "exact": ("s", COST_COLORS["gradient_exact"]),
    "truncated": ("^", COLORS[0]),
    "shaped": ("D", COLORS[1]),
}
"""Markers and colours of ratio modes; a mode has the colour of the variance that was measured in it."""
CLOCK_TITLES = {"compute": "at equal compute steps", "policy": "at equal policy steps"}
GAIN = "gain in test pass rate\n(guided − unguided, fraction)"
SEED = {"ls": "", "ms": 4, "alpha": 0.8, "mec": "white", "mew": 0.5, "zorder": 3.5}
"""Look of a single seed."""
MEAN = {"ls": "", "mec": "black", "mew": 0.7, "zorder": 4}
"""Look of a mean over seeds."""


def learning_curves(path: str | Path) -> Figure:
    """Pass rate and entropy of the arms over both clocks, mean over seeds (paper: Figure 1a).

    A seed's curve is the moving average over the steps behind each line, as in `training_curves`: after a roll-back it
    goes on from its state at the step rolled back to. The policy clock shows the final trajectory only. Steps that a
    seed of the arm lacks are left out.

    Args:
        path: JSON file of the study of interventions, with `runs`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Another version, or the file holds no run, or one without steps.
    """
    runs = _entries(path, "runs", read(path))
    arms: dict[str, list[RunRecord]] = {}
    jumps: dict[str, list[Mapping[str, int]]] = {}
    for run in runs:
        arms.setdefault(run["arm"], []).append(_record(run, path))
        jumps.setdefault(run["arm"], []).extend(run["interventions"])
    colors = _arm_colors(runs)
    with style():
        figure, grid = canvas(2, 2, (WIDTH, 5.4), sharex="col", sharey="row")
        for row, name in zip(grid, CURVES, strict=True):
            row[0].set_ylabel(CURVES[name])
            for axes, clock in zip(row, reversed(CLOCKS), strict=True):
                for arm, records in arms.items():
                    steps, averages = _averages(records, name, clock)
                    mean, low, high = np.transpose([_interval(values) for values in averages.T])
                    axes.fill_between(steps, low, high, color=colors[arm], alpha=0.18, lw=0)
                    axes.plot(steps, mean, color=colors[arm], lw=1.6, label=arm)
                _draw_rollbacks(axes, {arm: {jump[clock] for jump in jumps[arm]} for arm in arms}, colors)
        for axes, clock in zip(grid[1], reversed(CLOCKS), strict=True):
            axes.set_xlabel(CLOCKS[clock])
        lines = [
            Line2D([], [], color=colors[arm], lw=1.6, label=f"{arm} (n = {len(records)})")
            for arm, records in arms.items()
        ]
        figure.legend(handles=lines, loc="outside upper center", ncols=4, frameon=False)
        marks = {
            f"mean over seeds of the moving average (weight {AVERAGE_WEIGHT})": Line2D([], [], color=GREY, lw=1.6),
            "95 % t interval over seeds": Patch(color=GREY, alpha=0.2, lw=0),
        }
        if any(jumps.values()):
            marks["roll-back, in the colour of its arm"] = Line2D([], [], color=GREY, ls="--", lw=1.0)
        figure.legend(marks.values(), marks, loc="outside lower center", ncols=2, frameon=False)
    return settle(figure)


def speed_up(path: str | Path) -> Figure:
    """How many times fewer compute steps an arm needs than GRPO to reach a level, by what is counted (ours).

    Args:
        path: JSON file of the study of interventions, with `speed_up`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Another version, or the file holds no speed-up.
    """
    content = read(path)
    found = content.get("speed_up", {})
    rows = _entries(path, "rows", found)
    colors = _arm_colors([*content.get("runs", []), *rows])
    with style():
        figure, ((axes,),) = canvas(1, 1, (WIDTH, 1.5 + 0.3 * len(rows)))
        _draw_rows(axes, {f"{row['arm']}, {row['count']}": row for row in rows}, colors)
        axes.axvline(1, color=GREY, lw=1.0, ls="--")
        axes.set_xlabel(
            f"speed-up to {100 * found['level_share']:g} % of GRPO's rise (compute steps of GRPO / those of the arm)"
        )
        _legend_of_rows(figure, "as fast as GRPO")
    return settle(figure)


def final_differences(path: str | Path) -> Figure:
    """Difference to GRPO in test pass rate at the end, a panel per clock that is held equal (ours).

    Args:
        path: JSON file of the study of interventions, with `differences`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Another version, or the file holds no difference.
    """
    content = read(path)
    rows = _entries(path, "differences", content)
    colors = _arm_colors([*content.get("runs", []), *rows])
    clocks = list(dict.fromkeys(row["clock"] for row in rows))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    with style():
        figure, (panels,) = canvas(1, len(clocks), (WIDTH, 1.7 + 0.3 * len(arms)), sharex=True, sharey=True)
        for axes, clock in zip(panels, clocks, strict=True):
            own = {row["arm"]: row for row in rows if row["clock"] == clock}
            _draw_rows(axes, {arm: own.get(arm) for arm in arms}, colors)
            axes.axvline(0, color=GREY, lw=1.0, ls="--")
            axes.set_title(CLOCK_TITLES[clock])
            axes.set_xlabel("difference to GRPO in test pass rate (fraction)")
        _legend_of_rows(figure, "as good as GRPO")
    return settle(figure)


def gain_against_signal(path: str | Path) -> Figure:
    """Gain of guided training over the S of its source: a row per origin, a column per ratio mode (ours).

    S is the primary signal of the mode. If a source shows nothing, S = 0 and the axis is linear below the smallest
    signal above 0.

    Args:
        path: JSON file of the gain study, with `arms`, `correlation` and `primary`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Another version, or the file holds no guided arm, or not the primary signal.
    """
    content = read(path)
    arms = _guided(path, content)
    missing = set(content["primary"].values()) - set(arms)
    if missing:
        raise ValueError(f"{path} holds no {', '.join(sorted(missing))}; the gain would be drawn against nothing.")
    free, looks = cycle(DISTANCE_LOOKS), {}
    for name, kind in dict(arms.sort_values("rank")[["name", "kind"]].to_numpy().tolist()).items():
        marker, color = SOURCES[kind][1:] if kind in SOURCES else next(free)
        looks[name] = {"color": color, "marker": marker, "ms": 9 if marker == "*" else 6}
    origins, modes = sorted(set(arms["origin"])), list(dict.fromkeys(arms["mode"]))
    ranks = {(row["origin"], row["mode"], row["signal"]): row for row in content["correlation"]}
    with style():
        size = (min(WIDTH, 2.2 + 2.8 * len(modes)), 1.3 + 2.6 * len(origins))
        figure, grid = canvas(len(origins), len(modes), size, sharey=True)
        for row, origin in zip(grid, origins, strict=True):
            row[0].set_ylabel(GAIN)
            for axes, mode in zip(row, modes, strict=True):
                signal = content["primary"][mode]
                own = arms[(arms["origin"] == origin) & (arms["mode"] == mode)].dropna(subset=[signal, "gain"])
                values = own[signal].to_numpy(float)
                for name, points in own.groupby("name"):
                    places = points[signal].to_numpy(float)
                    with np.errstate(divide="ignore"):  # S = 0 stays at 0
                        center, left, right = np.exp(_interval(np.log(places)))
                    axes.hlines(points["gain"].mean(), left, right, looks[name]["color"], lw=1.2)
                    _draw_gains(axes, places, center, points["gain"].to_numpy(float), name, looks[name])
                axes.axhline(0, color=GREY, lw=1.0, ls="--", zorder=1)
                log_axis(axes.xaxis, None if (values > 0).all() else values[values > 0].min(initial=1.0))
                rank = interval_text(ranks.get((origin, mode, signal)))
                axes.set_title(f"{origin_title(origin)}, ratio mode {mode}\nρ = {rank}", fontsize="medium")
                cost = signal.removeprefix("signal_1_").removeprefix("signal_")
                axes.set_xlabel(f"signal S = Q / V (V {COST_NAMES[cost]})")
        marks = [Line2D([], [], label=name, **MEAN, **look) for name, look in looks.items()]
        marks += _seed_marks("mean over seeds (S: geometric)")
        figure.legend(handles=marks, loc="outside lower center", ncols=min(3, len(modes) + 1), frameon=False)
        note = Line2D([], [], ls="", label="ρ: Spearman's over sources, mean over seeds [95 % t interval over seeds]")
        figure.legend(handles=[note], loc="outside upper center", frameon=False, handlelength=0)
    return settle(figure)


def gain_over_distance(path: str | Path) -> Figure:
    """Gain of guided training over the distance of its source, a panel per origin, a colour per ratio mode (ours).

    Args:
        path: JSON file of the gain study, with `arms`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Another version, or the file holds no guided arm.
    """
    arms = _guided(path, read(path)).sort_values("rank")
    origins, modes = sorted(set(arms["origin"])), list(dict.fromkeys(arms.sort_index()["mode"]))
    looks = {mode: dict(zip(("marker", "color"), MODE_LOOKS[mode], strict=True), ms=6) for mode in modes}
    with style():
        figure, (panels,) = canvas(1, len(origins), (min(WIDTH, 2.0 + 2.6 * len(origins)), 3.4), sharey=True)
        for axes, origin in zip(panels, origins, strict=True):
            own = arms[arms["origin"] == origin]
            ticks = list(dict.fromkeys(own["tick"]))
            for (tick, mode), points in own.dropna(subset=["gain"]).groupby(["tick", "mode"]):
                place = ticks.index(tick) + 0.34 * (modes.index(mode) - (len(modes) - 1) / 2)
                _draw_gains(axes, place + 0.11, place, points["gain"].to_numpy(float), mode, looks[mode])
            axes.axhline(0, color=GREY, lw=1.0, ls="--", zorder=1)
            axes.set_xticks(range(len(ticks)), ticks)
            axes.set_title(origin_title(origin))
            axes.set_xlabel("source of the guides: its distance Δ (policy steps)")
            axes.grid(visible=False, axis="x")
        panels[0].set_ylabel(GAIN)
        marks = [Line2D([], [], label=f"ratio mode {mode}", **MEAN, **look) for mode, look in looks.items()]
        marks += _seed_marks("mean over seeds")
        figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False)
    return settle(figure)


def _entries(path: str | Path, name: str, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not content.get(name):
        raise ValueError(f"{path} holds no {name}; collect the study's results first.")
    return content[name]


def _arm_colors(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Colours by arm in order of first appearance; the first colour is GRPO's, also where only others are drawn."""
    arms = dict.fromkeys(["GRPO", *(row["arm"] for row in rows)])
    return {arm: COLORS[index % len(COLORS)] for index, arm in enumerate(arms)}


def _record(run: Mapping[str, Any], path: str | Path) -> RunRecord:
    """Lines and branches of a run: a branch begins where the policy step does not grow."""
    policy = run["policy_step"]
    if not policy:
        raise ValueError(f"{path} holds a run without steps: {run['arm']}, seed {run['seed']}.")
    branches = np.cumsum(np.diff(policy, prepend=policy[0] - 1) < 1).tolist()
    columns = zip(branches, policy, run["compute_step"], run["pass_rate"], run["entropy"], strict=True)
    lines = [dict(zip(["branch", "policy_step", "compute_step", *CURVES], values, strict=True)) for values in columns]
    firsts = {line["branch"]: line["policy_step"] for line in reversed(lines)}
    return RunRecord(lines, [{"event": "segment", "branch": b, "start": step - 1} for b, step in firsts.items()])


def _averages(records: Sequence[RunRecord], name: str, clock: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps that all seeds have, and their moving averages there, seeds × steps."""
    kept = [record.kept() if clock == "policy_step" else np.full(len(record.lines), True) for record in records]
    steps = [record.values(clock)[keep] for record, keep in zip(records, kept, strict=True)]
    common = reduce(np.intersect1d, steps)
    averages = [record.average(name)[keep] for record, keep in zip(records, kept, strict=True)]
    return common, np.stack([values[np.isin(own, common)] for values, own in zip(averages, steps, strict=True)])


def _interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean with its 95 % t interval; NaN for the ends where one value has none."""
    if len(values) < 2 or not np.isfinite(values).all():
        return float(np.mean(values)), np.nan, np.nan
    found = mean_interval(values)
    return found.value, found.low, found.high


def _draw_rollbacks(axes: Axes, places: Mapping[str, set[int]], colors: Mapping[str, str]) -> None:
    """Dashed lines; the dashes of arms that roll back at one step take turns."""
    for place in sorted(set().union(*places.values())):
        sharing = [arm for arm in places if place in places[arm]]
        for index, arm in enumerate(sharing):
            dashes = (4 * index, (4, 4 * max(len(sharing) - 1, 1)))
            axes.axvline(place, color=colors[arm], lw=1.0, ls=dashes, zorder=1, label=f"{arm}, roll-back")


def _draw_rows(axes: Axes, rows: Mapping[str, Mapping[str, Any] | None], colors: Mapping[str, str]) -> None:
    """A value with its interval and its seeds per row, the first row at the top."""
    names = list(rows)
    for place, row in enumerate(rows.values()):
        if row is None or row["value"] is None:
            axes.text(0.5, place, "undefined", transform=axes.get_yaxis_transform(), ha="center", va="center")
            continue
        color = colors[row["arm"]]
        seeds = [value for value in row["per_seed"] if value is not None]
        if len(seeds) < len(row["per_seed"]):
            names[place] += f"\n({len(seeds)} of {len(row['per_seed'])} seeds)"
        axes.plot(seeds, [place + 0.22] * len(seeds), color=color, marker="o", label=f"{row['arm']}, seeds", **SEED)
        if row["low"] is not None:
            axes.hlines(place, row["low"], row["high"], color, lw=1.4)
        axes.plot(row["value"], place, color=color, marker="o", ms=6, label=row["arm"], **MEAN)
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def _guided(path: str | Path, content: Mapping[str, Any]) -> pd.DataFrame:
    """Guided arms with kind, name, axis tick and rank of their source; the last checkpoint of all is the run's end."""
    arms = pd.DataFrame([arm for arm in _entries(path, "arms", content) if arm["mode"] is not None])
    if arms.empty:
        raise ValueError(f"{path} holds no guided arm, only unguided ones.")
    arms["distance"] = pd.to_numeric(arms["distance"])
    last = (arms["origin"] + arms["distance"]).max()
    rows = []
    for origin, source, distance in arms[["origin", "source", "distance"]].itertuples(index=False):
        if np.isnan(distance):
            rows.append((source, SOURCES[source][0] if source in SOURCES else source, f"{source}\n", np.inf))
        elif distance == 0:
            rows.append((RESAMPLE, SOURCES[RESAMPLE][0], "0\nown", 0))
        elif origin + distance == last:
            rows.append(("far", "end of the run", f"{distance:g}\nend", last))
        else:
            rows.append(("distance", f"Δ = {distance:g}", f"{distance:g}\n", distance))
    arms[["kind", "name", "tick", "rank"]] = rows
    return arms


def _draw_gains(
    axes: Axes, places: np.ndarray | float, center: float, gains: np.ndarray, name: str, look: Mapping[str, Any]
) -> None:
    """Seeds at their places, and their mean with its t interval at the center."""
    mean, low, high = _interval(gains)
    seeds = {"color": look["color"], "marker": look["marker"], "label": f"{name}, seeds"}
    axes.plot(np.broadcast_to(places, len(gains)), gains, **seeds, **SEED)
    axes.vlines(center, low, high, look["color"], lw=1.2)
    axes.plot(center, mean, label=name, **MEAN, **look)


def _seed_marks(mean: str) -> list[Line2D]:
    bar = {"ls": "", "marker": "|", "ms": 9, "mew": 1.2}
    return [
        Line2D([], [], color=GREY, label=f"{mean}: 95 % t interval", **bar),
        Line2D([], [], color=GREY, label="single seed (small)", marker="o", **SEED),
    ]


def _legend_of_rows(figure: Figure, reference: str) -> None:
    marks = [
        Line2D([], [], color=GREY, marker="o", ms=6, label="mean over seeds", **MEAN),
        Line2D([], [], color=GREY, lw=1.4, label="95 % interval over seeds"),
        Line2D([], [], color=GREY, marker="o", label="single seed", **SEED),
        Line2D([], [], color=GREY, lw=1.0, ls="--", label=reference),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=4, frameon=False)
