"""What NPOTrainer takes for granted of TRL's GRPOTrainer, pinned by behaviour.

A failure here after an upgrade of TRL says which extension point has moved; see docs/implementation.md. Nothing of
NPOTrainer is used: each test subclasses or calls GRPOTrainer alone.
"""

import ast
import inspect
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import GRPOTrainer
from trl.data_utils import prepare_multimodal_messages
from trl.generation.vllm_generation import VLLMGeneration
from trl.models import prepare_fsdp
from trl.trainer.utils import RepeatSampler, pad, shuffle_sequence_dict, split_tensor_dict
from worlds import log_probs, token_log_probs, trainer_of, world

import npo_core.trainer

ACCUMULATED = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4}


def _parameters(name: str) -> list[str]:
    return list(inspect.signature(getattr(GRPOTrainer, name)).parameters)


def test_extension_points_have_the_parameters_that_the_overrides_pass_on():
    assert _parameters("_generate_and_score_completions") == ["self", "inputs"]
    assert _parameters("_compute_loss") == ["self", "model", "inputs"]
    assert _parameters("_calculate_rewards") == ["self", "inputs", "prompts", "completions", "completion_ids_list"]
    assert _parameters("_generate_single_turn")[:2] == ["self", "prompt_ids"]
    assert _parameters("_get_per_token_logps_and_entropies")[:2] == ["self", "model"]
    assert _parameters("log") == ["self", "logs", "start_time"]


