"""What a data set must hold to be trained on, and the explicit order in which its prompts come."""

import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from datasets.features.features import require_decoding

from ..guidance.answers import normalise_answer
from ..guidance.fingerprints import image_digest, tokenizer_digest, tokenizer_of
from ..guidance.verifiers import reference_fault
from ..streams import DATA_ORDER
from .pictures import inspect_picture, tokens_of_size
from .prompts import PromptCheck, Room

REQUIRED_COLUMNS = ("uid", "prompt", "answer")
"""Columns that NPO needs; `answer` for the package's own verifier only, `image` for visual tasks only."""

CHECKED_AT_ONCE = 1024
"""Rows in memory at a time when a data set is checked."""

DatasetOrStream = TypeVar("DatasetOrStream", Dataset, IterableDataset)

REMEMBERED = 8
"""Data sets of which is remembered what was found: each trainer of a run asks again."""

_LOOKED_THROUGH: dict[tuple[Any, ...], tuple[list[str], set[str]]] = {}


def training_schedule(dataset: Dataset, steps: int, prompts_per_step: int, seed: int) -> Dataset:
    """The explicit data order: row g·prompts_per_step + i is prompt i of optimiser step g.

    Passes over the data are shuffled each on their own, and no step straddles two, so the prompts of a step are
    distinct (rows that fill no whole step are left out of that pass). The result is one epoch long, so that a resumed
    or rolled-back run finds its place by step number alone.
    """
    whole = len(dataset) // prompts_per_step * prompts_per_step
    if not whole:
        raise ValueError(
            f"A step takes {prompts_per_step} distinct prompts, but the data set has {len(dataset)}; "
            f"lower prompts_per_step to {len(dataset)} or less (and micro_batch to a divisor of prompts_per_step × "
            "num_generations), or add prompts."
        )
    rng = DATA_ORDER.generator(seed)
    passes = [rng.permutation(len(dataset))[:whole] for _ in range(-(-steps * prompts_per_step // whole))]
    return dataset.select(np.concatenate(passes)[: steps * prompts_per_step])


def decoded_rows(batch: pa.Table, features: Features) -> list[dict[str, Any]]:
    """Rows of a stored table as they are read: a field of mixed types is stored as JSON text. Pictures stay encoded."""
    coded = Features(
        {
            name: features[name]
            for name in batch.column_names
            if require_decoding(features[name]) and not _holds_picture(features[name])
        }
    )
    rows = batch.to_pylist()
    return [row | coded.decode_example({name: row[name] for name in coded}) for row in rows] if coded else rows


def _holds_picture(feature: Any) -> bool:
    if isinstance(feature, Mapping):
        return any(map(_holds_picture, feature.values()))
    inner = feature[0] if isinstance(feature, list) else feature.feature if isinstance(feature, List) else None
    return isinstance(feature, Image) or (inner is not None and _holds_picture(inner))


def require_columns(dataset: Dataset, answer: bool = True, processor: Any = None, room: Room | None = None) -> set[str]:
    """Refuse a data set whose rows NPO cannot use.

    Args:
        dataset: Rows.
        answer: Every row needs a text under `answer`, as `BoxedVerifier` does; False for a verifier of one's own, which
            may read any column.
        processor: Processor of the policy, which has a say in the shapes of pictures; None: it is not asked.
        room: What the policy's context leaves to a prompt; None: prompts are not put into the template.

    Returns:
        The uids.

    Raises:
        ValueError: See `row_complaints`; the message lists every rule that is broken.
    """
    found, uids = row_complaints(dataset, answer, processor, room)
    if len(found) == 1:
        raise ValueError(f"The data set cannot be trained on: {found[0]}.")
    if found:
        raise ValueError("The data set cannot be trained on:\n" + "\n".join(f"  - {each}" for each in found))
    return uids


def row_complaints(
    dataset: Dataset, answer: bool = True, processor: Any = None, room: Room | None = None
) -> tuple[list[str], set[str]]:
    """What keeps NPO from using a data set, a clause for each rule with its first row, and the uids.

    A column that is missing; a uid that is no text, or that names two different rows; an answer or a prompt that is
    empty, or a whole solution in the place of an answer; a picture that is missing, cannot be decoded, or has a shape
    that the processor takes none of; a prompt that the chat template refuses, or that leaves no room for a response.

    Arguments are those of `require_columns`. A data set that was looked through is not looked through again.
    """
    known: tuple[Any, ...] = (dataset._fingerprint, answer, image_digest(processor) if processor is not None else None)
    if room is not None:
        assert processor is not None  # its tokens fill the room
        known += (repr(room), tokenizer_digest(processor), processor.chat_template)
    if known not in _LOOKED_THROUGH:
        while len(_LOOKED_THROUGH) >= REMEMBERED:
            _LOOKED_THROUGH.pop(next(iter(_LOOKED_THROUGH)))
        _LOOKED_THROUGH[known] = _look_through(dataset, answer, processor, room)
    found, uids = _LOOKED_THROUGH[known]
    return list(found), set(uids)


def _look_through(dataset: Dataset, answer: bool, processor: Any, room: Room | None) -> tuple[list[str], set[str]]:
    if missing := missing_columns(dataset.column_names, answer):
        return missing, set()
    first: dict[str, str] = {}
    count: Counter[str] = Counter()

    def complain(rule: str, text: str) -> None:
        first.setdefault(rule, text)
        count[rule] += 1

    seen: dict[str, tuple[int, tuple[str, str]]] = {}
    repeated: list[tuple[str, int]] = []
    prompts = None if room is None else PromptCheck(processor, room)
    # as stored: through a data set's own format or transform, each row would have its pictures decoded
    read = [name for name in REQUIRED_COLUMNS if name in dataset.column_names]
    stored = dataset.with_format("arrow").select_columns(read)
    rows = (row for batch in stored.iter(CHECKED_AT_ONCE) for row in decoded_rows(batch, dataset.features))
    for index, row in enumerate(rows):
        uid, wanted, prompt = row["uid"], row.get("answer"), row["prompt"]
        if not isinstance(uid, str) or not uid:
            advice = "; npo_core.with_uids(dataset) writes numbers as text" if isinstance(uid, int) else ""
            complain("uid", f"Row {index} has uid {uid!r}; every row needs a non-empty string{advice}")
            continue
        if answer and (not isinstance(wanted, str) or not normalise_answer(wanted)):
            complain(
                "answer",
                f"Row {index} (uid {uid!r}) has answer {wanted!r}; every row needs a non-empty string. (A verifier of "
                "your own may read any column.)",
            )
        elif answer and (fault := reference_fault(wanted)):
            complain("solution", f"Row {index} (uid {uid!r}) has an answer, {str(wanted)[-80:]!r}, that {fault}")
        if not prompt:
            complain("prompt", f"Row {index} (uid {uid!r}) has no prompt")
        elif prompts is not None and uid not in seen:
            prompts.add(index, prompt)
        content = (str(wanted), str(prompt))
        if uid in seen:
            repeated.append((uid, index))
        if seen.setdefault(uid, (index, content))[1] != content:
            complain(
                "twice",
                f"Uid {uid!r} names two rows with different content, answers {seen[uid][1][0]!r} and {str(wanted)!r}; "
                "make uids unique",
            )
    places = {uid: index for uid, (index, _) in seen.items()}
    shown: dict[int, list[int]] = {}
    for name in {"image", "images"} & set(dataset.column_names):
        index = _first_without(dataset, name)
        if index is not None:
            uid = stored[index]["uid"][0].as_py()
            complain("picture", f"Row {index} (uid {uid!r}) has no image; give every row one, or drop the column")
        elif _holds_picture(dataset.features[name]):
            pictures = dataset.with_format("arrow").select_columns([name])
            for uid, fault in _picture_faults(pictures, places, processor, shown):
                complain("picture", f"Row {places[uid]} (uid {uid!r}): {fault}")
            for uid, index in repeated:
                if _differ(pictures, places[uid], index):
                    complain("twice", f"Uid {uid!r} names two rows with different pictures; make uids unique")
    more = {rule: f" (and {number - 1} more)" if number > 1 else "" for rule, number in count.items()}
    found = [f"{text}{more[rule]}" for rule, text in first.items()]
    if prompts is not None and "picture" not in first:
        found += prompts.complaints(dataset, shown)
    return found, set(seen)


def _differ(stored: Dataset, one: int, other: int) -> bool:
    """Whether two rows hold different pictures; a row that is there twice, as in a schedule, is not read."""
    if stored._indices is not None:
        places = stored._indices.column(0)
        if places[one].as_py() == places[other].as_py():
            return False
    name = stored.column_names[0]
    return not stored[one][name][0].equals(stored[other][name][0])


def _picture_faults(
    stored: Dataset, places: Mapping[str, int], processor: Any, shown: dict[int, list[int]]
) -> Iterator[tuple[str, str]]:
    """Pictures that cannot be shown to the policy, each prompt looked at once; only header and end are read.

    Tokens of each picture that can go to `shown`, by row; 0 where the processor does not count them.
    """
    sizes: dict[tuple[int, int], int] = {}
    for uid, index in places.items():
        cell = stored[index][stored.column_names[0]][0]
        for value in cell.values if isinstance(cell, pa.ListScalar) else [cell]:
            if not value.is_valid or not (value["bytes"].is_valid or value["path"].is_valid):
                yield uid, "a picture of it is empty"
                break
            content, path = value["bytes"], value["path"].as_py()
            try:
                # the stored bytes are not copied: of most pictures the first and last pages are all that is read
                raw = pa.BufferReader(content.as_buffer()) if content.is_valid else pa.OSFile(path)
                with io.BufferedReader(raw) as stream:
                    size = inspect_picture(stream)
                if size not in sizes:
                    counts = processor is not None and tokenizer_of(processor) is not processor
                    sizes[size] = (tokens_of_size(processor, *size) or 0) if counts else 0
                shown.setdefault(index, []).append(sizes[size])
            except (OSError, ValueError) as error:
                yield uid, str(error)
                break


def missing_columns(names: Sequence[str] | None, answer: bool = True) -> list[str]:
    """A clause on the columns that NPO needs and that are not there; none where all are.

    Args:
        names: Columns of a data set; None for a stream that does not know them.
        answer: As in `require_columns`.
    """
    required = [name for name in REQUIRED_COLUMNS if answer or name != "answer"]
    missing = [] if names is None else [name for name in required if name not in names]
    if names is None or not missing:
        return []
    made = ". npo_core.with_uids(dataset) makes the first" if "uid" in missing else ""
    return [
        f"the data set has the columns {list(names)}, but not {missing}. NPO needs {required} in every row: uid names "
        f"the prompt in the guidance cache, answer is verified{made}"
    ]


def with_uids(dataset: DatasetOrStream, name: str = "row") -> DatasetOrStream:
    """The same rows with a text under `uid` that names each one: what stands there already, or its place (ours).

    Args:
        dataset: Rows, or a stream of them; a `uid` that is there, such as a number, is written as text.
        name: What the place is added to, `name/0`, `name/1`, …, so that two data sets have different uids.

    Raises:
        TypeError: A dictionary of splits, or anything else that is no data set.
    """

    def text(uid: Any, place: int) -> str:
        if isinstance(uid, float) and math.isfinite(uid) and uid.is_integer():
            uid = int(uid)  # a column of numbers in which one is missing is read as floats
        missing = uid is None or uid == "" or (isinstance(uid, float) and math.isnan(uid))
        return f"{name}/{place}" if missing else str(uid)

    if isinstance(dataset, IterableDataset):
        features = dataset.features and Features({**dataset.features, "uid": Value("string")})
        named = dataset.map(lambda row, place: {"uid": text(row.get("uid"), place)}, with_indices=True)
        return named if features is None else named.cast(features)
    if not isinstance(dataset, Dataset):
        raise TypeError(f"with_uids takes a Dataset or an IterableDataset, one split; got a {type(dataset).__name__}.")
    known = "uid" in dataset.column_names
    given = dataset.with_format(None)["uid"][:] if known else [None] * len(dataset)
    uids = [text(uid, place) for place, uid in enumerate(given)]
    return (dataset.remove_columns("uid") if known else dataset).add_column("uid", uids)


def _first_without(dataset: Dataset, name: str) -> int | None:
    """Index of the first row without a picture. None is read from disk: of the stored column, only what is null."""
    missing: list[bool] = []
    for chunk in dataset.data.column(name).chunks:
        empty = chunk.is_null()
        if pa.types.is_list(chunk.type):
            # pyarrow makes its functions when it is imported: a checker of types sees none of them
            lengths = pc.fill_null(pc.list_value_length(chunk), 0)  # pyright: ignore[reportAttributeAccessIssue]
            empty = pc.or_(empty, pc.equal(lengths, 0))  # pyright: ignore[reportAttributeAccessIssue]
        missing += empty.to_pylist()
    if not any(missing):
        return None
    # a selection of rows is a column of places in the stored table
    order = dataset._indices.column(0).to_pylist() if dataset._indices is not None else range(len(missing))
    return next((index for index, place in enumerate(order) if missing[place]), None)
