"""Runs in processes of their own: side by side, or each over several processes through accelerate's launcher."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path

from ..notebook import in_one_sentence
from ..progress import ProgressBar, progress, tell
from ..runs.config import RunConfig
from ..runs.folder import RunFolder
from ..runs.launchers import read_launcher
from . import run as stages

LOOK_SECONDS = 1.0
"""Time between two looks at the metric lines of a run in another process."""


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

    @property
    def folder(self) -> RunFolder:
        """Its run folder."""
        return RunFolder(self.config, self.root)

    def wait(self) -> RunFolder:
        """Wait for the end of the run and return its folder.

        Raises:
            RuntimeError: The process failed; the message holds the end of its output.
        """
        if self.process is not None and self.process.wait() != 0:
            log = self.folder.path / "process.log"
            end = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise RuntimeError(f"The run {self.config.run_name} failed; the end of {log}:\n{end}")
        return self.folder

    def follow(self, quiet: bool = False, label: str = "") -> RunFolder:
        """Wait for the end of the run with a progress bar here, which reads its metric lines; return its folder."""
        self.draw(self.bar(quiet, label))
        return self.wait()

    def bar(self, quiet: bool = False, label: str = "") -> ProgressBar | None:
        """A progress bar for the run, None if it is finished, which is said."""
        label = label or self.config.method
        if self.process is None:
            if not quiet:
                tell(label, f"loaded, {stages.loaded_words(self.folder.result())}")
            return None
        done = self.folder.steps_done()
        return progress(self.config.compute_steps, label, quiet, start=done)

    def draw(self, bar: ProgressBar | None) -> None:
        """Move a bar on with the metric lines until the process ends."""
        if bar is None:
            return
        folder = self.folder
        with bar:
            seen, done = folder.steps_done(), False
            while not done:
                done = self.process.poll() is not None
                reached = folder.steps_done()
                bar.advance(reached - seen)
                seen = reached
                if not done:
                    time.sleep(LOOK_SECONDS)

    def stop(self) -> None:
        """End the process if it still runs; the run can be resumed later."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


def run_all(configs: Mapping[str, RunConfig], root: Path | None = None, quiet: bool = False) -> dict[str, RunFolder]:
    """Do several runs side by side: the last one here, the others in processes of their own, with a bar each.

    Runs with a `launcher` or with vLLM are done one after the other: each takes all the devices.

    Args:
        configs: Settings by label. Finished runs are loaded.
        root: Folder of all runs; the project's `data/runs` if None.
        quiet: Without progress bars.

    Returns:
        Run folders by label, in the given order.
    """
    if any(config.launcher or config.vllm != "off" for config in configs.values()):
        return {label: run_launched(config, root, quiet, label) for label, config in configs.items()}
    *others, here = configs
    started = {label: start(configs[label], root) for label in others}
    drawing = []
    try:
        for label, background in started.items():
            bar = background.bar(quiet, label)
            # a copy of the context: what a thread draws belongs to the cell that started it
            drawing.append(threading.Thread(target=copy_context().run, args=(background.draw, bar)))
            drawing[-1].start()
        folder = stages.run(configs[here], root, quiet, here)
        with in_one_sentence(", ".join(others), lambda: _reached(started.values())):
            return {**{label: background.wait() for label, background in started.items()}, here: folder}
    finally:
        for background in started.values():
            background.stop()
        for thread in drawing:
            thread.join()


def _reached(started: Iterable[BackgroundRun]) -> str:
    return ", ".join(background.folder.reached() for background in started)


def run_launched(config: RunConfig, root: Path | None = None, quiet: bool = False, label: str = "") -> RunFolder:
    """Do a run through its launcher, with a progress bar here; without a launcher it is done in this process.

    A run with vLLM gets a process of its own too: vLLM does not give memory back, and one process holds one engine.

    Args:
        config: Settings.
        root: Folder of all runs; the project's `data/runs` if None.
        quiet: Without progress bars.
        label: Name of the run on its bar; its method if there is none.
    """
    if not config.launcher and config.vllm == "off":
        return stages.run(config, root, quiet, label)
    background = start(config, root)
    try:
        with in_one_sentence(label or config.method, lambda: _reached([background])):
            return background.follow(quiet, label)
    finally:
        background.stop()


def start(config: RunConfig, root: Path | None = None) -> BackgroundRun:
    """Start a run in a process of its own and return at once; a finished run is not run again.

    Args:
        config: Settings.
        root: Folder of all runs; the project's `data/runs` if None.

    Raises:
        ValueError: The launcher spans several machines; the command must be given on each of them.
    """
    folder = RunFolder(config, root)
    if folder.result() is not None:
        return BackgroundRun(config, None, root)
    command = [*_launch_command(config, folder), "run", "--config", str(folder.path / "config.json"), "--quiet"]
    if root is not None:
        command += ["--root", str(root)]
    with (folder.path / "process.log").open("a") as log:  # maybe another one waits for the first
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": str(config.threads)}
        )
    return BackgroundRun(config, process, root)


def _launch_command(config: RunConfig, folder: RunFolder) -> list[str]:
    """What starts `npo_core`: this Python alone, or accelerate's launcher."""
    layout = read_launcher(config.launcher)
    if layout.processes == 1:  # accelerate would start a child that outlives it
        return [sys.executable, "-m", "npo_core"]
    command = ["accelerate.commands.launch", "--config_file", str(layout.file)]
    if layout.machines > 1:
        raise ValueError(
            f"launcher {config.launcher!r} spans {layout.machines} machines, which one process cannot start. On each "
            f"of them: python -m {' '.join(command)} --machine_rank RANK --main_process_ip ADDRESS "
            f"--main_process_port PORT -m npo_core run --config {folder.path / 'config.json'}"
        )
    if layout.port is None:  # accelerate's 29500 is taken where another run is
        command += ["--main_process_port", "0"]
    return [sys.executable, "-m", *command, "-m", "npo_core"]
