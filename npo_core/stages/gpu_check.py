"""`python -m npo_core gpu-check`: what only a GPU can show, measured in minutes, without a network, in one visit.

Each part is a process of its own, with a share of the time after which it is ended: a part that fails, hangs, or leaves
the GPU in an error is written down with its last words, and the others go on. A part writes its rows as it measures
them, and the result is written anew whenever it does, so that a visit that is cut off leaves what was known by then.
Where there is no GPU, the same parts run on the CPU at a small size, to see that they run at all.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import read_json, write_json
from ..lock import Lock
from ..progress import duration
from ..runs.folder import environment, runs_folder

MINUTES = {"gpu": 8.0, "rehearsal": 30.0}
"""Time of the whole, unless another is given."""

REVISION = "NPO_REVISION"
"""Variable in which the script of the parcels says what they were made from; an installed copy does not know."""

LEAST = 2.0
"""Seconds below which a part is not begun."""

POLL = 0.5
"""Seconds between looks at a part that runs."""

LAST_WORDS = 12
"""Lines of a failed part's output that are kept."""


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        name: As on the command line.
        what: What it measures, for the progress line.
        share: Of the whole time, which it may use up; what it leaves goes to the next part.
        needs: Parts without which it cannot run.
    """

    name: str
    what: str
    share: float
    needs: tuple[str, ...] = ()


PARTS = (
    Part("model", "SmolLM2 converted and started on its task", 0.13),
    Part("steps", "GRPO and NPO steps in turns", 0.16, ("model",)),
    Part("speed", "tokens per second, off-line sampling", 0.09, ("model",)),
    Part("cache", "cost of a guidance cache", 0.09, ("model",)),
    Part("rollback", "checkpoints and a roll-back", 0.12, ("model",)),
    Part("precision", "training in 32 and in 16 bits", 0.11, ("model",)),
    Part("memory", "the plan's memory against that of a random Qwen3-VL", 0.15),
    Part("paths", "AutoNPO, signal and scores on the small world", 0.07),
    Part("training", "as many steps of GRPO and NPO as fit, side by side", 0.08, ("model",)),
)
"""In the order they run: what later ones stand on first, what takes all the time that is left last."""

DONE, FAILED, STOPPED, SKIPPED, RUNNING = "done", "failed", "out of time", "not run", "running"
"""States of a part: one that ended, one with an error, one that was ended at its limit, one that never began, and one
that runs, or ran when the whole check was cut off."""


def add_stage(stages) -> None:
    """Add the stage to the command line's."""
    text = (
        "Measure on a GPU, without a network and in minutes, what a CPU cannot show: speed, memory against the plan, "
        "16 bits, roll-backs, and steps of GRPO and NPO on the real model. Where there is no GPU the same is rehearsed "
        "on the CPU at a small size, and its figures say nothing of a GPU."
    )
    stage = stages.add_parser(
        "gpu-check", help="Measure on a GPU what a CPU cannot show, in minutes.", description=text
    )
    stage.set_defaults(stage=_gpu_check)
    stage.add_argument("--rehearse", action="store_true", help="on the CPU at a small size, even where a GPU is")
    stage.add_argument("--minutes", type=float, help="time of the whole (default: 8, in a rehearsal 30)")
    names = [part.name for part in PARTS]
    stage.add_argument("--parts", nargs="+", choices=names, metavar="PART", help=f"only these of {', '.join(names)}")
    stage.add_argument("--out", type=Path, help="file of the result (default: gpu-check.json beside the runs)")
    pack = stage.add_argument_group("for a machine without a network")
    pack.add_argument("--pack", type=Path, metavar="FOLDER", help="write parcels to carry there, and measure nothing")
    pack.add_argument("--python", metavar="X.Y", help="Python release of that machine (default: the one here)")
    pack.add_argument("--parcel-mib", type=int, metavar="MIB", help="most that a parcel may hold (default: 64)")


def _gpu_check(options: argparse.Namespace) -> int:
    if options.pack is not None:
        from .gpu_pack import PARCEL_MIB, here, pack

        mib = PARCEL_MIB if options.parcel_mib is None else options.parcel_mib
        parcels = pack(options.pack, options.python or here(), mib)
        for parcel in parcels:
            size = sum(file.stat().st_size for file in parcel.iterdir())
            print(f"{parcel}: {size / 2**20:.1f} MiB")
        print(f"Carry all to one folder there, and start it: sh {parcels[-1].name}/run.sh")
        return 0
    if options.python is not None or options.parcel_mib is not None:
        raise ValueError("--python and --parcel-mib are those of parcels; give --pack with them.")
    small = options.rehearse or not _gpu_is_there()
    minutes = MINUTES["rehearsal" if small else "gpu"] if options.minutes is None else options.minutes
    if minutes <= 0:
        raise ValueError(f"--minutes is {minutes:g}; the whole needs a time above 0.")
    out = runs_folder() / "gpu-check.json" if options.out is None else options.out
    parts = [part for part in PARTS if options.parts is None or part.name in options.parts]
    # as of `timeout`: what runs on the GPU is ended before this process is
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    result = check(parts, 60 * minutes, out, small)
    print(table(result))
    print(f"Result: {out}")
    return 0 if all(part["state"] == DONE for part in result["parts"]) else 1


def _gpu_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


