"""Seeds that an earlier call left in a folder of results stay there: results grow seed by seed, on any machine.

A call replaces the seeds that it names and leaves the others, whose runs need not be on this disk. What does not belong
together (other settings, versions, arms, grid) is refused, and nothing is written. Ours.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..files import read_json
from ..runs.folder import deciding
from .results import (
    ABOUT,
    MAP_ABOUT,
    SCORES,
    TRAINING,
    Evidence,
    ResultsRefused,
    check_evidence,
    mixture_complaints,
    read_about,
    read_evidence,
    read_map,
    require_world,
)


def require_one_kind(folder: Path, complaints: Sequence[str]) -> None:
    """Refuse to put results beside those in a folder that they do not belong with, and list why.

    Raises:
        ResultsRefused: There are complaints.
    """
    if complaints:
        listed = "\n".join(f"- {line}" for line in complaints)
        raise ResultsRefused(
            f"The runs do not belong with those in {folder}; give another folder (--out), or make all seeds again "
            f"with one version and one set of settings.\n{listed}"
        )


def require_joinable(about: Mapping[str, Any], folder: Path) -> set[int]:
    """Refuse a study whose results do not belong with those in a folder; asked before its runs too, which take hours.

    Args:
        about: What is known of the study: arms, seeds, suites, same, and runs with arm, seed, config and versions.
        folder: Folder of results; one that has none of other seeds belongs to all.

    Returns:
        Seeds that the folder has beside those of the study.

    Raises:
        ResultsRefused: Other arms or suites, mixed configurations or versions, another world.
    """
    others = _seeds_in(folder / ABOUT) - set(about["seeds"])
    if others:
        there = read_about(folder, (SCORES, TRAINING, ABOUT), "study")
        require_world(there, folder / ABOUT)
        complaints = [
            f"{name}: {_listed(about.get(name, []))} now, {_listed(there.get(name, []))} there"
            for name in ("arms", "suites", "same")
            if set(about.get(name, [])) != set(there.get(name, []))
        ]
        runs = _by_seed([*_of(there["runs"], others), *about["runs"]])
        require_one_kind(folder, [*complaints, *mixture_complaints(runs)])
    return others


def join_evidence(found: Evidence, folder: Path) -> Evidence:
    """Results of the study, and of the seeds in a folder that they lack.

    Args:
        found: Results of some seeds, whole.
        folder: Folder of results; one that has none adds nothing.

    Raises:
        ResultsRefused: See `require_joinable` and `check_evidence`.
    """
    about = found.about
    if not (others := require_joinable(about, folder)):
        return found
    there = read_evidence(folder)
    joined = {"seeds": sorted([*others, *about["seeds"]])}
    joined |= {name: _by_seed([*_of(there.about[name], others), *about[name]]) for name in ("failed", "runs")}
    together = Evidence(
        _joined(there.scores, found.scores, others),
        _joined(there.training, found.training, others),
        {**about, **joined},
    )
    check_evidence(together.scores, together.about)
    return together


def require_joinable_map(grid: Collection[tuple[float, int]], about: Mapping[str, Any], folder: Path) -> set[int]:
    """Refuse a map whose rows do not belong with those in a folder, as `require_joinable` does a study.

    Args:
        grid: Learning rates and distances of its cells.
        about: Its versions and configurations, the latter with arm, seed and config.
        folder: Folder of results.

    Raises:
        ResultsRefused: Another grid, other settings or versions, another world.
    """
    seeds = {one["seed"] for one in about["configurations"]}
    if others := _seeds_in(folder / MAP_ABOUT) - seeds:
        there, made = read_map(folder), read_json(folder / MAP_ABOUT)
        # the table holds six digits of a rate
        now, before = (
            sorted({(f"{rate:.6g}", int(distance)) for rate, distance in cells})
            for cells in (grid, there[["learning_rate", "distance"]].itertuples(index=False))
        )
        complaints = [f"grid (rate, Δ): {now} now, {before} there"] if now != before else []
        runs = [
            {**one, "arm": f"{one['arm']} at {one['config']['learning_rate']:g}", "versions": part["versions"]}
            for part, kept in ((made, others), (about, seeds))
            for one in _of(part["configurations"], kept)
        ]
        require_one_kind(folder, [*complaints, *mixture_complaints(runs)])
    return others


def join_map(table: pd.DataFrame, about: Mapping[str, Any], folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Rows of the map and what made them, and those of the seeds in a folder that they lack.

    Raises:
        ResultsRefused: See `require_joinable_map`.
    """
    grid = set(table[["learning_rate", "distance"]].itertuples(index=False, name=None))
    if not (others := require_joinable_map(grid, about, folder)):
        return table, dict(about)
    there, made = read_map(folder), read_json(folder / MAP_ABOUT)
    kept = {name: _by_seed([*_of(made[name], others), *about[name]]) for name in ("failed", "configurations")}
    return _joined(there, table, others), {**about, **kept}


