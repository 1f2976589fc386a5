"""The figure of the findings: every difference in its panel, far ones in numbers, and committed as it is drawn."""

from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from evidences import evidence as made_up
from legible import assert_legible

from npo_core.figures import findings, save_figure
from npo_core.figures.findings import BLOCKS
from npo_core.study.arms import ARMS
from npo_core.study.families import FAMILIES, FIRST_TRIED, GUIDED
from npo_core.study.results import Evidence, read_evidence

ROOT = Path(__file__).parents[2]
BASE = (0.40, 0.50, 0.45)
GAINS = {
    "GRPO, longer": (0.20, 0.20, 0.20),
    "GRPO, groups of 16": (0.10, 0.12, 0.08),
    "GRPO, best rate": (0.05, 0.06, 0.04),
    "NPO early": (0.02, 0.01, -0.01),
    "NPO": (0.03, 0.05, 0.04),
    "NPO, no guide": (-0.02, 0.01, 0.00),
}


def drawn(figure, arm):
    """x of the seeds of an arm by panel, in the order of the seeds."""
    return [
        [float(line.get_xdata()[0]) for line in axes.get_lines() if line.get_label().startswith(f"{arm}, seed ")]
        for axes in figure.axes
    ]


def row_of(axes, arm):
    return next(line.get_ydata()[0] for line in axes.get_lines() if line.get_label() == f"{arm}, seed 0")


def bars_at(axes, place):
    ends = np.concatenate([bars.get_segments() for bars in axes.collections]).reshape(-1, 4)
    return ends[np.isclose(ends[:, 1], place)][:, [0, 2]]


def test_every_clock_has_its_reference_and_every_seed_its_place():
    figure = findings(made_up(GAINS, base=BASE, ends={"NPO": 30}))
    assert [axes.get_title().split("\n")[0] for axes in figure.axes] == [
        "at equal policy step",
        "at equal",
        "at equal total rollouts",
    ]
    base = np.array(BASE)
    half = base / 2 + base / 4  # what GRPO has half way
    at_thirty = base / 2 + base / 2 * 30 / 40
    longer = base / 2 + (base / 2 + 0.20) / 2  # twice the rollouts a step: half way at as many
    policy, compute, rollouts = drawn(figure, "NPO")
    assert policy == pytest.approx(base + GAINS["NPO"] - at_thirty)
    assert compute == pytest.approx(GAINS["NPO"])
    assert rollouts == pytest.approx(base + GAINS["NPO"] - longer)
    assert (longer > base / 2 + (base / 2 + np.array(GAINS["GRPO, groups of 16"])) / 2).all() and (longer > half).all()
    # the reference itself is held against the other one
    assert drawn(figure, "GRPO, groups of 16")[2] == pytest.approx(np.array(GAINS["GRPO, groups of 16"]) - 0.20)
    axes = figure.axes[1]
    for arm in ("GRPO, best rate", "NPO early", "NPO", "NPO, no guide"):
        place, values = row_of(axes, arm), np.array(GAINS[arm])
        (mean,) = [line for line in axes.get_lines() if line.get_label() == arm]
        assert (mean.get_xdata()[0], mean.get_ydata()[0]) == pytest.approx((values.mean(), place))
        ends = scipy.stats.t.interval(0.95, 2, loc=values.mean(), scale=scipy.stats.sem(values))
        assert bars_at(axes, place) == pytest.approx(np.array([ends]))
    assert "3 seeds (0, 1, 2)" in axes.get_xlabel() and "minus “GRPO, longer”" in axes.get_xlabel()
    assert_legible({"findings": figure})


def test_a_run_that_broke_is_a_cross_at_the_edge_with_its_number():
    whole = made_up(GAINS | {"NPO, no guide": (-0.40, 0.01, 0.02)}, base=BASE)
    lost = (whole.training["arm"] == "NPO, no guide") & (whole.training["seed"] == 0)
    training = whole.training.assign(pass_rate=whole.training["pass_rate"].mask(lost, 0.0))
    figure = findings(Evidence(whole.scores, training, whole.about))
    axes = figure.axes[1]
    low, high = axes.get_xlim()
    assert -0.4 < low < 0 < high < 0.4
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines["NPO, no guide, seed 0"].get_marker() == "X" and lines["NPO, no guide, seed 1"].get_marker() == "D"
    assert low < lines["NPO, no guide, seed 0"].get_xdata()[0] < 0.9 * low
    assert [text.get_text() for text in axes.texts] == ["−0.40"], "the mean lies within"
    ((left, right),) = bars_at(axes, row_of(axes, "NPO, no guide"))
    assert (left, right) == pytest.approx((low, high)), "an interval from −0.71 to 0.46 ends with the axis"
    assert "run that broke (pass rate < 1 %)" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert "X" not in [line.get_marker() for line in findings(whole).axes[1].get_lines()]
    assert_legible({"findings": figure})


def test_a_broken_reference_is_said():
    whole = made_up(GAINS, base=BASE)
    lost = (whole.training["arm"] == "GRPO") & (whole.training["seed"] == 1)
    training = whole.training.assign(pass_rate=whole.training["pass_rate"].mask(lost, 0.0))
    figure = findings(Evidence(whole.scores, training, whole.about))
    assert "GRPO broke on seed 1" in figure.axes[1].get_xlabel().replace("\n", " ")
    assert "broke" not in findings(whole).axes[1].get_xlabel()
    assert_legible({"findings": figure})


def test_one_seed_is_a_point_without_an_interval():
    figure = findings(made_up({arm: values[:1] for arm, values in GAINS.items()}, base=BASE[:1]))
    assert all(not axes.collections for axes in figure.axes)
    assert drawn(figure, "NPO")[1] == pytest.approx([0.03])
    assert "one seed (0), no interval" in figure.axes[1].get_xlabel()
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert not [text for text in legend if "interval" in text or "single" in text]


def test_a_failed_seed_is_left_out_and_an_arm_of_no_seed_has_an_empty_row():
    failed = [("NPO", 1), *(("NPO early", seed) for seed in range(3))]
    figure = findings(made_up(GAINS, base=BASE, failed=failed))
    assert drawn(figure, "NPO")[1] == pytest.approx([0.03, 0.04])
    assert drawn(figure, "NPO early") == [[], [], []]
    assert "NPO early" in [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_all_arms_of_the_claims_about_guidance_are_there_and_what_is_not_run_is_refused():
    arms = [arm for block in BLOCKS for arm in block]
    assert len(arms) == len(set(arms)) and set(arms) <= set(ARMS)
    compared = {arm for family in FAMILIES[:5] for pair in family.pairs for arm in (pair.arm, pair.against)} - {None}
    assert compared == set(arms) and set(FIRST_TRIED) | set(GUIDED) < compared
    with pytest.raises(ValueError, match="holds no arm of this figure"):
        findings(made_up({"LUFFY": (0.0, 0.0, 0.0)}))
    found = findings(made_up({"NPO": (0.01, 0.02, 0.03)}))
    assert drawn(found, "NPO")[2] == [], "nothing to hold it against at equal total rollouts"


def test_the_findings_are_committed_as_they_are_drawn(tmp_path):
    _, svg = save_figure(findings(read_evidence(ROOT / "data" / "results")), tmp_path, "findings")
    assert svg.read_bytes() == (ROOT / "figures" / "findings.svg").read_bytes(), "run make figures"
