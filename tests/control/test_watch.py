"""What a watched run makes of what its trainer logs: numbers of any kind, and a step that diverged."""

import inspect
import json
import math
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from factories import Factory, controller_of, own_config
from triggers import calendar

import npo_core.control.watch
from npo_core.control.controller import Controller
from npo_core.control.watch import Segment, Watch, numbers
from npo_core.figures.record import RunRecord
from npo_core.method.trigger import MistakePool, TriggerSettings
from npo_core.runs.config import RunConfig
from npo_core.runs.folder import RunFolder

DIVERGED = 2


class Killed(BaseException):
    """Stands in for a kill: nothing in the package catches it."""


def overflowing(completions, trainer_state=None, **columns):
    """A reward of 1e25 in one step: its gradients are finite, and their norm is not."""
    large = 1e25 if trainer_state.global_step == DIVERGED - 1 else 1.0
    return [large * (index % 2) for index, _ in enumerate(completions)]


def controller(folder):
    factory = Factory(own_config("grpo", compute_steps=4), reward=overflowing, scale_rewards="none")
    return controller_of(factory, folder, Controller)


def test_a_step_whose_gradient_norm_is_infinite_is_noted_and_the_run_goes_on(tmp_path, monkeypatch):
    whole = controller(tmp_path / "whole")
    assert whole.run().state.global_step == 4
    text = whole.run_folder.metrics_path.read_text()
    norms = [json.loads(line, parse_constant=pytest.fail)["grad_norm"] for line in text.splitlines()]
    assert norms[DIVERGED - 1] is None and all(norm > 0 for norm in norms[:1] + norms[DIVERGED:])

    append = RunFolder.append_metrics

    def killed(run, line):
        append(run, line)
        if line["policy_step"] == DIVERGED + 1:
            raise Killed

    cut = controller(tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_metrics", killed)
        with pytest.raises(Killed):
            cut.run()
    again = controller(tmp_path / "cut")
    again.run()
    timeless = [[{**line, "step_time": 0} for line in each.run_folder.metrics()] for each in (whole, again)]
    np.testing.assert_equal(*timeless)
    shown = RunRecord.read(again.run_folder.path).values("grad_norm")
    assert np.isnan(shown).tolist() == [step == DIVERGED for step in (1, 2, 3, 4)]


def test_numbers_of_any_kind_are_kept_and_other_things_left_out():
    logs = {
        "a": np.float32(0.5), "b": torch.tensor(2), "c": torch.tensor([0.25], dtype=torch.bfloat16), 3: np.int64(4),
        "d": np.array([[1.5]]), "text": "x", "none": None, "many": torch.ones(2), "list": [1.0], "e": 1, "f": True,
    }  # fmt: skip
    kept = numbers(logs)
    assert kept == {"a": 0.5, "b": 2, "c": 0.25, "3": 4, "d": 1.5, "e": 1, "f": True}
    assert {type(value) for value in kept.values()} == {float, int, bool}


def falling_apart(step):
    """Longer and longer responses, and from step 30 on most of them cut off, at a reward that stays."""
    length, clipped = 100.0 * 1.05**step, 0.9 if step >= 30 else 0.0
    return {"npo/reward": 0.3, "npo/entropy": 1.0, "completions/mean_length": length,
            "completions/clipped_ratio": clipped}  # fmt: skip


@pytest.fixture
def watched(tmp_path):
    """`watched(logs, steps, **settings)`: a run whose trainer logs these; its alarms by step, and the lines said."""

    def watch(logs, steps, name="run", rise=0.5, clipped=0.5, guide_until=0):
        limits = {"alarm_rise": rise, "alarm_clipped": clipped, "trigger_ema": 0.5, "trigger_window": 20}
        limits["trigger_reward_tolerance"] = 0.01
        run = RunFolder(own_config("grpo", compute_steps=steps, **limits), tmp_path / name)
        said = []
        bar = SimpleNamespace(advance=lambda **values: None, say=said.append)
        seen = Watch(run.config, run, [Segment(0, 0, 0, guide_until=guide_until)], bar, acts=True)
        seen.trainer = SimpleNamespace(group_pass_rates={"a": 0.25})
        control = SimpleNamespace(should_training_stop=False, should_save=False)
        for step in range(1, steps):
            seen.on_log(None, SimpleNamespace(global_step=step), control, logs(step))
        return run, said, control

    return watch


def test_a_run_that_falls_apart_is_told_once_as_a_line_and_an_event_and_goes_on(watched):
    run, said, control = watched(falling_apart, 60)
    alarms = run.events("alarm")
    kinds = [text.split()[0] for alarm in alarms for text in alarm["complaints"]]
    assert [kind for kind in kinds if kind == "length"] == ["length"] and len(kinds) == 2
    assert alarms[0]["policy_step"] == 21, "where the window first shows the rise"
    assert 30 <= alarms[1]["policy_step"] <= 32 and "of the responses are cut off at the longest" in said[1]
    assert [line.startswith(f"Alarm at step {a['policy_step']}: ") for line, a in zip(said, alarms, strict=True)] == [
        True, True,
    ]  # fmt: skip
    assert "reward by +0.000" in said[0] and said[0].endswith(".")
    assert not control.should_training_stop and not run.events("rollback"), "it tells, and does nothing"


def test_a_baseline_that_is_guided_all_along_is_heard_too(watched):
    guided, plain = (watched(falling_apart, 60, str(end), guide_until=end)[0].events("alarm") for end in (60, 0))
    assert [alarm["policy_step"] for alarm in guided] == [alarm["policy_step"] for alarm in plain] != []


def test_growth_that_reward_pays_for_is_no_alarm_and_limits_of_nought_switch_it_off(watched):
    learning = lambda step: {**falling_apart(step), "npo/reward": 0.01 * step, "completions/clipped_ratio": 0.0}  # noqa: E731
    assert watched(learning, 60, "learning")[0].events("alarm") == []
    assert watched(falling_apart, 60, "off", rise=0.0, clipped=0.0)[0].events("alarm") == []


def test_a_resumed_run_does_not_raise_an_alarm_again(watched):
    """What was said is on the lines that the watch is rebuilt from."""
    run, said, _ = watched(falling_apart, 40)
    again = Watch(run.config, run, [Segment(0, 0, 0)], SimpleNamespace(say=said.append), acts=True)
    before = len(said)
    again.replay(run.metrics())
    assert len(said) == before == len(run.events("alarm")) == 2
    assert again.observe({**run.metrics()[-1], "policy_step": 40, **falling_apart(40)}) is None
    assert again.complaints == []


def test_a_warning_has_one_decision(tmp_path, monkeypatch):
    """What came of it may begin where the newest line of the trajectory is still the one that warned."""
    monkeypatch.setattr(npo_core.control.watch, "PlateauTrigger", calendar(4))
    run = RunFolder(own_config("autonpo", max_interventions=9), tmp_path)

    def line(step, branch):
        clocks = {"policy_step": step, "compute_step": step, "branch": branch}
        return {**clocks, "npo/reward": 0.1, "npo/entropy": 1.0, "groups": {}}

    lines = [line(step, 0) for step in (1, 2, 3, 4)]

    def due(*segments, further=()):
        return Watch(run.config, run, [Segment(0, 0, 0), *segments], None, acts=True).replay([*lines, *further])

    assert due() == 4, "a run that was killed before the decision"
    assert due(Segment(1, 4, 4, guidance="x", guide_until=6)) is None, "guides for the prompts ahead"
    assert due(Segment(1, 8, 8), Segment(2, 4, 8, guidance="x", guide_until=8)) is None, "dismissed then, origin now"
    ahead = [line(step, 1) for step in (5, 6, 7, 8)]
    assert due(Segment(1, 4, 4, guidance="x", guide_until=6), further=ahead[:3]) is None
    assert due(Segment(1, 4, 4, guidance="x", guide_until=6), further=ahead) == 8


def test_a_trainers_own_names_do_not_replace_the_clocks(tmp_path):
    run = RunFolder(own_config("grpo"), tmp_path)
    watch = Watch(run.config, run, [Segment(0, 0, 0)], SimpleNamespace(advance=lambda **values: None), acts=True)
    watch.trainer = SimpleNamespace(group_pass_rates={"a": 0.0})
    logs = {"npo/reward": math.inf, "npo/entropy": 1.0, "branch": 7.0, "policy_step": 9, "groups": 3, "compute_step": 5}
    watch.on_log(None, SimpleNamespace(global_step=1), SimpleNamespace(should_training_stop=False), logs)
    [line] = run.metrics()
    assert (line["policy_step"], line["compute_step"], line["branch"], line["groups"]) == (1, 1, 0, {"a": 0.0})
    assert math.isnan(line["npo/reward"])
    assert watch.trigger.entropy_ema is None, "what is not finite is not averaged, now or after a resume"


def test_the_trigger_and_the_pool_alone_are_set_as_those_of_a_run():
    """Whoever calls them without a configuration gets what is documented for one."""
    of_a_run = {setting.name: setting.default for setting in fields(RunConfig)}
    trigger = {f"trigger_{each.name}": each.default for each in fields(TriggerSettings)}
    pool = {f"pool_{name}": each.default for name, each in inspect.signature(MistakePool).parameters.items()}
    assert len(trigger) == 6 and len(pool) == 3
    assert trigger | pool == {name: of_a_run[name] for name in trigger | pool}
