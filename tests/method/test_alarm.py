"""The alarm for a run that falls apart: what rises without reward, and responses that are cut off."""

import math

import pytest

from npo_core.method.alarm import Alarm, AlarmSettings

PLAIN = AlarmSettings(ema=0.0, window=4, reward_tolerance=0.01, rise=0.5, clipped=0.5)
"""Without averaging, so that every figure counts as it is."""


def complaints(settings, **figures):
    """Steps and first words of all complaints; figures are lists over steps."""
    alarm, found = Alarm(settings), []
    for step in range(max(map(len, figures.values()))):
        for text in alarm.update(step, {name: values[step] for name, values in figures.items()}):
            found.append((step, text.split()[0]))
    return found


@pytest.mark.parametrize("name", ["entropy", "length"])
def test_a_rise_without_reward_is_said_once_at_the_step_where_the_window_first_shows_it(name):
    values = [2.0, 2.0, 2.0, 2.0, 2.9, 3.0, 4.0, 5.0]
    # 2.9 is 45 % more than four steps before, 3.0 is 50 %
    assert complaints(PLAIN, reward=[0.3] * 8, **{name: values}) == [(5, name)]


def test_a_rise_with_reward_is_learning():
    values = [2.0 + step for step in range(8)]
    assert complaints(PLAIN, reward=[0.01 * step for step in range(8)], length=values) == []
    # over four steps 0.0025 a step is exactly the tolerance
    assert complaints(PLAIN, reward=[0.002 * step for step in range(8)], length=values) == [(4, "length")]


def test_a_complaint_that_ended_is_made_again():
    values = [2.0, 2.0, 2.0, 2.0, 3.0, 2.0, 2.0, 2.0, 2.0, 3.0, 3.0]
    assert complaints(PLAIN, reward=[0.3] * 11, entropy=values) == [(4, "entropy"), (9, "entropy")]


def test_cut_off_responses_above_the_limit_are_said_after_a_window():
    shares = [0.9, 0.5, 0.5, 0.5, 0.5, 0.51, 0.6]
    assert complaints(PLAIN, reward=[0.3] * 7, clipped=shares) == [(5, "51")]


def test_zero_turns_an_alarm_off():
    off = AlarmSettings(ema=0.0, window=2, rise=0.0, clipped=0.0)
    assert complaints(off, reward=[0.0] * 6, entropy=[4.0**step for step in range(6)], clipped=[1.0] * 6) == []


def test_figures_that_are_missing_or_not_finite_are_passed_over():
    alarm = Alarm(PLAIN)
    for step in range(4):
        assert alarm.update(step, {"reward": 0.3, "entropy": math.nan if step % 2 else 1.0}) == []
    assert alarm.update(4, {"entropy": math.inf}) == []
    assert [text.split()[0] for text in alarm.update(5, {"reward": 0.3, "entropy": 2.0})] == ["entropy"]


def test_averages_are_those_of_the_trigger_and_a_reset_forgets_them():
    alarm = Alarm(AlarmSettings(ema=0.5, window=1, rise=0.5))
    assert alarm.update(1, {"reward": 0.0, "entropy": 1.0}) == []
    # bias-corrected: (0.5 * 0.5 * 1 + 0.5 * x) / 0.75, which is 1.5 at x = 1.75
    assert alarm.update(2, {"reward": 0.0, "entropy": 1.7499}) == []
    alarm.reset()
    assert alarm.update(1, {"reward": 0.0, "entropy": 1.0}) == []
    (text,) = alarm.update(2, {"reward": 0.0, "entropy": 1.75})
    assert text == "entropy rose from 1 to 1.5 nats per token in 1 steps, reward by +0.000"
