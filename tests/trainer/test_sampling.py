"""Off-line rollouts and scores: against an independent forward pass, and that sampling leaves no trace."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from datasets import Dataset
from transformers import GenerationConfig
from worlds import world

import npo_core.control.offline
from npo_core.control.controller import Controller
from npo_core.guidance.verifiers import BoxedVerifier
from npo_core.runs.config import resolve_config
from npo_core.runs.folder import RunFolder
from npo_core.streams import PROBE
from npo_core.trainer.inputs import encode_prompts, end_tokens
from npo_core.trainer.sampling import (
    Lazily,
    completion_entropies,
    completion_logps,
    sample_rollouts,
    shared_logps,
    shared_rollouts,
)
from npo_core.world.policies import TinyPolicySpec, build_processor, build_tiny_policy
from npo_core.world.tasks import make_dataset, sample_problems, vocabulary

WIDTH = 12


@pytest.fixture(scope="module")
def processor():
    return build_processor(vocabulary())


@pytest.fixture(scope="module")
def model(processor):
    policy = build_tiny_policy(processor, TinyPolicySpec(32, 2, 2, 32, 1), seed=0)
    with torch.no_grad():  # sharper than at initialisation, so that a wrong score shows
        policy.model.language_model.embed_tokens.weight.mul_(8)
    return policy.eval()


@pytest.fixture(scope="module")
def rows():
    return list(make_dataset(sample_problems("train", 8, 0)))


@pytest.fixture
def sample(model, processor, rows):
    def call(seed=0, k=3, rows=rows, verifier=None, **settings):
        settings = {"max_new_tokens": WIDTH} | settings
        return sample_rollouts(model, processor, rows, k, verifier or BoxedVerifier(), seed=seed, **settings)

    return call


@pytest.fixture(scope="module")
def groups(model, processor, rows):
    return sample_rollouts(model, processor, rows, 6, BoxedVerifier(), seed=0, max_new_tokens=WIDTH, source_step=7)


def alone(model, processor, row, tokens):
    """Log-probs of one response by one full forward pass, without padding."""
    tokens = list(tokens)
    scores = distributions(model, processor, row, tokens)
    return scores.gather(-1, torch.tensor(tokens).unsqueeze(-1))[:, 0].tolist()


def distributions(model, processor, row, tokens):
    """Log-softmax of all that can be sampled at each token of one response, without padding; −∞ for what cannot."""
    inputs = encode_prompts(processor, [row])
    prompt = inputs["input_ids"].shape[1]
    tokens = torch.tensor([list(tokens)])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    types = torch.zeros_like(inputs["input_ids"])
    types[:, :prompt] = inputs["mm_token_type_ids"]
    with torch.no_grad():
        logits = model(**{**inputs, "mm_token_type_ids": types}).logits[0, prompt - 1 : -1]
    logits[:, processor.image_token_id] = -torch.inf
    return logits.log_softmax(-1)


def test_scores_are_those_of_an_independent_forward_pass(model, processor, rows, groups):
    for row, group in zip(rows, groups, strict=True):
        for trajectory in group[:2]:
            expected = alone(model, processor, row, trajectory.token_ids)
            assert trajectory.logps == pytest.approx(expected, abs=1e-4)


def test_entropies_are_those_of_an_independent_forward_pass(model, processor, rows, groups):
    """Mean over the response's own tokens of −Σ p ln p over the whole vocabulary, whatever it is padded to."""
    pairs = [
        (row, t.token_ids[: 12 - cut]) for row, group in zip(rows, groups, strict=True) for cut, t in enumerate(group)
    ]
    found = completion_entropies(model, processor, *(list(column) for column in zip(*pairs, strict=True)))
    for entropy, (row, tokens) in zip(found, pairs, strict=True):
        scores = distributions(model, processor, row, tokens)
        assert entropy == pytest.approx(torch.special.entr(scores.exp()).sum(-1).mean().item(), abs=1e-4)
    assert max(found) - min(found) > 0.1 and len({len(tokens) for _, tokens in pairs}) > 1


def test_entropies_are_asked_in_evaluation_mode_in_batches_and_leave_no_trace(model, processor, rows):
    completions, modes = [(15, 16, 17), (15,), (16, 17)], []
    whole = completion_entropies(model, processor, rows[:3], completions)
    before = torch.get_rng_state()
    hook = model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    model.train()
    try:
        apart = completion_entropies(model, processor, rows[:3], completions, batch=2)
        assert apart == pytest.approx(whole, abs=1e-5)
        assert model.training and modes == [False, False]
    finally:
        hook.remove()
        model.eval()
    assert torch.equal(torch.get_rng_state(), before)
    assert completion_entropies(model, processor, [], []) == []


