r"""Verification of answers by our own rules: the last balanced \boxed{…} against the reference.

Standard library only, linear in the completion's length, and no completion can make it raise or hang. When two answers
are the same stands in `answers`. The paper does not publish its verifier, so all rules are ours.
"""

import enum
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from .answers import normalise_answer, same_answer

_BRACES = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")


class Verdict(enum.Enum):
    """Outcome of one verification (ours).

    CORRECT: the boxed answer matches the reference. WRONG: there is a boxed answer and it does not match. UNPARSEABLE:
    there is no balanced, non-empty box, e.g. because the response was cut off.
    """

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSEABLE = "unparseable"

    @property
    def correct(self) -> bool:
        """True for CORRECT only."""
        return self is Verdict.CORRECT


Verifier = Callable[[str, Mapping[str, Any]], Verdict | bool]
"""What the engine calls: completion text and dataset row in, verdict out; True stands for correct, False for wrong."""


def is_correct(verdict: Verdict | bool) -> bool:
    """Whether a verifier's answer means correct (ours).

    Args:
        verdict: a `Verdict`, or anything with an attribute `correct`, or a bool.

    Raises:
        TypeError: neither; a number or None could mean anything.
    """
    if isinstance(verdict, bool):
        return verdict
    if not hasattr(verdict, "correct"):
        raise TypeError(
            f"the verifier returned {verdict!r}; a Verdict or a bool is needed: Verdict.CORRECT, Verdict.WRONG, True."
        )
    return bool(verdict.correct)


def extract_answer(text: str) -> str | None:
    r"""Content of the last balanced `\boxed{…}`, stripped (ours).

    "Last" goes by where the box opens, so the inner one of two nested boxes is taken, and an unfinished box at the end
    of a cut-off response does not hide a finished one before it. Space between `\boxed` and the brace is allowed; `\{`
    and `\}` do not count as braces.

    Args:
        text: completion text.

    Returns:
        The content, possibly empty, or None when no box is balanced.
    """
    opened: list[tuple[int, bool]] = []
    last: tuple[int, int] | None = None
    for token in _BRACES.finditer(text):
        kind = token.group()
        if kind == "}":
            if opened:
                start, boxed = opened.pop()
                if boxed and (last is None or start > last[0]):
                    last = (start, token.start())
        elif kind == "{" or kind.startswith("\\boxed"):
            opened.append((token.end(), kind != "{"))
    return None if last is None else text[last[0] : last[1]].strip()


def verify(completion_text: str, answer: str) -> Verdict:
    r"""Compare a completion's last boxed answer with the reference (ours); verdicts are kept, as rollouts repeat.

    Correct when both are the same after `normalise_answer`, see `same_answer` and docs/verification.md: as text, as
    lists, or as numbers of equal value (50% is 0.5, and 50 only where the reference has the sign).

    Args:
        completion_text: the whole response; any text is fine.
        answer: reference answer, without a box.

    Returns:
        Verdict.

    Raises:
        TypeError: the reference is not a string.
        ValueError: the reference is empty, or nothing is left of it after normalisation.
    """
    if not isinstance(answer, str):
        raise TypeError(
            f"the reference answer is a string; got {type(answer).__name__}. Write str(answer) in the dataset."
        )
    return _verdict(completion_text, answer)


@functools.lru_cache(maxsize=1 << 16)
def _verdict(completion_text: str, answer: str) -> Verdict:
    reference = normalise_answer(answer)
    if not reference:
        raise ValueError(f"the reference answer {answer!r} is empty after normalisation. Repair the dataset row.")
    boxed = extract_answer(completion_text)
    given = None if boxed is None else normalise_answer(boxed)
    if not given:
        return Verdict.UNPARSEABLE
    return Verdict.CORRECT if same_answer(given, reference) else Verdict.WRONG


class BoxedVerifier:
    """The default `Verifier`: `verify` against the row's "answer" column (ours)."""

    def __call__(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """Verify one completion.

        Args:
            completion: completion text.
            row: dataset row with a non-empty string under "answer".

        Returns:
            Verdict.

        Raises:
            ValueError: the row has no answer, or an empty one.
            TypeError: the answer is not a string.
        """
        if "answer" not in row:
            raise ValueError(
                f"the row has no 'answer' column; it has {sorted(row)}. Add the column, or pass a verifier of your own."
            )
        return verify(completion, row["answer"])


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """Text of a completion in either of TRL's forms (ours).

    Args:
        completion: plain text, or messages `[{"role": "assistant", "content": …}]` whose content is text, None or a
            list of parts. Only the assistant's messages count, joined by newlines: a tool's output is not an answer.

    Returns:
        The text.

    Raises:
        TypeError: neither form.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, list) and all(isinstance(message, Mapping) for message in completion):
        return "\n".join(
            _content_text(message.get("content")) for message in completion if message.get("role") == "assistant"
        )
    raise TypeError(f"a completion is text or a list of messages; got {type(completion).__name__}.")


def verifier_reward(verifier: Verifier) -> Callable[..., list[float]]:
    """A reward function in TRL's convention from a verifier: 1.0 for CORRECT, else 0.0 (ours).

    The function is `reward(completions, **columns)` and is logged as "verified". The verifier's row holds the columns
    that are lists with one entry per completion; what else TRL passes (trainer_state, log_extra, …) is left out.

    Args:
        verifier: called once per completion with its text and its row.

    Returns:
        The reward function.
    """

    def verified(completions: list[Any], **columns: Any) -> list[float]:
        per_row = {
            name: values
            for name, values in columns.items()
            if isinstance(values, list) and len(values) == len(completions)
        }
        return [
            float(
                is_correct(verifier(completion_text(completion), {name: values[i] for name, values in per_row.items()}))
            )
            for i, completion in enumerate(completions)
        ]

    return verified


def _content_text(content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        return "".join(part["text"] for part in content if part.get("type") == "text")
    raise TypeError(f"a message's content is text, None or a list of parts; got {type(content).__name__}.")
