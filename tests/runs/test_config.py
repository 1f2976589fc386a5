"""Configuration: what is refused and how, what the digest depends on, and that every preset resolves."""

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from otherwise import pair

from npo_core.declaration import declarations
from npo_core.runs.config import (
    METHOD_SETTINGS,
    RunConfig,
    load_preset,
    preset_names,
    resolve_config,
)
from npo_core.runs.settings import Method
from npo_core.runs.validation import SUITES
from npo_core.world import tasks


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


def test_data_of_ones_own_has_suites_of_its_own():
    own = {"eval_problems": 2, "data": "own.jsonl", "policy": "org/model"}
    assert resolve_config(overrides=own).eval_problems == 2


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
        ({"eval_problems": 2 * len(SUITES) - 1}, f"at least two for each of the {len(SUITES)} suites"),
        (
            {"eval_problems": 1, "data": "own.jsonl", "policy": "org/model"},
            "eval_problems is 1; it must be at least two, for an interval",
        ),
        ({"replay_share": 1.1}, "replay_share is 1.1; it must be a number from 0 to 1"),
        ({"replay_start": -0.1}, "replay_start"),
        ({"replay_keep": 0}, "replay_keep is 0; it must be at least 1"),
        ({"entropy_bonus": -0.001}, "entropy_bonus is -0.001; it must be at least 0"),
        ({"guides_per_group": 0}, "guides_per_group is 0; it must be at least 1"),
    ],
)
def test_a_value_out_of_range_is_refused(overrides, complaint):
    with pytest.raises(ValueError, match=complaint):
        resolve_config(overrides=overrides)


@pytest.mark.parametrize(
    ("method", "overrides", "complaint"),
    [
        (
            "grpo",
            {"guide_from": "own"},
            "guide_from is 'own'; it must be \"future\" for method grpo, which has no replay",
        ),
        ("autonpo", {"roll_back": False, "guide_from": "own"}, "guide_from is 'own'; .* without roll-back"),
        ("autonpo", {"roll_back": False, "guide_from": "none"}, "guide_from is 'none'; .* without roll-back"),
        ("npo", {"repeat_every": 20, "repeat_back": 0, "guide_from": "own"}, "guide_from is 'own'; .* without roll-"),
        ("luffy", {"guide_from": "none"}, "guide_from is 'none'; .* method luffy"),
        ("autonpo", {"random_interventions": 1}, "random_interventions is 1; it must be 0 for method autonpo"),
        ("grpo", {"random_interventions": 2}, "random_interventions is 2; it must be 0 for method grpo"),
        ("npo", {"random_interventions": 1}, "checkpoint_keep is 20; it must be 0 with random_interventions"),
        ("npo", {"random_interventions": 1, "compute_steps": 19}, "compute_steps is 19; it must be at least 20"),
        ("npo", {"placement": "append"}, "placement is 'append'; it must be \"replace\" for method npo"),
        ("npo", {"guides_per_group": 2}, "method is 'npo'; it must be \"rlep\", the one with several guides"),
        ("rlep", {"compute_steps": 200}, "rlep_source_steps is 200; it must be below compute_steps = 200"),
        ("rlep", {"rlep_source_steps": 401}, "rlep_source_steps is 401; it must be below compute_steps = 400"),
        ("rlep", {"placement": "replace", "guides_per_group": 8}, "guides_per_group is 8; it must be at most 7"),
        ("rlep", {"placement": "prepend"}, "placement is 'prepend'; did you mean 'append'"),
        ("luffy", {"guide_behaviour": "two"}, "guide_behaviour is 'two'. Allowed: 'stored', 'one'"),
        ("luffy", {"advantage_scale": "batch"}, "advantage_scale is 'batch'"),
    ],
)
def test_settings_of_the_baselines_and_controls_that_contradict_the_method_are_refused(method, overrides, complaint):
    with pytest.raises(ValueError, match=complaint):
        resolve_config(method, "cpu", overrides=overrides)


