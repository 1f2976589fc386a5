"""Shared beginnings: runs that differ only in where they intervene are the same run until then, bit for bit.

GRPO and a late intervention share all steps up to the plateau; an early intervention alone and with a late one share
the scout and the guided window; AutoNPO is GRPO until it intervenes, and where it never does to its end. A new run
takes such a beginning from a run on disk and goes on from its checkpoint, as it would after a kill. The steps count on
both clocks all the same: nothing is free in a comparison.
"""

import shutil
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from ..control.scheduled import Intervention, planned_interventions
from ..declaration import declarations
from ..files import append_line, read_json
from ..runs.checkpoints import complete_checkpoints, retain
from ..runs.config import RunConfig
from ..runs.folder import RunFolder

SHARING = ("grpo", "npo")
"""Methods whose interventions are known beforehand, and that train as GRPO until the first."""


UNSHARED = ("prefix", "warning", "probe", "choice", "dismissed")
"""Events of a beginning that are the lender's own; those of AutoNPO led to nothing that the taker has too."""


def shared_steps(config: RunConfig, other: RunConfig) -> int:
    """Compute steps that two runs have in common: up to the first intervention that only one of them makes.

    Up to the first intervention of all where they guide in different ways. 0 for methods whose interventions nobody
    knows beforehand or that guide from the start, and where any other setting differs; what a run of AutoNPO on disk
    has in common with others, its log says, see `take_prefix`.
    """
    if config.method not in SHARING or other.method not in SHARING:
        return 0
    ours, theirs = config.deciding(), other.deciding()
    declared = declarations(RunConfig)
    different = {declared[name].acts for name in ours if ours[name] != theirs[name]} - {"plan"}
    if "start" in different:
        return 0
    length = min(config.compute_steps, other.compute_steps)
    if different:
        return min(length, *(plan[0].at for plan in (_plan(config), _plan(other)) if plan), length)
    steps, place = 0, 0
    for first, second in zip_longest(_plan(config), _plan(other)):
        ends = [intervention.at for intervention in (first, second) if intervention is not None]
        if first != second:
            return min(length, steps + min(ends) - place)
        steps, place = steps + ends[0] - place, first.back_to
    return length


def _plan(config: RunConfig) -> Sequence[Intervention]:
    return planned_interventions(config) if config.method == "npo" else ()


def take_prefix(run: RunFolder) -> int:
    """Copy the longest beginning that another run in the same root shares; return its length in compute steps.

    Nothing is done for a run that has begun. A kill while copying leaves no log, so the next call copies again.
    """
    if run.events_path.exists():
        return 0
    best: tuple[int, RunFolder, list[dict]] | None = None
    for path in sorted(run.path.parent.glob(f"*-s{run.config.seed}-*/config.json")):
        try:
            donor = RunConfig.of_run(read_json(path))
        except (ValueError, TypeError):
            continue  # a run of another version
        if path.parent == run.path or path.parent.name != donor.run_name:
            continue
        folder = RunFolder(donor, run.path.parent)
        events = folder.effective_events()
        steps = _steps_of(run.config, donor, events)
        if not steps:
            continue
        segments = [event for event in events if event["event"] == "segment" and event["compute_start"] < steps]
        reached = _last_checkpoint(folder, segments, steps)
        if reached and (best is None or reached > best[0]):
            best = reached, folder, segments
    if best is None:
        return 0
    _copy(run, *best)
    return best[0]


def _steps_of(config: RunConfig, donor: RunConfig, events: Sequence[dict]) -> int:
    """Compute steps that a run has in common with one on disk, whose log has these events.

    A run of AutoNPO is plain GRPO up to its first intervention: a warning that is dismissed changes no step.
    """
    if donor.method == "autonpo":
        interventions = [event["compute_step"] for event in events if event["event"] in ("rollback", "ahead")]
        return min([shared_steps(config, donor.with_changes(method="grpo")), *interventions])
    if any(event["event"] == "dismissed" for event in events):
        return 0  # its clock is not that of its plan
    return shared_steps(config, donor)


def _last_checkpoint(folder: RunFolder, segments: Sequence[dict], steps: int) -> int:
    """Compute step of the newest resumable checkpoint of the last segment, at most `steps`; 0 if there is none."""
    if not segments:
        return 0
    last = segments[-1]
    offset = last["compute_start"] - last["start"]
    saved = _lent(folder, last["branch"])
    done = max((line["compute_step"] for line in folder.metrics()), default=0)
    return max((step + offset for step in saved if step + offset <= min(steps, done)), default=0)


def _lent(donor: RunFolder, branch: int, resumable: bool = True) -> dict[int, Path]:
    """Checkpoints of a branch by policy step, without those that AutoNPO saved for a warning alone."""
    every = donor.config.checkpoint_every
    alone = {event["policy_step"] for event in donor.events("warning") if event["policy_step"] % every}
    saved = complete_checkpoints(donor.branch(branch), resumable=resumable)
    return {step: folder for step, folder in saved.items() if step not in alone}


def _copy(run: RunFolder, steps: int, donor: RunFolder, segments: Sequence[dict]) -> None:
    for segment in segments:
        branch, offset = segment["branch"], segment["compute_start"] - segment["start"]
        for step, folder in _lent(donor, branch, resumable=False).items():
            if step + offset <= steps:
                shutil.copytree(folder, run.branch(branch) / folder.name, dirs_exist_ok=True)
        retain(run.branch(branch), donor.config.compute_steps, run.config.checkpoint_keep)
        for table in (donor.path / "rollouts").glob(f"step-*-b{branch:02d}.parquet"):
            if int(table.name.split("-")[1]) + offset <= steps:
                shutil.copy(table, run.path / "rollouts")
        if segment["guidance"] is not None:
            shutil.copy(donor.path / segment["guidance"], run.path / "guidance")
    _copy_logs(run, steps, donor)


def _copy_logs(run: RunFolder, steps: int, donor: RunFolder) -> None:
    """Logs last, the events at the very end: their presence says that all else is there."""
    metrics, unfinished = run.metrics_path.with_suffix(".part"), run.events_path.with_suffix(".part")
    for part in (metrics, unfinished):
        part.unlink(missing_ok=True)
    for line in donor.metrics():
        if line["compute_step"] <= steps:
            append_line(metrics, line)
    for event in donor.effective_events():
        moment = event.get("compute_step", event.get("compute_start", steps))
        within = moment < steps or (moment == steps and event["event"] == "alarm")
        if within and event["event"] not in UNSHARED:
            append_line(unfinished, event)
    append_line(unfinished, {"event": "prefix", "compute_step": steps, "run": donor.path.name})
    # metrics without events are no sign of a run that has begun: they are written again
    metrics.replace(run.metrics_path)
    unfinished.replace(run.events_path)
