"""AutoNPO: train, watch, probe, choose a distance, roll back, and replay with guidance from the near future.

The controller drives a trainer factory and keeps all its state in the run folder: `metrics.jsonl` holds every executed
step, `events.jsonl` every decision. After a kill the state is rebuilt from those two files and the newest complete
checkpoint, and the run goes on as if nothing had happened.

Two clocks: `policy_step` is the place on the trajectory and goes back at a roll-back; `compute_step` counts executed
optimiser steps and never goes back.
"""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import TrainerCallback

from .checkpoints import checkpoint_folder, complete_checkpoints, require_complete
from .config import RunConfig
from .learning_signal import variance_cost
from .policies import load_policy, tokenizer_digest, tokenizer_of
from .progress import progress
from .runs import RunFolder
from .sampling import completion_logps, sample_rollouts
from .sources import GuidanceSource, GuidanceWindow
from .trainer import NPOTrainer, Verifier
from .trajectories import GuidanceCache, Trajectory
from .trigger import Candidate, Decision, Mistake, PlateauWarning, choose_distance
from .watch import Segment, Watch

DIVERGENCE_ROLLOUTS = 128
"""Probe rollouts that the divergence of V̂ is measured on."""


class TrainerFactory(Protocol):
    """Makes a fresh trainer of the same run: same base weights, data order and arguments every time."""

    def __call__(
        self, output_dir: Path, guidance: GuidanceSource | None, callbacks: Sequence[TrainerCallback]
    ) -> NPOTrainer: ...


