"""The table of decisions that a notebook shows: a row an intervention, few columns, few digits, the reason as words."""

from npo_core.control.auto import _decision_record
from npo_core.control.watch import _fields
from npo_core.method.trigger import Candidate, PlateauWarning, choose_distance
from npo_core.runs.decisions import COLUMNS, decision_reasons, decision_table

CANDIDATES = [
    Candidate(distance=10, policy_step=50, quality=0.123456, variance=1.234567, prompts=31),
    Candidate(distance=20, policy_step=40, quality=0.4, variance=1.6, prompts=48),
    Candidate(distance=30, policy_step=30, quality=0.41, variance=4.1, prompts=50),
]


def event(kind, policy_step, compute_step, **content):
    return {"event": kind, "time": 0.0, "policy_step": policy_step, "compute_step": compute_step, **content}


def warned(step, compute):
    warning = PlateauWarning(step, 0.512345, 0.00234, 0.7, -0.204999)
    return event("warning", step, compute, **_fields(warning))


def choice(step, compute, floor):
    return event("choice", step, compute, **_decision_record(choose_distance(CANDIDATES, floor)))


EVENTS = [
    event("segment", 0, 0, branch=0),
    warned(60, 60),
    event("probe", 60, 60, pool=117, prompts=64, rollouts=512, pass_rate=0.3),
    choice(60, 60, 0.05),
    event("cache", 60, 60, file="guidance/00-00060.parquet", prompts=48, cached=31, rollouts=384),
    event("rollback", 60, 60, to=40, distance=20),
    event("segment", 40, 60, branch=1),
    event("alarm", 55, 75, complaints=["length rose"]),
    warned(70, 90),
    event("probe", 70, 90, pool=9, prompts=9, rollouts=72, pass_rate=0.1),
    choice(70, 90, 0.9),
    event("dismissed", 70, 90, reason=choose_distance(CANDIDATES, 0.9).reason),
    warned(110, 130),
    event("dismissed", 110, 130, reason="no checkpoint that the budget allows to replay from, or no mistake since"),
    event("planned", 200, 220, stage="late"),
    event("rollback", 200, 220, to=180, distance=20),
    event("cache", 240, 260, file="x", prompts=12, cached=12, rollouts=96),
    event("ahead", 240, 260, until=280),
]
"""What the run folder holds, as the controllers write it."""


def test_a_row_is_a_decision_and_its_cells_are_read_at_a_glance():
    rows = decision_table(EVENTS)
    assert [row["step"] for row in rows] == ["60", "70", "110", "200", "240"]
    assert all(tuple(row) == COLUMNS for row in rows)
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in COLUMNS]
    assert sum(widths) + 3 * len(widths) <= 160, "wider than a page"
    first, dismissed, early, planned, ahead = rows
    assert first == {
        "step": "60", "changes": "reward +0.00, entropy −20 %", "pool": "117 prompts", "Δ*": "20 steps", "Q̂": "0.40",
        "V̂": "1.60", "Ŝ": "0.25", "edge": "no", "guides of asked": "31 of 48", "back to": "40",
    }  # fmt: skip
    assert (dismissed["Δ*"], dismissed["back to"], dismissed["pool"]) == ("", "dismissed", "9 prompts")
    assert (early["changes"], early["pool"], early["back to"]) == (first["changes"], "", "dismissed")
    assert (planned["Δ*"], planned["back to"], planned["changes"]) == ("20 steps", "180", "")
    assert (ahead["back to"], ahead["guides of asked"]) == ("no roll-back, guided until 280", "12 of 12")


def test_a_distance_at_the_edge_of_the_range_is_marked():
    edge = choose_distance(CANDIDATES[:2], 0.05)
    assert edge.at_edge and edge.chosen is CANDIDATES[1]
    (row,) = decision_table([event("choice", 60, 60, **_decision_record(edge))])
    assert (row["Δ*"], row["edge"]) == ("20 steps", "yes")


def test_the_reason_of_each_is_a_sentence():
    reasons = decision_reasons(EVENTS)
    assert len(reasons) == len(decision_table(EVENTS))
    for row, text in zip(decision_table(EVENTS), reasons, strict=True):
        assert text.startswith(f"Step {row['step']}: ") and text.endswith(".") and "\n" not in text
    assert choose_distance(CANDIDATES, 0.05).reason in reasons[0]
    assert "dismissed, no roll-back: largest quality 0.41, floor 0.9" in reasons[1]
    assert "no checkpoint that the budget allows" in reasons[2]
    assert reasons[3:] == [
        "Step 200: planned before the run, stage late.",
        "Step 240: guided from here until step 280, without a roll-back.",
    ]


def test_a_warning_that_nobody_acts_on_is_a_row_too():
    assert decision_table([warned(60, 60)])[0]["back to"] == ""
    assert decision_reasons([warned(60, 60)]) == ["Step 60: training went on as if nothing had happened."]
    assert decision_table([]) == decision_reasons([]) == []
