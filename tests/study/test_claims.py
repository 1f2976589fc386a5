"""Verdicts follow the rules that were written before the runs."""

import json

import pandas as pd
import pytest
from evidences import evidence

from npo_core.study.claims import NEEDED, claims, decide, markdown, signal_results, write
from npo_core.study.comparisons import difference, speed_up_bound
from npo_core.study.verdicts import FEW, NOT, PARTLY, REPRODUCED, in_words, opposite_of, powers, verdict_of

OF_THE_SIGNAL = ("interior peak", "shapes")
UP, DOWN, FLAT = [0.05, 0.06, 0.07], [-0.05, -0.06, -0.07], [-0.05, 0.0, 0.05]


def study(**changes):
    gains = {arm: FLAT for arm in NEEDED if arm != "GRPO"}
    ends = {"NPO early": 30, "NPO late": 30, "NPO": 20, "NPO, exact ratio": 20, "AutoNPO": 30}
    return evidence({**gains, **changes}, ends=ends)


def verdicts(found, signal=None):
    return {claim.name: claim.verdict for claim in claims(found, signal)}


def a_difference(values):
    return difference(pd.Series(values), pd.Series([0.0] * len(values)), names=("a", "b"))


@pytest.mark.parametrize(
    ("compute", "policy", "verdict"),
    [
        ([UP], [], REPRODUCED),
        ([UP, UP], [], REPRODUCED),
        ([UP, FLAT], [], PARTLY),
        ([FLAT], [UP], PARTLY),
        ([FLAT], [FLAT], NOT),
        ([DOWN], [FLAT], NOT),
        ([UP[:1]], [], FEW),
        ([], [], FEW),
    ],
)
def test_the_rule(compute, policy, verdict):
    assert verdict_of([a_difference(v) for v in compute], [a_difference(v) for v in policy]) == verdict


def test_a_difference_on_the_other_side_is_named():
    found = [a_difference(values) for values in (UP, DOWN, FLAT)]
    assert opposite_of(found) == ["a − b"] == opposite_of(found[1:])
    (plateau,) = [claim for claim in claims(study(**{"NPO late": DOWN})) if claim.name == "plateau"]
    assert plateau.opposite == ["NPO late − GRPO"]
    assert f"| {plateau.verdict}; the other way: NPO late − GRPO |" in markdown([plateau])


def test_fewer_seeds_than_the_others_are_said():
    assert in_words([a_difference(UP)]) == "a − b: +0.060 (+0.035 to +0.085)"
    assert in_words([a_difference(UP), a_difference(UP[:2])]).endswith(", 2 seeds")


def test_powers_name_what_is_compared():
    one, other = a_difference(UP), difference(pd.Series(UP), pd.Series(DOWN), names=("a", "c"))
    assert powers([one]) == f"found with power 0.8 if at least: a {one.detectable:.3f}"
    assert "a − b" in powers([one, other]) and "a − c" in powers([one, other])
    assert powers([a_difference(UP[:1])]) == "no interval with fewer than two seeds"


def test_every_claim_of_the_issue_has_a_row():
    assert [claim.name for claim in claims(study())] == [
        *OF_THE_SIGNAL,
        *("early speed-up", "plateau", "Table 1", "ordering", "entropy", "correction", "growing gap", "overhead"),
    ]


def test_a_gain_everywhere_reproduces_and_none_does_not():
    gains = dict.fromkeys(("NPO early", "NPO late", "NPO", "AutoNPO"), UP)
    found = verdicts(study(**gains, LUFFY=UP))
    assert found["plateau"] == found["Table 1"] == REPRODUCED
    found = verdicts(study(**dict.fromkeys(gains, DOWN)))
    assert found["growing gap"] == NOT
    # two interventions above one say nothing where one lies below GRPO
    assert verdicts(study(**{"NPO early": DOWN, "NPO": FLAT}))["growing gap"] == NOT
    more = [2 * gain for gain in UP]
    assert verdicts(study(**{"NPO early": UP, "NPO": more}))["growing gap"] == REPRODUCED
    # behind at equal compute, yet ahead of GRPO's score at the early policy step where these arms end
    assert found["Table 1"] == PARTLY


