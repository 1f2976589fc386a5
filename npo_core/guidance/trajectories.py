"""Trajectories and the guidance cache: one verified-correct response per prompt, from a later checkpoint.

A guide is kept as the token ids that were sampled, never as text, with the log-probabilities under the policy that
sampled it. It is verified when it enters the cache: a trajectory that is wrong, over-long, without end of sequence or
of an unknown prompt is refused.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from ..files import write_whole
from .fingerprints import image_digest, tokenizer_digest

FORMAT = 1
RULES = ("first", "shortest", "closest")
"""Rules that choose which correct trajectory of a prompt is kept (ours; the paper keeps one, unspecified)."""


@dataclass(frozen=True)
class Trajectory:
    """One sampled response.

    Attributes:
        uid: Prompt that it answers.
        token_ids: Sampled token ids, end of sequence included where there is one.
        logps: Log-probability of each token under the policy that sampled it, at `temperature`, in nats.
        source_step: Policy step of that policy.
        correct: Verdict of the verifier.
        text: Decoded response, for people; never tokenised again.
        policy_logps: Log-probability of each token under the policy that will be guided, or None if not computed.
        temperature: Temperature that the log-probabilities are taken at. A ratio of π and q needs that of the training.
    """

    uid: str
    token_ids: tuple[int, ...]
    logps: tuple[float, ...]
    source_step: int
    correct: bool
    text: str
    policy_logps: tuple[float, ...] | None = None
    temperature: float = 1.0


def uid_of(row: Mapping[str, Any]) -> str:
    """The text that names a row's prompt among guides.

    Raises:
        ValueError: The row has none, or a number, under which no guide would ever be found.
    """
    uid = row.get("uid")
    if not isinstance(uid, str) or not uid:
        has = f"uid {uid!r}" if "uid" in row else f"no uid, but {sorted(row)}"
        raise ValueError(
            f"A row has {has}; every row needs a non-empty string that names its prompt: npo_core.with_uids(dataset) "
            "writes numbers as text, or counts the rows."
        )
    return uid


class GuidanceRefused(ValueError):
    """A trajectory that may not guide: wrong, over-long, without end of sequence, or of an unknown prompt."""


@dataclass
class Filled:
    """What became of the candidates of a cache.

    Attributes:
        candidates: Off-line rollouts.
        wrong: Those that the verifier found wrong.
        cut: Of these, those without an end of sequence: cut off at the longest response.
        refused: Those that were right and cannot guide.
        example: Why the first of these cannot.
    """

    candidates: int = 0
    wrong: int = 0
    refused: int = 0
    example: str = ""
    cut: int = 0

    def __add__(self, other: "Filled") -> "Filled":
        counts = (self.candidates + other.candidates, self.wrong + other.wrong, self.refused + other.refused)
        return Filled(*counts, self.example or other.example, self.cut + other.cut)

    def __str__(self) -> str:
        first = f" (the first: {self.example})" if self.refused else ""
        cut = f" ({self.cut} of these were cut off)" if self.cut else ""
        return f"of {self.candidates} responses {self.wrong} were wrong{cut}, {self.refused} right but no guides{first}"


class GuidanceCache:
    """Guide trajectories by prompt uid: the near-future source of NPO. `NPOTrainer.new_cache` makes one that fits it.

    Args:
        eos_token_ids: Token ids that end a response.
        max_completion_length: Longest response in tokens.
        tokenizer_digest: Fingerprint of the tokenizer that the token ids belong to (`npo_core.tokenizer_digest`); empty
            if unknown, then a trainer cannot tell whether they are its own.
        known_uids: Prompts that may be guided; None allows any.
        image_digest: Fingerprint of the picture settings that the guides were sampled under; empty if unknown.

    Attributes:
        filled: What became of the candidates that `fill` got last; as text, why prompts are without a guide.
    """

    def __init__(
        self,
        eos_token_ids: Sequence[int],
        max_completion_length: int,
        tokenizer_digest: str,
        known_uids: Iterable[str] | None = None,
        image_digest: str = "",
    ):
        self.eos_token_ids = tuple(eos_token_ids)
        self.max_completion_length = max_completion_length
        self.tokenizer_digest = tokenizer_digest
        self.image_digest = image_digest
        self.known_uids = None if known_uids is None else frozenset(known_uids)
        self._guides: dict[str, Trajectory] = {}
        self.filled = Filled()

    @classmethod
    def empty(
        cls,
        processor: Any,
        eos_token_ids: Sequence[int],
        max_completion_length: int,
        known_uids: Iterable[str] | None = None,
    ) -> Self:
        """A cache without guides for the policies of a processor or tokenizer, whose fingerprints it carries."""
        digests = tokenizer_digest(processor), image_digest(processor)
        return cls(eos_token_ids, max_completion_length, digests[0], known_uids, digests[1])

    def __len__(self) -> int:
        return len(self._guides)

    def __contains__(self, uid: object) -> bool:
        return uid in self._guides

    def __iter__(self) -> Iterator[Trajectory]:
        return iter(self._guides.values())

    def guide(self, uid: str, policy_step: int) -> Trajectory | None:
        """Guide of a prompt at a policy step, or None. (The cache is the same at every step.)"""
        return self._guides.get(uid)

    def add(self, trajectory: Trajectory) -> None:
        """Put a trajectory in as the guide of its prompt.

        Raises:
            GuidanceRefused: It is wrong, over-long, without end of sequence or goes on behind it, of an unknown prompt,
                or its token ids and log-probabilities differ in number.
        """
        self.check(trajectory)
        self._guides[trajectory.uid] = trajectory

    def check(self, trajectory: Trajectory) -> None:
        """Raise `GuidanceRefused` if the trajectory may not guide; see `add`."""
        uid, length = trajectory.uid, len(trajectory.token_ids)
        if self.known_uids is not None and uid not in self.known_uids:
            raise GuidanceRefused(f"Guide for the unknown prompt {uid!r}: the training data has no such uid.")
        if not trajectory.correct:
            raise GuidanceRefused(f"Guide for {uid!r} is not verified correct: {trajectory.text!r}.")
        if length > self.max_completion_length:
            raise GuidanceRefused(
                f"Guide for {uid!r} has {length} tokens; at most {self.max_completion_length} fit a response."
            )
        if not length or trajectory.token_ids[-1] not in self.eos_token_ids:
            raise GuidanceRefused(f"Guide for {uid!r} does not end with an end-of-sequence token: {trajectory.text!r}.")
        if not set(trajectory.token_ids[:-1]).isdisjoint(self.eos_token_ids):
            raise GuidanceRefused(
                f"Guide for {uid!r} goes on behind an end-of-sequence token, where no rollout does; cut it there."
            )
        if length != len(trajectory.logps):
            raise GuidanceRefused(f"Guide for {uid!r} has {length} tokens but {len(trajectory.logps)} log-probs.")

    def fill(self, candidates: Iterable[Trajectory], rule: str = "first") -> int:
        """Keep one correct, usable trajectory per prompt; return how many correct ones were not usable.

        Args:
            candidates: Off-line rollouts, in the order they were sampled. Wrong ones are passed over.
            rule: "first" sampled; "shortest" in tokens; "closest": highest mean log-probability per token under the
                policy that will be guided (`policy_logps` must be there).

        Raises:
            ValueError: Unknown rule, or rule "closest" without `policy_logps`.
        """
        if rule not in RULES:
            raise ValueError(f"Unknown cache rule {rule!r}. Allowed: {', '.join(RULES)}.")
        usable: dict[str, list[Trajectory]] = {}
        for trajectory in self._usable(candidates):
            usable.setdefault(trajectory.uid, []).append(trajectory)
        for uid, choices in usable.items():
            self._guides[uid] = _choose(choices, rule)
        return self.filled.refused

    def _usable(self, candidates: Iterable[Trajectory]) -> Iterator[Trajectory]:
        """The candidates that are correct and can guide; `filled` counts what becomes of all of them."""
        self.filled = Filled()
        for trajectory in candidates:
            self.filled.candidates += 1
            if not trajectory.correct:
                self.filled.wrong += 1
                ended = bool(trajectory.token_ids) and trajectory.token_ids[-1] in self.eos_token_ids
                self.filled.cut += not ended
                continue
            try:
                self.check(trajectory)
            except GuidanceRefused as refusal:
                self.filled.refused += 1
                self.filled.example = self.filled.example or str(refusal)
                continue
            yield trajectory

    def save(self, path: str | Path) -> None:
        """Write the cache to a parquet file, its folder if need be; under another name first, then renamed."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {name: [] for name in _SCHEMA.names}
        for guide in self:
            values = (
                guide.uid,
                list(guide.token_ids),
                list(guide.logps),
                guide.source_step,
                1.0,
                guide.text,
                guide.temperature,
            )
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
        about = {
            "format": FORMAT,
            "eos_token_ids": self.eos_token_ids,
            "max_completion_length": self.max_completion_length,
            "tokenizer": self.tokenizer_digest,
            "pictures": self.image_digest,
        }
        table = pa.table(columns, schema=_SCHEMA).replace_schema_metadata({"npo_guidance": json.dumps(about)})
        write_whole(path, lambda unfinished: pq.write_table(table, unfinished))

    @classmethod
    def load(
        cls,
        path: str | Path,
        tokenizer_digest: str | None = None,
        known_uids: Iterable[str] | None = None,
        image_digest: str | None = None,
    ) -> "GuidanceCache":
        """Read a cache; each guide is checked again.

        Args:
            path: Parquet file that `save` wrote.
            tokenizer_digest: Fingerprint of the tokenizer in use; None skips that check.
            known_uids: Prompts that may be guided; None allows any.
            image_digest: Fingerprint of the picture settings in use; None skips that check, as does a cache without.

        Raises:
            FileNotFoundError: No such file.
            ValueError: Not a guidance cache, or one made with another tokenizer or other picture settings.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"No guidance cache at {path}.")
        try:
            table = pq.read_table(path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is not a parquet file: {error}") from error
        about = (table.schema.metadata or {}).get(b"npo_guidance")
        if about is None:
            raise ValueError(f"{path} is a parquet file, but not a guidance cache (no npo_guidance metadata).")
        try:
            about = json.loads(about)
        except ValueError as error:  # neither text nor JSON
            raise ValueError(
                f"{path} holds npo_guidance metadata that are no JSON, so it is no guidance cache."
            ) from error
        if about["format"] != FORMAT:
            raise ValueError(f"{path} has cache format {about['format']}; this version reads format {FORMAT}.")
        if tokenizer_digest is not None and about["tokenizer"] != tokenizer_digest:
            raise ValueError(
                f"{path} was made with another tokenizer ({about['tokenizer']}) than this policy's "
                f"({tokenizer_digest}); its token ids would mean other text. Make the cache again."
            )
        pictures = about.get("pictures", "")
        if image_digest and pictures and image_digest != pictures:
            raise ValueError(
                f"{path} was sampled with other picture settings ({pictures}) than this policy's ({image_digest}), so "
                "its guides saw other pictures. Make the cache again, or set min_pixels and max_pixels as they were."
            )
        cache = cls(about["eos_token_ids"], about["max_completion_length"], about["tokenizer"], known_uids, pictures)
        for row in table.to_pylist():
            cache.add(
                Trajectory(
                    uid=row["uid"],
                    token_ids=tuple(row["token_ids"]),
                    logps=tuple(row["logps"]),
                    source_step=row["source_step"],
                    correct=row["reward"] == 1.0,
                    text=row["text"],
                    temperature=row.get("temperature", 1.0),  # a file without it is older, and scored at 1
                )
            )
        return cache


_SCHEMA = pa.schema(
    {
        "uid": pa.string(),
        "token_ids": pa.list_(pa.int32()),
        "logps": pa.list_(pa.float32()),
        "source_step": pa.int32(),
        "reward": pa.float32(),
        "text": pa.string(),
        "temperature": pa.float64(),
    }
)


def _choose(choices: list[Trajectory], rule: str) -> Trajectory:
    if rule == "shortest":
        return min(choices, key=lambda choice: len(choice.token_ids))
    if rule == "closest":
        return max(choices, key=_closeness)
    return choices[0]


def _closeness(choice: Trajectory) -> float:
    """Mean log-prob under the policy to be guided, nats per token."""
    if choice.policy_logps is None:
        raise ValueError(
            "Cache rule 'closest' needs the log-probs under the policy to be guided (policy_logps); "
            "score the trajectories first, or use rule 'first' or 'shortest'."
        )
    return sum(choice.policy_logps) / len(choice.policy_logps)


def as_row(trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory as a plain dictionary."""
    return asdict(trajectory)
