"""The third clock of a run: what it has learnt over all rollouts that it has sampled, those off line included."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..files import read_json
from ..runs.folder import offline_rollouts
from .curves import CURVES
from .record import AVERAGE_WEIGHT, RunRecord
from .style import GREY, WIDTH, arm_looks, canvas, settle, style


def rollout_curves(runs: Mapping[str, str | Path]) -> Figure:
    """On-policy pass rate of some runs over all rollouts, those of training and those off line (ours).

    Off-line rollouts are jumps to the right: nothing is learnt while they are sampled.

    Args:
        runs: Run folders by the label of the legend.

    Raises:
        ValueError: No run, or a folder without metric lines.
    """
    if not runs:
        raise ValueError("runs is empty; give at least one run folder with its label.")
    looks = arm_looks(list(runs))
    with style():
        figure, ((axes,),) = canvas(1, 1, (WIDTH, 3.2))
        for label, folder in runs.items():
            record, color = RunRecord.read(folder), looks[label][0]
            spent = rollouts_spent(record, Path(folder))
            axes.plot(spent, record.values("npo/pass_rate"), color=color, lw=0.7, alpha=0.35)
            axes.plot(spent, record.average("npo/pass_rate"), color=color, lw=1.8, label=label)
        axes.set_xlabel("rollouts in all (training and off line)")
        axes.set_ylabel(CURVES["npo/pass_rate"])
        handles, labels = axes.get_legend_handles_labels()
        handles += [Line2D([], [], color=GREY, lw=0.7, alpha=0.5), Line2D([], [], color=GREY, lw=1.8)]
        labels += ["single step", f"moving average (weight {AVERAGE_WEIGHT})"]
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False)
    return settle(figure)


def rollouts_spent(record: RunRecord, folder: Path) -> np.ndarray:
    """Rollouts that a run has sampled in all when each of its lines is written.

    Args:
        record: Lines and events of the run.
        folder: Run folder, whose `config.json` tells how many rollouts a step takes.
    """
    config = read_json(folder / "config.json")
    steps = record.values("compute_step")
    offline = np.array([offline_rollouts(record.events, before=step) for step in steps])
    return steps * config["prompts_per_step"] * config["num_generations"] + offline
