"""The run folder: resume, logs that survive a kill, and files that are never half written."""

import json
import math

import numpy as np
import pytest

from npo_core.files import append_line
from npo_core.runs.config import resolve_config
from npo_core.runs.folder import RunFolder, moving_average, project_folder, runs_folder

CONFIG = resolve_config("grpo", "smoke", 1)


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder(CONFIG, tmp_path)


def hidden(folder) -> list[str]:
    """Files that were written under another name first and never renamed."""
    return [path.name for path in folder.rglob(".*")]


def test_a_folder_has_its_parts_and_its_configuration(run, tmp_path):
    assert run.path == tmp_path / CONFIG.run_name
    assert json.loads((run.path / "config.json").read_text()) == json.loads(CONFIG.to_json())
    assert {"rollouts", "guidance", "branches", "figures"} <= {path.name for path in run.path.iterdir()}
    about = json.loads((run.path / "env.json").read_text())
    assert {"torch", "transformers", "trl"} <= about["packages"].keys()
    assert about["device"]
    assert hidden(run.path) == []


def test_the_same_settings_open_the_same_folder_with_its_logs(run, tmp_path):
    append_line(run.metrics_path, {"compute_step": 1})
    run.event("segment", compute_step=0)
    again = RunFolder(CONFIG, tmp_path)
    assert again.path == run.path
    assert again.metrics() == [{"compute_step": 1}]
    assert [event["event"] for event in again.events()] == ["segment"]


def test_other_settings_get_another_folder(run, tmp_path):
    assert RunFolder(CONFIG.with_changes(tau_gate=0.5), tmp_path).path != run.path


def test_trackers_and_addresses_may_change_between_sittings(run, tmp_path):
    again = CONFIG.with_changes(report_to=["wandb"], vllm_port=8001)
    assert RunFolder(again, tmp_path).path == run.path
    assert json.loads((run.path / "config.json").read_text()) == json.loads(again.to_json())
    run.finish({})
    RunFolder(CONFIG, tmp_path)
    assert json.loads((run.path / "config.json").read_text())["vllm_port"] == 8001, "a finished run is only read"


def test_a_folder_with_other_settings_under_this_name_is_refused(run, tmp_path):
    (run.path / "config.json").write_text(CONFIG.with_changes(tau_gate=0.5).to_json())
    with pytest.raises(ValueError, match="other settings"):
        RunFolder(CONFIG, tmp_path)


def test_a_folder_from_before_a_setting_came_is_opened_as_runs_were_then(tmp_path):
    """Without score_threshold and mask_unsampled, whose default is another now."""
    then = CONFIG.with_changes(mask_unsampled=False)
    saved = RunFolder(then, tmp_path).path / "config.json"
    settings = json.loads(saved.read_text())
    later = {name: settings.pop(name) for name in ("score_threshold", "mask_unsampled")}
    saved.write_text(json.dumps(settings))
    assert RunFolder(then, tmp_path).path == saved.parent
    assert json.loads(saved.read_text()) == settings | later, "it goes on, and says by what"
    assert RunFolder(CONFIG, tmp_path).path != saved.parent
    assert RunFolder(then.with_changes(score_threshold=0.5), tmp_path).path != saved.parent


def test_a_folder_that_cannot_be_written_is_refused_with_a_hint(tmp_path):
    # chmod would not stop root, a file in the place of the folder does
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(OSError, match="cannot be written") as caught:
        RunFolder(CONFIG, in_the_way)
    assert "NPO_RUNS" in str(caught.value)
    assert str(in_the_way) in str(caught.value)


def test_the_place_of_all_runs(monkeypatch, tmp_path):
    monkeypatch.delenv("NPO_RUNS", raising=False)
    assert runs_folder() == project_folder() / "data" / "runs"
    monkeypatch.setenv("NPO_RUNS", str(tmp_path))
    assert RunFolder(CONFIG).path == tmp_path / CONFIG.run_name


