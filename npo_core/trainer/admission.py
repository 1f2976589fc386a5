"""Which guides a trainer takes: checks of a source when it is given, of each guide at injection, and of how many fail.

A setting that spoils every guide (another tokenizer, another temperature, too long a response) is refused when the
source is given. A single guide that is judged wrong at injection is left out and counted: a verifier that runs into a
timeout does not end a long run.
"""

import logging
import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, cast

from datasets import Dataset
from transformers import ProcessorMixin

from ..guidance.fingerprints import image_digest, tokenizer_digest, tokenizer_of
from ..guidance.sources import GuidanceSource, GuidanceWindow, ManyGuides, ReplaySource
from ..guidance.trajectories import GuidanceCache, GuidanceRefused, Trajectory
from ..guidance.verdicts import AnswerVerifier, Verifier
from .pictures import left_out_of_loss

if TYPE_CHECKING:
    from .trainer import NPOTrainer

ALL_REFUSED = 8
"""Guides that are wrong at injection, and none right, after which training stops: then it is not the single guide."""

ROUNDING = 0.1
"""Nats above 0 up to which a log-prob is taken for one that was rounded, and not for a probability (ours)."""

logger = logging.getLogger(__name__)


def needs_behaviour(trainer: "NPOTrainer") -> bool:
    """Whether the ratio of the guide rows is made from the guides' stored log-probs."""
    return trainer.args.ratio_mode != "current" and trainer.args.guide_behaviour == "stored"


def known_uids(trainer: "NPOTrainer") -> set[str] | None:
    """Uids of the training data, whose columns are checked; None of a stream, which is not read ahead of training.

    Raises:
        ValueError: Rows that NPO cannot use.
    """
    found, uids = _rows(trainer)
    _refuse("The data set cannot be trained on", found)
    return uids


def _rows(trainer: "NPOTrainer") -> tuple[list[str], set[str] | None]:
    """What keeps NPO from using the training data, a clause each, and its uids."""
    # for guidance alone, as the rules for answers and pictures that it reads by
    from .dataset import missing_columns, row_complaints
    from .prompts import Room

    dataset, answer = trainer.train_dataset, isinstance(trainer.verifier, AnswerVerifier)
    if not isinstance(dataset, Dataset):
        return missing_columns(dataset.column_names, answer), None
    return row_complaints(dataset, answer, trainer.processing_class, Room.of(trainer))


def _require_longest(trainer: "NPOTrainer") -> None:
    """Refuse TRL's way to leave the length of responses open."""
    if cast(int | None, trainer.max_completion_length) is None:
        raise ValueError(
            "max_completion_length is None; a guide may be as long as a rollout, and prompts must leave it room: set "
            "the longest response in tokens."
        )


def _refuse(what: str, found: Sequence[str]) -> None:
    """Raise a ValueError with all complaints, if there are any."""
    if found:
        listed = f" {found[0]}." if len(found) == 1 else "".join(f"\n  - {each}" for each in found)
        raise ValueError(f"{what}:{listed}")


def check_arguments(trainer: "NPOTrainer", verifier: Verifier | None) -> None:
    """Refuse arguments under which verdicts or appended places, if there are any, would not get rows and groups whole.

    Raises:
        ValueError: With a verifier: the trainer takes columns away that no argument of the model is called like. With
            appended places: a rollout function, tools or environments, which make the group elsewhere. With either: a
            group would be split over two processes.
    """
    if verifier is not None and trainer.args.remove_unused_columns:
        raise ValueError(
            "remove_unused_columns is True, which takes uid and the verifier's columns out of the rows; set it to "
            "False, TRL's default for GRPO."
        )
    appended = trainer.args.placement == "append"
    others = _others_sample(trainer, "placement 'append'") if appended else []
    for complaint in others + (_split_groups(trainer) if appended or verifier is not None else []):
        raise ValueError(f"{complaint}.")


def _others_sample(trainer: "NPOTrainer", what: str) -> list[str]:
    given = {
        "rollout_func": trainer.rollout_func is not None,
        "environment_factory": trainer.environment_factories is not None,
        "tools": bool(trainer.tools) and trainer.environment_factories is None,
    }
    return [
        f"{name} is given together with {what}. A guide takes the place of a whole response that the trainer samples "
        f"itself, and with {name} it does not: leave one of the two out"
        for name, there in given.items()
        if there
    ]


