"""Adapters that are merged into their policy: the same log-probs, from a folder that needs no other."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from npo_core.__main__ import main
from npo_core.trainer.sampling import completion_logps
from npo_core.world.merging import merge
from npo_core.world.policies import (
    TinyPolicySpec,
    build_processor,
    build_tiny_policy,
    load_policy,
    load_processor,
    save_policy,
)
from npo_core.world.tasks import make_dataset, sample_problems, vocabulary

ROWS = list(make_dataset(sample_problems("test", 3, 0)))
COMPLETIONS = [[9, 10, 11], [12], [9, 13]]


@pytest.fixture
def adapted(tmp_path):
    """A base policy in bfloat16 files, and a checkpoint of adapters for it that change what it says."""
    processor = build_processor(vocabulary())
    base = build_tiny_policy(processor, TinyPolicySpec(hidden=32, layers=2, heads=2), seed=0)
    save_policy(base, processor, tmp_path / "base")
    policy = get_peft_model(load_policy(tmp_path / "base"), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    drawn = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:  # peft draws the first of each pair from the global state
            torch.nn.init.normal_(parameter, std=1.0, generator=drawn)
    policy.save_pretrained(tmp_path / "checkpoint-7")
    return tmp_path


def logps(folder, processor):
    return completion_logps(load_policy(folder).eval(), processor, ROWS, COMPLETIONS)


def test_a_merged_checkpoint_says_what_the_adapters_said(adapted):
    assert main(["merge", "--checkpoint", str(adapted / "checkpoint-7"), "--out", str(adapted / "merged")]) == 0
    before = logps(adapted / "checkpoint-7", load_processor(adapted / "checkpoint-7"))
    (adapted / "base").rename(adapted / "gone")
    after = logps(adapted / "merged", load_processor(adapted / "merged"))
    plain = logps(adapted / "gone", load_processor(adapted / "gone"))
    for first, second, third in zip(before, after, plain, strict=True):
        assert first == pytest.approx(second, abs=1e-5)
        assert first != pytest.approx(third, abs=1e-2), "the adapters change nothing: this says nothing"
    files = {path.name for path in (adapted / "merged").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files
    assert not [name for name in files if "adapter" in name]


def test_the_merged_weights_have_the_type_of_the_base_policy(adapted):
    save_policy(load_policy(adapted / "base", dtype="bfloat16"), load_processor(adapted / "base"), adapted / "half")
    (adapted / "base").rename(adapted / "whole")
    (adapted / "half").rename(adapted / "base")
    merge(adapted / "checkpoint-7", adapted / "merged")
    assert {weight.dtype for weight in load_file(adapted / "merged" / "model.safetensors").values()} == {torch.bfloat16}


def test_what_cannot_be_merged_is_refused_in_one_line(adapted, capsys):
    def refused(checkpoint, out="merged"):
        assert main(["merge", "--checkpoint", str(adapted / checkpoint), "--out", str(adapted / out)]) == 2
        return capsys.readouterr().err

    assert "no checkpoint folder" in refused("checkpoint-8")
    assert "has no adapters" in refused("base")
    assert "something at" in refused("checkpoint-7", out="base")
    (adapted / "base").rename(adapted / "gone")
    gone = refused("checkpoint-7")
    assert "The base policy of the adapters in" in gone and "holds no config.json" in gone
    assert "under base_model_name_or_path; a relative name is looked for" in gone
    about = adapted / "checkpoint-7" / "adapter_config.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "base_model_name_or_path": None}))
    assert "names no base policy, as the trainer was given one that came from no folder" in refused("checkpoint-7")
    assert not (adapted / "merged").exists()


def test_a_template_that_adapters_were_trained_with_stays_theirs(adapted):
    """A base model often has no chat template, or another one; the trainer writes its tokenizer beside the adapters."""
    base, checkpoint = adapted / "base", adapted / "checkpoint-7"
    processor = load_processor(base)
    assert load_processor(checkpoint).chat_template == processor.chat_template
    processor.chat_template = processor.tokenizer.chat_template = "{{ 'Now: ' }}" + processor.chat_template
    processor.save_pretrained(checkpoint)
    merge(checkpoint, adapted / "merged")
    prompts = [
        load_processor(folder).apply_chat_template(ROWS[0]["prompt"], tokenize=False, add_generation_prompt=True)
        for folder in (base, checkpoint, adapted / "merged")
    ]
    assert prompts == [prompts[0], "Now: " + prompts[0], "Now: " + prompts[0]]


def test_a_folder_that_could_not_be_written_is_not_there(adapted, monkeypatch):
    def full(model, processor, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError("No space left on device")

    monkeypatch.setattr("npo_core.world.merging.save_policy", full)
    with pytest.raises(OSError, match="No space left"):
        merge(adapted / "checkpoint-7", adapted / "merged")
    assert {path.name for path in adapted.iterdir()} == {"base", "checkpoint-7"}
