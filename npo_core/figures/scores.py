"""What decisions and policies are judged by: the signal over distances, and pass rates per suite."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..runs.validation import SUITES
from .record import RunRecord
from .style import COLORS, GREY, WIDTH, arm_looks, canvas, settle, style

LOG_RANGE = 20.0
"""Ratio of the largest to the smallest V̂ from which its axis is logarithmic."""


def intervention_signals(run: str | Path) -> Figure:
    """Q̂, V̂ and Ŝ over the candidate distances, a column per intervention (paper: Figure 2b and c).

    Args:
        run: Run folder.

    Raises:
        ValueError: The run chose no distance.
    """
    record = RunRecord.read(run)
    choices = [choice for choice in record.of_kind("choice") if choice["candidates"]]
    if not choices:
        raise ValueError(f"{run} had no intervention: its events hold no choice of a distance.")
    dismissed = {event["compute_step"] for event in record.of_kind("dismissed")}
    panels = {
        "quality": "quality $\\hat{Q}$\n(pass rate on failures)",
        "variance": "variance cost $\\hat{V}$\n(on-policy = 1)",
        "signal": "signal\n$\\hat{S} = \\hat{Q}\\,/\\,\\hat{V}$",
    }
    costs = [candidate["variance"] for choice in choices for candidate in choice["candidates"]]
    with style():
        width = min(WIDTH, 1.6 + 2.2 * len(choices))
        figure, grid = canvas(3, len(choices), (width, 5.2), sharex="col", sharey="row")
        for column, choice in zip(grid.T, choices, strict=True):
            distances = [candidate["distance"] for candidate in choice["candidates"]]
            for axes, name, color in zip(column, panels, COLORS, strict=False):
                values = [candidate[name] for candidate in choice["candidates"]]
                axes.plot(distances, values, "o-", color=color, ms=4, lw=1.4, label=name)
                # a quality of 0 that nobody measured must not look like a measured one
                empty = (
                    [] if name == "variance" else [i for i, c in enumerate(choice["candidates"]) if not c["prompts"]]
                )
                if empty:
                    x, y = [distances[i] for i in empty], [values[i] for i in empty]
                    axes.plot(x, y, "o", ms=4, color=color, mfc="white", zorder=3, label=f"{name}, not probed")
                axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
                if name == "variance" and max(costs) > LOG_RANGE * min(costs):
                    axes.set_yscale("log")
                    axes.yaxis.set_major_formatter("{x:g}")
            column[-1].set_xlabel("distance Δ (policy steps)")
            state = ", dismissed" if choice["compute_step"] in dismissed else ""
            column[0].set_title(f"policy step {choice['policy_step']}{state}", pad=18)
            if choice["chosen"] is not None:
                text = f"Δ* = {choice['chosen']}{' (edge)' if choice['at_edge'] else ''}"
                for axes in column:
                    axes.axvline(choice["chosen"], color=GREY, ls="--", lw=1.2, label=text)
                # beside the line where a centred label would leave the panel
                share = (choice["chosen"] - min(distances)) / max(max(distances) - min(distances), 1)
                side = "left" if share < 0.25 else "right" if share > 0.75 else "center"
                place = column[0].get_xaxis_transform()
                column[0].text(choice["chosen"], 1.03, text, transform=place, ha=side, va="bottom", color=GREY)
        for axes, label in zip(grid[:, 0], panels.values(), strict=True):
            axes.set_ylabel(label)
        marks = {
            "saved checkpoint": Line2D([], [], color=GREY, marker="o", ms=4, lw=1.4),
            "chosen Δ*": Line2D([], [], color=GREY, ls="--", lw=1.2),
        }
        if any(not candidate["prompts"] for choice in choices for candidate in choice["candidates"]):
            marks["no failure since then was probed"] = Line2D([], [], color=GREY, marker="o", ms=4, ls="", mfc="white")
        columns = 2 if len(choices) == 1 else 3
        figure.legend(marks.values(), marks, loc="outside lower center", ncols=columns, frameon=False)
    return settle(figure)


def suite_pass_rates(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Pass rate per suite and on average, a bar per policy (paper: Table 1).

    Args:
        results: Scores by label, each as `base` or `final` of a `result.json`: `average`, `suites` and, to be drawn as
            error bars, `interval` and `suite_intervals`.

    Raises:
        ValueError: No scores.
    """
    if not results:
        raise ValueError("results is empty; give the scores of at least one policy with its label.")
    found = {suite for scores in results.values() for suite in scores["suites"]}
    suites = [*(suite for suite in SUITES if suite in found), *sorted(found - set(SUITES))]
    places = {"average": 0.0} | {suite: 1.3 + index for index, suite in enumerate(suites)}
    width, looks = 0.8 / len(results), arm_looks(list(results))
    with style():
        figure, ((axes,),) = canvas(1, 1, (WIDTH, 3.4))
        for index, (label, scores) in enumerate(results.items()):
            rates = {"average": scores["average"], **scores["suites"]}
            limits = {"average": scores.get("interval"), **scores.get("suite_intervals", {})}
            x = {name: places[name] + (index - (len(results) - 1) / 2) * width for name in places if name in rates}
            heights = [rates[name] for name in x]
            axes.bar(x.values(), heights, width * 0.94, color=looks[label][0], label=label)
            for name in (name for name in x if limits.get(name) is not None):
                around = [[max(rates[name] - limits[name][0], 0.0)], [max(limits[name][1] - rates[name], 0.0)]]
                axes.errorbar(x[name], rates[name], around, fmt="none", ecolor="black", elinewidth=0.9, capsize=2)
        axes.axvline(0.65, color=GREY, lw=0.8)
        axes.set_xticks(list(places.values()), list(places), rotation=30, ha="right", rotation_mode="anchor")
        axes.set_ylabel("pass rate (fraction)")
        axes.grid(visible=False, axis="x")
        handles, labels = axes.get_legend_handles_labels()
        if any(scores.get("interval") or scores.get("suite_intervals") for scores in results.values()):
            handles.append(Line2D([], [], color="black", ls="", marker="|", ms=9, mew=0.9))
            labels.append("95 % interval over test items")
        figure.legend(handles, labels, loc="outside upper center", ncols=min(5, len(labels)), frameon=False)
    return settle(figure)
