"""The study of the real model: its plan, equal rollouts, and what a small run of every arm leaves, on a tiny policy."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from foreign import byte_llama

from npo_core.__main__ import main
from npo_core.method.curve import SUMS
from npo_core.runs.checkpoints import complete_checkpoints
from npo_core.runs.measurement import plan_pairs
from npo_core.stages.signal import MeasuredSignal
from npo_core.study import real, real_claims
from npo_core.study.cells import Cell
from npo_core.study.results import ResultsRefused
from npo_core.study.scores import finished
from npo_core.world import finetune, letters
from npo_core.world.policies import load_policy, load_processor

TINY = {
    "data": "letters:2-3",
    "warmstart_pass_rate": 0.0,
    "mixed_precision": "no",
    "train_problems": 60,
    "eval_problems": 16,
    "eval_rollouts": 2,
    "compute_steps": 6,
    "max_completion_length": 6,
    "late_step": 0,
    "late_start": 0,
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return str(byte_llama(tmp_path_factory.mktemp("policy")))


def test_the_plan_is_arms_times_seeds_of_at_least_sixty_steps():
    cells = real.plan_real("real", [0, 1, 2])
    assert [(cell.arm, cell.seed) for cell in cells] == [(arm, seed) for seed in range(3) for arm in real.ORDER]
    assert sorted(real.ORDER) == sorted(real.REAL_ARMS)
    assert len({cell.config.run_name for cell in cells}) == 15
    steps = {cell.arm: cell.config.compute_steps for cell in cells}
    assert steps.pop("GRPO, groups of 16") == 40 and set(steps.values()) == {60}


def test_larger_groups_spend_the_rollouts_of_npo_early():
    configs = {cell.arm: cell.config for cell in real.plan_real("real", [0])}
    early, large = configs["NPO early"], configs["GRPO, groups of 16"]
    offline = early.early_window * early.prompts_per_step * early.cache_rollouts
    spent = early.compute_steps * early.rollouts_per_step + offline
    assert large.compute_steps * large.rollouts_per_step == spent == 5120


def test_an_unknown_arm_is_refused():
    with pytest.raises(ValueError, match=r"Unknown arm 'LUFFY'\. Allowed: GRPO, "):
        real.plan_real("real", [0], ["LUFFY"])


@pytest.fixture(scope="module")
def study(policy, tmp_path_factory):
    """GRPO and NPO early of six steps on a policy of one layer."""
    root = tmp_path_factory.mktemp("runs")
    cells = real.plan_real("real-smoke", [0], ["GRPO", "NPO early"], {**TINY, "policy": policy})
    assert all(isinstance(cell, Cell) for cell in cells)
    files = real.run_real(cells, root, root / "out", processes=2, quiet=True)
    return cells, root, files


def test_scores_stand_on_three_clocks(study):
    cells, root, files = study
    assert [path.name for path in files] == [real.SCORES, real.EXACT, real.ABOUT]
    table = pd.read_csv(files[0])
    assert set(table["arm"]) == {"GRPO", "NPO early"} and set(table["suite"]) == {"02 letters", "03 letters"}
    ends = table[table["final"]].groupby("arm")[["policy_step", "compute_step", "rollouts"]].first()
    grpo, early = (cell.config for cell in cells)
    assert ends.loc["GRPO"].tolist() == [6, 6, 6 * grpo.rollouts_per_step]
    offline = early.early_window * early.prompts_per_step * early.cache_rollouts
    # this policy finds no guide, so nothing is rolled back; what was sampled for guides is paid all the same
    assert ends.loc["NPO early"].tolist() == [6, 6, 6 * early.rollouts_per_step + offline]
    about = json.loads(files[-1].read_text())
    assert [run["arm"] for run in about["runs"]] == ["GRPO", "NPO early"]
    assert "| GRPO | 1 | 0.000 (0.000) | 6 | 6 | 192 |" in real_claims.write(root / "out")


def test_the_right_response_is_as_probable_at_every_checkpoint_as_its_weights_say(study, policy):
    _, _, files = study
    table = pd.read_csv(files[1])
    steps = table.groupby("arm")["compute_step"].unique()
    assert list(steps["GRPO"]) == [0, 2, 4, 6] and list(steps["NPO early"]) == [2, 4, 6]
    first = table[table["compute_step"] == 0].set_index("word")["probability"]
    assert len(first) == 64 and first.index.is_unique
    words = letters.sample_words("test", 64, real.EXACT_SEED, (2, 3))
    model, processor = load_policy(policy), load_processor(policy)
    chances = finetune.right_probabilities(model, processor, letters.make_dataset(words))
    assert first[[word.uid for word in words]].tolist() == pytest.approx(chances, abs=1e-5)


def test_autonpo_lends_its_steps_before_its_weights_go(study, policy, tmp_path):
    grpo = study[0][0].folder(study[1])
    cells = real.plan_real("real-smoke", [0], ["AutoNPO", "GRPO"], {**TINY, "policy": policy})
    real.run_real(cells, tmp_path, tmp_path / "out", processes=1, quiet=True)
    auto, taker = (cell.folder(tmp_path) for cell in cells)
    assert not list(auto.path.glob("branches/*/checkpoint-*"))
    assert [event["compute_step"] for event in taker.events("prefix")] == [6]
    lines = [[{**line, "step_time": 0} for line in run.metrics()] for run in (grpo, taker)]
    assert lines[0] == lines[1] and len(lines[0]) == 6
    settled = [json.loads((run.path / real.SETTLED).read_text()) for run in (grpo, taker)]
    assert settled[0]["rows"] == settled[1]["rows"] and settled[0]["exact"] == settled[1]["exact"]


def test_the_pass_rate_at_temperature_one_stands_at_every_point(study):
    _, _, files = study
    table = pd.read_csv(files[0])
    for arm in ("GRPO", "NPO early"):
        steps = table[(table["arm"] == arm) & (table["sampling"] == "plain")]["compute_step"].unique()
        assert list(steps) == [2, 4, 6]


def test_a_grpo_that_was_settled_without_those_on_the_way_is_scored_again(study):
    """Its weights are kept, so nothing of it is trained again."""
    cells, root, _ = study
    path, lines = real._settled(cells[0], root), cells[0].folder(root).metrics_path.read_text()
    settled = json.loads(path.read_text())
    old = [row for row in settled["rows"] if row["final"] or row["sampling"] == "paper"]
    path.write_text(json.dumps({**settled, "rows": old}))
    for score in (cells[0].folder(root).path / "scores").glob("*-plain.json"):
        if "000006" not in score.name:
            score.unlink()
    real.run_real(cells, root, root / "out", processes=1, quiet=True)
    again = json.loads(path.read_text())
    assert again["rows"] == settled["rows"] and cells[0].folder(root).metrics_path.read_text() == lines


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"learning_rate": 3e-6}, r"mixed learning rates: 3e-06: AutoNPO/0; 1e-05: GRPO/0, NPO early/0"),
        ({"arm": "GRPO", "seed": 4, "temperature": 0.9}, r"mixed configurations of GRPO: seeds \[4\]; seeds \[0\]"),
        ({"versions": {"python": "4"}}, "mixed versions: "),
    ],
)
def test_runs_that_were_made_otherwise_are_not_written_beside_them(study, tmp_path, changed, complaint):
    cells, root, files = study
    for file in files:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    about = json.loads(files[-1].read_text())
    run = json.loads(json.dumps(about["runs"][0])) | {"arm": "AutoNPO"}
    for name, value in changed.items():
        (run if name in run else run["config"])[name] = value
    (tmp_path / real.ABOUT).write_text(json.dumps({**about, "runs": [*about["runs"], run]}))
    before = (tmp_path / real.SCORES).read_text()
    with pytest.raises(ResultsRefused, match=complaint):
        real.collect_real(cells, root, tmp_path)
    assert (tmp_path / real.SCORES).read_text() == before


def test_runs_that_will_be_made_otherwise_are_refused_before_they_are(study, policy, tmp_path):
    _, root, files = study
    other = real.plan_real("real-smoke", [0], ["AutoNPO"], {**TINY, "policy": policy, "learning_rate": 3e-6})
    before = files[-1].read_bytes()
    with pytest.raises(ResultsRefused, match="mixed learning rates: 1e-05: GRPO/0, NPO early/0; 3e-06: AutoNPO/0"):
        real.run_real(other, tmp_path / "runs", root / "out", quiet=True)
    assert not (tmp_path / "runs").exists() and files[-1].read_bytes() == before


def test_the_gate_is_that_of_the_plan(tmp_path, monkeypatch):
    """Distances 10 to 40 alone, one-sided: 7 prompts against none is p = 1/128, four times that is below 0.05."""
    asked = []

    def measure(config, origins, settings, *, distances, also, **rest):
        asked.extend(plan_pairs(range(0, 61, 10), origins, distances, also=also))
        (tmp_path / "pairs").mkdir()
        for pair in asked:
            columns = pd.DataFrame(1.0, index=range(20), columns=list(SUMS))
            columns["shown"] = (np.arange(20) < 7 * (pair.distance == 30) * (pair.origin == 20)).astype(float)
            columns.to_parquet(tmp_path / "pairs" / pair.file)
        return MeasuredSignal(tmp_path, asked, {"origins": {}})

    monkeypatch.setattr(real, "measure_run", measure)
    found = json.loads(
        real.measure_real_premise(real.premise_cell(real.plan_real("real", [0])), out=tmp_path).read_text()
    )["gate"]
    assert {d: [one["distance"] for one in rows] for d, rows in found["origins"].items()} == {
        "0": [10, 20, 30, 40],
        "20": [10, 20, 30, 40],
    }
    assert [one["p_holm"] for one in found["origins"]["20"]] == pytest.approx([1, 1, 4 / 128, 1])
    assert found["passed"] and {one["p_holm"] for one in found["origins"]["0"]} == {1.0}


def test_weights_go_but_those_that_the_premise_needs(study):
    cells, root, _ = study
    grpo, early = (cell.folder(root).path / "branches" for cell in cells)
    assert list(complete_checkpoints(grpo / "00", resumable=False)) == [2, 4, 6]
    assert not complete_checkpoints(grpo / "00") and not list(early.glob("*/checkpoint-*"))


def test_a_second_call_runs_nothing_again_and_keeps_other_seeds(study, monkeypatch):
    cells, root, files = study
    table = pd.read_csv(files[0])
    other = table.assign(seed=7)
    pd.concat([table, other]).to_csv(files[0], index=False)
    about = json.loads(files[-1].read_text())
    more = [{**run, "seed": 7} for run in about["runs"]]
    files[-1].write_text(json.dumps({**about, "runs": [*about["runs"], *more]}))
    monkeypatch.setattr(real, "run_cells", lambda *_: pytest.fail("a settled run is run again"))
    real.run_real(cells, root, root / "out", quiet=True)
    assert sorted(set(pd.read_csv(files[0])["seed"])) == [0, 7] and len(pd.read_csv(files[0])) == 2 * len(table)
    assert [run["seed"] for run in json.loads(files[-1].read_text())["runs"]] == [0, 0, 7, 7]


def test_what_is_cut_off_has_left_the_results_of_the_waves_before(study, policy, tmp_path, monkeypatch):
    settled = json.loads(real._settled(study[0][0], study[1]).read_text())
    cells = real.plan_real("real-smoke", [5, 6], ["GRPO"], {**TINY, "policy": policy})
    waves = []

    def run(now, *_):
        waves.append(now)
        if len(waves) == 2:
            raise KeyboardInterrupt

    def settle(cell, root):
        rows = {name: [{**row, "seed": cell.seed} for row in settled[name]] for name in ("rows", "exact")}
        real._settled(cell, root).write_text(json.dumps({**rows, "about": {**settled["about"], "seed": cell.seed}}))

    monkeypatch.setattr(real, "run_cells", run)
    monkeypatch.setattr(real, "settle", settle)
    with pytest.raises(KeyboardInterrupt):
        real.run_real(cells, tmp_path, tmp_path / "out", processes=1, quiet=True)
    assert waves == [[cells[0]], [cells[1]]]
    assert set(pd.read_csv(tmp_path / "out" / "scores.csv")["seed"]) == {5}


def test_the_premise_is_measured_along_grpo(study):
    cells, root, _ = study
    found = json.loads(real.measure_real_premise(real.premise_cell(cells), root, root / "out", quiet=True).read_text())
    assert found["run"] == cells[0].config.run_name and list(found["origins"]) == ["0"]
    assert [entry["distance"] for entry in found["origins"]["0"]["premise"]] == [2]
    assert [one["distance"] for one in found["gate"]["origins"]["0"]] == [2]
    assert "Gate not passed (one-sided, Holm): from 0, Δ = 2: " in real_claims.write(root / "out")
    assert real.premise_cell(cells[1:]) is None


def test_weights_that_a_kill_left_behind_go_at_the_next_call(study):
    cells, root, _ = study
    grpo, early = (cell.folder(root).path / "branches" / "00" for cell in cells)
    moments, left = grpo / "checkpoint-6" / "optimizer.pt", early / "checkpoint-6"
    moments.write_bytes(b"left")
    left.mkdir()
    real.run_real(cells, root, root / "out", quiet=True)
    assert not left.exists() and not moments.exists()
    assert list(complete_checkpoints(grpo, resumable=False)) == [2, 4, 6]


def test_what_another_call_has_settled_is_neither_run_nor_scored_again(study, policy, tmp_path, monkeypatch):
    """Seen first when both calls had the run before them, so that neither knew it to be done when it began."""
    cells, root, _ = study
    done = cells[1]
    first = real.plan_real("real-smoke", [5], ["GRPO"], {**TINY, "policy": policy})[0]
    settled = json.loads(real._settled(done, root).read_text())
    ran = []

    def run(now, *_):
        ran.extend(now)
        source, target = done.folder(root).path, done.folder(tmp_path).path
        shutil.copytree(source, target, dirs_exist_ok=True)  # while this call runs another cell

    def settle(cell, root):
        if cell == done:
            return was(cell, root)
        rows = {name: [{**row, "arm": "GRPO", "seed": 5} for row in settled[name]] for name in ("rows", "exact")}
        about = {**settled["about"], "arm": "GRPO", "seed": 5}
        real._settled(cell, root).write_text(json.dumps({**rows, "about": about}))

    was = real.settle
    monkeypatch.setattr(real, "run_cells", run)
    monkeypatch.setattr(real, "settle", settle)
    monkeypatch.setattr(real, "_found", lambda *_: pytest.fail("what is settled is scored again"))
    real.run_real([first, done], tmp_path, tmp_path / "out", processes=1, quiet=True)
    assert ran == [first]
    assert {(arm, seed) for arm, seed in pd.read_csv(tmp_path / "out" / "scores.csv")[["arm", "seed"]].to_numpy()} == {
        ("GRPO", 5),
        ("NPO early", 0),
    }


def test_a_settled_run_is_finished_without_its_weights_and_another_is_not(study, tmp_path):
    early = study[0][1]
    shutil.copytree(early.folder(study[1]).path, early.folder(tmp_path).path, dirs_exist_ok=True)
    assert finished(early.folder(tmp_path)) and early.failure(tmp_path) is None
    real._settled(early, tmp_path).unlink()
    assert not finished(early.folder(tmp_path))


def test_the_gate_is_measured_as_soon_as_its_run_is_there(study, policy, tmp_path, monkeypatch):
    """A night that is cut off after the first run has it; a later call, whose first run is settled, before all else."""
    cells, root, _ = study
    order = []
    plan = real.plan_real("real-smoke", [0, 5], ["GRPO"], {**TINY, "policy": policy})

    def run(now, *_):
        order.extend(cell.seed for cell in now)
        if now == [plan[0]]:
            shutil.copytree(cells[0].folder(root).path, plan[0].folder(tmp_path).path, dirs_exist_ok=True)
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr(real, "run_cells", run)
    monkeypatch.setattr(real, "measure_real_premise", lambda *_: order.append("gate"))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            real.run_real(plan, tmp_path, tmp_path / "out", processes=1, quiet=True, premise=True)
    assert order == [0, "gate", 5, "gate", 5]


def test_the_premise_of_seed_0_stays_when_other_seeds_are_run(study, tmp_path, monkeypatch, capsys):
    premise = tmp_path / real.PREMISE
    premise.write_text('{"gate": {"origins": {}, "passed": true}}')
    monkeypatch.setattr(real, "run_real", lambda *_: [])
    monkeypatch.setattr(real, "measure_real_premise", lambda *_: pytest.fail("another seed's premise is measured"))
    rest = ["--preset", "real-smoke", "--root", str(tmp_path / "runs"), "--out", str(tmp_path), "--quiet"]
    assert main(["real-study", "--seeds", "1", "2", *rest]) == 0
    assert main(["real-study", "--seeds", "0", "--arms", "NPO early", *rest]) == 0
    said = capsys.readouterr().out
    assert said.count("GRPO of seed 0 is not among the runs") == 2 and f"No run is scored in {tmp_path}." in said
    assert json.loads(premise.read_text())["gate"]["passed"]
