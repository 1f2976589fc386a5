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
    Evidence,
    ResultsRefused,
    check_evidence,
    mixture_complaints,
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


def require_joinable(about: Mapping[str, Any], folder: Path) -> None:
    """Refuse a study whose results `join_evidence` would refuse, before the hours that its runs take.

    Args:
        about: Of the study to be made: arms, seeds, suites, same and runs, each with arm, seed, config and versions.
        folder: Folder of results.

    Raises:
        ResultsRefused: Other arms or suites, mixed configurations or versions.
    """
    others = _seeds_in(folder / ABOUT) - set(about["seeds"])
    if others:
        there = read_json(folder / ABOUT)
        runs = _by_seed([*_of(there["runs"], others), *about["runs"]])
        require_one_kind(folder, [*_differences(about, there), *mixture_complaints(runs)])


def _differences(about: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Arms and suites that only one of two studies has, a line each."""
    return [
        f"{name}: {_listed(about.get(name, []))} now, {_listed(there.get(name, []))} there"
        for name in ("arms", "suites", "same")
        if set(about.get(name, [])) != set(there.get(name, []))
    ]


def join_evidence(found: Evidence, folder: Path) -> Evidence:
    """Results of the study, and of the seeds in a folder that they lack.

    Args:
        found: Results of some seeds, whole.
        folder: Folder of results; one that has none adds nothing.

    Raises:
        ResultsRefused: Other arms or suites, mixed configurations or versions, another world; see `check_evidence`.
    """
    about = found.about
    if not (others := _seeds_in(folder / ABOUT) - set(about["seeds"])):
        return found
    there = read_evidence(folder)
    runs = _by_seed([*_of(there.about["runs"], others), *about["runs"]])
    require_one_kind(folder, [*_differences(about, there.about), *mixture_complaints(runs)])
    joined = {
        "seeds": sorted([*others, *about["seeds"]]),
        "failed": _by_seed([*_of(there.about["failed"], others), *about["failed"]]),
        "runs": runs,
    }
    together = Evidence(
        _joined(there.scores, found.scores, others),
        _joined(there.training, found.training, others),
        {**about, **joined},
    )
    check_evidence(together.scores, together.about)
    return together


def join_map(table: pd.DataFrame, about: Mapping[str, Any], folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Rows of the map and what made them, and those of the seeds in a folder that they lack.

    Raises:
        ResultsRefused: Another grid, other settings or versions, another world.
    """
    if not (others := _seeds_in(folder / MAP_ABOUT) - set(table["seed"])):
        return table, dict(about)
    there, made = read_map(folder), read_json(folder / MAP_ABOUT)
    here, before = ({(row.learning_rate, row.distance) for row in grid.itertuples()} for grid in (table, there))
    complaints = [f"grid (rate, Δ): {sorted(here)} now, {sorted(before)} there"] if here != before else []
    runs = [
        {**one, "arm": f"{one['arm']} at {one['config']['learning_rate']:g}", "versions": part["versions"]}
        for part, seeds in ((made, others), (about, set(table["seed"])))
        for one in _of(part["configurations"], seeds)
    ]
    complaints += mixture_complaints(runs)
    require_one_kind(folder, complaints)
    kept = {name: _by_seed([*_of(made[name], others), *about[name]]) for name in ("failed", "configurations")}
    return _joined(there, table, others), {**about, **kept}


def join_signal(
    found: Mapping[str, Any], path: Path, predict: Callable[[list[dict], list[dict]], list[dict]]
) -> dict[str, Any]:
    """What `signal.json` holds, and the seeds of the file that it lacks.

    Args:
        found: Content made now.
        path: The file; one that is not there adds nothing.
        predict: Of the rows of `table` and `gain`: the content of `prediction`.

    Raises:
        ResultsRefused: Other settings, origins, distances or window, another world or version of the file.
    """
    if not (others := _seeds_in(path) - set(found["seeds"])):
        return dict(found)
    there = read_json(path)
    require_world(there, path)
    complaints = [f"{name} differs" for name in ("schema", "window") if there[name] != found[name]]
    one, other = (deciding(results["configuration"]) for results in (found, there))
    if changed := sorted(name for name in {*one, *other} if one.get(name) != other.get(name)):
        complaints.append(f"mixed configurations: {', '.join(changed)}")
    grids = [{origin: part["distances"] for origin, part in results["origins"].items()} for results in (found, there)]
    if grids[0] != grids[1]:
        complaints.append(f"distances by origin: {grids[0]} now, {grids[1]} there")
    require_one_kind(path.parent, complaints)
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
