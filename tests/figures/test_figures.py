"""Figures: what they show of a run folder, read back from the axes."""

import io
import json

import matplotlib
import numpy as np
import pytest
import torch
from legible import assert_legible
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from PIL import Image

from npo_core.figures import (
    group_before_after,
    intervention_signals,
    plateau,
    sample_gallery,
    save_figure,
    suite_pass_rates,
    training_curves,
)
from npo_core.files import write_table
from npo_core.method.groups import group_advantages
from npo_core.runs.validation import SUITES

WARNED, ORIGIN, TOTAL = 40, 20, 100
"""The synthetic intervention: a warning at 40, back to 20, replay until 40; 100 steps executed."""


def metric(policy_step, compute_step, branch):
    rng = np.random.default_rng(compute_step)
    rise = 0.2 + 0.3 * (1 - np.exp(-policy_step / 15)) + 0.12 * branch * (1 - np.exp(-(policy_step - ORIGIN) / 20))
    return {
        "policy_step": policy_step,
        "compute_step": compute_step,
        "branch": branch,
        "npo/reward": rise,
        "npo/pass_rate": rise + rng.normal(0, 0.02),
        "npo/entropy": 0.2 + 0.7 * np.exp(-policy_step / 25) + 0.15 * branch + rng.normal(0, 0.02),
        "npo/all_wrong_groups": 0.45 - 0.3 * rise + rng.normal(0, 0.02),
        "npo/gated_groups": 0.6,
        "npo/replaced_slots": 0.0,
        "loss": 0.0,
        "groups": {"a": 0.5},
    }


def segment(branch, start, compute_start, guidance=None, guide_until=0):
    content = {"branch": branch, "start": start, "compute_start": compute_start, "resume_from": None}
    return {"event": "segment", **content, "guidance": guidance, "guide_until": guide_until}


def choice(compute_step, chosen, at_edge=False, policy_step=WARNED, variances=(1.2, 2.0, 4.0)):
    candidates = [
        {"distance": d, "policy_step": policy_step - d, "quality": q, "variance": v, "prompts": 64, "signal": q / v}
        for d, q, v in zip((10, 20, 30), (0.1, 0.4, 0.45), variances, strict=True)
    ]
    content = {"policy_step": policy_step, "compute_step": compute_step, "chosen": chosen, "at_edge": at_edge}
    return {"event": "choice", **content, "reason": "", "candidates": candidates}


def write_run(folder, lines, events):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "events.jsonl").write_text("".join(json.dumps({"time": 0.0, **event}) + "\n" for event in events))
    return folder


@pytest.fixture
def grpo(tmp_path):
    return write_run(tmp_path / "grpo", [metric(t, t, 0) for t in range(1, TOTAL + 1)], [segment(0, 0, 0)])


@pytest.fixture
def autonpo(tmp_path):
    lines = [metric(t, t, 0) for t in range(1, WARNED + 1)]
    lines += [metric(t - ORIGIN, t, 1) for t in range(WARNED + 1, TOTAL + 1)]
    clocks = {"policy_step": WARNED, "compute_step": WARNED}
    events = [
        segment(0, 0, 0),
        {"event": "warning", **clocks, "reward": 0.5, "reward_change": 0.0, "entropy": 0.3, "entropy_change": -0.2},
        choice(WARNED, 20),
        {"event": "rollback", **clocks, "to": ORIGIN, "distance": WARNED - ORIGIN},
        # killed in the replay, after a second warning and roll-back that were then undone
        segment(1, ORIGIN, WARNED, "guidance/00-00040.parquet", WARNED),
        {"event": "warning", "compute_step": 75, "policy_step": 55},
        choice(75, 30, policy_step=55),
        {"event": "rollback", "compute_step": 75, "policy_step": 55, "to": 30, "distance": 25},
        segment(2, 30, 75, "guidance/01-00055.parquet", 55),
        {"event": "resume", "compute_step": 70, "policy_step": 50},
    ]
    return write_run(tmp_path / "autonpo", lines, events)


def lines_of(axes, label):
    return [line for line in axes.get_lines() if line.get_label() == label]


def texts_of(figure):
    return [text.get_text() for axes in figure.axes for text in [*axes.texts, axes.title, axes._left_title]]


