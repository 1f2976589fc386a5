"""AutoNPO's decisions: what the policy failed, when it has stopped learning, and how far to roll back.

The paper states the mechanism: a mistake pool, a trigger on "reward flat and entropy falling", and the choice of the
distance that maximises S = Q / V. Its numbers are not public, so every default here is ours. State is a function of the
calls made since construction: an interrupted run rebuilds it by repeating the calls from its metrics.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

# Pass rates arrive as k/n rounded to float32.
_RATE_SLACK = 1e-6

# The average of a constant reward is constant but for this, so that a tolerance of 0 finds it flat at every step.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Mistake:
    """A prompt that the policy failed (paper: very low group accuracy, and the step at which it failed).

    Attributes:
        uid: the prompt's identifier in the dataset.
        step: policy step of the batch in which it failed.
        pass_rate: fraction of its group that was correct, in [0, 1].
    """

    uid: str
    step: int
    pass_rate: float


class MistakePool:
    """The mistake pool B: prompts of recent batches with a very low pass rate (paper).

    A prompt has one entry, its newest failure. A later success does not remove it: what an earlier policy failed and
    the current one solves is what a replay can be guided with, and what gives Q̂ its value.

    Args:
        cutoff: largest pass rate that counts as a failure, in [0, 1]. 0.125 is one of eight (ours).
        capacity: most entries kept, >= 1; the oldest are dropped first (ours).
        expiry: policy steps; entries more than this before the newest step seen are dropped, >= 1 (ours).

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(self, cutoff: float = 0.125, capacity: int = 4096, expiry: int = 400) -> None:
        if not 0.0 <= cutoff <= 1.0:
            raise ValueError(f"cutoff is {cutoff}; a pass rate in [0, 1] is needed, such as 0.125 for one of eight.")
        if capacity < 1 or expiry < 1:
            raise ValueError(f"capacity is {capacity} and expiry {expiry}; both must be at least 1.")
        self.cutoff = cutoff
        self.capacity = capacity
        self.expiry = expiry
        self._entries: dict[str, Mistake] = {}
        self._newest: int | None = None

    def add(self, uid: str, step: int, pass_rate: float) -> bool:
        """Record the outcome of one prompt's group; call it for every group: successes advance the expiry.

        Args:
            uid: the prompt.
            step: policy step of the batch, >= 0. Outcomes older than the prompt's entry are ignored.
            pass_rate: fraction correct in [0, 1].

        Returns:
            True if this outcome is now the prompt's entry in the pool.

        Raises:
            ValueError: if `step` is negative or `pass_rate` outside [0, 1].
        """
        if not 0.0 <= pass_rate <= 1.0:
            raise ValueError(
                f"pass_rate of {uid!r} is {pass_rate}; a fraction in [0, 1] is needed: use groups.pass_rate."
            )
        if step < 0:
            raise ValueError(f"step of {uid!r} is {step}; a policy step >= 0 is needed.")
        if self._newest is None or step > self._newest:
            self._newest = step
            self._entries = {u: m for u, m in self._entries.items() if m.step >= step - self.expiry}
        known = self._entries.get(uid)
        if (known is not None and step < known.step) or step < self._newest - self.expiry:
            return False
        if pass_rate > self.cutoff + _RATE_SLACK:
            return False
        # Removed first, so that a renewed entry is also the youngest among those of its step.
        self._entries.pop(uid, None)
        self._entries[uid] = Mistake(uid=uid, step=step, pass_rate=pass_rate)
        if len(self._entries) > self.capacity:
            oldest = min(self._entries.values(), key=lambda mistake: mistake.step)
            del self._entries[oldest.uid]
        return uid in self._entries

    def since(self, step: int) -> list[Mistake]:
        """Failures after `step`, oldest first.

        With `step = t - distance` these are the paper's B of that distance, the interval (t - distance, t].

        Args:
            step: policy step, exclusive.

        Returns:
            The mistakes, sorted by step, then uid.
        """
        found = (mistake for mistake in self._entries.values() if mistake.step > step)
        return sorted(found, key=lambda mistake: (mistake.step, mistake.uid))

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, uid: object) -> bool:
        return uid in self._entries