class AutoNPO:
    """Controller of a run that intervenes by itself.

    Args:
        make_trainer: Trainer factory. Its trainers must train on `dataset` in a fixed order with `logging_steps=1`,
            `save_steps=config.checkpoint_every` and `max_steps=config.compute_steps`.
        config: Settings; trigger, probe, choice, cache, checkpoint and compute settings are used here.
        run: Run folder that the controller writes to and resumes from.
        rows: Data set rows by uid: prompt, answer and, for visual tasks, image.
        processor: Processor or tokenizer of the policy.
        verifier: `verifier(text, row) -> Verdict`.
        intervene: False watches and logs warnings, but never rolls back: plain GRPO.
        quiet: Without a progress bar.
    """

    def __init__(
        self,
        make_trainer: TrainerFactory,
        config: RunConfig,
        run: RunFolder,
        rows: Mapping[str, Mapping[str, Any]],
        processor: Any,
        verifier: Verifier,
        intervene: bool = True,
        quiet: bool = False,
    ):
        self.make_trainer = make_trainer
        self.config = config
        self.run_folder = run
        self.rows = rows
        self.processor = processor
        self.verifier = verifier
        self.intervene = intervene
        self.quiet = quiet

    def run(self) -> NPOTrainer:
        """Train until the compute budget is spent; return the trainer with the final policy."""
        segments = [_segment(event) for event in self.run_folder.effective_events() if event["event"] == "segment"]
        if not segments:
            segments.append(self._open(Segment(branch=0, start=0, compute_start=0)))
        resume_from = self._resume_point(segments[-1])
        done = self._lineage(segments)
        spent = done[-1]["compute_step"] if done else 0
        with progress(self.config.compute_steps, self.config.method, self.quiet, start=spent) as bar:
            while True:
                watch = Watch(self.config, self.run_folder, segments, bar, self.intervene)
                warning = watch.replay(self._lineage(segments))
                trainer = self.make_trainer(self._branch(segments[-1]), self._guidance(segments[-1]), [watch])
                watch.trainer = trainer
                if warning is None and watch.compute_step < self.config.compute_steps:
                    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
                    warning = watch.warning
                elif resume_from is not None:
                    trainer._load_from_checkpoint(str(resume_from))
                if warning is None or watch.compute_step >= self.config.compute_steps:
                    return trainer
                following = self._decide(trainer, watch, warning, segments)
                if following is None:
                    resume_from = checkpoint_folder(self._branch(segments[-1]), warning.step)
                else:
                    segments.append(self._open(following))
                    resume_from = self.run_folder.path / following.resume_from
                del trainer, watch
                gc.collect()

    # State from the run folder

    def _open(self, segment: Segment) -> Segment:
        self.run_folder.event("segment", **asdict(segment))
        return segment

    def _branch(self, segment: Segment) -> Path:
        return self.run_folder.path / "branches" / f"{segment.branch:02d}"

    def _guidance(self, segment: Segment) -> GuidanceSource | None:
        if segment.guidance is None:
            return None
        path = self.run_folder.path / segment.guidance
        cache = GuidanceCache.load(path, tokenizer_digest(self.processor), self.rows)
        return GuidanceWindow(cache, segment.start, segment.guide_until)

    def _resume_point(self, segment: Segment) -> Path | None:
        """Newest complete checkpoint of the segment; metric lines past it are dropped, to be executed again."""
        saved = complete_checkpoints(self._branch(segment))
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
        return None if segment.resume_from is None else require_complete(self.run_folder.path / segment.resume_from)

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
            found |= complete_checkpoints(self._branch(segment))
        return dict(sorted(found.items()))

    # Decisions

    def _decide(
        self, trainer: NPOTrainer, watch: "Watch", warning: PlateauWarning, segments: Sequence[Segment]
    ) -> Segment | None:
        """Probe, choose, fill the cache. The next segment, or None when the warning is dismissed."""
        run, config, step = self.run_folder, self.config, warning.step
        clocks = {"policy_step": step, "compute_step": watch.compute_step}
        left = config.compute_steps - watch.compute_step
        # a replay that the budget would cut short is no candidate
        origins = [saved for saved in self._checkpoints(segments) if saved < step <= saved + left]
        mistakes = watch.pool.since(min(origins, default=step))
        if not mistakes:
            run.event(
                "dismissed", **clocks, reason="no checkpoint that the budget allows to replay from, or no mistake since"
            )
            return None
        probed = self._probe(trainer, mistakes, step)
        quality = float(np.mean([t.correct for group in probed for t in group]))
        run.event(
            "probe",
            **clocks,
            pool=len(mistakes),
            prompts=len(probed),
            rollouts=len(probed) * config.probe_rollouts,
            pass_rate=quality,
        )
        if quality < config.confirm_quality:
            run.event("dismissed", **clocks, reason=f"the probe's pass rate {quality:.3f} is below confirm_quality")
            return None
        candidates = self._candidates(step, {s: self._checkpoints(segments)[s] for s in origins}, mistakes, probed)
        decision = choose_distance(candidates, config.quality_floor)
        run.event("choice", **clocks, **_decision_record(decision))
        if decision.chosen is None:
            run.event("dismissed", **clocks, reason=decision.reason)
            return None
        origin = decision.chosen.policy_step
        folder = self._checkpoints(segments)[origin]
        replayed = [mistake for mistake in mistakes if mistake.step > origin]
        name = f"guidance/{segments[-1].branch:02d}-{step:05d}.parquet"
        cache = self._fill_cache(trainer, replayed, step, folder)
        if not len(cache):
            run.event("dismissed", **clocks, reason="the guide solved none of the prompts to be replayed")
            return None
        cache.save(run.path / name)
        run.event(
            "cache",
            **clocks,
            file=name,
            prompts=len(replayed),
            cached=len(cache),
            rollouts=len(replayed) * config.cache_rollouts,
        )
        run.event("rollback", **clocks, to=origin, distance=decision.chosen.distance)
        return Segment(
            branch=segments[-1].branch + 1,
            start=origin,
            compute_start=watch.compute_step,
            resume_from=str(folder.relative_to(run.path)),
            guidance=name,
            guide_until=step,
        )

    def _probe(self, trainer: NPOTrainer, mistakes: Sequence[Mistake], step: int) -> list[list[Trajectory]]:
        """Rollouts of the current policy on a random subset of the pool, a list per prompt."""
        rng = np.random.default_rng([self.config.seed, step, 1])
        chosen = rng.permutation(len(mistakes))[: self.config.probe_prompts]
        return self._sample(trainer, [mistakes[i].uid for i in sorted(chosen)], self.config.probe_rollouts, step, 1)

    def _sample(
        self, trainer: NPOTrainer, uids: Sequence[str], k: int, step: int, stream: int
    ) -> list[list[Trajectory]]:
        return sample_rollouts(
            trainer.accelerator.unwrap_model(trainer.model),
            self.processor,
            [self.rows[uid] for uid in uids],
            k,
            self.verifier,
            seed=int(np.random.SeedSequence([self.config.seed, step, stream]).generate_state(1)[0]),
            max_new_tokens=self.config.max_completion_length,
            source_step=step,
            temperature=self.config.temperature,
        )

    def _candidates(
        self,
        step: int,
        origins: Mapping[int, Path],
        mistakes: Sequence[Mistake],
        probed: Sequence[Sequence[Trajectory]],
    ) -> list[Candidate]:
        """Q̂ and V̂ of every saved distance.

        Q̂(Δ): pass rate of the current policy on the probed failures since t−Δ (paper). V̂(Δ): the proxy between the
        current policy, which sampled the tokens and would be the guide, and the policy at t−Δ, which would learn from
        them (paper: exp of the per-token KL).
        """
        failed_at = {mistake.uid: mistake.step for mistake in mistakes}
        flat = [trajectory for group in probed for trajectory in group]
        keep = np.random.default_rng([self.config.seed, step, 2]).permutation(len(flat))[:DIVERGENCE_ROLLOUTS]
        judged = [flat[i] for i in sorted(keep)]
        rows = [self.rows[trajectory.uid] for trajectory in judged]
        guide_logps, mask = _padded([trajectory.logps for trajectory in judged])
        candidates = []
        for origin, folder in origins.items():
            since = [group for group in probed if failed_at[group[0].uid] > origin]
            quality = float(np.mean([t.correct for group in since for t in group])) if since else 0.0
            learner = load_policy(folder).eval()
            logps = completion_logps(learner, self.processor, rows, [trajectory.token_ids for trajectory in judged])
            variance = variance_cost(
                _padded(logps)[0], guide_logps, mask, self.config.variance_proxy, c=self.config.variance_c
            )
            candidates.append(
                Candidate(
                    distance=step - origin, policy_step=origin, quality=quality, variance=variance, prompts=len(since)
                )
            )
        return candidates

    def _fill_cache(
        self, trainer: NPOTrainer, mistakes: Sequence[Mistake], step: int, learner_folder: Path
    ) -> GuidanceCache:
        """Guides of the current policy for the prompts that failed since the roll-back point."""
        config = self.config
        sampled = self._sample(trainer, [mistake.uid for mistake in mistakes], config.cache_rollouts, step, 3)
        flat = [trajectory for group in sampled for trajectory in group if trajectory.correct]
        if config.cache_rule == "closest" and flat:
            learner = load_policy(learner_folder).eval()
            rows = [self.rows[trajectory.uid] for trajectory in flat]
            scores = completion_logps(learner, self.processor, rows, [trajectory.token_ids for trajectory in flat])
            flat = [
                Trajectory(**{**vars(trajectory), "policy_logps": tuple(logps)})
                for trajectory, logps in zip(flat, scores, strict=True)
            ]
        cache = GuidanceCache(
            [tokenizer_of(self.processor).eos_token_id],
            config.max_completion_length,
            tokenizer_digest(self.processor),
            self.rows,
        )
        cache.fill(flat, config.cache_rule)
        return cache


def _segment(event: Mapping[str, Any]) -> Segment:
    return Segment(**{name: event[name] for name in Segment.__dataclass_fields__})


def _decision_record(decision: Decision) -> dict[str, Any]:
    return {
        "chosen": None if decision.chosen is None else decision.chosen.distance,
        "at_edge": decision.at_edge,
        "reason": decision.reason,
        "candidates": [{**asdict(c), "signal": c.signal} for c in decision.candidates],
    }


def _padded(rows: Sequence[Sequence[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of unequal length as (rows, longest) values, zero-padded, and their mask."""
    width = max(map(len, rows))
    values, mask = torch.zeros(len(rows), width), torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        values[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = True
    return values, mask