def legends_of(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def read(run, name):
    return [json.loads(line)[name] for line in (run / "metrics.jsonl").read_text().splitlines()]


# Training curves


def test_curves_are_the_metrics_in_the_order_of_execution(grpo, autonpo):
    figure = training_curves({"GRPO": grpo, "AutoNPO": autonpo})
    for row, name in enumerate(["npo/pass_rate", "npo/entropy"]):
        axes = figure.axes[2 * row]
        for label, run in [("GRPO", grpo), ("AutoNPO", autonpo)]:
            (raw,) = lines_of(axes, f"{label}, single step")
            assert raw.get_xdata().tolist() == list(range(1, TOTAL + 1))
            assert raw.get_ydata().tolist() == read(run, name)
    labels = [axes.get_ylabel() for axes in figure.axes[::2]] + [axes.get_xlabel() for axes in figure.axes[2:]]
    assert "fraction" in labels[0] and "nats" in labels[1] and "compute" in labels[2] and labels[3] == "policy step"


def test_policy_clock_shows_the_final_trajectory_and_the_abandoned_stretch_fainter(autonpo):
    axes = training_curves({"AutoNPO": autonpo}).axes[1]
    values = read(autonpo, "npo/pass_rate")
    (raw,), (average,) = lines_of(axes, "AutoNPO, single step"), lines_of(axes, "AutoNPO, average")
    assert raw.get_xdata().tolist() == list(range(1, TOTAL - ORIGIN + 1))
    assert raw.get_ydata().tolist() == values[:ORIGIN] + values[WARNED:]
    (lost,) = lines_of(axes, "AutoNPO, abandoned")
    assert lost.get_xdata().tolist() == list(range(ORIGIN, WARNED + 1))
    assert lost.get_alpha() < (average.get_alpha() or 1)


def test_average_starts_at_the_first_value_and_goes_on_from_the_step_rolled_back_to(tmp_path):
    lines = [{**metric(t, c, b), "npo/pass_rate": v} for t, c, b, v in [(1, 1, 0, 1.0), (2, 2, 0, 0.0), (2, 3, 1, 1.0)]]
    run = write_run(tmp_path / "run", lines, [segment(0, 0, 0), segment(1, 1, 2, "guidance/x", 2)])
    (average,) = lines_of(training_curves({"x": run}).axes[0], "x, average")
    # weights 0.9 and 1: (0.9 · 1 + 0) / 1.9 on the first branch; only ones on the second branch's own past
    assert average.get_ydata().tolist() == pytest.approx([1.0, 0.9 / 1.9, 1.0])


def test_marks_stand_where_the_events_were_and_undone_events_are_left_out(grpo, autonpo):
    figure = training_curves({"GRPO": grpo, "AutoNPO": autonpo})
    for index, axes in enumerate(figure.axes):
        assert [line.get_xdata()[0] for line in lines_of(axes, "AutoNPO, roll-back")] == [WARNED]
        assert [line.get_xdata()[0] for line in lines_of(axes, "AutoNPO, warning")] == [WARNED]
        assert lines_of(axes, "GRPO, roll-back") == lines_of(axes, "GRPO, warning") == []
        (shade,) = [patch for patch in axes.patches if patch.get_label() == "AutoNPO, guided replay"]
        expected = (ORIGIN, WARNED) if index % 2 == 1 else (WARNED, WARNED + WARNED - ORIGIN)
        assert (shade.get_x(), shade.get_x() + shade.get_width()) == expected
        arrows = [(text.xyann[0], text.xy[0]) for text in axes.texts]
        assert arrows == ([(WARNED, ORIGIN)] if index % 2 == 1 else [])


def test_replay_is_shaded_only_as_far_as_it_was_executed(tmp_path):
    lines = [metric(t, t, 0) for t in range(1, 41)] + [metric(t - 20, t, 1) for t in range(41, 46)]
    run = write_run(tmp_path / "run", lines, [segment(0, 0, 0), segment(1, 20, 40, "guidance/x", 40)])
    compute, policy = training_curves({"x": run}).axes[:2]
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for axes in (policy, compute) for patch in axes.patches]
    assert spans == [(20, 25), (40, 45)]


def test_overlapping_arrows_are_kept_apart(tmp_path):
    lines = [metric(t, t, 0) for t in range(1, 101)]
    jumps = [(40, 20), (60, 30), (95, 70)]
    events = [
        {"event": "rollback", "compute_step": t, "policy_step": t, "to": to, "distance": t - to} for t, to in jumps
    ]
    axes = training_curves({"x": write_run(tmp_path / "run", lines, [segment(0, 0, 0), *events])}).axes[1]
    heights = [text.xy[1] for text in axes.texts]
    assert heights[0] != heights[1] and heights[0] == heights[2]


