"""Pictures in prompts: those of a row as a viewer shows them, the tokens that stand for them, and how vLLM wants both.

Whatever a picture's file is like, a policy sees in training and off line what a person would see of it: the first
frame, upright, in RGB of 8 bits, on white ground where it is transparent. Image processors take the colour of
transparent pixels as it is, which is black in most drawings, and cut 16 bits off at 255 (ours).

A policy that reads pictures must not write the token that stands for one, so sampling suppresses it (TRL, transformers'
`suppress_tokens`; `logit_bias` for vLLM). TRL's loss goes on to take its softmax over the whole vocabulary. Then the
policy that is trained is not the one that was sampled, and there is a sink: what a negative advantage takes from the
tokens of a rollout goes to the others in proportion to their probability, and the one token that no rollout can hold
is never pushed back. With a net push downwards it ends with all the mass (docs/log.md, 2026-11-27): the entropy is 0,
and what is sampled looks random. So the loss, and all that is scored off line, leave out what sampling never draws: the
token of a picture, and what the settings of a run or the policy's own `generation_config.json` forbid altogether
(`never_drawn`). Ours; upstream does not do it.
"""

import io
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, ProcessorMixin

if TYPE_CHECKING:
    from .trainer import NPOTrainer

NEVER = -100.0
"""Added to the logit of a token that is never to be sampled."""

NO_CHANCE = -1e4
"""Added to the logit: a probability of 0 in any float, and finite, so that p log p is 0. 16-bit floats hold it."""


KINDS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF", "TGA", "ICO")
"""Kinds of files that are read as pictures, by Pillow's names. It knows others, some of which run another program (EPS
is given to Ghostscript)."""

ENDS = {"PNG": b"IEND", "JPEG": b"\xff\xd9", "GIF": b";"}
"""What the last bytes of a picture's file hold if it was not cut off."""

TAIL = 32
"""Bytes at the end of a file that are looked at."""

ORIENTATION = 0x0112
"""EXIF entry that says how a picture is turned; 1 is upright."""

SIXTEEN_BITS = 2**16 - 1


class NoWhite(ValueError):
    """A picture of numbers that no one has agreed a white for."""