def require_joinable_signal(found: Mapping[str, Any], path: Path) -> set[int]:
    """Refuse a study of the signal that does not belong with that in a file, as `require_joinable` does a study.

    Args:
        found: Its schema, window, configuration and seeds; origins too, where it has been made.
        path: The file.

    Raises:
        ResultsRefused: Other settings, origins, distances or window, another world or version of the file.
    """
    if others := _seeds_in(path) - set(found["seeds"]):
        there = read_json(path)
        require_world(there, path)
        complaints = [f"{name} differs" for name in ("schema", "window") if there[name] != found[name]]
        one, other = (deciding(results["configuration"]) for results in (found, there))
        if changed := sorted(name for name in {*one, *other} if one.get(name) != other.get(name)):
            complaints.append(f"mixed configurations: {', '.join(changed)}")
        if "origins" in found:
            now, before = (
                {origin: part["distances"] for origin, part in results["origins"].items()} for results in (found, there)
            )
            complaints += [f"distances by origin: {now} now, {before} there"] if now != before else []
        require_one_kind(path.parent, complaints)
    return others


def join_signal(
    found: Mapping[str, Any], path: Path, predict: Callable[[list[dict], list[dict]], list[dict]]
) -> dict[str, Any]:
    """What `signal.json` holds, and the seeds of the file that it lacks.

    Args:
        found: Content made now.
        path: The file; one that is not there adds nothing.
        predict: Of the rows of `table` and `gain`: the content of `prediction`.

    Raises:
        ResultsRefused: See `require_joinable_signal`.
    """
    if not (others := require_joinable_signal(found, path)):
        return dict(found)
    there = read_json(path)
    seeds = sorted([*others, *found["seeds"]])

    def in_order(new: Sequence[Any], old: Sequence[Any]) -> list[Any]:
        values = dict(zip(there["seeds"], old, strict=True)) | dict(zip(found["seeds"], new, strict=True))
        return [values[seed] for seed in seeds]

    origins = {
        origin: {
            **part,
            **{
                kind: {name: in_order(new, there["origins"][origin][kind][name]) for name, new in part[kind].items()}
                for kind in ("optimum", "fit")
            },
            "premise": in_order(part["premise"], there["origins"][origin]["premise"]),
        }
        for origin, part in found["origins"].items()
    }
    rows = {name: _by_seed([*_of(there[name], others), *found[name]]) for name in ("table", "gain")}
    return {**found, "seeds": seeds, "origins": origins, **rows, "prediction": predict(rows["table"], rows["gain"])}


def _seeds_in(path: Path) -> set[int]:
    """Seeds that a file of results has, none where there is none; what made them is not looked at."""
    there = read_json(path) if path.is_file() else {}
    return set(there.get("seeds", [one["seed"] for one in there.get("configurations", ())]))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _of(rows: Sequence[Mapping[str, Any]], seeds: Collection[int]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["seed"] in seeds]


def _by_seed(rows: Sequence[Any]) -> list[Any]:
    return sorted(rows, key=lambda row: row["seed"])


def _joined(there: pd.DataFrame, now: pd.DataFrame, others: Collection[int]) -> pd.DataFrame:
    """Rows of both, by seed; columns and types are those of now."""
    kept = there.loc[there["seed"].isin(others), list(now.columns)]
    return pd.concat([kept.astype(now.dtypes), now]).sort_values("seed", kind="stable", ignore_index=True)
