"""Options that the stages of the study share on the command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..runs.config import preset_names


def add_options(
    stage: argparse.ArgumentParser, seeds: Sequence[int], out: str = "data/results", preset: str = "cpu"
) -> None:
    """Preset, seeds and places of a stage that runs many runs.

    Args:
        stage: Parser of the stage.
        seeds: Default seeds, one after the other.
        out: Default folder of the results, in words.
        preset: Default preset.
    """
    several = f"seeds (default: {seeds[0]} to {seeds[-1]})"
    stage.add_argument("--preset", default=preset, help=f"one of {', '.join(preset_names())} (default: {preset})")
    stage.add_argument("--seeds", type=int, nargs="+", default=list(seeds), help=several)
    stage.add_argument("--root", type=Path, help="folder of all runs (default: data/runs)")
    stage.add_argument("--out", type=Path, help=f"folder of the results (default: {out})")
    stage.add_argument("--quiet", action="store_true", help="no progress bar")


def add_run_options(stage: argparse.ArgumentParser) -> None:
    """Settings of every run, and how many run at a time."""
    stage.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting of every run")
    stage.add_argument("--processes", type=int, help="runs at a time (default: one per core)")
