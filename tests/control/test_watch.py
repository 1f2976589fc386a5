"""What a watched run makes of what its trainer logs: numbers of any kind, and a step that diverged."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from factories import Factory, controller_of, own_config

from npo_core.control.controller import Controller
from npo_core.control.watch import Segment, Watch, numbers
from npo_core.figures.record import RunRecord
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
