"""Runs that share a beginning: how long it is, and that taking it over changes no bit of what follows."""

import json
import shutil
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from npo_core.runs.checkpoints import checkpoint_folder, complete_checkpoints
from npo_core.runs.config import resolve_config
from npo_core.runs.folder import RunFolder
from npo_core.stages import prefix
from npo_core.stages import run as stages
from npo_core.stages.prefix import shared_steps, take_prefix
from npo_core.study.cells import plan_cells


def config(method="npo", **overrides):
    return resolve_config(method, "smoke", overrides=overrides)


BOTH, EARLY, LATE = config(), config(late_step=0), config(scout_steps=0)
GRPO, AUTO = config("grpo"), config("autonpo")


@pytest.mark.parametrize(
    ("first", "second", "steps"),
    [
        # smoke: scout 4 steps and restart, late intervention at policy step 10, 20 compute steps in all
        pytest.param(GRPO, LATE, 10, id="late leaves GRPO at its roll-back"),
        pytest.param(GRPO, EARLY, 4, id="early leaves GRPO after the scout"),
        pytest.param(BOTH, EARLY, 14, id="scout, then ten steps from the base policy"),
        pytest.param(BOTH, LATE, 4, id="the scout is all they share"),
        pytest.param(BOTH, BOTH.with_changes(late_start=8), 14, id="same step, another roll-back"),
        pytest.param(BOTH, BOTH.with_changes(checkpoint_keep=0), 20, id="what is kept changes nothing"),
        pytest.param(GRPO, AUTO, 0, id="nobody knows when AutoNPO intervenes"),
        pytest.param(GRPO, LATE.with_changes(learning_rate=1e-3), 0, id="another setting"),
        pytest.param(GRPO, LATE.with_changes(seed=1), 0, id="another seed"),
        pytest.param(GRPO.with_changes(compute_steps=33), GRPO, 20, id="a longer run"),
        pytest.param(GRPO.with_changes(compute_steps=33), LATE, 10, id="late leaves the longer run at its roll-back"),
        pytest.param(BOTH, BOTH.with_changes(ratio_mode="exact"), 4, id="other guidance differs from the first on"),
        pytest.param(BOTH, LATE.with_changes(guide_from="own"), 4, id="the earlier first intervention of the two"),
        pytest.param(GRPO, LATE.with_changes(guide_from="none"), 10, id="GRPO makes no intervention"),
        pytest.param(GRPO, GRPO.with_changes(tau_gate=0.1), 20, id="without guidance its settings mean nothing"),
        pytest.param(GRPO, config("luffy"), 0, id="guided from the start"),
        pytest.param(BOTH, config(random_interventions=2, checkpoint_keep=0), 4, id="random ones begin at 14"),
        pytest.param(GRPO, GRPO.with_changes(entropy_bonus=0.1), 0, id="another objective"),
        pytest.param(GRPO, GRPO.with_changes(advantage_scale="none"), 0, id="other advantages"),
    ],
)
def test_shared_steps(first, second, steps):
    assert shared_steps(first, second) == shared_steps(second, first) == steps


def _weights(run):
    line = run.metrics()[-1]
    branch = run.path / "branches" / f"{line['branch']:02d}"
    return load_file(checkpoint_folder(branch, line["policy_step"]) / "model.safetensors")


def _lines(run):
    return [{name: value for name, value in line.items() if name != "step_time"} for line in run.metrics()]


def _decisions(run):
    kinds = {"sitting", "prefix"}
    events = [event for event in run.effective_events() if event["event"] not in kinds]
    return [{name: value for name, value in event.items() if name != "time"} for event in events]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.mark.parametrize(
    ("donor", "taker", "steps"),
    [pytest.param(BOTH, EARLY, 14, id="early"), pytest.param(GRPO, LATE, 10, id="late", marks=pytest.mark.slow)],
)
def test_a_run_with_a_shared_beginning_ends_as_one_that_did_every_step(root, tmp_path, donor, taker, steps):
    stages.run(donor, root, quiet=True)
    shared, alone = stages.run(taker, root, quiet=True), stages.run(taker, tmp_path, quiet=True)
    (prefix,) = shared.events("prefix")
    assert prefix["compute_step"] == steps and alone.events("prefix") == []
    assert _lines(shared) == _lines(alone)
    assert _decisions(shared) == _decisions(alone)
    first, second = _weights(shared), _weights(alone)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    results = [{k: v for k, v in run.result().items() if k != "wall_seconds"} for run in (shared, alone)]
    assert results[0] == results[1] and results[0]["compute_steps"] == 20
    for kept in ("rollouts", "guided", "guided/pictures"):
        names = [sorted(path.name for path in (run.path / kept).iterdir()) for run in (shared, alone)]
        assert names[0] == names[1]
    guided = [[path.read_text() for path in sorted((run.path / "guided").glob("*.jsonl"))] for run in (shared, alone)]
    assert guided[0] == guided[1] != []