def _split_groups(trainer: "NPOTrainer") -> list[str]:
    """That a group's rollouts would not all be in one process; TRL itself compares rewards over all processes."""
    args = trainer.args
    assert args.steps_per_generation is not None  # TRL has computed it
    batch = args.per_device_train_batch_size * args.steps_per_generation
    if batch % trainer.num_generations == 0:
        return []
    return [
        f"per_device_train_batch_size × steps_per_generation = {batch} is not a multiple of "
        f"num_generations = {trainer.num_generations}, so a group would be split over two processes. Change one of the "
        "three"
    ]


def check_source(trainer: "NPOTrainer", source: GuidanceSource) -> None:
    """Refuse a source, or settings, with which the trainer could not guide.

    Raises:
        TypeError: It is no source of guides.
        ValueError: No longest response; no verifier; `rollout_func`, tools or environments; a group that would be split
            over two processes; rows that NPO cannot use; a cache of another tokenizer or other picture settings, with
            longer responses or tokens that the loss leaves out, or whose log-probs are none, or at another temperature,
            where the ratio needs its q. The message says all of it, and what to change.
    """
    if not isinstance(source, GuidanceSource):
        raise TypeError(
            f"guidance is a {type(source).__name__}; guides come from anything with guide(uid, policy_step), such as "
            "GuidanceCache.load(path), or trainer.new_cache() that is filled."
        )
    _require_longest(trainer)
    rows, uids = _rows(trainer)
    inner = _inner(source)
    cache = inner if isinstance(inner, GuidanceCache) else None
    of_cache = [] if cache is None else _misfits(trainer, cache)
    _refuse("NPOTrainer cannot guide", [*_settings(trainer, source), *rows, *of_cache])
    if cache is not None:
        _warn(trainer, cache, uids)


def _inner(source: GuidanceSource) -> GuidanceSource:
    """What is inside of windows."""
    while isinstance(source, GuidanceWindow):
        source = source.source
    return source


def _settings(trainer: "NPOTrainer", source: GuidanceSource) -> list[str]:
    """What of the trainer's arguments keeps it from guiding, a clause each."""
    args, processes, found = trainer.args, trainer.accelerator.num_processes, []
    if trainer.verifier is None:
        found.append("guidance is given without a verifier; NPO gates on verified pass rates. Pass verifier=…")
    found += [*_others_sample(trainer, "guidance"), *_split_groups(trainer)]
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if args.guide_prefix < 1 and (isinstance(source, ReplaySource) or sharded):
        found.append(
            f"guide_prefix is {args.guide_prefix}; beginnings of guides come from a cache, and the policy that goes on "
            "from them must be whole in every process: set guide_prefix=1 for a replaying source, under FSDP and under "
            "DeepSpeed"
        )
    if isinstance(_inner(source), ReplaySource) and not isinstance(source, ReplaySource):
        found.append(
            f"{type(_inner(source)).__name__} is given inside of a GuidanceWindow, through which it would neither see "
            "rollouts nor choose prompts, and so never guide; give it by itself"
        )
    if isinstance(source, ReplaySource) and processes > 1:
        found.append(
            f"{type(source).__name__} learns from the rollouts it sees, and each of the {processes} processes sees "
            "only its own; train on one process"
        )
    steps, passes = args.steps_per_generation, args.gradient_accumulation_steps
    if isinstance(source, ReplaySource) and steps is not None and steps < passes:
        found.append(
            f"steps_per_generation is {steps} with gradient_accumulation_steps {passes}: "
            f"{type(source).__name__} chooses prompts by optimiser step, and would choose the same for each of its "
            "generation batches; make steps_per_generation a multiple of gradient_accumulation_steps"
        )
    if args.guides_per_group > 1 and not isinstance(source, ManyGuides):
        found.append(
            f"guides_per_group is {args.guides_per_group}, but {type(source).__name__} has no guides(); "
            "give a source with several guides for a prompt, such as ReplayPool"
        )
    processor = trainer.processing_class
    if isinstance(processor, ProcessorMixin) and tokenizer_of(processor).padding_side != "left":
        found.append(
            "the processor's tokenizer pads on the right, where TRL's training would take other tokens of a padded "
            "prompt for its picture than off-line sampling; set processor.tokenizer.padding_side = 'left'"
        )
    return found


