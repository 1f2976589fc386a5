"""The signal over seeds: what is ranked against the gain, and a small study from its runs to the claims."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from npo_core.lock import Lock
from npo_core.method.curve import SUMS
from npo_core.runs.folder import RunFolder
from npo_core.runs.measurement import RESAMPLE, Pair, read_pairs, summarise
from npo_core.runs.settings import SignalSettings
from npo_core.stages.signal import MeasuredSignal
from npo_core.study import signal_study
from npo_core.study.arms import arm_config
from npo_core.study.gain import GainPlan
from npo_core.study.signal_claims import interior_peak, predicts, premise_holds, shapes
from npo_core.study.verdicts import FEW, NOT, PARTLY, REPRODUCED

SMALL = {"compute_steps": 8, "checkpoint_every": 2, "train_problems": 32}
PLAN = GainPlan(origins=(2,), distances=(0, 2, 4), window=2, modes=("current",), teacher=False)
AT_ONCE = f"""
import sys
from pathlib import Path
from npo_core.loading import loading

with loading(own=True):
    from npo_core.study.gain import GainPlan
    from npo_core.study.signal_study import run_signal_study

root, out, *seeds = sys.argv[1:]
seeds = [int(seed) for seed in seeds]
run_signal_study("smoke", seeds, {SMALL}, {PLAN}, origins=(0, 2), root=Path(root), out=Path(out), quiet=True)
"""
"""A study in a process of its own: root, out and seeds."""


def table(seed=0):
    """Q rises, V rises faster from Δ = 2 on, so S is largest at 1; Q less the own resample's, over V, at 2."""
    rows = zip((0, 1, 2, 3), (0.1, 0.4, 0.6, 0.7), (1.0, 1.0, 1.6, 9.0), strict=True)
    return [
        {
            **{"seed": seed, "origin": 0, "distance": distance, "quality": quality},
            **{f"gradient_{mode}": cost for mode in ("current", "exact")},
            **{f"signal_gradient_{mode}": quality / cost for mode in ("current", "exact")},
        }
        for distance, quality, cost in rows
    ]


def gains(values, seed=0):
    return [
        {"seed": seed, "origin": 0, "distance": distance, "mode": "exact", "gain": gain}
        for distance, gain in enumerate(values)
    ]


def test_a_gain_that_follows_q_is_told_from_one_that_follows_s():
    found = {row["predictor"]: row for row in signal_study.predictions(table(), gains([0.0, 0.1, 0.2, 0.3]))}
    assert found["quality"]["rho"] == found["lead"]["rho"] == [pytest.approx(1.0)]
    # S is 0.1, 0.4, 0.375, 0.078: ranks 2, 4, 3, 1 against 1, 2, 3, 4; lead over cost 0, 0.3, 0.31, 0.067
    assert found["signal"]["rho"] == [pytest.approx(-0.4)]
    assert found["lead over cost"]["rho"] == [pytest.approx(0.4)]
    assert found["signal"]["sources"] == 4 and found["signal"]["low"] is None
    follows = {row["predictor"]: row for row in signal_study.predictions(table(), gains([0.1, 0.9, 0.8, 0.0]))}
    assert follows["signal"]["rho"] == [pytest.approx(1.0)]


def test_seeds_are_ranked_by_themselves_and_a_flat_one_says_nothing():
    rows = [*table(0), *table(1), *table(2)]
    several = [*gains([0.0, 0.1, 0.2, 0.3], 0), *gains([0.3, 0.2, 0.1, 0.0], 1), *gains([0.1] * 4, 2)]
    found = {row["predictor"]: row for row in signal_study.predictions(rows, several)}["quality"]
    assert found["rho"][:2] == [pytest.approx(1.0), pytest.approx(-1.0)] and math.isnan(found["rho"][2])
    assert found["mean"] == pytest.approx(0.0) and found["low"] < -1 and found["seeds"] == [0, 1, 2]
    assert found["n"] == 2, "the flat one has no ρ, so two seeds decide: too few"
    of_s = [row for row in signal_study.predictions(rows, several) if row["predictor"] == "signal"]
    claim = predicts({"prediction": of_s, "seeds": [0, 1, 2]})
    assert claim.verdict == FEW and claim.ours.endswith("2 of 3 seeds")


def test_the_gain_is_that_over_the_same_steps_of_grpo():
    records = [
        {"origin": 0, "source": "unguided", "final": {"average": 0.4}},
        {"origin": 2, "source": "unguided", "final": {"average": 0.5}},
        *(
            {
                **{"origin": origin, "source": "resample", "distance": 0, "mode": "exact", "final": {"average": 0.7}},
                **dict.fromkeys(("prompts", "cached", "replaced_slots", "guide_kl"), 1),
            }
            for origin in (0, 2)
        ),
    ]
    assert [row["gain"] for row in signal_study.gain_rows(records)] == [pytest.approx(0.3), pytest.approx(0.2)]


