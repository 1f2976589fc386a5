"""What the study compares: each claim with its pairs of arms and the clocks that it is decided on.

This is the table of docs/evidence.md as data; `clocks.py` says what a clock holds equal, `claims.py` decides. The
scores that a clock needs on the way are made from it too (`cells.py`).
"""

from dataclasses import dataclass

CLOCKS = ("policy", "compute", "rollouts")
"""Policy step (the paper's), compute steps, total rollouts."""

AT_CLOCK = {"policy": "policy step", "compute": "compute steps", "rollouts": "total rollouts"}
"""What each clock holds equal, in words."""

AXES = {"policy": "policy_step", "compute": "compute_step", "rollouts": "rollouts"}
"""Column of the scores that a clock counts in."""

COUNTED = {"policy": "policy_steps", "compute": "compute_steps", "rollouts": "rollouts"}
"""What a run as a whole has counted on a clock, by its name in `result.json`."""

REFERENCES = {"policy": ("GRPO",), "compute": ("GRPO",), "rollouts": ("GRPO, longer", "GRPO, groups of 16")}
"""GRPO runs that an arm is held against on each clock; of several the better one by its mean over the seeds."""

EQUAL = 0.01
"""Largest difference in test pass rate that counts as about equal."""


@dataclass(frozen=True)
class Pair:
    """One comparison.

    Attributes:
        arm: Arm.
        against: What it is compared with; None: the reference of the clock.
        margin: What the difference must exceed to be as claimed; below zero for "at least as good".
    """

    arm: str
    against: str | None = None
    margin: float = 0.0


@dataclass(frozen=True)
class Family:
    """A claim that pairs of arms decide; Holm's adjustment is over its pairs, on each clock by itself.

    Attributes:
        name: Short name.
        claim: What is claimed.
        paper: The paper's figure for it, or that it has none.
        pairs: Comparisons.
        clocks: Clocks that it is decided on, of `CLOCKS`.
        measure: What is compared: "pass_rate" (test) or "entropy" (on-policy, last 20 steps).
    """

    name: str
    claim: str
    paper: str
    pairs: tuple[Pair, ...]
    clocks: tuple[str, ...] = ("compute",)
    measure: str = "pass_rate"


OURS = "not in the paper"
GUIDED = ("NPO early", "NPO, first steps", "NPO late", "NPO", "NPO, repeated", "AutoNPO")
FIRST_TRIED = ("GRPO, groups of 16", "GRPO, entropy bonus", "GRPO, best rate")

FAMILIES = (
    Family(
        "guidance pays",
        "Guidance by the near future ends above GRPO",
        "+1.87 (early), +2.59 (early and late), +2.90 points (AutoNPO) at equal policy step, one run",
        tuple(Pair(arm) for arm in GUIDED),
        CLOCKS,
    ),
    Family(
        "the future is what pays",
        "A guide from the future is worth more than the policy's own resample",
        OURS,
        (
            Pair("NPO", "NPO, own resample"),
            Pair("NPO, repeated", "NPO, repeated, own"),
            Pair("AutoNPO", "AutoNPO, own resample"),
        ),
    ),
    Family(
        "the guide is what pays",
        "The same roll-backs without a guide are worth less",
        OURS,
        (Pair("NPO", "NPO, no guide"), Pair("AutoNPO", "AutoNPO, no guide")),
    ),
    Family(
        "the roll-back is what pays",
        "Going back is worth more than a guide for the prompts ahead",
        OURS,
        (Pair("NPO, repeated", "NPO, no roll-back"),),
        ("compute", "rollouts"),
    ),
    Family(
        "better than what one tries first",
        "NPO is worth more than larger groups, an entropy bonus or a better learning rate",
        OURS,
        tuple(Pair(arm, other) for arm in ("NPO", "AutoNPO") for other in FIRST_TRIED),
        ("compute", "rollouts"),
    ),
    Family(
        "ordering",
        "AutoNPO ≥ NPO > RLEP, ExGRPO, LUFFY",
        "63.15 ≥ 62.84 > 61.48, 61.16, 58.68, one run",
        (Pair("AutoNPO", "NPO", -EQUAL), *(Pair("NPO", other) for other in ("RLEP", "ExGRPO", "LUFFY"))),
        CLOCKS,
    ),
    Family(
        "correction",
        "The importance correction is unnecessary for NPO and necessary for LUFFY",
        "figure 4c: NPO about equal, LUFFY collapses",
        (Pair("NPO", "NPO, exact ratio", -EQUAL), Pair("LUFFY", "LUFFY, no correction")),
    ),
    Family(
        "entropy",
        "Entropy stays higher than GRPO's",
        "figure 4b, no number",
        (Pair("NPO"), Pair("AutoNPO")),
        ("policy",),
        "entropy",
    ),
)
"""The families of docs/evidence.md; speed-up, overhead and the signal have rules of their own in `claims.py`."""


def compared_on(clock: str) -> set[tuple[str, str]]:
    """Pairs of arms, each without order, that some family compares on a clock; those with its references excluded."""
    pairs = (pair for family in FAMILIES if clock in family.clocks for pair in family.pairs)
    return {(pair.arm, pair.against) for pair in pairs if pair.against is not None}


def needed_arms() -> tuple[str, ...]:
    """Arms without which the claims cannot be decided, in the order in which families name them."""
    named = [one for family in FAMILIES for pair in family.pairs for one in (pair.arm, pair.against) if one is not None]
    return tuple(dict.fromkeys(["GRPO", *REFERENCES["rollouts"], *named]))
