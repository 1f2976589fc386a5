"""The verdicts on the real model follow the rule that was written before its guided runs, on each clock."""

import json

import pandas as pd
import pytest
from evidences import evidence, write_evidence
from real_evidences import BASE, write_results

from npo_core.__main__ import main
from npo_core.study.families import CLOCKS
from npo_core.study.real_claims import (
    NOT_SEEN,
    PAIRS,
    PASS_RATE,
    PROBABILITY,
    SEEN,
    real_claims,
    verdict_of,
    write,
)
from npo_core.study.real_results import ABOUT, CLAIMS, EXACT, REAL_ARMS, SCORES, read_real
from npo_core.study.results import TUNED, ResultsRefused, read_evidence
from npo_core.study.verdicts import FEW

GRPO = (0.50, 0.51, 0.49)
"""Probability at the end by seed; its spread is 0.02."""
EVEN = {
    "GRPO": GRPO,
    "GRPO, groups of 16": (0.52, 0.53, 0.51),
    "NPO early": (0.60, 0.61, 0.59),
    "AutoNPO": (0.55, 0.56, 0.54),
    "NPO early, own resample": (0.51, 0.52, 0.50),
}


def after(final, step, end=60):
    """The probability of a run that ends at `final`, so many executed steps in."""
    return BASE + (final - BASE) * step / end


def claims(folder):
    return {(row.arm, row.against, row.clock, row.measure): row for row in real_claims(read_real(folder))}


@pytest.mark.parametrize(
    ("differences", "spread", "word"),
    [
        ([0.03, 0.04, 0.05], 0.039, SEEN),
        ([-0.03, -0.04, -0.05], 0.039, SEEN),
        ([0.03, 0.04, 0.05], 0.041, NOT_SEEN),  # no more than what seeds do
        ([0.10, 0.10, -0.01], 0.01, NOT_SEEN),  # large on the mean, and not in every seed
        ([0.10, 0.10, 0.0], 0.01, NOT_SEEN),  # none has no sign
        ([0.10, 0.10, 0.10, -0.01], 0.01, NOT_SEEN),
        ([0.10, 0.10], 0.0, FEW),
        ([], 0.0, FEW),
    ],
)
def test_the_rule(differences, spread, word):
    assert verdict_of(differences, spread) == word


def test_every_pair_of_the_plan_is_compared_on_its_clocks_by_both_endpoints(tmp_path):
    rows = claims(write_results(tmp_path, EVEN))
    assert len(rows) == 2 * (4 * 3 + 2 + 2 * 3)
    for arm in REAL_ARMS:
        assert arm == "GRPO" or {clock for one, other, clock, _ in rows if (one, other) == (arm, "GRPO")} == set(CLOCKS)
    larger = [clocks for _, other, clocks in PAIRS if other == "GRPO, groups of 16"]
    assert larger == [("rollouts",)] * 2  # NPO early and AutoNPO


def test_each_clock_takes_both_arms_where_the_one_that_ends_first_has_counted_as_much(tmp_path):
    rows = claims(write_results(tmp_path, EVEN))
    own, grpo = EVEN["NPO early"][0], GRPO[0]
    wanted = {
        # it ends at policy step 40, where GRPO has 20 steps to go
        "policy": (own - after(grpo, 40), (40, 40)),
        "compute": (own - grpo, (60, 60)),
        # GRPO has spent 3,840 at its end, NPO early as many after 40 of its steps and what it sampled off line
        "rollouts": (after(own, 40) - grpo, (3840, 3840)),
    }
    for clock, (value, counted) in wanted.items():
        for measure in (PASS_RATE, PROBABILITY):
            row = rows["NPO early", "GRPO", clock, measure]
            assert row.differences[0] == pytest.approx(value, abs=1e-9) and row.counted[0] == counted
            assert row.mean == pytest.approx(sum(row.differences.values()) / 3)
    # equal rollouts at the ends of both
    larger = rows["NPO early", "GRPO, groups of 16", "rollouts", PROBABILITY]
    assert larger.differences[1] == pytest.approx(0.61 - 0.53) and larger.counted[1] == (5120, 5120)


