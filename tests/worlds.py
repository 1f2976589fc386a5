"""Small worlds for the engine's tests: random tiny policies, prompts with exact solutions, rigged rollouts, a spy."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProcessorMixin,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from npo_core.guidance.fingerprints import tokenizer_of
from npo_core.guidance.trajectories import Trajectory
from npo_core.guidance.verdicts import verifier_reward
from npo_core.guidance.verifiers import BoxedVerifier
from npo_core.trainer.config import NPOConfig
from npo_core.trainer.trainer import NPOTrainer
from npo_core.world.policies import CHAT_TEMPLATE, TinyPolicySpec, build_processor, build_tiny_policy, build_tokenizer
from npo_core.world.tasks import make_dataset, parse_uid, sample_problems, vocabulary, write_response

VERIFIER = BoxedVerifier()
WIDTH = 12
"""Room for the longest response, which is a path of six states, the box and its end, and some words more."""

Write = Callable[[Mapping[str, Any], int], Sequence[int]]


@dataclass(frozen=True)
class TinyWorld:
    """A policy that can be built again and again, its processor, and a data set."""

    processor: Any
    dataset: Dataset
    build: Callable[[], PreTrainedModel]

    def solution(self, uid: str) -> list[int]:
        """Token ids of the exact solution, with end of sequence."""
        problem = parse_uid(uid)
        return self.encode(write_response(problem, problem.states()))

    def mistake(self, uid: str) -> list[int]:
        """Token ids of the exact solution with a wrong last state."""
        problem = parse_uid(uid)
        *states, last = problem.states()
        return self.encode(write_response(problem, [*states, (last + 1) % problem.family.states]))

    def encode(self, text: str) -> list[int]:
        tokenizer = tokenizer_of(self.processor)
        return [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]

    def guide(self, uid: str, **changes: Any) -> Trajectory:
        """The exact solution as a guide; log-probs that differ by token, from far above a random policy's to below.

        They fall by 0.7 a token, so that a response of six tokens has ratios on both sides of every bound, which
        tests/trainer/test_trainer.py checks where it compares gradients.
        """
        ids = tuple(changes.pop("token_ids", self.solution(uid)))
        logps = tuple(-0.5 - 0.7 * index for index in range(len(ids)))
        guide = Trajectory(uid=uid, token_ids=ids, logps=logps, source_step=30, correct=True, text="for people")
        return replace(guide, **changes)


@cache
def world(name: str) -> TinyWorld:
    """`"text"`: a Qwen3 with a tokenizer. `"pictures"`: a Qwen3-VL with its processor. `"words"`: the same Qwen3-VL on
    prompts without pictures."""
    problems = sample_problems("train", 12, 0, ["mathvista", "mmstar"])
    dataset = make_dataset(problems, text_only=name != "pictures")
    if name == "text":
        tokenizer = build_tokenizer(vocabulary())
        tokenizer.chat_template = CHAT_TEMPLATE
        return TinyWorld(tokenizer, dataset, lambda: qwen3(tokenizer, initializer_range=0.2))
    processor = build_processor(vocabulary())
    spec = TinyPolicySpec(hidden=32, layers=1, heads=1, vision_hidden=32, vision_depth=1)
    return TinyWorld(processor, dataset, lambda: build_tiny_policy(processor, spec, 0))


def qwen3(tokenizer, width: int = 32, **changes: Any) -> Qwen3ForCausalLM:
    """A random Qwen3 of one layer for the words of a tokenizer, the same one at every call."""
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": width // 2,
        "max_position_embeddings": 128,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen3ForCausalLM(Qwen3Config(**settings | changes))


class Guides(dict):
    """A source that hands out whatever it holds, unchecked: `{uid: Trajectory}`."""

    def guide(self, uid: str, policy_step: int) -> Trajectory | None:
        return self.get(uid)


class SpyTrainer(NPOTrainer):
    """NPOTrainer that keeps what the generation returned, what each loss call got, and the weights it ran with."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.generated: list[dict[str, Any]] = []
        self.loss_calls: list[tuple[dict[str, torch.Tensor], dict[str, Any]]] = []

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.generated.append({"uids": [row["uid"] for row in inputs], **_copied(output)})
        return output

    def _compute_loss(self, model, inputs):
        self.loss_calls.append((_copied(model.state_dict()), _copied(inputs)))
        return super()._compute_loss(model, inputs)


class Gradients(TrainerCallback):
    """Keeps the gradient of every optimiser step, by parameter name."""

    def __init__(self):
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in values.items()}


