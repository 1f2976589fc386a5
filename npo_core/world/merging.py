"""A checkpoint with adapters as a policy of its own, which any program can load: vLLM, lmms-eval, transformers."""

from pathlib import Path

import torch
from peft import PeftConfig

from ..files import whole_folder
from .policies import load_policy, load_processor, save_policy
from .pretrained import policy_config


def merge(checkpoint: str | Path, out: str | Path) -> Path:
    """Write a checkpoint's adapters, merged into the weights they belong to, with tokenizer and processor (ours).

    The sum is made in float32 and written in the type of the base policy's files. The processor is the base policy's
    too, with the picture sizes that it was published with, and the chat template that the adapters were trained with.

    Args:
        checkpoint: Folder of a checkpoint with adapters.
        out: Folder to write; it appears when it is whole.

    Returns:
        `out`.

    Raises:
        FileNotFoundError: No such checkpoint, or the base policy of its adapters is gone.
        FileExistsError: There is something at `out`.
        ValueError: The checkpoint has no adapters.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"There is no checkpoint folder {checkpoint}.")
    if not (checkpoint / "adapter_config.json").is_file():
        raise ValueError(f"{checkpoint} has no adapters (no adapter_config.json): its weights are whole as they are.")
    if out.exists():
        raise FileExistsError(f"There is something at {out} already; give another folder, or move it away.")
    policy = load_policy(checkpoint, dtype="float32", share=False).merge_and_unload()
    base = PeftConfig.from_pretrained(checkpoint).base_model_name_or_path
    policy.to(policy_config(base).dtype or torch.float32)
    with whole_folder(out, replace=False) as unfinished:
        save_policy(policy, load_processor(checkpoint), unfinished)
    return out
