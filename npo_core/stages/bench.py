"""`python -m npo_core bench`: speed and memory, as ratios and counts measured in one run.

Machines are shared and noisy, so every speed is a ratio of two things that take turns in this process, and the median
over the turns is reported; steps are timed in CPU seconds of this one-threaded process, which leave out the waiting
for a busy core. One of the things timed is `handwritten_loop`, GRPO without any trainer: what a step costs at least.
Memory is the peak of another process, which does one short run and nothing else. The table is printed and written to
`data/runs/bench.json`.
"""

import gc
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Qwen3VLProcessor,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from ..files import write_json
from ..guidance.fingerprints import tokenizer_of
from ..guidance.trajectories import GuidanceCache, Trajectory
from ..method.groups import group_advantages
from ..processes import own_device
from ..runs.checkpoints import checkpoint_folder, mark_complete
from ..runs.config import RunConfig, resolve_config
from ..runs.folder import runs_folder
from ..trainer.dataset import training_schedule
from ..trainer.inputs import encode_prompts
from ..trainer.pictures import left_out
from ..trainer.sampling import completion_logps
from ..world.policies import keep_freed_memory, load_policy, quiet_transformers
from ..world.tasks import make_dataset, parse_uid, write_response
from . import run as stages
from .clocks import wall_clock, work_clock

TURNS, STEPS = 5, 4
"""Turns that each contestant takes, and optimiser steps in a turn (the first of a turn is not counted)."""

MEMORY_STEPS = 8
"""Optimiser steps of the run whose memory is measured."""


class StepClock(TrainerCallback):
    """Seconds of each optimiser step, rollouts included, on the given clock."""

    def __init__(self, clock: Callable[[], float]):
        self.seconds: list[float] = []
        self._clock = clock
        self._last = clock()

    def on_train_begin(self, *args, **kwargs):
        self._last = self._clock()

    def on_step_end(self, *args, **kwargs):
        now = self._clock()
        self.seconds.append(now - self._last)
        self._last = now


def main() -> int:
    """Measure everything, print the table, write `data/runs/bench.json`; 1 if a limit is missed."""
    config = resolve_config("grpo", "cpu", 0, {"compute_steps": TURNS * STEPS})
    world = stages.prepare(config)
    torch.set_num_threads(config.threads)  # as in a run, and so is the next line
    keep_freed_memory()
    from .bench_real import real_rows  # it times its steps as they are timed here

    rows = [*_step_ratios(config, world), *checkpoint_ratios(config, world), _run_memory(), *real_rows()]
    print(f"{'':<62}{'value':>9}  {'unit':<7}{'limit':>7}")
    for one in rows:
        limit = "" if one["limit"] is None else f"{one['limit']:.2f}"
        print(f"{one['name']:<62}{one['value']:>9.3f}  {one['unit']:<7}{limit:>7}")
    runs_folder().mkdir(parents=True, exist_ok=True)
    write_json(runs_folder() / "bench.json", rows)
    missed = [one["name"] for one in rows if one["limit"] is not None and one["value"] > one["limit"]]
    if missed:
        print("over the limit:", ", ".join(missed), file=sys.stderr)
    return 1 if missed else 0


