"""Figures, drawn from run folders only: a plot needs the logs that a run left behind, never the engine that ran it.

Every function returns a closed matplotlib figure: a notebook shows it as the value of a cell, `save_figure` writes it.
Colours are seaborn's "colorblind" palette, and no text is smaller than 8 pt at a width of 7 inches.
"""

from .curves import plateau, training_curves
from .rollouts import group_before_after, sample_gallery
from .scores import intervention_signals, suite_pass_rates
from .style import save_figure

__all__ = [
    "group_before_after",
    "intervention_signals",
    "plateau",
    "sample_gallery",
    "save_figure",
    "suite_pass_rates",
    "training_curves",
]
