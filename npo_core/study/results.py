"""Results of the evidence study in `data/results/`: read them, and refuse what does not belong together.

Three files: `evidence.csv` (test scores: arm, seed, both clocks, sampling, suite, pass rates),
`evidence_training.parquet` (a line per executed step of every run) and `evidence.json` (what made them: the
configuration of every run, versions, failures). A comparison rests on whole cells: every arm with every seed, once,
made with one configuration and one set of versions of Python, packages and device. The revision of this code may
differ, since a study outlives a change of a document; `Evidence.revisions` counts them, and `make claims` prints them.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..files import read_json
from ..runs.folder import deciding
from ..runs.validation import SUITES, WORLD
from .arms import ARMS
from .findings import SCHEMA, results_folder

SCORES, TRAINING, ABOUT = "evidence.csv", "evidence_training.parquet", "evidence.json"
"""File names in the folder of results."""
MAP, MAP_ABOUT = "map.csv", "map.json"
"""There too: the map of the gain, and what made it."""
TUNED = "cpu_tuned"
"""There too: the folder of the study in the tuned regime, named as its preset."""
MAP_COLUMNS = (
    *("learning_rate", "distance", "seed", "base", "grpo", "npo", "difference", "rollouts", "grpo_rollouts"),
    *("guide_solves", "own_solves", "lead"),
)
"""Columns of the map's table."""

SCORE_COLUMNS = (
    "arm", "seed", "policy_step", "compute_step", "final", "sampling", "suite", "pass_rate", "pass_at_4", "pass_at_8",
    "entropy", "all_wrong_groups", "interventions", "rollouts",
)  # fmt: skip
"""Columns of the scores; entropy and all-wrong groups are means over the 20 compute steps before, `rollouts` counts all
that were spent by then, off-line ones too."""

SAMPLINGS = ("paper", "plain")
"""How test responses are sampled: as the paper evaluates (temperature 0.7, top-p 0.8, top-k 20), and as in training."""


class ResultsRefused(ValueError):
    """Results with missing or repeated cells, or of mixed configurations or versions."""


@dataclass(frozen=True)
class Evidence:
    """Results of the study.

    Attributes:
        scores: Test scores, columns `SCORE_COLUMNS`.
        training: Lines of training: arm, seed, branch, both clocks, on-policy metrics.
        about: Configurations, versions, failures, seeds and arms.
        compared: Of the scores, the sampling that clocks compare: the paper's, but with the real model.
    """

    scores: pd.DataFrame
    training: pd.DataFrame
    about: Mapping[str, Any]
    compared: str = SAMPLINGS[0]

    @property
    def arms(self) -> list[str]:
        """Arms in the order of tables."""
        return [arm for arm in ARMS if arm in self.about["arms"]]

    @property
    def failed(self) -> dict[str, list[int]]:
        """Seeds that crashed or gave NaN, by arm; they are reported, and left out of means."""
        found: dict[str, list[int]] = {}
        for entry in self.about["failed"]:
            found.setdefault(entry["arm"], []).append(entry["seed"])
        return found

    @property
    def same(self) -> list[str]:
        """Arms that are GRPO itself with these settings, and that were not run once more."""
        return list(self.about.get("same", ()))

    @property
    def revisions(self) -> dict[str, int]:
        """Runs by the revision of this code that made them."""
        return dict(Counter(str(run["git_revision"]) for run in self.about["runs"]))

    def finals(self, sampling: str = "paper", column: str = "pass_rate") -> pd.DataFrame:
        """Score at the end of each run, mean over suites: a row per seed, a column per arm."""
        chosen = self.scores[(self.scores["sampling"] == sampling) & self.scores["final"]]
        return chosen.pivot_table(index="seed", columns="arm", values=column, aggfunc="mean").reindex(
            columns=self.arms, index=self.about["seeds"]
        )


def has_evidence(folder: Path | None = None) -> bool:
    """Whether results of a study lie in a folder; the project's `data/results` if None."""
    return (results_folder(folder) / ABOUT).is_file()


def find_tuned(folder: str | Path | None = None) -> Path | None:
    """Folder of the study in the tuned regime, beside the results in a folder; None if there is none."""
    place = results_folder(folder) / TUNED
    return place if has_evidence(place) else None


def read_evidence(folder: str | Path | None = None) -> Evidence:
    """The results of the study, checked.

    Args:
        folder: Folder of the results; the project's `data/results` if None.

    Raises:
        FileNotFoundError: A file is missing.
        ResultsRefused: See `check_evidence`.
    """
    folder = results_folder(folder or None)
    stage = f"study --preset {TUNED}" if folder.name == TUNED else "study"
    about = read_about(folder, (SCORES, TRAINING, ABOUT), stage)
    require_world(about, folder / ABOUT)
    scores = pd.read_csv(folder / SCORES)
    check_evidence(scores, about)
    return Evidence(scores, pd.read_parquet(folder / TRAINING), about)


def read_about(folder: Path, names: Sequence[str], stage: str) -> dict[str, Any]:
    """What made the results in a folder: the last of their files, which must all be there.

    Raises:
        FileNotFoundError: A file is missing; the message names the stage of the command line that makes it.
        ResultsRefused: Of another version of the files.
    """
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; `python -m npo_core {stage}` makes them.")
    path = folder / names[-1]
    about = read_json(path)
    if about.get("schema") != SCHEMA:
        raise ResultsRefused(f"{path} has schema {about.get('schema')}; this version reads {SCHEMA}.")
    return about


