"""Shared work: rollouts of a prompt computed once give what the processor and the model give for each of them.

The model computes in float64 throughout, so that sums in another order agree to ten digits and no two tokens tie; its
weights are three times those of a fresh policy, so that pictures and earlier words matter to a logit.
"""

import copy
import gc
import json
import weakref
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import DynamicCache, GenerationConfig, GPT2Config, GPT2LMHeadModel, Qwen3VLProcessor, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.models.qwen3_vl import modeling_qwen3_vl

from npo_core.trainer.inputs import encode_prompts
from npo_core.trainer.sampling import completion_logps
from npo_core.world.policies import TinyPolicySpec, build_processor, build_tiny_policy, load_policy, save_policy
from npo_core.world.speed import prompts, sharing
from npo_core.world.speed.sharing import WORTHWHILE, RoomyLayer, cheapest_sharing, share_work
from npo_core.world.tasks import conversation, make_dataset, sample_problems, vocabulary

SPEC = TinyPolicySpec(hidden=32, layers=2, heads=2, vision_hidden=32, vision_depth=2)
SLOT = "<|vision_start|><|image_pad|><|vision_end|>"


class PlainProcessor(Qwen3VLProcessor):
    """The processor of transformers, with no video part and nothing else changed: what sharing is compared with."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]


@pytest.fixture(scope="module")
def processor():
    return build_processor(vocabulary())


@pytest.fixture(scope="module")
def plain(processor):
    return PlainProcessor(processor.image_processor, processor.tokenizer, chat_template=processor.chat_template)


@pytest.fixture(scope="module", autouse=True)
def exact():
    """Norms and rotations in the precision of their inputs; transformers rounds them to float32."""

    def normed(self, states):
        return self.weight * torch.nn.functional.rms_norm(states, states.shape[-1:], eps=self.variance_epsilon)

    def rotated(queries, keys, cosine, sine):
        cosine, sine = cosine.unsqueeze(-2), sine.unsqueeze(-2)
        return tuple(part * cosine + modeling_qwen3_vl.rotate_half(part) * sine for part in (queries, keys))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_qwen3_vl.Qwen3VLTextRMSNorm, "forward", normed)
        patch.setattr(modeling_qwen3_vl, "apply_rotary_pos_emb_vision", rotated)
        yield


@pytest.fixture(scope="module")
def model(processor):
    """A policy as it comes, nothing shared."""
    policy = build_tiny_policy(processor, SPEC, seed=0).double().eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(3)
    return policy


def rows_of(copies):
    """Data set rows of distinct problems, each as often as told, mixed."""
    rows = make_dataset(sample_problems("train", len(copies), 0))
    return [rows[index] for turn in range(max(copies)) for index, count in enumerate(copies) if turn < count]


def one_picture_texts(processor, count):
    return [
        processor.apply_chat_template(conversation(problem, True), add_generation_prompt=True)
        for problem in sample_problems("train", count, 0)
    ]


def same(one, other):
    assert list(one) == list(other)
    for name in one:
        assert type(one[name]) is type(other[name]), name
        if isinstance(one[name], torch.Tensor):
            assert one[name].dtype == other[name].dtype, name
            assert torch.equal(one[name], other[name]), name
        elif isinstance(one[name], list):
            assert [list(row) for row in one[name]] == [list(row) for row in other[name]], name
        else:
            assert (one[name] == other[name]).all(), name


def close(one, other, message=None):
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11, msg=message)


class Seen(NamedTuple):
    """What went through the first layers of a model, a number per call."""

    patches: list[int]
    tokens: list[int]

    def forget(self):
        self.patches.clear()
        self.tokens.clear()


def watched(policy):
    seen = Seen([], [])
    policy.model.visual.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.patches.append(len(inputs[0])))
    layer = policy.model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda _, inputs: seen.tokens.append(inputs[0][..., 0].numel()))
    return seen


def twins(model, frozen=False):
    """A copy of the model as it is, one that shares, and what the second one sees."""
    unshared, shared = copy.deepcopy(model), copy.deepcopy(model)
    for policy in (unshared, shared):
        policy.model.visual.requires_grad_(not frozen)
    share_work(shared)
    share_work(shared)  # twice changes nothing
    return unshared, shared, watched(shared)


def picture(size=(48, 32), turn=0):
    return Image.linear_gradient("L").rotate(90 * turn).resize(size).convert("RGB")


def doubled(inputs):
    """Pictures in the precision of the model; the model would cast them itself."""
    return {name: value.double() if name == "pixel_values" else value for name, value in inputs.items()}


def forced(processor, prompts, completions):
    """Inputs that score given completions: prompts padded on the left, completions on the right."""
    texts, pictures = zip(*prompts, strict=True)
    pictures = [shown for shown in pictures if shown is not None] or None
    options = {"return_tensors": "pt", "padding": True, "padding_side": "left"}
    inputs = doubled(dict(processor(images=pictures, text=list(texts), **options)))
    ids = torch.zeros(len(completions), max(map(len, completions)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, tokens in enumerate(completions):
        ids[index, : len(tokens)] = torch.tensor(tokens)
        mask[index, : len(tokens)] = 1
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask], dim=1)
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(ids)], dim=1)
    return inputs


def drawn(rows, longest, seed=0):
    """Completions of words drawn at random, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (rows,), generator=generator).tolist()
    lengths[0] = longest
    return [torch.randint(12, 40, (length,), generator=generator).tolist() for length in lengths]


def pieces_of(inputs):
    counts = inputs["image_grid_thw"].prod(dim=-1).tolist()
    pieces = inputs["pixel_values"].split(counts)
    return [
        (*grid, piece.numpy().tobytes()) for grid, piece in zip(inputs["image_grid_thw"].tolist(), pieces, strict=True)
    ]


