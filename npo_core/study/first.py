"""The signal study over seeds: runs what is missing, and writes the small results that figures and claims rest on.

`python -m npo_core signal-study` makes `data/results/`: `interventions.json` (manual interventions beside GRPO),
`signal.json` (Q, V, S, Δ*, proxies, c), `gain.json` (does S predict the gain) and `signal-seed<N>/` (the measurement of
the first seed). Runs are resumed and loaded as always; intervals are over seeds, from Student's t.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..files import write_json
from ..method.curve import MEASURED_COSTS, QUALITIES, SIGNALS, rank_correlation
from ..method.stats import mean_interval
from ..runs.checkpoints import checkpoint_folder
from ..runs.config import RunConfig, resolve_config
from ..runs.folder import RunFolder, environment
from ..runs.measurement import PROXIES
from ..stages import run as stages
from ..stages.signal import default_origins, measure_run, settings_for
from ..world.policies import load_policy
from .comparisons import LEVEL_SHARE, SPEED_UP_COUNTS, reference_level, speed_up_ratios
from .findings import PREDICTORS, SCHEMA, results_folder
from .gain import GainPlan, GainStudy

ARMS = {"GRPO": None, "NPO early": {"late_step": 0}, "NPO late": {"scout_steps": 0}, "NPO early+late": {}}
"""Arms of the manual interventions: settings of method npo, None for GRPO."""

PRIMARY = {"current": "signal_gradient_current", "exact": "signal_gradient_exact"}
"""The signal that is said to predict the gain in each ratio mode: Q over the variance measured in that mode."""

OUTCOMES = ("gain", "pass_rate_gain")
"""Gains over the unguided arm: test pass rate (primary), and on-policy pass rate of the last third of the window."""

GAIN_PLANS = (GainPlan(origins=(0,)),)
"""From the base policy alone: arms from the plateau are planned but not run yet, see docs/log.md."""

OVERRIDES = {"checkpoint_keep": 0}
"""The study's GRPO runs keep every checkpoint resumable; settings are otherwise the preset's."""
DISTANCES, ALSO = 12, (20, 60, 160)
"""Distances that are measured from each origin in the study; the second are those of the gain plan."""


def write(
    preset: str,
    seeds: Sequence[int],
    parts: Sequence[str] = ("interventions", "signal", "gain"),
    measurement: Mapping[str, Any] | None = None,
    plans: Sequence[GainPlan] | None = None,
    root: Path | None = None,
    out: Path | None = None,
    quiet: bool = False,
) -> list[Path]:
    """Do the study and write its results; what is on disk is not done again.

    Args:
        preset: Name of a preset.
        seeds: Seeds, two or more for an interval.
        parts: "interventions", "signal" and "gain"; the last needs the second.
        measurement: Settings of `SignalSettings` that are not its defaults.
        plans: Plans of the gain study, `GAIN_PLANS` if None.
        root: Folder of all runs; the project's `data/runs` if None.
        out: Folder of the results; the project's `data/results` if None.
        quiet: Without progress bars.

    Returns:
        The files written.
    """
    folder = results_folder() if out is None else Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    if "interventions" in parts:
        found["interventions"] = interventions(preset, seeds, OVERRIDES, root, quiet)
    if "signal" in parts:
        options = {"distances": DISTANCES, "also": ALSO, "root": root, "out": folder, "quiet": quiet}
        found["signal"], table = signal(preset, seeds, OVERRIDES, measurement or {}, **options)
        if "gain" in parts:
            found["gain"] = gain(preset, seeds, OVERRIDES, plans or GAIN_PLANS, table, root, quiet)
    for name, content in found.items():
        write_json(folder / f"{name}.json", content)
    return [folder / f"{name}.json" for name in found]


def interventions(
    preset: str, seeds: Sequence[int], overrides: Mapping[str, Any], root: Path | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Manual interventions beside GRPO, each seed on both clocks.

    GRPO and the run with both interventions come first: the other two share their beginnings. `overrides` are GRPO's.
    """
    runs: dict[tuple[str, int], RunFolder] = {}
    for seed in seeds:
        for arm in ("GRPO", "NPO early+late", "NPO early", "NPO late"):
            runs[arm, seed] = stages.run(_arm(arm, preset, seed, overrides), root, quiet)
    records = [_run_record(arm, seed, runs[arm, seed]) for seed in seeds for arm in ARMS]
    differences = []
    for arm in ARMS:
        if arm == "GRPO":
            continue
        for clock in ("compute", "policy"):
            values = []
            for seed in seeds:
                result, grpo = runs[arm, seed].result(), runs["GRPO", seed]
                same = grpo.config.compute_steps if clock == "compute" else result["policy_steps"]
                values.append(result["final"]["average"] - _score_at(grpo, same))
            differences.append({"arm": arm, "clock": clock, **_over_seeds(values)})
    return {
        "schema": SCHEMA,
        **_provenance(preset, seeds, overrides),
        "runs": records,
        "speed_up": _speed_up(runs, seeds),
        "differences": differences,
    }


