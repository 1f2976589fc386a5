"""Where the results of a study over seeds are kept, how a table of them is written, and the paper's own table."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from ..runs.folder import project_folder

SCHEMA = 1
"""Version of the results files."""


def results_folder(given: str | Path | None = None) -> Path:
    """The given folder of results; if None, the project's `data/results`, where committed ones are kept."""
    return project_folder() / "data" / "results" if given is None else Path(given)


def paper_table() -> pd.DataFrame:
    """Table 1 of the paper as printed: accuracy in percent, a row per method, `average` and the eight suites."""
    path = project_folder() / "data" / "paper" / "table1.csv"
    if not path.is_file():
        raise FileNotFoundError(f"There is no table {path}; it is part of the repository.")
    return pd.read_csv(path).set_index("method")


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, from the texts of its cells."""
    line, *lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([line, "|" + "---|" * len(head), *lines])


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
