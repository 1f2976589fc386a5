"""Policies: the tiny Qwen3-VL with its processor, and loading of any policy from a local folder.

The tiny policy is `Qwen3VLForConditionalGeneration` and `Qwen3VLProcessor` of transformers at a small size, so that
everything that runs on it runs on a pretrained Qwen3-VL too. It deviates in three points: random weights, a
word-level tokenizer, and a processor without a video part (that one needs torchvision).
"""

import ctypes
import platform
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftModel
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence as PreSequence
from tokenizers.pre_tokenizers import Split, WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import CHAT_TEMPLATE_FILE, is_torchvision_available
from transformers.utils import logging as transformers_logging

from ..files import read_json
from ..guidance.fingerprints import tokenizer_of
from ..processes import own_device
from .speed.heads import group_heads
from .speed.prompts import SharedPrompts
from .speed.sharing import share_work
from .speed.words import share_words

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|unk|>",
)

DOWNLOADED = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model")
"""Files of a hub model that are fetched: weights as safetensors, configuration, tokenizer, chat template; no code."""

SIDES = {"padding_side": "left", "truncation_side": "left"}
"""How TRL loads a processor that it is not given: prompts end side by side, where responses begin."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of glibc's mallopt."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


class TinyQwen3VLProcessor(SharedPrompts, Qwen3VLProcessor):
    """`Qwen3VLProcessor` without a video processor, which would need torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor=image_processor, tokenizer=tokenizer, chat_template=chat_template, **kwargs)

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]


@dataclass(frozen=True)
class TinyPolicySpec:
    """Size of the tiny Qwen3-VL.

    Attributes:
        hidden: Width of the language model.
        layers: Layers of the language model.
        heads: Attention heads; head size is hidden / heads and must be a multiple of 8.
        vision_hidden: Width of the vision tower.
        vision_depth: Layers of the vision tower.
    """

    hidden: int = 96
    layers: int = 3
    heads: int = 3
    vision_hidden: int = 64
    vision_depth: int = 2

    def __post_init__(self):
        if self.hidden % self.heads or (self.hidden // self.heads) % 8:
            raise ValueError(
                f"hidden={self.hidden} over heads={self.heads} gives head size {self.hidden / self.heads:g}; "
                "it must be a multiple of 8."
            )


def build_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Word-level tokenizer over `words` with Qwen's special tokens; ends a turn with `<|im_end|>`."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, "user", "assistant", *words])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<|unk|>"))
    backend.pre_tokenizer = PreSequence([WhitespaceSplit(), Split(Regex(r"<\|[a-z_]+\|>"), behavior="isolated")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:7]),
        padding_side="left",
    )


def build_processor(words: Sequence[str]) -> TinyQwen3VLProcessor:
    """Processor of the tiny policy: 8-pixel patches merged 2 × 2, so a 48 × 32 picture is six vision tokens."""
    images = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 1 << 20}
    )
    return TinyQwen3VLProcessor(images, build_tokenizer(words), chat_template=CHAT_TEMPLATE)


def build_tiny_policy(
    processor: TinyQwen3VLProcessor, spec: TinyPolicySpec, seed: int
) -> Qwen3VLForConditionalGeneration:
    """Randomly initialised Qwen3-VL of size `spec` for the processor's vocabulary, in float32."""
    head = spec.hidden // spec.heads
    side = head // 2 // 3
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": spec.hidden,
            "intermediate_size": 3 * spec.hidden,
            "num_hidden_layers": spec.layers,
            "num_attention_heads": spec.heads,
            "num_key_value_heads": spec.heads,
            "head_dim": head,
            "max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000.0,
                "mrope_section": [head // 2 - 2 * side, side, side],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
            "pad_token_id": processor.tokenizer.pad_token_id,
        },
        vision_config={
            "depth": spec.vision_depth,
            "hidden_size": spec.vision_hidden,
            "intermediate_size": 2 * spec.vision_hidden,
            "num_heads": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": spec.hidden,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=processor.vision_start_token_id,
        vision_end_token_id=processor.vision_end_token_id,
        tie_word_embeddings=True,
    )
    config.pad_token_id = processor.tokenizer.pad_token_id
    config.eos_token_id = processor.tokenizer.eos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return model


def save_policy(model: PreTrainedModel, processor, folder: Path) -> None:
    """Save weights (safetensors), configuration and processor to `folder` in the Hugging Face format."""
    with quiet_transformers():
        model.save_pretrained(folder)
        processor.save_pretrained(folder)