def test_scores_tell_tokens_and_pictures_apart(model, processor, rows, groups):
    # the oracle above would pass on a policy that gives every token the same probability
    tokens = groups[0][0].token_ids
    scores = alone(model, processor, rows[0], tokens)
    assert max(scores) - min(scores) > 0.1
    other = {**rows[0], "image": rows[1]["image"]}
    assert alone(model, processor, other, tokens) != pytest.approx(scores, abs=1e-3)


def test_padding_does_not_change_a_score(model, processor, rows, groups):
    lengths = {encode_prompts(processor, [row])["input_ids"].shape[1] for row in rows}
    assert len(lengths) > 1  # prompts of different length, so some are padded on the left
    completions = [group[0].token_ids[: 1 + place] for place, group in enumerate(groups)]
    together = completion_logps(model, processor, rows, completions)
    for row, tokens, scores in zip(rows, completions, together, strict=True):
        assert scores == pytest.approx(completion_logps(model, processor, [row], [tokens])[0], abs=1e-4)
        assert len(scores) == len(tokens)


def test_scores_do_not_depend_on_the_batches(model, processor, rows, groups):
    completions = [group[0].token_ids for group in groups]
    together = completion_logps(model, processor, rows, completions)
    apart = completion_logps(model, processor, rows, completions, batch=3)
    assert [pytest.approx(scores, abs=1e-4) for scores in together] == apart


def test_scores_are_at_temperature_one_and_untruncated_however_it_was_sampled(model, processor, rows, sample):
    for group, row in zip(sample(temperature=0.3, top_p=0.5, top_k=3, k=1), rows, strict=True):
        assert group[0].logps == pytest.approx(alone(model, processor, row, group[0].token_ids), abs=1e-4)


def test_scores_at_another_temperature_are_those_of_the_logits_divided_by_it(model, processor, rows, groups, sample):
    trajectory = groups[0][0]
    whole = distributions(model, processor, rows[0], trajectory.token_ids)
    tokens = torch.tensor(trajectory.token_ids).unsqueeze(-1)
    expected = (whole / 0.6).log_softmax(-1).gather(-1, tokens)[:, 0].tolist()
    assert completion_logps(model, processor, rows[:1], [trajectory.token_ids], temperature=0.6)[0] == pytest.approx(
        expected, abs=1e-4
    )
    (group,) = sample(k=1, rows=rows[:1], score_temperature=0.6)
    assert group[0].temperature == 0.6 and trajectory.temperature == 1.0
    with pytest.raises(ValueError, match=r"temperature is 0\.0"):
        completion_logps(model, processor, rows[:1], [trajectory.token_ids], temperature=0.0)


def test_prompts_are_rendered_with_the_template_arguments_of_training(model, processor, rows, sample, monkeypatch):
    template = processor.chat_template + "{% if think is defined %}0 0 {% endif %}"
    monkeypatch.setattr(processor, "chat_template", template)
    think = {"think": True}
    plain, longer = (encode_prompts(processor, rows[:1], given)["input_ids"] for given in (None, think))
    word = processor.tokenizer.convert_tokens_to_ids("0")
    assert longer[0].tolist() == [*plain[0].tolist(), word, word]
    tokens = [(word, word)]
    scores = completion_logps(model, processor, rows[:1], tokens, chat_template_kwargs=think)
    assert scores[0] == pytest.approx(alone(model, processor, rows[0], (word,) * 4)[2:], abs=1e-4)
    with_thought, without = sample(k=2, rows=rows[:1], chat_template_kwargs=think), sample(k=2, rows=rows[:1])
    assert with_thought != without
    entropies = [completion_entropies(model, processor, rows[:1], tokens, chat_template_kwargs=t) for t in (think, {})]
    assert entropies[0] != entropies[1]


def test_a_prompt_that_is_a_plain_string_is_tokenised_as_it_is(model, processor, rows):
    tokenizer = processor.tokenizer
    plain = [{"uid": "a", "prompt": "0 1 2"}, {"uid": "b", "prompt": "3"}]
    for encoder in (processor, tokenizer):
        inputs = encode_prompts(encoder, plain)
        ids = [
            tokens[kept].tolist()
            for tokens, kept in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
        ]
        assert ids == [tokenizer(row["prompt"])["input_ids"] for row in plain]
        assert inputs["attention_mask"][1].tolist() == [0, 0, 1]
    for some in (plain, plain[:1]):
        groups = sample_rollouts(model, processor, some, 2, lambda text, row: True, seed=0, max_new_tokens=4)
        assert [len(group) for group in groups] == [2] * len(some)
    for mixed in ([plain[0], rows[0]], [{**plain[0], "image": rows[0]["image"]}]):
        with pytest.raises(ValueError, match="chat messages"):
            encode_prompts(processor, mixed)