def require_world(about: Mapping[str, Any], path: Path) -> None:
    """Refuse results that another small world gave: its pass rates mean something else.

    Args:
        about: What the file says of itself; "world" names the world since there are two.
        path: The file, for the message.

    Raises:
        ResultsRefused: Another world, or none named, as in results of the first world.
    """
    found = about.get("world", "the first one, which had no name")
    if found != WORLD:
        raise ResultsRefused(
            f"{path} is of another small world ({found}); this version compares results of the world {WORLD!r} alone. "
            "Make them again, or read them with the version that made them."
        )


def check_evidence(scores: pd.DataFrame, about: Mapping[str, Any]) -> None:
    """Refuse results whose cells do not belong together.

    Raises:
        ResultsRefused: Columns are missing; a cell (arm, seed) is missing that is not reported as failed, or there
            twice; configurations or versions are mixed. The message lists them.
    """
    absent = [name for name in SCORE_COLUMNS if name not in scores.columns]
    if absent:
        raise ResultsRefused(f"{SCORES} lacks the columns {', '.join(absent)}.")
    require_together([*_cell_complaints(scores, about), *mixture_complaints(about["runs"])])


def require_together(complaints: Sequence[str]) -> None:
    """Refuse results of which there are complaints, and list them."""
    if complaints:
        raise ResultsRefused("The results do not belong together:\n" + "\n".join(f"- {line}" for line in complaints))


def _cell_complaints(scores: pd.DataFrame, about: Mapping[str, Any]) -> list[str]:
    wanted = {(arm, seed) for arm in about["arms"] for seed in about["seeds"]}
    failed = {(entry["arm"], entry["seed"]) for entry in about["failed"]}
    suites = about.get("suites", SUITES)
    finals = scores[scores["final"]]
    found = finals.groupby(["arm", "seed", "sampling", "suite"]).size()
    complaints = []
    for arm, seed in sorted(wanted - failed):
        lacking = [
            f"{sampling}/{suite}"
            for sampling in SAMPLINGS
            for suite in suites
            if (arm, seed, sampling, suite) not in found.index
        ]
        if lacking:
            complaints.append(f"missing: {arm}, seed {seed}: {', '.join(lacking)}")
    for arm, seed, sampling, suite in found[found > 1].index:
        complaints.append(f"twice: {arm}, seed {seed}, {sampling}, {suite}")
    cells = set(zip(scores["arm"], scores["seed"], strict=True))
    complaints += [f"not in the plan: {arm}, seed {seed}" for arm, seed in sorted(cells - wanted)]
    keys = ["arm", "seed", "compute_step", "policy_step", "sampling", "suite"]
    repeated = scores[scores.duplicated(keys, keep="first")]
    complaints += [
        f"twice: {row.arm}, seed {row.seed}, compute step {row.compute_step}, {row.sampling}, {row.suite}"
        for row in repeated.itertuples()
        if not row.final
    ]
    return complaints


def mixture_complaints(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is mixed among runs: a run twice, an arm's settings, versions of Python, packages or device; a line each."""
    complaints = []
    by_arm: dict[str, dict[str, list[int]]] = {}
    versions: dict[str, list[str]] = {}
    seen: dict[tuple[str, int], int] = {}
    for run in runs:
        settings = {name: value for name, value in deciding(run["config"]).items() if name != "seed"}
        by_arm.setdefault(run["arm"], {}).setdefault(json.dumps(settings, sort_keys=True), []).append(run["seed"])
        versions.setdefault(json.dumps(run["versions"], sort_keys=True), []).append(f"{run['arm']}/{run['seed']}")
        seen[run["arm"], run["seed"]] = seen.get((run["arm"], run["seed"]), 0) + 1
    complaints += [f"twice: run of {arm}, seed {seed}" for (arm, seed), count in seen.items() if count > 1]
    for arm, kinds in by_arm.items():
        if len(kinds) > 1:
            groups = "; ".join(f"seeds {seeds}" for seeds in kinds.values())
            complaints.append(f"mixed configurations of {arm}: {groups}")
    if len(versions) > 1:
        groups = "; ".join(f"{len(cells)} runs such as {cells[0]} with {kind}" for kind, cells in versions.items())
        complaints.append(f"mixed versions: {groups}")
    return complaints


# The map of the gain


def has_map(out: Path | None = None) -> bool:
    """Whether the folder of results has a map."""
    return (results_folder(out) / MAP).is_file()


def read_map(out: Path | None = None) -> pd.DataFrame:
    """Rows of the map.

    Raises:
        FileNotFoundError: There is no map.
        ResultsRefused: Another small world, missing columns, or a cell that is there twice.
    """
    path = results_folder(out) / MAP
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; `python -m npo_core map` makes it.")
    made = path.with_name(MAP_ABOUT)
    require_world(read_json(made) if made.is_file() else {}, path)
    table = pd.read_csv(path)
    if absent := [name for name in MAP_COLUMNS if name not in table.columns]:
        raise ResultsRefused(f"{path} lacks the columns {', '.join(absent)}; `python -m npo_core map` makes it again.")
    repeated = table[table.duplicated(["learning_rate", "distance", "seed"])]
    if len(repeated):
        cells = "; ".join(f"rate {r.learning_rate:g}, Δ = {r.distance:g}, seed {r.seed}" for r in repeated.itertuples())
        raise ResultsRefused(f"{path} has cells twice: {cells}. Remove it and run `make map`.")
    return table
