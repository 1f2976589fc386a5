"""The stage `gates` of the command line; what it runs is imported when it runs."""

import argparse
from pathlib import Path

from ..runs.config import preset_names


def add_stage(stages) -> None:
    """Add the stage to a parser's subparsers."""
    text = (
        "The gates of the small world, docs/gates.md: GRPO at five learning rates and with an entropy bonus, and the "
        "premise on the first run. Writes data/results/gates.json after each run; a second call goes on where the "
        "first stopped."
    )
    stage = stages.add_parser("gates", help="Run GRPO through the gates of the small world.", description=text)
    stage.set_defaults(stage=_gates)
    stage.add_argument("--preset", default="cpu", help=f"one of {', '.join(preset_names())} (default: cpu)")
    stage.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 to 2)")
    stage.add_argument("--root", type=Path, help="folder of all runs (default: data/runs)")
    stage.add_argument("--out", type=Path, help="folder of the results (default: data/results)")
    stage.add_argument("--quiet", action="store_true", help="no progress bar")


def _gates(options: argparse.Namespace) -> int:
    from . import gates

    gates.run_gates(options.preset, options.seeds, options.root, options.out, options.quiet)
    return 0
