"""A run of TRL that logged its completions (`log_completions=True`), as the explorer shows it.

TRL writes `completions/completions_<step>.parquet` with the columns step, prompt, completion, a column per reward
function, what else the rewards were given, and advantage. It knows neither uids nor verdicts nor guides: prompts are
told apart by their text, and a group is a run of rows with one prompt.
"""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ..files import read_json, read_table
from .groups import Prompts

OWN_COLUMNS = ("step", "prompt", "completion", "advantage")
PATTERN = "completions/completions_*.parquet"


def is_completions_folder(path: Path) -> bool:
    """Whether a folder holds tables that TRL's log_completions wrote."""
    return next(path.glob(PATTERN), None) is not None


def read_completions(path: Path) -> dict[str, Any]:
    """All that the page shows of TRL's tables; metric curves from the newest `trainer_state.json`, if there is one.

    Raises:
        ValueError: A table without one of TRL's columns.
    """
    prompts = Prompts()
    steps, rates, names = [], {}, []
    for file in sorted(path.glob(PATTERN)):
        rows = read_table(file)
        missing = [name for name in OWN_COLUMNS if rows and name not in rows[0]]
        if missing:
            raise ValueError(f"{file} has no column {', '.join(missing)}; it is no table of TRL's log_completions.")
        if not rows:
            continue
        names = reward_columns(rows)
        groups = [_group(number, members, names, prompts) for number, members in enumerate(_runs(rows))]
        step = int(rows[0]["step"])
        steps.append({"s": step, "c": step, "b": 0, "whole": True, "groups": groups})
        rates[step] = [[group["p"], None] for group in groups]
    return {
        "name": path.resolve().name,
        "kind": "trl",
        "method": "TRL",
        "preset": "",
        "seed": None,
        "finished": True,
        "scores": {},
        "notes": [
            "TRL's log of completions: it holds no uids, verdicts or guides. Reward: "
            + (" + ".join(names) if names else "none found")
            + " (unweighted)."
        ],
        "config": {},
        "lines": _lines(path, rates),
        "events": [],
        "steps": steps,
        "caches": [],
        "probes": [],
        "prompts": prompts.records,
    }


def reward_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns that hold rewards: those of numbers, or of nothing, that are not TRL's own."""
    return [
        name
        for name in rows[0]
        if name not in OWN_COLUMNS
        and all(
            row[name] is None or (isinstance(row[name], int | float) and not isinstance(row[name], bool))
            for row in rows
        )
    ]


def _runs(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    return [list(members) for _, members in groupby(rows, key=lambda row: _text(row["prompt"]))]


def _group(number: int, rows: Sequence[Mapping[str, Any]], names: Sequence[str], prompts: Prompts) -> dict[str, Any]:
    question = _text(rows[0]["prompt"])
    uid = hashlib.sha256(question.encode()).hexdigest()[:10]
    slots = []
    for row in rows:
        given = [row[name] for name in names if row[name] is not None and row[name] == row[name]]
        advantage = row["advantage"]
        slots.append(
            {
                "t": _text(row["completion"]),
                "ok": None,
                "r": round(sum(given), 5) if given else None,
                "a": None if advantage is None else round(advantage, 5),
            }
        )
    return {"i": number, "p": prompts.tell(uid, {"question": question}), "slots": slots}


def _text(message: Any) -> str:
    """A prompt or completion as text: a string, or the contents of a conversation's turns."""
    if isinstance(message, str):
        return message
    turns = []
    for turn in message:
        content = turn["content"]
        if not isinstance(content, str):
            content = " ".join(part.get("text") or f"[{part.get('type')}]" for part in content or [])
        turns.append(content)
    return "\n\n".join(turns)


def _lines(path: Path, rates: Mapping[int, list[Any]]) -> list[dict[str, Any]]:
    """A line per logged step: TRL's own reward and entropy, guide rows included if there were any."""
    states = sorted(
        (*path.glob("checkpoint-*/trainer_state.json"), *path.glob("trainer_state.json")),
        key=lambda state: state.stat().st_mtime,
    )
    history = read_json(states[-1])["log_history"] if states else []
    logged = {entry["step"]: entry for entry in history if "reward" in entry}
    lines = []
    for step in sorted(logged.keys() | rates.keys()):
        entry = logged.get(step, {})
        shown = {"s": step, "c": step, "b": 0, "g": rates.get(step, [])}
        for short, name in (("r", "reward"), ("e", "entropy")):
            if entry.get(name) is not None:
                shown[short] = round(entry[name], 5)
        lines.append(shown)
    return lines
