"""Runs side by side: one here with a progress bar, the others in processes of their own."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .config import RunConfig
from .runs import RunFolder
from .stages import run


@dataclass(frozen=True)
class BackgroundRun:
    """A run in a process of its own.

    Attributes:
        config: Its settings.
        process: The process, or None if the run was finished already.
        root: Folder of all runs.
    """

    config: RunConfig
    process: subprocess.Popen | None
    root: Path | None

    def wait(self) -> RunFolder:
        """Wait for the end of the run and return its folder.

        Raises:
            RuntimeError: The process failed; the message holds the end of its output.
        """
        if self.process is not None and self.process.wait() != 0:
            log = RunFolder(self.config, self.root).path / "process.log"
            raise RuntimeError(f"The run {self.config.run_name} failed; the end of {log}:\n{log.read_text()[-2000:]}")
        return RunFolder(self.config, self.root)

    def stop(self) -> None:
        """End the process if it still runs; the run can be resumed later."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


def run_all(configs: Mapping[str, RunConfig], root: Path | None = None, quiet: bool = False) -> dict[str, RunFolder]:
    """Do several runs side by side: the last one here, with a progress bar, the others in processes of their own.

    Args:
        configs: Settings by label. Finished runs are loaded.
        root: Folder of all runs; the project's `data/runs` if None.
        quiet: Without progress bars.

    Returns:
        Run folders by label, in the given order.
    """
    *others, here = configs
    started = {label: start(configs[label], root) for label in others}
    try:
        folder = run(configs[here], root, quiet)
        return {**{label: background.wait() for label, background in started.items()}, here: folder}
    finally:
        for background in started.values():
            background.stop()


def start(config: RunConfig, root: Path | None = None) -> BackgroundRun:
    """Start a run in a process of its own and return at once; a finished run is not run again.

    Args:
        config: Settings.
        root: Folder of all runs; the project's `data/runs` if None.
    """
    folder = RunFolder(config, root)
    if folder.result() is not None:
        return BackgroundRun(config, None, root)
    command = [sys.executable, "-m", "npo_core", "run", "--config", str(folder.path / "config.json"), "--quiet"]
    if root is not None:
        command += ["--root", str(root)]
    with (folder.path / "process.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": str(config.threads)}
        )
    return BackgroundRun(config, process, root)