def test_seen_is_what_exceeds_the_wider_spread_of_the_two_arms(tmp_path):
    wide = {**EVEN, "NPO early": (0.55, 0.61, 0.64), "AutoNPO": (0.52, 0.53, 0.51)}
    rows = claims(write_results(tmp_path, wide))
    early = rows["NPO early", "GRPO", "compute", PROBABILITY]
    assert early.mean == pytest.approx(0.1) and early.spread == pytest.approx(0.09) and early.verdict == SEEN
    auto = rows["AutoNPO", "GRPO", "compute", PROBABILITY]
    assert auto.mean == pytest.approx(0.02) and auto.spread == pytest.approx(0.02) and auto.verdict == NOT_SEEN
    # the other arm's spread counts as well: 0.09 here, with a difference of 0.08
    against = rows["AutoNPO", "NPO early, own resample", "compute", PROBABILITY]
    assert against.verdict == NOT_SEEN
    swapped = claims(write_results(tmp_path, {**wide, "GRPO": (0.53, 0.61, 0.66), "AutoNPO": (0.7, 0.7, 0.7)}))
    row = swapped["AutoNPO", "GRPO", "compute", PROBABILITY]
    assert row.mean == pytest.approx(0.1) and row.spread == pytest.approx(0.13) and row.verdict == NOT_SEEN


def test_the_two_endpoints_are_decided_apart(tmp_path):
    folder = write_results(tmp_path, EVEN)
    table = pd.read_csv(folder / SCORES)
    chosen = (table["arm"] == "NPO early") & (table["sampling"] == "plain") & (table["seed"] == 2)
    table.loc[chosen, "pass_rate"] = 0.1
    table.to_csv(folder / SCORES, index=False)
    rows = claims(folder)
    verdicts = {measure: rows["NPO early", "GRPO", "compute", measure].verdict for measure in (PASS_RATE, PROBABILITY)}
    assert verdicts == {PASS_RATE: NOT_SEEN, PROBABILITY: SEEN}


def test_what_was_sampled_as_the_paper_evaluates_is_no_endpoint(tmp_path):
    folder = write_results(tmp_path, EVEN)
    before = real_claims(read_real(folder))
    table = pd.read_csv(folder / SCORES)
    table.loc[table["sampling"] == "paper", "pass_rate"] = 0.0
    table.to_csv(folder / SCORES, index=False)
    assert real_claims(read_real(folder)) == before


def test_two_seeds_have_numbers_and_no_verdict_and_the_third_is_named(tmp_path):
    folder = write_results(tmp_path, {arm: (*values[:2], None) for arm, values in EVEN.items()})
    rows = claims(folder)
    assert {row.verdict for row in rows.values()} == {FEW}
    row = rows["NPO early", "GRPO", "compute", PASS_RATE]
    assert row.mean == pytest.approx(0.1) and row.lacking == {2: "no run of NPO early and GRPO"}
    said = write(folder)
    assert "Whole seeds (all arms): 0, 1. Seeds without a run: GRPO: 2; GRPO, groups of 16: 2; NPO early: 2" in said


def test_an_arm_that_was_not_run_is_named_in_every_pair_of_it(tmp_path):
    folder = write_results(tmp_path, {arm: values for arm, values in EVEN.items() if arm != "AutoNPO"})
    rows = claims(folder)
    assert len(rows) == len(claims(write_results(tmp_path / "whole", EVEN)))
    lacking = [row for row in rows.values() if row.arm == "AutoNPO"]
    assert len(lacking) == 14
    for row in lacking:
        assert (row.verdict, row.mean, row.spread, row.differences) == (FEW, None, None, {})
        assert row.lacking == dict.fromkeys((0, 1, 2), "no run of AutoNPO")
    said = write(folder)
    assert "no run of AutoNPO, seed 0, 1, 2" in said and "Seeds without a run: AutoNPO: 0, 1, 2." in said
    assert json.loads((folder / CLAIMS).read_text())["lacking"] == {"AutoNPO": [0, 1, 2]}
    assert rows["NPO early", "GRPO", "compute", PASS_RATE].verdict == SEEN


def test_one_seed_that_only_one_arm_has_is_left_out_of_its_pairs_alone(tmp_path):
    rows = claims(write_results(tmp_path, {**EVEN, "NPO early": (0.60, None, 0.59)}))
    early = rows["NPO early", "GRPO", "compute", PROBABILITY]
    assert list(early.differences) == [0, 2] and early.lacking == {1: "no run of NPO early"} and early.verdict == FEW
    assert early.spread == pytest.approx(0.01)  # GRPO's at seeds 0 and 2, not its 0.02 over three
    assert len(rows["AutoNPO", "GRPO", "compute", PROBABILITY].differences) == 3


def test_seeds_that_end_at_different_steps_have_each_their_own_reference(tmp_path):
    jumps = [(37, 20), None, (43, 30)]
    rows = claims(write_results(tmp_path, EVEN, jumps={"AutoNPO": jumps}))
    auto = EVEN["AutoNPO"]
    exact = rows["AutoNPO", "GRPO", "policy", PROBABILITY]
    # ends at policy steps 43, 60 and 47: GRPO's newest checkpoint by then is 40, 60 and 40
    assert exact.counted == {0: (43, 40), 1: (60, 60), 2: (47, 40)}
    wanted = [auto[0] - after(GRPO[0], 40), auto[1] - GRPO[1], auto[2] - after(GRPO[2], 40)]
    assert list(exact.differences.values()) == pytest.approx(wanted)
    assert exact.lacking == {}
    # one spends 3,840 in all, the two others 1,280 more, of which groups of 16 have spent as much at the end
    larger = rows["AutoNPO", "GRPO, groups of 16", "rollouts", PROBABILITY]
    assert larger.counted == {0: (5120, 5120), 1: (3840, 3840), 2: (5120, 5120)}
    assert larger.differences[1] == pytest.approx(auto[1] - after(0.53, 30, 40))


