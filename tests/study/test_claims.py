"""Verdicts follow the rules that were written before the runs."""

import json

import pytest
from evidences import evidence

from npo_core.runs.validation import WORLD
from npo_core.study.claims import _early_speed_up, claims, decide, markdown, signal_results, write
from npo_core.study.comparisons import arm_markdown, speed_up_bound
from npo_core.study.families import CLOCKS, FAMILIES, GUIDED, needed_arms
from npo_core.study.results import ResultsRefused
from npo_core.study.verdicts import (
    ABOUT_EQUAL,
    FEW,
    NOT,
    NOT_COMPARABLE,
    NOT_SHOWN,
    OTHER_WAY,
    PARTLY,
    REPRODUCED,
    summary,
    verdict_of,
)

OF_THE_SIGNAL = ("premise", "interior peak", "shapes", "prediction")
UP, DOWN, FLAT = [0.050, 0.051, 0.052], [-0.050, -0.051, -0.052], [-0.05, 0.0, 0.05]
NONE = [0.0, 0.0, 0.0]
EVEN = [0.5 * base + 2 * gain for base, gain in zip((0.40, 0.50, 0.45), UP, strict=True)]
"""Gain over GRPO at the end of a run whose pass rate halfway is GRPO's at the end plus `UP`."""
ENDS = {"NPO early": 30, "NPO late": 30, "NPO": 20, "NPO, exact ratio": 20, "AutoNPO": 30}


def study(**changes):
    gains = {arm: FLAT for arm in needed_arms() if arm != "GRPO"}
    return evidence({**gains, **changes}, ends=ENDS)


def rows(found, signal=None):
    return {(claim.name, claim.clock): claim for claim in claims(found, signal)}


def verdict(found, name, clock="compute", signal=None):
    return rows(found, signal)[name, clock].verdict


@pytest.mark.parametrize(
    ("low", "high", "p", "margin", "word"),
    [
        (0.02, 0.05, 0.01, 0.0, REPRODUCED),
        (0.02, 0.05, None, 0.0, REPRODUCED),
        (0.02, 0.05, 0.06, 0.0, NOT_SHOWN),  # sure by itself, not in its family
        (-0.05, -0.02, 0.01, 0.0, OTHER_WAY),
        (-0.009, 0.008, 0.9, 0.0, ABOUT_EQUAL),
        (-0.011, 0.008, 0.9, 0.0, NOT_SHOWN),
        (-0.009, 0.03, 0.01, -0.01, REPRODUCED),  # at least as good
        (-0.02, 0.03, 0.5, -0.01, NOT_SHOWN),
        (-0.03, -0.011, 0.01, -0.01, OTHER_WAY),
        (None, None, None, 0.0, FEW),
    ],
)
def test_the_rule(low, high, p, margin, word):
    assert verdict_of(low, high, p, margin) == word


def test_a_family_that_agrees_has_one_word_and_another_names_who_has_which():
    assert summary({"a": NOT_SHOWN, "b": NOT_SHOWN}) == NOT_SHOWN
    assert summary({"a": NOT_SHOWN, "b": REPRODUCED, "c": NOT_SHOWN}) == "reproduced: b; not shown: a, c"


def test_every_claim_has_a_row_for_each_of_its_clocks():
    expected = [(name, "") for name in OF_THE_SIGNAL]
    expected += [(family.name, clock) for family in FAMILIES for clock in family.clocks]
    expected += [("early speed-up", clock) for clock in CLOCKS]
    assert [(claim.name, claim.clock) for claim in claims(study())] == [
        *expected,
        ("overhead of AutoNPO", ""),
        ("overhead of NPO", ""),
    ]


