"""The stage `map` of the command line; what it runs is imported when it runs."""

import argparse
from pathlib import Path

from ..runs.config import given_overrides, preset_names


def add_stage(stages) -> None:
    """Add the stage to a parser's subparsers."""
    text = (
        "When does guidance pay? The gain of one guided window at equal total rollouts over learning rate and "
        "distance, and the premise beside it; writes data/results/map.csv."
    )
    stage = stages.add_parser("map", help="Run the map of the gain, and write its results.", description=text)
    stage.set_defaults(stage=_map)
    stage.add_argument("--preset", default="cpu", help=f"one of {', '.join(preset_names())} (default: cpu)")
    stage.add_argument("--seeds", type=int, nargs="+", default=list(range(5)), help="seeds (default: 0 to 4)")
    stage.add_argument("--rates", type=float, nargs="+", help="learning rates, rising (default: those of gate G5)")
    stage.add_argument("--distances", type=int, nargs="+", help="distances, rising (default: 0 20 60 160)")
    stage.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting of every run")
    stage.add_argument("--processes", type=int, help="runs at a time (default: one per core)")
    stage.add_argument("--root", type=Path, help="folder of all runs (default: data/runs)")
    stage.add_argument("--out", type=Path, help="folder of the results (default: data/results)")
    stage.add_argument("--quiet", action="store_true", help="no progress bar")


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
