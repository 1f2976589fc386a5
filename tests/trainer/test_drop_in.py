"""NPOTrainer in the place of GRPOTrainer: its arguments, its card, its streams; and the ways past the replacement."""

import dataclasses
import itertools
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from foreign import TURNS, byte_tokenizer, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import HfArgumentParser, PrinterCallback
from trl import GRPOConfig, GRPOTrainer, TrlParser
from trl.chat_template_utils import qwen3_template
from worlds import WIDTH, Guides, TinyWorld, responses, trainer_of, world

from npo_core.guidance.verdicts import verifier_reward
from npo_core.guidance.verifiers import BoxedVerifier
from npo_core.trainer import rollouts
from npo_core.trainer.config import NPOConfig, own_arguments
from npo_core.trainer.sampling import sample_rollouts
from npo_core.trainer.trainer import NPOTrainer

QUIET = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False, "report_to": [],
    "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
}  # fmt: skip
OWN = {"tau_gate", "ratio_mode", "ratio_truncation", "ratio_gamma", "guide_behaviour", "placement", "guides_per_group"}


TURN = [{"role": "user", "content": "0 1"}]


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


@pytest.mark.parametrize("parse", [HfArgumentParser.parse_args_into_dataclasses, TrlParser.parse_args_and_config])
def test_the_parsers_of_scripts_read_npos_arguments(tmp_path, parse):
    """As TRL's own scripts do it: `parser = TrlParser((ScriptArguments, NPOConfig))`."""
    parser = (HfArgumentParser if parse is HfArgumentParser.parse_args_into_dataclasses else TrlParser)((NPOConfig,))
    line = f"--output_dir {tmp_path} --use_cpu --bf16 False --tau_gate 0.25 --ratio_mode truncated --guides_per_group 2"
    (args,) = parse(parser, line.split())
    assert (type(args), args.tau_gate, args.ratio_mode, args.guides_per_group) == (NPOConfig, 0.25, "truncated", 2)
    assert "A group is gated when its on-policy pass rate" in " ".join(parser.format_help().split())
    with pytest.raises(SystemExit):
        parse(parser, [*line.split(), "--placement", "prepend"])


def test_npos_arguments_are_read_from_a_file_of_settings(tmp_path):
    path = tmp_path / "args.yaml"
    path.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\ntau_gate: 0.25\nplacement: append\n")
    (args,) = TrlParser((NPOConfig,)).parse_args_and_config(["--config", str(path)])
    assert (args.tau_gate, args.placement) == (0.25, "append")


@pytest.mark.parametrize(
    ("guidance", "named"),
    [({"a": 1}, "a dict"), ("guides.parquet", r"a str; .* GuidanceCache\.load\(path\)"), ([], "a list")],
    ids=["dict", "path", "list"],
)
def test_what_has_no_guides_is_refused_when_it_is_given(tmp_path, guidance, named):
    with pytest.raises(TypeError, match=f"guidance is {named}"):
        trainer_of(world("text"), tmp_path, guidance=guidance)


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


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        (
            [{"uid": 7, "prompt": TURN, "answer": "1"}],
            r"A row has uid 7; .* npo_core.with_uids\(dataset\) writes numbers as text",
        ),
        ([{"prompt": TURN, "answer": "1"}], r"A row has no uid, but \['answer', 'prompt'\]"),
    ],
    ids=["a number", "none"],
)
def test_a_stream_whose_uids_name_no_guide_is_refused_at_its_first_batch(tmp_path, rows, complaint):
    """Its columns may be unknown until it is read; a guide under "7" would never be found under 7."""
    tiny = world("text")
    stream = IterableDataset.from_generator(lambda: itertools.cycle(rows))
    trainer = trainer_of(tiny, tmp_path, dataset=stream, prompts=1, guidance=Guides())
    with pytest.raises(ValueError, match=complaint):
        trainer.train()
    with pytest.raises(ValueError, match=complaint):
        sample_rollouts(tiny.build(), tiny.processor, rows, 1, BoxedVerifier(), seed=0, max_new_tokens=2)


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


class Asks:
    """An environment that makes the prompt of a row, which has none itself."""

    def reset(self, number, **row):
        return f"say {number}"


def test_environments_that_give_the_prompts_train_as_with_grpo(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setattr("trl.trainer.grpo_trainer.supports_tool_calling", lambda _: True)
    rows, weights, asked = Dataset.from_list([{"number": number} for number in range(4)]), [], []

    def noted(prompts, completions, **_):
        asked.append([prompt[-1]["content"] for prompt in prompts])
        return [float(place % 4) for place in range(len(completions))]

    for kind in (GRPOTrainer, NPOTrainer):
        tokenizer = byte_tokenizer()
        args = GRPOConfig(
            str(tmp_path), max_steps=2, num_generations=4, per_device_train_batch_size=8, max_completion_length=6,
            **QUIET,
        )  # fmt: skip
        policy = tiny_model("Qwen3", tokenizer)
        trainer = kind(policy, noted, args, rows, processing_class=tokenizer, environment_factory=Asks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert asked[:2] == asked[2:] and {text for texts in asked for text in texts} == {f"say {n}" for n in range(4)}
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


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


class NoDouble(TorchDispatchMode):
    """A device without numbers of 64 bits, such as Apple's GPUs: what would make one fails there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            if isinstance(each, torch.Tensor) and each.dtype == torch.float64:
                raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype ({func})")
        return made


@pytest.mark.parametrize("settings", [{}, {"ratio_mode": "shaped"}], ids=str)
def test_a_device_without_double_precision_trains_on_guides(tmp_path, monkeypatch, settings):
    tiny = world("text")
    guides = Guides({uid: tiny.guide(uid) for uid in tiny.dataset["uid"]})
    logs = []
    for kinds in ((), ("cpu",)):
        monkeypatch.setattr(rollouts, "WITHOUT_DOUBLE", kinds)
        trainer = trainer_of(tiny, tmp_path, NPOTrainer, guidance=guides, **settings)
        with NoDouble() if kinds else nullcontext():
            trainer.train()
        logs.append({name: value for name, value in trainer.state.log_history[0].items() if name.startswith("npo/")})
    assert logs[0]["npo/replaced_slots"] == 4 and logs[1] == pytest.approx(logs[0], rel=1e-5)