@dataclass(frozen=True)
class TriggerSettings:
    """Constants of `PlateauTrigger`. None is public; all defaults are ours.

    Attributes:
        ema: weight of the past in the exponential moving averages, in [0, 1); 0.9 averages about ten steps.
        window: policy steps over which a change is measured, >= 1.
        reward_tolerance: largest rise of the reward's average over a window that still counts as flat, in units of
            reward (pass rate, where a right answer earns 1 and a wrong one 0), >= 0.
        entropy_drop: smallest relative fall of the entropy's average over a window that counts as falling, in (0, 1].
        warmup: policy steps after the start or a reset without a warning, >= 0.
        cooldown: policy steps after a warning or a reset without another, >= 0.

    Raises:
        ValueError: if a value is out of its range.
    """

    ema: float = 0.9
    window: int = 20
    reward_tolerance: float = 0.01
    entropy_drop: float = 0.1
    warmup: int = 40
    cooldown: int = 40

    def __post_init__(self) -> None:
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"ema is {self.ema}; the weight of the past must lie in [0, 1), such as 0.9.")
        if self.window < 1 or self.warmup < 0 or self.cooldown < 0:
            raise ValueError(
                f"window is {self.window}, warmup {self.warmup}, cooldown {self.cooldown}; steps with window >= 1 and "
                "the others >= 0 are needed."
            )
        if not 0.0 <= self.reward_tolerance < math.inf:
            raise ValueError(
                f"reward_tolerance is {self.reward_tolerance}; a finite pass rate >= 0 is needed, such as 0.01."
            )
        if not 0.0 < self.entropy_drop <= 1.0:
            raise ValueError(
                f"entropy_drop is {self.entropy_drop}; a fraction in (0, 1] is needed, 0.1 for a fall of 10 %."
            )


@dataclass(frozen=True)
class PlateauWarning:
    """The trigger fired: reward flat, entropy falling. A confirmation probe decides what follows (paper).

    Attributes:
        step: policy step of the warning.
        reward: average (EMA) reward at `step`, pass rate.
        reward_change: average reward at `step` minus that one window earlier, pass rate.
        entropy: average (EMA) policy entropy at `step`, nats per token.
        entropy_change: relative change of that average over the window; -0.1 is a fall of 10 %.
    """

    step: int
    reward: float
    reward_change: float
    entropy: float
    entropy_change: float


