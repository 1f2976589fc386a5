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
import sys
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

RatioMode = Literal["current", "exact", "truncated", "shaped"]
"""Type of a ratio mode's name."""

RATIO_MODES: tuple[str, ...] = get_args(RatioMode)
"""Names of the ratio modes, in the order of the module's table."""

MAX_LOG_WEIGHT = 20.0
"""Nats at which the coefficient of mode `exact` saturates (ours): e^20 = 4.9e8, which times an advantage is finite."""


def log_ratio(
    policy_logps: Float[Tensor, "batch tokens"],
    behaviour_logps: Float[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
    mode: RatioMode,
    *,
    truncation: float = 2.0,
    gamma: float = 0.1,
) -> Float[Tensor, "batch tokens"]:
    """Logarithm of each token's importance weight, differentiable in `policy_logps`.

    In every mode the gradient of `exp(log_ratio)` is `gradient_weight` times the gradient of log pi (for `exact`, up to
    e^20). For `truncated` this means that the weight is a constant coefficient in front of log pi, as in truncated
    importance sampling: a token above the truncation keeps its gradient, with the coefficient `truncation`, whereas a
    differentiated minimum would drop it. For `exact`, `exp` of the result overflows in float32 above 88 nats;
    `gradient_weight` does not.

    Args:
        policy_logps: `[batch, tokens]`, log pi of the tokens under the policy, nats.
        behaviour_logps: `[batch, tokens]`, log q of the same tokens when they were sampled, nats. A constant: no
            gradient reaches it. Zeros for LUFFY, whose published code takes q as 1. Mode `current` does not read its
            values, except to refuse non-finite ones.
        mask: `[batch, tokens]`, True on response tokens. Values elsewhere are never used, NaN included.
        mode: one of `RATIO_MODES`; see the module's table. The default of the package, `"current"`, is the ablation
            that the paper finds about equal to `"exact"`.
        truncation: largest weight of mode `truncated`, > 0 (ours).
        gamma: constant of mode `shaped`, > 0; 0.1 in LUFFY's and ExGRPO's code.

    Returns:
        `[batch, tokens]`, nats, at least float32; 0 where `mask` is False.

    Raises:
        ValueError: if `mode` is unknown, a constant is not a positive finite number, the shapes differ or are not
            two-dimensional, or a log-probability under the mask is not finite.
    """
    delta = _log_difference(policy_logps, behaviour_logps.detach(), mask, mode, truncation, gamma)
    if mode == "exact":
        return delta
    if mode == "shaped":
        return torch.where(mask, logsigmoid(delta - math.log(gamma)), 0.0)
    gradient_only = delta - delta.detach()
    if mode == "current":
        return gradient_only
    # delta is 0 under the padding, which a truncation below 1 would turn into log(truncation).
    return gradient_only + torch.where(mask, delta.detach().clamp(max=math.log(truncation)), 0.0)


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
        policy_logps: `[batch, tokens]`, log pi, nats.
        behaviour_logps: `[batch, tokens]`, log q, nats.
        mask: `[batch, tokens]`, True on response tokens.
        mode: one of `RATIO_MODES`.
        truncation: as in `log_ratio`.
        gamma: as in `log_ratio`.

    Returns:
        `[batch, tokens]`, dimensionless, >= 0, finite, at least float32; 0 where `mask` is False.

    Raises:
        ValueError: as `log_ratio`.
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


@dataclass(frozen=True)
class RatioDiagnostics:
    """How far guide tokens, sampled from q, are from the policy pi. Plain finite floats; definitions are ours.

    With w = pi/q of a token and N tokens under the mask. Guides are filtered (only verified-correct ones are kept), so
    these numbers describe the guides that are used; they estimate divergences between pi and q without bias only for
    unfiltered samples. The two second-moment figures are token-wise and may be dominated by a few tokens.

    Attributes:
        token_kl: mean over tokens of log q - log pi, nats per token; estimates KL(q || pi). May be negative by sampling
            noise.
        sequence_kl: mean over sequences of the summed log q - log pi, nats per sequence. Rows without a token are left
            out.
        chi_square: sum(w^2) / N - 1, token weights; estimates chi^2(pi || q) = E_q[w^2] - 1. Saturates at the largest
            float.
        effective_sample_size: (sum w)^2 / sum(w^2) / N, a fraction in (0, 1]; 1 when all weights are equal.
        clip_fraction: fraction of tokens with w outside [1 - clip_low, 1 + clip_high].
        mean_ratio: sum(w) / N; 1 in expectation for unfiltered samples. Saturates at the largest float.
    """

    token_kl: float
    sequence_kl: float
    chi_square: float
    effective_sample_size: float
    clip_fraction: float
    mean_ratio: float


def diagnostics(
    policy_logps: Float[Tensor, "batch tokens"],
    behaviour_logps: Float[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> RatioDiagnostics:
    """Divergence, second moment and clipping of guide tokens, from the exact ratio whatever the mode used in training.

    Computed on the CPU in float64 and in log space.

    Args:
        policy_logps: `[batch, tokens]`, log pi, nats.
        behaviour_logps: `[batch, tokens]`, log q, nats; the tokens were sampled from q.
        mask: `[batch, tokens]`, True on response tokens; at least one.
        clip_low: lower clip range in [0, 1), 0.2 in the sister paper's recipe.
        clip_high: upper clip range >= 0, 0.28 in the sister paper's recipe.

    Returns:
        A `RatioDiagnostics`.

    Raises:
        ValueError: if no token is under the mask, a clip range is out of bounds, the shapes differ or are not
            two-dimensional, or a log-probability under the mask is not finite.
    """
    if not 0.0 <= clip_low < 1.0 or not 0.0 <= clip_high < math.inf:
        raise ValueError(
            f"clip_low is {clip_low} and clip_high {clip_high}; 0 <= clip_low < 1 and clip_high >= 0 are needed."
        )
    _check_tensors(policy_logps, behaviour_logps, mask)
    selected = mask.cpu()
    tokens = int(selected.sum())
    if tokens == 0:
        raise ValueError(
            "mask selects no token; at least one guide token is needed: skip diagnostics for unguided batches."
        )
    delta = policy_logps.detach().cpu().double() - behaviour_logps.detach().cpu().double()
    delta = torch.where(selected, delta, 0.0)
    rows = selected.any(dim=1)
    flat = delta[selected]
    log_sum = torch.logsumexp(flat, dim=0).item()
    log_sum_square = torch.logsumexp(2.0 * flat, dim=0).item()
    log_tokens = math.log(tokens)
    clipped = (flat < math.log1p(-clip_low)) | (flat > math.log1p(clip_high))
    return RatioDiagnostics(
        token_kl=-flat.mean().item(),
        sequence_kl=-delta.sum(dim=1)[rows].mean().item(),
        chi_square=_expm1(log_sum_square - log_tokens),
        effective_sample_size=min(1.0, math.exp(2.0 * log_sum - log_sum_square - log_tokens)),
        clip_fraction=clipped.double().mean().item(),
        mean_ratio=_expm1(log_sum - log_tokens) + 1.0,
    )


def _expm1(x: float) -> float:
    """e^x - 1, at most the largest float: a record must stay valid JSON, which has no infinity."""
    return math.expm1(x) if x < math.log(sys.float_info.max) else sys.float_info.max


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
