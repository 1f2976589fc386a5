"""Work that the rollouts of a prompt share: computed once per distinct prompt, then copied.

GRPO hands every prompt to the model n times, once per rollout: the processor, the vision tower and the language model
all see the same picture and the same words n times. Attention is causal, so what is computed for a common beginning is
the same in every row. Here it is computed once and copied, with the same gradient up to the order of a sum. No result
depends on it except in the last bits; `share_work(model)` patches one model object, and transformers stays as it is.
"""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    BaseModelOutputWithDeepstackFeatures,
    Qwen3VLTextModel,
    Qwen3VLVisionModel,
)

from .conditions import nothing_before, nothing_recorded
from .prompts import copied_rows

WORTHWHILE = 0.8
"""Rows are shared when that leaves at most this share of the tokens to compute."""

REMEMBERED_BYTES = 1 << 28
"""Bytes of pictures with their features that are kept before a memory starts afresh."""

ROOM = 16
"""Tokens that a cache layer makes room for at a time while sampling."""

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What a language model is given and returns of earlier tokens, which transformers 5.24 calls by another name."""

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of the size of a pixel value, in bytes."""


def share_work(model: PreTrainedModel) -> None:
    """Make a Qwen3-VL compute the picture and the words of a prompt once, instead of once per rollout.

    Pictures: the vision tower sees each on its own (attention never crosses pictures), so it runs once per distinct one
    and the features are copied. A tower whose parameters are all frozen remembers them from call to call. Words: where
    rows begin alike, the language model computes that beginning once. Other architectures are left alone, and so is
    a model that uses gradient checkpointing. Calling it twice changes nothing.
    """
    base = getattr(model, "model", None)
    visual, language = getattr(base, "visual", None), getattr(base, "language_model", None)
    if isinstance(visual, Qwen3VLVisionModel):
        visual.forward = MethodOf(visual, _shared_vision_forward)
        base.get_rope_index = MethodOf(base, _shared_rope_index)
    if isinstance(language, Qwen3VLTextModel):
        language.forward = MethodOf(language, _shared_prefix_forward)


class MethodOf:
    """A method that an object carries without being kept alive by it, as it would be by a bound one.

    A policy is then freed where it is dropped, and not when Python next looks for cycles: a choice of the distance
    loads one after the other, each as large as the GPU has room for.
    """

    def __init__(self, owner: Any, function: Callable):
        self.owner, self.function = weakref.ref(owner), function

    def __call__(self, *args, **kwargs):
        return self.function(self.owner(), *args, **kwargs)

    def __deepcopy__(self, memo: dict) -> "MethodOf":
        return MethodOf(copy.deepcopy(self.owner(), memo), self.function)


# Words


def _shared_prefix_forward(
    self,
    input_ids=None,
    attention_mask=None,
    position_ids=None,
    past_key_values=None,
    inputs_embeds=None,
    use_cache=None,
    visual_pos_masks=None,
    deepstack_visual_embeds=None,
    **kwargs,
):
    past_key_values = kwargs.pop(CACHE, past_key_values)

    def plain(**changes):
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            CACHE: past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            "visual_pos_masks": visual_pos_masks,
            "deepstack_visual_embeds": deepstack_visual_embeds,
            **kwargs,
        }
        return type(self).forward(self, **(arguments | changes))

    understood = (
        nothing_before(past_key_values)
        and inputs_embeds is not None
        and len(inputs_embeds) > 1
        and position_ids is not None
        and position_ids.dim() == 3
        and position_ids.shape[1] == len(inputs_embeds)
        and attention_mask is not None
        and attention_mask.dim() == 2
        and nothing_recorded(self, kwargs)
        and kwargs.get("return_dict", self.config.return_dict) is not False
    )
    if not understood:
        return plain()
    seen = _visible(inputs_embeds, attention_mask, position_ids, visual_pos_masks, deepstack_visual_embeds)
    width, first, inverse = cheapest_sharing(seen)
    rows, columns = seen.shape
    if len(first) * width + rows * (columns - width) > WORTHWHILE * rows * columns:
        return plain()
    if visual_pos_masks is not None and visual_pos_masks[:, width:].any():
        return plain()
    shared = {
        "inputs_embeds": inputs_embeds[first, :width],
        "attention_mask": attention_mask[first, :width],
        "position_ids": position_ids[:, first, :width],
    }
    if visual_pos_masks is not None:
        owner = visual_pos_masks.nonzero()[:, 0]
        kept = torch.isin(owner, first)
        shared["visual_pos_masks"] = visual_pos_masks[first, :width]
        shared["deepstack_visual_embeds"] = [layer[kept] for layer in deepstack_visual_embeds]
    if not _repeats(seen, first, inverse, width, inputs_embeds, visual_pos_masks, deepstack_visual_embeds):
        return plain()
    rest = {
        "inputs_embeds": inputs_embeds[:, width:],
        "position_ids": position_ids[:, :, width:],
        "visual_pos_masks": None,
        "deepstack_visual_embeds": None,
    }
    cache = DynamicCache(config=self.config) if past_key_values is None else past_key_values
    hidden = computed_once(plain, shared, rest if width < columns else None, inverse, cache)
    returned = None if past_key_values is None and use_cache is False else cache
    return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE: returned})