class PlateauTrigger:
    """Watches training and warns when the reward's EMA is flat AND the policy's entropy falls.

    The rule is the paper's, its details are ours. Both curves are averaged with a bias-corrected EMA, so the first
    value counts in full and then fades. The change over a window is the average now minus the average at the latest
    step that is at least `window` steps back. "Flat" means "has not risen by more than the tolerance": a falling reward
    is no progress either, and fires too. A reward that stands at its ceiling also fires; the empty mistake pool then
    stops the intervention.

    Feed it on-policy figures without guide rows, and the full-vocabulary entropy: the mean -log p of the tokens would
    move with every injected guide. A single-step spike of entropy is forgiven up to 2.28 times the level (default
    settings); the fall from a higher one looks like a collapse.

    Args:
        settings: constants; `TriggerSettings()` when not given.
    """

    def __init__(self, settings: TriggerSettings | None = None) -> None:
        self.settings = TriggerSettings() if settings is None else settings
        self._last_step: int | None = None
        self._quiet_since: int | None = None
        self._forget()

    @property
    def reward_ema(self) -> float | None:
        """Bias-corrected average reward (pass rate), None before the first update since construction or reset."""
        return self._history[-1][1] if self._history else None

    @property
    def entropy_ema(self) -> float | None:
        """Bias-corrected average entropy (nats per token), None before the first update since construction or reset."""
        return self._history[-1][2] if self._history else None

    def update(self, step: int, reward: float, entropy: float) -> PlateauWarning | None:
        """Take one step's figures; return a warning if all of these hold.

        At least `warmup` steps since the first update (after construction or reset), a history that covers the window,
        a rise of the average reward of at most `reward_tolerance`, a fall of the average entropy by at least
        `entropy_drop` of its value, and at least `cooldown` steps since the last warning or reset. A warning starts its
        own cooldown, whether or not the caller acts on it.

        Args:
            step: policy step, larger than that of the last update or reset. Steps may be skipped; the EMA counts
                updates.
            reward: mean on-policy reward of the step, pass rate.
            entropy: mean on-policy token entropy of the step, nats, >= 0; rounding below 0, to -1e-6, is read as 0.

        Returns:
            A `PlateauWarning`, or None.

        Raises:
            ValueError: if `step` does not increase, or a figure is not finite, or `entropy` is negative. The state is
                unchanged.
        """
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(
                f"step is {step} after step {self._last_step}; steps must strictly increase: call reset(step) after a "
                "roll-back."
            )
        if not math.isfinite(reward) or not math.isfinite(entropy) or entropy < -1e-6:
            raise ValueError(
                f"reward is {reward} and entropy {entropy} at step {step}; a finite reward and a finite entropy >= 0 "
                "are needed: skip steps without on-policy rollouts."
            )
        settings = self.settings
        self._last_step = step
        if self._start is None:
            self._start = step
        self._updates += 1
        self._reward_sum = settings.ema * self._reward_sum + (1.0 - settings.ema) * reward
        self._entropy_sum = settings.ema * self._entropy_sum + (1.0 - settings.ema) * max(entropy, 0.0)
        correction = 1.0 - settings.ema**self._updates
        average_reward, average_entropy = self._reward_sum / correction, self._entropy_sum / correction
        self._history.append((step, average_reward, average_entropy))
        while len(self._history) > 1 and self._history[1][0] <= step - settings.window:
            self._history.popleft()

        past_step, past_reward, past_entropy = self._history[0]
        reward_change = average_reward - past_reward
        # An entropy of zero cannot fall any further.
        entropy_change = (average_entropy - past_entropy) / past_entropy if past_entropy > 0.0 else 0.0
        ready = (
            past_step <= step - settings.window
            and step - self._start >= settings.warmup
            and (self._quiet_since is None or step - self._quiet_since >= settings.cooldown)
        )
        rises = reward_change > settings.reward_tolerance + _ROUNDING
        if not ready or rises or entropy_change > -settings.entropy_drop:
            return None
        self._quiet_since = step
        return PlateauWarning(step, average_reward, reward_change, average_entropy, entropy_change)

    def reset(self, step: int) -> None:
        """Forget all history after a roll-back to `step`. Warm-up starts at the next update, the cooldown at `step`.

        Args:
            step: policy step to which training has rolled back; the next update's step must be larger.
        """
        self._last_step = step
        self._quiet_since = step
        self._forget()

    def _forget(self) -> None:
        self._start: int | None = None
        self._updates = 0
        self._reward_sum = 0.0
        self._entropy_sum = 0.0
        self._history: deque[tuple[int, float, float]] = deque()


