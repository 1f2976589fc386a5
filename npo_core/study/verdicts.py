"""A row of the table of verdicts, and the rules that decide it; `claims.py` and `signal_claims.py` fill them in.

The rules are in docs/evidence.md, written before the runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .clocks import Compared
from .differences import Difference
from .families import AT_CLOCK, EQUAL

REPRODUCED, OTHER_WAY, ABOUT_EQUAL, NOT_SHOWN = "reproduced", "the other way", "about equal", "not shown"
PARTLY, NOT, FEW, UNMEASURED = "partly", "not reproduced", "too few seeds", "not measured"
NOT_COMPARABLE = "not comparable"

ORDER = (REPRODUCED, OTHER_WAY, ABOUT_EQUAL, NOT_SHOWN, NOT_COMPARABLE, FEW)
"""Verdicts in the order in which a summary names them."""

STUDY, SIGNAL = "make study", "python -m npo_core signal-study"


@dataclass(frozen=True)
class Claim:
    """One row of the table: a claim on one clock.

    Attributes:
        name: Short name.
        claim: What is claimed.
        paper: The paper's figure.
        clock: Clock that is held equal, of `families.CLOCKS`; "" where none is.
        ours: Ours, in words.
        verdict: One of the words above; of a family whose pairs differ, how many have which.
        grounds: What decided it.
        command: What makes the numbers.
        numbers: The differences behind it, each with its own "verdict" where the claim is a family.
    """

    name: str
    claim: str
    paper: str
    clock: str
    ours: str
    verdict: str
    grounds: str
    command: str
    numbers: Sequence[Mapping[str, Any]] = ()


def verdict_of(low: float | None, high: float | None, p_holm: float | None, margin: float = 0.0) -> str:
    """The rule of the plan for one difference of test pass rates.

    Args:
        low: Lower end of its 95 % interval, None with fewer than two seeds.
        high: Upper end.
        p_holm: Its p after Holm's adjustment over the family; None where there is no family: the interval decides.
        margin: What the claim says that it exceeds.
    """
    if low is None or high is None:
        return FEW
    if low > margin and (p_holm is None or p_holm < 0.05):
        return REPRODUCED
    if high < margin:
        return OTHER_WAY
    return ABOUT_EQUAL if low >= -EQUAL and high <= EQUAL else NOT_SHOWN


def verdict(one: Compared) -> str:
    """`verdict_of` a compared pair; "about equal" is said of test pass rates alone, and of no policy nothing at all."""
    if one.too_early:
        return NOT_COMPARABLE
    word = verdict_of(one.found.low, one.found.high, one.p_holm, one.pair.margin)
    return NOT_SHOWN if word == ABOUT_EQUAL and one.found.measure != "pass_rate" else word


def summary(words: Mapping[str, str]) -> str:
    """Verdicts of pairs as one: the word that all share, or how many have which and who they are."""
    kinds = [word for word in ORDER if word in words.values()]
    if len(kinds) == 1:
        return kinds[0]
    parts = []
    for kind in kinds:
        names = [name for name, word in words.items() if word == kind]
        parts.append(f"{kind}: {', '.join(names)}")
    return "; ".join(parts)


def in_words(compared: Sequence[Compared]) -> str:
    """Differences with their intervals, and the number of seeds where it is not that of the first."""
    seeds, told = max((one.found.seeds for one in compared), default=0), []
    for one in compared:
        found, text = one.found, one.found.text
        if one.too_early:
            text = f"{one.too_early} has no policy yet at that many {AT_CLOCK[found.clock]}"
        elif found.seeds < seeds:
            text += f", {found.seeds} seeds"
        told.append(f"{found.arm} − {found.against}: {text}")
    return "; ".join(told)


def powers(found: Sequence[Difference]) -> str:
    """What each comparison would have found with probability 0.8."""
    known = [entry for entry in found if entry.detectable is not None]
    if not known:
        return "no interval with fewer than two seeds"
    others = {entry.against for entry in known}
    names = [entry.arm if len(others) == 1 else f"{entry.arm} − {entry.against}" for entry in known]
    return "found with power 0.8 if at least: " + ", ".join(
        f"{name} {entry.detectable:.3f}" for name, entry in zip(names, known, strict=True)
    )