def computed_once(
    plain: Callable[..., Any], shared: dict[str, Any], rest: dict[str, Any] | None, inverse: Tensor, cache: DynamicCache
) -> Tensor:
    """Last hidden states of all rows, of which each distinct beginning is computed once; `cache` holds them afterwards.

    `shared` and `rest` are what the forward pass of transformers (`plain`) gets of the beginnings, and of the rows
    behind them, None where nothing is left; `inverse` has for each row the place of its beginning.
    """
    prefix = plain(use_cache=True, **shared, **{CACHE: cache})
    copy_rows(cache, inverse, room=None if torch.is_grad_enabled() else ROOM)
    hidden = prefix.last_hidden_state.index_select(0, inverse)
    if rest is None:
        return hidden
    return torch.cat([hidden, plain(use_cache=True, **rest, **{CACHE: cache}).last_hidden_state], dim=1)


def copy_rows(cache: DynamicCache, rows: Tensor, room: int | None) -> None:
    """Give every row its copy of the cached beginning; with `room`, in layers that grow in place."""
    if room is None:
        cache.batch_select_indices(rows)
        return
    for index, layer in enumerate(cache.layers):
        cache.layers[index] = RoomyLayer(layer.keys.index_select(0, rows), layer.values.index_select(0, rows), room)


class RoomyLayer(DynamicLayer):
    """Cache layer with room for more tokens, so that a sampled token is written in place instead of copying them all.

    Args:
        keys: `[rows, heads, tokens, size]`.
        values: The same for the values.
        room: Tokens that are made room for at a time.
    """

    def __init__(self, keys: Tensor, values: Tensor, room: int):
        super().__init__()
        self.room = room
        self.lazy_initialization(keys, values)
        self._key_buffer = self._value_buffer = None
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        start, stop = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        buffer = self._key_buffer
        moved = buffer is None or self.keys.data_ptr() != buffer.data_ptr() or len(self.keys) != len(buffer)
        if moved or stop > buffer.shape[-2]:
            self._key_buffer, self._value_buffer = (self._grown(part, stop) for part in (self.keys, self.values))
        self._key_buffer[:, :, start:stop] = key_states
        self._value_buffer[:, :, start:stop] = value_states
        self.keys, self.values = self._key_buffer[:, :, :stop], self._value_buffer[:, :, :stop]
        return self.keys, self.values

    def _grown(self, part: Tensor, tokens: int) -> Tensor:
        rows, heads, old, size = part.shape
        buffer = part.new_empty(rows, heads, tokens + self.room, size)
        buffer[:, :, :old] = part
        return buffer


@torch.no_grad()
def _visible(inputs_embeds, attention_mask, position_ids, visual_pos_masks, deepstack_visual_embeds) -> Tensor:
    """Number of what the language model sees in a place, (rows, columns): equal where all inputs are equal.

    Two different inputs get the same number only by a collision of 64-bit sums, which `_repeats` finds out.
    """
    rows, columns, size = inputs_embeds.shape
    weights = torch.arange(1, size + 1, device=inputs_embeds.device, dtype=torch.float64).cos()
    # not a matrix product: BLAS may add up equal places in different orders, by where they stand
    key = (inputs_embeds.double() * weights).sum(dim=-1)
    if visual_pos_masks is not None:
        for number, layer in enumerate(deepstack_visual_embeds, start=2):
            key[visual_pos_masks] += number * (layer.double() * weights).sum(dim=-1)
    parts = [key, attention_mask.double(), *position_ids.double()]
    number = torch.zeros(rows * columns, dtype=torch.int64, device=inputs_embeds.device)
    for part in parts:
        _, place = part.reshape(-1).unique(return_inverse=True)
        _, number = (number * (int(place.max()) + 1) + place).unique(return_inverse=True)
    return number.view(rows, columns)


