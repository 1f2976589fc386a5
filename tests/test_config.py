"""Configuration: what is refused and how, what the digest depends on, and that every preset resolves."""

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npo_core import tasks
from npo_core.config import SUITES, RunConfig, check_parameters, load_preset, preset_names, resolve_config

OTHER = {
    "method": "grpo",
    "preset": "other",
    "suites": SUITES[:2],
    "policy": "/elsewhere",
    "loss_type": "dapo",
    "ratio_mode": "exact",
    "cache_rule": "shortest",
    "variance_proxy": "sequence",
    "micro_batch": 128,
}
"""Another valid value of each setting for which 'a bit smaller or larger' is none."""


def another(setting, value):
    """A valid value of a setting that differs from `value`."""
    if setting.name in OTHER:
        return OTHER[setting.name]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value * 0.9 if value else 0.1


@pytest.mark.parametrize(
    ("overrides", "nearest"),
    [
        ({"tau_gat": 0.5}, "tau_gate"),
        ({"learning-rate": 1.0e-3}, "learning_rate"),
        ({"lerning_rate": 1.0e-3}, "learning_rate"),
        ({"ratio_mode": "exakt"}, "exact"),
        ({"cache_rule": "shorter"}, "shortest"),
        ({"loss_type": "dr-grpo"}, "dr_grpo"),
        ({"suites": ["mathvista", "mathvison"]}, "mathvision"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(overrides, nearest):
    with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
        resolve_config(overrides=overrides)


def test_an_unknown_preset_and_method_are_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"'smok'; did you mean 'smoke'\? Allowed: .*'cpu'"):
        resolve_config(preset="smok")
    with pytest.raises(ValueError, match=r"did you mean 'autonpo'\? Allowed: 'grpo', 'npo', 'autonpo'"):
        resolve_config(method="auto_npo")


def test_a_name_like_no_other_is_refused_without_a_guess():
    with pytest.raises(ValueError, match="Unknown setting 'zzzz'") as caught:
        resolve_config(overrides={"zzzz": 1})
    assert "did you mean" not in str(caught.value)
    assert "npo_core settings" in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        {"learning_rate": "1e-4"},  # YAML 1.1 reads 1e-4 as a string, and papermill passes it on
        {"learning_rate": True},
        {"learning_rate": None},
        {"compute_steps": True},
        {"compute_steps": 10.0},
        {"compute_steps": "10"},
        {"freeze_vision": 1},
        {"freeze_vision": "true"},
        {"policy": 7},
        {"suites": "mathvista"},
        {"suites": ["mathvista", 1]},
        {"tau_gate": [0.5]},
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(overrides):
    (name,) = overrides
    with pytest.raises(TypeError, match=f"^{name} is"):
        resolve_config(overrides=overrides)


def test_the_seed_is_typed_too():
    with pytest.raises(TypeError, match="seed is '0' of type str; it must be int"):
        resolve_config(seed="0")


def test_an_int_serves_as_a_float_and_gives_the_same_digest():
    config = resolve_config(overrides={"temperature": 1, "tau_gate": 0})
    assert type(config.temperature) is float
    assert config == resolve_config(overrides={"temperature": 1.0, "tau_gate": 0.0})
    assert config.digest == resolve_config(overrides={"temperature": 1.0, "tau_gate": 0.0}).digest


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"tau_gate": 1.01}, "tau_gate is 1.01; it must be a number from 0 to 1"),
        ({"tau_gate": -0.1}, "tau_gate"),
        ({"eval_top_p": 2}, "eval_top_p"),
        ({"micro_batch": 48}, "a divisor of prompts_per_step × num_generations = 256"),
        ({"num_generations": 1, "micro_batch": 32}, "num_generations"),
        ({"compute_steps": 0}, "compute_steps is 0; it must be at least 1"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": -1.0e-4}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it must be a finite number"),
        ({"trigger_ema": float("inf")}, "trigger_ema is inf; it must be a finite number"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"ratio_truncation": 0}, "ratio_truncation"),
        ({"checkpoint_keep": -1}, "checkpoint_keep"),
        ({"data_seed": -1}, "data_seed is -1; it must be at least 0"),
        ({"easy_share": 0.7, "middling_share": 0.4}, "easy_share \\+ middling_share"),
        ({"suites": []}, "one or more distinct suites"),
        ({"suites": ["wemath", "wemath"]}, "one or more distinct suites"),
        ({"eval_problems": 2 * len(SUITES) - 1}, "eval_problems"),
    ],
)
def test_a_value_out_of_range_is_refused(overrides, complaint):
    with pytest.raises(ValueError, match=complaint):
        resolve_config(overrides=overrides)


