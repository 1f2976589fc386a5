"""The run folder of several processes: one writes it, and tells the others what it reads."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..processes import agree, is_writer, process_count
from .config import RunConfig
from .folder import RunFolder
from .launchers import read_launcher


class SharedRunFolder(RunFolder):
    """A `RunFolder` that every process of a run holds; all of them call what reads, in the same order.

    Nothing is read by two processes, so a file system that shows a change late cannot make them differ. Arguments and
    errors are those of `RunFolder`; an error of the writing process is raised in all.
    """

    def __init__(self, config: RunConfig, root: Path | None = None):
        self.config = config
        self.path = agree(lambda: RunFolder(config, root).path)
        self._lock = self._own_lock()  # held by the writing process, for all

    @contextmanager
    def writing(self, quiet: bool = False) -> Iterator[None]:
        if agree(lambda: self._lock.held):
            yield
            return
        agree(lambda: self._acquire(quiet))
        try:
            agree(self._begin)
            yield
        finally:
            if is_writer():
                self._release()

    def event(self, kind: str, **content: Any) -> dict[str, Any]:
        # the others are not told: what they know of events they read
        return super().event(kind, **content) if is_writer() else {"event": kind, **content}

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        return agree(lambda: super(SharedRunFolder, self).events(kind))

    def metrics(self) -> list[dict[str, Any]]:
        return agree(lambda: super(SharedRunFolder, self).metrics())

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        if is_writer():
            super().append_metrics(line)

    def drop_metrics_after(self, compute_step: int) -> None:
        kept = [record for record in self.metrics() if record["compute_step"] <= compute_step]
        agree(lambda: self._rewrite_metrics(kept))

    def result(self) -> dict[str, Any] | None:
        return agree(lambda: super(SharedRunFolder, self).result())

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        return agree(lambda: super(SharedRunFolder, self).finish(result))


def open_run(config: RunConfig, root: Path | None = None) -> RunFolder:
    """Run folder of a configuration, for this process or for all processes of the run.

    Raises:
        ValueError: The run was started with another number of processes than its `launcher` has.
    """
    layout = read_launcher(config.launcher)
    if layout.processes != process_count():
        how = "as it is" if layout.file is None else f"with `accelerate launch --config_file {layout.file}`"
        raise ValueError(
            f"launcher is {config.launcher!r}, which is {layout.processes} process(es), but {process_count()} run. "
            f"Each process samples on its own, so another number is another run. Start it {how}, or set launcher to "
            "an accelerate configuration with that many."
        )
    if layout.sharded and config.lora_rank:
        raise ValueError(
            f"launcher {config.launcher!r} shards the policy, and lora_rank is {config.lora_rank}; adapters were not "
            "made to work with sharding here. Train them on whole copies (distributed_type MULTI_GPU)."
        )
    return RunFolder(config, root) if process_count() == 1 else SharedRunFolder(config, root)