def _misfits(trainer: "NPOTrainer", cache: GuidanceCache) -> list[str]:
    """Why the trainer cannot use a cache, a clause each."""
    own, found = tokenizer_digest(trainer.processing_class), []
    if cache.image_digest and cache.image_digest != (pictures := image_digest(trainer.processing_class)):
        found.append(
            f"the guidance cache was sampled with other picture settings ({cache.image_digest}) than this policy's "
            f"({pictures or 'none'}), so its guides saw other pictures. Make the cache again"
        )
    if cache.tokenizer_digest and cache.tokenizer_digest != own:
        found.append(
            f"the guidance cache was made with another tokenizer ({cache.tokenizer_digest}) than this policy's "
            f"({own}); its token ids would mean other text. Make the cache again"
        )
    longest = max((len(guide.token_ids) for guide in cache), default=0)
    if longest > trainer.max_completion_length:
        found.append(
            f"the guidance cache holds a guide of {longest} tokens, and max_completion_length is "
            f"{trainer.max_completion_length}; raise it, or make the cache again with shorter responses"
        )
    ends = set(trainer.eos_token_ids)
    if holding := [guide for guide in cache if _ends_otherwise(guide, ends)]:
        found.append(
            f"the guidance cache holds {len(holding)} guides, such as that of {holding[0].uid!r}, that do not end with "
            f"one of {trainer.eos_token_ids}, or go on behind it, as no rollout of this trainer does. Make the cache "
            "with trainer.new_cache(), which leaves them out"
        )
    if (other := _other_temperatures(trainer, cache)) and needs_behaviour(trainer):
        found.append(
            f"the log-probs of the guidance cache are at temperature {min(other)}, and training is at "
            f"{trainer.temperature}, so the ratio of mode {trainer.args.ratio_mode!r} would be biased. Score the "
            f"guides again (sample_rollouts or completion_logps at {trainer.temperature}), or use ratio_mode 'current'"
        )
    if needs_behaviour(trainer) and (holding := [guide for guide in cache if not _log_probs(guide)]):
        found.append(
            f"the guidance cache holds {len(holding)} guides whose log-probs are none, such as that of "
            f"{holding[0].uid!r}: a log-prob is finite and at most 0, and the ratio of mode "
            f"{trainer.args.ratio_mode!r} is made from it. Score the guides again, or use ratio_mode 'current'"
        )
    if holding := [guide for guide in cache if _impossible(trainer, guide)]:
        found.append(
            f"the guidance cache holds {len(holding)} guides with tokens that this trainer never samples and its loss "
            f"leaves out, such as {_impossible(trainer, holding[0])} in that of {holding[0].uid!r}: sample the guides "
            "with the trainer's generation_kwargs, or set mask_unsampled=False"
        )
    return found


def _ends_otherwise(guide: Trajectory, ends: Collection[int]) -> bool:
    return not guide.token_ids or guide.token_ids[-1] not in ends or not set(guide.token_ids[:-1]).isdisjoint(ends)


def _log_probs(guide: Trajectory) -> bool:
    """Whether what a guide holds as log-probs can be that: no NaN, no infinity, no probabilities in their place."""
    return all(-math.inf < value <= ROUNDING for value in guide.logps)


def _impossible(trainer: "NPOTrainer", guide: Trajectory) -> list[int]:
    """Tokens of a guide that have no chance in the distribution that is trained, so that its log-probs say nothing."""
    return sorted(set(left_out_of_loss(trainer)) & set(guide.token_ids))


def _other_temperatures(trainer: "NPOTrainer", cache: GuidanceCache) -> set[float]:
    return {guide.temperature for guide in cache} - {trainer.temperature}


def _warn(trainer: "NPOTrainer", cache: GuidanceCache, uids: set[str] | None) -> None:
    """Say what makes a cache that can be used useless, or some metrics of it."""
    if other := _other_temperatures(trainer, cache):
        logger.warning(
            "The log-probs of the guidance cache are at temperature %s, and training is at %s: npo/guide_kl, "
            "npo/guide_ratio and npo/guide_ess will compare different distributions.",
            min(other),
            trainer.temperature,
        )
    if not len(cache):
        logger.warning("The guidance cache is empty (%s), so nothing will be guided.", cache.filled)
    elif uids is not None and not any(guide.uid in uids for guide in cache):
        logger.warning(
            "None of the %d prompts of the guidance cache is in the training data, so nothing will be guided.",
            len(cache),
        )


