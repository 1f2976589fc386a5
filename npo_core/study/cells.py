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

from ..files import write_json, write_whole
from ..lock import Lock
from ..notebook import in_one_sentence
from ..progress import progress
from ..runs.checkpoints import checkpoint_folder, complete_checkpoints
from ..runs.config import RunConfig
from ..runs.folder import RunFolder, offline_rollouts
from ..runs.validation import WORLD
from ..stages import run as stages
from ..world.policies import placed_policy
from .arms import ARMS, arm_config
from .families import AXES, CLOCKS, COUNTED, REFERENCES, compared_on
from .findings import SCHEMA, results_folder
from .results import ABOUT, SCORE_COLUMNS, SCORES, TRAINING, check_evidence

ORDER = ("GRPO, longer", "GRPO", "NPO", *ARMS)
"""Arms whose beginnings others share go first."""

POINTS = 4
"""Scores on the way to the end of the budget."""

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
        if log.exists():
            return json.loads(log.read_text(encoding="utf-8"))["reason"]
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

    Raises:
        ValueError: No arm, no seed, or an unknown arm.
    """
    for name, given in (("arm", arms), ("seed", seeds)):
        if given is not None and not len(given):
            raise ValueError(f"No {name} is named, so there is nothing to run; name at least one.")
    chosen = list(ARMS) if arms is None else list(arms)
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
    for cell in waiting:
        (cell.folder(root).path / "failed.json").unlink(missing_ok=True)
    total = sum(cell.config.compute_steps for cell in cells)
    done = {cell: _steps(cell, root) for cell in cells}
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
                    steps = _steps(cell, root)
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


def finished(run: RunFolder) -> bool:
    return run.result() is not None and all(_score_file(run, *point).exists() for point in score_points(run))


def _steps(cell: Cell, root: Path | None) -> int:
    """Compute steps of a cell that are done, those that it paid for before its first line included."""
    return cell.folder(root).steps_done()


# Scores


def score_points(run: RunFolder) -> list[tuple[int, int, str]]:
    """What a finished run is scored at: (branch, policy step, sampling), the end last and with both samplings."""
    budget = run.config.compute_steps
    every = max(1, budget // POINTS)
    places = [newest_place(run, step) for step in range(every, budget + 1, every)]
    end = newest_place(run, budget)
    places = [place for place in dict.fromkeys(places) if place is not None and place != end]
    return [*((*place, "paper") for place in places), (*end, "paper"), (*end, "plain")]


def newest_place(run: RunFolder, compute_step: int) -> tuple[int, int] | None:
    """Branch and policy step of the newest checkpoint at or before a compute step."""
    saved: dict[int, set[int]] = {}
    for line in reversed(run.metrics()):
        if line["compute_step"] > compute_step:
            continue
        branch = line["branch"]
        if branch not in saved:
            saved[branch] = set(complete_checkpoints(run.path / "branches" / f"{branch:02d}", resumable=False))
        if line["policy_step"] in saved[branch]:
            return branch, line["policy_step"]
    return None


def _score_file(run: RunFolder, branch: int, step: int, sampling: str) -> Path:
    return run.path / "scores" / f"b{branch:02d}-{step:06d}-{sampling}.json"


def score(run: RunFolder, branch: int, step: int, sampling: str, world: stages.World | None = None) -> dict[str, Any]:
    """Scores of a checkpoint on the test problems; made once and kept in the run folder."""
    path = _score_file(run, branch, step, sampling)
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        world = stages.prepare(run.config, quiet=True) if world is None else world
        policy = placed_policy(checkpoint_folder(run.path / "branches" / f"{branch:02d}", step))
        label = f"{run.config.method} at {step}"
        write_json(path, stages.evaluate_policy(run.config, policy, world, label, True, plain=sampling == "plain"))
    return json.loads(path.read_text(encoding="utf-8"))


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


def collect(cells: Sequence[Cell], root: Path | None = None, out: Path | None = None) -> list[Path]:
    """Write the results of finished cells; refuse to when a cell is neither finished nor failed.

    Args:
        cells: Cells of the study.
        root: Folder of all runs.
        out: Folder of the results; the project's `data/results` if None.

    Returns:
        The files written.

    Raises:
        ResultsRefused: Cells are missing or do not belong together; see `results.check_evidence`.
    """
    folder = results_folder() if out is None else Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    failed = [
        {"arm": cell.arm, "seed": cell.seed, "reason": reason}
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
    about = {
        "schema": SCHEMA,
        "world": WORLD,
        "arms": [arm for arm in ARMS if arm in {cell.arm for cell in cells}],
        "seeds": sorted({cell.seed for cell in cells}),
        "suites": list(cells[0].config.suites),
        "failed": failed,
        "runs": [about_run(cell, cell.folder(root)) for cell in used],
    }
    check_evidence(scores, about)
    for column in training.columns[training.dtypes == np.float64]:
        training[column] = training[column].astype(np.float32)
    with Lock(folder / "lock.json", f"The results {folder}").holding():  # three files that belong together
        write_whole(folder / SCORES, lambda path: scores.to_csv(path, index=False, float_format="%.6f"))
        write_whole(folder / TRAINING, lambda path: training.to_parquet(path, index=False, compression="zstd"))
        write_json(folder / ABOUT, about)
    return [folder / name for name in (SCORES, TRAINING, ABOUT)]


def about_run(cell: Cell, run: RunFolder) -> dict[str, Any]:
    made = json.loads((run.path / "env.json").read_text(encoding="utf-8"))
    result = run.result()
    versions = {"python": made["python"], "packages": made["packages"], "device": made["device"]}
    chosen = ("policy_steps", "compute_steps", "rollouts", "offline_rollouts", "wall_seconds")
    tokens = sum(line["completions/mean_length"] for line in run.metrics()) * cell.config.rollouts_per_step
    return {
        "arm": cell.arm,
        "seed": cell.seed,
        "config": json.loads(cell.config.to_json()),
        "versions": versions,
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


def _counts_to_score(cell: Cell, results: Mapping[tuple[str, int], Mapping[str, Any]]) -> set[tuple[str, int]]:
    """Where a cell is scored beside its own points: (clock, count) at which an arm ends that it is compared with."""
    found = set()
    for clock in CLOCKS:
        end = {arm: result[COUNTED[clock]] for (arm, seed), result in results.items() if seed == cell.seed}
        pairs = compared_on(clock) | {(arm, other) for arm in end for other in REFERENCES[clock]}
        partners = {other if arm == cell.arm else arm for arm, other in pairs if cell.arm in (arm, other)}
        found |= {(clock, end[arm]) for arm in partners if arm in end and end[arm] < end[cell.arm]}
    return found


def saved_places(run: RunFolder) -> list[dict[str, Any]]:
    """Lines of training that have a checkpoint, with all rollouts spent by then."""
    config, events, saved = run.config, run.effective_events(), {}
    places = []
    for line in run.metrics():
        branch, step = line["branch"], line["compute_step"]
        if branch not in saved:
            saved[branch] = complete_checkpoints(run.path / "branches" / f"{branch:02d}", resumable=False)
        if line["policy_step"] in saved[branch]:
            spent = step * config.rollouts_per_step + offline_rollouts(events, before=step)
            places.append(
                {**{name: line[name] for name in ("branch", "policy_step", "compute_step")}, "rollouts": spent}
            )
    return places


def score_rows(cell: Cell, run: RunFolder, counts: Iterable[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """Rows of one run: its own points, and the newest checkpoint that has counted at most so much on each clock."""
    lines, result, places = run.metrics(), run.result(), saved_places(run)
    points = score_points(run)
    final = points[-1][:2]
    for clock, count in sorted(counts):
        name = AXES[clock]
        there = [place for place in places if place[name] <= count]
        if there:
            newest = max(there, key=lambda place: (place[name], place["compute_step"]))
            points.insert(0, (newest["branch"], newest["policy_step"], "paper"))
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
