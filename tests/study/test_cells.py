"""The evidence study on the smallest preset: real runs, real scores, real files."""

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from npo_core.files import write_json
from npo_core.runs.folder import RunFolder
from npo_core.stages.run import compare, source_config
from npo_core.study import cells as study
from npo_core.study.arms import arm_config
from npo_core.study.cells import Cell, about_run, collect, plan_cells, run_cell, run_cells, score_rows
from npo_core.study.results import ABOUT, SCORES, ResultsRefused, read_evidence
from npo_core.study.scores import saved_places, score_points

# rollouts enough that a scout solves some prompt that the policy failed, whatever is sampled
SMALL = {
    "compute_steps": 12, "scout_steps": 4, "early_window": 4, "late_step": 6, "late_start": 4, "rollout_every": 0,
    "cache_rollouts": 32,
}  # fmt: skip
ARMS = ["NPO", "GRPO"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def cells(root):
    """All made here, as each in a process of its own would import for longer than it trains."""
    chosen = plan_cells("smoke", [0, 1], ARMS, SMALL)
    for cell in chosen:
        run_cell(cell.config, root)
    return chosen


@pytest.fixture(scope="module")
def found(cells, root, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    collect(cells, root, out)
    return read_evidence(out)


def test_cells_run_seed_by_seed_and_lenders_of_beginnings_first():
    order = [(cell.arm, cell.seed) for cell in plan_cells("cpu", [0, 1], ["NPO late", "RLEP", "NPO", "GRPO"])]
    assert order[:4] == [("GRPO", 0), ("NPO", 0), ("RLEP", 0), ("NPO late", 0)]
    assert [seed for _, seed in order] == [0] * 4 + [1] * 4


def test_what_is_named_twice_runs_once_and_nothing_at_all_is_refused():
    """Two processes on one run would wait for each other, and the bar would count it twice."""
    assert [(cell.arm, cell.seed) for cell in plan_cells("cpu", [3, 3], ["NPO", "NPO"])] == [("NPO", 3)]
    for seeds, arms, named in (([0], [], "arm"), ([], ["NPO"], "seed"), (range(0), None, "seed")):
        with pytest.raises(ValueError, match=f"No {named} is named"):
            plan_cells("cpu", seeds, arms)


def test_an_arm_that_is_grpo_itself_is_not_run_beside_it():
    """The best rate is that of preset cpu_tuned, so there the arm is GRPO; alone it can be asked for all the same."""
    names = {preset: {cell.arm for cell in plan_cells(preset, [0])} for preset in ("cpu", "cpu_tuned")}
    assert names["cpu"] - names["cpu_tuned"] == {"GRPO, best rate"} and len(names["cpu"]) == 25
    assert [cell.arm for cell in plan_cells("cpu_tuned", [0], ["GRPO, best rate"])] == ["GRPO, best rate"]


def written(config, root, length, first=1, guides=0):
    """A finished run of which only the lines matter: rows have so many tokens on average, and so many are guides."""
    run = RunFolder(config, root)
    steps = range(first, config.compute_steps + 1)
    with run.writing():
        for step in steps:
            place = {"branch": 0, "policy_step": step, "compute_step": step}
            run.append_metrics({**place, "completions/mean_length": float(length), "npo/replaced_slots": float(guides)})
        names = ("policy_steps", "compute_steps", "rollouts", "offline_rollouts", "wall_seconds")
        run.finish({**dict.fromkeys(names, 0), "interventions": []})
    return run


def test_rlep_has_trained_on_the_tokens_of_the_run_that_its_guides_come_from(tmp_path):
    config = arm_config("RLEP", "smoke", 0)
    source = written(source_config(config), tmp_path, length=10)
    spent = config.rlep_source_steps
    prompts, n, places = config.prompts_per_step, config.num_generations, config.guides_per_group
    assert places == 2 and config.placement == "append"
    assert about_run(Cell("GRPO", 0, source.config), source)["trained_tokens"] == 10 * spent * prompts * n
    # all responses have 5 tokens; one prompt has its guides, and of the others both places hold one end of sequence
    mean = 5 - 4 * places * (prompts - 1) / (prompts * (n + places))
    run = written(config, tmp_path, length=mean, first=spent + 1, guides=places)
    step = 5 * (prompts * n + places)
    expected = 10 * spent * prompts * n + (config.compute_steps - spent) * step
    assert about_run(Cell("RLEP", 0, config), run)["trained_tokens"] == expected


def test_a_note_of_a_crash_is_forgotten_once_the_run_is_finished(tmp_path, monkeypatch):
    """Another call, or the same arm of another study, may have finished it since."""
    (cell,) = plan_cells("smoke", [0], ["GRPO"], SMALL)
    run = written(cell.config, tmp_path, length=1)
    note = run.path / "failed.json"
    note.write_text(json.dumps({"reason": "exit status 137: killed"}))
    monkeypatch.setattr(study, "finished", lambda run: False)  # trained, and not scored
    assert cell.failure(tmp_path) == "exit status 137: killed"
    monkeypatch.setattr(study, "finished", lambda run: True)
    assert cell.failure(tmp_path) is None
    run_cells([cell], tmp_path, quiet=True)
    assert not note.exists()


def test_a_run_without_a_result_is_named_in_the_place_of_a_table(tmp_path):
    (cell,) = plan_cells("smoke", [0], ["GRPO"], SMALL)
    with pytest.raises(ValueError, match="GRPO has no result, as it crashed or was not run to its end"):
        compare({"GRPO": cell.folder(tmp_path)})


@pytest.mark.slow
def test_every_cell_is_scored_on_the_way_and_at_its_end_with_both_samplings(found):
    for arm in ARMS:
        for seed in (0, 1):
            rows = found.scores[(found.scores["arm"] == arm) & (found.scores["seed"] == seed)]
            ends = rows[rows["final"]]
            assert set(ends["sampling"]) == {"paper", "plain"} and set(ends["compute_step"]) == {12}
            assert len(ends) == 2 * len(found.about["suites"])
            assert rows["compute_step"].nunique() >= 4
    # GRPO is also scored where NPO ends: 12 compute steps less 4 + 2 rolled back
    grpo = found.scores[found.scores["arm"] == "GRPO"]
    assert set(found.scores[(found.scores["arm"] == "NPO") & found.scores["final"]]["policy_step"]) == {6}
    assert 6 in set(grpo["policy_step"])
    assert set(found.scores[found.scores["arm"] == "NPO"]["interventions"]) == {0, 1, 2}


@pytest.mark.slow
def test_a_reference_is_scored_on_both_sides_of_the_rollouts_of_another_arm(cells, root, monkeypatch):
    (cell,) = (one for one in cells if (one.arm, one.seed) == ("GRPO", 0))
    run, asked = cell.folder(root), []
    scored = study.score
    monkeypatch.setattr(study, "score", lambda run, *point: asked.append(point) or scored(run, *point))
    spent = [place["rollouts"] for place in saved_places(run)]
    between = (spent[1] + spent[2]) // 2
    for arm, more in (("GRPO", 0), ("GRPO, longer", 1)):
        asked.clear()
        list(score_rows(Cell(arm, 0, cell.config), run, {("rollouts", between)}))
        steps = {step for _, step, _ in asked} - {step for _, step, _ in score_points(run)}
        here = {place["policy_step"] for place in saved_places(run)[1 : 2 + more]}
        assert steps == here - {step for _, step, _ in score_points(run)}
        assert here <= {step for _, step, _ in asked}


@pytest.mark.slow
def test_a_score_is_that_of_the_checkpoint(cells, root, found):
    run = cells[0].folder(root)
    branch, step, sampling = score_points(run)[-2]
    assert sampling == "paper" and run.result()["final"]["suites"] == pytest.approx(
        json.loads((run.path / "scores" / f"b{branch:02d}-{step:06d}-paper.json").read_text())["suites"]
    )


@pytest.mark.slow
def test_the_training_table_has_a_row_per_executed_step(found):
    counts = found.training.groupby(["arm", "seed"]).size()
    assert set(counts) == {12}
    npo = found.training[(found.training["arm"] == "NPO") & (found.training["seed"] == 0)]
    assert npo["compute_step"].tolist() == list(range(1, 13)) and npo["branch"].max() == 2


@pytest.mark.slow
def test_finished_cells_are_not_run_again(cells, root, monkeypatch):
    monkeypatch.setattr(study, "_begin", lambda *_: pytest.fail("a finished cell was started"))
    run_cells(cells, root, quiet=True)


@pytest.mark.slow
def test_results_are_refused_while_a_cell_is_missing(cells, root, tmp_path):
    with pytest.raises(ResultsRefused, match=r"missing: GRPO, seed 2: paper/mmmu_pro"):
        collect([*cells, *plan_cells("smoke", [2], ["GRPO"], SMALL)], root, tmp_path)
    assert not list(tmp_path.glob("*.csv"))


def test_results_name_no_folder_of_the_machine(cells, root, tmp_path):
    lost = plan_cells("smoke", [7], ["GRPO", "NPO"], SMALL)
    for cell in lost:
        folder = cell.folder(root).path
        write_json(folder / "failed.json", {"reason": f"exit status 2: {folder}/x solved nothing.", "log": ""})
    collect([*cells, *lost], root, tmp_path)
    about = (tmp_path / ABOUT).read_text(encoding="utf-8")
    assert str(root) not in about
    reasons = [entry["reason"] for entry in json.loads(about)["failed"]]
    assert reasons == [f"exit status 2: {cell.config.run_name}/x solved nothing." for cell in lost]


@pytest.mark.slow
def test_a_crashed_cell_is_reported_and_nothing_else_is_lost(cells, root, tmp_path, capsys):
    broken = Cell("GRPO", 2, arm_config("GRPO", "smoke", 2, {**SMALL, "policy": str(tmp_path / "nowhere")}))
    npo = plan_cells("smoke", [2], ["NPO"], SMALL)
    run_cells([broken, *npo], root, processes=2)
    reason = broken.failure(root)
    assert reason.startswith("exit status") and "nowhere" in reason
    assert f"GRPO, seed 2, failed: {reason}" in capsys.readouterr().out
    collect([*cells, broken, *npo], root, tmp_path)
    again = read_evidence(tmp_path)
    assert again.failed == {"GRPO": [2]}
    assert pd.read_csv(tmp_path / SCORES).groupby("arm")["seed"].nunique().to_dict() == {"GRPO": 2, "NPO": 3}
    assert "nowhere" in json.loads((tmp_path / ABOUT).read_text())["failed"][0]["reason"]


@pytest.mark.slow
def test_a_metric_that_is_not_a_number_makes_the_cell_a_failure(cells, root, monkeypatch):
    lines = cells[0].folder(root).metrics()
    lines[3] = {**lines[3], "npo/entropy": float("nan")}
    monkeypatch.setattr(type(cells[0].folder(root)), "metrics", lambda self: lines)
    assert cells[0].failure(root) == "npo/entropy is nan at compute step 4"


@pytest.mark.slow
def test_a_killed_study_goes_on_where_it_stopped(root, cells, tmp_path):
    """The whole tree of processes is killed in the middle; the second call ends with the bytes of an unbroken run."""
    command = [sys.executable, "-m", "npo_core", "study", "--preset", "smoke", "--seeds", "0", "--arms", "GRPO"]
    command += [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
    command += ["--root", str(tmp_path), "--quiet"]
    process = subprocess.Popen(command, start_new_session=True)
    (cell,) = plan_cells("smoke", [0], ["GRPO"], SMALL)
    log = cell.folder(tmp_path).metrics_path
    while not (log.exists() and log.read_bytes().count(b"\n") >= 4) and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert cell.folder(tmp_path).result() is None, "the run was over before it was killed"
    run_cell(cell.config, tmp_path)  # as a process of the second call does
    unbroken = next(other for other in cells if (other.arm, other.seed) == ("GRPO", 0)).folder(root)
    weights = "branches/00/checkpoint-12/model.safetensors"
    assert (cell.folder(tmp_path).path / weights).read_bytes() == (unbroken.path / weights).read_bytes()


@pytest.mark.slow
def test_two_studies_at_once_on_one_folder_share_the_work(root, cells, tmp_path):
    """Overlapping arms, the same runs and results: each run is made once, and the results are those of one study."""
    command = [sys.executable, "-m", "npo_core", "study", "--preset", "smoke", "--seeds", "0", "--processes", "1"]
    command += [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
    command += ["--root", str(tmp_path / "runs"), "--out", str(tmp_path / "results"), "--quiet"]
    studies = [subprocess.Popen([*command, "--arms", *arms]) for arms in (ARMS, ARMS[::-1])]
    try:
        assert [study.wait(timeout=3600) for study in studies] == [0, 0]
    finally:
        for study in studies:
            study.terminate()
    for cell in plan_cells("smoke", [0], ARMS, SMALL):
        run = cell.folder(tmp_path / "runs")
        alone = cell.folder(root)
        assert [line["compute_step"] for line in run.metrics()] == list(range(1, 13))
        decided = ("planned", "cache", "rollback")  # a beginning may be shared or not, by what is finished by then
        kinds = [[e["event"] for e in each.events() if e["event"] in decided] for each in (run, alone)]
        assert kinds[0] == kinds[1] and (cell.arm == "GRPO" or "rollback" in kinds[0])
        last = sorted(path.relative_to(alone.path) for path in alone.path.glob("branches/*/*/model.safetensors"))[-1]
        assert (run.path / last).read_bytes() == (alone.path / last).read_bytes()
        assert not (run.path / "lock.json").exists() and not (run.path / "failed.json").exists()
    assert set(read_evidence(tmp_path / "results").arms) == set(ARMS)
    assert sorted(path.name for path in (tmp_path / "results").iterdir() if path.name == "lock.json") == []