def test_no_verdict_is_carried_from_one_clock_to_another():
    gains = dict.fromkeys(GUIDED, UP)
    found = study(**gains, **{"GRPO, groups of 16": NONE, "GRPO, longer": NONE})
    assert verdict(found, "guidance pays") == verdict(found, "guidance pays", "policy") == REPRODUCED
    # four of the six arms end at 656 rollouts, 16 after the checkpoint of the reference, two on it
    grounds = rows(found)["guidance pays", "rollouts"].grounds
    assert grounds.endswith("; references have spent 11 rollouts less on average")
    # GRPO's groups of 16 have spent as much at half their steps, where they are at 3/4 of their end: ahead of nothing
    assert verdict(found, "guidance pays", "rollouts") == REPRODUCED
    # with half of its rollouts the other one is as good as the guided arms, which win nothing at equal rollouts
    found = study(**gains, **{"GRPO, longer": [half_as_good + 1e-4 * seed for seed, half_as_good in enumerate(EVEN)]})
    assert verdict(found, "guidance pays") == REPRODUCED
    assert verdict(found, "guidance pays", "rollouts") == ABOUT_EQUAL
    assert verdict(study(**dict.fromkeys(GUIDED, DOWN)), "guidance pays") == OTHER_WAY
    assert verdict(study(), "guidance pays") == NOT_SHOWN


def test_an_arm_that_is_grpo_itself_has_no_pairs_and_that_is_said():
    gains = {arm: FLAT for arm in needed_arms() if arm not in ("GRPO", "GRPO, best rate")}
    found = evidence(gains, ends=ENDS)
    with pytest.raises(ValueError, match="lack the arms GRPO, best rate"):
        claims(found)
    found.about["same"] = ["GRPO, best rate"]
    row = rows(found)["better than what one tries first", "compute"]
    assert "best rate" not in row.ours and len(row.numbers) == 4
    assert row.grounds.endswith("without GRPO, best rate, which is GRPO itself here")
    assert "No arm of its own here, being GRPO itself: GRPO, best rate." in arm_markdown(found)


def test_an_arm_without_a_policy_at_so_many_rollouts_is_not_comparable_and_counts_in_its_family():
    """RLEP has sampled more before its first step than NPO in all; Holm's family has four pairs all the same."""
    found = study(NPO=[0.05, 0.051, 0.06], AutoNPO=[0.05, 0.06, 0.051], ExGRPO=NONE, LUFFY=NONE)
    found.scores.loc[found.scores["arm"] == "RLEP", "rollouts"] += 1000
    for run in found.about["runs"]:
        run["rollouts"] += 1000 * (run["arm"] == "RLEP")
    row = rows(found)["ordering", "rollouts"]
    assert "not comparable: NPO − RLEP" in row.verdict and FEW not in row.verdict
    assert "NPO − RLEP: RLEP has no policy yet at that many total rollouts" in row.ours
    by_arm = {entry["against"]: entry for entry in row.numbers}
    p = {arm: by_arm[arm]["p"] for arm in ("NPO", "ExGRPO", "LUFFY")}
    assert min(by_arm[arm]["p_holm"] for arm in p) == pytest.approx(4 * min(p.values()))
    assert NOT_COMPARABLE not in rows(found)["ordering", "compute"].verdict


def test_each_guided_arm_has_its_own_verdict():
    found = rows(study(**{"NPO late": UP}))["guidance pays", "compute"]
    assert found.verdict.startswith("reproduced: NPO late; not shown: NPO early")
    assert {entry["arm"]: entry["verdict"] for entry in found.numbers}["NPO late"] == REPRODUCED


def test_controls_are_compared_with_what_they_control():
    found = study(NPO=UP, **{"NPO, own resample": NONE, "NPO, no guide": UP})
    assert verdict(found, "the future is what pays").startswith(
        "reproduced: NPO − NPO, own resample; about equal: NPO, rep"
    )
    assert verdict(found, "the guide is what pays") == ABOUT_EQUAL


def test_the_ordering_asks_for_at_least_as_good_and_better():
    others = dict.fromkeys(("RLEP", "ExGRPO", "LUFFY"), NONE)
    near = [0.0505, 0.0508, 0.0519]
    assert verdict(study(**others, NPO=UP, AutoNPO=near), "ordering") == REPRODUCED
    more = [2 * gain for gain in UP]
    assert "the other way: AutoNPO − NPO" in verdict(study(**others, NPO=more, AutoNPO=UP), "ordering")
    assert (
        "NPO − RLEP" in verdict(study(**{**others, "RLEP": UP}, NPO=UP, AutoNPO=UP), "ordering").split("about equal")[1]
    )


