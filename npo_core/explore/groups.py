"""Groups of rollouts on disk, as the explorer shows them: whole tables of some steps, guided groups of every step."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..files import read_lines, read_table

SMALL_PICTURE = 4096
"""Bytes up to which a picture is shown as it is."""

PICTURE_SIDE = 320
"""Longest side in pixels of a larger picture's copy in the page."""

KINDS = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp"}


class Prompts:
    """The prompts of a run by number: what is known of each, filled in from whatever file tells it.

    Args:
        cutoff: Pass rate up to which a prompt counts as failed.

    Attributes:
        records: What is known of each prompt: `uid`, and where known `question`, `answer`, `suite`, `picture` (a data
            address).
    """

    def __init__(self, cutoff: float = 0.125):
        self.cutoff = cutoff
        self.records: list[dict[str, Any]] = []
        self._places: dict[str, int] = {}

    def place(self, uid: str) -> int:
        """Number of a prompt; a new one is added."""
        if uid not in self._places:
            self._places[uid] = len(self.records)
            self.records.append({"uid": uid})
        return self._places[uid]

    def tell(self, uid: str, row: Mapping[str, Any]) -> int:
        """Fill in what a row says about its prompt; its number."""
        place = self.place(uid)
        record = self.records[place]
        for name in ("question", "answer", "suite"):
            if row.get(name) is not None and name not in record:
                record[name] = str(row[name])
        if row.get("picture") is not None and "picture" not in record:
            record["picture"] = picture_address(row["picture"])
        return place


def picture_address(content: bytes) -> str:
    """A picture as a data address; a large one as a smaller copy. Empty where it cannot be read."""
    try:
        with Image.open(io.BytesIO(content)) as picture:
            if picture.format in KINDS and len(content) <= SMALL_PICTURE:
                return f"data:image/{KINDS[picture.format]};base64,{base64.b64encode(content).decode()}"
            copy = picture.convert("RGB")
    except (OSError, Image.DecompressionBombError):
        return ""
    copy.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    stream = io.BytesIO()
    copy.save(stream, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def slot(row: Mapping[str, Any]) -> dict[str, Any]:
    """A rollout for the page: text, verdict, reward, advantage; of a guide its tokens and what it replaced too."""
    shown: dict[str, Any] = {
        "t": row["text"],
        "ok": row.get("correct"),
        "r": None if row["reward"] is None or row["reward"] != row["reward"] else round(row["reward"], 5),
        "a": None if row["advantage"] is None else round(row["advantage"], 5),
    }
    if not row.get("ended", True):
        shown["cut"] = True
    if row.get("source") in ("guide", "prefix"):
        shown["guide"] = -1 if row.get("guide_step") is None else row["guide_step"]
        if row.get("overwritten_text") is not None:
            shown["lost"], shown["lostOk"] = row["overwritten_text"], bool(row["overwritten_correct"])
        if row["source"] == "prefix":  # what follows is the policy's own, which no ratio weighs
            shown["begun"] = [row["prefix"], len(row["token_ids"]), row.get("prefix_text")]
        elif row.get("behaviour_logps") and row.get("current_logps"):
            shown["q"] = [round(value, 4) for value in row["behaviour_logps"]]
            shown["l"] = [round(value, 4) for value in row["current_logps"]]
            shown["ids"] = list(row["token_ids"])
            if row.get("pieces"):
                shown["pieces"] = list(row["pieces"])
    return shown


def read_tables(run: Path, prompts: Prompts, clock: Mapping[int, tuple[int, int]], last: int) -> list[dict[str, Any]]:
    """Whole steps: `rollouts/step-<policy step>-b<branch>.parquet`, those that the run's log has come to."""
    steps = []
    for path in sorted((run / "rollouts").glob("step-*-b*.parquet")):
        policy_step, branch = (int(part) for part in path.stem.removeprefix("step-").split("-b"))
        start, compute_start = clock.get(branch, (0, 0))
        compute_step = compute_start + policy_step - start
        if compute_step > last:
            continue
        rows = read_table(path)
        steps.append(
            {"s": policy_step, "c": compute_step, "b": branch, "whole": True, "groups": grouped(rows, prompts)}
        )
    return steps


def grouped(rows: Sequence[Mapping[str, Any]], prompts: Prompts) -> list[dict[str, Any]]:
    """Rows of a step as groups, each in the order of its slots."""
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    shown = []
    for number, members in sorted(groups.items()):
        members = sorted(members, key=lambda row: row["slot"])
        first = next((row for row in members if row.get("picture") is not None), members[0])
        place = prompts.tell(str(members[0]["uid"]), first)
        shown.append({"i": number, "p": place, "slots": [slot(row) for row in members]})
    return shown


def read_guided(run: Path, prompts: Prompts, clock: Mapping[int, tuple[int, int]], last: int) -> list[dict[str, Any]]:
    """Guided groups and refused guides of every step; see `control.record`. A step that was done again counts once."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for path in sorted((run / "guided").glob("b*.jsonl")):
        branch = path.stem.removeprefix("b").partition("-p")[0]  # each process has a file of its own
        start, compute_start = clock.get(int(branch), (0, 0))
        own: dict[int, Mapping[str, Any]] = {line["policy_step"]: line for line in read_lines(path)}
        for policy_step, line in own.items():
            compute_step = compute_start + policy_step - start
            if compute_step > last:
                continue
            step = found.setdefault(
                (int(branch), policy_step),
                {"s": policy_step, "c": compute_step, "b": int(branch), "whole": False, "groups": [], "refused": []},
            )
            for group in line["groups"]:
                uid = str(group["uid"])
                place = prompts.tell(uid, group | {"picture": _picture(run, group.get("picture"))})
                step["groups"].append({"i": group["group"], "p": place, "slots": [slot(row) for row in group["slots"]]})
            for guide in line["refused"]:
                step["refused"].append([prompts.place(guide["uid"]), guide["guide_step"], guide["text"]])
    return list(found.values())


def _picture(run: Path, name: str | None) -> bytes | None:
    """A picture that was recorded beside the groups; a name from a file leads nowhere else."""
    if name is None:
        return None
    path = run / "guided" / "pictures" / Path(name).name
    return path.read_bytes() if path.is_file() else None


def read_caches(run: Path, events: Sequence[Mapping[str, Any]], prompts: Prompts) -> list[dict[str, Any]]:
    """Guides of all caches that the run's events name, where the file is still there."""
    caches = []
    for event in events:
        if event["event"] != "cache":
            continue
        cache = {"file": event["file"], "s": event["policy_step"], "c": event["compute_step"], "guides": []}
        path = run / event["file"]
        if path.is_file() and path.resolve().is_relative_to(run.resolve()):
            for row in read_table(path):
                nats = sum(row["logps"]) / max(len(row["logps"]), 1)
                cache["guides"].append([prompts.place(row["uid"]), row["text"], len(row["token_ids"]), round(nats, 4)])
        caches.append(cache)
    return caches
