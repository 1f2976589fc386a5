"""A random kill of a command that rolls back, and of a notebook; `tests/kill_runs.py` does many."""

import pytest
from kill_runs import compare, torment


@pytest.mark.slow
@pytest.mark.parametrize("target", ["autonpo", "03_autonpo"])
def test_what_is_killed_and_started_again_ends_as_what_was_not(tmp_path, capsys, target):
    assert torment([target], 1, 0, tmp_path) == []
    said = capsys.readouterr().out
    assert said.count(" kill ") == 1
    assert "weight files: 0 differences" in said and " 0 weight files" not in said


def test_a_difference_would_be_seen():
    assert compare({"a": 1, "b": b"x"}, {"a": 1, "b": b"y", "c": 2}) == ["b", "c"]
