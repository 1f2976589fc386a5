"""The evidence on the real model: a few arms × seeds of preset `real`, one process a run, and the premise along GRPO.

Plan and meaning: docs/evidence.md. `python -m npo_core real-study` runs what is missing and writes
`data/results/real/`; a kill at any moment loses at most the steps since the last checkpoint. Runs and scores are those
of the other study (`cells`); what differs is written here: the arms, and that weights are deleted as soon as nothing
needs them, since a checkpoint of this model takes 1.6 GB.
"""

import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..files import read_json, write_json, write_whole
from ..lock import Lock
from ..method.premise import LEVEL
from ..method.stats import holm, mcnemar_exact
from ..runs.checkpoints import checkpoint_folder, complete_checkpoints, slim
from ..runs.config import resolve_config
from ..runs.folder import RunFolder
from ..runs.measurement import read_pairs
from ..stages.prefix import take_prefix
from ..stages.signal import MeasuredSignal
from ..stages.signal_run import measure_run, settings_for
from ..world import finetune, letters
from ..world.computing import precision, run_policy, threads
from ..world.policies import load_processor
from ..world.warmstart import base_policy_folder
from .cells import Cell, about_run, planned_runs, run_cells, score_rows
from .findings import SCHEMA
from .joining import require_one_kind
from .real_results import ABOUT, EXACT, PREMISE, REAL_ARMS, SCORES, real_folder
from .results import mixture_complaints
from .scores import SETTLED, saved_places

SHARED: Mapping[str, Any] = {"compute_steps": 60, "checkpoint_keep": 1}
"""Settings of every arm that are not the preset's; AutoNPO alone rolls back to what it has kept."""

ORDER = ("AutoNPO", "GRPO, groups of 16", "GRPO", "NPO early", "NPO early, own resample")
"""Arms as they run: AutoNPO keeps its checkpoints and is GRPO until it intervenes, so the last three go on from it."""

ORIGINS, DISTANCES = (0, 20), (10, 20, 30, 40)
"""Policy steps that the premise is measured from, and its distances."""

PREMISE_SEED = 0
"""Seed of the GRPO run that it is measured along; a call with other seeds alone leaves what was measured as it is."""

PROMPTS = 64
"""Prompts of the premise, the first of the training set."""

EXACT_WORDS, EXACT_SEED = 120, 1
"""Test words whose right response's probability is computed at every checkpoint, and the seed that draws them."""


def plan_real(
    preset: str, seeds: Sequence[int], arms: Sequence[str] | None = None, overrides: Mapping[str, Any] | None = None
) -> list[Cell]:
    """Cells of the study in the order they run: seed by seed, AutoNPO first, whose beginning the others share.

    Args:
        preset: Name of a preset, `real` or smaller.
        seeds: Seeds of sampling during training.
        arms: Names in `REAL_ARMS`; None for all.
        overrides: Settings of every run that are not the plan's.

    Raises:
        ValueError: Unknown arm.
    """
    for arm in arms or ():
        if arm not in REAL_ARMS:
            raise ValueError(f"Unknown arm {arm!r}. Allowed: {', '.join(REAL_ARMS)}.")
    cells = []
    for seed in seeds:
        for name in ORDER:
            if arms is None or name in arms:
                arm = REAL_ARMS[name]
                settings = {**SHARED, **(overrides or {}), **arm.settings}
                settings["compute_steps"] = round(settings["compute_steps"] * arm.budget)
                cells.append(Cell(name, seed, resolve_config(arm.method, preset, seed, settings)))
    return cells


def run_real(
    cells: Sequence[Cell], root: Path | None = None, out: Path | None = None, processes: int | None = None,
    quiet: bool = False, premise: bool = False,
) -> list[Path]:  # fmt: skip
    """Run and score what is missing, as many runs at a time as there are processes, and write the results.

    The gate is measured as soon as its run is there, so a night that is cut off has it. Another call with the same runs
    may go on beside this one: a run has one writer, and one of the two scores it.

    Args:
        cells: What to run.
        root: Folder of all runs; the project's `data/runs` if None.
        out: Folder of the results; `data/results/real` if None.
        processes: Runs at a time; the number of cores if None.
        quiet: Without progress bars.
        premise: Measure the premise, if the run that it is measured along is among the cells and did not fail.

    Returns:
        The files written.
    """
    at_a_time = processes or os.cpu_count() or 1
    _require_one_kind(real_folder(out), planned_runs(cells, root))  # before the hours that they take, not after
    waiting = [cell for cell in cells if not _is_settled(cell, root)]
    done = [cell for cell in cells if cell not in waiting]
    for cell in done:
        _free(cell, cell.folder(root))  # a call that was cut off may have left the weights
    written, along = collect_real(done, root, out) if done else [], premise_cell(cells) if premise else None
    gate_file = [measure_real_premise(along, root, out, quiet)] if along in done else []
    while waiting:
        now, waiting = waiting[:at_a_time], waiting[at_a_time:]
        # what another call has settled by now may have no weights that could be looked for
        if missing := [cell for cell in now if not _is_settled(cell, root)]:
            run_cells(missing, root, at_a_time, quiet)
        for cell in now:
            if (reason := cell.failure(root)) is not None:
                print(f"failed: {cell.arm}, seed {cell.seed}: {reason}")
                continue
            _lend(waiting, root)
            settle(cell, root)
            done.append(cell)
            written = collect_real(done, root, out)  # a night that is cut off leaves what it had
        if along in done and not gate_file:
            gate_file = [measure_real_premise(along, root, out, quiet)]
    return [*written, *gate_file]


