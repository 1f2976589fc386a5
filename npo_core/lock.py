"""The lock of what one process at a time may write: a run folder, a measurement, a policy that is being made."""

import json
import os
import platform
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil

from .files import UNFINISHED, said_where, write_json

BEAT = 10.0
"""Seconds between two signs of life of a lock's holder."""

SILENCE = 120.0
"""Seconds without such a sign after which a holder on another system is taken for dead."""

LOOK = 1.0
"""Seconds between two looks at a lock that another process holds."""

SETTLE = 0.25
"""Seconds after which a lock that was taken over from a dead process is looked at again."""

_HELD: set[str] = set()
"""Tokens of the locks that this process holds; one that names it otherwise was left when taking it was interrupted."""


class Locked(OSError):
    """Another process writes the folder, and this one must not."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        host: Name of its machine, for people.
        system: What process numbers count in: machine, boot, and process namespace (a container has its own).
        process: Number of the process.
        started: When the process began, in a form that only equality means something in: numbers are used again.
        command: What it was started as, for people.
        since: When it took the lock, for people.
        token: Tells this taking of the lock from any other.
    """

    host: str = ""
    system: str = ""
    process: int = 0
    started: str = ""
    command: str = ""
    since: str = ""
    token: str = ""

    @classmethod
    def this_process(cls) -> "Holder":
        """This process, with a token of its own."""
        return cls(
            host=platform.node(),
            system=_system(),
            process=os.getpid(),
            started=_started(os.getpid()) or "",
            command=" ".join(sys.orig_argv)[:200],
            since=datetime.now().astimezone().isoformat(timespec="seconds"),
            token=secrets.token_hex(8),
        )

    @property
    def here(self) -> bool:
        """Whether its process number means something in this process."""
        return self.system == _system()

    @property
    def alive(self) -> bool:
        """Whether the process still runs, and has not forgotten the lock; only of a holder that is `here`."""
        return _started(self.process) == self.started and (self.process != os.getpid() or self.token in _HELD)

    def __str__(self) -> str:
        if not self.process:
            return "a process that has not said who it is"
        return f"process {self.process} on {self.host}, since {self.since} ({self.command})"


