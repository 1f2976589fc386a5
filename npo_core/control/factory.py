"""What a controller needs of a trainer factory, and what it reads from the trainers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import PreTrainedModel, TrainerCallback

from ..guidance.sources import GuidanceSource
from ..runs.config import RunConfig
from ..trainer.inputs import Sampling
from ..trainer.pictures import picture_tokens
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


@dataclass(frozen=True)
class Training:
    """What a run's decisions and off-line rollouts share with its training, as the trainer has it.

    Attributes:
        max_completion_length: Longest response in tokens.
        sampling: How responses are drawn; what will guide is scored at its temperature.
        tau_gate: Largest pass rate of a guided group.
        prompts_per_step: Prompts of an optimiser step, over all processes.
        half: Type of 16 bits in which matrix products are computed; None where they have that of the weights.
        weights: Type of the policy's weights; adapters may have another.
        chat_template_kwargs: Template arguments of the prompts.
    """

    max_completion_length: int
    sampling: Sampling
    tau_gate: float
    prompts_per_step: int
    half: torch.dtype | None
    weights: torch.dtype
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, trainer: NPOTrainer) -> "Training":
        """That of a trainer."""
        args = trainer.args
        assert args.generation_batch_size is not None  # TRL has computed it
        return cls(
            trainer.max_completion_length,
            Sampling.of(trainer),
            args.tau_gate,
            args.generation_batch_size // trainer.num_generations,
            half_of(trainer.accelerator),
            trainer.model.dtype,
            trainer.chat_template_kwargs,
        )

    @classmethod
    def planned(cls, config: RunConfig, processor: Any) -> "Training":
        """That which the trainers of a configuration will have, for guides that are sampled before there is one.

        Args:
            config: Settings.
            processor: Processor or tokenizer of the policy, whose picture tokens vLLM is told never to draw.
        """
        never = picture_tokens(processor) if config.vllm != "off" else []
        unsampled = (tuple(never) or None) if config.mask_unsampled else ()
        return cls(
            config.max_completion_length,
            Sampling(
                config.temperature, generation_kwargs={"suppress_tokens": never} if never else {}, unsampled=unsampled
            ),
            config.tau_gate,
            config.prompts_per_step,
            torch.bfloat16 if config.mixed_precision == "bf16" else None,
            getattr(torch, config.dtype),
        )


def half_of(accelerator: Accelerator) -> torch.dtype | None:
    """Type of 16 bits in which accelerate has a policy's matrix products computed; None where it leaves them alone.

    The arguments `bf16` and `fp16` do not tell: without them accelerate goes by how the script was launched
    (`accelerate launch --mixed_precision bf16`), and on a CPU fp16 is 32 bits.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # it makes the weights 16 bits when training begins
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    device = accelerator.device.type
    with accelerator.autocast():
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
