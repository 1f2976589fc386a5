"""What a run folder tells the plots: metric lines on two clocks, and the events that hold."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_lines
from ..runs.folder import effective, metric_lines, moving_average

AVERAGE_WEIGHT = 0.9
"""Weight of the past in the moving averages; the trigger's default."""


@dataclass(frozen=True)
class RunRecord:
    """What the plots need of a run folder.

    Attributes:
        lines: Metric lines, in the order of `compute_step`.
        events: Events that hold, in the order they were written.
    """

    lines: list[dict[str, Any]]
    events: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: str | Path) -> "RunRecord":
        lines = metric_lines(Path(folder) / "metrics.jsonl")
        if not lines:
            raise ValueError(f"{folder} holds no metric lines; give the folder of a run that has made a step.")
        return cls(lines, effective(read_lines(Path(folder) / "events.jsonl")))

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    def values(self, name: str) -> np.ndarray:
        """A metric or clock over all lines; NaN where a line lacks it."""
        return np.array([line.get(name, np.nan) for line in self.lines], dtype=float)

    def kept(self) -> np.ndarray:
        """Which lines lie on the final trajectory: those that no later branch starts before."""
        starts = [(segment["branch"], segment["start"]) for segment in self.of_kind("segment")]
        return np.array(
            [
                all(line["policy_step"] <= start for branch, start in starts if branch > line["branch"])
                for line in self.lines
            ]
        )

    def average(self, name: str) -> np.ndarray:
        """Moving average of a metric over the steps behind each line."""
        return moving_average(self.lines, name, AVERAGE_WEIGHT)

    def replays(self) -> list[dict[str, tuple[float, float]]]:
        """Guided stretches that were executed: (from, to) on each clock."""
        spans = []
        for segment in self.of_kind("segment"):
            steps = [line["policy_step"] for line in self.lines if line["branch"] == segment["branch"]]
            if segment["guidance"] is None or not steps:
                continue
            start, moment = segment["start"], segment["compute_start"]
            length = min(segment["guide_until"], max(steps)) - start
            spans.append({"policy_step": (start, start + length), "compute_step": (moment, moment + length)})
        return spans
