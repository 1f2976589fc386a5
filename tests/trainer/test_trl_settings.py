"""Every setting of the installed GRPOConfig: what it does to a guided step is what it does to GRPOTrainer's.

A guided step with ratio mode current is GRPO on the responses that stand in its groups. So GRPOTrainer is given these
responses, the guides among them, and NPOTrainer those that the guides are to replace: the weights must be the same,
bit for bit, whatever the setting.
"""

import dataclasses
from functools import cache

import pytest
import torch
import transformers.trainer
from foreign import byte_tokenizer, tiny_model
from torch._dynamo.utils import counters
from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer
from worlds import VERIFIER, WIDTH, Guides, SpyTrainer, TinyWorld, trainer_of, world

from npo_core.guidance.verdicts import verifier_reward
from npo_core.trainer.inputs import prompt_tokens

LAYOUT = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_iterations": 2}
"""Two updates on each generated batch, so that ratios are not 1 and clips bind."""

LOSS = {
    "beta": {"beta": 0.1},
    "beta, KL without correction": {"beta": 0.1, "use_bias_correction_kl": False},
    "beta, reference that follows": {
        "beta": 0.1, "sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 1,
    },
    "epsilon": {"epsilon": 0.01},
    "epsilon_high": {"epsilon_high": 0.001},
    "delta": {"delta": 1.001},
    "grpo by sequence": {"importance_sampling_level": "sequence"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.05},
    "sapo": {"loss_type": "sapo", "sapo_temperature_pos": 1.5, "sapo_temperature_neg": 2.0},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "luspo by token": {"loss_type": "luspo"},
    "vespo": {
        "loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_pos": 2.0, "vespo_k_neg": 2.0, "vespo_lambda_neg": 1.0,
    },
    "rewards over the batch": {"scale_rewards": "batch"},
    "rewards as they are": {"scale_rewards": False},
    "weights of rewards": {"reward_weights": [1.0, 0.3]},
    "rewards normalised one by one": {"multi_objective_aggregation": "normalize_then_sum"},
    "cut-off responses left out": {"mask_truncated_completions": True},
    "high entropies only": {"top_entropy_quantile": 0.3},
    "entropy bonus": {"entropy_coef": 0.5},
    "entropy bonus that adapts": {
        "entropy_coef": 0.1, "use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef_delta": 0.2,
        "entropy_coef_min": 0.05, "entropy_coef_max": 0.25,
    },
    "entropy bonus on high entropies": {"entropy_coef": 0.5, "top_entropy_quantile": 0.3},
    "far sequences left out": {"off_policy_mask_threshold": 1e-4},
    "temperature": {"temperature": 0.7},
    "one update": {"num_iterations": 1},
    "four passes": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4},
    "batches by their size": {"generation_batch_size": 32},
    "groups of eight": {"num_generations": 8},
    "padded to a multiple": {"pad_to_multiple_of": 16},
    "longer responses": {"max_completion_length": WIDTH + 5, "loss_type": "dr_grpo"},
    "shuffled": {"shuffle_dataset": True},
    "head in 32 bits": {"cast_lm_head_to_fp32": True, "bf16": True},
    "products in 16 bits": {"bf16": True},
    "without dropout": {"disable_dropout": True},
    "layers computed twice": {"gradient_checkpointing": True},
    "noise in the embeddings": {"neftune_noise_alpha": 5.0},
    "smoothed labels": {"label_smoothing_factor": 0.1},
}  # fmt: skip
"""Settings of the loss, of advantages and of batches."""

OF_RATIOS = (
    "beta", "beta, KL without correction", "epsilon", "epsilon_high", "delta", "grpo by sequence", "dapo", "cispo",
    "sapo", "luspo", "vespo", "far sequences left out", "high entropies only", "temperature", "four passes",
    "padded to a multiple",
)  # fmt: skip
"""Settings that a ratio of the guide's own log-probs may meet in another way than one of 1."""

