"""Training and test rows from two places: none of the ones among the others, whatever their uids."""

import json
from collections import defaultdict
from typing import Any

from datasets import Dataset, Image, List

LEAST_TEST_ROWS = 2
"""Test prompts that an interval needs."""


def unseen(train: Dataset, test: Dataset) -> Dataset:
    """Test rows that a test can be made of, under uids that no training row has.

    Raises:
        ValueError: Fewer than an interval needs, or some that the training rows have too.
    """
    common = common_rows(train, test)
    if common:
        raise ValueError(
            f"{len(common)} prompts are in data and in test_data, such as {test[common[0]]['uid']!r}; a test prompt "
            "must not be trained on. Give another split (test_split) or file."
        )
    if len(test) < LEAST_TEST_ROWS:
        raise ValueError(
            f"test_data has {len(test)} rows; an interval needs {LEAST_TEST_ROWS} or more. Give more rows, or leave "
            "test_data empty: then eval_problems rows of data are held out."
        )
    uids = test["uid"][:]
    if set(train["uid"][:]).isdisjoint(uids):
        return test
    # rows of two splits that have no uid of their own are both counted from 0
    return test.remove_columns("uid").add_column("uid", [f"test/{uid}" for uid in uids])


def common_rows(train: Dataset, test: Dataset) -> list[int]:
    """Places of the test rows that the training rows have too: prompt, answer and pictures, whatever their uids."""
    texts, asked = _texts(train), _texts(test)
    wanted, places = set(asked), defaultdict(list)
    for place, text in enumerate(texts):
        if text in wanted:
            places[text].append(place)
    kind = next((kind for kind in ("image", "images") if kind in test.column_names and kind in train.column_names), "")
    return [
        place
        for place, text in enumerate(asked)
        if places[text] and (not kind or _stored(test, kind, place) in [_stored(train, kind, n) for n in places[text]])
    ]


def _texts(rows: Dataset) -> list[str]:
    names = [name for name in ("prompt", "answer") if name in rows.column_names]
    return [json.dumps(list(row.values())) for row in rows.select_columns(names)]


def _stored(rows: Dataset, kind: str, place: int) -> list[Any]:
    """What the pictures of a row are decoded from: their bytes, or their path where those are not in the data set."""
    plain = Image(decode=False) if kind == "image" else List(Image(decode=False))
    found = rows.select([place]).select_columns([kind]).cast_column(kind, plain)[0][kind]
    return [each["bytes"] or each["path"] for each in (found if kind == "images" else [found]) if each]
