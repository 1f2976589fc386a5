"""Figures of a signal measurement: what they show of its table and summary, read back from the axes."""

import json

import matplotlib
import numpy as np
import pandas as pd
import pytest
from legible import assert_legible
from matplotlib import pyplot as plt
from matplotlib.colors import same_color

from npo_core.figures import (
    gain_over_distance,
    proxy_agreement,
    quality_stability,
    save_figure,
    signal_curves,
)
from npo_core.figures.signal import COST_COLORS, PROXY_NAMES, interval_text, log_axis
from npo_core.figures.style import canvas
from npo_core.method.quantities import ESTIMATES, MEASURED_COSTS, SIGNALS, Cost
from npo_core.runs.measurement import PROXIES

DISTANCES = (0, 5, 10, 20, 40, 80, 160)
ORIGINS = (0, 100)
TAU, GROWTH = 30.0, 0.05


def estimates(origin, distance):
    """Known values: Q rises to 0.6, ln of the exact cost grows with the distance, faster from the base policy."""
    ahead = abs(distance)
    quality = 0.05 + 0.55 * (1 - np.exp(-ahead / TAU)) if distance >= 0 else 0.04
    exact = np.exp(GROWTH * ahead / (1 + origin / 50))
    values = dict.fromkeys(map(str, Cost), 1.0 + 0.01 * ahead)
    values |= {"quality": quality, "quality_1": quality / 3, "token_kl": 0.01 * ahead, "token_kl_policy": 0.008 * ahead}
    values |= {"kl": np.exp(0.02 * ahead), "sequence": exact**1.5, "sequence_policy": exact}
    return values | {"gradient_exact": exact, "gradient_current": 1 + 0.002 * ahead}


def row(origin, source, distance, kind, **changes):
    values = estimates(origin, 60 if distance is None else distance) | changes
    for signal in SIGNALS:
        values[signal.name] = values[signal.quality] / values[signal.cost]
    names = [*map(str, ESTIMATES), *(signal.name for signal in SIGNALS)]
    bounds = {f"{n}_{end}": values[n] * scale for n in names for end, scale in [("low", 0.8), ("high", 1.3)]}
    return {"origin": origin, "source": source, "distance": distance, "kind": kind, "failing": 50, **values, **bounds}


def rows_of(origin):
    rows = [row(origin, f"{origin + d:06d}" if d else "resample", d, "future" if d else "resample") for d in DISTANCES]
    rows += [row(origin, f"{origin - d:06d}", -d, "past") for d in (10, 50) if origin >= d]
    return [*rows, row(origin, "teacher", None, "teacher", quality=0.9, gradient_exact=2000.0)]


def rank(origin, proxy, cost):
    """An agreement that is another for each proxy and cost, and undefined from policy step 100."""
    value = PROXIES.index(proxy) / 8 - MEASURED_COSTS.index(cost)
    defined = {"value": value, "low": value - 0.5, "high": value + 0.5}
    return defined if origin == 0 else dict.fromkeys(defined)


def entry(origin, rows):
    """What the summary holds of an origin; Δ* of the cost kl is said to be at an edge."""
    ahead = [r for r in rows if r["distance"] is not None and r["distance"] >= 0]
    optimum = {}
    for name in (signal.name for signal in SIGNALS):
        best = max(ahead, key=lambda r: r[name])
        ends = {"low": 5.0, "high": 40.0} if name != "signal_gradient_current" else {"low": None, "high": None}
        optimum[name] = {"distance": best["distance"], "signal": best[name], "at_edge": name == "signal_kl", **ends}
    fit = {"q_inf": 0.6, "tau": TAU, "beta": 0.02} if origin == 0 else dict.fromkeys(("q_inf", "tau", "beta"))
    return {
        "failing": 50,
        "optimum": optimum,
        "fit": {quality: {"kl": fit} for quality in ("quality", "quality_1")},
        "agreement": {cost: {proxy: rank(origin, proxy, cost) for proxy in PROXIES} for cost in MEASURED_COSTS},
    }


