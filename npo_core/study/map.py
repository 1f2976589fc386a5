"""When does guidance pay? The gain of one guided window at equal total rollouts, over learning rate × guide distance.

For each learning rate and seed: a GRPO run, and for each distance Δ a run whose scout makes Δ steps, goes back to the
base policy and is guided by what they led to, for a window. Beside the gain stands the premise of these policies: what
share of the prompts that the base policy fails the guide solves, minus the base policy's own resample. Does the second,
which is known before any guided run, predict the first? The plan is in docs/evidence.md; `python -m npo_core map` runs
what is missing and writes `data/results/map.csv`. Ours.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..files import read_json, write_json, write_whole
from ..lock import Lock
from ..method.curve import rank_correlation
from ..method.stats import Estimate, holm, mean_interval, paired_t_test
from ..runs.config import RunConfig, resolve_config
from ..runs.folder import RunFolder
from ..runs.validation import WORLD
from .arms import shared_settings
from .cells import Cell, planned_runs
from .findings import SCHEMA, markdown_table, results_folder
from .gates import RATES, measure_premise
from .joining import join_map, require_joinable_map
from .results import MAP, MAP_ABOUT, MAP_COLUMNS, ResultsRefused, has_map, read_map
from .scores import saved_places, score
from .signal_claims import LEAST
from .verdicts import FEW

DISTANCES = (0, 20, 60, 160)
"""Distances of the guide, in policy steps; 0 is the base policy's own resample."""

WINDOW, AFTER = 30, 30
"""Guided steps, and plain steps after them before the run is scored."""

GRPO, GUIDED = "GRPO", "NPO at Δ = {}"


def plan_map(
    preset: str,
    seeds: Sequence[int],
    rates: Sequence[float] = RATES,
    distances: Sequence[int] = DISTANCES,
    overrides: Mapping[str, Any] | None = None,
) -> list[Cell]:
    """Runs of the map, seed by seed and rate by rate, GRPO first, whose beginning the scouts share.

    Args:
        preset: Name of a preset.
        seeds: Seeds of sampling during training.
        rates: Learning rates, rising.
        distances: Distances of the guide in policy steps, rising, multiples of the steps between checkpoints. At 0
            the guide is the base policy itself; the scout is then the one step that a run must make before it can
            go back, and charged.
        overrides: Settings of every run that are not the preset's.

    Raises:
        ValueError: Rates or distances do not rise.
    """
    for name, values in (("rates", rates), ("distances", distances)):
        if list(values) != sorted(set(values)):
            raise ValueError(f"{name} is {list(values)}; give rising values, each once.")
    cells = []
    for seed in seeds:
        for rate in rates:
            chosen = {**shared_settings(preset, overrides), "learning_rate": rate}
            guided = {distance: _guided(preset, seed, distance, chosen) for distance in distances}
            longest = max(_grpo_steps(config) for config in guided.values())
            cells.append(Cell(GRPO, seed, resolve_config("grpo", preset, seed, {**chosen, "compute_steps": longest})))
            cells += [Cell(GUIDED.format(distance), seed, config) for distance, config in guided.items()]
    return cells


def _grpo_steps(guided: RunConfig) -> int:
    """Steps to a checkpoint of GRPO that has spent what a guided run can at most, its guides included."""
    offline = WINDOW * guided.prompts_per_step * guided.cache_rollouts
    steps = guided.compute_steps + math.ceil(offline / guided.rollouts_per_step)
    return math.ceil(steps / guided.checkpoint_every) * guided.checkpoint_every


def _guided(preset: str, seed: int, distance: int, chosen: Mapping[str, Any]) -> RunConfig:
    scout = distance or 1
    early = {"scout_steps": scout, "early_window": WINDOW, "late_step": 0}
    early |= {"compute_steps": scout + WINDOW + AFTER, "guide_from": "future" if distance else "own"}
    return resolve_config("npo", preset, seed, {**chosen, **early})


def require_joinable(cells: Sequence[Cell], root: Path | None = None, out: Path | None = None) -> None:
    """Refuse cells whose rows could not stand beside those of other seeds in the folder; before they run, not after.

    Raises:
        ResultsRefused: Another grid, other settings or versions than there.
    """
    planned = planned_runs(cells, root)
    about = {"versions": _distinct([run["versions"] for run in planned]), "configurations": planned}
    grid = {(cell.config.learning_rate, distance) for cell in cells for distance in _distances([cell])}
    require_joinable_map(grid, about, results_folder(out))


