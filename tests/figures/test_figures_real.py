"""The figure of the real model shows its tables: courses on two clocks with their falls, and rates by length."""

import json

import pytest
from legible import assert_legible
from real_evidences import BASE, LENGTHS, write_results

from npo_core.__main__ import main
from npo_core.figures import draw_study, real_arms
from npo_core.figures.style import ARM_LOOKS
from npo_core.study.real_results import ABOUT, read_real

FINALS = {
    "GRPO": (0.50, 0.56, 0.44),
    "GRPO, groups of 16": (0.52, 0.53, 0.51),
    "NPO early": (0.60, 0.66, 0.54),
    "AutoNPO": (0.56, 0.59, 0.53),
    "NPO early, own resample": (0.51, 0.52, 0.50),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    jumps = {"AutoNPO": [(37, 20), None, (43, 30)]}
    return read_real(write_results(tmp_path_factory.mktemp("results"), FINALS, jumps=jumps))


@pytest.fixture(scope="module")
def figure(results):
    return real_arms(results)


def lines(axes, label):
    return [line for line in axes.get_lines() if line.get_label() == label]


def course(axes, label):
    [line] = lines(axes, label)
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_the_mean_of_an_arm_rises_from_the_base_policy_to_the_mean_of_its_ends(figure):
    steps, rollouts, _ = figure.axes
    wanted = [(step, pytest.approx(BASE + 0.3 * step / 60)) for step in range(0, 61, 10)]
    assert course(steps, "GRPO") == wanted
    assert course(rollouts, "GRPO") == [(64 * step, value) for step, value in wanted]
    assert course(rollouts, "GRPO, groups of 16")[-1] == (5120, pytest.approx(0.52))


def test_off_line_rollouts_are_level_and_a_roll_back_falls_to_what_it_goes_back_to(figure):
    steps, rollouts, _ = figure.axes
    guide = BASE + 0.4 * 20 / 60
    assert course(steps, "NPO early")[2:5] == [(20, pytest.approx(value)) for value in (guide, guide, BASE)]
    fall = [(1280, guide), (2560, guide), (2560, BASE), (3200, BASE + 0.4 * 30 / 60)]
    assert course(rollouts, "NPO early")[2:6] == [(at, pytest.approx(value)) for at, value in fall]


def test_seeds_that_go_back_at_different_steps_fall_one_by_one(figure):
    steps, rollouts, _ = figure.axes
    seeds = lines(steps, "AutoNPO, seed")
    falls = [
        [x for x, one, other in zip(s.get_xdata()[1:], s.get_ydata(), s.get_ydata()[1:], strict=False) if other < one]
        for s in seeds
    ]
    assert falls == [[37], [], [43]]
    # it went back to step 20 of a run that ends at 0.56, when it had sampled 37 steps and what guides took
    [_, spent] = [
        x
        for x, y in zip(*lines(rollouts, "AutoNPO, seed")[0].get_data(), strict=True)
        if 64 * 37 <= x <= 64 * 37 + 1280
    ][-2:]
    assert spent == 64 * 37 + 1280
    assert min(seeds[0].get_ydata()[list(seeds[0].get_xdata()).index(37) :]) == pytest.approx(BASE + 0.36 * 20 / 60)
    assert [x for x, _ in course(steps, "AutoNPO")] == [0, 10, 20, 30, 60]  # what all three have


def test_rates_stand_by_length_with_every_seed(figure):
    below = figure.axes[2]
    for place, arm in enumerate(FINALS):
        [mean] = lines(below, arm)
        assert list(mean.get_ydata()) == pytest.approx([sum(FINALS[arm]) / 3 + 0.1 + more for more in (0.02, -0.02)])
        assert [round(x) for x in mean.get_xdata()] == list(LENGTHS)
        assert sorted(line.get_ydata()[0] for line in lines(below, f"{arm}, seed")) == pytest.approx(
            sorted(value + 0.12 for value in FINALS[arm])
        )
        assert (mean.get_color(), mean.get_linestyle()) == ARM_LOOKS[arm], place


def test_what_there_is_of_a_study_is_drawn_and_what_is_missing_said(tmp_path, figure):
    part = {"GRPO": (0.5, 0.4, None), "NPO early": (0.6, None, None)}
    early = real_arms(read_real(write_results(tmp_path / "part", part)))
    said = [text.get_text() for legend in early.legends for text in legend.get_texts()]
    assert "GRPO (n = 2 of 3)" in said and "NPO early (n = 1 of 3)" in said and "AutoNPO: no run" in said
    without = real_arms(read_real(write_results(tmp_path / "without", {"NPO early": (0.6, 0.5, 0.4)})))
    # without GRPO nothing says where the base policy stood: no start, and no fall to it
    assert [x for x, _ in course(without.axes[0], "NPO early")] == [10, 20, 30, 40, 50, 60]
    assert_legible({"whole": figure, "part": early, "without": without})


def test_no_run_is_refused_and_no_results_draw_nothing(tmp_path):
    folder = write_results(tmp_path / "real", FINALS)
    about = json.loads((folder / ABOUT).read_text())
    (folder / ABOUT).write_text(json.dumps({**about, "runs": []}))
    with pytest.raises(ValueError, match="hold no run"):
        real_arms(read_real(folder))
    (folder / ABOUT).unlink()
    assert [path.name for path in draw_study(tmp_path, tmp_path / "figures")] == ["idea.png"]


def test_the_command_draws_it_from_results_and_from_a_folder_of_its_own(tmp_path, capsys):
    folder = write_results(tmp_path / "real", FINALS)
    for results, out in ((tmp_path, "one"), (folder, "other")):
        assert main(["figures", "--results", str(results), "--out", str(tmp_path / out)]) == 0
    assert "holds no results" not in capsys.readouterr().out
    one, other = ((tmp_path / out / "real_arms.svg").read_bytes() for out in ("one", "other"))
    assert one == other
