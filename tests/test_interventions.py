"""Manual interventions: what is planned, what a run does with it, and that a kill changes nothing."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import npo_core.watch
from npo_core import stages
from npo_core.checkpoints import checkpoint_folder
from npo_core.config import RunConfig, resolve_config
from npo_core.interventions import Intervention, ScheduledNPO, planned_interventions
from npo_core.policies import tokenizer_digest
from npo_core.runs import RunFolder, append_line
from npo_core.trajectories import GuidanceCache, read_rollouts

# smoke: scout of 4 steps and restart, guided for 4; at policy step 10 back to 6; 20 compute steps in all
BOTH = resolve_config("npo", "smoke")
PER_STEP = BOTH.prompts_per_step


def _config(**overrides) -> RunConfig:
    return resolve_config("npo", "smoke", overrides=overrides)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def both(root) -> RunFolder:
    return stages.run(BOTH, root, quiet=True)


@pytest.fixture(scope="module")
def grpo(root) -> RunFolder:
    return stages.run(resolve_config("grpo", "smoke"), root, quiet=True)


def _lines(run: RunFolder) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "step_time"} for line in run.metrics()]


def _decisions(run: RunFolder) -> list[dict]:
    events = [event for event in run.effective_events() if event["event"] not in ("sitting", "prefix", "resume")]
    return [{name: value for name, value in event.items() if name != "time"} for event in events]


# The plan


def test_the_two_stages_are_one_mechanism():
    assert planned_interventions(BOTH) == (Intervention("early", 4, 0, 4), Intervention("late", 10, 6, 10))
    assert planned_interventions(_config(scout_steps=0)) == (Intervention("late", 10, 6, 10),)
    assert planned_interventions(_config(late_step=0)) == (Intervention("early", 4, 0, 4),)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"scout_steps": 0, "late_step": 0}, r"scout_steps and late_step is \(0, 0\); it must be above 0"),
        ({"early_window": 0}, "early_window is 0; it must be at least 1"),
        ({"late_start": 7}, r"late_start is 7; it must be a checkpoint \(a multiple of 2\) from 4 to below"),
        ({"late_start": 10}, "late_start is 10; .* below late_step = 10"),
        ({"late_start": 2}, "late_start is 2; .* from 4"),
        ({"compute_steps": 17}, "compute_steps is 17; it must be at least 18"),
        ({"checkpoint_keep": 2}, "late_step - late_start is 4; it must be at most 2"),
        ({"late_step": -1}, "late_step is -1; it must be at least 0"),
    ],
)
def test_interventions_that_cannot_be_carried_out_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        _config(**overrides)


def test_other_methods_do_not_mind_the_settings_of_interventions():
    assert resolve_config("grpo", "smoke", overrides={"compute_steps": 3}).compute_steps == 3


# A run


def test_both_clocks_of_a_run_with_both_stages(both):
    lines = both.metrics()
    assert [line["compute_step"] for line in lines] == list(range(1, 21))
    assert [line["policy_step"] for line in lines] == [*range(1, 5), *range(1, 11), *range(7, 13)]
    assert [line["branch"] for line in lines] == [0] * 4 + [1] * 10 + [2] * 6
    early, late = both.result()["interventions"]
    assert (early["stage"], early["policy_step"], early["compute_step"], early["distance"]) == ("early", 4, 4, 4)
    assert (late["stage"], late["policy_step"], late["compute_step"], late["distance"]) == ("late", 10, 14, 4)
    assert early["signal"] is late["signal"] is None
    assert both.result()["offline_rollouts"] == sum(e["rollouts"] for e in both.events("cache")) > 0
    assert both.result()["rollouts"] == 20 * BOTH.rollouts_per_step + both.result()["offline_rollouts"]


def test_the_scout_is_grpo_and_the_restart_starts_from_the_base_policy(both, grpo):
    assert _lines(both)[:4] == _lines(grpo)[:4]
    first, restart = _lines(both)[0], _lines(both)[4]
    assert restart["npo/replaced_slots"] == 0, "the first step holds no guided group here, so it repeats the scout's"
    different = {name for name in first if first[name] != restart[name]}
    assert different <= {"compute_step", "branch", "num_tokens", "epoch"}


def test_guides_are_the_scouts_for_the_windows_prompts_and_only_in_the_window(both):
    world = stages.prepare(BOTH, quiet=True)
    order = stages.TrainerMaker(BOTH, world).schedule.with_format(None)["uid"]
    windows = {1: (0, 4), 2: (6, 10)}
    for segment in both.events("segment")[1:]:
        start, stop = windows[segment["branch"]]
        cache = GuidanceCache.load(both.path / segment["guidance"], tokenizer_digest(world.processor))
        prompts = set(order[start * PER_STEP : stop * PER_STEP])
        assert {guide.uid for guide in cache} <= prompts
        assert {guide.source_step for guide in cache} == {stop}
        assert (segment["start"], segment["guide_until"]) == (start, stop)
    guided = 0
    for line in both.metrics():
        step, branch = line["policy_step"], line["branch"]
        rows = read_rollouts(both.path / "rollouts" / f"step-{step:05d}-b{branch:02d}.parquet")
        guides = [row for row in rows if row["source"] == "guide"]
        start, stop = windows.get(branch, (0, 0))
        assert not guides or start < step <= stop
        guided += len(guides)
    assert guided >= 1


def test_a_guide_that_solves_nothing_is_a_dismissal_and_training_goes_on(grpo, tmp_path, monkeypatch):
    def nothing(self, trainer, uids, step, learner):
        return GuidanceCache([0], 1, "")

    monkeypatch.setattr(ScheduledNPO, "_fill_cache", nothing)
    run = stages.run(BOTH, tmp_path, quiet=True)
    assert [event["policy_step"] for event in run.events("dismissed")] == [4, 10]
    assert run.result()["interventions"] == []
    same = {"num_tokens"}
    assert [{k: v for k, v in line.items() if k not in same} for line in _lines(run)] == [
        {k: v for k, v in line.items() if k not in same} for line in _lines(grpo)
    ]


class Killed(BaseException):
    """Stands in for a kill: nothing in the package catches it."""


@pytest.mark.parametrize("compute_step", [5, 14, 15], ids=["after the restart", "before the late one", "after it"])
def test_a_killed_run_ends_as_if_nothing_had_happened(both, tmp_path, compute_step):
    def append(path, record):
        if record.get("compute_step") == compute_step:
            raise Killed
        append_line(path, record)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(npo_core.watch, "append_line", append)
        stages.run(BOTH, tmp_path, quiet=True)
    run = stages.run(BOTH, tmp_path, quiet=True)
    assert _lines(run) == _lines(both)
    assert _decisions(run) == _decisions(both)
    weights = [load_file(checkpoint_folder(r.path / "branches" / "02", 12) / "model.safetensors") for r in (run, both)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_rule_closest_scores_guides_under_the_base_policy_at_the_restart(tmp_path):
    run = stages.run(_config(late_step=0, cache_rule="closest", compute_steps=8), tmp_path, quiet=True)
    assert run.result()["interventions"][0]["cached"] >= 1
