"""What a run will cost before it starts, and whether it fits: memory, disk, rollouts, tokens, arithmetic.

Everything is counted from the settings and from the shapes of the policy; no weight is loaded. Memory is an estimate
(ours): weights, gradients and Adam's moments exactly, activations and logits by the rules at `step_memory`.
"""

import math
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from ..control.scheduled import planned_interventions
from ..runs.checkpoints import ADAM_COPIES, retention_bytes
from ..runs.config import RunConfig
from ..runs.folder import runs_folder
from ..runs.launchers import Launcher, read_launcher
from ..trainer.memory import DRAWN, at_once, device_memory, logits_bytes
from ..world.pretrained import PolicySize, policy_config, policy_size
from ..world.warmstart import base_policy_folder
from .factory import batch_shape

GIB = 2**30
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
BYTES = {"float32": 4, "bfloat16": 2}

ACTIVATIONS = 34
"""Bytes of activations that a layer keeps per token and unit of width, in 16 bits (Korthikanti et al. 2022, eq. 2)."""

SCORED = 8
"""Bytes per token and word of a scoring pass: logits and log-softmax in 32 bits; 2 more where products have 16."""

HALF = 2
"""Bytes of a number in 16 bits."""

LOGIT_TILE = (4096, 32768)
"""Tokens and words of the tiles in which TRL's head computes log-probabilities."""


@dataclass(frozen=True)
class StepMemory:
    """GPU memory of one process, in bytes: while it samples, trains, and decides, where trajectories are scored.

    Each has the weights, the moments and vLLM's share. `casts` are weights in 16 bits beside those in 32, `keys` the
    keys and values of what transformers samples. A decision needs neither gradients nor what a step computes, but
    `learner`, a second policy, and `scoring`.
    """

    weights: int
    gradients: int
    moments: int
    activations: int
    logits: int
    casts: int
    keys: int
    learner: int
    scoring: int
    vllm: int

    @property
    def training(self) -> int:
        """Sum of what a training step holds."""
        return self._always + self.gradients + self.activations + self.logits

    @property
    def sampling(self) -> int:
        """Sum of what is held while the step's rollouts are sampled."""
        return self._always + self.keys

    @property
    def deciding(self) -> int:
        """Sum of what is held while guides are sampled and scored; 0 for a method that does neither."""
        return self._always + self.learner + self.scoring if self.scoring else 0

    @property
    def total(self) -> int:
        """The largest of the three."""
        return max(self.training, self.sampling, self.deciding)

    @property
    def _always(self) -> int:
        return self.weights + self.moments + self.casts + self.vllm


