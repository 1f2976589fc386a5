"""A run folder as the explorer shows it: metric lines, decisions, groups, guides and probes, in plain JSON values.

Nothing is written and nothing is trained here; a run that is still being written is read as far as it is.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import read_json, read_lines
from ..runs.folder import SCHEMA, effective, runs_folder
from .completions import is_completions_folder, read_completions
from .groups import Prompts, read_caches, read_guided, read_tables

METRICS = {
    "p": "npo/pass_rate",
    "r": "npo/reward",
    "e": "npo/entropy",
    "w": "npo/all_wrong_groups",
    "k": "npo/replaced_slots",
    "f": "npo/refused_guides",
    "d": "npo/guide_kl",
}
"""Short names of the metrics that the page shows."""

SHOWN_SETTINGS = (
    *("num_generations", "tau_gate", "advantage_scale", "ratio_mode", "ratio_truncation", "ratio_gamma"),
    *(
        "guide_behaviour",
        "guides_per_group",
        "guide_prefix",
        "placement",
        "pool_cutoff",
        "pool_expiry",
        "pool_capacity",
    ),
    *("variance_proxy", "variance_c", "quality_floor", "probe_rollouts", "compute_steps", "rollout_every"),
)
"""Settings that the page's sums need or names."""


OF_THE_TRAINER = (
    "tau_gate", "ratio_mode", "ratio_truncation", "ratio_gamma", "guide_behaviour", "guides_per_group", "placement",
    "guide_prefix",
)  # fmt: skip
"""Settings that a trainer has under the name of the run's."""


def find_run(run: str | Path) -> Path:
    """Folder of a run: a path, or the name of a run in `runs_folder()`.

    Raises:
        ValueError: Neither, or a folder that is no run; the message says what is there.
    """
    path = Path(run).expanduser()
    if not path.is_dir() and (runs_folder() / run).is_dir():
        path = runs_folder() / run
    if not path.is_dir():
        known = sorted(found.parent.name for found in runs_folder().glob("*/config.json"))
        there = f" Runs there: {', '.join(known[:8])}{', …' if len(known) > 8 else ''}." if known else ""
        raise ValueError(f"{run} is no folder, and no run of that name is in {runs_folder()}.{there}")
    if not (path / "config.json").is_file() and not (path / "metrics.jsonl").is_file():
        if is_completions_folder(path):
            return path
        inner = sorted(found.parent.name for found in path.glob("*/metrics.jsonl"))
        hint = f" It holds the runs {', '.join(inner[:8])}; give one of them." if inner else ""
        raise ValueError(
            f"{path} is no run: neither config.json nor metrics.jsonl (a run of npo_core) nor "
            f"completions/completions_*.parquet (TRL's log_completions) is in it.{hint}"
        )
    return path


def read_run(run: str | Path) -> dict[str, Any]:
    """All that the page shows of a run, as JSON values.

    Raises:
        ValueError: No run, or one whose files this version cannot read; the message names the file.
    """
    path = find_run(run)
    if not (path / "metrics.jsonl").is_file() and is_completions_folder(path):
        return read_completions(path)
    config, result = _as_trained(path), _json(path / "result.json")
    lines = list(read_lines(path / "metrics.jsonl"))
    for line in lines:
        missing = {"policy_step", "compute_step", "branch"} - line.keys()
        if missing:
            raise ValueError(
                f"{path / 'metrics.jsonl'} has a line without {', '.join(sorted(missing))}; it is no log of npo_core."
            )
    events = [_timeless(event) for event in effective(list(read_lines(path / "events.jsonl")))]
    prompts = Prompts(config.get("pool_cutoff", 0.125))
    last = max((line["compute_step"] for line in lines), default=0)
    shown = [_line(line, prompts) for line in lines]
    clock = _clock(events)
    steps = read_tables(path, prompts, clock, last) + read_guided(path, prompts, clock, last)
    return {
        "name": path.name,
        "kind": "npo",
        "method": config.get("method", ""),
        "preset": config.get("preset", ""),
        "seed": config.get("seed"),
        "finished": bool(result),
        "scores": {name: result[name].get("average") for name in ("base", "final") if name in result},
        "notes": _notes(config, result, lines),
        "config": {name: config[name] for name in SHOWN_SETTINGS if name in config},
        "lines": shown,
        "events": events,
        "steps": steps,
        "caches": read_caches(path, events, prompts),
        "probes": _probes(path, prompts, last),
        "prompts": prompts.records,
    }


def _as_trained(run: Path) -> dict[str, Any]:
    """Settings of a run; of those that its trainer has too, the trainer's, which a factory of one's own decides."""
    config, trained = _json(run / "config.json"), _json(run / "factory.json")
    own = {name: trained[name] for name in OF_THE_TRAINER if name in trained}
    if "num_generations" in trained:
        appended = trained.get("guides_per_group", 0) if trained.get("placement") == "append" else 0
        own["num_generations"] = trained["num_generations"] - appended
    return config | own


def _json(path: Path) -> dict[str, Any]:
    """Content of a JSON file, empty where there is none."""
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}. Remove it, or give another run.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not the settings of a run.")
    return content


def _timeless(event: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name != "time"}


def _notes(config: Mapping[str, Any], result: Mapping[str, Any], lines: Sequence[Any]) -> list[str]:
    notes = []
    if result and result.get("schema") != SCHEMA:
        notes.append(
            f"Written by another version (result.json has schema {result.get('schema')}, this version writes "
            f"{SCHEMA}): shown as far as its files are known."
        )
    if not result:
        total = config.get("compute_steps")
        spent = max((line["compute_step"] for line in lines), default=0)
        notes.append(f"Not finished: {spent}{f' of {total}' if total else ''} steps so far.")
    return notes


def _line(line: Mapping[str, Any], prompts: Prompts) -> dict[str, Any]:
    shown: dict[str, Any] = {"s": line["policy_step"], "c": line["compute_step"], "b": line["branch"]}
    for short, name in METRICS.items():
        value = line.get(name)
        if value is not None and math.isfinite(value):
            shown[short] = round(value, 5)
    shown["g"] = [[prompts.place(uid), rate] for uid, rate in line.get("groups", {}).items()]
    return shown


def _clock(events: Sequence[Mapping[str, Any]]) -> dict[int, tuple[int, int]]:
    """Policy step and compute step at which each branch begins."""
    return {e["branch"]: (e["start"], e["compute_start"]) for e in events if e["event"] == "segment"}


def _probes(path: Path, prompts: Prompts, last: int) -> list[dict[str, Any]]:
    """Outcomes by prompt of the probes, where the run recorded them; see `control.record`."""
    probes = []
    for file in sorted((path / "probes").glob("*.json")):
        record = _json(file)
        if record["compute_step"] > last:
            continue  # of a stretch that a restart has not come to again
        probes.append(
            {
                "s": record["policy_step"],
                "c": record["compute_step"],
                "k": record["rollouts"],
                "prompts": [[prompts.place(p["uid"]), p["correct"], p["failed_at"]] for p in record["prompts"]],
                "candidates": [
                    {"distance": each["distance"], "sums": each["sums"], "tokens": each["tokens"]}
                    for each in record["candidates"]
                ],
            }
        )
    return probes
