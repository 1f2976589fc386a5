"""What a data set must hold to be trained on, and the explicit order in which its prompts come."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

REQUIRED_COLUMNS = ("uid", "prompt", "answer")
"""Columns that NPO needs; `answer` for the package's own verifier only, `image` for visual tasks only."""

CHECKED_AT_ONCE = 1024
"""Rows in memory at a time when a data set is checked."""


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
            "lower prompts_per_step or add prompts."
        )
    rng = np.random.default_rng([seed, 7])
    passes = [rng.permutation(len(dataset))[:whole] for _ in range(-(-steps * prompts_per_step // whole))]
    return dataset.select(np.concatenate(passes)[: steps * prompts_per_step])


def require_columns(dataset: Dataset, answer: bool = True) -> set[str]:
    """Refuse a data set whose rows NPO cannot use.

    Args:
        dataset: Rows.
        answer: Every row needs a text under `answer`, as `BoxedVerifier` does; False for a verifier of one's own, which
            may read any column.

    Returns:
        The uids.

    Raises:
        ValueError: A column is missing, a value is empty, an image is missing, or two different rows share a uid.
    """
    required = [name for name in REQUIRED_COLUMNS if answer or name != "answer"]
    missing = [name for name in required if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"The data set has the columns {dataset.column_names}, but not {missing}. NPO needs "
            f"{required} in every row: uid names the prompt in the guidance cache, answer is verified."
        )
    seen: dict[str, tuple[str, str]] = {}
    # as stored: through a data set's own format or transform, each row would have its pictures decoded
    read = [name for name in REQUIRED_COLUMNS if name in dataset.column_names]
    stored = dataset.with_format("arrow").select_columns(read)
    rows = (row for batch in stored.iter(CHECKED_AT_ONCE) for row in batch.to_pylist())
    for index, row in enumerate(rows):
        uid, wanted, prompt = row["uid"], row.get("answer"), row["prompt"]
        if not isinstance(uid, str) or not uid:
            raise ValueError(f"Row {index} has uid {uid!r}; every row needs a non-empty string.")
        if answer and (not isinstance(wanted, str) or not wanted.strip()):
            raise ValueError(
                f"Row {index} (uid {uid!r}) has answer {wanted!r}; every row needs a non-empty string. (A verifier of "
                "your own may read any column.)"
            )
        if not prompt:
            raise ValueError(f"Row {index} (uid {uid!r}) has no prompt.")
        content = (str(wanted), str(prompt))
        if seen.setdefault(uid, content) != content:
            raise ValueError(
                f"Uid {uid!r} names two rows with different content, answers {seen[uid][0]!r} and {str(wanted)!r}; "
                "make uids unique."
            )
    for name in {"image", "images"} & set(dataset.column_names):
        index = _first_without(dataset, name)
        if index is not None:
            uid = stored[index]["uid"][0].as_py()
            raise ValueError(f"Row {index} (uid {uid!r}) has no image; give every row one, or drop the column.")
    return set(seen)


def _first_without(dataset: Dataset, name: str) -> int | None:
    """Index of the first row without a picture. None is read from disk: of the stored column, only what is null."""
    missing: list[bool] = []
    for chunk in dataset.data.column(name).chunks:
        empty = chunk.is_null()
        if pa.types.is_list(chunk.type):
            empty = pc.or_(empty, pc.equal(pc.fill_null(pc.list_value_length(chunk), 0), 0))
        missing += empty.to_pylist()
    if not any(missing):
        return None
    # a selection of rows is a column of places in the stored table
    order = dataset._indices.column(0).to_pylist() if dataset._indices is not None else range(len(missing))
    return next((index for index, place in enumerate(order) if missing[place]), None)
