"""Data that is made rather than read: sources that the setting `data` names by a word, with a verifier of their own.

`data = "letters"` is the task of the real model, `data = "reasoning_gym:chain_sum"` one of a library of tasks. What
stands behind the colon is the source's own: "letters:5-10". No file is read, so the settings that say how one is read
are refused; `instruction`, `max_prompt_length` and `skip_refused` do here what they do with files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from datasets import Dataset

from ..declaration import require
from ..guidance.verdicts import Verifier
from ..runs.config import RunConfig
from . import gym, letters

TEST_SEED = 0
"""Seed of the test problems: one fixed test set for all runs."""


@dataclass(frozen=True)
class Source:
    """Problems of a run.

    Attributes:
        train: Training rows, one per prompt, with distinct uids.
        test: Test rows, each of a suite with at least two; no problem of these is trained on.
        verifier: Verifier of the responses.
        instruction: What every question ends with, unless the setting `instruction` says otherwise.
    """

    train: Dataset
    test: Dataset
    verifier: Verifier
    instruction: str = ""


def made_source(config: RunConfig, quiet: bool = True) -> Source | None:
    """Problems of the source that `config.data` names; None if it names a file, a folder or a name on the hub.

    Args:
        config: Settings.
        quiet: Without a progress bar.

    Raises:
        ValueError: A source of these that cannot be made so, or settings of files with it.
    """
    maker = SOURCES.get(config.data.partition(":")[0])
    if maker is None:
        return None
    for name in ("test_data", "columns", "image_root"):
        given = getattr(config, name)
        require(not given, name, given, f"empty with data = {config.data!r}, which is made and not read from a file")
    return maker(config, quiet)


def training_prompts(data: str, count: int, seed: int, quiet: bool = True) -> tuple[Dataset, Verifier, str] | None:
    """Training rows of a source for a measurement, their verifier, and what every question ends with.

    Args:
        data: As the setting `data`.
        count: Number of rows.
        seed: Seed that they are drawn with, as `data_seed`.
        quiet: Without a progress bar.

    Returns:
        Rows, verifier and instruction, or None if `data` names a file, a folder or a name on the hub.

    Raises:
        ValueError: A source of these that cannot be made so.
    """
    if (lengths := letters.read_source(data)) is not None:
        return letters.make_dataset(letters.sample_words("train", count, seed, lengths)), letters.ChainVerifier(), ""
    if (tasks := gym.read_source(data)) is not None:
        gym.require_installed(data)
        drawn = gym.draw("train", tasks, count, seed, RunConfig.score_threshold, quiet=quiet)
        verifier = gym.GymVerifier({problem.uid: problem for problem in drawn}, RunConfig.score_threshold)
        return gym.make_dataset(drawn), verifier, gym.INSTRUCTION
    return None


def _letters(config: RunConfig, quiet: bool) -> Source:
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


def _reasoning_gym(config: RunConfig, quiet: bool) -> Source:
    tasks = gym.read_source(config.data)
    gym.require_installed(config.data)
    require(
        config.eval_problems >= 2 * len(tasks),
        "eval_problems",
        config.eval_problems,
        f"at least two for each of the {len(tasks)} tasks of {config.data!r}, for an interval",
    )
    rules = {"threshold": config.score_threshold, "skip_refused": config.skip_refused, "quiet": quiet}
    test = gym.draw("test", tasks, config.eval_problems, TEST_SEED, **rules)
    tested = frozenset(problem.uid for problem in test)
    train = gym.draw("train", tasks, config.train_problems, config.data_seed, without=tested, **rules)
    verifier = gym.GymVerifier({problem.uid: problem for problem in (*train, *test)}, config.score_threshold)
    return Source(gym.make_dataset(train), gym.make_dataset(test), verifier, gym.INSTRUCTION)


SOURCES: Mapping[str, Callable[[RunConfig, bool], Source]] = {"letters": _letters, gym.NAME: _reasoning_gym}
"""Makers of the sources by the first word of `data`."""
