"""What a run needs of a trainer factory: TRL's arguments under which it can be rolled back, and the same prompts again.

A factory of one's own has TRL arguments of its own, and what a controller must know of them it reads from the trainers.
Some decide whether a run can be watched and rolled back at all: what would break it is refused before the first step,
all of it in one message. All of this is ours.
"""

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler

from ..guidance.sources import GuidanceSource
from ..guidance.verdicts import AnswerVerifier
from ..runs.config import RunConfig
from ..trainer.dataset import row_complaints
from ..trainer.prompts import Room
from ..trainer.trainer import NPOTrainer

FIXED: Mapping[str, tuple[Any, str]] = {
    "save_strategy": ("steps", "a run is rolled back to its checkpoints"),
    "save_only_model": (False, "a checkpoint without optimiser and random state cannot be rolled back to"),
    "load_best_model_at_end": (False, "where training stops for a decision, the current policy is the one that counts"),
    "logging_strategy": ("steps", "the metric lines are what is watched"),
    "logging_steps": (1, "every step is watched, and has a metric line"),
    "num_iterations": (1, "a roll-back between two updates of one generated batch would not be exact"),
    "ignore_data_skip": (False, "a replay would start from the first prompts again"),
    "remove_unused_columns": (False, "the trainer reads uid and answer of every row"),
    "sync_ref_model": (False, "a checkpoint does not hold the reference policy"),
    "cast_lm_head_to_fp32": (
        False,
        "policies of checkpoints, which its own is compared with, have their head as it was saved; with weights in "
        "float32 it changes nothing",
    ),
}
"""Arguments with one value under which a run can be watched and rolled back, and why."""


def require_agreement(
    trainer: NPOTrainer,
    config: RunConfig,
    output_dir: Path,
    guidance: GuidanceSource | None,
    watch: TrainerCallback,
    uids: Sequence[str],
    further: Sequence[str] = (),
) -> None:
    """Refuse a trainer that does not do what the run needs.

    Args:
        trainer: What the factory made.
        config: Settings of the run.
        output_dir: Folder that the factory was given.
        guidance: Source that it was given.
        watch: Callback that it was given.
        uids: Prompts that the controller has rows of.
        further: Complaints of a controller with needs of its own.

    Raises:
        TypeError: It is no NPOTrainer.
        ValueError: It disagrees with the run; the message lists every point.
    """
    if not isinstance(trainer, NPOTrainer):
        raise TypeError(f"The trainer factory returned a {type(trainer).__name__}; it must return an NPOTrainer.")
    found = [*_arguments(trainer, config), *_parts(trainer, output_dir, guidance, watch), *_prompts(trainer, uids)]
    found += further
    if found:
        listed = "\n".join(f"  - {complaint}" for complaint in found)
        raise ValueError(
            f"The trainer that the factory made does not fit the run. Change NPOConfig or RunConfig:\n{listed}"
        )


def _arguments(trainer: NPOTrainer, config: RunConfig) -> list[str]:
    args, found = trainer.args, []
    for name, (wanted, why) in FIXED.items():
        given = getattr(args, name)
        if given != wanted:
            given = given.value if isinstance(given, Enum) else given
            found.append(f"{name} is {given!r}; it must be {wanted!r}: {why}")
    if args.save_steps < 1:
        found.append(f"save_steps is {args.save_steps}; it must be a number of steps, not a share of all")
    if args.max_steps < config.compute_steps:
        found.append(f"max_steps is {args.max_steps}; it must be at least compute_steps = {config.compute_steps}")
    if args.steps_per_generation != args.gradient_accumulation_steps:
        found.append(
            f"steps_per_generation is {args.steps_per_generation}; it must be gradient_accumulation_steps = "
            f"{args.gradient_accumulation_steps}: each optimiser step generates one batch"
        )
    limit, keep = args.save_total_limit, config.checkpoint_keep
    if limit is not None and not 0 < keep <= limit:
        found.append(f"save_total_limit is {limit}; it must be None: checkpoint_keep = {keep} says what is kept")
    return found