def fewest_tokens(inputs, image_token):
    """Tokens that a forward pass must compute at least, by trying every width on what the rows are made of."""
    shown = iter(pieces_of(inputs)) if "pixel_values" in inputs else None
    rows, pictures_end = [], 0
    for ids, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True):
        content = next(shown) if image_token in ids else None
        rows.append([(*place, content if place[0] == image_token else None) for place in zip(ids, mask, strict=True)])
        pictures_end = max([pictures_end, *(index + 1 for index, place in enumerate(ids) if place == image_token)])
    columns = len(rows[0])
    costs = {
        width: len({tuple(row[:width]) for row in rows}) * width + len(rows) * (columns - width)
        for width in range(columns + 1)
    }
    width, best = min(costs.items(), key=lambda item: (item[1], item[0]))
    return best if best <= WORTHWHILE * costs[0] and width >= pictures_end else costs[0]


def passes(policies, inputs, repeats=1):
    """Logits, and gradients of a loss over all places, of each policy in turn."""
    generator = torch.Generator().manual_seed(1)
    outputs = []
    weight = None
    for policy in policies:
        for _ in range(repeats):
            policy.zero_grad()
            logits = policy(**inputs).logits
            if weight is None:
                weight = torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
            (logits.log_softmax(-1) * weight).sum().backward()
        gradients = {name: value.grad for name, value in policy.named_parameters() if value.requires_grad}
        outputs.append((logits.detach(), gradients))
    return outputs


def agree(policies, inputs, repeats=1):
    (expected, expected_gradients), (logits, gradients) = passes(policies, inputs, repeats)
    close(logits, expected)
    assert list(gradients) == list(expected_gradients)
    for name, gradient in expected_gradients.items():
        if gradient is None:
            assert gradients[name] is None, name
        else:
            close(gradients[name], gradient, lambda text, name=name: f"{name}: {text}")
    return gradients


# The width of the common beginnings


@settings(max_examples=60)
@given(st.data())
def test_the_cheapest_sharing_is_the_cheapest_of_all_widths(data):
    rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 7))
    row = st.lists(st.integers(0, data.draw(st.sampled_from([0, 1, 3, 1000]))), min_size=columns, max_size=columns)
    templates = data.draw(st.lists(row, min_size=1, max_size=rows))
    table = [list(data.draw(st.sampled_from(templates))) for _ in range(rows)]
    for cells in table:  # rows that agree up to a place of their own
        cut = data.draw(st.integers(0, columns))
        cells[cut:] = data.draw(row)[cut:]
    width, first, inverse = cheapest_sharing(torch.tensor(table))

    costs = [len({tuple(cells[:w]) for cells in table}) * w + rows * (columns - w) for w in range(columns + 1)]
    assert costs[width] == min(costs)
    assert (width == 0) == (min(costs) == costs[0])
    beginnings = [tuple(cells[:width]) for cells in table]
    assert first.tolist() == sorted({beginnings.index(beginning) for beginning in beginnings})
    assert [beginnings[index] for index in first[inverse].tolist()] == beginnings


@pytest.mark.parametrize(
    ("table", "width", "first", "inverse"),
    [
        ([[1, 2, 3]], 0, [0], [0]),
        ([[1, 2], [2, 2]], 0, [0], [0, 0]),
        ([[1, 2], [1, 2]], 2, [0], [0, 0]),
        ([[1, 2, 4], [1, 3, 4]], 1, [0], [0, 0]),
        # two beginnings of width 3 leave 2 · 3 + 4 · 1 tokens, one of width 1 leaves 1 + 4 · 3
        ([[5, 9, 9, 1], [5, 7, 7, 2], [5, 9, 9, 3], [5, 7, 7, 4]], 3, [0, 1], [0, 1, 0, 1]),
        # the larger number comes first
        ([[9, 9], [1, 1], [9, 9], [1, 1]], 2, [0, 1], [0, 1, 0, 1]),
    ],
)
def test_the_cheapest_sharing_by_hand(table, width, first, inverse):
    found = cheapest_sharing(torch.tensor(table))
    assert (found[0], found[1].tolist(), found[2].tolist()) == (width, first, inverse)


# A beginning that rows share is computed once


def prompts_of(processor, count):
    """Different words of different lengths, and different pictures."""
    texts = one_picture_texts(processor, count)
    return [(text.replace(SLOT, SLOT + "1 2 3 " * index), picture(turn=index % 4)) for index, text in enumerate(texts)]


CASES = {
    "one prompt": ([0] * 5, True),
    "groups": ([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2], True),
    "shuffled": ([2, 0, 1, 0, 2, 2, 1, 0, 1, 2, 0], True),
    "different sizes": ([0, 1, 2, 3, 3, 2, 1, 0, 0, 1], True),
    "identical": ([0] * 4, True),
    "distinct": ([0, 1, 2, 3], False),
    "one row": ([0], False),
}
"""Prompt of each row, and whether sharing is worth the while."""


def case_of(processor, name):
    order, worthwhile = CASES[name]
    prompts = prompts_of(processor, 4)
    if name == "different sizes":
        sizes = [(48, 32), (32, 32), (64, 48), (48, 32)]
        prompts = [
            (text, picture(size, index)) for index, ((text, _), size) in enumerate(zip(prompts, sizes, strict=True))
        ]
    completions = [[12, 13, 14]] * len(order) if name == "identical" else drawn(len(order), 6)
    return forced(processor, [prompts[index] for index in order], completions), worthwhile


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable tower", "frozen tower"])
@pytest.mark.parametrize("name", CASES)
def test_sharing_changes_neither_logits_nor_gradients(processor, model, name, frozen):
    inputs, worthwhile = case_of(processor, name)
    unshared, shared, seen = twins(model, frozen)
    gradients = agree((unshared, shared), inputs, repeats=2)
    assert any(".visual." in name for name in gradients) != frozen
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients.values())

    size = inputs["input_ids"].numel()
    fewest = fewest_tokens(inputs, processor.image_token_id)
    assert (fewest < size) == worthwhile
    assert sum(seen.tokens) == 2 * fewest
    patches = sum(grid[0] * grid[1] * grid[2] for grid in {tuple(piece) for piece in pieces_of(inputs)})
    assert seen.patches == [patches] * (1 if frozen else 2)


