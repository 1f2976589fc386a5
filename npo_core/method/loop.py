"""GRPO, and what NPO adds to it, as one loop to read: a policy that is a table, a response that is one answer.

Deleted from the real trainer (`npo_core.trainer`): tokens, so that a rollout is one draw; the clip, as one update a
batch leaves every ratio at 1; epochs and batches, as every prompt comes in every step. What is left is the method.
"""

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from .groups import gate, group_advantages, pass_rate, place_guides

NO_GUIDE = -1


def train_table(
    policy: Float[Tensor, "prompts answers"],
    right: Int[Tensor, " prompts"],
    steps: int,
    generator: Generator,
    *,
    guides: Int[Tensor, " prompts"] | None = None,
    n: int = 8,
    tau: float = 0.6,
    learning_rate: float = 4.0,
) -> tuple[Float[Tensor, "prompts answers"], Float[Tensor, " steps"]]:
    """Train a table of logits by GRPO, with a guide in the last slot of gated groups where there is one.

    Args:
        policy: Logits of the answers to each prompt; not changed.
        right: The right answer of each prompt.
        steps: Updates.
        generator: Source of the rollouts.
        guides: An answer of a later policy for each prompt, or `NO_GUIDE`; None is plain GRPO.
        n: Rollouts in a group.
        tau: Gate.
        learning_rate: Of plain gradient ascent, per prompt.

    Returns:
        The trained logits, and the chance of a right answer before each step, mean over prompts.
    """
    policy, rates = policy.clone(), torch.zeros(steps)
    for step in range(steps):
        policy.requires_grad_()
        logps = policy.log_softmax(dim=1)
        rates[step] = logps.detach().exp().gather(1, right[:, None]).mean()
        rollouts = torch.multinomial(logps.detach().exp(), n, replacement=True, generator=generator)
        if guides is not None:
            offered = (guides != NO_GUIDE).long()
            gated = gate(pass_rate(rollouts == right[:, None]), offered.bool(), tau)
            rows = place_guides(gated, offered, n)[:, 0]
            rollouts.view(-1)[rows] = guides[rows // n]
        advantages = group_advantages((rollouts == right[:, None]).float())
        chosen = logps.gather(1, rollouts)
        ratio = (chosen - chosen.detach()).exp()  # 1 in value: its gradient is that of log pi
        gain = (ratio * advantages).mean(dim=1).sum()
        (gradient,) = torch.autograd.grad(gain, policy)
        policy = (policy + learning_rate * gradient).detach()
    return policy, rates


def verified_answers(
    policy: Float[Tensor, "prompts answers"], right: Int[Tensor, " prompts"], k: int, generator: Generator
) -> Int[Tensor, " prompts"]:
    """What a policy can show in k rollouts a prompt: the right answer where it came up, else `NO_GUIDE`."""
    drawn = torch.multinomial(policy.softmax(dim=1), k, replacement=True, generator=generator)
    return torch.where((drawn == right[:, None]).any(dim=1), right, NO_GUIDE)
