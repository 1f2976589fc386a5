"""NPOTrainer in the place of GRPOTrainer: its arguments, its card, its streams; and the ways past the replacement."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from datasets import IterableDataset
from foreign import TURNS, byte_tokenizer, tiny_model
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen3_template
from worlds import WIDTH, Guides, TinyWorld, responses, trainer_of, world

from npo_core.guidance.verdicts import verifier_reward
from npo_core.guidance.verifiers import BoxedVerifier
from npo_core.trainer.config import NPOConfig, own_arguments
from npo_core.trainer.sampling import sample_rollouts
from npo_core.trainer.trainer import NPOTrainer

QUIET = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False, "report_to": [],
    "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
}  # fmt: skip
OWN = {"tau_gate", "ratio_mode", "ratio_truncation", "ratio_gamma", "guide_behaviour", "placement", "guides_per_group"}


def reward(completions, **_) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]


# Arguments


def test_plain_grpo_arguments_train_as_grpo_does_bit_for_bit(tmp_path):
    tiny, weights = world("text"), []
    for kind in (GRPOTrainer, NPOTrainer):
        args = GRPOConfig(
            str(tmp_path), max_steps=2, per_device_train_batch_size=8, num_generations=4, max_completion_length=6,
            learning_rate=1e-2, **QUIET,
        )  # fmt: skip
        # as GRPOTrainer's own: policy, reward and arguments by place
        trainer = kind(tiny.build(), reward, args, tiny.dataset, processing_class=tiny.processor)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        weights.append(trainer.model.state_dict())
        assert type(args) is GRPOConfig, "the arguments that were given stay what they are"
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert isinstance(trainer.args, NPOConfig)
    assert {name: getattr(trainer.args, name) for name in OWN} == {
        each.name: each.default for each in dataclasses.fields(NPOConfig) if each.name in OWN
    }
    # a GRPOConfig works its arguments out when it is made; that is not done a second time
    assert {name: getattr(trainer.args, name) for name in ("steps_per_generation", "generation_batch_size")} == {
        name: getattr(args, name) for name in ("steps_per_generation", "generation_batch_size")
    }


def test_without_arguments_the_folder_is_named_as_grpo_names_it(monkeypatch):
    tiny = world("text")
    model = tiny.build()
    model.config._name_or_path = "somebody/small-policy"
    seen = []
    monkeypatch.setattr(NPOConfig, "__post_init__", lambda self: seen.append(self.output_dir))
    for given in (model, "somebody/small-policy", "small-policy"):
        assert type(own_arguments(None, given)) is NPOConfig
    assert seen == ["small-policy-NPO"] * 3


def test_arguments_of_another_kind_are_refused_before_the_policy_is_loaded(tmp_path):
    @dataclasses.dataclass
    class MyConfig(GRPOConfig):
        mine: int = 1

    args = MyConfig(str(tmp_path), **QUIET)
    with pytest.raises(TypeError, match=r"args is a MyConfig; .* derived from NPOConfig"):
        NPOTrainer("no such policy", reward, args, world("text").dataset)


def test_the_card_cites_the_paper_of_npo_and_that_of_grpo(tmp_path):
    trainer = trainer_of(world("text"), tmp_path, NPOTrainer)
    trainer.create_model_card(model_name="guided")
    card = (tmp_path / "README.md").read_text()
    assert "a method introduced in [Near-Future Policy Optimization](https://huggingface.co/papers/2604.20733)" in card
    assert "2604.20733}" in card and "Cite NPO as" in card
    assert "DeepSeekMath" in card.split("## Citations")[1] and "2402.03300" not in card.split("## Citations")[0]


# Streams


def test_a_stream_is_not_read_ahead_of_training(tmp_path):
    """It may have no end."""
    tiny, read = world("text"), []

    def rows():
        for row in itertools.cycle(list(tiny.dataset)):
            read.append(row["uid"])
            yield row

    stream = IterableDataset.from_generator(rows, features=tiny.dataset.features)
    assert stream.column_names == tiny.dataset.column_names
    trainer = trainer_of(tiny, tmp_path, dataset=stream, prompts=2, n=2, tau_gate=1.0)
    cache = trainer.new_cache()
    for uid in tiny.dataset["uid"]:
        cache.add(tiny.guide(uid))
    trainer.guidance = cache
    assert read == [] and cache.known_uids is None
    trainer.train()
    assert trainer.state.log_history[0]["npo/replaced_slots"] == 2
    nameless = stream.remove_columns("uid")
    with pytest.raises(ValueError, match=r"but not \['uid'\]"):
        trainer_of(tiny, tmp_path, dataset=nameless, guidance=cache)


# Ways past the replacement


def rollout(prompts, trainer):
    ids = trainer.processing_class("0 1", add_special_tokens=False)["input_ids"]
    return {
        "prompt_ids": [ids] * len(prompts),
        "completion_ids": [ids] * len(prompts),
        "logprobs": [[0.0, 0.0]] * len(prompts),
    }


class Silent:
    """An environment without tools: TRL has none when the trainer is made, and makes it with the first batch."""

    def reset(self, **row):
        return None


WAYS = {"rollout_func": {"rollout_func": rollout}, "environment_factory": {"environment_factory": Silent}}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("settings", [{"guidance": Guides()}, {"placement": "append"}], ids=["guidance", "append"])
def test_other_ways_of_sampling_are_refused_where_guides_would_not_arrive(tmp_path, monkeypatch, name, settings):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    tokenizer = byte_tokenizer()
    monkeypatch.setattr("trl.trainer.grpo_trainer.supports_tool_calling", lambda _: True)
    guidance = settings.get("guidance")
    args = NPOConfig(
        str(tmp_path), num_generations=4, per_device_train_batch_size=4, placement=settings.get("placement", "replace"),
        **QUIET,
    )  # fmt: skip
    with pytest.raises(ValueError, match=rf"{name} is given together with (guidance|placement 'append')"):
        NPOTrainer(
            tiny_model("Qwen3", tokenizer), reward, args, world("text").dataset, processing_class=tokenizer,
            verifier=BoxedVerifier(), guidance=guidance, **WAYS[name],
        )  # fmt: skip


def test_a_rollout_function_without_guidance_trains_as_it_does_with_grpo(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    tiny = world("text")
    args = NPOConfig(
        str(tmp_path), max_steps=1, num_generations=4, per_device_train_batch_size=4, max_completion_length=6, **QUIET
    )
    trainer = NPOTrainer(
        tiny.build(), reward, args, tiny.dataset, processing_class=tiny.processor, rollout_func=rollout,
        verifier=lambda text, row: text == "0 1",
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert trainer.state.log_history[0]["npo/pass_rate"] == 1.0


@pytest.mark.parametrize("template", [None, qwen3_template], ids=["plain", "response template"])
def test_a_rollout_function_is_judged_on_the_text_that_rewards_get(tmp_path, monkeypatch, template):
    """TRL keeps the prompts of a rollout function to itself, and a response template reads them."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    tokenizer = byte_tokenizer(template=TURNS)
    tokenizer.response_template = template
    text = "<think>\n\\boxed{4}\n</think>\n\nThe answer is four."

    def thinking(prompts, trainer):
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        return {name: [each] * len(prompts) for name, each in
                {"prompt_ids": [5], "completion_ids": ids, "logprobs": [0.0] * len(ids)}.items()}  # fmt: skip

    rows = [{"uid": "a", "prompt": [{"role": "user", "content": "2 + 2?"}], "answer": "4"}]
    args = NPOConfig(
        str(tmp_path), max_steps=1, num_generations=4, per_device_train_batch_size=4, max_completion_length=64, **QUIET
    )
    judge = BoxedVerifier()
    trainer = NPOTrainer(
        tiny_model("Qwen3", tokenizer), verifier_reward(judge), args, world("text").dataset.from_list(rows),
        processing_class=tokenizer, rollout_func=thinking, verifier=judge,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["npo/pass_rate"] == line["reward"] == float(template is None)


# Tokenizers that take a response apart

TEXTS = {
    "box in the reasoning only": ("<think>\nso \\boxed{4}\n</think>\n\nThe answer is four.", False),
    "box after the reasoning": ("<think>\nsum\n</think>\n\nThe answer is \\boxed{4}.", True),
    "right in the reasoning, wrong after": ("<think>\n\\boxed{4}\n</think>\n\nThe answer is \\boxed{5}.", False),
    "no reasoning": ("The answer is \\boxed{4}.", True),
}


@pytest.mark.parametrize("name", TEXTS)
def test_gate_reward_and_off_line_rollouts_judge_the_same_text(tmp_path, monkeypatch, name):
    text, right = TEXTS[name]
    tokenizer = byte_tokenizer(template=TURNS)
    tokenizer.response_template = qwen3_template
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    monkeypatch.setattr(
        GRPOTrainer, "_generate_single_turn", lambda self, prompts, *_: ([list(ids) for _ in prompts], None)
    )
    rows = [{"uid": "a", "prompt": [{"role": "user", "content": "2 + 2?"}], "answer": "4"}]
    judge, model = BoxedVerifier(), tiny_model("Qwen3", tokenizer)
    (group,) = sample_rollouts(
        model, tokenizer, rows, 2, judge, seed=0, max_new_tokens=128, generate=lambda part, k, _: [ids] * k
    )
    assert [trajectory.correct for trajectory in group] == [right] * 2
    assert group[0].text == text, "what is kept for people is the whole response"
    tiny = TinyWorld(tokenizer, world("text").dataset.from_list(rows), lambda: model)
    trainer = trainer_of(
        tiny, Path(tmp_path), prompts=1, n=4, reward=verifier_reward(judge), verifier=judge, tau_gate=1.0,
        max_completion_length=128,
    )  # fmt: skip
    cache = trainer.new_cache()
    cache.fill(group)
    assert len(cache) == right
    trainer.guidance = cache
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["reward"] == line["npo/pass_rate"] == float(right)
    assert line["npo/replaced_slots"] == right
    assert responses(trainer.generated[0])[-1] == ids and len(ids) > WIDTH
