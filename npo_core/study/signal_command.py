"""The stage `signal-study` of the command line; what it runs is imported when it runs."""

import argparse

from ..runs.config import given_overrides
from .options import add_options


def add_stage(stages) -> None:
    """Add the stage to a parser's subparsers."""
    text = (
        "Premise, Q, V and S from several policies of the GRPO run of each seed, and guided windows from them: does S "
        "predict the gain? Writes data/results/signal.json; a second call goes on where the first stopped. Half an "
        "hour of a core for a seed of preset cpu."
    )
    stage = stages.add_parser(
        "signal-study", help="Measure the signal over seeds, and what it predicts.", description=text
    )
    stage.set_defaults(stage=_signal_study)
    add_options(stage, range(5))
    stage.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting of every run")


def _signal_study(options: argparse.Namespace) -> int:
    from . import signal_study

    path = signal_study.run_signal_study(
        options.preset,
        options.seeds,
        given_overrides(options.set),
        root=options.root,
        out=options.out,
        quiet=options.quiet,
    )
    print(path, signal_study.in_words(path), sep="\n")
    return 0
