"""Names that settings and data share: suites, and columns of a data set."""

from ..declaration import nearest, require

SUITES = ("mmmu_pro", "mathvista", "mathvision", "zerobench", "wemath", "mmbench", "mmstar", "mathverse")
"""Suites of the paper's Table 1, in its order."""

WORLD = "paths"
"""Name of the small world in results: its answers are whole paths. Results of another world are refused."""

DATA_COLUMNS = ("uid", "prompt", "image", "images", "answer", "suite", "difficulty")
"""Columns of the rows of a data set, in our names; prompt and answer must be there."""


def check_suites(suites: tuple[str, ...]) -> None:
    """Refuse unknown, repeated or no suites."""
    for suite in suites:
        if suite not in SUITES:
            raise ValueError(f"Unknown suite {suite!r}{nearest(suite, SUITES)} Allowed: {', '.join(SUITES)}.")
    require(bool(suites) and len(set(suites)) == len(suites), "suites", suites, "one or more distinct suites")
