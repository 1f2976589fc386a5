"""What a measurement yields, by name: qualities Q, divergences, costs V, and signals S = Q/V.

The members of the enumerations are their own text, so they serve as columns of tables and keys of JSON; the text of a
signal is made here alone.
"""

from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from typing import Literal

Side = Literal["source", "policy"]
"""Which of the two policies sampled the tokens."""

Proxy = Literal["kl", "second_moment", "sequence"]
"""Estimator of the variance cost from log-probs alone."""

PROXIES: tuple[Proxy, ...] = ("kl", "second_moment", "sequence")
"""Names of the proxies."""


class Quality(StrEnum):
    """Q with k rollouts of the source per prompt, any correct one of which shows the prompt, and with one.

    The paper leaves the number open, and it decides how Q grows: a source that collapsed is better at one rollout and
    worse at many.
    """

    MANY = "quality"
    ONE = "quality_1"


class Divergence(StrEnum):
    """KL per token, nats: KL(q‖π) on the source's tokens, KL(π‖q) on the policy's."""

    OF_SOURCE = "token_kl"
    OF_POLICY = "token_kl_policy"


class Cost(StrEnum):
    """V: by a proxy that needs log-probs only, or as the measured variance of the weighted per-sample gradient.

    Proxies without suffix come from the source's tokens (KL(q‖π), E_q[w²], E_q[W²]), those ending in `_policy` from the
    policy's own (KL(π‖q), E_π[w], E_π[W], the latter two being the same moments over prefixes that π visits). Measured
    ones are in units of the on-policy variance, see `trainer/gradients.py`.
    """

    KL = "kl"
    KL_POLICY = "kl_policy"
    SECOND_MOMENT = "second_moment"
    SECOND_MOMENT_POLICY = "second_moment_policy"
    SEQUENCE = "sequence"
    SEQUENCE_POLICY = "sequence_policy"
    GRADIENT_CURRENT = "gradient_current"
    GRADIENT_EXACT = "gradient_exact"
    GRADIENT_SEQUENCE = "gradient_sequence"

    @property
    def measured(self) -> bool:
        """Whether it is a gradient's variance and no proxy."""
        return self in MEASURED_COSTS

    @property
    def proxy(self) -> Proxy:
        """Its estimator.

        Raises:
            ValueError: It is measured.
        """
        if self.measured:
            raise ValueError(f"{self} is measured; proxies are {', '.join(PROXY_COSTS)}.")
        return PROXIES[PROXY_COSTS.index(self) // 2]

    @property
    def side(self) -> Side:
        """Who sampled the tokens that a proxy is estimated from."""
        return "policy" if PROXY_COSTS.index(self) % 2 else "source"


PROXY_COSTS = tuple(Cost)[:6]
"""Costs that need log-probs only."""

MEASURED_COSTS = tuple(Cost)[6:]
"""Measured variances of the gradient: with weight 1 (ratio mode current), the token's w (exact), the sequence's W."""

ESTIMATES: tuple[Quality | Divergence | Cost, ...] = (*Quality, *Divergence, *Cost)
"""Everything that a pair of policies yields."""


@dataclass(frozen=True)
class Signal:
    """S = Q/V: which Q, over which V.

    Attributes:
        quality: Q.
        cost: V.
    """

    quality: Quality
    cost: Cost

    @property
    def name(self) -> str:
        """Its text in tables and summaries: "signal_kl" with Q of k rollouts, "signal_1_kl" with Q of one."""
        return f"{self.quality.replace('quality', 'signal')}_{self.cost}"


SIGNALS = tuple(Signal(quality, cost) for quality, cost in product(Quality, Cost))
"""All signals, those with Q of k rollouts first."""
