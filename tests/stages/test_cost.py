"""The plan of a run: counted from settings and shapes, and refused where it does not fit."""

import shutil
from collections import namedtuple
from dataclasses import replace
from types import SimpleNamespace

import pytest
from foreign import byte_llama

from npo_core.runs.config import preset_names, resolve_config
from npo_core.runs.launchers import Launcher, read_launcher
from npo_core.stages import cost as plan
from npo_core.stages.cost import GIB, amount, checkpoint_bytes, fits, require_room, scored_at_once, step_memory
from npo_core.stages.factory import batch_shape
from npo_core.trainer import memory
from npo_core.trainer.memory import fitting, scoring_bytes
from npo_core.world.pretrained import PolicySize, policy_config, policy_size
from npo_core.world.warmstart import base_policy_folder

EIGHT = PolicySize(total=1000, trained=800, layers=10, hidden=8, cached=4, vocabulary=50)
"""A policy with round numbers."""

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_resolves_and_its_plan_prints(preset):
    table = plan.plan(resolve_config("autonpo", preset))
    config = resolve_config("autonpo", preset)
    assert (
        table["rollouts in training"] == f"{config.compute_steps * config.prompts_per_step * config.num_generations:,}"
    )
    assert all(isinstance(value, str) and value for value in table.values())


def test_the_paper_preset_is_the_papers_recipe():
    config = resolve_config("autonpo", "paper")
    assert (config.prompts_per_step, config.num_generations, config.compute_steps) == (256, 8, 400)
    assert (config.max_prompt_length, config.max_completion_length) == (4096, 4096)
    assert (config.learning_rate, config.epsilon, config.epsilon_high, config.weight_decay) == (1e-6, 0.2, 0.28, 0.01)
    assert (config.tau_gate, config.checkpoint_every, config.temperature) == (0.6, 10, 1.0)
    layout = read_launcher(config.launcher)
    assert (layout.machines, layout.processes) == (4, 32)
    assert batch_shape(config, layout.processes) == (4, 16)


def test_memory_of_a_step_by_hand():
    """Weights 1000, trained 800, in float32, whole: 4000, 3200 and 6400 bytes; 4 rows of 6 + 2 tokens, width 8."""
    config = resolve_config(
        "grpo", "smoke", overrides={"micro_batch": 4, "max_completion_length": 2, "max_prompt_length": 6}
    )
    memory = step_memory(config, EIGHT, Launcher())
    tokens = 4 * (6 + 2)
    assert (memory.weights, memory.gradients, memory.moments, memory.vllm) == (4000, 3200, 6400, 0)
    assert memory.activations == 34 * 2 * tokens * 8 * 10
    assert memory.logits == 4 * (2 * tokens * 50 + 50 * 8)
    assert (memory.learner, memory.scoring, memory.deciding) == (0, 0, 0), "GRPO decides nothing"
    passes = config.rollouts_per_step // 4
    assert memory.keys == 4 * passes * (4 * 4 * (6 + 2) + 4 * 4 * 50 + 34 * 2 * 6 * 8), (
        "all rollouts of the step at once"
    )
    assert memory.sampling == memory.weights + memory.moments + memory.keys, "gradients are let go of before"
    parts = [getattr(memory, name) for name in memory.__dataclass_fields__ if name != "keys"]
    assert memory.training == sum(parts) and memory.total == max(memory.training, memory.sampling)
    with_vllm = config.with_changes(vllm="server")
    assert step_memory(with_vllm, EIGHT, Launcher()).keys == 0, "another process samples"

    checkpointed = step_memory(config.with_changes(gradient_checkpointing=True), EIGHT, Launcher())
    assert checkpointed.activations == 4 * tokens * 8 * 10 + 34 * 2 * tokens * 8
    adapters = step_memory(config.with_changes(lora_rank=2, dtype="bfloat16"), EIGHT, Launcher())
    assert (adapters.gradients, adapters.moments) == (3200, 6400), "adapters stay in float32"
    assert adapters.weights == 2000 + 3200, "beside the weights that they change"
    assert adapters.logits == 4 * 2 * tokens * 50, "a frozen head has no gradient"


def test_weights_in_32_bits_have_copies_in_16_where_products_do():
    """Of 1000 weights 800 are trained and kept so; of the others a layer of 100 at most, and a head of 50 × 8."""
    config = resolve_config("grpo", "smoke", overrides={"micro_batch": 4})
    assert step_memory(config, EIGHT, Launcher()).casts == 0
    half = config.with_changes(mixed_precision="bf16")
    assert step_memory(half, EIGHT, Launcher()).casts == 2 * 1000, "saved for the gradient of what lies before them"
    checkpointed = half.with_changes(gradient_checkpointing=True)
    assert step_memory(checkpointed, EIGHT, Launcher()).casts == 2 * 800 + 2 * 200, "no more than there are"
    few = replace(EIGHT, trained=20)
    adapters = checkpointed.with_changes(lora_rank=2)
    assert step_memory(adapters, few, Launcher()).casts == 2 * 20 + 2 * (100 + 50 * 8)
    assert step_memory(half.with_changes(dtype="bfloat16"), EIGHT, Launcher()).casts == 0
    assert step_memory(half, EIGHT, Launcher(processes=4, sharded=True)).casts == 0, "gathered in 16 bits"
    decision = step_memory(half.with_changes(method="autonpo"), EIGHT, Launcher())
    assert decision.deciding == sum(
        (decision.weights, decision.moments, decision.casts, decision.learner, decision.scoring)
    )


