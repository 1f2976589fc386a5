"""The signal over seeds: premise, Q, V and S from several policies of GRPO, and whether S predicts the gain.

`python -m npo_core signal-study` measures the GRPO run of each seed, trains guided windows that a prediction is held
against, and writes `data/results/signal.json`, on which the claims about S are decided. A second call goes on where the
first stopped. The plan is in docs/evidence.md; what one seed does is `stages.signal_run` and `gain`. Ours.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..files import as_json, read_json, read_table, write_json
from ..lock import Lock
from ..method.curve import rank_correlation
from ..method.quantities import Cost, Quality, Signal
from ..method.stats import mean_interval
from ..runs.config import RunConfig
from ..runs.measurement import read_pairs, read_premise, summarise
from ..runs.settings import GRADIENTS, SignalSettings
from ..runs.validation import WORLD
from ..stages.signal import MeasuredSignal
from ..stages.signal_run import measure_run, settings_for
from .arms import arm_config
from .findings import SCHEMA, results_folder
from .gain import GainPlan, GainStudy
from .joining import join_signal, require_joinable_signal
from .signal_claims import interior_peak, predicts, premise_holds, shapes

ORIGINS = (0, 100, 200)
"""Policy steps that the signal is measured from."""

DISTANCES = (0, 10, 20, 40, 60, 100, 160)
"""Distances of both: of the signal, and of the guides of a window; the end of the run is a guide too."""

GAIN = GainPlan(origins=(0, 100), distances=DISTANCES, window=30, teacher=False)
"""Guided windows: eight sources from each origin, in two ratio modes."""

COST_OF = {"current": Cost.GRADIENT_CURRENT, "exact": Cost.GRADIENT_EXACT}
"""The measured V of each ratio mode."""

PREDICTORS = ("signal", "quality", "lead", "lead over cost")
"""What a gain is predicted from: S; Q; Q less the own resample's (which ranks as Q does); that over V."""

RESULT = "signal.json"
"""File of the results, beside those of the arms."""


def measure_seed(
    config: RunConfig, plan: GainPlan, origins: Sequence[int], root: Path | None = None, quiet: bool = False
) -> dict[str, Any]:
    """One seed: what was measured of the signal, and the gain of each window.

    Args:
        config: The GRPO run; it is made first if it is not there.
        plan: Guided windows.
        origins: Policy steps that the signal is measured from, those of the plan among them.
        root: Folder of all runs; the project's `data/runs` if None.
        quiet: Without progress bars.
    """
    last = config.compute_steps
    also = sorted({d for d in plan.distances if d} | {last - origin for origin in origins})
    settings = settings_for(config, gradients=GRADIENTS)  # what S is made of must not depend on a machine's memory
    measured = measure_run(config, origins, settings, distances=1, also=also, root=root, quiet=quiet)
    gain = GainStudy(config, plan, root, quiet).run()
    table = read_table(measured.folder / "table.parquet")
    summary = near(measured, max(plan.distances))
    return {"seed": config.seed, "config": asdict(config), "summary": summary, "table": table, "gain": gain}


def near(measured: MeasuredSignal, farthest: int) -> dict[str, Any]:
    """Summary up to the plan's largest distance: the end of the run is a source of gains, and no part of the curves.

    A later origin has the end nearer, so a curve up to there would be another curve from each origin.
    """
    pairs = [pair for pair in measured.pairs if pair.distance is None or pair.distance <= farthest]
    return summarise(read_pairs(measured.folder, pairs), SignalSettings(**measured.summary["settings"]))


def summarise_seeds(seeds: Sequence[Mapping[str, Any]], plan: GainPlan) -> dict[str, Any]:
    """What `signal.json` holds, from what `measure_seed` gave.

    Returns:
        `seeds`; `configuration`: the settings of GRPO, its seed left out; `origins`: by origin `distances`, and lists
        over seeds of `optimum` (by S), `fit` (by Q and V) and `premise` (a list by Δ; `holds` is Holm's over them), all
        up to the plan's largest distance; `table`: Q, V and S by seed, origin and distance, the end of the run too;
        `gain`: test pass rate of each guided window less the unguided one's; `prediction`: Spearman's ρ of each
        predictor with the gain over the sources, by origin and mode, a value a seed, with mean and t interval over the
        `n` seeds that have one (no interval below two).
    """
    table = [{"seed": one["seed"], **row} for one in seeds for row in one["table"]]
    gains = [{"seed": one["seed"], **row} for one in seeds for row in gain_rows(one["gain"])]
    origins = {}
    for origin in seeds[0]["summary"]["origins"]:
        entries = [one["summary"]["origins"][origin] for one in seeds]
        rows = [
            row
            for row in table
            if str(row["origin"]) == origin
            and row["distance"] is not None
            and 0 <= row["distance"] <= max(plan.distances)
        ]
        origins[origin] = {
            "distances": sorted({row["distance"] for row in rows}),
            "optimum": {name: [entry["optimum"][name] for entry in entries] for name in entries[0]["optimum"]},
            "fit": {
                **{str(of): [entry["fit"][of][Cost.GRADIENT_CURRENT] for entry in entries] for of in Quality},
                **{str(of): [entry["fit"][Quality.MANY][of] for entry in entries] for of in Cost},
            },
            "premise": [[{**one, "holds": read_premise(one).holds} for one in entry["premise"]] for entry in entries],
        }
    return as_json(
        {
            **_about([one["seed"] for one in seeds], seeds[0]["config"], plan),
            "origins": origins,
            "table": table,
            "gain": gains,
            "prediction": predictions(table, gains),
        }
    )


