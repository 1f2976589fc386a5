"""The map of the gain: its grid, and its table from real runs of the smallest preset."""

import json

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from evidences import evidence

import npo_core.study.results as results
from npo_core.__main__ import main
from npo_core.runs.config import RunConfig
from npo_core.runs.validation import WORLD
from npo_core.stages import run as stages
from npo_core.stages.prefix import shared_steps
from npo_core.study import map as map_of_gain
from npo_core.study.cells import newest_place, score
from npo_core.study.map import (
    ABOUT,
    COLUMNS,
    HARD_SHARES,
    LEARNING_RATES,
    collect_map,
    corner_differences,
    corner_markdown,
    has_map,
    map_cells,
    map_config,
    map_markdown,
    map_relations,
    markdown,
    plan_corner,
    plan_map,
    read_corner,
    read_map,
)
from npo_core.study.results import CORNER, MAP, ResultsRefused

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
        assert config.easy_share == RunConfig().easy_share and config.compute_steps == 160
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
    assert row["base"] == pytest.approx(cells[0].folder(root).result()["base"]["average"], abs=1e-5)
    about = json.loads((tmp_path / ABOUT).read_text())
    assert about["failed"] == [] and len(about["versions"]) == 1 and len(about["configurations"]) == 2


def test_the_policy_clock_scores_grpo_where_npo_ends(cells, root, tmp_path):
    collect_map(cells, root, tmp_path)
    (row,) = read_map(tmp_path).itertuples()
    grpo, npo = (cell.folder(root) for cell in cells)
    end = npo.result()["policy_steps"]
    assert end == SMALL["compute_steps"] - SMALL["scout_steps"] - (SMALL["late_step"] - SMALL["late_start"])
    branch, step = newest_place(grpo, end)
    assert end - grpo.config.checkpoint_every < step <= end < SMALL["compute_steps"]
    assert row.grpo_policy == pytest.approx(score(grpo, branch, step, "paper")["average"], abs=1e-5)
    assert row.difference_policy == pytest.approx(row.npo - row.grpo_policy, abs=1e-5)


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


def table(gains, plateaus, seeds=3, noise=0.01):
    """Rows of a map of 2 x 2 cells: a gain and a plateau each, and seeds that lie `noise` around them."""
    rows = []
    places = [(rate, share) for rate in (1.0e-4, 3.0e-4) for share in (0.1, 0.4)]
    for (rate, share), gain, plateau in zip(places, gains, plateaus, strict=True):
        for seed in range(seeds):
            gained = gain + noise * (seed - (seeds - 1) / 2)
            rows.append(
                (rate, share, seed, 0.3, 0.5, 0.5 + gained, gained, 0.45, 0.05 + gained, plateau, 0.01 * plateau)
            )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def test_cells_hold_the_t_interval_on_both_clocks_and_holms_p():
    found = map_cells(table([0.1, 0.0, -0.1, 0.02], [0.2, 0.4, 0.6, 0.8]))
    assert [(cell.learning_rate, cell.hard_share) for cell in found] == [
        (1e-4, 0.1),
        (1e-4, 0.4),
        (3e-4, 0.1),
        (3e-4, 0.4),
    ]
    first, second, *_, last = found
    half = 4.302653 * 0.01 / np.sqrt(3)  # t of 0.975 with two degrees of freedom, over a standard deviation of 0.01
    assert (first.compute.value, first.compute.low, first.compute.high) == pytest.approx((0.1, 0.1 - half, 0.1 + half))
    assert (first.policy.value, first.policy.low) == pytest.approx((0.15, 0.15 - half))
    assert (first.grpo, first.depth, first.slope) == pytest.approx((0.5, 0.8, 0.002))
    # two of four are alike and smallest: Holm gives both four times their p; then twice the third's
    assert first.p_holm == pytest.approx(4 * first.compute.p) == found[2].p_holm
    assert last.p_holm == pytest.approx(2 * last.compute.p) and second.p_holm == 1


