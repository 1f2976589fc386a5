"""Figures of the studies over seeds: what they show of their results files, read back from the axes."""

import json

import matplotlib
import numpy as np
import pytest
import scipy.stats
from legible import assert_legible
from matplotlib import pyplot as plt

from npo_core.figures import (
    final_differences,
    gain_against_signal,
    gain_over_distance,
    learning_curves,
    save_figure,
    speed_up,
)
from npo_core.figures.style import COLORS

SEEDS = (0, 1, 2)
ROLLBACKS = {
    "GRPO": [],
    "NPO early": [(20, 20, 20)],
    "NPO late": [(60, 60, 30)],
    "NPO early+late": [(20, 20, 20), (60, 40, 20)],
}
"""Compute step, policy step and distance of each roll-back of an arm; 80 compute steps each."""
SOURCES = {"resample": 0, "000020": 20, "000060": 60, "000100": 100, "teacher": None}


def run(arm, seed):
    """Metrics tell where they come from: the pass rate is the compute step in thousandths, the entropy the seed."""
    steps, jumps, policy = [], {step: distance for step, _, distance in ROLLBACKS[arm]}, 0
    for compute in range(1, 81):
        policy += 1
        steps.append((policy, compute))
        policy -= jumps.get(compute, 0)
    keys = ("compute_step", "policy_step", "distance")
    return {
        "arm": arm,
        "seed": seed,
        "policy_step": [policy for policy, _ in steps],
        "compute_step": [compute for _, compute in steps],
        "pass_rate": [compute / 1000 + 0.01 * seed for _, compute in steps],
        "entropy": [0.5 + 0.1 * seed for _ in steps],
        "interventions": [{"stage": "x", **dict(zip(keys, jump, strict=True))} for jump in ROLLBACKS[arm]],
    }


def estimate(value, seeds=(-0.01, 0.0, 0.01), **content):
    return {
        **content,
        "value": value,
        "low": value - 0.02,
        "high": value + 0.03,
        "per_seed": [value + s for s in seeds],
    }


def interventions():
    counts = [estimate(v, arm="NPO early", count=c) for c, v in [("without scout", 1.5), ("with scout", 0.9)]]
    counts[1]["per_seed"][1] = None
    counts.append(
        {"arm": "NPO early", "count": "never", "value": None, "low": None, "high": None, "per_seed": [None] * 3}
    )
    arms = [arm for arm in ROLLBACKS if arm != "GRPO"]
    differences = [estimate(0.01 * i, arm=arm, clock=c) for c in ("compute", "policy") for i, arm in enumerate(arms)]
    runs = [run(arm, seed) for seed in SEEDS for arm in ROLLBACKS]
    return {"schema": 1, "runs": runs, "speed_up": {"level_share": 0.8, "rows": counts}, "differences": differences}


def gain(origins=(0, 40)):
    arms = []
    for seed in SEEDS:
        for origin in origins:
            for index, (source, distance) in enumerate(SOURCES.items()):
                for mode in ("current", "exact"):
                    if distance is not None and origin + distance > 100:
                        distance = 100 - origin
                    signal = 10.0 ** -(index + seed) * (0.5 if mode == "exact" else 1.0)
                    signals = {"signal_gradient_current": signal, "signal_gradient_exact": signal / 3}
                    where = {"seed": seed, "origin": origin, "source": source, "distance": distance, "mode": mode}
                    arms.append(
                        {**where, **signals, "gain": 0.02 - 0.01 * index + 0.002 * seed + (mode == "exact") * 0.001}
                    )
    arms = [a for a in arms if not (a["origin"] == 40 and a["source"] == "000100")]
    primary = {"current": "signal_gradient_current", "exact": "signal_gradient_exact"}
    ranks = [
        estimate(0.5 if signal == primary[mode] else 0.9, origin=origin, mode=mode, signal=signal)
        for origin in origins
        for mode in primary
        for signal in primary.values()
    ]
    return {"schema": 1, "arms": arms, "correlation": ranks, "primary": primary}


def write(folder, name, content):
    path = folder / name
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    manual, gains = write(folder, "interventions.json", interventions()), write(folder, "gain.json", gain())
    drawn = {draw.__name__: draw(manual) for draw in (learning_curves, speed_up, final_differences)}
    return drawn | {draw.__name__: draw(gains) for draw in (gain_against_signal, gain_over_distance)}


