"""When does guidance pay: the map's grid, its table from real runs of the smallest preset, and what it says."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from npo_core.__main__ import main
from npo_core.runs.validation import WORLD
from npo_core.stages import run as stages
from npo_core.stages.prefix import shared_steps
from npo_core.study import map as map_of_gain
from npo_core.study.gates import RATES
from npo_core.study.map import (
    DISTANCES,
    GRPO,
    collect_map,
    map_markdown,
    markdown,
    plan_map,
    premise_predicts,
)
from npo_core.study.results import MAP, MAP_ABOUT, MAP_COLUMNS, ResultsRefused, has_map, read_map
from npo_core.study.scores import score

SMALL = {"rollout_every": 0, "checkpoint_every": 2}


def test_the_grid_holds_grpo_and_every_distance_at_every_rate():
    grid = plan_map("cpu", range(5))
    assert len(grid) == 5 * len(RATES) * (1 + len(DISTANCES))
    assert {cell.config.learning_rate for cell in grid} == set(RATES)
    for cell in grid:
        config = cell.config
        if cell.arm == GRPO:
            # the longest guided run makes 220 steps and asks for at most 8 rollouts of 30 × 32 prompts, 30 steps' worth
            assert config.method == "grpo" and config.compute_steps == 250
            continue
        distance = int(cell.arm.split()[-1])
        assert (config.scout_steps, config.early_window, config.late_step) == (distance or 1, 30, 0)
        assert config.compute_steps == config.scout_steps + 60
        assert config.guide_from == ("future" if distance else "own")


def test_the_scout_is_the_beginning_of_grpo():
    grpo, *_, far = plan_map("cpu", [0], rates=[6e-4])
    assert shared_steps(far.config, grpo.config) == 160


def test_grpo_goes_on_for_all_that_a_guided_run_can_spend_off_line():
    (grpo, *guided) = plan_map("cpu", [0], [6e-4], overrides={"cache_rollouts": 20})
    most = max(cell.config.compute_steps * 256 + 30 * 32 * 20 for cell in guided)
    assert most <= grpo.config.compute_steps * 256 < most + 10 * 256, "to a checkpoint, and no further"
    assert grpo.config.compute_steps % grpo.config.checkpoint_every == 0


def test_rates_and_distances_rise():
    with pytest.raises(ValueError, match=r"rates is \[0.001, 0.0001\]; give rising values"):
        plan_map("cpu", [0], rates=[1e-3, 1e-4])
    with pytest.raises(ValueError, match=r"distances is \[20, 20\]"):
        plan_map("cpu", [0], distances=[20, 20])


@pytest.mark.slow
def test_the_table_holds_grpo_at_as_many_rollouts_and_the_premise(tmp_path, monkeypatch):
    for name, value in {"WINDOW": 2, "AFTER": 2}.items():  # distances that are not the planned ones
        monkeypatch.setattr(map_of_gain, name, value)
    chosen = plan_map("smoke", [0], rates=[1.0e-4], distances=(0, 2), overrides=SMALL)
    for cell in chosen:
        stages.run(cell.config, tmp_path, quiet=True)
    collect_map(chosen, tmp_path, tmp_path)
    table = read_map(tmp_path)
    assert table["distance"].tolist() == [0, 2] and table.columns.tolist() == list(MAP_COLUMNS)
    grpo, own, future = (cell.folder(tmp_path) for cell in chosen)
    for row, run in zip(table.to_dict("records"), (own, future), strict=True):
        result = run.result()
        assert row["npo"] == pytest.approx(result["final"]["average"], abs=1e-5)
        assert row["rollouts"] == result["rollouts"] >= row["grpo_rollouts"] > 0
        assert row["difference"] == pytest.approx(row["npo"] - row["grpo"], abs=1e-5)
        assert row["grpo_rollouts"] % (2 * grpo.config.rollouts_per_step) == 0, "a checkpoint every other step"
    assert table["lead"][0] == 0 and table["guide_solves"][0] == table["own_solves"][0] == table["own_solves"][1]
    # the guided run's rollouts lie between two of GRPO's checkpoints, of which GRPO's score is a mean by distance
    per_step = grpo.config.rollouts_per_step
    row = table.to_dict("records")[1]
    first, step = (row["grpo_rollouts"] // per_step, row["rollouts"] / per_step)
    levels = [score(grpo, 0, int(at), "paper")["average"] for at in (first, first + 2)]
    share = (step - first) / 2
    assert 0 < share < 1 and row["grpo"] == pytest.approx((1 - share) * levels[0] + share * levels[1], abs=1e-5)
    # a failed run leaves its place in the table
    for lost, names in ((chosen[2], ["grpo", "npo", "difference"]), (chosen[0], [*MAP_COLUMNS[3:]])):
        folder = lost.folder(tmp_path).path
        moved = folder.rename(folder.with_name("moved"))
        lost.folder(tmp_path)
        (folder / "failed.json").write_text(json.dumps({"reason": "exit status 1"}))
        collect_map(chosen, tmp_path, tmp_path)
        again = read_map(tmp_path)
        assert again["distance"].tolist() == [0, 2] and again.loc[1, names].isna().all()
        assert "failed |" in map_markdown(again)
        shutil.rmtree(folder)
        moved.rename(folder)
    assert again["difference"].isna().all(), "no GRPO to compare with"
    with pytest.raises(ResultsRefused, match=r"runs of the map are missing: GRPO, seed 1, rate 0.0001; NPO at Δ = 0"):
        collect_map([*chosen, *plan_map("smoke", [1], [1.0e-4], (0, 2), SMALL)], tmp_path, tmp_path)


def table(gains, leads, seeds=3, noise=0.01):
    """Four cells, their gains and leads; seeds lie `noise` apart around the gain."""
    rows = []
    places = [(rate, distance) for rate in (1e-4, 3e-4) for distance in (0, 20)]
    for (rate, distance), gain, lead in zip(places, gains, leads, strict=True):
        for seed in range(seeds):
            gained = gain + noise * (seed - (seeds - 1) / 2)
            rows.append((rate, distance, seed, 0.3, 0.5, 0.5 + gained, gained, 900, 800, 0.1 + lead, 0.1, lead))
    return pd.DataFrame(rows, columns=list(MAP_COLUMNS))


def kept(found, folder, about={"world": WORLD}):  # noqa: B006
    found.to_csv(folder / MAP, index=False)
    if about is not None:
        (folder / MAP_ABOUT).write_text(json.dumps(about))
    return folder


def test_the_table_in_markdown_marks_what_survives_holm():
    text = map_markdown(table([0.1, 0.0, -0.1, 0.02], [0.0, 0.2, 0.0, 0.3])).splitlines()
    assert text[2].startswith("| 0.0001 | 0 | 0.10 | 0.10 | **+0.100 (+0.075 to +0.125)** | 0.013 | 3 |")
    assert "**" not in text[3] and "| 0.30 | 0.10 |" in text[3] and "| 1.000 |" in text[3]
    assert text[-1].startswith("Does the premise predict the gain? ") and "3 seeds" in text[-1]
    single = map_markdown(table([0.1, 0.0, -0.1, 0.02], [0.0, 0.2, 0.0, 0.3], seeds=1))
    assert "**" not in single and "Spearman" not in single and "| +0.100 |  | 1 |" in single


def test_the_premise_is_ranked_against_the_gain_seed_by_seed():
    found = premise_predicts(table([0.0, 0.1, 0.2, 0.3], [0.0, 0.2, 0.3, 0.4]))
    assert found.value == found.low == pytest.approx(1) and found.n == 3
    turned = table([0.0, 0.1, 0.2, 0.3], [0.0, 0.2, 0.3, 0.4])
    turned.loc[turned["seed"] == 2, "difference"] *= -1
    mixed = premise_predicts(turned)
    assert mixed.value == pytest.approx(1 / 3) and mixed.low < 0
    assert "Yes: Spearman's ρ" in map_markdown(table([0.0, 0.1, 0.2, 0.3], [0.0, 0.2, 0.3, 0.4]))
    pair = map_markdown(table([0.0, 0.1, 0.2, 0.3], [0.0, 0.2, 0.3, 0.4], seeds=2))
    assert "Too few seeds: Spearman's ρ" in pair, "two seeds that agree"
    assert premise_predicts(table([0.0, 0.1, 0.2, 0.3], [0.2] * 4)) is None, "a premise that does not vary"
    failed = table([0.0, 0.1, 0.3, 0.3], [0.0, 0.2, 0.3, 0.4])
    failed.loc[(failed["learning_rate"] == 3e-4) & (failed["distance"] == 0), ["npo", "difference"]] = np.nan
    assert premise_predicts(failed).value == pytest.approx(1), "a cell that failed with every seed is on neither side"
    assert "| 0.0003 | 0 | 0.40 | 0.10 | failed |  | 0, 3 failed |" in map_markdown(failed)
    lost = table([0.0, 0.1, 0.2, 0.3], [0.0, 0.2, 0.3, 0.4], seeds=2)
    lost.loc[0, "difference"] = np.nan
    assert premise_predicts(lost) is None, "one whole seed"


def test_a_map_that_is_not_one_is_refused(tmp_path):
    assert not has_map(tmp_path) and markdown(tmp_path) == ""
    with pytest.raises(FileNotFoundError, match="python -m npo_core map"):
        read_map(tmp_path)
    whole = table([0.1, 0.0, -0.1, 0.02], [0.2, 0.4, 0.6, 0.8])
    for about in (None, {"schema": 1}, {"world": "another"}):
        with pytest.raises(ResultsRefused, match=r"another small world \((the first one|another)"):
            read_map(kept(whole, tmp_path, about))
    with pytest.raises(ResultsRefused, match="lacks the columns lead"):
        read_map(kept(whole.drop(columns="lead"), tmp_path))
    with pytest.raises(ResultsRefused, match=r"twice: rate 0\.0001, Δ = 0, seed 0"):
        read_map(kept(pd.concat([whole, whole[:1]]), tmp_path))
    assert len(read_map(kept(whole, tmp_path))) == 12
    assert markdown(tmp_path) == map_markdown(read_map(tmp_path))


def test_the_command_runs_what_it_is_told(tmp_path, monkeypatch, capsys):
    """What is planned, run, collected and printed; the runs themselves are replaced."""
    ran = []
    monkeypatch.setattr("npo_core.study.cells.run_cells", lambda cells, *rest: ran.extend(cells))
    monkeypatch.setattr(map_of_gain, "collect_map", lambda cells, root, out: [tmp_path / "results"])
    monkeypatch.setattr(map_of_gain, "markdown", lambda out: "the table")
    assert main(["map", "--out", str(tmp_path)]) == 0
    assert ran == plan_map("cpu", range(5))
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "results"), "the table"]
    ran.clear()
    asked = ["map", "--seeds", "9", "--rates", "1e-4", "6e-4", "--distances", "20", "--set", "eval_problems=64"]
    assert main(asked) == 2  # the committed map has another grid: said before anything runs
    assert "grid (rate, Δ): [('0.0001', 20), ('0.0006', 20)] now, " in capsys.readouterr().err and not ran
    assert main([*asked, "--out", str(tmp_path)]) == 0
    assert ran == plan_map("cpu", [9], [1e-4, 6e-4], [20], {"eval_problems": 64})
