"""What a verifier is and says: a verdict on a response, and the reward that TRL is given for it."""

import enum
import inspect
from collections.abc import Callable, Mapping
from typing import Any


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


class AnswerVerifier:
    """Base of the verifiers that read the row's "answer": a trainer asks every row for one, a non-empty string."""


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


def require_verifier(verifier: Any) -> None:
    """Refuse what cannot be called as a verifier.

    Raises:
        TypeError: It is a class, a coroutine, or takes other arguments, such as a reward function.
    """
    fault = ""
    if isinstance(verifier, type):
        fault = f"the class {verifier.__name__}: give an instance, {verifier.__name__}()"
    elif not callable(verifier):
        fault = f"a {type(verifier).__name__}"
    elif inspect.iscoroutinefunction(verifier) or inspect.iscoroutinefunction(type(verifier).__call__):
        fault = "a coroutine, which nobody awaits here: give a plain function"
    else:
        try:
            inspect.signature(verifier).bind("text", {})
        except TypeError as error:
            fault = f"{verifier!r}, which does not take these two: {error}"
        except ValueError:  # a function of C that does not say what it takes
            pass
    if fault:
        raise TypeError(f"verifier is called as verifier(response text, row) -> Verdict or bool; it is {fault}.")


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

    The function is `reward(completions, **columns)` and is logged as "verified". The verifier's row holds the prompt,
    under the data set's name for it, and the columns that are lists with one entry per completion; what else TRL passes
    (trainer_state, log_extra, …) is left out.

    Args:
        verifier: called once per completion with its text and its row.

    Returns:
        The reward function.
    """

    def verified(completions: list[Any], *, prompts: list[Any] | None = None, **columns: Any) -> list[float]:
        per_row = {
            name: values
            for name, values in {"prompt": prompts, **columns}.items()
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
