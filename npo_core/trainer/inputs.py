"""What a policy reads and how it writes, off line as in training: prompts, padding, ends, generation settings.

Training's prompts are made by TRL, each time it samples. Those of guides, probes, V, signal and evaluation are made
here, by the very method of TRL, so that they are the same token ids whatever the template, and are padded as TRL pads:
in front, whatever side the tokenizer would pad on. The generation settings are those that TRL gives to `generate`; what
it leaves unset, `generate` takes from the policy's own `generation_config.json` in both places.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin
from trl import GRPOTrainer  # pyright: ignore[reportPrivateImportUsage] (TRL loads its names late)
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.utils import pad

from ..guidance.fingerprints import tokenizer_of
from .pictures import (
    forbidden_to_vllm,
    left_out_of_loss,
    never_drawn,
    pictures_of,
    prompt_as_seen,
    suppressed,
    with_suppressed,
)

if TYPE_CHECKING:
    from .trainer import NPOTrainer

TAKEN = ("conversation", "tools", "chat_template", "add_generation_prompt", "tokenize", "return_dict", "padding")
"""Arguments of `apply_chat_template` that TRL gives itself; as `chat_template_kwargs` they would stand there twice."""

BENDING = (
    *("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "num_beams", "no_repeat_ngram_size"),
    *("min_length", "min_new_tokens", "bad_words_ids", "sequence_bias", "encoder_repetition_penalty", "guidance_scale"),
    *("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"),
    *("exponential_decay_length_penalty", "watermarking_config"),
)
"""Settings that TRL leaves to the policy's `generation_config.json` and that change the distribution of responses."""

SHARED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Settings of a draw that transformers, vLLM and TRL's GRPOTrainer call by the same name."""


@dataclass(frozen=True)
class _Asked:
    """What `GRPOTrainer._tokenize_prompts` reads of a trainer without tools and environments."""

    processing_class: Any
    chat_template_kwargs: Mapping[str, Any]
    _is_vlm: bool
    tools: tuple = ()
    chat_template: str | None = None
    environment_factories: None = None


def prompt_tokens(
    processor, rows: Sequence[Mapping[str, Any]], chat_template_kwargs: Mapping[str, Any] | None = None
) -> tuple[list[list[int]], dict[str, Any]]:
    """Token ids of the rows' prompts, without padding, and what the processor makes beside them, as in training.

    Chat messages go through the chat template, `image` or `images` in the first user message; a prompt that is a plain
    string is tokenised as it is.

    Args:
        processor: Processor or tokenizer.
        rows: Data set rows with prompt and, for visual tasks, image or images.
        chat_template_kwargs: What TRL's argument of this name is in training, such as `{"enable_thinking": False}`.

    Raises:
        ValueError: Plain strings among chat messages, or with pictures; a template argument that TRL gives itself.
    """
    template = dict(chat_template_kwargs or {})
    if given := sorted(set(template) & set(TAKEN)):
        raise ValueError(
            f"chat_template_kwargs holds {', '.join(given)}, which the trainer gives to the chat template itself; "
            "leave it out (a chat template of your own is set as processor.chat_template)."
        )
    plain, pictures = [isinstance(row["prompt"], str) for row in rows], [pictures_of(row) for row in rows]
    if any(plain) and (not all(plain) or any(pictures)):
        raise ValueError(
            "A prompt is a plain string, and others are chat messages or have pictures; write every prompt as chat "
            'messages: [{"role": "user", "content": …}].'
        )
    prompts = [prompt_as_seen(row["prompt"]) for row in rows]
    if any(pictures):
        prompts = [prepare_multimodal_messages(*each) for each in zip(prompts, pictures, strict=True)]
    asked = _Asked(processor, template, isinstance(processor, ProcessorMixin))
    ids, _, fields = GRPOTrainer._tokenize_prompts(cast(GRPOTrainer, asked), prompts)
    return [list(row) for row in ids], dict(fields)


def encode_prompts(
    processor,
    rows: Sequence[Mapping[str, Any]],
    chat_template_kwargs: Mapping[str, Any] | None = None,
    after: Sequence[Sequence[int]] = (),
) -> dict[str, torch.Tensor]:
    """Model inputs of data set rows as TRL gives them to `generate`: `prompt_tokens`, padded in front.

    Arguments and errors are those of `prompt_tokens`; `after` holds token ids of text that follows each prompt, none
    if it is empty. Everything that is there per token has shape (rows, longest).
    """
    ids, fields = prompt_tokens(processor, rows, chat_template_kwargs)
    if after:
        ids = [[*row, *more] for row, more in zip(ids, after, strict=True)]
        fields = {name: _longer(value, after) for name, value in fields.items()}
    inputs = {
        "input_ids": _padded(ids, padding_token(processor)),
        "attention_mask": _padded([[1] * len(row) for row in ids], 0),
    }
    for name, value in fields.items():
        if isinstance(value, list) and isinstance(value[0], list):
            inputs[name] = _padded(value, 0)
        else:
            inputs[name] = value if isinstance(value, torch.Tensor) else torch.tensor(np.array(value))
    return inputs


