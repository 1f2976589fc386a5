"""The yardsticks of `make bench`: the hand-written loop does what NPOTrainer does; memory is that of one process."""

import math
import sys

import pytest
import torch
from torch.testing import assert_close
from transformers import GenerationMixin

from npo_core.runs.config import resolve_config
from npo_core.stages import bench
from npo_core.stages import run as stages
from npo_core.world.policies import load_policy
from npo_core.world.speed.sharing import MethodOf

# Each setting is such that its effect shows in the weights, were it left out of the loop. Clipping needs two steps:
# Adam's first one does not depend on the size of the gradient.
SETTINGS = {
    "compute_steps": 2,
    "temperature": 0.8,
    "learning_rate": 1e-3,
    "weight_decay": 5.0,
    "max_grad_norm": 0.1,
}
CONFIG = resolve_config("grpo", "smoke", overrides=SETTINGS)


@pytest.fixture(scope="module")
def world():
    return stages.prepare(CONFIG, quiet=True)


@pytest.fixture
def sampled(monkeypatch):
    """Seeds every sampling alike, and keeps the model with a copy of what it sampled."""
    calls = []
    generate = GenerationMixin.generate

    def seeded(self, *args, **kwargs):
        torch.manual_seed(5)
        ids = generate(self, *args, **kwargs)
        calls.append((self, ids.clone()))
        return ids

    monkeypatch.setattr(GenerationMixin, "generate", seeded)
    return calls


def test_updates_of_the_hand_written_loop_are_those_of_the_trainer(world, sampled, tmp_path):
    start = load_policy(world.base).state_dict()
    maker = stages.TrainerMaker(CONFIG, world)
    trainer = maker(tmp_path)
    trainer.args.save_strategy = "no"
    trainer.train()
    logs = list(bench.handwritten_loop(CONFIG, world, maker.schedule))

    trained, in_trainer = zip(*sampled[:2], strict=True)
    written, in_loop = zip(*sampled[2:], strict=True)
    for one, other in zip(in_trainer, in_loop, strict=True):
        assert torch.equal(one, other)
    assert_close(dict(written[0].state_dict()), dict(trained[0].state_dict()), atol=3e-4, rtol=0)
    moved = [name for name, value in written[0].state_dict().items() if (value - start[name]).abs().max() > 1e-3]
    assert len(moved) > 10
    for own, log in zip(logs, trainer.state.log_history, strict=False):
        assert own["reward"] == pytest.approx(log["reward"])
        assert own["entropy"] == pytest.approx(log["npo/entropy"], rel=1e-5)
        assert own["grad_norm"] == pytest.approx(log["grad_norm"], rel=1e-4)
        assert own["grad_norm"] > CONFIG.max_grad_norm


@pytest.mark.slow
def test_rows_of_the_table(world, monkeypatch):
    monkeypatch.setattr(bench, "TURNS", 1)
    monkeypatch.setattr(bench, "STEPS", 2)
    rows = {row["name"]: row for row in bench._step_ratios(CONFIG, world)}
    assert all(math.isfinite(row["value"]) and row["value"] > 0 for row in rows.values())
    assert rows["NPOTrainer step / hand-written loop step"]["limit"] == 1.3
    npo = rows["NPOTrainer / GRPOTrainer step, no guidance"]["value"] * rows["GRPOTrainer step"]["value"]
    (projected,) = [row for name, row in rows.items() if "projected" in name]
    assert projected["value"] == pytest.approx(400 * npo / 60)
    assert (projected["unit"], projected["limit"]) == ("min", None)


def test_nothing_is_left_of_sharing_in_an_unshared_policy(world):
    def patched(model):
        return [name for part in model.modules() for name, value in vars(part).items() if isinstance(value, MethodOf)]

    model = load_policy(world.base)
    assert patched(model)
    bench._unshare(model)
    assert patched(model) == []


def test_peak_memory_is_that_of_the_command_alone():
    held = torch.ones(60 << 20)  # 240 MiB in this process
    assert bench._peak_memory([sys.executable, "-c", "pass"]) < 0.05
    assert 0.2 < bench._peak_memory([sys.executable, "-c", "held = bytes([1]) * (220 << 20)"]) < 0.3
    assert held.all()