def test_rows_may_be_a_data_set(model, processor, rows, sample):
    dataset = make_dataset(sample_problems("train", 8, 0))
    assert sample(k=1, batch=3, rows=dataset) == sample(k=1, batch=3)
    tokens = [(15, 16)] * 4
    few = dataset.select(range(4))
    assert completion_logps(model, processor, few, tokens, 3) == completion_logps(model, processor, rows[:4], tokens, 3)
    assert completion_entropies(model, processor, few, tokens, 3) == completion_entropies(
        model, processor, rows[:4], tokens, 3
    )


def test_a_list_of_pictures_stands_where_one_does(processor, rows):
    """`images` of one picture is `image`; of two, both are shown, the first one first."""
    one, other = (row["image"] for row in rows[:2])
    plain = {"prompt": rows[0]["prompt"]}
    single = encode_prompts(processor, [{**plain, "image": one}])
    listed = encode_prompts(processor, [{**plain, "images": [one]}, {**plain, "images": [one]}])
    assert all(torch.equal(listed[name], torch.cat([value, value])) for name, value in single.items())
    both = encode_prompts(processor, [{**plain, "images": [one, other]}])
    alone = encode_prompts(processor, [{**plain, "image": other}])
    assert torch.equal(both["pixel_values"], torch.cat([single["pixel_values"], alone["pixel_values"]]))
    shown = [int((inputs["input_ids"] == processor.image_token_id).sum()) for inputs in (single, alone, both)]
    assert shown[0] + shown[1] == shown[2]
    for empty in ({"image": None}, {"images": []}, {"images": None}):
        without = encode_prompts(processor, [{**plain, **empty}])["input_ids"]
        assert torch.equal(without, encode_prompts(processor, [plain])["input_ids"])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"uid": ""}, "Row 2 has uid ''"),
        ({"answer": "so\n#### 4"}, "Row 2 .* holds ####"),
        ({"prompt": []}, "Row 2 .* has no prompt"),
    ],
    ids=["uid", "answer", "prompt"],
)
def test_rows_that_could_not_be_trained_on_are_refused_before_anything_is_sampled(changes, complaint):
    """One bad row at the end would throw away what was sampled for all others."""
    tiny = world("text")
    rows = [{name: row[name] for name in ("uid", "prompt", "answer")} for row in tiny.dataset.select(range(3))]
    rows[2] |= changes
    sampled = []
    with pytest.raises(ValueError, match=complaint):
        sample_rollouts(
            tiny.build(), tiny.processor, Dataset.from_list(rows), 1, BoxedVerifier(), seed=0, max_new_tokens=2,
            batch=1, advance=sampled.append,
        )  # fmt: skip
    assert not sampled


def test_there_are_k_per_row_in_the_order_of_the_rows(rows, groups):
    assert [len(group) for group in groups] == [6] * len(rows)
    for row, group in zip(rows, groups, strict=True):
        assert {trajectory.uid for trajectory in group} == {row["uid"]}
    assert {trajectory.source_step for group in groups for trajectory in group} == {7}


def test_a_response_ends_with_the_first_end_of_sequence(processor, sample):
    eos = processor.tokenizer.eos_token_id
    groups = sample(k=12, temperature=50.0)  # nearly uniform: a sixth of 96 responses end before their room does
    responses = [trajectory.token_ids for group in groups for trajectory in group]
    stopped = [tokens for tokens in responses if eos in tokens]
    assert stopped
    assert all(tokens.index(eos) == len(tokens) - 1 for tokens in stopped)
    cut_off = [tokens for tokens in responses if eos not in tokens]
    assert cut_off
    assert {len(tokens) for tokens in cut_off} == {WIDTH}
    assert all(len(t.token_ids) == len(t.logps) for group in groups for t in group)


