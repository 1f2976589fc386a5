"""The stage `map` of the command line; what it runs is imported when it runs."""

import argparse
from pathlib import Path

from ..runs.config import given_overrides, preset_names


def add_stage(stages) -> None:
    """Add the stage to a parser's subparsers."""
    text = "Map of the gain at equal compute over learning rate and share of hard facts; writes data/results/map.csv."
    stage = stages.add_parser("map", help="Run the map of the gain, and write its results.", description=text)
    stage.set_defaults(stage=_map)
    stage.add_argument("--preset", default="cpu", help=f"one of {', '.join(preset_names())} (default: cpu)")
    stage.add_argument("--corner", action="store_true", help="the follow-up in one cell; writes data/results/corner/")
    stage.add_argument("--seeds", type=int, nargs="+", help="seeds (default: 0 to 4; of the follow-up 5 to 14)")
    stage.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting of every run")
    stage.add_argument("--processes", type=int, help="runs at a time (default: one per core)")
    stage.add_argument("--root", type=Path, help="folder of all runs (default: data/runs)")
    stage.add_argument("--out", type=Path, help="folder of the results (default: data/results)")
    stage.add_argument("--quiet", action="store_true", help="no progress bar")


def _map(options: argparse.Namespace) -> int:
    from . import cells as evidence
    from . import map as map_of_gain

    corner = options.corner
    plan, seeds = (map_of_gain.plan_corner, map_of_gain.CORNER_SEEDS) if corner else (map_of_gain.plan_map, range(5))
    cells = plan(options.preset, options.seeds or seeds, overrides=given_overrides(options.set))
    map_of_gain.prepare_bases(cells, options.quiet)
    evidence.run_cells(cells, options.root, options.processes, options.quiet)
    collect = map_of_gain.collect_corner if corner else map_of_gain.collect_map
    print(*collect(cells, options.root, options.out), map_of_gain.markdown(options.out), sep="\n")
    return 0
