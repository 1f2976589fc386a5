"""How many responses fit into memory at a time off line: from the device's memory and the policy's vocabulary (ours).

The numbers that one asks for are limits, right for a small policy; 512 responses of 512 tokens over 150,000 words
would be 430 GiB of logits. What a batch takes is counted against a share of the memory that the device has in all, not
of what happens to be free, so that a run that is killed and goes on samples in the same batches.
"""

import functools
import logging
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from ..processes import process_count

SHARE = 0.25
"""Share of a device's memory that a batch may take: the rest holds policies, training, and what others need."""

COPIES = 2.9
"""Peak of a scoring pass in copies of its logits in 32 bits, measured."""

DRAWN = 4
"""Copies of the logits of one place, in 32 bits, while a token is drawn."""

CONTROL = Path("/sys/fs/cgroup")
"""Where Linux keeps what a container, or a job of a batch system, may use."""

GROUPS = Path("/proc/self/cgroup")
"""Groups that this process is in, from the top down: a line `number:controllers:/path` each."""

logger = logging.getLogger(__name__)


def device_memory(device: torch.device | str) -> int:
    """Bytes of memory that a device has in all; on the CPU this process's part of what machine and container allow."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min([psutil.virtual_memory().total, *_allowed()]) // process_count()


def _allowed() -> Iterator[int]:
    """Limits of memory that hold for this process, in bytes: of its group and of those around it, in both versions."""
    lines = GROUPS.read_text(encoding="utf-8").splitlines() if GROUPS.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (CONTROL / "memory", "memory.limit_in_bytes") if controllers else (CONTROL, "memory.max")
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and (folder / name).is_file():
                text = (folder / name).read_text(encoding="utf-8").strip()
                if text.isdecimal():  # else "max"
                    yield int(text)


def scoring_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Memory of the logits of one response while it is scored, by its length in tokens."""
    return logits_bytes(model.config.get_text_config().vocab_size, tokens)


def logits_bytes(words: int, tokens: int) -> int:
    """`scoring_bytes` of a policy that is not loaded, by its words."""
    return int(COPIES * 4 * (tokens + 1) * words)


def sampling_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Memory of one response while it is sampled: keys and values of its tokens, logits of a place.

    Args:
        model: Policy.
        tokens: Longest response in tokens; the prompt is counted as long as that.
    """
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cached = 2 * heads * width * text.num_hidden_layers * 2 * tokens * model.dtype.itemsize
    return cached + DRAWN * 4 * text.vocab_size


def fitting(asked: int, each: int, device: torch.device | str, what: str) -> int:
    """Responses that are taken at a time: those asked for, or fewer where memory asks for it, which is said once.

    Args:
        asked: Limit, at least 1.
        each: Bytes of one response.
        device: Where it is computed.
        what: What is done with them, for the message: "scored" or "sampled".

    Raises:
        ValueError: Not even one fits the device.
    """
    memory = device_memory(device)
    if each > memory:
        raise ValueError(
            f"One response that is {what} takes {each / 2**30:.1f} GiB, and {device} has {memory / 2**30:.1f} GiB in "
            "all. Ask for shorter responses (max_new_tokens, max_completion_length), or use a larger device."
        )
    rows = at_once(asked, each, memory)
    if rows < asked:
        _say(f"{rows} responses are {what} at a time, not {asked}: one takes {each / 2**20:,.0f} MiB.")
    return rows


def at_once(asked: int, each: int, memory: int) -> int:
    """Responses that are taken at a time on a device with so much memory, in bytes, that one of them fits."""
    return max(1, min(asked, int(SHARE * memory / each)))


@functools.cache
def _say(message: str) -> None:
    logger.warning(message)
