"""What is computed of a run beside its training is computed as the training does: weights, and products of matrices."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from foreign import byte_llama

from npo_core.control.baselines import GuidedByPolicy
from npo_core.runs.checkpoints import mark_complete
from npo_core.runs.config import resolve_config
from npo_core.runs.measurement import Pair
from npo_core.runs.shared import open_run
from npo_core.stages import bench_real
from npo_core.stages import run as stages
from npo_core.study import gates, real
from npo_core.study.gain import GainPlan, GainStudy
from npo_core.study.scores import score
from npo_core.world import policies
from npo_core.world.policies import load_policy, save_policy

SMALL = {"data": "letters:2-2", "train_problems": 8, "eval_problems": 2, "eval_rollouts": 1, "max_completion_length": 4}
STEPS = {"compute_steps": 4, "checkpoint_every": 2, "checkpoint_keep": 0, "warmstart_pass_rate": 0.0}
LIKE = {
    "32 bits": ({"mixed_precision": "no"}, torch.float32, torch.float32),
    "products of 16 bits": ({"mixed_precision": "bf16"}, torch.float32, torch.bfloat16),
    "weights of 16 bits": ({"mixed_precision": "no", "dtype": "bfloat16"}, torch.bfloat16, torch.bfloat16),
}
"""Settings of a run, and the types that its policy's weights and products have."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return byte_llama(tmp_path_factory.mktemp("policy"))


def checkpoints(run, processor, policy):
    for step in (2, 4):
        folder = run.path / "branches" / "00" / f"checkpoint-{step}"
        save_policy(load_policy(policy), processor, folder)
        mark_complete(folder)


def gain_study(config, world, root, monkeypatch):
    run = open_run(config, root)
    checkpoints(run, world.processor, world.base)
    monkeypatch.setattr("npo_core.study.gain.require_complete", lambda folder: None)
    monkeypatch.setattr(stages, "run", lambda *_: run)
    return GainStudy(config, GainPlan((2,), (0, 2), window=2, teacher=False), root, quiet=True)


def guides_of_gain(config, world, root, monkeypatch):
    gain_study(config, world, root, monkeypatch)._cache(Pair(2, "000004", 2))


def end_without_guides(config, world, root, monkeypatch):
    study = gain_study(config, world, root, monkeypatch)
    monkeypatch.setattr("npo_core.study.gain._means", lambda lines: {})
    study._unguided(2)


def scores(config, world, root, monkeypatch):
    run = open_run(config, root)
    checkpoints(run, world.processor, world.base)
    score(run, 0, 2, "plain", world)


def exact_chances(config, world, root, monkeypatch):
    run = open_run(config, root)
    checkpoints(run, world.processor, world.base)
    place = {"branch": 0, "policy_step": 2, "compute_step": 2, "rollouts": 8}
    monkeypatch.setattr(real, "saved_places", lambda run: [place])
    assert list(real.exact_rows(SimpleNamespace(config=config, arm="NPO", seed=0), run))


def premise(config, world, root, monkeypatch):
    checkpoints(open_run(config, root), world.processor, world.base)
    monkeypatch.setattr("npo_core.stages.measure.Measurement._require_failures", lambda *_: None)
    monkeypatch.setattr(gates, "PROMPTS", 2)
    monkeypatch.setattr(gates, "premise", lambda *_: [])  # a bootstrap of seconds
    monkeypatch.setattr(gates, "ROLLOUTS", 2)
    gates.measure_premise(config, root, True, [0], [2])


def guides_of_a_teacher(config, world, root, monkeypatch):
    made = SimpleNamespace(policy=lambda folder: policies.load_policy(folder, dtype=config.dtype))
    config = config.with_changes(method="luffy")
    work = GuidedByPolicy(
        made, config, open_run(config, root), world.rows, world.processor, lambda text, row: True, True,
        guide_folder=world.base,
    )  # fmt: skip
    work._sampled_guides(0)


def guides_of_a_trial(config, world, root, monkeypatch):
    guides = bench_real.right_guides(config, world, list(world.rows)[:2])
    assert {guide.temperature for guide in guides} == {config.temperature}


def responses_for_readers(config, world, root, monkeypatch):
    stages.sample_responses(config, 1, 1, world)


WORK = (
    guides_of_gain,
    end_without_guides,
    scores,
    exact_chances,
    premise,
    guides_of_a_teacher,
    guides_of_a_trial,
    responses_for_readers,
)


@pytest.mark.parametrize("like", LIKE)
@pytest.mark.parametrize("work", WORK)
def test_a_policy_computes_as_in_the_run(policy, tmp_path, monkeypatch, work, like):
    changes, weights, products = LIKE[like]
    config = resolve_config(
        "grpo", "smoke", 0, {"policy": str(policy), **SMALL, **STEPS, **changes, "temperature": 0.8}
    )
    world, seen = stages.prepare(config, quiet=True), set()

    def note(layer, _, out):
        seen.add((layer.weight.dtype, out.dtype))

    def load(*given, **named):
        model = load_policy(*given, **named)
        model.model.layers[0].mlp.down_proj.register_forward_hook(note)
        return model

    monkeypatch.setattr(policies, "load_policy", load)
    work(config, world, tmp_path, monkeypatch)
    assert seen == {(weights, products)}
