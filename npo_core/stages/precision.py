"""Which precision is faster on the machine at hand: matrix products in 32 bits against 16, in training and sampling.

Processors with AMX or AVX-512 BF16 multiply in bfloat16 in hardware; others emulate it, slower than float32. What a run
does is its setting `mixed_precision`; this says what the other choice would cost.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..files import read_json, write_json
from ..runs.folder import runs_folder
from ..world import computing
from ..world.policies import load_policy
from ..world.smollm import smollm_folder
from .clocks import work_clock

FLAGS = ("amx_bf16", "avx512_bf16")
"""Instructions for products in bfloat16, as Linux names them."""

ROWS, PROMPT, RESPONSE = 16, 40, 24
"""Sequences, and tokens of prompt and response, that are computed in a trial."""

CPUINFO = Path("/proc/cpuinfo")


def measured_precisions(quiet: bool = False) -> list[dict[str, Any]]:
    """`compare_precisions` of SmolLM2, measured once for a processor and kept beside the policies.

    So that a run which is started again gets the same settings: near a tie, a second trial could choose otherwise.

    Args:
        quiet: Say nothing while the model is fetched.

    Raises:
        OSError, ValueError: As `smollm_folder`.
    """
    folder, path = smollm_folder(quiet), runs_folder() / "base" / "precision.json"
    here = {"processor": _processor(), "torch": torch.__version__}
    known = read_json(path) if path.exists() else {}
    if known.get("machine") != here:
        known = {"machine": here, "lines": compare_precisions(folder)}
        write_json(path, known)
    return known["lines"]


def precision_setting(lines: list[dict[str, Any]]) -> str:
    """What `mixed_precision` should be after such a measurement: "bf16", or "no" where float32 is at least as fast."""
    return "bf16" if faster(lines) == "bfloat16" else "no"


def compare_precisions(
    folder: Path, threads: int = 1, device: torch.device | str = "cpu", rows: int = ROWS
) -> list[dict[str, Any]]:
    """Tokens per second in both precisions, one short trial each after one that is not counted.

    Args:
        folder: Policy.
        threads: CPU threads.
        device: What computes.
        rows: Sequences in a trial.

    Returns:
        A line per precision: `matrix products in`, `trained tokens/s` (forward and backward pass), `sampled tokens/s`,
        `in hardware` (whether the processor multiplies so itself; None where it does not tell).
    """
    model = load_policy(folder, share=False).to(device)
    with computing.threads(threads):
        return [_trial(model, name, rows) for name in ("float32", "bfloat16")]


def faster(lines: list[dict[str, Any]]) -> str:
    """Precision with the least time for a token that is sampled and trained on: "float32" or "bfloat16"."""
    cost = {line["matrix products in"]: 1 / line["trained tokens/s"] + 1 / line["sampled tokens/s"] for line in lines}
    return min(cost, key=cost.__getitem__)


def bfloat16_in_hardware() -> bool | None:
    """Whether the processor multiplies in bfloat16 itself; None where the system does not list what it can."""
    flags = _told("flags")
    return any(flag in flags.split() for flag in FLAGS) if flags else None


def _processor() -> str:
    return _told("model name") or "unknown"


def _told(what: str) -> str:
    """What the system tells of its first processor under a name; empty where it tells nothing."""
    lines = CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(what)), "")


def _trial(model: PreTrainedModel, name: str, rows: int) -> dict[str, Any]:
    device, now = model.device, work_clock(model.device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (rows, PROMPT + RESPONSE), generator=generator).to(device)
    half = name == "bfloat16"

    def train(count: int) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits = model(input_ids=ids[:count], logits_to_keep=RESPONSE).logits
        logits.float().log_softmax(-1).mean().backward()
        model.zero_grad()

    def sample(tokens: int) -> None:
        settings = GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0
        )
        with torch.random.fork_rng(), torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            model.generate(ids[:, :PROMPT], attention_mask=torch.ones_like(ids[:, :PROMPT]), generation_config=settings)

    train(2)  # kernels are chosen and weights are paged in
    begin = now()
    train(rows)
    trained = rows * (PROMPT + RESPONSE) / (now() - begin)
    sample(1)
    begin = now()
    sample(RESPONSE)
    sampled = rows * RESPONSE / (now() - begin)
    return {
        "matrix products in": name,
        "trained tokens/s": round(trained),
        "sampled tokens/s": round(sampled),
        "in hardware": bfloat16_in_hardware() if half and device.type == "cpu" else True,
    }