def check(
    parts: Sequence[Part], seconds: float, out: Path, small: bool,
    command: Callable[[str, Path, float, bool], list[str]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run parts one after the other within a time, and write what they find as they find it.

    One check at a time: another one beside these runs is waited for, as the GPU could not be measured by both.

    Args:
        parts: What is measured, in order.
        seconds: Time of the whole. A part has its share of it, and what those before it have left.
        out: JSON file of the result.
        small: Rehearse on the CPU at a small size.
        command: Makes the command of a part, from its name, the working folder, its seconds and `small`; that of
            `gpu_parts` if None.

    Returns:
        What was written: `rehearsal`, `environment`, `gpu` (name, memory), `seconds`, and for each part name, state,
        seconds, its limit, rows (`name`, `value`, `unit`), series, and error.
    """
    work = runs_folder() / "gpu-check"
    work.parent.mkdir(parents=True, exist_ok=True)
    with Lock(work.with_name(f"{work.name}.lock.json"), f"The GPU check in {work}").holding():
        return _check(parts, seconds, out, small, command or _command, work)


def _check(
    parts: Sequence[Part], seconds: float, out: Path, small: bool,
    command: Callable[[str, Path, float, bool], list[str]], work: Path,
) -> dict[str, Any]:  # fmt: skip
    begin = time.monotonic()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    out.parent.mkdir(parents=True, exist_ok=True)
    variables = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if small else {})}
    print(_announcement(small, seconds))
    records: list[dict[str, Any]] = []
    here = environment() | ({"device": "cpu"} if small else {})
    here["git_revision"] = os.environ.get(REVISION, here["git_revision"])
    result = {"rehearsal": small, "environment": here, "gpu": None if small else _gpu(), "parts": records}

    def save() -> None:
        write_json(out, result | {"seconds": round(time.monotonic() - begin, 1)})

    save()
    states: dict[str, str] = {}
    for part in parts:
        left = seconds - (time.monotonic() - begin)
        limit = left - sum(later.share for later in parts[parts.index(part) + 1 :]) * seconds
        record = {"part": part.name, "what": part.what, "state": SKIPPED, "seconds": 0.0, "limit": round(limit, 1)}
        records.append(record | {"rows": [], "series": {}, "error": None})
        record = records[-1]
        missing = [name for name in part.needs if states.get(name, DONE) != DONE]
        if missing:
            record["error"] = f"it needs what {', '.join(missing)} makes"
        elif limit < LEAST:
            record["error"] = "no time was left"
        else:
            asked = command(part.name, work, limit, small)
            _run(asked, record, work, limit, variables, save)
        states[part.name] = record["state"]
        ending = "" if record["error"] is None else f": {record['error'].splitlines()[-1]}"
        print(f"{part.name:<10} {record['state']:<11} {record['seconds']:6.1f} s of {limit:.0f}{ending}", flush=True)
        save()
    return read_json(out)


def _command(name: str, work: Path, seconds: float, small: bool) -> list[str]:
    size = ["--small"] if small else []
    return [sys.executable, "-m", "npo_core.stages.gpu_parts", name, str(work), f"{seconds:.1f}", *size]


def _run(
    command: Sequence[str], record: dict[str, Any], work: Path, limit: float, variables: Mapping[str, str],
    save: Callable[[], None],
) -> None:  # fmt: skip
    """Run a part to its end or its limit; its record is brought up to date, and saved, as it measures."""
    found, log = work / f"{record['part']}.json", work / f"{record['part']}.log"
    begin, record["state"] = time.monotonic(), RUNNING
    save()
    with log.open("wb") as stream:
        # a session of its own, so that what it has started is ended with it
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=variables, start_new_session=True
        )
        try:
            while process.poll() is None and time.monotonic() - begin < limit:
                time.sleep(POLL)
                if _read(found, record):
                    save()
        finally:  # also where this process is stopped
            ended = process.poll()
            if ended is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    _read(found, record)
    record["seconds"] = round(time.monotonic() - begin, 1)
    record["state"] = STOPPED if ended is None else FAILED if ended else DONE
    if ended is None:
        record["error"] = f"ended after {limit:.0f} s, with the rows that it had by then"
    elif ended:
        words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LAST_WORDS:]
        record["error"] = "\n".join(words) or f"it ended with status {ended} and said nothing"


def _read(found: Path, record: dict[str, Any]) -> bool:
    """Take over what a part has written; whether there is more than before."""
    if not found.is_file():
        return False
    content = read_json(found)
    new = any(record[name] != content[name] for name in content)
    record.update(content)
    return new


def _gpu() -> dict[str, Any]:
    import torch

    about = torch.cuda.get_device_properties(0)
    return {"name": about.name, "memory GiB": round(about.total_memory / 2**30, 1), "cuda": torch.version.cuda}


def _announcement(small: bool, seconds: float) -> str:
    if not small:
        return f"On {_gpu()['name']}, at most {duration(seconds)}."
    return (
        f"A REHEARSAL on the CPU at a small size, at most {duration(seconds)}: it shows that every part runs, and "
        "its figures say nothing of a GPU."
    )


def table(result: Mapping[str, Any]) -> str:
    """What was found, as text: a line a row, and for each part that was not done, why."""
    title = "rehearsal on the CPU, no figure of a GPU" if result["rehearsal"] else result["gpu"]["name"]
    lines = [f"{title}, {result['seconds']:.0f} s", f"{'part':<10} {'':<80}{'value':>12}  unit"]
    for part in result["parts"]:
        for row in part["rows"]:
            value = "not finite" if row["value"] is None else f"{row['value']:.4g}"
            lines.append(f"{part['part']:<10} {row['name']:<80}{value:>12}  {row['unit']}")
        if part["state"] != DONE:
            lines.append(f"{part['part']:<10} {part['state']}: {part['error'].splitlines()[-1]}")
    return "\n".join(lines)