def test_the_gain_is_ranked_against_what_may_explain_it_seed_by_seed():
    found = map_relations(table([0.0, 0.1, 0.2, 0.3], [0.8, 0.7, 0.6, 0.5]))
    assert found["plateau depth"].value == found["plateau depth"].low == pytest.approx(1)
    assert found["slope of the plateau"].value == pytest.approx(-1)
    # ranks 1.5, 1.5, 3.5, 3.5 against 1, 2, 3, 4: 4 / sqrt(4 * 5)
    assert found["learning rate"].value == pytest.approx(2 / np.sqrt(5))
    assert found["share of hard facts"].value == pytest.approx(1 / np.sqrt(5))
    turned = table([0.0, 0.1, 0.2, 0.3], [0.8, 0.7, 0.6, 0.5])
    turned.loc[turned["seed"] == 2, "difference"] *= -1
    mixed = map_relations(turned)["plateau depth"]
    assert mixed.value == pytest.approx(1 / 3) and mixed.low < 0 and mixed.n == 3
    flat = table([0.1, 0.1, 0.1, 0.1], [0.5, 0.5, 0.5, 0.5])
    assert map_relations(flat) == {}
    assert map_relations(table([0.0, 0.1, 0.2, 0.3], [0.8, 0.7, 0.6, 0.5], seeds=1)) == {}


def test_the_table_in_markdown_marks_what_survives_holm():
    text = map_markdown(table([0.1, 0.0, -0.1, 0.02], [0.2, 0.4, 0.6, 0.8])).splitlines()
    assert text[2].startswith(
        "| 0.0001 | 0.1 | 0.500 | 0.800 | +0.002 | **+0.100 (+0.075 to +0.125)** | 0.013 | +0.150 ("
    )
    assert "**" not in text[3] and "| 1.000 |" in text[3]
    assert text[-1].startswith("Spearman's ρ over cells") and "3 seeds" in text[-1]
    single = map_markdown(table([0.1, 0.0, -0.1, 0.02], [0.2, 0.4, 0.6, 0.8], seeds=1))
    assert "**" not in single and "Spearman" not in single and "| +0.100 |  | +0.150 |" in single


def test_a_map_that_is_not_one_is_refused(tmp_path):
    assert not has_map(tmp_path)
    with pytest.raises(FileNotFoundError, match="python -m npo_core map"):
        read_map(tmp_path)
    whole = table([0.1, 0.0, -0.1, 0.02], [0.2, 0.4, 0.6, 0.8])
    whole.to_csv(tmp_path / MAP, index=False)
    for about in (None, {"schema": 1}, {"world": "another"}):
        if about is not None:
            (tmp_path / map_of_gain.ABOUT).write_text(json.dumps(about))
        with pytest.raises(ResultsRefused, match=r"another small world \((the first one|another)"):
            read_map(tmp_path)
    (tmp_path / map_of_gain.ABOUT).write_text(json.dumps({"world": WORLD}))
    whole.drop(columns="plateau").to_csv(tmp_path / MAP, index=False)
    with pytest.raises(ResultsRefused, match="lacks the columns plateau"):
        read_map(tmp_path)
    pd.concat([whole, whole[:1]]).to_csv(tmp_path / MAP, index=False)
    with pytest.raises(ResultsRefused, match=r"twice: rate 0\.0001, share 0\.1, seed 0"):
        read_map(tmp_path)
    whole.to_csv(tmp_path / MAP, index=False)
    assert has_map(tmp_path) and len(read_map(tmp_path)) == 12


