"""The study in one figure: what one tries first, guidance by the near future and its controls, on three clocks (ours).

Every difference is paired by seed; `evidence.py` draws all arms, each with what it is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..study.clocks import paired, reference
from ..study.comparisons import BROKEN, broken
from ..study.families import FIRST_TRIED, GUIDED, REFERENCES
from ..study.results import Evidence
from .estimates import interval, reference_note, require_arms, signed
from .style import ARM_LOOKS, GREY, MEAN, SEED, WIDTH, canvas, settle, style

BLOCKS: Sequence[Mapping[str, str]] = (
    {arm: arm for arm in FIRST_TRIED},
    {arm: arm for arm in ("NPO early", "NPO, first steps", "NPO late")},
    {"NPO": "NPO, early and late", "NPO, own resample": "own resample", "NPO, no guide": "no guide"},
    {
        "NPO, repeated": "NPO, every 80 steps",
        "NPO, repeated, own": "own resample",
        "NPO, no roll-back": "own, no roll-back",
    },
    {"AutoNPO": "AutoNPO", "AutoNPO, own resample": "own resample", "AutoNPO, no guide": "no guide"},
)
"""Arms by what a reader compares, with their names: GRPO with another setting; guided arms above their controls."""
TITLES = {
    "policy": "at equal policy step\n(the paper's clock)",
    "compute": "at equal\ncompute steps",
    "rollouts": "at equal total rollouts\n(off-line ones included)",
}
KINDS = {"GRPO, another setting": "s", "guided by the near future": "o", "control of the arm above": "D"}
"""Marker of a kind of arm: tried first, guided, control; the face of the last is white."""
GAP = 0.5
"""Space between two blocks, in rows."""
FAR, SHARE = 3.0, 80
"""Multiple of this percentile of the differences beyond which a seed is written at the edge: beside a broken run
the others could not be told apart."""
ROOM = 1.25
"""How far the axis goes beyond the farthest of the other seeds; an interval that is longer is cut off there."""
EDGE = 0.96
"""Where a seed beyond the axis is drawn, as a share of the way to its end."""


def findings(evidence: Evidence) -> Figure:
    """Test pass rate minus the reference's, a panel per clock: baselines, guided arms and their controls.

    Seeds are points; from two on their mean stands beside them with its 95 % t interval over seeds. A seed whose run
    ended with hardly anything right is a cross.

    Args:
        evidence: Results of the study; of the arms those that it holds are drawn.

    Raises:
        ValueError: There is no GRPO, or none of the arms.
    """
    require_arms(evidence, "GRPO")
    blocks = [{arm: name for arm, name in block.items() if arm in evidence.arms} for block in BLOCKS]
    names = {arm: name for block in blocks for arm, name in block.items()}
    if not names:
        raise ValueError("The evidence holds no arm of this figure; `python -m npo_core study` runs what is missing.")
    found = {clock: {arm: _by_seed(evidence, arm, clock) for arm in names} for clock in TITLES}
    places, place = {}, 0.0
    for block in filter(None, blocks):
        places |= {arm: place + index for index, arm in enumerate(block)}
        place += len(block) + GAP
    limit, broke = _limit(found), broken(evidence)
    with style():
        figure, grid = canvas(1, len(TITLES), (WIDTH, 1.7 + 0.2 * place), sharex=True, sharey=True)
        for axes, (clock, title) in zip(grid[0], TITLES.items(), strict=True):
            for arm in names:
                _draw_arm(axes, places[arm], found[clock][arm], arm, limit, broke.get(arm, []))
            axes.axvline(0, color=GREY, lw=1.0, ls="--", zorder=1)
            axes.set_title(title)
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
        first, middle = grid[0, :2]
        first.set_xlim(-limit, limit)
        first.set_ylim(place - GAP - 0.4, -0.9)
        first.set_yticks(list(places.values()), list(names.values()))
        for label, arm in zip(first.get_yticklabels(), names, strict=True):
            label.set_fontweight("bold" if arm in GUIDED else "normal")
        note = reference_note(evidence, list(names), 56)
        middle.set_xlabel(
            f"test pass rate minus that of GRPO (fraction, mean over suites); {_seeds(evidence, broke)}{note}"
        )
        marks = _marks(names, found, broke)
        figure.legend(handles=marks, loc="outside lower center", ncols=3, frameon=False)
    return settle(figure)


def _by_seed(evidence: Evidence, arm: str, clock: str) -> dict[int, float]:
    """Difference to the clock's reference by seed; none where the results hold no reference but the arm itself."""
    if not set(REFERENCES[clock]) & set(evidence.arms) - {arm}:
        return {}
    own, other = paired(evidence, arm, reference(evidence, arm, clock), clock)
    return {int(seed): float(value) for seed, value in (own - other).dropna().items()}


