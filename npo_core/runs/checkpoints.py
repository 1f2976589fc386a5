"""Checkpoints that a run can roll back to, and how many of them are kept.

A checkpoint is a folder that transformers' Trainer writes: weights, optimiser, schedule, random state. A marker with
the size of every file is added last, so a half-written folder is recognised. Beyond the roll-back horizon a checkpoint
is slimmed to its weights: it can still be a guide or be evaluated, but no longer be resumed from.
"""

import json
import re
import shutil
from pathlib import Path

from ..files import read_json, write_text

MARKER = "complete.json"

NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
"""Folders that transformers' Trainer writes; another name beside them, such as checkpoint-2-copy, is no checkpoint."""

WEIGHTS = re.compile(
    r"model\.safetensors|model-\d+-of-\d+\.safetensors|model\.safetensors\.index\.json|adapter_model\.safetensors"
)
"""Files with weights: whole, in shards with their index, or those of an adapter."""

FULL_STATE = {
    "optimiser": re.compile(r"optimizer\.(pt|bin)|optimizer_\d+/.+"),
    "schedule": re.compile(r"scheduler\.pt"),
    "random state": re.compile(r"rng_state(_\d+)?\.pth"),
    "trainer state": re.compile(r"trainer_state\.json"),
}
"""What a roll-back needs beside the weights; one process, DDP and FSDP name the files differently."""

SHARDED_MODEL = re.compile(r"pytorch_model_fsdp(\.bin|_\d+/.+)")
"""The model's own state under FSDP, needed to resume where it was written."""

KEPT = re.compile(r"(?!trainer_state\.json)[\w.-]+\.(json|jinja|txt|model)")
"""Files that a slimmed checkpoint keeps beside its weights: configurations, tokenizer, processor, chat template."""

ADAM_COPIES = 3
"""A resumable checkpoint holds the weights and two Adam moments."""


class CheckpointError(ValueError):
    """A checkpoint folder that is missing, half written or slimmed to its weights."""


def checkpoint_folder(branch: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimiser steps in a branch."""
    return Path(branch) / f"checkpoint-{step}"


def checkpoint_step(folder: Path) -> int:
    """Policy step of a checkpoint folder, from its name.

    Raises:
        CheckpointError: It is not named checkpoint-<step>.
    """
    found = NAME.fullmatch(Path(folder).name)
    if not found:
        raise CheckpointError(f"{folder} is no checkpoint of a run: those are named checkpoint-<step>.")
    return int(found.group(1))


def checkpoint_folders(folder: Path) -> dict[int, Path]:
    """Folders named checkpoint-<step> by step, in order, whole or not; files and other names are passed over."""
    found = {path: NAME.fullmatch(path.name) for path in Path(folder).glob("checkpoint-*") if path.is_dir()}
    return dict(sorted((int(name.group(1)), path) for path, name in found.items() if name))


def mark_complete(folder: Path) -> None:
    """Write the marker: from now on the checkpoint counts as complete."""
    sizes = {
        entry.relative_to(folder).as_posix(): entry.stat().st_size
        for entry in sorted(Path(folder).rglob("*"))
        if entry.is_file()
    }
    sizes.pop(MARKER, None)
    write_text(Path(folder) / MARKER, json.dumps(sizes))


def require_complete(folder: str | Path, resumable: bool = True) -> Path:
    """The folder, if it is a complete checkpoint.

    Args:
        folder: Checkpoint folder.
        resumable: Also ask for optimiser, schedule and random state; False is enough for a guide.

    Raises:
        CheckpointError: It is missing, half written, or slimmed to weights while `resumable` is asked for.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"There is no checkpoint folder {folder}.")
    if not (folder / MARKER).is_file():
        raise CheckpointError(f"{folder} is half written (it has no {MARKER}); resume from an earlier checkpoint.")
    sizes = read_json(folder / MARKER)
    for part, pattern in {"weights": WEIGHTS, **(FULL_STATE if resumable else {})}.items():
        if not any(pattern.fullmatch(name) for name in sizes):
            raise CheckpointError(
                f"{folder} holds no {part}: it was slimmed to its weights and cannot be resumed from. "
                "Raise checkpoint_keep, or choose a later checkpoint."
                if part != "weights"
                else f"{folder} holds no weights in safetensors."
            )
    needed = [WEIGHTS, *((SHARDED_MODEL, *FULL_STATE.values()) if resumable else ())]
    for name, size in sizes.items():
        path = folder / name
        wanted = any(pattern.fullmatch(name) for pattern in needed)
        if wanted and (not path.is_file() or path.stat().st_size != size):
            raise CheckpointError(f"{path} is missing or not {size} bytes long; the checkpoint is damaged.")
    return folder


def complete_checkpoints(branch: Path, resumable: bool = True) -> dict[int, Path]:
    """Complete checkpoints of a branch by policy step, in order."""
    found = {}
    for step, folder in checkpoint_folders(branch).items():
        try:
            found[step] = require_complete(folder, resumable)
        except CheckpointError:
            continue
    return found


def slim(folder: Path) -> None:
    """Delete what only a resume needs; what loads the policy stays: weights, configuration, tokenizer, processor."""
    folder = Path(folder)
    # the marker first: a kill in between leaves a folder that claims less than it holds, never more
    sizes = read_json(folder / MARKER)
    kept = {name: size for name, size in sizes.items() if WEIGHTS.fullmatch(name) or KEPT.fullmatch(name)}
    write_text(folder / MARKER, json.dumps(kept))
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name not in kept and entry.name != MARKER:
            entry.unlink()


def retain(branch: Path, newest: int, keep: int) -> None:
    """Slim the checkpoints of a branch that no roll-back needs any more.

    Args:
        branch: Folder of the branch.
        newest: Policy step of the newest checkpoint.
        keep: Number of newest checkpoints that stay resumable; 0 keeps all.
    """
    if keep <= 0:
        return
    steps = [step for step in complete_checkpoints(branch) if step <= newest]
    for step in steps[:-keep]:
        slim(checkpoint_folder(branch, step))


def retention_bytes(parameters: int, bytes_per_parameter: int, checkpoints: int, keep: int) -> int:
    """Disk space that the checkpoints of a run take, in bytes.

    Args:
        parameters: Parameters of the policy.
        bytes_per_parameter: Bytes of a stored weight (4 for float32).
        checkpoints: Checkpoints that the run writes.
        keep: Number of newest ones that stay resumable; 0 keeps all.

    Returns:
        Resumable ones hold weights and two Adam moments, the others weights only.
    """
    full = checkpoints if keep <= 0 else min(keep, checkpoints)
    weights = parameters * bytes_per_parameter
    return full * ADAM_COPIES * weights + (checkpoints - full) * weights
