"""Seeds that another call left in a folder of results stay there, to the byte; what does not belong to them is refused.

The committed results are taken apart and put together again.
"""

import json
import shutil
from unittest.mock import Mock

import pandas as pd
import pytest

from npo_core.__main__ import main
from npo_core.files import read_json, write_json
from npo_core.runs.validation import WORLD
from npo_core.study import cells, signal_study
from npo_core.study import map as map_of_gain
from npo_core.study.findings import results_folder
from npo_core.study.joining import join_evidence, join_map, join_signal
from npo_core.study.results import (
    ABOUT,
    MAP,
    MAP_ABOUT,
    SCORES,
    TRAINING,
    Evidence,
    ResultsRefused,
    read_evidence,
    read_map,
)
from npo_core.study.signal_study import RESULT, predictions

COMMITTED = results_folder()


def of_seeds(rows, seeds):
    if isinstance(rows, pd.DataFrame):
        return rows[rows["seed"].isin(seeds)].reset_index(drop=True)
    return [row for row in rows if row["seed"] in seeds]


def part(found, seeds):
    about = {**found.about, "seeds": sorted(seeds)}
    about |= {name: of_seeds(about[name], seeds) for name in ("failed", "runs")}
    return Evidence(of_seeds(found.scores, seeds), of_seeds(found.training, seeds), about)


def kept(found, folder):
    """As `cells.collect` writes it."""
    found.scores.to_csv(folder / SCORES, index=False, float_format="%.6f")
    found.training.to_parquet(folder / TRAINING, index=False, compression="zstd")
    write_json(folder / ABOUT, found.about)


@pytest.fixture(scope="module")
def whole():
    return read_evidence(COMMITTED)


@pytest.mark.parametrize("there", [{0, 1, 2}, {1, 3}, {0, 1, 2, 3, 4}])
def test_a_study_made_in_two_parts_is_the_study_made_at_once(whole, there, tmp_path):
    kept(part(whole, there), tmp_path)
    made = {seed for seed in range(5) if seed not in there} or {2}
    again = join_evidence(part(whole, made), tmp_path)
    assert again.about == whole.about
    pd.testing.assert_frame_equal(again.training, whole.training)
    kept(again, tmp_path)
    assert (tmp_path / SCORES).read_bytes() == (COMMITTED / SCORES).read_bytes()
    assert read_json(tmp_path / ABOUT) == read_json(COMMITTED / ABOUT)