def _parts(trainer: NPOTrainer, output_dir: Path, guidance: GuidanceSource | None, watch: TrainerCallback) -> list[str]:
    found = []
    if Path(str(trainer.args.output_dir)) != Path(output_dir):
        found.append(f"output_dir is {trainer.args.output_dir}; it must be what the factory is given, {output_dir}")
    if watch not in trainer.callback_handler.callbacks:
        found.append("callbacks is without the one that the factory is given; nothing would be watched. Hand it on")
    if trainer.guidance is not guidance:
        found.append("guidance is not what the factory is given; a replay would not be guided by it. Hand it on")
    if trainer.verifier is None:
        found.append("verifier is None; without verdicts no mistake is seen. Give the controller's")
    return found


def _prompts(trainer: NPOTrainer, uids: Sequence[str]) -> list[str]:
    order = prompt_order(trainer)
    if order is None:
        return []
    if not order:
        return ["train_dataset has no column uid, which names a prompt in metric lines and cache"]
    assert isinstance(trainer.train_dataset, Dataset)  # it has an order
    # all that a roll-back will need of the rows, though until the first one nothing asks for it
    judged = isinstance(trainer.verifier, AnswerVerifier)
    found, _ = row_complaints(trainer.train_dataset, judged, trainer.processing_class, Room.of(trainer))
    found = [f"train_dataset: {complaint}" for complaint in found]
    unknown = sorted(set(order) - set(uids), key=str)
    if unknown:
        some = ", ".join(map(repr, unknown[:3]))
        found.append(f"rows of the controller lack {len(unknown)} prompts of train_dataset, such as {some}; give each")
    return found


def prompt_order(trainer: NPOTrainer) -> list[str] | None:
    """Uids of a trainer's rows as they lie in its data set; none without that column, None where it has no order."""
    dataset = trainer.train_dataset
    if not isinstance(dataset, Dataset):
        return None
    # through the data set's own format or transform, each row would have its pictures decoded
    return dataset.with_format(None)["uid"][:] if "uid" in dataset.column_names else []


def keep_order(trainer: NPOTrainer, step: int) -> None:
    """Let a trainer that goes on from a checkpoint get the prompts that an uninterrupted one would get.

    TRL's sampler draws the order of each pass over the data from one generator, and transformers' Trainer starts a
    resumed run in its pass, but with a fresh generator: it would see the order of the first pass again. Passes that are
    over are drawn here.

    Args:
        trainer: A fresh trainer with one generated batch for each optimiser step.
        step: Optimiser steps done at the checkpoint.
    """
    make = trainer._get_train_sampler

    def sampler_in_its_pass(dataset: Any = None):
        sampler = make(dataset)
        if isinstance(sampler, RepeatSampler):
            for _ in range(step // (sampler.num_samples // sampler.batch_size)):
                next(iter(sampler))
        return sampler

    trainer._get_train_sampler = sampler_in_its_pass


def require_same_prompts(step: int, before: Sequence[str], now: Sequence[str]) -> None:
    """Refuse a replay that sees other prompts than the steps it repeats: its guides would be for prompts that are gone.

    Args:
        step: Policy step.
        before: Prompts of the step that was rolled back; none if not known.
        now: Prompts of the same step in the replay.

    Raises:
        ValueError: They differ.
    """
    if before and now and set(before) != set(now):
        gone, new = sorted(set(before) - set(now)), sorted(set(now) - set(before))
        raise ValueError(
            f"Policy step {step} is replayed with other prompts than before ({', '.join(gone[:2])} became "
            f"{', '.join(new[:2])}), so the guides are for other prompts. Every trainer of a factory must see the same "
            "data in the same order: train on npo_core.training_schedule(dataset, steps, prompts_per_step, seed) with "
            "shuffle_dataset=False, and begin the run again in another root."
        )