@pytest.mark.parametrize("axes", [3, 4])
def test_rows_of_words_alone_are_shared_where_their_positions_are_given(processor, model, axes):
    texts = [text.replace(SLOT, "") for text, _ in prompts_of(processor, 2)]
    inputs = forced(processor, [(texts[index], None) for index in (0, 1, 0, 1, 0, 0)], drawn(6, 5))
    unshared, shared, seen = twins(model)
    agree((unshared, shared), inputs)
    assert seen.tokens == [inputs["input_ids"].numel()]  # the language model counts the places itself

    seen.forget()
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=-1) - 1).clamp(min=0).expand(axes, -1, -1)
    agree((unshared, shared), inputs)
    assert sum(seen.tokens) == fewest_tokens(inputs, processor.image_token_id) < inputs["input_ids"].numel()


def test_rows_with_and_without_a_picture_are_told_apart(processor, model):
    (text, shown), (other, _) = prompts_of(processor, 2)
    prompts = [(text, shown), (other.replace(SLOT, ""), None)]
    inputs = forced(processor, [prompts[index] for index in (0, 1, 1, 0, 0, 1)], drawn(6, 5))
    unshared, shared, seen = twins(model)
    agree((unshared, shared), inputs)
    assert sum(seen.tokens) == fewest_tokens(inputs, processor.image_token_id) < inputs["input_ids"].numel()


def test_the_same_words_under_different_pictures_are_told_apart(processor, model):
    (text, _), *_ = prompts_of(processor, 1)
    pictures = [Image.new("RGB", (48, 32), colour) for colour in ("red", "blue")]
    inputs = forced(processor, [(text, pictures[index]) for index in (0, 1, 1, 0, 1, 0)], [[12, 13]] * 6)
    unshared, shared, seen = twins(model)
    agree((unshared, shared), inputs)
    assert seen.tokens == [2 * inputs["input_ids"].shape[1]]
    with torch.no_grad():
        logits = shared(**inputs).logits[:, -1]
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    close(logits[[0, 1, 1, 0, 1, 0]], logits)


@pytest.mark.parametrize(
    "name", ["no mask", "hidden states", "attentions", "checkpointing", "a picture behind", "static cache"]
)
def test_where_a_beginning_cannot_be_shared_the_model_is_as_it_was(processor, model, name):
    unshared, shared, seen = twins(model)
    inputs, _ = case_of(processor, "one prompt")
    options = {}
    if name == "no mask":
        inputs["attention_mask"] = None
    elif name == "hidden states":
        options = {"output_hidden_states": True}
    elif name == "attentions":
        options = {"output_attentions": True}
        for policy in (unshared, shared):
            policy.set_attn_implementation("eager")
    elif name == "checkpointing":
        for policy in (unshared, shared):
            policy.train().gradient_checkpointing_enable({"use_reentrant": False})
    elif name == "a picture behind":
        text = one_picture_texts(processor, 1)[0].replace(SLOT, "1 2 3 4 5 6 7 8 " * 4 + SLOT)
        inputs = forced(processor, [(text, picture(turn=index)) for index in range(4)], [[12]] * 4)
    caches = [StaticCache(model.config, 64) if name == "static cache" else None for _ in range(2)]
    with torch.set_grad_enabled(name == "checkpointing"):
        expected, output = (
            policy(**inputs, **options, past_key_values=cache)
            for policy, cache in zip((unshared, shared), caches, strict=True)
        )
    assert seen.tokens == [inputs["input_ids"].numel()]
    close(output.logits, expected.logits)
    for part in ("hidden_states", "attentions"):
        assert (part in output) == (part in expected) == (f"output_{part}" in options)
        if part in output:
            for one, another in zip(output[part], expected[part], strict=True):
                close(one, another)
    if name == "checkpointing":
        for policy in (unshared, shared):
            policy.eval()
        seen.forget()
        agree((unshared, shared), inputs)
        assert sum(seen.tokens) < inputs["input_ids"].numel()


@pytest.mark.parametrize(("alike", "tokens"), [(0, 20), (3, 20), (4, 16), (9, 11), (10, 10)])
def test_a_beginning_is_shared_where_that_leaves_at_most_four_fifths(model, alike, tokens):
    unshared, shared, seen = twins(model)
    ids = torch.arange(12, 22).repeat(2, 1)
    ids[1, alike:] += 10
    arguments = {
        "inputs_embeds": model.get_input_embeddings()(ids),
        "position_ids": torch.arange(10).expand(3, 2, -1),
        "attention_mask": torch.ones_like(ids),
    }
    with torch.no_grad():
        expected, states = (p.model.language_model(**arguments).last_hidden_state for p in (unshared, shared))
    close(states, expected)
    assert sum(seen.tokens) == tokens


@pytest.mark.parametrize("name", ["as they are", "words", "no positions", "flat positions", "four-dimensional mask"])
def test_the_language_model_shares_only_what_it_understands(model, name):
    unshared, shared, seen = twins(model)
    rows, columns = 4, 6
    ids = torch.arange(12, 12 + columns).expand(rows, -1)
    arguments = {
        "inputs_embeds": model.get_input_embeddings()(ids),
        "position_ids": torch.arange(columns).expand(3, rows, -1),
        "attention_mask": torch.ones(rows, columns, dtype=torch.int64),
    }
    arguments |= {
        "as they are": {},
        "words": {"inputs_embeds": None, "input_ids": ids},
        "no positions": {"position_ids": None},
        "flat positions": {"position_ids": torch.arange(columns).expand(rows, -1)},
        "four-dimensional mask": {"attention_mask": torch.ones(rows, 1, columns, columns, dtype=torch.bool).tril()},
    }[name]
    with torch.no_grad():
        expected, output = (policy.model.language_model(**arguments) for policy in (unshared, shared))
    close(output.last_hidden_state, expected.last_hidden_state)
    assert seen.tokens == [columns if name == "as they are" else rows * columns]


def test_states_that_the_configuration_asks_for_are_handed_out(model):
    unshared, shared, _ = twins(model)
    arguments = columns_of("nothing")
    outputs = []
    for policy in (unshared, shared):
        policy.model.language_model.config.output_hidden_states = True
        with torch.no_grad():
            outputs.append(policy.model.language_model(**arguments).hidden_states)
    for one, other in zip(*outputs, strict=True):
        close(one, other)


