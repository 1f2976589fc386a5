"""A row of the table of verdicts, and the rules that decide it; `claims.py` and `signal_claims.py` fill them in.

The rules are in docs/evidence.md, with the date of each and what was known by then.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .comparisons import Difference

REPRODUCED, PARTLY, NOT, FEW = "reproduced", "partly", "not reproduced", "too few seeds"
UNMEASURED = "not measured"

STUDY, SIGNAL = "make study", "python -m npo_core signal"


@dataclass(frozen=True)
class Claim:
    """One row of the table.

    Attributes:
        name: Short name.
        claim: What the paper says.
        paper: Its figure.
        compute: Ours at equal compute, in words.
        policy: Ours at equal policy step, in words.
        verdict: "reproduced", "partly", "not reproduced", "too few seeds" or "not measured".
        grounds: What decided it.
        command: What makes the numbers.
        numbers: The differences behind it.
        opposite: Deciding differences whose interval lies on the other side of zero, as "arm − other".
    """

    name: str
    claim: str
    paper: str
    compute: str
    policy: str
    verdict: str
    grounds: str
    command: str
    numbers: Sequence[Mapping[str, Any]] = ()
    opposite: Sequence[str] = ()


def side(found: Difference) -> int | None:
    """1 when the interval lies above zero, −1 below, 0 when it holds zero, None without an interval."""
    if found.low is None or found.high is None:
        return None
    return int(found.low > 0) - int(found.high < 0)


def verdict_of(compute: Sequence[Difference], policy: Sequence[Difference] = ()) -> str:
    """The rule of the plan: reproduced at equal compute, partly on one clock or for a part of the claim, else not."""
    sides = [side(found) for found in compute]
    if not sides or any(value is None for value in sides):
        return FEW
    if all(value == 1 for value in sides):
        return REPRODUCED
    return PARTLY if 1 in [*sides, *(side(found) for found in policy)] else NOT


def opposite_of(found: Sequence[Difference]) -> list[str]:
    """The differences that lie on the other side, by name."""
    return [f"{entry.arm} − {entry.against}" for entry in found if side(entry) == -1]


def in_words(found: Sequence[Difference]) -> str:
    """Differences with their intervals, and the number of seeds where it is not that of the first."""
    seeds = max((entry.seeds for entry in found), default=0)
    few = {entry: f", {entry.seeds} seeds" if entry.seeds < seeds else "" for entry in found}
    return "; ".join(f"{entry.arm} − {entry.against}: {entry.text}{few[entry]}" for entry in found)


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


def numbers(*groups: Sequence[Difference]) -> list[dict[str, Any]]:
    """Differences as they are written to `claims.json`."""
    return [asdict(entry) for group in groups for entry in group]
