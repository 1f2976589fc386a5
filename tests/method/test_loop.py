"""The loop to read: its gradient is GRPO's, a group without contrast moves nothing, and a guide does what it is for."""

import torch
from torch import Generator

from npo_core.method.groups import group_advantages
from npo_core.method.loop import NO_GUIDE, train_table, verified_answers


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def test_an_update_is_the_policy_gradient_of_its_rollouts():
    policy = torch.tensor([[0.5, -0.2, 0.1]])
    right = torch.tensor([1])
    trained, rates = train_table(policy, right, 1, seeded(), n=8, learning_rate=0.5)
    probabilities = policy.softmax(dim=1)
    drawn = torch.multinomial(probabilities, 8, replacement=True, generator=seeded())
    advantages = group_advantages((drawn == 1).float())[0]
    assert advantages.any(), "a draw with contrast"
    score = torch.nn.functional.one_hot(drawn[0], 3) - probabilities
    expected = policy + 0.5 * (advantages[:, None] * score).mean(dim=0)
    torch.testing.assert_close(trained, expected)
    torch.testing.assert_close(rates, probabilities[:, 1])
    assert policy.tolist() == [[0.5, -0.20000000298023224, 0.10000000149011612]], "the given logits stay"


def hopeless() -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts whose right answer never comes up."""
    policy = torch.zeros(2, 3)
    policy[:, 0] = -200.0
    return policy, torch.tensor([0, 0])


def test_all_wrong_groups_teach_nothing_without_a_guide_and_something_with_one():
    policy, right = hopeless()
    torch.testing.assert_close(train_table(policy, right, 5, seeded())[0], policy)
    guided, _ = train_table(policy, right, 5, seeded(), guides=torch.tensor([0, NO_GUIDE]))
    assert guided[0, 0] > policy[0, 0] and (guided[0, 1:] < policy[0, 1:]).all()
    torch.testing.assert_close(guided[1], policy[1])


def test_a_gate_that_is_shut_trains_as_grpo_does():
    policy, right = torch.randn(6, 4, generator=seeded(1)), torch.tensor([0, 1, 2, 3, 0, 1])
    sure = policy.clone()
    sure[torch.arange(6), right] = 30.0
    plain = train_table(sure, right, 3, seeded())[0]
    torch.testing.assert_close(train_table(sure, right, 3, seeded(), guides=right, tau=0.0)[0], plain)


def test_only_right_answers_become_guides():
    policy, right = hopeless()
    policy[0, 0] = 200.0
    assert verified_answers(policy, right, 8, seeded()).tolist() == [0, NO_GUIDE]
