"""What a Llama on a processor computes in vain: copies of keys and values, and logits of prompts. Left out here.

Query heads share keys and values in groups. transformers copies these for every head before SDPA, for each token that
is sampled; SDPA is as right when the heads of a group are taken for queries of one head. And TRL, off CUDA, gives the
head all places of a row to score, and then drops those of the prompt. No result depends on it but in the last bits.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "npo_grouped_sdpa"
"""Name of this attention in the registry of transformers; it has the masks of "sdpa"."""

IGNORED = -100
"""Label of a place that is not scored, as in TRL and transformers."""


def group_heads(model: PreTrainedModel) -> None:
    """Let a Llama with SDPA take the heads of a group for queries of one; other attentions and models stay."""
    if type(model) is LlamaForCausalLM and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(GROUPED, grouped_attention)
        AttentionMaskInterface.register(GROUPED, sdpa_mask)
        model.set_attn_implementation(GROUPED)


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Attention as transformers' `sdpa`, without copies of keys and values where a mask or one query allows it.

    Args:
        module: Layer, for what it says of causality.
        query: `[rows, heads, queries, size]`.
        key: `[rows, key heads, places, size]`; `heads` is a multiple.
        value: The same for the values.
        attention_mask: None, or `[rows, 1, queries, places]`, boolean or added; of another shape it is left to theirs.
        settings: `scaling`, `dropout` and what else transformers gives; anything unusual is left to its function.

    Returns:
        `[rows, queries, heads, size]`, and None for the weights.
    """
    rows, heads, queries, size = query.shape
    groups = heads // key.shape[1]
    unusual = settings.get("position_bias") is not None or settings.get("output_attentions")
    unusual = unusual or (attention_mask is not None and attention_mask.shape[1] != 1)  # a mask for each head
    causal = attention_mask is None and queries > 1
    if groups == 1 or unusual or causal or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    if attention_mask is not None and queries > 1:
        attention_mask = attention_mask.expand(rows, -1, -1, -1).repeat(1, 1, groups, 1)
    folded = query.reshape(rows, heads // groups, groups * queries, size)
    found = functional.scaled_dot_product_attention(
        folded, key, value, attention_mask, settings.get("dropout", 0.0), scale=settings.get("scaling")
    )
    return found.reshape(rows, heads, queries, value.shape[-1]).transpose(1, 2).contiguous(), None


def score_responses_alone(model: PreTrainedModel | PeftModel) -> None:
    """Let the head that TRL has fused into a Llama score no place before the first that counts.

    For a policy whose trainer has been made, on a processor; others are left alone.
    """
    policy = model.get_base_model() if isinstance(model, PeftModel) else model
    if type(policy) is not LlamaForCausalLM or policy.device.type != "cpu":
        return
    fused = policy.forward

    @functools.wraps(fused)  # `generate` reads the signature
    def forward(*args, **kwargs):
        labels = kwargs.get("labels")
        if not kwargs.get("fused_lm_head") or labels is None or kwargs.get("shift_labels") is not None:
            return fused(*args, **kwargs)
        counted = (labels[:, 1:] != IGNORED).any(dim=0).nonzero()
        skipped = int(counted[0]) if len(counted) else 0
        with _states_from(policy.base_model, skipped):
            found = fused(*args, **(kwargs | {"labels": labels[:, skipped:]}))
        for name, part in found.items():
            if isinstance(part, Tensor) and part.dim() == 2:
                found[name] = functional.pad(part, (skipped, 0))
        return found

    policy.forward = forward


@contextmanager
def _states_from(backbone: nn.Module, first: int) -> Iterator[None]:
    """While it lasts, a backbone returns the last hidden states of its places from `first` on."""

    def cut(module: nn.Module, args: tuple, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[:, first:]
        return output

    handle = backbone.register_forward_hook(cut)
    try:
        yield
    finally:
        handle.remove()
