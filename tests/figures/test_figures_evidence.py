"""Figures of the evidence study: what they show of made-up results, read back from the axes.

Nothing here is a result: the scores follow a formula, so that every mean, interval and place is known.
"""

import json

import matplotlib
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from evidences import evidence as made_up
from evidences import write_evidence
from legible import assert_legible
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from npo_core import figures
from npo_core.figures import (
    arm_differences,
    controls,
    correction_ablation,
    gain_map,
    suite_table,
    training_with_interventions,
)
from npo_core.figures.estimates import reference_note, signed
from npo_core.runs.folder import project_folder
from npo_core.runs.validation import SUITES, WORLD
from npo_core.study.arms import ARMS as EVERY
from npo_core.study.gates import RATES
from npo_core.study.map import DISTANCES
from npo_core.study.results import MAP_COLUMNS, SCORE_COLUMNS, TUNED, Evidence, ResultsRefused

BUDGET = 40
SEEDS = (0, 1, 2)
MANUAL = [(8, 8, 8), (28, 20, 8)]
ROLLBACKS = {
    "RLEP": [(20, 20, 20)],
    "NPO early": MANUAL[:1],
    "NPO late": [(24, 24, 8)],
    **dict.fromkeys(("NPO", "NPO, exact ratio", "NPO, own resample", "NPO, no guide"), MANUAL),
}
"""Compute step, policy step and distance of the roll-backs; those of AutoNPO and of the random arm differ by seed."""
LATER = (
    "GRPO, best rate",
    "GRPO, groups of 16",
    "GRPO, entropy bonus",
    "NPO, prefix",
    "AutoNPO, own resample",
    "AutoNPO, no guide",
)
"""Arms that the made-up results here leave out, beside those with a grid of their own."""
ARMS = {arm: row for arm, row in EVERY.items() if not row.grid and arm not in LATER}
LIFTS = {arm: 0.004 * index - 0.021 for index, arm in enumerate(ARMS)} | {"GRPO": 0.0}
TRAINING = ("arm", "seed", "branch", "policy_step", "compute_step", "pass_rate", "entropy")


def rollbacks(arm, seed):
    if arm == "AutoNPO":
        return [(16 + 4 * seed, 16 + 4 * seed, 8)]
    return [(12, 12, 4 * (seed + 1))] if arm == "NPO, random" else ROLLBACKS.get(arm, [])


def score(arm, seed, step, suite=None):
    """GRPO gains 0.002 a policy step; any other arm ends at its lift above GRPO's end, more on later suites."""
    spread = 0.0 if arm == "GRPO" else 0.01 * (seed - 1)
    weight = 1.0 if suite is None else (SUITES.index(suite) + 1) / 4.5
    return 0.3 + 0.002 * (step if arm == "GRPO" else BUDGET) + 0.03 * seed + LIFTS[arm] * weight + spread


def fabricate(arms=tuple(ARMS), seeds=SEEDS, failed=()):
    scores, training, runs = [], [], []
    ends = {(arm, seed): BUDGET - sum(jump[2] for jump in rollbacks(arm, seed)) for arm in arms for seed in seeds}
    for arm, seed in sorted(set(ends) - set(failed)):
        jumps, policy, branch = {jump[0]: jump[2] for jump in rollbacks(arm, seed)}, 0, 0
        for compute in range(1, BUDGET + 1):
            policy += 1
            training.append((arm, seed, branch, policy, compute, compute / 1000 + 0.01 * seed, 0.5 + 0.1 * seed))
            branch, policy = branch + (compute in jumps), policy - jumps.get(compute, 0)
        points = {(policy, BUDGET, "paper"), (policy, BUDGET, "plain")}
        points |= {(end, end, "paper") for end in ends.values()} if arm == "GRPO" else set()
        for step, compute, sampling in sorted(points):
            for suite in SUITES:
                rate, entropy = score(arm, seed, step, suite), 0.5 + LIFTS[arm] + 0.1 * seed
                last = compute == BUDGET
                scores.append(
                    (arm, seed, step, compute, last, sampling, suite, rate, 0.9, 0.9, entropy, 0, 0, 8 * compute)
                )
        keys = ("compute_step", "policy_step", "distance")
        runs.append(
            {
                "arm": arm,
                "seed": seed,
                "config": {"arm": arm, "seed": seed},
                "versions": {},
                "policy_steps": policy,
                "compute_steps": BUDGET,
                "rollouts": 8 * BUDGET,
                "interventions": [dict(zip(keys, jump, strict=True)) for jump in rollbacks(arm, seed)],
            }
        )
    about = {
        "schema": 1,
        "world": WORLD,
        "arms": list(arms),
        "seeds": list(seeds),
        "suites": list(SUITES),
        "failed": [{"arm": arm, "seed": seed, "reason": "made up"} for arm, seed in failed],
        "runs": runs,
    }
    return Evidence(pd.DataFrame(scores, columns=SCORE_COLUMNS), pd.DataFrame(training, columns=TRAINING), about)


