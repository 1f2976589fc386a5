"""The page's own maths, run by Node where it is installed, against npo_core.method."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from made_runs import make_prefix_run, make_run, make_run_of_two, make_trl_run

from npo_core.explore.page import asset, module
from npo_core.explore.reading import read_run
from npo_core.method.groups import gate, group_advantages, pass_rate
from npo_core.method.ratios import RATIO_MODES, gradient_weight
from npo_core.method.signal import ratio_sums, variance_cost
from npo_core.method.trigger import Candidate, choose_distance

NODE = shutil.which("node")


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """`node(expression, **names)`: a JavaScript expression over maths.mjs (or another module), its value back."""
    assert NODE is not None, "this file is left out where Node is missing, see tests/conftest.py"
    folder = tmp_path_factory.mktemp("node")
    for name in ("maths", "model"):
        (folder / f"{name}.mjs").write_text(asset(f"{name}.mjs"))

    def run(expression, of="maths", **names):
        given = "".join(f"const {name} = {json.dumps(value)};" for name, value in names.items())
        code = f"import * as m from './{of}.mjs'; {given} console.log(JSON.stringify({expression}))"
        script = folder / "run.mjs"
        script.write_text(code)
        done = subprocess.run([NODE, script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages_are_those_of_the_trainer(node, scale):
    rewards = [[0, 0, 0, 0], [1, 0, 0, 0], [0.3, -2, 0.1, 5], [1, 1, 1, 1], [2, 0, 0.5, 1e-3]]
    expected = group_advantages(torch.tensor(rewards, dtype=torch.float64), scale)
    got = node("rewards.map((r) => m.groupAdvantages(r, scale))", rewards=rewards, scale=scale)
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-12)
    unscored = group_advantages(torch.tensor([[1.0, 0.0, float("nan"), 0.0]], dtype=torch.float64), scale)[0].tolist()
    assert node("m.groupAdvantages([1, 0, null, 0], scale)", scale=scale) == pytest.approx(unscored, abs=1e-12)


def test_gate_and_pass_rate_are_those_of_the_trainer(node):
    verdicts = [[k < right for k in range(n)] for n in (3, 5, 8) for right in range(n + 1)]
    rates = [float(pass_rate(torch.tensor([each]))[0]) for each in verdicts]
    assert node("verdicts.map(m.passRate)", verdicts=verdicts) == pytest.approx(rates, abs=1e-7)
    for tau in (0.0, 0.125, 0.6, 1.0):
        expected = gate(torch.tensor(rates), torch.ones(len(rates), dtype=torch.bool), tau).tolist()
        assert node("verdicts.map((v) => m.gate(m.passRate(v), true, tau))", verdicts=verdicts, tau=tau) == expected
    assert node("m.gate(0, false, 1)") is False


def test_weights_are_those_of_every_ratio_mode(node):
    deltas = [-700.0, -3.0, -0.5, 0.0, 0.2, 2.5, 30.0]
    policy = torch.tensor([deltas], dtype=torch.float64)
    mask = torch.ones_like(policy, dtype=torch.bool)
    assert node("m.RATIO_MODES") == list(RATIO_MODES)
    for mode in RATIO_MODES:
        expected = gradient_weight(policy, torch.zeros_like(policy), mask, mode, truncation=1.5, gamma=0.2)[0].tolist()
        got = node("d.map((x) => m.gradientWeight(x, mode, {truncation: 1.5, gamma: 0.2}))", d=deltas, mode=mode)
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_the_distance_that_is_chosen_is_the_controllers(node):
    rng = np.random.default_rng(0)
    for floor in (0.0, 0.2, 0.9):
        for _ in range(5):
            candidates = [
                {"distance": int(d), "policyStep": 100 - int(d), "quality": round(float(rng.random()), 1) if p else 0.0,
                 "variance": 1 + float(rng.integers(0, 3)), "prompts": int(p)}
                for d, p in zip(rng.permutation(40)[:6], rng.integers(0, 4, 6), strict=True)
            ]  # fmt: skip
            given = [
                Candidate(c["distance"], c["policyStep"], c["quality"], c["variance"], c["prompts"]) for c in candidates
            ]
            expected = choose_distance(given, floor)
            got = node("m.chooseDistance(c, floor)", c=candidates, floor=floor)
            assert (got["chosen"] or {}).get("distance") == (expected.chosen and expected.chosen.distance)
            assert got["atEdge"] == expected.at_edge


def test_the_cost_and_the_probes_sums_are_those_of_the_controller(node):
    source, policy = np.array([-0.5, -1.0, -2.0]), np.array([-0.7, -1.1, -1.9])
    sums = ratio_sums([policy - source], "source").total()
    for c in (0.0, 1.0, 17.0):
        expected = float(variance_cost(sums, "kl", c))
        assert node("m.varianceCost(kl, c)", kl=float((source - policy).mean()), c=c) == pytest.approx(
            expected, rel=1e-6
        )
    assert node("m.varianceCost(-3, 5)") == 1
    probe = {"k": 8, "prompts": [{"correct": 2, "failedAt": 3}, {"correct": 8, "failedAt": 9}],
             "candidates": [{"policyStep": 5, "sums": [1, 2], "tokens": [4, 6]}]}  # fmt: skip
    found = node("m.probeSums(probe, probe.candidates[0])", probe=probe)
    assert found == {"quality": 1.0, "prompts": 1, "kl": 0.3}, "only prompts that failed after the checkpoint count"


def test_an_interval_covers_what_a_bootstrap_over_prompts_gives(node):
    rng = np.random.default_rng(1)
    correct = rng.integers(0, 9, 40).tolist()
    probe = {"k": 8, "prompts": [{"correct": c, "failedAt": 1} for c in correct],
             "candidates": [{"policyStep": 0, "sums": [0.1] * 40, "tokens": [2] * 40}]}  # fmt: skip
    low, high = node("m.interval(m.resampleProbe(probe).map((d) => d[0].quality))", probe=probe)
    draws = rng.choice(correct, (4000, 40)).mean(axis=1) / 8
    assert (low, high) == pytest.approx(np.quantile(draws, (0.025, 0.975)), abs=0.02)
    again = node("m.interval(m.resampleProbe(probe).map((d) => d[0].quality))", probe=probe)
    assert again == [low, high], "the same page shows the same interval"


def test_the_parts_make_one_module_that_parses(tmp_path):
    assert "import " not in [line[:7] for line in module().splitlines()]
    (tmp_path / "explorer.mjs").write_text(module())
    done = subprocess.run([NODE, "--check", tmp_path / "explorer.mjs"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_part_of_the_page_turns_text_into_markup():
    for name in Path(__file__).parents[2].joinpath("npo_core/explore/assets").glob("*.mjs"):
        assert not {"innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("} & {
            word
            for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(")
            if word in name.read_text()
        }, name.name


FROZEN = """(() => {
  const freeze = (value) => {
    if (value && typeof value === "object") { Object.values(value).forEach(freeze); Object.freeze(value); }
    return value;
  };
  const prepared = m.prepare(freeze(data));
  m.promptHistory(prepared);
  let groups = 0;
  for (const line of prepared.lines) for (const entry of m.groupsOf(prepared, line)) {
    groups += 1;
    if (!entry.group) continue;
    for (const without of [true, false]) for (const tau of [0, 1]) m.asGated(prepared, entry, { tau, without });
  }
  return groups;
})()"""


@pytest.mark.parametrize("make", [make_run, make_prefix_run, make_run_of_two, make_trl_run])
def test_what_is_derived_from_a_run_changes_nothing_in_its_data(node, make, tmp_path):
    """The page hands its data on without a copy; a module would throw where it changed something frozen."""
    assert node(FROZEN, of="model", data=read_run(make(tmp_path / "run"))) > 1