def test_legends_name_the_runs_and_only_the_marks_that_occur(grpo, autonpo):
    both = legends_of(training_curves({"GRPO": grpo, "AutoNPO": autonpo}))
    assert both[:2] == ["GRPO", "AutoNPO"]
    assert {"plateau warning", "roll-back", "guided replay"} < set(both)
    assert legends_of(training_curves({"GRPO": grpo})) == ["GRPO", "single step", "moving average (weight 0.9)"]


def test_curves_refuse_nothing_and_what_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="at least one run"):
        training_curves({})
    with pytest.raises(ValueError, match="no metric lines"):
        training_curves({"x": tmp_path})


# Plateau


def test_plateau_draws_the_mean_of_each_quarter(grpo):
    figure = plateau(grpo)
    for axes, name in zip(figure.axes, ["npo/pass_rate", "npo/entropy", "npo/all_wrong_groups"], strict=True):
        quarters = lines_of(axes, "mean of a quarter")
        assert [quarter.get_xdata().tolist() for quarter in quarters] == [[1, 25], [26, 50], [51, 75], [76, 100]]
        means = np.array(read(grpo, name)).reshape(4, 25).mean(axis=1)
        assert [quarter.get_ydata()[0] for quarter in quarters] == pytest.approx(means)
        assert [text.get_text() for text in axes.texts] == [f"mean {mean:.3f}" for mean in means]


def test_plateau_refuses_a_run_with_a_roll_back_or_without_quarters(autonpo, tmp_path):
    with pytest.raises(ValueError, match="roll-back"):
        plateau(autonpo)
    with pytest.raises(ValueError, match="3 steps"):
        plateau(write_run(tmp_path / "short", [metric(t, t, 0) for t in (1, 2, 3)], []))


# Signals


def test_signals_show_the_candidates_and_mark_the_chosen_distance(autonpo):
    figure = intervention_signals(autonpo)
    assert len(figure.axes) == 3  # the second choice was undone by the resume
    expected = {"quality": [0.1, 0.4, 0.45], "variance": [1.2, 2.0, 4.0], "signal": [0.1 / 1.2, 0.4 / 2, 0.45 / 4]}
    for axes, (name, values) in zip(figure.axes, expected.items(), strict=True):
        (line,) = lines_of(axes, name)
        assert line.get_xdata().tolist() == [10, 20, 30]
        assert line.get_ydata().tolist() == values
        assert lines_of(axes, "Δ* = 20")[0].get_xdata() == [20, 20]
        assert axes.get_yscale() == "linear"
    assert figure.axes[0].get_title() == f"policy step {WARNED}"
    assert legends_of(figure) == ["saved checkpoint", "chosen Δ*"]
    assert "Δ* = 20" in texts_of(figure)


def test_signals_name_edges_and_dismissals_and_spread_a_wide_variance(tmp_path, grpo):
    dismissed = {"event": "dismissed", "policy_step": 80, "compute_step": 80, "reason": "none eligible"}
    events = [
        segment(0, 0, 0),
        choice(40, 10),  # a decision that was interrupted and taken again
        choice(40, 30, at_edge=True, variances=(1.0, 5.0, 21.0)),
        choice(80, None, policy_step=80),
        dismissed,
    ]
    figure = intervention_signals(write_run(tmp_path / "run", [metric(t, t, 0) for t in range(1, 91)], events))
    assert [axes.get_title() for axes in figure.axes[:2]] == ["policy step 40", "policy step 80, dismissed"]
    assert [text for text in texts_of(figure) if "Δ*" in text] == ["Δ* = 30 (edge)"]
    assert [axes.get_yscale() for axes in figure.axes[::2]] == ["linear", "log", "linear"]
    with pytest.raises(ValueError, match="had no intervention"):
        intervention_signals(grpo)


def test_signals_show_hollow_where_no_prompt_was_probed(tmp_path):
    unprobed = choice(WARNED, 20)
    unprobed["candidates"][0] |= {"prompts": 0, "quality": 0.0, "signal": 0.0}
    figure = intervention_signals(write_run(tmp_path / "run", [metric(1, 1, 0)], [segment(0, 0, 0), unprobed]))
    for axes, name, expected in zip(figure.axes, ["quality", "variance", "signal"], [[10], None, [10]], strict=True):
        hollow = lines_of(axes, f"{name}, not probed")
        assert [line.get_xdata().tolist() for line in hollow] == ([] if expected is None else [expected])
        assert all(line.get_markerfacecolor() == "white" for line in hollow)
    assert "no failure since then was probed" in legends_of(figure)