SAMPLED = {
    "temperature": {"temperature": 0.7},
    "nucleus": {"top_p": 0.5},
    "likeliest tokens": {"top_k": 3},
    "least probability": {"min_p": 0.2},
    "repetition": {"repetition_penalty": 1.5},
    "further settings": {"generation_kwargs": {"typical_p": 0.5, "no_repeat_ngram_size": 2}},
    "template": {"chat_template_kwargs": {"enable_thinking": False}},
    "cache": {"cache_implementation": "static"},
    "continuous batches": {
        "use_transformers_continuous_batching": True,
        "transformers_continuous_batching_config": {"num_blocks": 64, "block_size": 16, "max_batch_tokens": 256},
    },
}  # fmt: skip
"""Settings of sampling, of a policy that samples itself."""

IDLE = ("without dropout", "layers computed twice", "smoothed labels", "template", "cache")
"""Those that change nothing of a policy so small, or of GRPO; prompts are compared in the tests of inputs."""

ELSEWHERE = {
    "learning_rate": "of the optimiser alone",
    "model_init_kwargs": "of a policy that is given by its name",
    "trust_remote_code": "of a policy that is given by its name",
    "router_aux_loss_coef": "test_the_loss_of_a_router_is_added_as_grpo_adds_it",
    "ds3_gather_for_generation": "of DeepSpeed's third stage, which is not installed here",
    "num_generations_eval": "nothing is guided in evaluation: tests of the trainer",
    "max_tool_calling_iterations": "tools are refused with guidance: tests of the drop-in",
    **dict.fromkeys(
        (
            "use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex",
            "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port",
            "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size",
        ),
        "where vLLM is and how it runs: tests of vLLM",
    ),
    **dict.fromkeys(
        (
            "vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max",
            "vllm_importance_sampling_clip_min", "vllm_importance_sampling_cap",
        ),
        "a guide's ratio of sampler and policy is 1 in all modes: tests of TRL's contract",
    ),
    **dict.fromkeys(
        (
            "log_completions", "log_multimodal", "num_completions_to_print", "log_unique_prompts",
            "log_completions_hub_repo",
        ),
        "of what is printed",
    ),
    "use_transformers_paged": "another name of use_transformers_continuous_batching",
}  # fmt: skip
"""Settings that are compared elsewhere, or that cannot be, and why."""


def test_every_setting_of_trl_has_been_looked_at():
    """A release of TRL that brings one more fails here: does it act on guided groups as on all others?"""
    own = {field.name for field in dataclasses.fields(GRPOConfig)}
    own -= {field.name for field in dataclasses.fields(TrainingArguments)} - {"learning_rate"}
    compared = {name for settings in (*LOSS.values(), *SAMPLED.values()) for name in settings}
    assert own - compared == ELSEWHERE.keys()


def dense(completion_ids, **_) -> list[float]:
    """Differs between responses that are all wrong."""
    return [sum(token % 3 == 0 for token in ids) / len(ids) for ids in completion_ids]


@cache
def by_prompt(tiny: TinyWorld) -> dict[tuple[int, ...], str]:
    ids, _ = prompt_tokens(tiny.processor, list(tiny.dataset))
    return dict(zip(map(tuple, ids), tiny.dataset["uid"], strict=True))


def _solved(tiny: TinyWorld, uid: str) -> bool:
    return sorted(tiny.dataset["uid"]).index(uid) % 3 == 1


def has_guide(tiny: TinyWorld, guides: Guides, uid: str, slot: int, n: int) -> bool:
    """Whether a place is a guide's: the last one of a group that is gated and has one."""
    return slot == n - 1 and uid in guides and not _solved(tiny, uid)