def test_seeds_that_are_made_again_replace_those_that_are_there(whole, tmp_path):
    stale = part(whole, {0, 1})
    stale = Evidence(stale.scores.assign(pass_rate=0.0), stale.training, stale.about)
    kept(stale, tmp_path)
    again = join_evidence(part(whole, {1, 2}), tmp_path)
    zero = again.scores.groupby("seed")["pass_rate"].max().eq(0.0)
    assert zero.to_dict() == {0: True, 1: False, 2: False}
    # where all are made again nothing of the folder is looked at, whatever made it
    (tmp_path / ABOUT).write_text(json.dumps({"schema": 0, "world": "another", "seeds": [1, 2]}))
    assert join_evidence(part(whole, {1, 2}), tmp_path).about["seeds"] == [1, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("arm", r"arms: .*NPO.* now, GRPO there"),
        ("setting", r"mixed configurations of GRPO: seeds \[0\]; seeds \[1\]"),
        ("version", r"mixed versions: 1 runs such as GRPO/0 .*2\.12"),
    ],
)
def test_what_does_not_belong_together_is_refused_and_the_folder_stays(whole, change, words, tmp_path):
    there, now = part(whole, {0}), part(whole, {1})
    only = lambda found, arms: Evidence(  # noqa: E731
        found.scores[found.scores["arm"].isin(arms)],
        found.training[found.training["arm"].isin(arms)],
        {**found.about, "arms": arms, "runs": [run for run in found.about["runs"] if run["arm"] in arms]},
    )
    there, now = only(there, ["GRPO"]), only(now, ["GRPO", "NPO"] if change == "arm" else ["GRPO"])
    (run,) = there.about["runs"]
    changed = {
        "arm": run,
        "setting": {**run, "config": {**run["config"], "learning_rate": 0.5}},
        "version": {**run, "versions": {**run["versions"], "packages": {"torch": "2.12"}}},
    }
    there.about["runs"][:] = [changed[change]]
    kept(there, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ResultsRefused, match=rf"give another folder \(--out\)[\s\S]*{words}"):
        join_evidence(now, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_results_of_another_world_are_refused(whole, tmp_path):
    there = part(whole, {0})
    kept(Evidence(there.scores, there.training, {**there.about, "world": "another"}), tmp_path)
    with pytest.raises(ResultsRefused, match="another small world"):
        join_evidence(part(whole, {1}), tmp_path)


@pytest.mark.slow
def test_a_second_call_of_the_study_adds_its_seeds(tmp_path, capsys):
    out, small = tmp_path / "out", {"compute_steps": 2, "rollout_every": 0}
    for seed in (1, 0):
        planned = cells.plan_cells("smoke", [seed], ["GRPO"], small)
        cells.run_cell(planned[0].config, tmp_path / "runs")
        cells.collect(planned, tmp_path / "runs", out)
        shutil.rmtree(tmp_path / "runs")  # as on another machine
    found = read_evidence(out)
    assert found.about["seeds"] == [0, 1] and found.scores["seed"].unique().tolist() == [0, 1]
    # the command says so before it trains
    options = ["--preset", "smoke", "--arms", "GRPO", "--root", str(tmp_path / "runs"), "--out", str(out)]
    changed = [
        part for name, value in {**small, "learning_rate": 1e-5}.items() for part in ("--set", f"{name}={value}")
    ]
    assert main(["study", "--seeds", "2", *options, *changed]) == 2
    assert "mixed configurations of GRPO: seeds [0, 1]; seeds [2]" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    planned = cells.plan_cells("smoke", [2], ["GRPO"], small | {"learning_rate": 1e-5})
    cells.run_cell(planned[0].config, tmp_path / "runs")
    before = {path.name: path.read_bytes() for path in out.glob("evidence*")}
    with pytest.raises(ResultsRefused, match="mixed configurations of GRPO"):
        cells.collect(planned, tmp_path / "runs", out)
    assert {path.name: path.read_bytes() for path in out.glob("evidence*")} == before


# The map


def map_part(seeds):
    about = read_json(COMMITTED / MAP_ABOUT)
    about |= {name: of_seeds(about[name], seeds) for name in ("failed", "configurations")}
    return of_seeds(read_map(COMMITTED), seeds), about


def keep_map(table, about, folder):
    table.to_csv(folder / MAP, index=False, float_format="%.6g")
    write_json(folder / MAP_ABOUT, about)


@pytest.mark.parametrize("there", [{0}, {2, 1}])
def test_a_map_made_in_two_parts_is_the_map_made_at_once(there, tmp_path):
    keep_map(*map_part(there), tmp_path)
    keep_map(*join_map(*map_part({0, 1, 2} - there), tmp_path), tmp_path)
    for name in (MAP, MAP_ABOUT):
        assert (tmp_path / name).read_bytes() == (COMMITTED / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda about: about["versions"][0].__setitem__(0, "3.9"), r"mixed versions: .*GRPO at 0\.0002/0 with .*3\.9"),
        (
            lambda about: about["configurations"][0]["config"].update(num_generations=4),
            r"mixed configurations of GRPO at 0\.0002: seeds \[0\]; seeds \[1\]",
        ),
    ],
)
def test_another_map_is_refused(change, words, tmp_path):
    table, about = map_part({0})
    change(about)
    keep_map(table, about, tmp_path)
    with pytest.raises(ResultsRefused, match=words):
        join_map(*map_part({1}), tmp_path)


