"""Policies: save and load, prompts processed once, pictures seen once, and refusals."""

import pytest
import torch
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3VLProcessor
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from npo_core.policies import (
    SPECIAL_TOKENS,
    TinyPolicySpec,
    TinyQwen3VLProcessor,
    build_processor,
    build_tiny_policy,
    load_policy,
    load_processor,
    load_weights,
    save_policy,
    share_vision,
    tokenizer_digest,
    tokenizer_of,
)
from npo_core.sampling import encode_prompts
from npo_core.tasks import conversation, make_dataset, sample_problems, vocabulary

SPEC = TinyPolicySpec(hidden=32, layers=2, heads=2, vision_hidden=32, vision_depth=2)


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
    same(encode_prompts(loaded, rows), encode_prompts(processor, rows))
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


def test_weights_are_overwritten_in_place(saved, processor, model):
    other = build_tiny_policy(processor, SPEC, seed=9)
    place = next(other.parameters()).data_ptr()
    load_weights(other, saved)
    assert next(other.parameters()).data_ptr() == place
    weights = model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in other.state_dict().items())
    assert other.lm_head.weight is other.model.language_model.embed_tokens.weight


@pytest.mark.parametrize(
    "spec", [TinyPolicySpec(32, 1, 2, 32, 2), TinyPolicySpec(32, 3, 2, 32, 2), TinyPolicySpec(64, 2, 2, 32, 2)]
)
def test_weights_of_another_architecture_are_refused(saved, processor, spec):
    with pytest.raises(ValueError, match="another architecture"):
        load_weights(build_tiny_policy(processor, spec, 0), saved)


