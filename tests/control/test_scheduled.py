"""Manual interventions: what is planned, what a run does with it, and that a kill changes nothing."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from worlds import world

import npo_core.control.scheduled
import npo_core.control.watch
from npo_core.control.offline import Offline
from npo_core.control.scheduled import Intervention, ScheduledNPO, planned_interventions, random_plan
from npo_core.files import append_line, read_table
from npo_core.guidance.fingerprints import tokenizer_digest
from npo_core.guidance.trajectories import GuidanceCache
from npo_core.runs.checkpoints import checkpoint_folder
from npo_core.runs.config import RunConfig, resolve_config
from npo_core.runs.folder import RunFolder
from npo_core.stages import run as stages

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


@pytest.mark.parametrize("preset", ["smoke", "cpu"])
def test_random_interventions_fit_the_budget_and_the_grid(preset):
    """Training to the first step, back, on to the second, back: each replay ends within the budget."""
    plans = []
    for seed in range(200):
        config = resolve_config("npo", preset, seed, {"random_interventions": 2, "checkpoint_keep": 0})
        plan = random_plan(config)
        every, place, spent = config.checkpoint_every, 0, 0
        for intervention in plan:
            assert place < intervention.at and 0 <= intervention.back_to < intervention.at == intervention.guide_until
            assert intervention.at % every == intervention.back_to % every == 0
            spent, place = spent + intervention.at - place, intervention.back_to
            assert spent + intervention.at - place <= config.compute_steps, "the replay is over before the budget is"
        assert plan == random_plan(config) == planned_interventions(config)
        plans.append(plan)
    assert len(set(plans)) > 40, "seeds differ"
    steps = {plan[0].at for plan in plans}
    grid = set(range(every, config.compute_steps, every))
    assert steps <= grid and len(steps) > 0.9 * len(grid)
    assert min(plan[0].back_to for plan in plans) == 0, "the base policy is a place to go back to"
    assert {len(plan) for plan in plans} == {1, 2}


def test_after_a_dismissal_the_steps_that_training_is_past_are_skipped(monkeypatch):
    """The second of a random plan may lie before the first, whose roll-back did not happen."""
    plan = [Intervention("random", at, at - 4, at) for at in (8, 6, 12)]
    monkeypatch.setattr(npo_core.control.scheduled, "planned_interventions", lambda config: plan)
    controller, segment = ScheduledNPO.__new__(ScheduledNPO), {"event": "segment"}
    controller.config = BOTH
    for events, expected in (
        ([segment], plan[0]),
        ([segment, segment], plan[1]),
        ([segment, segment, {"event": "dismissed", "policy_step": 6}], plan[2]),
        ([segment, {"event": "dismissed", "policy_step": 8}], plan[2]),
        ([segment, {"event": "dismissed", "policy_step": 8}, segment], None),
    ):
        controller.run_folder = SimpleNamespace(effective_events=lambda events=events: events)
        assert controller._next([]) is expected


def test_a_number_of_random_interventions_is_drawn_from_the_seed_alone():
    one, two = (_config(random_interventions=count, checkpoint_keep=0) for count in (1, 2))
    assert random_plan(one) == random_plan(two)[:1]
    assert random_plan(two.with_changes(learning_rate=1e-3, scout_steps=2, late_step=0)) == random_plan(two)


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
    scout, again = (
        read_table(both.path / "rollouts" / f"step-00001-b{branch:02d}.parquet") for branch in (0, 1)
    )  # fmt: skip
    guided = [place for place, row in enumerate(again) if row["source"] == "guide"]
    groups = {again[place]["group"] for place in guided}
    for place, (one, other) in enumerate(zip(scout, again, strict=True)):
        if place in guided:
            assert other["overwritten_text"] == one["text"] and other["uid"] == one["uid"]
        else:  # bit for bit, but that a guide moves the advantages of its own group
            moved = {name for name in one if one[name] != other[name]}
            assert moved <= ({"advantage"} if one["group"] in groups else set())

    first, restart = _lines(both)[0], _lines(both)[4]
    different = {name for name in first if first[name] != restart[name]} - CLOCKS
    assert restart["npo/replaced_slots"] == len(guided)
    if not guided:
        assert not different
    # what is over all rows of the batch has the guides in it, what is the policy's own has lost what they replaced
    of_the_batch = {"loss", "grad_norm", "entropy", "reward", "reward_std"}
    own = {"npo/replaced_slots", "npo/reward", "npo/entropy"}
    assert {name for name in different if not name.startswith(("rewards/", "completions/"))} <= of_the_batch | own
    correct = sum(row["correct"] for row in scout)
    lost = sum(scout[place]["correct"] for place in guided)
    assert restart["reward"] == pytest.approx((correct - lost + len(guided)) / len(scout))
    assert restart["npo/reward"] == pytest.approx((correct - lost) / (len(scout) - len(guided)))


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
        rows = read_table(both.path / "rollouts" / f"step-{step:05d}-b{branch:02d}.parquet")
        guides = [row for row in rows if row["source"] == "guide"]
        start, stop = windows.get(branch, (0, 0))
        assert not guides or start < step <= stop
        guided += len(guides)
    assert guided >= 1


def test_a_guide_that_solves_nothing_is_a_dismissal_and_training_goes_on(grpo, tmp_path, monkeypatch):
    def nothing(self, trainer, uids, step, learner, generate, known):
        return GuidanceCache([0], 1, ""), 16

    monkeypatch.setattr(ScheduledNPO, "_fill_cache", nothing)
    run = stages.run(BOTH, tmp_path, quiet=True)
    assert [event["policy_step"] for event in run.events("dismissed")] == [4, 10]
    assert run.result()["interventions"] == []
    assert run.result()["offline_rollouts"] == 32, "what was sampled in vain counts too"
    same = {"num_tokens"}
    assert [{k: v for k, v in line.items() if k not in same} for line in _lines(run)] == [
        {k: v for k, v in line.items() if k not in same} for line in _lines(grpo)
    ]


# Controls: short runs that scout for 4 steps, or train for 4 and go back to 2; then the replay, then some steps

EARLY = {"late_step": 0, "compute_steps": 8}
LATE = {"scout_steps": 0, "late_step": 4, "late_start": 2, "compute_steps": 8}
CLOCKS = {"compute_step", "branch", "num_tokens", "epoch", "policy_step"}


def _course(line: dict) -> dict:
    return {name: value for name, value in line.items() if name not in CLOCKS}


def test_guides_from_the_own_policy_are_of_the_one_rolled_back_to(grpo, root, monkeypatch):
    filled = []
    fill = ScheduledNPO._fill_cache

    def watched(self, guide, uids, step, learner, generate, known):
        filled.append({name: value.clone() for name, value in guide.state_dict().items()})
        return fill(self, guide, uids, step, learner, generate, known)

    monkeypatch.setattr(ScheduledNPO, "_fill_cache", watched)
    whole = {"cache_prompts": "all", "cache_stop": False}
    run = stages.run(_config(guide_from="own", **whole, **LATE), root, quiet=True)
    assert run.events("prefix")[0]["compute_step"] == 4
    rolled_back_to = load_file(checkpoint_folder(run.path / "branches" / "00", 2) / "model.safetensors")
    (guide,) = filled
    assert rolled_back_to and all(torch.equal(guide[name], value) for name, value in rolled_back_to.items())
    segment = run.events("segment")[-1]
    cache = GuidanceCache.load(run.path / segment["guidance"])
    assert len(cache) >= 1 and {trajectory.source_step for trajectory in cache} == {2}
    assert (segment["start"], segment["guide_until"], segment["reseed"]) == (2, 4, False)
    (event,) = run.events("cache")
    assert event["rollouts"] == 2 * PER_STEP * BOTH.cache_rollouts, "the same budget as guides from the future"


def test_guides_from_the_own_policy_at_a_restart_are_the_base_policys(grpo, root, monkeypatch):
    seen = []

    def nothing(self, guide, uids, step, learner, generate, known):
        seen.append((step, learner, {name: value.clone() for name, value in guide.state_dict().items()}))
        return GuidanceCache([0], 1, ""), 0

    monkeypatch.setattr(ScheduledNPO, "_fill_cache", nothing)
    run = stages.run(_config(guide_from="own", **{**EARLY, "learning_rate": 2e-4}), root, quiet=True)
    ((step, learner, weights),) = seen
    assert (step, learner) == (0, None)
    base = load_file(stages.prepare(BOTH, quiet=True).base / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in base.items() if name in weights)
    assert len(base.keys() & weights.keys()) > 10
    assert run.events("dismissed") and run.result()["policy_steps"] == 8


@pytest.mark.parametrize(("settings", "start"), [(EARLY, 0), (LATE, 2)], ids=["restart", "roll-back"])
def test_a_replay_without_guide_has_other_rollouts_and_nothing_else_is_new(grpo, root, settings, start):
    run = stages.run(_config(guide_from="none", **settings), root, quiet=True)
    assert run.events("prefix")[0]["compute_step"] == 4
    segment = run.events("segment")[-1]
    assert (segment["start"], segment["guidance"], segment["reseed"]) == (start, None, True)
    assert run.events("cache") == [] and run.result()["offline_rollouts"] == 0
    (intervention,) = run.result()["interventions"]
    assert (intervention["cached"], intervention["distance"]) == (0, 4 - start)
    lines = _lines(run)
    assert [line["compute_step"] for line in lines] == list(range(1, 9))
    assert all(line["npo/replaced_slots"] == 0 for line in lines)
    first, again = lines[start], lines[4]
    assert first["policy_step"] == again["policy_step"] == start + 1
    assert first["groups"].keys() == again["groups"].keys(), "the same prompts"
    tables = [read_table(run.path / "rollouts" / f"step-{start + 1:05d}-b{branch:02d}.parquet") for branch in (0, 1)]
    assert [row["uid"] for row in tables[0]] == [row["uid"] for row in tables[1]]
    assert [row["token_ids"] for row in tables[0]] != [row["token_ids"] for row in tables[1]]


def test_without_fresh_randomness_a_replay_without_guide_repeats_the_run(grpo, tmp_path, monkeypatch):
    """So the reseeding is what makes the control one: the roll-back is exact."""
    monkeypatch.setattr(npo_core.control.watch, "set_seed", lambda seed: None)
    shutil.copytree(grpo.path, tmp_path / grpo.path.name)  # for the first four steps
    run = stages.run(_config(guide_from="none", **{**LATE, "compute_steps": 6}), tmp_path, quiet=True)
    lines = _lines(run)
    assert [line["policy_step"] for line in lines] == [1, 2, 3, 4, 3, 4]
    assert [_course(line) for line in lines[2:4]] == [_course(line) for line in lines[4:]]


def test_a_kill_after_a_replay_without_guide_began_changes_nothing(grpo, root, tmp_path):
    """Fresh randomness is set again when the replay starts again, and not in its middle."""
    settings = _config(guide_from="none", **LATE)
    whole = stages.run(settings, root, quiet=True)
    for compute_step in (5, 8):

        def append(path, record, at=compute_step):
            if record.get("compute_step") == at and path.name == "metrics.jsonl":
                raise Killed
            append_line(path, record)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(RunFolder, "append_metrics", lambda run, line: append(run.metrics_path, line))
            stages.run(settings, tmp_path, quiet=True)
    run = stages.run(settings, tmp_path, quiet=True)
    # one took its first four steps from a longer run, of which they are a smaller share
    assert [{**line, "epoch": None} for line in _lines(run)] == [{**line, "epoch": None} for line in _lines(whole)]


class Killed(BaseException):
    """Stands in for a kill: nothing in the package catches it."""


@pytest.mark.parametrize(
    "compute_step",
    [
        pytest.param(5, id="after the restart"),
        pytest.param(14, id="before the late one", marks=pytest.mark.slow),
        pytest.param(15, id="after it", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_as_if_nothing_had_happened(both, tmp_path, compute_step):
    def append(path, record):
        if record.get("compute_step") == compute_step:
            raise Killed
        append_line(path, record)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunFolder, "append_metrics", lambda run, line: append(run.metrics_path, line))
        stages.run(BOTH, tmp_path, quiet=True)
    run = stages.run(BOTH, tmp_path, quiet=True)
    assert _lines(run) == _lines(both)
    assert _decisions(run) == _decisions(both)
    weights = [load_file(checkpoint_folder(r.path / "branches" / "02", 12) / "model.safetensors") for r in (run, both)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.fixture
def solved(monkeypatch) -> None:
    """The first off-line response to each prompt is the exact solution: there is a guide, whatever is sampled."""
    sample, tiny = Offline._sample, world("text")

    def with_solutions(self, *args, **kwargs):
        groups = sample(self, *args, **kwargs)
        for group in groups:
            ids = tuple(tiny.solution(group[0].uid))
            group[0] = replace(group[0], token_ids=ids, logps=(-1.0,) * len(ids), correct=True)
        return groups

    monkeypatch.setattr(Offline, "_sample", with_solutions)


def test_rule_closest_scores_guides_under_the_base_policy_at_the_restart(tmp_path, solved):
    run = stages.run(
        _config(late_step=0, cache_rule="closest", cache_stop=False, compute_steps=8), tmp_path, quiet=True
    )
    (intervention,) = run.result()["interventions"]
    [cache] = run.events("cache")
    assert intervention["cached"] == cache["prompts"] > 0


@pytest.mark.parametrize("stop", [False, True])
def test_right_rollouts_that_cannot_guide_are_the_reason_of_a_dismissal(tmp_path, monkeypatch, stop):
    """A policy that no longer ends its responses is right and cannot guide: that is said, not "solved nothing"."""
    sample = Offline._sample

    def endless(self, *args, **kwargs):
        groups = sample(self, *args, **kwargs)
        return [[replace(t, token_ids=(*t.token_ids[:-1], 0), correct=True) for t in group] for group in groups]

    monkeypatch.setattr(Offline, "_sample", endless)
    run = stages.run(_config(late_step=0, cache_stop=stop, compute_steps=8), tmp_path, quiet=True)
    (dismissed,) = run.events("dismissed")
    rollouts = dismissed["rollouts"]
    assert f"of {rollouts} responses 0 were wrong, {rollouts} right but no guides (the first: " in dismissed["reason"]
    assert "does not end with an end-of-sequence token" in dismissed["reason"]


# Repeated interventions, with and without roll-back


@pytest.mark.parametrize(
    ("back", "steps", "plan"),
    [
        (2, 20, [(4, 2, 4), (8, 6, 8), (12, 10, 12)]),  # 4 + 2, 4 + 2, 4 + 2 spent; a fourth would end at 22
        (2, 18, [(4, 2, 4), (8, 6, 8), (12, 10, 12)]),
        (2, 17, [(4, 2, 4), (8, 6, 8)]),
        (4, 20, [(4, 0, 4), (8, 4, 8)]),
        (0, 10, [(4, 4, 8), (8, 8, 10)]),  # no way back: guides for the steps ahead, up to the end of the budget
    ],
)
def test_repeated_interventions_fit_the_budget(back, steps, plan):
    config = _config(repeat_every=4, repeat_back=back, compute_steps=steps)
    assert planned_interventions(config) == tuple(Intervention("repeated", *one) for one in plan)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"repeat_every": 3}, "repeat_every is 3; it must be a multiple of checkpoint_every = 2"),
        ({"repeat_every": 4, "repeat_back": 6}, "repeat_back is 6; .*at most repeat_every = 4"),
        ({"repeat_every": 4, "repeat_back": 1}, "repeat_back is 1; it must be a multiple"),
        ({"repeat_every": 8, "repeat_back": 4, "checkpoint_keep": 2}, "repeat_back is 4; it must be at most 2"),
        ({"repeat_every": 20, "repeat_back": 2}, "compute_steps is 20; it must be at least 22"),
        ({"repeat_every": 4, "repeat_back": 2, "random_interventions": 1}, "random_interventions is 1; it must be 0"),
    ],
)
def test_repeats_that_cannot_be_carried_out_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        _config(**overrides)


@pytest.fixture(scope="module")
def ahead(root) -> RunFolder:
    return stages.run(_config(repeat_every=12, repeat_back=0), root, quiet=True)


def test_without_roll_back_training_goes_on_as_it_was_with_guides_for_the_prompts_ahead(ahead, grpo):
    lines = ahead.metrics()
    assert [line["policy_step"] for line in lines] == [line["compute_step"] for line in lines] == list(range(1, 21))
    assert [line["branch"] for line in lines] == [0] * 12 + [1] * 8
    assert _lines(ahead)[:12] == _lines(grpo)[:12]
    assert lines[12]["groups"].keys() == grpo.metrics()[12]["groups"].keys(), "the data order goes on"
    # the rollouts of the first guided step are those of GRPO: only what trains on them differs
    assert lines[12]["npo/pass_rate"] == grpo.metrics()[12]["npo/pass_rate"]
    replaced = [line["npo/replaced_slots"] for line in lines]
    assert sum(replaced[:12]) == 0 < sum(replaced[12:])
    [event] = ahead.events("ahead")
    assert (event["policy_step"], event["compute_step"], event["until"]) == (12, 12, 20)
    assert ahead.events("rollback") == []
    [cache] = ahead.events("cache")
    guides = read_table(ahead.path / cache["file"])
    prompts = {uid for line in lines[12:] for uid in line["groups"]}
    assert {row["uid"] for row in guides} <= prompts and cache["prompts"] == len(prompts)
    assert {row["source_step"] for row in guides} == {12}
    [intervention] = ahead.result()["interventions"]
    assert (intervention["stage"], intervention["distance"]) == ("repeated", 0)


# Cheaper guides


@pytest.fixture(scope="module")
def cheap(root) -> RunFolder:
    """Groups of 16, so that of the window's prompts some surely have a right rollout, some none, and guides enough."""
    cheaper = {"cache_stop": True, "cache_prompts": "gated", "tau_gate": 0.05}
    groups = {"num_generations": 16, "micro_batch": 64, "cache_rollouts": 64}
    return stages.run(_config(scout_steps=0, **cheaper, **groups), root, quiet=True)


