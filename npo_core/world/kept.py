"""Policies that are made when they are first asked for, and kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..lock import Lock, remove_unfinished


def made_once(folder: Path, make: Callable[[], Any]) -> Path:
    """The folder of a policy, made now if it is not there yet: by one process, for which others that want it wait.

    Args:
        folder: Folder of the policy.
        make: Writes it, under another name first. One that was interrupted left that name behind, and starts over.
    """
    there = folder / "model.safetensors"
    if not there.is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with Lock(folder.with_name(f"{folder.name}.lock.json"), f"The policy {folder}").holding():
            if not there.is_file():
                remove_unfinished(folder.parent)
                make()
    return folder
