"""The runs that the explorer's tests look at."""

from pathlib import Path

import pytest
from made_runs import make_run, make_trl_run


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "autonpo-cpu-s0-0123456789")


@pytest.fixture(scope="session")
def trl_run(tmp_path_factory) -> Path:
    return make_trl_run(tmp_path_factory.mktemp("trl") / "my-grpo")