def _same_but_for_the_clock(run):
    """Lines without `epoch`, which is a share of the run's own length."""
    return [{name: value for name, value in line.items() if name != "epoch"} for line in _lines(run)]


@pytest.mark.parametrize(
    ("taker", "steps"),
    [
        (LATE.with_changes(ratio_mode="exact", guide_from="own", late_step=4, late_start=2, compute_steps=6), 4),
        (GRPO.with_changes(compute_steps=4), 4),
    ],
    ids=["other ratio and other guides", "all of it"],
)
def test_a_beginning_from_a_longer_run_changes_no_bit(root, tmp_path, taker, steps):
    donor = stages.run(GRPO.with_changes(compute_steps=8), root, quiet=True)
    shared, alone = stages.run(taker, root, quiet=True), stages.run(taker, tmp_path, quiet=True)
    assert [event["compute_step"] for event in shared.events("prefix")] == [steps] and not alone.events("prefix")
    assert _same_but_for_the_clock(shared) == _same_but_for_the_clock(alone)
    assert _same_but_for_the_clock(shared)[:steps] == _same_but_for_the_clock(donor)[:steps]
    assert _decisions(shared) == _decisions(alone)
    first, second = _weights(shared), _weights(alone)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    results = [{k: v for k, v in run.result().items() if k != "wall_seconds"} for run in (shared, alone)]
    assert results[0] == results[1] and results[0]["compute_steps"] == taker.compute_steps
    assert len(results[0]["interventions"]) == (taker.method == "npo")


@pytest.mark.parametrize("dismisses", [False, True], ids=["rolls back at 7", "dismisses every warning"])
def test_autonpo_is_grpo_until_it_intervenes(root, tmp_path, dismisses):
    """It saves a checkpoint at its warning, step 7, which is none of GRPO's."""
    folder, quality = root / f"auto{dismisses}", {"confirm_quality": 1.0} if dismisses else {}
    guides = "own" if dismisses else "future"
    donor = stages.run(AUTO.with_changes(checkpoint_keep=0, guide_from=guides, **quality), folder, quiet=True)
    assert donor.events("warning")[0]["compute_step"] == 7
    assert next(event["event"] for event in donor.events() if event["event"] in ("rollback", "dismissed")) == (
        "dismissed" if dismisses else "rollback"
    )
    taker = GRPO.with_changes(checkpoint_keep=1, **quality)
    shared, alone = stages.run(taker, folder, quiet=True), stages.run(taker, tmp_path, quiet=True)
    (prefix,) = shared.events("prefix")
    assert prefix["compute_step"] == (20 if dismisses else 6)
    assert _lines(shared) == _lines(alone) and _decisions(shared) == _decisions(alone)
    first, second = _weights(shared), _weights(alone)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    kept = [[list(complete_checkpoints(run.branch(0), resumable=r)) for r in (True, False)] for run in (shared, alone)]
    assert kept[0] == kept[1] == [[20], list(range(2, 21, 2))]
    results = [{k: v for k, v in run.result().items() if k != "wall_seconds"} for run in (shared, alone)]
    assert results[0] == results[1] and results[0]["offline_rollouts"] == 0


def test_an_autonpo_that_never_warned_lends_all_its_steps_and_their_alarms(root, tmp_path):
    donor = stages.run(AUTO.with_changes(trigger_warmup=20, compute_steps=8), root / "quiet", quiet=True)
    assert donor.events("warning") == []
    donor.event("alarm", compute_step=8, policy_step=8, complaints=["of the last step"])
    config = GRPO.with_changes(trigger_warmup=20, compute_steps=8)
    run = RunFolder(config, root / "quiet")
    with run.writing(quiet=True):
        assert take_prefix(run) == 8
    assert [event["complaints"] for event in run.events("alarm")] == [["of the last step"]]
    assert _lines(run) == _lines(donor)


