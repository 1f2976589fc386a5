"""Definitions in their plainest form, against which tests hold what the library computes in parts or folds away."""

import math

import torch
from torch.nn.functional import logsigmoid


def signal_quality(source_correct: torch.Tensor, policy_correct: torch.Tensor) -> tuple[float, int]:
    """Q from verdicts, prompts × rollouts each: of the prompts with no correct rollout of the policy, the share with a
    correct one of the source; and the number of those prompts."""
    failed = ~policy_correct.any(dim=1)
    return int(source_correct[failed].any(dim=1).sum()) / int(failed.sum()), int(failed.sum())


def variance_cost(policy_logps, source_logps, mask, proxy: str, *, c: float = 1.0, direction: str = "source") -> float:
    """V from padded log-probs, rows × tokens, of tokens that `direction` sampled: the mean of w, W, or e^(c·KL)."""
    log_weight = policy_logps.double() - source_logps.double()
    if proxy == "kl":
        sign = 1.0 if direction == "policy" else -1.0
        return math.exp(c * max(sign * float(log_weight[mask].mean()), 0.0))
    samples = log_weight[mask]
    if proxy == "sequence":
        samples = torch.where(mask, log_weight, 0.0).sum(dim=1)[mask.any(dim=1)]
    return max(float(((1.0 if direction == "policy" else 2.0) * samples).exp().mean()), 1.0)


def gradient_variance(per_sample_gradients: torch.Tensor) -> float:
    """Trace of the unbiased sample covariance of gradients, batch × params."""
    return float(per_sample_gradients.double().var(dim=0, correction=1).sum())


def log_ratio(policy_logps, behaviour_logps, mode: str, *, truncation: float = 2.0, gamma: float = 0.1):
    """Logarithm of a token's importance weight, whose exponential autograd may differentiate in `policy_logps`.

    A truncated weight is a constant in front of log π, so a token above the truncation keeps its gradient.
    """
    delta = policy_logps - behaviour_logps
    gradient_only = delta - delta.detach()
    return {
        "current": gradient_only,
        "exact": delta,
        "truncated": gradient_only + delta.detach().clamp(max=math.log(truncation)),
        "shaped": logsigmoid(delta - math.log(gamma)),
    }[mode]