def test_a_response_ends_at_every_token_that_ends_one_in_training(model, processor, rows, sample, monkeypatch):
    """As the end of a turn beside the end of a text."""
    tokenizer = processor.tokenizer
    end, word = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("0")
    for own, expected in ((None, [end]), (end, [end]), ([end, word], [end, word]), ([word], [end, word])):
        monkeypatch.setattr(model.generation_config, "eos_token_id", own)
        assert end_tokens(model, processor) == expected
    flat = [trajectory.token_ids for group in sample(k=8) for trajectory in group]
    assert any(tokens[-1] == word and len(tokens) < WIDTH for tokens in flat)
    assert not any({end, word} & set(tokens[:-1]) for tokens in flat)
    given = sample(k=1, rows=rows[:1], generate=lambda *_: [[7, word, 8, end]])
    assert given[0][0].token_ids == (7, word), "also where another sampler went on"


def test_the_verdict_is_that_of_the_verifier_on_the_decoded_text(processor, rows, sample):
    asked = []

    def verifier(text, row):
        asked.append((text, row["uid"]))
        return SimpleNamespace(correct=len(text) % 2 == 0)

    flat = [trajectory for group in sample(verifier=verifier) for trajectory in group]
    assert asked == [(trajectory.text, trajectory.uid) for trajectory in flat]
    assert [trajectory.correct for trajectory in flat] == [len(text) % 2 == 0 for text, _ in asked]
    for trajectory in flat:
        assert trajectory.text == processor.tokenizer.decode(trajectory.token_ids, skip_special_tokens=True)


def test_the_seed_decides_the_rollouts(sample):
    assert sample(seed=3) == sample(seed=3)
    assert sample(seed=3) != sample(seed=4)


def test_sampling_leaves_no_trace(model, sample):
    before, weights = torch.get_rng_state(), [parameter.clone() for parameter in model.parameters()]
    for training in (True, False):
        model.train(training)
        sample(k=1)
        assert model.training is training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(old, new) for old, new in zip(weights, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_verifier_that_fails_leaves_no_trace_either(model, sample):
    def verifier(text, row):
        raise RuntimeError("no verdict")

    before = torch.get_rng_state()
    model.train()
    with pytest.raises(RuntimeError, match="no verdict"):
        sample(k=1, verifier=verifier)
    assert model.training
    model.eval()
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_are_reported_and_joined_in_order(rows, sample):
    done = []
    groups = sample(k=2, batch=7, advance=done.append)  # three rows of k = 2, then three, then two
    assert done == [6, 6, 4]
    assert [group[0].uid for group in groups] == [row["uid"] for row in rows]
    assert all(len(group) == 2 for group in groups)


def test_rows_are_read_batch_by_batch(rows, sample):
    """Pictures of all prompts of a cache together would not fit into memory."""
    reads, seen = [], []
    lazy = Lazily(lambda place: reads.append(place) or rows[place], range(5))
    groups = sample(k=2, batch=4, rows=lazy, advance=lambda rollouts: seen.append(list(reads)))
    assert seen == [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert [group[0].uid for group in groups] == [row["uid"] for row in rows[:5]]
    assert len(lazy) == 5 and lazy[4] is rows[4] and lazy[1:3] == rows[1:3]


def test_a_group_larger_than_a_batch_is_sampled_all_the_same(rows, sample):
    assert [len(group) for group in sample(k=3, rows=rows[:2], batch=2)] == [3, 3]


def test_another_sampler_takes_the_place_of_the_model(model, processor, rows, sample):
    """Its tokens are cut at the end of sequence, judged, and scored by the model."""
    solution = processor.tokenizer("2 3 \\boxed{ 3 }")["input_ids"]
    eos = processor.tokenizer.eos_token_id
    asked = []

    def generate(part, k, sampling):
        asked.append((len(part), k, sampling))
        return [[*solution, eos, 9] for _ in part for _ in range(k)]

    settings = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}
    groups = sample(k=2, batch=4, generate=generate, rows=rows[:3], **settings)
    assert asked == [(3, 2, {**settings, "min_p": None, "repetition_penalty": 1.0})], (
        "it is sent the weights each time, so it gets as much as fits"
    )
    for group, row in zip(groups, rows[:3], strict=True):
        assert [trajectory.token_ids for trajectory in group] == [(*solution, eos)] * 2
        assert group[0].logps == pytest.approx(alone(model, processor, row, (*solution, eos)), abs=1e-4)


def test_shared_work_of_one_process_is_the_work_itself(model, processor, rows, sample):
    settings = {"seed": 3, "max_new_tokens": 6}
    plain = sample_rollouts(model, processor, rows, 2, BoxedVerifier(), **settings)
    assert shared_rollouts(model, processor, rows, 2, BoxedVerifier(), **settings) == plain
    completions = [group[0].token_ids for group in plain]
    assert shared_logps(model, processor, rows, completions) == completion_logps(model, processor, rows, completions)


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"temperature": 1e-4}, {"top_p": 1e-6}])
def test_each_sampling_setting_arrives(sample, settings):
    for group in sample(**settings):
        assert len({trajectory.token_ids for trajectory in group}) == 1
    assert any(len({trajectory.token_ids for trajectory in group}) > 1 for group in sample())


