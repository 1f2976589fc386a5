"""The clock of all rollouts: steps and what was sampled off line between them."""

import json

import pytest
from made_runs import make_run

from npo_core.figures import rollout_curves
from npo_core.files import write_json


@pytest.fixture
def run(tmp_path):
    """Six steps of 2 × 4 rollouts; after the fourth a probe of 16 rollouts and a cache of 16."""
    folder = make_run(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "prompts_per_step": 2})
    return folder


def test_offline_rollouts_stand_between_the_step_that_asked_for_them_and_the_next(run):
    (axes,) = rollout_curves({"AutoNPO": run}).axes
    single, average = axes.lines
    assert single.get_xdata().tolist() == average.get_xdata().tolist() == [8, 16, 24, 32, 40 + 32, 48 + 32]
    assert single.get_ydata()[0] == average.get_ydata()[0] == 0.25
    assert "off line" in axes.get_xlabel() and "fraction" in axes.get_ylabel()


def test_each_run_has_a_curve_and_no_run_is_refused(run):
    figure = rollout_curves({"one": run, "two": run})
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][:2] == ["one", "two"]
    with pytest.raises(ValueError, match="at least one run"):
        rollout_curves({})
