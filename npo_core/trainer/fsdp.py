"""Policies that are spread over processes (FSDP 2), where accelerate and TRL would train or sample them wrongly.

What is put right, each with a test on two processes of the CPU:

1. A pass without gradient leaves the last layers gathered, and TRL, which sends weights to vLLM, expects every one of
   them sharded.
2. TRL's head reads its weight from outside of the head's own forward pass, as a plain gather, whose gradient is that of
   each process alone: an untied head would be trained on a share of the batch by each of its rows. It expects a bias to
   be sharded as well, and `pictures.left_out` gives the head one that is not. `NPOTrainer` gathers it by itself.
3. accelerate lets gradients be added up, and outputs be rounded, in the type of the matrix products, 16 bits. Here
   they are reduced and added up in 32; the outputs of TRL's head stay as it computes them.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy
from transformers import PreTrainedModel

from ..processes import process_count

if TYPE_CHECKING:
    from .trainer import NPOTrainer


def reduced_each_pass() -> dict[str, Any]:
    """accelerate's settings under which the gradient of every pass is reduced and kept sharded, in 32 bits.

    Otherwise each process keeps a whole one, in the type of the matrix products, until the last pass of a step.
    """
    return {"gradient_accumulation_kwargs": {"sync_each_batch": True}}  # transformers writes into it


def reshard(model: torch.nn.Module) -> None:
    """Free what a pass gathered: every parameter is sharded again. A model that is not sharded is left alone."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def held_together(model: torch.nn.Module) -> bool:
    """Whether several processes hold a model together, so that each forward pass of one needs one of all the others."""
    if process_count() == 1:
        return False
    sharded = any(isinstance(part, FSDPModule | FullyShardedDataParallel) for part in model.modules())
    return sharded or any(hasattr(weight, "ds_id") for weight in model.parameters())  # DeepSpeed, ZeRO 3


def train_sharded(trainer: "NPOTrainer") -> None:
    """Make a fresh trainer, whose policy will be sharded, compute the gradient of the whole batch in 32 bits.

    Raises:
        ValueError: The processes were not started so that accelerate shards.
    """
    if not trainer.is_fsdp_enabled:
        raise ValueError(
            "launcher shards the policy, but this process was not started for that, or has no GPU; start it with "
            "`accelerate launch --config_file` and that launcher's file."
        )
    plugin = trainer.accelerator.state.fsdp_plugin
    assert plugin is not None
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=plugin.mixed_precision_policy.param_dtype, reduce_dtype=torch.float32
        )


def gather_heads(trainer: "NPOTrainer") -> None:
    """Let every pass of a trainer's policy, and of its reference, find the head as FSDP gathers it for a layer.

    A policy that FSDP has not sharded, or whose head is no part of its own, is left alone.
    """
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            cast(PreTrainedModel, model).register_forward_pre_hook(_gather_head)


def _gather_head(model: PreTrainedModel, _: Any) -> None:
    """Gather the head as FSDP does, so that its gradient is reduced as that of every layer."""
    head = model.get_output_embeddings()
    if isinstance(head, FSDPModule):
        head.unshard()