def handwritten_loop(config: RunConfig, world: stages.World, schedule: Dataset) -> Iterator[dict[str, float]]:
    """GRPO as a single script would have it, without trainer and accelerate: the yardstick of a training step.

    The weights after a step are NPOTrainer's without guidance, given the same samples, up to rounding. All rollouts of
    a step go through one forward pass, whatever `config.micro_batch` says, and the loss is that of `loss_type` grpo.

    Args:
        config: Settings.
        world: Base policy, processor and verifier.
        schedule: Data set rows in the order of training, `config.prompts_per_step` for each step.

    Yields:
        After each optimiser step what a script would log: loss, reward, entropy (nats per token), grad_norm.
    """
    torch.manual_seed(config.seed)
    n, tokenizer = config.num_generations, tokenizer_of(world.processor)
    model = load_policy(world.base, config.freeze_vision).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = {"params": [parameter for parameter in trained if parameter.ndim > 1]}
    vectors = {"params": [parameter for parameter in trained if parameter.ndim == 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(
        [matrices, vectors], lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    sampling = GenerationConfig(
        do_sample=True,
        temperature=config.temperature,
        top_k=0,
        max_new_tokens=config.max_completion_length,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[model.config.image_token_id],
    )
    for start in range(0, len(schedule), config.prompts_per_step):
        rows = [schedule[index] for index in range(start, start + config.prompts_per_step)]
        inputs = _every_row(encode_prompts(world.processor, rows), n)
        width = inputs["input_ids"].shape[1]
        with torch.no_grad():
            ids = model.generate(**inputs, generation_config=sampling)
        completions = ids[:, width:]
        is_end = (completions == tokenizer.eos_token_id).int()
        mask = (is_end.cumsum(dim=1) - is_end == 0).int()  # the first end of sequence is the last token that counts

        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        verdicts = [world.verifier(text, rows[index // n]).correct for index, text in enumerate(texts)]
        rewards = torch.tensor(verdicts).float().view(-1, n)
        advantages = group_advantages(rewards).view(-1, 1)

        inputs["input_ids"] = ids
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask], dim=1)
        types = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(completions, dtype=types.dtype)], dim=1)
        with left_out(model, sampling.suppress_tokens):
            logits = model(**inputs, logits_to_keep=completions.shape[1] + 1).logits[:, :-1] / config.temperature
        logps = logits.log_softmax(dim=-1)
        chosen = logps.gather(-1, completions.unsqueeze(-1)).squeeze(-1)
        ratio = torch.exp(chosen - chosen.detach())  # 1 at the first update, so clipping never binds
        loss = (-(ratio * advantages) * mask).sum(dim=1).div(mask.sum(dim=1)).mean()

        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            entropy = (-(logps.exp() * logps).sum(dim=-1) * mask).sum() / mask.sum()
        log = {"loss": loss, "reward": rewards.mean(), "entropy": entropy, "grad_norm": norm}
        yield {name: value.item() for name, value in log.items()}


def _every_row(inputs: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """Model inputs of distinct prompts, each n times over."""
    pictures = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(dim=-1).tolist())
    rows = {name: value.repeat_interleave(n, dim=0) for name, value in inputs.items() if name != "pixel_values"}
    return rows | {"pixel_values": torch.cat([picture for picture in pictures for _ in range(n)])}


def _step_ratios(config: RunConfig, world: stages.World) -> list[dict[str, Any]]:
    """Step times in turns: trainers with and without guidance, vision and shared work, and a hand-written loop."""
    maker = stages.TrainerMaker(config, world)
    guidance = _exact_guides(world)
    text_rows = make_dataset([parse_uid(uid) for uid in world.train["uid"]], text_only=True)
    text_schedule = training_schedule(text_rows, config.compute_steps, config.prompts_per_step, config.data_seed)

    def plain(schedule: Dataset, shared: bool = True) -> Callable[[Path], list[float]]:
        return lambda folder: timed(_plain(config, world, schedule, maker.reward, folder, shared))

    contestants: dict[str, Callable[[Path], list[float]]] = {
        "hand-written loop": lambda folder: _timed_loop(handwritten_loop(config, world, maker.schedule)),
        "GRPOTrainer": plain(maker.schedule),
        "NPOTrainer": lambda folder: timed(maker(folder)),
        "NPOTrainer, guided": lambda folder: timed(maker(folder, guidance)),
        "GRPOTrainer, unshared": plain(maker.schedule, shared=False),
        "text": plain(text_schedule),
        "text, unshared": plain(text_schedule, shared=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}  # medians of the turns
    for _ in range(TURNS):
        for name, measure in contestants.items():
            with tempfile.TemporaryDirectory() as folder:
                seconds[name].append(statistics.median(measure(Path(folder))))
            gc.collect()
    median = {name: statistics.median(values) for name, values in seconds.items()}
    steps = resolve_config("grpo", "cpu").compute_steps
    minutes = steps * median["NPOTrainer"] / 60

    def ratio(name: str, above: str, below: str, limit: float | None) -> dict[str, Any]:
        turns = [one / other for one, other in zip(seconds[above], seconds[below], strict=True)]
        return measured(name, statistics.median(turns), "ratio", limit)

    return [
        measured("GRPOTrainer step", median["GRPOTrainer"], "CPU s"),
        measured("hand-written loop step", median["hand-written loop"], "CPU s"),
        ratio("NPOTrainer step / hand-written loop step", "NPOTrainer", "hand-written loop", 1.3),
        ratio("NPOTrainer / GRPOTrainer step, no guidance", "NPOTrainer", "GRPOTrainer", 1.02),
        ratio("NPOTrainer / GRPOTrainer step, with guidance", "NPOTrainer, guided", "GRPOTrainer", 1.05),
        ratio("vision / text-only step", "GRPOTrainer", "text", 1.4),
        ratio("vision / text-only step, no work shared", "GRPOTrainer, unshared", "text, unshared", None),
        measured(f"whole run, projected: {steps} median NPOTrainer steps, {config.threads} thread", minutes, "min"),
    ]


def measured(name: str, value: float, unit: str, limit: float | None = None) -> dict[str, Any]:
    """A row of the table; a limit is the most that it may be."""
    return {"name": name, "value": value, "unit": unit, "limit": limit}


def timed(trainer: GRPOTrainer) -> list[float]:
    """Seconds of each optimiser step but the first, of the device's work (`work_clock`)."""
    clock = StepClock(work_clock(trainer.accelerator.device))
    trainer.args.save_strategy = "no"
    trainer.args.max_steps = STEPS
    trainer.add_callback(clock)
    trainer.train()
    return clock.seconds[1:]


def _timed_loop(loop: Iterator[dict[str, float]]) -> list[float]:
    """CPU seconds of each optimiser step but the first, in which the loop also loads its policy."""
    seconds = []
    for _ in range(STEPS):
        begin = time.process_time()
        next(loop)
        seconds.append(time.process_time() - begin)
    return seconds[1:]


def _plain(config, world, schedule, reward, folder: Path, shared: bool = True) -> GRPOTrainer:
    arguments = stages.training_arguments(config, folder).to_dict()
    known = GRPOConfig.__dataclass_fields__
    settings = {name: value for name, value in arguments.items() if name in known and known[name].init}
    settings.pop("generation_batch_size", None)
    model = load_policy(world.base, config.freeze_vision)
    processor = world.processor
    if not shared:
        _unshare(model)
        processor = _UnsharedProcessor.of(processor)
    with quiet_transformers():
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=GRPOConfig(**settings),
            train_dataset=schedule,
            processing_class=processor,
        )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def _unshare(model: PreTrainedModel) -> None:
    """Undo `sharing.share_work`: every row is computed anew, as transformers does."""
    base = model.model
    for part, method in ((base.visual, "forward"), (base, "get_rope_index"), (base.language_model, "forward")):
        part.__dict__.pop(method)


class _UnsharedProcessor:
    """Makes a processor that handles every copy of a prompt anew, as transformers' own does."""

    @staticmethod
    def of(processor):
        class Unshared(type(processor)):
            def __call__(self, *args, **kwargs):
                return Qwen3VLProcessor.__call__(self, *args, **kwargs)

            def apply_chat_template(self, *args, **kwargs):
                return Qwen3VLProcessor.apply_chat_template(self, *args, **kwargs)

        return Unshared(processor.image_processor, processor.tokenizer, chat_template=processor.chat_template)


def _exact_guides(world: stages.World) -> GuidanceCache:
    """A guide for every training prompt, from the exact solver: as many replacements as the gate allows."""
    tokenizer = tokenizer_of(world.processor)
    cache = GuidanceCache.empty(world.processor, [tokenizer.eos_token_id], 1 << 10)
    model = load_policy(world.base).eval()
    problems = [parse_uid(uid) for uid in world.train["uid"]]
    ids = [tokenizer(write_response(p, p.states()) + tokenizer.eos_token)["input_ids"] for p in problems]
    logps = completion_logps(model, world.processor, list(world.train), ids)
    for problem, tokens, scores in zip(problems, ids, logps, strict=True):
        cache.add(Trajectory(problem.uid, tuple(tokens), tuple(scores), 0, True, tokenizer.decode(tokens)))
    return cache


def checkpoint_ratios(config: RunConfig, world: stages.World) -> list[dict[str, Any]]:
    """Time to write and to restore a checkpoint, in training steps of the same trainer."""
    writes, restores = [], []
    with tempfile.TemporaryDirectory() as folder:
        now = wall_clock(own_device())  # a checkpoint waits for the disk
        clock = StepClock(now)
        trainer = stages.TrainerMaker(config, world)(Path(folder), None, [clock])
        trainer.args.save_strategy = "no"
        trainer.args.max_steps = STEPS
        trainer.train()
        step = statistics.median(clock.seconds[1:])
        target = checkpoint_folder(Path(folder), trainer.state.global_step)
        for _ in range(TURNS):
            shutil.rmtree(target, ignore_errors=True)
            begin = now()
            with quiet_transformers():
                trainer._save_checkpoint(trainer.model, trial=None)
            mark_complete(target)
            writes.append(now() - begin)
            begin = now()
            trainer._load_from_checkpoint(str(target))
            trainer._load_optimizer_and_scheduler(str(target))
            trainer._load_rng_state(str(target))
            restores.append(now() - begin)
        size = sum(entry.stat().st_size for entry in target.iterdir()) / 2**20
    return [
        measured("writing a checkpoint / training step", statistics.median(writes) / step, "ratio", 0.2),
        measured("restoring a checkpoint / training step", statistics.median(restores) / step, "ratio", 1.0),
        measured("checkpoint that can be resumed from", size, "MiB"),
        measured("CPU threads", float(torch.get_num_threads()), ""),
    ]


def _run_memory() -> dict[str, Any]:
    """Peak memory of a process that does one run, evaluations and checkpoints included."""
    settings = ["--preset", "cpu", "--set", f"compute_steps={MEMORY_STEPS}", "--quiet"]
    with tempfile.TemporaryDirectory() as root:
        peak = _peak_memory([sys.executable, "-m", "npo_core", "grpo", *settings, "--root", root])
    return measured(f"resident memory, peak of a process that runs {MEMORY_STEPS} steps", peak, "GiB", 1.5)


def _peak_memory(command: list[str]) -> float:
    """Peak resident memory of a command in GiB; CalledProcessError if it fails.

    A child of this process would begin with this process's own peak as its record, so a bare Python stands between.
    """
    watch = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", watch, *command], check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout) / (2**30 if sys.platform == "darwin" else 2**20)