def check_guide(trainer: "NPOTrainer", guide: Trajectory, uid: str) -> None:
    """Refuse a guide that no correct source would give.

    Raises:
        GuidanceRefused: It is another prompt's, marked wrong, over-long, without end of sequence or goes on behind it,
            without a log-prob for each token, holds a token that the loss leaves out, or the ratio needs its log-probs
            and they are none, or at another temperature than training.
    """
    if guide.uid != uid or not guide.correct:
        raise GuidanceRefused(f"The source gave a guide of {guide.uid!r} (correct: {guide.correct}) for {uid!r}.")
    if not guide.token_ids or len(guide.logps) != len(guide.token_ids):
        raise GuidanceRefused(
            f"The guide of {uid!r} has {len(guide.token_ids)} tokens and {len(guide.logps)} log-probs; "
            "it needs at least one token, and a log-prob for each."
        )
    if len(guide.token_ids) > trainer.max_completion_length or guide.token_ids[-1] not in trainer.eos_token_ids:
        raise GuidanceRefused(
            f"The guide of {uid!r} has {len(guide.token_ids)} tokens and ends with token {guide.token_ids[-1]}; "
            f"at most {trainer.max_completion_length} tokens ending in one of {trainer.eos_token_ids} fit a group."
        )
    if not set(guide.token_ids[:-1]).isdisjoint(trainer.eos_token_ids):
        raise GuidanceRefused(
            f"The guide of {uid!r} goes on behind an end of sequence ({trainer.eos_token_ids}), where no rollout does; "
            "cut it there."
        )
    if never := _impossible(trainer, guide):
        raise GuidanceRefused(
            f"The guide of {uid!r} holds the tokens {never}, which this trainer never samples and its loss leaves out; "
            "sample guides with the trainer's generation_kwargs, or set mask_unsampled=False."
        )
    if guide.temperature != trainer.temperature and needs_behaviour(trainer):
        raise GuidanceRefused(
            f"The log-probs of the guide of {uid!r} are at temperature {guide.temperature}, and training is at "
            f"{trainer.temperature}; mode {trainer.args.ratio_mode!r} needs them at the same."
        )
    if needs_behaviour(trainer) and not _log_probs(guide):
        raise GuidanceRefused(
            f"The log-probs of the guide of {uid!r} run from {min(guide.logps)} to {max(guide.logps)}; they must be "
            f"finite and at most 0, as mode {trainer.args.ratio_mode!r} divides by what they stand for."
        )


def empty_cache(trainer: "NPOTrainer", kind: type[GuidanceCache] = GuidanceCache) -> GuidanceCache:
    """A cache without guides that refuses what the trainer could not use; see `NPOTrainer.new_cache`."""
    _require_longest(trainer)
    return kind.empty(
        trainer.processing_class, trainer.eos_token_ids, trainer.max_completion_length, known_uids(trainer)
    )


class RefusedGuides:
    """Counts the guides of a source that were right and wrong when they were verified again, over all processes."""

    def __init__(self):
        self.taken = self.refused = 0

    def count(self, taken: int, refused: int, example: Trajectory | None) -> None:
        """Take in a step. Warns of the first wrong guide, and whenever no guide of a step is right.

        Args:
            taken: Guides that were injected.
            refused: Guides that were judged wrong.
            example: One of those, if this process has one.

        Raises:
            GuidanceRefused: Not one guide of this source was right, and at least `ALL_REFUSED` were wrong.
        """
        first = refused > 0 and not self.refused
        self.taken += taken
        self.refused += refused
        such = "" if example is None else f", such as that of {example.uid!r}: {example.text!r}"
        if not self.taken and self.refused >= ALL_REFUSED:
            raise GuidanceRefused(
                f"All {self.refused} guides so far were wrong at injection, though marked correct{such}. Their token "
                "ids mean other text here, or the verifier does not judge as it did when the cache was made."
            )
        if first or (refused and not taken):
            logger.warning(
                "%d of %d guides of this step were wrong at injection%s. They are left out; see npo/refused_guides.",
                refused,
                taken + refused,
                such,
            )