def _lend(cells: Sequence[Cell], root: Path | None) -> None:
    """Let runs that wait take what they share with those on disk, before the weights there are deleted."""
    for run in (cell.folder(root) for cell in cells):
        if not run.events_path.exists() and not run.written_elsewhere:
            with run.writing(quiet=True):
                take_prefix(run)


def _settled(cell: Cell, root: Path | None) -> Path:
    return cell.folder(root).path / SETTLED


def _is_settled(cell: Cell, root: Path | None) -> bool:
    """Whether all scores of the plan are here; GRPO's first run had none at temperature 1 on the way, and its weights.

    A run that lacks them and its weights cannot be scored again, and stands as it is.
    """
    path = _settled(cell, root)
    if not path.exists():
        return False
    scored: dict[int, set[str]] = {}
    for row in read_json(path)["rows"]:
        scored.setdefault(row["compute_step"], set()).add(row["sampling"])
    return all("plain" in samplings for samplings in scored.values()) or cell.arm != "GRPO"


def settle(cell: Cell, root: Path | None = None) -> None:
    """Note the scores of a run that is finished and scored, and give its disk free: what is left loads no run.

    GRPO keeps its weights, since the premise is measured on them. What another call has settled meanwhile is left.
    """
    run = cell.folder(root)
    with run.writing(quiet=True):
        if not _is_settled(cell, root):
            write_json(_settled(cell, root), _found(cell, run))
        _free(cell, run)


def _found(cell: Cell, run: RunFolder) -> dict[str, Any]:
    with threads(cell.config.threads):  # as in training
        exact = list(exact_rows(cell, run))
    return {"rows": list(score_rows(cell, run, ())), "exact": exact, "about": about_run(cell, run)}


def _free(cell: Cell, run: RunFolder) -> None:
    """Delete the weights of a settled run, or of GRPO what is more than weights; again after a kill in between."""
    if not list((run.path / "branches").glob("*/checkpoint-*")):
        return
    with run.writing(quiet=True):
        for branch in (run.path / "branches").iterdir():
            if cell.arm == "GRPO":
                for checkpoint in complete_checkpoints(branch, resumable=False).values():
                    slim(checkpoint)
            else:
                for checkpoint in branch.glob("checkpoint-*"):
                    shutil.rmtree(checkpoint)


def exact_rows(cell: Cell, run: RunFolder) -> Iterator[dict[str, Any]]:
    """Probability of the right response to fresh test words, at every checkpoint; GRPO's begin with the base policy.

    It has no noise of sampling, and what is left is that of words and seeds. Lengths take turns, so each has as many.
    """
    config = cell.config
    lengths = letters.read_source(config.data)
    words = letters.sample_words("test", min(EXACT_WORDS, config.eval_problems * 4), EXACT_SEED, lengths)
    rows = letters.make_dataset(words)
    start = {"branch": 0, "policy_step": 0, "compute_step": 0, "rollouts": 0}
    for place in [*([start] if cell.arm == "GRPO" else []), *saved_places(run)]:
        step = place["policy_step"]
        folder = checkpoint_folder(run.branch(place["branch"]), step)
        model = run_policy(config, folder if step else base_policy_folder(config, quiet=True)).eval()
        processor = load_processor(base_policy_folder(config, quiet=True))
        with precision(config):
            chances = finetune.right_probabilities(model, processor, rows)
        for word, chance in zip(words, chances, strict=True):
            named = {name: value for name, value in place.items() if name != "branch"}
            yield {"arm": cell.arm, "seed": cell.seed, **named, "word": word.uid, "probability": chance}


