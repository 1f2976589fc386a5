"""Command line: `python -m npo_core <stage>`; what make, scripts and background runs call."""

import argparse
import io
import json
import os
import sys
from dataclasses import fields
from pathlib import Path

from .explore.command import add_stage as add_explore
from .loading import loading
from .runs.config import (
    RunConfig,
    given_overrides,
    preset_names,
    resolve_config,
    settings_markdown,
    settings_text,
)
from .runs.settings import SignalSettings
from .stages.book import add_stage as add_book
from .stages.gpu_check import add_stage as add_gpu_check
from .study.commands import add_options, add_run_options, add_stages

OWN = __name__ == "__main__"
"""Whether the process is this command line's; it may be called from another one's too."""

FIGURE_PACKAGES = ("matplotlib", "seaborn")
"""What only the extra `study` brings."""

OF_ONES_OWN = ("verifier", "base", "processor", "teacher", "dtype", "mixed_precision", "chat_template_kwargs")
"""Options of `signal` for a run of one's own that `measure_folder` has by the same names."""

INTERRUPTED = 130
"""Exit status of a command that was stopped by Ctrl-C, as shells have it."""


def main(arguments: list[str] | None = None) -> int:
    """Run one stage; return the exit status. A bad setting ends with one line, not with a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # one that has no Greek shows what it has not as \\u0394
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    try:
        status = options.stage(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who reads, as `| head`, has read enough; the interpreter must not flush once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        if error.name not in FIGURE_PACKAGES:
            raise
        print(f"npo_core {options.name}: figures need {error.name}; pip install 'npo_core[study]'.", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError) as error:
        print(f"npo_core {options.name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"npo_core {options.name}: stopped. What is done is kept; the same command goes on.", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m npo_core", description="Near-Future Policy Optimization.")
    stages = parser.add_subparsers(dest="name", required=True, metavar="STAGE")
    for name, function, text in (
        ("grpo", _train, "Train plain GRPO and evaluate it."),
        ("npo", _train, "Train with manual interventions (scout and restart, plateau and roll-back) and evaluate it."),
        ("autonpo", _train, "Train with AutoNPO's own interventions and evaluate it."),
        ("warmstart", _warmstart, "Make a preset's base policy in data/base (installed copy: in data/runs/base)."),
        ("luffy", _train, "Train the baseline LUFFY (external teacher) and evaluate it."),
        ("exgrpo", _train, "Train the baseline ExGRPO (own past successes) and evaluate it."),
        ("rlep", _train, "Train the baseline RLEP (replay of a converged run) and evaluate it."),
        ("plan", _plan, "Print what a run will cost before it starts."),
    ):
        stage = stages.add_parser(name, help=text, description=text)
        stage.set_defaults(stage=function)
        _settings(stage)
        if name == "plan":
            stage.add_argument("--method", default="autonpo", help="training method (default: autonpo)")
        if name == "warmstart":
            stage.add_argument("--teacher", action="store_true", help="make the external teacher instead")
    again = stages.add_parser("run", help="Run a saved configuration, or what is left of it.")
    again.set_defaults(stage=_run)
    again.add_argument("--config", type=Path, required=True, help="a run folder's config.json")
    again.add_argument("--root", type=Path, help="folder of all runs (default: that of the run, else data/runs)")
    again.add_argument("--quiet", action="store_true", help="no progress bars")
    cell = stages.add_parser("cell", help="Run and score one cell of the evidence study; what its processes do.")
    cell.set_defaults(stage=_cell)
    cell.add_argument("--config", type=Path, required=True, help="a run folder's config.json")
    cell.add_argument("--root", type=Path, help="folder of all runs (default: data/runs)")
    _evidence_parser(stages)
    add_stages(stages)
    add_explore(stages)
    add_book(stages)
    add_gpu_check(stages)
    _signal_parser(stages)
    _gain_parser(stages)
    whole = stages.add_parser("merge", help="Write a checkpoint with adapters as a policy of its own.")
    whole.set_defaults(stage=_merge)
    whole.add_argument("--checkpoint", type=Path, required=True, help="folder of the checkpoint")
    whole.add_argument("--out", type=Path, required=True, help="folder to write")
    look = stages.add_parser("check", help="Say whether a run folder is whole, and where it would go on.")
    look.set_defaults(stage=_check)
    look.add_argument("run", type=Path, help="a run folder")
    draw = stages.add_parser("figures", help="Draw the committed figures of the study from its results.")
    draw.set_defaults(stage=_figures)
    draw.add_argument("--results", type=Path, help="folder of the results (default: data/results)")
    draw.add_argument("--out", type=Path, help="folder of the figures (default: figures)")
    settings = stages.add_parser("settings", help="List every setting by group: default, meaning, bounds, source.")
    settings.set_defaults(stage=_list_settings)
    settings.add_argument("--markdown", action="store_true", help="as the table in docs/implementation.md")
    bench = stages.add_parser("bench", help="Measure speed and memory; writes data/runs/bench.json.")
    bench.set_defaults(stage=_bench)
    return parser


def _settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="cpu", help=f"one of {', '.join(preset_names())} (default: cpu)")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling during training (default: 0)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a setting; VALUE is JSON or a bare word; may be given several times",
    )
    parser.add_argument("--root", type=Path, help="folder of all runs (default: data/runs)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _signal_parser(stages) -> None:
    text = (
        "Measure Q, V and S = Q/V over distances: of a folder of Hugging Face checkpoints (--checkpoints, --data, "
        "--out), or of the GRPO run of a preset. Writes table.parquet, signal.json and figures; a second call goes on "
        "where the first stopped."
    )
    stage = stages.add_parser("signal", help="Measure Q, V and S over distances, on any checkpoints.", description=text)
    stage.set_defaults(stage=_signal)
    _settings(stage)
    own = stage.add_argument_group("your own run")
    own.add_argument("--checkpoints", type=Path, help="folder that holds checkpoint-<step> folders")
    text = 'parquet or jsonl file with uid, prompt, answer and maybe image, or "reasoning_gym:TASK"'
    own.add_argument("--data", type=Path, help=text)
    own.add_argument("--out", type=Path, help="folder of the measurement")
    own.add_argument("--verifier", help='"boxed" (default) or module:name of a verifier')
    own.add_argument("--base", help="policy that the run started from, step 0: a folder, or a name on the hub")
    own.add_argument("--processor", help="policy with processor or tokenizer, in the same way (default: the first)")
    own.add_argument("--teacher", help="policy outside the run, in the same way")
    own.add_argument("--dtype", help="type of all weights: float32, bfloat16 or float16 (default: the checkpoints')")
    own.add_argument("--mixed-precision", help="of matrix products: no, bf16 or fp16 (default: that of the run)")
    text = "template arguments of the run's prompts, such as '{\"enable_thinking\": false}'"
    own.add_argument("--chat-template-kwargs", type=json.loads, metavar="JSON", help=text)
    how = stage.add_argument_group("measurement")
    how.add_argument("--origins", type=int, nargs="+", help="policy steps to measure from")
    how.add_argument("--distances", type=int, default=20, help="distances above 0 from each origin (default: 20)")
    how.add_argument("--also", type=int, nargs="+", default=[], help="distances beside that grid")
    at_once = "responses {} at a time, at most: fewer where memory asks for it (default: 512, or as the preset has it)"
    how.add_argument("--rollout-batch", type=int, metavar="N", help=at_once.format("sampled"))
    how.add_argument("--score-batch", type=int, metavar="N", help=at_once.format("scored"))
    for one in fields(SignalSettings):
        if one.name != "seed":
            text = one.metadata["help"].replace("%", "%%")
            how.add_argument(f"--{one.name.replace('_', '-')}", type=one.type, metavar=one.name.upper(), help=text)


def _gain_parser(stages) -> None:
    text = "Does S predict the gain? Guided training from one policy over one window, with guides of many distances."
    stage = stages.add_parser("gain", help=text, description=text)
    stage.set_defaults(stage=_gain)
    _settings(stage)
    stage.add_argument("--origins", type=int, nargs="+", help="policy steps that the arms start from")
    stage.add_argument("--distances", type=int, nargs="+", help="distances of the guides; the run's end is added")
    stage.add_argument("--window", type=int, help="guided steps of an arm")
    stage.add_argument("--modes", nargs="+", help="ratio modes of the guide slot")


def _evidence_parser(stages) -> None:
    text = (
        "The evidence study: every arm with every seed, one single-thread process a run, then data/results/ with the "
        "comparisons and verdicts (hours on two cores). A second call goes on where the first stopped; seeds that the "
        "results have of another call stay."
    )
    stage = stages.add_parser("study", help="Run arms x seeds, and write results and verdicts.", description=text)
    stage.set_defaults(stage=_evidence)
    add_options(stage, range(10), "data/results, of a preset other than cpu a folder of its name in it")
    add_run_options(stage)
    stage.add_argument("--arms", nargs="+", help="arms (default: all; see npo_core/study/arms.py)")


def _config(options: argparse.Namespace, method: str) -> RunConfig:
    return resolve_config(method, options.preset, options.seed, given_overrides(options.set))


def _train(options: argparse.Namespace) -> int:
    return _finish(_config(options, options.name), options)


def _saved(options: argparse.Namespace) -> RunConfig:
    return RunConfig.of_run(json.loads(options.config.read_text(encoding="utf-8")))


def _run(options: argparse.Namespace) -> int:
    config, folder = _saved(options), options.config.absolute().parent
    if options.root is None and folder.name == config.run_name:
        options.root = folder.parent  # the run goes on where it is
    return _finish(config, options)


def _finish(config: RunConfig, options: argparse.Namespace) -> int:
    with loading(OWN):
        from .processes import is_writer
        from .stages import launch
        from .stages import run as stages

    # `run` and what a launcher starts is the run itself; the other stages start it as its settings ask for
    here = options.name == "run" or "WORLD_SIZE" in os.environ
    folder = (stages.run if here else launch.run_launched)(config, options.root, options.quiet)
    result = folder.result()
    if is_writer():
        print(f"{folder.path}: {result['base']['average']:.3f} -> {result['final']['average']:.3f}")
    return 0


def _cell(options: argparse.Namespace) -> int:
    with loading(OWN):
        from .study import cells as evidence

    evidence.run_cell(_saved(options), options.root)
    return 0


def _evidence(options: argparse.Namespace) -> int:
    with loading(OWN):
        from .study import cells as evidence
        from .study import claims, comparisons
        from .study.findings import results_folder
        from .study.results import read_evidence

    cells = evidence.plan_cells(options.preset, options.seeds, options.arms, given_overrides(options.set))
    out = options.out or results_folder() / ("" if options.preset == "cpu" else options.preset)
    evidence.require_joinable(cells, options.root, out)
    evidence.run_cells(cells, options.root, options.processes, options.quiet)
    for path in evidence.collect(cells, options.root, out):
        print(path)
    found = read_evidence(out)
    print(comparisons.arm_markdown(found) if "GRPO" in found.arms else "No GRPO: nothing to compare with.")
    print("\n" + claims.decide(found, out))
    for arm, seeds in found.failed.items():
        print(f"failed: {arm}, seeds {seeds}", file=sys.stderr)
    return 1 if found.failed else 0


def _warmstart(options: argparse.Namespace) -> int:
    from .runs.folder import checkout, runs_folder, shipped_policies
    from .world.warmstart import base_digest, base_policy_folder, teacher_config, warm_start

    config = _config(options, "grpo")
    if options.teacher:
        config = teacher_config(config)
    if config.policy != "tiny":
        print(base_policy_folder(config, options.quiet))
        return 0
    kept = runs_folder() / "base" if checkout() is None else shipped_policies()
    print(warm_start(config, kept / f"tiny-{base_digest(config)}", options.quiet))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from .stages import cost as plan

    table = plan.plan(_config(options, options.method), options.root)
    for name, value in table.items():
        print(f"{name:<38} {value}")
    return 0 if plan.fits(table) else 1


def _signal(options: argparse.Namespace) -> int:
    from . import figures
    from .stages import signal as signal_stages
    from .stages import signal_run

    names = [field.name for field in fields(SignalSettings)]
    given = {name: getattr(options, name) for name in names if getattr(options, name, None) is not None}
    batches = {name: getattr(options, name) for name in ("rollout_batch", "score_batch")}
    batches = {name: value for name, value in batches.items() if value is not None}
    own = {name: getattr(options, name) for name in ("data", "out", *OF_ONES_OWN)}
    if options.checkpoints is None:
        if idle := [f"--{name.replace('_', '-')}" for name, value in own.items() if value is not None]:
            raise ValueError(f"{', '.join(idle)} given without --checkpoints; without it a preset's run is measured.")
        config = _config(options, "grpo")
        settings = signal_run.settings_for(config, **given)
        origins = options.origins or signal_run.default_origins(config)
        measured = signal_run.measure_run(
            config,
            origins,
            settings,
            distances=options.distances,
            also=options.also,
            root=options.root,
            quiet=options.quiet,
            **batches,
        )
    else:
        if options.data is None or options.out is None:
            raise ValueError("--checkpoints needs --data (prompts with answers) and --out (folder of the measurement).")
        if options.set or options.root is not None:
            raise ValueError("--set and --root are for a preset's run; with --checkpoints nothing reads them.")
        measured = signal_stages.measure_folder(
            options.checkpoints,
            options.data,
            options.out,
            SignalSettings(**{"seed": options.seed, **given}),
            origins=options.origins,
            distances=options.distances,
            also=options.also,
            quiet=options.quiet,
            **{name: own[name] for name in OF_ONES_OWN if own[name] is not None},
            **batches,
        )
    print(signal_stages.describe(measured))
    figures.save_figure(figures.signal_curves(measured.folder), measured.folder / "figures", "signal")
    figures.save_figure(figures.quality_stability(measured.folder), measured.folder / "figures", "plane")
    print(f"Table, summary and figures: {measured.folder}")
    return 0


def _gain(options: argparse.Namespace) -> int:
    from .study.gain import GainPlan, GainStudy

    names = [field.name for field in fields(GainPlan)]
    given = {name: getattr(options, name) for name in names if getattr(options, name, None) is not None}
    plan = GainPlan(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})
    config = _config(options, "grpo")
    for record in GainStudy(config, plan, options.root, options.quiet).run():
        print(
            f"{record['origin']:>5} {record['source']:<10} {record['mode'] or '':<9} {record['final']['average']:.3f}"
        )
    return 0


def _figures(options: argparse.Namespace) -> int:
    from . import figures
    from .runs.folder import project_folder
    from .study.findings import results_folder

    source = results_folder(options.results)
    drawn = figures.draw_study(source, options.out or project_folder() / "figures")
    print(*drawn, sep="\n")
    if len(drawn) == 1:
        print(f"{source} holds no results of a study; `make study` makes them.")
    return 0


def _check(options: argparse.Namespace) -> int:
    from .runs.check import check_run

    print(found := check_run(options.run))
    return 0 if found.whole else 1


def _merge(options: argparse.Namespace) -> int:
    from .world.merging import merge

    print(merge(options.checkpoint, options.out))
    return 0


def _bench(options: argparse.Namespace) -> int:
    from .stages import bench

    return bench.main()


def _list_settings(options: argparse.Namespace) -> int:
    print(settings_markdown() if options.markdown else settings_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