def prediction(low, high, predictor="signal", seeds=5):
    row = {"origin": 0, "mode": "current", "predictor": predictor, "seeds": list(range(seeds)), "sources": 8}
    row["n"] = seeds
    return row | {"mean": (low + high) / 2, "low": low, "high": high, "rho": [low, high]}


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ([prediction(0.2, 0.9), prediction(0.1, 0.8)], REPRODUCED),
        ([prediction(0.2, 0.9), prediction(-0.1, 0.8)], PARTLY),
        ([prediction(-0.2, 0.9), prediction(-0.5, -0.1)], NOT),
        ([prediction(-0.2, 0.9), prediction(0.2, 0.9, "quality")], NOT),
        ([prediction(0.2, 0.9, seeds=2)], FEW),
    ],
)
def test_a_prediction_is_judged_by_its_interval_over_seeds(rows, word):
    assert predicts({"prediction": rows, "seeds": rows[0]["seeds"]}).verdict == word


def premise(held, shown=0.4):
    """Intervals above 0 on every seed; what Holm's p says of them is given."""
    one = [
        [{"distance": 20.0, "holds": holds, "gain": {"low": 0.1}, "shown": {"value": shown}, "own": {"value": 0.1}}]
        for holds in held
    ]
    return {"seeds": list(range(len(held))), "origins": {"0": {"premise": one}, "100": {"premise": one}}}


def test_the_premise_is_judged_by_the_seeds_that_show_it():
    assert premise_holds(premise([True] * 4 + [False])).verdict == REPRODUCED
    assert premise_holds(premise([True] * 3 + [False] * 2)).verdict == NOT
    mixed = premise([True] * 5)
    mixed["origins"]["100"] = premise([False] * 5)["origins"]["100"]
    assert premise_holds(mixed).verdict == PARTLY
    assert "Δ = 20: 0.40 against 0.10, 5/5" in premise_holds(mixed).ours


@pytest.mark.parametrize(("seeds", "word"), [(1, FEW), (2, FEW), (3, REPRODUCED)])
def test_one_or_two_seeds_decide_nothing_whatever_they_show(seeds, word):
    inside = {"low": 20.0, "high": 60.0, "at_edge": False}
    bends = {"tau": 30.0, "q_inf": 0.6, "q_rmse": 0.01, "beta": 0.1, "v_rmse": 0.1}
    costs = ("gradient_current", "gradient_exact")
    entry = {
        "distances": [0.0, 20.0, 60.0, 160.0],
        "optimum": {f"signal{k}_{cost}": [inside] * seeds for k in ("", "_1") for cost in costs},
        "fit": dict.fromkeys(("quality", "quality_1", *costs), [bends] * seeds),
        "premise": premise([True] * seeds)["origins"]["0"]["premise"],
    }
    found = {"seeds": list(range(seeds)), "origins": {"0": entry}}
    assert [claim(found).verdict for claim in (premise_holds, interior_peak, shapes)] == [word] * 3


def test_the_end_of_the_run_is_no_part_of_the_curves(tmp_path):
    """S is largest at the end, 400 steps on; premise, Δ* and fits see the plan's distances alone, the table all."""
    settings = SignalSettings(prompts=8, rollouts=4, scored=1, gradients=8, resamples=20)
    grid = (0, 10, 20, 400)
    pairs = [Pair(0, f"{d:06d}" if d else RESAMPLE, d) for d in grid] + [Pair(0, "teacher", None)]
    (tmp_path / "pairs").mkdir()
    for pair in pairs:
        columns = pd.DataFrame(1.0, index=range(8), columns=list(SUMS))
        columns["shown"] = np.arange(8.0) < 1 + 7 * (pair.distance or 0) / 400
        columns.astype(float).to_parquet(tmp_path / "pairs" / pair.file)
    whole = summarise(read_pairs(tmp_path, pairs), settings)
    assert [one["distance"] for one in whole["origins"]["0"]["premise"]] == [10, 20, 400]
    plan = GainPlan(origins=(0,), distances=(0, 10, 20), window=2)
    summary = signal_study.near(MeasuredSignal(tmp_path, pairs, whole), max(plan.distances))
    assert [one["distance"] for one in summary["origins"]["0"]["premise"]] == [10, 20]
    seed = {"seed": 0, "config": {"seed": 0, "preset": "cpu"}, "summary": summary, "table": whole["table"], "gain": []}
    found = signal_study.summarise_seeds([seed], plan)
    assert found["origins"]["0"]["distances"] == [0, 10, 20]
    assert {row["distance"] for row in found["table"]} == {0, 10, 20, 400, None}
    assert [one["holds"] for one in found["origins"]["0"]["premise"][0]] == [False, False]


