"""The evidence study: arms × seeds, one single-thread process a run, scored on the way, written as one tidy table.

`python -m npo_core study` runs what is missing and writes `data/results/`. A kill at any moment loses at most the steps
since the last checkpoint. Nothing here decides what is compared: arms and plan are in `arms.py` and docs/evidence.md.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..files import read_json, write_json, write_whole
from ..lock import Lock
from ..notebook import in_one_sentence
from ..progress import progress
from ..runs.config import RunConfig
from ..runs.folder import RunFolder, environment, runs_folder, versions_of
from ..runs.validation import WORLD
from ..stages import run as stages
from . import joining
from .arms import ARMS, arm_config, repeats_grpo
from .families import AXES, CLOCKS, COUNTED, REFERENCES, compared_on
from .findings import SCHEMA, results_folder
from .results import ABOUT, SCORE_COLUMNS, SCORES, TRAINING, Evidence, check_evidence
from .scores import finished, saved_places, score, score_points

ORDER = ("GRPO, longer", "GRPO", "NPO", *ARMS)
"""Arms whose beginnings others share go first."""

RECENT = 20
"""Compute steps over which entropy and all-wrong groups are averaged for a score."""

TRAINING_COLUMNS = {
    "npo/pass_rate": "pass_rate",
    "npo/entropy": "entropy",
    "npo/all_wrong_groups": "all_wrong_groups",
    "npo/replaced_slots": "replaced_slots",
    "npo/guide_kl": "guide_kl",
}
"""Metrics that are kept for every executed step."""


@dataclass(frozen=True)
class Cell:
    """One run of the study.

    Attributes:
        arm: Name in `ARMS`.
        seed: Seed.
        config: Its settings.
    """

    arm: str
    seed: int
    config: RunConfig

    def folder(self, root: Path | None) -> RunFolder:
        """Its run folder."""
        return RunFolder(self.config, root)

    def failure(self, root: Path | None) -> str | None:
        """Why the run cannot be used: it crashed, or a metric is not a number; None if it can or is not there yet."""
        run = self.folder(root)
        log = run.path / "failed.json"
        if log.exists() and not finished(run):  # another call may have finished it since
            return read_json(log)["reason"]
        if run.result() is None:
            return None
        for line in run.metrics():
            for name in ("loss", "npo/pass_rate", "npo/entropy"):
                if not math.isfinite(line.get(name, 0.0)):
                    return f"{name} is {line[name]} at compute step {line['compute_step']}"
        return None


def plan_cells(
    preset: str, seeds: Sequence[int], arms: Sequence[str] | None = None, overrides: Mapping[str, Any] | None = None
) -> list[Cell]:
    """Cells of the study in the order they run: seed by seed, arms that others share beginnings with first.

    An arm that is GRPO itself with these settings is left out beside it: a run is no control of itself.

    Raises:
        ValueError: No arm, no seed, or an unknown arm.
    """
    for name, given in (("arm", arms), ("seed", seeds)):
        if given is not None and not len(given):
            raise ValueError(f"No {name} is named, so there is nothing to run; name at least one.")
    chosen = list(ARMS) if arms is None else list(arms)
    if "GRPO" in chosen:
        same = repeats_grpo(arm_config("GRPO", preset, seeds[0], overrides))
        chosen = [arm for arm in chosen if arm not in same]
    order = [arm for arm in dict.fromkeys(ORDER) if arm in chosen] + [arm for arm in chosen if arm not in ARMS]
    return [Cell(arm, seed, arm_config(arm, preset, seed, overrides)) for seed in dict.fromkeys(seeds) for arm in order]


def run_cells(
    cells: Sequence[Cell], root: Path | None = None, processes: int | None = None, quiet: bool = False
) -> None:
    """Run and score what is missing, side by side, with a bar over compute steps that estimates the time left.

    A cell that crashes is tried no further in this call, and noted in its folder; the next call tries it again.

    Args:
        cells: What to run.
        root: Folder of all runs; the project's `data/runs` if None.
        processes: Processes at a time; the number of cores if None.
        quiet: Without a progress bar.
    """
    waiting = [cell for cell in cells if not finished(cell.folder(root))]
    for cell in cells:
        (cell.folder(root).path / "failed.json").unlink(missing_ok=True)
    total = sum(cell.config.compute_steps for cell in cells)
    done = {cell: cell.folder(root).steps_done() for cell in cells}
    running: dict[Cell, subprocess.Popen] = {}
    at_a_time = processes or os.cpu_count() or 1
    label = f"study, {len(cells)} runs"
    stop = in_one_sentence(label, lambda: f"step {sum(done.values())} of {total}")
    with stop, progress(total, label, quiet, start=sum(done.values())) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < at_a_time:
                    # what another study makes is left to it as long as there is something else to do
                    free = (cell for cell in waiting if not cell.folder(root).written_elsewhere)
                    waiting.remove(cell := next(free, waiting[0]))
                    running[cell] = _begin(cell, root)
                time.sleep(0.2 if quiet else 1.0)
                for cell in list(running):
                    steps = cell.folder(root).steps_done()
                    bar.advance(steps - done[cell], runs_left=len(waiting) + len(running))
                    done[cell] = steps
                    if running[cell].poll() is not None and (lost := _end(cell, running.pop(cell).returncode, root)):
                        bar.say(f"{cell.arm}, seed {cell.seed}, failed: {lost}")
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()


def _begin(cell: Cell, root: Path | None) -> subprocess.Popen:
    folder = cell.folder(root).path
    command = [sys.executable, "-m", "npo_core", "cell", "--config", str(folder / "config.json")]
    if root is not None:
        command += ["--root", str(root)]
    with (folder / "process.log").open("a") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(cell.config.threads)},
        )


def _end(cell: Cell, status: int, root: Path | None) -> str:
    """Note why a cell crashed, if it did, and return it."""
    if status == 0:
        return ""
    folder = cell.folder(root).path
    tail = (folder / "process.log").read_text(encoding="utf-8", errors="replace")[-2000:].strip()
    reason = f"exit status {status}: {tail.splitlines()[-1] if tail else 'no output'}"
    write_json(folder / "failed.json", {"reason": reason, "log": tail})
    return reason


def run_cell(config: RunConfig, root: Path | None = None) -> RunFolder:
    """Train what is left of a run and score it; what a process of the study does."""
    run = stages.run(config, root, quiet=True)
    if not finished(run):
        with run.writing(quiet=True):
            world = stages.prepare(config, quiet=True)
            for point in score_points(run):
                score(run, *point, world)
    return run


# Results


def require_joinable(cells: Sequence[Cell], root: Path | None = None, out: Path | None = None) -> None:
    """Refuse cells whose results could not stand beside those of other seeds in the folder; before they run, not after.

    Args:
        cells: Cells of the study.
        root: Folder of all runs.
        out: Folder of the results; the project's `data/results` if None.

    Raises:
        ResultsRefused: Other arms, suites, settings or versions than there.
    """
    joining.require_joinable({**_about(cells), "runs": planned_runs(cells, root)}, results_folder(out))


def planned_runs(cells: Sequence[Cell], root: Path | None = None) -> list[dict[str, Any]]:
    """What can be said of runs before they are made, as in results; a finished one keeps the versions that made it."""
    now, places = environment(), (Path(root or runs_folder()) / cell.config.run_name for cell in cells)
    made = (read_json(place / "env.json") if (place / "result.json").exists() else now for place in places)
    return [
        {
            "arm": cell.arm,
            "seed": cell.seed,
            "config": json.loads(cell.config.to_json()),
            "versions": versions_of(machine),
        }
        for cell, machine in zip(cells, made, strict=True)
    ]


def _about(cells: Sequence[Cell]) -> dict[str, Any]:
    """What is known of a study's results before it has run."""
    return {
        "schema": SCHEMA,
        "world": WORLD,
        "arms": [arm for arm in ARMS if arm in {cell.arm for cell in cells}],
        "seeds": sorted({cell.seed for cell in cells}),
        "suites": list(cells[0].config.suites),
        "same": sorted({arm for cell in cells if cell.arm == "GRPO" for arm in repeats_grpo(cell.config)}),
    }


