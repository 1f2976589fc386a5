"""The figures that are committed: the idea, and those of the study, drawn again from its results in seconds."""

from pathlib import Path

from matplotlib.figure import Figure

from ..study.claims import signal_results
from ..study.findings import paper_table
from ..study.real_results import find_real, read_real
from ..study.results import find_tuned, has_evidence, has_map, read_evidence, read_map
from .distance import gain_over_distance
from .evidence import arm_differences, controls, correction_ablation, training_with_interventions
from .findings import findings
from .grids import gain_map, suite_table
from .idea import guided_group
from .real import real_arms
from .style import save_figure

FROM_EVIDENCE = {
    "findings": findings,
    "evidence_differences": arm_differences,
    "evidence_training": training_with_interventions,
    "evidence_correction": correction_ablation,
    "evidence_controls": controls,
}
"""Name of a figure to the function that draws it from the evidence study."""


def draw_study(results: str | Path, target: str | Path) -> list[Path]:
    """Draw the idea and, where there are results, every figure of the study; save them as PNG and SVG.

    Args:
        results: Folder that `python -m npo_core study` made, or one without a study; what lies beside the study is
            drawn too: the tuned regime, the signal over seeds, the map of the gain, the real
            model. The folder of `real-study --out` too.
        target: Folder of the figures.

    Returns:
        Paths of the PNGs.

    Raises:
        FileNotFoundError: A results file is missing; nothing is drawn then.
        ResultsRefused: The results do not belong together.
    """
    results = Path(results)
    figures = {"idea": guided_group()}
    if has_evidence(results):
        figures |= _of_study(results)
    if (real := find_real(results)) is not None:
        figures["real_arms"] = real_arms(read_real(real))
    return [save_figure(figure, target, name)[0] for name, figure in figures.items()]


def _of_study(results: Path) -> dict[str, Figure]:
    evidence = read_evidence(results)
    figures = {name: draw(evidence) for name, draw in FROM_EVIDENCE.items()}
    figures["evidence_suites"] = suite_table(evidence, paper_table().reset_index())
    if has_map(results):
        figures["evidence_map"] = gain_map(read_map(results))
    if (signal := signal_results(results)) is not None:
        figures["signal"] = gain_over_distance(signal)
    if (tuned := find_tuned(results)) is not None:
        figures["findings_tuned"] = findings(read_evidence(tuned))
    return figures