def test_a_map_is_refused_before_its_runs_as_after_them(tmp_path):
    table, about = map_part({0})
    keep_map(table, about, tmp_path)
    python, packages, device = about["versions"][0]
    versions = {"python": python, "packages": packages, "device": device}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cells, "environment", lambda: versions)
        map_of_gain.require_joinable(map_of_gain.plan_map("cpu", [3]), tmp_path / "runs", tmp_path)
        other = map_of_gain.plan_map("cpu", [3], overrides={"temperature": 0.9})
        with pytest.raises(ResultsRefused, match=r"mixed configurations of GRPO at 0\.0002: seeds \[0\]; seeds \[3\]"):
            map_of_gain.require_joinable(other, tmp_path / "runs", tmp_path)
        patched.setitem(versions, "python", "2.7")
        with pytest.raises(ResultsRefused, match="mixed versions: "):
            map_of_gain.require_joinable(map_of_gain.plan_map("cpu", [3]), tmp_path / "runs", tmp_path)
    assert not (tmp_path / "runs").exists()


def test_a_map_of_another_grid_is_refused(tmp_path):
    table, about = map_part({0})
    keep_map(table[table["distance"] < 100], about, tmp_path)
    with pytest.raises(ResultsRefused, match=r"grid \(rate, Δ\)"):
        join_map(*map_part({1}), tmp_path)


# The signal


def signal_part(seeds):
    """What `summarise_seeds` gives of these seeds alone."""
    found = read_json(COMMITTED / RESULT)
    places = [found["seeds"].index(seed) for seed in sorted(seeds)]
    pick = lambda values: [values[place] for place in places]  # noqa: E731
    for one in found["origins"].values():
        one["premise"] = pick(one["premise"])
        for kind in ("optimum", "fit"):
            one[kind] = {name: pick(values) for name, values in one[kind].items()}
    rows = {name: of_seeds(found[name], seeds) for name in ("table", "gain")}
    return found | rows | {"seeds": sorted(seeds), "prediction": predictions(rows["table"], rows["gain"])}


@pytest.mark.parametrize("there", [{0}, {2, 1}])
def test_a_signal_made_in_two_parts_is_the_one_made_at_once(there, tmp_path):
    path = tmp_path / RESULT
    write_json(path, signal_part(there))
    together = join_signal(signal_part({0, 1, 2} - there), path, predictions)
    whole = read_json(COMMITTED / RESULT)
    assert {name: value for name, value in together.items() if name != "prediction"} == {
        name: value for name, value in whole.items() if name != "prediction"
    }
    for one, other in zip(together["prediction"], whole["prediction"], strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value == (
                pytest.approx(other[name], rel=1e-12) if name in ("rho", "mean", "low", "high") else other[name]
            )


def test_a_missing_number_of_the_file_predicts_nothing():
    found = signal_part({0})
    for row in found["table"]:
        row["quality"] = None
    by_quality = [one for one in predictions(found["table"], found["gain"]) if one["predictor"] in ("quality", "lead")]
    assert by_quality and all(one["mean"] is None and one["n"] == 0 for one in by_quality)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found.update(window=7), "window differs"),
        (lambda found: found["configuration"].update(learning_rate=1.0), "mixed configurations: learning_rate"),
        (lambda found: found["origins"]["100"].update(distances=[0, 10]), "distances by origin"),
        (lambda found: found.update(world="another"), "another small world"),
    ],
)
def test_another_signal_is_refused(change, words, tmp_path):
    there = signal_part({0})
    change(there)
    write_json(tmp_path / RESULT, there)
    with pytest.raises(ResultsRefused, match=words):
        join_signal(signal_part({1}), tmp_path / RESULT, predictions)


def test_the_study_of_the_signal_keeps_the_seeds_of_its_file(tmp_path, monkeypatch):
    write_json(tmp_path / RESULT, signal_part({0, 2}))
    monkeypatch.setattr(signal_study, "measure_seed", lambda config, *_: {"seed": config.seed})
    monkeypatch.setattr(
        signal_study, "summarise_seeds", lambda found, plan: signal_part({one["seed"] for one in found})
    )
    found = read_json(signal_study.run_signal_study("cpu", [1], root=tmp_path, out=tmp_path))
    assert found["seeds"] == [0, 1, 2] and found["world"] == WORLD
    monkeypatch.setattr(signal_study, "measure_seed", Mock(side_effect=AssertionError))
    with pytest.raises(ResultsRefused, match="mixed configurations: learning_rate"):  # and before it measures
        signal_study.run_signal_study("cpu", [3], {"learning_rate": 0.5}, root=tmp_path, out=tmp_path)
