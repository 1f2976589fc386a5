"""The stage `real-study` of the command line; what it runs is imported when it runs."""

import argparse
from pathlib import Path

from ..runs.config import given_overrides


def add_stage(stages) -> None:
    """Add the stage to a parser's subparsers."""
    text = (
        "The evidence on SmolLM2-135M-Instruct, docs/evidence.md: five arms with each seed, one single-thread process "
        "a run, then the premise along GRPO. Writes data/results/real/; a second call goes on where the first stopped. "
        "Two runs at a time take about 20 GB of disk and 12 GB of memory."
    )
    stage = stages.add_parser("real-study", help="Run the arms of the real model over seeds.", description=text)
    stage.set_defaults(stage=_study)
    stage.add_argument("--preset", default="real", help="real (default) or real-smoke")
    stage.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 to 2)")
    stage.add_argument("--arms", nargs="+", help="arms (default: all; see npo_core/study/real.py)")
    stage.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting of every arm")
    stage.add_argument("--processes", type=int, help="runs at a time (default: one per core)")
    stage.add_argument("--root", type=Path, help="folder of all runs (default: data/runs)")
    stage.add_argument("--out", type=Path, help="folder of the results (default: data/results/real)")
    stage.add_argument("--no-premise", action="store_true", help="leave the premise out")
    stage.add_argument("--quiet", action="store_true", help="no progress bar")


def _study(options: argparse.Namespace) -> int:
    from . import real

    cells = real.plan_real(options.preset, options.seeds, options.arms, given_overrides(options.set))
    written = real.run_real(cells, options.root, options.out, options.processes, options.quiet)
    if not options.no_premise:
        written.append(real.measure_real_premise(cells, options.root, options.out, options.quiet))
    print(*written, real.in_words(options.out), sep="\n")
    return 1 if any(cell.failure(options.root) for cell in cells) else 0
