"""Prompts that come n times: processed once per call and copied, their text rendered once per run."""

import json
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_utils import make_flat_list_of_images

REMEMBERED_TEXTS = 8192
"""Rendered prompts that are kept before the memory starts afresh."""


class SharedPrompts:
    """Mixin for a vision-language processor: a prompt that comes n times is processed once and copied.

    TRL hands the processor every prompt n times, once per rollout, and does so twice a step. The output is the same;
    calls with other than one picture per text are passed on unchanged.
    """

    def __call__(self, images=None, text=None, **kwargs):
        pictures = make_flat_list_of_images(images) if images is not None else []
        if (
            not isinstance(text, list)
            or not len(pictures) == len(text) > 0
            or any(words.count(self.image_token) != 1 for words in text)
            or not all(isinstance(picture, Image.Image) for picture in pictures)
        ):
            return super().__call__(images=images, text=text, **kwargs)
        contents = {id(picture): picture for picture in pictures}  # one object many times is looked at once
        contents = {key: _content(picture) for key, picture in contents.items()}
        seen: dict[tuple, int] = {}
        copies = [
            seen.setdefault((words, contents[id(picture)]), len(seen))
            for words, picture in zip(text, pictures, strict=True)
        ]
        first = [copies.index(place) for place in range(len(seen))]
        output = super().__call__(
            images=[pictures[index] for index in first], text=[text[index] for index in first], **kwargs
        )
        if len(first) == len(text):
            return output
        counts = torch.as_tensor(output["image_grid_thw"]).prod(dim=-1)
        for name, value in output.items():
            if name == "pixel_values":
                output[name] = value[copied_rows(counts, copies, 1)]
            else:
                listed = isinstance(value, list)
                output[name] = [value[place] for place in copies] if listed else value[copies]
        return output

    def _process_images(self, images, **kwargs):
        """The pictures of the last call are not processed again: TRL asks for them twice a step, in two forms."""
        pictures = make_flat_list_of_images(images)
        tensors = kwargs.get("return_tensors")
        settings = {name: value for name, value in kwargs.items() if name != "return_tensors"}
        known = all(isinstance(picture, Image.Image) for picture in pictures) and tensors in (None, "pt")
        if not known or not all(_plain(value) for value in settings.values()):
            return super()._process_images(images, **kwargs)
        key = [settings, *map(_content, pictures)]
        last = self.__dict__.get("_last_pictures")
        if last is None or last[0] != key:
            last = self.__dict__["_last_pictures"] = (key, *super()._process_images(images, **settings))
        _, processed, replacements = last
        return BatchFeature(dict(processed), tensor_type=tensors), list(replacements)

    def apply_chat_template(self, conversation, chat_template=None, **kwargs):
        """As the processor's own; the text of a conversation that was rendered before is not rendered again."""
        if kwargs.get("tokenize") or not all(_plain(value) for value in kwargs.values()):
            return super().apply_chat_template(conversation, chat_template, **kwargs)
        rendered = self.__dict__.setdefault("_rendered", {})
        key = json.dumps([conversation, chat_template or self.chat_template, kwargs], default=_unwritten)
        if key not in rendered:
            if len(rendered) >= REMEMBERED_TEXTS:
                rendered.clear()
            rendered[key] = super().apply_chat_template(conversation, chat_template, **kwargs)
        text = rendered[key]
        return list(text) if isinstance(text, list) else text


def _content(picture: Image.Image) -> tuple:
    """What two pictures must share to be the same; the bytes of a palette picture are places in its palette."""
    return picture.mode, picture.size, picture.tobytes(), bytes(picture.getpalette() or ())


def _plain(value) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _unwritten(value) -> str:
    """A picture's place in a conversation: the text of a prompt does not depend on what it shows."""
    if isinstance(value, Image.Image):
        return "<picture>"
    raise TypeError(f"A conversation holds a {type(value).__name__}; text and PIL pictures can be rendered.")


def copied_rows(counts: Tensor, copies: Sequence[int], merge: int) -> Tensor:
    """Row numbers that spread the rows of the distinct pictures over all pictures.

    Args:
        counts: Patches of each distinct picture, shape (distinct,).
        copies: For each picture its distinct picture, length (pictures,).
        merge: Patches per row.
    """
    lengths = (counts // merge).cpu()
    starts = lengths.cumsum(0) - lengths
    chosen = torch.as_tensor(copies, dtype=torch.int64)
    return _from(starts[chosen], lengths[chosen])


def _from(starts: Tensor, lengths: Tensor) -> Tensor:
    """`starts[i], starts[i] + 1, …`, `lengths[i]` numbers each, in one row."""
    offsets = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (starts - offsets).repeat_interleave(lengths)
