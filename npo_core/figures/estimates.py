"""Estimates over seeds as the figures of the evidence study write them."""

from collections.abc import Sequence

import numpy as np

from ..method.stats import mean_interval
from ..study.results import Evidence


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


def difference_text(values: np.ndarray, digits: int, between: str = " ") -> str:
    """ "+0.012 [−0.003, +0.027]" of one difference per seed; "no seed" without any."""
    mean, low, high = interval(values)
    if np.isnan(mean):
        return "no seed"
    ends = "" if np.isnan(low) else f"{between}[{signed(low, digits)}, {signed(high, digits)}]"
    return signed(mean, digits) + ends
