"""AutoNPO: train, watch, probe, choose a distance, roll back, and replay with guidance from the near future."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..guidance.trajectories import Trajectory
from ..method.signal import RatioSums, quality, ratio_sums, shown, variance_cost
from ..method.trigger import Candidate, Decision, Mistake, choose_distance
from ..streams import DIVERGENCE, PROBE
from ..trainer.trainer import NPOTrainer
from ..trainer.vllm import trainer_generate
from .controller import Controller
from .record import record_probe
from .watch import Segment, Watch

Weighed = tuple[Candidate, list[float], list[int]]
"""A candidate, and by probed prompt the sum of log q − log π in nats and the tokens that it is over."""

DIVERGENCE_ROLLOUTS = 128
"""Probe rollouts that the divergence of V̂ is measured on."""


class AutoNPO(Controller):
    """Controller of a run that intervenes by itself: at a plateau warning that a probe confirms.

    Arguments are those of `Controller`.
    """

    acts_on_warnings = True

    def _decide(self, trainer: NPOTrainer, watch: Watch, step: int, segments: Sequence[Segment]) -> Segment | None:
        """Probe, choose, fill the cache. The next segment, or None when the warning is dismissed."""
        run, config = self.run_folder, self.config
        clocks = {"policy_step": step, "compute_step": watch.compute_step}
        left = config.compute_steps - watch.compute_step
        # a replay that the budget would cut short is no candidate
        checkpoints = self._checkpoints(segments)
        farthest = min(left, config.max_distance or left)
        origins = {saved: folder for saved, folder in checkpoints.items() if saved < step <= saved + farthest}
        if config.roll_back:
            mistakes = watch.pool.since(min(origins, default=step))
            lacking = "no checkpoint that the budget allows to replay from, or no mistake since"
        else:
            mistakes, lacking = watch.pool.since(0) if left else [], "no budget left to guide in, or no mistake"
        if not mistakes:
            run.event("dismissed", **clocks, reason=lacking)
            return None
        probed = self._probe(trainer, mistakes, step)
        pass_rate = float(np.mean([t.correct for group in probed for t in group]))
        run.event(
            "probe",
            **clocks,
            pool=len(mistakes),
            prompts=len(probed),
            rollouts=len(probed) * config.probe_rollouts,
            pass_rate=pass_rate,
        )
        if pass_rate < config.confirm_quality:
            self._note(watch, clocks, mistakes, probed, [])
            run.event("dismissed", **clocks, reason=f"the probe's pass rate {pass_rate:.3f} is below confirm_quality")
            return None
        known = [trajectory for group in probed for trajectory in group]
        if not config.roll_back:
            self._note(watch, clocks, mistakes, probed, [])
            until = min(step + config.ahead_window, step + left)
            ahead = self._prompts_of(trainer, step, until)
            return self._replay(trainer, watch, step, checkpoints[step], ahead, until, known)
        weighed = self._candidates(step, origins, mistakes, probed)
        self._note(watch, clocks, mistakes, probed, weighed)
        decision = choose_distance([candidate for candidate, _, _ in weighed], config.quality_floor)
        run.event("choice", **clocks, **_decision_record(decision))
        if decision.chosen is None:
            run.event("dismissed", **clocks, reason=decision.reason)
            return None
        origin = decision.chosen.policy_step
        replayed = [mistake for mistake in mistakes if mistake.step > origin]
        uids = [mistake.uid for mistake in replayed]
        return self._replay(trainer, watch, step, origins[origin], uids, step, known)

    def _complaints(self, trainer: NPOTrainer) -> list[str]:
        return [] if self.config.roll_back else self._order_complaints(trainer, self.config.compute_steps)

    def _probe(self, trainer: NPOTrainer, mistakes: Sequence[Mistake], step: int) -> list[list[Trajectory]]:
        """Rollouts of the current policy on a random subset of the pool, a list per prompt."""
        chosen = PROBE.generator(self.config.seed, step).permutation(len(mistakes))[: self.config.probe_prompts]
        policy = trainer.accelerator.unwrap_model(trainer.model)
        uids = [mistakes[i].uid for i in sorted(chosen)]
        return self._sample(policy, uids, self.config.probe_rollouts, step, PROBE, (step,), trainer_generate(trainer))

    def _candidates(
        self,
        step: int,
        origins: Mapping[int, Path],
        mistakes: Sequence[Mistake],
        probed: Sequence[Sequence[Trajectory]],
    ) -> list[Weighed]:
        """Q̂ and V̂ of every saved distance, with the divergence behind V̂ by probed prompt.

        Q̂(Δ): Q with one rollout of the current policy, its pass rate, on the probed failures since t−Δ (paper). The
        probe draws from the whole pool, so a near distance rests on few prompts, and may be chosen for their luck.
        V̂(Δ): the proxy between the current policy, which sampled the tokens and would be the guide, and the policy at
        t−Δ, which would learn from them (paper: exp of the per-token KL).
        """
        failed_at = {mistake.uid: mistake.step for mistake in mistakes}
        flat = [trajectory for group in probed for trajectory in group]
        keep = DIVERGENCE.generator(self.config.seed, step).permutation(len(flat))[:DIVERGENCE_ROLLOUTS]
        judged = [flat[i] for i in sorted(keep)]
        candidates: list[Weighed] = []
        for origin, folder in origins.items():
            since = np.array([[t.correct for t in group] for group in probed if failed_at[group[0].uid] > origin])
            logps = self._score(self._learner(folder), judged)
            log_weights = [np.subtract(ours, t.logps) for ours, t in zip(logps, judged, strict=True)]
            ratios = ratio_sums(log_weights, "source")
            variance = variance_cost(ratios.total(), self.config.variance_proxy, self.config.variance_c)
            candidate = Candidate(
                distance=step - origin,
                policy_step=origin,
                quality=float(quality(shown(since, 1), np.ones(len(since)))[0]) if len(since) else 0.0,
                variance=float(variance),
                prompts=len(since),
            )
            candidates.append((candidate, *_by_prompt(probed, judged, ratios)))
        return candidates

    def _note(
        self,
        watch: Watch,
        clocks: Mapping[str, int],
        mistakes: Sequence[Mistake],
        probed: Sequence[Sequence[Trajectory]],
        weighed: Sequence[Weighed],
    ) -> None:
        if self.config.record_mib:
            record_probe(self.run_folder, watch.segments[-1].branch, clocks, mistakes, probed, weighed)


def _by_prompt(
    probed: Sequence[Sequence[Trajectory]], judged: Sequence[Trajectory], ratios: RatioSums
) -> tuple[list[float], list[int]]:
    """Sum of log q − log π (nats) and number of tokens of the judged rollouts of each probed prompt."""
    places = {group[0].uid: place for place, group in enumerate(probed)}
    sums, tokens = [0.0] * len(probed), [0] * len(probed)
    for place, nats, count in zip([places[t.uid] for t in judged], ratios.log_ratio, ratios.tokens, strict=True):
        sums[place] += float(nats)
        tokens[place] += int(count)
    return sums, tokens


def _decision_record(decision: Decision) -> dict[str, Any]:
    return {
        "chosen": None if decision.chosen is None else decision.chosen.distance,
        "at_edge": decision.at_edge,
        "reason": decision.reason,
        "candidates": [{**asdict(c), "signal": c.signal} for c in decision.candidates],
    }
