"""Figures, drawn from run folders, measurements and results files only, never with the engine that made them.

Every function returns a closed matplotlib figure: a notebook shows it as the value of a cell, `save_figure` writes it.
Colours are seaborn's "colorblind" palette, and no text is smaller than 8 pt at a width of 7 inches.
"""

from .benchmarks import benchmark_table
from .committed import draw_study
from .curves import plateau, rollout_curves, training_curves
from .distance import gain_over_distance
from .evidence import arm_differences, controls, correction_ablation, training_with_interventions
from .findings import findings
from .grids import gain_map, suite_table
from .idea import guided_group
from .real import real_arms
from .rollouts import group_before_after, sample_gallery
from .scores import intervention_signals, suite_pass_rates
from .signal import proxy_agreement, quality_stability, signal_curves
from .style import save_figure

__all__ = [
    "arm_differences",
    "benchmark_table",
    "controls",
    "correction_ablation",
    "draw_study",
    "findings",
    "gain_map",
    "gain_over_distance",
    "group_before_after",
    "guided_group",
    "intervention_signals",
    "plateau",
    "proxy_agreement",
    "quality_stability",
    "real_arms",
    "rollout_curves",
    "sample_gallery",
    "save_figure",
    "signal_curves",
    "suite_pass_rates",
    "suite_table",
    "training_curves",
    "training_with_interventions",
]