def test_only_prompts_that_were_gated_when_the_window_first_ran_get_a_guide(cheap):
    [cache] = cheap.events("cache")
    first = [line for line in cheap.metrics() if line["branch"] == 0 and 6 < line["policy_step"] <= 10]
    rates = {uid: rate for line in first for uid, rate in line["groups"].items()}
    gated = {uid for uid, rate in rates.items() if rate <= 0.05}
    assert 0 < len(gated) < len(rates), "the window holds prompts of both kinds"
    assert cache["prompts"] == len(gated)
    guides = read_table(cheap.path / cache["file"])
    assert {row["uid"] for row in guides} <= gated
    assert len(gated) <= cache["rollouts"] <= len(gated) * cheap.config.cache_rollouts
    assert cheap.result()["offline_rollouts"] == cache["rollouts"]


def test_a_rule_that_chooses_among_all_rollouts_gets_all_of_them(tmp_path, solved):
    """Stopping is of the rule "first" alone, so a preset that stops leaves the other rules what they are."""
    runs = [
        stages.run(_config(late_step=0, cache_rule="shortest", cache_stop=stop, compute_steps=8), tmp_path, quiet=True)
        for stop in (True, False)
    ]
    caches = [run.events("cache") for run in runs]
    assert [event["rollouts"] for event in caches[0]] == [event["rollouts"] for event in caches[1]] != []
    assert [_course(line) for line in _lines(runs[0])] == [_course(line) for line in _lines(runs[1])]
