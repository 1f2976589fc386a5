"""Importance ratios of guide tokens: four ways to weight them, the gradient of each, and how far guide and policy lie.

A guide was sampled from a behaviour policy q (a later checkpoint, a teacher, a past self) and is put into the update of
the policy pi. Its importance ratio is rho = pi / q, per token. Everything is computed from log-probabilities in nats,
in at least float32. Log ratios of hundreds of nats, far outside the range of a float's exponential, give finite
results.

| mode | weight of a token | gradient coefficient c | who |
|---|---|---|---|
| `current` | 1 | 1 | q taken as the current policy: NPO's ablation, the package's default |
| `exact` | rho | rho | NPO's objective (paper), before the clip |
| `truncated` | min(rho, truncation), held constant | min(rho, truncation) | truncated importance sampling (ours) |
| `shaped` | rho / (rho + gamma) | gamma rho / (rho + gamma)^2 | LUFFY, ExGRPO |
"""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

RatioMode = Literal["current", "exact", "truncated", "shaped"]
"""Type of a ratio mode's name."""

RATIO_MODES: tuple[str, ...] = get_args(RatioMode)
"""Names of the ratio modes, in the order of the module's table."""

MAX_LOG_WEIGHT = 20.0
"""Nats at which the coefficient of mode `exact` saturates (ours): e^20 = 4.9e8, which times an advantage is finite."""


def gradient_weight(
    policy_logps: Float[Tensor, "batch tokens"],
    behaviour_logps: Float[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
    mode: RatioMode,
    *,
    truncation: float = 2.0,
    gamma: float = 0.1,
) -> Float[Tensor, "batch tokens"]:
    """The coefficient c for which the gradient of `weight * A` is `c * A * grad log pi`, token by token, detached.

    `current`: 1. `exact`: rho, saturating at e^20 (`MAX_LOG_WEIGHT`). `truncated`: min(rho, truncation), the weight
    being a constant that is not differentiated through. `shaped`: gamma rho / (rho + gamma)^2, which is f'(rho) rho for
    LUFFY's f(x) = x / (x + gamma); it is largest, 1/4, at rho = gamma, and vanishes for likely and for very unlikely
    tokens.

    A trainer that gives guide tokens the ratio 1 and the advantage `A * c` obtains the gradient of each mode, and no
    clip binds.

    Args:
        policy_logps: `[batch, tokens]`, log pi of the tokens under the policy, nats.
        behaviour_logps: `[batch, tokens]`, log q of the same tokens when they were sampled, nats. Zeros for LUFFY,
            whose published code takes q as 1. Mode `current` reads its values only to refuse non-finite ones.
        mask: `[batch, tokens]`, True on response tokens. Values elsewhere are never used, NaN included.
        mode: one of `RATIO_MODES`; see the module's table. The default of the package, `"current"`, is the ablation
            that the paper finds about equal to `"exact"`.
        truncation: largest weight of mode `truncated`, > 0 (ours).
        gamma: constant of mode `shaped`, > 0; 0.1 in LUFFY's and ExGRPO's code.

    Returns:
        `[batch, tokens]`, dimensionless, >= 0, finite, at least float32; 0 where `mask` is False.

    Raises:
        ValueError: if `mode` is unknown, a constant is not a positive finite number, the shapes differ or are not
            two-dimensional, or a log-probability under the mask is not finite.
    """
    delta = _log_difference(policy_logps.detach(), behaviour_logps.detach(), mask, mode, truncation, gamma)
    if mode == "current":
        weight = torch.ones_like(delta)
    elif mode == "exact":
        weight = delta.clamp(max=MAX_LOG_WEIGHT).exp()
    elif mode == "truncated":
        weight = delta.clamp(max=math.log(truncation)).exp()
    else:
        centred = delta - math.log(gamma)
        weight = centred.sigmoid() * (-centred).sigmoid()
    return torch.where(mask, weight, 0.0)


def _check_tensors(policy_logps: Tensor, behaviour_logps: Tensor, mask: Tensor) -> None:
    # Without runtime shape checks, a one-dimensional or transposed argument would broadcast into a wrong answer.
    shapes = [tuple(tensor.shape) for tensor in (policy_logps, behaviour_logps, mask)]
    if mask.ndim != 2 or len(set(shapes)) != 1 or mask.dtype != torch.bool:
        raise ValueError(
            f"shapes of policy, behaviour and mask are {shapes}, the mask's dtype {mask.dtype}; all three must be the "
            "same [batch, tokens], the mask bool: pad the rows to one width."
        )
    finite = policy_logps.isfinite() & behaviour_logps.isfinite()
    if not bool((finite | ~mask).all()):
        row, token = (mask & ~finite).nonzero()[0].tolist()
        raise ValueError(
            f"log-probability of row {row}, token {token} is not finite (policy {policy_logps[row, token].item()}, "
            f"behaviour {behaviour_logps[row, token].item()}); finite values are needed under the mask: check for a "
            "diverged policy, and that mask and log-probabilities are aligned."
        )


def _log_difference(
    policy_logps: Tensor, behaviour_logps: Tensor, mask: Tensor, mode: str, truncation: float, gamma: float
) -> Tensor:
    """log pi - log q in at least float32, 0 where masked out, after the checks that all modes share."""
    if mode not in RATIO_MODES:
        raise ValueError(f"mode is {mode!r}; allowed are {', '.join(RATIO_MODES)}.")
    for name, value in (("truncation", truncation), ("gamma", gamma)):
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name} is {value}; a positive finite number is needed, 2.0 and 0.1 are the defaults.")
    _check_tensors(policy_logps, behaviour_logps, mask)
    dtype = torch.promote_types(torch.promote_types(policy_logps.dtype, behaviour_logps.dtype), torch.float32)
    return torch.where(mask, policy_logps.to(dtype) - behaviour_logps.to(dtype), 0.0)