def test_the_correction_is_unnecessary_where_it_is_not_worse_by_more_than_the_margin():
    near = {"NPO": [0.001, 0.002, 0.003], "NPO, exact ratio": [0.002, 0.001, 0.003]}
    assert verdict(study(**near, LUFFY=UP, **{"LUFFY, no correction": NONE}), "correction") == REPRODUCED
    other = verdict(study(**near, LUFFY=NONE, **{"LUFFY, no correction": UP}), "correction")
    assert other == "reproduced: NPO − NPO, exact ratio; the other way: LUFFY − LUFFY, no correction"
    assert "the other way: NPO − NPO, exact" in verdict(study(NPO=DOWN, **{"NPO, exact ratio": NONE}), "correction")


def test_entropy_is_compared_at_equal_policy_step():
    found = study()
    found.scores["entropy"] *= 1 + 0.01 * found.scores["seed"]  # seeds differ
    # made up: a replay has 1.2 times the entropy of the same policy step
    assert verdict(found, "entropy", "policy") == REPRODUCED
    for arm in ("NPO", "AutoNPO"):
        own = found.scores["arm"] == arm
        level = (1 - found.scores["policy_step"] / 100) * (1 + 0.01 * found.scores["seed"])
        found.scores.loc[own, "entropy"] = level[own]
    assert verdict(found, "entropy", "policy") == NOT_SHOWN, "as high as GRPO's: about equal is said of pass rates"


def test_overhead_is_the_share_of_offline_rollouts_by_its_interval():
    found = study()
    row = rows(found)["overhead of NPO", ""]
    assert row.verdict == REPRODUCED and "off-line rollouts 2.4% of all (2.4% to 2.4%), steps done" in row.ours
    for run in found.about["runs"]:
        if run["arm"] == "NPO":
            run["offline_rollouts"] = run["rollouts"] // 5
    assert (
        verdict(found, "overhead of NPO", "") == OTHER_WAY and verdict(found, "overhead of AutoNPO", "") == REPRODUCED
    )


def test_the_speed_up_has_a_row_per_clock_and_says_what_is_possible():
    found = study()
    fast = (found.training["arm"] == "NPO early") & (found.training["branch"] == 1)
    found.training.loc[fast, "pass_rate"] = 10.0
    ends, speed = speed_up_bound(found), {clock: rows(found)["early speed-up", clock] for clock in CLOCKS}
    assert f"no more than {ends.min():.2f} to {ends.max():.2f} is possible" in speed["compute"].grounds
    # at the level with the first step of the replay: that is what is possible
    assert [row["ratio"] for row in speed["compute"].numbers] == pytest.approx(list(ends))
    policy, compute, every = (speed[clock].numbers[0]["ratio"] for clock in CLOCKS)
    assert policy > compute > every
    assert speed["policy"].verdict == REPRODUCED


def test_a_speed_up_that_some_seeds_never_reach_is_not_shown():
    """Two of four seeds are far ahead, the others stay below the level for good: a mean over two is of the lucky."""
    some = evidence({"NPO early": [0.5, 0.5, -0.3, -0.3]}, base=[0.4] * 4, ends=ENDS)
    for row in _early_speed_up(some):
        assert row.verdict == NOT_SHOWN and row.ours.endswith("2 of 4 reach it") and len(row.numbers) == 2
    every = evidence({"NPO early": [0.5] * 4}, base=[0.4] * 4, ends=ENDS, failed=[("NPO early", 3)])
    row = _early_speed_up(every)[0]  # a seed that failed is reported as such; it says nothing of the level
    assert row.verdict == REPRODUCED and "3 of 3 seeds reach it" in row.grounds and row.ours.endswith("without scout")


def test_one_seed_decides_nothing():
    gains = {arm: [0.1] for arm in needed_arms() if arm != "GRPO"}
    found = rows(evidence(gains, base=(0.4,), ends=ENDS))
    assert {claim.verdict for (name, _), claim in found.items() if name not in OF_THE_SIGNAL} == {FEW}