@dataclass(frozen=True)
class Candidate:
    """A distance to which training could roll back, with the probe's estimates for it.

    Attributes:
        distance: policy steps from the roll-back checkpoint to the current policy, the guide; >= 0.
        policy_step: step of that checkpoint; >= 0.
        quality: Q, pass rate of the guide on the prompts failed since the checkpoint, in [0, 1] (paper); 0 without
            prompts.
        variance: V, cost of the importance weight as a second moment, so 1 at distance 0 and never below (ours; the
            paper takes the exponential of a per-token KL). An estimate from a KL that came out negative must be raised
            to 1 by the caller.
        prompts: number of prompts behind `quality`, >= 0.

    Raises:
        ValueError: if a value is out of its range or not finite; for `variance`, below 1 - 1e-6.
    """

    distance: int
    policy_step: int
    quality: float
    variance: float
    prompts: int

    def __post_init__(self) -> None:
        if self.distance < 0 or self.policy_step < 0 or self.prompts < 0:
            given = f"distance is {self.distance}, policy_step {self.policy_step}, prompts {self.prompts}"
            raise ValueError(f"{given}; all must be >= 0.")
        if not 0.0 <= self.quality <= 1.0 or (self.prompts == 0 and self.quality != 0.0):
            raise ValueError(
                f"quality at distance {self.distance} is {self.quality} from {self.prompts} prompts; a pass rate in "
                "[0, 1] is needed, and 0 when no prompt was probed."
            )
        if not math.isfinite(self.variance) or self.variance < 1.0 - 1e-6:
            raise ValueError(
                f"variance at distance {self.distance} is {self.variance}; a finite second moment >= 1 is needed (not "
                "a variance, which vanishes at distance 0): clamp a negative KL estimate to 0."
            )

    @property
    def signal(self) -> float:
        """Effective learning signal S = Q / V (paper), dimensionless, in [0, 1] up to the tolerance of V."""
        return self.quality / self.variance


@dataclass(frozen=True)
class Decision:
    """What `choose_distance` decided, with all it considered.

    Attributes:
        chosen: the candidate with the largest signal, None if none is eligible.
        candidates: all candidates, by ascending distance.
        at_edge: True if the chosen distance is the smallest or largest that a prompt was probed for: the optimum is
            then not bracketed, and may lie outside (always so for one or two such candidates).
        reason: a sentence for the log.
    """

    chosen: Candidate | None
    candidates: tuple[Candidate, ...]
    at_edge: bool
    reason: str


def choose_distance(candidates: Sequence[Candidate], quality_floor: float = 0.0) -> Decision:
    """The distance with the largest signal Q / V (paper), among candidates whose quality reaches the floor (ours).

    Of equal signals the smaller distance wins: it rolls back fewer steps.

    Args:
        candidates: one per saved checkpoint, of distinct distances, in any order; at least one.
        quality_floor: smallest pass rate on the failed prompts that is worth a roll-back, in [0, 1]. A candidate
            without probed prompts is never eligible.

    Returns:
        A `Decision`.

    Raises:
        ValueError: if there is no candidate, a distance occurs twice, or `quality_floor` is outside [0, 1].
    """
    if not 0.0 <= quality_floor <= 1.0:
        raise ValueError(f"quality_floor is {quality_floor}; a pass rate in [0, 1] is needed.")
    if not candidates:
        raise ValueError("candidates is empty; at least one saved checkpoint is needed: save checkpoints more often.")
    ordered = tuple(sorted(candidates, key=lambda candidate: candidate.distance))
    distances = [candidate.distance for candidate in ordered]
    if len(set(distances)) < len(distances):
        raise ValueError(f"distances are {distances}; each may occur once: merge the estimates of one checkpoint.")
    eligible = [candidate for candidate in ordered if candidate.prompts > 0 and candidate.quality >= quality_floor]
    if not eligible:
        best = max(candidate.quality for candidate in ordered)
        probed = max(candidate.prompts for candidate in ordered)
        reason = f"no roll-back: largest quality {best:.3g}, floor {quality_floor:.3g}, at most {probed} prompts probed"
        return Decision(chosen=None, candidates=ordered, at_edge=False, reason=reason)
    # max keeps the first of equals, and the order is by distance.
    chosen = max(eligible, key=lambda candidate: candidate.signal)
    # without a probed prompt a distance has no estimate: it brackets nothing
    measured = [candidate.distance for candidate in ordered if candidate.prompts > 0]
    at_edge = chosen.distance in (measured[0], measured[-1])
    reason = (
        f"distance {chosen.distance}: signal {chosen.signal:.3g} = quality {chosen.quality:.3g} / variance "
        f"{chosen.variance:.3g} is the largest of {len(eligible)} eligible among {len(ordered)} candidates"
    )
    if at_edge:
        reason += f"; an edge of the range {measured[0]}..{measured[-1]}, so the optimum is not bracketed"
    return Decision(chosen=chosen, candidates=ordered, at_edge=at_edge, reason=reason)