def collect_real(cells: Sequence[Cell], root: Path | None = None, out: Path | None = None) -> list[Path]:
    """Write scores and what made them; what is there of other arms and seeds stays.

    Args:
        cells: Settled cells.
        root: Folder of all runs.
        out: Folder of the results.

    Raises:
        ResultsRefused: With what is there, settings of an arm, versions or learning rates are mixed.
    """
    folder = real_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    made = {(cell.arm, cell.seed) for cell in cells}
    found = [read_json(_settled(cell, root)) for cell in cells]
    order = list(REAL_ARMS)
    with Lock(folder / "lock.json", f"The results {folder}").holding():
        rows = [*_others(_read_rows(folder, SCORES), made), *(row for one in found for row in one["rows"])]
        runs = _require_one_kind(folder, [one["about"] for one in found])
        table = pd.DataFrame(rows).sort_values(["seed", "arm", "compute_step", "sampling", "suite"])
        about = {
            "schema": SCHEMA,
            "model": "SmolLM2-135M-Instruct, from 4-bit weights",
            "runs": sorted(runs, key=lambda run: (run["seed"], order.index(run["arm"]))),
        }
        write_whole(folder / SCORES, lambda path: table.to_csv(path, index=False, float_format="%.6f"))
        exact = pd.DataFrame(
            [*_others(_read_rows(folder, EXACT), made), *(row for one in found for row in one["exact"])]
        )
        exact = exact.sort_values(["seed", "arm", "compute_step", "word"])
        write_whole(folder / EXACT, lambda path: exact.to_csv(path, index=False, float_format="%.5f"))
        write_json(folder / ABOUT, about)
    return [folder / SCORES, folder / EXACT, folder / ABOUT]


def _require_one_kind(folder: Path, made: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs, and those that the folder has of other arms and seeds.

    Raises:
        ResultsRefused: Settings of an arm, versions or learning rates are mixed.
    """
    runs = [*_others(_read_runs(folder), {(run["arm"], run["seed"]) for run in made}), *made]
    require_one_kind(folder, [*mixture_complaints(runs), *_rate_complaints(runs)])
    return runs


def _rate_complaints(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rate was settled on GRPO once, for all arms."""
    rates: dict[float, list[str]] = {}
    for run in runs:
        rates.setdefault(run["config"]["learning_rate"], []).append(f"{run['arm']}/{run['seed']}")
    groups = "; ".join(f"{rate:g}: {', '.join(cells)}" for rate, cells in rates.items())
    return [f"mixed learning rates: {groups}"] if len(rates) > 1 else []


def _others(found: Sequence[dict[str, Any]], made: Collection[tuple[str, int]]) -> list[dict[str, Any]]:
    return [one for one in found if (one["arm"], one["seed"]) not in made]


def _read_rows(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / name
    return pd.read_csv(path).to_dict("records") if path.exists() else []


def _read_runs(folder: Path) -> list[dict[str, Any]]:
    path = folder / ABOUT
    return read_json(path)["runs"] if path.exists() else []


def premise_cell(cells: Sequence[Cell]) -> Cell | None:
    """The run that the premise is measured along, if it is among the cells."""
    return next((cell for cell in cells if (cell.arm, cell.seed) == ("GRPO", PREMISE_SEED)), None)


def measure_real_premise(cell: Cell, root: Path | None = None, out: Path | None = None, quiet: bool = False) -> Path:
    """The premise and S along a GRPO run, from the base policy and from mid-training, and the gate.

    Args:
        cell: The run, see `premise_cell`; it is made first if it is not there.
        root: Folder of all runs.
        out: Folder of the results.
        quiet: Without progress bars.
    """
    config = cell.config
    every, last = config.checkpoint_every, config.compute_steps
    origins = [origin for origin in ORIGINS if origin < last and origin % every == 0]
    settings = settings_for(config, prompts=min(PROMPTS, config.train_problems), gradients=0)
    # the grid of one distance is the nearest checkpoint, which is among the plan's: no other one takes part in Holm
    measured = measure_run(config, origins, settings, distances=1, also=DISTANCES, root=root, quiet=quiet)
    folder = real_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / PREMISE, {"run": config.run_name, "gate": gate(measured), **measured.summary})
    return folder / PREMISE


def gate(measured: MeasuredSignal) -> dict[str, Any]:
    """The gate of docs/evidence.md: does a later policy solve more of what this one fails than its own resample?

    Returns:
        `origins`: by origin a record a distance with `shown` and `own` (shares of the failed prompts that the later
        policy and the resample solve), `p` (exact McNemar, one-sided) and `p_holm` over the distances; `passed`:
        whether some p_holm is below 0.05 from some origin. Without it the arms are no test of the method.
    """
    tables, origins = read_pairs(measured.folder, measured.pairs), {}
    for origin in dict.fromkeys(pair.origin for pair in measured.pairs):
        here = {pair.distance: sums for pair, sums in tables.items() if pair.origin == origin}
        failed = here[0].failed > 0
        own = here[0].shown[failed] > 0
        later = {d: here[d].shown[failed] > 0 for d in sorted(d for d in here if d is not None and d > 0)}
        p = [
            mcnemar_exact(int((solved & ~own).sum()), int((own & ~solved).sum()), "greater")
            for solved in later.values()
        ]
        origins[str(origin)] = [
            {
                "distance": distance,
                "failed": int(failed.sum()),
                "shown": float(solved.mean()) if len(solved) else None,
                "own": float(own.mean()) if len(own) else None,
                "p": alone,
                "p_holm": float(adjusted),
            }
            for (distance, solved), alone, adjusted in zip(later.items(), p, holm(np.array(p)), strict=True)
        ]
    return {"origins": origins, "passed": any(one["p_holm"] < LEVEL for rows in origins.values() for one in rows)}
