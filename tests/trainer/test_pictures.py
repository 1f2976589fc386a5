"""Tokens that stand for pictures, as TRL and vLLM want them."""

from types import SimpleNamespace

from worlds import world

from npo_core.trainer.inputs import encode_prompts
from npo_core.trainer.pictures import NEVER, collapse_pictures, never_sampled, picture_tokens


def test_a_prompt_is_collapsed_to_one_token_per_picture():
    tiny = world("pictures")
    encoded = encode_prompts(tiny.processor, [tiny.dataset[0], tiny.dataset[1]])
    ids = [row[mask.bool()].tolist() for row, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)]
    picture = tiny.processor.image_token_id
    assert [row.count(picture) for row in ids] == [6, 6]
    collapsed = collapse_pictures(ids, tiny.processor)
    assert [row.count(picture) for row in collapsed] == [1, 1]
    assert [[token for token in row if token != picture] for row in collapsed] == [
        [token for token in row if token != picture] for row in ids
    ]


def test_two_pictures_stay_two_and_words_stay_as_they_are():
    processor = SimpleNamespace(image_token_id=7, video_token_id=8)
    assert collapse_pictures([[1, 1, 5, 7, 7, 7, 6, 5, 7, 7, 6, 2, 2]], processor) == [[1, 1, 5, 7, 6, 5, 7, 6, 2, 2]]
    assert collapse_pictures([[1, 1, 7]], SimpleNamespace()) == [[1, 1, 7]]


def test_picture_tokens_are_never_sampled():
    processor = world("pictures").processor
    assert never_sampled(processor) == {
        "logit_bias": {processor.image_token_id: NEVER, processor.video_token_id: NEVER}
    }
    assert picture_tokens(world("text").processor) == []