def test_positions_given_once_for_all_rows_are_those_of_each(model):
    unshared, shared, _ = twins(model)
    arguments = columns_of("nothing")
    arguments["position_ids"] = arguments["position_ids"][:, :1]
    with torch.no_grad():
        expected, states = (p.model.language_model(**arguments).last_hidden_state for p in (unshared, shared))
    close(states, expected)


def test_an_answer_may_be_a_tuple(model):
    unshared, shared, _ = twins(model)
    arguments = columns_of("nothing")
    with torch.no_grad():
        expected, found = (p.model.language_model(**arguments, return_dict=False) for p in (unshared, shared))
    assert type(found) is tuple
    close(found[0], expected[0])


@pytest.mark.parametrize("grad", [False, True])
def test_the_cache_that_comes_back_goes_on_as_that_of_the_model(processor, model, grad):
    inputs, _ = case_of(processor, "groups")
    unshared, shared, seen = twins(model)
    rows = len(inputs["input_ids"])
    more = torch.full((rows, 2), 12)
    logits = []
    with torch.set_grad_enabled(grad):
        for policy in (unshared, shared):
            assert policy(**inputs, use_cache=False).past_key_values is None
            cache = DynamicCache(config=policy.config)
            output = policy(**inputs, past_key_values=cache)
            assert output.past_key_values is cache
            mask = inputs["attention_mask"]
            seen.forget()
            for _ in range(2):
                mask = torch.cat([mask, torch.ones_like(more)], dim=1)
                positions = torch.arange(mask.shape[1] - 2, mask.shape[1]).expand(3, rows, -1)
                output = policy(input_ids=more, attention_mask=mask, position_ids=positions, past_key_values=cache)
            logits.append(output.logits)
            caches = [policy(**inputs).past_key_values, cache]
            assert [held.get_seq_length() for held in caches] == [mask.shape[1] - 4, mask.shape[1]]
    assert seen.tokens[:2] == [2 * rows, 2 * rows]
    close(*logits)


def columns_of(kind):
    """Arguments of the language model for six rows, the last three of which differ in one thing only."""
    generator = torch.Generator().manual_seed(0)
    columns, size = 7, SPEC.hidden
    embeddings = torch.randn(1, columns, size, generator=generator, dtype=torch.float64).expand(6, -1, -1).clone()
    mask = torch.ones(6, columns, dtype=torch.int64)
    positions = torch.arange(columns).expand(3, 6, -1).clone()
    shown = torch.zeros(6, columns, dtype=torch.bool)
    shown[:, 2:4] = True
    features = torch.randn(2, size, generator=generator, dtype=torch.float64).repeat(6, 1)
    if kind == "embeddings":
        embeddings[3:, 1] *= -1
    elif kind == "masks":
        mask[3:, :2] = 0
    elif kind == "positions":
        positions[1, 3:, 4:] += 3
    elif kind == "features":
        features[6:] = features[6:].flip(0)
    elif kind == "places of the features":
        shown[3:] = shown[3:].roll(1, dims=1)
    else:
        assert kind == "nothing"
    return {
        "inputs_embeds": embeddings,
        "attention_mask": mask,
        "position_ids": positions,
        "visual_pos_masks": shown,
        "deepstack_visual_embeds": [features],
    }


@pytest.mark.parametrize("kind", ["embeddings", "masks", "positions", "features", "places of the features", "nothing"])
def test_rows_that_differ_in_one_thing_are_told_apart(model, kind):
    unshared, shared, seen = twins(model)
    arguments = columns_of(kind)
    with torch.no_grad():
        expected, states = (p.model.language_model(**arguments).last_hidden_state for p in (unshared, shared))
    close(states, expected)
    columns = arguments["attention_mask"].shape[1]
    assert sum(seen.tokens) == columns * (1 if kind == "nothing" else 2)
    assert ((states[0] - states[3]).abs().max() > 1e-3) == (kind != "nothing")


@pytest.mark.parametrize("kind", ["embeddings", "features", "places of the features", "nothing"])
def test_a_collision_of_fingerprints_is_found_out(model, monkeypatch, kind):
    def blind(inputs_embeds, *_):
        return torch.zeros(inputs_embeds.shape[:2], dtype=torch.int64)

    monkeypatch.setattr(sharing, "_visible", blind)
    unshared, shared, seen = twins(model)
    arguments = columns_of(kind)
    with torch.no_grad():
        expected, states = (p.model.language_model(**arguments).last_hidden_state for p in (unshared, shared))
    close(states, expected)
    rows, columns = arguments["attention_mask"].shape
    assert seen.tokens == [columns if kind == "nothing" else rows * columns]


