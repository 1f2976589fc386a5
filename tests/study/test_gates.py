"""Gates: the course of a run in closed form, each decision on both sides of its bound, the command on small runs."""

import json

import numpy as np
import pytest

from npo_core.__main__ import main
from npo_core.runs.config import resolve_config
from npo_core.runs.validation import WORLD
from npo_core.study import gates
from npo_core.study.gates import RATES, SEEDS, Course, course, decide, g1, g2, g3, g4, g5, in_words, plan, setting


def a_course(**changes) -> Course:
    """A course that meets every gate on its own."""
    made = {
        "start": 0.1,
        "quarters": (0.2, 0.4, 0.41, 0.41),
        "risen": 120.0,
        "top": 0.42,
        "entropy_left": 0.2,
        "test": 0.4,
        "suites": {"mathvista": (0.1, 0.4)},
    }
    return Course(**{**made, **changes})


def test_the_course_of_a_ramp_and_a_plateau_is_read_off_in_closed_form():
    ramp = np.concatenate([np.full(10, 0.1), np.linspace(0.1, 0.5, 190), np.full(200, 0.5)])
    found = course(ramp, np.concatenate([np.full(10, 1.0), np.full(390, 0.3)]))
    assert found["start"] == pytest.approx(0.1)
    assert found["top"] == pytest.approx(0.5)
    assert found["quarters"] == pytest.approx([ramp[i : i + 100].mean() for i in range(0, 400, 100)])
    # the ramp passes 0.42 after 10 + 0.8 · 190 steps
    assert found["risen"] == pytest.approx(10 + 0.8 * 190, abs=1)
    assert found["entropy_left"] == pytest.approx(0.3)


def test_a_peak_that_falls_again_counts_as_the_top_and_as_no_creep():
    rates = np.concatenate([np.linspace(0.1, 0.6, 200), np.linspace(0.6, 0.3, 200)])
    found = course(rates, np.ones(400))
    assert found["top"] == pytest.approx(0.6, abs=0.02)
    assert a_course(**found).creep < 0


def test_too_short_a_run_has_no_course():
    with pytest.raises(ValueError, match="39 steps are too few"):
        course(np.ones(39), np.ones(39))


@pytest.mark.parametrize(("risen", "passed"), [(99.0, False), (100.0, True)])
def test_g1_wants_a_long_rise(risen, passed):
    config = resolve_config("grpo", "cpu")
    assert g1(config, {0: a_course(risen=risen), 1: a_course(risen=risen)}).passed is passed
    assert g1(config, {}).passed is None
    assert g1(config, {0: a_course()}).found["chance"] <= gates.CHANCE


def record(distance, shown, own, low):
    return {
        "distance": distance,
        "shown": {"value": shown},
        "own": {"value": own},
        "gain": {"low": low},
        "p_holm": 0.01,
    }


@pytest.mark.parametrize(
    ("mid", "passed"),
    [(record(40, 0.2, 0.1, 0.01), True), (record(40, 0.19, 0.1, 0.01), False), (record(40, 0.2, 0.1, 0.0), False)],
)
def test_g2_wants_twice_an_own_resample_and_an_interval_above_it_from_every_origin(mid, passed):
    weak = record(10, 0.11, 0.1, -0.02)
    assert g2({"0": [weak, record(60, 0.4, 0.1, 0.2)], "100": [weak, mid]}).passed is passed
    assert g2(None).passed is None


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, True),
        ({"quarters": (0.2, 0.199, 0.2, 0.2)}, False),
        ({"quarters": (0.2, 0.4, 0.41, 0.421)}, False),
        ({"entropy_left": 0.41}, False),
    ],
)
def test_g3_wants_a_rise_a_plateau_and_no_entropy(changes, passed):
    assert g3({seed: a_course(**changes) for seed in SEEDS}).passed is passed
    assert g3({}).passed is None


@pytest.mark.parametrize(("last", "passed"), [(0.445, True), (0.435, False)])
def test_g4_wants_another_setting_above_the_plateau_and_pairs_by_seed(last, passed):
    other = {0: a_course(quarters=(0.1, 0.2, 0.3, last)), 7: a_course(quarters=(0, 0, 0, 1.0))}
    found = g4({0: a_course(), 1: a_course()}, {"lr 0.0002": other})
    assert found.passed is passed  # seed 7 has no partner
    assert found.found["best"] == "lr 0.0002"
    assert g4({0: a_course()}, {}).passed is None