def test_sharding_spreads_weights_gradients_and_moments():
    config = resolve_config("grpo", "smoke", overrides={"micro_batch": 4})
    whole = step_memory(config, EIGHT, Launcher(processes=4))
    sharded = step_memory(config, EIGHT, Launcher(processes=4, sharded=True))
    assert (sharded.gradients, sharded.moments) == (whole.gradients // 4, whole.moments // 4)
    gathered = EIGHT.total // EIGHT.layers + EIGHT.vocabulary * EIGHT.hidden
    assert sharded.weights == whole.weights // 4 + 2 * gathered, "one gathered layer, and the head, in 16 bits"


def test_memory_of_a_decision_by_hand():
    """4 responses of 2 tokens behind prompts of 6, 50 words: 8 bytes each, 10 with products in 16 bits."""
    settings = {"score_batch": 4, "max_completion_length": 2, "max_prompt_length": 6}
    config = resolve_config("autonpo", "smoke", overrides=settings)
    memory = step_memory(config, EIGHT, Launcher())
    assert memory.learner == 4000, "V̂ compares with a policy of the past"
    assert memory.scoring == 8 * 4 * 2 * 50 + 2 * 34 * 4 * (6 + 2) * 8
    assert memory.deciding == memory.weights + memory.moments + memory.learner + memory.scoring
    assert memory.total == max(memory.training, memory.sampling, memory.deciding)
    half = step_memory(config.with_changes(mixed_precision="bf16"), EIGHT, Launcher())
    assert half.scoring == 10 * 4 * 2 * 50 + 34 * 4 * (6 + 2) * 8
    sharded = step_memory(config.with_changes(micro_batch=4), EIGHT, Launcher(processes=4, sharded=True))
    assert (sharded.learner, sharded.scoring) == (memory.learner, memory.scoring), "every process holds a whole learner"
    adapters = step_memory(config.with_changes(lora_rank=2), EIGHT, Launcher())
    assert adapters.learner == 4000 + 3200


@pytest.mark.parametrize(
    ("method", "overrides", "held"),
    [
        ("grpo", {}, (False, False)),
        ("exgrpo", {}, (False, False)),
        ("npo", {}, (False, True)),
        ("npo", {"cache_rule": "closest", "cache_stop": False}, (True, True)),
        ("npo", {"guide_from": "own"}, (True, True)),
        ("npo", {"guide_from": "none"}, (False, False)),
        ("luffy", {}, (True, True)),
        ("rlep", {}, (True, True)),
    ],
)
def test_what_a_decision_holds_depends_on_the_method(method, overrides, held):
    memory = step_memory(resolve_config(method, "smoke", overrides=overrides), EIGHT, Launcher())
    assert (memory.learner > 0, memory.scoring > 0) == held


def test_a_second_large_policy_does_not_fit_where_one_trains(monkeypatch):
    """8B with adapters on 80 GiB: 67 GiB in training, and as much again for the policy that V̂ compares with."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1024 * GIB, 0, 1024 * GIB))
    overrides = {"policy": "Qwen/Qwen3-VL-8B-Instruct", "micro_batch": 2}
    assert fits(plan.plan(resolve_config("grpo", "gpu", overrides=overrides)))
    assert "score_batch (decision)" in plan.plan(resolve_config("autonpo", "gpu", overrides=overrides))["fits"]


def test_a_plan_scores_as_many_at_a_time_as_the_run_will(monkeypatch):
    """512 are asked for; of 512 tokens over Qwen's words one takes 0.84 GiB, and a quarter of 80 GiB holds 23."""
    config = resolve_config("autonpo", "gpu", overrides={"max_completion_length": 512, "score_batch": 512})
    size = replace(EIGHT, vocabulary=151_936)
    assert scored_at_once(config.with_changes(gpu_memory=80.0), size) == 23
    assert scored_at_once(config.with_changes(gpu_memory=80.0, score_batch=16), size) == 16
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=151_936)))
    for gigabytes in (8, 24, 141):
        monkeypatch.setattr(memory, "device_memory", lambda device, has=gigabytes: has * GIB)
        really = fitting(512, scoring_bytes(model, 512), "cuda", "scored")
        planned = config.with_changes(gpu_memory=float(gigabytes))
        assert scored_at_once(planned, size) == really
        small = step_memory(planned.with_changes(score_batch=really), size, Launcher())
        assert step_memory(planned, size, Launcher()).scoring == small.scoring


