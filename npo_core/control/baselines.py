"""The baselines' runs: guidance from the first step on, by a teacher, a converged run, or the policy's own past.

What a baseline's own code does is a row of settings (`config.METHOD_SETTINGS`); a controller here only says where the
guides come from and what they cost. See the table in `docs/implementation.md`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..guidance.replay import OwnPast, ReplayPool
from ..guidance.sources import GuidanceSource
from ..guidance.trajectories import GuidanceCache, Trajectory
from ..processes import agree
from ..trainer.sampling import Lazily, shared_rollouts
from ..trainer.trainer import NPOTrainer
from .controller import Controller
from .watch import Segment

WHOLE_RUN = "guidance/whole-run.parquet"
"""Guides of a run that is guided from its first step to its last, inside the run folder."""


class GuidedByPolicy(Controller):
    """LUFFY and RLEP: another policy's verified-correct rollouts of the training prompts guide the whole run.

    They are sampled once, before the first step, and noted as an event. The steps of an earlier run that the guide took
    count as spent (RLEP); an external teacher is free on the clock of steps (LUFFY), as in the original.

    Args:
        guide_folder: Folder of the guide, in the Hugging Face format.
        prompts: Uids of the prompts that the run will meet, none else is sampled; all rows if None.
        chat_template_kwargs: Template arguments that the guide is asked with; it is sampled before any trainer is made.
        **kwargs: Arguments of `Controller`.
    """

    def __init__(
        self,
        *args: Any,
        guide_folder: Path,
        prompts: Collection[str] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.guide_folder = Path(guide_folder)
        met = self.rows if prompts is None else frozenset(prompts)
        self.prompts = [uid for uid in self.rows if uid in met]
        self.training = replace(self.training, chat_template_kwargs=dict(chat_template_kwargs or {}))

    @property
    def _cache_type(self) -> type[GuidanceCache]:
        return ReplayPool if self.config.guides_per_group > 1 else GuidanceCache

    def _first_segment(self) -> Segment:
        config, run = self.config, self.run_folder
        spent = config.compute_steps - config.trained_steps
        cache = self._sampled_guides(source_step=spent)
        if not len(cache):
            raise ValueError(f"The guide {self.guide_folder} solved no training prompt; it cannot guide.")
        agree(lambda: cache.save(run.path / WHOLE_RUN))
        run.event(
            "cache",
            policy_step=0,
            compute_step=spent,
            file=WHOLE_RUN,
            prompts=len(self.prompts),
            cached=len(cache),
            rollouts=len(self.prompts) * config.cache_rollouts,
        )
        return Segment(branch=0, start=0, compute_start=spent, guidance=WHOLE_RUN, guide_until=config.compute_steps)

    def _sampled_guides(self, source_step: int) -> GuidanceCache:
        """Correct rollouts of the guide; log-probs are computed for those that are kept, not for all."""
        config, training = self.config, self.training
        policy = self._learner(self.guide_folder)
        with self._precision():
            sampled = shared_rollouts(
                policy,
                self.processor,
                Lazily(self.rows.__getitem__, self.prompts),
                config.cache_rollouts,
                self.verifier,
                seed=config.seed,
                max_new_tokens=training.max_completion_length,
                source_step=source_step,
                **asdict(training.sampling),
                score=False,
                batch=config.rollout_batch,
                chat_template_kwargs=training.chat_template_kwargs,
                score_temperature=training.sampling.temperature,
            )
        cache = self._empty_cache(policy, self._cache_type)
        kept = [trajectory for group in sampled for trajectory in self._chosen(group, cache.eos_token_ids)]
        logps = self._score(policy, kept)
        cache.fill([replace(trajectory, logps=tuple(row)) for trajectory, row in zip(kept, logps, strict=True)])
        return cache

    def _chosen(self, group: Sequence[Trajectory], eos: Sequence[int]) -> list[Trajectory]:
        """Usable correct rollouts of a prompt: the first, or all of at least as many as a group takes (RLEP)."""
        count = self.config.guides_per_group
        correct = [t for t in group if t.correct and t.token_ids[-1] in eos]
        return correct[:1] if count == 1 else correct if len(correct) >= count else []

    def _guidance(self, segment: Segment, resume_from: Path | None = None) -> GuidanceSource | None:
        assert segment.guidance is not None  # `_first_segment` gives it, and there is no other segment
        cache = self._load_cache(self.run_folder.path / segment.guidance, self._cache_type)
        if isinstance(cache, ReplayPool):
            cache.seed = self.config.seed
        return cache


class GuidedByOwnPast(Controller):
    """ExGRPO: the run's own correct rollouts come again, from a memory that is saved with every checkpoint."""

    def _guidance(self, segment: Segment, resume_from: Path | None = None) -> GuidanceSource | None:
        config = self.config
        memory = OwnPast(
            self.rows,
            config.num_generations,
            config.seed,
            share=config.replay_share,
            start=config.replay_start,
            keep=config.replay_keep,
            temperature=config.temperature,
        )
        if resume_from is not None:
            memory.restore(resume_from)
        return memory

    def _complaints(self, trainer: NPOTrainer) -> list[str]:
        """The memory is made before the trainer whose rollouts it keeps."""
        same = {"num_generations": self.config.num_generations, "temperature": self.config.temperature}
        given = {name: getattr(trainer.args, name) for name in same}
        return [
            f"{name} is {given[name]}; it must be {value}, as the memory of own rollouts has it"
            for name, value in same.items()
            if given[name] != value
        ]
