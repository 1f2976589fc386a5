"""Arms of the evidence study: every one resolves, differs from the preset as it says, and shares what it can."""

from dataclasses import asdict

import pytest

from npo_core.runs.config import METHOD_SETTINGS, preset_names, resolve_config
from npo_core.stages.prefix import shared_steps
from npo_core.stages.run import CONTROLLERS
from npo_core.study.arms import ABLATIONS, ARMS, SHARED, ablation_configs, arm_config

LONGER = "GRPO, longer"

PRESETS = [name for name in preset_names() if name != "real-smoke"]
"""Presets that every arm fits into; six steps are too few for interventions that come every eight checkpoints."""


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_differs_from_plain_grpo_in_what_it_says_alone(arm, preset):
    config, plain = arm_config(arm, preset, 3), arm_config("GRPO", preset, 3)
    row = ARMS[arm]
    assert (config.method, config.seed, config.preset) == (row.method, 3, preset)
    said = {"method", *METHOD_SETTINGS.get(row.method, {}), *row.settings, *row.grid}
    different = {name for name, value in asdict(config).items() if value != asdict(plain)[name]}
    said |= {"learning_rate"} if row.rate_of else set()
    assert different <= said | ({"compute_steps"} if row.budget != 1 else set())
    changes = row.changes(plain.checkpoint_every)
    assert {name: getattr(config, name) for name in changes} == changes


def test_no_two_arms_are_the_same_run():
    for preset in PRESETS:
        # where the best rate is the preset's own, that arm is GRPO
        same = sum(row.rate_of == preset for row in ARMS.values())
        assert len({arm_config(arm, preset, 0).run_name for arm in ARMS}) == len(ARMS) - same
    assert arm_config("GRPO", "cpu", 0).run_name != arm_config("GRPO", "cpu", 1).run_name


def test_all_arms_have_one_budget_but_the_longer_grpo():
    for preset in PRESETS:
        plain = resolve_config("grpo", preset).compute_steps
        budgets = {arm: arm_config(arm, preset, 0).compute_steps for arm in ARMS}
        assert budgets.pop(LONGER) == 2 * plain
        assert set(budgets.values()) == {plain}
    assert arm_config(LONGER, "cpu", 0).compute_steps == 800


def test_the_longer_grpo_pays_for_the_dearest_arms_offline_rollouts():
    """RLEP samples 8 rollouts of each of 12,800 prompts, 256 of which count as a step: 400 + 400."""
    rlep = arm_config("RLEP", "cpu", 0)
    assert rlep.compute_steps + rlep.train_problems * rlep.cache_rollouts // rlep.rollouts_per_step == 800


def test_every_method_and_kind_is_known():
    assert {arm.method for arm in ARMS.values()} == set(CONTROLLERS)
    assert {arm.kind for arm in ARMS.values()} == {"baseline", "npo", "control"}
    assert all(arm.about for arm in ARMS.values())


def test_overrides_reach_every_arm_but_not_what_makes_it():
    config = arm_config("NPO, exact ratio", "smoke", 0, {"learning_rate": 3e-4, "ratio_mode": "shaped"})
    assert (config.learning_rate, config.ratio_mode) == (3e-4, "exact")
    assert arm_config("GRPO", "smoke", 0, {"checkpoint_keep": 7}).checkpoint_keep == 7
    assert arm_config(LONGER, "smoke", 0, {"compute_steps": 100}).compute_steps == 200
    assert arm_config("GRPO", "smoke", 0).checkpoint_keep == SHARED["checkpoint_keep"] == 0


@pytest.mark.parametrize("preset", ["cpu", "cpu_tuned", "smoke"])
@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_can_be_run_and_changes_what_it_names(name, preset):
    configs = ablation_configs(name, preset, 3)
    setting = next(iter(configs)).partition(" = ")[0]
    values = [getattr(config, setting) for config in configs.values()]
    assert len(values) == len(set(values)) > 1
    assert [f"{setting} = {value}" for value in values] == list(configs)


def test_an_unknown_arm_is_refused():
    with pytest.raises(ValueError, match=r"Unknown arm 'DAPO'. Allowed: GRPO, GRPO, longer"):
        arm_config("DAPO", "cpu", 0)


@pytest.mark.parametrize(
    ("first", "second", "steps"),
    [
        ("GRPO", LONGER, 400),
        ("GRPO", "NPO early", 40),
        ("GRPO", "NPO late", 260),
        ("NPO early", "NPO", 300),
        ("NPO late", "NPO", 40),
        ("NPO", "NPO, exact ratio", 40),
        ("NPO", "NPO, own resample", 40),
        ("NPO late", "NPO, no guide", 40),
        ("GRPO", "NPO, first steps", 20),
        ("GRPO", "NPO, repeated", 80),
        ("NPO, repeated", "NPO, repeated, own", 80),
        ("NPO, repeated", "NPO, no roll-back", 80),
        ("NPO", "NPO, prefix", 40),
        ("AutoNPO", "AutoNPO, no guide", 0),
        ("GRPO", "GRPO, groups of 16", 0),
        ("GRPO", "LUFFY", 0),
        ("LUFFY", "LUFFY, no correction", 0),
        ("GRPO", "ExGRPO", 0),
        ("GRPO", "RLEP", 0),
        ("GRPO", "AutoNPO", 0),
    ],
)
def test_arms_share_the_steps_in_which_they_are_the_same_run(first, second, steps):
    """Preset cpu: scout of 40 steps, late intervention at policy step 260, which is compute step 300 after a scout."""
    configs = arm_config(first, "cpu", 0), arm_config(second, "cpu", 0)
    assert shared_steps(*configs) == shared_steps(*configs[::-1]) == steps


def test_the_study_keeps_the_tries_that_it_began_with():
    for preset in ("cpu", "cpu_tuned"):
        assert resolve_config("autonpo", preset).cache_rollouts == 2
        assert {arm_config(arm, preset, 0).cache_rollouts for arm in ARMS} == {8}
    assert arm_config("AutoNPO", "smoke", 0).cache_rollouts == resolve_config("autonpo", "smoke").cache_rollouts
