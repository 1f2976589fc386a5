"""The premise by hand: shares, the paired control, the adjustment over distances, and the sentence."""

import numpy as np
import pytest
from scipy.stats import binom

from npo_core.method.premise import best, in_words, premise


def rng():
    return np.random.default_rng(0)


def marks(n, *places):
    out = np.zeros(n)
    out[list(places)] = 1.0
    return out


def test_shares_difference_and_test_by_hand():
    failed = marks(50, *range(40))
    own = marks(50, 0, 1)
    [found] = premise(failed, own, {40: marks(50, *range(1, 11))}, rng())
    assert (found.shown.value, found.own.value, found.shown.n) == (10 / 40, 2 / 40, 40)
    assert found.gain.value == pytest.approx(8 / 40)
    # discordant prompts: nine that only the later policy solves, one that only the resample does
    assert found.p_holm == pytest.approx(2 * binom.cdf(1, 10, 0.5))
    assert found.gain.low < found.gain.value < found.gain.high
    # Wilson at 10 of 40, z = 1.959964: (p + z²/2n ± z·sqrt(p(1−p)/n + z²/4n²)) / (1 + z²/n)
    z, n, p = 1.959964, 40, 0.25
    half = z * np.sqrt(p * (1 - p) / n + z**2 / 4 / n**2)
    assert found.shown.low == pytest.approx((p + z**2 / 2 / n - half) / (1 + z**2 / n), abs=1e-6)
    assert found.holds


def test_distances_are_adjusted_together_and_the_best_is_named():
    failed = np.ones(60)
    own = marks(60, 0)
    later = {10: marks(60, 0, 1), 40: marks(60, *range(12)), 80: marks(60, *range(9))}
    found = premise(failed, own, later, rng())
    assert [one.distance for one in found] == [10, 40, 80]
    raw = [1.0, 2 * 0.5**11, 2 * 0.5**8]
    assert [one.p_holm for one in found] == pytest.approx([raw[0], 3 * raw[1], 2 * raw[2]])
    assert [one.holds for one in found] == [False, True, True]
    assert best(found).distance == 40
    assert "Guides from Δ = 40 solve 0.20" in in_words(found, 8)
    assert in_words(found, 8).endswith("the premise holds.")


def test_a_resample_that_does_as_well_says_not_to_expect_a_gain():
    failed, own = np.ones(60), marks(60, *range(20))
    words = in_words(premise(failed, own, {10: marks(60, *range(1, 21))}, rng()), 4)
    assert "in 4 rollouts" in words
    assert "the premise is not shown" in words
    assert words.endswith("Do not expect a gain from the near future.")


def test_few_failures_say_nothing():
    failed = marks(100, *range(10))
    found = premise(failed, np.zeros(100), {10: failed}, rng())
    assert not best(found).holds
    assert "Only 10 prompts" in in_words(found, 8)


def test_one_failed_prompt_has_the_widest_interval():
    [found] = premise(marks(3, 1), np.zeros(3), {10: marks(3, 1)}, rng())
    assert (found.gain.low, found.gain.value, found.gain.high) == (-1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("failed", "own", "later", "message"),
    [
        (np.zeros(4), np.zeros(4), {1: np.zeros(4)}, "fails none of the 4 prompts"),
        (np.ones(4), np.zeros(4), {}, "No later policy"),
        (marks(4, 0), marks(4, 1), {1: np.zeros(4)}, "own: a prompt counts as solved"),
        (marks(4, 0), np.zeros(4), {7: marks(4, 2)}, "7: a prompt counts as solved"),
    ],
)
def test_what_cannot_be_measured_is_refused(failed, own, later, message):
    with pytest.raises(ValueError, match=message):
        premise(failed, own, later, rng())
