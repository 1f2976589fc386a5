"""Stages of the study on the command line; what they run is imported when they run."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..runs.config import given_overrides, preset_names


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
    _add_settings(stage)
    stage.add_argument("--processes", type=int, help="runs at a time (default: one per core)")


def _add_settings(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting of every run")


def add_stages(stages) -> None:
    """Add the stages to a parser's subparsers."""
    text = (
        "When does guidance pay? The gain of one guided window at equal total rollouts over learning rate and "
        "distance, and the premise beside it; writes data/results/map.csv. Seeds that it has of another call stay."
    )
    stage = stages.add_parser("map", help="Run the map of the gain, and write its results.", description=text)
    stage.set_defaults(stage=_map)
    add_options(stage, range(5))
    add_run_options(stage)
    stage.add_argument("--rates", type=float, nargs="+", help="learning rates, rising (default: those of gate G5)")
    stage.add_argument("--distances", type=int, nargs="+", help="distances, rising (default: 0 20 60 160)")

    text = "Print the table of arms and the verdicts on the claims of the plans."
    stage = stages.add_parser("claims", help=text)
    stage.set_defaults(stage=_claims)
    stage.add_argument("--results", type=Path, help="folder of the results (default: data/results)")

    text = (
        "The gates of the small world, docs/gates.md: GRPO at five learning rates and with an entropy bonus, and the "
        "premise on the first run. Writes data/results/gates.json after each run; a second call goes on where the "
        "first stopped."
    )
    stage = stages.add_parser("gates", help="Run GRPO through the gates of the small world.", description=text)
    stage.set_defaults(stage=_gates)
    add_options(stage, range(3))

    text = (
        "The evidence on SmolLM2-135M-Instruct, docs/evidence.md: five arms with each seed, one single-thread process "
        "a run, the premise along GRPO of seed 0 as soon as that is there, and the verdicts of the plan. Writes "
        "data/results/real/; a second call goes on where the first stopped. Two runs at a time take about 30 GB of "
        "disk and 17 GB of memory."
    )
    stage = stages.add_parser("real-study", help="Run the arms of the real model over seeds.", description=text)
    stage.set_defaults(stage=_real_study)
    add_options(stage, range(3), "data/results/real", "real")
    add_run_options(stage)
    stage.add_argument("--arms", nargs="+", help="arms (default: all; see npo_core/study/real.py)")
    stage.add_argument("--no-premise", action="store_true", help="leave the premise out")

    text = (
        "Premise, Q, V and S from several policies of the GRPO run of each seed, and guided windows from them: does S "
        "predict the gain? Writes data/results/signal.json; a second call goes on where the first stopped, and seeds "
        "that it has of another call stay. Half an hour of a core for a seed of preset cpu."
    )
    about = "Measure the signal over seeds, and what it predicts."
    stage = stages.add_parser("signal-study", help=about, description=text)
    stage.set_defaults(stage=_signal_study)
    add_options(stage, range(5))
    _add_settings(stage)


def _map(options: argparse.Namespace) -> int:
    from . import cells as evidence
    from . import map as map_of_gain

    grid = {name: getattr(options, name) for name in ("rates", "distances") if getattr(options, name)}
    overrides = given_overrides(options.set)
    cells = map_of_gain.plan_map(options.preset, options.seeds, **grid, overrides=overrides)
    map_of_gain.require_joinable(cells, options.root, options.out)
    evidence.run_cells(cells, options.root, options.processes, options.quiet)
    paths = map_of_gain.collect_map(cells, options.root, options.out)
    print(*paths, map_of_gain.markdown(options.out), sep="\n")
    return 0


def _claims(options: argparse.Namespace) -> int:
    from . import map as map_of_gain
    from . import real_claims, real_results
    from .findings import results_folder
    from .results import find_tuned, has_evidence

    folder = results_folder(options.results)
    real = real_results.find_real(folder)
    if real is not None and not has_evidence(folder):
        print(real_claims.write(real))
        return 0
    print(_study_in_words(folder))
    if (tuned := find_tuned(folder)) is not None:
        print("\nThe tuned regime:\n\n" + _study_in_words(tuned))
    print("\n" + map_of_gain.markdown(folder))
    if real is not None:
        print("\nThe real model:\n\n" + real_claims.write(real))
    return 0


def _study_in_words(folder: Path) -> str:
    """Tables of arms and verdicts of the study in a folder, in Markdown; its verdicts are written there."""
    from . import claims, comparisons
    from .results import read_evidence

    found = read_evidence(folder)
    made = ", ".join(f"{count} by {revision[:7]}" for revision, count in found.revisions.items())
    tables = [comparisons.arm_markdown(found), comparisons.secondary_markdown(found)]
    return "\n\n".join([*tables, f"Runs by revision of the code: {made}.", claims.decide(found, folder)])


def _gates(options: argparse.Namespace) -> int:
    from . import gates

    gates.run_gates(options.preset, options.seeds, options.root, options.out, options.quiet)
    return 0


def _real_study(options: argparse.Namespace) -> int:
    from . import real, real_claims, real_results

    cells = real.plan_real(options.preset, options.seeds, options.arms, given_overrides(options.set))
    premise = not options.no_premise
    written = real.run_real(cells, options.root, options.out, options.processes, options.quiet, premise)
    if premise and not any(path.name == real_results.PREMISE for path in written):
        print(f"GRPO of seed {real.PREMISE_SEED} is not among the runs or failed: the premise is left as it is.")
    folder = real_results.real_folder(options.out)
    if not (folder / real_results.ABOUT).is_file():
        print(f"No run is scored in {folder}.")
    else:
        print(*written, folder / real_results.CLAIMS, "", real_claims.write(folder), sep="\n")
    return 1 if any(cell.failure(options.root) for cell in cells) else 0


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
