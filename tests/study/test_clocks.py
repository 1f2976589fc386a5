"""Arms at equal policy step, compute steps and total rollouts, on results whose scores are known."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from evidences import STEPS, evidence

from npo_core.method.stats import holm
from npo_core.study.arms import ARMS
from npo_core.study.clocks import (
    against_reference,
    at_equal,
    compare,
    ends,
    interpolated,
    reference,
    score_at,
    score_between,
    short_by,
)
from npo_core.study.families import FAMILIES, GUIDED, compared_on, needed_arms

GAINS = [0.01, 0.03, 0.05]


def test_on_the_policy_clock_grpo_is_taken_where_the_arm_ends():
    found = evidence({"NPO": GAINS}, ends={"NPO": 20})
    assert ends(found, "NPO", "policy") == {0: 20, 1: 20, 2: 20}
    # GRPO's line at half the budget is 3/4 of its end
    expected = np.mean([0.41 - 0.30, 0.53 - 0.375, 0.50 - 0.3375])
    assert against_reference(found, "NPO", "policy").value == pytest.approx(expected)
    assert against_reference(found, "NPO", "compute").value == pytest.approx(0.03)


def test_a_score_is_that_of_the_newest_checkpoint_that_has_counted_so_much():
    found = evidence({"NPO": GAINS}, ends={"NPO": 20})
    assert score_at(found, "GRPO", "policy", {0: 25, 1: 40}).to_dict() == pytest.approx({0: 0.30, 1: 0.50})
    assert score_at(found, "GRPO", "policy", {0: 9}).empty
    # NPO passes policy step 10 twice; the later pass, at compute step 30, counts
    start, final = 0.40, 0.41
    late = start / 2 + (final - start / 2) * 30 / STEPS
    assert score_at(found, "NPO", "policy", {0: 10})[0] == pytest.approx(late)


def test_the_one_that_has_counted_more_is_taken_where_the_other_ends():
    """Groups of 16 spend twice the rollouts of a step: at 20 of their 40 steps they have spent what GRPO has in all."""
    found = evidence({"GRPO, groups of 16": [0.1, 0.1, 0.1], "NPO": GAINS}, ends={"NPO": 20})
    assert ends(found, "GRPO, groups of 16", "rollouts") == dict.fromkeys(range(3), 1280)
    base = np.array([0.40, 0.50, 0.45])
    half = base / 2 + (base + 0.1 - base / 2) / 2
    one, other = (
        at_equal(found, "GRPO", "GRPO, groups of 16", "rollouts"),
        at_equal(found, "GRPO, groups of 16", "GRPO", "rollouts"),
    )
    assert one.value == pytest.approx(np.mean(base - half)) and other.value == pytest.approx(-one.value)
    # NPO spent 16 more: still the checkpoint at 20 steps, the newest that has spent at most 656
    assert against_reference(found, "NPO", "rollouts").value == pytest.approx(np.mean(base + GAINS - half))
    # held against an arm that has spent less, NPO itself is taken earlier: at 30 steps it has spent 496, at 40 656
    found = evidence({"NPO": GAINS, "GRPO, entropy bonus": [0.0, 0.0, 0.0]}, ends={"NPO": 20})
    early = base / 2 + (base + GAINS - base / 2) * 30 / STEPS
    assert at_equal(found, "NPO", "GRPO, entropy bonus", "rollouts").value == pytest.approx(np.mean(early - base))


def test_the_reference_is_short_of_rollouts_and_between_checkpoints_it_is_not():
    """NPO spent 656; groups of 16 have checkpoints at 640 and 960, and NPO itself none in between."""
    found = evidence({"GRPO, groups of 16": [0.1, 0.1, 0.1], "NPO": GAINS}, ends={"NPO": 20})
    base = np.array([0.40, 0.50, 0.45])
    steps = 656 / 32
    line = base / 2 + (base + 0.1 - base / 2) * steps / STEPS
    one = interpolated(found, "NPO")
    assert one.value == pytest.approx(np.mean(base + GAINS - line)) and one.against == "GRPO, groups of 16"
    assert one.value < against_reference(found, "NPO", "rollouts").value and short_by(found, "NPO") == 16
    assert score_between(found, "GRPO, groups of 16", {0: 640})[0] == pytest.approx(
        score_at(found, "GRPO, groups of 16", "rollouts", {0: 640})[0]
    )
    assert score_between(found, "GRPO, groups of 16", {0: 10, 1: 5000}).empty, "no checkpoint on one side"
    assert interpolated(found, "GRPO").value == against_reference(found, "GRPO", "rollouts").value
    assert short_by(found, "GRPO") == 0


def test_of_two_references_the_better_one_counts():
    low, high = [-0.2, -0.2, -0.2], [0.3, 0.3, 0.3]
    for longer, groups, best in ((low, high, "GRPO, groups of 16"), (high, low, "GRPO, longer")):
        found = evidence({"NPO": GAINS, "GRPO, longer": longer, "GRPO, groups of 16": groups}, ends={"NPO": 20})
        assert reference(found, "NPO", "rollouts") == best == against_reference(found, "NPO", "rollouts").against
    with pytest.raises(ValueError, match="lack GRPO, longer or GRPO, groups of 16, the reference at equal total"):
        reference(evidence({"NPO": GAINS}), "NPO", "rollouts")
    with pytest.raises(ValueError, match=r"Unknown clock 'wall'\. Allowed: policy, compute, rollouts"):
        ends(found, "NPO", "wall")


def test_a_family_is_adjusted_by_holm_over_the_pairs_that_were_run():
    gains = {arm: [0.01 * (place + 1), 0.02 * (place + 1), 0.045] for place, arm in enumerate(GUIDED[:4])}
    compared = compare(evidence(gains), FAMILIES[0], "compute")
    assert [one.pair.arm for one in compared] == list(GUIDED[:4])
    expected = holm(np.array([one.found.p for one in compared]))
    assert [one.p_holm for one in compared] == pytest.approx(list(expected))
    assert compare(evidence(gains), FAMILIES[0], "rollouts") == [], "no reference was run"


def test_a_margin_shifts_the_test_and_not_the_difference():
    found = evidence({"NPO": [-0.004, -0.005, -0.003], "AutoNPO": [0.0, 0.0, 0.0]})
    plain, shifted = at_equal(found, "NPO", "AutoNPO"), at_equal(found, "NPO", "AutoNPO", margin=-0.01)
    assert plain.value == shifted.value == pytest.approx(-0.004) and plain.low == shifted.low
    values = pd.Series([-0.004, -0.005, -0.003])
    t = abs(values.mean() + 0.01) / (values.std() / np.sqrt(3))
    assert shifted.p == pytest.approx(2 * scipy.stats.t.sf(t, 2))


def test_every_pair_of_a_family_is_an_arm_of_the_study():
    assert set(needed_arms()) <= set(ARMS)
    assert ("NPO", "GRPO, groups of 16") in compared_on("rollouts")
    assert not any(None in pair for clock in ("policy", "compute", "rollouts") for pair in compared_on(clock))
