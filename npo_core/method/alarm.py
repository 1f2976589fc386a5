"""An alarm for the other direction: entropy or length that rises without reward, responses that are cut off (ours).

The plateau trigger watches for collapse. A run can also fall apart: it babbles, or writes ever longer. Nothing is done
about that but to say so.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class AlarmSettings:
    """Constants of `Alarm`; all defaults are ours.

    Attributes:
        ema: weight of the past in the averages, in [0, 1).
        window: policy steps over which a rise is measured, >= 1.
        reward_tolerance: largest rise of the average reward over the window that counts as none, pass rate.
        rise: smallest relative rise of the average entropy or length over the window; 0.5 is half as much again, 0 off.
        clipped: largest average share of responses that are cut off at the longest length, in [0, 1]; 0 is off.
    """

    ema: float = 0.9
    window: int = 20
    reward_tolerance: float = 0.01
    rise: float = 0.5
    clipped: float = 0.5


class Alarm:
    """Watches averages over steps; each complaint is made once, and again only after it had ended.

    Args:
        settings: constants.
    """

    def __init__(self, settings: AlarmSettings):
        self.settings = settings
        self._sounding: set[str] = set()
        self.reset()

    def reset(self) -> None:
        """Forget all steps, as after a roll-back."""
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._history: deque[tuple[int, dict[str, float]]] = deque()

    def update(self, step: int, figures: Mapping[str, float]) -> list[str]:
        """Take one step's figures; what is to be complained of now, a sentence each.

        Args:
            step: policy step, larger than the last since a reset.
            figures: any of reward (pass rate), entropy (nats per token), length (tokens) and clipped (share); what is
                missing or not finite is passed over.
        """
        settings = self.settings
        for name, value in figures.items():
            if math.isfinite(value):
                self._counts[name] = self._counts.get(name, 0) + 1
                self._sums[name] = settings.ema * self._sums.get(name, 0.0) + (1.0 - settings.ema) * value
        now = {name: total / (1.0 - settings.ema ** self._counts[name]) for name, total in self._sums.items()}
        self._history.append((step, now))
        while len(self._history) > 1 and self._history[1][0] <= step - settings.window:
            self._history.popleft()
        before = self._history[0][1] if self._history[0][0] <= step - settings.window else {}
        found = {**self._rises(before, now), **self._cut_off(now if before else {})}
        fresh = [text for kind, text in found.items() if kind not in self._sounding]
        self._sounding = set(found)
        return fresh

    def _rises(self, before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, str]:
        settings = self.settings
        if not settings.rise or "reward" not in before:
            return {}
        gain = now["reward"] - before["reward"]
        if gain > settings.reward_tolerance:
            return {}
        found = {}
        for name, unit in (("entropy", "nats per token"), ("length", "tokens")):
            if before.get(name, 0.0) > 0.0 and now[name] >= (1.0 + settings.rise) * before[name]:
                found[name] = (
                    f"{name} rose from {before[name]:.3g} to {now[name]:.3g} {unit} in {settings.window} steps, "
                    f"reward by {gain:+.3f}"
                )
        return found

    def _cut_off(self, now: Mapping[str, float]) -> dict[str, str]:
        limit, share = self.settings.clipped, now.get("clipped", 0.0)
        if not limit or share <= limit:
            return {}
        return {"clipped": f"{100 * share:.0f} % of the responses are cut off at the longest length"}
