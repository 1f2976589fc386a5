"""AutoNPO's decisions: the pool's rules, the trigger on synthetic curves, and the distance against its closed form."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from npo_core.method.trigger import Candidate, Mistake, MistakePool, PlateauTrigger, TriggerSettings, choose_distance


def _warnings(trigger, curve, start=0):
    """Feed (reward, entropy) pairs from step `start`; the warnings, in order."""
    results = [trigger.update(start + i, float(reward), float(entropy)) for i, (reward, entropy) in enumerate(curve)]
    return [warning for warning in results if warning is not None]


def _steps(curve, settings=None):
    return [warning.step for warning in _warnings(PlateauTrigger(settings), curve)]


def _falling(steps, rate=0.01):
    return [math.exp(-rate * step) for step in range(steps)]


# ---- mistake pool


def test_pool_keeps_failures_up_to_the_cutoff_and_a_later_success_does_not_remove_them():
    """What an earlier policy failed and the current one solves is what a replay is guided with."""
    pool = MistakePool()
    assert pool.add("a", 1, 0.125) and pool.add("b", 1, 0.0)
    assert not pool.add("c", 1, 0.25)
    assert "a" in pool and "c" not in pool and len(pool) == 2
    assert not pool.add("a", 2, 0.5)
    assert pool.since(0) == [Mistake("a", 1, 0.125), Mistake("b", 1, 0.0)]


def test_pool_cutoff_holds_for_rounded_fractions():
    assert MistakePool(cutoff=1 / 10).add("a", 0, float(np.float32(0.1)))


def test_newest_entry_wins_and_an_older_outcome_changes_nothing():
    pool = MistakePool()
    pool.add("a", 5, 0.0)
    assert pool.add("a", 9, 0.125)
    assert not pool.add("a", 7, 1.0) and not pool.add("a", 7, 0.0)
    assert pool.since(0) == [Mistake("a", 9, 0.125)]


def test_since_is_the_half_open_interval_sorted_by_step_then_uid():
    pool = MistakePool()
    for uid, step in [("z", 12), ("b", 10), ("c", 11), ("a", 12)]:
        pool.add(uid, step, 0.0)
    assert [(mistake.step, mistake.uid) for mistake in pool.since(10)] == [(11, "c"), (12, "a"), (12, "z")]
    assert pool.since(12) == []


def test_expiry_counts_back_from_the_newest_step_successes_included():
    pool = MistakePool(expiry=10)
    pool.add("a", 0, 0.0)
    pool.add("b", 1, 0.0)
    pool.add("c", 10, 1.0)
    assert "a" in pool
    pool.add("c", 11, 1.0)
    assert "a" not in pool and "b" in pool
    assert not pool.add("late", 0, 0.0) and "late" not in pool


def test_capacity_drops_the_oldest_and_a_renewed_entry_is_young():
    pool = MistakePool(capacity=2)
    for uid, step in [("a", 1), ("b", 1), ("a", 2)]:
        pool.add(uid, step, 0.0)
    assert pool.add("c", 3, 0.0)
    assert [mistake.uid for mistake in pool.since(-1)] == ["a", "c"]
    assert not pool.add("older", 1, 0.0)
    assert len(pool) == 2 and "older" not in pool


@pytest.mark.parametrize("options", [{"cutoff": 1.5}, {"cutoff": math.nan}, {"capacity": 0}, {"expiry": 0}])
def test_pool_refuses_bad_settings(options):
    with pytest.raises(ValueError):
        MistakePool(**options)


@pytest.mark.parametrize(("step", "rate"), [(-1, 0.0), (0, 1.5), (0, math.nan), (0, -0.1)])
def test_pool_refuses_bad_outcomes(step, rate):
    with pytest.raises(ValueError):
        MistakePool().add("a", step, rate)


# ---- trigger


def test_averages_by_hand():
    trigger = PlateauTrigger(TriggerSettings(ema=0.5))
    assert trigger.reward_ema is None and trigger.entropy_ema is None
    trigger.update(0, 1.0, 4.0)
    assert trigger.reward_ema == 1.0 and trigger.entropy_ema == 4.0  # bias correction: the first value counts in full
    trigger.update(1, 0.0, 1.0)
    assert trigger.reward_ema == pytest.approx(1 / 3) and trigger.entropy_ema == pytest.approx(2.0)


def test_warning_holds_the_changes_of_the_window_by_hand():
    # Without averaging: entropy 0.9^t falls by 1 - 0.9^2 = 19 % in a window of 2; the reward rises by 0.001 a step.
    settings = TriggerSettings(ema=0.0, window=2, warmup=3, cooldown=0)
    curve = [(0.5 + 0.001 * step, 0.9**step) for step in range(5)]
    first = _warnings(PlateauTrigger(settings), curve)[0]
    assert first.step == 3
    assert first.reward == pytest.approx(0.503) and first.reward_change == pytest.approx(0.002)
    assert first.entropy == pytest.approx(0.729) and first.entropy_change == pytest.approx(-0.19)


def test_plateau_with_falling_entropy_fires_once_per_cooldown():
    curve = [(0.5, entropy) for entropy in _falling(150)]
    assert _steps(curve[:80]) == [40]
    assert _steps(curve) == [40, 80, 120]


def test_rise_then_plateau_fires_only_after_the_rise():
    curve = [(0.2 + 0.3 * min(step, 100) / 100, entropy) for step, entropy in enumerate(_falling(180))]
    fired = _steps(curve)
    assert fired and 100 < fired[0] <= 130


@pytest.mark.parametrize(
    ("name", "curve"),
    [
        ("rising reward", [(0.2 + 0.003 * step, entropy) for step, entropy in enumerate(_falling(200))]),
        ("flat entropy", [(0.5, 0.8)] * 200),
        ("rising entropy", [(0.5, 0.3 + 0.002 * step) for step in range(200)]),
        ("slowly falling entropy", [(0.5, entropy) for entropy in _falling(200, rate=0.004)]),
        ("zero entropy", [(0.5, 0.0)] * 200),
    ],
)
def test_no_warning_without_both_conditions(name, curve):
    assert _steps(curve) == [], name


def test_a_falling_reward_counts_as_flat():
    assert _steps([(0.6 - 0.003 * step, entropy) for step, entropy in enumerate(_falling(60))]) == [40]


def test_a_constant_reward_is_flat_at_a_tolerance_of_nought():
    trigger = PlateauTrigger(TriggerSettings(reward_tolerance=0.0, warmup=0, cooldown=0))
    fired = [trigger.update(step, 0.3, 0.97**step) is not None for step in range(1, 200)]
    assert fired == [step > 20 for step in range(1, 200)]
    assert trigger.update(200, 0.3 + 1e-9, 0.97**200) is None, "a rise is one, however small"


def test_warmup_and_window_delay_the_first_warning():
    curve = [(0.5, entropy) for entropy in _falling(100)]
    assert _steps(curve, TriggerSettings(warmup=70))[0] == 70
    assert _steps(curve, TriggerSettings(warmup=0))[0] == 20
    assert _steps(curve, TriggerSettings(warmup=0, window=50))[0] == 50


@pytest.mark.parametrize("seed", range(8))
def test_noise_of_a_batch_neither_fires_nor_hides_a_plateau(seed):
    """Binomial noise of 32 prompts x 8 at pass rate 0.5 (deviation 0.031) and 3 % noise of the entropy."""
    generator = np.random.default_rng(seed)
    reward = generator.binomial(256, 0.5, size=200) / 256
    noise = 1 + 0.03 * generator.standard_normal(200)
    assert _steps(zip(reward, 0.8 * noise, strict=True)) == []
    rising = np.clip(reward + 0.0025 * np.arange(200) - 0.25, 0, 1)
    assert _steps(zip(rising, np.array(_falling(200)) * noise, strict=True)) == []
    fired = _steps(zip(reward, np.array(_falling(200)) * noise, strict=True))
    assert fired and fired[0] < 70
    assert all(later - earlier >= 40 for earlier, later in itertools.pairwise(fired))


@pytest.mark.parametrize("at", [50, 100])
def test_one_guide_injection_does_not_fire(at):
    """The reward jumps for one step, or for good, and the entropy doubles for one step."""
    level, spike = (0.5, 0.8), (0.8, 1.6)
    assert _steps([level] * at + [spike] + [level] * 100) == []
    assert _steps([level] * at + [spike] + [(0.55, 0.8)] * 100) == []


@pytest.mark.parametrize(("factor", "fires"), [(2.2, False), (2.4, True)])
def test_the_documented_limit_of_an_entropy_spike(factor, fires):
    """A spike of more than 2.28 times the level is mistaken for a fall: known, and stated in the docstring."""
    assert bool(_steps([(0.5, 0.8)] * 100 + [(0.5, 0.8 * factor)] + [(0.5, 0.8)] * 60)) is fires


def test_reset_forgets_the_history_and_starts_warmup_and_cooldown():
    trigger = PlateauTrigger()
    curve = [(0.5, entropy) for entropy in _falling(200)]
    assert [warning.step for warning in _warnings(trigger, curve[:60])] == [40]
    trigger.reset(20)
    assert trigger.reward_ema is None and trigger.entropy_ema is None
    with pytest.raises(ValueError, match="strictly increase"):
        trigger.update(20, 0.5, 0.5)
    # First update at 21, so the warm-up ends at 61; the cooldown alone would end at 60.
    assert [warning.step for warning in _warnings(trigger, curve[21:80], start=21)] == [61]
    patient = PlateauTrigger(TriggerSettings(warmup=0, cooldown=50))
    patient.reset(20)
    assert [warning.step for warning in _warnings(patient, curve[21:80], start=21)] == [70]


def test_skipped_steps_use_the_latest_step_that_covers_the_window():
    trigger = PlateauTrigger(TriggerSettings(ema=0.0, window=20, warmup=0, cooldown=0))
    assert trigger.update(0, 0.5, 1.0) is None
    assert trigger.update(7, 0.5, 0.9) is None
    assert trigger.update(19, 0.5, 0.5) is None  # nothing is 20 steps back yet
    assert trigger.update(30, 0.5, 0.45).entropy_change == pytest.approx(-0.5)  # against step 7, the latest <= 10


def test_repeating_the_calls_rebuilds_the_state():
    curve = [(0.5, entropy) for entropy in _falling(120)]
    first, again = PlateauTrigger(), PlateauTrigger()
    _warnings(first, curve[:70])
    _warnings(again, curve[:70])
    assert _warnings(first, curve[70:], start=70) == _warnings(again, curve[70:], start=70) != []


@pytest.mark.parametrize("figures", [(math.nan, 1.0), (math.inf, 1.0), (0.5, math.nan), (0.5, math.inf), (0.5, -0.1)])
def test_bad_figures_are_refused_and_leave_the_state(figures):
    trigger = PlateauTrigger()
    trigger.update(0, 0.5, 1.0)
    with pytest.raises(ValueError, match="finite"):
        trigger.update(1, *figures)
    assert trigger.update(1, 0.5, 1.0) is None and trigger.reward_ema == pytest.approx(0.5)


def test_steps_must_increase():
    trigger = PlateauTrigger()
    trigger.update(5, 0.5, 1.0)
    for step in (5, 4):
        with pytest.raises(ValueError, match="strictly increase"):
            trigger.update(step, 0.5, 1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"ema": 1.0},
        {"ema": -0.1},
        {"window": 0},
        {"warmup": -1},
        {"cooldown": -1},
        {"reward_tolerance": -0.01},
        {"reward_tolerance": math.nan},
        {"entropy_drop": 0.0},
        {"entropy_drop": 1.5},
    ],
)
def test_settings_are_validated(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TriggerSettings(**options)


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TriggerSettings().ema = 0.5


# ---- distance


def _candidate(distance, quality, variance, prompts=32):
    return Candidate(distance, 1000 - distance, float(quality), float(variance), prompts)


@pytest.mark.parametrize(("tau", "beta"), [(30.0, 0.01), (60.0, 0.02), (20.0, 0.05), (100.0, 0.004)])
def test_closed_form_optimum(tau, beta):
    """Q = Qinf (1 - exp(-d/tau)), V = exp(beta d): the maximum is at tau ln(1 + 1/(beta tau)), and is unique."""
    distances = range(1, 501)
    candidates = [_candidate(d, 0.8 * (1 - math.exp(-d / tau)), math.exp(beta * d)) for d in distances]
    decision = choose_distance(candidates, quality_floor=0.0)
    optimum = tau * math.log(1 + 1 / (beta * tau))
    assert abs(decision.chosen.distance - optimum) <= 1
    assert decision.chosen.policy_step == 1000 - decision.chosen.distance
    assert not decision.at_edge


def test_monotone_signals_are_flagged_at_both_edges():
    growing = choose_distance([_candidate(d, d / 100, 1.0) for d in (10, 20, 40)])
    assert growing.chosen.distance == 40 and growing.at_edge and "edge" in growing.reason
    shrinking = choose_distance([_candidate(d, 0.5, math.exp(0.1 * d)) for d in (10, 20, 40)])
    assert shrinking.chosen.distance == 10 and shrinking.at_edge


def test_an_edge_is_one_of_all_candidates_not_only_of_the_eligible():
    candidates = [_candidate(10, 0.01, 1.0), _candidate(20, 0.5, 1.1), _candidate(40, 0.5, 2.0)]
    decision = choose_distance(candidates)
    assert decision.chosen.distance == 20 and not decision.at_edge and "edge" not in decision.reason


def test_a_distance_without_probed_prompts_brackets_nothing():
    """The failures of the last few steps may all be missing in the probe; V alone is no estimate of S there."""
    candidates = [_candidate(3, 0.0, 1.4, prompts=0), _candidate(13, 0.06, 1.8), _candidate(23, 0.05, 2.9)]
    decision = choose_distance(candidates)
    assert decision.chosen.distance == 13 and decision.at_edge and "range 13..23" in decision.reason
    assert len(decision.candidates) == 3


def test_signal_is_quality_over_variance_and_ties_go_to_the_smaller_distance():
    candidates = [_candidate(40, 0.5, 2.0), _candidate(10, 0.2, 1.0), _candidate(20, 0.25, 1.0)]
    assert [candidate.signal for candidate in candidates] == [0.25, 0.2, 0.25]
    decision = choose_distance(candidates)
    assert decision.chosen.distance == 20
    assert [candidate.distance for candidate in decision.candidates] == [10, 20, 40]


def test_the_floor_removes_a_cheap_distance_without_quality():
    cheap, dear = _candidate(10, 0.04, 1.0), _candidate(80, 0.3, 20.0)
    assert cheap.signal > dear.signal
    assert choose_distance([cheap, dear], quality_floor=0.05).chosen == dear
    assert choose_distance([cheap, dear], quality_floor=0.04).chosen == cheap == choose_distance([cheap, dear]).chosen


def test_none_eligible_gives_no_distance_and_says_why():
    decision = choose_distance([_candidate(10, 0.0, 1.0), _candidate(20, 0.04, 1.2)], quality_floor=0.05)
    assert decision.chosen is None and not decision.at_edge and len(decision.candidates) == 2
    assert "0.04" in decision.reason and "0.05" in decision.reason


def test_without_probed_prompts_nothing_is_eligible_even_without_a_floor():
    decision = choose_distance([_candidate(10, 0.0, 1.0, prompts=0)], quality_floor=0.0)
    assert decision.chosen is None and "0 prompts" in decision.reason


def test_a_second_moment_at_distance_zero_is_accepted():
    assert choose_distance([_candidate(0, 0.2, 1.0 - 1e-7), _candidate(10, 0.1, 1.0)]).chosen.distance == 0


@pytest.mark.parametrize(
    "change",
    [
        {"variance": 0.5},
        {"variance": math.inf},
        {"variance": math.nan},
        {"quality": math.nan},
        {"quality": 1.5},
        {"quality": -0.1},
        {"prompts": 0},
        {"prompts": -1},
        {"distance": -1},
        {"policy_step": -1},
    ],
)
def test_impossible_candidates_are_refused(change):
    good = {"distance": 10, "policy_step": 5, "quality": 0.5, "variance": 1.2, "prompts": 8}
    Candidate(**good)
    with pytest.raises(ValueError):
        Candidate(**(good | change))


def test_bad_lists_are_refused():
    with pytest.raises(ValueError, match="empty"):
        choose_distance([])
    with pytest.raises(ValueError, match="once"):
        choose_distance([_candidate(10, 0.5, 1.0), _candidate(10, 0.4, 1.0)])
    with pytest.raises(ValueError, match="quality_floor"):
        choose_distance([_candidate(10, 0.5, 1.0)], quality_floor=-0.1)
