"""Results of the study: only whole, unmixed cells are read."""

import json
import re

import pandas as pd
import pytest
from evidences import SUITES, evidence

from npo_core.runs.validation import WORLD
from npo_core.study.results import ABOUT, SCORES, TRAINING, ResultsRefused, check_evidence, read_evidence


@pytest.fixture
def found():
    return evidence({"NPO": [0.01, 0.02, 0.03]})


def kept(found, folder):
    found.scores.to_csv(folder / SCORES, index=False)
    found.training.to_parquet(folder / TRAINING)
    (folder / ABOUT).write_text(json.dumps(found.about))
    return folder


def test_what_was_written_is_read(found, tmp_path):
    again = read_evidence(kept(found, tmp_path))
    pd.testing.assert_frame_equal(again.scores, found.scores)
    assert again.arms == ["GRPO", "NPO"] and again.failed == {}
    finals = again.finals()
    assert finals["NPO"].tolist() == pytest.approx([0.41, 0.52, 0.48])
    assert again.finals("plain", "pass_at_8")["GRPO"].tolist() == pytest.approx([0.60, 0.70, 0.65])


@pytest.mark.parametrize("name", [SCORES, TRAINING, ABOUT])
def test_a_missing_file_is_named(found, tmp_path, name):
    (kept(found, tmp_path) / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks {name}; .*npo_core study"):
        read_evidence(tmp_path)


def test_results_of_another_version_are_refused(found, tmp_path):
    kept(found, tmp_path)
    (tmp_path / ABOUT).write_text(json.dumps({**found.about, "schema": 0}))
    with pytest.raises(ResultsRefused, match="schema 0"):
        read_evidence(tmp_path)


@pytest.mark.parametrize(("world", "named"), [(None, "the first one, which had no name"), ("marbles", "marbles")])
def test_results_of_another_small_world_are_refused_by_its_name(found, tmp_path, world, named):
    kept(found, tmp_path)
    about = {name: value for name, value in found.about.items() if name != "world"}
    (tmp_path / ABOUT).write_text(json.dumps(about if world is None else {**about, "world": world}))
    with pytest.raises(ResultsRefused, match=rf"another small world \({named}\).*'{WORLD}' alone"):
        read_evidence(tmp_path)


def test_missing_cells_are_listed(found):
    scores = found.scores
    lost = scores[~((scores["arm"] == "NPO") & (scores["seed"] == 1))]
    lost = lost[~((lost["arm"] == "GRPO") & (lost["seed"] == 2) & lost["final"] & (lost["suite"] == SUITES[0]))]
    with pytest.raises(ResultsRefused) as refused:
        check_evidence(lost, found.about)
    text = str(refused.value)
    assert "missing: NPO, seed 1: paper/mathvista" in text and "missing: GRPO, seed 2: paper/mathvista" in text
    assert "seed 0" not in text


def test_a_failed_cell_is_not_missing():
    found = evidence({"NPO": [0.01, 0.02, 0.03]}, failed=[("NPO", 1)])
    check_evidence(found.scores, found.about)
    assert found.failed == {"NPO": [1]}
    assert found.finals()["NPO"].isna().tolist() == [False, True, False]


@pytest.mark.parametrize("final", [True, False])
def test_a_cell_that_is_there_twice_is_listed(found, final):
    again = found.scores[(found.scores["seed"] == 2) & (found.scores["final"] == final)].tail(1)
    with pytest.raises(ResultsRefused, match="twice: NPO, seed 2"):
        check_evidence(pd.concat([found.scores, again], ignore_index=True), found.about)


def test_a_cell_that_nobody_planned_is_listed(found):
    about = {**found.about, "seeds": [0, 1]}
    with pytest.raises(ResultsRefused, match="not in the plan: GRPO, seed 2"):
        check_evidence(found.scores, about)


def test_mixed_configurations_are_listed(found):
    runs = json.loads(json.dumps(found.about["runs"]))
    next(run for run in runs if (run["arm"], run["seed"]) == ("NPO", 1))["config"]["tau_gate"] = 0.3
    with pytest.raises(ResultsRefused, match=re.escape("mixed configurations of NPO: seeds [0, 2]; seeds [1]")):
        check_evidence(found.scores, {**found.about, "runs": runs})


def test_mixed_versions_are_listed(found):
    runs = json.loads(json.dumps(found.about["runs"]))
    runs[-1]["versions"]["packages"]["torch"] = "3"
    with pytest.raises(ResultsRefused, match=r"mixed versions: 5 runs such as GRPO/0 .*; 1 runs such as NPO/2"):
        check_evidence(found.scores, {**found.about, "runs": runs})


def test_revisions_of_the_code_are_counted(found):
    found.about["runs"][0]["git_revision"] = "def"
    assert found.revisions == {"def": 1, "abc": len(found.about["runs"]) - 1}


def test_a_run_that_is_listed_twice_is_refused(found):
    with pytest.raises(ResultsRefused, match="twice: run of NPO, seed 2"):
        check_evidence(found.scores, {**found.about, "runs": [*found.about["runs"], found.about["runs"][-1]]})


def test_missing_columns_are_named(found):
    with pytest.raises(ResultsRefused, match="lacks the columns entropy"):
        check_evidence(found.scores.drop(columns="entropy"), found.about)