def test_the_ordering_needs_every_pair():
    others = {arm: [0.0, 0.0, 0.0] for arm in ("RLEP", "ExGRPO", "LUFFY")}
    assert verdicts(study(**others, NPO=UP, AutoNPO=UP))["ordering"] == REPRODUCED
    # AutoNPO clearly behind NPO contradicts AutoNPO ≥ NPO
    more = [2 * gain for gain in UP]
    assert verdicts(study(**others, NPO=more, AutoNPO=UP))["ordering"] == PARTLY
    assert verdicts(study(**{**others, "RLEP": UP}, NPO=UP, AutoNPO=UP))["ordering"] == PARTLY
    assert verdicts(study(**others, NPO=DOWN, AutoNPO=DOWN))["ordering"] == NOT


def test_the_correction_is_unnecessary_where_the_interval_is_within_the_margin():
    near = {"NPO": [0.001, 0.002, 0.003], "NPO, exact ratio": [0.002, 0.001, 0.003]}
    luffy = {"LUFFY": UP, "LUFFY, no correction": [0.0, 0.0, 0.0]}
    assert verdicts(study(**near, **luffy))["correction"] == REPRODUCED
    assert verdicts(study(**near, LUFFY=[0.0] * 3, **{"LUFFY, no correction": UP}))["correction"] == PARTLY
    assert verdicts(study(NPO=UP, **{"NPO, exact ratio": [0.0] * 3}))["correction"] == NOT


def test_entropy_is_compared_at_equal_policy_step_and_against_the_first_pass():
    found = study(**{"NPO, no guide": FLAT})
    (claim,) = [claim for claim in claims(found) if claim.name == "entropy"]
    # made up: 1.2 times the entropy of the same policy step, and an earlier policy step at equal compute
    assert claim.verdict == REPRODUCED
    assert "minus 1: NPO early − its own first pass: +0.200" in claim.compute and "NPO − NPO, no guide" in claim.compute
    # as high as GRPO where GRPO has made as many steps, higher at equal compute: the steps alone
    final = found.scores["final"]
    for arm in ("NPO", "AutoNPO"):
        end = {"NPO": 20, "AutoNPO": 30}[arm]
        found.scores.loc[final & (found.scores["arm"] == arm), "entropy"] = 1 - end / 100
    found.training["entropy"] = 1 - found.training["policy_step"] / 100
    assert verdicts(found)["entropy"] == NOT


def test_overhead_is_the_share_of_offline_rollouts_by_its_interval():
    found = study()
    (claim,) = [claim for claim in claims(found) if claim.name == "overhead"]
    assert (
        claim.verdict == REPRODUCED and "NPO: off-line rollouts 2.4% of all (2.4% to 2.4%), steps done" in claim.compute
    )
    for share, verdict, opposite in ((5, NOT, ["AutoNPO", "NPO"]), (11, REPRODUCED, [])):
        for run in found.about["runs"]:
            run["offline_rollouts"] = run["rollouts"] // share
        (claim,) = [claim for claim in claims(found) if claim.name == "overhead"]
        assert (claim.verdict, list(claim.opposite)) == (verdict, opposite)
    for run in found.about["runs"]:
        if run["arm"] == "NPO":
            run["offline_rollouts"] = run["rollouts"] // 5
    assert verdicts(found)["overhead"] == PARTLY


def test_the_speed_up_is_decided_with_the_scout_and_says_what_is_possible():
    found = study()
    fast = (found.training["arm"] == "NPO early") & (found.training["branch"] == 1)
    found.training.loc[fast, "pass_rate"] = 10.0
    (claim,) = [claim for claim in claims(found) if claim.name == "early speed-up"]
    ends = speed_up_bound(found)
    assert f"no more than {ends.min():.2f} to {ends.max():.2f} is possible" in claim.grounds
    # at the level with the first step of the replay: that is what is possible
    assert [row["with scout"] for row in claim.numbers] == pytest.approx(list(ends))
    assert claim.verdict == PARTLY and "with scout and off-line" in claim.opposite


