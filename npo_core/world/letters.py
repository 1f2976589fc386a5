r"""The task of the real model: count a letter in a spelled word, letter by letter, every step checked.

"How many r are in s t r a w?" is answered `s0 t0 r1 a1 w1 \boxed{1}`: each letter with the count so far, then the
count. Published for SmolLM2-135M-Instruct as verl-recipe's `char_count`, which pays the count alone; here the whole
chain is verified, so nothing is paid for luck. Deviations, all ours: words are random letters of which each is the
asked one with probability 1/2, since in a word of a dictionary "none so far" is right nearly everywhere and can be
guessed: here all 2^L patterns of a word of L letters are equally likely, and a policy that copies perfectly and counts
blindly is right once in 2^L. Problems are unlimited, fresh by seed, and their split hangs on their content.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

import numpy as np
from datasets import Dataset

from ..guidance.verdicts import Verdict
from ..guidance.verifiers import extract_answer

SYSTEM = "Write each letter with the count so far, then box the count."
"""System message of every prompt; it takes the place of the template's own, which is longer."""

LENGTHS = (5, 10)
"""Shortest and longest word unless others are asked for; the chance of a blind count is 1/32 at most."""

SPLITS = ("train", "test")
TEST_SHARE = 10
"""One of so many words is a test word."""

TRIES = 1000
"""Draws of one length in a row that give nothing new before that length counts as used up."""

_SOURCE = re.compile(r"letters(?::(\d+)-(\d+))?")


@dataclass(frozen=True)
class Word:
    """One problem: a letter, and the word that it is counted in.

    Attributes:
        letter: What is counted, a lower-case letter.
        word: Where, lower-case letters.
    """

    letter: str
    word: str

    @property
    def uid(self) -> str:
        """Content-based identity, the same in every run and on every machine."""
        return f"{self.letter}-{self.word}"

    @property
    def difficulty(self) -> int:
        """Letters of the word, the steps of the exact solution."""
        return len(self.word)

    @property
    def suite(self) -> str:
        """Problems of one length are scored together."""
        return f"{self.difficulty:02d} letters"

    @property
    def question(self) -> str:
        """What the user asks; the word is spelled, so that each letter is a token."""
        return f"How many {self.letter} are in {' '.join(self.word)}?"

    @property
    def answer(self) -> str:
        r"""The one right response: each letter with the count so far, and the count in `\boxed{}`."""
        counts = [self.word[: place + 1].count(self.letter) for place in range(len(self.word))]
        return " ".join(f"{one}{count}" for one, count in zip(self.word, counts, strict=True)) + (
            f" \\boxed{{{counts[-1]}}}"
        )


class ChainVerifier:
    r"""Correct when every step of the chain and the boxed count are right, and nothing else is said (ours).

    The response is compared word by word with the row's answer, so white space is free: lines of their own are as good.
    A response without a box is `UNPARSEABLE`.
    """

    def __call__(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """Verify one completion.

        Args:
            completion: Completion text; any text is fine.
            row: Data set row with the right response under "answer".

        Raises:
            ValueError: The row has no answer, or an empty one.
        """
        if not row.get("answer"):
            raise ValueError(f"the row has no 'answer', the right response; it has {sorted(row)}.")
        if not extract_answer(completion):
            return Verdict.UNPARSEABLE
        return Verdict.CORRECT if completion.split() == row["answer"].split() else Verdict.WRONG


def read_source(source: str) -> tuple[int, int] | None:
    """Shortest and longest word that a data source such as "letters:5-10" names; None if it is another source.

    Raises:
        ValueError: It begins like this one, and is none that can be had.
    """
    if source.partition(":")[0] != "letters":
        return None
    found = _SOURCE.fullmatch(source)
    lengths = LENGTHS if found and found[1] is None else found and (int(found[1]), int(found[2]))
    if not lengths or not 1 <= lengths[0] <= lengths[1] <= 99:
        raise ValueError(
            f'data is {source!r}; allowed is "letters", or "letters:SHORTEST-LONGEST" with lengths of words from 1 to '
            '99, such as "letters:5-10".'
        )
    return lengths


def split_of(problem: Word) -> str:
    """Split of a problem: a tenth of all words, chosen by a hash, is the test split, whatever letter is counted."""
    digest = hashlib.sha256(f"split:{problem.word}".encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % TEST_SHARE == 0 else "train"


def sample_words(split: str, count: int, seed: int, lengths: tuple[int, int] = LENGTHS) -> list[Word]:
    """Draw distinct problems, the lengths in turn while they last.

    Args:
        split: "train" or "test"; the splits share no word, whatever the seeds.
        count: Number of problems.
        seed: Seed of the draw.
        lengths: Shortest and longest word.

    Raises:
        ValueError: Unknown split, or more problems asked for than there are.
    """
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}. Allowed: {', '.join(SPLITS)}.")
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    left = list(range(lengths[0], lengths[1] + 1))
    seen: dict[Word, None] = {}
    while len(seen) < count:
        if not left:
            raise ValueError(f"{count} distinct {split} words of {lengths[0]} to {lengths[1]} letters do not exist.")
        length = left.pop(0)
        draws = (random_word(length, rng) for _ in range(TRIES))
        new = next((word for word in draws if word not in seen and split_of(word) == split), None)
        if new is not None:
            seen[new] = None
            left.append(length)
    return list(seen)


def random_word(length: int, rng: np.random.Generator) -> Word:
    """A problem whose letters are the asked one with probability 1/2 each, and else any other."""
    letter = ascii_lowercase[rng.integers(26)]
    others = ascii_lowercase.replace(letter, "")
    places = rng.random(length) < 0.5
    return Word(letter, "".join(letter if asked else others[rng.integers(25)] for asked in places))


def make_dataset(problems: list[Word]) -> Dataset:
    """Rows (uid, prompt, answer, suite, difficulty), one per problem."""
    return Dataset.from_list(
        [
            {
                "uid": problem.uid,
                "prompt": [
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": problem.question},
                ],
                "answer": problem.answer,
                "suite": problem.suite,
                "difficulty": problem.difficulty,
            }
            for problem in problems
        ]
    )