def test_other_methods_do_not_mind_the_length_of_rleps_earlier_run():
    assert resolve_config("grpo", overrides={"compute_steps": 3}).rlep_source_steps == 200


def test_random_interventions_leave_the_planned_ones_out_of_account():
    with pytest.raises(ValueError, match="compute_steps is 100"):
        resolve_config("npo", overrides={"compute_steps": 100})
    assert resolve_config("npo", overrides={"compute_steps": 100, "random_interventions": 1, "checkpoint_keep": 0})


def test_a_methods_own_settings_win_over_the_presets_and_lose_to_overrides():
    assert load_preset("smoke")["cache_rollouts"] == 4
    config = resolve_config("rlep", "smoke")
    assert {name: getattr(config, name) for name in METHOD_SETTINGS["rlep"]} == METHOD_SETTINGS["rlep"]
    assert resolve_config("rlep", "smoke", overrides={"cache_rollouts": 5}).cache_rollouts == 5
    assert resolve_config("luffy", "smoke", overrides={"ratio_mode": "current"}).ratio_mode == "current"
    assert not set(METHOD_SETTINGS) & {"grpo", "npo", "autonpo"}


def test_a_group_has_rows_for_what_is_appended_and_a_step_samples_only_its_own():
    rlep = resolve_config("rlep", "cpu")
    assert (rlep.group_rows, rlep.num_generations, rlep.rollouts_per_step) == (10, 8, 256)
    assert resolve_config("luffy", "cpu").group_rows == resolve_config("grpo", "cpu").group_rows == 8


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
        for method in get_args(Method):
            config = resolve_config(method, name, seed=3)
            assert (config.method, config.preset, config.seed) == (method, name, 3)
            assert config.run_name == f"{method}-{name}-s3-{config.digest}"


@pytest.mark.parametrize("setting", fields(RunConfig), ids=lambda setting: setting.name)
def test_the_digest_changes_with_every_setting_that_decides(setting):
    config, changed = pair(setting)
    assert (changed.digest != config.digest) == setting.metadata["setting"].names_run
    declared = setting.metadata["setting"]
    for settings in (config, changed):
        as_before = declared.later and getattr(settings, setting.name) == declared.had
        assert (setting.name in settings.deciding()) == (declared.names_run and not as_before)


def test_later_settings_are_those_that_came_after_runs_were_named():
    """As those had them they are no part of the name, see above, so that earlier runs are found under theirs."""
    later = {name: setting.had for name, setting in declarations(RunConfig).items() if setting.later}
    assert later == {"score_threshold": 1.0, "mask_unsampled": False, "box_ends": False}


def test_a_run_that_was_made_before_a_setting_is_read_as_it_was_made():
    """Else its first steps would be taken for those of a run whose loss has another vocabulary."""
    config = resolve_config("grpo", "cpu", overrides={"mask_unsampled": False})
    written = json.loads(config.to_json())
    del written["mask_unsampled"]
    assert RunConfig.of_run(written) == config and config.digest != resolve_config("grpo", "cpu").digest
    assert RunConfig.of_run(json.loads(resolve_config("grpo", "cpu").to_json())) == resolve_config("grpo", "cpu")


def test_trackers_addresses_and_what_is_kept_for_a_reader_decide_nothing():
    nameless = {name for name, setting in declarations(RunConfig).items() if not setting.names_run}
    alarms = {"alarm_rise", "alarm_clipped"}
    assert nameless == {"report_to", "vllm_host", "vllm_port", "gpu_memory", "record_mib"} | alarms


def test_the_digest_is_the_same_in_another_process():
    code = "from npo_core.runs.config import resolve_config; print(resolve_config('grpo', 'smoke', 5).run_name)"
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


def test_the_suites_are_those_of_the_world():
    assert SUITES == tasks.SUITES


def test_a_step_has_prompts_times_rollouts():
    assert resolve_config(overrides={"prompts_per_step": 4, "micro_batch": 8}).rollouts_per_step == 32