def _arm(arm: str, preset: str, seed: int, overrides: Mapping[str, Any]) -> RunConfig:
    stage = ARMS[arm]
    return (
        resolve_config("grpo", preset, seed, overrides) if stage is None else resolve_config("npo", preset, seed, stage)
    )


def _run_record(arm: str, seed: int, run: RunFolder) -> dict[str, Any]:
    result, lines = run.result(), run.metrics()
    chosen = ("policy_steps", "compute_steps", "rollouts", "offline_rollouts")
    stages_of = [
        {name: entry[name] for name in ("stage", "policy_step", "compute_step", "distance", "cached")}
        for entry in result["interventions"]
    ]
    return {
        "arm": arm,
        "seed": seed,
        **{name: result[name] for name in chosen},
        "base": result["base"]["average"],
        "final": result["final"]["average"],
        "suites": result["final"]["suites"],
        "interventions": stages_of,
        "policy_step": [line["policy_step"] for line in lines],
        "compute_step": [line["compute_step"] for line in lines],
        "pass_rate": [round(line["npo/pass_rate"], 5) for line in lines],
        "entropy": [round(line["npo/entropy"], 5) for line in lines],
    }


def _score_at(run: RunFolder, step: int) -> float:
    """Test pass rate of a GRPO run at a policy step; evaluated once and kept beside the checkpoint's run."""
    if step == run.config.compute_steps:
        return run.result()["final"]["average"]
    path = run.path / "scores" / f"{step:06d}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        policy = load_policy(checkpoint_folder(run.path / "branches" / "00", step))
        world = stages.prepare(run.config, quiet=True)
        write_json(path, stages.evaluate_policy(run.config, policy, world, f"GRPO at {step}", quiet=True))
    return json.loads(path.read_text())["average"]


def _speed_up(runs: Mapping[tuple[str, int], RunFolder], seeds: Sequence[int]) -> dict[str, Any]:
    """Compute steps of GRPO over those of NPO to a reference level, counted three ways."""
    found, levels = [], []
    for seed in seeds:
        npo = runs["NPO early", seed]
        slow, fast = (
            [{**line, "pass_rate": line["npo/pass_rate"]} for line in run.metrics()]
            for run in (runs["GRPO", seed], npo)
        )
        first = npo.result()["interventions"][0]["compute_step"]
        caches = (e for e in npo.effective_events() if e["event"] == "cache" and e["compute_step"] == first)
        found.append(speed_up_ratios(slow, fast, next(caches)["rollouts"] / npo.config.rollouts_per_step))
        levels.append(reference_level(slow))
    columns = {count: [None if np.isnan(one[count]) else one[count] for one in found] for count in SPEED_UP_COUNTS}
    rows = [{"arm": "NPO early", "count": count, **_over_seeds(values)} for count, values in columns.items()]
    return {"level_share": LEVEL_SHARE, "levels": levels, "rows": rows}


