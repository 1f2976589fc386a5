"""The run folder: the only interface between training, figures and readers.

`data/runs/<method>-<preset>-s<seed>-<digest>/` holds `config.json`, `env.json`, `metrics.jsonl`, `events.jsonl`,
`rollouts/`, `guidance/`, `branches/`, `figures/` and `result.json`. Files are written under another name first and then
renamed; the two logs are append-only. One process at a time writes it: `lock.json` names which.
"""

import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ..declaration import declarations
from ..files import append_line, as_json, read_json, read_lines, unfinished_name, write_json, write_text
from ..lock import Lock, remove_unfinished
from ..progress import ProgressBar, progress
from .config import RunConfig

NAMELESS = {name for name, setting in declarations(RunConfig).items() if not setting.names_run}
"""Settings that may differ from one sitting of a run to the next."""

SCHEMA = 1
"""Version of `result.json`."""

DECISIONS = ("warning", "probe", "choice", "planned", "dismissed", "cache", "rollback", "ahead")
"""Events that a decision leaves, at most one of a kind at a compute step."""

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "numpy")


PACKAGE = Path(__file__).resolve().parents[1]


def checkout() -> Path | None:
    """Root of the checkout that this package is run from; None for an installed copy, which carries `base/`."""
    return None if (PACKAGE / "base").is_dir() else PACKAGE.parent


def project_folder() -> Path:
    """Where `data/` and `figures/` are: the root of the checkout, or for an installed copy the caller's folder."""
    return checkout() or Path.cwd()


def shipped_policies() -> Path:
    """Folder of the base policies that come with the code; only read by an installed copy."""
    root = checkout()
    return PACKAGE / "base" if root is None else root / "data" / "base"


def runs_folder() -> Path:
    """Where runs are kept: `NPO_RUNS` if set, else `data/runs` of the checkout, or of the caller's folder."""
    return Path(os.environ.get("NPO_RUNS", project_folder() / "data" / "runs"))


