"""AutoNPO on the smallest world: bitwise roll-back, a whole run, kill and resume, dismissal, and its limits."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from triggers import calendar
from worlds import responses

import npo_core.control.controller
import npo_core.control.watch
from npo_core.control.auto import AutoNPO
from npo_core.control.watch import Segment, Watch
from npo_core.files import append_line, read_table
from npo_core.guidance.fingerprints import tokenizer_digest
from npo_core.guidance.trajectories import GuidanceCache
from npo_core.method.trigger import PlateauTrigger, TriggerSettings
from npo_core.runs.checkpoints import checkpoint_folder, complete_checkpoints
from npo_core.runs.config import RunConfig, resolve_config
from npo_core.runs.folder import RunFolder
from npo_core.stages import run as stages
from npo_core.trainer.trainer import NPOTrainer
from npo_core.world.policies import load_processor
from npo_core.world.warmstart import base_policy_folder

STEPS = 12
"""Enough for a warning in step 5, a roll-back to 2 or 4, the replay, and some steps after it."""
TIMED = {"step_time"}
"""Metrics that measure the machine; all others repeat bit for bit."""


@pytest.fixture(scope="module")
def base() -> Path:
    """The shipped base policy, which solves about one rollout in ten, under its own name."""
    return base_policy_folder(resolve_config("autonpo", "smoke"))


def _config(base: Path, method: str = "autonpo", **overrides) -> RunConfig:
    return resolve_config(
        method,
        "smoke",
        overrides={
            "policy": str(base),
            "suites": ["mathvista"],
            "train_problems": 16,
            "compute_steps": STEPS,
            "probe_rollouts": 8,
            "cache_rollouts": 16,
            "eval_problems": 4,
            **overrides,
        },
    )


LOOSE = {"trigger_ema": 0.0, "trigger_window": 1, "trigger_warmup": 3, "trigger_cooldown": 4}
"""The package's own trigger, which then fires as soon as the entropy falls from one step to the next."""