def scripted(tiny: TinyWorld, guides: Guides):
    """What stands in for sampling: by prompt, right in some places, cut off in one, and for TRL with the guide."""

    def write(uid: str, slot: int, n: int, of_trl: bool) -> list[int]:
        if of_trl and has_guide(tiny, guides, uid, slot, n):
            return list(guides[uid].token_ids)
        if _solved(tiny, uid) and slot < n - 1:  # by 3 of 4, or 7 of 8
            return tiny.solution(uid)
        wrong = tiny.mistake(uid)
        return (wrong * WIDTH)[:WIDTH] if slot == 1 else [wrong[slot % (len(wrong) - 1)], *wrong]

    def single_turn(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs):
        of_trl = not isinstance(self, SpyTrainer)
        uids = [by_prompt(tiny)[tuple(ids)] for ids in prompt_ids]
        return [write(uid, row % num_generations, num_generations, of_trl) for row, uid in enumerate(uids)], None

    return single_turn


def ends(tiny: TinyWorld, folder, kind, guides, settings, steps: int = 2) -> dict[str, torch.Tensor]:
    """Weights after a few steps."""
    trainer = trainer_of(
        tiny, folder, kind, steps=steps, reward=[verifier_reward(VERIFIER), dense], guidance=guides,
        **{**LAYOUT, **settings},
    )  # fmt: skip
    trainer.train()
    if kind is SpyTrainer and guides:
        assert any(batch["is_guide"].any() for batch in trainer.generated)
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def different(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> TinyWorld:
    """The world of text, its policy in a folder: TRL reads the reference from there."""
    tiny, folder = world("text"), tmp_path_factory.mktemp("policy")
    tiny.build().save_pretrained(folder)
    build = type(tiny.build()).from_pretrained
    return TinyWorld(tiny.processor, tiny.dataset, lambda: build(folder))


@pytest.fixture(scope="module")
def guided(saved, tmp_path_factory):
    """Weights of GRPOTrainer on some responses, and of a guided trainer that comes to the same; by settings."""
    guides = Guides({uid: saved.guide(uid) for uid in sorted(saved.dataset["uid"])[::2]})

    @cache
    def of(name: str | None):
        settings, folder = {} if name is None else LOSS[name], tmp_path_factory.mktemp("run")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GRPOTrainer, "_generate_single_turn", scripted(saved, guides))
            return [ends(saved, folder, kind, guides, settings) for kind in (GRPOTrainer, SpyTrainer)]

    return of


@pytest.mark.parametrize("name", LOSS)
def test_a_guided_step_is_grpos_on_the_same_responses_bit_for_bit(guided, name):
    trl, ours = guided(name)
    assert not different(trl, ours)
    assert different(trl, guided(None)[0]) or name in IDLE, "a setting that changes nothing is not tested"