def policy_folder(name: str) -> Path:
    """Local folder of a policy: the folder itself, or the snapshot of a hub model, downloaded when it is not there.

    Raises:
        FileNotFoundError: No such folder, and no such model on the hub or no connection to it.
    """
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    try:
        return Path(snapshot_download(name, allow_patterns=list(DOWNLOADED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"policy is {name!r}, but {folder} holds no config.json, and the hub did not give it "
            f"({type(error).__name__}). Give a folder in the Hugging Face format, or download the model first."
        ) from error


def load_processor(folder: str | Path):
    """Processor (vision-language) or tokenizer (text-only) of a policy folder, or of a checkpoint with adapters.

    A Qwen3-VL that cannot have its video part here, because torchvision is missing, gets a processor without it, which
    works on its pictures with PIL. Adapters that were trained with a chat template of their own have it beside them.

    Raises:
        FileNotFoundError: `folder` is not a policy folder.
        ValueError: Its adapters name no base policy.
    """
    base, template = _base_folder(folder), Path(folder) / CHAT_TEMPLATE_FILE
    processor = _processor_of(base)
    if base != Path(folder) and template.is_file():
        processor.chat_template = tokenizer_of(processor).chat_template = template.read_text(encoding="utf-8")
    return processor


def _processor_of(folder: Path):
    config = _policy_config(folder)
    if config.model_type != "qwen3_vl":
        auto = AutoProcessor if hasattr(config, "vision_config") else AutoTokenizer
        return auto.from_pretrained(folder, trust_remote_code=False, **SIDES)
    if _has_video_part(folder) and is_torchvision_available():
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False, **SIDES)
        # a subclass of the same name, so that a saved processor still names the class of transformers
        processor.__class__ = type(type(processor).__name__, (SharedPrompts, type(processor)), {})
        return processor
    return TinyQwen3VLProcessor.from_pretrained(folder, trust_remote_code=False)


def load_policy(
    folder: str | Path,
    freeze_vision: bool = False,
    dtype: str = "float32",
    attention: str = "sdpa",
    share: bool = True,
) -> PreTrainedModel | PeftModel:
    """Policy of a folder, with its adapters where it is a checkpoint of those; rollouts of a prompt share its work.

    Args:
        folder: Folder in the Hugging Face format (safetensors; no code from the folder is run).
        freeze_vision: Take the vision tower out of training.
        dtype: Type of the weights: "float32" or "bfloat16".
        attention: Attention of transformers: "sdpa", "eager" or "flash_attention_2".
        share: Compute what rollouts of a prompt share once. Not for a policy that will be sharded: how often a layer
            runs then depends on the rows, and processes that gather its weights together would wait for each other.

    Raises:
        FileNotFoundError: `folder` is not a policy folder, or its adapters belong to a base policy that is gone.
    """
    base = _base_folder(folder)
    config = _policy_config(base)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with quiet_transformers(), _weights_of(base):
        model = auto.from_pretrained(
            base,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            trust_remote_code=False,
            use_safetensors=True,
        )
    if share:
        share_work(model)
        share_words(model)
        group_heads(model)
    if config.get_text_config().tie_word_embeddings:
        # tied heads are not in the file; this tells transformers' Trainer that their absence there is no fault
        model._keys_to_ignore_on_save = {"lm_head.weight"}
    if freeze_vision and hasattr(model.base_model, "visual"):
        model.base_model.visual.requires_grad_(False)
    if base != Path(folder):
        if not (Path(folder) / "adapter_model.safetensors").is_file():
            raise FileNotFoundError(f"{folder} holds no adapter_model.safetensors; pickled adapters are not read.")
        return PeftModel.from_pretrained(model, folder, is_trainable=True)
    return model


def placed_policy(folder: str | Path, *settings: Any, **named: Any) -> PreTrainedModel | PeftModel:
    """`load_policy`, on the device of this process: for work outside a trainer, which places its policy itself."""
    policy = load_policy(folder, *settings, **named)
    return policy.to(own_device())  # pyright: ignore[reportArgumentType] (a decorator of transformers hides `self`)


@contextmanager
def _weights_of(path: Path):
    """Say of which file it is that holds no safetensors, though it is named so: cut off, or a pickle."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{path} holds weights that cannot be read as safetensors ({error}); nothing else is."
        ) from error


@contextmanager
def quiet_transformers():
    """Silence transformers' progress bars and notices (not its warnings) for a block."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_warning()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:  # blocks may be nested
            transformers_logging.enable_progress_bar()


def keep_freed_memory() -> None:
    """Ask glibc to keep the memory that a step frees for the next one; elsewhere nothing is done.

    By default it hands large blocks back to the kernel, which clears every page of them again in the next step.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(option, 1 << 30)


def _base_folder(folder: str | Path) -> Path:
    """The folder itself, or that of the base policy, on disk or of the hub, which a checkpoint's adapters belong to."""
    adapter = Path(folder) / "adapter_config.json"
    if not adapter.is_file():
        return Path(folder)
    name = read_json(adapter)["base_model_name_or_path"]
    if not name:
        raise ValueError(
            f"{adapter} names no base policy, as the trainer was given one that came from no folder; write its folder "
            "there, under base_model_name_or_path."
        )
    if not Path(name).is_dir():
        try:
            # as it was trained on: the hub may have another revision by now
            return Path(snapshot_download(name, allow_patterns=list(DOWNLOADED), local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError):
            try:
                return policy_folder(name)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"The base policy of the adapters in {folder} is not there: {error} {adapter} names it, under "
                    "base_model_name_or_path; a relative name is looked for in the folder that this is run in."
                ) from error
    return Path(name)


def _has_video_part(folder: Path) -> bool:
    """Whether a processor was saved with its video part: in a file of its own, or as transformers 5 does, in one."""
    whole = folder / "processor_config.json"
    within = whole.is_file() and "video_processor" in read_json(whole)
    return within or (folder / "video_preprocessor_config.json").is_file()


def _policy_config(folder: str | Path):
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; give a folder in the Hugging Face format.")
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)