def step_memory(config: RunConfig, size: PolicySize, layout: Launcher) -> StepMemory:
    """GPU memory of one process (ours).

    Weights, gradients (of what is trained) and two Adam moments are exact, and spread over the processes when sharded;
    of the weights a layer and the head are then gathered in 16 bits. Where products have 16 bits and weights 32,
    autocast keeps a copy of each weight that is trained, and makes one of the others where they are used: of the head,
    and of a layer with gradient checkpointing, of all without. Keys and values are of all rollouts of a process, which
    are sampled together, in the weights' type, with one layer for the prompts in full, and `DRAWN` copies of the
    logits of a place. The learner is a whole
    policy in every process: the one that V̂ compares with, that guides are chosen for, or that guides the run; nothing
    of it is trained. Scoring: the logits of `score_batch` responses over all words, and one layer for their tokens in
    full. vLLM's share is counted at all times, though it sleeps while others work: what it leaves behind is not known.
    Activations: 34 bytes per token, layer and unit of width in 16 bits, twice that in 32; with gradient checkpointing
    one copy of each layer's input, and one layer in full. Logits: two tiles of `LOGIT_TILE` in which TRL's head works,
    and where the head is trained a gradient of it in float32. The longest prompt and response are taken; a prompt limit
    of 0 counts as the response length.
    """
    shards = layout.processes if layout.sharded else 1
    width = BYTES[config.dtype]
    rows, passes = batch_shape(config, layout.processes)
    longest = (config.max_prompt_length or config.max_completion_length) + config.max_completion_length
    tokens = rows * longest
    precision = HALF if "bf16" in (config.mixed_precision, config.dtype.replace("bfloat", "bf")) else 4
    layer = ACTIVATIONS * precision // 2 * tokens * size.hidden
    inputs = precision * tokens * size.hidden * size.layers
    head = 0 if config.lora_rank else size.vocabulary * size.hidden
    used = HALF * (size.total // size.layers + size.vocabulary * size.hidden)
    frozen = size.total - (0 if config.lora_rank else size.trained)
    casts = HALF * size.trained + min(HALF * frozen, used if config.gradient_checkpointing else HALF * frozen)
    learner, scored = _off_line(config)
    adapters = trained_width(config) * size.trained if config.lora_rank else 0
    together = scored_at_once(config, size)
    response = together * config.max_completion_length
    read = together * longest
    words = (SCORED + (HALF if precision == HALF else 0)) * response * size.vocabulary
    prompt = longest - config.max_completion_length
    place = 4 * DRAWN * size.vocabulary + ACTIVATIONS * precision // 2 * prompt * size.hidden
    return StepMemory(
        weights=(width * size.total + adapters) // shards + (used if layout.sharded else 0),
        gradients=trained_width(config) * size.trained // shards,
        moments=2 * trained_width(config) * size.trained // shards,
        activations=inputs + layer if config.gradient_checkpointing else layer * size.layers,
        logits=4 * (2 * min(LOGIT_TILE[0], tokens) * min(LOGIT_TILE[1], size.vocabulary) + head),
        casts=casts if width > precision and not layout.sharded else 0,
        keys=rows * passes * (width * size.cached * longest + place) if config.vllm == "off" else 0,
        learner=learner * (width * size.total + adapters),
        scoring=scored * (words + ACTIVATIONS * precision // 2 * read * size.hidden),
        vllm=int(config.vllm_memory * gpu_bytes(config)) if config.vllm == "colocate" else 0,
    )


def scored_at_once(config: RunConfig, size: PolicySize) -> int:
    """Responses in a scoring pass off line: `score_batch`, or fewer where the device's memory asks for it."""
    memory = gpu_bytes(config) or device_memory("cpu")
    return at_once(config.score_batch, logits_bytes(size.vocabulary, config.max_completion_length), memory)


def _off_line(config: RunConfig) -> tuple[int, int]:
    """Policies that are loaded beside the trained one, and whether trajectories are scored, by the method."""
    if config.method == "autonpo":
        return 1, 1
    if config.method == "npo":
        guided, beside = config.guide_from != "none", config.cache_rule == "closest" or config.guide_from == "own"
        return int(guided and beside), int(guided)
    return (1, 1) if config.method in ("luffy", "rlep") else (0, 0)


def trained_width(config: RunConfig) -> int:
    """Bytes of a trained weight; adapters are kept in float32 beside weights of 16 bits (peft's own rule)."""
    return BYTES["float32"] if config.lora_rank else BYTES[config.dtype]


def gpu_bytes(config: RunConfig) -> int:
    """Memory of a GPU: as set, else that of the one here; 0 without one."""
    if config.gpu_memory:
        return int(config.gpu_memory * GIB)
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


def checkpoint_bytes(config: RunConfig, size: PolicySize, layout: Launcher) -> int:
    """Disk that the checkpoints of a run take at most, by the retention rule.

    Each branch keeps its newest resumable ones, and a roll-back opens a branch; where training stops for a decision a
    checkpoint is written too. A resumable checkpoint holds the weights (adapters only with LoRA) and two moments of
    what is trained; under FSDP the weights a second time, in the form that a resume needs. A slimmed one holds the
    weights.
    """
    width = trained_width(config)
    stored = size.trained if config.lora_rank else size.total
    turns = {"npo": len(planned_interventions(config)), "autonpo": config.max_interventions}.get(config.method, 0)
    count = -(-config.compute_steps // config.checkpoint_every) + turns
    keep = config.checkpoint_keep * (1 + turns)
    full = count if keep <= 0 else min(keep, count)
    plain = retention_bytes(size.trained, width, count, keep)
    untrained = (stored - size.trained) * width * count
    again = full * width * stored if layout.sharded else 0
    return plain + untrained + again


def require_room(config: RunConfig, folder: Path, base: Path) -> int:
    """Disk that the checkpoints of a run will take beside those that are there, in bytes, when there is room for them.

    Args:
        config: Settings.
        folder: The run folder.
        base: Folder of the base policy, which is what is trained, whatever its name says of its size.

    Raises:
        ValueError: Less than that is free where the run folder lies.
    """
    size = policy_size(config, policy_config(str(base)))
    written = sum(file.stat().st_size for file in (folder / "branches").rglob("*") if file.is_file())
    needed = max(0, checkpoint_bytes(config, size, read_launcher(config.launcher)) - written)
    free = shutil.disk_usage(_existing(folder)).free
    if needed > free:
        raise ValueError(
            f"The checkpoints will take {amount(needed)} (a resumable one holds the weights and two moments, "
            f"checkpoint_keep is {config.checkpoint_keep}), but {amount(free)} are free under {folder}. Lower "
            "checkpoint_keep, raise checkpoint_every, train adapters (lora_rank), or set NPO_RUNS to a larger disk."
        )
    return needed


def plan(config: RunConfig, root: Path | None = None) -> dict[str, str]:
    """What a run will cost: a table of names and values with units.

    Args:
        config: Settings.
        root: Folder of all runs; the project's `data/runs` if None.
    """
    layout = read_launcher(config.launcher)
    size = policy_size(config, policy_config(_policy(config)))
    memory = step_memory(config, size, layout)
    rows, passes = batch_shape(config, layout.processes)
    count = -(-config.compute_steps // config.checkpoint_every)
    rollouts = config.compute_steps * config.rollouts_per_step
    probes, cached = _offline_rollouts(config)
    longest = config.max_completion_length
    read = (config.max_prompt_length or longest) + longest
    table = {
        "policy": f"{config.policy}, {size.total:,} parameters, {size.trained:,} trained",
        "processes": f"{layout.processes} on {layout.machines} machine(s), {'sharded' if layout.sharded else 'whole'}",
        "optimiser steps (compute clock)": f"{config.compute_steps:,}",
        **_rolled_back(config),
        "a step": f"{config.prompts_per_step} prompts × {config.num_generations} rollouts",
        "a process in a step": f"{passes} passes of {rows} rows",
        "rollouts in training": f"{rollouts:,}",
        "rollouts of probes, at most": f"{probes:,}",
        "rollouts of guidance caches, at most": f"{cached:,}",
        "tokens sampled, at most": f"{(rollouts + probes + cached) * longest:,}",
        "arithmetic in training, at most": f"{6 * size.total * rollouts * read:.2g} operations",
        "GPU memory of a process": f"{amount(memory.total)}: {_parts(memory)}",
        "of it in sampling, training, a decision": ", ".join(
            map(amount, (memory.sampling, memory.training, memory.deciding))
        ),
        "responses scored at a time": f"{scored_at_once(config, size):,} (score_batch {config.score_batch:,})",
        "a token in vLLM's cache": amount(BYTES["bfloat16"] * size.cached),
        "checkpoints": f"{count}, {amount(checkpoint_bytes(config, size, layout))} on disk",
        "a resumable checkpoint": amount(_one_checkpoint(config, size, layout)),
        "evaluation rollouts": f"{2 * config.eval_problems * config.eval_rollouts:,}",
    }
    problems = _misfits(config, size, layout, memory, runs_folder() if root is None else root)
    return {**table, "fits": "; ".join(problems) or "yes"}


def fits(table: dict[str, str]) -> bool:
    """Whether a planned run fits the GPU and the disk."""
    return table["fits"] == "yes"


def _misfits(config: RunConfig, size: PolicySize, layout: Launcher, memory: StepMemory, root: Path) -> list[str]:
    problems = []
    if gpu_bytes(config) and memory.total > gpu_bytes(config):
        problems.append(
            f"no: a process needs {amount(memory.total)} of the GPU's {amount(gpu_bytes(config))}; lower "
            "micro_batch (training) or score_batch (decision), set gradient_checkpointing, train adapters (lora_rank), "
            "or use more GPUs"
        )
    needed, free = checkpoint_bytes(config, size, layout), shutil.disk_usage(_existing(root)).free
    if needed > free:
        problems.append(
            f"no: checkpoints need {amount(needed)}, {amount(free)} are free under {root}; lower "
            "checkpoint_keep, raise checkpoint_every, or set NPO_RUNS to a larger disk"
        )
    return problems


def _one_checkpoint(config: RunConfig, size: PolicySize, layout: Launcher) -> int:
    stored = size.trained if config.lora_rank else size.total
    copies = stored * (2 if layout.sharded else 1) + (ADAM_COPIES - 1) * size.trained
    return trained_width(config) * copies


def _offline_rollouts(config: RunConfig) -> tuple[int, int]:
    """Rollouts of probes and of guidance caches, at most: as if every prompt were a mistake at every intervention."""
    if config.method == "autonpo":
        prompts = min(config.pool_capacity, config.compute_steps * config.prompts_per_step)
        times = config.max_interventions
        return times * config.probe_prompts * config.probe_rollouts, times * prompts * config.cache_rollouts
    if config.method == "npo":
        windows = sum(stage.guide_until - stage.back_to for stage in planned_interventions(config))
        return 0, windows * config.prompts_per_step * config.cache_rollouts
    if config.method in ("luffy", "rlep"):
        return 0, config.trained_steps * config.prompts_per_step * config.cache_rollouts
    return 0, 0


def _parts(memory: StepMemory) -> str:
    return ", ".join(f"{part.name} {amount(getattr(memory, part.name))}" for part in fields(memory))


def amount(size: int) -> str:
    """Bytes in a unit that fits."""
    unit = min(int(math.log2(size)) // 10, len(UNITS) - 1) if size else 0
    value = size / 2 ** (10 * unit)
    digits = 0 if value >= 100 or not unit else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {UNITS[unit]}"


def _rolled_back(config: RunConfig) -> dict[str, str]:
    """Steps whose result is thrown away, where they are known before the run."""
    if config.method != "npo":
        return {}
    lost = sum(stage.at - stage.back_to for stage in planned_interventions(config))
    return {"of them scout and rolled back": f"{lost:,}"}


def _policy(config: RunConfig) -> str:
    return str(base_policy_folder(config)) if config.policy == "tiny" else config.policy


def _existing(folder: Path) -> Path:
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
