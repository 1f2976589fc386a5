"""A random kill of a command that rolls back, and of a notebook; `tests/kill_runs.py` does many."""

import random
import re
from contextlib import redirect_stdout
from io import StringIO

import pytest
from kill_runs import SMALL, compare, disturbed, outcome, torment

from npo_core.runs.config import resolve_config
from npo_core.stages import run as stages


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command undisturbed and killed: what differed, what was said of it, and the folder of the undisturbed run."""
    folder = tmp_path_factory.mktemp("kills")
    with redirect_stdout(StringIO()) as said:
        different = torment(["autonpo"], 1, 0, folder)
    return different, said.getvalue(), folder / "autonpo"


@pytest.mark.slow
def test_a_command_that_is_killed_and_started_again_ends_as_what_was_not(command):
    different, said, _ = command
    assert different == []
    assert said.count(" kill ") == 1
    assert "weight files: 0 differences" in said and " 0 weight files" not in said


@pytest.mark.slow
def test_a_notebook_that_is_killed_and_started_again_ends_as_the_command_does(command, tmp_path):
    """It makes the command's run and GRPO's beside it, which is made here undisturbed."""
    _, said, folder = command
    stages.run(resolve_config("grpo", "smoke", 0, SMALL), folder, quiet=True)
    seconds = 1.6 * float(re.search(r"undisturbed, (\d+) CPU seconds", said)[1])  # of the more that it does
    assert disturbed("03_autonpo", tmp_path, seconds, 1, random.Random(0)) == 1
    unkilled = outcome(folder)
    assert {name.split("-")[0] for name in unkilled if name.endswith(".safetensors")} == {"autonpo", "grpo"}
    assert compare(unkilled, outcome(tmp_path)) == []


def test_a_difference_would_be_seen():
    assert compare({"a": 1, "b": b"x"}, {"a": 1, "b": b"y", "c": 2}) == ["b", "c"]