class RunFolder:
    """One run on disk.

    Args:
        config: Settings of the run; its name and digest decide the folder.
        root: Folder of all runs; `runs_folder()` if None.

    Raises:
        OSError: The folder cannot be written.
        ValueError: The folder holds a run with other settings.
    """

    def __init__(self, config: RunConfig, root: Path | None = None):
        self.config = config
        self.path = Path(runs_folder() if root is None else root) / config.run_name
        self._lock = self._own_lock()
        finished = self.result() is not None  # then the folder is only read, maybe on another machine
        if not finished:
            self._make()
        saved = self.path / "config.json"
        settings = json.loads(config.to_json())
        found = read_json(saved) if saved.exists() else None
        if found is not None and deciding(found) != deciding(settings):
            raise ValueError(f"{saved} holds other settings than this run's; move that folder away.")
        if found is None or (found != settings and not finished):
            write_json(saved, settings)  # trackers and addresses may change between sittings
        if not (self.path / "env.json").exists():
            write_json(self.path / "env.json", environment())

    def _own_lock(self) -> Lock:
        return Lock(self.path / "lock.json", f"The run {self.path}")

    def _make(self) -> None:
        try:
            for name in ("rollouts", "guidance", "branches", "figures"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            probe = unfinished_name(self.path / "writable")
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OSError(
                f"The run folder {self.path} cannot be written ({error.strerror}). "
                "Give another root, or set NPO_RUNS to a folder that you may write to."
            ) from error

    @property
    def written_elsewhere(self) -> bool:
        """Whether another process writes the run."""
        return self._lock.taken

    @contextmanager
    def writing(self, quiet: bool = False) -> Iterator[None]:
        """Be the one process that writes the run; wait for another that does. Within it, it may be asked for again.

        What the run is afterwards has to be read anew: another process may have gone on with it, or finished it.

        Args:
            quiet: Without a progress bar while waiting; for whom is said all the same.

        Raises:
            Locked: The run is being written on another system, see `Lock`.
        """
        if self._lock.held:
            yield
            return
        self._acquire(quiet)
        try:
            self._begin()
            yield
        finally:
            self._release()

    def _acquire(self, quiet: bool) -> None:
        with ExitStack() as stack:
            self._lock.acquire(_Waiting(self, quiet, stack))

    def _release(self) -> None:
        self._lock.release()

    def _begin(self) -> None:
        """What a sitting starts with; a finished run is only read."""
        if (self.path / "result.json").exists():
            return
        remove_unfinished(self.path)  # of a process that was killed
        write_json(self.path / "env.json", environment())

    def branch(self, number: int) -> Path:
        """Folder of the checkpoints of a branch; a roll-back opens the next one."""
        return self.path / "branches" / f"{number:02d}"

    @property
    def metrics_path(self) -> Path:
        """`metrics.jsonl`: a line per executed optimiser step."""
        return self.path / "metrics.jsonl"

    @property
    def events_path(self) -> Path:
        """`events.jsonl`: the append-only log of decisions."""
        return self.path / "events.jsonl"

    def event(self, kind: str, **content: Any) -> dict[str, Any]:
        """Append an event and return it."""
        self._lock.require()
        record = {"event": kind, "time": round(time.time(), 3), **content}
        append_line(self.events_path, record)
        return record

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """All events, or those of one kind, in the order they were written."""
        return [record for record in read_lines(self.events_path) if kind in (None, record["event"])]

    def effective_events(self) -> list[dict[str, Any]]:
        """Events as a reader of the run should see them; see `effective`."""
        return effective(self.events())

    def metrics(self) -> list[dict[str, Any]]:
        """All metric lines in the order of `compute_step`; NaN where a metric was not finite.

        Raises:
            ValueError: They are not in that order; two processes have written them.
        """
        return metric_lines(self.metrics_path)

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Append the line of an executed step."""
        self._lock.require()
        append_line(self.metrics_path, line)

    def steps_done(self) -> int:
        """Optimiser steps that are on disk; read by one process, whoever writes."""
        return max((line["compute_step"] for line in metric_lines(self.metrics_path)), default=0)

    def reached(self) -> str:
        """How far the run is, in words."""
        return f"step {self.steps_done()} of {self.config.compute_steps}"

    def drop_metrics_after(self, compute_step: int) -> None:
        """Forget metric lines past `compute_step`: an interrupted run repeats those steps from its checkpoint."""
        self._rewrite_metrics([record for record in self.metrics() if record["compute_step"] <= compute_step])

    def _rewrite_metrics(self, kept: Sequence[Mapping[str, Any]]) -> None:
        self._lock.require()
        write_text(self.metrics_path, "".join(json.dumps(as_json(record)) + "\n" for record in kept))

    def result(self) -> dict[str, Any] | None:
        """Content of `result.json`, or None while the run is not finished."""
        path = self.path / "result.json"
        return read_json(path) if path.exists() else None

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write `result.json`; from then on the run is loaded, not run again."""
        self._lock.require()
        content = {
            "schema": SCHEMA,
            "method": self.config.method,
            "preset": self.config.preset,
            "seed": self.config.seed,
            "status": "finished",
            **result,
        }
        write_json(self.path / "result.json", content)
        return content


class _Waiting:
    """A bar over the steps that another process makes of a run."""

    def __init__(self, run: RunFolder, quiet: bool, stack: ExitStack):
        self.run, self.quiet, self.stack = run, quiet, stack
        self.bar: ProgressBar | None = None
        self.seen = 0

    def __call__(self) -> None:
        if self.bar is None:
            label = f"{self.run.config.method}, another process"
            self.bar = self.stack.enter_context(progress(self.run.config.compute_steps, label, self.quiet, stays=False))
        reached = self.run.steps_done()
        self.bar.advance(reached - self.seen)
        self.seen = reached


def effective(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Events of a log without what a restart after a kill did again.

    Left out are events past the point where the run went on, and the first of two records of the same decision.
    """
    kept: list[dict[str, Any]] = []
    for record in events:
        if record["event"] == "resume":
            kept = [e for e in kept if e.get("compute_step", e.get("compute_start", 0)) <= record["compute_step"]]
        elif record["event"] in DECISIONS:
            same = (record["event"], record["compute_step"])
            kept = [e for e in kept if (e["event"], e.get("compute_step")) != same]
        kept.append(dict(record))
    return kept


def deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What decides of the settings in a `config.json`; one from before a setting came has what runs had then."""
    later = {name: setting.had for name, setting in declarations(RunConfig).items() if setting.later}
    return {name: value for name, value in {**later, **settings}.items() if name not in NAMELESS}


def metric_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a `metrics.jsonl`; NaN where a metric was not finite, which JSON has as null.

    Raises:
        ValueError: They are not in the order of `compute_step`; two processes have written them.
    """
    lines = [{k: math.nan if v is None else v for k, v in line.items()} for line in read_lines(path)]
    for number, (before, line) in enumerate(itertools.pairwise(lines), start=2):
        if line["compute_step"] <= before["compute_step"]:
            raise ValueError(
                f"{path}, line {number}: compute step {line['compute_step']} comes after {before['compute_step']}. Two "
                "processes have written this run, and nothing in it can be trusted: delete or move away its folder, "
                "and run again."
            )
    return lines


def offline_rollouts(events: Sequence[Mapping[str, Any]], before: int | None = None) -> int:
    """Rollouts that were sampled outside of training steps: probes, caches, and caches that held nothing.

    Args:
        events: Events of a run, without those of abandoned sittings.
        before: Compute step; only what was sampled before that step was made counts. None: all.
    """
    return sum(
        event.get("rollouts", 0)
        for event in events
        if event["event"] in ("probe", "cache", "dismissed") and (before is None or event["compute_step"] < before)
    )


def moving_average(lines: Sequence[Mapping[str, Any]], name: str, weight: float = 0.9) -> np.ndarray:
    """Bias-corrected moving average of a metric over the steps behind each line.

    Args:
        lines: Metric lines in the order of `compute_step`; a branch goes on from the step that it starts at.
        name: Metric; lines without it, or with NaN, leave the average as it was.
        weight: Weight of the past.

    Returns:
        A value per line, NaN before the first finite one.
    """
    states: dict[int, np.ndarray] = {}
    state, branch, averages = np.zeros(2), None, []
    for line in lines:
        step, value = line["policy_step"], line.get(name, np.nan)
        if line["branch"] != branch:
            earlier = [known for known in states if known < step]
            state, branch = states[max(earlier)] if earlier else np.zeros(2), line["branch"]
        if np.isfinite(value):
            state = weight * state + (1 - weight) * np.array([value, 1.0])
        states[step] = state
        averages.append(state[0] / state[1] if state[1] else np.nan)
    return np.array(averages)


def versions_of(made: Mapping[str, Any]) -> dict[str, Any]:
    """Of an `env.json` what decides the bits of a run beside its settings: Python, packages, device."""
    return {name: made[name] for name in ("python", "packages", "device")}


def environment() -> dict[str, Any]:
    """Versions, git revision and device, for `env.json`."""
    import torch

    revision, root = None, checkout()
    if root is not None:  # an installed copy would name the revision of whatever folder it is called from
        asked = ["git", "rev-parse", "HEAD"]
        try:
            revision = subprocess.run(asked, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            revision = None
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "git_revision": revision,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
    }
