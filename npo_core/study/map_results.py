"""Rows of the map of the gain, read and checked without the engine that makes them, which is `map.py`."""

from pathlib import Path

import pandas as pd

from ..files import read_json
from .findings import results_folder
from .results import MAP, ResultsRefused, require_world

ABOUT = "map.json"
"""What made the map, beside it in the folder of results."""

COLUMNS = (
    *("learning_rate", "distance", "seed", "base", "grpo", "npo", "difference", "rollouts", "grpo_rollouts"),
    *("guide_solves", "own_solves", "lead"),
)
"""Columns of the map's table."""


def has_map(out: Path | None = None) -> bool:
    """Whether the folder of results has a map."""
    return (results_folder(out) / MAP).is_file()


def read_map(out: Path | None = None) -> pd.DataFrame:
    """Rows of the map.

    Raises:
        FileNotFoundError: There is no map.
        ResultsRefused: Another small world, missing columns, or a cell that is there twice.
    """
    path = results_folder(out) / MAP
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; `python -m npo_core map` makes it.")
    made = path.with_name(ABOUT)
    require_world(read_json(made) if made.is_file() else {}, path)
    table = pd.read_csv(path)
    if absent := [name for name in COLUMNS if name not in table.columns]:
        raise ResultsRefused(f"{path} lacks the columns {', '.join(absent)}; `python -m npo_core map` makes it again.")
    repeated = table[table.duplicated(["learning_rate", "distance", "seed"])]
    if len(repeated):
        cells = "; ".join(f"rate {r.learning_rate:g}, Δ = {r.distance:g}, seed {r.seed}" for r in repeated.itertuples())
        raise ResultsRefused(f"{path} has cells twice: {cells}. Remove it and run `make map`.")
    return table
