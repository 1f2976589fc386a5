"""When the common beginning of rows may be computed once, whatever the architecture."""

from collections.abc import Mapping
from typing import Any

from transformers import DynamicCache

RECORDED = ("output_attentions", "output_hidden_states")
"""What the plain forward pass records on demand, and the shared one does not."""


def nothing_before(cache: Any) -> bool:
    """Whether a row begins here: there is no cache of earlier tokens, or an empty one of the usual kind."""
    return cache is None or (type(cache) is DynamicCache and cache.get_seq_length() == 0)


def nothing_recorded(model: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether no state of a layer is asked for or computed twice, and no dropout tells equal rows apart."""
    return (
        not (model.gradient_checkpointing and model.training)
        and not (model.config.attention_dropout and model.training)
        and not any(arguments.get(name, getattr(model.config, name)) for name in RECORDED)
    )
