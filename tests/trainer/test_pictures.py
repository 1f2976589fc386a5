"""Pictures as a viewer shows them, and the tokens that stand for them, as TRL and vLLM want them."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image, ImageDraw
from worlds import TinyWorld, trainer_of, world

from npo_core.trainer.inputs import encode_prompts
from npo_core.trainer.pictures import NEVER, as_seen, collapse_pictures, never_sampled, picture_tokens, rows_as_seen


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


# What a policy sees of a picture


def drawing(mode: str, ink=(0, 0, 0, 255)) -> Image.Image:
    """A black line on transparent ground."""
    drawn = Image.new("RGBA", (48, 32), (0, 0, 0, 0))
    ImageDraw.Draw(drawn).line((4, 4, 44, 28), fill=ink, width=4)
    return drawn.convert(mode)


def stored(picture: Image.Image, kind: str = "PNG", **options) -> Image.Image:
    """The picture as it comes back from a file."""
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    stream.seek(0)
    return Image.open(stream)


def palette_with_transparency() -> Image.Image:
    picture = Image.new("P", (48, 32), 0)
    picture.putpalette([0, 0, 0, 0, 0, 0])  # the ground is of the ink's colour, but transparent
    ImageDraw.Draw(picture).line((4, 4, 44, 28), fill=1, width=4)
    picture.info["transparency"] = 0
    return picture


ON_WHITE = Image.new("RGB", (48, 32), "white")
ImageDraw.Draw(ON_WHITE).line((4, 4, 44, 28), fill="black", width=4)
RAMP = np.linspace(0, 65535, 32 * 48).reshape(32, 48).astype(np.uint16)
SEEN = {
    "RGBA": drawing("RGBA"),
    "LA": drawing("LA"),
    "palette": palette_with_transparency(),
    "palette of a PNG": stored(palette_with_transparency(), transparency=0),
    "colour that is transparent": stored(Image.new("RGB", (48, 32), "red"), transparency=(255, 0, 0)),
    "premultiplied": drawing("RGBa"),
    "WebP": stored(drawing("RGBA"), "WEBP", lossless=True),
    "TIFF": stored(drawing("RGBA"), "TIFF"),
}


@pytest.mark.parametrize("kind", SEEN)
def test_a_transparent_ground_is_white_as_a_viewer_shows_it(kind):
    seen = as_seen(SEEN[kind])
    white = Image.new("RGB", (48, 32), "white") if kind.startswith("colour") else ON_WHITE
    assert seen.mode == "RGB" and seen.tobytes() == white.tobytes()


def test_half_transparent_ink_is_mixed_with_the_ground():
    assert as_seen(drawing("RGBA", (255, 0, 0, 128))).getpixel((24, 16)) == (255, 127, 127)


def test_sixteen_bits_are_scaled_and_not_cut_off():
    for picture in (stored(Image.fromarray(RAMP)), Image.fromarray(RAMP.astype(np.int32))):
        seen = np.asarray(as_seen(picture))
        assert seen.shape == (32, 48, 3)
        assert np.abs(seen[..., 0] - RAMP / 257).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("values", [np.float32([[0.5]]), np.int32([[65536]]), np.int32([[-1]])])
def test_numbers_without_an_agreed_white_are_refused(values):
    with pytest.raises(ValueError, match="no agreed white: save it with 8 or 16 bits"):
        as_seen(Image.fromarray(values))


def test_other_kinds_are_what_pillow_makes_of_them_and_a_turned_one_is_upright():
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    for mode in ("L", "1", "P", "CMYK", "YCbCr", "HSV"):
        assert as_seen(colours.convert(mode)).tobytes() == colours.convert(mode).convert("RGB").tobytes()
    turned = Image.Exif()
    turned[0x0112] = 6
    seen = as_seen(stored(colours, exif=turned))
    assert seen.size == (32, 48) and seen.tobytes() == colours.transpose(Image.Transpose.ROTATE_270).tobytes()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    moving = stored(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert as_seen(moving).getpixel((0, 0)) == (255, 0, 0), "the first frame"
    assert as_seen(Image.new("RGBA", (1, 1))).getpixel((0, 0)) == (255, 255, 255)
    assert as_seen(colours) is colours and as_seen("a/path.png") == "a/path.png"


def test_training_and_what_is_off_line_see_the_same(tmp_path):
    """A drawing on transparent ground, in `image`, in `images` or in the prompt itself, gives the pixels of white."""
    tiny = world("pictures")
    row = {**tiny.dataset[0], "image": None}
    part = {"type": "image", "image": SEEN["RGBA"]}
    text = {"type": "text", "text": row["prompt"][-1]["content"]}
    white = encode_prompts(tiny.processor, [{**row, "image": ON_WHITE}])["pixel_values"]
    within = {**row, "prompt": [{"role": "user", "content": [part, text]}]}
    for given in ({**row, "image": SEEN["RGBA"]}, {**row, "images": [SEEN["LA"]]}, within):
        torch.testing.assert_close(encode_prompts(tiny.processor, [given])["pixel_values"], white, rtol=0, atol=0)
        seen = rows_as_seen([given])[0]
        torch.testing.assert_close(encode_prompts(tiny.processor, [seen])["pixel_values"], white, rtol=0, atol=0)
    rows = Dataset.from_list([{**tiny.dataset[n], "image": SEEN["RGBA"]} for n in range(2)])
    trainer = trainer_of(TinyWorld(tiny.processor, rows, tiny.build), tmp_path, prompts=2, n=2)
    trainer.train()
    pixels = trainer.generated[0]["pixel_values"]
    torch.testing.assert_close(pixels, white.repeat(4, 1), rtol=0, atol=0)
