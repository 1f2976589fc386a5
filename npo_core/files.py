"""Files that are never half: written under another name, then renamed; and logs of JSON lines that a kill may tear."""

import errno
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

UNFINISHED = re.compile(r"\..+\.(\d+)-[0-9a-f]{8}")
"""Names that files and folders have until they are whole, with the number of the process that writes them."""


def unfinished_name(path: Path) -> Path:
    """Another name for what is being written, beside its own; no other process or thread has the same."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a half."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, as `write_whole` does."""
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under another name and rename it: a reader sees the old file or the new one, never a half.

    Args:
        path: File.
        write: Called with the path to write to.
    """
    unfinished = unfinished_name(path)
    try:
        with said_where(path):
            write(unfinished)
            unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)  # a part of a file would only fill the disk
        raise


@contextmanager
def whole_folder(folder: Path, replace: bool = True) -> Iterator[Path]:
    """A folder under another name to write into, which is renamed when all is written, and goes if it is not.

    Args:
        folder: Where it ends.
        replace: Take the place of what is there; otherwise that is an OSError.
    """
    unfinished = unfinished_name(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield unfinished
        if replace:
            shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def said_where(path: Path) -> Iterator[None]:
    """A full disk with the file's name and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        hint = f"{os.strerror(error.errno)}; make room and start again, what is on disk is kept"
        raise OSError(error.errno, hint, str(path)) from error


def as_json(value: Any) -> Any:
    """A value as strict JSON has it: null for NaN and infinity, numbers and lists for numpy's, text for keys.

    What JSON does not know is left as it is, and refused when it is written.
    """
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(key): as_json(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(content) for content in value]
    if isinstance(value, np.ndarray | np.bool_):
        return as_json(value.tolist())
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return value


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line (`as_json`); a torn last line (a kill while writing) is cut off first.

    Raises:
        TypeError: The record holds what JSON does not know; the log stays as it was.
    """
    line = json.dumps(as_json(record), allow_nan=False) + "\n"
    with said_where(path), path.open("ab+") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                _mend_tail(path)
        stream.write(line.encode())


def _mend_tail(path: Path) -> None:
    """Finish the last line of a log if it is whole, cut it off if it is torn; as `read_lines` sees it."""
    whole = path.read_bytes()
    start = whole.rfind(b"\n") + 1
    try:
        json.loads(whole[start:])
    except json.JSONDecodeError:
        os.truncate(path, start)
    else:
        with path.open("ab") as stream:
            stream.write(b"\n")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """JSON lines of a file; none if it does not exist; a torn last line (a kill while writing) is left out."""
    if not path.exists():
        return
    # of the line ends that Python knows, some may stand inside a text that others wrote
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    for index, line in enumerate(lines):
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            if index != len(lines) - 1:
                raise ValueError(f"{path}, line {index + 1} is not JSON: {line[:80]!r}.") from None


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, as of rollouts, to a parquet file; a column for each of their names."""
    table = pa.Table.from_pylist([dict(row) for row in rows])
    write_whole(path, lambda unfinished: pq.write_table(table, unfinished))


def read_table(path: Path) -> list[dict[str, Any]]:
    """Rows of a parquet file, such as `write_table` wrote.

    Raises:
        ValueError: It is no parquet file, or a part of one.
    """
    try:
        return pq.read_table(path).to_pylist()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is damaged ({error}). Delete it and start again: it is made anew.") from error