def lines_of(axes, label):
    return [line for line in axes.get_lines() if line.get_label() == label]


def line_of(axes, label):
    (line,) = lines_of(axes, label)
    return line


def point_of(axes, label):
    line = line_of(axes, label)
    return line.get_xdata()[0], line.get_ydata()[0]


def bars_of(axes):
    """Ends of all interval bars: rows of (x, y) of one end and of the other."""
    return np.concatenate([bars.get_segments() for bars in axes.collections]).reshape(-1, 4)


def legends_of(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def average(values):
    """Moving average of weight 0.9 whose weights sum to one."""
    weights = 0.9 ** np.arange(len(values))[::-1]
    return weights @ values / weights.sum()


# Learning curves


def test_policy_clock_shows_the_mean_over_seeds_of_the_final_trajectory(figures):
    compute, policy = figures["learning_curves"].axes[:2]
    line = line_of(policy, "NPO early+late")
    # 20 steps lost to the first roll-back, 20 more to the second at policy step 40
    steps = [*range(21, 41), *range(61, 81)]
    assert line.get_xdata().tolist() == list(range(1, 41))
    rates = np.array(steps) / 1000 + 0.01
    expected = [average(rates[: n + 1]) for n in range(40)]
    assert line.get_ydata() == pytest.approx(expected)
    assert line_of(compute, "NPO early+late").get_xdata().tolist() == list(range(1, 81))
    # the first step after the second roll-back goes on from the average at policy step 20
    assert line_of(compute, "NPO early+late").get_ydata()[60] == pytest.approx(expected[20])
    assert line_of(policy, "GRPO").get_xdata().tolist() == list(range(1, 81))
    assert [axes.get_xlabel() for axes in figures["learning_curves"].axes[2:]] == [
        "compute step (optimiser steps executed)",
        "policy step",
    ]


def test_band_is_the_t_interval_over_seeds(figures):
    axes = figures["learning_curves"].axes[2]
    band = axes.collections[0].get_paths()[0].vertices
    seeds = [0.5, 0.6, 0.7]
    ends = scipy.stats.t.interval(0.95, 2, loc=0.6, scale=scipy.stats.sem(seeds))
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx(ends)
    assert line_of(axes, "GRPO").get_ydata() == pytest.approx(np.full(80, 0.6))


def test_roll_backs_stand_where_they_were_in_the_colour_of_their_arm(figures):
    for index, clock in enumerate((0, 1)):
        axes = figures["learning_curves"].axes[index]
        for arm, jumps in ROLLBACKS.items():
            marks = lines_of(axes, f"{arm}, roll-back")
            assert sorted(mark.get_xdata()[0] for mark in marks) == sorted({jump[clock] for jump in jumps})
            assert {mark.get_color() for mark in marks} <= {line_of(axes, arm).get_color()}
    shared = [mark for arm in ROLLBACKS for mark in lines_of(axes, f"{arm}, roll-back") if mark.get_xdata()[0] == 20]
    assert len({mark._unscaled_dash_pattern[0] for mark in shared}) == len(shared) == 2
    assert "roll-back, in the colour of its arm" in legends_of(figures["learning_curves"])
    assert legends_of(figures["learning_curves"])[:4] == [f"{arm} (n = 3)" for arm in ROLLBACKS]


def test_a_single_seed_has_a_curve_and_no_band(tmp_path):
    content = interventions()
    content["runs"] = [found for found in content["runs"] if found["seed"] == 2 and found["arm"] == "GRPO"]
    figure = learning_curves(write(tmp_path, "one.json", content))
    assert line_of(figure.axes[2], "GRPO").get_ydata() == pytest.approx(np.full(80, 0.7))
    assert not any(len(path.vertices) for band in figure.axes[2].collections for path in band.get_paths())
    assert "roll-back, in the colour of its arm" not in legends_of(figure)


def test_steps_that_a_seed_lacks_are_left_out(tmp_path):
    content = interventions()
    content["runs"] = [found for found in content["runs"] if found["arm"] == "GRPO"]
    for name in ("policy_step", "compute_step", "pass_rate", "entropy"):
        content["runs"][1][name] = content["runs"][1][name][:50]
    figure = learning_curves(write(tmp_path, "short.json", content))
    assert [len(line_of(axes, "GRPO").get_xdata()) for axes in figure.axes] == [50] * 4


# Speed-up and differences


def test_speed_up_shows_values_intervals_and_seeds(figures):
    (axes,) = figures["speed_up"].axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["NPO early, without scout", "NPO early, with scout\n(2 of 3 seeds)", "NPO early, never"]
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in lines_of(axes, "NPO early")]
    assert points == [(1.5, 0), (0.9, 1)]
    assert bars_of(axes).tolist() == [pytest.approx(row) for row in ([1.48, 0, 1.53, 0], [0.88, 1, 0.93, 1])]
    seeds = [line.get_xdata().tolist() for line in lines_of(axes, "NPO early, seeds")]
    assert seeds == [pytest.approx([1.49, 1.5, 1.51]), pytest.approx([0.89, 0.91])]
    assert [text.get_text() for text in axes.texts] == ["undefined"]
    assert [line.get_xdata()[0] for line in axes.get_lines() if line.get_linestyle() == "--"] == [1]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row is at the top
    assert "80 % of GRPO's rise" in axes.get_xlabel()


