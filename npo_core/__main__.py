"""Command line: `python -m npo_core <stage>`; what make, scripts and background runs call."""

import argparse
import json
import sys
from pathlib import Path

from .config import RunConfig, preset_names, resolve_config


def main(arguments: list[str] | None = None) -> int:
    """Run one stage; return the exit status. A bad setting ends with one line, not with a traceback."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.stage(options)
    except (ValueError, TypeError, OSError) as error:
        print(f"npo_core {options.name}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m npo_core", description="Near-Future Policy Optimization.")
    stages = parser.add_subparsers(dest="name", required=True, metavar="STAGE")
    for name, function, text in (
        ("grpo", _train, "Train plain GRPO and evaluate it."),
        ("npo", _train, "Train with manual interventions (scout and restart, plateau and roll-back) and evaluate it."),
        ("autonpo", _train, "Train with AutoNPO's own interventions and evaluate it."),
        ("warmstart", _warmstart, "Make the base policy of a preset and keep it in data/base."),
        ("plan", _plan, "Print what a run will cost before it starts."),
    ):
        stage = stages.add_parser(name, help=text, description=text)
        stage.set_defaults(stage=function)
        _settings(stage)
        stage.add_argument("--root", type=Path, help="folder of all runs (default: data/runs)")
        stage.add_argument("--quiet", action="store_true", help="no progress bars")
    again = stages.add_parser("run", help="Run a saved configuration, or what is left of it.")
    again.set_defaults(stage=_run)
    again.add_argument("--config", type=Path, required=True, help="a run folder's config.json")
    again.add_argument("--root", type=Path, help="folder of all runs (default: data/runs)")
    again.add_argument("--quiet", action="store_true", help="no progress bars")
    settings = stages.add_parser("settings", help="List every setting with its default, source and meaning.")
    settings.set_defaults(stage=_list_settings)
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


def _config(options: argparse.Namespace, method: str) -> RunConfig:
    overrides = {}
    for item in options.set:
        name, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"--set {item}: write NAME=VALUE, such as --set tau_gate=0.5.")
        try:
            overrides[name] = json.loads(text)
        except json.JSONDecodeError:
            overrides[name] = text
    return resolve_config(method, options.preset, options.seed, overrides)


def _train(options: argparse.Namespace) -> int:
    return _finish(_config(options, options.name), options)


def _run(options: argparse.Namespace) -> int:
    return _finish(RunConfig.from_mapping(json.loads(options.config.read_text())), options)


def _finish(config: RunConfig, options: argparse.Namespace) -> int:
    from . import stages

    folder = stages.run(config, options.root, options.quiet)
    result = folder.result()
    print(f"{folder.path}: {result['base']['average']:.3f} -> {result['final']['average']:.3f}")
    return 0


def _warmstart(options: argparse.Namespace) -> int:
    from .runs import project_folder
    from .warmstart import base_digest, warm_start

    config = _config(options, "grpo")
    folder = project_folder() / "data" / "base" / f"tiny-{base_digest(config)}"
    print(warm_start(config, folder, options.quiet))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from . import stages

    for name, value in stages.plan(_config(options, "autonpo")).items():
        print(f"{name:<34} {value}")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from . import bench

    return bench.main()


def _list_settings(options: argparse.Namespace) -> int:
    for name, kind, default, source, text in RunConfig.describe():
        print(f"{name:<26} {kind:<8} {default!s:<14} {source:<6} {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