@pytest.mark.parametrize("name", ["text", "pictures"])
def test_single_turn_returns_token_ids_per_row_and_no_log_probs(tmp_path, name):
    """Run for real: a 2-tuple of plain lists, each cut after its end of sequence."""
    returned = []

    class Spy(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            output = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            returned.append((prompt_ids, output))
            return output

    trainer = trainer_of(world(name), tmp_path, Spy, prompts=8)
    trainer.train()
    ((prompt_ids, output),) = returned
    assert isinstance(output, tuple) and len(output) == 2
    completion_ids, logprobs = output
    assert logprobs is None
    assert isinstance(completion_ids, list) and len(completion_ids) == len(prompt_ids) == 32
    assert all(isinstance(token, int) for ids in completion_ids for token in ids)
    assert all(1 <= len(ids) <= trainer.max_completion_length for ids in completion_ids)
    ended = [ids for ids in completion_ids if len(ids) < trainer.max_completion_length]
    assert ended and all(ids[-1] in trainer.eos_token_ids for ids in ended)
    assert not any(token in trainer.eos_token_ids for ids in completion_ids for token in ids[:-1])


def test_replaced_token_ids_are_decoded_rewarded_masked_and_trained_on(tmp_path):
    """The list that the single turn returns is what everything after it sees, of whatever length."""
    tiny = world("text")
    solution = tiny.solution(tiny.dataset["uid"][0])
    seen = {}

    class Replace(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            return [[7, 8] for _ in ids[:-1]] + [solution], logprobs

        def _compute_loss(self, model, inputs):
            seen.update(inputs)
            return super()._compute_loss(model, inputs)

    def reward(completions, completion_ids, **_):
        seen["texts"] = [completion[0]["content"] for completion in completions]
        seen["ids"] = completion_ids
        return [float(len(ids) > 2) for ids in completion_ids]

    trainer_of(tiny, tmp_path, Replace, prompts=1, reward=reward).train()
    assert seen["ids"] == [[7, 8]] * 3 + [solution]
    assert seen["texts"][-1] == tiny.processor.decode(solution, skip_special_tokens=True)
    assert sorted(seen["completion_mask"].sum(1).tolist()) == [2, 2, 2, len(solution)]
    assert sorted(seen["advantages"].tolist()) == pytest.approx([-0.5] * 3 + [1.5], abs=1e-3)


def test_rows_of_a_generation_batch_are_whole_groups_in_order(tmp_path):
    """Row g·n + i is rollout i of group g, with every column of the data set."""
    batches = []

    class Spy(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            batches.append(inputs)
            return super()._generate_and_score_completions(inputs)

    tiny = world("text")
    trainer_of(tiny, tmp_path, Spy, steps=4, **ACCUMULATED).train()
    assert [[row["uid"] for row in batch] for batch in batches] == [
        [uid for uid in tiny.dataset["uid"][start : start + 4] for _ in range(4)] for start in (0, 4)
    ]
    assert set(batches[0][0]) >= {"uid", "prompt", "answer"}


def test_rewards_come_per_function_and_row_before_the_advantages(tmp_path):
    """`_calculate_rewards` returns rows × functions, unweighted; its rows are those of the generation batch."""
    returned = []

    class Spy(GRPOTrainer):
        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            returned.append((inputs, completions, completion_ids_list, rewards))
            return rewards

    rewards = [lambda completions, **_: [1.0, None, 2.0, 3.0], lambda completions, **_: [5.0] * 4]
    trainer = trainer_of(world("text"), tmp_path, Spy, prompts=1, reward=rewards, reward_weights=[1.0, 10.0])
    trainer.train()
    ((inputs, completions, ids, table),) = returned
    assert len(inputs) == len(completions) == len(ids) == 4
    assert completions[0][0]["role"] == "assistant"
    assert table.nan_to_num(-1.0).tolist() == [[1.0, 5.0], [-1.0, 5.0], [2.0, 5.0], [3.0, 5.0]]
    assert trainer.reward_weights.tolist() == [1.0, 10.0]


@pytest.mark.parametrize("name", ["text", "pictures"])
def test_log_probs_come_as_a_triple_with_full_vocabulary_entropy(tmp_path, name):
    """(logps with gradient, entropies, None): at temperature 1 those of a plain log-softmax."""
    tiny = world(name)
    calls = []

    class Spy(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            calls.append([inputs])
            return super()._compute_loss(model, inputs)

        def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
            output = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
            calls[-1].append(tuple(None if part is None else part.detach().clone() for part in output))
            assert output[0].requires_grad
            return output

    trainer_of(tiny, tmp_path, Spy, prompts=2).train()
    ((batch, output),) = calls
    assert len(output) == 3 and output[2] is None
    logps, entropies, _ = output
    mask = batch["completion_mask"].bool()
    assert logps.shape == entropies.shape == mask.shape
    model = tiny.build()
    with torch.no_grad():
        scores = log_probs(model, batch)
        torch.testing.assert_close(logps[mask], token_log_probs(model, batch)[mask], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropies[mask], -(scores.exp() * scores).sum(-1)[mask], rtol=1e-4, atol=1e-5)


class _SetInsideTheForward(GRPOTrainer):
    """Sets entries of the loss inputs while the loss waits for its forward pass."""

    ratio = 1.0
    advantages = None

    def _compute_loss(self, model, inputs):
        self.inputs = inputs = dict(inputs)
        self.loss_value = super()._compute_loss(model, inputs)
        return self.loss_value

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        output = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.inputs["old_per_token_logps"] = output[0].detach() - math.log(self.ratio)
        if self.advantages is not None:
            self.inputs["advantages"] = self.advantages(self.inputs["completion_mask"])
        return output


@pytest.mark.parametrize(("ratio", "weight"), [(1.0, 1.0), (1.1, 1.1), (0.5, 0.5), (3.0, 1.28)])
def test_loss_reads_old_log_probs_and_advantages_after_its_forward(tmp_path, ratio, weight):
    """Both set inside the forward's wrapper take effect, the advantages per token; positive ones clip above only."""
    trainer = trainer_of(world("text"), tmp_path, _SetInsideTheForward, prompts=1, epsilon=0.2, epsilon_high=0.28)
    trainer.ratio = ratio
    trainer.advantages = lambda mask: torch.arange(mask.numel()).view(mask.shape).float()
    trainer.train()
    mask = trainer.inputs["completion_mask"]
    per_row = (trainer.inputs["advantages"] * mask).sum(1) / mask.sum(1)
    assert trainer.inputs["advantages"].dim() == 2
    assert trainer.loss_value.item() == pytest.approx(-weight * per_row.mean().item(), rel=1e-5)


@pytest.mark.parametrize(("layout", "kept"), [({}, False), (ACCUMULATED, True)], ids=["aligned", "misaligned"])
def test_old_log_probs_are_left_out_only_when_generation_and_steps_align(tmp_path, layout, kept):
    found = []

    class Spy(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            found.append("old_per_token_logps" in output)
            return output

    trainer_of(world("text"), tmp_path, Spy, **layout).train()
    assert found == [kept]


@pytest.mark.parametrize("name", ["text", "pictures"])
def test_extra_tensors_are_shuffled_and_split_along(tmp_path, name):
    """Per-row tensors of one and of two dimensions that the output did not have before stay with their rows."""
    seen = []

    class Tag(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            output["tag"] = output["completion_ids"].clone()
            output["flag"] = torch.arange(len(inputs))
            return output

        def _compute_loss(self, model, inputs):
            assert torch.equal(inputs["tag"], inputs["completion_ids"])
            seen.append(inputs["flag"].tolist())
            return super()._compute_loss(model, inputs)

    trainer_of(world(name), tmp_path, Tag, steps=2, **ACCUMULATED).train()
    assert [len(rows) for rows in seen] == [4] * 4
    order = list(itertools.chain(*seen))
    assert sorted(order) == list(range(16)) and order != list(range(16))


def test_shuffling_and_splitting_are_the_helpers_that_are_used():
    batch = {"row": torch.arange(6), "wide": torch.arange(12).view(6, 2), "one": torch.tensor(5), "none": None}
    shuffled = shuffle_sequence_dict(batch)
    assert torch.equal(shuffled["wide"][:, 0], 2 * shuffled["row"])
    parts = split_tensor_dict(shuffled, 3)
    assert [part["row"].tolist() for part in parts] == shuffled["row"].view(3, 2).tolist()
    assert all(part["one"] == 5 and part["none"] is None for part in parts)


@pytest.mark.parametrize("mode", ["sequence_mask", "token_truncate"])
def test_unknown_sampling_log_probs_give_a_mismatch_ratio_of_one(tmp_path, monkeypatch, mode):
    """As vLLM returns them: `None` becomes NaN, and the row's ratio exactly 1, whatever the other rows get."""
    tiny = world("text")

    def rigged(self, prompt_ids, *args, **kwargs):
        ids = [[9, 10, 11, tiny.processor.eos_token_id] for _ in prompt_ids]
        return ids, [[-0.1] * 4] * 3 + [[None] * 4]

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", rigged)
    trainer = trainer_of(tiny, tmp_path, GRPOTrainer, prompts=1)
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    trainer.vllm_importance_sampling_mode = mode
    trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max = None, 3.0
    output = trainer._generate_and_score_completions([tiny.dataset[0]] * 4)
    assert output["sampling_per_token_logps"][3].isnan().all()
    assert (output["importance_sampling_ratio"][3] == 1.0).all()
    assert (output["importance_sampling_ratio"][:3] != 1.0).all()


def test_metrics_are_averaged_without_nan_and_cleared(tmp_path):
    """A value appended to `_metrics["train"]` in a step reaches the log as the mean of that step's values."""

    class Metric(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            calls.append(len(calls))
            self._metrics["train"]["npo/probe"].append([1.0, float("nan"), 4.0, 6.0][len(calls) - 1])
            return super()._compute_loss(model, inputs)

    calls = []
    trainer = trainer_of(
        world("text"), tmp_path, Metric, steps=2, per_device_train_batch_size=8, gradient_accumulation_steps=2
    )
    trainer.train()
    assert [entry["npo/probe"] for entry in trainer.state.log_history if "npo/probe" in entry] == [1.0, 5.0]


def test_advantages_use_the_unbiased_std_and_one_ten_thousandth(tmp_path, monkeypatch):
    """The constants behind +2.475 and −0.354; groups.group_advantages follows them."""
    tiny = world("text")
    trainer = trainer_of(tiny, tmp_path, GRPOTrainer, prompts=1, n=8, reward=lambda completions, **_: [0.0] * 7 + [1.0])
    output = trainer._generate_and_score_completions([tiny.dataset[0]] * 8)
    std = math.sqrt(8 / 7 * (1 / 8) * (7 / 8))
    assert output["advantages"].tolist() == pytest.approx([-0.125 / (std + 1e-4)] * 7 + [0.875 / (std + 1e-4)])


# What is read, called or replaced beside the five hooks


def test_every_internal_that_the_code_touches_is_listed_and_pinned():
    """Names with an underscore of objects that are not ours, in the modules that work on TRL and transformers."""
    package = Path(npo_core.trainer.__file__).parents[1]
    files = [*package.glob("trainer/*.py"), *package.glob("control/*.py"), package / "stages" / "factory.py"]
    touched = {
        node.attr
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr) and ast.unparse(node.value) not in OURS
    }
    assert "_tokenize_prompts" in touched and "_load_from_checkpoint" in touched
    listed = set(re.findall(r"`(?:\w+\.)*(\w+)`", npo_core.trainer.__doc__))
    assert touched <= listed, touched - listed
    assert [name for name in listed if name.startswith("_") and name not in Path(__file__).read_text()] == []


OURS = {"self", "cls", "self._rollouts", "self._refused", "self._recording", "self._engine", "engine"}
"""Objects of the package itself."""


class _Asked:
    """A stand-in for a trainer that notes which attributes it is asked for."""

    def __init__(self, **attributes):
        self.given, self.asked = attributes, set()

    def __getattr__(self, name):
        self.asked.add(name)
        return self.given[name]


@pytest.mark.parametrize("name", ["text", "pictures"])
def test_prompts_are_tokenized_from_five_attributes_of_a_trainer_without_tools(tmp_path, name):
    """And to the token ids, without padding, that the trainer itself would make of them."""
    tiny = world(name)
    trainer = trainer_of(tiny, tmp_path, GRPOTrainer)
    rows = [tiny.dataset[place] for place in (0, 1)]
    prompts = [
        prepare_multimodal_messages(row["prompt"], images=[row["image"]]) if name == "pictures" else row["prompt"]
        for row in rows
    ]
    asked = _Asked(
        processing_class=tiny.processor, _is_vlm=name == "pictures", tools=(), environment_factories=None,
        chat_template=None, chat_template_kwargs={},
    )  # fmt: skip
    ids, _, fields = GRPOTrainer._tokenize_prompts(asked, prompts)
    own, _, own_fields = trainer._tokenize_prompts(prompts)
    assert [list(row) for row in ids] == [list(row) for row in own] and fields.keys() == own_fields.keys()
    padded = pad([torch.tensor(row) for row in ids], padding_value=0, padding_side="left")
    assert padded.shape == (2, max(map(len, ids))) and padded[0, -len(ids[0]) :].tolist() == list(ids[0])


def test_an_engine_is_made_by_names_of_its_module_and_sent_weights_when_the_step_is_another():
    """`vllm_generation.LLM` and `VLLMClient` are looked up when a trainer is made; `_last_loaded_step` says when."""
    assert {"LLM", "VLLMClient"} <= set(VLLMGeneration._init_vllm.__code__.co_names)
    assert {"sync_weights", "generate"} <= VLLMGeneration.__dict__.keys()
    for method in (GRPOTrainer.__init__, GRPOTrainer._generate_single_turn):
        assert "_last_loaded_step" in method.__code__.co_names
    assert list(inspect.signature(prepare_fsdp).parameters) == ["model", "accelerator"]


def test_a_checkpoint_is_loaded_into_the_policy_that_the_trainer_holds(tmp_path):
    tiny = world("text")
    trainer = trainer_of(tiny, tmp_path / "run", GRPOTrainer)
    other = tiny.build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.save_pretrained(tmp_path / "checkpoint-1")
    before = trainer.model
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert trainer.model is before
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), other.parameters(), strict=True))


def test_a_pass_of_the_sampler_is_its_samples_over_its_batch_and_each_pass_has_another_order(tmp_path):
    """`_get_train_sampler` with one generated batch a step: pass after pass from one generator, seeded by the run."""
    trainer = trainer_of(world("text"), tmp_path, GRPOTrainer, prompts=2, shuffle_dataset=True)
    sampler, again = trainer._get_train_sampler(), trainer._get_train_sampler(trainer.train_dataset)
    assert isinstance(sampler, RepeatSampler)
    assert sampler.num_samples // sampler.batch_size == len(trainer.train_dataset) // 2
    first, second = list(sampler), list(sampler)
    assert first != second and sorted(first) == sorted(second)
    next(iter(again))  # a pass is drawn when it begins
    assert list(again) == second


def test_the_papers_of_a_model_card_are_a_citation_and_an_id():
    """`_paper` of the class."""
    assert "citation" in GRPOTrainer._paper and GRPOTrainer._paper["citation"].strip().startswith("@")


def test_one_gpu_may_be_said_of_arguments(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    arguments._n_gpu = 7
    assert arguments.n_gpu == 7 and "n_gpu" not in arguments.to_dict()


def test_a_selection_of_rows_is_a_column_of_places():
    rows = Dataset.from_dict({"uid": ["a", "b", "c"]})
    assert rows._indices is None
    assert len({rows._fingerprint, rows.select([2, 0])._fingerprint, rows.select([0, 2])._fingerprint}) == 3
    assert rows.select([2, 0])._indices.column(0).to_pylist() == [2, 0]
    assert rows.select([2, 0]).data.column("uid").to_pylist() == ["a", "b", "c"]


def test_a_policy_knows_where_it_was_loaded_from_and_which_weights_are_not_in_its_files(tmp_path):
    world("text").build().save_pretrained(tmp_path)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert policy.config._name_or_path == str(tmp_path)
    assert type(policy)._keys_to_ignore_on_save is None, "that of the class would be changed for all policies"
