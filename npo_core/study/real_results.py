"""Results of the evidence on the real model in `data/results/real/`: its arms, its files, and how they are read.

Plan and meaning: docs/evidence.md. `real.py` makes them; nothing here loads a policy, so verdicts and figures are made
in seconds. The plan's two endpoints are two tables: sampled pass rates at temperature 1, and the probability of the
right response, which is computed and not sampled.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..files import read_json
from .arms import Arm
from .findings import results_folder
from .results import Evidence, mixture_complaints, read_about, require_together

REAL_ARMS: Mapping[str, Arm] = {
    "GRPO": Arm("grpo", "on-policy rollouts alone", "baseline"),
    "GRPO, groups of 16": Arm("grpo", "twice the rollouts of each prompt, and as many in all as NPO early", "baseline",
                              {"num_generations": 16}, budget=2 / 3),
    "NPO early": Arm("npo", "scout, restart and guided window", "npo", {"late_step": 0, "late_start": 0}),
    "AutoNPO": Arm("autonpo", "interventions chosen by the run", "npo", {"checkpoint_keep": 5}),
    "NPO early, own resample": Arm("npo", "as NPO early, guide from the base policy itself", "control",
                                   {"late_step": 0, "late_start": 0, "guide_from": "own"}),
}  # fmt: skip
"""Arms in the order of tables. NPO early spends 60 steps of 64 rollouts and 1,280 off line: 40 steps of 128."""

SEEDS = (0, 1, 2)
"""Seeds of the plan."""

SCORES, EXACT, ABOUT, PREMISE, CLAIMS = "scores.csv", "exact.csv", "about.json", "premise.json", "claims.json"
"""Files of the results."""

PLAIN, COMPUTED = "plain", "computed"
"""How the scores of the two endpoints were sampled: as in training, and not at all."""


@dataclass(frozen=True)
class RealResults:
    """Results of the study of the real model.

    Attributes:
        pass_rate: Endpoint sampled at temperature 1: measure `pass_rate`, a row per checkpoint and word length.
        exact: Endpoint that is computed: measure `probability`, a row per checkpoint and word; GRPO's begin with the
            base policy, at step 0.
        premise: Content of `premise.json`, None while it is not measured.
    """

    pass_rate: Evidence
    exact: Evidence
    premise: Mapping[str, Any] | None

    @property
    def about(self) -> Mapping[str, Any]:
        """What made them: an entry a run."""
        return self.pass_rate.about

    @property
    def seeds(self) -> list[int]:
        """Seeds of the plan, and others that were run."""
        return sorted({*SEEDS, *(run["seed"] for run in self.about["runs"])})

    @property
    def arms(self) -> list[str]:
        """Arms with at least one run, in the order of tables."""
        there = {run["arm"] for run in self.about["runs"]}
        return [arm for arm in REAL_ARMS if arm in there]

    def lacking(self, arm: str) -> list[int]:
        """Seeds of which an arm has no run."""
        there = {run["seed"] for run in self.about["runs"] if run["arm"] == arm}
        return [seed for seed in self.seeds if seed not in there]

    @property
    def whole_seeds(self) -> list[int]:
        """Seeds that all arms have, in order."""
        return [seed for seed in self.seeds if not any(seed in self.lacking(arm) for arm in REAL_ARMS)]


def real_folder(given: str | Path | None = None) -> Path:
    """The given folder of results of the real model; if None, the project's `data/results/real`."""
    return results_folder() / "real" if given is None else Path(given)


def find_real(folder: str | Path) -> Path | None:
    """The results of the real model in a folder of results, or that folder if it is theirs; None if there are none."""
    places = (Path(folder) / "real", Path(folder))
    return next((place for place in places if (place / ABOUT).is_file()), None)


def read_real(folder: str | Path | None = None) -> RealResults:
    """The results, checked.

    Args:
        folder: Folder of the results; the project's `data/results/real` if None.

    Raises:
        FileNotFoundError: A file is missing.
        ResultsRefused: Of another version of the files, or runs that do not belong together.
    """
    folder = real_folder(folder)
    about = read_about(folder, (SCORES, EXACT, ABOUT), "real-study")
    require_together(mixture_complaints(about["runs"]))
    exact = pd.read_csv(folder / EXACT).assign(sampling=COMPUTED)
    premise = folder / PREMISE
    return RealResults(
        Evidence(pd.read_csv(folder / SCORES), pd.DataFrame(), about, PLAIN),
        Evidence(exact, pd.DataFrame(), about, COMPUTED),
        read_json(premise) if premise.is_file() else None,
    )
