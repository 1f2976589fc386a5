"""What a run computes with, for work outside of its trainers: policies, matrix products, threads."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..declaration import require
from ..processes import own_device
from ..runs.config import RunConfig
from .policies import placed_policy

DTYPES = ("float32", "bfloat16", "float16")
"""Types of weights."""

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRODUCTS = ("no", *HALF)
"""Mixed precision of matrix products, as transformers' Trainer and accelerate name it: none, or a type of 16 bits."""


@dataclass(frozen=True)
class Computing:
    """Types that a policy computes in.

    Attributes:
        dtype: Type of its weights, one of `DTYPES`.
        mixed_precision: Precision of its matrix products, one of `PRODUCTS`; "no" leaves them that of the weights.

    Raises:
        ValueError: Neither of these.
    """

    dtype: str = "float32"
    mixed_precision: str = "no"

    def __post_init__(self):
        for name, allowed in (("dtype", DTYPES), ("mixed_precision", PRODUCTS)):
            value = getattr(self, name)
            require(value in allowed, name, value, f"one of {', '.join(allowed)}")

    def __str__(self) -> str:
        products = HALF.get(self.mixed_precision, self.dtype)
        return f"weights in {self.dtype}, matrix products in {str(products).removeprefix('torch.')}"

    def products(self, device: torch.device) -> torch.autocast:
        """While it lasts, matrix products on a device are of this precision."""
        half = HALF.get(self.mixed_precision)
        return torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None)

    @classmethod
    def of(cls, config: RunConfig) -> "Computing":
        """That of a run of ours."""
        return cls(config.dtype, config.mixed_precision)


IN_FLOAT32 = Computing()
"""Weights and matrix products in 32 bits."""


def run_policy(config: RunConfig, folder: str | Path) -> PreTrainedModel | PeftModel:
    """Policy of a folder on this process's device, with the type of weights and the attention that the run's has.

    Raises:
        FileNotFoundError: As `load_policy`.
    """
    return placed_policy(folder, config.freeze_vision, config.dtype, config.attention)


def precision(config: RunConfig) -> torch.autocast:
    """While it lasts, matrix products are those of the run's training: in 16 bits with `mixed_precision` bf16."""
    return Computing.of(config).products(own_device())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """While it lasts, torch computes with so many threads: another number adds up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
