"""NPOConfig: the arguments of NPOTrainer, and what its model card cites."""

import copy
from dataclasses import dataclass, fields
from typing import Any

from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportPrivateImportUsage] (TRL loads its names late)
from trl.trainer.utils import get_config_model_id

from ..declaration import check_declared
from . import settings as declared
from .settings import GuideBehaviour, Placement, RatioMode

PAPER = {
    "title": "Near-Future Policy Optimization",
    "id": "2604.20733",
    "citation": """\
@misc{npo2026,
    title         = {{Near-Future Policy Optimization}},
    year          = 2026,
    eprint        = {2604.20733},
    archivePrefix = {arXiv}
}

"""
    + GRPOTrainer._paper["citation"].strip(),
}
"""What TRL's model card says of a policy that NPOTrainer trained; NPO is a form of GRPO, which is cited beside it."""


@dataclass
class NPOConfig(GRPOConfig):
    r"""GRPOConfig with NPO's settings; default, bounds and source of each are declared in `trainer/settings.py`.

    Args:
        tau_gate (`float`, *optional*): A group is gated when its on-policy pass rate, over all n rollouts, is at most
            this.
        ratio_mode (`str`, *optional*): Importance ratio of guide tokens. `"current"`: the guide counts as sampled from
            the policy that sampled the batch (ratio 1 at the first update; paper's default). `"exact"`: π_θ/q with the
            guide's stored log-probs q, clipped like every other ratio. Paper. `"truncated"`: min(π_θ/q,
            ratio_truncation) as a constant weight, not clipped. Ours. `"shaped"`: x/(x+ratio_gamma) with x = π_θ/q, not
            clipped. LUFFY.
        ratio_truncation (`float`, *optional*): Largest weight in mode truncated.
        ratio_gamma (`float`, *optional*): γ in mode shaped.
        guide_behaviour (`str`, *optional*): Probability q of the guide's tokens in its ratio: `"stored"` as sampled,
            `"one"` for q = 1, a teacher whose probabilities are not known.
        placement (`str`, *optional*): `"replace"`: guides take the last slots of the n rollouts. `"append"`: a group
            has `num_generations` rows of which the last `guides_per_group` are kept for guides; where there is no guide
            they stay empty and carry no gradient.
        guides_per_group (`int`, *optional*): Guides in a guided group.
        guide_prefix (`float`, *optional*): Share of a guide's tokens that is given; the policy goes on from there, and
            what it was given is not trained on. 1 gives whole guides, as in the paper. PrefixRL, POPE.
        mask_unsampled (`bool`, *optional*): Leave the tokens that sampling never draws (the token of a picture, what
            `suppress_tokens` names) out of the distribution of the loss, so that the policy that is trained is the one
            that is sampled. False as TRL has it; then give what is scored off line `unsampled=()`. Ours.
    """

    tau_gate: float = declared.TAU_GATE.field()
    ratio_mode: RatioMode = declared.RATIO_MODE.field()
    ratio_truncation: float = declared.RATIO_TRUNCATION.field()
    ratio_gamma: float = declared.RATIO_GAMMA.field()
    guide_behaviour: GuideBehaviour = declared.GUIDE_BEHAVIOUR.field()
    placement: Placement = declared.PLACEMENT.field()
    guides_per_group: int = declared.GUIDES_PER_GROUP.field()
    guide_prefix: float = declared.GUIDE_PREFIX.field()
    mask_unsampled: bool = declared.MASK_UNSAMPLED.field()

    def __post_init__(self):
        super().__post_init__()
        check_declared(self)
        assert self.num_generations is not None  # TRL has divided by it
        own = self.num_generations - (self.guides_per_group if self.placement == "append" else 0)
        if not 1 <= self.guides_per_group < self.num_generations or own < 2:
            raise ValueError(
                f"guides_per_group is {self.guides_per_group} with num_generations = {self.num_generations}, placement "
                f"{self.placement}; at least one guide, and rollouts of the policy to compare it with, must fit."
            )
        if self.guide_prefix < 1 and (self.use_vllm or self.ratio_mode != "current"):
            raise ValueError(
                f"guide_prefix is {self.guide_prefix} with use_vllm={self.use_vllm} and ratio_mode "
                f"{self.ratio_mode!r}; what follows a prefix is sampled by transformers and is the policy's own, whose "
                "ratio no mode changes: set use_vllm=False and ratio_mode='current', or guide_prefix=1."
            )
        # both give each guide token a weight of its own, which a ratio of the whole sequence would mix up
        by_sequence = self.importance_sampling_level == "sequence" or self.loss_type in ("luspo", "vespo")
        if self.ratio_mode in ("truncated", "shaped") and by_sequence:
            raise ValueError(
                f"ratio_mode {self.ratio_mode!r} weights token by token; importance_sampling_level "
                f"{self.importance_sampling_level!r} with loss_type {self.loss_type!r} takes one ratio for a whole "
                "response. Use ratio_mode 'current' or 'exact', or importance_sampling_level 'token' with another loss."
            )


def own_arguments(args: GRPOConfig | None, model: Any) -> NPOConfig:
    """Arguments of a trainer: those given, NPO's own at their defaults where they are plain GRPO's or none (ours).

    Args:
        args: What the trainer is given; left as it is.
        model: The policy, or its name or folder, which names the output folder where there are no arguments.

    Raises:
        TypeError: Arguments of another kind.
    """
    if isinstance(args, NPOConfig):
        return args
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return NPOConfig(f"{name.split('/')[-1]}-NPO")
    if type(args) is not GRPOConfig:
        raise TypeError(
            f"args is a {type(args).__name__}; NPOTrainer takes an NPOConfig or a GRPOConfig. A class of your own is "
            "derived from NPOConfig."
        )
    own = copy.copy(args)
    own.__class__ = NPOConfig
    for name in {each.name for each in fields(NPOConfig)} - {each.name for each in fields(GRPOConfig)}:
        setattr(own, name, NPOConfig.__dataclass_fields__[name].default)
    assert isinstance(own, NPOConfig)
    return own
