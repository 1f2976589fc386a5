"""Prefix guidance: the policy is given the beginning of a guide and goes on from there by itself.

A variant that the paper does not have (PrefixRL, POPE): what the guide wrote is context and not target, so its tokens
are masked out of the loss, and what follows is the policy's own. Whether it ends right is not known beforehand.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from trl.models import unwrap_model_for_generation  # pyright: ignore[reportPrivateImportUsage] (TRL loads its names late)

from ..guidance.trajectories import Trajectory
from .inputs import encode_prompts

if TYPE_CHECKING:
    from .trainer import NPOTrainer


def beginning(guide: Trajectory, share: float) -> list[int]:
    """The first `share` of a guide's tokens, rounded down; at least one, and never its end of sequence.

    Args:
        guide: A whole guide, ended by an end of sequence.
        share: In (0, 1).
    """
    body = guide.token_ids[:-1]
    return list(body[: max(1, int(share * len(body)))])


def continued(
    trainer: "NPOTrainer", rows: Sequence[Mapping[str, Any]], prefixes: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Responses that begin with given tokens and are the policy's own from there on: one draw each, as in training.

    Args:
        trainer: Holds policy, processor and generation settings; samples by transformers.
        rows: One data set row per response.
        prefixes: Token ids that each response begins with.

    Returns:
        Token ids of the whole responses, an end of sequence included where there is one. What is longer than
        `max_completion_length`, the prefix included, is cut, as in training.
    """
    inputs = encode_prompts(trainer.processing_class, rows, trainer.chat_template_kwargs, after=prefixes)
    inputs = {name: value.to(trainer.accelerator.device) for name, value in inputs.items()}
    with (
        unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            generation_kwargs=trainer.generation_kwargs,
            gradient_checkpointing_kwargs=cast(dict | None, trainer.args.gradient_checkpointing_kwargs),
        ) as model,
        torch.no_grad(),
    ):
        ids = model.generate(**inputs, generation_config=trainer.generation_config)
    out = []
    for prefix, tokens in zip(prefixes, ids[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
        end = next((place + 1 for place, token in enumerate(tokens) if token in trainer.eos_token_ids), len(tokens))
        out.append([*prefix, *tokens[:end]][: trainer.args.max_completion_length])
    return out
