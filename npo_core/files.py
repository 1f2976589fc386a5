"""Files that are never half: written under another name, then renamed; and logs of JSON lines that a kill may tear."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a half."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda unfinished: unfinished.write_text(text))


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under another name and rename it: a reader sees the old file or the new one, never a half.

    Args:
        path: File.
        write: Called with the path to write to.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    write(unfinished)
    unfinished.replace(path)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line; a torn last line (a kill while writing) is cut off first."""
    line = json.dumps(record, allow_nan=False) + "\n"
    with path.open("ab+") as stream:
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
    lines = path.read_text().splitlines()
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
    """Rows of a parquet file, such as `write_table` wrote."""
    return pq.read_table(path).to_pylist()
