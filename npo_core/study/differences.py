"""The difference of two arms, paired by seed: mean, interval, test and power.

The arms of a seed share base policy, data order and test problems, so differences are paired. Intervals and tests are
over seeds.
"""

from dataclasses import dataclass

import pandas as pd

from ..method.stats import detectable_difference, mean_interval, paired_t_test, probability_of_improvement


@dataclass(frozen=True)
class Difference:
    """Mean difference of two arms over seeds.

    Attributes:
        arm: Arm.
        against: What it is compared with.
        clock: What is held equal, of `families.CLOCKS`.
        measure: What differs.
        value: Mean over seeds, None with no seed.
        low: Lower end of the 95 % t interval, None with fewer than two seeds.
        high: Upper end.
        p: Two-sided paired t test against the margin.
        seeds: Seeds that both arms finished.
        detectable: Difference that the test finds with probability 0.8.
        improvement: Probability that a run of the arm beats one of the other.
        margin: What the difference is tested against; 0 unless a claim says "at least as good".
    """

    arm: str
    against: str
    clock: str
    measure: str
    value: float | None
    low: float | None
    high: float | None
    p: float | None
    seeds: int
    detectable: float | None
    improvement: float | None
    margin: float = 0.0

    @property
    def text(self) -> str:
        """The difference in words for a table: mean and interval."""
        if self.value is None:
            return "–"
        interval = "" if self.low is None else f" ({_signed(self.low)} to {_signed(self.high)})"
        return f"{_signed(self.value)}{interval}"


def difference(
    arm: pd.Series,
    other: pd.Series,
    *,
    names: tuple[str, str],
    clock: str = "compute",
    measure: str = "test pass rate",
    margin: float = 0.0,
) -> Difference:
    """Difference of two arms, each a score by seed; seeds that one of them lacks are left out and not counted."""
    both = pd.concat([arm, other], axis=1, keys=["arm", "other"]).dropna()
    values = (both["arm"] - both["other"]).to_numpy(dtype=float)
    several = len(values) > 1
    estimate = mean_interval(values) if several else None
    return Difference(
        arm=names[0],
        against=names[1],
        clock=clock,
        measure=measure,
        value=float(values.mean()) if len(values) else None,
        low=estimate.low if estimate else None,
        high=estimate.high if estimate else None,
        p=paired_t_test(values - margin) if several else None,
        seeds=len(values),
        detectable=detectable_difference(values) if several else None,
        improvement=probability_of_improvement(*both.to_numpy(dtype=float).T) if len(values) else None,
        margin=margin,
    )


def _signed(value: float) -> str:
    """Three digits with a sign; what rounds to zero has none of its own."""
    return f"{round(value, 3) + 0.0:+.3f}"
