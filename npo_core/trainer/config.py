"""NPOConfig: the arguments of NPOTrainer."""

from dataclasses import dataclass, field
from typing import Literal

from trl import GRPOConfig


@dataclass
class NPOConfig(GRPOConfig):
    r"""GRPOConfig with NPO's settings.

    Args:
        tau_gate (`float`, *optional*, defaults to `0.6`): A group is gated when its on-policy pass rate, over all n
            rollouts, is at most this. In [0, 1]. Paper.
        ratio_mode (`str`, *optional*, defaults to `"current"`): Importance ratio of guide tokens. `"current"`: the
            guide counts as sampled from the policy that sampled the batch (ratio 1 at the first update; paper's
            default). `"exact"`: π_θ/q with the guide's stored log-probs q, clipped like every other ratio. Paper.
            `"truncated"`: min(π_θ/q, ratio_truncation) as a constant weight, not clipped. Ours. `"shaped"`:
            x/(x+ratio_gamma) with x = π_θ/q, not clipped. LUFFY.
        ratio_truncation (`float`, *optional*, defaults to `2.0`): Largest weight in mode truncated. Ours.
        ratio_gamma (`float`, *optional*, defaults to `0.1`): γ in mode shaped. LUFFY.
        guide_behaviour (`str`, *optional*, defaults to `"stored"`): Probability q of the guide's tokens in its ratio:
            `"stored"` as sampled, `"one"` for q = 1, a teacher whose probabilities are not known (LUFFY).
        placement (`str`, *optional*, defaults to `"replace"`): `"replace"`: guides take the last slots of the n
            rollouts. Paper. `"append"`: a group has `num_generations` rows of which the last `guides_per_group` are
            kept for guides; where there is no guide they stay empty and carry no gradient. RLEP.
        guides_per_group (`int`, *optional*, defaults to `1`): Guides in a guided group. Paper; RLEP: 2.
    """

    tau_gate: float = field(default=0.6, metadata={"help": "Gate: largest on-policy pass rate of a guided group."})
    ratio_mode: Literal["current", "exact", "truncated", "shaped"] = field(
        default="current", metadata={"help": "Importance ratio of guide tokens."}
    )
    ratio_truncation: float = field(default=2.0, metadata={"help": "Largest weight in ratio mode truncated."})
    ratio_gamma: float = field(default=0.1, metadata={"help": "γ of x/(x+γ) in ratio mode shaped."})
    guide_behaviour: Literal["stored", "one"] = field(
        default="stored", metadata={"help": "Probability of the guide's tokens in its ratio."}
    )
    placement: Literal["replace", "append"] = field(
        default="replace", metadata={"help": "Guides replace the last rollouts, or are appended to them."}
    )
    guides_per_group: int = field(default=1, metadata={"help": "Guides in a guided group."})

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.tau_gate <= 1:
            raise ValueError(f"tau_gate is {self.tau_gate}; a pass rate lies in [0, 1].")
        for name, allowed in (
            ("ratio_mode", ("current", "exact", "truncated", "shaped")),
            ("guide_behaviour", ("stored", "one")),
            ("placement", ("replace", "append")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}.")
        own = self.num_generations - (self.guides_per_group if self.placement == "append" else 0)
        if not 1 <= self.guides_per_group < self.num_generations or own < 2:
            raise ValueError(
                f"guides_per_group is {self.guides_per_group} with num_generations = {self.num_generations}, placement "
                f"{self.placement}; at least one guide, and rollouts of the policy to compare it with, must fit."
            )
        # both give each guide token a weight of its own, which a ratio of the whole sequence would mix up
        by_sequence = self.importance_sampling_level == "sequence" or self.loss_type in ("luspo", "vespo")
        if self.ratio_mode in ("truncated", "shaped") and by_sequence:
            raise ValueError(
                f"ratio_mode {self.ratio_mode!r} weights token by token; importance_sampling_level "
                f"{self.importance_sampling_level!r} with loss_type {self.loss_type!r} takes one ratio for a whole "
                "response. Use ratio_mode 'current' or 'exact', or importance_sampling_level 'token' with another loss."
            )
        for name in ("ratio_truncation", "ratio_gamma"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0.")