def collect(cells: Sequence[Cell], root: Path | None = None, out: Path | None = None) -> list[Path]:
    """Write the results of finished cells; refuse to when a cell is neither finished nor failed.

    Seeds that the folder has of another call stay in it, so a study grows seed by seed.

    Args:
        cells: Cells of the study.
        root: Folder of all runs.
        out: Folder of the results; the project's `data/results` if None.

    Returns:
        The files written.

    Raises:
        ResultsRefused: Cells are missing or do not belong together, or with what the folder has; see
            `results.check_evidence` and `joining.join_evidence`. Nothing is written.
    """
    folder = results_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    failed = [  # results are read elsewhere: they name no folder of this machine
        {"arm": cell.arm, "seed": cell.seed, "reason": reason.replace(f"{cell.folder(root).path.parent}/", "")}
        for cell in cells
        if (reason := cell.failure(root)) is not None
    ]
    lost = {(entry["arm"], entry["seed"]) for entry in failed}
    used = [cell for cell in cells if (cell.arm, cell.seed) not in lost and finished(cell.folder(root))]
    results = {(cell.arm, cell.seed): cell.folder(root).result() for cell in used}
    scores = pd.DataFrame(
        [row for cell in used for row in score_rows(cell, cell.folder(root), _counts_to_score(cell, results))],
        columns=list(SCORE_COLUMNS),
    )
    training = pd.DataFrame([row for cell in used for row in _training_rows(cell, cell.folder(root))])
    about = {**_about(cells), "failed": failed, "runs": [about_run(cell, cell.folder(root)) for cell in used]}
    check_evidence(scores, about)
    for column in training.columns[training.dtypes == np.float64]:
        training[column] = training[column].astype(np.float32)
    with Lock(folder / "lock.json", f"The results {folder}").holding():  # three files that belong together
        found = joining.join_evidence(Evidence(scores, training, about), folder)
        write_whole(folder / SCORES, lambda path: found.scores.to_csv(path, index=False, float_format="%.6f"))
        write_whole(folder / TRAINING, lambda path: found.training.to_parquet(path, index=False, compression="zstd"))
        write_json(folder / ABOUT, found.about)
    return [folder / name for name in (SCORES, TRAINING, ABOUT)]


