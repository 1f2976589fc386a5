"""What a run computes with, for work outside of its trainers: policies, matrix products, threads."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..processes import own_device
from ..runs.config import RunConfig
from .policies import placed_policy


def run_policy(config: RunConfig, folder: str | Path) -> PreTrainedModel | PeftModel:
    """Policy of a folder on this process's device, with the type of weights and the attention that the run's has.

    Raises:
        FileNotFoundError: As `load_policy`.
    """
    return placed_policy(folder, config.freeze_vision, config.dtype, config.attention)


def precision(config: RunConfig) -> torch.autocast:
    """While it lasts, matrix products are those of the run's training: in 16 bits with `mixed_precision` bf16."""
    return torch.autocast(own_device().type, torch.bfloat16, enabled=config.mixed_precision == "bf16")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """While it lasts, torch computes with so many threads: another number adds up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