def write(folder, tables, measured=True):
    """A measurement's folder; without `measured` as after gradients = 0."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame([r for rows in tables.values() for r in rows])
    about = {"rollouts": 8, "c": 2.0, "gradients": 16 * measured}
    summary = {"settings": about, "origins": {str(o): entry(o, rows) for o, rows in tables.items()}}
    if measured:
        summary["c"] = {kl: {cost: {"value": 4.0} for cost in MEASURED_COSTS} for kl in ("token_kl", "token_kl_policy")}
    else:
        table = table[[name for name in table if "gradient" not in name]]
        for found in summary["origins"].values():
            found["agreement"] = {}
    table.to_parquet(folder / "table.parquet")
    (folder / "signal.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return write(tmp_path_factory.mktemp("signal"), {origin: rows_of(origin) for origin in ORIGINS})


@pytest.fixture(scope="module")
def proxies_only(tmp_path_factory):
    return write(tmp_path_factory.mktemp("proxies"), {100: rows_of(100)}, measured=False)


@pytest.fixture(scope="module")
def figures(measured, proxies_only):
    return {
        "curves": signal_curves(measured),
        "curves-proxies": signal_curves(proxies_only),
        "plane": quality_stability(measured),
        "plane-proxies": quality_stability(proxies_only, "kl"),
        "proxies": proxy_agreement(measured),
    }


def line_of(axes, label):
    (line,) = [line for line in axes.get_lines() if line.get_label() == label]
    return line


def legends_of(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def columns_of(figure):
    """Axes by origin; Q, V and S from the top."""
    return dict(zip(ORIGINS, np.reshape(figure.axes, (3, -1)).T, strict=False))


# Curves over distances


def test_curves_are_the_table_over_distances_of_zero_or_more(figures):
    figure = figures["curves"]
    for origin, (quality, cost, signal) in columns_of(figure).items():
        shown = [(quality, name) for name in ("quality", "quality_1")]
        shown += [(axes, prefix + name) for axes, prefix in ((cost, ""), (signal, "signal_")) for name in COST_COLORS]
        for axes, name in shown:
            line = line_of(axes, name)
            assert line.get_xdata().tolist() == list(DISTANCES)
            expected = [r[name] for r in rows_of(origin) if r["distance"] in DISTANCES]
            assert line.get_ydata().tolist() == pytest.approx(expected)
            (band,) = [b for b in axes.collections if same_color(b.get_facecolor()[0][:3], line.get_color())]
            points = band.get_paths()[0].vertices
            for distance, value in zip(DISTANCES, expected, strict=True):
                ends = points[points[:, 0] == distance, 1]
                assert (ends.min(), ends.max()) == pytest.approx((0.8 * value, 1.3 * value))
        assert (quality.get_yscale(), cost.get_yscale(), signal.get_yscale()) == ("linear", "log", "linear")
        assert signal.get_ylim()[0] == 0
    assert [axes.get_title() for axes in figure.axes[:2]] == ["from the base policy", "from policy step 100"]
    assert [axes.get_xlabel() for axes in figure.axes[4:]] == ["distance Δ (policy steps)"] * 2
    assert "Q, 8 rollouts" in legends_of(figure)


def test_a_cost_and_its_signal_share_a_colour(figures):
    _, cost, signal = columns_of(figures["curves"])[0]
    colors = [line_of(cost, name).get_color() for name in COST_COLORS]
    assert colors == [line_of(signal, f"signal_{name}").get_color() for name in COST_COLORS] == [*COST_COLORS.values()]
    assert len(set(colors)) == 3


def test_optimum_is_marked_at_the_maximum_and_hollow_at_an_edge(figures):
    figure = figures["curves"]
    for _, _, axes in columns_of(figure).values():
        for cost in COST_COLORS:
            curve, mark = line_of(axes, f"signal_{cost}"), line_of(axes, f"Δ*, {cost}")
            best = int(np.argmax(curve.get_ydata()))
            assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (curve.get_xdata()[best], curve.get_ydata()[best])
            assert (mark.get_markerfacecolor() == "white") == (cost == "kl")
        interval = line_of(axes, "interval of Δ*, gradient_exact")
        assert interval.get_xdata().tolist() == [5.0, 40.0]
        assert interval.get_marker() == "|", "an interval of one distance would not be seen"
        assert not [line for line in axes.get_lines() if line.get_label() == "interval of Δ*, gradient_current"]
    marks = {
        "Δ*, the maximum of S",
        "Δ* at an edge of the distances measured",
        "Δ*: its 95 % interval (bars at the top)",
    }
    assert marks < set(legends_of(figure))


def test_the_signal_can_be_of_a_single_rollout(measured):
    figure = signal_curves(measured, "quality_1")
    for origin, (_, _, axes) in columns_of(figure).items():
        curve = line_of(axes, "signal_1_kl")
        expected = [r["signal_1_kl"] for r in rows_of(origin) if r["distance"] in DISTANCES]
        assert curve.get_ydata().tolist() == pytest.approx(expected)
        mark = line_of(axes, "Δ*, kl")
        assert mark.get_ydata()[0] == max(expected) and mark.get_markerfacecolor() != "white", "not at an edge here"
    assert "1 rollout" in figure.axes[4].get_ylabel()
    with pytest.raises(ValueError, match="quality is 'quality_2'; allowed are quality, quality_1"):
        signal_curves(measured, "quality_2")


def test_fitted_shapes_are_drawn_where_there_is_a_fit(figures):
    columns = columns_of(figures["curves"])
    quality, cost, _ = columns[0]
    fit = line_of(quality, "quality, fit")
    assert fit.get_ydata() == pytest.approx(0.6 * (1 - np.exp(-fit.get_xdata() / TAU)))
    fit = line_of(cost, "kl, fit")
    assert fit.get_ydata() == pytest.approx(np.exp(0.02 * fit.get_xdata()))
    assert fit.get_xdata()[[0, -1]].tolist() == [0, 160]
    assert not [line for axes in columns[100] for line in axes.get_lines() if "fit" in line.get_label()]


def test_costs_that_were_not_measured_are_left_out_of_the_curves(figures):
    figure = figures["curves-proxies"]
    assert len(figure.axes) == 3
    assert [text for text in legends_of(figure) if "measured" in text] == ["Δ* at an edge of the distances measured"]
    assert "V and S, exp(c·KL(q‖π)), c = 2" in legends_of(figure)


# Quality and stability


def test_every_source_is_a_point_with_its_intervals(figures):
    figure = figures["plane"]
    expected = {
        "own resample (Δ = 0)": [0],
        "near future: later checkpoints": [5, 10, 20, 40, 80],
        "far future: the largest distance": [160],
        "past: earlier checkpoints": [-50, -10],
    }
    axes = figure.axes[1]
    found = {r["distance"]: r for r in rows_of(100)}
    for name, distances in expected.items():
        line = line_of(axes, name)
        assert line.get_xdata().tolist() == pytest.approx([found[d]["gradient_exact"] for d in distances])
        assert line.get_ydata().tolist() == pytest.approx([found[d]["quality"] for d in distances])
    assert line_of(axes, "near future: later checkpoints").get_linestyle() == "-"
    teacher = line_of(axes, "external teacher")
    assert (teacher.get_xdata()[0], teacher.get_ydata()[0]) == (2000.0, 0.9)
    bars = np.concatenate([lines.get_segments() for lines in axes.collections])
    across = bars[bars[:, 0, 1] == bars[:, 1, 1]]
    assert [[1600.0, 0.9], [2600.0, 0.9]] in across.tolist()
    assert len(bars) == 2 * len(rows_of(100))
    assert axes.get_xscale() == "log" and "measured, mode exact" in axes.get_xlabel()
    markers = [line_of(axes, name).get_marker() for name in [*expected, "external teacher"]]
    assert len(set(markers)) == 5


def test_base_policy_has_no_past_and_other_policies_keep_their_name(tmp_path):
    rows = [*rows_of(0), row(0, "expert", None, "expert")]
    figure = quality_stability(write(tmp_path / "signal", {0: rows}))
    names = legends_of(figure)
    assert "expert" in names and "past: earlier checkpoints" not in names


def test_thin_curves_join_equal_signals(figures):
    for axes in figures["plane"].axes:
        curves = [line for line in axes.get_lines() if line.get_label() == "equal signal"]
        names = [text.get_text() for text in axes.texts if text.get_text().startswith("S = ")]
        assert len(curves) == len(names) >= 3
        for curve, name in zip(curves, names, strict=True):
            ratio = curve.get_ydata() / curve.get_xdata()
            assert ratio == pytest.approx(np.full(200, float(name.removeprefix("S = ").replace("−", "-"))))


def test_some_distances_are_named_beside_their_points(figures):
    for origin, axes in zip(ORIGINS, figures["plane"].axes, strict=True):
        found = {f"Δ = {r['distance']}": r for r in rows_of(origin) if r["distance"]}
        named = [text for text in axes.texts if text.get_text().startswith("Δ = ")]
        assert "Δ = 160" in [text.get_text() for text in named] and len(named) >= 2
        for text in named:
            point = found[text.get_text()]
            assert text.xy == pytest.approx((point["gradient_exact"], point["quality"]))


def test_without_gradients_the_plane_is_that_of_the_proxy(proxies_only):
    [axes, *_] = quality_stability(proxies_only).axes
    assert "exp(c·KL" in axes.get_xlabel()


def test_a_cost_that_is_not_there_is_refused_with_those_that_are(proxies_only, measured):
    with pytest.raises(ValueError, match=r"no cost 'gradient_exact'; available: kl, kl_policy, .*sequence_policy\."):
        quality_stability(proxies_only, "gradient_exact")
    with pytest.raises(ValueError, match=r"available: none\."):
        proxy_agreement(proxies_only)
    with pytest.raises(ValueError, match="available: gradient_current, gradient_exact, gradient_sequence"):
        proxy_agreement(measured, "kl")
    assert "exp(c·KL(q‖π))" in quality_stability(proxies_only, "kl").axes[0].get_xlabel()


# Proxies


def test_proxies_are_drawn_against_the_cost_with_their_rank_correlation(measured):
    figure = proxy_agreement(measured, "gradient_current")
    for axes, proxy in zip(figure.axes, PROXIES, strict=True):
        for origin in ORIGINS:
            line, rows = line_of(axes, str(origin)), [r for r in rows_of(origin) if r["distance"] in DISTANCES]
            assert line.get_xdata().tolist() == pytest.approx([r[proxy] for r in rows])
            assert line.get_ydata().tolist() == pytest.approx([r["gradient_current"] for r in rows])
        expected = interval_text(rank(0, proxy, "gradient_current"))
        assert axes.get_title() == f"from 0: ρ {expected}\nfrom 100: ρ undefined"
        assert axes.get_xlabel() == PROXY_NAMES[proxy]
        assert axes.get_yscale() == "log"
    scales = {proxy: axes.get_xscale() for proxy, axes in zip(PROXIES, figure.axes, strict=True)}
    assert [proxy for proxy, scale in scales.items() if scale == "log"] == ["sequence", "sequence_policy"]
    assert len({line_of(figure.axes[0], str(origin)).get_color() for origin in ORIGINS}) == 2


def test_fitted_constant_is_drawn_beside_kl_only(figures):
    figure = figures["proxies"]
    for axes, proxy in zip(figure.axes, PROXIES, strict=True):
        fits = [line for line in axes.get_lines() if line.get_label() == "ln V = c·KL"]
        assert len(fits) == proxy.startswith("token")
        for line in fits:
            assert np.log(line.get_ydata()) == pytest.approx(4.0 * line.get_xdata())
            assert "c = 4" in [text.get_text() for text in axes.texts]


def test_intervals_in_words():
    assert interval_text({"value": 0.5, "low": -0.125, "high": 1.0}) == "0.50 [−0.12, 1.00]"
    assert interval_text({"value": 0.5, "low": None, "high": None}) == "0.50"
    assert interval_text({"value": None, "low": None, "high": None}) == interval_text(None) == "undefined"


# All


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        signal_curves(tmp_path / "none")
    folder = write(tmp_path / "signal", {0: rows_of(0)})
    table = pd.read_parquet(folder / "table.parquet")
    table[table["kind"] == "teacher"].to_parquet(folder / "table.parquet")
    for draw in (signal_curves, proxy_agreement):
        with pytest.raises(ValueError, match="no pair with a distance of 0 or more"):
            draw(folder)
    table[:0].to_parquet(folder / "table.parquet")
    for draw in (signal_curves, quality_stability, proxy_agreement):
        with pytest.raises(ValueError, match="compares nothing"):
            draw(folder)


@pytest.mark.parametrize("ends", [(1.0, 1.7), (0.3, 8.0), (0.5, 90.0), (1e-5, 1e7)])
def test_logarithmic_axes_have_three_plain_numbers_or_more(ends):
    figure, ((axes,),) = canvas(1, 1, (3, 3))
    axes.set_xlim(*ends)
    log_axis(axes.xaxis)
    figure.draw_without_rendering()
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert 3 <= len(labels) <= 7
    assert [float(label.replace("−", "-")) for label in labels] == pytest.approx(axes.get_xticks())


def test_figures_are_saved_with_the_same_bytes_each_time(figures, tmp_path):
    for name in ("curves", "plane"):
        figure = figures[name]
        drawn = save_figure(figure, tmp_path / "out", name)[1].read_bytes()
        assert save_figure(figure, tmp_path / "out", name)[1].read_bytes() == drawn


def test_texts_are_large_enough_inside_of_the_figure_and_apart(figures):
    assert_legible(figures)


def test_drawing_leaves_the_style_of_the_session_alone_and_no_figure_open(measured):
    before = matplotlib.rcParams.copy()
    quality_stability(measured)
    assert matplotlib.rcParams == before
    assert plt.get_fignums() == []


# Distance, over seeds: what a guide should be worth, and what it was


def of_seeds(seeds):
    """Content of `signal.json` as far as it is drawn: from the base policy to Δ = 40, from step 100 to Δ = 20."""
    table, gains = [], []
    for seed in seeds:
        for origin, distances in ((0, (0, 10, 40)), (100, (0, 20))):
            for distance in distances:
                quality, cost = 0.1 + 0.01 * distance + 0.02 * seed, 1.0 + distance * (1 + seed)
                costs = {"gradient_current": 2.0, "gradient_exact": cost}
                signals = {f"signal_{name}": quality / value for name, value in costs.items()}
                pair = {"seed": seed, "origin": origin, "distance": distance}
                table.append({**pair, "quality": quality, **costs, **signals})
                for mode, sign in (("current", 1), ("exact", -1)):
                    gains.append({**pair, "mode": mode, "gain": sign * quality})
            table.append({**pair, "distance": None, "quality": 1.0, **costs, **signals})  # a teacher is at none
    return {"seeds": list(seeds), "table": table, "gain": gains}


def test_quality_cost_signal_and_gain_stand_over_one_distance_by_seed_and_as_their_middle():
    figure = gain_over_distance(of_seeds([0, 1, 5]))
    assert [axes.get_ylabel() for axes in figure.axes[::4]] == ["from the base policy", "from policy step 100"]
    quality, cost, signal, gain = figure.axes[:4]
    assert list(line_of(quality, "Q").get_xdata()) == [0, 10, 40]
    assert line_of(quality, "Q").get_ydata() == pytest.approx([0.14, 0.24, 0.54])
    assert line_of(quality, "Q, seed 5").get_ydata() == pytest.approx([0.2, 0.3, 0.6])
    assert line_of(cost, "V, exact").get_ydata() == pytest.approx([1, 21, 81])  # of 11, 21, 61: the median
    assert cost.get_yscale() == "log" and line_of(cost, "V, current").get_ydata() == pytest.approx([2, 2, 2])
    assert line_of(signal, "S, current").get_ydata() == pytest.approx([0.07, 0.12, 0.27])
    assert line_of(gain, "gain, exact").get_ydata() == pytest.approx([-0.14, -0.24, -0.54])
    assert same_color(line_of(gain, "gain, exact").get_color(), line_of(signal, "S, exact").get_color())
    assert line_of(figure.axes[4], "Q").get_ydata() == pytest.approx([0.14, 0.34])
    assert gain.get_ylim() == figure.axes[7].get_ylim()
    assert "mean over 3 seeds (V: median)" in legends_of(figure)
    assert_legible({"distance": figure})


def test_one_seed_is_said_to_be_one_and_a_distance_that_a_seed_lacks_has_no_mean():
    assert "one seed" in legends_of(gain_over_distance(of_seeds([2])))
    some = of_seeds([0, 1])
    some["gain"] = [row for row in some["gain"] if (row["seed"], row["distance"]) != (1, 10)]
    gain = gain_over_distance(some).axes[3]
    assert list(line_of(gain, "gain, current").get_xdata()) == [0, 40]
    assert list(line_of(gain, "gain, current, seed 0").get_xdata()) == [0, 10, 40]


def test_a_signal_without_guided_windows_is_refused():
    with pytest.raises(ValueError, match="no guided window; `python -m npo_core signal-study` trains them"):
        gain_over_distance({**of_seeds([0]), "gain": []})