def test_differences_have_a_panel_per_clock(figures):
    figure = figures["final_differences"]
    assert [axes.get_title() for axes in figure.axes] == ["at equal compute steps", "at equal policy steps"]
    arms = [arm for arm in ROLLBACKS if arm != "GRPO"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == arms
    for axes in figure.axes:
        for place, arm in enumerate(arms):
            assert point_of(axes, arm) == (0.01 * place, place)
            low, high = bars_of(axes)[place][[0, 2]]
            assert (low, high) == pytest.approx((0.01 * place - 0.02, 0.01 * place + 0.03))
        assert [line.get_xdata()[0] for line in axes.get_lines() if line.get_linestyle() == "--"] == [0]


def test_an_arm_has_one_colour_in_all_figures(figures):
    for arm, color in zip(ROLLBACKS, COLORS, strict=False):
        found = [
            line for name in ("learning_curves", "final_differences") for line in lines_of(figures[name].axes[0], arm)
        ]
        assert found and {line.get_color() for line in found} == {color}
    assert lines_of(figures["speed_up"].axes[0], "NPO early")[0].get_color() == COLORS[1]


# Gain


def test_gain_is_drawn_over_the_primary_signal_of_its_mode(figures):
    panels = iter(figures["gain_against_signal"].axes)
    names = {0: "own resample (Δ = 0)", 1: "Δ = 20", 2: "Δ = 60", 3: "end of the run", 4: "external teacher"}
    for origin, title in ((0, "from the base policy"), (40, "from policy step 40")):
        for mode, scale in (("current", 1.0), ("exact", 0.5 / 3)):
            axes = next(panels)
            assert axes.get_title() == f"{title}, ratio mode {mode}\nρ = 0.50 [0.48, 0.53]"
            assert axes.get_xscale() == "log" and f"mode {mode}" in axes.get_xlabel()
            for index, name in names.items():
                if origin == 40 and index == 3:
                    continue
                name = "end of the run" if origin == 40 and index == 2 else name
                signals = scale * 10.0 ** -(index + np.arange(3))
                gains = 0.02 - 0.01 * index + 0.002 * np.arange(3) + (mode == "exact") * 0.001
                seeds = line_of(axes, f"{name}, seeds")
                assert seeds.get_xdata() == pytest.approx(signals) and seeds.get_ydata() == pytest.approx(gains)
                assert point_of(axes, name) == pytest.approx((signals[1], gains[1]))
                ends = scipy.stats.t.interval(0.95, 2, loc=gains[1], scale=scipy.stats.sem(gains))
                left, right = np.exp(scipy.stats.t.interval(0.95, 2, np.log(signals[1]), np.log(10) / np.sqrt(3)))
                for bar in ([signals[1], ends[0], signals[1], ends[1]], [left, gains[1], right, gains[1]]):
                    assert np.isclose(bars_of(axes), bar).all(axis=1).any()
    looks = {(line.get_marker(), line.get_color()) for name in names.values() for line in lines_of(axes, name)}
    assert len(looks) == 4  # every source has its own marker and colour


def test_a_source_looks_the_same_in_all_panels(figures):
    panels = figures["gain_against_signal"].axes
    for name in ("own resample (Δ = 0)", "Δ = 20", "end of the run", "external teacher"):
        looks = {(line.get_marker(), line.get_color()) for axes in panels for line in lines_of(axes, name)}
        assert len(looks) == 1


def test_a_signal_of_zero_keeps_its_place(tmp_path):
    content = gain(origins=(0,))
    for arm in content["arms"]:
        arm["signal_gradient_exact"] *= arm["source"] != "resample"
    content["correlation"] = []
    current, exact = gain_against_signal(write(tmp_path, "gain.json", content)).axes
    assert (current.get_xscale(), exact.get_xscale()) == ("log", "symlog")
    assert point_of(exact, "own resample (Δ = 0)")[0] == 0
    assert exact.get_xticks()[0] == 0 and len(exact.get_xticks()) >= 3 and exact.get_xlim()[0] < 0
    assert exact.get_title().endswith("ρ = undefined")


def test_gain_over_distance_orders_the_sources_and_parts_the_modes(figures):
    base, later = figures["gain_over_distance"].axes
    ticks = [label.get_text() for label in base.get_xticklabels()]
    assert ticks == ["0\nown", "20\n", "60\n", "100\nend", "teacher\n"]
    assert [label.get_text() for label in later.get_xticklabels()] == ["0\nown", "20\n", "60\nend", "teacher\n"]
    for shift, mode in ((-0.17, "current"), (0.17, "exact")):
        points = sorted((line.get_xdata()[0], line.get_ydata()[0]) for line in lines_of(base, mode))
        means = [0.022 - 0.01 * index + (mode == "exact") * 0.001 for index in range(5)]
        assert np.array(points) == pytest.approx(np.array([np.arange(5) + shift, means]).T)
        half = scipy.stats.t.ppf(0.975, 2) * 0.002 / np.sqrt(3)
        for place, mean in zip(np.arange(5) + shift, means, strict=True):
            assert np.isclose(bars_of(base), [place, mean - half, place, mean + half]).all(axis=1).any()
    assert {line.get_color() for line in lines_of(base, "current")} != {
        line.get_color() for line in lines_of(base, "exact")
    }
    assert legends_of(figures["gain_over_distance"])[:2] == ["ratio mode current", "ratio mode exact"]


# All


def test_nothing_to_draw_is_refused(tmp_path):
    empty = write(tmp_path, "empty.json", {"schema": 1})
    for draw, name in [
        (learning_curves, "runs"),
        (speed_up, "rows"),
        (final_differences, "differences"),
        (gain_against_signal, "arms"),
        (gain_over_distance, "arms"),
    ]:
        with pytest.raises(ValueError, match=f"holds no {name}"):
            draw(empty)
        with pytest.raises(FileNotFoundError, match=r"none\.json"):
            draw(tmp_path / "none.json")
    unguided = write(tmp_path, "unguided.json", {"schema": 1, "arms": [{"mode": None, "source": "unguided"}]})
    with pytest.raises(ValueError, match="no guided arm"):
        gain_over_distance(unguided)
    unmeasured = gain() | {"primary": {"current": "signal_second_moment", "exact": "signal_gradient_exact"}}
    with pytest.raises(ValueError, match="holds no signal_second_moment"):
        gain_against_signal(write(tmp_path, "gain.json", unmeasured))
    stopped = interventions()
    stopped["runs"][0]["policy_step"] = []
    with pytest.raises(ValueError, match="run without steps: GRPO, seed 0"):
        learning_curves(write(tmp_path, "stopped.json", stopped))


def test_figures_are_saved_with_the_same_bytes_each_time(figures, tmp_path):
    for name in ("speed_up", "gain_against_signal"):
        drawn = save_figure(figures[name], tmp_path, name)[1].read_bytes()
        assert save_figure(figures[name], tmp_path, name)[1].read_bytes() == drawn


def test_texts_are_large_enough_inside_of_the_figure_and_apart(figures):
    assert_legible(figures)


def test_drawing_leaves_the_style_of_the_session_alone_and_no_figure_open(tmp_path):
    before = matplotlib.rcParams.copy()
    speed_up(write(tmp_path, "interventions.json", interventions()))
    assert matplotlib.rcParams == before
    assert plt.get_fignums() == []