def test_a_copy_of_a_model_that_shares_is_a_model_of_its_own(processor, model):
    inputs, _ = case_of(processor, "groups")
    unshared, shared, _ = twins(model, frozen=True)
    with torch.no_grad():
        shared(**inputs)
        copied = copy.deepcopy(shared)
        for policy in (unshared, copied):
            for parameter in policy.parameters():
                parameter.mul_(0.9)
        close(copied(**inputs).logits, unshared(**inputs).logits)
        close(shared(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("adapters", [False, True])
def test_a_dropped_policy_is_freed_at_once(processor, tmp_path, adapters):
    """Not when Python next looks for cycles: several that wait for it do not fit a GPU."""
    save_policy(build_tiny_policy(processor, SPEC, seed=0), processor, tmp_path / "policy")
    folder = tmp_path / "policy"
    if adapters:
        folder = tmp_path / "adapters"
        get_peft_model(load_policy(tmp_path / "policy"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
            folder
        )
    gc.collect()
    gc.disable()
    try:
        policy = load_policy(folder).eval()
        left = [weakref.ref(policy), *map(weakref.ref, policy.parameters())]
        rows = make_dataset(sample_problems("test", 2, 0))
        completion_logps(policy, processor, [rows[0], rows[0], rows[1]], [[9, 10]] * 3)
        del policy
        assert sum(part() is not None for part in left) == 0
    finally:
        gc.enable()


def test_other_architectures_are_left_alone():
    other = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=16, n_embd=8, n_layer=1, n_head=1))
    before = {name: set(vars(module)) for name, module in other.named_modules()}
    share_work(other)
    assert {name: set(vars(module)) for name, module in other.named_modules()} == before


# Sampling


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["pictures", "words", "copies by generate"])
def test_sampling_gives_the_same_tokens(processor, model, name, sampled):
    prompts = prompts_of(processor, 3)
    if name == "words":
        prompts = [(text.replace(SLOT, ""), None) for text, _ in prompts]
    order = [0, 1, 2] if name == "copies by generate" else [1, 0, 0, 2, 1, 0, 2, 1]
    inputs = forced(processor, [prompts[index] for index in order], [[12]] * len(order))
    new = sharing.ROOM + 4
    sampling = GenerationConfig(
        do_sample=sampled,
        temperature=1.0 if sampled else None,
        top_k=0 if sampled else None,
        max_new_tokens=new,
        min_new_tokens=new,
        num_return_sequences=3 if sampled and name == "copies by generate" else 1,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        suppress_tokens=[processor.image_token_id],
        return_dict_in_generate=True,
        output_scores=True,
    )
    unshared, shared, seen = twins(model)
    outputs = []
    with torch.random.fork_rng(), torch.no_grad():
        for policy in (unshared, shared):
            torch.manual_seed(3)
            outputs.append(policy.generate(**inputs, generation_config=sampling))
    expected, output = outputs
    assert torch.equal(output.sequences, expected.sequences)
    for scores, expected_scores in zip(output.scores, expected.scores, strict=True):
        close(scores, expected_scores)
    rows, columns = len(output.sequences), inputs["input_ids"].shape[1]
    assert len({tuple(row) for row in output.sequences[:, columns:].tolist()}) == (rows if sampled else 3)
    if rows > 3:
        assert seen.tokens == [3 * columns] + [rows] * (new - 1)
        assert {type(layer) for layer in output.past_key_values.layers} == {RoomyLayer}
    else:
        assert sum(seen.tokens) == rows * (columns + new - 1)
    for layer, other in zip(output.past_key_values.layers, expected.past_key_values.layers, strict=True):
        close(layer.keys, other.keys)
        close(layer.values, other.values)


def grown(start, room):
    """A layer of transformers and one with room, both of which hold the same tokens."""
    generator = torch.Generator().manual_seed(0)

    def states(tokens, rows=3):
        return tuple(torch.randn(rows, 2, tokens, 4, generator=generator) for _ in range(2))

    keys, values = states(start)
    layer = DynamicLayer()
    layer.update(keys, values)
    return layer, RoomyLayer(keys.clone(), values.clone(), room), states


@pytest.mark.parametrize("updates", [[1] * 12, [3, 1, 9, 1, 2], [5], [4, 1], [1, 4, 4, 1]])
@pytest.mark.parametrize("room", [1, 4])
def test_a_layer_with_room_holds_what_a_layer_without_holds(updates, room):
    plain_layer, layer, states = grown(5, room)
    given = []
    for tokens in updates:
        keys, values = states(tokens)
        one, other = layer.update(keys, values), plain_layer.update(keys, values)
        for part, expected in zip(one, other, strict=True):
            assert part.dtype == expected.dtype
            assert torch.equal(part, expected)
        assert torch.equal(layer.keys, plain_layer.keys)
        assert torch.equal(layer.values, plain_layer.values)
        assert layer.get_seq_length() == plain_layer.get_seq_length()
        assert layer.get_mask_sizes(1) == plain_layer.get_mask_sizes(1)
        given.append((one, [part.clone() for part in one]))
    for one, kept in given:  # what was handed out stays as it was
        assert all(torch.equal(part, before) for part, before in zip(one, kept, strict=True))


def test_a_layer_with_room_copies_its_tokens_only_when_the_room_is_used_up():
    _, layer, states = grown(5, room=4)
    places = [layer.update(*states(1))[0].data_ptr() for _ in range(10)]
    # the first update makes room for itself and four more
    assert [len(set(places[start : start + 5])) for start in (0, 5)] == [1, 1]
    assert places[0] != places[5]


@pytest.mark.parametrize("change", ["crop", "reorder", "select", "repeat"])
def test_a_layer_with_room_that_was_changed_goes_on_as_one_without(change):
    layers = grown(5, room=4)[:2]
    states = grown(5, room=4)[2]
    step = states(1)
    for layer in layers:
        layer.update(*step)
        {
            "crop": lambda layer: layer.crop(-2),
            "reorder": lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
            "select": lambda layer: layer.batch_select_indices(torch.tensor([0, 2])),
            "repeat": lambda layer: layer.batch_repeat_interleave(2),
        }[change](layer)
    for _ in range(6):
        step = states(1, len(layers[0].keys))
        one, other = (layer.update(*step) for layer in layers)
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_beam_search_gives_the_same_tokens(processor, model):
    prompts = prompts_of(processor, 2)
    inputs = forced(processor, prompts, [[12]] * 2)
    sampling = GenerationConfig(
        num_beams=3,
        do_sample=False,
        max_new_tokens=8,
        min_new_tokens=8,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        suppress_tokens=[processor.image_token_id],
    )
    unshared, shared, _ = twins(model)
    expected, tokens = (policy.generate(**inputs, generation_config=sampling) for policy in (unshared, shared))
    assert torch.equal(tokens, expected)


# A prompt that comes n times is processed once


@pytest.mark.parametrize("copies", [[1], [1, 1, 1], [4, 4], [3, 1, 2], [5]])
@pytest.mark.parametrize("tensors", ["pt", "np", None])
def test_shared_prompts_give_what_the_plain_processor_gives(processor, plain, copies, tensors):
    rows = rows_of(copies)
    texts = [
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}, *text]}], tokenize=False)
        for text in ([{"type": "text", "text": row["prompt"][0]["content"]}] for row in rows)
    ]
    pictures = [row["image"] for row in rows]
    options = {"padding": True, "padding_side": "left"} | ({} if tensors is None else {"return_tensors": tensors})
    for images in (pictures, [[picture] for picture in pictures]):
        same(processor(images=images, text=list(texts), **options), plain(images=images, text=list(texts), **options))


