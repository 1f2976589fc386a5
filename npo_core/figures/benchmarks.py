"""Real benchmark scores, the paper's Table 1 below them."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..runs.validation import SUITES
from ..study.findings import paper_table
from ..study.lmms_eval import AVERAGE, BASE, GAIN, LEVEL
from .estimates import signed
from .grids import _cell_text, _draw_cells, _legend_of_cells, in_two_lines, name_cells
from .style import WIDTH, canvas, settle, style

OTHER_QUESTIONS = {"zerobench": "† the paper's ZeroBench: 334 sub-questions, not the 100 main ones"}
"""Suites of which lmms-eval asks other questions than the paper, and how they differ."""


def benchmark_table(comparison: pd.DataFrame) -> Figure:
    """Gains over the base by model and suite, the paper's over its own base below (paper: Table 1).

    Args:
        comparison: Table of `study.lmms_eval.compare`.

    Raises:
        ValueError: The comparison has no base or no trained model.
    """
    labels = list(dict.fromkeys(comparison["label"]))
    if labels[:1] != [BASE] or len(labels) < 2:
        raise ValueError(f"The comparison holds {labels}; it must hold {BASE!r} first, then trained models.")
    paper = paper_table()
    names = dict(zip((AVERAGE, *SUITES), paper.columns, strict=True))
    suites = [suite for suite in names if suite in set(comparison["suite"])]
    theirs = paper[[names[suite] for suite in suites]].copy()
    if len(suites) < len(names):
        theirs["average"] = theirs.drop(columns="average").mean(axis=1)
    gains = (theirs - theirs.loc["Base"]).drop(index="Base").to_numpy(float)
    at = comparison.set_index(["label", "suite"])
    cells = np.array([[at.loc[(m, s), list(LEVEL if m == BASE else GAIN)] for s in suites] for m in labels], float)
    excludes = (cells[..., 1] > 0) | (cells[..., 2] < 0)
    excludes[0] = False
    # an interval of the bootstrap is not symmetric: half of its width is written
    cells[..., 2] = cells[..., 0] + (cells[..., 2] - cells[..., 1]) / 2
    ours_text = [[_cell_text(cell, absolute=i == 0) for cell in row] for i, row in enumerate(cells)]
    theirs_text = [[f"{v:.2f}" for v in theirs.loc["Base"]], *([signed(v, 2) for v in row] for row in gains)]
    marks = ["mean", *(in_two_lines(names[s]) + "†" * (s in OTHER_QUESTIONS) for s in suites[1:])]
    counts = [f"{text}\nn = {at.loc[(BASE, suite), 'items']}" for text, suite in zip(marks, suites, strict=True)]
    limit = comparison["limit"].iloc[0]
    subset = "" if np.isnan(limit) else f", first {limit:g} rows of a task only"
    titles = (
        f"By lmms-eval: gain over the base in points (percent){subset}",
        f"The paper: gain over its base in points (percent), one run, no intervals; mean of {len(suites) - 1} suites",
    )
    rows = [1.2 * len(labels), 0.9 * len(theirs)]
    with style():
        figure, grid = canvas(2, 1, (WIDTH, 1.8 + 0.3 * sum(rows)), gridspec_kw={"height_ratios": rows})
        for axes, values, texts, marked, ticks, models, title in (
            (grid[0, 0], cells[1:, :, 0], ours_text, excludes, counts, labels, titles[0]),
            (grid[1, 0], gains, theirs_text, np.zeros(theirs.shape, bool), marks, list(theirs.index), titles[1]),
        ):
            shades = _draw_cells(axes, np.vstack([np.full(len(suites), np.nan), values]), texts, marked)
            name_cells(axes, ticks, models, title)
            # a fixed number: an automatic one depends on the session's font, and moves the label
            figure.colorbar(shades, ax=axes, label="points", aspect=16, pad=0.01, ticks=MaxNLocator(4))
        other = [text for suite, text in OTHER_QUESTIONS.items() if suite in suites]
        numbers = "± half of the 95 % bootstrap interval over n items of one run; the two colour scales differ"
        _legend_of_cells(figure, "\n".join([numbers, *other]), [2])
    return settle(figure)
