"""The stage `real-study` of the command line; what it runs is imported when it runs."""

import argparse

from ..runs.config import given_overrides
from .options import add_options, add_run_options


def add_stage(stages) -> None:
    """Add the stage to a parser's subparsers."""
    text = (
        "The evidence on SmolLM2-135M-Instruct, docs/evidence.md: five arms with each seed, one single-thread process "
        "a run, the premise along GRPO of seed 0 as soon as that is there, and the verdicts of the plan. Writes "
        "data/results/real/; a second call goes on where the first stopped. Two runs at a time take about 20 GB of "
        "disk and 12 GB of memory."
    )
    stage = stages.add_parser("real-study", help="Run the arms of the real model over seeds.", description=text)
    stage.set_defaults(stage=_study)
    add_options(stage, range(3), "data/results/real", "real")
    add_run_options(stage)
    stage.add_argument("--arms", nargs="+", help="arms (default: all; see npo_core/study/real.py)")
    stage.add_argument("--no-premise", action="store_true", help="leave the premise out")


def _study(options: argparse.Namespace) -> int:
    from . import real, real_claims, real_results

    cells = real.plan_real(options.preset, options.seeds, options.arms, given_overrides(options.set))
    premise = not options.no_premise
    written = real.run_real(cells, options.root, options.out, options.processes, options.quiet, premise)
    if premise and not any(path.name == real_results.PREMISE for path in written):
        print(f"GRPO of seed {real.PREMISE_SEED} is not among the runs or failed: the premise is left as it is.")
    folder = options.out or real_results.real_folder()
    if not (folder / real_results.ABOUT).is_file():
        print(f"No run is scored in {folder}.")
    else:
        print(*written, folder / real_results.CLAIMS, "", real_claims.write(folder), sep="\n")
    return 1 if any(cell.failure(options.root) for cell in cells) else 0
