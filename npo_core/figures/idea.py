"""The method as one picture: an all-wrong group, and the same group with a guide from the near future in its last slot.

Nothing is measured here; the advantages are those of `method.groups`.
"""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from ..method.groups import gate, group_advantages, pass_rate, place_guides
from .style import COLORS, GREY, WIDTH, canvas, settle, style

SLOTS = 8
"""Rollouts of a group (paper)."""
WRONG, GUIDE = COLORS[3], COLORS[1]
SIDE, GAP = 0.8, 0.2
"""Side of a square and space between two, in units of the axes."""


def guided_group() -> Figure:
    """A group of eight wrong rollouts before and after its last slot is taken by a correct one of a later policy."""
    wrong = torch.zeros(1, SLOTS, dtype=torch.bool)
    gated = gate(pass_rate(wrong), torch.ones(1, dtype=torch.bool))
    [(row, _)] = place_guides(gated, torch.ones(1, dtype=torch.int64), SLOTS).tolist()
    rewards = torch.zeros(1, SLOTS)
    before = group_advantages(rewards)[0].tolist()
    rewards[0, row] = 1.0
    after = group_advantages(rewards)[0].tolist()
    with style():
        figure, axes = canvas(1, 1, (WIDTH, 2.5))
        drawn = axes[0, 0]
        drawn.set(xlim=(-4.1, SLOTS + 3.5), ylim=(-3.1, 3.0), aspect="equal")
        drawn.axis("off")
        _run(drawn)
        _group(drawn, 0.2, "sampled by π(t):\nall wrong, nothing to learn", before, None)
        _group(drawn, -2.2, "last slot replaced:\na direction to go", after, row)
        drawn.annotate(
            "",
            (row + SIDE, -2.2 + SIDE / 2),
            (row + SIDE + 1.35, 1.8),
            arrowprops={"arrowstyle": "-|>", "color": GUIDE, "lw": 1.3, "connectionstyle": "arc3,rad=-0.25"},
        )
        drawn.text(row + SIDE + 1.75, -0.15, "guide, verified\nto be correct", ha="left", va="center", color=GREY)
    return settle(figure)


def _run(axes: Axes) -> None:
    """The training run on top: the policy that learns, and the later one of the same run that guides it."""
    height, now, later = 2.2, 2.4, SLOTS - GAP + 1.35
    axes.add_patch(FancyArrowPatch((0, height), (SLOTS + 2.9, height), arrowstyle="-|>", mutation_scale=9, color=GREY))
    axes.text(-0.25, height, "one training run", ha="right", va="center")
    for place, name, colour in ((now, "π(t)", "black"), (later, "π(t+Δ)", GUIDE)):
        axes.plot(place, height, "o", color=colour, ms=6, zorder=3)
        axes.text(place, height + 0.35, name, ha="center", va="bottom")
    ends = [(place, height - 0.32) for place in (later - 0.2, now + 0.2)]
    axes.annotate("", *ends, arrowprops={"arrowstyle": "<->", "color": GREY})
    axes.text((now + later) / 2, height - 0.42, "Δ steps: near", ha="center", va="top", color=GREY)


def _group(axes: Axes, bottom: float, name: str, advantages: list[float], guided: int | None) -> None:
    axes.text(-0.25, bottom + SIDE, name, ha="right", va="top", linespacing=1.1)
    for slot, advantage in enumerate(advantages):
        right = slot == guided
        colour = GUIDE if right else WRONG
        axes.add_patch(Rectangle((slot, bottom), SIDE, SIDE, facecolor=colour, alpha=0.9 if right else 0.35, lw=0))
        axes.text(slot + SIDE / 2, bottom + SIDE / 2, "✓" if right else "✗", ha="center", va="center", fontsize=11)
        text = f"{advantage:+.2f}".replace("-", "−") if advantage else "0"
        axes.text(slot + SIDE / 2, bottom - 0.12, text, ha="center", va="top")
    axes.text(-0.25, bottom - 0.12, "advantage", ha="right", va="top", color=GREY)