def test_the_ends_of_a_range_are_allowed():
    assert resolve_config(overrides={"tau_gate": 0.0}).tau_gate == 0
    assert resolve_config(overrides={"tau_gate": 1.0}).tau_gate == 1
    assert resolve_config(overrides={"easy_share": 0.7, "middling_share": 0.3}).easy_share == 0.7


@pytest.mark.parametrize("overrides", [[("tau_gate", 0.5)], "tau_gate=0.5", 3])
def test_overrides_are_a_mapping(overrides):
    with pytest.raises(TypeError, match="must be a mapping"):
        resolve_config(overrides=overrides)


@pytest.mark.parametrize("name", ["method", "preset", "seed"])
def test_a_parameter_is_refused_in_overrides(name):
    value = getattr(resolve_config(), name)
    with pytest.raises(ValueError, match=f"'{name}' has a parameter of its own"):
        resolve_config(overrides={name: value})


def test_overrides_win_over_the_preset_and_the_preset_over_the_default():
    default, preset = RunConfig().compute_steps, load_preset("smoke")["compute_steps"]
    assert default != preset
    assert resolve_config(preset="smoke").compute_steps == preset
    assert resolve_config(preset="smoke", overrides={"compute_steps": preset + 1}).compute_steps == preset + 1


def test_every_preset_resolves_under_its_own_name():
    assert {"smoke", "cpu"} <= set(preset_names())
    for name in preset_names():
        for method in ("grpo", "autonpo"):
            config = resolve_config(method, name, seed=3)
            assert (config.method, config.preset, config.seed) == (method, name, 3)
            assert config.run_name == f"{method}-{name}-s3-{config.digest}"


@pytest.mark.parametrize("setting", fields(RunConfig), ids=lambda setting: setting.name)
def test_the_digest_changes_with_every_setting(setting):
    config = RunConfig(micro_batch=8)  # divides whatever the others become
    changed = replace(config, **{setting.name: another(setting, getattr(config, setting.name))})
    assert getattr(changed, setting.name) != getattr(config, setting.name)
    assert changed.digest != config.digest


def test_the_digest_is_the_same_in_another_process():
    code = "from npo_core.config import resolve_config; print(resolve_config('grpo', 'smoke', 5).run_name)"
    names = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert names == {resolve_config("grpo", "smoke", 5).run_name}


@given(
    tau_gate=st.floats(0, 1),
    learning_rate=st.floats(1e-12, 1.0),
    seed=st.integers(0, 2**40),
    suites=st.lists(st.sampled_from(SUITES), min_size=1, unique=True),
)
def test_json_round_trip(tau_gate, learning_rate, seed, suites):
    config = resolve_config(
        "grpo", "cpu", seed, {"tau_gate": tau_gate, "learning_rate": learning_rate, "suites": suites}
    )
    again = RunConfig.from_mapping(json.loads(config.to_json()))
    assert again == config
    assert (again.digest, again.run_name) == (config.digest, config.run_name)


def test_a_saved_configuration_with_a_stranger_is_refused():
    saved = json.loads(RunConfig().to_json()) | {"comput_steps": 3}
    with pytest.raises(ValueError, match="did you mean 'compute_steps'"):
        RunConfig.from_mapping(saved)


def test_changes_go_through_the_same_checks():
    config = RunConfig()
    assert config.with_changes(tau_gate=0).tau_gate == 0.0
    with pytest.raises(ValueError, match="did you mean 'tau_gate'"):
        config.with_changes(tau_gates=0.5)
    with pytest.raises(TypeError, match="tau_gate"):
        config.with_changes(tau_gate="0.5")
    with pytest.raises(FrozenInstanceError):
        config.tau_gate = 0.5


def test_every_setting_is_described():
    rows = RunConfig.describe()
    assert [row[0] for row in rows] == [setting.name for setting in fields(RunConfig)]
    for name, kind, default, source, meaning in rows:
        assert kind, name
        assert default == getattr(RunConfig(), name)
        assert source in ("paper", "ours"), name
        assert len(meaning) > 10, name
        assert meaning.endswith((".", ")")), name


def test_the_suites_are_those_of_the_world():
    assert SUITES == tasks.SUITES


def test_a_step_has_prompts_times_rollouts():
    assert resolve_config(overrides={"prompts_per_step": 4, "micro_batch": 8}).rollouts_per_step == 32


def test_a_notebook_refuses_a_parameter_that_it_does_not_have():
    allowed = ["preset", "seed", "overrides"]
    check_parameters(["x = 1", '# Parameters\npreset = "smoke"\nseed = 3\n'], allowed)
    with pytest.raises(ValueError, match="Unknown parameter 'sead'; did you mean 'seed'"):
        check_parameters(["# Parameters\nsead = 3\n"], allowed)