def _limit(found: Mapping[str, Mapping[str, Mapping[int, float]]]) -> float:
    """End of the axis on both sides: beyond every seed that is not far from the others."""
    sizes = np.abs([value for rows in found.values() for row in rows.values() for value in row.values()] or [0.0])
    near = sizes[sizes <= FAR * np.percentile(sizes, SHARE)]
    return ROOM * float(near.max()) or 0.01


def _kind(arm: str) -> str:
    first, guided, control = KINDS
    return first if arm in FIRST_TRIED else guided if arm in GUIDED else control


def _look(kind: str, color: str) -> dict[str, Any]:
    """Look of the mean of an arm, and of its only seed."""
    face = {"mfc": "white", "mec": color, "mew": 1.3} if kind == [*KINDS][-1] else {}
    return {**MEAN, "ms": 5.5, "color": color, "marker": KINDS[kind], **face}


def _draw_arm(
    axes: Axes, place: float, values: Mapping[int, float], arm: str, limit: float, broke: Sequence[int]
) -> None:
    """Seeds, from two on their mean with its interval; in numbers what lies beyond the axis."""
    look = _look(_kind(arm), ARM_LOOKS[arm][0])
    mean, low, high = interval(np.array(list(values.values())))
    several = len(values) > 1
    for seed, value in values.items():
        own = {**look, **SEED, "ms": 3.5, "mec": look["color"], "mew": 0.8} if several else look
        own |= {"marker": "X", "mfc": look["color"], "ms": 5.5} if seed in broke else {}
        axes.plot(np.clip(value, -EDGE * limit, EDGE * limit), place, **own, label=f"{arm}, seed {seed}")
    if several:
        axes.hlines(place, max(low, -limit), min(high, limit), look["color"], lw=1.3, zorder=3)
    if several and abs(mean) < limit:
        axes.plot(mean, place, **look, label=arm)
    beyond = [value for value in values.values() if abs(value) > limit]
    if beyond:
        text = f"mean {signed(mean, 2)}" if abs(mean) > limit and several else " ".join(signed(v, 2) for v in beyond)
        below = sum(beyond) < 0
        where = {"transform": axes.get_yaxis_transform(), "ha": "left" if below else "right", "va": "center"}
        axes.text(0.02 if below else 0.98, place - 0.48, text, **where)  # a mark may lie on the row


def _seeds(evidence: Evidence, broke: Mapping[str, Sequence[int]]) -> str:
    seeds = evidence.about["seeds"]
    lost = f"\nGRPO broke on seed {', '.join(map(str, broke['GRPO']))}" if broke.get("GRPO") else ""
    if len(seeds) == 1:
        return f"one seed ({seeds[0]}), no interval{lost}"
    return f"{len(seeds)} seeds ({', '.join(map(str, seeds))}){lost}"


def _marks(
    names: Mapping[str, str],
    found: Mapping[str, Mapping[str, Mapping[int, float]]],
    broke: Mapping[str, Sequence[int]],
) -> list[Line2D]:
    shown = {_kind(arm) for arm in names}
    marks = [Line2D([], [], **_look(kind, GREY), label=kind) for kind in KINDS if kind in shown]
    rows = [(arm, row) for panel in found.values() for arm, row in panel.items()]
    if any(len(row) > 1 for _, row in rows):
        marks.append(Line2D([], [], color=GREY, lw=1.3, label="95 % t interval over seeds"))
        marks.append(Line2D([], [], color=GREY, marker="o", label="single seed", **SEED | {"ms": 3.5}))
    if any(seed in broke.get(arm, []) for arm, row in rows for seed in row):
        marks.append(
            Line2D(
                [],
                [],
                color=GREY,
                marker="X",
                label=f"run that broke (pass rate < {100 * BROKEN:g} %)",
                **MEAN,
            )
        )
    return marks
