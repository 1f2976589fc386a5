"""The map of the gain: its grid, and its table from real runs of the smallest preset."""

import json

import numpy as np
import pandas as pd
import pytest

from npo_core import stages
from npo_core.map_of_gain import ABOUT, HARD_SHARES, LEARNING_RATES, MAP, collect_map, map_config, plan_map
from npo_core.prefix import shared_steps
from npo_core.results import ResultsRefused

SMALL = {"compute_steps": 12, "scout_steps": 4, "early_window": 4, "late_step": 6, "late_start": 4, "rollout_every": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("map")


@pytest.fixture(scope="module")
def cells(root):
    chosen = plan_map("smoke", [0], learning_rates=[1.0e-4], hard_shares=[0.0], overrides=SMALL)
    for cell in chosen:
        stages.run(cell.config, root, quiet=True)
    return chosen


def test_the_grid_holds_both_arms_of_every_cell_and_seed():
    grid = plan_map("cpu", range(5))
    assert len(grid) == 2 * 5 * len(LEARNING_RATES) * len(HARD_SHARES)
    assert {cell.arm for cell in grid} == {"GRPO", "NPO"}
    for cell in grid:
        config = cell.config
        assert config.easy_share == 0.4 and config.compute_steps == 160
        assert round(1 - config.easy_share - config.middling_share, 6) in HARD_SHARES


def test_npo_shares_the_scout_with_grpo_and_ends_within_the_budget():
    grpo, npo = (map_config(arm, "cpu", 0, 3.0e-4, 0.4) for arm in ("GRPO", "NPO"))
    assert shared_steps(npo, grpo) == 20
    assert npo.scout_steps + npo.late_step + npo.late_step - npo.late_start <= npo.compute_steps


def test_the_table_holds_both_scores_and_grpos_plateau(cells, root, tmp_path):
    collect_map(cells, root, tmp_path)
    row = pd.read_csv(tmp_path / MAP).iloc[0]
    grpo, npo = (cell.folder(root).result()["final"]["average"] for cell in cells)
    assert (row["grpo"], row["npo"], row["difference"]) == pytest.approx((grpo, npo, npo - grpo), abs=1e-5)
    rates = [line["npo/pass_rate"] for line in cells[0].folder(root).metrics()]
    assert row["plateau"] == pytest.approx(np.mean(rates[6:]), rel=1e-4)
    assert row["slope"] == pytest.approx(rates[-1] - rates[6], abs=1e-5)
    about = json.loads((tmp_path / ABOUT).read_text())
    assert about["failed"] == [] and len(about["versions"]) == 1 and len(about["configurations"]) == 2


def test_a_missing_run_is_named(cells, root, tmp_path):
    more = plan_map("smoke", [0, 1], learning_rates=[1.0e-4], hard_shares=[0.0], overrides=SMALL)
    with pytest.raises(ResultsRefused, match=r"2 runs of the map are missing: GRPO, seed 1, rate 0.0001, share 0;"):
        collect_map(more, root, tmp_path)
    assert not (tmp_path / MAP).exists()


def test_mixed_versions_are_refused(cells, root, tmp_path, monkeypatch):
    path = cells[0].folder(root).path / "env.json"
    kept = path.read_text()
    path.write_text(json.dumps({**json.loads(kept), "python": "2.7"}))
    try:
        with pytest.raises(ResultsRefused, match="mixed versions"):
            collect_map(cells, root, tmp_path)
    finally:
        path.write_text(kept)
