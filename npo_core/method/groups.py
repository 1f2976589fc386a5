"""Groups of rollouts: pass rate, gate, the slot a guide takes, and group-relative advantages.

A group is the `n` rollouts of one prompt. Rollouts are stored flat in the order of TRL's GRPOTrainer, so that rollout
`i` of group `g` is row `g * n + i` of a batch.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# A pass rate k/n is rarely exact in float32 (3/5 is 0.60000002), and `<= tau` must hold whenever it holds for the
# fractions.
_RATE_SLACK = 1e-6


def pass_rate(correct: Bool[Tensor, "groups n"]) -> Float[Tensor, " groups"]:
    """Fraction of each group's rollouts that the verifier accepts.

    The mean is over ALL `n` on-policy rollouts, the one that a guide will overwrite included (paper).

    Args:
        correct: `[groups, n]`, True where the rollout is verified correct.

    Returns:
        `[groups]`, float32, a fraction in [0, 1].

    Raises:
        ValueError: if `correct` is not a two-dimensional boolean tensor with at least one rollout a group.
    """
    if correct.ndim != 2 or correct.shape[1] == 0 or correct.dtype != torch.bool:
        raise ValueError(
            f"correct has shape {tuple(correct.shape)} and dtype {correct.dtype}; a bool tensor [groups, n] with "
            "n >= 1 is needed: reshape the flat verdicts with .view(-1, n)."
        )
    return correct.float().mean(dim=1)


def gate(
    pass_rate: Float[Tensor, " groups"], has_guide: Bool[Tensor, " groups"], tau: float = 0.6
) -> Bool[Tensor, " groups"]:
    """Which groups receive a guide: those with a pass rate of at most `tau` for which the cache holds a trajectory.

    The rule is the paper's; the value 0.6 comes from one reader's note. The bound is inclusive, and is compared with a
    slack of 1e-6 (ours), so that 3 of 5 passes `tau=0.6` whatever the rounding.

    Args:
        pass_rate: `[groups]`, fractions in [0, 1], from `pass_rate`.
        has_guide: `[groups]`, True where a verified-correct guide trajectory is cached for the prompt.
        tau: largest pass rate that is still guided, a fraction in [0, 1]. 1 guides every group that has a guide.

    Returns:
        `[groups]`, True where the last slot is to be replaced.

    Raises:
        ValueError: if `tau` or a pass rate is outside [0, 1], or if the two tensors differ in shape.
    """
    if not 0.0 <= tau <= 1.0:
        raise ValueError(
            f"tau is {tau}; it is a pass rate and must lie in [0, 1]. To guide no group, pass no guidance."
        )
    if pass_rate.shape != has_guide.shape or pass_rate.ndim != 1 or has_guide.dtype != torch.bool:
        raise ValueError(
            f"pass_rate has shape {tuple(pass_rate.shape)}, has_guide {tuple(has_guide.shape)} ({has_guide.dtype}); "
            "both must be [groups], the second bool: give one value per group, not per rollout."
        )
    if not bool(((pass_rate >= 0.0) & (pass_rate <= 1.0)).all()):
        raise ValueError(f"pass_rate holds {pass_rate.tolist()}; every value must lie in [0, 1]. Use groups.pass_rate.")
    return (pass_rate <= tau + _RATE_SLACK) & has_guide


def place_guides(
    gated: Bool[Tensor, " groups"], offered: Int[Tensor, " groups"], n: int, count: int = 1
) -> Int[Tensor, "guides 2"]:
    """Where guides go: guide i of a gated group takes the i-th of the group's last `count` slots.

    With one guide that is the last slot, row `g * n + n - 1` (paper). A group with fewer guides than `count` keeps its
    last slots as they are. The rule is the same for guides that replace rollouts and for guides that are appended to
    them (RLEP): then the last `count` slots of all groups are kept for guides, see `empty_places`.

    Args:
        gated: `[groups]`, from `gate`.
        offered: `[groups]`, number of guides that the source has for the prompt; what exceeds `count` is not used.
        n: rows per group, those of guides included.
        count: guides that a group takes at most (paper: 1; RLEP: 2).

    Returns:
        `[guides, 2]`, int64: row in the flat `[groups * n]` batch, ascending, and index of the guide in its group's
        offer. The group is `row // n`.

    Raises:
        ValueError: if `n` is below 2 or not above `count` (guides would leave no on-policy rollout to compare them
            with), or if the tensors are not one-dimensional and equally long, the first bool.
    """
    if not 1 <= count < n:
        raise ValueError(
            f"n is {n} and count {count}; a guided group needs 1 <= count < n, so that an on-policy rollout remains: "
            "raise num_generations."
        )
    if gated.ndim != 1 or gated.dtype != torch.bool or gated.shape != offered.shape:
        raise ValueError(
            f"gated has shape {tuple(gated.shape)} and dtype {gated.dtype}, offered {tuple(offered.shape)}; a bool "
            "tensor [groups] and a number for each group are needed: use groups.gate."
        )
    filled = gated.unsqueeze(1) & (torch.arange(count, device=gated.device) < offered.unsqueeze(1))
    group, guide = filled.nonzero(as_tuple=True)
    return torch.stack([group * n + (n - count) + guide, guide], dim=1)


def empty_places(guided: Int[Tensor, " guides"], groups: int, n: int, count: int) -> Int[Tensor, " rows"]:
    """Rows that are kept for appended guides, the last `count` of every group, and that no guide takes (RLEP).

    Args:
        guided: `[guides]`, rows that guides take.
        groups: groups in the batch.
        n: rows per group, those kept for guides included.
        count: rows of a group that are kept for guides; 0 where guides replace rollouts.

    Returns:
        `[rows]`, int64, ascending.
    """
    rows = torch.arange(groups * n, device=guided.device)
    return rows[(rows % n >= n - count) & ~torch.isin(rows, guided)]


def group_advantages(
    rewards: Float[Tensor, "groups n"], scale: Literal["group", "none"] = "group", eps: float = 1e-4
) -> Float[Tensor, "groups n"]:
    """Group-relative advantages: `(r - mean) / (std + eps)` within each group.

    `std` is the unbiased one (ddof 1). The paper divides by std; the ddof and `eps` follow TRL's GRPOTrainer, to the
    bit. As there, a NaN reward marks a rollout that no reward function could score: it is left out of mean and std, and
    its advantage is 0. A group with equal rewards has advantages of 0.

    Args:
        rewards: `[groups, n]`, any unit; verified correctness is 0 or 1.
        scale: `"group"` divides by the group's std (GRPO, paper), `"none"` only centres (LUFFY's published code).
        eps: added to std, in units of reward. 0 is allowed.

    Returns:
        `[groups, n]`, dimensionless for `"group"`, in units of reward for `"none"`.

    Raises:
        ValueError: if `scale` is unknown, `eps` is negative, `rewards` is not `[groups, n]` with n >= 2, or a reward is
            infinite.
    """
    if scale not in ("group", "none"):
        raise ValueError(
            f"scale is {scale!r}; allowed are 'group' and 'none' (TRL's 'batch' is not a group statistic)."
        )
    if not eps >= 0.0:
        raise ValueError(f"eps is {eps}; it must be >= 0. TRL uses 1e-4.")
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)}; [groups, n] with n >= 2 is needed: reshape with .view(-1, n)."
        )
    if bool(rewards.isinf().any()):
        raise ValueError(
            "rewards holds an infinite value; rewards must be finite, or NaN where unscorable: fix the verifier."
        )
    mean = rewards.nanmean(dim=1, keepdim=True)
    advantages = rewards - mean
    if scale == "group":
        count = (~rewards.isnan()).sum(dim=1, keepdim=True)
        # Variance and correction are multiplied in TRL's order: the equality is bitwise, and one scored rollout gives
        # NaN, then 0.
        variance = advantages.square().nanmean(dim=1, keepdim=True) * (count / (count - 1))
        advantages = advantages / (variance.sqrt() + eps)
    return advantages.nan_to_num(nan=0.0)
