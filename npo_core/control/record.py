"""What a run keeps for a reader beside its metrics: every guided group, refused guides, and probe outcomes by prompt.

`guided/b<branch>.jsonl` has a line per step in which a guide took a slot or was refused; `probes/<branch>-<step>.json`
holds what a decision rested on, prompt by prompt. Nothing of it is read by the run itself. All of this is ours.
"""

import io
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image

from ..files import append_line, write_json, write_whole
from ..guidance.fingerprints import tokenizer_of
from ..guidance.trajectories import Trajectory
from ..method.trigger import Candidate, Mistake
from ..processes import is_writer, process_count, process_number
from ..runs.folder import RunFolder
from ..trainer.pictures import pictures_of

KEPT = ("slot", "source", "text", "ended", "correct", "reward", "advantage")
"""What is kept of every rollout of a guided group; token ids and log-probs are kept of guides only."""

OF_GUIDES = ("guide_step", "token_ids", "behaviour_logps", "current_logps", "overwritten_correct")

PICTURE_SIDE = 512
"""Longest side in pixels of a recorded picture; larger ones are kept as smaller copies."""


class GuidedGroups:
    """Sink of a trainer's guided groups: writes them to the run folder until a size on disk is reached.

    Each process writes a file of its own, so nothing is gathered and no step waits. After a kill a step that is done
    again is written again: of two lines of a step the later one counts.

    Args:
        run: Run folder.
        branch: Branch that is trained.
        rows: Data set rows by uid.
        processor: Processor or tokenizer of the policy.
        limit: MiB that all processes and branches of the run may fill.
    """

    def __init__(
        self, run: RunFolder, branch: int, rows: Mapping[str, Mapping[str, Any]], processor: Any, limit: float
    ):
        self.rows, self.tokenizer = rows, tokenizer_of(processor)
        self.folder = run.path / "guided"
        process = f"-p{process_number()}" if process_number() else ""
        self.path = self.folder / f"b{branch:02d}{process}.jsonl"
        (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
        mine = [path for path in self.folder.glob("b*.jsonl") if path.stem.partition("-")[2] == process[1:]]
        if is_writer():
            mine += list((self.folder / "pictures").iterdir())
        self.left = limit * 2**20 / process_count() - sum(path.stat().st_size for path in mine)
        self._pieces: dict[int, str] = {}

    def __call__(self, policy_step: int, rows: Sequence[Mapping[str, Any]], refused: Sequence[Trajectory]) -> None:
        """Write a step: rows of its guided groups, as a rollout table has them, and guides that were refused."""
        if self.left <= 0:
            return
        groups: dict[int, list[Mapping[str, Any]]] = {}
        for row in rows:
            groups.setdefault(row["group"], []).append(row)
        line = {
            "policy_step": policy_step,
            "groups": [self._group(number, members) for number, members in sorted(groups.items())],
            "refused": [{"uid": str(g.uid), "guide_step": g.source_step, "text": g.text} for g in refused],
        }
        before = self.path.stat().st_size if self.path.exists() else 0
        append_line(self.path, line)
        self.left -= self.path.stat().st_size - before

    def _group(self, number: int, members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        uid = members[0]["uid"]
        source = self.rows[uid]
        about = {"uid": str(uid), "group": number, "question": question_of(source)}
        about |= {name: str(source[name]) for name in ("answer", "suite") if source.get(name) is not None}
        return {**about, "picture": self._picture(uid, source), "slots": [self._slot(row) for row in members]}

    def _slot(self, row: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: row[name] for name in KEPT}
        if row["source"] != "policy":
            lost = row["overwritten_ids"]
            kept |= {name: row[name] for name in OF_GUIDES}
            kept["overwritten_text"] = None if lost is None else self.tokenizer.decode(lost, skip_special_tokens=True)
            kept["pieces"] = [self._piece(token) for token in row["token_ids"]]
            for name in ("behaviour_logps", "current_logps"):
                kept[name] = [round(value, 5) for value in row[name]]
        if row["source"] == "prefix":
            kept["prefix"] = row["prefix"]
            kept["prefix_text"] = self.tokenizer.decode(row["token_ids"][: row["prefix"]], skip_special_tokens=True)
        return kept

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self.tokenizer.decode([token])
        return self._pieces[token]

    def _picture(self, uid: Any, source: Mapping[str, Any]) -> str | None:
        """File name of a prompt's first picture, which is written once; None for a prompt without one."""
        pictures = [picture for picture in pictures_of(source) if isinstance(picture, Image.Image)]
        if not pictures:
            return None
        path = self.folder / "pictures" / f"{sha256(str(uid).encode()).hexdigest()[:16]}.png"
        if not path.exists():
            copy = pictures[0].copy()
            copy.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
            stream = io.BytesIO()
            copy.save(stream, "PNG")
            write_whole(path, lambda unfinished: unfinished.write_bytes(stream.getvalue()))
            self.left -= len(stream.getvalue())
        return path.name


def question_of(row: Mapping[str, Any]) -> str:
    """The question of a row for a reader: its prompt, or the text of the last turn of a conversation."""
    prompt = row["prompt"]
    content = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part.get("text"))


def record_probe(
    run: RunFolder,
    branch: int,
    clocks: Mapping[str, int],
    mistakes: Sequence[Mistake],
    probed: Sequence[Sequence[Trajectory]],
    divergence: Sequence[tuple[Candidate, Sequence[float], Sequence[int]]],
) -> Path | None:
    """Write the outcomes of a probe by prompt.

    Args:
        run: Run folder.
        branch: Branch that ended at the probe.
        clocks: `policy_step` and `compute_step` of the decision.
        mistakes: The mistake pool.
        probed: Rollouts of the current policy, a list per probed prompt.
        divergence: Of each candidate, per probed prompt: the sum of log q − log π over its judged tokens (nats), with q
            the current policy and π that of the checkpoint, and the number of those tokens.

    Returns:
        The file, in the process that writes.
    """
    if not is_writer():
        return None
    failed_at = {mistake.uid: mistake.step for mistake in mistakes}
    path = run.path / "probes" / f"{branch:02d}-{clocks['policy_step']:05d}.json"
    path.parent.mkdir(exist_ok=True)
    prompts = [
        {"uid": str(group[0].uid), "correct": sum(t.correct for t in group), "failed_at": failed_at[group[0].uid]}
        for group in probed
    ]
    candidates = [
        {"distance": candidate.distance, "sums": [round(value, 5) for value in sums], "tokens": list(tokens)}
        for candidate, sums, tokens in divergence
    ]
    write_json(path, {**clocks, "rollouts": len(probed[0]), "prompts": prompts, "candidates": candidates})
    return path
