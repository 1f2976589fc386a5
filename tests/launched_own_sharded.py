"""A training script of somebody's own, whose policy accelerate shards on the CPU; for test_fsdp."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from launched_sharded import with_gloo
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from worlds import SpyTrainer, trainer_of, world

from npo_core.processes import join

OTHER = 7
"""A token that the script forbids, as those of pictures are by themselves."""


def trained(policy: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Weights after two steps of a policy with a head of its own, held to the policy that it began as."""
    trainer = trainer_of(
        replace(world("text"), build=lambda: AutoModelForCausalLM.from_pretrained(policy)),
        folder,
        SpyTrainer,
        reward=lambda completions, **_: [float(place % 3) for place in range(len(completions))],
        generation_kwargs={"suppress_tokens": [OTHER]},
        steps=2,
        beta=0.1,
        num_iterations=2,
    )
    trainer.train()
    return {name: weight.contiguous() for name, weight in trainer.accelerator.get_state_dict(trainer.model).items()}


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")  # accelerate does so by itself for several processes
    PartialState._prepare_backend = with_gloo
    join()
    policy, folder = map(Path, sys.argv[1:])
    save_file(trained(policy, folder), folder / "sharded.safetensors")
