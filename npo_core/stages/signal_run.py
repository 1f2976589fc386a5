"""The signal along a run of ours: its own checkpoints, prompts and settings, and the external teacher."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..runs.checkpoints import complete_checkpoints
from ..runs.config import RunConfig
from ..runs.folder import RunFolder
from ..runs.measurement import Pair, plan_pairs
from ..runs.settings import SignalSettings
from ..world.computing import Computing, run_policy, threads
from ..world.warmstart import teacher_folder
from . import run as stages
from .measure import COMPARED, Measurement
from .signal import TEACHER, MeasuredSignal


def measure_run(
    config: RunConfig,
    origins: Sequence[int],
    settings: SignalSettings,
    *,
    distances: int = 20,
    also: Sequence[int] = (),
    root: Path | None = None,
    quiet: bool = False,
    rollout_batch: int | None = None,
    score_batch: int | None = None,
) -> MeasuredSignal:
    """Measure a GRPO run of ours; the run is made first if it is not there. The external teacher is a source too.

    Args:
        config: Settings of the run, method "grpo".
        origins: Policy steps to measure from; 0 is the base policy.
        settings: How to measure.
        distances: Distances above 0 from each origin, at most.
        also: Distances beside the grid, such as those of a `GainPlan`.
        root: Folder of all runs; the project's `data/runs` if None.
        quiet: Without progress bars.
        rollout_batch: Responses that are sampled at a time, at most; the run's own setting if None.
        score_batch: Responses that are scored at a time, at most, in the same way.

    Raises:
        ValueError: Another method, or an origin without checkpoint.
    """
    if config.method != "grpo":
        raise ValueError(
            f"method is {config.method!r}; distances are measured along a run that never rolled back: grpo."
        )
    origins = checked_origins(config, origins)  # before the run is made, not after
    world = stages.prepare(config, quiet)
    if len(world.train) < settings.prompts:
        raise ValueError(f"prompts is {settings.prompts}, but the data has {len(world.train)} rows; lower prompts.")
    run = stages.run(config, root, quiet)
    policies = run_policies(run, world)
    others = {TEACHER: teacher_folder(config, quiet)} if config.policy == "tiny" else {}
    pairs = plan_pairs(list(policies), origins, distances, others=list(others), also=also)
    # a folder for each way of sampling: what was sampled is kept whatever is measured from it
    sampled = {name: value for name, value in settings.of_rollouts().items() if name not in COMPARED}
    digest = hashlib.sha256(json.dumps(sampled, sort_keys=True).encode()).hexdigest()[:6]
    folder, batches = run.path / f"signal-{digest}", {"rollout_batch": rollout_batch, "score_batch": score_batch}
    measurement = run_measurement(config, world, folder, policies, pairs, settings, quiet, others=others, **batches)
    with threads(config.threads):  # as in training: at this size a second one costs more than it brings
        return MeasuredSignal(measurement.folder, pairs, measurement.run())


def run_policies(run: RunFolder, world: stages.World) -> dict[int, Path]:
    """Policies of a run that never rolled back by policy step: the base policy, and its checkpoints."""
    return {0: world.base, **complete_checkpoints(run.branch(0), resumable=False)}


def run_measurement(
    config: RunConfig,
    world: stages.World,
    folder: Path,
    policies: Mapping[int, Path],
    pairs: Sequence[Pair],
    settings: SignalSettings,
    quiet: bool,
    *,
    others: Mapping[str, Path] = MappingProxyType({}),
    rollout_batch: int | None = None,
    score_batch: int | None = None,
) -> Measurement:
    """A measurement of policies of a run: its prompts from the first on, its verifier, and the way that it computes.

    Args:
        config: Settings of the run.
        world: Its base policy and data.
        folder: Folder of the measurement.
        policies: Policies by policy step.
        pairs: What to compare.
        settings: How to measure.
        quiet: Without a progress bar.
        others: Policies outside the run, by name.
        rollout_batch: Responses that are sampled at a time, at most; the run's own setting if None.
        score_batch: Responses that are scored at a time, at most, in the same way.
    """
    return Measurement(
        folder,
        {**{f"{step:06d}": policy for step, policy in policies.items()}, **others},
        pairs,
        world.processor,
        list(world.train.select(range(min(settings.prompts, len(world.train))))),
        world.verifier,
        settings,
        load=partial(run_policy, config),
        quiet=quiet,
        computing=Computing.of(config),
        unsampled=None if config.mask_unsampled else (),
        rollout_batch=config.rollout_batch if rollout_batch is None else rollout_batch,
        score_batch=config.score_batch if score_batch is None else score_batch,
    )


def settings_for(config: RunConfig, **given: Any) -> SignalSettings:
    """Settings of a measurement of one of our runs: its response length, seed and c, and no more prompts than it has.

    Args:
        config: Settings of the run.
        given: Settings that take the place of those.
    """
    out = {"max_new_tokens": config.max_completion_length, "seed": config.seed, "c": config.variance_c, **given}
    out["prompts"] = min(out.get("prompts", SignalSettings.prompts), config.train_problems)
    if "gradients" in out:
        out["gradients"] = min(out["gradients"], out["prompts"])
    return SignalSettings(**out)


def checked_origins(config: RunConfig, origins: Sequence[int]) -> list[int]:
    """The origins, or the default ones if there are none.

    Raises:
        ValueError: There will be no checkpoint at one, or none after it; said before the run is made.
    """
    every = config.checkpoint_every
    for origin in origins:
        if origin % every or not 0 <= origin < config.compute_steps:
            raise ValueError(
                f"Policy step {origin} cannot be measured from: it must be a multiple of checkpoint_every = {every}, "
                f"from 0 to below compute_steps = {config.compute_steps}."
            )
    return list(origins) or default_origins(config)


def default_origins(config: RunConfig) -> list[int]:
    """The base policy, the start of the plateau (`late_start`), and the middle of the run, each with a checkpoint."""
    every = config.checkpoint_every
    asked = {0, config.late_start // every * every, config.compute_steps // 2 // every * every}
    return sorted(origin for origin in asked if origin < config.compute_steps)
