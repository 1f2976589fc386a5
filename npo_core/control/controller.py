"""The controller of a run: train in segments, roll back, replay with guidance, and go on after a kill.

It drives a trainer factory and keeps all its state in the run folder: `metrics.jsonl` holds every executed step,
`events.jsonl` every decision. After a kill the state is rebuilt from those two files and the newest complete
checkpoint, and the run goes on as if nothing had happened.

A `Controller` as it is never intervenes: plain GRPO, watched. `ScheduledNPO` intervenes at given steps, `AutoNPO` when
the trigger warns.

Two clocks: `policy_step` is the place on the trajectory and goes back at a roll-back; `compute_step` counts executed
optimiser steps and never goes back.
"""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from ..guidance.sources import GuidanceSource, GuidanceWindow
from ..guidance.trajectories import Trajectory
from ..guidance.verdicts import Verifier
from ..processes import agree, is_writer
from ..progress import progress
from ..runs.checkpoints import checkpoint_folder, checkpoint_step, complete_checkpoints, require_complete
from ..runs.config import RunConfig
from ..runs.folder import RunFolder
from ..trainer.trainer import NPOTrainer
from ..trainer.vllm import place, trainer_generate
from .agreement import keep_order, prompt_order, require_agreement
from .factory import TrainerFactory, Training
from .fingerprint import require_same_factory
from .offline import Offline
from .record import GuidedGroups
from .watch import Segment, Watch

UNSOLVED = "no rollout of the guide can guide a prompt that is to be replayed"

RATE_SLACK = 1e-6
"""Metric lines hold pass rates with six digits."""