def test_a_folder_without_weights_is_refused(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist"):
        load_weights(model, tmp_path)


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


# The tokenizer


def test_the_digest_tells_vocabularies_apart(processor):
    words = vocabulary()
    digest = tokenizer_digest(processor)
    assert digest == tokenizer_digest(build_processor(words)) == tokenizer_digest(tokenizer_of(processor))
    swapped = [words[1], words[0], *words[2:]]
    for other in ([*words, "new"], words[:-1], swapped):
        assert tokenizer_digest(build_processor(other)) != digest


def test_a_special_token_is_one_token_wherever_it_stands(processor):
    tokenizer = processor.tokenizer
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    ids = tokenizer("1<|im_end|><|im_start|>2")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["1", "<|im_end|>", "<|im_start|>", "2"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("1 strange 2")["input_ids"]) == ["1", "<|unk|>", "2"]


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
    slot = "<|vision_start|><|image_pad|><|vision_end|>"
    two, none = text.replace(slot, slot * 2), text.replace(slot, "")
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


def shared(model):
    """A copy of the policy whose tower is shared, and a list that fills with the patches its tower sees."""
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    share_vision(copy)
    share_vision(copy)  # twice changes nothing
    seen = []
    copy.model.visual.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    return copy, seen


def mixed_sizes(processor):
    sizes = [(48, 32), (32, 32), (48, 32), (64, 48), (32, 32), (48, 32)]
    gradient = Image.linear_gradient("L")
    pictures = [gradient.resize(size).convert("RGB") for size in sizes]
    pictures[-1] = gradient.rotate(90).resize(sizes[-1]).convert("RGB")  # the size of another, but another picture
    texts = one_picture_texts(processor, 1) * len(sizes)
    return dict(processor(images=pictures, text=texts, return_tensors="pt", padding=True, padding_side="left"))


@pytest.mark.parametrize("case", ["one group", "groups", "all distinct", "different sizes"])
def test_sharing_vision_changes_neither_logits_nor_gradients(processor, model, case):
    inputs = (
        mixed_sizes(processor)
        if case == "different sizes"
        else encode_prompts(
            processor, rows_of({"one group": [4], "groups": [3, 1, 4], "all distinct": [1, 1, 1]}[case])
        )
    )
    copy, seen = shared(model)
    outputs = []
    for policy in (model, copy):
        policy.zero_grad()
        logits = policy(**inputs).logits
        weight = torch.linspace(-1, 1, logits.numel()).view_as(logits)
        (logits.log_softmax(-1) * weight).mean().backward()
        gradients = {name: parameter.grad for name, parameter in policy.named_parameters()}
        outputs.append((logits.detach(), gradients))
    (plain_logits, plain_gradients), (logits, gradients) = outputs
    # equal bit for bit on one thread; on two, the product of a matrix with fewer rows may be summed in another order
    torch.testing.assert_close(logits, plain_logits, rtol=0, atol=1e-6)
    for name, gradient in plain_gradients.items():
        assert gradients[name] is not None, name
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
    assert any(gradient.abs().max() > 1e-6 for name, gradient in gradients.items() if ".visual." in name)

    patches = inputs["image_grid_thw"].prod(dim=-1)
    pieces = inputs["pixel_values"].split(patches.tolist())
    distinct = {
        (tuple(grid), piece.numpy().tobytes())
        for grid, piece in zip(inputs["image_grid_thw"].tolist(), pieces, strict=True)
    }
    assert seen == [sum(grid[0] * grid[1] * grid[2] for grid, _ in distinct)]


def test_pictures_with_the_same_fingerprint_are_still_told_apart(processor, model):
    # the sums of the patches are equal, the patches are not
    inputs = encode_prompts(processor, rows_of([2]))
    half = len(inputs["pixel_values"]) // 2
    inputs["pixel_values"][half:] = inputs["pixel_values"][half:].flip(-1)
    copy, seen = shared(model)
    with torch.no_grad():
        assert torch.equal(copy(**inputs).logits, model(**inputs).logits)
    assert seen == [2 * half]


def test_text_without_pictures_is_untouched(processor, model):
    inputs = dict(processor(text=["add the bars to 3 .", "add the bars"], return_tensors="pt", padding=True))
    copy, seen = shared(model)
    with torch.no_grad():
        assert torch.equal(copy(**inputs).logits, model(**inputs).logits)
    assert seen == []


def test_a_loaded_policy_shares_its_vision(saved, processor):
    policy = load_policy(saved)
    seen = []
    policy.model.visual.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    inputs = encode_prompts(processor, rows_of([8, 8]))
    with torch.no_grad():
        policy(**inputs)
    assert seen == [len(inputs["pixel_values"]) // 8]
    assert isinstance(policy.model.visual, Qwen3VLVisionModel)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "case", ["groups", "different sizes", "two pictures in a row", "a row without picture", "text"]
)
def test_positions_are_those_of_the_plain_policy(processor, model, case, side):
    (text,) = one_picture_texts(processor, 1)
    slot = "<|vision_start|><|image_pad|><|vision_end|>"
    long = text.replace(slot, "1 2 3 " + slot + "4 ")
    small, wide = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (64, 32), "blue")
    texts, pictures = {
        "groups": ([text, long, text, long, text], [small] * 5),
        "different sizes": ([text, text, long, text], [small, wide, small, small]),
        "two pictures in a row": ([text.replace(slot, slot * 2), text, text], [small, wide, small, small]),
        # as many pictures as rows, but not one each
        "a row without picture": ([text.replace(slot, slot * 2), text.replace(slot, "")], [small, wide]),
        "text": ([text.replace(slot, ""), long.replace(slot, "")], None),
    }[case]
    inputs = processor(images=pictures, text=texts, return_tensors="pt", padding=True, padding_side=side)
    arguments = (inputs["input_ids"], inputs["mm_token_type_ids"], inputs.get("image_grid_thw"), None)
    copy, _ = shared(model)
    for mask in (inputs["attention_mask"], None):
        got = copy.model.get_rope_index(*arguments, mask)
        expected = model.model.get_rope_index(*arguments, mask)
        for one, other in zip(got, expected, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
