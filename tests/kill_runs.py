"""Kill commands and notebooks at random moments, start them again, and compare with runs that nobody killed.

`python tests/kill_runs.py --kills 30` runs every target on preset smoke twice: undisturbed, and with its share of the
kills (SIGKILL, at a moment drawn over the CPU seconds of the undisturbed run; all of its processes, or only the one
that was started, whose children then live on as orphans). Equal must be: result.json but for its seconds, the metric
lines but for their times, and all weights, byte for byte. Exit status 1 says that they are not.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"compute_steps": 12, "trigger_warmup": 3, "trigger_cooldown": 3, "late_step": 6}
SMALL |= {"late_start": 4, "scout_steps": 2, "early_window": 2, "rlep_source_steps": 4}
"""Settings that make a target short: all stages are still gone through."""

METHODS = ("grpo", "npo", "autonpo", "exgrpo", "rlep", "luffy")
NOTEBOOKS = ("03_autonpo", "02_npo")
TARGETS = (*METHODS, *NOTEBOOKS)
ORPHANS = 0.3
"""Share of the kills that leave the children of a target alive."""

SECONDS = ("wall_seconds", "step_time", "time", "seconds", "runtime", "per_second")
"""Parts of names of what a clock says."""


def command(target: str, folder: Path) -> list[str]:
    """What starts a target."""
    if target in METHODS:
        settings = [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
        return [sys.executable, "-m", "npo_core", target, "--preset", "smoke", "--quiet", *settings]
    notebook = [str(ROOT / "notebooks" / f"{target}.ipynb"), str(folder / f"{target}.out.ipynb")]
    return [
        *(sys.executable, "-m", "papermill", *notebook, "--no-progress-bar", "--log-level", "ERROR"),
        *("-p", "preset", "smoke", "-y", json.dumps({"overrides": SMALL})),
    ]


def start(target: str, folder: Path) -> subprocess.Popen:
    """Start a target whose runs go to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "NPO_RUNS": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with (folder / f"{target}.log").open("a") as log:
        return subprocess.Popen(command(target, folder), env=environment, stdout=log, stderr=log)


def kill(process: subprocess.Popen, orphans: bool) -> None:
    """SIGKILL: a target with all that it started, or that one process alone."""
    victims = [psutil.Process(process.pid)]
    victims += [] if orphans else victims[0].children(recursive=True)
    for victim in victims:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue  # it had just ended
    process.wait()


def timeless(record: Mapping) -> dict:
    """A record without what a clock says."""
    return {name: value for name, value in record.items() if not any(part in name for part in SECONDS)}


def outcome(folder: Path) -> dict[str, object]:
    """What must be equal of the runs in a folder, by path."""
    found: dict[str, object] = {}
    for path in sorted(folder.glob("*-smoke-*/result.json")):
        run = path.parent
        found[f"{run.name}/result.json"] = timeless(json.loads(path.read_text()))
        lines = (run / "metrics.jsonl").read_text().splitlines()
        found[f"{run.name}/metrics.jsonl"] = [timeless(json.loads(line)) for line in lines]
        for weights in sorted(run.glob("branches/*/*/model.safetensors")):
            found[str(weights.relative_to(folder))] = weights.read_bytes()
    return found


def compare(reference: Mapping[str, object], disturbed: Mapping[str, object]) -> list[str]:
    """Names of what differs or is on one side only."""
    return sorted(name for name in {*reference, *disturbed} if reference.get(name) != disturbed.get(name))


def effort(process: psutil.Process) -> float:
    """CPU seconds of a process and of all that it has started and that still runs."""
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += sum(one.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue  # it had just ended
    return total


def watch(process: subprocess.Popen, until: float) -> float:
    """Wait until a target has done so many CPU seconds of work, or has ended; return what it had done."""
    seen, itself = 0.0, psutil.Process(process.pid)
    while process.poll() is None and seen < until:
        try:
            seen = max(seen, effort(itself))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.25)
    return seen


def undisturbed(target: str, folder: Path) -> float:
    """Run a target to its end and return its CPU seconds: on a busy machine those of the wall say little."""
    process = start(target, folder)
    seconds = watch(process, math.inf)
    ended(process, target, folder)
    print(f"{target:<12} undisturbed, {seconds:.0f} CPU seconds", flush=True)
    return seconds


def ended(process: subprocess.Popen, target: str, folder: Path) -> None:
    if process.wait() != 0:
        raise RuntimeError(f"{target} fails, see {folder / target}.log")


def disturbed(target: str, folder: Path, seconds: float, most: int, dice: random.Random) -> int:
    """Start a target until it gets to its end, killed up to `most` times before; return how often it was."""
    for made in range(most):
        process = start(target, folder)
        moment, orphans = dice.uniform(0.2, 1.0) * seconds, dice.random() < ORPHANS
        done = watch(process, moment)
        if process.poll() is not None:
            ended(process, target, folder)
            return made
        kill(process, orphans)
        print(f"{target:<12} kill after {done:.1f} CPU seconds{', children live on' if orphans else ''}", flush=True)
    ended(start(target, folder), target, folder)
    return most


def torment(targets: Sequence[str], kills: int, seed: int, folder: Path) -> list[str]:
    """Run all targets undisturbed and disturbed, each with its share of the kills; return what differs."""
    dice, different, done, runs, weights = random.Random(seed), [], 0, 0, 0
    for place, target in enumerate(targets):
        seconds = undisturbed(target, folder / target)
        reference, turn = outcome(folder / target), 0
        runs += sum(name.endswith("result.json") for name in reference)
        weights += sum(name.endswith(".safetensors") for name in reference)
        due = kills * (place + 1) // len(targets)
        while done < due:  # a target that ends before its kills are used up is begun anew
            turn += 1
            again = folder / f"{target}-{turn}"
            done += disturbed(target, again, seconds, due - done, dice)
            different += [f"{target}-{turn}/{name}" for name in compare(reference, outcome(again))]
        print(f"{target:<12} compared", flush=True)
    print(f"{done} kills, {runs} runs, {weights} weight files: {len(different)} differences", *different, sep="\n  ")
    return different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--folder", type=Path, help="where the runs go; a new one of the system's by default")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kill_runs-"))
    return 1 if torment(options.targets, options.kills, options.seed, folder) else 0


if __name__ == "__main__":
    sys.exit(main())