def as_seen(picture: Any) -> Any:
    """A picture as a viewer shows it; an upright one in RGB, and what is no PIL picture, are given back as they are.

    Raises:
        NoWhite: Numbers of floating point, or above 16 bits.
    """
    if not isinstance(picture, Image.Image):
        return picture
    if picture.getexif().get(ORIENTATION, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F":
        raise NoWhite("picture of floating-point numbers, which have no agreed white: save it with 8 or 16 bits")
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > SIXTEEN_BITS:
            raise NoWhite(
                f"picture of numbers from {values.min()} to {values.max()}, which have no agreed white: save it with 8 "
                "or 16 bits"
            )
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if not picture.has_transparency_data:
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite((picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA"))
    return ground.convert("RGB")


def inspect_picture(stream: BinaryIO) -> tuple[int, int]:
    """Width and height of an encoded picture that can be read: from its header, and its last bytes for one cut off.

    It is decoded only where those do not tell.

    Raises:
        ValueError: It cannot be read, or cannot be shown; the message says why, as a clause.
    """
    try:
        with Image.open(stream) as opened:
            if opened.format not in KINDS:
                raise ValueError(f"it is of kind {opened.format}; {', '.join(KINDS)} are read")
            stream.seek(0, io.SEEK_END)
            stream.seek(max(0, stream.tell() - TAIL))
            end = ENDS.get(opened.format)
            if end is None or end not in stream.read() or opened.mode == "F" or opened.mode.startswith("I"):
                as_seen(opened)
                opened.load()
            return opened.size
    except NoWhite:
        raise
    except UnidentifiedImageError as error:  # its own words name an object in memory
        raise ValueError("picture cannot be decoded: cannot identify of what kind it is") from error
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"picture cannot be decoded: {str(error)[:200]}") from error


def tokens_of_size(processor: Any, width: int, height: int) -> int | None:
    """Tokens of a picture by the processor's own count; None where a processor has none.

    Raises:
        ValueError: The processor takes no picture of this shape; the message says why, as a clause.
    """
    images = processor.image_processor
    if not hasattr(images, "get_number_of_image_patches") or not hasattr(images, "merge_size"):
        return None
    try:
        # older releases of transformers look into the third argument, whether it is given or not
        return images.get_number_of_image_patches(height, width, {}) // images.merge_size**2
    except ValueError as error:
        raise ValueError(f"picture of a shape that has no tokens: {width} × {height}, {error}") from error


def pictures_of(row: Mapping[str, Any]) -> list[Any]:
    """Pictures of a row as they are seen: its `images`, or its `image` alone, or none."""
    given = row.get("images") or ([] if row.get("image") is None else [row["image"]])
    return [as_seen(picture) for picture in given]


def prompt_as_seen(prompt: Any) -> Any:
    """A prompt whose messages may hold pictures themselves, among the parts of their content, as they are seen."""
    if isinstance(prompt, str) or not any(isinstance(message.get("content"), list) for message in prompt):
        return prompt
    return [
        {**message, "content": [_part_as_seen(part) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in prompt
    ]


def _part_as_seen(part: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**part, "image": as_seen(part["image"])} if isinstance(part.get("image"), Image.Image) else part


def rows_as_seen(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows for TRL, whose pictures are as they are seen; a row has no prompt where an environment gives it."""
    shown = []
    for row in rows:
        seen = {"prompt": prompt_as_seen(row["prompt"])} if "prompt" in row else {}
        if row.get("images"):
            seen["images"] = pictures_of(row)
        elif row.get("image") is not None:
            seen["image"] = as_seen(row["image"])
        shown.append({**row, **seen})
    return shown


def picture_tokens(processor: Any) -> list[int]:
    """Token ids that stand for pictures and videos in a prompt."""
    names = ("image_token_id", "video_token_id")
    return [getattr(processor, name) for name in names if getattr(processor, name, None) is not None]


def keep_pictures_out(trainer: Any) -> None:
    """Let a trainer's own generation sample no image token, as TRL does by itself from 1.16 on.

    A response with one would have to bring a picture along, and the next forward pass would fail. TRL forgets it where
    a user suppresses tokens of their own.
    """
    if not trainer.use_vllm and isinstance(trainer.processing_class, ProcessorMixin):
        given = trainer.generation_kwargs.get("suppress_tokens")
        kept = with_suppressed(given, suppressed(trainer.model, trainer.processing_class))
        trainer.generation_kwargs["suppress_tokens"] = trainer.generation_config.suppress_tokens = kept


def never_sampled(processor: Any) -> dict[str, Any]:
    """Generation settings for vLLM under which no picture token is sampled."""
    return {"logit_bias": dict.fromkeys(picture_tokens(processor), NEVER)}


def collapse_pictures(prompt_ids: Sequence[Sequence[int]], processor: Any) -> list[list[int]]:
    """Prompts with every run of an image token as one, the form that vLLM expands for each picture.

    Two pictures in a row stay two: their runs are apart by their start and end tokens.
    """
    pictures = set(picture_tokens(processor))
    collapsed = []
    for ids in prompt_ids:
        runs = ((token, sum(1 for _ in run)) for token, run in groupby(ids))
        collapsed.append([kept for token, count in runs for kept in [token] * (1 if token in pictures else count)])
    return collapsed


def picture_limits(min_pixels: int, max_pixels: int) -> dict[str, Any]:
    """Settings that give vLLM, which reads its own processor from the policy's folder, the same picture sizes.

    Args:
        min_pixels: Smallest picture in pixels; 0 as the processor has it.
        max_pixels: Largest picture in pixels; 0 as the processor has it.
    """
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    given = {name: value for name, value in limits.items() if value}
    return {"mm_processor_kwargs": given} if given else {}


def suppressed(model: PreTrainedModel | PeftModel, processor: Any) -> list[int]:
    """Tokens that a policy's own sampling never draws: that of a picture, if it reads pictures.

    In a response it stands for no picture, and the next forward pass would fail. TRL from 1.16 on suppresses the same.
    """
    config = cast(PretrainedConfig, model.config)
    return [config.image_token_id] if isinstance(processor, ProcessorMixin) else []


def with_suppressed(given: Sequence[int] | None, never: Sequence[int]) -> list[int]:
    """`suppress_tokens` of a user, if there are any, together with those of the policy, each once."""
    return list(dict.fromkeys([*(given or []), *never]))


def forbidden_to_vllm(generation_kwargs: Mapping[str, Any] | None) -> list[int]:
    """Tokens that vLLM never draws, by the settings that it is given beside TRL's."""
    biases = (generation_kwargs or {}).get("logit_bias") or {}
    return [int(token) for token, bias in biases.items() if bias <= NEVER]


def never_drawn(settings: GenerationConfig, policy: PreTrainedModel | PeftModel) -> list[int]:
    """Tokens that transformers' `generate` gives no chance at any place of a response, in rising order.

    They are those of `suppress_tokens`, of `bad_words_ids` that are one token, and of one token in `sequence_bias` with
    at most `NEVER`. What has no chance at some places only, as after `begin_suppress_tokens`, is drawn at others, and
    counts.

    Args:
        settings: What `generate` is given.
        policy: Its own generation settings count where `settings` leaves one unset, as in `generate`.
    """
    own = cast(GenerationConfig, policy.generation_config)

    def set_to(name: str) -> Any:
        given = getattr(settings, name)
        return getattr(own, name) if given is None else given

    ends = set_to("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    found = set(set_to("suppress_tokens") or [])
    found |= {ids[0] for ids in set_to("bad_words_ids") or [] if len(ids) == 1 and ids[0] not in ends}  # as `generate`
    biases = set_to("sequence_bias") or {}
    pairs = biases.items() if isinstance(biases, Mapping) else biases
    return sorted(found | {ids[0] for ids, bias in pairs if len(ids) == 1 and bias <= NEVER})


def left_out_of_loss(trainer: "NPOTrainer") -> list[int]:
    """Tokens that a trainer's loss leaves out: what its sampling never draws, or none (`mask_unsampled`).

    What is scored off line for the trainer leaves out the same (`inputs.Sampling.of`).
    """
    if not trainer.args.mask_unsampled:
        return []
    if trainer.use_vllm:
        return forbidden_to_vllm(cast(Mapping[str, Any] | None, trainer.args.generation_kwargs))  # a text is read
    return never_drawn(trainer.generation_config, trainer.model)


@contextmanager
def left_out(model: PreTrainedModel | PeftModel, tokens: Sequence[int]) -> Iterator[None]:
    """While it lasts, the head of the policy gives `tokens` a probability of 0, and to their logits no gradient.

    Where logits are capped behind the head, the probability is e^-cap of that of a logit of 0 (e^-30 for Gemma).

    The head has a bias for the time, which TRL's fused head, that reads the weights, and a plain forward pass both see;
    nothing is saved with the policy. Without tokens nothing is done.

    Args:
        model: Policy, out of the wrappers of accelerate.
        tokens: Token ids that are never sampled.
    """
    if not tokens:
        yield
        return
    inner = cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model
    head = _computing(cast(torch.nn.Module, inner.get_output_embeddings()))
    wrapped = isinstance(head, AuxiliaryTrainingWrapper)
    layer = cast(torch.nn.Linear, head.original_module if wrapped else head)
    bias = torch.zeros(layer.out_features, dtype=layer.weight.dtype, device=layer.weight.device)
    bias[list(tokens)] = NO_CHANCE
    # before the module's parameters in the look-up of attributes, and none of them
    own = None if wrapped else cast(torch.Tensor | None, layer.bias)
    head.__dict__["bias"] = bias if own is None else own + bias
    hook = head.register_forward_hook(lambda *passed: cast(torch.Tensor, passed[-1]) + bias) if wrapped else None
    try:
        yield
    finally:
        del head.__dict__["bias"]
        if hook is not None:
            hook.remove()


def _computing(head: torch.nn.Module) -> torch.nn.Module:
    """The layer of a head whose bias counts, within what PEFT put around it: its trained copy, or an adapter's base.

    A head that is tied to embeddings of which PEFT trains some rows (`trainable_token_indices`) is given with its
    wrapper, whose product of matrices reads no bias.
    """
    while isinstance(head, BaseTunerLayer | AuxiliaryTrainingWrapper):
        if isinstance(head, BaseTunerLayer):
            head = head.get_base_layer()
        elif head.disable_adapters or not head.active_adapters:
            head = head.original_module
        elif isinstance(head, ModulesToSaveWrapper):
            head = head.modules_to_save[head.active_adapters[0]]
        else:
            return head
    return head