def test_the_chat_template_goes_the_same_way(processor, plain):
    rows = rows_of([3, 2])
    same(encode_prompts(processor, rows), encode_prompts(plain, rows))


@pytest.mark.parametrize("sizes", [[(48, 32), (32, 32), (48, 32), (64, 48), (32, 32)]])
def test_pictures_of_different_sizes_are_shared_rightly(processor, plain, sizes):
    texts = one_picture_texts(processor, 1) * len(sizes)
    pictures = [Image.linear_gradient("L").resize(size).convert("RGB") for size in sizes]
    options = {"return_tensors": "pt", "padding": True}
    output = processor(images=pictures, text=list(texts), **options)
    same(output, plain(images=pictures, text=list(texts), **options))
    assert len(output["image_grid_thw"].unique(dim=0)) == 3


def test_each_distinct_prompt_is_processed_once(processor, monkeypatch):
    seen = []
    original = type(processor.image_processor).__call__
    monkeypatch.setattr(
        type(processor.image_processor),
        "__call__",
        lambda self, images, *args, **kw: seen.append(len(images)) or original(self, images, *args, **kw),
    )
    encode_prompts(processor, rows_of([8, 8, 8]))
    assert seen == [3]


def test_the_same_words_with_another_picture_and_the_other_way_round_are_not_the_same(processor, plain):
    one, two = one_picture_texts(processor, 2)
    red, blue = Image.new("RGB", (48, 32), "red"), Image.new("RGB", (48, 32), "blue")
    texts, pictures = [one, one, two, two, one], [red, blue, red, blue, red]
    options = {"return_tensors": "pt", "padding": True}
    same(processor(images=pictures, text=list(texts), **options), plain(images=pictures, text=list(texts), **options))


def test_palette_pictures_with_equal_bytes_and_other_colours_are_not_the_same(processor, plain):
    texts = one_picture_texts(processor, 1) * 2
    pictures = [Image.new("P", (48, 32)) for _ in range(2)]
    for picture, colour in zip(pictures, ([255, 0, 0], [0, 0, 255]), strict=True):
        picture.putpalette(colour * 256)
    assert pictures[0].tobytes() == pictures[1].tobytes()
    options = {"return_tensors": "pt", "padding": True}
    same(processor(images=pictures, text=list(texts), **options), plain(images=pictures, text=list(texts), **options))


def test_calls_with_other_than_one_picture_per_text_are_passed_on(processor, plain):
    (text,) = one_picture_texts(processor, 1)
    two, none = text.replace(SLOT, SLOT * 2), text.replace(SLOT, "")
    red, blue, green = (Image.new("RGB", (48, 32), colour) for colour in ("red", "blue", "green"))
    options = {"return_tensors": "pt", "padding": True}
    for images, texts in (
        (None, [none, none]),
        ([red], text),
        ([[red, blue]], [two]),
        # as many pictures as texts, but not one each
        ([[red, blue], [], [green, blue], []], [two, none, two, none]),
        ([[red, blue], [], [red, blue], []], [two, none, two, none]),
    ):
        given = texts if isinstance(texts, str) else list(texts)
        same(processor(images=images, text=given, **options), plain(images=images, text=given, **options))


# A picture that comes n times is seen once


def test_pictures_with_the_same_fingerprint_are_still_told_apart(processor, model):
    # the sums of the patches are equal, the patches are not
    inputs = doubled(encode_prompts(processor, rows_of([2])))
    half = len(inputs["pixel_values"]) // 2
    inputs["pixel_values"][half:] = inputs["pixel_values"][half:].flip(-1)
    unshared, shared, seen = twins(model)
    with torch.no_grad():
        close(shared(**inputs).logits, unshared(**inputs).logits)
    assert seen.patches == [2 * half]


