r"""Verification of answers by our own rules: the last balanced \boxed{…} against the reference.

Standard library only, linear in the completion's length, and no completion can make it raise or hang: nothing is
evaluated, so an expression that is not a plain number (5^(5^(5^5)), 1/2004!) is compared as text. That is stricter than
a computer algebra system: equal expressions in other forms count as wrong. The paper does not publish its verifier, so
all rules are ours.
"""

import enum
import functools
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

RELATIVE_TOLERANCE = Fraction(1, 10**6)
"""Largest relative error of a number that is not an integer."""

MAX_NUMBER_LENGTH = 64
"""Longer texts are not read as numbers."""

_MAX_NESTED_WRAPPERS = 8

_BRACES = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox)\{([^{}]*)\}")
_MATH_DELIMITERS_AND_SPACING = re.compile(r"\\[()\[\],;:! ]|~|\\(?:quad|qquad)(?![a-zA-Z])")
_SPACE_BETWEEN_DIGITS = re.compile(r"(?<=[0-9])\s+(?=[0-9])")
_OPTION = re.compile(r"\(([a-z])\)|([a-z])[):]")
_PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?"
_DECIMAL = re.compile(rf"(?=[0-9.])({_PLAIN})(?:e([+-]?[0-9]{{1,3}}))?")
_RATIO = re.compile(rf"\\[dt]?frac\{{([+-]?{_PLAIN})\}}\{{([+-]?{_PLAIN})\}}|({_PLAIN})/([+-]?{_PLAIN})")


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


def normalise_answer(answer: str) -> str:
    r"""The form in which two answers are compared as text (ours).

    Lower case; no white space, except one space between two digits ("1 2" is a list and not 12); without math
    delimiters, LaTeX spacing, `\text{…}` and its kin, surrounding `$`, trailing periods. (A), A., A) and A: become a.

    Args:
        answer: content of a box, or a reference answer.

    Returns:
        Normalised text, possibly empty.
    """
    text = answer.replace("\u2212", "-").replace("{,}", ",").replace("\\%", "%").replace("\\$", "$").casefold()
    text = _MATH_DELIMITERS_AND_SPACING.sub("", text)
    # A control character marks the spaces that carry meaning while the others are removed.
    text = "".join(_SPACE_BETWEEN_DIGITS.sub("\0", text.replace("\0", "")).split()).replace("\0", " ")
    for _ in range(_MAX_NESTED_WRAPPERS):
        unwrapped = _WRAPPER.sub(r"\1", text)
        if unwrapped == text:
            break
        text = unwrapped
    text = text.lstrip("$").rstrip("$.")
    option = _OPTION.fullmatch(text)
    return (option.group(1) or option.group(2)) if option else text


def verify(completion_text: str, answer: str) -> Verdict:
    r"""Compare a completion's last boxed answer with the reference (ours); verdicts are kept, as rollouts repeat.

    Correct when both are equal after `normalise_answer`, or both are plain numbers of equal value: integers, decimals,
    exponents (1e-3), thousands separators, fractions (a/b, `\frac{a}{b}`), percentages (50% is 0.5, not 50). Two
    integers must be equal; otherwise the relative error may be 1e-6.

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
    if given == reference:
        return Verdict.CORRECT
    given_number, reference_number = _number(given), _number(reference)
    if given_number is None or reference_number is None:
        return Verdict.WRONG
    if given_number.denominator == reference_number.denominator == 1:
        return Verdict.CORRECT if given_number == reference_number else Verdict.WRONG
    close = abs(given_number - reference_number) <= RELATIVE_TOLERANCE * abs(reference_number)
    return Verdict.CORRECT if close else Verdict.WRONG


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


def _number(text: str) -> Fraction | None:
    """The value of a plain number in normalised text, or None."""
    if len(text) > MAX_NUMBER_LENGTH:
        return None
    unsigned = text[1:] if text.startswith(("-", "+")) else text
    percent = unsigned.endswith("%")
    body = unsigned.removesuffix("%")
    ratio = _RATIO.fullmatch(body)
    if ratio:
        top, bottom = (_plain(part) for part in ratio.groups() if part is not None)
        value = None if top is None or not bottom else top / bottom
    else:
        decimal = _DECIMAL.fullmatch(body)
        plain = _plain(decimal.group(1)) if decimal else None
        value = None if decimal is None or plain is None else plain * Fraction(10) ** int(decimal.group(2) or 0)
    if value is None:
        return None
    return (-value if text.startswith("-") else value) / (100 if percent else 1)


def _plain(text: str) -> Fraction | None:
    digits = text.replace(",", "")
    return Fraction(digits) if digits.strip("+-") else None
