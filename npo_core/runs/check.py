"""Whether a run folder is whole: what `python -m npo_core check RUN` looks at. Nothing is written or loaded."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from ..files import UNFINISHED, read_json, read_lines
from ..lock import Lock
from .checkpoints import MARKER, WEIGHTS, CheckpointError, checkpoint_folders, require_complete
from .config import RunConfig
from .folder import effective, metric_lines


@dataclass
class Finding:
    """What a check of a run folder found.

    Attributes:
        state: What the run is, a sentence.
        damage: What is broken, and what to do about it.
        notes: What a restart puts right by itself, or what is no damage.
    """

    state: str = ""
    damage: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether the run can be read, and gone on with."""
        return not self.damage

    def __str__(self) -> str:
        lines = [self.state, *(f"damaged: {text}" for text in self.damage), *(f"note: {text}" for text in self.notes)]
        return "\n".join(line for line in lines if line)


def check_run(folder: str | Path) -> Finding:
    """Look at every file of a run folder.

    Args:
        folder: Run folder.

    Raises:
        FileNotFoundError: It is not there, or is no run folder.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no run folder: it has no config.json.")
    found = Finding()
    config = _read(
        found,
        lambda: RunConfig.of_run(read_json(folder / "config.json")),
        "config.json",
    )
    lines = _read(found, lambda: metric_lines(folder / "metrics.jsonl"), "metrics.jsonl") or []
    events = _read(found, lambda: list(read_lines(folder / "events.jsonl")), "events.jsonl") or []
    result = _result(found, folder)
    _torn(found, folder)
    _tables(found, folder)
    newest = _checkpoints(found, folder)
    _caches(found, folder, events)
    _others(found, folder)
    done = lines[-1]["compute_step"] if lines else 0
    budget = "?" if config is None else config.compute_steps
    if result is not None:
        found.state = f"{folder.name}: finished, {done} steps"
        if result.get("compute_steps") != done:
            found.damage.append(
                f"result.json speaks of {result.get('compute_steps')} steps, metrics.jsonl of {done}; delete the first "
                "and start the run again, which makes it anew from what is there"
            )
    else:
        segment = ([event for event in effective(events) if event["event"] == "segment"] or [None])[-1]
        found.state = f"{folder.name}: at step {done} of {budget}, {_goes_on(segment, newest, done)}"
    if config is not None and folder.name != config.run_name:
        found.notes.append(f"its name is not that of its settings; it goes on under {config.run_name} only")
    return found


def _goes_on(segment: dict[str, Any] | None, newest: dict[int, int], done: int) -> str:
    if segment is None:
        return "begins anew when it is started again"
    step = newest.get(segment["branch"], segment["start"])
    place = segment["compute_start"] + step - segment["start"]
    return f"goes on from step {place} when it is started again ({done - place} to be done once more)"


def _read(found: Finding, read: Callable[[], Any], name: str) -> Any:
    try:
        return read()
    except (ValueError, TypeError, KeyError) as error:
        found.damage.append(f"{name}: {error}")
        return None


def _result(found: Finding, folder: Path) -> dict[str, Any] | None:
    path = folder / "result.json"
    if not path.exists():
        return None
    return _read(found, lambda: dict(read_json(path)), "result.json")


def _torn(found: Finding, folder: Path) -> None:
    for name in ("metrics.jsonl", "events.jsonl"):
        path = folder / name
        if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
            found.notes.append(f"{name}: the last line is cut off; the next one that is written mends it")


def _tables(found: Finding, folder: Path) -> None:
    for path in sorted(folder.rglob("*.parquet")):
        if not UNFINISHED.fullmatch(path.name):
            try:
                pq.read_table(path)
            except (pa.ArrowInvalid, OSError) as error:
                found.damage.append(f"{path.relative_to(folder)} cannot be read ({error}); {_remedy(path)}")


def _remedy(path: Path) -> str:
    if path.parent.name == "guidance":
        return "copy it again: the replay it belongs to needs it"
    return "delete it; only a picture or a measurement is made from it"


def _checkpoints(found: Finding, folder: Path) -> dict[int, int]:
    """Look at all checkpoints; the newest resumable policy step of each branch."""
    newest: dict[int, int] = {}
    for branch in sorted((folder / "branches").glob("[0-9]*")):
        for step, checkpoint in sorted(checkpoint_folders(branch).items()):
            name = checkpoint.relative_to(folder)
            if not (checkpoint / MARKER).is_file():
                found.notes.append(f"{name} is half written; a restart goes on from the one before")
                continue
            broken = list(_broken_weights(checkpoint))
            try:
                require_complete(checkpoint, resumable=False)
            except CheckpointError as error:
                broken.append(str(error))
            if broken:
                found.damage.append(f"{name}: {broken[0]} Copy it again, or delete it: a restart goes on from another")
                continue
            try:
                require_complete(checkpoint)
            except CheckpointError:
                continue  # slimmed to its weights, as it should be
            newest[int(branch.name)] = max(step, newest.get(int(branch.name), 0))
    return newest


def _broken_weights(checkpoint: Path) -> Iterator[str]:
    for path in sorted(checkpoint.glob("*.safetensors")):
        if WEIGHTS.fullmatch(path.name):
            try:
                with safe_open(path, "np"):
                    pass
            except SafetensorError as error:
                yield f"{path.name} cannot be read ({error})."


def _caches(found: Finding, folder: Path, events: list[dict[str, Any]]) -> None:
    for event in effective(events):
        name = event.get("guidance") if event["event"] == "segment" else event.get("file")
        if name and not (folder / name).is_file():
            found.damage.append(f"{name} is missing, and a replay was guided by it; copy it again")


def _others(found: Finding, folder: Path) -> None:
    lock = Lock(folder / "lock.json", "The run")
    if (holder := lock.holder()) is not None:
        doing = "writes" if lock.taken else "wrote, and is dead; the next start takes over from it:"
        found.notes.append(f"{doing} here: {holder}")
    left = sum(1 for path in folder.rglob(".*") if UNFINISHED.fullmatch(path.name))
    if left:
        found.notes.append(f"{left} files that a killed process had begun; the next start removes them")