def test_the_settings_that_a_pretrained_policy_brings_along_do_not_count(model, sample, monkeypatch):
    # a pretrained Qwen3-VL comes with top_k 20, top_p 0.8 and temperature 0.7 of its own
    expected = sample(k=2)
    for name, value in {"do_sample": False, "top_k": 1, "top_p": 0.1, "temperature": 0.01}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert sample(k=2) == expected


def test_no_image_token_is_sampled(model, processor, sample):
    # one in a response stands for no picture: scoring it, or training on it, would fail
    image = processor.image_token_id

    def favour(module, inputs, logits):
        logits[..., image] += 30
        return logits

    hook = model.lm_head.register_forward_hook(favour)
    try:
        flat = [trajectory for group in sample() for trajectory in group]
    finally:
        hook.remove()
    assert not any(image in trajectory.token_ids for trajectory in flat)


def test_without_scores_there_are_no_log_probs_but_the_same_tokens(sample):
    for scored, unscored in zip(sample(k=2), sample(k=2, score=False), strict=True):
        assert [t.token_ids for t in scored] == [t.token_ids for t in unscored]
        assert all(t.logps == () for t in unscored)


def test_what_cannot_be_sampled_or_scored_is_refused(model, processor, rows, sample):
    with pytest.raises(ValueError, match="k is 0"):
        sample(k=0)
    with pytest.raises(ValueError, match="empty response"):
        completion_logps(model, processor, rows[:2], [(5,), ()])


def test_no_rows_give_no_groups(sample):
    assert sample(rows=[]) == []


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_controller_samples_and_scores_off_line_as_its_trainers_train(tmp_path, monkeypatch, temperature):
    """Template arguments are the trainer's; log-probs are at the training's temperature, q and pi alike."""
    asked = []

    def record(name, result):
        def call(*args, **settings):
            asked.append((name, settings))
            return result

        return call

    monkeypatch.setattr(npo_core.control.offline, "shared_rollouts", record("sampled", []))
    monkeypatch.setattr(npo_core.control.offline, "shared_logps", record("scored", []))

    class Asking(Controller):
        def _stop_at(self, segments):
            return 1

        def _decide(self, trainer, watch, step, segments):
            self._sample(None, [], 2, step, PROBE, (step,))
            self._score(None, [])
            raise StopIteration

        def _require_fit(self, trainer, watch, guidance):
            """The trainer below is none; `test_agreement` has what this refuses."""

    class Trainer:
        chat_template_kwargs: ClassVar = {"enable_thinking": False}
        use_vllm = False
        args = SimpleNamespace(
            generation_kwargs={"no_repeat_ngram_size": 3}, tau_gate=0.6, generation_batch_size=16,
            mask_unsampled=True,
        )  # fmt: skip
        model = SimpleNamespace(generation_config=GenerationConfig(), dtype=torch.float32)
        accelerator = SimpleNamespace(distributed_type="NO", device=torch.device("cpu"), autocast=nullcontext)
        generation_config = GenerationConfig(suppress_tokens=[7], eos_token_id=2)
        max_completion_length, num_generations = 12, 4
        top_p, top_k, min_p, repetition_penalty = 0.9, 40, 0.01, 1.1

        def __init__(self, output_dir, guidance, callbacks):
            (self.watch,) = callbacks
            self.temperature = temperature

        def train(self, resume_from_checkpoint):
            self.watch.due = 1

        def remove_callback(self, callback):
            """It prints nothing."""

    config = resolve_config("grpo", "smoke", 0, {"temperature": temperature})
    with pytest.raises(StopIteration):
        Asking(Trainer, config, RunFolder(config, tmp_path), {}, None, None, quiet=True).run()
    (_, of_sampling), (_, of_scoring) = asked
    assert of_sampling["chat_template_kwargs"] == of_scoring["chat_template_kwargs"] == {"enable_thinking": False}
    assert of_sampling["temperature"] == of_sampling["score_temperature"] == of_scoring["temperature"] == temperature
    drawn = {"top_p": 0.9, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1}
    assert {name: of_sampling[name] for name in drawn} == drawn
    assert of_sampling["generation_kwargs"] == {"no_repeat_ngram_size": 3}
    assert of_sampling["unsampled"] == of_scoring["unsampled"] == (7,)
