"""Random streams: no two share a key, each is what it was, and nothing draws beside them."""

import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from npo_core.streams import (
    BRANCH,
    CACHE,
    DATA_ORDER,
    DIVERGENCE,
    GAIN,
    GATES,
    GYM,
    MEASURED,
    PAIRS,
    POOL,
    PREMISE,
    PROBE,
    PROCESS,
    RANDOM_PLAN,
    STREAMS,
    TEST_ITEMS,
    Stream,
)

PACKAGE = Path(__file__).parents[1] / "npo_core"
TEXTS = {"uid", "policy", "source", "split", "task"}


@pytest.mark.parametrize(
    ("stream", "place", "key"),
    [
        (DATA_ORDER, (), [9, 7]),
        (GYM, ("train", "gcd", 2), [9, *b"train", 8, *b"gcd", 2]),
        (PROBE, (40,), [9, 40, 1]),
        (DIVERGENCE, (40,), [9, 40, 2]),
        (CACHE, (40, 0), [9, 40, 3]),
        (CACHE, (40, 2), [9, 40, 3, 2]),
        (BRANCH, (2,), [9, 2, 4]),
        (RANDOM_PLAN, (), [9, 5]),
        (POOL, (40, "ab"), [9, 40, 97, 98]),
        (PAIRS, (40,), [9, 40]),
        (PREMISE, (40,), [9, 40, 1]),
        (MEASURED, (1, "000040"), [9, 1, *b"000040"]),
        (GATES, (), 9),
        (GAIN, (0, "teacher"), [9, 0, *b"teacher"]),
        (PROCESS, (3,), [9, 3]),
        (TEST_ITEMS, (), 9),
    ],
    ids=str,
)
def test_a_stream_draws_what_runs_on_disk_were_made_with(stream, place, key):
    assert stream.seed(9, *place) == np.random.SeedSequence(key).generate_state(1)[0]
    assert stream.generator(9, *place).random(3).tolist() == np.random.default_rng(key).random(3).tolist()


def test_no_two_places_of_what_one_run_draws_share_a_key():
    """SeedSequence fills short keys with zeros, so that is how they are compared; run and data may have one seed."""
    seen: dict[tuple, tuple] = {}
    for name, stream in STREAMS.items():
        owner = "run" if stream.of == "data" else stream.of
        values = [("1", "ab", "000005") if place in TEXTS else (0, 1, 2, 5, 7, 30) for place in stream.place]
        for place in product(*values):
            key = stream.key(5, *place)
            padded = (owner, *key, *[0] * (12 - len(key)))
            assert padded not in seen, f"{name} at {place} and {seen[padded]}"
            seen[padded] = (name, place)


def test_tags_and_texts_cannot_be_taken_for_each_other():
    assert all(0 <= stream.tag < 32 for stream in STREAMS.values())
    assert len({(s.of, s.tag, len(s.place)) for s in STREAMS.values()}) == len(STREAMS)


def test_a_key_of_too_few_or_too_many_places_is_refused():
    for place in ((), (1, 2)):
        with pytest.raises(ValueError, match=r"the key has the places \('policy step',\)"):
            PROBE.key(0, *place)


def test_nothing_makes_a_key_of_its_own():
    """The small world's draws have settings for seeds; a bootstrap is given its generator."""
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(r"SeedSequence\(|default_rng\(", path.read_text())
    }
    assert found == {"streams.py", "world/letters.py", "world/tasks/problems.py", "world/warmstart.py"}
    assert all(isinstance(stream, Stream) and len(stream.draws) > 10 for stream in STREAMS.values())