def _system() -> str:
    """Machine, boot and process namespace of this process."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [platform.node()]
    parts += [boot.read_text(encoding="utf-8").strip()] if boot.is_file() else []
    parts += [str(namespace.readlink())] if namespace.is_symlink() else []
    return " ".join(parts)


def _started(process: int) -> str | None:
    """When a process began, or None if it has ended; a dead one that its parent has not asked for counts as ended."""
    if Path("/proc/self/stat").is_file():  # in ticks since boot: a clock that is set does not change it
        try:
            fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in ("Z", "X") else fields[19]
    try:
        found = psutil.Process(process)
        return None if found.status() == psutil.STATUS_ZOMBIE else str(found.create_time())
    except psutil.NoSuchProcess:
        return None


class Lock:
    """One writer at a time, over processes and machines that share a disk.

    A file names the holder, who touches it while it lives. Of a holder on this system it is known whether its process
    lives; of one on another system (machine, or container) only whether the file is still touched, on the clock of
    the one who looks: nobody's date is compared. A dead holder's lock is taken over.

    Args:
        path: The file.
        what: What is locked, in words for messages.
    """

    def __init__(self, path: Path, what: str):
        self.path, self.what = path, what
        self._mine: Holder | None = None
        self._released = threading.Event()

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._mine is not None

    @property
    def taken(self) -> bool:
        """Whether somebody else holds the lock; on another system, dead or alive."""
        holder = self.holder()
        return holder is not None and holder != self._mine and (not holder.here or holder.alive)

    def holder(self) -> Holder | None:
        """Who holds the lock, dead or alive; None if nobody does."""
        return self._read()[0]

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Hold the lock; see `acquire`."""
        self.acquire()
        try:
            yield
        finally:
            self.release()

    def acquire(self, look: Callable[[], None] = lambda: None) -> None:
        """Take the lock; wait for its holder if there is one, and say for whom.

        Args:
            look: Called about once a second while another process holds it.

        Raises:
            Locked: The holder lives on another system, or is this very process.
            OSError: The file cannot be written.
        """
        mine = Holder.this_process()
        _HELD.add(mine.token)
        try:
            self._wait(mine, look)
        except BaseException:
            self._drop(mine)
            raise
        self._mine, self._released = mine, threading.Event()
        threading.Thread(target=self._beat, args=(mine, self._released), daemon=True).start()

    def _wait(self, mine: Holder, look: Callable[[], None]) -> None:
        seen, silent_since = (None, 0), time.monotonic()
        while not self._create(mine):
            holder, touched = self._read()
            if holder is None:
                continue
            if holder.token in _HELD:
                raise Locked(f"{self.what} is being written by this very process already; wait for that to end.")
            if (holder, touched) != seen:
                # one that has not said who it is yet may be another each time
                if holder == seen[0] and holder.process and not holder.here:
                    raise Locked(
                        f"{self.what} is being written by {holder}. Wait for it, or stop it there and start again; "
                        f"should it be dead, its lock is taken over after {SILENCE:g} seconds without a sign of life."
                    )
                if holder != seen[0] and (not holder.here or holder.alive):
                    print(f"{self.what} is being written by {holder}; waiting for it.", flush=True)
                seen, silent_since = (holder, touched), time.monotonic()
            dead = not holder.alive if holder.here else time.monotonic() - silent_since > SILENCE
            if dead and self._take_over(holder, mine):
                break
            look()
            time.sleep(LOOK)

    def require(self) -> None:
        """Refuse to write: unless this object holds the lock, or nobody alive does.

        Raises:
            Locked: Another process holds the lock.
        """
        holder = self.holder()
        if self._mine is not None and holder != self._mine:
            raise Locked(
                f"{self.what} was taken from this process by {holder or 'somebody who removed its lock'}; it stops "
                "here, what it wrote is kept."
            )
        if self._mine is None and holder is not None and self.taken:
            raise Locked(f"{self.what} is being written by {holder}; one process at a time may.")

    def release(self) -> None:
        """Give the lock back."""
        self._released.set()
        if self._mine is not None:
            self._drop(self._mine)
        self._mine = None

    def _drop(self, mine: Holder) -> None:
        if self.holder() == mine:
            self.path.unlink()
        _HELD.discard(mine.token)

    def _read(self) -> tuple[Holder | None, int]:
        """The holder, and when it last gave a sign of life, in the file system's own time."""
        try:
            with self.path.open() as stream:  # opened, so that a network file system asks its server
                text, touched = stream.read(), os.fstat(stream.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None, 0
        try:
            return Holder(**json.loads(text)), touched
        except (json.JSONDecodeError, TypeError):
            return Holder(), touched  # being written just now, or by a process that was killed while it wrote

    def _create(self, mine: Holder) -> bool:
        try:
            with said_where(self.path), self.path.open("x") as stream:
                try:
                    stream.write(json.dumps(asdict(mine)))
                    stream.flush()
                except OSError:
                    self.path.unlink()
                    raise
        except FileExistsError:
            return False
        return True

    def _take_over(self, dead: Holder, mine: Holder) -> bool:
        """Put this process in a dead one's place; whether it is there still a moment later, when others do the same."""
        if self.holder() != dead:
            return False
        write_json(self.path, asdict(mine))
        time.sleep(SETTLE)
        return self.holder() == mine

    def _beat(self, mine: Holder, released: threading.Event) -> None:
        while not released.wait(BEAT):
            try:
                if self.holder() != mine:
                    return  # the next write says so
                os.utime(self.path)
            except OSError:
                continue  # released just now, or a share that is away for a moment


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed had begun to write; only where no other machine writes."""
    for path in list(folder.rglob(".*")):
        named = UNFINISHED.fullmatch(path.name)
        if named and _started(int(named[1])) is None:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
