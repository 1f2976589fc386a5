"""The study over seeds: speed-up, differences on both clocks, and the join of gain and signal."""

import json

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from npo_core.files import append_line
from npo_core.runs.config import resolve_config
from npo_core.runs.folder import RunFolder
from npo_core.study import findings
from npo_core.study import first as study
from npo_core.study.gain import GainPlan

# Speed-up on made curves


def _run(root, method, curve, scout=0, rollouts=0) -> RunFolder:
    """A run folder whose on-policy pass rate is `curve` over the policy steps after a scout of some steps at 0."""
    run = RunFolder(resolve_config(method, "smoke", overrides={"late_step": 0} if method == "npo" else {}), root)
    for step in range(1, scout + 1):
        append_line(run.metrics_path, {"policy_step": step, "compute_step": step, "branch": 0, "npo/pass_rate": 0.0})
    for step, rate in enumerate(curve, 1):
        line = {"policy_step": step, "compute_step": scout + step, "branch": int(scout > 0), "npo/pass_rate": rate}
        append_line(run.metrics_path, line)
    if scout:
        run.event("cache", policy_step=scout, compute_step=scout, rollouts=rollouts)
        run.finish({"interventions": [{"compute_step": scout}]})
    return run


def _speed_up(root, fast, scout=4, rollouts=0):
    slow = [0.0] * 10 + [1.0] * 30
    runs = {("GRPO", 0): _run(root, "grpo", slow), ("NPO early", 0): _run(root, "npo", fast, scout, rollouts)}
    out = study._speed_up(runs, [0])
    assert out["levels"] == [0.8], "steps 1 (a fortieth) at 0, second quarter (11 to 20) at 1"
    return {row["count"]: row["per_seed"][0] for row in out["rows"]}


def test_the_speed_up_counts_policy_steps_then_the_scout_then_the_offline_rollouts(tmp_path):
    # the moving average of weight 0.9 over n zeros and m ones is (1 − 0.9^m)/(1 − 0.9^(n+m))
    def reached(zeros):
        return next(zeros + m for m in range(1, 99) if (1 - 0.9**m) / (1 - 0.9 ** (zeros + m)) >= 0.8)

    slow, fast = reached(10), reached(2)
    per_step = resolve_config("npo", "smoke").rollouts_per_step
    ratios = _speed_up(tmp_path, [0.0] * 2 + [1.0] * 30, scout=4, rollouts=3 * per_step)
    assert ratios["without scout"] == slow / fast > 1
    assert ratios["with scout"] == slow / (fast + 4)
    assert ratios["with scout and off-line"] == slow / (fast + 4 + 3)


def test_a_level_that_is_never_reached_is_no_speed_up(tmp_path):
    assert set(_speed_up(tmp_path, [0.0] * 30).values()) == {None}


def test_over_seeds_is_students_t_and_leaves_missing_seeds_out():
    values = [0.1, 0.3, 0.2]
    out = study._over_seeds([*values, None])
    low, high = scipy.stats.t.interval(0.95, 2, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert (out["value"], out["low"], out["high"]) == pytest.approx((0.2, low, high))
    assert out["per_seed"] == [*values, None]
    assert study._over_seeds([None])["value"] is None
    assert study._over_seeds([0.4]) == {"value": 0.4, "low": None, "high": None, "per_seed": [0.4]}


# The whole study, at the smallest size


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root, out = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("results")
    study.write(
        "smoke",
        [0],
        measurement={"prompts": 16, "rollouts": 4, "gradients": 4, "resamples": 20},
        plans=[GainPlan(origins=(0,), distances=(0, 4), window=2, modes=("current",), teacher=False)],
        root=root,
        out=out,
        quiet=True,
    )
    return out


def test_interventions_hold_every_arm_on_both_clocks(folder):
    found = findings.read(folder / "interventions.json")
    assert [(run["arm"], run["seed"]) for run in found["runs"]] == [(arm, 0) for arm in study.ARMS]
    finals = {(run["arm"], run["seed"]): run for run in found["runs"]}
    for run in found["runs"]:
        assert run["compute_step"] == list(range(1, 21)) and len(run["pass_rate"]) == len(run["entropy"]) == 20
        assert run["policy_steps"] == run["policy_step"][-1]
    early = finals["NPO early", 0]
    assert early["interventions"][0]["stage"] == "early" and early["policy_steps"] == 16
    for row in found["differences"]:
        gains = [finals[row["arm"], 0]["final"] - finals["GRPO", 0]["final"]]
        if row["clock"] == "compute":
            assert row["per_seed"] == gains
    assert {(row["arm"], row["clock"]) for row in found["differences"]} == {
        (arm, clock) for arm in study.ARMS if arm != "GRPO" for clock in ("compute", "policy")
    }


def test_signal_can_be_read_as_tables(folder):
    found = findings.read(folder / "signal.json")
    assert found["seeds"] == [0] and set(found["origins"]) == {"0", "6", "10"}
    rows = findings.optima(found)
    assert {row["signal"] for row in rows} == set(findings.PREDICTORS) - {"quality", "quality_1"}
    assert all(row["interior"].endswith("of 1") for row in rows)
    assert len(findings.constants(found)) == 6 and len(findings.agreements(found)) == 9
    assert (folder / "signal-seed0" / "table.parquet").is_file()


def test_gain_is_over_the_unguided_arm_and_carries_the_measured_signal(folder):
    found = findings.read(folder / "gain.json")
    table = pd.read_parquet(folder / "signal-seed0" / "table.parquet").set_index(["origin", "source"])
    arms = [arm for arm in found["arms"] if arm["seed"] == 0]
    assert [(arm["source"], arm["distance"]) for arm in arms] == [("resample", 0), ("000004", 4), ("000020", 20)]
    for arm in arms:
        measured = table.loc[(0, arm["source"])]
        assert arm["quality"] == measured["quality"]
        assert arm["signal_gradient_current"] == measured["signal_gradient_current"]
    for name in ("correlation", "correlation_on_policy"):
        assert {row["signal"] for row in found[name]} == set(findings.PREDICTORS)
    assert set(found["primary"].values()) <= set(findings.PREDICTORS)


def test_the_correlation_is_spearmans_rho_over_the_sources_of_a_seed():
    part = pd.DataFrame({"quality": [0.1, 0.2, 0.3, 0.4], "gain": [0.0, 0.3, 0.2, 0.5]})
    assert study._rho(part, "quality") == pytest.approx(scipy.stats.spearmanr(part["quality"], part["gain"])[0])
    assert study._rho(part.assign(gain=0.1), "quality") is None
    assert study._rho(part.assign(other=-part["quality"]), "quality", "other") == pytest.approx(-1)


def test_a_source_that_was_not_measured_is_named():
    table = pd.DataFrame({"seed": [0], "origin": [0], "source": ["resample"]})
    with pytest.raises(ValueError, match=r"0 rows for seed 0, origin 0, source 000020; it must hold one"):
        study._arm_record({"seed": 0, "origin": 0, "source": "000020"}, {}, table)


def test_results_that_are_missing_or_of_another_version_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="signal-study"):
        findings.read(tmp_path / "gain.json")
    (tmp_path / "gain.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(ValueError, match="schema 99; this version reads schema 1"):
        findings.read(tmp_path / "gain.json")
