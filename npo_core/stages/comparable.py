"""Policies that a measurement compares: found by step, of one architecture and tokenizer, told apart by weights."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoConfig

from ..guidance.fingerprints import tokenizer_digest
from ..runs.checkpoints import checkpoint_folders
from ..trainer.pictures import as_seen, pictures_of
from ..world.policies import load_processor

VOLATILE = {
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}
"""Entries of a model configuration that do not change the architecture; TRL writes the tokenizer's ids into them."""


def find_checkpoints(folder: str | Path, base: str | Path | None = None) -> dict[int, Path]:
    """Policies of a folder by step: `checkpoint-<step>` folders as TRL writes them, and the base policy as step 0.

    Raises:
        FileNotFoundError: The folder does not exist, or holds no checkpoint with weights.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    found = {} if base is None else {0: Path(base)}
    for step, path in checkpoint_folders(folder).items():
        if (path / "config.json").is_file() and any(path.glob("model*.safetensors")):
            found[step] = path
    adapters = [path for path in checkpoint_folders(folder).values() if (path / "adapter_config.json").is_file()]
    if not set(found) - {0} and adapters:
        raise FileNotFoundError(
            f"{folder} holds checkpoints of adapters (LoRA) only, such as {adapters[0].name}; whole policies are "
            f"compared. Merge each with its base policy, python -m npo_core merge --checkpoint {adapters[0]} --out "
            f"merged/{adapters[0].name}, and give the folder merged."
        )
    if not set(found) - {0}:
        raise FileNotFoundError(
            f"{folder} holds no checkpoint: folders named checkpoint-<step> with config.json and model*.safetensors "
            "are looked for."
        )
    return dict(sorted(found.items()))


def check_policies(policies: Mapping[str, Path], processor: Any) -> None:
    """Refuse policies that cannot be compared.

    Raises:
        ValueError: Architectures or tokenizers differ.
    """
    digest = tokenizer_digest(processor)
    first: tuple[str, dict] | None = None
    for name, folder in policies.items():
        config = _architecture(AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict())
        if first is None:
            first = name, config
        different = sorted(k for k in {*config, *first[1]} if config.get(k) != first[1].get(k))
        if different:
            raise ValueError(
                f"The policies {first[0]} and {name} ({folder}) differ in architecture: {different}. "
                "Checkpoints of one run and one architecture can be compared."
            )
        if (Path(folder) / "tokenizer.json").is_file() and tokenizer_digest(load_processor(folder)) != digest:
            raise ValueError(
                f"The policy {name} ({folder}) has another tokenizer; its token ids mean other text. "
                "Policies of one tokenizer can be compared."
            )


def fingerprint(folder: str | Path) -> str:
    """What tells the weights of two policy folders apart: sizes, first and last 64 KiB of each weight file."""
    found = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        size = path.stat().st_size
        found.update(f"{path.name} {size}".encode())
        with path.open("rb") as stream:
            for start in (0, max(0, size - 2**16)):
                stream.seek(start)
                found.update(stream.read(2**16))
    return found.hexdigest()[:16]


def content_digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """Fingerprint of what is asked: prompts, answers and pictures of the rows, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        asked = [row.get("prompt"), row.get("answer"), pictures_of(row)]
        digest.update(json.dumps(asked, default=_told, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _told(value: Any) -> str:
    """A picture by its size and pixels; anything else that JSON does not know by its text."""
    if not isinstance(value, Image.Image):
        return str(value)
    seen = as_seen(value)
    return f"{seen.mode} {seen.size} {hashlib.sha256(seen.tobytes()).hexdigest()}"


def _architecture(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Entries of a model configuration that decide its architecture, flat."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _architecture(value, f"{prefix}{name}.")
        elif name not in VOLATILE:
            flat[f"{prefix}{name}"] = value
    return flat
