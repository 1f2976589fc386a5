"""The premise of guidance: does a later policy solve what this one fails, more often than this one tried again?

A guide from the near future can only help where the answer is yes. The measure is Q(Δ) of the paper beside the control
that the paper leaves out, an own resample: what the policy itself solves of its failures when it is sampled once more.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.stats
from jaxtyping import Float

from .stats import Estimate, bootstrap_interval, holm, mcnemar_exact

FEW = 20
"""Failed prompts below which nothing is said of the premise (ours)."""

LEVEL = 0.05
"""Holm-adjusted p-value over the distances, below which a later policy counts as better than a resample (ours)."""


@dataclass(frozen=True)
class Premise:
    """What a policy fails, and who solves it.

    Attributes:
        distance: Policy steps from the policy to the later one.
        shown: Share of the failed prompts that the later policy solves, 95 % Wilson interval over prompts.
        own: The same for a second sample of the policy itself.
        gain: `shown` minus `own`, paired by prompt, 95 % bootstrap interval over prompts.
        p_holm: Exact McNemar test of the two on the same prompts, two-sided, adjusted over the distances by Holm.
    """

    distance: int
    shown: Estimate
    own: Estimate
    gain: Estimate
    p_holm: float

    @property
    def holds(self) -> bool:
        """Whether the later policy is shown to solve more than the resample."""
        return self.shown.n >= FEW and self.gain.value > 0 and self.p_holm < LEVEL


def premise(
    failed: Float[np.ndarray, " prompts"],
    own: Float[np.ndarray, " prompts"],
    later: Mapping[int, Float[np.ndarray, " prompts"]],
    rng: np.random.Generator,
    resamples: int = 1000,
) -> list[Premise]:
    """The premise at each distance (paper: Q; ours: the control, the tests).

    Args:
        failed: 1 where the policy fails in all its rollouts.
        own: 1 where it fails and a second sample of as many rollouts solves the prompt.
        later: By distance in policy steps, 1 where the policy fails and the later one solves the prompt in as many.
        rng: Source of the bootstrap.
        resamples: Bootstrap resamples over prompts.

    Returns:
        One record a distance, in ascending order.

    Raises:
        ValueError: Nothing failed, no later policy, or a prompt that counts as solved though it was not failed.
    """
    mask = failed > 0
    if not mask.any():
        raise ValueError(
            f"The policy fails none of the {len(failed)} prompts: there is nothing to guide. Take harder ones."
        )
    if not later:
        raise ValueError("No later policy to compare with; the premise needs a checkpoint of the policy's future.")
    for name, shown in {"own": own, **later}.items():
        if bool((shown[~mask] > 0).any()):
            raise ValueError(f"{name}: a prompt counts as solved that the policy did not fail; mask it by `failed`.")
    mine = own[mask] > 0
    rows: list[tuple[int, Estimate, Estimate, Estimate]] = []
    p_values: list[float] = []
    for distance in sorted(later):
        theirs = later[distance][mask] > 0
        difference = theirs.astype(float) - mine
        gain = (
            bootstrap_interval(difference, np.mean, rng, resamples=resamples)
            if len(difference) > 1
            else Estimate(float(difference[0]), -1.0, 1.0, 1)
        )
        rows.append((distance, _share(theirs), _share(mine), gain))
        p_values.append(mcnemar_exact(int((theirs & ~mine).sum()), int((mine & ~theirs).sum())))
    return [Premise(*row, float(p)) for row, p in zip(rows, holm(np.array(p_values)), strict=True)]


def best(found: list[Premise]) -> Premise:
    """The distance that solves most beyond the resample; the nearest of equal ones."""
    return max(found, key=lambda one: (one.gain.value, -one.distance))


def in_words(found: list[Premise], rollouts: int) -> str:
    """The premise as one sentence, for the best distance.

    Args:
        found: From `premise`.
        rollouts: Rollouts a prompt and policy.
    """
    one = best(found)
    if one.shown.n < FEW:
        return (
            f"Only {one.shown.n} prompts are failed in {rollouts} rollouts: too few to tell whether the premise holds. "
            "Take more or harder prompts."
        )
    begin = (
        f"Guides from Δ = {one.distance} solve {one.shown.value:.2f} ({one.shown.low:.2f} to {one.shown.high:.2f}) of "
        f"the {one.shown.n} prompts that the policy fails in {rollouts} rollouts, its own resample {one.own.value:.2f} "
        f"({one.own.low:.2f} to {one.own.high:.2f})"
    )
    if one.holds:
        return f"{begin}: the premise holds."
    return f"{begin}: the premise is not shown (p {one.p_holm:.2g} by Holm). Do not expect a gain from the near future."


def _share(solved: np.ndarray) -> Estimate:
    found = scipy.stats.binomtest(int(solved.sum()), len(solved)).proportion_ci(method="wilson")
    return Estimate(float(solved.mean()), float(found.low), float(found.high), len(solved))
