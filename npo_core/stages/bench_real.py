"""The part of `python -m npo_core bench` that takes the real model: tokens per second, steps, off-line sampling.

Fetching the model and starting it on its task takes minutes the first time, so these rows are measured where that is
done already (`make real`), and left out, which is said, where it is not. CPU seconds of one thread, as elsewhere.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..guidance.sources import GuidanceSource
from ..guidance.trajectories import GuidanceCache, Trajectory
from ..runs.config import RunConfig, resolve_config
from ..runs.folder import runs_folder
from ..trainer.inputs import Sampling, encode_prompts
from ..trainer.sampling import completion_logps, sample_rollouts
from ..world.finetune import real_folder, right_tokens
from ..world.policies import load_policy
from . import run as stages
from .bench import timed
from .precision import compare_precisions

TURNS = 2
"""Turns that each contestant takes."""

LIMIT = 1.1
"""Most time that off-line sampling may take, in that of plain `generate` on the same prompts."""


def real_rows() -> list[dict[str, Any]]:
    """Rows of the real model; none where its base policy is not there yet."""
    config = resolve_config("grpo", "real", 0)
    if not (real_folder(config) / "model.safetensors").is_file():
        print(f"SmolLM2 is not under {runs_folder()} yet, so its rows are left out; `make real` makes it.")
        return []
    world = stages.prepare(config, quiet=True)
    rows = []
    for line in compare_precisions(world.base):
        for what in ("sampled", "trained"):
            name = f"SmolLM2, {line['matrix products in']}, {what}"
            rows.append({"name": name, "value": line[f"{what} tokens/s"], "unit": "token/s", "limit": None})
    return [*rows, _offline(config, world), *_steps(config, world)]


def _offline(config: RunConfig, world: stages.World) -> dict[str, Any]:
    """Off-line sampling, verdicts and all, against `generate` alone: the same prompts, seed, and so the same tokens."""
    model = load_policy(world.base).eval()
    rows, k = list(world.train.select(range(config.prompts_per_step))), config.num_generations
    inputs = encode_prompts(world.processor, [row for row in rows for _ in range(k)])
    settings = Sampling().settings(model, world.processor, config.max_completion_length)

    def plain() -> None:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            model.generate(**inputs, generation_config=settings)

    def offline() -> None:
        sample_rollouts(
            model, world.processor, rows, k, world.verifier, seed=0, max_new_tokens=config.max_completion_length,
            score=False,
        )  # fmt: skip

    with torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16"):
        plain()  # kernels are chosen and weights are cast
        turns = [_seconds(offline) / _seconds(plain) for _ in range(TURNS)]
    name = "SmolLM2, off-line sampling / plain generate"
    return {"name": name, "value": statistics.median(turns), "unit": "ratio", "limit": LIMIT}


def _steps(config: RunConfig, world: stages.World) -> list[dict[str, Any]]:
    """Steps with and without a guide for every prompt, in turns."""
    maker = stages.TrainerMaker(config, world)
    guides = _right_guides(world, maker.schedule["uid"][: 8 * config.prompts_per_step])
    seconds: dict[str, list[float]] = {"GRPO": [], "NPO": []}
    for _ in range(TURNS):
        for name, guidance in (("GRPO", None), ("NPO", guides)):
            with tempfile.TemporaryDirectory() as folder:
                seconds[name].append(statistics.median(timed(maker(Path(folder), guidance))))
    turns = [one / other for one, other in zip(seconds["NPO"], seconds["GRPO"], strict=True)]
    step = f"SmolLM2, GRPO step of {config.rollouts_per_step} rollouts"
    return [
        {"name": step, "value": statistics.median(seconds["GRPO"]), "unit": "CPU s", "limit": None},
        {"name": "SmolLM2, NPO / GRPO step", "value": statistics.median(turns), "unit": "ratio", "limit": 1.05},
    ]


def _right_guides(world: stages.World, uids: list[str]) -> GuidanceSource:
    """The right response as a guide for each prompt."""
    cache = GuidanceCache.empty(world.processor, [world.processor.eos_token_id], 1 << 10)
    rows = [world.rows[uid] for uid in dict.fromkeys(uids)]
    tokens = right_tokens(world.processor, [row["answer"] for row in rows])
    logps = completion_logps(load_policy(world.base).eval(), world.processor, rows, tokens)
    for row, ids, scores in zip(rows, tokens, logps, strict=True):
        cache.add(Trajectory(row["uid"], tuple(ids), tuple(scores), 0, True, row["answer"]))
    return cache


def _seconds(work: Callable[[], None]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin
