r"""Verification of answers by our own rules: the last balanced \boxed{…} against the reference.

Standard library only, linear in the completion's length, and no completion can make it raise or hang. When two answers
are the same stands in `answers`. The paper does not publish its verifier, so all rules are ours.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

from .answers import normalise_answer, same_answer
from .verdicts import AnswerVerifier, Verdict

_BRACES = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")


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
    last = _last_box(text)
    return None if last is None else text[last[0] : last[1]].strip()


def behind_answer(text: str) -> str:
    r"""What a completion says behind its last balanced `\boxed{…}`, stripped; all of it where there is none (ours)."""
    last = _last_box(text)
    return text.strip() if last is None else text[last[1] + 1 :].strip()


def _last_box(text: str) -> tuple[int, int] | None:
    """Where the content of the last balanced box begins, and where its closing brace stands."""
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
    return last


def verify(completion_text: str, answer: str) -> Verdict:
    r"""Compare a completion's last boxed answer with the reference (ours).

    Correct when both are the same after `normalise_answer`, see `same_answer` and docs/verification.md: as text, as
    lists, or as numbers of equal value (50% is 0.5, and 50 only where the reference has the sign).

    Args:
        completion_text: the whole response; any text is fine.
        answer: reference answer, without a box.

    Returns:
        Verdict.

    Raises:
        TypeError: the reference is not a string.
        ValueError: no response could be right against the reference, see `reference_fault`.
    """
    if not isinstance(answer, str):
        raise TypeError(
            f"the reference answer is a string; got {type(answer).__name__}. Write str(answer) in the dataset."
        )
    if fault := reference_fault(answer):
        raise ValueError(f"the reference answer {answer[-80:]!r} {fault}. Repair the dataset row.")
    boxed = extract_answer(completion_text)
    return Verdict.UNPARSEABLE if boxed is None else _verdict(boxed, answer)


@functools.lru_cache(maxsize=1 << 16)
def reference_fault(answer: str) -> str:
    r"""Why no response could be right against a reference, as a clause; empty if one could (ours).

    It is empty after normalisation; or it is a whole solution, whose answer stands in `\boxed{}` or, as GSM8K's,
    behind `####`.
    """
    if not normalise_answer(answer):
        return "is empty after normalisation"
    if "\\boxed" in answer:
        return "holds a box; write its content alone"
    if "####" in answer:
        return "holds ####, as GSM8K's solutions do; write what stands behind it alone"
    return ""


@functools.lru_cache(maxsize=1 << 16)
def _verdict(boxed: str, answer: str) -> Verdict:
    """Verdict on the content of a box; kept, as rollouts repeat. Whole responses would fill a long run's memory."""
    given = normalise_answer(boxed)
    if not given:
        return Verdict.UNPARSEABLE
    return Verdict.CORRECT if same_answer(given, normalise_answer(answer)) else Verdict.WRONG


class BoxedVerifier(AnswerVerifier):
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
