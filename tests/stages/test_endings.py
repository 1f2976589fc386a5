"""The sentences that notebooks end with, on runs counted by hand."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from npo_core.stages import endings


def line(rate: float, entropy: float, wrong: float) -> dict[str, float]:
    return {"npo/pass_rate": rate, "npo/entropy": entropy, "npo/all_wrong_groups": wrong}


def result(average: float, **further) -> dict:
    scores = {"average": average, "interval": [average - 0.05, average + 0.05]}
    base = {"average": 0.2, "interval": [0.1, 0.3]}
    return {"base": base, "final": scores, "compute_steps": 40, "policy_steps": 40, "offline_rollouts": 0, **further}


def test_grpo_says_where_a_run_began_where_it_ended_and_what_it_left():
    quarters = [line(0.1, 1.0, 0.9), line(0.4, 0.5, 0.5), line(0.45, 0.4, 0.4), line(0.38, 0.25, 0.3)]
    told = endings.grpo([quarters[step // 10] for step in range(40)], result(0.6))
    assert "In 40 steps" in told and "from 0.10 (first 10 steps) to 0.38 (last quarter, −0.02 from the second)" in told
    assert "from 0.20 to 0.60 (0.55 to 0.65)" in told
    assert "25 % of its entropy is left, and 30 % of the groups" in told


def test_a_run_of_one_step_has_a_sentence_too():
    assert "(first 1 steps) to 0.10 (last quarter, +0.00" in endings.grpo([line(0.1, 1.0, 0.9)], result(0.2))


def test_interventions_are_counted_from_the_run_without():
    runs = {
        "GRPO": result(0.5),
        "late": result(0.48, policy_steps=30, offline_rollouts=2048),
        "early": result(0.53, policy_steps=20),
    }
    told = endings.interventions(runs)
    assert "after 40 executed steps, less GRPO's 0.500" in told
    assert "late −0.020 (it stands at policy step 30, and sampled 2,048 rollouts off line); early +0.030" in told


def intervention(step: int, distance: int, at_edge: bool | None) -> dict:
    return {"policy_step": step, "distance": distance, "at_edge": at_edge}


def test_decisions_name_every_intervention_and_the_dismissed_warnings():
    events = [{"event": kind} for kind in ("segment", "warning", "choice", "warning", "dismissed", "warning")]
    told = endings.decisions(events, {"interventions": [intervention(60, 20, True), intervention(90, 40, False)]})
    assert told == (
        "AutoNPO intervened twice, at step 60 back by 20, at step 90 back by 40 (3 warnings, 1 dismissed). "
        "1 of 2 chose the edge of what was saved."
    )
    ahead = endings.decisions(events[:2], {"interventions": [intervention(60, 0, None)]})
    assert ahead == "AutoNPO intervened once, at step 60 without a roll-back (1 warning, 0 dismissed)."


def test_a_run_that_did_not_intervene_says_so():
    events = [{"event": "warning"}, {"event": "dismissed"}]
    assert endings.decisions(events, {"interventions": []}).startswith("AutoNPO did not intervene (1 warning, 1 dism")


def measured(origins: dict) -> SimpleNamespace:
    return SimpleNamespace(folder=Path(), summary={"settings": {"rollouts": 8}, "origins": origins})


def premise(shown: float, own: float, p: float) -> dict:
    def estimate(value):
        return {"value": value, "low": value - 0.05, "high": value + 0.05, "n": 100}

    gain = estimate(shown - own)
    return {"distance": 40, "shown": estimate(shown), "own": estimate(own), "gain": gain, "p_holm": p}


@pytest.mark.parametrize(("at_edge", "words"), [(True, "the edge of"), (False, "inside of")])
def test_the_signal_has_a_sentence_for_the_premise_and_one_for_the_peak(at_edge, words):
    best = {"distance": 20.0, "low": 0.0, "high": 40.0, "at_edge": at_edge}
    optimum = {"signal_gradient_current": best, "signal_kl": best | {"distance": 99.0}}
    told = endings.signal(measured({"100": {"premise": [premise(0.4, 0.1, 0.001)], "optimum": optimum}}))
    assert "From policy step 100: Guides from Δ = 40 solve 0.40" in told and "the premise holds." in told
    assert f"largest at Δ = 20 (0 to 40 over prompts), {words} what was measured." in told


def test_an_origin_without_premise_or_gradients_is_not_left_out():
    told = endings.signal(measured({"0": {"premise": [], "optimum": {}}}))
    assert told == "From policy step 0: the policy fails too little to tell."


def test_arms_stand_in_the_order_of_their_scores():
    runs = {"NPO": result(0.51), "GRPO": result(0.5), "LUFFY": result(0.47)}
    assert "less GRPO's: NPO 0.510 (+0.010), GRPO 0.500, LUFFY 0.470 (−0.030)." in endings.arms(runs)
    del runs["GRPO"]
    assert "best first: NPO 0.510, LUFFY 0.470." in endings.arms(runs)