def test_an_arm_without_a_score_by_then_is_said(tmp_path):
    folder = write_results(tmp_path, EVEN)
    table = pd.read_csv(folder / SCORES)
    late = table[~((table["arm"] == "GRPO") & (table["compute_step"] < 60) & (table["seed"] == 1))]
    late.to_csv(folder / SCORES, index=False)
    row = claims(folder)["NPO early", "GRPO", "policy", PASS_RATE]
    assert row.lacking == {1: "no score yet of GRPO at equal policy step"} and row.verdict == FEW


@pytest.mark.parametrize(
    ("passed", "said"),
    [
        (True, "Gate passed (one-sided, Holm): from 0, Δ = 10: 0.40 against 0.20, p 0.010."),
        (False, "p 0.200. The arms are not read as a test of the method."),
        (None, "The premise is not measured, so whether these arms can test the method is not known."),
    ],
)
def test_verdicts_are_read_after_the_gate(tmp_path, passed, said):
    assert said in write(write_results(tmp_path, EVEN, passed=passed))


def test_the_command_prints_them_without_a_run(tmp_path, capsys):
    folder = write_results(tmp_path / "real", EVEN)
    assert main(["claims", "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    each = "0: +0.100, 1: +0.100, 2: +0.100"
    assert f"| NPO early − GRPO | compute steps | +0.100 ({each}), spread 0.020, at 60 and 60 | seen |" in said
    (folder / CLAIMS).unlink()
    assert main(["claims", "--results", str(folder)]) == 0  # the folder of `real-study --out`
    assert capsys.readouterr().out == said and (folder / CLAIMS).is_file()
    assert main(["claims", "--results", str(tmp_path / "none")]) == 2
    assert "lacks evidence.csv" in capsys.readouterr().err


def test_half_written_and_mixed_results_are_refused(tmp_path):
    folder = write_results(tmp_path, EVEN)
    about = json.loads((folder / ABOUT).read_text())
    (folder / ABOUT).write_text(json.dumps({**about, "schema": 0}))
    with pytest.raises(ResultsRefused, match="has schema 0; this version reads"):
        read_real(folder)
    about["runs"][0]["versions"]["python"] = "3.12"
    (folder / ABOUT).write_text(json.dumps(about))
    with pytest.raises(ResultsRefused, match="mixed versions"):
        read_real(folder)
    (folder / EXACT).unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks exact\.csv; `python -m npo_core real-study` makes them"):
        read_real(folder)


def test_beside_the_small_world_they_stand_after_its_verdicts(tmp_path, capsys):
    small = evidence({"NPO": (0.05, 0.06, 0.07), "GRPO, groups of 16": (0.01, 0.02, 0.0)})
    write_evidence(tmp_path, small)
    assert main(["claims", "--results", str(tmp_path)]) == 0
    alone = capsys.readouterr().out
    assert "The real model" not in alone and "The tuned regime" not in alone
    write_results(tmp_path / "real", EVEN)
    assert main(["claims", "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(alone + "\nThe real model:\n") and "Whole seeds (all arms): 0, 1, 2." in said


def test_the_tuned_regime_stands_between_them_with_verdicts_of_its_own(tmp_path, capsys):
    write_evidence(tmp_path, evidence({"NPO": (0.05, 0.06, 0.07)}))
    assert main(["claims", "--results", str(tmp_path)]) == 0
    alone = capsys.readouterr().out
    write_evidence(tmp_path / TUNED, evidence({"NPO": (-0.05, -0.06, -0.07)}))
    write_results(tmp_path / "real", EVEN)
    assert main(["claims", "--results", str(tmp_path)]) == 0
    first, rest = capsys.readouterr().out.split("\nThe tuned regime:\n\n")
    assert alone.startswith(first) and "+0.060" in first and "\nThe real model:\n" in rest
    assert main(["claims", "--results", str(tmp_path / TUNED)]) == 0
    assert rest.startswith(capsys.readouterr().out.rstrip()) and "-0.060" in rest
    (tmp_path / TUNED / "evidence.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks evidence\.csv; `python -m npo_core study --preset cpu_tuned`"):
        read_evidence(tmp_path / TUNED)
    assert main(["claims", "--results", str(tmp_path)]) != 0