def test_metrics_past_a_step_are_dropped_and_the_others_stay(run):
    lines = [{"compute_step": step, "npo/reward": step / 10} for step in range(1, 6)]
    for line in lines:
        append_line(run.metrics_path, line)
    run.drop_metrics_after(3)
    assert run.metrics() == lines[:3]
    append_line(run.metrics_path, lines[3])
    assert run.metrics() == lines[:4]
    run.drop_metrics_after(0)
    assert run.metrics() == []
    assert hidden(run.path) == []


def test_events_are_kept_in_order_and_found_by_kind(run):
    first = run.event("warning", compute_step=3)
    run.event("probe", compute_step=3, rollouts=8)
    run.event("warning", compute_step=9)
    assert run.events()[0] == first
    assert [event["compute_step"] for event in run.events("warning")] == [3, 9]
    assert run.events("probe")[0]["rollouts"] == 8
    assert run.events()[0]["time"] <= run.events()[-1]["time"]


def test_what_a_restart_did_again_is_not_effective(run):
    run.event("segment", compute_step=0, branch=0)
    run.event("warning", compute_step=10)
    run.event("rollback", compute_step=10)
    run.event("segment", compute_step=10, branch=1)
    run.event("warning", compute_step=14)  # lost: the kill came after it, the newest checkpoint is of step 12
    run.event("sitting", seconds=5.0)  # has no clock: the time was spent
    run.event("resume", compute_step=12)
    run.event("warning", compute_step=14)
    kept = [(event["event"], event.get("compute_step")) for event in run.effective_events()]
    assert kept == [
        ("segment", 0),
        ("warning", 10),
        ("rollback", 10),
        ("segment", 10),
        ("sitting", None),
        ("resume", 12),
        ("warning", 14),
    ]
    assert len(run.events("warning")) == 3


def test_two_restarts_from_ever_earlier_steps(run):
    for step in (2, 4, 6):
        run.event("warning", compute_step=step)
    run.event("resume", compute_step=4)
    run.event("warning", compute_step=6)
    run.event("resume", compute_step=2)
    kept = [(event["event"], event["compute_step"]) for event in run.effective_events()]
    assert kept == [("warning", 2), ("resume", 2)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_json_does_not_know_is_null_and_is_read_as_nan(run, value):
    for step in (1, 2, 3):
        run.append_metrics({"compute_step": step, "npo/entropy": value, "loss": 0.5})
    run.event("warning", entropy=value)
    run.drop_metrics_after(2)
    strict = [json.loads(line, parse_constant=pytest.fail) for line in run.metrics_path.read_text().splitlines()]
    assert strict == [{"compute_step": step, "npo/entropy": None, "loss": 0.5} for step in (1, 2)]
    assert [(line["loss"], math.isnan(line["npo/entropy"])) for line in run.metrics()] == [(0.5, True)] * 2
    assert run.events()[0]["entropy"] is None
    lines = [{**line, "policy_step": step, "branch": 0} for step, line in enumerate(run.metrics(), 1)]
    assert np.isnan(moving_average(lines, "npo/entropy")).all()


def test_a_finished_run_says_what_it_was_and_keeps_its_environment(run, tmp_path):
    assert run.result() is None
    written = run.finish({"compute_steps": 20})
    assert written == run.result()
    assert written["status"] == "finished"
    assert (written["method"], written["preset"], written["seed"]) == ("grpo", "smoke", 1)
    assert written["compute_steps"] == 20
    environment = run.path / "env.json"
    environment.write_text('{"device": "where it ran"}')
    assert RunFolder(CONFIG, tmp_path).result() == written
    assert json.loads(environment.read_text()) == {"device": "where it ran"}
    assert hidden(run.path) == []


def test_a_decision_that_was_logged_twice_counts_once(run):
    # killed between two records of one decision: the restart decides again at the same step
    run.event("warning", compute_step=10)
    run.event("probe", compute_step=10, quality=0.1)
    run.event("probe", compute_step=10, quality=0.2)
    run.event("segment", branch=1, compute_start=10)
    run.event("warning", compute_step=12)
    kept = run.effective_events()
    assert [event["event"] for event in kept] == ["warning", "probe", "segment", "warning"]
    assert kept[1]["quality"] == 0.2
