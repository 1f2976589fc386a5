"""What is watched while a segment trains: metric lines, mistake pool, trigger, checkpoints' completion."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, set_seed

from ..guidance.sources import ReplaySource
from ..method.alarm import Alarm, AlarmSettings
from ..method.trigger import MistakePool, PlateauTrigger, PlateauWarning, TriggerSettings
from ..processes import agree, collect, is_writer, process_number
from ..progress import ProgressBar
from ..runs.checkpoints import checkpoint_folder, mark_complete, retain
from ..runs.config import RunConfig
from ..runs.folder import RunFolder
from ..streams import BRANCH
from ..trainer.trainer import NPOTrainer
from .agreement import require_same_prompts

CLOCKS = ("policy_step", "compute_step", "branch", "groups")
"""Entries of a metric line that a trainer's own of these names do not replace."""


ALARMED = {
    "reward": "npo/reward",
    "entropy": "npo/entropy",
    "length": "completions/mean_length",
    "clipped": "completions/clipped_ratio",
}
"""Metrics that the alarm watches; TRL's two count guide rows too, a slot of a group."""


@dataclass(frozen=True)
class Segment:
    """One uninterrupted stretch of training on a branch of the trajectory.

    Attributes:
        branch: Number of the branch; a roll-back opens a new one.
        start: Policy step that the branch starts from.
        compute_start: Compute step at that moment.
        resume_from: Checkpoint folder to start from, relative to the run folder; None is the base policy.
        guidance: Guidance cache, relative to the run folder, or None.
        guide_until: Policy step at which guidance ends; the end of the replay.
        reseed: Sample with fresh randomness from here on; a replay without guide would else repeat the run.
    """

    branch: int
    start: int
    compute_start: int
    resume_from: str | None = None
    guidance: str | None = None
    guide_until: int = 0
    reseed: bool = False


