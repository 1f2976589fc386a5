"""Comparisons of the study, on results whose differences are known."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from evidences import STEPS, SUITES, evidence

from npo_core.study.clocks import against_reference, interpolated
from npo_core.study.comparisons import (
    END_STEPS,
    arm_markdown,
    arm_table,
    between,
    broken,
    by_suite,
    primary,
    secondary_markdown,
    speed_up,
)
from npo_core.study.differences import difference
from npo_core.study.families import GUIDED
from npo_core.study.results import Evidence

GAINS = [0.01, 0.03, 0.05]


def test_a_difference_is_paired_by_seed():
    found = against_reference(evidence({"NPO": GAINS}), "NPO")
    half = scipy.stats.t.ppf(0.975, 2) * np.std(GAINS, ddof=1) / np.sqrt(3)
    assert (found.value, found.low, found.high) == pytest.approx((0.03, 0.03 - half, 0.03 + half))
    assert found.p == pytest.approx(scipy.stats.ttest_rel([0.41, 0.53, 0.50], [0.40, 0.50, 0.45]).pvalue)
    assert found.seeds == 3 and found.text == f"+0.030 ({0.03 - half:+.3f} to {0.03 + half:+.3f})"
    # of nine pairs of runs seven have the arm ahead, one is a tie: 0.50 against 0.50
    assert found.improvement == pytest.approx((6 + 0.5) / 9)


def test_seeds_that_one_side_lacks_are_left_out_and_counted():
    found = against_reference(evidence({"NPO": GAINS}, failed=[("NPO", 2)]), "NPO")
    assert found.seeds == 2 and found.value == pytest.approx(0.02)
    single = against_reference(evidence({"NPO": GAINS}, failed=[("NPO", 2), ("GRPO", 0)]), "NPO")
    assert single.value == pytest.approx(0.03)
    assert (single.seeds, single.low, single.p, single.detectable) == (1, None, None, None)
    none = difference(pd.Series({0: 1.0}), pd.Series({1: 1.0}), names=("a", "b"))
    assert (none.value, none.seeds, none.text) == (None, 0, "–")


def test_every_arm_is_held_against_the_reference_of_each_clock():
    found = evidence({"NPO": GAINS, "RLEP": GAINS, "GRPO, groups of 16": [0.0, 0.0, 0.0]}, ends={"NPO": 20})
    table = primary(found).set_index(["arm", "clock"])
    assert table.loc[("NPO", "policy"), "against"] == table.loc[("NPO", "compute"), "against"] == "GRPO"
    assert table.loc[("NPO", "rollouts"), "against"] == "GRPO, groups of 16"
    # the reference of a clock has no row on it, and one that spends more has none on the others
    assert ("GRPO", "compute") not in table.index and ("GRPO, groups of 16", "rollouts") not in table.index
    assert ("GRPO", "rollouts") in table.index
    assert np.isfinite(table.loc[("NPO", "compute"), "p_holm"]) and pd.isna(table.loc[("RLEP", "compute"), "p_holm"])


def test_two_arms_and_each_suite():
    found = evidence({"NPO": GAINS, "RLEP": [0.02, 0.02, 0.02]})
    assert between(found, "NPO", "RLEP").value == pytest.approx(0.01)
    table = by_suite(found, "NPO").set_index("suite")
    assert list(table.index) == list(SUITES)
    assert table["value"].tolist() == pytest.approx([0.03, 0.03])
    assert table["p_holm"].tolist() == pytest.approx([min(1, 2 * p) for p in table["p"]])


def test_the_table_of_arms():
    found = evidence({"NPO": GAINS}, ends={"NPO": 20}, failed=[("NPO", 0)])
    table = arm_table(found, np.random.default_rng(0)).set_index("arm")
    assert table.loc["GRPO", "pass rate"] == pytest.approx(0.45)
    assert table.loc["NPO", ["seeds", "failed", "interventions", "policy steps"]].tolist() == [2, 1, 1, 20]
    assert table.loc["NPO", "equal compute steps"].startswith("+0.040")
    assert table.loc["GRPO", "pass@8 at T = 1"] == pytest.approx(0.65)
    assert table.loc["GRPO", "IQM low"] <= table.loc["GRPO", "IQM"] <= table.loc["GRPO", "IQM high"]


def test_the_table_of_arms_in_words_is_bold_where_a_difference_is_sure():
    up, wide = [0.10, 0.11, 0.12], [-0.1, 0.0, 0.2]
    found = evidence({"LUFFY": up, "NPO": wide, "GRPO, longer": up, "NPO, own resample": up}, ends={"NPO": 20})
    rows = [row.strip("| ").split(" | ") for row in arm_markdown(found).splitlines() if row.startswith("| ")][1:]
    table = {row[0]: row[1:] for row in rows}
    assert table["LUFFY"][3] == f"**{against_reference(found, 'LUFFY').text}**"
    assert table["NPO"][3] == against_reference(found, "NPO").text and table["NPO"][5] == "16"
    assert table["NPO"][6:] == ["20", "40", "16", "656", "6,400"], "what it has spent"
    assert table["NPO, own resample"][3].startswith("**+0.110") and table["NPO, own resample"][0] == "3 of 3"
    assert table["LUFFY"][4] == f"**{against_reference(found, 'LUFFY', 'rollouts').text}**" != table["LUFFY"][3]
    assert "At equal total rollouts against GRPO, longer: GRPO; LUFFY; NPO; " in arm_markdown(found)
    line = next(row for row in secondary_markdown(found).splitlines() if row.startswith("| NPO |"))
    assert line.strip("| ").split(" | ")[-1] == interpolated(found, "NPO").text
    # the second of six guided arms: sure by itself, not after Holm's adjustment
    close = evidence({arm: [0.10, 0.11, 0.16] for arm in GUIDED})
    lone = against_reference(close, "NPO")
    assert lone.low > 0 and 6 * lone.p > 0.05
    assert all("**" not in line for line in arm_markdown(close).splitlines())


def test_secondary_endpoints_in_words():
    """Each column has its own known difference, and two more suites lie far off on either side of the other two."""
    up, wide = [0.10, 0.11, 0.12], [-0.1, 0.0, 0.2]
    found = evidence({"LUFFY": up, "NPO": wide})
    scores = found.scores
    far = [
        scores[scores["suite"] == "mathvista"].assign(suite=name, pass_rate=rate)
        for name, rate in (("low", 0.0), ("high", 1.0))
    ]
    scores = pd.concat([scores, *far], ignore_index=True)
    own = scores["arm"] == "LUFFY"
    scores.loc[own & (scores["suite"] == "high"), "pass_rate"] = 0.8  # a mean would see this
    scores.loc[own & (scores["sampling"] == "plain"), "pass_rate"] += 0.2
    scores.loc[own & (scores["sampling"] == "plain"), "pass_at_8"] += 0.3
    scores.loc[own & (scores["sampling"] == "paper"), ["entropy", "all_wrong_groups"]] += [0.4, -0.3]
    found = Evidence(scores, found.training, {**found.about, "suites": [*SUITES, "low", "high"]})
    rows = [row.strip("| ").split(" | ") for row in secondary_markdown(found).splitlines()[2:]]
    table = {row[0]: row[1:] for row in rows}
    assert table["LUFFY"][1].startswith("**+0.110 (") and table["NPO"][1].startswith("+0.033 (")
    plain = (2 * 0.11 - 0.2) / 4 + 0.2
    assert table["LUFFY"][3].startswith(f"**{plain:+.3f} ("), "avg@8 at T = 1"
    assert table["LUFFY"][4].startswith(f"**{0.11 + 0.3:+.3f} ("), "pass@8 at T = 1"
    assert table["LUFFY"][5] == "**+0.400 (+0.400 to +0.400)**", "entropy"
    assert table["LUFFY"][6] == "**-0.300 (-0.300 to -0.300)**", "all-wrong groups"
    # Holm over four suites; "high" differs by the same in all seeds, and then a sign test says 0.25
    assert 4 * scipy.stats.ttest_1samp(up, 0).pvalue < 0.05
    assert table["LUFFY"][7] == "mathvista +0.11, mmstar +0.11"
    assert table["NPO"][7:] == ["none"], "and no reference at equal total rollouts"
    assert table["NPO"][2] == f"{between(found, 'NPO', 'GRPO').improvement:.2f}"
    assert table["GRPO"][1:3] == ["", ""] and table["GRPO"][5] == "0.600"
    lone = evidence({"NPO": [0.1]}, base=[0.4])
    assert "| NPO | 0.500 | +0.100 | 1.00 | +0.100 |" in secondary_markdown(lone)


def test_an_arm_with_more_steps_than_grpo_has_no_equal_step():
    found = evidence({"GRPO, longer": GAINS})
    for run in found.about["runs"]:
        run["policy_steps"] += 10 * (run["arm"] == "GRPO, longer")
        run["compute_steps"] += 10 * (run["arm"] == "GRPO, longer")
    table = arm_table(found, np.random.default_rng(0)).set_index("arm")
    assert table.loc["GRPO, longer", ["equal policy step", "equal compute steps"]].tolist() == [None, None]
    (row,) = [row for row in arm_markdown(found).splitlines() if row.startswith("| GRPO, longer")]
    assert row.split(" | ")[3:6] == ["", "", ""]


@pytest.mark.parametrize("lost", ["NPO", "GRPO", "GRPO, longer"])
def test_an_arm_of_which_no_seed_is_finished_stands_in_the_tables_without_numbers(lost):
    failed = [(lost, seed) for seed in range(3)] + [("LUFFY", 0)]
    found = evidence({"NPO": GAINS, "LUFFY": GAINS, "GRPO, longer": GAINS}, ends={"NPO": 20}, failed=failed)
    text = arm_markdown(found)
    table = {row.split(" | ")[0].strip("| "): row.strip("| ").split(" | ")[1:] for row in text.splitlines()}
    assert table[lost][:2] == ["0 of 3", "–"] and table["LUFFY"][0] == "2 of 3"
    assert text.endswith(f"{lost}, seed 2: exit status 1; LUFFY, seed 0: exit status 1.")
    for shown in (text, secondary_markdown(found)):
        assert "nan" not in shown and "None" not in shown


def test_runs_that_broke_are_named_and_stay_in_the_means():
    found = evidence({"NPO": GAINS})
    whole = arm_markdown(found)
    training = found.training
    ended = (training["arm"] == "NPO") & (training["seed"] == 1) & (training["compute_step"] > STEPS - END_STEPS)
    assert broken(found) == {} and "Hardly anything right" not in whole
    training.loc[ended, "pass_rate"] = 0.0
    training.loc[ended & (training["compute_step"] == STEPS), "pass_rate"] = 0.19  # 0.0095 on average
    assert broken(found) == {"NPO": [1]}
    table, said = arm_markdown(found).split(
        "\n\nHardly anything right in the last 20 steps, and counted in the means: "
    )
    assert said == "NPO, seed 1." and table == whole


def test_entropy_and_all_wrong_groups_are_compared_at_equal_policy_step():
    """The arm ends at policy step 20 with what GRPO has there; GRPO's own end is elsewhere."""
    found = evidence({"NPO": GAINS}, ends={"NPO": 20})
    for name in ("entropy", "all_wrong_groups"):
        found.scores[name] = found.scores["policy_step"] / 100
    row = next(row for row in secondary_markdown(found).splitlines() if row.startswith("| NPO"))
    assert row.strip("| ").split(" | ")[6:8] == ["+0.000 (+0.000 to +0.000)"] * 2


def test_the_speed_up_counts_scout_and_offline_rollouts():
    """GRPO's rate r(t) on a line; the arm is at once at its end in the branch after the scout of 20 steps."""
    found = evidence({"NPO early": GAINS}, ends={"NPO early": 20})
    fast = (found.training["arm"] == "NPO early") & (found.training["branch"] == 1)
    found.training.loc[fast, "pass_rate"] = 10.0
    table = speed_up(found)
    # the replay starts from the scout's beginning, so its first step has policy step 1 and compute step 21
    slow = (table["without scout"] * 1).to_numpy()
    assert table["with scout"].to_numpy() == pytest.approx(slow / 21)
    # 16 off-line rollouts are one step's worth
    assert table["with scout and off-line"].to_numpy() == pytest.approx(slow / 22)
    assert np.all((slow > 1) & (slow <= STEPS))


def test_a_level_that_is_not_reached_is_no_number():
    found = evidence({"NPO early": GAINS}, ends={"NPO early": 20})
    found.training.loc[found.training["arm"] == "NPO early", "pass_rate"] = 0.0
    assert speed_up(found).isna().all().all()