def test_g5_takes_the_best_rate_unless_it_is_at_the_edge_or_runs_are_missing():
    rates = [setting(rate) for rate in RATES]
    sweep = {name: {seed: a_course(test=0.1 * place) for seed in SEEDS} for place, name in enumerate(rates)}
    assert g5(sweep, rates, SEEDS).passed is False
    sweep[rates[2]] = {seed: a_course(test=0.9) for seed in SEEDS}
    found = g5(sweep, rates, SEEDS)
    assert (found.passed, found.found["best"]) == (True, rates[2])
    del sweep[rates[0]][2]
    assert g5(sweep, rates, SEEDS).passed is None
    del sweep[rates[0]]
    assert g5(sweep, rates, SEEDS).passed is None


def test_the_runs_are_grpo_alone_the_presets_own_first_and_every_rate_with_every_seed():
    cells = plan("cpu")
    assert {cell.config.method for cell in cells} == {"grpo"}
    assert cells[0].config == resolve_config("grpo", "cpu", 0)
    assert cells[0].config.learning_rate in RATES
    assert list(RATES) == sorted(set(RATES))
    assert len(RATES) == 5
    for seed in SEEDS:
        of_seed = [cell for cell in cells if cell.seed == seed]
        assert {cell.config.learning_rate for cell in of_seed} == set(RATES)
        assert len({cell.config.run_name for cell in of_seed}) == len(of_seed) == len(RATES) + 1
    (bonus,) = {cell.config.entropy_bonus for cell in cells} - {0.0}
    assert bonus == gates.BONUS


def test_without_runs_every_gate_is_undecided(tmp_path):
    found = decide("cpu", SEEDS, tmp_path)
    assert [gate["passed"] for gate in found["gates"]] == [None] * 5
    assert in_words(found).count("undecided") == 5
    assert found["world"] == WORLD


def test_the_command_runs_what_is_missing_and_writes_after_each_run(tmp_path, monkeypatch, capsys):
    """The whole way on preset smoke, with one rate beside its own; a second call finds all of it done."""
    own = resolve_config("grpo", "smoke").learning_rate
    monkeypatch.setattr(gates, "RATES", (own, 2 * own))
    monkeypatch.setattr(gates, "SEEDS", (0,))
    monkeypatch.setattr(gates, "ORIGINS", (0, 4))
    monkeypatch.setattr(gates, "DISTANCES", (2, 4))
    monkeypatch.setattr(gates, "PROMPTS", 12)
    monkeypatch.setattr(gates, "WINDOW", 5)
    arguments = ["gates", "--preset", "smoke", "--seeds", "0", "--quiet"]
    arguments += ["--root", str(tmp_path / "runs"), "--out", str(tmp_path / "results")]
    assert main(arguments) == 0
    found = json.loads((tmp_path / "results" / "gates.json").read_text())
    assert [gate["name"] for gate in found["gates"]] == ["G1", "G2", "G3", "G4", "G5"]
    assert set(found["runs"]) == {setting(own), setting(2 * own), setting(own, gates.BONUS)}
    assert all(gate["passed"] is not None for gate in found["gates"])
    shares = found["gates"][1]["found"]["shares"]
    assert set(shares) == {"0", "4"}
    assert set(shares["0"]) == {"own", "2", "4"}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("metrics.jsonl")}
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("metrics.jsonl")} == before


def test_the_premise_is_sampled_with_the_seed_of_the_run(tmp_path, monkeypatch):
    """Else base failures and own resample would be one draw for all seeds of the map."""
    seeds = []

    class Asked(Exception):
        pass

    def measurement(folder, policies, pairs, processor, rows, verifier, settings, **rest):
        seeds.append(settings.seed)
        raise Asked

    monkeypatch.setattr("npo_core.stages.signal_run.Measurement", measurement)
    for seed in (0, 3):
        with pytest.raises(Asked):
            gates.measure_premise(resolve_config("grpo", "smoke", seed), tmp_path, quiet=True)
    assert seeds == [0, 3]
