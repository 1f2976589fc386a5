"""Pretrained policies: what one must have, its size, and LoRA adapters for it.

Sizes come from the configuration alone: the model is laid out without memory for its weights (device `meta`), so a plan
for an 8B policy prints on a laptop. For Qwen3-VL the dense configurations are known here, and no download is needed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3VLConfig,
)

from ..guidance.fingerprints import tokenizer_of
from ..runs.config import RunConfig
from . import smollm
from .policies import policy_folder, quiet_transformers

_SMALL_TOWER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
_LARGE_TOWER = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}

QWEN3_VL: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "2B": (
        {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
        _SMALL_TOWER,
    ),
    "4B": (
        {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
        _SMALL_TOWER,
    ),
    "8B": (
        {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
        _LARGE_TOWER,
    ),
}
"""Language model and vision tower of the dense Qwen3-VL by size, from their public configuration files."""


@dataclass(frozen=True)
class PolicySize:
    """How large a policy is, in parameters.

    Attributes:
        total: All parameters; tied ones count once.
        trained: Those that an optimiser step changes: all, those outside of a frozen vision tower, or the adapters'.
        layers: Layers of the language model.
        hidden: Width of the language model.
        cached: Key and value entries that a token leaves in the cache of all layers.
        vocabulary: Size of the vocabulary.
    """

    total: int
    trained: int
    layers: int
    hidden: int
    cached: int
    vocabulary: int


def check_policy(folder: Path, processor: Any) -> None:
    """Refuse a policy that cannot be trained here, before anything is loaded.

    Raises:
        ValueError: An architecture that transformers cannot generate with, weights in another form than safetensors,
            or a processor without end-of-sequence token, or without chat template that writes a prompt.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if type(config) not in {**AutoModelForImageTextToText._model_mapping, **AutoModelForCausalLM._model_mapping}:
        raise ValueError(
            f"{folder} holds a {config.model_type!r} model, with which transformers generates no text; "
            "give a causal language model or an image-text-to-text model such as Qwen3-VL."
        )
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds no weights in safetensors; pickled weights are not read. Convert them first.")
    if not getattr(processor, "chat_template", None) and not tokenizer_of(processor).chat_template:
        raise ValueError(f"The processor in {folder} has no chat template, so prompts cannot be written; add one.")
    if tokenizer_of(processor).eos_token_id is None:
        raise ValueError(f"The tokenizer in {folder} has no end-of-sequence token; a response could not end.")
    check_template(folder, processor)


def check_template(folder: str | Path, processor: Any) -> None:
    """Refuse a chat template that writes no prompt, before anything is loaded.

    Templates are programs. transformers runs them in Jinja's sandbox, where they reach no file, module or hidden
    attribute: one that tries to shows here, and not in the first step.

    Raises:
        ValueError: The template fails on one user message.
    """
    message = {"role": "user", "content": "?"}
    try:
        processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, OverflowError) as error:
        raise ValueError(f"The chat template in {folder} cannot write a prompt: {error}") from error


def adapter_settings(config: RunConfig) -> LoraConfig | None:
    """LoRA adapters of a configuration, on the language model only; None trains the weights themselves."""
    if not config.lora_rank:
        return None
    names = "|".join(re.escape(name) for name in config.lora_modules)
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=rf"(?!.*visual).*\.({names})",
        task_type="CAUSAL_LM",
    )


def policy_config(name: str) -> PretrainedConfig:
    """Configuration of a policy: of a folder, of a hub model on disk, or of one whose size its name tells.

    Raises:
        FileNotFoundError: Neither on disk nor a Qwen3-VL of a known size.
    """
    if name == smollm.NAME:
        return smollm.smollm_config()
    known = re.search(r"Qwen3-VL-(\w+?)-", name)
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if known and known.group(1) in QWEN3_VL:
        return _qwen3_vl(known.group(1))
    return AutoConfig.from_pretrained(policy_folder(name), trust_remote_code=False)


def _qwen3_vl(size: str) -> Qwen3VLConfig:
    text, vision = QWEN3_VL[size]
    tied = size != "8B"
    return Qwen3VLConfig(
        text_config={
            **text,
            "vocab_size": 151936,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": tied,
        },
        vision_config={
            **vision,
            "num_heads": 16,
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "num_position_embeddings": 2304,
            "out_hidden_size": text["hidden_size"],
        },
        tie_word_embeddings=tied,
    )


def laid_out(settings: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration on device `meta`: every shape, no weights."""
    auto = AutoModelForImageTextToText if hasattr(settings, "vision_config") else AutoModelForCausalLM
    with torch.device("meta"), quiet_transformers():
        model = auto.from_config(settings)
    model.tie_weights()
    return model


def policy_size(config: RunConfig, settings: PretrainedConfig) -> PolicySize:
    """Size of a policy under a run's settings (adapters, frozen vision tower)."""
    model = laid_out(settings)
    text = settings.get_text_config()
    total = trained = model.num_parameters()
    tower = getattr(model.base_model, "visual", None)
    if tower is not None and config.freeze_vision:
        trained -= sum(parameter.numel() for parameter in tower.parameters())
    if config.lora_rank:
        wanted = re.compile(adapter_settings(config).target_modules)
        layers = [part for name, part in model.named_modules() if wanted.fullmatch(name)]
        trained = sum(config.lora_rank * (part.in_features + part.out_features) for part in layers)
    # GPT-2's configuration names neither: every head is kept, and shares the width
    kept = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    heads = kept * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    return PolicySize(
        total=total,
        trained=trained,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        cached=2 * heads * text.num_hidden_layers,
        vocabulary=text.vocab_size,
    )