def about_run(cell: Cell, run: RunFolder) -> dict[str, Any]:
    made = read_json(run.path / "env.json")
    result = run.result()
    chosen = ("policy_steps", "compute_steps", "rollouts", "offline_rollouts", "wall_seconds")
    tokens = _trained_tokens(run)
    if cell.config.method == "rlep":  # its steps begin with those of the run that its guides come from
        tokens += _trained_tokens(RunFolder(stages.source_config(cell.config), run.path.parent))
    return {
        "arm": cell.arm,
        "seed": cell.seed,
        "config": json.loads(cell.config.to_json()),
        "versions": versions_of(made),
        "git_revision": made["git_revision"],
        **{name: result[name] for name in chosen},
        "trained_tokens": round(tokens),
        "interventions": [
            {
                name: entry.get(name)
                for name in ("stage", "policy_step", "compute_step", "distance", "cached", "at_edge")
            }
            for entry in result["interventions"]
        ],
    }


def _trained_tokens(run: RunFolder) -> float:
    """Tokens of the responses in a run's steps; a place kept for a guide that there was not holds one, and none counts.

    TRL's mean length is over all rows of a group, those kept for guides and those that stayed empty among them.
    """
    config, empty = run.config, 0.0
    kept = config.prompts_per_step * (config.group_rows - config.num_generations)
    lines = run.metrics()
    if kept:
        empty = sum(kept - line["npo/replaced_slots"] for line in lines)
    return sum(line["completions/mean_length"] for line in lines) * config.prompts_per_step * config.group_rows - empty


def _counts_to_score(cell: Cell, results: Mapping[tuple[str, int], Mapping[str, Any]]) -> set[tuple[str, int]]:
    """Where a cell is scored beside its own points: (clock, count) at which an arm ends that it is compared with."""
    found = set()
    for clock in CLOCKS:
        end = {arm: result[COUNTED[clock]] for (arm, seed), result in results.items() if seed == cell.seed}
        pairs = compared_on(clock) | {(arm, other) for arm in end for other in REFERENCES[clock]}
        partners = {other if arm == cell.arm else arm for arm, other in pairs if cell.arm in (arm, other)}
        found |= {(clock, end[arm]) for arm in partners if arm in end and end[arm] < end[cell.arm]}
    return found


def score_rows(cell: Cell, run: RunFolder, counts: Iterable[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """Rows of one run: its own points, and the newest checkpoint that has counted at most so much on each clock.

    Of a reference at equal total rollouts the checkpoint after it too, so that a line can be drawn between the two.
    """
    lines, result, places = run.metrics(), run.result(), saved_places(run)
    points = score_points(run)
    final = points[-1][:2]
    for clock, count in sorted(counts):
        name = AXES[clock]
        there = [place for place in places if place[name] <= count]
        if there:
            newest = max(there, key=lambda place: (place[name], place["compute_step"]))
            points.insert(0, (newest["branch"], newest["policy_step"], "paper"))
        after = [place for place in places if place[name] > count]
        if after and clock == "rollouts" and cell.arm in REFERENCES[clock]:
            points.insert(0, (after[0]["branch"], after[0]["policy_step"], "paper"))
    place_of = {(line["branch"], line["policy_step"]): index for index, line in enumerate(lines)}
    spent = {(place["branch"], place["policy_step"]): place["rollouts"] for place in places}
    for branch, step, sampling in dict.fromkeys(points):
        found = score(run, branch, step, sampling)
        index = place_of[branch, step]
        recent = lines[max(0, index + 1 - RECENT) : index + 1]
        compute_step = lines[index]["compute_step"]
        for suite, rate in found["suites"].items():
            yield {
                "arm": cell.arm,
                "seed": cell.seed,
                "policy_step": step,
                "compute_step": compute_step,
                "final": (branch, step) == final,
                "sampling": sampling,
                "suite": suite,
                "pass_rate": rate,
                "pass_at_4": found["pass_at"].get("4", {}).get(suite),
                "pass_at_8": found["pass_at"].get("8", {}).get(suite),
                "entropy": float(np.mean([line["npo/entropy"] for line in recent])),
                "all_wrong_groups": float(np.mean([line["npo/all_wrong_groups"] for line in recent])),
                "interventions": sum(e["compute_step"] < compute_step for e in result["interventions"]),
                "rollouts": spent[branch, step],
            }


def _training_rows(cell: Cell, run: RunFolder) -> Iterator[dict[str, Any]]:
    for line in run.metrics():
        yield {
            "arm": cell.arm,
            "seed": cell.seed,
            "branch": line["branch"],
            "policy_step": line["policy_step"],
            "compute_step": line["compute_step"],
            **{short: line.get(name, np.nan) for name, short in TRAINING_COLUMNS.items()},
        }
