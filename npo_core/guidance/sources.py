"""Where guides come from: the protocols that NPOTrainer asks, and windows that limit a source to a segment."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from .trajectories import Trajectory

Entropies = Callable[[Sequence[Mapping[str, Any]], Sequence[Sequence[int]]], list[float]]
"""`entropies(rows, token ids) -> mean token entropy of each response under the current policy, nats`."""


@runtime_checkable
class GuidanceSource(Protocol):
    """Anything that can hand out a guide for a prompt; `GuidanceCache` is one."""

    def guide(self, uid: str, policy_step: int) -> Trajectory | None:
        """Verified-correct guide for prompt `uid` at `policy_step` (steps done before this one), or None."""
        ...


@runtime_checkable
class ManyGuides(GuidanceSource, Protocol):
    """A source with several guides for a prompt, as RLEP appends to a group."""

    def guides(self, uid: str, policy_step: int, count: int) -> Sequence[Trajectory]:
        """At most `count` verified-correct guides for prompt `uid` at `policy_step`."""
        ...


@runtime_checkable
class ReplaySource(GuidanceSource, Protocol):
    """A source that learns from the run itself and chooses prompts to come again, as ExGRPO does."""

    def replay(self, uids: Sequence[str], policy_step: int, entropies: Entropies) -> dict[int, Mapping[str, Any]]:
        """Rows that take the place of some of a step's prompts, by place in `uids`; called before the rollouts."""
        ...

    def observe(self, policy_step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take in the rollout table of a finished step (see `NPOTrainer`'s rollout sink)."""
        ...

    def save(self, folder: Path) -> None:
        """Write the state beside a checkpoint; controllers call it, a trainer by itself does not."""
        ...

    def restore(self, folder: Path) -> None:
        """Read the state that `save` wrote."""
        ...


@dataclass(frozen=True)
class GuidanceWindow:
    """A source that guides only while `start <= policy_step < stop` (the replayed segment).

    Attributes:
        source: The source inside the window.
        start: First policy step that is guided, counted in steps done before it.
        stop: First policy step that is not guided any more.
    """

    source: GuidanceSource
    start: int
    stop: int

    def guide(self, uid: str, policy_step: int) -> Trajectory | None:
        """Guide of the inner source inside the window, else None."""
        return self.source.guide(uid, policy_step) if self.start <= policy_step < self.stop else None
