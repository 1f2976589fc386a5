"""What a controller samples and scores outside of training: probes, guides, their log-probs under other policies."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..guidance.fingerprints import image_digest, tokenizer_digest
from ..guidance.trajectories import Filled, GuidanceCache, Trajectory
from ..guidance.verdicts import Verifier
from ..processes import own_device
from ..runs.config import RunConfig
from ..streams import CACHE, Stream
from ..trainer.inputs import end_tokens
from ..trainer.sampling import Generate, Lazily, shared_logps, shared_rollouts
from .factory import TrainerFactory, Training


class Offline:
    """Off-line rollouts of a run, with the prompts, the length and the distribution of its training.

    Args:
        make_trainer: Trainer factory, for policies alone.
        config: Settings.
        rows: Data set rows by uid.
        processor: Processor or tokenizer of the policy.
        verifier: `verifier(text, row) -> Verdict`.
    """

    def __init__(
        self,
        make_trainer: TrainerFactory,
        config: RunConfig,
        rows: Mapping[str, Mapping[str, Any]],
        processor: Any,
        verifier: Verifier,
    ):
        self.make_trainer = make_trainer
        self.config = config
        self.rows = rows
        self.processor = processor
        self.verifier = verifier
        self.training = Training.planned(config, processor)

    def _precision(self) -> torch.autocast:
        """Matrix products as the trainer's policy computes them: one that is compared with it must too."""
        half = self.training.half
        return torch.autocast(own_device().type, half or torch.bfloat16, enabled=half is not None)

    def _sample(
        self,
        policy: PreTrainedModel,
        uids: Sequence[str],
        k: int,
        step: int,
        stream: Stream,
        place: Sequence[int],
        generate: Generate | None = None,
    ) -> list[list[Trajectory]]:
        training = self.training
        with self._precision():  # weights are then made 16 bits once, not for every token
            return shared_rollouts(
                policy,
                self.processor,
                Lazily(self.rows.__getitem__, uids),
                k,
                self.verifier,
                seed=stream.seed(self.config.seed, *place),
                max_new_tokens=training.max_completion_length,
                source_step=step,
                **asdict(training.sampling),
                batch=self.config.rollout_batch,
                score_batch=self.config.score_batch,
                generate=generate,
                chat_template_kwargs=training.chat_template_kwargs,
                score_temperature=training.sampling.temperature,
            )

    def _score(self, policy: PreTrainedModel, trajectories: Sequence[Trajectory]) -> list[list[float]]:
        """Log-probs of trajectories under another policy, in nats, at the training's temperature."""
        rows = Lazily(self.rows.__getitem__, [trajectory.uid for trajectory in trajectories])
        tokens = [trajectory.token_ids for trajectory in trajectories]
        with self._precision():
            return shared_logps(
                policy,
                self.processor,
                rows,
                tokens,
                self.config.score_batch,
                temperature=self.training.sampling.temperature,
                chat_template_kwargs=self.training.chat_template_kwargs,
                unsampled=self.training.sampling.unsampled,
            )

    def _fill_cache(
        self,
        guide: PreTrainedModel,
        uids: Sequence[str],
        step: int,
        learner_folder: Path | None,
        generate: Generate | None = None,
        known: Sequence[Trajectory] = (),
    ) -> tuple[GuidanceCache, int]:
        """Guides of a policy for some prompts, and the rollouts that were sampled for them."""
        config = self.config
        if config.cache_stop and config.cache_rule == "first":  # the other rules choose among all
            return self._sample_until_solved(guide, uids, step, generate, known)
        sampled = self._sample(guide, uids, config.cache_rollouts, step, CACHE, (step, 0), generate)
        flat = [trajectory for group in sampled for trajectory in group]
        if config.cache_rule == "closest" and any(trajectory.correct for trajectory in flat):
            flat = [trajectory for trajectory in flat if trajectory.correct]
            scores = self._score(self._learner(learner_folder), flat)
            flat = [
                replace(trajectory, policy_logps=tuple(logps)) for trajectory, logps in zip(flat, scores, strict=True)
            ]
        cache = self._empty_cache(guide)
        cache.fill(flat, config.cache_rule)
        return cache, len(uids) * config.cache_rollouts

    def _sample_until_solved(
        self,
        guide: PreTrainedModel,
        uids: Sequence[str],
        step: int,
        generate: Generate | None,
        known: Sequence[Trajectory],
    ) -> tuple[GuidanceCache, int]:
        """Guides as `_fill_cache`, but a prompt is sampled no further than its first usable rollout (ours).

        All open prompts are sampled together, in turns of 1, 1, 2, 4, … rollouts up to `cache_rollouts`. A prompt that
        the guide was sampled on already joins when the others have had as many.
        """
        cache = self._empty_cache(guide)
        cache.fill([trajectory for trajectory in known if trajectory.uid in set(uids)])
        tried = Counter(trajectory.uid for trajectory in known)
        waiting = [uid for uid in uids if uid not in cache]
        turn = done = spent = 0
        filled = Filled()
        while waiting and done < self.config.cache_rollouts:
            k = min(max(1, done), self.config.cache_rollouts - done)
            asked = [uid for uid in waiting if tried[uid] <= done]
            if asked:
                sampled = self._sample(guide, asked, k, step, CACHE, (step, turn), generate)
                cache.fill([trajectory for group in sampled for trajectory in group])
                filled += cache.filled
            turn, done, spent = turn + 1, done + k, spent + k * len(asked)
            waiting = [uid for uid in waiting if uid not in cache]
        cache.filled = filled
        return cache, spent

    def _empty_cache(self, guide: PreTrainedModel, kind: type[GuidanceCache] = GuidanceCache) -> GuidanceCache:
        ends, longest = end_tokens(guide, self.processor), self.training.max_completion_length
        return kind.empty(self.processor, ends, longest, self.rows)

    def _load_cache(self, path: Path, kind: type[GuidanceCache] = GuidanceCache) -> GuidanceCache:
        """A cache of this run; refused when tokenizer or picture settings are others than those it was made with."""
        return kind.load(path, tokenizer_digest(self.processor), self.rows, image_digest(self.processor))

    def _learner(self, folder: Path | None) -> PreTrainedModel:
        """Policy of a checkpoint, in evaluation mode; None is the base policy."""
        policy = self.make_trainer.policy(folder).eval()
        if policy.dtype != self.training.weights:
            _retype(policy, self.training.weights)
        # autocast keeps a copy in 16 bits of every weight that could be trained: memory that a GPU has not to spare,
        # and on a CPU, where `_sample` opens it once for all tokens, the point of it
        if own_device().type != "cpu":
            policy.requires_grad_(False)
        return policy.to(own_device())  # pyright: ignore[reportArgumentType] (a decorator of transformers hides `self`)


def _retype(policy: PreTrainedModel, weights: torch.dtype) -> None:
    """Give a policy's weights the type of the trainer's: `from_pretrained` takes that of the files, TRL 32 bits."""
    before = policy.dtype
    for name, weight in policy.named_parameters():
        if weight.dtype == before and "lora_" not in name:
            weight.data = weight.data.to(weights)
