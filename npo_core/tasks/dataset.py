"""Data sets for TRL: rows with uid, prompt, image, answer, suite and difficulty, and the explicit training schedule."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .problems import Problem

REQUIRED_COLUMNS = ("uid", "prompt", "answer")
"""Columns that NPO needs beside TRL's; `image` is needed for visual tasks only."""

CHECKED_AT_ONCE = 1024
"""Rows in memory at a time when a data set is checked."""


def conversation(problem: Problem, with_picture: bool) -> list[dict]:
    """Chat messages of a problem; `with_picture` puts the PIL picture into the message itself."""
    if not with_picture:
        return [{"role": "user", "content": problem.question}]
    parts = [{"type": "image", "image": problem.picture()}, {"type": "text", "text": problem.question}]
    return [{"role": "user", "content": parts}]


def make_dataset(problems: Sequence[Problem], text_only: bool = False) -> Dataset:
    """Rows (uid, prompt, image, answer, suite, difficulty), one per problem.

    Args:
        problems: Problems with distinct uids.
        text_only: Name the glyphs in the prompt instead of showing them; no image column.
    """
    rows = []
    for problem in problems:
        question = problem.question
        if text_only:
            question += " " + " ".join(problem.family.glyphs[glyph] for glyph in problem.glyphs)
        row = {
            "uid": problem.uid,
            "prompt": [{"role": "user", "content": question}],
            "answer": problem.answer,
            "suite": problem.suite,
            "difficulty": problem.difficulty,
        }
        rows.append(row if text_only else {**row, "image": problem.picture()})
    return Dataset.from_list(rows)


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


def require_columns(dataset: Dataset) -> None:
    """Refuse a data set whose rows NPO cannot use.

    Raises:
        ValueError: A column is missing, a value is empty, an image is missing, or two different rows share a uid.
    """
    missing = [name for name in REQUIRED_COLUMNS if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"The data set has the columns {dataset.column_names}, but not {missing}. NPO needs "
            f"{list(REQUIRED_COLUMNS)} in every row: uid names the prompt in the guidance cache, answer is verified."
        )
    seen: dict[str, tuple[str, str]] = {}
    # as stored: through a data set's own format or transform, each row would have its pictures decoded
    stored = dataset.with_format("arrow").select_columns(list(REQUIRED_COLUMNS))
    rows = (row for batch in stored.iter(CHECKED_AT_ONCE) for row in batch.to_pylist())
    for index, row in enumerate(rows):
        uid, answer, prompt = row["uid"], row["answer"], row["prompt"]
        if not isinstance(uid, str) or not uid:
            raise ValueError(f"Row {index} has uid {uid!r}; every row needs a non-empty string.")
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"Row {index} (uid {uid!r}) has answer {answer!r}; every row needs a non-empty string.")
        if not prompt:
            raise ValueError(f"Row {index} (uid {uid!r}) has no prompt.")
        content = (answer, str(prompt))
        if seen.setdefault(uid, content) != content:
            raise ValueError(
                f"Uid {uid!r} names two rows with different content, answers {seen[uid][0]!r} and {answer!r}; "
                "make uids unique."
            )
    for name in {"image", "images"} & set(dataset.column_names):
        index = _first_without(dataset, name)
        if index is not None:
            uid = stored[index]["uid"][0].as_py()
            raise ValueError(f"Row {index} (uid {uid!r}) has no image; give every row one, or drop the column.")


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