def signal(
    preset: str,
    seeds: Sequence[int],
    overrides: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    distances: int = 12,
    also: Sequence[int] = (),
    root: Path | None = None,
    out: Path | None = None,
    quiet: bool = False,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Measure Q, V and S along the GRPO run of each seed.

    `settings` are those of `SignalSettings` that are not the run's own or the defaults.

    Returns:
        What `signal.json` holds, and the rows of all seeds' tables.
    """
    tables, summaries = [], []
    for seed in seeds:
        config = resolve_config("grpo", preset, seed, overrides)
        own = settings_for(config, **settings)
        origins = default_origins(config)
        measured = measure_run(config, origins, own, distances=distances, also=also, root=root, quiet=quiet)
        tables.append(pd.read_parquet(measured.folder / "table.parquet").assign(seed=seed))
        summaries.append(measured.summary)
        if seed == seeds[0] and out is not None:
            target = out / f"signal-seed{seed}"
            target.mkdir(parents=True, exist_ok=True)
            for name in ("table.parquet", "signal.json"):
                shutil.copy(measured.folder / name, target / name)
    pooled = {
        origin: {
            "failing": [summary["origins"][origin]["failing"] for summary in summaries],
            "optimum": {
                name: [summary["origins"][origin]["optimum"][name] for summary in summaries] for name in SIGNALS
            },
            "distances": _distances(tables[0], int(origin)),
            "fit": {
                **{
                    quality: [summary["origins"][origin]["fit"][quality]["kl"] for summary in summaries]
                    for quality in QUALITIES
                },
                **{
                    cost: [summary["origins"][origin]["fit"]["quality"][cost] for summary in summaries]
                    for cost in MEASURED_COSTS
                },
            },
            "agreement": {
                cost: {
                    proxy: _over_seeds([s["origins"][origin]["agreement"][cost][proxy]["value"] for s in summaries])
                    for proxy in PROXIES
                }
                for cost in MEASURED_COSTS
            },
        }
        for origin in summaries[0]["origins"]
    }
    constants = {
        kl: {cost: _over_seeds([s["c"][kl][cost]["value"] for s in summaries]) for cost in MEASURED_COSTS}
        for kl in summaries[0]["c"]
    }
    about = {"schema": SCHEMA, **_provenance(preset, seeds, overrides), "settings": summaries[0]["settings"]}
    return {**about, "origins": pooled, "c": constants}, pd.concat(tables, ignore_index=True)


def _distances(table: pd.DataFrame, origin: int) -> list[float]:
    """Distances of 0 and more from an origin, policy steps."""
    found = table.loc[(table["origin"] == origin) & (table["distance"] >= 0), "distance"]
    return sorted(float(distance) for distance in found)


def gain(
    preset: str,
    seeds: Sequence[int],
    overrides: Mapping[str, Any],
    plans: Sequence[GainPlan],
    table: pd.DataFrame,
    root: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Gain of each arm over the unguided one, joined with the signal of its source, and their rank correlation.

    Args:
        preset: Name of a preset.
        seeds: Seeds.
        overrides: Settings that replace the preset's.
        plans: What is compared, one plan for an origin.
        table: Rows of `signal`; every source of the plans must be in it.
        root: Folder of all runs.
        quiet: Without progress bars.
    """
    arms = []
    for seed in seeds:
        config = resolve_config("grpo", preset, seed, overrides)
        records = [record for plan in plans for record in GainStudy(config, plan, root, quiet).run()]
        unguided = {record["origin"]: record for record in records if record["source"] == "unguided"}
        for record in records:
            if record["source"] == "unguided":
                continue
            arms.append(_arm_record(record, unguided[record["origin"]], table))
    cells = [(origin, mode) for plan in plans for origin in plan.origins for mode in plan.modes]
    correlation = {
        outcome: [row for cell in cells for row in _correlation(arms, *cell, outcome)] for outcome in OUTCOMES
    }
    about = {"schema": SCHEMA, **_provenance(preset, seeds, overrides), "plans": [asdict(plan) for plan in plans]}
    return {
        **about,
        "primary": PRIMARY,
        "arms": arms,
        "correlation": correlation["gain"],
        "correlation_on_policy": correlation["pass_rate_gain"],
    }


def _correlation(arms: Sequence[Mapping[str, Any]], origin: int, mode: str, outcome: str) -> list[dict[str, Any]]:
    """Rank correlation of each predictor with an outcome over the sources of a seed, a row per predictor."""
    chosen = pd.DataFrame([arm for arm in arms if arm["origin"] == origin and arm["mode"] == mode])
    return [
        {
            "origin": origin,
            "mode": mode,
            "signal": name,
            **_bounded(_over_seeds([_rho(part, name, outcome) for _, part in chosen.groupby("seed")])),
        }
        for name in PREDICTORS
    ]


def _bounded(rho: dict[str, Any]) -> dict[str, Any]:
    """The same with an interval that does not leave [−1, 1], which Student's t knows nothing of."""
    cut = {"low": max, "high": min}
    return rho | {
        end: cut[end](rho[end], bound) for end, bound in (("low", -1.0), ("high", 1.0)) if rho[end] is not None
    }


def _arm_record(record: Mapping[str, Any], unguided: Mapping[str, Any], table: pd.DataFrame) -> dict[str, Any]:
    match = table[
        (table["seed"] == record["seed"])
        & (table["origin"] == record["origin"])
        & (table["source"] == record["source"])
    ]
    if len(match) != 1:
        raise ValueError(
            f"The measurement holds {len(match)} rows for seed {record['seed']}, origin {record['origin']}, source "
            f"{record['source']}; it must hold one. Measure the distances of the plan too (also=…)."
        )
    measured = match.iloc[0]
    kept = (
        "seed",
        "origin",
        "source",
        "distance",
        "mode",
        "prompts",
        "cached",
        "replaced_slots",
        "guide_kl",
        "entropy",
    )
    return {
        **{name: record[name] for name in kept},
        "final": record["final"]["average"],
        "gain": record["final"]["average"] - unguided["final"]["average"],
        "pass_rate_gain": record["pass_rate"] - unguided["pass_rate"],
        **{name: float(measured[name]) for name in (*PREDICTORS, "token_kl", "token_kl_policy", *MEASURED_COSTS)},
    }


def _rho(part: pd.DataFrame, name: str, outcome: str = "gain") -> float | None:
    value = rank_correlation(part[[name]].to_numpy(float).T, part[[outcome]].to_numpy(float).T)[0]
    return float(value) if np.isfinite(value) else None


def _over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean over seeds with its t interval; seeds without a value are listed as None and left out of both."""
    known = np.array([value for value in values if value is not None], dtype=float)
    out: dict[str, Any] = {"value": None, "low": None, "high": None, "per_seed": list(values)}
    if len(known):
        out["value"] = float(known.mean())
    if len(known) > 1:
        estimate = mean_interval(known)
        out |= {"low": estimate.low, "high": estimate.high}
    return out


def _provenance(preset: str, seeds: Sequence[int], overrides: Mapping[str, Any]) -> dict[str, Any]:
    about = environment()
    return {
        "preset": preset,
        "seeds": list(seeds),
        "overrides": dict(overrides),
        "packages": about["packages"],
        "git_revision": about["git_revision"],
    }