def _distinct(made: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Versions that made runs, each once: Python, packages, device."""
    texts = {json.dumps([env["python"], env["packages"], env["device"]], sort_keys=True) for env in made}
    return [json.loads(text) for text in sorted(texts)]


def collect_map(cells: Sequence[Cell], root: Path | None = None, out: Path | None = None) -> list[Path]:
    """Write `map.csv`, a row per rate, distance and seed, and `map.json`, what made it.

    Columns: learning_rate, distance, seed; base, grpo and npo: test pass rates of the base policy, of GRPO where it has
    spent as many rollouts as the guided run in all (on a line between its checkpoints before and after), and of the
    guided run at its end; difference; rollouts of the guided run, off-line ones included, and of GRPO's checkpoint
    before; guide_solves and own_solves: shares of the prompts failed by the base policy that guide and own resample
    solve in 8 rollouts; lead, the first minus the second. What a failed run would have given is NaN. Seeds that the
    folder has of another call stay in it.

    Raises:
        ResultsRefused: A run is neither finished nor failed, versions are mixed, or the runs do not belong with those
            that the folder has (`joining.join_map`). Nothing is written.
    """
    folder = results_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    failed = [
        {"arm": cell.arm, "seed": cell.seed, "learning_rate": cell.config.learning_rate, "reason": reason}
        for cell in cells
        if (reason := cell.failure(root)) is not None
    ]
    lost = {(entry["arm"], entry["seed"], entry["learning_rate"]) for entry in failed}
    runs = {(cell.arm, cell.seed, cell.config.learning_rate): cell.folder(root) for cell in cells}
    missing = [key for key, run in runs.items() if key not in lost and run.result() is None]
    if missing:
        listed = "; ".join(f"{arm}, seed {seed}, rate {rate:g}" for arm, seed, rate in missing)
        raise ResultsRefused(f"{len(missing)} runs of the map are missing: {listed}. Run `make map` to the end.")
    made = [read_json(run.path / "env.json") for key, run in runs.items() if key not in lost]
    versions = _distinct(made)
    if len(versions) > 1:
        listed = "\n".join(json.dumps(one, sort_keys=True) for one in versions)
        raise ResultsRefused(f"The runs of the map have mixed versions:\n{listed}")
    whole = {key: run for key, run in runs.items() if key not in lost}
    distances = sorted(_distances(cells))
    nothing = dict.fromkeys(MAP_COLUMNS, float("nan"))
    rows = []
    for arm, seed, rate in runs:
        grpo = whole.get((arm, seed, rate))
        if arm != GRPO:
            continue
        records = {} if grpo is None else _premise(grpo, distances, root)
        for distance in distances:
            npo = whole.get((GUIDED.format(distance), seed, rate))
            found = {} if grpo is None or npo is None else _row(grpo, npo)
            place = {"learning_rate": rate, "distance": distance, "seed": seed}
            rows.append({**nothing, **place, **found, **records.get(distance, {})})
    about = {
        "schema": SCHEMA,
        "world": WORLD,
        "failed": failed,
        "versions": versions,
        "configurations": [
            {"arm": cell.arm, "seed": cell.seed, "config": json.loads(cell.config.to_json())} for cell in cells
        ],
    }
    table = pd.DataFrame(rows, columns=list(MAP_COLUMNS))
    with Lock(folder / "lock.json", f"The results {folder}").holding():
        table, about = join_map(table, about, folder)
        write_whole(folder / MAP, lambda path: table.to_csv(path, index=False, float_format="%.6g"))
        write_json(folder / MAP_ABOUT, about)
    return [folder / MAP, folder / MAP_ABOUT]


def _distances(cells: Sequence[Cell]) -> set[int]:
    return {int(cell.arm.rpartition(" ")[2]) for cell in cells if cell.arm != GRPO}


def _row(grpo: RunFolder, npo: RunFolder) -> dict[str, float]:
    result = npo.result()
    level, spent = _at_rollouts(grpo, result["rollouts"])
    return {
        "base": result["base"]["average"],
        "grpo": level,
        "npo": result["final"]["average"],
        "difference": result["final"]["average"] - level,
        "rollouts": result["rollouts"],
        "grpo_rollouts": spent,
    }


def _at_rollouts(grpo: RunFolder, rollouts: int) -> tuple[float, int]:
    """GRPO's score where it has spent so many rollouts, between two checkpoints, and the rollouts of the one before.

    Taken at the one before alone, GRPO would be short of rollouts wherever the guided run ends between two.
    """
    per_step = grpo.config.rollouts_per_step
    steps = rollouts / per_step
    places = [(0, 0), *((place["compute_step"], place["branch"]) for place in saved_places(grpo))]
    before = max(step for step, _ in places if step <= steps)
    around = [before, *(step for step, _ in places if step > steps)][:2]
    branches = dict(places)
    levels = [
        score(grpo, branches[step], step, "paper")["average"] if step else grpo.result()["base"]["average"]
        for step in around
    ]
    inside = before == steps or len(around) == 2  # beyond its end there is nothing to compare with
    return (float(np.interp(steps, around, levels)) if inside else float("nan")), before * per_step


def _premise(grpo: RunFolder, distances: Sequence[int], root: Path | None) -> dict[int, dict[str, float]]:
    """What guide and own resample solve of the prompts that the base policy fails; at Δ = 0 both are the resample."""
    later = [distance for distance in distances if distance] or [grpo.config.checkpoint_every]
    (records,) = measure_premise(grpo.config, root, quiet=True, origins=(0,), distances=later).values()
    own = records[0]["own"]["value"]
    solves = {0: own} | {record["distance"]: record["shown"]["value"] for record in records}
    return {
        distance: {"guide_solves": solves[distance], "own_solves": own, "lead": solves[distance] - own}
        for distance in distances
    }


# Results


def map_markdown(table: pd.DataFrame) -> str:
    """The map in Markdown: a row per rate and distance. Bold: Holm's p over the cells is below 0.05."""
    groups = list(table.groupby(["learning_rate", "distance"]))
    gains = [rows["difference"].dropna().to_numpy(float) for _, rows in groups]
    p = [paired_t_test(values) if len(values) > 1 else None for values in gains]
    known = np.array([value for value in p if value is not None])
    adjusted = iter(holm(known)) if known.size else iter(())
    words = ("the guide solves", "own resample", "gain at equal total rollouts", "p, Holm")
    lines = []
    for ((rate, distance), rows), values, alone in zip(groups, gains, p, strict=True):
        corrected = None if alone is None else float(next(adjusted))
        lost = int(rows["npo"].isna().sum())
        text = _interval_text(values) if len(values) or not lost else "failed"
        shown = f"**{text}**" if corrected is not None and corrected < 0.05 else text
        solves = ["–" if np.isnan(m) else f"{m:.2f}" for m in (rows[n].mean() for n in ("guide_solves", "own_solves"))]
        cells = (f"{rate:g}", f"{distance:g}", *solves, shown, "" if corrected is None else f"{corrected:.3f}")
        seeds = f"{len(values)}, {lost} failed" if lost else str(len(values))
        lines.append((*cells, seeds))
    found = premise_predicts(table)
    answer = "" if found is None else f"\n\nDoes the premise predict the gain? {in_words(found)}"
    return markdown_table(["learning rate", "Δ", *words, "seeds"], lines) + answer


def _interval_text(values: np.ndarray) -> str:
    if len(values) < 2:
        return f"{values[0]:+.3f}" if len(values) else "–"
    found = mean_interval(values)
    return f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def premise_predicts(table: pd.DataFrame) -> Estimate | None:
    """Spearman's ρ over cells of the premise's lead with the gain, seed by seed; its mean and t interval over seeds.

    A cell that failed with every seed is left out on both sides.

    Returns:
        None with fewer than two seeds that have all cells, or where a side does not vary.
    """
    columns = ["learning_rate", "distance"]
    grids = {name: table.pivot(index="seed", columns=columns, values=name) for name in ("lead", "difference")}
    both = grids["lead"].notna() & grids["difference"].notna()
    there = both.columns[both.any()]
    seeds = sorted(both.index[both[there].all(axis=1)])
    grids = {name: grid[there] for name, grid in grids.items()}
    if len(seeds) < 2:
        return None
    rho = rank_correlation(*(grids[name].loc[seeds].to_numpy(float) for name in ("lead", "difference")))
    return mean_interval(rho) if np.isfinite(rho).all() else None


def in_words(found: Estimate) -> str:
    """The answer of `premise_predicts` as a sentence; none from fewer seeds than a prediction by S needs."""
    sure = "Yes" if found.low > 0 else "The other way round" if found.high < 0 else "Not shown"
    answer = sure if found.n >= LEAST else FEW.capitalize()
    return (
        f"{answer}: Spearman's ρ of the guide's lead over an own resample with the gain is {found.value:+.2f} "
        f"({found.low:+.2f} to {found.high:+.2f}), {found.n} seeds."
    )


def markdown(out: Path | None = None) -> str:
    """The map in Markdown, or "" where there is none among the results."""
    return map_markdown(read_map(out)) if has_map(out) else ""
