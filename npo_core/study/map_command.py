"""The stage `map` of the command line; what it runs is imported when it runs."""

import argparse

from ..runs.config import given_overrides
from .options import add_options, add_run_options


def add_stage(stages) -> None:
    """Add the stage to a parser's subparsers."""
    text = (
        "When does guidance pay? The gain of one guided window at equal total rollouts over learning rate and "
        "distance, and the premise beside it; writes data/results/map.csv."
    )
    stage = stages.add_parser("map", help="Run the map of the gain, and write its results.", description=text)
    stage.set_defaults(stage=_map)
    add_options(stage, range(5))
    add_run_options(stage)
    stage.add_argument("--rates", type=float, nargs="+", help="learning rates, rising (default: those of gate G5)")
    stage.add_argument("--distances", type=int, nargs="+", help="distances, rising (default: 0 20 60 160)")


def _map(options: argparse.Namespace) -> int:
    from . import cells as evidence
    from . import map as map_of_gain

    grid = {name: getattr(options, name) for name in ("rates", "distances") if getattr(options, name)}
    overrides = given_overrides(options.set)
    cells = map_of_gain.plan_map(options.preset, options.seeds, **grid, overrides=overrides)
    evidence.run_cells(cells, options.root, options.processes, options.quiet)
    paths = map_of_gain.collect_map(cells, options.root, options.out)
    print(*paths, map_of_gain.markdown(options.out), sep="\n")
    return 0