@pytest.mark.parametrize("name", OF_RATIOS)
def test_an_exact_ratio_is_grpos_with_the_guides_log_probs_bit_for_bit(saved, guided, tmp_path, monkeypatch, name):
    """GRPOTrainer that is told another sampler of these rows."""
    heat = LOSS[name].get("temperature", 1.0)
    guides = Guides({uid: saved.guide(uid, temperature=heat) for uid in sorted(saved.dataset["uid"])[::2]})

    class Told(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output, n = super()._generate_and_score_completions(inputs), self.num_generations
            for place, row in enumerate(inputs):
                if has_guide(saved, guides, row["uid"], place % n, n):
                    logps = torch.tensor(guides[row["uid"]].logps)
                    output["old_per_token_logps"][place, : len(logps)] = logps
            return output

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", scripted(saved, guides))
    told, ours = (
        ends(saved, tmp_path, kind, guides, {**LOSS[name], **mode})
        for kind, mode in ((Told, {}), (SpyTrainer, {"ratio_mode": "exact"}))
    )
    assert not different(told, ours) and different(told, guided(name)[0])


@pytest.mark.parametrize("name", SAMPLED)
def test_sampling_without_guides_is_grpos_bit_for_bit(tmp_path, name):
    tiny = world("text")
    plain, *found = [
        ends(tiny, tmp_path, kind, None, settings, 1)
        for kind, settings in ((GRPOTrainer, {}), (GRPOTrainer, SAMPLED[name]), (SpyTrainer, SAMPLED[name]))
    ]
    assert not different(*found)
    assert different(plain, found[0]) or name in IDLE


def test_the_loss_of_a_router_is_added_as_grpo_adds_it(tmp_path, monkeypatch):
    tiny = world("text")
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    mixture = TinyWorld(tiny.processor, tiny.dataset, lambda: tiny_model("Qwen3Moe", tiny.processor, **experts))
    guides = Guides({uid: tiny.guide(uid) for uid in sorted(tiny.dataset["uid"])[::2]})
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", scripted(mixture, guides))
    plain, *found = [
        ends(mixture, tmp_path, kind, guides, {"router_aux_loss_coef": coefficient})
        for kind, coefficient in ((GRPOTrainer, 0.0), (GRPOTrainer, 0.5), (SpyTrainer, 0.5))
    ]
    assert not different(*found) and different(plain, found[0])


class Scores(SpyTrainer):
    """Keeps the log-probs of each loss call."""

    scores = ()

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        found = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        self.scores = (*self.scores, found[0].detach())
        return found


OTHER = 7
NEVER = {"generation_kwargs": {"suppress_tokens": [OTHER]}}


@pytest.mark.filterwarnings("ignore:`use_liger_kernel=True` is deprecated")
def test_ligers_kernels_are_those_of_layers_and_leave_the_loss_to_the_trainer(tmp_path, monkeypatch):
    """Its fused loss computes logits by itself, and would know nothing of what is left out: TRL does not take it."""
    given, logps = [], []
    monkeypatch.setattr(transformers.trainer, "apply_liger_kernel", lambda model, kernels: given.append(kernels))
    for use in (False, True):
        tiny = world("text")
        trainer = trainer_of(tiny, tmp_path, Scores, prompts=2, reward=dense, use_liger_kernel=use, **NEVER)
        trainer.train()
        logps.append(trainer.scores[0])
    assert given == [{"fused_linear_cross_entropy": False}]
    assert torch.equal(*logps)
    fused = {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}}
    with pytest.raises(ValueError, match="fused_linear_cross_entropy"):
        trainer_of(tiny, tmp_path, Scores, **fused)


@pytest.mark.slow
def test_a_compiled_policy_leaves_out_what_is_never_drawn(tmp_path):
    """The bias of the head that leaves it out is there for a pass, and a compiled pass is made once."""
    scores = []
    counters.clear()
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = trainer_of(world("text"), tmp_path, Scores, prompts=2, reward=dense, steps=2, **compiled, **NEVER)
        trainer.train()
        scores.append(trainer.scores)
    assert counters["stats"]["unique_graphs"]
    for one, other in zip(*scores, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("masked", [True, False])
def test_logits_under_a_cap_leave_out_what_is_never_drawn(tmp_path, masked):
    """Gemma's are at least -30, so a token that is left out keeps a chance of e^-30 at most, in loss and scores."""
    tokenizer = byte_tokenizer()
    capped = tiny_model("Gemma2", tokenizer, final_logit_softcapping=30.0, initializer_range=0.1)
    tiny = TinyWorld(tokenizer, world("text").dataset, lambda: capped)
    trainer = trainer_of(tiny, tmp_path, Scores, prompts=1, reward=dense, mask_unsampled=masked, learning_rate=0.0,
                         max_completion_length=4, **NEVER)  # fmt: skip
    trainer.train()
    (_, batch), (logps, *_) = trainer.loss_calls[0], trainer.scores
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    seen = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=seen).logits[:, -batch["completion_ids"].shape[1] - 1 : -1]
    if masked:
        logits[..., OTHER] = -torch.inf
    expected = logits.log_softmax(-1).gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    mask = batch["completion_mask"].bool()
    torch.testing.assert_close(logps[mask], expected[mask], atol=2e-5, rtol=0)
