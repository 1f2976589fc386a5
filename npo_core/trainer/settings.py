"""Settings of the guided step, declared once: `NPOConfig` and `RunConfig` are made of them. Light to import."""

from typing import Literal

from ..declaration import COUNT, POSITIVE, SHARE, Bounds, Setting

GROUP = "Guidance"

RatioMode = Literal["current", "exact", "truncated", "shaped"]
GuideBehaviour = Literal["stored", "one"]
Placement = Literal["replace", "append"]

TAU_GATE = Setting(
    0.6, "A group is gated when its on-policy pass rate is at most this.", GROUP, "paper", SHARE, acts="guidance"
)
RATIO_MODE = Setting("current", "Importance ratio of the guide slot.", GROUP, "paper", acts="guidance")
RATIO_TRUNCATION = Setting(2.0, "Largest weight in ratio mode truncated.", GROUP, bounds=POSITIVE, acts="guidance")
RATIO_GAMMA = Setting(0.1, "γ of x/(x+γ) in ratio mode shaped.", GROUP, "paper", POSITIVE, acts="guidance")
GUIDE_BEHAVIOUR = Setting(
    "stored",
    "Probability of the guide's tokens in its ratio: as sampled, or 1 (LUFFY).",
    GROUP,
    "paper",
    acts="guidance",
)
PLACEMENT = Setting(
    "replace", "Guides take the last slots of a group, or are appended to its n rollouts (RLEP).", GROUP, "paper"
)
GUIDES_PER_GROUP = Setting(1, "Guides in a guided group.", GROUP, "paper", COUNT)
GUIDE_PREFIX = Setting(
    1.0,
    "Share of a guide's tokens that is given, the policy going on from there; 1 gives whole guides.",
    GROUP,
    bounds=Bounds(0, 1, low_open=True),
    acts="guidance",
)
MASK_UNSAMPLED = Setting(
    True,
    "Leave tokens that are never sampled, that of a picture, out of the trained distribution.",
    GROUP,
    later=True,
    before=False,
)