# Scores


def scores(average, suites=SUITES, interval=False):
    rates = {suite: average + 0.02 * index - 0.07 for index, suite in enumerate(suites)}
    found = {"average": average, "suites": dict(reversed(rates.items()))}
    limits = {suite: [rate - 0.05, rate + 0.03] for suite, rate in rates.items()}
    return found | ({"interval": [average - 0.02, average + 0.01], "suite_intervals": limits} if interval else {})


def test_bars_hold_the_rates_in_the_order_of_the_suites():
    results = {"Base": scores(0.3), "AutoNPO": scores(0.5, interval=True)}
    figure = suite_pass_rates(results)
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["average", *SUITES]
    bars = [container for container in axes.containers if container.get_label() in results]
    for container, (label, given) in zip(bars, results.items(), strict=True):
        assert container.get_label() == label
        heights = [bar.get_height() for bar in container]
        assert heights == [given["average"], *(given["suites"][suite] for suite in SUITES)]
    ends = [bar.lines[2][0].get_segments()[0][:, 1].tolist() for bar in axes.containers if bar not in bars]
    limits = [results["AutoNPO"]["interval"], *results["AutoNPO"]["suite_intervals"].values()]
    assert ends == [pytest.approx(limit) for limit in limits]  # none for Base, which gave no intervals
    assert legends_of(figure) == ["Base", "AutoNPO", "95 % interval over test items"]


def test_bars_leave_out_suites_that_nobody_was_tested_on():
    axes = suite_pass_rates({"a": scores(0.3, ("wemath", "mmmu_pro")), "b": scores(0.3, ("mmmu_pro", "own"))}).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["average", "mmmu_pro", "wemath", "own"]
    assert [len(container) for container in axes.containers] == [3, 3]
    with pytest.raises(ValueError, match="at least one policy"):
        suite_pass_rates({})


# Rollouts


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8))


def group(number, rewards, guide=None, overwritten=False):
    """Rows of one group of 8; with `guide` the last slot is replaced, its own verdict being `overwritten`."""
    stream = io.BytesIO()
    picture().save(stream, "PNG")
    stored = [*rewards[:-1], 1.0] if guide is not None else rewards
    advantages = group_advantages(torch.tensor([stored]))[0].tolist()
    rows = []
    for slot in range(8):
        guided = guide is not None and slot == 7
        rows.append(
            {
                "uid": f"u{number}",
                "group": number,
                "slot": slot,
                "source": "guide" if guided else "policy",
                "guide_step": guide if guided else None,
                "token_ids": [1, 2],
                "text": "four 2 four 0 two 1 two 3 \\boxed{ 3 }"
                if guided
                else f"four 1 two {slot} \\boxed{{ {slot} }}",
                "behaviour_logps": [-0.1, -0.2],
                "current_logps": [-0.1, -0.2],
                "ratio": [1.0, 1.0],
                "reward": stored[slot],
                "advantage": advantages[slot],
                "overwritten_text": "the $lost$ one" + " and on" * 30 + " \\boxed{ 9 }" if guided else None,
                "overwritten_correct": overwritten if guided else None,
                "question": f"dice : multiply the dice onto {number} .",
                "answer": "3",
                "picture": stream.getvalue() if slot == 0 else None,
            }
        )
    return rows


def rollout_table(run, name, *groups):
    (run / "rollouts").mkdir(parents=True, exist_ok=True)
    write_table(run / "rollouts" / name, [row for rows in groups for row in rows])


def advantages_of(figure):
    return [[t.get_text() for t in axes.texts if t.get_position()[0] == 1][1:] for axes in figure.axes[2:4]]


