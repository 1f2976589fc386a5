"""`python -m npo_core explore RUN [RUN2 …]`: write the page, and say where it is."""

import argparse
from pathlib import Path


def add_stage(stages) -> None:
    """Add the stage to the command line's."""
    text = (
        "Write one self-contained HTML page of a run, or of several laid over each other: run line, groups with their "
        "guides, decisions, mistake pool. It opens from disk without server, network or Python."
    )
    stage = stages.add_parser("explore", help="Write a page to look at a run with, in any browser.", description=text)
    stage.set_defaults(stage=_explore)
    stage.add_argument("runs", nargs="+", metavar="RUN", help="run folder or name of a run; TRL's output folder too")
    stage.add_argument("--out", type=Path, help="file to write (default: explorer.html in the first run's folder)")
    stage.add_argument("--limit-mb", type=float, default=2.0, help="size of the page in megabytes (default: 2)")


def _explore(options: argparse.Namespace) -> int:
    from .page import write_page

    path, _ = write_page(*options.runs, out=options.out, limit_mb=options.limit_mb)
    print(f"{path} ({path.stat().st_size / 1e6:.2f} MB)")
    return 0
