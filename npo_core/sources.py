"""Where guides come from: the protocol that NPOTrainer asks, and windows that limit a source to a segment."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from .trajectories import Trajectory


@runtime_checkable
class GuidanceSource(Protocol):
    """Anything that can hand out a guide for a prompt; `GuidanceCache` is one."""

    def guide(self, uid: str, policy_step: int) -> Trajectory | None:
        """Verified-correct guide for prompt `uid` at `policy_step` (steps done before this one), or None."""
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
