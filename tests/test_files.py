"""Files that are written whole or not at all, and logs that a kill may tear."""

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npo_core.files import append_line, as_json, read_lines, read_table, write_json, write_table


@given(cut=st.integers(1, 40))
def test_a_kill_at_any_byte_loses_the_last_line_at_most(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    lines = [{"step": step, "text": "née"} for step in range(3)]
    for line in lines:
        append_line(path, line)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    kept = list(read_lines(path))
    assert kept == lines[: len(kept)]
    assert len(kept) == whole[:-cut].count(b"\n") + (whole[:-cut].endswith(b"}"))
    append_line(path, {"step": "resume"})
    append_line(path, {"step": "on"})
    assert list(read_lines(path)) == [*kept, {"step": "resume"}, {"step": "on"}]


def test_a_damaged_line_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2 is not JSON"):
        list(read_lines(path))


def test_strict_json_of_whatever_is_logged(tmp_path):
    inf = float("inf")
    given = {
        1: np.float32(0.5), ("a", 2): np.int64(3), "b": np.bool_(True), "c": [inf, -inf, float("nan"), (1, np.inf)],
        "d": np.array([[1.0, np.nan]]), "e": {2.5: np.float16("inf")}, "f": True, "g": None, "h": "inf", "i": 10**30,
    }  # fmt: skip
    append_line(tmp_path / "log.jsonl", given)
    [line] = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "1": 0.5, "('a', 2)": 3, "b": True, "c": [None, None, None, [1, None]], "d": [[1.0, None]],
        "e": {"2.5": None}, "f": True, "g": None, "h": "inf", "i": 10**30,
    }  # fmt: skip
    assert as_json(True) is True and type(as_json(np.int8(1))) is int


def test_what_json_does_not_know_is_refused_and_the_log_stays_as_it_was(tmp_path):
    append_line(tmp_path / "log.jsonl", {"a": 1})
    with pytest.raises(TypeError, match="JSON"):
        append_line(tmp_path / "log.jsonl", {"a": object()})
    assert list(read_lines(tmp_path / "log.jsonl")) == [{"a": 1}]


def test_a_text_may_hold_what_python_takes_for_the_end_of_a_line(tmp_path):
    """Other programs do not escape them; nor do they all end the last line."""
    rows = [{"text": "a\u2028b\u2029c\x85d\x1ce"}, {"text": "Δ"}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for end in ("", "\n", "\r\n"):
        (tmp_path / "log.jsonl").write_bytes((text + end).encode())
        assert list(read_lines(tmp_path / "log.jsonl")) == rows


def test_no_file_has_no_lines(tmp_path):
    assert list(read_lines(tmp_path / "none.jsonl")) == []


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]

    # killed between the writing and the renaming: a reader still sees the old file
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(path), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_the_marker_of_a_writer_names_its_process(tmp_path, monkeypatch):
    # two processes that write the same file must not share the unfinished one
    names = []
    monkeypatch.setattr(type(tmp_path), "replace", lambda self, target: names.append(self.name))
    write_json(tmp_path / "x.json", 1)
    monkeypatch.setattr(os, "getpid", lambda: 12345)
    write_json(tmp_path / "x.json", 1)
    assert len(set(names)) == 2


def test_a_rollout_table_gives_back_its_rows(tmp_path):
    rows = [
        {"uid": "a", "slot": 0, "guide_step": None, "token_ids": [1, 2], "ratio": [1.0, 0.5], "picture": b"png"},
        {"uid": "a", "slot": 1, "guide_step": 40, "token_ids": [3], "ratio": [2.0], "picture": None},
    ]
    write_table(tmp_path / "r.parquet", rows)
    assert read_table(tmp_path / "r.parquet") == rows
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.parquet"]