def test_all_wrong_group_had_no_advantage_before_and_the_hand_numbers_after(tmp_path):
    mostly = group(0, [1.0] + [0.0] * 7, guide=40)
    rollout_table(tmp_path, "step-00021-b00.parquet", group(9, [0.0] * 8))
    rollout_table(tmp_path, "step-00041-b01.parquet", mostly, group(1, [0.0] * 8), group(2, [0.0] * 8, guide=40))
    figure = group_before_after(tmp_path)
    texts = texts_of(figure)
    assert any("dice : multiply the dice onto 2 ." in text and "Answer: 3" in text for text in texts)
    assert any("Policy step 41, branch 1" in text for text in texts)
    before, after = advantages_of(figure)
    assert before == ["0.00"] * 8
    # one right of eight: mean 1/8, unbiased std √(1/8): 7/8 · √8 = 2.475 and −1/8 · √8 = −0.354
    assert after == ["−0.35"] * 7 + ["+2.47"]
    assert texts.count("← guide, from step 40") == 1
    shades = [[(patch.get_y(), patch.get_height()) for patch in axes.patches] for axes in figure.axes[2:4]]
    assert shades[0] == shades[1] and len(shades[0]) == 1
    assert figure.axes[0].images[0].get_interpolation() == "nearest"
    assert np.array_equal(figure.axes[0].images[0].get_array(), np.array(picture()))
    assert any(text.startswith("…") and text.endswith("\\boxed{ 9 }") for text in texts)


def test_overwritten_right_rollout_counts_before(tmp_path):
    rollout_table(tmp_path, "step-00041-b01.parquet", group(0, [1.0] + [0.0] * 7, guide=40, overwritten=True))
    before, after = advantages_of(group_before_after(tmp_path))
    # two right of eight: mean 1/4, unbiased std √(3/14): 3/4 / 0.4629 = 1.620 and −1/4 / 0.4629 = −0.540
    assert before == after == ["+1.62", *["−0.54"] * 6, "+1.62"]


def test_run_without_a_guided_group_is_refused(tmp_path):
    rollout_table(tmp_path, "step-00021-b00.parquet", group(0, [0.0] * 8))
    with pytest.raises(ValueError, match="no guided group in any of the 1 rollout tables"):
        group_before_after(tmp_path)


def gallery_rows():
    responses = [
        ("four 2 \\boxed{ 3 }", True),
        ("four " * 40 + "\\boxed{ 7 }", False),
        ("a", True),
        ("b", False),
        ("c", True),
    ]
    rows = [{"picture": picture(), "question": "dice : onto 7 .", "answer": "3", "responses": responses}]
    return [*rows, {**rows[0], "picture": None, "question": "Long $x^2$ question. " * 12, "responses": responses[:1]}]


def test_gallery_marks_right_and_wrong_responses():
    figure = sample_gallery(gallery_rows())
    first = [(text.get_text(), to_hex(text.get_color())) for text in figure.axes[1].texts]
    marks = [text[0] for text, _ in first if text[0] in "✓✗"]
    assert marks == ["✓", "✗", "✓", "✗"]  # four responses at most
    assert len({color for text, color in first if text[0] == "✓"}) == 1
    assert {color for text, color in first if text[0] == "✓"}.isdisjoint(
        {color for text, color in first if text[0] == "✗"}
    )
    assert "…" in first[3][0] and first[3][0].endswith("\\boxed{ 7 }")
    assert [len(axes.images) for axes in figure.axes[::2]] == [1, 0]
    with pytest.raises(ValueError, match="at least one problem"):
        sample_gallery([])


# All


@pytest.fixture
def figures(grpo, autonpo):
    rollout_table(autonpo, "step-00021-b01.parquet", group(0, [0.0] * 8, guide=40))
    return {
        "curves": training_curves({"GRPO": grpo, "AutoNPO": autonpo}),
        "plateau": plateau(grpo),
        "signals": intervention_signals(autonpo),
        "suites": suite_pass_rates({"Base": scores(0.3), "AutoNPO": scores(0.5, interval=True)}),
        "group": group_before_after(autonpo),
        "gallery": sample_gallery(gallery_rows()),
    }


def test_figures_are_saved_whole_with_the_same_bytes_each_time(figures, tmp_path):
    for name, figure in figures.items():
        paths = save_figure(figure, tmp_path / "out", name)
        assert [path.name for path in paths] == [f"{name}.png", f"{name}.svg"]
        drawn = paths[1].read_bytes()
        assert b"<svg" in drawn and b"dc:date" not in drawn
        assert save_figure(figure, tmp_path / "out", name)[1].read_bytes() == drawn
    assert len(list((tmp_path / "out").iterdir())) == 2 * len(figures)
    with Image.open(tmp_path / "out" / "curves.png") as image:
        assert image.width == 7 * 200


def test_texts_are_large_enough_inside_of_the_figure_and_apart(figures):
    assert_legible(figures, ticks=False)


def test_drawing_leaves_the_style_of_the_session_alone_and_no_figure_open(grpo):
    before = matplotlib.rcParams.copy()
    plateau(grpo)
    assert matplotlib.rcParams == before
    assert plt.get_fignums() == []
