"""The part of `python -m npo_core bench` that takes the real model: tokens per second, steps, off-line sampling.

Fetching the model and starting it on its task takes minutes the first time, so these rows are measured where that is
done already (`make real`), and left out, which is said, where it is not. CPU seconds of one thread, as elsewhere; on a
GPU, where `gpu-check` measures the same, those of the wall.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..control.factory import Training
from ..guidance.sources import GuidanceSource
from ..guidance.trajectories import GuidanceCache, Trajectory
from ..processes import own_device
from ..runs.config import RunConfig, resolve_config
from ..runs.folder import runs_folder
from ..trainer.inputs import Sampling, encode_prompts
from ..trainer.sampling import completion_logps, sample_rollouts
from ..world.computing import precision, run_policy
from ..world.finetune import real_folder, right_tokens
from . import run as stages
from .bench import measured, timed
from .clocks import work_clock, work_unit
from .precision import compare_precisions

MODEL = "SmolLM2"
"""What the rows are called by."""

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
    return [*speed_rows(world.base), offline_row(config, world), *step_rows(config, world)]


def speed_rows(base: Path, **settings: Any) -> list[dict[str, Any]]:
    """Tokens per second, sampled and trained on, in both precisions; settings are those of `compare_precisions`."""
    return [
        measured(f"{MODEL}, {line['matrix products in']}, {what}", line[f"{what} tokens/s"], "token/s")
        for line in compare_precisions(base, **settings)
        for what in ("sampled", "trained")
    ]


def offline_row(config: RunConfig, world: stages.World) -> dict[str, Any]:
    """Off-line sampling, verdicts and all, against `generate` alone: the same prompts, seed, and so the same tokens."""
    model = run_policy(config, world.base).eval()
    device = model.device
    now = work_clock(device)
    rows, k = list(world.train.select(range(config.prompts_per_step))), config.num_generations
    inputs = encode_prompts(world.processor, [each for each in rows for _ in range(k)])
    inputs = {name: value.to(device) for name, value in inputs.items()}
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

    def seconds(work: Callable[[], None]) -> float:
        begin = now()
        work()
        return now() - begin

    with precision(config):
        plain()  # kernels are chosen and weights are cast
        turns = [seconds(offline) / seconds(plain) for _ in range(TURNS)]
    return measured(f"{MODEL}, off-line sampling / plain generate", statistics.median(turns), "ratio", LIMIT)


def step_rows(config: RunConfig, world: stages.World) -> list[dict[str, Any]]:
    """Steps with and without a guide for every prompt, in turns."""
    return rows_of_turns(config, list(step_turns(config, world)))


def step_turns(config: RunConfig, world: stages.World) -> Iterator[dict[str, float]]:
    """Median seconds of a GRPO and of an NPO step, a turn after the other."""
    maker = stages.TrainerMaker(config, world)
    guides = right_guides(config, world, maker.schedule["uid"][: 8 * config.prompts_per_step])
    for _ in range(TURNS):
        turn = {}
        for name, guidance in (("GRPO", None), ("NPO", guides)):
            with tempfile.TemporaryDirectory() as folder:
                turn[name] = statistics.median(timed(maker(Path(folder), guidance)))
        yield turn


def rows_of_turns(config: RunConfig, turns: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """A GRPO step, and the ratio within the turns, each the median over the turns so far."""
    step = f"{MODEL}, GRPO step of {config.rollouts_per_step} rollouts"
    unit = work_unit(own_device())
    ratio = statistics.median(turn["NPO"] / turn["GRPO"] for turn in turns)
    return [
        measured(step, statistics.median(turn["GRPO"] for turn in turns), unit),
        measured(f"{MODEL}, NPO / GRPO step", ratio, "ratio", 1.05),
    ]


def right_guides(config: RunConfig, world: stages.World, uids: list[str]) -> GuidanceSource:
    """The right response as a guide for each prompt, its log-probs as those that a run samples have them."""
    cache = GuidanceCache.empty(world.processor, [world.processor.eos_token_id], 1 << 10)
    rows = [world.rows[uid] for uid in dict.fromkeys(uids)]
    tokens = right_tokens(world.processor, [row["answer"] for row in rows])
    policy, about = run_policy(config, world.base).eval(), Training.planned(config, world.processor).sampling
    with precision(config):
        logps = completion_logps(
            policy, world.processor, rows, tokens, temperature=about.temperature, unsampled=about.unsampled
        )
    for row, ids, scores in zip(rows, tokens, logps, strict=True):
        guide = Trajectory(row["uid"], tuple(ids), tuple(scores), 0, True, row["answer"])
        cache.add(replace(guide, temperature=about.temperature))
    return cache
