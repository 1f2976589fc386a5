"""Pictures in prompts: those of a row, the tokens that stand for them, and how vLLM wants both."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

NEVER = -100.0
"""Added to the logit of a token that is never to be sampled."""


def pictures_of(row: Mapping[str, Any]) -> list[Any]:
    """Pictures of a row: its `images`, or its `image` alone, or none."""
    return list(row.get("images") or ([] if row.get("image") is None else [row["image"]]))


def picture_tokens(processor: Any) -> list[int]:
    """Token ids that stand for pictures and videos in a prompt."""
    names = ("image_token_id", "video_token_id")
    return [getattr(processor, name) for name in names if getattr(processor, name, None) is not None]


def never_sampled(processor: Any) -> dict[str, Any]:
    """Generation settings for vLLM under which no picture token is sampled."""
    return {"logit_bias": dict.fromkeys(picture_tokens(processor), NEVER)}


def collapse_pictures(prompt_ids: Sequence[Sequence[int]], processor: Any) -> list[list[int]]:
    """Prompts with every run of an image token as one, the form that vLLM expands for each picture.

    Two pictures in a row stay two: their runs are apart by their start and end tokens.
    """
    pictures = set(picture_tokens(processor))
    collapsed = []
    for ids in prompt_ids:
        runs = ((token, sum(1 for _ in run)) for token, run in groupby(ids))
        collapsed.append([kept for token, count in runs for kept in [token] * (1 if token in pictures else count)])
    return collapsed


def picture_limits(min_pixels: int, max_pixels: int) -> dict[str, Any]:
    """Settings that give vLLM, which reads its own processor from the policy's folder, the same picture sizes.

    Args:
        min_pixels: Smallest picture in pixels; 0 as the processor has it.
        max_pixels: Largest picture in pixels; 0 as the processor has it.
    """
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    given = {name: value for name, value in limits.items() if value}
    return {"mm_processor_kwargs": given} if given else {}
