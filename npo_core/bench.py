"""`python -m npo_core bench`: speed and memory, as ratios and counts measured in one run.

Machines are shared and noisy, so every speed is a ratio of two things that take turns in this process, and the median
over the turns is reported. The table is printed and written to `data/runs/bench.json`.
"""

import gc
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from . import stages
from .checkpoints import checkpoint_folder, mark_complete
from .config import RunConfig, resolve_config
from .policies import load_policy, load_weights, quiet_transformers, tokenizer_digest, tokenizer_of
from .runs import runs_folder, write_json
from .sampling import completion_logps
from .tasks import make_dataset, parse_uid, training_schedule, write_response
from .trajectories import GuidanceCache, Trajectory

TURNS, STEPS = 5, 4
"""Turns that each contestant takes, and optimiser steps in a turn (the first of a turn is not counted)."""


class _StepClock(TrainerCallback):
    """Seconds of each optimiser step, rollouts included."""

    def __init__(self):
        self.seconds: list[float] = []
        self._last = time.perf_counter()

    def on_train_begin(self, *args, **kwargs):
        self._last = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def main() -> int:
    """Measure everything, print the table, write `data/runs/bench.json`; 1 if a limit is missed."""
    config = resolve_config("grpo", "cpu", 0, {"compute_steps": TURNS * STEPS})
    world = stages.prepare(config)
    rows = [*_step_ratios(config, world), *_checkpoint_ratios(config, world)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rows.append({"name": "resident memory, peak of this process", "value": peak, "unit": "GiB", "limit": 3.0})
    print(f"{'':<52}{'value':>9}  {'unit':<14}{'limit':>7}")
    for row in rows:
        limit = "" if row["limit"] is None else f"{row['limit']:.2f}"
        print(f"{row['name']:<52}{row['value']:>9.3f}  {row['unit']:<14}{limit:>7}")
    runs_folder().mkdir(parents=True, exist_ok=True)
    write_json(runs_folder() / "bench.json", rows)
    missed = [row["name"] for row in rows if row["limit"] is not None and row["value"] > row["limit"]]
    if missed:
        print("over the limit:", ", ".join(missed), file=sys.stderr)
    return 1 if missed else 0


def _step_ratios(config: RunConfig, world: stages.World) -> list[dict[str, Any]]:
    """Step times of GRPOTrainer, NPOTrainer without and with guidance, and a text-only policy, in turns."""
    maker = stages.TrainerMaker(config, world)
    guidance = _exact_guides(world)
    text_rows = make_dataset([parse_uid(uid) for uid in world.train["uid"]], text_only=True)
    text_schedule = training_schedule(text_rows, config.compute_steps, config.prompts_per_step, config.data_seed)
    contestants: dict[str, Callable[[Path], Any]] = {
        "GRPOTrainer": lambda folder: _plain(config, world, maker.schedule, maker.reward, folder),
        "NPOTrainer": lambda folder: maker(folder),
        "NPOTrainer, guided": lambda folder: maker(folder, guidance),
        "GRPOTrainer, unshared": lambda folder: _plain(config, world, maker.schedule, maker.reward, folder, False),
        "text": lambda folder: _plain(config, world, text_schedule, maker.reward, folder),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(TURNS):
        for name, make in contestants.items():
            with tempfile.TemporaryDirectory() as folder:
                trainer, clock = make(Path(folder)), _StepClock()
                trainer.args.save_strategy = "no"
                trainer.args.max_steps = STEPS
                trainer.add_callback(clock)
                trainer.train()
                seconds[name] += clock.seconds[1:]
            del trainer
            gc.collect()
    median = {name: statistics.median(values) for name, values in seconds.items()}
    plain = median["GRPOTrainer"]

    def ratio(name: str, value: float, limit: float | None) -> dict[str, Any]:
        return {"name": name, "value": value, "unit": "ratio", "limit": limit}

    return [
        {"name": "GRPOTrainer step", "value": plain, "unit": "s", "limit": None},
        ratio("NPOTrainer / GRPOTrainer step, no guidance", median["NPOTrainer"] / plain, 1.02),
        ratio("NPOTrainer / GRPOTrainer step, with guidance", median["NPOTrainer, guided"] / plain, 1.05),
        ratio("vision / text-only step", plain / median["text"], 1.4),
        ratio("vision / text-only step, pictures not shared", median["GRPOTrainer, unshared"] / median["text"], None),
    ]


def _plain(config, world, schedule, reward, folder: Path, shared: bool = True) -> GRPOTrainer:
    arguments = stages.training_arguments(config, folder).to_dict()
    known = GRPOConfig.__dataclass_fields__
    settings = {name: value for name, value in arguments.items() if name in known and known[name].init}
    settings.pop("generation_batch_size", None)
    model = load_policy(world.base, config.freeze_vision)
    processor = world.processor
    if not shared:
        model.model.visual.__dict__.pop("forward")
        processor = _UnsharedProcessor.of(processor)
    with quiet_transformers():
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=GRPOConfig(**settings),
            train_dataset=schedule,
            processing_class=processor,
        )
    for callback in (stages.PrinterCallback, stages.ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


class _UnsharedProcessor:
    """Makes a processor that handles every copy of a prompt anew, as transformers' own does."""

    @staticmethod
    def of(processor):
        from transformers import Qwen3VLProcessor

        class Unshared(type(processor)):
            def __call__(self, *args, **kwargs):
                return Qwen3VLProcessor.__call__(self, *args, **kwargs)

        return Unshared(processor.image_processor, processor.tokenizer, chat_template=processor.chat_template)


def _exact_guides(world: stages.World) -> GuidanceCache:
    """A guide for every training prompt, from the exact solver: as many replacements as the gate allows."""
    tokenizer = tokenizer_of(world.processor)
    cache = GuidanceCache([tokenizer.eos_token_id], 1 << 10, tokenizer_digest(world.processor))
    model = load_policy(world.base).eval()
    problems = [parse_uid(uid) for uid in world.train["uid"]]
    ids = [tokenizer(write_response(p, p.states()) + tokenizer.eos_token)["input_ids"] for p in problems]
    logps = completion_logps(model, world.processor, list(world.train), ids)
    for problem, tokens, scores in zip(problems, ids, logps, strict=True):
        cache.add(Trajectory(problem.uid, tuple(tokens), tuple(scores), 0, True, tokenizer.decode(tokens)))
    return cache


def _checkpoint_ratios(config: RunConfig, world: stages.World) -> list[dict[str, Any]]:
    """Time to write and to restore a checkpoint, in training steps of the same trainer."""
    writes, restores = [], []
    with tempfile.TemporaryDirectory() as folder:
        clock = _StepClock()
        trainer = stages.TrainerMaker(config, world)(Path(folder), None, [clock])
        trainer.args.save_strategy = "no"
        trainer.args.max_steps = STEPS
        trainer.train()
        step = statistics.median(clock.seconds[1:])
        target = checkpoint_folder(Path(folder), trainer.state.global_step)
        for _ in range(TURNS):
            shutil.rmtree(target, ignore_errors=True)
            begin = time.perf_counter()
            with quiet_transformers():
                trainer._save_checkpoint(trainer.model, trial=None)
            mark_complete(target)
            writes.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            load_weights(trainer.accelerator.unwrap_model(trainer.model), target)
            trainer._load_optimizer_and_scheduler(str(target))
            trainer._load_rng_state(str(target))
            restores.append(time.perf_counter() - begin)
        size = sum(entry.stat().st_size for entry in target.iterdir()) / 2**20
    return [
        {
            "name": "writing a checkpoint / training step",
            "value": statistics.median(writes) / step,
            "unit": "ratio",
            "limit": 0.2,
        },
        {
            "name": "restoring a checkpoint / training step",
            "value": statistics.median(restores) / step,
            "unit": "ratio",
            "limit": 1.0,
        },
        {"name": "checkpoint that can be resumed from", "value": size, "unit": "MiB", "limit": None},
        {"name": "CPU threads", "value": float(torch.get_num_threads()), "unit": "", "limit": None},
    ]
