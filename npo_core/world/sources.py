"""Data that is made rather than read: sources that the setting `data` names by a word, with a verifier of their own.

`data = "letters"` is the task of the real model. What stands behind the colon is the source's own: "letters:5-10".
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from datasets import Dataset

from ..guidance.verdicts import Verifier
from ..runs.config import RunConfig
from . import letters

TEST_SEED = 0
"""Seed of the test problems: one fixed test set for all runs."""


@dataclass(frozen=True)
class Source:
    """Problems of a run.

    Attributes:
        train: Training rows, one per prompt, with distinct uids.
        test: Test rows, each of a suite with at least two; no problem of these is trained on.
        verifier: Verifier of the responses.
    """

    train: Dataset
    test: Dataset
    verifier: Verifier


def made_source(config: RunConfig) -> Source | None:
    """Problems of the source that `config.data` names; None if it names a file, a folder or a name on the hub.

    Raises:
        ValueError: A source of these that cannot be made so.
    """
    maker = SOURCES.get(config.data.partition(":")[0])
    return None if maker is None else maker(config)


def _letters(config: RunConfig) -> Source:
    lengths = letters.read_source(config.data)
    count = lengths[1] - lengths[0] + 1
    if config.eval_problems < 2 * count:
        raise ValueError(
            f"eval_problems is {config.eval_problems}; at least two for each of the {count} lengths of {config.data!r} "
            "are needed, for an interval."
        )
    return Source(
        letters.make_dataset(letters.sample_words("train", config.train_problems, config.data_seed, lengths)),
        letters.make_dataset(letters.sample_words("test", config.eval_problems, TEST_SEED, lengths)),
        letters.ChainVerifier(),
    )


SOURCES: Mapping[str, Callable[[RunConfig], Source]] = {"letters": _letters}
"""Makers of the sources by the first word of `data`."""
