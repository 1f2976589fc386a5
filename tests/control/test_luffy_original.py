"""LUFFY's training step against its published code, restated as its run script calls it.

https://github.com/ElliottYan/LUFFY at 01f4ae0: `compute_token_on_off_policy_loss` (mix_core_alg.py), `update_policy`
(mix_actor.py) and `compute_grpo_outcome_advantage` (core_algos.py), with the settings of exp_scripts/train.sh.
"""

from typing import NamedTuple

import pytest
import torch
from worlds import WIDTH, Gradients, Guides, SpyTrainer, log_probs, rig, trainer_of, world

from npo_core.runs.config import METHOD_SETTINGS

ROWS, N = 16, 8
LUFFY = METHOD_SETTINGS["luffy"]


def original_advantages(scores: torch.Tensor) -> torch.Tensor:
    """`grpo_use_std=False`: over all rows of a prompt, the teacher's included."""
    return scores - scores.mean(dim=1, keepdim=True)


def original_loss(log_prob, entropy, advantages, response_mask, prefix_mask) -> torch.Tensor:
    """Of one micro-batch: `loss_remove_clip`, `off_policy_reshape=p_div_p_0.1`, `loss_remove_token_mean`."""
    old_log_prob = log_prob.detach()
    on_policy = -advantages * (log_prob - old_log_prob).exp()
    prob = log_prob.exp()
    off_policy = -advantages * (prob / (prob + 0.1))
    losses = torch.where(prefix_mask, off_policy, on_policy)
    policy = (losses * response_mask).sum() / response_mask.shape[-1]  # a sum over rows, by the longest length
    return policy - 0.001 * (entropy * response_mask).sum() / response_mask.sum()


class Step(NamedTuple):
    found: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]
    lengths: set[int]


def a_step(folder, weights_of_rows=torch.ones_like, **arguments) -> Step:
    """One step on two prompts, the first failed, the second solved by three; and the original's gradient on its rows.

    Args:
        weights_of_rows: Factor of each row's advantage in the original's loss, given the rows' lengths.
    """
    tiny, gradients = world("text"), Gradients()
    failed, half = tiny.dataset["uid"][:2]

    def write(row, slot):
        right = row["uid"] == half and slot < 3
        response = tiny.solution(row["uid"]) if right else tiny.mistake(row["uid"])
        return [7] * (slot % 3) + response

    with pytest.MonkeyPatch.context() as patch:
        rig(patch, write)
        trainer = trainer_of(
            tiny,
            folder,
            SpyTrainer,
            prompts=ROWS // N,
            n=N,
            max_grad_norm=0.0,
            guidance=Guides({uid: tiny.guide(uid) for uid in (failed, half)}),
            callbacks=[gradients],
            tau_gate=LUFFY["tau_gate"],
            ratio_mode=LUFFY["ratio_mode"],
            guide_behaviour=LUFFY["guide_behaviour"],
            scale_rewards=LUFFY["advantage_scale"],
            entropy_coef=LUFFY["entropy_bonus"] / ROWS,
            **arguments,
        )
        trainer.train()
    (generated,), (weights, batch) = trainer.generated, trainer.loss_calls[0]
    assert generated["is_guide"].nonzero().flatten().tolist() == [N - 1, 2 * N - 1]
    verdicts = torch.tensor([[0.0] * 7 + [1.0], [1.0] * 3 + [0.0] * 4 + [1.0]])
    torch.testing.assert_close(generated["advantages"].view(-1, N), original_advantages(verdicts))

    model = tiny.build()
    model.load_state_dict(weights)
    scores = log_probs(model, batch)
    entropy = -(scores.exp() * scores).sum(-1)
    logps = scores.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    lengths = batch["completion_mask"].sum(1)
    # TRL shuffles the rows between generation and loss, and pads to the longest row only
    advantages = (batch["advantages"] * weights_of_rows(lengths.float())).unsqueeze(1)
    missing = trainer.max_completion_length - logps.shape[1]
    logps, entropy, mask = (
        torch.nn.functional.pad(each, (0, missing)) for each in (logps, entropy, batch["completion_mask"])
    )
    original_loss(logps, entropy, advantages, mask, batch["is_guide"].unsqueeze(1)).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Step(gradients.steps[0], expected, set(lengths.tolist()))


def distance(step: Step) -> float:
    """Norm of the difference between the original's gradient and ours times the rows, over the original's norm."""
    apart = sum((ROWS * step.found[name] - gradient).square().sum() for name, gradient in step.expected.items())
    size = sum(gradient.square().sum() for gradient in step.expected.values())
    return float((apart / size).sqrt())


def test_the_step_is_the_originals_under_its_own_sum_over_tokens(tmp_path):
    """TRL's dr_grpo divides the original's sum by the rows as well: a constant, and so for the bonus."""
    step = a_step(tmp_path, loss_type="dr_grpo")
    assert len(step.lengths) > 2, "else a mean over each row's tokens would do as well"
    assert distance(step) < 1e-4


def test_the_arms_mean_over_a_rows_tokens_is_the_only_difference(tmp_path):
    """Loss type grpo, which all arms have: each row of the original's sum weighs 1/length in place of 1/width."""
    step = a_step(tmp_path, lambda lengths: WIDTH / lengths, loss_type="grpo")
    assert len(step.lengths) > 2 and distance(step) < 1e-4