@pytest.fixture
def own_trigger(monkeypatch):
    monkeypatch.setattr(npo_core.control.watch, "PlateauTrigger", PlateauTrigger)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(npo_core.control.watch, "PlateauTrigger", calendar(5))
        patch.setenv("NPO_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield lambda name: tmp_path_factory.mktemp(name)


@pytest.fixture(scope="module")
def autonpo(base, roots) -> RunFolder:
    """An AutoNPO run that nothing interrupts."""
    return stages.run(_config(base), roots("autonpo"), quiet=True)


@pytest.fixture(scope="module")
def grpo(base, roots) -> RunFolder:
    """Plain GRPO with the same seed that nothing interrupts."""
    return stages.run(_config(base, "grpo"), roots("grpo"), quiet=True)


def _lines(run: RunFolder) -> list[dict]:
    """Metric lines without what measures the machine or names the branch."""
    return [{name: value for name, value in line.items() if name not in TIMED} for line in run.metrics()]


def _weights(run: RunFolder, compute_step: int = 0) -> dict[str, torch.Tensor]:
    """Weights after a compute step, the last one by default."""
    line = run.metrics()[compute_step - 1]
    branch = run.path / "branches" / f"{line['branch']:02d}"
    return load_file(checkpoint_folder(branch, line["policy_step"]) / "model.safetensors")


def _same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _decisions(run: RunFolder) -> list[dict]:
    """Effective events without their times, and without the notes about sittings and restarts."""
    return [
        {name: value for name, value in event.items() if name != "time"}
        for event in run.effective_events()
        if event["event"] not in ("sitting", "resume")
    ]


def _result(run: RunFolder) -> dict:
    return {name: value for name, value in run.result().items() if name != "wall_seconds"}


# Roll-back


def _recorded(maker: stages.TrainerMaker, folder: Path, resume_from: Path | None):
    """Train to the end of the budget; prompts and completions of every step, and the final weights."""
    trainer = maker(folder)
    batches = []
    generate = trainer._generate_and_score_completions

    def record(inputs):
        output = generate(inputs)
        batches.append(([row["uid"] for row in inputs], output["prompt_ids"].tolist(), responses(output)))
        return output

    trainer._generate_and_score_completions = record
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    return batches, {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("micro_batch", [16, 8], ids=["one batch", "gradient accumulation"])
def test_rolling_back_replays_prompts_rollouts_and_weights_bit_for_bit(base, tmp_path, micro_batch):
    config = _config(base, "grpo", compute_steps=8, micro_batch=micro_batch)
    maker = stages.TrainerMaker(config, stages.prepare(config, quiet=True))
    batches, weights = _recorded(maker, tmp_path / "00", None)
    replayed, again = _recorded(maker, tmp_path / "01", tmp_path / "00" / "checkpoint-4")
    assert len(batches) == 8 and len({str(batch) for batch in batches}) == 8
    assert replayed == batches[4:]
    assert _same_bits(weights, again)
    assert not _same_bits(weights, load_file(tmp_path / "00" / "checkpoint-4" / "model.safetensors"))


# A whole run


def test_a_run_intervenes_and_says_what_it_considered(autonpo):
    (intervention,) = autonpo.result()["interventions"]
    candidates = intervention["candidates"]
    assert len(candidates) >= 2
    for candidate in candidates:
        assert candidate["distance"] == intervention["policy_step"] - candidate["policy_step"] > 0
        assert 0 <= candidate["quality"] <= 1 <= candidate["variance"]
        assert candidate["signal"] == pytest.approx(candidate["quality"] / candidate["variance"])
    best = max(candidates, key=lambda candidate: candidate["signal"])
    assert intervention["distance"] == best["distance"]
    assert {name: best[name] for name in ("quality", "variance", "signal")} == {
        name: intervention[name] for name in ("quality", "variance", "signal")
    }
    assert intervention["cached"] >= 1
    order = [event["event"] for event in autonpo.events() if event["event"] != "sitting"]
    assert order == ["segment", "warning", "probe", "choice", "cache", "rollback", "segment"]


def test_the_two_clocks(autonpo):
    """Compute time never goes back and is spent to the last step; policy time goes back once, to the chosen place."""
    (intervention,) = autonpo.result()["interventions"]
    lines = autonpo.metrics()
    assert [line["compute_step"] for line in lines] == list(range(1, STEPS + 1))
    when, origin = intervention["compute_step"], intervention["policy_step"] - intervention["distance"]
    assert when == intervention["policy_step"]
    assert [line["policy_step"] for line in lines] == [
        *range(1, when + 1),
        *range(origin + 1, origin + 1 + STEPS - when),
    ]
    assert [line["branch"] for line in lines] == [0] * when + [1] * (STEPS - when)


def test_result_has_the_agreed_form(autonpo, grpo):
    result = autonpo.result()
    assert list(result)[:5] == ["schema", "method", "preset", "seed", "status"]
    assert (result["schema"], result["method"], result["preset"], result["seed"]) == (1, "autonpo", "smoke", 0)
    assert result["status"] == "finished" and result["compute_steps"] == STEPS and result["wall_seconds"] > 0
    assert result["policy_steps"] == autonpo.metrics()[-1]["policy_step"] < STEPS
    for scores in (result["base"], result["final"]):
        assert set(scores["suites"]) == {"mathvista"} and scores["average"] == scores["suites"]["mathvista"]
    offline = sum(event["rollouts"] for event in autonpo.events() if event["event"] in ("probe", "cache"))
    assert offline > 0 and result["rollouts"] == STEPS * 16 + offline
    assert set(result["interventions"][0]) >= {
        *("policy_step", "compute_step", "distance", "quality", "variance", "signal", "at_edge", "cached")
    }
    assert grpo.result()["interventions"] == [] and grpo.result()["rollouts"] == STEPS * 16
    assert grpo.result()["base"] == result["base"]


def test_until_the_warning_the_run_is_plain_grpo(autonpo, grpo):
    (intervention,) = autonpo.result()["interventions"]
    when = intervention["compute_step"]
    assert _lines(autonpo)[:when] == _lines(grpo)[:when]
    assert _lines(autonpo)[when:] != _lines(grpo)[when:]


def test_guides_are_those_of_the_cache_and_only_in_the_replayed_segment(autonpo):
    (segment,) = [event for event in autonpo.events("segment") if event["branch"] == 1]
    processor = load_processor(Path(autonpo.config.policy))
    cache = GuidanceCache.load(autonpo.path / segment["guidance"], tokenizer_digest(processor))
    assert len(cache) == autonpo.result()["interventions"][0]["cached"]
    assert {guide.source_step for guide in cache} == {segment["guide_until"]}
    guided = 0
    for line in autonpo.metrics():
        step, branch = line["policy_step"], line["branch"]
        rows = read_table(autonpo.path / "rollouts" / f"step-{step:05d}-b{branch:02d}.parquet")
        guides = [row for row in rows if row["source"] == "guide"]
        assert len(guides) == line["npo/replaced_slots"]
        assert not guides or (branch == 1 and segment["start"] < step <= segment["guide_until"])
        for row in guides:
            assert row["slot"] == 3 and row["reward"] == 1.0
            assert row["token_ids"] == list(cache.guide(row["uid"], 0).token_ids)
        guided += len(guides)
    assert guided >= 1


def test_the_replay_is_guided_from_the_roll_back_to_the_step_of_the_warning(autonpo):
    world = stages.prepare(autonpo.config, quiet=True)
    rows = {row["uid"]: row for row in world.train}
    controller = AutoNPO(None, autonpo.config, autonpo, rows, world.processor, world.verifier)
    segment = npo_core.control.controller._segment(autonpo.events("segment")[1])
    source = controller._guidance(segment)
    (uid, *_) = [guide.uid for guide in source.source]
    done_before = [step for step in range(2 * STEPS) if source.guide(uid, step) is not None]
    (intervention,) = autonpo.result()["interventions"]
    assert done_before == list(
        range(intervention["policy_step"] - intervention["distance"], intervention["policy_step"])
    )


def test_a_replay_feeds_the_pool_but_not_the_trigger(base, tmp_path):
    """Averages that hold guided steps would judge the intervention; they start afresh when the replay is over."""
    config = _config(base)
    segments = [Segment(0, 0, 0), Segment(1, 2, 5, "branches/00/checkpoint-2", "guidance/x.parquet", guide_until=5)]
    watch = Watch(config, RunFolder(config, tmp_path), segments, None, acts=True)
    averages = []
    for step, branch in ((1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 1)):
        groups = {f"prompt {step}": 0.0}
        watch.observe(
            {"policy_step": step, "branch": branch, "npo/reward": 0.1, "npo/entropy": float(step), "groups": groups}
        )
        averages.append(watch.trigger.entropy_ema)
    assert averages[1] is not None and averages[1:5] == [averages[1]] * 3 + [None]
    assert averages[5] == pytest.approx(6.0)
    line = {"policy_step": 7, "branch": 1, "groups": {"prompt 7": 0.0}}
    for missing in ({"npo/reward": 0.1}, {"npo/entropy": 1.0}, {}):  # all rows masked, none of them scored
        assert watch.observe({**line, **missing}) is None and watch.trigger.entropy_ema == pytest.approx(6.0)
    assert [mistake.step for mistake in watch.pool.since(0)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_step_without_entropy_is_logged_and_trained_on(base, tmp_path):
    """mask_truncated_completions takes every token of a step whose responses are all cut off."""
    run = RunFolder(_config(base), tmp_path)
    shown, control = [], SimpleNamespace(should_training_stop=False)
    bar = SimpleNamespace(advance=lambda **values: shown.append(values))
    watch = Watch(run.config, run, [Segment(0, 0, 0)], bar, acts=True)
    watch.trainer = SimpleNamespace(group_pass_rates={"a": 0.0})
    watch.on_log(None, SimpleNamespace(global_step=1), control, {"npo/reward": 0.25, "npo/entropy": None})
    watch.on_log(None, SimpleNamespace(global_step=2), control, {"npo/reward": None, "npo/entropy": 1.5})
    assert [(line["policy_step"], line["groups"]) for line in run.metrics()] == [(1, {"a": 0.0}), (2, {"a": 0.0})]
    assert [(values["reward"], values["entropy"]) for values in shown] == [("0.25", "nan"), ("nan", "1.50")]
    assert not control.should_training_stop


def test_a_finished_run_is_loaded_not_run_again(autonpo, monkeypatch):
    monkeypatch.setattr(AutoNPO, "run", lambda self: pytest.fail("the run was executed again"))
    again = stages.run(autonpo.config, autonpo.path.parent, quiet=True)
    assert again.result() == autonpo.result()


# Kill and resume


class Killed(BaseException):
    """Stands in for a kill: nothing in the package catches it."""


def _kill_before_line(compute_step: int) -> Callable:
    def install(patch):
        def append(path, record):
            if record.get("compute_step") == compute_step:
                raise Killed
            append_line(path, record)

        patch.setattr(RunFolder, "append_metrics", lambda run, line: append(run.metrics_path, line))

    return install


def _kill_after_line(compute_step: int) -> Callable:
    def install(patch):
        def append(path, record):
            append_line(path, record)
            if record.get("compute_step") == compute_step:
                raise Killed

        patch.setattr(RunFolder, "append_metrics", lambda run, line: append(run.metrics_path, line))

    return install


def _kill_in_checkpoint(branch: int, policy_step: int) -> Callable:
    def install(patch):
        mark = npo_core.control.watch.mark_complete

        def marked(folder):
            if folder == folder.parent / f"checkpoint-{policy_step}" and folder.parent.name == f"{branch:02d}":
                (folder / "model.safetensors").write_bytes(b"half")
                raise Killed
            mark(folder)

        patch.setattr(npo_core.control.watch, "mark_complete", marked)

    return install


def _kill_in(method: str) -> Callable:
    def install(patch):
        def killed(*args, **kwargs):
            raise Killed

        patch.setattr(AutoNPO, method, killed)

    return install


def _kill_after_rollback_event(patch):
    open_segment = AutoNPO._open

    def opened(self, segment):
        if segment.branch:
            raise Killed
        return open_segment(self, segment)

    patch.setattr(AutoNPO, "_open", opened)


def _resumed(config: RunConfig, root: Path, *kills: Callable) -> RunFolder:
    for kill in kills:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            kill(patch)
            stages.run(config, root, quiet=True)
    return stages.run(config, root, quiet=True)


def _assert_as_if_nothing_had_happened(run: RunFolder, reference: RunFolder) -> None:
    assert _lines(run) == _lines(reference)
    assert _same_bits(_weights(run), _weights(reference))
    assert _decisions(run) == _decisions(reference)
    assert _result(run) == _result(reference)


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param([_kill_after_line(7)], id="after a line, before its checkpoint"),
        pytest.param(
            [_kill_before_line(1), _kill_in_checkpoint(0, 6)],
            id="in the first step, then in a checkpoint",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_killed_grpo_run_ends_as_if_nothing_had_happened(base, grpo, tmp_path, kills):
    run = _resumed(grpo.config, tmp_path, *kills)
    _assert_as_if_nothing_had_happened(run, grpo)


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("while the cache is filled", marks=pytest.mark.slow),
        pytest.param("between roll-back and new segment", marks=pytest.mark.slow),
        "in the first step after the roll-back",
        pytest.param("three times", marks=pytest.mark.slow),
    ],
)
def test_a_killed_autonpo_run_ends_as_if_nothing_had_happened(base, autonpo, tmp_path, where):
    when = autonpo.result()["interventions"][0]["compute_step"]
    kills = {
        "while the cache is filled": [_kill_in("_fill_cache")],
        "between roll-back and new segment": [_kill_after_rollback_event],
        "in the first step after the roll-back": [_kill_before_line(when + 1)],
        "three times": [_kill_before_line(when), _kill_in("_probe"), _kill_after_line(STEPS - 1)],
    }[where]
    run = _resumed(autonpo.config, tmp_path, *kills)
    _assert_as_if_nothing_had_happened(run, autonpo)


# Dismissal and limits


def _own_warnings(lines: list[dict]) -> list[int]:
    """Steps in which the package's trigger, set to `LOOSE`, warns when fed metric lines."""
    trigger = PlateauTrigger(
        TriggerSettings(ema=0.0, window=1, reward_tolerance=1.0, entropy_drop=1e-6, warmup=3, cooldown=4)
    )
    updates = ((line["policy_step"], line["npo/reward"], line["npo/entropy"]) for line in lines)
    return [step for step, *figures in updates if trigger.update(step, *figures) is not None]


def test_the_trigger_reads_the_on_policy_metrics(base, grpo, tmp_path, own_trigger):
    first, *_ = _own_warnings(grpo.metrics())
    assert first < STEPS
    steps = first + 1
    run = stages.run(_config(base, **LOOSE, compute_steps=steps, checkpoint_every=steps), tmp_path, quiet=True)
    (warning,) = run.events("warning")
    assert warning["policy_step"] == warning["compute_step"] == first
    # it reached the decision; one step of budget is too little for a replay from the start, and there is no other
    (dismissed,) = run.events("dismissed")
    assert dismissed["policy_step"] == first and "budget" in dismissed["reason"]
    assert run.result()["interventions"] == []


def test_a_dismissed_warning_leaves_the_run_as_it_was(base, grpo, tmp_path, own_trigger):
    """The probe has to stop training; resuming the same branch gives the bits of a run that never stopped."""
    config = _config(base, **LOOSE, confirm_quality=1.0, compute_steps=10)
    expected = [step for step in _own_warnings(grpo.metrics()[:10]) if step < 10]
    run = stages.run(config, tmp_path, quiet=True)
    dismissed = run.events("dismissed")
    assert [event["compute_step"] for event in dismissed] == expected != []
    assert all("confirm_quality" in event["reason"] for event in dismissed)
    assert run.result()["interventions"] == []
    assert [line["npo/entropy"] for line in run.metrics()] == [line["npo/entropy"] for line in grpo.metrics()[:10]]
    assert _same_bits(_weights(run), _weights(grpo, 10))
    # and killed in between, the dismissal is neither forgotten nor repeated
    killed = _resumed(config, tmp_path / "killed", _kill_before_line(expected[0] + 1))
    _assert_as_if_nothing_had_happened(killed, run)
    assert len(killed.events("dismissed")) == len(expected)


def test_a_warning_without_a_promising_distance_is_dismissed(base, grpo, tmp_path):
    run = stages.run(_config(base, compute_steps=8, quality_floor=1.0), tmp_path, quiet=True)
    assert [event["reason"].split(":")[0] for event in run.events("dismissed")] == ["no roll-back"]
    assert _same_bits(_weights(run), _weights(grpo, 8))


def test_without_interventions_to_spend_a_run_is_plain_grpo(base, grpo, tmp_path):
    run = stages.run(_config(base, max_interventions=0, compute_steps=8), tmp_path, quiet=True)
    assert run.result()["interventions"] == []
    assert run.events("warning") == []
    assert _same_bits(_weights(run), _weights(grpo, 8))


@pytest.mark.slow
def test_a_run_stops_intervening_at_max_interventions(base, autonpo, tmp_path):
    """Two runs that differ in the limit alone: the second intervention is where they part."""
    once, twice = (
        stages.run(_config(base, max_interventions=most, compute_steps=24), tmp_path, quiet=True) for most in (1, 2)
    )
    assert len(once.result()["interventions"]) == 1
    first, second = twice.result()["interventions"]
    assert first == once.result()["interventions"][0] == autonpo.result()["interventions"][0]
    assert first["policy_step"] < second["policy_step"], "a replay is judged when it is over"
    when = second["compute_step"]
    assert first["compute_step"] < when < 24
    assert _lines(once)[:when] == _lines(twice)[:when]
    assert [event["branch"] for event in twice.events("segment")] == [0, 1, 2]
    assert [line["compute_step"] for line in twice.metrics()] == list(range(1, 25))
    # what branch 0 saved past the roll-back point belongs to another trajectory
    origin = first["policy_step"] - first["distance"]
    own = complete_checkpoints(twice.path / "branches" / "01")
    kept = [step for step in complete_checkpoints(twice.path / "branches" / "00") if step <= origin]
    grid = [candidate["policy_step"] for candidate in second["candidates"]]
    # from t back to t − Δ and up again costs Δ steps, and no more than are left
    affordable = range(second["policy_step"] - (24 - when), second["policy_step"])
    assert sorted(grid) == sorted({*kept, *own}.intersection(affordable))


def test_a_warning_at_the_end_of_the_budget_does_not_undo_the_run(base, autonpo, grpo, tmp_path):
    """With no step left to replay, a roll-back could only lose what was learnt."""
    when = autonpo.result()["interventions"][0]["compute_step"]
    run = stages.run(_config(base, compute_steps=when), tmp_path, quiet=True)
    assert len(run.events("warning")) == 1
    assert run.result()["interventions"] == []
    assert run.result()["policy_steps"] == run.result()["compute_steps"] == when
    # the policy that is evaluated is the one that the metrics end with
    plain = stages.run(_config(base, "grpo", compute_steps=when), tmp_path, quiet=True)
    assert run.result()["final"] == plain.result()["final"]


def test_a_run_killed_after_its_last_step_is_evaluated_and_not_trained_on(autonpo, monkeypatch, tmp_path):
    """The last checkpoint, which lies on the second branch, is loaded."""
    shutil.copytree(autonpo.path, tmp_path / autonpo.path.name)
    (tmp_path / autonpo.path.name / "result.json").unlink()
    monkeypatch.setattr(NPOTrainer, "train", lambda *args, **kwargs: pytest.fail("a finished run was trained on"))
    run = stages.run(autonpo.config, tmp_path, quiet=True)
    assert _result(run) == _result(autonpo)


# Without roll-back, and with short ones


@pytest.fixture(scope="module")
def ahead(base, roots) -> RunFolder:
    return stages.run(_config(base, roll_back=False, ahead_window=4, cache_stop=True), roots("ahead"), quiet=True)


def test_without_roll_back_a_confirmed_warning_guides_the_prompts_ahead(ahead, grpo):
    [warning, *_] = ahead.events("warning")
    [event] = ahead.events("ahead")
    assert (event["policy_step"], event["until"]) == (warning["policy_step"], 9)
    assert ahead.events("rollback") == ahead.events("choice") == []
    lines = ahead.metrics()
    assert [line["policy_step"] for line in lines] == list(range(1, STEPS + 1)), "nothing is done twice"
    assert [line["branch"] for line in lines] == [0] * 5 + [1] * 7
    assert _lines(ahead)[:5] == _lines(grpo)[:5]
    replaced = [line["npo/replaced_slots"] for line in lines]
    assert sum(replaced[:5]) == sum(replaced[9:]) == 0, "guided inside of its window only"
    [cache] = ahead.events("cache")
    ahead_of_it = {uid for line in lines[5:9] for uid in line["groups"]}
    assert {row["uid"] for row in read_table(ahead.path / cache["file"])} <= ahead_of_it
    [intervention] = ahead.result()["interventions"]
    assert (intervention["stage"], intervention["distance"]) == ("ahead", 0)


def test_without_roll_back_each_warning_has_one_intervention(base, roots):
    settings = {"roll_back": False, "ahead_window": 3, "cache_stop": True, "max_interventions": 3}
    run = stages.run(_config(base, **settings), roots("ahead thrice"), quiet=True)
    warned = [event["policy_step"] for event in run.events("warning")]
    decided = [event["policy_step"] for event in run.events() if event["event"] in ("ahead", "dismissed")]
    assert decided == warned and len(set(warned)) == len(warned) > 1


def test_without_roll_back_no_older_checkpoint_is_needed(base, roots):
    settings = {"roll_back": False, "ahead_window": 4, "cache_stop": True, "checkpoint_keep": 1}
    run = stages.run(_config(base, **settings), roots("ahead of one"), quiet=True)
    [event, *_] = run.events("ahead")
    assert event["policy_step"] == run.events("warning")[0]["policy_step"]


def test_a_roll_back_goes_no_farther_than_max_distance(base, roots, autonpo):
    run = stages.run(_config(base, max_distance=2), roots("near"), quiet=True)
    [choice, *_] = run.events("choice")
    assert [candidate["distance"] for candidate in choice["candidates"]] == [1]
    assert max(candidate["distance"] for candidate in autonpo.events("choice")[0]["candidates"]) > 2
