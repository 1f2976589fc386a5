"""The yardsticks of `make bench`: the hand-written loop does what NPOTrainer does; memory is that of one process."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing import assert_close
from transformers import GenerationMixin

from npo_core.guidance.verdicts import Verdict
from npo_core.runs.config import resolve_config
from npo_core.stages import bench, factory
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


RIGHT, OTHER = "0", "1"
"""Words that a group's first response, and the others, begin with."""

VERDICTS = {True: Verdict.CORRECT, False: Verdict.WRONG}


@pytest.fixture
def judged(world):
    """The world with a verdict by the first word: whatever is sampled, one response of a group is right (`sampled`)."""
    return replace(world, verifier=lambda text, row: VERDICTS[text.split()[0] == RIGHT])


@pytest.fixture
def sampled(world, monkeypatch):
    """Seeds every sampling alike, gives it its first words, and keeps the model with a copy of what it sampled."""
    calls, tokenizer = [], world.processor.tokenizer
    generate = GenerationMixin.generate
    right, other = tokenizer.convert_tokens_to_ids([RIGHT, OTHER])

    def seeded(self, *args, **kwargs):
        torch.manual_seed(5)
        ids = generate(self, *args, **kwargs)
        first = kwargs["input_ids"].shape[1]
        at_once = ids[:, first] == tokenizer.eos_token_id
        ids[at_once, first + 1] = tokenizer.eos_token_id
        ids[:, first] = other
        ids[:: CONFIG.num_generations, first] = right
        calls.append((self, ids.clone()))
        return ids

    monkeypatch.setattr(GenerationMixin, "generate", seeded)
    return calls


@pytest.fixture
def gradients():
    """What each optimiser step was given, by parameter in the optimiser's order."""
    steps = []

    def keep(optimizer, *_):
        steps.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    handle = register_optimizer_step_pre_hook(keep)
    yield steps
    handle.remove()


@pytest.fixture
def double(monkeypatch):
    """Loads a policy in double precision; where a model asks for single precision, it gets double as well."""
    single = torch.float32

    def load(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "float32", single)
            torch.set_default_dtype(single)
            model = load_policy(*args, **kwargs).double()
        torch.set_default_dtype(torch.float64)
        return model

    for module in (bench, factory):
        monkeypatch.setattr(module, "load_policy", load)
    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    yield load
    torch.set_default_dtype(single)


def _trained_and_written(world, sampled, folder):
    """Policy of the trainer and policy of the loop after the same samples, and what both logged."""
    maker = stages.TrainerMaker(CONFIG, world)
    trainer = maker(folder)
    trainer.args.save_strategy = "no"
    trainer.train()
    logs = list(bench.handwritten_loop(CONFIG, world, maker.schedule))
    (trained, _), (written, _) = sampled[0], sampled[-1]
    for (_, one), (_, other) in zip(sampled[:2], sampled[2:], strict=True):
        assert torch.equal(one, other)
    return trained, written, trainer.state.log_history, logs


def test_updates_of_the_hand_written_loop_are_those_of_the_trainer(judged, sampled, gradients, double, tmp_path):
    """In double precision: Adam moves a weight by lr · g / (|g| + 1e-8), which turns the rounding of single precision,
    2e-9 in a gradient as small as that, into 1e-4 in the weight."""
    start = double(judged.base).state_dict()
    trained, written, _, _ = _trained_and_written(judged, sampled, tmp_path)
    assert {p.dtype for p in trained.parameters()} == {torch.float64}
    for one, other in zip(gradients[:2], gradients[2:], strict=True):
        assert_close(one, other, atol=1e-14, rtol=0)
        assert min(gradient.abs().max() for gradient in one) > 1e-8
    assert_close(dict(written.state_dict()), dict(trained.state_dict()), atol=1e-10, rtol=0)
    moved = [name for name, value in written.state_dict().items() if (value - start[name]).abs().max() > 1e-3]
    assert len(moved) > 10


def test_the_hand_written_loop_logs_what_the_trainer_logs(judged, sampled, gradients, tmp_path):
    _, _, history, logs = _trained_and_written(judged, sampled, tmp_path)
    for one, other in zip(gradients[:2], gradients[2:], strict=True):
        assert_close(one, other, atol=1e-7, rtol=0)
    for own, log in zip(logs, history, strict=False):
        assert own["reward"] == pytest.approx(log["reward"]) == 1 / CONFIG.num_generations
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