def test_the_follow_up_has_one_primary_comparison_and_three_controls_by_holm():
    up, own, none = [0.04, 0.05, 0.06], [0.03, 0.06, 0.05], [-0.02, -0.01, 0.01]
    found = evidence({"NPO": up, "NPO, own resample": own, "NPO, no guide": none}, ends={"NPO": 20})
    first, *others = corner_differences(found)
    p = scipy.stats.ttest_1samp(up, 0).pvalue
    assert (first[0].arm, first[0].against) == ("NPO", "GRPO") and first[1] == pytest.approx(p), "not adjusted"
    pairs = [np.subtract(up, own), np.subtract(up, none), np.array(none)]
    alone = np.array([scipy.stats.ttest_1samp(values, 0).pvalue for values in pairs])
    order = np.argsort(alone)
    expected = np.minimum(1, np.maximum.accumulate(alone[order] * np.array([3, 2, 1])))[np.argsort(order)]
    assert [adjusted for _, adjusted in others] == pytest.approx(expected)
    assert [found.value for found, _ in others] == pytest.approx([values.mean() for values in pairs])
    rows = corner_markdown(found).split("\n\n")[1].splitlines()[2:]
    assert rows[0].startswith("| NPO − GRPO | **+0.050 (+0.025 to +0.075)** | 0.013 |")
    assert [row.split(" | ")[0] for row in rows[1:]] == [
        "| NPO − NPO, own resample",
        "| NPO − NPO, no guide",
        "| NPO, no guide − GRPO",
    ]
    assert "**" not in rows[1]
    single = evidence({"NPO": [0.1], "NPO, own resample": [0.1], "NPO, no guide": [0.0]}, base=[0.4])
    assert "| NPO − GRPO | +0.100 |  |  |" in corner_markdown(single)


def test_the_follow_up_is_read_from_its_folder(tmp_path):
    assert read_corner(tmp_path) is None
    found, folder = evidence({"NPO": [0.01, 0.02, 0.03]}), tmp_path / CORNER
    folder.mkdir()
    found.scores.to_csv(folder / results.SCORES, index=False)
    found.training.to_parquet(folder / results.TRAINING)
    (folder / results.ABOUT).write_text(json.dumps(found.about))
    assert read_corner(tmp_path).arms == ["GRPO", "NPO"]


def test_the_follow_up_has_the_settings_of_the_map_in_its_corner():
    """GRPO and NPO are the map's own runs but for the seed; the controls differ from NPO in the guide alone."""
    planned = {(cell.arm, cell.seed): cell.config for cell in plan_corner("cpu")}
    assert {seed for _, seed in planned} == set(range(5, 15)) and len(planned) == 40
    for (arm, seed), config in planned.items():
        mapped = map_config("GRPO" if arm == "GRPO" else "NPO", "cpu", seed, 3.0e-4, 0.4)
        guide = {"NPO, own resample": "own", "NPO, no guide": "none"}.get(arm, "future")
        assert config == mapped.with_changes(guide_from=guide)


@pytest.mark.parametrize("corner", [False, True])
def test_the_command_runs_map_or_follow_up(corner, tmp_path, monkeypatch, capsys):
    """What is planned, run, collected and printed; the runs themselves are replaced."""
    ran = []
    monkeypatch.setattr(map_of_gain, "prepare_bases", lambda cells, quiet: None)
    monkeypatch.setattr("npo_core.study.cells.run_cells", lambda cells, *rest: ran.extend(cells))

    def collected(cells, root, out):
        assert cells == ran and out == tmp_path
        return [tmp_path / "results"]

    monkeypatch.setattr(map_of_gain, "collect_corner" if corner else "collect_map", collected)
    monkeypatch.setattr(map_of_gain, "markdown", lambda out: "the tables")
    assert main(["map", *(["--corner"] if corner else []), "--out", str(tmp_path)]) == 0
    assert ran == (plan_corner("cpu") if corner else plan_map("cpu", range(5)))
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "results"), "the tables"]


def test_the_tables_are_those_that_are_there(tmp_path):
    assert markdown(tmp_path) == ""
    table([0.1, 0.0, -0.1, 0.02], [0.2, 0.4, 0.6, 0.8]).to_csv(tmp_path / MAP, index=False)
    (tmp_path / map_of_gain.ABOUT).write_text(json.dumps({"world": WORLD}))
    assert markdown(tmp_path) == map_markdown(read_map(tmp_path))
