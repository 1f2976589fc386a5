"""Words that the rollouts of a prompt share, for text policies of the Llama architecture: computed once, then copied.

The counterpart of `sharing` for a policy without pictures, such as SmolLM2: in a step of 8 prompts with 8 rollouts
each, half of all tokens are those of prompts, and 7 in 8 of these are copies.
"""

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from .conditions import nothing_before, nothing_recorded
from .sharing import CACHE, WORTHWHILE, MethodOf, cheapest_sharing, computed_once


def share_words(model: PreTrainedModel) -> None:
    """Make a Llama compute the common beginning of rows once; other architectures are left alone.

    So is a model that uses gradient checkpointing while it trains. No result depends on it except in the last bits.
    """
    base = getattr(model, "model", None)
    if type(base) is LlamaModel:
        base.forward = MethodOf(base, _shared_forward)


def _shared_forward(
    self,
    input_ids=None,
    attention_mask=None,
    position_ids=None,
    past_key_values=None,
    inputs_embeds=None,
    use_cache=None,
    **kwargs,
):
    past_key_values = kwargs.pop(CACHE, past_key_values)
    given = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        CACHE: past_key_values,
        "inputs_embeds": inputs_embeds,
        "use_cache": use_cache,
        **kwargs,
    }

    def plain(**changes):
        return type(self).forward(self, **(given | changes))

    understood = (
        nothing_before(past_key_values)
        and input_ids is not None
        and len(input_ids) > 1
        and (attention_mask is None or attention_mask.shape == input_ids.shape)
        and (position_ids is None or position_ids.shape in (input_ids.shape, (1, input_ids.shape[1])))
        and nothing_recorded(self, kwargs)
        and kwargs.get("return_dict", self.config.return_dict) is not False
    )
    if not understood:
        return plain()
    rows, columns = input_ids.shape
    if position_ids is None:
        position_ids = torch.arange(columns, device=input_ids.device).unsqueeze(0)
    position_ids = position_ids.expand(rows, columns)
    width, first, inverse = cheapest_sharing(_seen(input_ids, attention_mask, position_ids))
    if len(first) * width + rows * (columns - width) > WORTHWHILE * rows * columns:
        return plain()
    shared = {
        "input_ids": input_ids[first, :width],
        "attention_mask": None if attention_mask is None else attention_mask[first, :width],
        "position_ids": position_ids[first, :width],
    }
    rest = {"input_ids": input_ids[:, width:], "position_ids": position_ids[:, width:]}
    cache = DynamicCache(config=self.config) if past_key_values is None else past_key_values
    hidden = computed_once(plain, shared, rest if width < columns else None, inverse, cache)
    returned = None if past_key_values is None and use_cache is False else cache
    return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE: returned})


@torch.no_grad()
def _seen(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> Tensor:
    """Number of what the model sees in a place, (rows, columns): equal where token, mask and position are equal."""
    number = input_ids.long()
    for part in (position_ids, *(() if attention_mask is None else (attention_mask,))):
        part = part.long()
        number = (number * (int(part.max()) + 2) + part + 1).contiguous()
        _, number = number.unique(return_inverse=True)
    return number