def cheapest_sharing(seen: Tensor) -> tuple[int, Tensor, Tensor]:
    """Width of the common beginnings that leaves the fewest tokens to compute.

    Args:
        seen: What stands in each place, integers (rows, columns); equal numbers are equal inputs.

    Returns:
        The width; the first row of each distinct beginning of that width, ascending; and for each row the place of its
        beginning in that list. Width 0 where nothing is shared.
    """
    rows, columns = seen.shape
    order = torch.zeros(rows, dtype=torch.int64, device=seen.device)
    best, best_order = rows * columns, order
    width, symbols = 0, int(seen.max()) + 1
    for column in range(columns):
        _, order = (order * symbols + seen[:, column]).unique(return_inverse=True)
        distinct = int(order.max()) + 1
        tokens = distinct * (column + 1) + rows * (columns - column - 1)
        if tokens < best:
            best, best_order, width = tokens, order, column + 1
        if distinct == rows:
            break
    first = torch.full((int(best_order.max()) + 1,), rows, device=seen.device)
    first.scatter_reduce_(0, best_order, torch.arange(rows, device=seen.device), "amin")
    ascending = first.argsort()
    return width, first[ascending], ascending.argsort()[best_order]


@torch.no_grad()
def _repeats(seen, first, inverse, width, inputs_embeds, visual_pos_masks, deepstack_visual_embeds) -> bool:
    """Whether the beginnings that are taken for copies are copies, to the bit."""
    copied = first[inverse]
    inputs = inputs_embeds[:, :width]
    if not torch.equal(inputs, inputs[copied]):
        return False
    if visual_pos_masks is None:
        return True
    mask = visual_pos_masks[:, :width]
    if not torch.equal(mask, mask[copied]):
        return False
    for layer in deepstack_visual_embeds:
        dense = torch.zeros_like(inputs)
        dense[mask] = layer.to(dense.dtype)
        if not torch.equal(dense, dense[copied]):
            return False
    return True


def _shared_rope_index(
    self, input_ids, mm_token_type_ids, image_grid_thw=None, video_grid_thw=None, attention_mask=None, **kwargs
):
    """Positions depend on the layout of a row, not on its words: rows of one layout are computed once."""
    one_picture_each = image_grid_thw is not None and len(image_grid_thw) == len(input_ids) and video_grid_thw is None
    if not one_picture_each or not (mm_token_type_ids == 1).any(dim=1).all():
        return type(self).get_rope_index(
            self, input_ids, mm_token_type_ids, image_grid_thw, video_grid_thw, attention_mask, **kwargs
        )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    layouts = torch.cat([mm_token_type_ids.long(), mask.long(), image_grid_thw.to(input_ids.device)], dim=1)
    distinct, inverse = layouts.unique(dim=0, return_inverse=True)
    first = torch.full((len(distinct),), len(layouts), device=inverse.device)
    first.scatter_reduce_(0, inverse, torch.arange(len(layouts), device=inverse.device), "amin")
    positions, deltas = type(self).get_rope_index(
        self, input_ids[first], mm_token_type_ids[first], image_grid_thw[first], None, mask[first], **kwargs
    )
    return positions[:, inverse], deltas[inverse]


# Pictures


def _shared_vision_forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs):
    counts = grid_thw.prod(dim=-1)
    first, inverse = _distinct_pictures(hidden_states, grid_thw, counts)
    pieces = hidden_states.split(counts.tolist())
    shown = hidden_states if len(first) == len(grid_thw) else torch.cat([pieces[place] for place in first])
    memory = _memory(self, shown)
    keys = [] if memory is None else [(_bytes(pieces[place]), *grid_thw[place].tolist()) for place in first]
    merge = self.spatial_merge_size**2
    if memory is not None and all(key in memory for key in keys):
        output = _recalled([memory[key] for key in keys])
    else:
        output = type(self).forward(self, shown, grid_thw[first], **kwargs)
        if memory is not None:
            _remember(memory, keys, output, counts[first].tolist(), merge)
    if len(first) == len(grid_thw):
        return output
    patch_rows = copied_rows(counts[first], inverse, 1).to(hidden_states.device)
    token_rows = copied_rows(counts[first], inverse, merge).to(hidden_states.device)
    output.last_hidden_state = output.last_hidden_state.index_select(0, patch_rows)
    output.pooler_output = output.pooler_output.index_select(0, token_rows)
    output.deepstack_features = [feature.index_select(0, token_rows) for feature in output.deepstack_features]
    return output


