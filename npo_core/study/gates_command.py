"""The stage `gates` of the command line; what it runs is imported when it runs."""

import argparse

from .options import add_options


def add_stage(stages) -> None:
    """Add the stage to a parser's subparsers."""
    text = (
        "The gates of the small world, docs/gates.md: GRPO at five learning rates and with an entropy bonus, and the "
        "premise on the first run. Writes data/results/gates.json after each run; a second call goes on where the "
        "first stopped."
    )
    stage = stages.add_parser("gates", help="Run GRPO through the gates of the small world.", description=text)
    stage.set_defaults(stage=_gates)
    add_options(stage, range(3))


def _gates(options: argparse.Namespace) -> int:
    from . import gates

    gates.run_gates(options.preset, options.seeds, options.root, options.out, options.quiet)
    return 0
