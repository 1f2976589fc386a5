"""Results of a study over seeds, as kept in `data/results/`: where they are, and the tables that are read off them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ..method.curve import QUALITIES
from ..runs.folder import project_folder

SCHEMA = 1
"""Version of the results files."""

PREDICTORS = (
    *QUALITIES,
    *(f"signal{k}_{cost}" for k in ("", "_1") for cost in ("kl", "gradient_current", "gradient_exact")),
)
"""What is tabulated over seeds and correlated with the gain: Q and S, with k rollouts and with one."""


def results_folder() -> Path:
    """Where committed results are kept."""
    return project_folder() / "data" / "results"


def read(path: str | Path) -> dict[str, Any]:
    """A results file.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It is of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no results file {path}; `python -m npo_core signal-study` makes it.")
    found = json.loads(path.read_text())
    if found.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {found.get('schema')}; this version reads schema {SCHEMA}. Make it again.")
    return found


def paper_table(path: str | Path | None = None) -> pd.DataFrame:
    """Table 1 of the paper as printed: accuracy in percent, a row per method, `average` and the eight suites.

    Args:
        path: CSV file; the project's `data/paper/table1.csv` if None.
    """
    path = project_folder() / "data" / "paper" / "table1.csv" if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no table {path}; it is part of the repository.")
    return pd.read_csv(path).set_index("method")


def paper_gains(table: pd.DataFrame) -> pd.DataFrame:
    """The paper's averages checked: as printed, recomputed from the suites, and the gain over GRPO in points."""
    again = table.drop(columns="average").mean(axis=1)
    return pd.DataFrame(
        {
            "average, printed": table["average"],
            "average, recomputed": again.round(3),
            "printed minus recomputed": (table["average"] - again).round(3),
            "over GRPO": (again - again["GRPO"]).round(3),
            "over the base": (again - again["Base"]).round(3),
        }
    )


def optima(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a table from `signal.json`: Δ* of each seed by origin and kind of S, and how many are interior."""
    return [
        {
            "origin": int(origin),
            "signal": name,
            "Δ* by seed": ", ".join(f"{best['distance']:g}" for best in entry["optimum"][name]),
            "interior": f"{sum(not best['at_edge'] for best in entry['optimum'][name])} of {len(found['seeds'])}",
            "95 % over prompts": ", ".join(f"{best['low']:g}–{best['high']:g}" for best in entry["optimum"][name]),
        }
        for origin, entry in found["origins"].items()
        for name in PREDICTORS
        if name in entry["optimum"]
    ]


def constants(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a table from `signal.json`: the fitted c of e^(c·KL), mean over seeds with its t interval."""
    return [
        {"KL": kl, "fitted to": cost, **{name: value[name] for name in ("value", "low", "high")}}
        for kl, costs in found["c"].items()
        for cost, value in costs.items()
    ]


def agreements(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a table from `signal.json`: Spearman's ρ of each proxy with each measured variance, mean over seeds."""
    return [
        {"origin": int(origin), "measured": cost, **{proxy: value["value"] for proxy, value in proxies.items()}}
        for origin, entry in found["origins"].items()
        for cost, proxies in entry["agreement"].items()
    ]
