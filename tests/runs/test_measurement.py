"""Records of a measurement: grids of distances, pairs, settings, and the summary of planted sums."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from npo_core.files import write_table
from npo_core.method.curve import SUMS, PairSums
from npo_core.method.quantities import ESTIMATES, MEASURED_COSTS, PROXY_COSTS, SIGNALS, Cost, Quality, Signal
from npo_core.runs.measurement import (
    PROXIES,
    RESAMPLE,
    Pair,
    curves,
    distance_grid,
    plan_pairs,
    read_pairs,
    read_premise,
    summarise,
)
from npo_core.runs.settings import WHERE_THEY_FIT, SignalSettings

# Distances


def test_a_grid_of_distances_by_hand():
    assert distance_grid(range(10, 210, 10), 5) == [10, 20, 60, 120, 200]  # places 0, 19/16, 19/4, 171/16, 19
    # places 0, 0.2, 0.8, 1.8, 3.2, 5 and pushed apart from the front
    assert distance_grid(range(1, 7), 6) == [1, 2, 3, 4, 5, 6]
    assert distance_grid(range(1, 8), 6) == [1, 2, 3, 4, 5, 7]
    assert distance_grid([30, 10, 20], 3) == distance_grid([30, 10, 20], 7) == [10, 20, 30]
    assert distance_grid([30, 10, 20], 1) == [10]
    assert distance_grid([], 3) == []


@given(st.sets(st.integers(1, 5000), min_size=1, max_size=200), st.integers(2, 40))
@example(set(range(1, 42)), 40)
@example(set(range(1, 201)), 20)
def test_a_grid_keeps_both_ends_repeats_nothing_and_is_finer_near_zero(available, count):
    ordered = sorted(available)
    grid = distance_grid(list(available), count)
    assert len(grid) == min(count, len(ordered))
    assert grid == sorted(set(grid))
    assert set(grid) <= available
    if len(ordered) > 1:
        assert (grid[0], grid[-1]) == (ordered[0], ordered[-1])
    if len(ordered) <= count:
        assert grid == ordered
        return
    # as far as places on the list go, no chosen one lies beyond its place on an even grid, and gaps grow
    places = [ordered.index(distance) for distance in grid]
    even = np.linspace(0, len(ordered) - 1, count)
    assert all(place <= even_place + 0.5 for place, even_place in zip(places, even, strict=True))
    gaps = np.diff(places)
    assert gaps[0] == gaps.min()
    assert gaps[-1] >= gaps.max() - 1  # rounding to places


def test_pairs_of_a_run_by_hand():
    pairs = plan_pairs([0, 10, 20, 30, 40], [10, 20], count=2, past=1, others=["teacher"], also=[20, 15])
    assert [(p.origin, p.source, p.distance, p.kind) for p in pairs] == [
        (10, "resample", 0, "resample"),
        (10, "000020", 10, "future"),
        (10, "000030", 20, "future"),
        (10, "000040", 30, "future"),
        (10, "000000", -10, "past"),
        (10, "teacher", None, "teacher"),
        (20, "resample", 0, "resample"),
        (20, "000030", 10, "future"),
        (20, "000040", 20, "future"),
        (20, "000010", -10, "past"),
        (20, "teacher", None, "teacher"),
    ]
    assert len({pair.file for pair in pairs}) == len(pairs)
    assert pairs[1].file == "000010--000020.parquet"


def test_the_past_is_left_out_where_there_is_none_or_none_is_asked_for():
    assert [pair.distance for pair in plan_pairs([0, 10, 20], [0])] == [0, 10, 20]
    assert [pair.distance for pair in plan_pairs([20, 0, 10], [10], past=0)] == [0, 10]


@pytest.mark.parametrize(
    ("steps", "origins", "complaint"),
    [
        ([10], [10], r"1 checkpoint\(s\) found \(steps \[10\]\); a distance needs two"),
        ([], [0], r"0 checkpoint\(s\) found"),
        ([0, 10, 20], [5], r"no checkpoint at origin 5\. Available steps: \[0, 10, 20\]"),
        ([0, 10, 20], [0, 20], "Origin 20 is the last checkpoint"),
    ],
)
def test_pairs_that_cannot_be_planned_are_refused(steps, origins, complaint):
    with pytest.raises(ValueError, match=complaint):
        plan_pairs(steps, origins)


# Settings


@pytest.mark.parametrize("setting", [{"temperature": 0.7}, {"top_p": 0.95}, {"top_k": 20}])
def test_truncated_or_tempered_sampling_is_refused_with_the_reason(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=rf"{name} {value}.*importance ratio biased.*temperature=1, top_p=1, top_k=0"):
        SignalSettings(**setting)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"prompts": 1, "gradients": 0}, "prompts is 1; it must be at least 2"),
        ({"rollouts": 0, "scored": 0}, "rollouts is 0"),
        ({"scored": 0}, "scored is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"resamples": 0}, "resamples is 0"),
        ({"scored": 9}, "scored is 9; at most rollouts = 8"),
        ({"gradients": 1}, "gradients is 1; it must be 0 or from 2 to prompts = 256"),
        ({"gradients": 257}, "gradients is 257"),
        ({"gradients": -2}, "gradients is -2"),
    ],
)
def test_settings_out_of_range_are_refused(setting, complaint):
    with pytest.raises(ValueError, match=complaint):
        SignalSettings(**setting)


def test_settings_at_their_bounds_are_taken():
    SignalSettings(prompts=2, rollouts=1, scored=1, gradients=2, max_new_tokens=1, resamples=1)
    assert SignalSettings(gradients=0).gradients == 0
    assert SignalSettings(prompts=2).gradients == WHERE_THEY_FIT, "few prompts need no word about gradients"


# Summary

SETTINGS = SignalSettings(prompts=6, rollouts=2, scored=1, gradients=3, c=2.0, resamples=50, seed=4)
GRID = (0, 10, 20, 40, 80)


def sums(distance, **changes):
    """Q = 0.6·(1 − e^(−Δ/20)), ln V = 0.02·Δ for measured costs, KL = 0.01·Δ, gradients on three of six prompts."""
    cost, on = math.exp(0.02 * distance), np.array([1.0, 1, 1, 0, 0, 0])
    columns = dict.fromkeys(SUMS, np.ones(6))
    columns |= dict.fromkeys(("log_ratio", "own_log_ratio"), np.full(6, 0.01 * distance))
    columns |= dict.fromkeys(("gradients", "gradient_own"), on) | dict.fromkeys(MEASURED_COSTS, cost * on)
    columns["own_sequence"] = 1.0 + np.arange(6) * distance  # prompts differ, so its interval has a width
    quality = 0.6 * (1 - math.exp(-distance / 20))
    columns |= {"shown": np.full(6, quality), "shown_share": np.full(6, quality / 3)}
    return PairSums(**{**columns, **changes})


@pytest.fixture(scope="module")
def pairs():
    found = {Pair(7, f"{7 + d:06d}" if d else RESAMPLE, d): sums(d) for d in GRID}
    found[Pair(7, "000002", -5)] = sums(30)
    found[Pair(7, "teacher", None)] = sums(200)
    return found


@pytest.fixture(scope="module")
def summary(pairs):
    return summarise(pairs, SETTINGS)


def test_a_curve_holds_the_distances_from_zero_on(pairs):
    other = {Pair(9, RESAMPLE, 0): sums(0), Pair(9, "000019", 10): sums(10)}
    found = curves({**pairs, **other}, SETTINGS)
    assert {origin: curve.distances.tolist() for origin, curve in found.items()} == {7: list(GRID), 9: [0, 10]}


def test_the_summary_holds_the_best_distance_fits_agreement_and_c(summary):
    assert summary["settings"] == asdict(SETTINGS)
    entry = summary["origins"]["7"]
    assert entry["failing"] == 6
    # τ ln(1 + 1/(βτ)) = 20 ln 3.5 = 25.06: of the grid, S is largest at 20
    assert set(entry["optimum"]) == {signal.name for signal in SIGNALS}
    for name, best in entry["optimum"].items():
        if "moment" not in name and "sequence" not in name.removesuffix("gradient_sequence"):
            assert (best["distance"], best["at_edge"], best["low"], best["high"]) == (20.0, False, 20.0, 20.0), name
    assert entry["optimum"]["signal_second_moment"]["at_edge"]
    fit = entry["fit"]["quality_1"]["gradient_exact"]
    assert [fit["q_inf"], fit["tau"], fit["beta"]] == pytest.approx([0.2, 20.0, 0.02], rel=1e-3)
    assert {quality: set(fits) for quality, fits in entry["fit"].items()} == {name: set(Cost) for name in Quality}
    ranked = {cost: set(proxies) for cost, proxies in entry["agreement"].items()}
    assert ranked == {cost: set(PROXIES) for cost in MEASURED_COSTS}
    assert entry["agreement"]["gradient_exact"]["token_kl"]["value"] == pytest.approx(1.0)
    assert entry["agreement"]["gradient_exact"]["second_moment"]["value"] is None  # it is constant here
    for kl in ("token_kl", "token_kl_policy"):
        assert summary["c"][kl]["gradient_exact"]["value"] == pytest.approx(2.0)


def test_the_summary_holds_the_premise_of_each_origin():
    shown = {0: [0, 1, 0, 0, 0, 0], 10: [1, 1, 0, 0, 0, 0], 20: [1, 1, 1, 1, 0, 0]}
    planted = {
        Pair(7, f"{7 + d:06d}" if d else RESAMPLE, d): sums(d, shown=np.array(row, dtype=float))
        for d, row in shown.items()
    }
    planted[Pair(7, "000002", -5)] = sums(30)
    [entry] = summarise(planted, SETTINGS)["origins"].values()
    assert [(one["distance"], one["shown"]["value"], one["own"]["value"]) for one in entry["premise"]] == [
        (10, pytest.approx(2 / 6), pytest.approx(1 / 6)),
        (20, pytest.approx(4 / 6), pytest.approx(1 / 6)),
    ]
    assert [asdict(read_premise(one)) for one in entry["premise"]] == entry["premise"]


def test_without_a_resample_there_is_no_premise(pairs):
    later = {pair: found for pair, found in pairs.items() if pair.distance}
    assert summarise(later, SETTINGS)["origins"]["7"]["premise"] == []


def test_the_summary_is_json_without_nan(summary):
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_the_table_has_a_row_per_pair_with_the_numbers_of_the_curve(pairs, summary):
    table = summary["table"]
    assert [(row["origin"], row["source"], row["distance"], row["kind"]) for row in table] == [
        (pair.origin, pair.source, pair.distance, pair.kind) for pair in pairs
    ]
    curve = curves(pairs, SETTINGS)[7]
    low, high = curve.interval(Cost.SEQUENCE_POLICY)
    assert (high - low)[1:].min() > 1
    for of in (*ESTIMATES, *SIGNALS):
        name = of.name if isinstance(of, Signal) else of
        low, high = curve.interval(of)
        for place in range(len(GRID)):
            row = table[place]
            expected = [curve.values(of)[place], low[place], high[place]]
            assert [row[name], row[f"{name}_low"], row[f"{name}_high"]] == pytest.approx(expected), name
    teacher = table[-1]
    assert teacher["token_kl"] == pytest.approx(2.0)
    assert teacher["gradient_exact"] == pytest.approx(math.exp(4))
    assert teacher["signal_kl"] == pytest.approx(teacher["quality"] / math.exp(4))


def test_without_gradients_nothing_is_said_about_measured_costs(pairs):
    settings = SignalSettings(**{**asdict(SETTINGS), "gradients": 0})
    zeros = dict.fromkeys(("gradients", "gradient_own", *MEASURED_COSTS), np.zeros(6))
    found = summarise({pair: sums(pair.distance or 0, **zeros) for pair in list(pairs)[:5]}, settings)
    assert "gradient" not in json.dumps({name: value for name, value in found.items() if name != "settings"})
    assert set(found["origins"]["7"]["fit"]["quality"]) == set(PROXY_COSTS)
    assert found["origins"]["7"]["optimum"]["signal_kl"]["distance"] == 20.0
    assert "c" not in found


def test_policies_that_do_not_differ_have_a_summary_and_no_c():
    # a run that did not move: every KL is 0, c has no effect and no value, and the table is worth having all the same
    still = {Pair(7, f"{7 + d:06d}" if d else RESAMPLE, d): sums(0, shown=np.full(6, 0.5)) for d in (0, 10, 20)}
    found = summarise(still, SETTINGS)
    assert found["table"][0]["quality"] == 0.5
    nothing = {"value": None, "low": None, "high": None, "n": 3}
    assert found["c"] == {kl: dict.fromkeys(MEASURED_COSTS, nothing) for kl in ("token_kl", "token_kl_policy")}


def test_pairs_are_read_from_their_files(tmp_path):
    (tmp_path / "pairs").mkdir()
    pair, numbers = Pair(7, "000027", 20), sums(20, tokens=np.arange(1.0, 7.0))
    rows = [{"uid": str(place), **{name: float(getattr(numbers, name)[place]) for name in SUMS}} for place in range(6)]
    write_table(tmp_path / "pairs" / pair.file, rows)
    ((found, read),) = read_pairs(tmp_path, [pair]).items()
    assert found == pair
    assert all(np.array_equal(getattr(read, name), getattr(numbers, name)) for name in SUMS)
