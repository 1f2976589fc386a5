"""What checkpoints tell of how their run computed, whoever trained them: types of its weights and matrix products.

transformers' Trainer writes its arguments beside every checkpoint, as a pickle (`training_args.bin`). A pickle can
execute anything when it is loaded, so this one is not: its instructions are listed (`pickletools`), and of what they
would put together only the precision is read.
"""

import json
import pickletools
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..world.computing import DTYPES, PRODUCTS

ARGUMENTS = "training_args.bin"
"""File of a checkpoint with the arguments of its Trainer."""

LARGEST = 1 << 20
"""Bytes of a pickle that is looked through; one of arguments has some thousands."""

ALLOWED = {"mixed_precision": ("no", "fp16", "bf16", "fp8"), "fp16": (True, False), "bf16": (True, False)}
"""Arguments that are read, and their values; the first is what became of the others and of how it was launched."""

MEMORISED, RECALLED = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), ("GET", "BINGET", "LONG_BINGET")
TEXTS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
"""Instructions of a pickle."""


def trained_dtype(checkpoints: Iterable[Path]) -> str:
    """Type of a run's weights, as its checkpoints' configurations have it; "float32" where they name none of `DTYPES`.

    Raises:
        ValueError: They have weights of different types.
    """
    found = {path: _dtype(path) for path in checkpoints}
    return _same(found, "weights of different types", "dtype", DTYPES) if found else DTYPES[0]


def trained_products(checkpoints: Iterable[Path]) -> str | None:
    """Precision of a run's matrix products, one of `PRODUCTS`; None where no checkpoint has `training_args.bin`.

    Raises:
        ValueError: They differ, or such a file cannot be read or says nothing of it.
    """
    found = {path: _products(path / ARGUMENTS) for path in checkpoints if (path / ARGUMENTS).is_file()}
    return _same(found, "matrix products of different precision", "mixed_precision", PRODUCTS) if found else None


def _same(found: dict[Path, str], what: str, setting: str, allowed: tuple[str, ...]) -> str:
    if len(set(found.values())) > 1:
        some = ", ".join(f"{path.name}: {value}" for path, value in found.items())
        raise ValueError(f"The checkpoints have {what} ({some}); set {setting} to one of {_or(allowed)}.")
    return next(iter(found.values()))


def _or(allowed: tuple[str, ...]) -> str:
    return " or ".join(map(repr, allowed))


def _dtype(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # transformers 4 had another name; some policies with a vision tower name it for their parts alone
    named = (part.get(name) for part in (config, config.get("text_config", {})) for name in ("dtype", "torch_dtype"))
    return next((dtype for dtype in named if dtype in DTYPES), DTYPES[0])


def _products(path: Path) -> str:
    told = dict(_told(path))
    precision = told.get("mixed_precision") or ("fp16" if told.get("fp16") else "bf16" if told.get("bf16") else "no")
    if not told or precision not in PRODUCTS:
        raise ValueError(
            f"{path} says nothing of the precision of its run that is known here ({precision if told else 'nothing'}); "
            f"set mixed_precision to one of {_or(PRODUCTS)}."
        )
    return precision


def _told(path: Path) -> Iterator[tuple[str, Any]]:
    """Arguments of `ALLOWED` and their values, in the order of the pickle."""
    try:
        with zipfile.ZipFile(path) as archive:
            (entry,) = (entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
            if entry.file_size > LARGEST:
                raise ValueError(f"{entry.file_size} bytes of arguments")
            instructions = list(pickletools.genops(archive.read(entry)))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read ({error}); set mixed_precision to one of {_or(PRODUCTS)}.") from error
    memory: dict[int, Any] = {}
    before = value = None
    for instruction, argument, _ in instructions:
        if instruction.name in MEMORISED:
            memory[len(memory) if argument is None else int(argument)] = value
            continue
        before, value = value, _value(instruction.name, argument, memory)
        if isinstance(before, str) and value in ALLOWED.get(before, ()):
            yield before, value


def _value(name: str, argument: Any, memory: dict[int, Any]) -> Any:
    """What an instruction puts on the stack: a text, True or False; None for all else."""
    if name in RECALLED:
        return memory.get(int(argument))
    return argument if name in TEXTS else {"NEWTRUE": True, "NEWFALSE": False}.get(name)
