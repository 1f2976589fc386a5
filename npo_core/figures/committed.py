"""The figures of the study that are committed, drawn again from its results in seconds."""

from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from ..study.findings import paper_table
from ..study.results import ABOUT, CORNER, MAP, read_evidence
from .evidence import arm_differences, controls, correction_ablation, training_with_interventions
from .grids import gain_map, suite_table
from .signal import proxy_agreement, quality_stability, signal_curves
from .study import final_differences, gain_against_signal, gain_over_distance, learning_curves, speed_up
from .style import save_figure

FROM_FILE = {
    "npo_learning_curves": ("interventions.json", learning_curves),
    "npo_speed_up": ("interventions.json", speed_up),
    "npo_differences": ("interventions.json", final_differences),
    "gain_signal": ("gain.json", gain_against_signal),
    "gain_distance": ("gain.json", gain_over_distance),
}
"""Name of a figure to its results file and the function that draws it."""

FROM_MEASUREMENT = {
    "signal_curves": signal_curves,
    "signal_curves_1": partial(signal_curves, quality="quality_1"),
    "signal_plane": quality_stability,
    "signal_proxies": proxy_agreement,
}
"""Name of a figure to the function that draws it from the first seed's measurement."""

FROM_EVIDENCE = {
    "evidence_differences": arm_differences,
    "evidence_training": training_with_interventions,
    "evidence_correction": correction_ablation,
    "evidence_controls": controls,
}
"""Name of a figure to the function that draws it from the evidence study."""


def draw_study(results: str | Path, target: str | Path) -> list[Path]:
    """Draw every figure of the studies and save it as PNG and SVG.

    Args:
        results: Folder that `python -m npo_core signal-study` made; where it holds results of the evidence study too,
            their figures are drawn with the others.
        target: Folder of the figures.

    Returns:
        Paths of the PNGs.

    Raises:
        FileNotFoundError: A results file is missing; nothing is drawn then.
        ResultsRefused: Results of the evidence study do not belong together.
    """
    results = Path(results)
    measurements = sorted(results.glob("signal-seed*"))
    missing = sorted({name for name, _ in FROM_FILE.values() if not (results / name).is_file()})
    if missing or not measurements:
        absent = [*missing, *([] if measurements else ["signal-seed*/"])]
        raise FileNotFoundError(
            f"{results} lacks {', '.join(absent)}; `python -m npo_core signal-study` makes the results."
        )
    figures = {name: draw(results / file) for name, (file, draw) in FROM_FILE.items()}
    figures |= {name: draw(measurements[0]) for name, draw in FROM_MEASUREMENT.items()}
    if (results / ABOUT).is_file():
        figures |= _evidence_figures(results)
    return [save_figure(figure, target, name)[0] for name, figure in figures.items()]


def _evidence_figures(results: Path) -> dict[str, Figure]:
    evidence = read_evidence(results)
    figures = {name: draw(evidence) for name, draw in FROM_EVIDENCE.items()}
    figures["evidence_suites"] = suite_table(evidence, paper_table().reset_index())
    if (results / MAP).is_file():
        figures["evidence_map"] = gain_map(pd.read_csv(results / MAP))
    if (results / CORNER / ABOUT).is_file():
        figures["evidence_corner"] = controls(read_evidence(results / CORNER))
    return figures
