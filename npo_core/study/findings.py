"""Where the results of a study over seeds are kept, and the paper's own table beside them."""

from pathlib import Path

import pandas as pd

from ..runs.folder import project_folder

SCHEMA = 1
"""Version of the results files."""


def results_folder() -> Path:
    """Where committed results are kept."""
    return project_folder() / "data" / "results"


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
