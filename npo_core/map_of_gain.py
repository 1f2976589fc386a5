"""Map of the gain: where does near-future guidance pay at equal compute?

NPO (early and late) and GRPO over learning rate × share of hard facts, in shorter runs. The learning rate sets how soon
and how hard the policy collapses, the share of hard facts how much there is to find beyond the plateau. The plan is in
docs/evidence.md; `python -m npo_core map` runs what is missing and writes `data/results/map.csv`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import stages
from .config import RunConfig, resolve_config
from .evidence import Cell
from .findings import SCHEMA, results_folder
from .results import ResultsRefused
from .runs import RunFolder, write_json, write_whole

LEARNING_RATES = (5.0e-5, 1.0e-4, 3.0e-4)
HARD_SHARES = (0.1, 0.25, 0.4)
"""Shares of hard facts; easy facts keep theirs, middling ones give way."""

SCHEDULE = {
    "compute_steps": 160,
    "scout_steps": 20,
    "early_window": 20,
    "late_step": 80,
    "late_start": 40,
    "checkpoint_keep": 0,
}
"""Length and interventions of the map's runs."""

ARMS = {"GRPO": "grpo", "NPO": "npo"}
MAP, ABOUT = "map.csv", "map.json"
"""File names in the folder of results."""


def map_config(
    arm: str,
    preset: str,
    seed: int,
    learning_rate: float,
    hard_share: float,
    overrides: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Settings of one run of the map."""
    plain = resolve_config(ARMS[arm], preset, seed, {**SCHEDULE, **(overrides or {})})
    return plain.with_changes(learning_rate=learning_rate, middling_share=round(1 - plain.easy_share - hard_share, 6))


def plan_map(
    preset: str,
    seeds: Sequence[int],
    learning_rates: Sequence[float] = LEARNING_RATES,
    hard_shares: Sequence[float] = HARD_SHARES,
    overrides: Mapping[str, Any] | None = None,
) -> list[Cell]:
    """Runs of the map, seed by seed, GRPO before NPO, which shares its beginning."""
    return [
        Cell(arm, seed, map_config(arm, preset, seed, rate, share, overrides))
        for seed in seeds
        for rate in learning_rates
        for share in hard_shares
        for arm in ARMS
    ]


def prepare_bases(cells: Sequence[Cell], quiet: bool = False) -> None:
    """Make the base policies of the map before its runs start side by side."""
    for config in {cell.config.middling_share: cell.config for cell in cells}.values():
        stages.prepare(config, quiet)


def collect_map(cells: Sequence[Cell], root: Path | None = None, out: Path | None = None) -> list[Path]:
    """Write `map.csv`, a row per cell and seed, and `map.json`, what made it.

    Columns: learning_rate, hard_share, seed, grpo and npo (final test pass rates), difference, plateau and slope (mean
    and change of GRPO's on-policy pass rate over its second half).

    Raises:
        ResultsRefused: A run is neither finished nor failed, or versions are mixed.
    """
    folder = results_folder() if out is None else Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    failed = [
        {"arm": cell.arm, "seed": cell.seed, "reason": reason, **_axes(cell.config)}
        for cell in cells
        if (reason := cell.failure(root)) is not None
    ]
    runs = {(cell.arm, cell.seed, *_axes(cell.config).values()): cell.folder(root) for cell in cells}
    lost = {(entry["arm"], entry["seed"], entry["learning_rate"], entry["hard_share"]) for entry in failed}
    open_cells = [key for key, run in runs.items() if key not in lost and run.result() is None]
    if open_cells:
        listed = "; ".join(
            f"{arm}, seed {seed}, rate {rate:g}, share {share:g}" for arm, seed, rate, share in open_cells
        )
        raise ResultsRefused(f"{len(open_cells)} runs of the map are missing: {listed}. Run `make map` to the end.")
    made = {key: json.loads((run.path / "env.json").read_text()) for key, run in runs.items() if key not in lost}
    versions = {json.dumps([env["python"], env["packages"], env["device"]], sort_keys=True) for env in made.values()}
    if len(versions) > 1:
        raise ResultsRefused("The runs of the map have mixed versions:\n" + "\n".join(sorted(versions)))
    rows = [
        {"learning_rate": rate, "hard_share": share, "seed": seed, **_row(run, runs["NPO", seed, rate, share])}
        for (arm, seed, rate, share), run in runs.items()
        if arm == "GRPO" and not {("GRPO", seed, rate, share), ("NPO", seed, rate, share)} & lost
    ]
    about = {
        "schema": SCHEMA,
        "schedule": SCHEDULE,
        "failed": failed,
        "versions": [json.loads(text) for text in versions],
        "configurations": [
            {"arm": cell.arm, "seed": cell.seed, "config": json.loads(cell.config.to_json())} for cell in cells
        ],
    }
    table = pd.DataFrame(rows)
    write_whole(folder / MAP, lambda path: table.to_csv(path, index=False, float_format="%.6g"))
    write_json(folder / ABOUT, about)
    return [folder / MAP, folder / ABOUT]


def _axes(config: RunConfig) -> dict[str, float]:
    share = round(1 - config.easy_share - config.middling_share, 6)
    return {"learning_rate": config.learning_rate, "hard_share": share}


def _row(grpo: RunFolder, npo: RunFolder) -> dict[str, float]:
    rates = [line["npo/pass_rate"] for line in grpo.metrics()]
    half = rates[len(rates) // 2 :]
    tenth = max(1, len(half) // 5)
    finals = [run.result()["final"]["average"] for run in (grpo, npo)]
    return {
        "grpo": finals[0],
        "npo": finals[1],
        "difference": finals[1] - finals[0],
        "plateau": float(np.mean(half)),
        "slope": float(np.mean(half[-tenth:]) - np.mean(half[:tenth])),
    }
