"""Pretrained policies: found, refused, counted; trained through the same path as the tiny one, adapters included."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from npo_core.runs.checkpoints import checkpoint_folder, complete_checkpoints, slim
from npo_core.runs.config import resolve_config
from npo_core.stages import run as stages
from npo_core.world import policies
from npo_core.world.policies import load_policy, load_processor, policy_folder
from npo_core.world.pretrained import (
    QWEN3_VL,
    adapter_settings,
    check_policy,
    laid_out,
    policy_config,
    policy_size,
)

PUBLISHED = {"2B": 2_127_532_032, "4B": 4_437_815_808, "8B": 8_767_123_696}
"""Parameters of the published checkpoints, as the hub counts them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny policy of preset smoke as somebody's pretrained model: a folder with another name."""
    base = stages.prepare(resolve_config("grpo", "smoke"), quiet=True).base
    return shutil.copytree(base, tmp_path_factory.mktemp("somebody") / "Qwen3-VL-Tiny-Instruct")


def config(folder, method="npo", **overrides):
    return resolve_config(method, "smoke", overrides={"policy": str(folder), **overrides})


@pytest.mark.parametrize("size", QWEN3_VL)
def test_parameters_of_the_published_sizes(size):
    settings = policy_config(f"Qwen/Qwen3-VL-{size}-Instruct")
    plain = policy_size(resolve_config("grpo", "cpu", overrides={"freeze_vision": False}), settings)
    assert plain.total == plain.trained == PUBLISHED[size]
    assert all(parameter.is_meta for parameter in laid_out(settings).parameters()), "a plan must not take memory"


def test_what_is_trained_is_counted_as_it_is_trained(folder):
    settings = policy_config(str(folder))
    for overrides in ({}, {"freeze_vision": False}, {"lora_rank": 3}):
        run = config(folder, "grpo", **overrides)
        maker = stages.TrainerMaker(run, stages.prepare(run, quiet=True))
        model = maker(folder / "out").model
        size = policy_size(run, settings)
        assert size.trained == sum(p.numel() for p in model.parameters() if p.requires_grad), overrides
        assert size.total == maker.policy().num_parameters()


def test_entries_of_the_cache_are_those_that_a_token_leaves(folder):
    model, processor = load_policy(folder), load_processor(folder)
    ids = torch.tensor([[processor.tokenizer.eos_token_id] * 5])
    cache = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
    entries = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert policy_size(resolve_config("grpo", "smoke"), policy_config(str(folder))).cached == entries / 5


def test_adapters_are_on_the_language_model_alone(folder):
    run = config(folder, "grpo", lora_rank=4, freeze_vision=False)
    model = stages.TrainerMaker(run, stages.prepare(run, quiet=True))(folder / "out").model
    assert isinstance(model, PeftModel)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name and "language_model" in name for name in trained)
    layers = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trained}
    assert layers == set(run.lora_modules)
    assert adapter_settings(config(folder, "grpo")) is None


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_rollback_and_guidance_on_a_pretrained_policy(folder, tmp_path, rank):
    """Scout, restart, plateau, roll-back, replay: the whole method on a folder, with and without adapters."""
    # so many that some prompt of each window has a guide, whatever is drawn: about 8 of 16 have
    every = {"cache_prompts": "all", "cache_stop": False, "cache_rollouts": 32}
    run = stages.run(config(folder, lora_rank=rank, **every), tmp_path, quiet=True)
    result = run.result()
    assert [event["event"] for event in run.events()].count("rollback") == 2
    assert any(line["npo/replaced_slots"] for line in run.metrics()), "no group was guided"
    assert result["compute_steps"] == run.config.compute_steps
    name = "adapter_model.safetensors" if rank else "model.safetensors"
    first, later = (
        load_file(checkpoint_folder(run.path / "branches" / branch, step) / name)
        for branch, step in (("00", 2), ("02", 8))
    )
    assert first.keys() == later.keys() and all(("lora" in key) == bool(rank) for key in first)
    assert any((first[key] != later[key]).any() for key in first)


