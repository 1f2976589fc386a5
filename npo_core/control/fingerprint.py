"""What a run notes of its trainer factory, so that another factory does not go on with the run.

`RunConfig` names the run folder, but a factory of one's own has settings that `RunConfig` does not know. They are
written to `factory.json` when the run begins and compared whenever it goes on. All of this is ours.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
from datasets import Dataset
from peft import PeftModel

from ..files import write_json
from ..guidance.fingerprints import tokenizer_digest
from ..processes import agree, process_count
from ..runs.folder import RunFolder
from ..trainer.trainer import NPOTrainer

FILE = "factory.json"

FREE = re.compile(
    "output_dir|run_name|project|report_to|use_cpu|disable_tqdm|local_rank|debug|num_train_epochs|tf32|"
    "skip_memory_metrics|push_to_hub|resume_from_checkpoint|num_completions_to_print|per_device_.+|"
    "gradient_accumulation_steps|steps_per_generation|num_generations_eval|(gradient_checkpointing|torch|ddp|do|eval|"
    "log|logging|hub|trackio|save|include|restore).*|dataloader_(?!drop_last).+|vllm_(server|group|gpu|enable).+"
)
"""Arguments that may differ between two sittings: where and how a run computes and reports, not what."""

MEANING = {
    "data": "data (hash of order, prompts and answers)",
    "policy": "policy (last part of its name)",
    "tokenizer": "tokenizer (hash)",
}
"""What is said in a message of names that are no arguments."""

SHOWN = 60
"""Characters of a value in a message."""


def require_same_factory(run: RunFolder, trainer: NPOTrainer) -> None:
    """Note a trainer's settings in a run folder that has none yet; refuse a trainer with others than those.

    A run of a version that noted nothing goes on with the factory that it now gets. A setting that only one of two
    versions knows is not compared.

    Args:
        run: Run folder.
        trainer: A fresh trainer of the factory.

    Raises:
        ValueError: The run was begun by another factory; the message names each setting that differs.
    """
    agree(lambda: _settle(run.path / FILE, fingerprint(trainer)))


def _settle(path: Path, ours: Mapping[str, Any]) -> None:
    if not path.exists():
        write_json(path, ours)
        return
    theirs = json.loads(path.read_text(encoding="utf-8"))
    found = [
        f"  - {MEANING.get(name, name)} was {str(theirs[name])[:SHOWN]}, now it is {str(ours[name])[:SHOWN]}"
        for name in theirs
        if name in ours and theirs[name] != ours[name]
    ]
    if found:
        raise ValueError(
            f"{path.parent} holds a run of another trainer factory:\n" + "\n".join(found) + "\nTo go on with it, give "
            "the factory its old settings; it makes every trainer of a run alike. For a run of its own, give RunFolder "
            "another root, or move that folder away."
        )


def fingerprint(trainer: NPOTrainer) -> dict[str, Any]:
    """Settings of a fresh trainer that decide what a run computes, as JSON has them, by name.

    The policy is named by the last part of its name or path and by its size, so that a run may move with its files.
    Verifier and reward functions are code: of the latter the names are noted.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    given = {name: value for name, value in trainer.args.to_dict().items() if not FREE.fullmatch(name)}
    noted = {
        **given,
        "processes": process_count(),
        "policy": Path(str(model.config._name_or_path)).name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "adapters": _adapters(model),
        "tokenizer": tokenizer_digest(trainer.processing_class),
        "rewards": trainer.reward_func_names,
    }
    data = data_digest(trainer.train_dataset)
    return _plain(noted if data is None else {**noted, "data": data})


def _adapters(model: Any) -> Any:
    if not isinstance(model, PeftModel):
        return None
    machine = {"base_model_name_or_path", "inference_mode", "peft_version", "revision"}
    return {
        name: {key: value for key, value in settings.to_dict().items() if key not in machine}
        for name, settings in model.peft_config.items()
    }


def data_digest(dataset: Any) -> str | None:
    """Hash of the order of the uids, and of prompt and answer of each; None for data without uids or order."""
    if not isinstance(dataset, Dataset) or "uid" not in dataset.column_names:
        return None
    order = dataset.with_format(None)["uid"][:]
    first: dict[Any, int] = {}
    for place, uid in enumerate(order):
        first.setdefault(uid, place)
    columns = [name for name in ("prompt", "answer") if name in dataset.column_names]
    # as stored: through a data set's own format or transform, each row would have its pictures decoded
    rows = dataset.with_format("arrow").select_columns(columns).select(list(first.values()))
    digest = hashlib.sha256(repr(order).encode())
    for batch in rows.iter(1024):
        digest.update(repr([cast(pa.Table, batch)[name].to_pylist() for name in columns]).encode())
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    """A value as JSON has it; of what JSON does not know, the name of its type."""
    if isinstance(value, Mapping):
        return {str(key): _plain(content) for key, content in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_plain(content) for content in value]
    if isinstance(value, Enum):
        return _plain(value.value)
    known = value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
    return value if known else type(value).__name__
