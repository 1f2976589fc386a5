"""Policies with other people's habits: text tokenizers that pad on either side or not at all, and models for them."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from npo_core.world.policies import save_policy

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin|>")

TURNS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Reads a message's content as text."""

THINKING = TURNS + (
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}"
)
"""Ends a prompt with an empty thought where thinking is switched off, as Qwen3's does."""

PARTS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
"""Reads a message's content as a list of parts, and plain text not at all, as those of LLaVA and SmolVLM do."""


def byte_tokenizer(
    padding_side: str = "right",
    pad: str | None = "<|endoftext|>",
    begin: bool = False,
    template: str | None = TURNS,
) -> PreTrainedTokenizerFast:
    """A tokenizer of any text, a token a byte, that ends a turn with `<|im_end|>`.

    Args:
        padding_side: Side that it would pad on; "right" is the default of Qwen's, SmolLM2's and most others.
        pad: Its padding token; None as Llama's has none.
        begin: It begins what it tokenises with `<|begin|>`, as Llama's does.
        template: Its chat template.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE({token: index for index, token in enumerate([*SPECIAL, *letters])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    if begin:
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", SPECIAL.index("<|begin|>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token=pad,
        bos_token="<|begin|>" if begin else None,
        padding_side=padding_side,
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(kind: str, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> PreTrainedModel:
    """A random language model of one layer, sharp enough that a wrong input shows; `kind` as in `Qwen3ForCausalLM`."""
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind != "GPT2":
        size |= {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        **{"initializer_range": 0.3, **size, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, **settings},
    )
    head = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, head)(config)


def boxed_policy(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A Qwen3 that answers every chat with `\\boxed{1}` or `\\boxed{2}`, evenly: each token follows from the last."""
    size = len(tokenizer)
    model = tiny_model("Qwen3", tokenizer, hidden_size=size + size % 2, intermediate_size=8)
    model.config.max_position_embeddings = 1024
    follows = [("\n", "\\"), *pairwise("\\boxed{"), ("{", "1"), ("{", "2"), ("1", "}"), ("2", "}")]
    ids = [[tokenizer.convert_tokens_to_ids(tokenizer.tokenize(letter))[0] for letter in pair] for pair in follows]
    ids.append([tokenizer.convert_tokens_to_ids("}"), tokenizer.eos_token_id])
    with torch.no_grad():
        for parameter in (*model.model.layers.parameters(), model.lm_head.weight):
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, model.config.hidden_size))
        for before, after in ids:
            model.lm_head.weight[after, before] = 2.0
    return model


def byte_llama(folder: Path) -> Path:
    """Write a random Llama of one layer, and the tokenizer of bytes that it reads with, to a folder; return that."""
    tokenizer = byte_tokenizer()
    save_policy(tiny_model("Llama", tokenizer, initializer_range=0.02), tokenizer, folder)
    return folder