def trainer_of(
    tiny: TinyWorld,
    folder: Path,
    kind: type[GRPOTrainer] = SpyTrainer,
    *,
    prompts: int = 4,
    steps: int = 1,
    n: int = 4,
    reward: Callable | None = None,
    eval_dataset: Dataset | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    guidance: Any = None,
    verifier: Any = VERIFIER,
    dataset: Dataset | None = None,
    **arguments: Any,
) -> GRPOTrainer:
    """A quiet trainer of a fresh policy; `prompts` × `n` rollouts fill one micro-batch unless `arguments` say else."""
    settings = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": prompts * n,
        "num_generations": n,
        "max_completion_length": WIDTH,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "loss_type": "grpo",
        "beta": 0.0,
        "shuffle_dataset": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "report_to": [],
        "disable_tqdm": True,
        **arguments,
    }
    guided = issubclass(kind, NPOTrainer)
    if not guided and isinstance(tiny.processor, ProcessorMixin):  # TRL does this itself from 1.16 on
        settings.setdefault("generation_kwargs", {"suppress_tokens": [tiny.processor.image_token_id]})
    extra = {"guidance": guidance, "verifier": verifier} if guided else {}
    trainer = kind(
        model=tiny.build(),
        reward_funcs=verifier_reward(VERIFIER) if reward is None else reward,
        args=(NPOConfig if guided else GRPOConfig)(**settings),
        train_dataset=tiny.dataset if dataset is None else dataset,
        eval_dataset=eval_dataset,
        processing_class=tiny.processor,
        callbacks=list(callbacks),
        **extra,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def rig(monkeypatch, write: Write) -> None:
    """Replace sampling: rollout `slot` of a row is `write(row, slot)`. Everything after it is TRL's and NPO's own."""

    def rigged(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs):
        rows = self._rollouts.rows
        assert len(rows) == len(prompt_ids)
        return [list(write(row, index % num_generations)) for index, row in enumerate(rows)], None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", rigged)


def correct_in(tiny: TinyWorld, slots: Mapping[str, Sequence[int]]) -> Write:
    """Rollouts for `rig`: right in the given slots of each uid, wrong elsewhere."""

    def write(row: Mapping[str, Any], slot: int) -> list[int]:
        uid = row["uid"]
        return tiny.solution(uid) if slot in slots.get(uid, ()) else tiny.mistake(uid)

    return write


def responses(batch: Mapping[str, Any]) -> list[list[int]]:
    """Token ids under the completion mask, a list per row."""
    rows = zip(batch["completion_ids"], batch["completion_mask"].bool(), strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


def log_probs(model: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """Full log-softmax of a plain forward pass at the completion tokens, `[rows, tokens, vocabulary]`."""
    extra = {name: batch[name] for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids") if name in batch}
    width = batch["completion_ids"].shape[1]
    logits = model(
        input_ids=torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        **extra,
    ).logits
    return logits[:, -width - 1 : -1].log_softmax(dim=-1)


def token_log_probs(model: torch.nn.Module, batch: Mapping[str, Any], never: Sequence[int] = ()) -> torch.Tensor:
    """Log-probability of each completion token, `[rows, tokens]`, differentiable; tokens of `never` have none of it."""
    logs = log_probs(model, batch)
    if never:
        logs = logs.index_fill(-1, torch.tensor(never), -torch.inf).log_softmax(dim=-1)
    return logs.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)


def uniform_world(rows: Sequence[Mapping[str, Any]]) -> TinyWorld:
    """A language model with a zero output layer: each of its 12 tokens has probability 1/12 after any prompt."""
    tokenizer = build_tokenizer(["a", "b"])
    tokenizer.chat_template = CHAT_TEMPLATE

    def build():
        model = qwen3(tokenizer, 16)
        nn.init.zeros_(model.lm_head.weight)
        return model

    prompt = [{"role": "user", "content": "a b"}]
    return TinyWorld(tokenizer, Dataset.from_list([{"prompt": prompt, "answer": "a", **row} for row in rows]), build)


def prompt_logps(tiny: TinyWorld, model, response: tuple[int, ...] = ()) -> torch.Tensor:
    """Log-softmax after the prompt and after each token of the response: `[1 + len(response), vocabulary]`."""
    text = tiny.processor.apply_chat_template(tiny.dataset[0]["prompt"], tokenize=False, add_generation_prompt=True)
    ids = tiny.processor(text)["input_ids"]
    logits = model(input_ids=torch.tensor([[*ids, *response]])).logits[0]
    return logits[len(ids) - 1 :].log_softmax(-1)


class TabularPolicy(nn.Module):
    """Next token given the last one only: a table of logits. Answers TRL's fused call, and that before 1.16."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(
        self, input_ids, attention_mask=None, labels=None, fused_lm_head=False, logits_to_keep=0, use_cache=False
    ):
        scores = self.logits[input_ids[:, :-1]].log_softmax(-1)
        chosen = scores.gather(-1, input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        return SimpleNamespace(
            log_probs=chosen,
            entropy=-(scores.exp() * scores).sum(-1),
            logits=self.logits[input_ids[:, -logits_to_keep:]],
        )

    def sequence_logps(self, sequences: torch.Tensor) -> torch.Tensor:
        before = torch.cat([torch.zeros_like(sequences[:, :1]), sequences[:, :-1]], dim=1)
        return self.logits.log_softmax(-1)[before, sequences]