def test_no_run_of_the_study_stands_in_the_way_of_another(tmp_path):
    """All folders are there before the first run starts, those of AutoNPO with own guides and without among them."""
    runs = [cell.folder(tmp_path) for cell in plan_cells("smoke", [0])]
    assert {run.config.guide_from for run in runs if run.config.method == "autonpo"} == {"future", "own", "none"}
    for run in runs:
        with run.writing(quiet=True):
            assert take_prefix(run) == 0


@pytest.fixture
def lender(root):
    """A finished GRPO that kept the last checkpoint alone resumable, in a folder that a test may damage."""
    return stages.run(GRPO.with_changes(compute_steps=8, checkpoint_keep=1, tau_gate=0.3), root / "lender", quiet=True)


@pytest.fixture
def lent(lender, tmp_path):
    shutil.copytree(lender.path.parent, tmp_path / "runs")
    return RunFolder(lender.config, tmp_path / "runs")


def _take(config, root):
    run = RunFolder(config, root)
    with run.writing(quiet=True):
        return run, take_prefix(run)


def _holds(run):
    return [path for name in ("branches", "rollouts", "guidance", "guided") for path in (run.path / name).glob("*")]


def test_what_a_kill_left_of_a_copy_is_not_resumed_from(lent, monkeypatch):
    taker = lent.config.with_changes(checkpoint_keep=2)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(prefix, "_copy_logs", Mock(side_effect=KeyboardInterrupt))
        _take(taker, lent.path.parent)
    run = RunFolder(taker, lent.path.parent)
    assert list(complete_checkpoints(run.branch(0))) == [8]
    shutil.rmtree(lent.path / "branches")
    run, steps = _take(taker, lent.path.parent)
    assert steps == 0 and not _holds(run) and not run.metrics() and not run.events_path.exists()


def test_a_copy_that_fails_is_said_and_removed(lent, monkeypatch):
    monkeypatch.setattr(prefix.shutil, "copy", Mock(side_effect=OSError("No space left on device")))
    with pytest.warns(UserWarning, match=r"makes every step: the beginning of grpo-smoke-s0-.* \(No space left"):
        run, steps = _take(lent.config.with_changes(checkpoint_keep=2), lent.path.parent)
    assert steps == 0 and not _holds(run) and not run.events_path.exists()


def test_a_run_takes_no_beginning_that_it_could_not_roll_back_in(lent):
    """The lender has weights alone of step 6."""
    late = LATE.with_changes(late_step=8, tau_gate=0.3)
    assert _take(late.with_changes(late_start=6), lent.path.parent)[1] == 0
    assert _take(late.with_changes(late_start=6, late_step=10), lent.path.parent)[1] == 0
    assert _take(EARLY.with_changes(scout_steps=8, tau_gate=0.3), lent.path.parent)[1] == 8
    assert _take(late.with_changes(late_start=8, late_step=10), lent.path.parent)[1] == 8


def test_a_run_of_other_versions_lends_nothing(lent):
    made = json.loads((lent.path / "env.json").read_text())
    made["packages"]["torch"] = "1.0"
    (lent.path / "env.json").write_text(json.dumps(made))
    assert _take(lent.config.with_changes(checkpoint_keep=2), lent.path.parent)[1] == 0


def test_a_run_that_has_begun_takes_nothing(root):
    run = RunFolder(BOTH.with_changes(checkpoint_keep=7), root)
    run.event("segment", branch=0, start=0, compute_start=0, resume_from=None, guidance=None, guide_until=0)
    assert take_prefix(run) == 0


def test_only_steps_with_a_checkpoint_are_taken(root):
    """A donor that saved every second step cannot hand over an odd number of them."""
    assert take_prefix(RunFolder(BOTH.with_changes(scout_steps=0, late_step=9, late_start=8), root)) == 8


def test_a_run_of_a_version_with_fewer_settings_lends_nothing_and_gets_no_twin(tmp_path):
    """Its missing settings would be filled with today's defaults, and its folder name would be another one."""
    old = json.loads(GRPO.to_json())
    old.pop("guide_from")
    folder = tmp_path / f"grpo-smoke-s{GRPO.seed}-0123456789"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(old))
    assert take_prefix(RunFolder(LATE, tmp_path)) == 0
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, LATE.run_name}