class Watch(TrainerCallback):
    """Writes the metric lines, feeds trigger and pool, and stops training at a warning or when the budget is spent.

    Args:
        config: Settings.
        run: Run folder that gets the metric lines and the warnings.
        segments: All segments so far; the last one is being trained.
        bar: Progress bar over compute steps.
        acts: Stop at a warning; False trains on, as plain GRPO does.
        stop_at: Policy step of the last segment at which training stops for a scheduled decision, or None.

    Attributes:
        due: Policy step at which training stopped for a decision, or None.
        compute_step: Optimiser steps executed so far.
        pool: Mistake pool of the current trajectory.
        complaints: What the alarm has to say of the newest line.
    """

    def __init__(
        self,
        config: RunConfig,
        run: RunFolder,
        segments: Sequence[Segment],
        bar: ProgressBar,
        acts: bool,
        stop_at: int | None = None,
    ):
        self.config, self.run_folder, self.bar, self.acts, self.stop_at = config, run, bar, acts, stop_at
        self.segments = list(segments)
        self.trigger = PlateauTrigger(
            TriggerSettings(
                ema=config.trigger_ema,
                window=config.trigger_window,
                reward_tolerance=config.trigger_reward_tolerance,
                entropy_drop=config.trigger_entropy_drop,
                warmup=config.trigger_warmup,
                cooldown=config.trigger_cooldown,
            )
        )
        self.alarm = Alarm(
            AlarmSettings(
                ema=config.trigger_ema,
                window=config.trigger_window,
                reward_tolerance=config.trigger_reward_tolerance,
                rise=config.alarm_rise,
                clipped=config.alarm_clipped,
            )
        )
        self.complaints: list[str] = []
        self.pool = MistakePool(config.pool_cutoff, config.pool_capacity, config.pool_expiry)
        self.due: int | None = None
        self.compute_step = 0
        self.trainer: NPOTrainer  # set once it is made, before it trains
        self._rolled_back: dict[int, list[str]] = {}

    def replay(self, lines: Sequence[Mapping[str, Any]]) -> int | None:
        """Rebuild trigger and pool from the current trajectory; the step of a decision that is still due at its end."""
        due = None
        for line in lines:
            warning = self.observe(line)
            due = line["policy_step"] if warning is not None or self._stops(line) else None
        if lines and lines[-1]["branch"] != self.segments[-1].branch:
            due = None  # the warning has had its decision: the newest segment is what came of it, or of a later one
        self.compute_step = max((line["compute_step"] for line in lines), default=0)
        self.compute_step = max(self.compute_step, self.segments[-1].compute_start)
        decided = {
            event["compute_step"] for event in self.run_folder.effective_events() if event["event"] == "dismissed"
        }
        earlier = [line for line in self.run_folder.metrics() if line["branch"] < self.segments[-1].branch]
        self._rolled_back = {line["policy_step"]: list(line["groups"]) for line in earlier}
        return None if self.compute_step in decided else due

    def _stops(self, line: Mapping[str, Any]) -> bool:
        return line["policy_step"] == self.stop_at and line["branch"] == self.segments[-1].branch

    def observe(self, line: Mapping[str, Any]) -> PlateauWarning | None:
        """Feed one metric line; a warning that calls for an intervention, or None."""
        step, self.complaints = line["policy_step"], []
        for uid, rate in line["groups"].items():
            self.pool.add(uid, step, rate)
        replay_end = next((s.guide_until for s in self.segments if s.branch == line["branch"]), 0)
        replayed = step <= replay_end
        # a baseline is guided from its first step to its last, on the one branch that it has, and can collapse too
        if not replayed or line["branch"] == 0:
            self.complaints = self.alarm.update(step, {key: line.get(name, math.nan) for key, name in ALARMED.items()})
        if replayed:
            # the guided replay is judged when it is over: until then the averages hold the intervention itself
            if step == replay_end:
                self.trigger.reset(step)
                self.alarm.reset()
            return None
        if not all(math.isfinite(line.get(name, math.nan)) for name in ("npo/reward", "npo/entropy")):
            return None  # no row of the policy was scored, every response was masked, or the step diverged
        warning = self.trigger.update(step, line["npo/reward"], line["npo/entropy"])
        enough = len(self.segments) - 1 >= self.config.max_interventions
        return None if enough or not self.acts else warning

    def on_step_begin(self, args, state, control, **kwargs):
        segment = self.segments[-1]
        if segment.reseed and state.global_step == segment.start:
            set_seed((BRANCH.seed(self.config.seed, segment.branch) + process_number()) % 2**32)
        every = self.config.rollout_every
        self.trainer.record_rollouts = bool(every) and (state.global_step % every == 0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or "npo/reward" not in logs:
            return
        segment = self.segments[-1]
        self.compute_step = segment.compute_start + state.global_step - segment.start
        line = {
            "policy_step": state.global_step,
            "compute_step": self.compute_step,
            "branch": segment.branch,
            **{name: value for name, value in numbers(logs).items() if name not in CLOCKS},
            "groups": {str(uid): round(rate, 6) for uid, rate in self.trainer.group_pass_rates.items()},
        }
        line = agree(lambda: line)
        require_same_prompts(state.global_step, self._rolled_back.get(state.global_step, []), list(line["groups"]))
        self.run_folder.append_metrics(line)
        warning = self.observe(line)
        self.due = state.global_step if warning is not None or self._stops(line) else None
        shown = {name: f"{line.get(f'npo/{name}', float('nan')):.2f}" for name in ("reward", "entropy")}
        self.bar.advance(steps=1, **shown, at=state.global_step)
        if warning is not None:
            self.run_folder.event(
                "warning", compute_step=self.compute_step, policy_step=state.global_step, **_fields(warning)
            )
        if self.complaints:
            clocks = {"compute_step": self.compute_step, "policy_step": state.global_step}
            self.run_folder.event("alarm", **clocks, complaints=self.complaints)
            self.bar.say(f"Alarm at step {state.global_step}: {'; '.join(self.complaints)}.")
        if self.due is not None or self.compute_step >= self.config.compute_steps:
            control.should_save = True
            control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        assert args.output_dir is not None
        branch, guidance = Path(args.output_dir), self.trainer.guidance
        if isinstance(guidance, ReplaySource):
            guidance.save(checkpoint_folder(branch, state.global_step))
        collect(None)  # each process writes its random state
        if is_writer():
            mark_complete(checkpoint_folder(branch, state.global_step))
            retain(branch, state.global_step, self.config.checkpoint_keep)
        collect(None)


def numbers(logs: Mapping[Any, Any]) -> dict[str, bool | int | float]:
    """The numbers among what a trainer logs, those of numpy and tensors of one element too."""
    values = {
        str(name): value.item() if isinstance(value, np.generic) or _single(value) else value
        for name, value in logs.items()
    }
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def _single(value: Any) -> bool:
    return isinstance(value, torch.Tensor | np.ndarray) and math.prod(value.shape) == 1


def _fields(warning: PlateauWarning) -> dict[str, float]:
    record = asdict(warning)
    record.pop("step")
    return record