@pytest.mark.parametrize("overrides", [None, SMALL])
def test_a_seed_is_measured_on_the_run_of_the_study_of_arms(overrides, tmp_path, monkeypatch):
    """Its checkpoints all stay resumable: windows begin at step 100 of 400, and preset cpu keeps twenty of forty."""
    measured = []
    monkeypatch.setattr(signal_study, "measure_seed", lambda config, *_: measured.append(config) or {"seed": 3})
    monkeypatch.setattr(signal_study, "summarise_seeds", lambda *_: {"seeds": [3]})
    plan = {"plan": PLAN} if overrides else {}
    signal_study.run_signal_study("cpu", [3], overrides, **plan, root=tmp_path, out=tmp_path)
    (config,) = measured
    assert config == arm_config("GRPO", "cpu", 3, overrides) and config.checkpoint_keep == 0


def test_no_seed_is_refused_and_one_that_is_named_twice_counts_once(tmp_path, monkeypatch):
    measured = []

    def measure(config, *_):
        measured.append(config.seed)
        return {"seed": config.seed}

    monkeypatch.setattr(signal_study, "measure_seed", measure)
    monkeypatch.setattr(signal_study, "summarise_seeds", lambda found, plan: {"seeds": [one["seed"] for one in found]})
    run = lambda seeds: signal_study.run_signal_study("smoke", seeds, SMALL, PLAN, root=tmp_path, out=tmp_path)  # noqa: E731
    with pytest.raises(ValueError, match="No seed is named"):
        run([])
    assert json.loads(run([3, 1, 3]).read_text()) == {"seeds": [1, 3]}
    assert measured == [3, 1], "in the order they are named"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def alone(place):
    """`signal.json` of a small study that nobody disturbs."""
    return signal_study.run_signal_study(
        "smoke", [0, 1], SMALL, PLAN, origins=(0, 2), root=place / "runs", out=place / "out", quiet=True
    )


@pytest.mark.slow
def test_a_small_study_is_measured_trained_and_judged(alone, place):
    path = alone
    found = json.loads(path.read_text())
    assert found["seeds"] == [0, 1] and list(found["origins"]) == ["0", "2"]
    assert found["origins"]["2"]["distances"][0] == 0 and found["origins"]["2"]["distances"][-1] == 4
    assert {row["distance"] for row in found["table"] if row["origin"] == 2} >= {4, 6}
    assert [(row["seed"], row["distance"]) for row in found["gain"]] == [(s, d) for s in (0, 1) for d in (0, 2, 4, 6)]
    assert {row["sources"] for row in found["prediction"]} == {4}
    for claim in (interior_peak(found), shapes(found), predicts(found), premise_holds(found)):
        assert claim.verdict and claim.ours and claim.numbers
    told = signal_study.in_words(path)
    assert told.startswith("Seeds 0, 1.\n") and told.count(": too few seeds; ") == 4
    assert {"preset", "seed"} & set(found["configuration"]) == {"preset"}
    before = {file: file.stat().st_mtime_ns for file in (place / "runs").rglob("*.json") if "lock" not in file.name}
    again = signal_study.run_signal_study(
        "smoke", [0, 1], SMALL, PLAN, origins=(0, 2), root=place / "runs", out=place / "out", quiet=True
    )
    assert json.loads(again.read_text()) == found
    kept = [file for file in before if file.parent.name == "gain"]
    assert kept and all(file.stat().st_mtime_ns == before[file] for file in kept)


@pytest.mark.slow
def test_two_studies_at_once_on_one_folder_share_the_work(alone, tmp_path):
    """Each run, measurement and window is made once, and the numbers are those of one study."""
    runs, out = tmp_path / "runs", tmp_path / "out"
    command = [sys.executable, "-c", AT_ONCE, str(runs), str(out), "0", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = RunFolder(arm_config("GRPO", "smoke", 0, SMALL), runs)
    with Lock(first.path / "lock.json", "The run").holding():  # until both are there
        both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        met = [any("waiting for it" in line for line in iter(study.stdout.readline, "")) for study in both]
    try:
        for study in both:
            study.communicate(timeout=3600)
    finally:
        for study in both:
            study.kill()
    assert met == [True, True] and [study.returncode for study in both] == [0, 0]
    assert (out / signal_study.RESULT).read_bytes() == alone.read_bytes()
    folders = sorted(path for path in runs.iterdir() if (path / "config.json").exists())
    assert len(folders) == 2
    for folder in folders:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["compute_step"] for line in lines] == list(range(1, SMALL["compute_steps"] + 1))
        sittings = [line for line in (folder / "events.jsonl").read_text().splitlines() if '"sitting"' in line]
        assert len(sittings) == 1, "one of them trained"
    assert not list(tmp_path.rglob("*lock.json"))
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()], "nothing is left half written"
