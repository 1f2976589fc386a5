"""A trainer factory of somebody else: TRL arguments of its own, a text-only policy, a lenient verifier."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback
from worlds import WIDTH, SpyTrainer, TinyWorld, trainer_of, world

from npo_core.control.auto import AutoNPO
from npo_core.control.controller import Controller
from npo_core.guidance.sources import GuidanceSource
from npo_core.guidance.verdicts import Verdict, verifier_reward
from npo_core.runs.config import RunConfig, resolve_config
from npo_core.runs.folder import RunFolder
from npo_core.trainer.trainer import NPOTrainer
from npo_core.world.policies import load_policy


def even(text: str, row: Mapping[str, Any]) -> Verdict:
    """A response with an even number of letters is right: a random policy solves every prompt sometimes."""
    return Verdict.WRONG if len(text) % 2 else Verdict.CORRECT


def own_config(method: str = "autonpo", **overrides: Any) -> RunConfig:
    """Settings that `Factory` agrees with; nothing is dismissed but a cache without guides."""
    settings = {
        "compute_steps": 4, "prompts_per_step": 2, "num_generations": 4, "micro_batch": 8, "checkpoint_every": 2,
        "max_completion_length": WIDTH, "pool_cutoff": 1.0, "cache_rollouts": 128, "rollout_every": 0, "tau_gate": 1.0,
        "scout_steps": 0, "late_step": 2, "late_start": 1,
    }  # fmt: skip
    return resolve_config(method, "smoke", overrides={**settings, **overrides})


class Factory:
    """Makes trainers on the rows of a tiny world; what is given replaces its TRL arguments and its data."""

    def __init__(
        self, config: RunConfig, dataset: Dataset | None = None, tiny: TinyWorld | None = None, **changes: Any
    ):
        self.config, self.changes = config, changes
        self.tiny = world("text") if tiny is None else tiny
        self.dataset = self.tiny.dataset if dataset is None else dataset
        self.made: list[SpyTrainer] = []

    def __call__(
        self, output_dir: Path, guidance: GuidanceSource | None = None, callbacks: Sequence[TrainerCallback] = ()
    ) -> NPOTrainer:
        config = self.config
        settings = {
            "prompts": config.prompts_per_step,
            "n": config.num_generations,
            "steps": config.compute_steps,
            "save_strategy": "steps",
            "save_steps": config.checkpoint_every,
            "tau_gate": config.tau_gate,
            "reward": verifier_reward(even),
            "verifier": even,
            "dataset": self.dataset,
            "guidance": guidance,
            "callbacks": callbacks,
            **self.changes,
        }
        trainer = trainer_of(self.tiny, output_dir, **settings)
        self.made.append(trainer)
        return trainer

    def policy(self, folder: Path | None = None) -> PreTrainedModel:
        return self.tiny.build() if folder is None else load_policy(folder)


def controller_of(factory: Factory, root: Path, kind: type[Controller] = AutoNPO) -> Controller:
    """A controller over a factory, in a run folder of its own."""
    rows = {row["uid"]: row for row in factory.tiny.dataset}
    run = RunFolder(factory.config, root)
    return kind(factory, factory.config, run, rows, factory.tiny.processor, even, quiet=True)
