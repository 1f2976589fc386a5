"""Words computed once per distinct prompt give what a Llama gives for each row: hidden states, gradients, samples."""

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM

from npo_core.world.speed import words
from npo_core.world.speed.words import share_words

PAD = 0
SETTINGS = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": PAD,
    "eos_token_id": 49,
}


@pytest.fixture(scope="module")
def model():
    """A Llama as it comes, in float64, with weights so large that earlier words matter."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SETTINGS)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.fixture
def shared(model):
    other = copy.deepcopy(model)
    share_words(other)
    return other


@pytest.fixture
def inputs():
    """Three prompts of two lengths, padded in front, four rows each, then answers of their own, padded behind."""
    torch.manual_seed(1)
    prompts = torch.randint(1, 49, (3, 9)).repeat_interleave(4, dim=0)
    mask = torch.ones(12, 15, dtype=torch.long)
    prompts[:4, :3], mask[:4, :3] = PAD, 0
    answers = torch.randint(1, 49, (12, 6))
    answers[5, 3:], mask[5, 12:] = PAD, 0
    return {"input_ids": torch.cat([prompts, answers], dim=1), "attention_mask": mask}


def counted(model, monkeypatch):
    """Tokens that the layers compute from now on, as a list that grows."""
    tokens = []
    layer = model.model.layers[0]
    forward = layer.forward
    monkeypatch.setattr(
        layer, "forward", lambda states, *a, **k: tokens.append(states[..., 0].numel()) or forward(states, *a, **k)
    )
    return tokens


@pytest.mark.parametrize("positions", ["none", "counted"])
def test_logits_and_gradients_are_those_of_the_rows_one_by_one(model, shared, inputs, positions, monkeypatch):
    if positions == "counted":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    tokens = counted(shared, monkeypatch)
    seen = inputs["attention_mask"].bool()
    weights = torch.randn(12, 15, 50, dtype=torch.float64)
    found = []
    for policy in (model, shared):
        policy.zero_grad()
        logits = policy(**inputs).logits
        (logits[seen] * weights[seen]).sum().backward()
        found.append((logits[seen].detach(), [parameter.grad.clone() for parameter in policy.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)  # norms are taken in float32
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
    assert tokens == [3 * 9, 12 * 6]  # and it was shared


def test_sampling_draws_the_same(model, shared, inputs, monkeypatch):
    prompts = {name: value[:, :9] for name, value in inputs.items()}
    settings = GenerationConfig(do_sample=True, max_new_tokens=20, top_k=0, pad_token_id=PAD, eos_token_id=49)
    tokens = counted(shared, monkeypatch)
    drawn = []
    for policy in (model, shared):
        torch.manual_seed(2)
        drawn.append(policy.generate(**prompts, generation_config=settings))
    assert torch.equal(*drawn)
    assert tokens[0] == 3 * 9 and set(tokens[1:]) <= {12}


def test_a_cache_that_is_handed_in_is_filled_for_every_row(shared, inputs):
    cache = DynamicCache(config=shared.config)
    with torch.no_grad():
        shared(**inputs, past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 15 and cache.layers[0].keys.shape[0] == 12


@pytest.mark.parametrize("where", ["mask", "positions", "token"])
def test_rows_that_differ_only_there_are_not_taken_for_copies(model, shared, inputs, where):
    rows = {name: value[4:8].clone() for name, value in inputs.items()}
    rows["position_ids"] = torch.arange(15).repeat(4, 1)
    if where == "mask":
        rows["attention_mask"][1, 0] = 0
    elif where == "positions":
        rows["position_ids"][1] += 1 + torch.arange(15)
    else:
        rows["input_ids"][1, 0] += 1
    with torch.no_grad():
        plain, found = (policy(**rows).logits for policy in (model, shared))
    torch.testing.assert_close(plain, found, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0, 8], found[1, 8], atol=1e-3)


def test_rows_that_share_nothing_are_computed_as_they_are(shared, monkeypatch):
    tokens = counted(shared, monkeypatch)
    torch.manual_seed(3)
    shared(input_ids=torch.randint(1, 49, (4, 8)))
    assert tokens == [32]


def test_what_records_states_is_left_alone(shared, inputs):
    assert len(shared(**inputs, output_hidden_states=True).hidden_states) == 3


def test_number_of_a_place_tells_every_part_apart():
    ids = torch.tensor([[7, 7], [7, 7], [7, 7], [8, 7]])
    mask = torch.tensor([[1, 1], [0, 1], [1, 1], [1, 1]])
    places = torch.tensor([[0, 1], [0, 1], [1, 1], [0, 1]])
    number = words._seen(ids, mask, places)
    assert len(set(number[:, 0].tolist())) == 4
    assert number[:, 1].unique().numel() == 1
