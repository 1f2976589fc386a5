"""What a policy could not read of a data set's prompts, found before the first step: template and context (ours)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PretrainedConfig

from .inputs import prompt_tokens

if TYPE_CHECKING:
    from .trainer import NPOTrainer

PER_TURN = 64
"""Tokens that a chat template adds to a turn at most, where a prompt is seen to be short without being tokenised."""

COUNTED_AT_ONCE = 64
"""Prompts that are tokenised together; one at a time where they have pictures."""


WRITTEN_OUT = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")
"""Beginning of a conversation that stands as text where messages are wanted, as some tables and CSV files have it."""


@dataclass(frozen=True)
class Room:
    """What the context of a policy leaves to a prompt.

    Attributes:
        context: Tokens that it reads at most, prompt and response; None of a policy without a limit.
        response: Longest response in tokens.
        template: `chat_template_kwargs` of training.
        setting: What the longest response is called, for messages.
    """

    context: int | None
    response: int
    template: Mapping[str, Any] = field(default_factory=dict)
    setting: str = "max_completion_length"

    @classmethod
    def of(cls, trainer: "NPOTrainer") -> "Room":
        """That of a trainer; an engine that samples for it may have a shorter context than the policy."""
        limits = [
            context_length(trainer.model.config),
            trainer.args.vllm_max_model_length if trainer.use_vllm else None,
        ]
        known = [limit for limit in limits if limit]
        return cls(min(known, default=None), trainer.max_completion_length, trainer.chat_template_kwargs)

    def fits(self, tokens: int) -> bool:
        """Whether a prompt of so many tokens leaves room for the longest response."""
        return self.context is None or tokens + self.response <= self.context

    def complaint(self, tokens: int, prompt: str, others: int) -> str:
        """A clause on prompts that do not fit.

        Args:
            tokens: Length of the longest.
            prompt: Which it is, such as "Row 3 (uid 'a')".
            others: How many others do not fit either.
        """
        more = f" (and {others} more are too long)" if others else ""
        assert self.context is not None  # without a limit every prompt fits
        left = max(0, self.context - self.response)
        return (
            f"{prompt} has a prompt of {tokens:,} tokens{more}; the policy's context is {self.context:,}, which with "
            f"responses of up to {self.response:,} ({self.setting}) leaves {left:,}. Lower {self.setting}, or leave "
            "long prompts out"
        )


def context_length(config: PretrainedConfig) -> int | None:
    """Tokens that a policy reads at most, by its configuration; None of an architecture without a limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


class PromptCheck:
    """Goes through the prompts of a data set: which the template refuses, and which leave no room for a response.

    Of the conversations that have the same succession of roles and parts one is put through the template. Only prompts
    that could be too long are tokenised: a token is at least a byte.

    Args:
        processor: Processor or tokenizer of the policy.
        room: What its context leaves to a prompt.
    """

    def __init__(self, processor: Any, room: Room):
        self.processor, self.room = processor, room
        self._shapes: dict[int, tuple] = {}
        self._bytes: dict[int, int] = {}
        self._written_out: list[int] = []

    def add(self, index: int, prompt: str | Sequence[Mapping[str, Any]]) -> None:
        """Take in the prompt of a row, as it is stored but for its pictures."""
        self._shapes[index] = _shape(prompt)
        self._bytes[index] = _size(prompt) + PER_TURN * len(self._shapes[index])
        if isinstance(prompt, str) and WRITTEN_OUT.match(prompt):
            self._written_out.append(index)

    def complaints(self, dataset: Dataset, pictures: Mapping[int, Sequence[int]]) -> list[str]:
        """A clause for each rule that is broken, with a row of it.

        Args:
            dataset: The rows, all of which can be shown.
            pictures: Tokens of each picture of a row, by index; of rows that have some.
        """
        rows = dataset.with_format(None)
        if self._written_out:
            first, *others = self._written_out
            more = f" (and {len(others)} more)" if others else ""
            return [
                f"{named(rows, first)} has chat messages written out as a text for a prompt{more}, which the policy "
                "would read as they stand; decode them (json.loads, or ast.literal_eval)"
            ]
        examples: dict[tuple, int] = {}
        for index, shape in self._shapes.items():
            examples.setdefault((shape, len(pictures.get(index, ()))), index)
        plain = {shape == (): index for (shape, _), index in examples.items()}
        if len(plain) > 1:
            one, other = named(rows, plain[True]), named(rows, plain[False])
            return [
                f"{one} has a plain text for a prompt, and {other} chat messages; write every prompt as chat messages: "
                '[{"role": "user", "content": …}]'
            ]
        found, around = [], 0
        for index in examples.values():
            try:
                around = max(around, self._tokens([rows[index]])[0])
            except (TemplateError, ValueError, KeyError, TypeError) as error:
                why = str(error).rstrip(".")
                found.append(f"{named(rows, index)} has a prompt that cannot be put into the chat template: {why}")
        return found or self._too_long(rows, pictures, around)

    def _too_long(self, rows: Dataset, pictures: Mapping[int, Sequence[int]], around: int) -> list[str]:
        most = {index: size + around + sum(pictures.get(index, ())) for index, size in self._bytes.items()}
        near = [index for index, tokens in most.items() if not self.room.fits(tokens)]
        at_once, long = 1 if pictures else COUNTED_AT_ONCE, {}
        for start in range(0, len(near), at_once):
            part = near[start : start + at_once]
            counts = self._tokens([rows[index] for index in part])
            long |= {index: tokens for index, tokens in zip(part, counts, strict=True) if not self.room.fits(tokens)}
        if not long:
            return []
        worst = max(long, key=long.__getitem__)
        return [self.room.complaint(long[worst], named(rows, worst), len(long) - 1)]

    def _tokens(self, rows: Sequence[Mapping[str, Any]]) -> list[int]:
        return [len(ids) for ids in prompt_tokens(self.processor, rows, self.room.template)[0]]


def require_room(processor: Any, rows: Sequence[Mapping[str, Any]], room: Room) -> None:
    """Refuse rows, few enough to be tokenised, whose prompts leave no room for a response.

    Raises:
        ValueError: A prompt is too long.
    """
    long: dict[str, int] = {}
    for row in rows:
        tokens = len(prompt_tokens(processor, [row], room.template)[0][0])
        if not room.fits(tokens):
            long[row["uid"]] = tokens
    if long:
        worst = max(long, key=long.__getitem__)
        raise ValueError(f"{room.complaint(long[worst], f'Uid {worst!r}', len(long) - 1)}.")


def named(rows: Dataset, index: int) -> str:
    """A row as messages name it."""
    return f"Row {index} (uid {rows[index]['uid']!r})"


def _shape(prompt: str | Sequence[Mapping[str, Any]]) -> tuple:
    """What a template may refuse a prompt for: its turns, by role and kinds of parts; none of a plain text."""
    if isinstance(prompt, str):
        return ()
    return tuple((message.get("role"), _parts(message.get("content"))) for message in prompt)


def _parts(content: Any) -> tuple | str:
    if not isinstance(content, list):
        return type(content).__name__
    return tuple(part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in content)


def _size(value: Any) -> int:
    """Bytes of all text in a prompt."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, Mapping):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 0