class Controller(Offline):
    """Runs segments of training until the compute budget is spent; plain GRPO unless a subclass decides otherwise.

    Args:
        make_trainer: Trainer factory. Its trainers must have `logging_steps=1` and `max_steps=config.compute_steps`,
            see `agreement`; what they know of training is read from them (`factory.Training`). They see the same data
            in the same order, best that of `training_schedule` with `shuffle_dataset=False`.
        config: Settings; trigger, probe, choice, cache, retention and compute settings are used here.
        run: Run folder that the controller writes to and resumes from.
        rows: Data set rows by uid: prompt, answer and, for visual tasks, image.
        processor: Processor or tokenizer of the policy.
        verifier: `verifier(text, row) -> Verdict`.
        quiet: Without a progress bar.

    Raises:
        ValueError: In `run`: a trainer that does not fit the settings, another factory than the run was begun with, or
            a replay that sees other prompts.
    """

    acts_on_warnings = False
    """Whether a plateau warning stops training for a decision."""

    def __init__(
        self,
        make_trainer: TrainerFactory,
        config: RunConfig,
        run: RunFolder,
        rows: Mapping[str, Mapping[str, Any]],
        processor: Any,
        verifier: Verifier,
        quiet: bool = False,
    ):
        super().__init__(make_trainer, config, rows, processor, verifier)
        self.run_folder = run
        self.quiet = quiet or not is_writer()
        self.label = config.method  # on the bar

    def run(self) -> NPOTrainer:
        """Train until the compute budget is spent; return the trainer with the final policy.

        Another process that writes the run folder is waited for, see `RunFolder.writing`.
        """
        with self.run_folder.writing(self.quiet):
            return self._train()

    def _train(self) -> NPOTrainer:
        segments = [_segment(event) for event in self.run_folder.effective_events() if event["event"] == "segment"]
        if not segments:
            segments.append(self._open(self._first_segment()))
        resume_from = self._resume_point(segments[-1])
        done = self._lineage(segments)
        spent = done[-1]["compute_step"] if done else segments[-1].compute_start
        with progress(self.config.compute_steps, self.label, self.quiet, start=spent) as bar:
            while True:
                watch = Watch(
                    self.config, self.run_folder, segments, bar, self.acts_on_warnings, self._stop_at(segments)
                )
                due = watch.replay(self._lineage(segments))
                guidance = self._guidance(segments[-1], resume_from)
                trainer = self.make_trainer(self._branch(segments[-1]), guidance, [watch])
                watch.trainer = trainer
                trainer.guided_sink = self._record(segments[-1])
                self._require_fit(trainer, watch, guidance)
                trainer.remove_callback(PrinterCallback)  # the bar is there, and metrics.jsonl has all numbers
                self.training = Training.of(trainer)
                if resume_from is not None:
                    keep_order(trainer, checkpoint_step(resume_from))
                if due is None and watch.compute_step < self.config.compute_steps:
                    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
                    due = watch.due
                elif resume_from is not None:
                    place(trainer, resume_from)
                if due is None or watch.compute_step >= self.config.compute_steps:
                    return trainer
                bar.label(f"{self.label}, deciding at {due}")
                following = self._decide(trainer, watch, due, segments)
                bar.label(self.label)
                if following is None:
                    resume_from = checkpoint_folder(self._branch(segments[-1]), due)
                else:
                    segments.append(self._open(following))
                    resume_from = (
                        None if following.resume_from is None else self.run_folder.path / following.resume_from
                    )
                del trainer, watch
                gc.collect()

    def _require_fit(self, trainer: NPOTrainer, watch: Watch, guidance: GuidanceSource | None) -> None:
        """Refuse a trainer that is not one of this run; called before it is trained."""
        folder = self._branch(watch.segments[-1])
        further = self._complaints(trainer) if isinstance(trainer, NPOTrainer) else []
        require_agreement(trainer, self.config, folder, guidance, watch, list(self.rows), further)
        require_same_factory(self.run_folder, trainer)

    def _record(self, segment: Segment) -> GuidedGroups | None:
        """Where the guided groups of a segment go."""
        limit = self.config.record_mib
        return GuidedGroups(self.run_folder, segment.branch, self.rows, self.processor, limit) if limit else None

    # What a subclass decides

    def _first_segment(self) -> Segment:
        """How the run begins: from the base policy, at compute step 0, without guidance."""
        return Segment(branch=0, start=0, compute_start=0)

    def _complaints(self, trainer: NPOTrainer) -> list[str]:
        """What else keeps this controller from training with a trainer, a line each."""
        return []

    def _order_complaints(self, trainer: NPOTrainer, steps: int) -> list[str]:
        """What keeps this run from knowing the prompts of its first `steps` steps beforehand, a line each."""
        order, needed = prompt_order(trainer), steps * Training.of(trainer).prompts_per_step
        if not trainer.args.shuffle_dataset and order is not None and len(order) >= needed:
            return []
        return [
            "train_dataset must name the prompts of every step, as the cache is filled for those of a window: "
            f"train on npo_core.training_schedule ({needed} rows or more) with shuffle_dataset=False"
        ]

    def _prompts_of(self, trainer: NPOTrainer, start: int, stop: int) -> list[str]:
        """Prompts of the steps after policy step `start` up to `stop`, each once."""
        order, per_step = prompt_order(trainer), self.training.prompts_per_step
        assert order is not None  # `_order_complaints` refuses a stream
        return list(dict.fromkeys(order[start * per_step : stop * per_step]))

    def _stop_at(self, segments: Sequence[Segment]) -> int | None:
        """Policy step at which the last segment stops for a decision, or None."""
        return None

    def _decide(self, trainer: NPOTrainer, watch: Watch, step: int, segments: Sequence[Segment]) -> Segment | None:
        """The next segment, or None to train on as if nothing had happened; called where training stopped."""
        raise NotImplementedError(f"{type(self).__name__} stopped at policy step {step} but decides nothing.")

    # State from the run folder

    def _open(self, segment: Segment) -> Segment:
        self.run_folder.event("segment", **asdict(segment))
        return segment

    def _branch(self, segment: Segment) -> Path:
        return self.run_folder.path / "branches" / f"{segment.branch:02d}"

    def _guidance(self, segment: Segment, resume_from: Path | None = None) -> GuidanceSource | None:
        """Source of a segment that trains on from a checkpoint (None: from the base policy)."""
        if segment.guidance is None:
            return None
        path = self.run_folder.path / segment.guidance
        cache = self._load_cache(path)
        return GuidanceWindow(cache, segment.start, segment.guide_until)

    def _resume_point(self, segment: Segment) -> Path | None:
        """Newest complete checkpoint of the segment; metric lines past it are dropped, to be executed again."""
        saved = agree(lambda: complete_checkpoints(self._branch(segment)))
        step = max(saved, default=segment.start)
        compute_step = segment.compute_start + step - segment.start
        last = max((line["compute_step"] for line in self.run_folder.metrics()), default=0)
        if last > compute_step or any(
            e.get("compute_step", 0) > compute_step for e in self.run_folder.effective_events()
        ):
            self.run_folder.drop_metrics_after(compute_step)
            self.run_folder.event("resume", compute_step=compute_step, policy_step=step)
        if saved:
            return saved[step]
        origin = segment.resume_from
        return None if origin is None else agree(lambda: require_complete(self.run_folder.path / origin))

    def _lineage(self, segments: Sequence[Segment]) -> list[dict[str, Any]]:
        """Metric lines of the current trajectory: rolled-back ones left out, in the order of `policy_step`."""
        metrics = self.run_folder.metrics()
        lines: list[dict[str, Any]] = []
        for segment in segments:
            lines = [line for line in lines if line["policy_step"] <= segment.start]
            lines += [line for line in metrics if line["branch"] == segment.branch]
        return lines

    def _checkpoints(self, segments: Sequence[Segment]) -> dict[int, Path]:
        """Resumable checkpoints of the current trajectory by policy step."""
        found: dict[int, Path] = {}
        for segment in segments:
            found = {step: path for step, path in found.items() if step <= segment.start}
            found |= agree(partial(complete_checkpoints, self._branch(segment)))
        return dict(sorted(found.items()))

    # Guides

    def _replay(
        self,
        trainer: NPOTrainer,
        watch: Watch,
        step: int,
        origin: Path | None,
        uids: Sequence[str],
        until: int,
        known: Sequence[Trajectory] = (),
    ) -> Segment | None:
        """Fill a cache with guides, note the roll-back, and return the segment of the replay.

        An origin at `step` itself is no roll-back: training goes on from there with guides for the prompts ahead.

        Args:
            trainer: Holds the current policy, the guide.
            watch: Watch of the segment that ends here.
            step: Policy step of the guide.
            origin: Checkpoint to roll back to; None is the base policy.
            uids: Prompts to sample guides for.
            until: Policy step at which guidance ends.
            known: Rollouts of the guide that were sampled already, as by a probe.

        Returns:
            None when the guide solves none of the prompts; the cause is noted as an event.
        """
        run, last = self.run_folder, watch.segments[-1]
        clocks = {"policy_step": step, "compute_step": watch.compute_step}
        start = 0 if origin is None else checkpoint_step(origin)
        name, guided = None, self.config.guide_from != "none"
        if guided:
            own = self.config.guide_from == "own"
            guide = self._learner(origin) if own else trainer.accelerator.unwrap_model(trainer.model)
            generate = None if own else trainer_generate(trainer)
            cache, rollouts = self._fill_cache(
                guide, uids, start if own else step, origin, generate, () if own else known
            )
            if not len(cache):
                run.event("dismissed", **clocks, reason=f"{UNSOLVED}: {cache.filled}", rollouts=rollouts)
                return None
            name = f"guidance/{last.branch:02d}-{step:05d}.parquet"
            agree(lambda: cache.save(run.path / name))
            held = {"cached": len(cache), "refused": cache.filled.refused}
            run.event("cache", **clocks, file=name, prompts=len(uids), **held, rollouts=rollouts)
        if start == step:
            run.event("ahead", **clocks, until=until)
        else:
            run.event("rollback", **clocks, to=start, distance=step - start)
        return Segment(
            branch=last.branch + 1,
            start=start,
            compute_start=watch.compute_step,
            resume_from=None if origin is None else str(origin.relative_to(run.path)),
            guidance=name,
            guide_until=until,
            reseed=not guided,
        )

    def _gated(self, uids: Sequence[str], segments: Sequence[Segment], start: int) -> list[str]:
        """Those of the prompts that were gated when the steps after `start` first ran; all with `cache_prompts` all.

        A prompt that has not come yet stays in.
        """
        if self.config.cache_prompts == "all":
            return list(uids)
        lines = [line for line in self._lineage(segments) if line["policy_step"] > start]
        rates = {uid: rate for line in lines for uid, rate in line["groups"].items()}
        return [uid for uid in uids if rates.get(uid, 0.0) <= self.training.tau_gate + RATE_SLACK]


def _segment(event: Mapping[str, Any]) -> Segment:
    return Segment(**{name: event[name] for name in Segment.__dataclass_fields__})
