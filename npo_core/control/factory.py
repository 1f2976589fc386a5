"""What a controller needs of a trainer factory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel, TrainerCallback

from ..guidance.sources import GuidanceSource
from ..trainer.trainer import NPOTrainer


class TrainerFactory(Protocol):
    """Makes a fresh trainer of the same run: same base weights, data order and arguments every time.

    It hands on `output_dir`, `guidance` and `callbacks` as it gets them. `docs/own_run.md` has an example.
    """

    def __call__(
        self, output_dir: Path, guidance: GuidanceSource | None, callbacks: Sequence[TrainerCallback]
    ) -> NPOTrainer: ...

    def policy(self, folder: Path | None = None) -> PreTrainedModel:
        """The policy of a folder, such as a checkpoint, adapters included; the base policy alone if None."""
        ...