@pytest.mark.slow
def test_a_run_with_adapters_resumes_bit_for_bit(folder, tmp_path):
    settings = config(folder, "grpo", lora_rank=4, compute_steps=6)
    whole = stages.run(settings, tmp_path / "whole", quiet=True)
    broken = stages.run(settings, tmp_path / "broken", quiet=True)
    (broken.path / "result.json").unlink()
    for step in (4, 6):
        shutil.rmtree(checkpoint_folder(broken.path / "branches" / "00", step))
    again = stages.run(settings, tmp_path / "broken", quiet=True)
    ends = [
        load_file(checkpoint_folder(r.path / "branches" / "00", 6) / "adapter_model.safetensors")
        for r in (whole, again)
    ]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_a_checkpoint_of_adapters_is_a_policy(folder, tmp_path):
    settings = config(folder, "grpo", lora_rank=4, compute_steps=4, learning_rate=0.01)
    run = stages.run(settings, tmp_path, quiet=True)
    saved = complete_checkpoints(run.path / "branches" / "00")[4]
    slim(saved)
    policy, base = load_policy(saved).eval(), load_policy(folder).eval()
    assert isinstance(policy, PeftModel)
    ids = torch.tensor([[9, 10, 11]])
    with torch.no_grad():
        changed, before = (model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for model in (policy, base))
        with policy.disable_adapter():
            without = policy(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert not torch.allclose(changed, before, atol=1e-4)
    torch.testing.assert_close(without, before)
    assert type(load_processor(saved)) is type(load_processor(folder))
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled adapters are not read"):
        load_policy(saved)


def test_adapters_belong_to_a_base_policy_of_the_hub_too(folder, tmp_path, monkeypatch):
    """TRL writes the name that it was given into a checkpoint; the base lies where it was downloaded to."""
    hub, saved = tmp_path / "models--me--tiny", tmp_path / "checkpoint-2"
    shutil.copytree(folder, hub / "snapshots" / "abc")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    settings = adapter_settings(config(folder, "grpo", lora_rank=4))
    model = get_peft_model(load_policy(folder), settings)
    model.peft_config["default"].base_model_name_or_path = "me/tiny"
    model.save_pretrained(saved)
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/tiny"
    policy = load_policy(saved)
    assert isinstance(policy, PeftModel)
    assert Path(policy.config._name_or_path) == hub / "snapshots" / "abc"
    assert type(load_processor(saved)) is type(load_processor(folder))
    shutil.rmtree(hub)
    with pytest.raises(FileNotFoundError, match=r"'me/tiny'.*the hub did not give it"):
        load_policy(saved)


def test_sixteen_bit_weights_and_eager_attention(folder):
    policy = load_policy(folder, dtype="bfloat16", attention="eager")
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
    assert policy.config._attn_implementation == "eager"


def test_a_policy_that_is_nowhere(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(policies, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"'nobody/nothing'.*the hub did not give it.*download the model first"):
        policy_folder("nobody/nothing")


def test_a_hub_model_is_fetched_without_code_or_pickles(tmp_path, monkeypatch):
    asked = {}

    def download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(policies, "snapshot_download", download)
    assert policy_folder("Qwen/Qwen3-VL-2B-Instruct") == tmp_path
    assert asked["name"] == "Qwen/Qwen3-VL-2B-Instruct"
    assert not any(pattern.endswith((".py", ".bin", ".pt")) or pattern == "*" for pattern in asked["patterns"])


def test_policies_that_cannot_be_trained_are_refused(folder, tmp_path):
    processor = load_processor(folder)
    check_policy(folder, processor)
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match="'vit' model, with which transformers generates no text"):
        check_policy(encoder, processor)
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no weights in safetensors"):
        check_policy(pickled, processor)
    silent = load_processor(folder)
    silent.chat_template = silent.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        check_policy(folder, silent)
    endless = load_processor(folder)
    endless.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        check_policy(folder, endless)


def test_an_external_teacher_is_a_folder_too(folder, tmp_path):
    run = stages.run(config(folder, "luffy", teacher=str(folder), compute_steps=2), tmp_path, quiet=True)
    cache = next(event for event in run.events() if event["event"] == "cache")
    assert cache["cached"] > 0
    with pytest.raises(ValueError, match=r"only the tiny policy has a teacher of its own\. Name one"):
        stages.run(config(folder, "luffy"), tmp_path, quiet=True)
