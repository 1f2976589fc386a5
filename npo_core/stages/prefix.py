"""Shared beginnings: runs that differ only in where they intervene are the same run until then, bit for bit.

GRPO and a late intervention share all steps up to the plateau; an early intervention alone and with a late one share
the scout and the guided window; AutoNPO is GRPO until it intervenes, and where it never does to its end. A new run
takes such a beginning from a run on disk and goes on from its checkpoint, as it would after a kill. The steps count on
both clocks all the same: nothing is free in a comparison.
"""

import math
import shutil
import warnings
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from ..control.scheduled import Intervention, planned_interventions
from ..declaration import declarations
from ..files import append_line, read_json, read_lines, write_json
from ..runs.checkpoints import complete_checkpoints, slim
from ..runs.config import RunConfig
from ..runs.folder import RunFolder, environment, versions_of

SHARING = ("grpo", "npo")
"""Methods whose interventions are known beforehand, and that train as GRPO until the first."""


UNSHARED = ("prefix", "warning", "probe", "choice", "dismissed")
"""Events of a beginning that are the lender's own; those of AutoNPO led to nothing that the taker has too."""


UNFINISHED = "taking.json"
"""File of a run that is being given its beginning; what a kill leaves of it is removed."""


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

    Nothing is done for a run that has begun. A copy that was cut off is removed by the next call. One that fails, as
    when another process deletes the weights meanwhile, is removed and said, and the run makes every step itself.
    """
    _remove_unfinished(run)
    if run.events_path.exists():
        return 0
    best: tuple[int, RunFolder, list[dict]] | None = None
    for path in sorted(run.path.parent.glob(f"*-s{run.config.seed}-*/config.json")):
        try:
            donor = RunConfig.of_run(read_json(path))
        except (ValueError, TypeError):
            continue  # a run of another version
        steps = shared_steps(run.config, _until_it_intervenes(donor))
        if path.parent == run.path or not steps or path.parent.name != donor.run_name or _made_otherwise(path.parent):
            continue
        folder = RunFolder(donor, run.path.parent)
        events = folder.effective_events()
        steps = min(steps, _first_of_its_own(donor, events))
        segments = [event for event in events if event["event"] == "segment" and event["compute_start"] < steps]
        reached = _last_checkpoint(folder, segments, steps)
        if reached > (0 if best is None else best[0]) and _can_roll_back(run.config, folder, segments, reached):
            best = reached, folder, segments
    if best is None:
        return 0
    write_json(run.path / UNFINISHED, {"of": best[1].path.name})
    try:
        _copy(run, *best)
    except OSError as error:
        _remove_unfinished(run)
        warnings.warn(f"{run.path.name} makes every step: the beginning of {best[1].path.name}, which it shares, "
                      f"could not be copied ({error}).", stacklevel=2)  # fmt: skip
        return 0
    (run.path / UNFINISHED).unlink()
    return best[0]


def _remove_unfinished(run: RunFolder) -> None:
    """Remove what a copy that was cut off has left: a checkpoint without the steps before it would be resumed from."""
    if not (run.path / UNFINISHED).exists():
        return
    if not run.events_path.exists():  # written last: with them the copy is whole
        for name in ("branches", "rollouts", "guidance", "guided"):
            for entry in (run.path / name).glob("*"):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        run.metrics_path.unlink(missing_ok=True)
    (run.path / UNFINISHED).unlink()


def _until_it_intervenes(config: RunConfig) -> RunConfig:
    """What a run on disk is until its first intervention, as far as its settings say: AutoNPO is GRPO."""
    return config.with_changes(method="grpo", guide_from="future") if config.method == "autonpo" else config


def _made_otherwise(folder: Path) -> bool:
    """Whether other versions of Python and packages, or another device, made a run: its bits may be others."""
    made = folder / "env.json"
    return not made.exists() or versions_of(read_json(made)) != versions_of(environment())


def _first_of_its_own(donor: RunConfig, events: Sequence[dict]) -> float:
    """Compute steps of a run on disk after which its log, and not its settings, says what it did.

    AutoNPO is plain GRPO up to its first intervention: a warning that is dismissed changes no step. The clock of a
    scheduled run that dismissed an intervention is not that of its plan.
    """
    if donor.method == "autonpo":
        return min((e["compute_step"] for e in events if e["event"] in ("rollback", "ahead")), default=math.inf)
    return 0 if any(event["event"] == "dismissed" for event in events) else math.inf


def _can_roll_back(config: RunConfig, donor: RunFolder, segments: Sequence[dict], reached: int) -> bool:
    """Whether a run that goes on from there has what its interventions go back to; the donor may have kept less."""
    there: set[int] = set()
    for segment in segments:
        there = {step for step in there if step <= segment["start"]} | set(_lent(donor, segment["branch"]))
    last = segments[-1]
    made_from = reached - last["compute_start"] + last["start"]
    for intervention in _plan(config)[len(segments) - 1 :]:
        if 0 < intervention.back_to < made_from and intervention.back_to not in there:
            return False
        made_from = min(made_from, intervention.back_to)
    return True


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
        last = steps - offset
        _copy_checkpoints(run, donor, branch, last)
        for table in (donor.path / "rollouts").glob(f"step-*-b{branch:02d}.parquet"):
            if int(table.name.split("-")[1]) <= last:
                shutil.copy(table, run.path / "rollouts")
        if segment["guidance"] is not None:
            shutil.copy(donor.path / segment["guidance"], run.path / "guidance")
        _copy_guided(run, donor, branch, last)
    _copy_logs(run, steps, donor)


def _copy_checkpoints(run: RunFolder, donor: RunFolder, branch: int, last: int) -> None:
    """Checkpoints of a branch up to a policy step; those that the run would have slimmed are, one after the other."""
    whole = [step for step in _lent(donor, branch) if step <= last]
    slimmed = whole[: -run.config.checkpoint_keep] if run.config.checkpoint_keep > 0 else []
    for step, folder in _lent(donor, branch, resumable=False).items():
        if step <= last:
            copied = shutil.copytree(folder, run.branch(branch) / folder.name, dirs_exist_ok=True)
            if step in slimmed:
                slim(Path(copied))


def _copy_guided(run: RunFolder, donor: RunFolder, branch: int, last: int) -> None:
    """What is kept of guided groups for a reader, up to a policy step, with their pictures."""
    for path in (donor.path / "guided").glob(f"b{branch:02d}*.jsonl"):
        lines = [line for line in read_lines(path) if line["policy_step"] <= last]
        (run.path / "guided" / "pictures").mkdir(parents=True, exist_ok=True)
        for line in lines:
            append_line(run.path / "guided" / path.name, line)
        for name in {group["picture"] for line in lines for group in line["groups"]} - {None}:
            shutil.copy(donor.path / "guided" / "pictures" / name, run.path / "guided" / "pictures")


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
