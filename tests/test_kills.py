"""A few random kills of a command that rolls back, and of a notebook; `tests/kill_runs.py` does many."""

import pytest
from kill_runs import compare, torment


@pytest.mark.slow
@pytest.mark.parametrize(("target", "kills"), [("autonpo", 2), ("03_autonpo", 1)])
def test_what_is_killed_and_started_again_ends_as_what_was_not(tmp_path, capsys, target, kills):
    assert torment([target], kills, 0, tmp_path) == []
    said = capsys.readouterr().out
    assert said.count(" kill ") == kills
    assert "weight files: 0 differences" in said and " 0 weight files" not in said


def test_a_difference_would_be_seen():
    assert compare({"a": 1, "b": b"x"}, {"a": 1, "b": b"y", "c": 2}) == ["b", "c"]
