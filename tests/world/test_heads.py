"""A Llama without copies of keys or scored prompts gives what transformers and TRL give: states, samples, gradients."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from npo_core.world.speed import heads
from npo_core.world.speed.heads import GROUPED, IGNORED, group_heads, score_responses_alone

PAD, END = 0, 49
SETTINGS = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "pad_token_id": PAD,
    "eos_token_id": END,
}


def llama(**changes):
    """As it comes, in float64, with weights so large that earlier words matter."""
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**(SETTINGS | changes)), attn_implementation="sdpa")
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    ids, mask = torch.randint(1, 49, (5, 12)), torch.ones(5, 12, dtype=torch.long)
    ids[:2, :3], mask[:2, :3] = PAD, 0  # in front
    ids[4, 9:], mask[4, 9:] = PAD, 0  # and behind
    return {"input_ids": ids, "attention_mask": mask}


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6 * float(wanted.detach().abs().max()))


# Grouped heads


@pytest.fixture
def pair():
    model = llama()
    grouped = copy.deepcopy(model)
    group_heads(grouped)
    assert grouped.config._attn_implementation == GROUPED and model.config._attn_implementation == "sdpa"
    return model, grouped


def expanded(monkeypatch):
    """Heads of the keys that SDPA is given from now on, as a list that grows."""
    given, plain = [], heads.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        heads.functional,
        "scaled_dot_product_attention",
        lambda query, key, *a, **k: given.append(key.shape[1]) or plain(query, key, *a, **k),
    )
    return given


@pytest.mark.parametrize("padded", [True, False])
def test_grouped_heads_give_the_same_states_and_gradients(pair, inputs, padded, monkeypatch):
    if not padded:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    seen, weights = inputs["attention_mask"].bool(), torch.randn(5, 12, 50, dtype=torch.float64)
    given, found = expanded(monkeypatch), []
    for policy in pair:
        given.clear()
        logits = policy(**inputs).logits
        (logits[seen] * weights[seen]).sum().backward()
        found.append((logits[seen].detach(), [parameter.grad for parameter in policy.parameters()]))
    close(found[1][0], found[0][0])
    for one, other in zip(found[1][1], found[0][1], strict=True):
        close(one, other)
    assert set(given) == {2}  # no copies: as many as there are key heads


@pytest.mark.parametrize("padded", [True, False])
def test_grouped_heads_draw_the_same(pair, inputs, padded, monkeypatch):
    rows = {name: value[:4] if padded else value[2:4] for name, value in inputs.items()}
    settings = GenerationConfig(do_sample=True, max_new_tokens=20, top_k=0, pad_token_id=PAD, eos_token_id=END)
    given, drawn = expanded(monkeypatch), []
    for policy in pair:
        given.clear()
        torch.manual_seed(2)
        drawn.append(policy.generate(**rows, generation_config=settings))
    assert torch.equal(*drawn)
    assert set(given) == {2}


def test_other_attentions_and_models_stay(tmp_path):
    eager = llama()
    eager.set_attn_implementation("eager")
    group_heads(eager)
    assert eager.config._attn_implementation == "eager"
    single = llama(num_key_value_heads=6)
    group_heads(single)
    ids = torch.arange(1, 9).unsqueeze(0)
    close(single(ids).logits, llama(num_key_value_heads=6)(ids).logits)
    base = llama().model
    group_heads(base)
    assert base.config._attn_implementation == "sdpa"


def test_a_mask_for_each_head_is_left_to_transformers(pair, inputs):
    mask = torch.ones(12, 12, dtype=torch.bool).tril().repeat(5, 6, 1, 1)
    mask[:, 0, :, 1] = mask[:, 4, 3:, 2] = False  # heads see different places
    found, wanted = (policy(inputs["input_ids"], attention_mask=mask).logits for policy in reversed(pair))
    close(found, wanted)


def test_the_name_stays_out_of_saved_policies(pair, tmp_path):
    pair[1].save_pretrained(tmp_path)
    assert GROUPED not in (tmp_path / "config.json").read_text()
    assert LlamaForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


# Scored places


def fused(model, alone):
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy", "is_top1"))
    if alone:
        score_responses_alone(model)
    return model


def scored(monkeypatch, model):
    """Places that the head is given from now on, as a list that grows."""
    from trl.trainer import utils

    given, plain = [], utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        utils._ChunkedLogProbFunction, "apply", lambda hidden, *a: given.append(len(hidden)) or plain(hidden, *a)
    )
    return given


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("first", [1, 2, 7, 12])
def test_places_of_the_prompt_are_not_scored(inputs, first, lora, monkeypatch):
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
    labels[:, :first] = IGNORED
    weights, found, given = torch.randn(5, 11), [], scored(monkeypatch, None)
    for alone in (False, True):
        policy = fused(llama().float(), False)
        if lora:
            torch.manual_seed(5)
            policy = get_peft_model(policy, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        if alone:
            score_responses_alone(policy)
        given.clear()
        output = policy(**inputs, labels=labels, fused_lm_head=True)
        assert given == [5 * (12 - first if alone and first < 12 else 11)]
        ((output.log_probs + output.entropy) * weights).sum().backward()
        grads = [one.grad for one in policy.parameters() if one.requires_grad]
        found.append((output, grads))
    (plain, plain_grads), (alone, grads) = found
    for name in ("loss", "log_probs", "entropy"):
        assert getattr(alone, name).shape == getattr(plain, name).shape
        torch.testing.assert_close(getattr(alone, name), getattr(plain, name), rtol=1e-4, atol=1e-5)
    assert torch.equal(alone.label_mask, plain.label_mask) and torch.equal(alone.is_top1, plain.is_top1)
    for one, other in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()) + 1e-9)


def test_a_forward_pass_without_the_head_of_trl_is_the_models(inputs):
    policy = fused(llama(), True)
    close(policy(**inputs).logits, llama()(**inputs).logits)
    labels = inputs["input_ids"]
    close(policy(**inputs, labels=labels).loss, llama()(**inputs, labels=labels).loss)
    drawn = [
        model.generate(**{name: value[2:4] for name, value in inputs.items()}, max_new_tokens=5, do_sample=False)
        for model in (policy, llama())
    ]
    assert torch.equal(*drawn)


def test_shifted_labels_are_left_to_trl(inputs):
    shift = inputs["input_ids"].roll(-1, dims=1)
    shift[:, :6] = IGNORED
    plain, alone = (
        fused(llama().float(), which)(**inputs, shift_labels=shift, labels=shift, fused_lm_head=True)
        for which in (False, True)
    )
    assert torch.equal(plain.log_probs, alone.log_probs)
