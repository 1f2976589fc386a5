"""Estimates over seeds as the figures of the evidence study write them."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np

from ..method.stats import mean_interval
from ..study.clocks import reference
from ..study.families import REFERENCES
from ..study.results import Evidence

FAR = 4
"""Multiple of the median distance that an arm's seeds reach, beyond which one is written at the edge."""
LONGEST = 1.5
"""How far an interval is drawn, as a multiple of the farthest seed: of two seeds it can be ten times as long."""


def require_arms(evidence: Evidence, *arms: str) -> None:
    """Refuse an evidence that lacks one of the arms, and name those that it lacks."""
    missing = [arm for arm in arms if arm not in evidence.arms]
    if missing:
        raise ValueError(f"The evidence lacks {quoted(missing)}; `python -m npo_core study` runs what is missing.")


def quoted(names: Sequence[str]) -> str:
    """Names in quotation marks, as some of them hold a comma."""
    return ", ".join(f'"{name}"' for name in names)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean with the ends of its 95 % t interval; NaN for what too few values do not give."""
    if len(values) < 2:
        return float(values[0]) if len(values) else np.nan, np.nan, np.nan
    found = mean_interval(values)
    return found.value, found.low, found.high


def signed(value: float, digits: int) -> str:
    """ "+0.012" or "−0.012", with a true minus; zero has no sign."""
    shown = round(value, digits) + 0.0  # what rounds to zero is zero, and has no sign
    return f"{shown:{'+' if shown else ''}.{digits}f}".replace("-", "−")


def difference_text(values: np.ndarray) -> str:
    """ "+0.012 [−0.003, +0.027]" of one difference per seed; "no seed" without any."""
    mean, low, high = interval(values)
    if np.isnan(mean):
        return "no seed"
    ends = "" if np.isnan(low) else f" [{signed(low, 3)}, {signed(high, 3)}]"
    return signed(mean, 3) + ends


def axis_of(found: Mapping[str, Mapping[str, np.ndarray]]) -> tuple[tuple[float, float], set[str]]:
    """Ends of the axis of differences, and arms that reach so far that the others would not be told apart.

    Args:
        found: By arm and clock, a difference per seed.
    """
    seeds = {arm: np.concatenate([[0.0], *row.values()]) for arm, row in found.items()}
    farthest = {arm: np.abs(values).max() for arm, values in seeds.items()}
    typical = np.median(list(farthest.values()))
    far = {arm for arm, end in farthest.items() if end > FAR * typical > 0}
    near = [arm for arm in found if arm not in far]
    longest = LONGEST * max(farthest[arm] for arm in near)
    bars = [end for arm in near for values in found[arm].values() for end in interval(values)[1:]]
    shown = np.concatenate([*(seeds[arm] for arm in near), np.clip(bars, -longest, longest)])
    low, high = np.nanmin(shown), np.nanmax(shown)
    margin = 0.05 * (high - low) or 0.01
    return (low - margin, high + margin), far


def reference_note(evidence: Evidence, arms: Sequence[str], width: int = 90) -> str:
    """What arms are held against at equal total rollouts, the most frequent first; "" where nothing is there for it."""
    there = set(REFERENCES["rollouts"]) & set(evidence.arms)
    held: dict[str, list[str]] = {}
    for arm in arms if there else ():
        held.setdefault(reference(evidence, arm, "rollouts"), []).append(arm)
    if not held:
        return ""
    most, *others = sorted(held, key=lambda name: -len(held[name]))
    told = [f"at equal total rollouts: minus “{most}”", *(f"{quoted(held[name])}: minus “{name}”" for name in others)]
    return "\n" + textwrap.fill("; ".join(told), width, break_on_hyphens=False)