def _distinct_pictures(pixels: Tensor, grid_thw: Tensor, counts: Tensor) -> tuple[list[int], list[int]]:
    """Indices of the first copy of each distinct picture, and for each picture its place in that list."""
    places = counts.to(pixels.device)
    owner = torch.arange(len(counts), device=pixels.device).repeat_interleave(places)
    within = torch.arange(1, len(pixels) + 1, device=pixels.device) - (places.cumsum(0) - places)[owner]
    # sums of the bit patterns are exact in any order; two pictures of one sum are told apart below
    bits = pixels.detach().contiguous().view(BITS[pixels.element_size()]).sum(dim=-1, dtype=torch.int64)
    sums = torch.zeros(len(counts), dtype=torch.int64, device=pixels.device).index_add_(0, owner, bits * within)
    seen: dict[tuple, int] = {}
    keys = [(total, *grid) for total, grid in zip(sums.tolist(), grid_thw.tolist(), strict=True)]
    inverse = [seen.setdefault(key, len(seen)) for key in keys]
    first = [inverse.index(number) for number in range(len(seen))]
    if len(first) < len(counts):
        copies = copied_rows(counts, [first[number] for number in inverse], 1).to(pixels.device)
        if not torch.equal(pixels, pixels.index_select(0, copies)):
            return list(range(len(counts))), list(range(len(counts)))
    return first, inverse


def _memory(visual, shown: Tensor) -> dict | None:
    """Features of pictures by their patches, emptied when a parameter was written to.

    None for a tower that trains, for pictures that a gradient is asked for, and for pictures too large to be worth
    remembering. Writing through `parameter.data` goes unnoticed; optimisers and loading do not write that way.
    """
    parameters = list(visual.parameters())
    trains = shown.requires_grad or any(parameter.requires_grad for parameter in parameters)
    if trains or shown.nbytes > REMEMBERED_BYTES // 8:
        return None
    kind = shown.device.type
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    state = [precision, *((parameter.data_ptr(), parameter._version) for parameter in parameters)]
    if visual.__dict__.get("_remembered_state") != state:
        visual.__dict__["_remembered_state"], visual.__dict__["_remembered"] = state, {}
    return visual.__dict__["_remembered"]


def _remember(memory: dict, keys: list, output, counts: list[int], merge: int) -> None:
    merged = [count // merge for count in counts]
    layers = zip(*(_pieces(layer, merged) for layer in output.deepstack_features), strict=True)
    states, pooled = _pieces(output.last_hidden_state, counts), _pieces(output.pooler_output, merged)
    parts = list(zip(states, pooled, layers, strict=True))
    size = sum(len(key[0]) for key in keys) + sum(_size(part) for part in parts)
    held = sum(len(key[0]) for key in memory) + sum(_size(part) for part in memory.values())
    if held + size > REMEMBERED_BYTES:
        memory.clear()
    memory.update(zip(keys, parts, strict=True))


def _pieces(features: Tensor, lengths: list[int]) -> list[Tensor]:
    """Copies, not views: a view would keep the whole batch alive."""
    return [piece.clone() for piece in features.detach().split(lengths)]


def _size(part: tuple) -> int:
    state, pooled, layers = part
    return state.nbytes + pooled.nbytes + sum(layer.nbytes for layer in layers)


def _recalled(parts: list) -> BaseModelOutputWithDeepstackFeatures:
    return BaseModelOutputWithDeepstackFeatures(
        last_hidden_state=torch.cat([part[0] for part in parts]),
        pooler_output=torch.cat([part[1] for part in parts]),
        deepstack_features=[torch.cat(layer) for layer in zip(*(part[2] for part in parts), strict=True)],
    )


def _bytes(patches: Tensor) -> bytes:
    return patches.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
