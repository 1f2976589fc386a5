"""The baselines' own sources: RLEP's pool of a converged run, and ExGRPO's memory of the policy's own successes.

Both are written from the table of the originals' code in `docs/implementation.md`. Their random choices depend on seed,
step and prompt alone, so a resumed run makes the same ones.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_table, write_table
from ..streams import OWN_PAST, POOL
from .sources import Entropies
from .trajectories import GuidanceCache, Trajectory

MEMORY_FILE = "own_past.parquet"
"""State of ExGRPO's memory beside a checkpoint."""


class ReplayPool(GuidanceCache):
    """Several verified-correct trajectories per prompt (RLEP); which of them guide is drawn anew at each step.

    Arguments are those of `GuidanceCache`.
    """

    def __init__(self, *args: Any, seed: int = 0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seed = seed
        self._pool: dict[str, list[Trajectory]] = {}

    def __len__(self) -> int:
        return len(self._pool)

    def __contains__(self, uid: object) -> bool:
        return uid in self._pool

    def __iter__(self) -> Iterator[Trajectory]:
        return (trajectory for kept in self._pool.values() for trajectory in kept)

    def add(self, trajectory: Trajectory) -> None:
        """Put a trajectory beside the others of its prompt; see `GuidanceCache.add` for what is refused."""
        self.check(trajectory)
        self._pool.setdefault(trajectory.uid, []).append(trajectory)

    def fill(self, candidates: Iterable[Trajectory], rule: str = "first") -> int:
        """Keep every correct, usable trajectory, whatever the rule; return how many correct ones were not usable."""
        for trajectory in self._usable(candidates):
            self._pool.setdefault(trajectory.uid, []).append(trajectory)
        return self.filled.refused

    def guide(self, uid: str, policy_step: int) -> Trajectory | None:
        """One of the prompt's trajectories, or None."""
        return next(iter(self.guides(uid, policy_step, 1)), None)

    def guides(self, uid: str, policy_step: int, count: int) -> Sequence[Trajectory]:
        """`count` of the prompt's trajectories, drawn without return; all of them if there are fewer."""
        kept = self._pool.get(uid, [])
        rng = POOL.generator(self.seed, policy_step, uid)
        return [kept[index] for index in rng.permutation(len(kept))[:count]]


class OwnPast:
    """ExGRPO: the policy's own correct rollouts come again as guides, for prompts that it solves sometimes.

    A prompt whose last group had 0 < k < n correct rollouts lies in bucket k with its newest correct rollouts; at k = n
    it retires, at k = 0 it stays as it was. From the first step whose pass rate exceeds `start` on, a share of each
    step's prompts is replaced by prompts of the memory: a bucket is drawn with weight N(k; n/2, 1), then one of its
    prompts. The guide is the kept rollout with the lowest entropy under the current policy.

    Args:
        rows: Data set rows by uid.
        n: Rollouts in a group.
        seed: Seed of the choice of prompts.
        share: Share of a step's prompts that are replayed.
        start: Pass rate of a step above which replay begins.
        keep: Newest correct rollouts kept per prompt.
        temperature: Temperature of the training, whose log-probs are kept with the rollouts.
    """

    def __init__(
        self,
        rows: Mapping[str, Mapping[str, Any]],
        n: int,
        seed: int,
        share: float = 0.5,
        start: float = 0.35,
        keep: int = 8,
        temperature: float = 1.0,
    ):
        self.rows, self.n, self.seed, self.share, self.start, self.keep = rows, n, seed, share, start, keep
        self.temperature = temperature
        self.begun = False
        self._solved: dict[str, int] = {}
        self._kept: dict[str, list[Trajectory]] = {}
        self._chosen: dict[str, Trajectory] = {}

    def __len__(self) -> int:
        return len(self._solved)

    def guide(self, uid: str, policy_step: int) -> Trajectory | None:
        """The trajectory chosen for a prompt that is replayed in this step, else None."""
        return self._chosen.get(uid)

    def replay(self, uids: Sequence[str], policy_step: int, entropies: Entropies) -> dict[int, Mapping[str, Any]]:
        """Rows that take the last places of the step's prompts; none before replay has begun."""
        self._chosen = {}
        if not self.begun:
            return {}
        count = int(self.share * len(uids))
        staying = set(uids[: len(uids) - count])
        drawn = self._draw(policy_step, count, staying)
        if len(drawn) < count:
            # fewer places are taken, so more of the step's prompts stay: none of those may come twice
            drawn = [uid for uid in drawn if uid not in uids]
        candidates = [trajectory for uid in drawn for trajectory in self._kept[uid]]
        if not candidates:
            return {}
        scores = entropies([self.rows[c.uid] for c in candidates], [c.token_ids for c in candidates])
        best: dict[str, tuple[float, Trajectory]] = {}
        for score, candidate in zip(scores, candidates, strict=True):
            if candidate.uid not in best or score < best[candidate.uid][0]:
                best[candidate.uid] = score, candidate
        self._chosen = {uid: trajectory for uid, (_, trajectory) in best.items()}
        return {len(uids) - len(drawn) + place: self.rows[uid] for place, uid in enumerate(drawn)}

    def _draw(self, policy_step: int, count: int, staying: Iterable[str]) -> list[str]:
        """Prompts to replay, without return: first a bucket, then one of its prompts."""
        rng = OWN_PAST.generator(self.seed, policy_step)
        buckets: dict[int, list[str]] = {}
        for uid, solved in sorted(self._solved.items()):
            if uid not in staying:
                buckets.setdefault(solved, []).append(uid)
        drawn: list[str] = []
        while buckets and len(drawn) < count:
            weights = bucket_weights(np.array(sorted(buckets)), self.n)
            bucket = sorted(buckets)[rng.choice(len(buckets), p=weights)]
            drawn.append(buckets[bucket].pop(int(rng.integers(len(buckets[bucket])))))
            if not buckets[bucket]:
                del buckets[bucket]
        return drawn

    def observe(self, policy_step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Update buckets and kept rollouts from a step's rollouts; guides count for neither."""
        groups: dict[int, list[Mapping[str, Any]]] = {}
        for row in rows:
            groups.setdefault(row["group"], []).append(row)
        rates = []
        for group in groups.values():
            own = [row for row in group if row["source"] == "policy"]
            verdicts = [row["correct"] for row in own] + [
                row["overwritten_correct"] for row in group if row["overwritten_correct"] is not None
            ]
            rates.append(sum(verdicts) / len(verdicts))
            self._update(group[0]["uid"], sum(verdicts), len(verdicts), policy_step, own)
        self.begun = self.begun or float(np.mean(rates)) > self.start

    def _update(self, uid: str, solved: int, of: int, step: int, own: Sequence[Mapping[str, Any]]) -> None:
        if solved == of:
            self._solved.pop(uid, None)
            self._kept.pop(uid, None)
            return
        if solved == 0:
            return
        new = [
            self._kept_one(uid, row["token_ids"], row["behaviour_logps"], step, row["text"])
            for row in own
            if row["correct"] and row["ended"]
        ]
        kept = (self._kept.get(uid, []) + new)[-self.keep :]
        if kept:
            self._solved[uid], self._kept[uid] = solved, kept

    def _kept_one(self, uid: str, ids: Sequence[int], logps: Sequence[float], step: int, text: str) -> Trajectory:
        return Trajectory(uid, tuple(ids), tuple(logps), step, True, text, temperature=self.temperature)

    def save(self, folder: Path) -> None:
        """Write the memory to `own_past.parquet` in a checkpoint folder."""
        rows = [
            {
                "uid": uid,
                "solved": self._solved[uid],
                "token_ids": list(trajectory.token_ids),
                "logps": list(trajectory.logps),
                "source_step": trajectory.source_step,
                "text": trajectory.text,
            }
            for uid, kept in self._kept.items()
            for trajectory in kept
        ]
        # a first row of its own says whether replay has begun: an empty memory is a state too
        about = {"uid": None, "solved": int(self.begun), "token_ids": [], "logps": [], "source_step": 0, "text": ""}
        write_table(Path(folder) / MEMORY_FILE, [about, *rows])

    def restore(self, folder: Path) -> None:
        """Read the memory that `save` wrote.

        Raises:
            FileNotFoundError: The folder holds none.
        """
        path = Path(folder) / MEMORY_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; a checkpoint of ExGRPO holds its memory.")
        about, *rows = read_table(path)
        self.begun, self._solved, self._kept, self._chosen = bool(about["solved"]), {}, {}, {}
        for row in rows:
            uid = row["uid"]
            trajectory = self._kept_one(uid, row["token_ids"], row["logps"], row["source_step"], row["text"])
            self._solved[uid] = row["solved"]
            self._kept.setdefault(uid, []).append(trajectory)


def bucket_weights(solved: np.ndarray, n: int) -> np.ndarray:
    """Chance of each bucket: the normal density N(k; n/2, 1), normalised over the buckets given (ExGRPO)."""
    weights = np.exp(-0.5 * (solved - n / 2) ** 2)
    return weights / weights.sum()
