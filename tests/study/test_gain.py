"""The gain study: arms that differ in their guides alone, the unguided arm, and what is kept on disk."""

import json

import pytest

import npo_core.study.gain
from npo_core.guidance.fingerprints import tokenizer_digest
from npo_core.guidance.trajectories import GuidanceCache
from npo_core.runs.config import resolve_config
from npo_core.runs.measurement import Pair
from npo_core.stages import run as stages
from npo_core.study.gain import GainPlan, GainStudy
from npo_core.world.policies import load_policy

CONFIG = resolve_config("grpo", "smoke", overrides={"compute_steps": 10, "checkpoint_keep": 0, "checkpoint_every": 2})
PLAN = GainPlan(origins=(4,), distances=(0, 2), window=4, modes=("current", "exact"), teacher=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def study(root):
    return GainStudy(CONFIG, PLAN, root, quiet=True)


@pytest.fixture(scope="module")
def records(study):
    return study.run()


def test_pairs_of_a_plan_hold_the_end_of_the_run_and_the_teacher():
    assert PLAN.pairs(10) == [
        Pair(4, "resample", 0),
        Pair(4, "000006", 2),
        Pair(4, "000010", 6),
        Pair(4, "teacher", None),
    ]
    assert [pair.distance for pair in GainPlan(origins=(8,), distances=(0, 2, 4), teacher=False).pairs(10)] == [0, 2]


def test_a_plan_off_the_checkpoints_is_refused():
    with pytest.raises(ValueError, match=r"needs checkpoints at \[3, 7\]; the run has them every 2 steps up to 10"):
        GainPlan(origins=(3,), distances=(0,), window=4).check(CONFIG)
    with pytest.raises(ValueError, match=r"needs checkpoints at \[12\]"):
        GainPlan(origins=(8,), distances=(0,), window=4).check(CONFIG)


def test_an_origin_that_cannot_be_resumed_from_is_refused(tmp_path):
    config = CONFIG.with_changes(checkpoint_keep=2)
    with pytest.raises(ValueError, match="slimmed to its weights"):
        GainStudy(config, PLAN, tmp_path, quiet=True)


@pytest.mark.slow
def test_every_arm_has_a_record_and_the_same_window(records):
    arms = [(record["source"], record["mode"]) for record in records]
    assert arms == [
        ("unguided", None),
        *[(source, mode) for source in ("resample", "000006", "000010", "teacher") for mode in ("current", "exact")],
    ]
    for record in records:
        assert record["seed"] == 0 and record["window"] == 4 and 0 <= record["final"]["average"] <= 1
    guided = [record for record in records if record["source"] != "unguided"]
    assert all(record["prompts"] == 16 and 0 < record["cached"] <= 16 for record in guided)
    assert any(record["replaced_slots"] > 0 for record in guided)
    by_mode = [{r["cached"] for r in guided if r["source"] == "teacher"}, {r["replaced_slots"] for r in guided if
               r["source"] == "teacher" and r["mode"] == "current"}]  # fmt: skip
    assert len(by_mode[0]) == 1, "both modes are guided by the same cache"


@pytest.mark.slow
def test_the_unguided_arm_is_the_grpo_run(study, records):
    lines = [line for line in study.run_folder.metrics() if 4 < line["policy_step"] <= 8]
    unguided = records[0]
    assert unguided["pass_rate"] == lines[-1]["npo/pass_rate"]
    policy = load_policy(study.run_folder.path / "branches" / "00" / "checkpoint-8")
    scores = stages.evaluate_policy(CONFIG, policy, study.world, "again", quiet=True)
    assert unguided["final"]["average"] == scores["average"]


@pytest.mark.slow
def test_an_arm_without_guides_ends_as_the_grpo_run(study, records, monkeypatch):
    """Same start, same prompts, same number of steps: what is left of an arm when its cache is empty is GRPO."""
    digest = tokenizer_digest(study.world.processor)
    monkeypatch.setattr(GainStudy, "_cache", lambda self, pair: (GuidanceCache([0], 1, digest), 16))
    record = study._guided(Pair(4, "resample", 0), "current")
    assert record["final"]["average"] == records[0]["final"]["average"]
    assert record["pass_rate"] == records[0]["pass_rate"] and record["entropy"] == records[0]["entropy"]


@pytest.mark.slow
def test_guides_come_from_the_source_that_the_arm_names(study, records):
    digest = tokenizer_digest(study.world.processor)
    steps = {"resample": 4, "000006": 6, "000010": 10, "teacher": -1}
    for source, step in steps.items():
        cache = GuidanceCache.load(study.folder / f"000004-{source}-w4.parquet", digest)
        assert {guide.source_step for guide in cache} == {step}


@pytest.mark.slow
def test_finished_arms_are_read_not_run_again(study, records, monkeypatch):
    monkeypatch.setattr(npo_core.study.gain.GainStudy, "_guided", lambda *_: pytest.fail("an arm was run again"))
    assert study.run() == records
    path = study.folder / "000004-teacher-exact-w4.json"
    assert json.loads(path.read_text()) == records[-1]