def test_without_the_arms_that_claims_need_there_are_no_verdicts_and_no_file(tmp_path):
    found = evidence({"NPO": UP})
    text = decide(found, tmp_path)
    assert text.startswith("No verdicts") and "LUFFY" in text and not (tmp_path / "claims.json").exists()
    whole = study()
    assert decide(whole, tmp_path) == markdown(claims(whole)) and (tmp_path / "claims.json").is_file()
    with pytest.raises(ValueError, match="lack the arms GRPO, longer"):
        claims(found)


def test_claims_about_the_signal_without_its_file_are_not_measured_and_say_so(tmp_path):
    write(study(), tmp_path)
    kept = {(row["name"], row["clock"]): row for row in json.loads((tmp_path / "claims.json").read_text())["claims"]}
    of_it = [kept[name, ""] for name in OF_THE_SIGNAL]
    assert {row["verdict"] for row in of_it} == {"not measured"}
    assert all("no signal.json" in row["grounds"] and not row["numbers"] for row in of_it)
    assert sum(row["verdict"] == "not measured" for row in kept.values()) == len(OF_THE_SIGNAL)


GRID = [0.0, 10.0, 40.0, 100.0]
BENDS = {"q_inf": 0.5, "tau": 30.0, "q_rmse": 0.01, "beta": 0.02, "v_rmse": 0.1}


def signal(intervals, fit=BENDS):
    """Δ* of 40 on five seeds with these intervals, and one fit for every curve."""
    best = [{"distance": 40.0, "at_edge": False, "low": low, "high": high} for low, high in intervals]
    names = [f"signal{k}_gradient_{mode}" for k in ("", "_1") for mode in ("current", "exact")]
    curves = ("quality", "quality_1", "gradient_current", "gradient_exact")
    entry = {"optimum": dict.fromkeys(names, best), "distances": GRID, "fit": dict.fromkeys(curves, [fit] * 5)}
    entry["premise"] = [[]] * 5
    return {"seeds": [0, 1, 2, 3, 4], "origins": {"0": entry, "100": entry}, "prediction": []}


INSIDE, WIDE = (10.0, 40.0), (0.0, 40.0)


def test_the_peak_is_interior_where_its_interval_is_on_four_of_five_seeds():
    assert verdict(study(), "interior peak", "", signal([INSIDE] * 4 + [WIDE])) == REPRODUCED
    assert verdict(study(), "interior peak", "", signal([INSIDE] * 3 + [WIDE] * 2)) == NOT
    assert verdict(study(), "interior peak", "", signal([(10.0, 100.0)] * 5)) == NOT
    mixed = signal([INSIDE] * 5)
    mixed["origins"]["100"] = signal([WIDE] * 5)["origins"]["100"]
    assert verdict(study(), "interior peak", "", mixed) == PARTLY


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, REPRODUCED),
        ({"v_rmse": 0.5}, PARTLY),  # ln V rises by 2 over the distances
        ({"beta": 0.001, "v_rmse": 0.0}, PARTLY),  # V is flat
        ({"beta": None}, PARTLY),
        ({"q_rmse": 0.2}, PARTLY),
        ({"tau": 5000.0}, PARTLY),  # a straight line
        ({"tau": 0.1}, PARTLY),  # flat from the first distance on
        ({"tau": None}, PARTLY),
        ({"tau": 5000.0, "v_rmse": 0.5}, NOT),
    ],
)
def test_shapes_are_judged_by_their_fits(change, word):
    assert verdict(study(), "shapes", "", signal([INSIDE] * 5, BENDS | change)) == word


def test_the_rows_are_written_and_make_a_table(tmp_path):
    (tmp_path / "signal.json").write_text(json.dumps(signal([INSIDE] * 5) | {"world": WORLD}))
    text = write(study(), tmp_path)
    kept = json.loads((tmp_path / "claims.json").read_text())
    found = claims(study(), signal_results(tmp_path))
    assert len(kept["claims"]) == len(found) and kept["seeds"] == [0, 1, 2]
    lines = text.splitlines()
    assert len(lines) == len(found) + 2 and {line.count("|") for line in lines} == {7}
    assert text == markdown(found) and signal_results(tmp_path / "nowhere") is None
    (tmp_path / "signal.json").write_text(json.dumps(signal([INSIDE] * 5)))
    with pytest.raises(ResultsRefused, match=r"signal\.json is of another small world \(the first one"):
        write(study(), tmp_path)