def _about(seeds: Sequence[int], config: Mapping[str, Any], plan: GainPlan) -> dict[str, Any]:
    """What is known of the file before anything has run."""
    return {
        "schema": SCHEMA,
        "world": WORLD,
        "seeds": list(seeds),
        "configuration": {name: value for name, value in config.items() if name != "seed"},
        "window": plan.window,
    }


def gain_rows(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Gain of each guided window of one seed: its test pass rate less that of GRPO over the same steps."""
    unguided = {one["origin"]: one["final"]["average"] for one in records if one["source"] == "unguided"}
    kept = ("origin", "distance", "mode", "prompts", "cached", "replaced_slots", "guide_kl")
    return [
        {**{name: one[name] for name in kept}, "gain": one["final"]["average"] - unguided[one["origin"]]}
        for one in records
        if one["source"] != "unguided"
    ]


def predictions(table: Sequence[Mapping[str, Any]], gains: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Does it rank the sources as their gains do? Spearman's ρ by origin, mode and predictor, a value a seed."""
    pairs = {(row["seed"], row["origin"], row["distance"]): row for row in table}
    cells: dict[tuple[int, str], dict[int, list[Mapping[str, Any]]]] = {}
    for row in gains:
        cells.setdefault((row["origin"], row["mode"]), {}).setdefault(row["seed"], []).append(row)
    out = []
    for (origin, mode), by_seed in cells.items():
        for predictor in PREDICTORS:
            rhos = []
            for seed, rows in by_seed.items():
                own = pairs[seed, origin, 0]
                found = [_predicted(predictor, pairs[seed, origin, row["distance"]], own, mode) for row in rows]
                rhos.append(rank_correlation(np.array([found]), np.array([[row["gain"] for row in rows]]))[0])
            defined = [rho for rho in rhos if np.isfinite(rho)]
            spread = mean_interval(np.array(defined)) if len(defined) > 1 else None
            out.append(
                {
                    **{"origin": origin, "mode": mode, "predictor": predictor, "seeds": list(by_seed), "rho": rhos},
                    **{"mean": float(np.mean(defined)) if defined else None, "n": len(defined)},
                    "sources": len(rows),
                    **{"low": spread and spread.low, "high": spread and spread.high},
                }
            )
    return out


def _predicted(predictor: str, row: Mapping[str, Any], own: Mapping[str, Any], mode: str) -> float:
    cost = COST_OF[mode]
    signal, quality, spent, resample = (
        np.nan if value is None else value  # as a file has it
        for value in (row[Signal(Quality.MANY, cost).name], row[Quality.MANY], row[cost], own[Quality.MANY])
    )
    lead = quality - resample
    return {"signal": signal, "quality": quality, "lead": lead, "lead over cost": lead / spent}[predictor]


def run_signal_study(
    preset: str,
    seeds: Sequence[int],
    overrides: Mapping[str, Any] | None = None,
    plan: GainPlan = GAIN,
    origins: Sequence[int] = ORIGINS,
    root: Path | None = None,
    out: Path | None = None,
    quiet: bool = False,
) -> Path:
    """Measure all seeds, one after the other, and write `signal.json`; what is there of them is loaded.

    Of two at once, each waits for what the other is making and loads it. Other seeds that the file has stay in it.

    Args:
        preset: Name of a preset.
        seeds: Seeds, measured in this order; each counts once.
        overrides: Settings of the GRPO run that are not the preset's.
        plan: Guided windows.
        origins: Policy steps that the signal is measured from.
        root: Folder of all runs; the project's `data/runs` if None.
        out: Folder of the results; the project's `data/results` if None.
        quiet: Without progress bars.

    Raises:
        ValueError: No seed; the plan needs checkpoints that the run has not, see `GainPlan.check`.
        ResultsRefused: The seeds do not belong with those in the file, see `joining.join_signal`.
    """
    if not len(seeds):
        raise ValueError("No seed is named, so there is nothing to measure; name at least one.")
    folder = results_folder(out)
    configs = [arm_config("GRPO", preset, seed, overrides) for seed in dict.fromkeys(seeds)]
    plan.check(configs[0])
    # before the hours that it takes, not after
    require_joinable_signal(_about(seeds, json.loads(configs[0].to_json()), plan), folder / RESULT)
    found = [measure_seed(config, plan, origins, root, quiet) for config in configs]
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder / "lock.json", f"The results {folder}").holding():
        summary = summarise_seeds(sorted(found, key=lambda one: one["seed"]), plan)
        write_json(folder / RESULT, as_json(join_signal(summary, folder / RESULT, predictions)))
    return folder / RESULT


def in_words(path: Path) -> str:
    """The claims of a `signal.json`, a line each."""
    found = read_json(Path(path))
    claims = (premise_holds, interior_peak, shapes, predicts)
    lines = [f"{claim.claim}: {claim.verdict}; {claim.ours}." for claim in (one(found) for one in claims)]
    return "\n".join([f"Seeds {', '.join(map(str, found['seeds']))}.", *lines])