def _longer(value: Any, after: Sequence[Sequence[int]]) -> Any:
    """What is there per token, with the 0 of plain text for each token more; anything else as it is."""
    if isinstance(value, list) and isinstance(value[0], list):
        return [[*row, *[0] * len(more)] for row, more in zip(value, after, strict=True)]
    return value


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    return pad([torch.tensor(row) for row in rows], padding_value=value, padding_side="left")


def padding_token(processor) -> int:
    """Token id that pads: the tokenizer's own or, as TRL has it, the end of sequence of one that has none.

    Raises:
        ValueError: The tokenizer has neither.
    """
    tokenizer = tokenizer_of(processor)
    token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if token is None:
        raise ValueError(
            "The tokenizer has neither a padding nor an end-of-sequence token; set tokenizer.eos_token to the token "
            "that ends a response."
        )
    return token


def end_tokens(model: PreTrainedModel, processor) -> list[int]:
    """Token ids that end a response, as TRL has them: the tokenizer's, and all that the model's generation names."""
    ids = model.generation_config.eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    own = tokenizer_of(processor).eos_token_id
    return list(dict.fromkeys(ids if own in ids else [own, *ids]))


def inherited(model: PreTrainedModel) -> dict[str, Any]:
    """Settings of the policy's own `generation_config.json` that rollouts obey, in training and off line alike."""
    plain = {"num_beams": 1, "no_repeat_ngram_size": 0, "min_length": 0, "typical_p": 1.0, "guidance_scale": 1}
    plain |= {"epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "encoder_repetition_penalty": 1.0}
    found = {name: getattr(model.generation_config, name) for name in BENDING}
    return {name: value for name, value in found.items() if value is not None and value != plain.get(name)}


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn; the defaults are those of TRL's GRPOConfig.

    Attributes:
        temperature: The logits are divided by it.
        top_p: Nucleus; 1 switches it off.
        top_k: Number of likeliest tokens; 0 switches it off.
        min_p: Least probability as a share of the likeliest token's; None as the policy's `generation_config.json`.
        repetition_penalty: 1 switches it off.
        generation_kwargs: Further settings of transformers' `GenerationConfig`, as TRL's argument of this name.
        unsampled: Tokens that log-probs leave out, those that the loss of training leaves out; None for all that are
            never drawn by these settings, as `mask_unsampled` has it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)
    unsampled: tuple[int, ...] | None = None

    @property
    def of_engine(self) -> dict[str, Any]:
        """Settings that vLLM knows by the same names."""
        return {name: getattr(self, name) for name in SHARED}

    @classmethod
    def of(cls, trainer: "NPOTrainer") -> "Sampling":
        """That of a trainer's rollouts; what it gives to vLLM beside these settings, vLLM keeps.

        What vLLM never draws, the policies that are sampled without it must not draw either.
        """
        given = cast(Mapping[str, Any] | None, trainer.args.generation_kwargs)  # TRL has read a text as JSON
        further = given or {}
        if trainer.use_vllm:
            further = {"suppress_tokens": never} if (never := forbidden_to_vllm(given)) else {}
        shared = {name: getattr(trainer, name) for name in SHARED}
        return cls(**shared, generation_kwargs=further, unsampled=tuple(left_out_of_loss(trainer)))

    def settings(self, model: PreTrainedModel, processor, max_new_tokens: int) -> GenerationConfig:
        """What `model.generate` is given, as TRL would give it.

        Args:
            model: Policy.
            processor: Its processor or tokenizer.
            max_new_tokens: Longest response in tokens.
        """
        given: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "do_sample": True,
            "pad_token_id": padding_token(processor),
            "bos_token_id": tokenizer_of(processor).bos_token_id,
            "eos_token_id": end_tokens(model, processor),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
        }
        given |= self.generation_kwargs
        if never := suppressed(model, processor):
            given["suppress_tokens"] = with_suppressed(given.get("suppress_tokens"), never)
        return GenerationConfig(**given, disable_compile=True)

    def left_out(self, model: PreTrainedModel, processor) -> list[int]:
        """Tokens that log-probs of these responses leave out; arguments are those of `settings`."""
        if self.unsampled is not None:
            return list(self.unsampled)
        return never_drawn(self.settings(model, processor, max_new_tokens=1), model)
