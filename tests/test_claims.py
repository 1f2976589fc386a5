"""Verdicts follow the rules that were written before the runs."""

import json

import pandas as pd
import pytest
from evidences import evidence

from npo_core.claims import (
    FEW,
    NEEDED,
    NOT,
    PARTLY,
    REPRODUCED,
    claims,
    markdown,
    signal_results,
    verdict_of,
    write,
)
from npo_core.comparisons import difference

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


def test_every_claim_of_the_issue_has_a_row():
    assert [claim.name for claim in claims(study())] == [
        *("early speed-up", "plateau", "Table 1", "ordering", "entropy", "correction", "growing gap", "overhead")
    ]


def test_a_gain_everywhere_reproduces_and_none_does_not():
    gains = dict.fromkeys(("NPO early", "NPO late", "NPO", "AutoNPO"), UP)
    found = verdicts(study(**gains, LUFFY=UP))
    assert found["plateau"] == found["Table 1"] == REPRODUCED
    found = verdicts(study(**dict.fromkeys(gains, DOWN)))
    assert found["growing gap"] == NOT
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


def test_entropy_is_compared_on_both_clocks_and_against_the_first_pass():
    (claim,) = [claim for claim in claims(study()) if claim.name == "entropy"]
    # made up: 1.2 times the entropy of the same policy step, and an earlier policy step at equal compute
    assert claim.verdict == REPRODUCED
    assert "minus 1: NPO − its own first pass: +0.200" in claim.compute


def test_overhead_is_the_share_of_offline_rollouts():
    found = study()
    (claim,) = [claim for claim in claims(found) if claim.name == "overhead"]
    assert claim.verdict == REPRODUCED and "off-line rollouts 2.4% of all, steps done again 50.0%" in claim.compute
    for run in found.about["runs"]:
        run["offline_rollouts"] = run["rollouts"] // 5
    assert verdicts(found)["overhead"] == PARTLY


def test_one_seed_decides_nothing():
    gains = {arm: [0.1] for arm in NEEDED if arm != "GRPO"}
    found = verdicts(evidence(gains, base=(0.4,), ends={"NPO": 20, "NPO early": 30}))
    assert {found[name] for name in set(found) - {"early speed-up"}} == {FEW}


def test_arms_that_a_claim_needs_are_named():
    with pytest.raises(ValueError, match="lack the arms LUFFY, ExGRPO"):
        claims(evidence({"NPO": UP}))


def signal(interior, fits):
    best = [{"distance": 20, "at_edge": not inside} for inside in interior]
    names = [f"signal{k}_gradient_{mode}" for k in ("", "_1") for mode in ("current", "exact")]
    entry = {"optimum": dict.fromkeys(names, best), "fit": {"quality": [fits] * 5}}
    return {"seeds": [0, 1, 2, 3, 4], "origins": {"0": entry, "100": entry}}


GOOD = {"q_inf": 0.5, "q_rmse": 0.01, "v_rmse": 0.1}


def test_the_peak_is_interior_on_four_of_five_seeds():
    assert verdicts(study(), signal([True] * 4 + [False], GOOD))["interior peak"] == REPRODUCED
    assert verdicts(study(), signal([True] * 3 + [False] * 2, GOOD))["interior peak"] == NOT
    mixed = signal([True] * 5, GOOD)
    mixed["origins"]["100"] = signal([False] * 5, GOOD)["origins"]["100"]
    assert verdicts(study(), mixed)["interior peak"] == PARTLY


def test_shapes_are_judged_by_the_error_of_their_fits():
    assert verdicts(study(), signal([True] * 5, GOOD))["shapes"] == REPRODUCED
    assert verdicts(study(), signal([True] * 5, GOOD | {"v_rmse": 0.9}))["shapes"] == PARTLY
    assert verdicts(study(), signal([True] * 5, {"q_inf": 0.1, "q_rmse": 0.1, "v_rmse": 0.9}))["shapes"] == NOT


def test_the_rows_are_written_and_make_a_table(tmp_path):
    (tmp_path / "signal.json").write_text(json.dumps(signal([True] * 5, GOOD)))
    text = write(study(), tmp_path)
    kept = json.loads((tmp_path / "claims.json").read_text())
    assert len(kept["claims"]) == 10 and kept["seeds"] == [0, 1, 2]
    lines = text.splitlines()
    assert len(lines) == 12 and {line.count("|") for line in lines} == {8}
    assert text == markdown(claims(study(), signal_results(tmp_path)))
    assert signal_results(tmp_path / "nowhere") is None