def test_one_seed_decides_nothing():
    gains = {arm: [0.1] for arm in NEEDED if arm != "GRPO"}
    found = verdicts(evidence(gains, base=(0.4,), ends={"NPO": 20, "NPO early": 30}))
    assert {found[name] for name in set(found) - {"early speed-up", *OF_THE_SIGNAL}} == {FEW}


def test_without_the_arms_that_claims_need_there_are_no_verdicts_and_no_file(tmp_path):
    found = evidence({"NPO": UP})
    text = decide(found, tmp_path)
    assert text.startswith("No verdicts") and "LUFFY, ExGRPO" in text and not (tmp_path / "claims.json").exists()
    whole = evidence({arm: UP for arm in NEEDED if arm != "GRPO"})
    assert decide(whole, tmp_path) == markdown(claims(whole)) and (tmp_path / "claims.json").is_file()


def test_arms_that_a_claim_needs_are_named():
    with pytest.raises(ValueError, match="lack the arms LUFFY, ExGRPO"):
        claims(evidence({"NPO": UP}))


def test_claims_about_the_signal_without_its_file_are_not_measured_and_say_so(tmp_path):
    write(study(), tmp_path)
    kept = {row["name"]: row for row in json.loads((tmp_path / "claims.json").read_text())["claims"]}
    assert len(kept) == 10 and {kept[name]["verdict"] for name in OF_THE_SIGNAL} == {"not measured"}
    assert all("no signal.json" in kept[name]["grounds"] and not kept[name]["numbers"] for name in OF_THE_SIGNAL)
    assert all(row["verdict"] != "not measured" for name, row in kept.items() if name not in OF_THE_SIGNAL)


GRID = [0.0, 10.0, 40.0, 100.0]
BENDS = {"q_inf": 0.5, "tau": 30.0, "q_rmse": 0.01, "beta": 0.02, "v_rmse": 0.1}


def signal(intervals, fit=BENDS):
    """Δ* of 40 on five seeds with these intervals, and one fit for every curve."""
    best = [{"distance": 40.0, "at_edge": False, "low": low, "high": high} for low, high in intervals]
    names = [f"signal{k}_gradient_{mode}" for k in ("", "_1") for mode in ("current", "exact")]
    curves = ("quality", "quality_1", "gradient_current", "gradient_exact")
    entry = {"optimum": dict.fromkeys(names, best), "distances": GRID, "fit": dict.fromkeys(curves, [fit] * 5)}
    return {"seeds": [0, 1, 2, 3, 4], "origins": {"0": entry, "100": entry}}


INSIDE, WIDE = (10.0, 40.0), (0.0, 40.0)


def test_the_peak_is_interior_where_its_interval_is_on_four_of_five_seeds():
    assert verdicts(study(), signal([INSIDE] * 4 + [WIDE]))["interior peak"] == REPRODUCED
    assert verdicts(study(), signal([INSIDE] * 3 + [WIDE] * 2))["interior peak"] == NOT
    assert verdicts(study(), signal([(10.0, 100.0)] * 5))["interior peak"] == NOT
    mixed = signal([INSIDE] * 5)
    mixed["origins"]["100"] = signal([WIDE] * 5)["origins"]["100"]
    assert verdicts(study(), mixed)["interior peak"] == PARTLY


@pytest.mark.parametrize(
    ("change", "verdict"),
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
def test_shapes_are_judged_by_their_fits(change, verdict):
    assert verdicts(study(), signal([INSIDE] * 5, BENDS | change))["shapes"] == verdict


def test_the_rows_are_written_and_make_a_table(tmp_path):
    (tmp_path / "signal.json").write_text(json.dumps(signal([INSIDE] * 5)))
    text = write(study(), tmp_path)
    kept = json.loads((tmp_path / "claims.json").read_text())
    assert len(kept["claims"]) == 10 and kept["seeds"] == [0, 1, 2]
    lines = text.splitlines()
    assert len(lines) == 12 and {line.count("|") for line in lines} == {8}
    assert text == markdown(claims(study(), signal_results(tmp_path)))
    assert signal_results(tmp_path / "nowhere") is None
