"""Benchmark scores, from rigged rollouts: what is averaged, over what, and with which interval."""

from types import SimpleNamespace

import numpy as np
import pytest

from npo_core.stages import evaluation

SAMPLING = {"seed": 0, "max_new_tokens": 16, "temperature": 0.7, "top_p": 0.8, "top_k": 20}


@pytest.fixture
def score(monkeypatch):
    """`score({suite: [[verdicts of an item], …]})`: evaluate on rollouts that are as told; items of suites mixed."""
    asked = {}

    def call(verdicts, **settings):
        rows = [
            {"suite": suite, "verdicts": items[turn]}
            for turn in range(max(map(len, verdicts.values())))
            for suite, items in verdicts.items()
            if turn < len(items)
        ]

        def rigged(model, processor, given, k, verifier, *, advance, **options):
            asked.update(options, k=k, verifier=verifier, model=model)
            for row in given:
                advance(len(row["verdicts"]))
            return [[SimpleNamespace(correct=bool(verdict)) for verdict in row["verdicts"]] for row in given]

        monkeypatch.setattr(evaluation, "shared_rollouts", rigged)
        k = len(rows[0]["verdicts"])
        return evaluation.evaluate("model", "processor", rows, "verifier", k=k, quiet=True, **(SAMPLING | settings))

    call.asked = asked
    return call


def test_the_average_is_over_suites_not_over_items(score):
    result = score({"small": [[1, 1], [1, 0]], "large": [[0, 0], [1, 0], [0, 0], [0, 0], [0, 1], [0, 0]]})
    assert result["suites"] == {"small": pytest.approx(0.75), "large": pytest.approx(1 / 6)}
    assert result["average"] == pytest.approx((0.75 + 1 / 6) / 2)
    assert result["average"] != pytest.approx(5 / 16)
    assert (result["items"], result["k"]) == (8, 2)


def test_intervals_hold_the_value(score):
    rng = np.random.default_rng(0)
    verdicts = {
        name: (rng.random((items, 4)) < rate).tolist()
        for name, items, rate in [("a", 9, 0.2), ("b", 30, 0.6), ("c", 5, 0.9)]
    }
    result = score(verdicts)
    low, high = result["interval"]
    assert 0 <= low < result["average"] < high <= 1
    for suite, value in result["suites"].items():
        low, high = result["suite_intervals"][suite]
        assert 0 <= low <= value <= high <= 1
        assert value == pytest.approx(np.mean(verdicts[suite]))


def test_the_interval_is_over_items_and_narrows_with_them(score):
    def width(items):
        low, high = score({"a": [[1, 1], [0, 0]] * items})["interval"]
        return high - low

    # items of rate 0 or 1: standard error 0.5/√items, 95 % of it 2 · 1.96 times as wide
    assert width(50) == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(100), rel=0.15)
    assert width(50) < width(5) / 2
    # rollouts of one item are not independent items: more of them do not narrow it
    many = score({"a": [[1] * 64, [0] * 64] * 5})["interval"]
    few = score({"a": [[1], [0]] * 5})["interval"]
    assert many == few


@pytest.mark.parametrize("verdict", [0, 1])
def test_a_policy_that_is_always_right_or_wrong(score, verdict):
    result = score({"a": [[verdict] * 3] * 4, "b": [[verdict] * 3] * 2})
    assert result["average"] == verdict
    assert result["interval"] == [verdict, verdict]
    assert result["suites"] == {"a": verdict, "b": verdict}


def test_suites_come_in_the_order_of_the_rows(score):
    result = score({"z": [[1], [0]], "a": [[1], [1]]})
    assert list(result["suites"]) == list(result["suite_intervals"]) == ["z", "a"]


def test_the_sampling_is_what_was_asked_for_and_nothing_is_scored(score):
    score({"a": [[1, 0, 0], [1, 1, 1]]}, seed=5, temperature=0.9)
    expected = SAMPLING | {"seed": 5, "temperature": 0.9, "k": 3, "score": False}
    assert expected.items() <= score.asked.items()
    assert (score.asked["model"], score.asked["verifier"]) == ("model", "verifier")


def test_the_same_seed_gives_the_same_intervals(score):
    verdicts = {"a": [[1, 0], [0, 0], [1, 1]]}
    assert score(verdicts) == score(verdicts)
