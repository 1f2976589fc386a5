"""Fingerprints: token ids mean the same text, and pictures give a policy the same tokens, where these are equal."""

import hashlib
import json

PICTURE_SETTINGS = (
    "size", "patch_size", "merge_size", "temporal_patch_size", "do_convert_rgb", "do_resize", "resample", "do_rescale",
    "rescale_factor", "do_normalize", "image_mean", "image_std",
)  # fmt: skip
"""Settings of an image processor that decide what a policy sees of a picture."""


def tokenizer_of(processor):
    """The tokenizer inside a processor, or the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def tokenizer_digest(processor) -> str:
    """Fingerprint of a tokenizer: token ids mean the same text where it is equal."""
    tokenizer = tokenizer_of(processor)
    # TRL pads with the end of sequence where a tokenizer has no padding: that makes it no other tokenizer
    padding = None if tokenizer.pad_token == tokenizer.eos_token else tokenizer.pad_token
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token, padding]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def image_digest(processor) -> str:
    """Fingerprint of all settings that decide what a policy sees of a picture; empty for a tokenizer, which sees none.

    Pictures give the same tokens where it is equal: size limits, patch and merge size, rescaling, mean and std.
    """
    if tokenizer_of(processor) is processor:
        return ""
    settings = processor.image_processor.to_dict()
    known = {name: settings.get(name) for name in PICTURE_SETTINGS}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