def test_text_without_pictures_is_untouched(processor, model):
    inputs = dict(processor(text=["add the bars to 3 .", "add the bars"], return_tensors="pt", padding=True))
    unshared, shared, seen = twins(model)
    with torch.no_grad():
        assert torch.equal(shared(**inputs).logits, unshared(**inputs).logits)
    assert seen.patches == []


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "case", ["groups", "different sizes", "two pictures in a row", "a row without picture", "text"]
)
def test_positions_are_those_of_the_plain_policy(processor, model, case, side):
    (text,) = one_picture_texts(processor, 1)
    long = text.replace(SLOT, "1 2 3 " + SLOT + "4 ")
    small, wide = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (64, 32), "blue")
    texts, pictures = {
        "groups": ([text, long, text, long, text], [small] * 5),
        "different sizes": ([text, text, long, text], [small, wide, small, small]),
        "two pictures in a row": ([text.replace(SLOT, SLOT * 2), text, text], [small, wide, small, small]),
        # as many pictures as rows, but not one each
        "a row without picture": ([text.replace(SLOT, SLOT * 2), text.replace(SLOT, "")], [small, wide]),
        "text": ([text.replace(SLOT, ""), long.replace(SLOT, "")], None),
    }[case]
    inputs = processor(images=pictures, text=texts, return_tensors="pt", padding=True, padding_side=side)
    arguments = (inputs["input_ids"], inputs["mm_token_type_ids"], inputs.get("image_grid_thw"), None)
    unshared, shared, _ = twins(model)
    for mask in (inputs["attention_mask"], None):
        got = shared.model.get_rope_index(*arguments, mask)
        expected = unshared.model.get_rope_index(*arguments, mask)
        for one, other in zip(got, expected, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


# A frozen tower remembers pictures


def shown(*seeds, side=4):
    """Patches and grids of one random square picture per seed, `side` patches wide."""
    patches = [
        torch.rand(side * side, 384, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]
    return torch.cat(patches), torch.tensor([[1, side, side]] * len(seeds))


def features(output):
    return [output.last_hidden_state, output.pooler_output, *output.deepstack_features]


def look(policies, pictures):
    """Features of a vision tower and of the one that shares, which must agree."""
    pixels, grids = pictures
    with torch.no_grad():
        expected, found = (features(policy.model.visual(pixels, grid_thw=grids)) for policy in policies)
    for one, other in zip(found, expected, strict=True):
        close(one, other)


def held_bytes(visual):
    """Bytes that the memory of a tower keeps alive: keys, and each storage once."""
    memory = visual._remembered
    tensors = [tensor for state, pooled, layers in memory.values() for tensor in (state, pooled, *layers)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(len(key[0]) for key in memory) + sum(storages.values())


def test_a_frozen_tower_sees_each_distinct_picture_once(model):
    *policies, seen = twins(model, frozen=True)
    look(policies, shown(0, 1, 0, 0))
    assert seen.patches == [32]
    for again in ((0, 1, 0, 0), (1,), (0,), (1, 1, 0)):
        look(policies, shown(*again))
    assert seen.patches == [32]
    look(policies, shown(2))
    look(policies, shown(2, 0, 1))
    assert seen.patches == [32, 16]


def test_a_remembered_picture_of_another_shape_is_another_picture(model):
    *policies, seen = twins(model, frozen=True)
    pixels, _ = shown(0)
    for grid in ([1, 4, 4], [1, 2, 8], [1, 8, 2], [1, 4, 4]):
        look(policies, (pixels, torch.tensor([grid])))
    assert seen.patches == [16, 16, 16]


@pytest.mark.parametrize("write", ["in place", "an optimizer", "load_state_dict", "load_state_dict, assigned", "cast"])
def test_a_tower_that_was_written_to_forgets(model, write):
    *policies, seen = twins(model, frozen=True)
    look(policies, shown(0, 1))
    for policy in policies:
        visual = policy.model.visual
        if write == "in place":
            with torch.no_grad():
                visual.merger.linear_fc2.bias.add_(1)
        elif write == "an optimizer":
            visual.requires_grad_(True)
            optimizer = torch.optim.SGD(visual.parameters(), lr=0.1)
            pixels, grids = shown(0)
            visual(pixels, grid_thw=grids).pooler_output.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            visual.requires_grad_(False)
        elif write == "cast":
            visual.float().double()
        else:
            weights = {name: value * 1.5 for name, value in visual.state_dict().items()}
            visual.load_state_dict(weights, assign=write.endswith("assigned"))
            visual.requires_grad_(False)
    seen.forget()
    look(policies, shown(0, 1))
    assert seen.patches == [32]
    look(policies, shown(0, 1))
    assert seen.patches == [32]


@pytest.mark.parametrize("trains", ["all", "one parameter"])
def test_a_tower_that_trains_does_not_remember(model, trains):
    *policies, seen = twins(model, frozen=trains == "one parameter")
    if trains == "one parameter":
        look(policies, shown(0))
        seen.forget()
        for policy in policies:
            policy.model.visual.merger.linear_fc2.bias.requires_grad_(True)
    for _ in range(2):
        look(policies, shown(0, 0))
    assert seen.patches == [16, 16]


def test_what_a_tower_remembers_is_bounded(model, monkeypatch):
    pixels, grids = shown(0)
    *policies, seen = twins(model, frozen=True)
    look(policies, (pixels, grids))
    each = held_bytes(policies[1].model.visual)
    # pictures of an eighth of the bound are remembered, each with its features
    bound = 8 * pixels.nbytes
    kept = bound // each
    assert 2 <= kept < 8
    monkeypatch.setattr(sharing, "REMEMBERED_BYTES", bound)
    lengths = []
    for seed in range(1, 2 * kept + 2):
        look(policies, shown(seed))
        look(policies, shown(seed))
        lengths.append(len(policies[1].model.visual._remembered))
        assert held_bytes(policies[1].model.visual) <= bound
    assert lengths == [*range(2, kept + 1), *range(1, kept + 1), 1, 2]
    assert seen.patches == [16] * (2 * kept + 2)


def test_features_that_are_kept_keep_no_others_alive(model, monkeypatch):
    *policies, _ = twins(model, frozen=True)
    monkeypatch.setattr(sharing, "REMEMBERED_BYTES", 40 * shown(0)[0].nbytes)
    for seed in range(12):  # each time three that are remembered, and one that is not
        look(policies, shown(0, 1, 2, 3 + seed))
    tower = policies[1].model.visual
    parts = [tensor for state, pooled, layers in tower._remembered.values() for tensor in (state, pooled, *layers)]
    assert held_bytes(tower) == sum(len(key[0]) for key in tower._remembered) + sum(part.nbytes for part in parts)


@pytest.mark.parametrize("extra", [0, -1])
def test_pictures_too_large_are_not_remembered(model, monkeypatch, extra):
    *policies, seen = twins(model, frozen=True)
    pictures = shown(0, 1)
    monkeypatch.setattr(sharing, "REMEMBERED_BYTES", 8 * pictures[0].nbytes + extra)
    for _ in range(3):
        look(policies, pictures)
    assert seen.patches == ([32] if extra == 0 else [32] * 3)
    seen.forget()
    look(policies, shown(5))  # one picture is small enough
    look(policies, shown(5))
    assert seen.patches == [16]


def test_what_was_computed_in_half_precision_is_not_remembered_as_exact(model):
    policies = [policy.float() for policy in twins(model, frozen=True)[:2]]
    pixels, grids = shown(0)
    pictures = (pixels.float(), grids)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        policies[1].model.visual(pictures[0], grid_thw=grids)
    with torch.no_grad():
        expected, found = (policy.model.visual(pictures[0], grid_thw=grids).pooler_output for policy in policies)
    torch.testing.assert_close(found, expected)


def test_a_gradient_with_respect_to_the_pixels_goes_through_a_frozen_tower(model):
    policies = twins(model, frozen=True)[:2]
    gradients = []
    for policy in policies:
        for _ in range(2):
            pixels, grids = shown(0)
            pixels.requires_grad_(True)
            policy.model.visual(pixels, grid_thw=grids).pooler_output.sum().backward()
        gradients.append(pixels.grad)
    close(*gradients)


# A conversation is rendered once


@pytest.fixture
def rendering(monkeypatch):
    """A processor with nothing remembered, and the conversations that are really rendered."""
    rendered = []
    original = Qwen3VLProcessor.apply_chat_template

    def counted(self, talk, *args, **options):
        if isinstance(self, prompts.SharedPrompts):
            rendered.append(talk)
        return original(self, talk, *args, **options)

    monkeypatch.setattr(Qwen3VLProcessor, "apply_chat_template", counted)
    return build_processor(vocabulary()), rendered


def talk_of(words, image=None):
    parts = [] if image is None else [{"type": "image", "image": image}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": words}]}]


def test_a_conversation_is_rendered_once_and_as_the_plain_processor_does(rendering, plain):
    processor, rendered = rendering
    talks = [
        talk_of("add the bars"),
        talk_of("add the bars ."),
        talk_of("add the bars", picture()),
        talk_of('add "the" bars, "text": [] é \n', picture()),
        [{"role": "user", "content": "add the bars"}],
        [{"role": "assistant", "content": "add the bars"}],
        [*talk_of("add the bars", picture()), {"role": "assistant", "content": "1"}],
        [talk_of("add the bars", picture()), talk_of("add the bars")],
    ]
    settings = [
        {},
        {"add_generation_prompt": True},
        {"add_generation_prompt": False, "tokenize": False},
        {"chat_template": "{% for message in messages %}{{ message['role'] }} {% endfor %}"},
        {"chat_template": "{{ mood }} {{ messages | length }}", "mood": "glad"},
        {"chat_template": "{{ mood }} {{ messages | length }}", "mood": "sad"},
    ]
    calls = [(talk, options) for options in settings for talk in talks]
    for _ in range(2):
        for talk, options in calls:
            assert processor.apply_chat_template(talk, **options) == plain.apply_chat_template(talk, **options)
    assert len(rendered) == len(calls)


def test_the_template_may_be_given_by_place_and_may_change(rendering, plain):
    processor, _ = rendering
    one, two = "one {{ messages | length }}", "two {{ messages | length }}"
    assert [processor.apply_chat_template(talk_of("add"), template) for template in (one, two, one)] == [
        "one 1",
        "two 1",
        "one 1",
    ]
    for template in (one, two):
        processor.chat_template = template
        assert processor.apply_chat_template(talk_of("add")) == f"{template[:3]} 1"


def test_the_text_does_not_depend_on_the_picture_but_the_inputs_do(rendering, plain):
    processor, rendered = rendering
    pictures = [Image.new("RGB", (48, 32), colour) for colour in ("red", "blue")]
    texts = {processor.apply_chat_template(talk_of("add the bars", shown)) for shown in pictures}
    assert texts == {plain.apply_chat_template(talk_of("add the bars", pictures[0]))}
    assert len(rendered) == 1
    options = {"tokenize": True, "return_dict": True, "processor_kwargs": {"return_tensors": "pt"}}
    for shown in pictures:
        talk = talk_of("add the bars", shown)
        same(processor.apply_chat_template(talk, **options), plain.apply_chat_template(talk, **options))


def test_what_is_not_text_or_a_picture_is_refused(rendering):
    processor, rendered = rendering
    with pytest.raises(TypeError, match=r"holds a Tensor; text and PIL pictures can be rendered"):
        processor.apply_chat_template(talk_of("add the bars", torch.zeros(3, 4, 4)))
    assert rendered == []


def test_a_call_with_other_than_plain_options_is_passed_on(rendering, plain):
    processor, rendered = rendering
    template = "{{ tools | length }}{{ messages | length }}"
    for tools in ([{"a": 1}], [{"a": 1}, {"b": 2}], [{"a": 1}]):
        options = {"chat_template": template, "tools": tools}
        assert processor.apply_chat_template(talk_of("add"), **options) == f"{len(tools)}1"
    assert len(rendered) == 3


def test_rendered_texts_are_bounded(rendering, plain, monkeypatch):
    processor, rendered = rendering
    monkeypatch.setattr(prompts, "REMEMBERED_TEXTS", 3)
    lengths = []
    for number in range(8):
        for _ in range(2):
            talk = talk_of(f"add {number}")
            assert processor.apply_chat_template(talk) == plain.apply_chat_template(talk)
        lengths.append(len(processor._rendered))
    assert lengths == [1, 2, 3, 1, 2, 3, 1, 2]
    assert len(rendered) == 8


def test_a_list_of_texts_may_be_written_to(rendering, plain):
    processor, _ = rendering
    talks = [talk_of("add"), talk_of("add the bars")]
    texts = processor.apply_chat_template(talks)
    texts[0] = "another"
    assert processor.apply_chat_template(talks) == plain.apply_chat_template(talks)


def test_a_saved_processor_holds_no_rendered_text(rendering, tmp_path):
    processor, _ = rendering
    for name in ("fresh", "used"):
        processor.save_pretrained(tmp_path / name)
        processor.apply_chat_template(talk_of("add the bars", picture()))
    fresh, used = ({path.name: path.read_text() for path in (tmp_path / name).iterdir()} for name in ("fresh", "used"))
    assert fresh == used
    assert json.loads(used["processor_config.json"])["processor_class"] == "TinyQwen3VLProcessor"


def test_the_pictures_of_the_last_call_are_remembered_and_no_others(processor, plain, monkeypatch):
    """TRL asks for the same pictures twice, as lists and as tensors; another picture or setting is another question."""
    gradient = Image.linear_gradient("L").convert("RGB")
    first, second = gradient.resize((48, 32)), gradient.rotate(90).resize((48, 32))
    (text,) = one_picture_texts(processor, 1)
    asked = []
    inner = type(processor.image_processor).__call__
    monkeypatch.setattr(
        type(processor.image_processor), "__call__", lambda self, *a, **k: asked.append(1) or inner(self, *a, **k)
    )
    for picture, options, calls in (
        (first, {}, 1),
        (first, {"return_tensors": "pt"}, 1),
        (second, {"return_tensors": "pt"}, 2),
        (first, {"return_tensors": "pt"}, 3),
        (first, {"return_tensors": "pt", "do_rescale": False}, 4),
    ):
        found = processor(images=[picture], text=[text], **options)
        assert len(asked) == calls
        with monkeypatch.context() as patch:
            patch.setattr(type(processor.image_processor), "__call__", inner)
            same(found, plain(images=[picture], text=[text], **options))