def cells(seeds=3, centers=(0.001, 0.02, -0.03)):
    rows = [
        (rate, distance, seed, center + 0.01 * index + 0.002 * (seed - 1), 0.1 + 0.2 * index, 0.1)
        for rate, center in zip((5e-5, 1e-4, 3e-4), centers, strict=True)
        for index, distance in enumerate((0, 20))
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows, columns=["learning_rate", "distance", "seed", "difference", "guide_solves", "own_solves"])


@pytest.fixture(scope="module")
def paper():
    return pd.read_csv(project_folder() / "data" / "paper" / "table1.csv")


@pytest.fixture(scope="module")
def evidence():
    return fabricate()


@pytest.fixture(scope="module")
def drawn(evidence, paper):
    return draw_all(evidence, paper, cells())


def draw_all(evidence, paper, table):
    return {
        "differences": arm_differences(evidence),
        "training": training_with_interventions(evidence),
        "correction": correction_ablation(evidence),
        "suites": suite_table(evidence, paper),
        "controls": controls(evidence),
        "map": gain_map(table),
    }


def lines_of(axes, label):
    return [line for line in axes.get_lines() if line.get_label() == label]


def line_of(axes, label):
    (line,) = lines_of(axes, label)
    return line


def legends_of(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def bars_of(axes):
    """Ends of all interval bars: rows of (x, y) of one end and of the other."""
    return np.concatenate([bars.get_segments() for bars in axes.collections]).reshape(-1, 4)


def labels_of(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def texts_of(axes):
    return {(text.get_position()[0], text.get_position()[1]): text.get_text() for text in axes.texts}


def t_interval(values):
    if np.ptp(values) < 1e-12:
        return np.mean(values), np.mean(values)
    return scipy.stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=scipy.stats.sem(values))


def average(values):
    """Moving average of weight 0.9 whose weights sum to one."""
    weights = 0.9 ** np.arange(len(values))[::-1]
    return weights @ values / weights.sum()


# Differences


def test_differences_are_paired_by_seed_on_three_clocks(drawn):
    figure = drawn["differences"]
    assert [axes._left_title.get_text() for axes in figure.axes] == ["Baselines", "NPO", "Controls"]
    for axes, kind in zip(figure.axes, ("baseline", "npo", "control"), strict=True):
        arms = [arm for arm in ARMS if ARMS[arm].kind == kind and not arm.startswith("GRPO")]
        assert [label.split("\n")[0] for label in labels_of(axes)] == arms
        assert axes.get_ylim()[0] > axes.get_ylim()[1]
        for place, arm in enumerate(arms):
            ends = [BUDGET - sum(jump[2] for jump in rollbacks(arm, seed)) for seed in SEEDS]
            shifts = {"at equal policy step": -0.25, "at equal compute steps": 0.0, "at equal total rollouts": 0.25}
            for clock, shift in shifts.items():
                less = 0.002 * (BUDGET - np.array(ends)) * (clock == "at equal policy step")
                differences = LIFTS[arm] + 0.01 * (np.array(SEEDS) - 1) + less
                if clock == "at equal total rollouts":  # against the longer run, which differs by its own lift
                    differences = differences - LIFTS["GRPO, longer"] - 0.01 * (np.array(SEEDS) - 1)
                assert line_of(axes, f"{arm}, {clock}, seeds").get_xdata() == pytest.approx(differences)
                mean = line_of(axes, f"{arm}, {clock}")
                assert (mean.get_xdata()[0], mean.get_ydata()[0]) == pytest.approx((differences.mean(), place + shift))
                low, high = t_interval(differences)
                assert np.isclose(bars_of(axes), [low, place + shift, high, place + shift]).all(axis=1).any()
        assert [line.get_xdata()[0] for line in axes.get_lines() if line.get_linestyle() == "--"] == [0]


def test_a_row_says_how_many_seeds_are_left(drawn):
    assert not any("n =" in label for axes in drawn["differences"].axes for label in labels_of(axes))
    figure = arm_differences(fabricate(failed=[("NPO", 1), ("AutoNPO", 0), ("AutoNPO", 1), ("AutoNPO", 2)]))
    labels = [label.split("\n")[0] for label in labels_of(figure.axes[1])]
    assert labels[2:4] == ["NPO (n = 2 of 3)", "AutoNPO (n = 0 of 3)"]
    differences = np.array([-0.01, 0.01]) + LIFTS["NPO"]
    assert line_of(figure.axes[1], "NPO, at equal compute steps, seeds").get_xdata() == pytest.approx(differences)
    lost = arm_differences(fabricate(failed=[("GRPO", 2)]))
    # the longer run, reference at equal total rollouts, has lost none
    assert all("(n = 2 and 3 of 3)" in label for axes in lost.axes for label in labels_of(axes))


def test_an_arm_far_off_is_written_at_the_edge(evidence):
    scores = evidence.scores.copy()
    scores.loc[scores["arm"] == "LUFFY, no correction", "pass_rate"] -= 0.5
    figure = arm_differences(Evidence(scores, evidence.training, evidence.about))
    axes = figure.axes[2]
    low, high = axes.get_xlim()
    assert -0.1 < low < high < 0.15
    mean = LIFTS["LUFFY, no correction"] - 0.5
    ends = t_interval(mean + 0.01 * (np.array(SEEDS) - 1))
    expected = f"{mean:+.3f} [{ends[0]:+.3f}, {ends[1]:+.3f}]".replace("-", "−")
    # at equal total rollouts against the longer run, whose seeds spread alike
    level = f"{mean - LIFTS['GRPO, longer']:+.3f}".replace("-", "−")
    assert [text.get_text() for text in axes.texts] == [expected, expected, f"{level} [{level}, {level}]"]
    assert line_of(axes, "LUFFY, no correction, at equal compute steps").get_marker() == "<"
    for panel in figure.axes:
        for line in panel.get_lines():
            if line.get_label().endswith("seeds"):
                assert line.get_xdata().min() > low and line.get_xdata().max() < high


def test_two_seeds_are_told_apart_however_long_their_intervals_are():
    """Two seeds that differ by 0.01 have an interval of ±0.064; the axis is that of the seeds."""
    figure = arm_differences(fabricate(seeds=(0, 1)))
    low, high = figure.axes[0].get_xlim()
    lines = [line for axes in figure.axes for line in axes.get_lines() if line.get_label().endswith("seeds")]
    values = np.concatenate([line.get_xdata() for line in lines])
    longest = max(np.abs(values))
    assert longest < max(-low, high) < 1.7 * longest and max(np.abs(values)) > 0.015
    assert max(np.abs(bars_of(figure.axes[1])[:, [0, 2]]).ravel()) > max(-low, high), "drawn, and cut off at the frame"


# Training


def test_policy_clock_shows_the_final_trajectory_only(drawn):
    figure = drawn["training"]
    compute, policy = figure.axes[:2]
    # 8 steps lost to the first roll-back, 8 more to the second at policy step 20
    rates = np.array([*range(9, 21), *range(29, 41)]) / 1000 + 0.01
    line = line_of(policy, "NPO")
    assert line.get_xdata().tolist() == list(range(1, 25))
    assert line.get_ydata() == pytest.approx([average(rates[: n + 1]) for n in range(24)])
    assert line_of(compute, "NPO").get_xdata().tolist() == list(range(1, 41))
    assert line_of(compute, "NPO").get_ydata()[28] == pytest.approx(average(rates[:13]))
    band = figure.axes[2].collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx(t_interval([0.5, 0.6, 0.7]))
    assert legends_of(figure)[:3] == ["GRPO (n = 3)", "AutoNPO (n = 3)", "NPO (n = 3)"]
    assert [axes.get_xlabel() for axes in figure.axes[2:]] == [
        "compute step (optimiser steps executed)",
        "policy step, final trajectory",
    ]


def test_roll_backs_are_lines_where_seeds_agree_and_ticks_where_they_differ(evidence, drawn):
    figure = drawn["training"]
    for column in (0, 1):
        for axes in figure.axes[column::2]:
            lines = [line for line in axes.get_lines() if line.get_label() == "NPO, roll-back"]
            assert [line.get_xdata()[0] for line in lines] == [8, (28, 20)[column]]
            assert {line.get_color() for line in lines} == {line_of(axes, "NPO").get_color()}
            (ticks,) = [ticks for ticks in axes.collections if "single seeds" in ticks.get_label()]
            assert ticks.get_label() == "AutoNPO, roll-backs of single seeds"
            assert [segment[0, 0] for segment in ticks.get_segments()] == [16, 20, 24]
            assert matplotlib.colors.same_color(ticks.get_color()[0][:3], lines_of(axes, "AutoNPO")[0].get_color())
            # the curves end above the ticks
            bottom, top = axes.get_ylim()
            lowest = min(
                line.get_ydata().min()
                for arm in ("GRPO", "AutoNPO", "AutoNPO, single seeds", "NPO")
                for line in lines_of(axes, arm)
            )
            assert bottom + 0.05 * (top - bottom) < lowest
    legends = legends_of(figure)
    assert "roll-back of all seeds of the arm" in legends and any("tick at the bottom" in text for text in legends)
    plain = legends_of(training_with_interventions(evidence, ["GRPO", "LUFFY"]))
    assert not any("roll-back" in text for text in plain)


def test_seeds_that_roll_back_at_different_steps_are_drawn_one_by_one(evidence, drawn):
    about = {**evidence.about, "runs": evidence.about["runs"][::-1]}  # the order of the file does not matter
    for figure in (drawn["training"], training_with_interventions(Evidence(evidence.scores, evidence.training, about))):
        assert [len(lines_of(axes, "AutoNPO, single seeds")) for axes in figure.axes] == [3] * 4
        assert [len(lines_of(axes, f"{arm}, single seeds")) for axes in figure.axes for arm in ("GRPO", "NPO")] == [
            0
        ] * 8
        assert [len(lines_of(axes, arm)) for axes in figure.axes for arm in ("GRPO", "NPO", "AutoNPO")] == [1] * 12
        # seed s rolls back 8 steps at step 16 + 4s
        for seed, line in enumerate(lines_of(figure.axes[0], "AutoNPO, single seeds")):
            values = line.get_ydata()
            assert len(values) == 40 and np.argmin(np.diff(values)) + 1 == 16 + 4 * seed
            assert line.get_alpha() < 0.5
        for axes in (figure.axes[0], figure.axes[2]):  # in full, and in place of a mean that would jump at each of them
            shown, own = line_of(axes, "AutoNPO"), lines_of(axes, "AutoNPO, single seeds")[1]
            assert shown.get_ydata().tolist() == own.get_ydata().tolist() and shown.get_alpha() is None
    # the final trajectories have 32 steps each, and a mean
    single = np.array([line.get_ydata() for line in lines_of(figure.axes[1], "AutoNPO, single seeds")])
    assert single.shape == (3, 32)
    assert line_of(figure.axes[1], "AutoNPO").get_ydata() == pytest.approx(single.mean(axis=0))
    assert "AutoNPO: single seeds; left, thick: one seed of n" in legends_of(figure)


def test_an_arm_whose_seeds_all_failed_has_no_curve():
    figure = training_with_interventions(fabricate(failed=[("AutoNPO", seed) for seed in SEEDS]))
    assert "AutoNPO (n = 0 of 3)" in legends_of(figure)
    assert "AutoNPO" not in [line.get_label() for line in figure.axes[0].get_lines()]


def test_the_correction_is_judged_by_paired_differences(drawn):
    figure = drawn["correction"]
    for axes, pair, name in zip(
        figure.axes,
        [("NPO", "NPO, exact ratio"), ("LUFFY", "LUFFY, no correction")] * 2,
        ["final test pass rate"] * 2 + ["entropy of the last steps"] * 2,
        strict=True,
    ):
        mean = LIFTS[pair[1]] - LIFTS[pair[0]]
        (text,) = [text.get_text() for text in axes.texts]
        value = f"{mean:+.3f} [{mean:+.3f}, {mean:+.3f}]"  # seeds differ by nothing but what both arms share
        assert text == f"{name}:\n“{pair[1]}” minus “{pair[0]}”\n{value}"
        assert [line.get_label() for line in axes.get_lines()] == list(pair)
        # no curve runs through the text
        figure.draw_without_rendering()
        lowest = axes.transData.inverted().transform(axes.texts[0].get_window_extent())[0, 1]
        assert max(line.get_ydata().max() for line in axes.get_lines()) < lowest
    missing = correction_ablation(fabricate(failed=[("NPO", 0)]))
    assert missing.axes[0].texts[0].get_text().endswith(", n = 2")
    assert missing.axes[1].texts[0].get_text().endswith("]")


# Tables


def test_suites_stand_over_those_of_the_paper(drawn, paper):
    ours, theirs = drawn["suites"].axes[:2]
    arms = ["GRPO", "LUFFY", "ExGRPO", "RLEP", "NPO early", "NPO", "AutoNPO"]
    assert labels_of(ours) == ["GRPO\n(percent)", *arms[1:]]
    assert labels_of(theirs)[4:6] == ["NPO (early)", "NPO (early+late)"]
    columns = [label.get_text().replace("\n", "") for label in ours.get_xticklabels()]
    assert columns == ["mean", *paper.columns[2:]]
    half = 100 * (t_interval([-0.01, 0, 0.01])[1])
    shown = texts_of(ours)
    for y, arm in enumerate(arms[1:], 1):
        for x in range(9):
            gain = 100 * LIFTS[arm] * (1 if x == 0 else x / 4.5)
            assert shown[x + 0.5, y + 0.5] == f"{signed(gain, 1)}\n±{half:.1f}"
    spread = np.ptp(t_interval([0, 0.03, 0.06])) / 2
    assert shown[0.5, 0.5] == f"41.0\n±{100 * spread:.1f}"
    printed = texts_of(theirs)
    assert (printed[0.5, 0.5], printed[0.5, 6.5], printed[0.5, 5.5]) == ("60.25", "+2.90", "+2.59")
    assert (printed[5.5, 1.5], printed[5.5, 5.5]) == ("−4.19", "+10.38")
    assert "n = 3" in ours._left_title.get_text() and "no intervals" in theirs._left_title.get_text()


def test_cells_whose_interval_excludes_zero_are_framed(evidence, paper):
    scores = evidence.scores.copy()
    scores.loc[(scores["arm"] == "RLEP") & (scores["suite"] == "wemath") & scores["final"], "pass_rate"] += 0.1
    ours, theirs = suite_table(Evidence(scores, evidence.training, evidence.about), paper).axes[:2]
    frames = [patch for patch in ours.patches if isinstance(patch, Rectangle)]
    # row 3 is RLEP, column 5 WeMath; row 6 is AutoNPO, whose gain is largest on the last suite
    assert [(int(frame.get_x()), int(frame.get_y())) for frame in frames] == [(5, 3), (8, 6)]
    assert not theirs.patches
    colors, paper_colors = (axes.collections[0].get_array() for axes in (ours, theirs))
    shown = [(int(x), int(y)) for y, x in zip(*np.nonzero(~colors.mask), strict=True)]
    assert shown == [(5, 3), (8, 6)], "a gain that cannot be told from zero has no colour"
    assert paper_colors.mask[0].all() and not paper_colors.mask[1:].any()
    assert ours.collections[0].norm.vcenter == theirs.collections[0].norm.vcenter == 0


def test_a_cell_whose_seeds_are_all_alike_has_no_interval_and_the_legend_says_so(evidence, drawn, paper):
    note = "±0.0: all seeds equal, no interval"
    assert not any(note in text for text in legends_of(drawn["suites"]))
    scores = evidence.scores.copy()
    for arm, rate in (("GRPO", 1.0), ("LUFFY", 0.0)):
        scores.loc[(scores["arm"] == arm) & (scores["suite"] == SUITES[0]), "pass_rate"] = rate
    figure = suite_table(Evidence(scores, evidence.training, evidence.about), paper)
    assert any(note in text for text in legends_of(figure))
    assert "−100.0\n±0.0" in texts_of(figure.axes[0]).values()


def test_the_reference_at_equal_total_rollouts_is_named(drawn):
    (axis,) = (axes for axes in drawn["differences"].axes if axes.get_xlabel())
    assert axis.get_xlabel().endswith("\nat equal total rollouts: minus “GRPO, longer”")
    both = {"GRPO, longer": [0.1] * 3, "GRPO, groups of 16": [0.1] * 3, "NPO": [0.0] * 3, "RLEP": [0.0] * 3}
    found = made_up({**both, "AutoNPO": [0.0] * 3})
    for run in found.about["runs"]:
        run["rollouts"] *= 1 + 3 * (run["arm"] == "RLEP")  # past the end of both
    found.scores.loc[found.scores["arm"] == "GRPO, longer", "pass_rate"] -= 0.01
    found.scores.loc[(found.scores["arm"] == "GRPO, longer") & found.scores["final"], "pass_rate"] += 0.05
    note = reference_note(found, ["NPO", "RLEP", "AutoNPO"])
    assert note == '\nat equal total rollouts: minus “GRPO, groups of 16”; "RLEP": minus “GRPO, longer”'
    assert reference_note(made_up({"NPO": [0.0] * 3}), ["NPO"]) == ""


def test_arms_that_were_not_run_leave_their_row_empty(paper):
    figure = suite_table(fabricate(["GRPO", "NPO"]), paper)
    shown = texts_of(figure.axes[0])
    assert {shown[x + 0.5, y + 0.5] for x in range(9) for y in (1, 2, 3, 4, 6)} == {"–"}
    assert shown[0.5, 5.5].startswith(f"{100 * LIFTS['NPO']:+.1f}")


def test_controls_stand_beside_grpo_on_both_clocks(drawn):
    (axes,) = drawn["controls"].axes
    arms = ["GRPO", "NPO", "NPO, own resample", "NPO, no guide", "NPO, random"]
    assert [label.split("\n")[0] for label in labels_of(axes)] == arms
    assert line_of(axes, "GRPO, at equal compute").get_xdata()[0] == pytest.approx(0.41)
    assert line_of(axes, "GRPO, mean").get_xdata()[0] == pytest.approx(0.41)
    differences = {}
    for place, arm in enumerate(arms[1:], 1):
        own = np.array([score(arm, seed, 0) for seed in SEEDS])
        where = [score("GRPO", seed, BUDGET - sum(jump[2] for jump in rollbacks(arm, seed))) for seed in SEEDS]
        for name, values, y in ((arm, own, place - 0.17), (f"GRPO, where {arm} ends", where, place + 0.17)):
            assert line_of(axes, f"{name}, seeds").get_xdata() == pytest.approx(values)
            assert line_of(axes, name).get_xdata()[0] == pytest.approx(np.mean(values))
            assert np.isclose(bars_of(axes), [t_interval(values)[0], y, t_interval(values)[1], y]).all(1).any()
        differences[place] = LIFTS["NPO"] - LIFTS[arm]
    written = texts_of(axes)
    assert written[1.02, 3].startswith(f"{differences[3]:+.3f} [".replace("-", "−"))
    assert written[1.02, 0].startswith(f"{LIFTS['NPO']:+.3f} [")
    assert written[1.02, 1].startswith(f"{LIFTS['NPO'] + 0.002 * 16:+.3f} [")
    assert written[1.02, 1].endswith("(minus GRPO\nwhere NPO ends)")


def test_the_map_shows_mean_interval_and_premise_of_every_cell():
    table = cells()
    table.loc[0, "difference"] = np.nan
    figure = gain_map(table)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["5e-5", "1e-4", "3e-4"]
    assert labels_of(axes) == ["own\nresample", "20"] and axes.get_ylim()[0] < axes.get_ylim()[1]
    shown = texts_of(axes)
    low, high = t_interval([0.018, 0.02, 0.022])
    assert shown[1.5, 0.5] == f"+0.020\n±{(high - low) / 2:.3f}\n0.10 / 0.10"
    assert shown[1.5, 1.5].endswith("\n0.30 / 0.10") and shown[0.5, 0.5].startswith("+0.002\n±0.013")
    frames = sorted((int(patch.get_x()), int(patch.get_y())) for patch in axes.patches)
    assert frames == [(0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert any("n = 2–3" in text for text in legends_of(figure))
    bold = {text.get_position() for text in axes.texts if text.get_fontweight() == "bold"}
    assert bold == {(x + 0.5, y + 0.5) for x, y in frames}


def test_the_map_does_not_shade_what_cannot_be_told_from_zero():
    axes = gain_map(cells()).axes[0]
    shades = axes.collections[0]
    norm, values = shades.norm, shades.get_array()
    assert norm.vcenter == 0 and (norm.vmin, norm.vmax) == pytest.approx((-1.25 * 0.03, 1.25 * 0.03))
    assert np.ma.getmaskarray(values)[0].tolist() == [True, False, False], "+0.001 with an interval around zero"
    assert values[1].tolist() == pytest.approx([0.011, 0.03, -0.02])


def test_the_map_of_the_plan_is_legible_with_two_seeds_one_of_which_broke():
    """Two seeds that differ by 0.6 have an interval of ±3.8; the planned grid has five rates."""
    places = [(rate, distance, seed) for rate in RATES for distance in DISTANCES for seed in (0, 1)]
    rows = [(*place, -0.6 * place[2] - 0.01, 0.31, 0.1) for place in places]
    figure = gain_map(pd.DataFrame(rows, columns=cells().columns))
    assert set(texts_of(figure.axes[0]).values()) == {"−0.310\n±3.812\n0.31 / 0.10"}
    assert_legible({"map": figure})


def test_the_map_says_what_was_not_run_and_what_failed():
    table = cells()
    table.loc[table["learning_rate"] == 3e-4, "difference"] = np.nan
    table = table[(table["learning_rate"] != 1e-4) | (table["distance"] != 20)]
    shown = texts_of(gain_map(table).axes[0])
    assert shown[1.5, 1.5] == "not run"
    assert shown[2.5, 0.5] == "failed\n0.10 / 0.10"
    table.loc[table["learning_rate"] == 3e-4, ["guide_solves", "own_solves"]] = np.nan
    assert texts_of(gain_map(table).axes[0])[2.5, 0.5] == "failed"


# All


def test_texts_are_large_enough_inside_of_the_figure_and_apart(drawn, paper):
    assert_legible(drawn)
    assert all(any("95 %" in text for text in legends_of(figure)) for figure in drawn.values())
    before = matplotlib.rcParams.copy()
    lost = draw_all(fabricate(failed=[("NPO", 0), ("GRPO", 1), ("LUFFY", 0), ("LUFFY", 1)]), paper, cells())
    assert matplotlib.rcParams == before and plt.get_fignums() == []
    assert_legible(lost)


def test_one_seed_has_no_interval_and_the_legend_says_so(paper):
    single = draw_all(fabricate(seeds=[2]), paper, cells(seeds=1))
    assert_legible(single)
    for name, figure in single.items():
        legends = legends_of(figure)
        assert any("one seed: no interval" in text for text in legends), name
        assert not any("95 %" in text for text in legends), name
    axes = single["differences"].axes[1]
    assert not axes.collections
    assert line_of(axes, "NPO, at equal compute steps").get_xdata()[0] == pytest.approx(LIFTS["NPO"] + 0.01)
    assert not single["training"].axes[0].collections


def test_missing_arms_are_named_where_they_are_needed(paper):
    few = fabricate(["GRPO", "LUFFY, base's form", "NPO"])
    assert [label.split("\n")[0] for axes in arm_differences(few).axes for label in labels_of(axes)] == [
        "LUFFY, base's form",
        "NPO",
    ]
    with pytest.raises(ValueError, match='lacks "AutoNPO"'):
        training_with_interventions(few)
    with pytest.raises(ValueError, match='lacks "NPO, exact ratio", "LUFFY", "LUFFY, no correction"'):
        correction_ablation(few)
    with pytest.raises(ValueError, match='lacks "NPO, own resample", "NPO, no guide", "NPO, random"'):
        controls(few)
    alone = fabricate(["NPO"])
    for draw in (arm_differences, controls, lambda found: suite_table(found, paper)):
        with pytest.raises(ValueError, match='lacks "GRPO"'):
            draw(alone)
    only = fabricate(["GRPO", "GRPO, longer"])
    with pytest.raises(ValueError, match="no arm but GRPO"):
        arm_differences(only)
    with pytest.raises(ValueError, match='lacks "LUFFY", "ExGRPO"'):
        suite_table(only, paper)
    with pytest.raises(ValueError, match='lacks "distance", "own_solves"'):
        gain_map(cells().drop(columns=["own_solves", "distance"]))
    with pytest.raises(ValueError, match="lacks rows"):
        gain_map(cells()[:0])


def test_the_committed_figures_are_those_of_both_regimes_the_signal_and_the_map_where_there(evidence, tmp_path):
    for folder in (tmp_path, tmp_path / TUNED):
        write_evidence(folder, evidence)
    cells().reindex(columns=list(MAP_COLUMNS)).to_csv(tmp_path / "map.csv", index=False)
    (tmp_path / "map.json").write_text(json.dumps({"world": "another"}))
    with pytest.raises(ResultsRefused, match=r"map\.csv is of another small world"):
        figures.draw_study(tmp_path, tmp_path / "figures")
    (tmp_path / "map.json").write_text(json.dumps({"world": WORLD}))
    pair = {"seed": 0, "origin": 0, "distance": 10}
    costs = {f"{of}gradient_{mode}": 1.0 for of in ("", "signal_") for mode in ("current", "exact")}
    gains = [{**pair, "mode": mode, "gain": 0.1} for mode in ("current", "exact")]
    signal = {"world": WORLD, "seeds": [0], "table": [{**pair, "quality": 0.2, **costs}], "gain": gains}
    (tmp_path / "signal.json").write_text(json.dumps(signal))
    drawn = figures.draw_study(tmp_path, tmp_path / "figures")
    names = [f"evidence_{name}" for name in ("differences", "training", "correction", "controls", "suites", "map")]
    assert [path.stem for path in drawn] == ["idea", "findings", *names, "signal", "findings_tuned"]
    assert all(path.stat().st_size > 10_000 and path.with_suffix(".svg").is_file() for path in drawn)
