"""Policies: save and load, what a loaded policy shares, and refusals."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from npo_core.guidance.fingerprints import tokenizer_digest
from npo_core.trainer.inputs import encode_prompts
from npo_core.world.policies import (
    SPECIAL_TOKENS,
    TinyPolicySpec,
    TinyQwen3VLProcessor,
    build_processor,
    build_tiny_policy,
    load_policy,
    load_processor,
    save_policy,
)
from npo_core.world.tasks import make_dataset, sample_problems, vocabulary

SPEC = TinyPolicySpec(hidden=32, layers=2, heads=2, vision_hidden=32, vision_depth=2)


@pytest.fixture(scope="module")
def processor():
    return build_processor(vocabulary())


@pytest.fixture(scope="module")
def model(processor):
    """A policy as it comes, its vision tower not shared."""
    return build_tiny_policy(processor, SPEC, seed=0).eval()


@pytest.fixture(scope="module")
def saved(processor, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    save_policy(model, processor, folder)
    return folder


def rows_of(copies):
    """Data set rows of distinct problems, each as often as told."""
    rows = make_dataset(sample_problems("train", len(copies), 0))
    return [rows[index] for index, count in enumerate(copies) for _ in range(count)]


# Saving and loading


def test_a_saved_policy_gives_the_same_logits_bit_for_bit(saved, processor, model):
    inputs = encode_prompts(processor, rows_of([1, 1, 1]))
    loaded = load_policy(saved).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert loaded.dtype == torch.float32
    assert loaded.generation_config.eos_token_id == processor.tokenizer.eos_token_id


def test_a_saved_processor_is_loaded_as_its_own_class(saved, processor):
    loaded = load_processor(saved)
    assert type(loaded) is TinyQwen3VLProcessor
    rows = rows_of([2, 1])
    one, other = encode_prompts(loaded, rows), encode_prompts(processor, rows)
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert tokenizer_digest(loaded) == tokenizer_digest(processor)
    assert loaded.tokenizer.padding_side == "left"


def test_the_seed_decides_the_weights_and_the_global_random_state_is_left_alone(processor, model):
    before = torch.get_rng_state()
    again, other = (build_tiny_policy(processor, SPEC, seed).state_dict() for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    weights = model.state_dict()
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert not all(torch.equal(other[name], weights[name]) for name in weights)


def test_a_folder_that_is_no_policy_is_refused(tmp_path):
    for load in (load_policy, load_processor):
        with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
            load(tmp_path / "none")


@pytest.mark.parametrize(("hidden", "heads"), [(60, 3), (64, 3), (36, 3)])
def test_a_head_size_that_cannot_be_is_refused(hidden, heads):
    with pytest.raises(ValueError, match=f"hidden={hidden} over heads={heads} .* multiple of 8"):
        TinyPolicySpec(hidden=hidden, heads=heads)


@pytest.mark.parametrize("spec", [TinyPolicySpec(24, 1, 1, 32, 1), TinyPolicySpec(32, 1, 4, 32, 1), TinyPolicySpec()])
def test_every_allowed_size_runs(processor, spec):
    policy = build_tiny_policy(processor, spec, 0)
    with torch.no_grad():
        logits = policy(**encode_prompts(processor, rows_of([1]))).logits
    assert logits.shape[-1] == len(processor.tokenizer)
    assert logits.isfinite().all()


def test_freezing_vision_leaves_the_language_model_to_train(saved):
    frozen, whole = load_policy(saved, freeze_vision=True), load_policy(saved)
    assert all(parameter.requires_grad for parameter in whole.parameters())
    trainable = {name for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in whole.named_parameters() if ".visual." not in name}
    assert any("language_model" in name for name in trainable)


def test_a_text_only_policy_is_left_as_it_is(tmp_path):
    text_only = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=16, n_embd=8, n_layer=1, n_head=1))
    text_only.save_pretrained(tmp_path)
    loaded = load_policy(tmp_path, freeze_vision=True)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert "forward" not in vars(loaded)


def test_a_loaded_policy_shares_its_work(saved, processor):
    policy = load_policy(saved)
    patches, tokens = [], []
    policy.model.visual.patch_embed.register_forward_pre_hook(lambda module, inputs: patches.append(len(inputs[0])))
    first_layer = policy.model.language_model.layers[0]
    first_layer.register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0][..., 0].numel()))
    inputs = encode_prompts(processor, rows_of([8, 8]))
    with torch.no_grad():
        policy(**inputs)
    assert patches == [len(inputs["pixel_values"]) // 8]
    assert tokens == [inputs["input_ids"].numel() // 8]
    assert isinstance(policy.model.visual, Qwen3VLVisionModel)


# The tokenizer


def test_a_special_token_is_one_token_wherever_it_stands(processor):
    tokenizer = processor.tokenizer
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    ids = tokenizer("1<|im_end|><|im_start|>2")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["1", "<|im_end|>", "<|im_start|>", "2"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("1 strange 2")["input_ids"]) == ["1", "<|unk|>", "2"]
