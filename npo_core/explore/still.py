"""What the page shows without JavaScript: a figure of the run's course and a sentence."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 760, 150
LEFT, TOP, BOTTOM = 40, 12, 24


def still_figure(runs: Sequence[Mapping[str, Any]]) -> str:
    """Pass rate over compute steps of each run, as SVG, with a sentence on each run; text escaped."""
    length = max((line["c"] for run in runs for line in run["lines"]), default=1)
    wide, high = WIDTH - LEFT - 10, HEIGHT - TOP - BOTTOM
    curves, words = [], []
    for number, run in enumerate(runs):
        points = [(line["c"], line.get("p", line.get("r"))) for line in run["lines"]]
        known = [(c, value) for c, value in points if value is not None]
        places = " ".join(
            f"{LEFT + wide * c / length:.1f},{TOP + high * (1 - min(max(v, 0), 1)):.1f}" for c, v in known
        )
        dash = ' stroke-dasharray="5 3"' if number else ""
        curves.append(f'<polyline points="{places}" fill="none" stroke="currentColor"{dash}/>')
        words.append(sentence(run))
    ticks = "".join(
        f'<text x="{LEFT - 6}" y="{TOP + high * (1 - value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        for value in (0, 0.5, 1)
    )
    axis = (
        f'<line x1="{LEFT}" y1="{TOP + high}" x2="{LEFT + wide}" y2="{TOP + high}" stroke="currentColor"/>'
        f'<text x="{LEFT + wide}" y="{HEIGHT - 6}" text-anchor="end">compute step {length}</text>'
    )
    label = html.escape(" ".join(words), quote=True)
    return (
        f'<figure class="still"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{axis}{ticks}'
        f"{''.join(curves)}</svg><figcaption>Pass rate over compute steps. {html.escape(' '.join(words))} "
        "The explorer itself needs JavaScript.</figcaption></figure>"
    )


def sentence(run: Mapping[str, Any]) -> str:
    """What a run was, in words."""
    steps = max((line["c"] for line in run["lines"]), default=0)
    back = sum(event["event"] == "rollback" for event in run["events"])
    guides = sum(line.get("k", 0) for line in run["lines"])
    text = f"{run['name']}: {steps} compute steps, {back} roll-back{'' if back == 1 else 's'}, {guides:.0f} guides."
    if {"base", "final"} <= run["scores"].keys():
        text += f" Test pass rate {run['scores']['base']:.3f} before, {run['scores']['final']:.3f} after."
    return text
