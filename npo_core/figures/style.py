"""Look of all figures, in a context of its own, and how a figure is written to disk."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import seaborn
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ..files import write_whole

WIDTH = 7.0
"""Width of a full figure in inches."""
FONT = 8.0
"""Smallest font size in points."""
COLORS = seaborn.color_palette("colorblind").as_hex()
GREY = "0.35"
Look = tuple[str, str | tuple[int, tuple[int, ...]]]
"""Colour and line, the latter by name or as lengths of dashes and gaps."""
ARM_LOOKS: Mapping[str, Look] = {
    "GRPO": (COLORS[0], "-"),
    "GRPO, longer": (COLORS[0], "--"),
    "LUFFY": (COLORS[9], "-"),
    "LUFFY, base's form": (COLORS[9], "--"),
    "ExGRPO": (COLORS[7], "-"),
    "RLEP": (COLORS[5], "-"),
    "NPO early": (COLORS[1], "-"),
    "NPO late": (COLORS[2], "-"),
    "NPO": (COLORS[3], "-"),
    "AutoNPO": (COLORS[4], "-"),
    "NPO, exact ratio": (COLORS[2], "--"),
    "LUFFY, no correction": (COLORS[5], "--"),
    "NPO, own resample": (COLORS[7], "--"),
    "NPO, no guide": (COLORS[1], "--"),
    "NPO, random": (COLORS[4], "--"),
    "GRPO, groups of 16": (COLORS[0], ":"),
    "GRPO, entropy bonus": (COLORS[0], "-."),
    "GRPO, best rate": (COLORS[0], (0, (6, 1, 1, 1, 1, 1))),
    "NPO, first steps": (COLORS[1], ":"),
    "NPO, repeated": (COLORS[2], ":"),
    "NPO, prefix": (COLORS[3], ":"),
    "NPO, repeated, own": (COLORS[7], ":"),
    "NPO early, own resample": (COLORS[7], "-."),
    "NPO, no roll-back": (COLORS[9], ":"),
    "AutoNPO, own resample": (COLORS[4], ":"),
    "AutoNPO, no guide": (COLORS[4], "-."),
}
"""Colour and line of an arm, in every figure that draws it."""
SEED = {"ls": "", "ms": 4, "alpha": 0.8, "mec": "white", "mew": 0.5, "zorder": 3.5}
"""Look of a single seed."""
MEAN = {"ls": "", "mec": "black", "mew": 0.7, "zorder": 4}
"""Look of a mean over seeds."""
LAYOUT_PASSES = 2
"""Layouts of a figure until it is fixed; the second knows the sizes that the first gave."""


def arm_looks(labels: Sequence[str]) -> dict[str, Look]:
    """Colour and line of some runs: an arm's own, and for other labels the colours that none of the arms has here."""
    known = {label: ARM_LOOKS[label] for label in labels if label in ARM_LOOKS}
    free = [color for color in COLORS if color not in {color for color, _ in known.values()}]
    others = [label for label in labels if label not in known]
    found = known | {label: (free[place % len(free)], "-") for place, label in enumerate(others)}
    return {label: found[label] for label in labels}


def style() -> AbstractContextManager:
    """The settings that figures are drawn under; those of the session come back at the end of the context."""
    look = seaborn.axes_style("ticks", {"axes.grid": True, "grid.color": "0.9", "font.sans-serif": ["DejaVu Sans"]})
    sizes = dict.fromkeys(
        ["font.size", "axes.labelsize", "legend.fontsize", "xtick.labelsize", "ytick.labelsize"], FONT
    )
    sizes |= {"axes.titlesize": FONT + 1, "figure.titlesize": FONT + 1, "axes.linewidth": 0.8, "grid.linewidth": 0.6}
    return matplotlib.rc_context({**look, **sizes, "axes.formatter.useoffset": False, "svg.hashsalt": "npo_core"})


def canvas(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure and its axes, rows × columns. It is closed at once, or a notebook would show it twice."""
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    plt.close(figure)
    return figure, axes


def settle(figure: Figure) -> Figure:
    """Fix the layout of a finished figure: laid out anew at each save, it would move by fractions of a pixel."""
    with style():
        for _ in range(LAYOUT_PASSES):
            figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def save_figure(figure: Figure, folder: str | Path, name: str) -> tuple[Path, Path]:
    """Write a figure as PNG (200 dpi) and SVG, so that the same figure gives the same bytes.

    Args:
        figure: The figure.
        folder: Folder to write to; it is made if it is not there.
        name: File name without suffix.

    Returns:
        Paths of the PNG and of the SVG. Each is written under another name first and then renamed.
    """
    paths = Path(folder) / f"{name}.png", Path(folder) / f"{name}.svg"
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for path in paths:
        kind = path.suffix[1:]
        how = {"format": kind, "dpi": 200, "metadata": {"Date": None} if kind == "svg" else None}
        with style():
            write_whole(path, partial(figure.savefig, **how))
    return paths