def test_disk_of_the_checkpoints_by_hand():
    """Five checkpoints, two resumable: weights 1000 × 4 bytes each, two moments of 800 × 4 in two of them."""
    config = resolve_config(
        "grpo", "smoke", overrides={"compute_steps": 10, "checkpoint_keep": 2, "rlep_source_steps": 2}
    )
    assert checkpoint_bytes(config, EIGHT, Launcher()) == 5 * 4000 + 2 * 2 * 3200
    assert checkpoint_bytes(config, EIGHT, Launcher(processes=2, sharded=True)) == 5 * 4000 + 2 * 2 * 3200 + 2 * 4000
    adapters = config.with_changes(lora_rank=2)
    assert checkpoint_bytes(adapters, EIGHT, Launcher()) == 5 * 3200 + 2 * 2 * 3200
    kept = config.with_changes(checkpoint_keep=0)
    assert checkpoint_bytes(kept, EIGHT, Launcher()) == 5 * (4000 + 2 * 3200)
    # one roll-back: a branch more with two resumable ones, and a checkpoint where training stopped
    decided = config.with_changes(method="autonpo", max_interventions=1)
    assert checkpoint_bytes(decided, EIGHT, Launcher()) == 6 * 4000 + 4 * 2 * 3200


def test_what_is_on_disk_already_needs_no_room(tmp_path, monkeypatch):
    """A run that has written most of its checkpoints goes on, however full the disk is by now."""
    config = resolve_config("grpo", "smoke")
    base = base_policy_folder(config)
    needed = require_room(config, tmp_path, base)
    (tmp_path / "branches" / "00").mkdir(parents=True)
    (tmp_path / "branches" / "00" / "weights").write_bytes(bytes(needed - 10))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 89, 11))
    assert require_room(config, tmp_path, base) == 10


def test_room_is_asked_for_the_policy_that_is_trained_and_not_for_what_its_name_means(tmp_path):
    """A rehearsal with a random Llama in the place of SmolLM2 writes a thousandth of what SmolLM2 would."""
    byte_llama(tmp_path / "llama")
    config = resolve_config("npo", "real-smoke")
    size = policy_size(config, policy_config(str(tmp_path / "llama")))
    needed = require_room(config, tmp_path / "run", tmp_path / "llama")
    assert needed == checkpoint_bytes(config, size, Launcher())
    assert 500 * needed < checkpoint_bytes(config, policy_size(config, policy_config(config.policy)), Launcher())


def test_too_little_disk_is_refused_before_training(tmp_path, monkeypatch):
    config = resolve_config("grpo", "smoke")
    base = base_policy_folder(config)
    assert require_room(config, tmp_path / "not" / "there", base) > 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 9, 1))
    with pytest.raises(ValueError, match=r"checkpoints will take .* checkpoint_keep is 20.*but 1 B are free.*NPO_RUNS"):
        require_room(config, tmp_path, base)
    table = plan.plan(config, tmp_path)
    assert not fits(table) and "checkpoints need" in table["fits"]


def test_too_little_gpu_memory_is_said():
    full = {"lora_rank": 0, "freeze_vision": False, "dtype": "float32"}
    table = plan.plan(resolve_config("grpo", "gpu", overrides={**full, "policy": "Qwen/Qwen3-VL-8B-Instruct"}))
    assert "a process needs" in table["fits"] and "of the GPU's 80.0 GiB" in table["fits"]
    assert plan.gpu_bytes(resolve_config("grpo", "gpu")) == 80 * GIB


def test_rolled_back_steps_and_offline_rollouts_are_counted():
    """Preset smoke: scout 4, late 10 back to 6; windows 4 + 4 of 4 prompts, 4 rollouts each."""
    table = plan.plan(resolve_config("npo", "smoke"))
    assert table["of them scout and rolled back"] == "8"
    assert table["rollouts of guidance caches, at most"] == str((4 + 4) * 4 * 4)
    assert plan.plan(resolve_config("grpo", "smoke"))["rollouts of guidance caches, at most"] == "0"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1000, "1,000 B"), (1536, "1.50 KiB"), (20 * 2**20, "20.0 MiB"), (1000 * 2**30, "1,000 GiB")],
)
def test_amounts(size, text):
    assert amount(size) == text


@pytest.mark.parametrize(
    ("overrides", "processes", "shape"),
    [
        ({}, 1, (16, 1)),
        ({"micro_batch": 8}, 1, (8, 2)),
        ({"micro_batch": 8}, 2, (8, 1)),
        ({"micro_batch": 2}, 1, (2, 8)),
    ],
)
def test_batch_shape(overrides, processes, shape):
    assert batch_shape(resolve_config("grpo", "smoke", overrides=overrides), processes) == shape


def test_a_step_that_cannot_be_shared_is_refused():
    config = resolve_config("grpo", "smoke")
    with pytest.raises(
        ValueError, match=r"4 prompts, which 3 processes cannot share evenly; a group of 4 rollouts is never"
    ):
        batch_shape(config, 3)
    with pytest.raises(ValueError, match=r"micro_batch is 16; with 2 processes it must be a divisor of the 8 rollouts"):
        batch_shape(config, 2)
    appended = resolve_config("rlep", "smoke", overrides={"micro_batch": 1})
    with pytest.raises(ValueError, match=r"micro_batch is 1 with 6 rows in a group of 4 rollouts.*multiple of 4"):
        batch_shape(appended)
