"""Fingerprints tell tokenizers and picture settings apart where, and only where, a guide would mean something else."""

import pytest

from npo_core.guidance.fingerprints import image_digest, tokenizer_digest, tokenizer_of
from npo_core.world.policies import build_processor, build_tokenizer
from npo_core.world.tasks import vocabulary


@pytest.fixture
def processor():
    return build_processor(vocabulary())


def test_the_digest_tells_vocabularies_apart(processor):
    words = vocabulary()
    digest = tokenizer_digest(processor)
    assert digest == tokenizer_digest(build_processor(words)) == tokenizer_digest(tokenizer_of(processor))
    swapped = [words[1], words[0], *words[2:]]
    for other in ([*words, "new"], words[:-1], swapped):
        assert tokenizer_digest(build_processor(other)) != digest


def test_padding_with_the_end_of_sequence_makes_it_no_other_tokenizer():
    """TRL sets it so on a tokenizer without padding, after a cache may have been made with it."""
    tokenizer = build_tokenizer(vocabulary())
    own = tokenizer_digest(tokenizer)
    tokenizer.pad_token = None
    without = tokenizer_digest(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer_digest(tokenizer) == without != own


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", {"shortest_edge": 256, "longest_edge": 512}),
        ("patch_size", 4),
        ("merge_size", 1),
        ("image_mean", [0.5] * 3),
        ("image_std", [0.5] * 3),
        ("do_rescale", False),
        ("rescale_factor", 1.0),
        ("do_resize", False),
    ],
)
def test_the_digest_tells_settings_apart_that_change_what_is_seen(processor, name, value):
    same = build_processor(vocabulary()[::-1])  # other words, the same pictures
    assert image_digest(same) == image_digest(processor)
    setattr(same.image_processor, name, value)
    assert image_digest(same) != image_digest(processor)


def test_a_tokenizer_sees_no_pictures():
    assert image_digest(build_tokenizer(vocabulary())) == ""
